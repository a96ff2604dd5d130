"""Instructions whose work goes on behind the warp's back: copies, mbarriers, products of warp groups, descriptors."""

import re

from fused_attn.emulator.operands import Code, Slots
from fused_attn.emulator.ptx import BYTES, listed, split_operands

# As in machine/products.h.
FROM_REGISTERS, A_ACROSS, B_ACROSS, OF_BF16 = 1, 2, 4, 8
_MAP_FIELDS = ("other", "global_address", "rank", "box_dim", "global_dim", "global_stride", "swizzle_mode", "fill_mode",
               "elemtype")


class Asynchronous(Slots):
    """Each method encodes a family: the operands of an instruction and its modifiers, or None for what is not known."""

    def _cp(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        if mods[:2] in (["async", "cg"], ["async", "ca"]):
            target, target_offset, _ = self.pointed(args[0])
            source, source_offset, _ = self.pointed(args[1])
            valid = [self.slot(args[3])] if len(args) > 3 else []
            return Code("CP_ASYNC", [], [target, source, *valid], size=int(args[2], 0), mode=source_offset,
                        offset=target_offset)
        if mods[:2] == ["async", "commit_group"]:
            return Code("CP_COMMIT")
        if mods[:2] in (["async", "wait_group"], ["async", "wait_all"]):
            return Code("CP_WAIT", offset=int(args[0], 0) if args else -1)
        if mods[:3] == ["async", "bulk", "commit_group"]:
            return Code("BULK_COMMIT")
        if mods[:3] == ["async", "bulk", "wait_group"]:
            return Code("BULK_WAIT", offset=int(args[0], 0))
        if mods[:3] == ["async", "bulk", "tensor"] and {"tile", "im2col"} & set(mods) != {"im2col"}:
            return self._bulk_tensor(args, store=mods[4] == "global")
        return None

    def _bulk_tensor(self, args: tuple[str, ...], store: bool) -> Code:
        smem, box = (args[1], args[0]) if store else (args[0], args[1])
        base, offset, _ = self.pointed(smem)
        pointer, at = split_operands(box.strip("[] "))
        coordinates = listed(at)
        barrier = [] if store else [self.pointed(args[2])[0]]
        return Code("BULK", [], [base, self.slot(pointer), *self.each(coordinates), *barrier], count=len(coordinates),
                    mode=int(store), offset=offset)

    def _mbarrier(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        if mods[0] in ("init", "inval"):
            base, offset, flags = self.pointed(args[0])
            op = "BARRIER_SET" if mods[0] == "init" else "BARRIER_DROP"
            return Code(op, [], [base, *self.each(args[1:])], flags=flags, offset=offset)
        if mods[0] == "arrive":
            base, offset, flags = self.pointed(args[1])
            return Code("BARRIER_ARRIVE", [], [base, *self.each(args[2:3])], mode=int("expect_tx" in mods), flags=flags,
                        offset=offset)
        if mods[:2] == ["try_wait", "parity"]:
            base, offset, flags = self.pointed(args[1])
            return Code("BARRIER_TRY", [self.slot(args[0])], [base, self.slot(args[2])], flags=flags, offset=offset)
        return None

    def _wgmma(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        if mods[0] in ("fence", "commit_group", "wait_group"):
            return Code({"fence": "WGMMA_FENCE", "commit_group": "WGMMA_COMMIT", "wait_group": "WGMMA_WAIT"}[mods[0]],
                        offset=int(args[0], 0) if args else 0)
        shape = re.fullmatch(r"m64n(\d+)k16", mods[3])
        d, a, b, scale, *flags = args
        numbers = [int(x, 0) for x in flags]
        if shape is None or mods[4] != "f32" or mods[5] != mods[6] or mods[5] not in ("f16", "bf16") or numbers[:2] != [1, 1]:
            return None
        registers = a.startswith("{")
        mode = (FROM_REGISTERS if registers else A_ACROSS * numbers[2]) | B_ACROSS * numbers[-1] | OF_BF16 * (mods[5] == "bf16")
        flag = self.slot(scale) if self.is_register(scale) else self.constant(-int(self.value(scale) != 0), 4)
        return Code("WGMMA", self.each(listed(d)), [*self.each(listed(a), 4 if registers else 8), self.slot(b, 8), flag],
                    size=int(shape[1]), mode=mode)

    def _tcgen05(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        what, *others = mods
        if what.startswith("fence") or what == "relinquish_alloc_permit":
            return Code("NOTHING")
        if what in ("wait_ld", "wait_st"):
            return Code("TENSOR_WAIT_LOAD" if what == "wait_ld" else "TENSOR_WAIT_STORE")
        if what in ("ld", "st"):
            return self._tensor_move(args, others, what)
        if "cta_group_1" not in others:
            return None
        if what == "alloc":
            base, offset, flags = self.pointed(args[0])
            return Code("TENSOR_ALLOCATE", [], [base, self.slot(args[1])], flags=flags, offset=offset)
        if what == "dealloc":
            return Code("TENSOR_FREE", [], self.each(args))
        if what == "commit" and "multicast_cluster" not in others:
            base, offset, flags = self.pointed(args[0])
            return Code("TENSOR_COMMIT", [], [base], flags=flags, offset=offset)
        if what == "mma" and others[-1] == "kind_f16" and len(args) == 5:
            d, d_offset, _ = self.pointed(args[0])
            inside = args[1].startswith("[")
            a, a_offset, _ = self.pointed(args[1]) if inside else (self.slot(args[1], 8), 0, 0)
            reads = [d, a, self.slot(args[2], 8), self.slot(args[3]), self.slot(args[4])]
            return Code("TENSOR_MULTIPLY", [], reads, size=d_offset, mode=int(inside), offset=a_offset)
        return None

    def _tensor_move(self, args: tuple[str, ...], mods: list[str], what: str) -> Code | None:
        shape = next((mod for mod in mods if mod in ("32x32b", "16x32bx2")), None)
        if shape is None or any(mod.startswith(("pack", "unpack")) for mod in mods):
            return None
        where, values = (args[1], args[0]) if what == "ld" else (args[0], args[-1])
        base, offset, _ = self.pointed(where)
        split = int(args[2 if what == "ld" else 1], 0) if shape == "16x32bx2" else 0
        slots = self.each(listed(values))
        writes, reads = (slots, [base]) if what == "ld" else ([], [base, *slots])
        return Code("TENSOR_LOAD" if what == "ld" else "TENSOR_STORE", writes, reads, size=split, count=len(slots),
                    mode=int(shape == "16x32bx2"), offset=offset)

    def _tensormap(self, args: tuple[str, ...], mods: list[str]) -> Code:
        if mods[0] == "cp_fenceproxy":
            source, offset, flags = self.pointed(args[1])
            return Code("MAP_PUBLISH", [], [self.pointed(args[0])[0], source], flags=flags, offset=offset)
        base, offset, flags = self.pointed(args[0])
        size = BYTES[mods[-1]]
        field = mods[2] if mods[2] in _MAP_FIELDS else "other"
        ordinal = int(args[1], 0) if len(args) == 3 else 0
        return Code("MAP_REPLACE", [], [base, self.slot(args[-1], size)], size=size, count=ordinal,
                    mode=_MAP_FIELDS.index(field), flags=flags, offset=offset)
