"""Instructions that reach memory: tensors, LDS, a lane's own scratch; and what waits for them."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fused_attn.emulator.amd import lanes as L
from fused_attn.emulator.amd.operands import Ref, ref, scalar, words
from fused_attn.emulator.amd.state import Array, Memory, Pending, Shared, Wave
from fused_attn.emulator.amd.text import Instruction
from fused_attn.emulator.schedule import EmulatorFault, UnknownInstructionError

Reach = Callable[[Wave, Memory, Shared], None]
_NONE: frozenset[int] = frozenset()
# What is loaded or stored: bytes, whether with a sign, which half of the register (None: all of it).
_SIZES: dict[str, tuple[int, bool, int | None]] = {
    "dword": (4, False, None), "dwordx2": (8, False, None), "dwordx3": (12, False, None), "dwordx4": (16, False, None),
    "b32": (4, False, None), "b64": (8, False, None), "b96": (12, False, None), "b128": (16, False, None),
    "ubyte": (1, False, None), "u8": (1, False, None), "sbyte": (1, True, None), "i8": (1, True, None),
    "ushort": (2, False, None), "u16": (2, False, None), "sshort": (2, True, None), "i16": (2, True, None),
    "byte": (1, False, None), "b8": (1, False, None), "short": (2, False, None), "b16": (2, False, None),
    "short_d16": (2, False, 0), "d16_b16": (2, False, 0), "u16_d16": (2, False, 0), "ubyte_d16": (1, False, 0),
    "d16_u8": (1, False, 0), "u8_d16": (1, False, 0), "short_d16_hi": (2, False, 1), "d16_hi_b16": (2, False, 1),
    "u16_d16_hi": (2, False, 1), "b16_d16_hi": (2, False, 1), "ubyte_d16_hi": (1, False, 1), "d16_hi_u8": (1, False, 1),
    "u8_d16_hi": (1, False, 1), "byte_d16_hi": (1, False, 1), "b8_d16_hi": (1, False, 1), "d16_hi_b8": (1, False, 1),
}
_ADDED = {"add_f32": np.float32, "add_f64": np.float64, "pk_add_f16": np.float16, "add": np.uint32, "add_u32": np.uint32,
          "add_u64": np.uint64, "add_x2": np.uint64}


def encode(instruction: Instruction, arch: str, lanes: int) -> Reach | None:
    """What an instruction does to memory; None for one that does nothing to it."""
    op = instruction.op
    if found := re.match(r"^s_load_(?:dword(?:x(\d+))?|b(\d+))$", op):
        return _scalar_load(instruction, int(found[1] or 1) if found[2] is None else int(found[2]) // 32)
    if found := re.match(r"^(buffer|global|scratch)_(load|store)_(\w+)$", op):
        return _tensor(instruction, found[1], found[2], found[3], arch)
    if found := re.match(r"^(buffer|global)_atomic_(\w+)$", op):
        return _atomic(instruction, found[1], found[2], arch)
    if op == "ds_read_b64_tr_b16":
        return _transposed(instruction)
    if found := re.match(r"^ds_(read|load|write|store)(2st64|2|_2addr_stride64|_2addr)?_(\w+)$", op):
        pair = (found[2] or "").replace("_2addr_stride", "2st").replace("_2addr", "2")
        return _shared(instruction, found[1] in ("write", "store"), pair, found[3])
    if op in ("ds_bpermute_b32", "ds_permute_b32", "ds_swizzle_b32"):
        return _exchanged(instruction, lanes)
    if op in ("buffer_gl0_inv", "buffer_gl1_inv", "buffer_wbl2", "buffer_inv", "buffer_wbinvl1", "buffer_wbinvl1_vol"):
        return lambda wave, memory, shared: None
    if op.startswith("s_waitcnt"):
        return _wait(instruction)
    return None


def fills(instruction: Instruction) -> str | None:
    """The queue of a load, which fills its first operand in the order of that queue. Scalar loads come in any order: None."""
    if re.match(r"^(buffer|global|scratch)_load", instruction.op):
        return "vm"
    return "lgkm" if re.match(r"^ds_(read|load|bpermute|permute|swizzle)", instruction.op) else None


def _registers(source: Ref) -> frozenset[int]:
    return frozenset(source.registers())


def _wait(instruction: Instruction) -> Reach:
    text = " ".join(instruction.operands)
    if found := re.match(r"^s_waitcnt_(vs|vm|lgkm)cnt$", instruction.op):
        most = {found[1]: int(text.split(",")[1], 0)}
    else:
        names = {"vmcnt": "vm", "lgkmcnt": "lgkm", "vscnt": "vs"}
        most = {names[name]: int(number) for name, number in re.findall(r"(vmcnt|lgkmcnt|vscnt)\((\d+)\)", text)}
        if re.match(r"^(0x)?0+$", text):
            most = {"vm": 0, "lgkm": 0}
        elif not most and "depctr" not in instruction.op and "expcnt" not in text:
            raise UnknownInstructionError(f"a wait for {text}")

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        for queue, number in most.items():
            wave.wait(queue, number)

    return step


def _scalar_load(instruction: Instruction, count: int) -> Reach:
    target, base = (ref(operand) for operand in instruction.operands[:2])
    written, more = ref(instruction.operands[2]), int(instruction.modifiers.get("offset", "0"), 0)
    fixed = int(written.constant, 0) if written.kind == "c" else 0
    offset = scalar(written) if written.kind == "s" else lambda wave: fixed
    address, filled = scalar(base, 2), _registers(target)

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        where = np.array([address(wave) + offset(wave) + more], np.int64)
        words = memory.read(where, 4 * count)[0].view(np.uint32)
        for i, word in enumerate(words):
            wave.write_scalar(target.index + i, int(word), 1)
        wave.issue("lgkm", Pending(filled, scalar=True))

    return step


Place = Callable[[Wave, int], tuple[Array, Array]]  # (lanes that reach memory, their addresses), of as many bytes


def _buffer(instruction: Instruction, offset: str, resource: str, base: str) -> Place:
    """A buffer is (address, stride, bytes, flags): beyond its bytes loads give 0 and stores do nothing."""
    if "idxen" in instruction.modifiers or "lds" in instruction.modifiers:
        raise UnknownInstructionError(instruction.text)
    described, moved = ref(resource).index, scalar(ref(base))
    own = words(ref(offset), "u32", 0) if "offen" in instruction.modifiers else lambda wave: np.zeros(wave.lanes, np.uint32)
    fixed = int(instruction.modifiers.get("offset", "0"), 0)

    def place(wave: Wave, width: int) -> tuple[Array, Array]:
        first, second, size = wave.s[described : described + 3]
        start, shift = first | (second & 0xFFFF) << 32, moved(wave)
        offsets = own(wave).astype(np.int64) + fixed
        lanes = np.flatnonzero(wave.mask & (offsets + width + shift <= size))
        return lanes, offsets[lanes] + start + shift

    return place


def _global(instruction: Instruction, address: str, base: str | None) -> Place:
    fixed = int(instruction.modifiers.get("offset", "0"), 0)
    source = ref(address)
    start = scalar(ref(base), 2) if base not in (None, "off") else None
    low, high = words(source, "u64", 0), words(source, "u64", 1)

    def place(wave: Wave, width: int) -> tuple[Array, Array]:
        lanes = np.flatnonzero(wave.mask)
        found = low(wave)[lanes].astype(np.int64)
        if start is not None:
            return lanes, found + start(wave) + fixed
        return lanes, found + (high(wave)[lanes].astype(np.int64) << 32) + fixed

    return place


def _scratch_place(instruction: Instruction, own: str, base: str) -> Callable[[Wave], Array]:
    fixed = int(instruction.modifiers.get("offset", "0"), 0)
    a = words(ref(own), "u32", 0) if own != "off" else None
    b = scalar(ref(base)) if base != "off" else None
    return lambda wave: np.zeros(wave.lanes, np.int64) + fixed + (a(wave) if a else 0) + (b(wave) if b else 0)


def _loaded(wave: Wave, target: int, lanes: Array, found: Array, size: tuple[int, bool, int | None]) -> None:
    """Bytes [lanes, width] into registers; the other active lanes, which are out of a buffer, get 0."""
    width, signed, half = size
    words = np.zeros((wave.lanes, max(1, width // 4)), np.uint32)
    if width >= 4:
        words[lanes] = np.ascontiguousarray(found).view(np.uint32)
    else:
        number = np.ascontiguousarray(found).view({1: np.uint8, 2: np.uint16}[width])[:, 0]
        words[lanes, 0] = (number.view({1: np.int8, 2: np.int16}[width]).astype(np.int32).view(np.uint32) if signed
                           else number.astype(np.uint32))
    if half is not None:
        kept = wave.v[target] & np.uint32(0xFFFF if half else 0xFFFF0000)
        words[:, 0] = kept | words[:, 0] << np.uint32(16 * half)
    for i in range(words.shape[1]):
        wave.write(target + i, words[:, i])


def _stored(wave: Wave, source: Ref, lanes: Array, size: tuple[int, bool, int | None]) -> Array:
    """Registers as bytes [lanes, width]."""
    width, _, half = size
    words = np.ascontiguousarray(wave.v[source.index : source.index + max(1, width // 4)][:, lanes].T)
    if half:
        words = words >> np.uint32(16)
    return np.ascontiguousarray(words).view(np.uint8)[:, :width]


def _tensor(instruction: Instruction, space: str, what: str, size: str, arch: str) -> Reach:
    if size not in _SIZES:
        raise UnknownInstructionError(instruction.text)
    measure, operands, loads = _SIZES[size], instruction.operands, what == "load"
    if space == "buffer":
        held, place = ref(operands[0]), _buffer(instruction, *operands[1:4])
    else:
        held = ref(operands[0 if loads else 1])
        address, base = operands[1 if loads else 0], operands[2] if len(operands) > 2 else None
        if space == "scratch":
            return _own(held, loads, _scratch_place(instruction, address, base or "off"), measure, arch)
        place = _global(instruction, address, base)
    filled = _registers(held) if loads else _NONE
    queue = "vm" if loads or arch.startswith("gfx9") else "vs"

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        lanes, addresses = place(wave, measure[0])
        if loads:
            found = memory.read(addresses, measure[0]) if lanes.size else np.zeros((0, measure[0]), np.uint8)
            _loaded(wave, held.index, lanes, found, measure)
        elif lanes.size:
            memory.write(addresses, _stored(wave, held, lanes, measure))
        wave.issue(queue, Pending(filled))

    return step


def _own(held: Ref, loads: bool, place: Callable[[Wave], Array], size: tuple[int, bool, int | None], arch: str) -> Reach:
    """A lane's scratch."""
    filled, width = _registers(held) if loads else _NONE, size[0]

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        lanes = np.flatnonzero(wave.mask)
        places = place(wave)[lanes]
        if lanes.size and (places.min() < 0 or places.max() + width > wave.scratch.shape[1]):
            raise EmulatorFault(f"scratch byte {places.max()} of {wave.scratch.shape[1]}")
        where = lanes[:, None], places[:, None] + np.arange(width)
        if loads:
            _loaded(wave, held.index, lanes, wave.scratch[where], size)
        else:
            wave.scratch[where] = _stored(wave, held, lanes, size)
        wave.issue("vm" if loads or arch.startswith("gfx9") else "vs", Pending(filled))

    return step


def _atomic(instruction: Instruction, space: str, what: str, arch: str) -> Reach:
    exchanges = what in ("cmpswap", "cmpswap_b32")
    if not exchanges and what not in _ADDED:
        raise UnknownInstructionError(instruction.text)
    dtype, operands = np.dtype(_ADDED.get(what, np.uint32)), list(instruction.operands)
    returns = "glc" in instruction.modifiers or "sc0" in instruction.modifiers
    if space == "buffer":
        held = target = ref(operands[0])
        place = _buffer(instruction, *operands[1:4])
    else:
        target = ref(operands.pop(0)) if returns else ref(operands[1])
        held, place = ref(operands[1]), _global(instruction, operands[0], operands[2] if len(operands) > 2 else None)
    width = max(4, dtype.itemsize)

    def changed(memory: Memory, addresses: Array, values: Array) -> Array:
        """Values [lanes, n] added, of packed ones both; or (what is to be there, what must have been)."""
        if exchanges:
            new, old = values.T
            return memory.change(addresses, dtype, lambda lanes, x: np.where(x == old[lanes], new[lanes], x))[:, None]

        def add(which: int) -> Array:
            part = values[:, which]
            return memory.change(addresses + which * dtype.itemsize, dtype, lambda lanes, x: x + part[lanes])

        return np.ascontiguousarray(np.stack([add(which) for which in range(values.shape[1])], 1))

    filled = _registers(target.part(0, width // 4)) if returns else _NONE
    queue = "vm" if returns or arch.startswith("gfx9") else "vs"

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        lanes, addresses = place(wave, width)
        if lanes.size:
            before = changed(memory, addresses, _stored(wave, held, lanes, (width * (1 + exchanges), False, None)).view(dtype))
            if returns:
                _loaded(wave, target.index, lanes, before.view(np.uint8), (width, False, None))
        wave.issue(queue, Pending(filled))

    return step


def _shared(instruction: Instruction, writes: bool, pair: str, size: str) -> Reach:
    if size not in _SIZES:
        raise UnknownInstructionError(instruction.text)
    measure, operands, modifiers = _SIZES[size], instruction.operands, instruction.modifiers
    width = measure[0]
    address = words(ref(operands[0 if writes else 1]), "u32", 0)
    step_of = {"": 1, "2": width, "2st64": 64 * width}[pair]
    offsets = ([int(modifiers.get(f"offset{i}", "0"), 0) * step_of for i in range(2)] if pair
               else [int(modifiers.get("offset", "0"), 0)])
    count = max(1, width // 4)
    held = [ref(operands[1 + i]) if writes else ref(operands[0]).part(i * count, count) for i in range(len(offsets))]
    filled = frozenset() if writes else _registers(ref(operands[0]))

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        lanes = np.flatnonzero(wave.mask)
        first = address(wave)[lanes].astype(np.int64)
        touched = []
        for offset, each in zip(offsets, held, strict=True):
            places = shared.at(first + offset & 0xFFFFFFFF, width)
            touched.append(places.reshape(-1))
            if writes:
                shared.write(places, _stored(wave, each, lanes, measure), wave.number)
            else:
                _loaded(wave, each.index, lanes, shared.read(places, wave.number), measure)
        wave.issue("lgkm", Pending(filled, shared=(np.concatenate(touched), writes)))

    return step


def _transposed(instruction: Instruction) -> Reach:
    """Each lane reads 4 neighbours of 16 bits; of 16 lanes, which hold 4 rows of 16, lane i gets column i."""
    target, address = ref(instruction.operands[0]), words(ref(instruction.operands[1]), "u32", 0)
    offset, filled = int(instruction.modifiers.get("offset", "0"), 0), _registers(target)

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        if not wave.all:
            raise EmulatorFault("a transposing load by some lanes of a wave")
        places = shared.at(address(wave).astype(np.int64) + offset, 8)
        rows = np.ascontiguousarray(shared.read(places, wave.number)).view(np.uint16).reshape(-1, 4, 16)
        columns = np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(wave.lanes, 4).view(np.uint32)
        for i in range(2):
            wave.v[target.index + i] = columns[:, i]
        wave.issue("lgkm", Pending(filled, shared=(places.reshape(-1), False)))

    return step


def _exchanged(instruction: Instruction, lanes: int) -> Reach:
    """Numbers of other lanes, by way of LDS but without touching it."""
    target, *operands = (ref(operand) for operand in instruction.operands)
    name, filled = instruction.op, _registers(target)
    fixed = L.swizzled(instruction.modifiers["offset"], lanes) if name == "ds_swizzle_b32" else None
    more = int(instruction.modifiers.get("offset", "0"), 0) if fixed is None else 0

    def step(wave: Wave, memory: Memory, shared: Shared) -> None:
        data = wave.v[operands[-1].index]
        which = fixed if fixed is not None else ((wave.v[operands[0].index].astype(np.int64) + more) // 4 % lanes)
        found: Any = np.zeros(lanes, np.uint32)
        if name == "ds_permute_b32":
            active = np.flatnonzero(wave.mask)
            found[which[active]] = data[active]
        else:
            found = np.where(wave.mask[which], data[which], np.uint32(0))
        wave.write(target.index, found)
        wave.issue("lgkm", Pending(filled))

    return step
