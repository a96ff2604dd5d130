"""Instructions to what the machine executes: numbers of opcodes, slots of their operands, targets of branches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fused_attn.emulator import flow, opcodes
from fused_attn.emulator.asynchronous import Asynchronous
from fused_attn.emulator.operands import Code
from fused_attn.emulator.ptx import BYTES, Instruction, Kernel, address, listed
from fused_attn.emulator.schedule import UnknownInstructionError

# What the machine does other than arithmetic, in the order of its numbers, which follow those of the table.
HANDLERS = ("NOTHING", "BRANCH", "BRANCH_TABLE", "EXIT", "LOAD", "STORE", "ATOM", "SHUFFLE", "VOTE", "LOAD_MATRIX",
            "STORE_MATRIX", "PACK", "UNPACK", "MMA", "BARRIER", "CP_ASYNC", "CP_COMMIT", "CP_WAIT", "BULK", "BULK_COMMIT",
            "BULK_WAIT", "BARRIER_SET", "BARRIER_DROP", "BARRIER_ARRIVE", "BARRIER_TRY", "FENCE_PROXY", "WGMMA", "WGMMA_FENCE",
            "WGMMA_COMMIT", "WGMMA_WAIT", "MAP_REPLACE", "MAP_PUBLISH", "TENSOR_ALLOCATE", "TENSOR_FREE", "TENSOR_LOAD",
            "TENSOR_STORE", "TENSOR_WAIT_LOAD", "TENSOR_WAIT_STORE", "TENSOR_MULTIPLY", "TENSOR_COMMIT")
# Ins in machine/state.h.
_NUMBERS = ("op", "predicate", "negated", "target", "meets", "first", "writes", "reads", "size", "count", "space", "mode",
            "flags", "pad")
INSTRUCTION = np.dtype([*((name, np.int32) for name in _NUMBERS), ("offset", np.int64)])
_WIDE_VALUES, _SIGNED = 2, 4  # flags, as in machine/state.h
_SPACES = {"param": -1, "global": 0, "shared": 1}
_ATOMS = ("add", "add.f32", "add.f64", "exch", "cas", "or", "and", "xor", "max.u", "min.u", "max.s", "min.s")
_SHUFFLES = ("idx", "bfly", "up", "down")
_VOTES = ("ballot", "all", "any", "add", "and", "or", "xor", "min.u", "max.u", "min.s", "max.s", "elect", "activemask",
          "min.f", "max.f")
_MMA = ("m16n8k16.row.col.f32.f16.f16.f32", "m16n8k16.row.col.f32.bf16.bf16.f32", "m16n8k8.row.col.f32.tf32.tf32.f32",
        "m8n8k4.row.col.f64.f64.f64.f64", "m16n8k16.row.col.f64.f64.f64.f64")
# Of one thread's past and future alone, or of what is not modelled: clusters, registers given to other warps, caches.
_NOTHING = ("setmaxnreg", "membar", "griddepcontrol", "prefetch", "prefetchu", "nanosleep", "bar.warp", "discard",
            "applypriority")


class Program(NamedTuple):
    """A kernel for one grid, as machine.c reads it."""

    kernel: Kernel
    code: np.ndarray
    operands: np.ndarray
    frame: np.ndarray  # [slots, 32] words that every warp starts with: constants, and NaN everywhere else
    special: tuple[int, int, int]  # slots of the thread's number, the lane's, and the program's three
    params: np.ndarray
    shared_extra: int  # bytes of shared variables beside what is asked for at the launch
    shifts: tuple[int, int]  # of the smallest accesses to shared and to global memory, at most 4 bytes
    hazards: bool  # whether it has products that run under other instructions


class Encoder(Asynchronous):
    """Encodes the instructions of one kernel."""

    def encode(self, instruction: Instruction) -> Code:
        """Raises UnknownInstructionError for what the machine does not have."""
        code = self._arithmetic(instruction) or self._other(instruction)
        if code is None:
            raise UnknownInstructionError(f"the emulator does not know {instruction.text} ({instruction.where})")
        return code

    def _arithmetic(self, instruction: Instruction) -> Code | None:
        name = instruction.op
        if name.startswith("cvt.") and len(instruction.args) == 2:
            to, source = name.split(".")[-2:]
            if self.wide(instruction.args[1]) and source in BYTES and BYTES[source] < 8:
                name += opcodes.FROM_64
            elif self.wide(instruction.args[0]) and to in BYTES and BYTES[to] < 8:
                name += opcodes.TO_64
        number = opcodes.numbers().get((name, len(instruction.args)))
        if number is None or (instruction.op.startswith("mov") and any(x.startswith("{") for x in instruction.args)):
            return None
        op = opcodes.table()[number]
        for text, kind in zip(instruction.args, op.types, strict=True):
            if self.kernel.type_of(text) is not None and self.wide(text) != (opcodes.lane_bytes(kind) == 8):
                return None  # a register of another width than the table has
        if op.name == "mov.pred" and not self.is_register(instruction.args[1]):
            reads = [self.constant(-1 if self.value(instruction.args[1]) else 0, 4)]
        else:
            operands = zip(instruction.args[1:], op.types[1:], strict=True)
            reads = [self.slot(text, opcodes.lane_bytes(kind)) for text, kind in operands]
        return Code(str(number), [self.slot(instruction.args[0])], reads)

    def _other(self, instruction: Instruction) -> Code | None:
        base, *mods = instruction.op.replace("::", "_").split(".")
        if base in _NOTHING or ".".join((base, *mods[:1])) in _NOTHING:
            return Code("NOTHING")
        family: Callable[[tuple[str, ...], list[str]], Code | None] | None = getattr(self, f"_{base}", None)
        return family(instruction.args, mods) if family is not None else None

    def _mov(self, args: tuple[str, ...], mods: list[str]) -> Code:
        size = BYTES[mods[-1]]
        if args[0].startswith("{"):
            parts = listed(args[0])
            return Code("UNPACK", self.each(parts), [self.slot(args[1], size)], size=size, count=len(parts))
        parts = listed(args[1])
        return Code("PACK", [self.slot(args[0])], self.each(parts, size // len(parts)), size=size, count=len(parts))

    def _cvta(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        base = {"param": self.params.ctypes.data, "global": 0, "to": 0}.get(mods[0])
        if base is None or "shared" in mods:
            return None
        number = opcodes.numbers()["add.s64", 3]
        return Code(str(number), [self.slot(args[0])], [self.slot(args[1], 8), self.constant(base, 8)])

    def _ld(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        return self._access("LOAD", args[0], args[1], mods)

    def _st(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        return self._access("STORE", args[1], args[0], mods)

    def _access(self, op: str, values: str, where: str, mods: list[str]) -> Code | None:
        kind = mods[-1]
        space = next((_SPACES[name] for mod in mods if (name := mod.removesuffix("_cta")) in _SPACES), None)
        if space is None:
            return None
        parts, size = listed(values), BYTES[kind]
        base, offset, flags = (0, self.value(address(where)[0]) + address(where)[1], 0) if space < 0 else self.pointed(where)
        wide = any(self.wide(x) for x in parts) or (op == "STORE" and size == 8)
        flags |= (_WIDE_VALUES if wide else 0) | (_SIGNED if op == "LOAD" and kind[0] == "s" else 0)
        slots = self.each(parts, size)
        common: dict[str, Any] = {"size": size, "count": len(parts), "space": space, "flags": flags, "offset": offset}
        return Code(op, slots, [base], **common) if op == "LOAD" else Code(op, [], [*slots, base], **common)

    def _atom(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        return self._atomic(listed(args[0]), args[1], args[2:], mods)

    def _red(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        return self._atomic(("_",) * len(listed(args[1])), args[0], args[1:], mods)

    def _atomic(self, results: tuple[str, ...], where: str, values: tuple[str, ...], mods: list[str]) -> Code | None:
        kind, how = mods[-1], next((mod for mod in mods if mod in ("add", "exch", "cas", "or", "and", "xor", "max", "min")), "")
        name = f"{how}.{kind}" if how == "add" and kind[0] == "f" else f"{how}.{kind[0]}" if how in ("max", "min") else how
        if name not in _ATOMS or (kind[0] == "f" and how != "add") or not {"global", "shared"} & set(mods):
            return None
        base, offset, flags = self.pointed(where)
        size = BYTES[kind]
        reads = [base, *(slot for text in values for slot in self.each(listed(text), size))]
        return Code("ATOM", self.each(results), reads, size=size, count=len(results), mode=_ATOMS.index(name), flags=flags,
                    space=_SPACES["global" if "global" in mods else "shared"], offset=offset)

    def _shfl(self, args: tuple[str, ...], mods: list[str]) -> Code:
        value, _, valid = args[0].partition("|")
        return Code("SHUFFLE", [self.slot(value), self.slot(valid or "_")], self.each(args[1:4]), mode=_SHUFFLES.index(mods[1]))

    def _vote(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        if args[1].startswith("!"):
            return None
        return Code("VOTE", [self.slot(args[0])], [self.slot(args[1])], mode=_VOTES.index(mods[1]))

    def _redux(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        name = f"{mods[1]}.{mods[-1][0]}" if mods[1] in ("min", "max") else mods[1]
        if name not in _VOTES or "NaN" in mods or "abs" in mods:
            return None
        return Code("VOTE", [self.slot(args[0])], [self.slot(args[1])], mode=_VOTES.index(name))

    def _elect(self, args: tuple[str, ...], mods: list[str]) -> Code:
        lane, _, chosen = args[0].partition("|")
        return Code("VOTE", [self.slot(lane), self.slot(chosen)], [], mode=_VOTES.index("elect"))

    def _activemask(self, args: tuple[str, ...], mods: list[str]) -> Code:
        return Code("VOTE", [self.slot(args[0])], [], mode=_VOTES.index("activemask"))

    def _ldmatrix(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        if "m8n8" not in mods or mods[-1] != "b16":
            return None
        base, offset, flags = self.pointed(args[1])
        parts = listed(args[0])
        return Code("LOAD_MATRIX", self.each(parts), [base], count=len(parts), mode=int("trans" in mods), flags=flags,
                    offset=offset)

    def _stmatrix(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        if "m8n8" not in mods or mods[-1] != "b16":
            return None
        base, offset, flags = self.pointed(args[0])
        parts = listed(args[1])
        return Code("STORE_MATRIX", [], [*self.each(parts), base], count=len(parts), mode=int("trans" in mods), flags=flags,
                    offset=offset)

    def _mma(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        shape = ".".join(mods[2:])
        if shape not in _MMA:
            return None
        size = 8 if ".f64" in shape else 4
        return Code("MMA", self.each(listed(args[0])), [slot for x in args[1:] for slot in self.each(listed(x), size)],
                    mode=_MMA.index(shape))

    def _bar(self, args: tuple[str, ...], mods: list[str]) -> Code | None:
        if not {"sync", "arrive"} & set(mods) or "red" in mods or "cluster" in mods:
            return None
        return Code("BARRIER", [], self.each(args), mode=int("arrive" in mods))

    _barrier = _bar

    def _bra(self, args: tuple[str, ...], mods: list[str]) -> Code:
        return Code("BRANCH", target=self.kernel.labels[args[0]])

    def _brx(self, args: tuple[str, ...], mods: list[str]) -> Code:
        targets = tuple(self.kernel.labels[name] for name in self.kernel.tables[args[1]])
        return Code("BRANCH_TABLE", [], [self.slot(args[0])], count=len(targets), targets=targets)

    def _ret(self, args: tuple[str, ...], mods: list[str]) -> Code:
        return Code("EXIT")

    _exit = _ret

    def _fence(self, args: tuple[str, ...], mods: list[str]) -> Code:
        return Code("FENCE_PROXY" if mods[0] == "proxy" and mods[1].startswith("async") else "NOTHING")


def encode(kernel: Kernel, grid: tuple[int, int, int], dynamic: int) -> Program:
    """A kernel as the machine runs it on a grid with so many bytes of shared memory. Raises UnknownInstructionError."""
    encoder = Encoder(kernel, grid, dynamic)
    numbers = {name: len(opcodes.table()) + k for k, name in enumerate(HANDLERS)}
    code = np.zeros(len(kernel.instructions), INSTRUCTION)
    operands: list[int] = []
    steps = []
    smallest = {0: 4, 1: 4}  # bytes of an access, by space
    for row, instruction in zip(code, kernel.instructions, strict=True):
        found = encoder.encode(instruction)
        row["op"] = numbers[found.op] if found.op in numbers else int(found.op)
        for name in ("size", "count", "space", "mode", "flags", "offset", "target"):
            row[name] = getattr(found, name)
        row["meets"], row["predicate"] = -1, -1
        if instruction.predicate:
            row["predicate"] = encoder.slot(instruction.predicate.lstrip("!"))
            row["negated"] = instruction.predicate[0] == "!"
        row["first"], row["writes"], row["reads"] = len(operands), len(found.writes), len(found.reads)
        operands += [*found.writes, *found.reads, *found.targets]
        targets = found.targets or ((found.target,) if found.op == "BRANCH" else ())
        leaves = found.op == "EXIT"
        steps.append(flow.Step(bool(targets) or leaves, targets, bool(instruction.predicate), leaves))
        if found.op in ("LOAD", "STORE", "ATOM") and found.space >= 0:
            smallest[found.space] = min(smallest[found.space], found.size * found.count)
    for at, meets in flow.meeting_points(steps).items():
        code["meets"][at] = meets
    frame = np.full((encoder.n_slots, 32), 0xFFFFFFFF, np.uint32)
    for (value, size), slot in encoder.constants.items():
        if size == 8:
            frame[slot : slot + 2].reshape(-1).view(np.uint64)[:] = value
        else:
            frame[slot] = value
    hazards = bool(np.isin(code["op"], [numbers["WGMMA"], numbers["TENSOR_LOAD"]]).any())
    special = encoder.tid, encoder.lane, encoder.program
    shifts = smallest[1].bit_length() - 1, smallest[0].bit_length() - 1
    return Program(kernel, code, np.array([*operands, 0], np.int32), frame, special, encoder.params, encoder.shared_extra,
                   shifts, hazards)
