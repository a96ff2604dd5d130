"""Vector instructions that write masks or scalar registers, carry, or move numbers between lanes."""

import re

import numpy as np

from fused_attn.emulator.amd import lanes as L
from fused_attn.emulator.amd.arithmetic import COMPARED, TABLE
from fused_attn.emulator.amd.operands import bits_of, ref, scalar, value, words
from fused_attn.emulator.amd.scalar import Step
from fused_attn.emulator.amd.state import EXEC, Wave, to_bits, to_mask
from fused_attn.emulator.amd.text import Instruction
from fused_attn.emulator.schedule import UnknownInstructionError


def encode(name: str, instruction: Instruction, lanes: int) -> Step | None:
    """What an instruction of these does; None for another."""
    step = _encode(name, instruction, lanes)
    unheeded = "dpp" in instruction.form or "clamp" in instruction.modifiers
    if step and (unheeded or ("sdwa" in instruction.form and not name.startswith("cmp"))):
        raise UnknownInstructionError(instruction.text)
    return step


def _encode(name: str, instruction: Instruction, lanes: int) -> Step | None:
    operands = instruction.operands
    if name.startswith("cmp"):
        return _comparison(name, instruction, lanes)
    if name in ("readfirstlane_b32", "readlane_b32"):
        return _read_lane(name, operands, lanes)
    if name == "writelane_b32":
        index, get, lane = ref(operands[0]).index, scalar(ref(operands[1])), scalar(ref(operands[2]))

        def write_lane(wave: Wave) -> None:
            wave.v[index][lane(wave) % lanes] = get(wave)

        return write_lane
    if name.startswith(("permlane16_b32", "permlanex16_b32")):
        return _permlane(instruction, lanes)
    if name in ("permlane32_swap_b32", "permlane16_swap_b32"):
        return _swapped(name, operands)
    if name.startswith("mbcnt_"):
        return _counted(name, operands, lanes)
    if found := re.match(r"^(add|addc|sub|subb|subrev|subbrev)_co(_ci)?_u32$", name):
        return _with_carry(found[1], operands, lanes)
    if name in ("mad_u64_u32", "mad_i64_i32"):
        return _mad64(name, operands, lanes)
    if name.startswith(("div_scale", "div_fmas")):
        return _divided(name, operands, lanes)
    return None


def _comparison(name: str, instruction: Instruction, lanes: int) -> Step:
    found = re.match(r"^cmp(x)?_(\w+)_([fui]\d\d)$", name)
    if found is None or found[2] not in COMPARED:
        raise UnknownInstructionError(instruction.text)
    kinds = (found[3], "u32" if found[2] == "class" else found[3])
    operands = list(instruction.operands)
    count, target = lanes // 32, ref(operands[0]) if len(operands) == 3 else None
    a, b = L.sources(instruction, kinds, operands[-2:])
    compare, executes = COMPARED[found[2]], found[1] is not None

    def step(wave: Wave) -> None:
        bits = to_bits(np.asarray(compare(a(wave), b(wave)), bool) & wave.mask)
        if target is not None:
            wave.write_scalar(target.index, bits, count)
        if executes:
            wave.write_scalar(EXEC, bits, count)

    return step


def _read_lane(name: str, operands: tuple[str, ...], lanes: int) -> Step:
    target, source = ref(operands[0]).index, words(ref(operands[1]), "u32", 0)
    lane = scalar(ref(operands[2])) if len(operands) > 2 else None

    def step(wave: Wave) -> None:
        which = lane(wave) % lanes if lane is not None else int(wave.mask.argmax())
        wave.write_scalar(target, int(np.broadcast_to(source(wave), lanes)[which]), 1)

    return step


def _permlane(instruction: Instruction, lanes: int) -> Step:
    target, source, low, high = (ref(x) for x in instruction.operands)
    selected = scalar(low), scalar(high)
    inactive, zero = L.numbers(instruction.modifiers, "op_sel", (0, 0))

    def step(wave: Wave) -> None:
        lane = L.permlane16(instruction, lanes, selected[0](wave) | selected[1](wave) << 32)
        there = wave.mask[lane] | bool(inactive)
        found = np.where(there, wave.v[source.index][lane], np.uint32(0))
        np.copyto(wave.v[target.index], found, where=wave.mask & (there | bool(zero)))

    return step


def _swapped(name: str, operands: tuple[str, ...]) -> Step:
    """The odd halves, or rows of 16, of the first with the even ones of the second."""
    a, b = (ref(x).index for x in operands)
    size = 32 if name.startswith("permlane32") else 16

    def step(wave: Wave) -> None:
        first, second = (wave.v[x].reshape(-1, 2, size).copy() for x in (a, b))
        wave.write(a, np.stack((first[:, 0], second[:, 0]), 1).reshape(-1))
        wave.write(b, np.stack((first[:, 1], second[:, 1]), 1).reshape(-1))

    return step


def _counted(name: str, operands: tuple[str, ...], lanes: int) -> Step:
    """v_mbcnt: a number, and how many bits of a mask stand for lanes before this one, of the lower or upper 32."""
    target, mask, more = ref(operands[0]).index, value(ref(operands[1]), "u32"), value(ref(operands[2]), "u32")
    lane = np.arange(lanes)
    before = np.clip(lane - (32 if "_hi" in name else 0), 0, 32)
    below = ((1 << before) - 1).astype(np.uint64)
    places = np.arange(32, dtype=np.uint64)

    def step(wave: Wave) -> None:
        bits = np.broadcast_to(mask(wave), lanes).astype(np.uint64) & below
        wave.write(target, ((bits[:, None] >> places & np.uint64(1)).sum(1).astype(np.uint32) + more(wave)).astype(np.uint32))

    return step


def _with_carry(kind: str, operands: tuple[str, ...], lanes: int) -> Step:
    target, carried = ref(operands[0]).index, ref(operands[1]).index
    a, b = (value(ref(x), "u32") for x in operands[2:4])
    given = scalar(ref(operands[4]), lanes // 32) if len(operands) > 4 else None

    def step(wave: Wave) -> None:
        x, y = (np.asarray(get(wave), np.int64) for get in (a, b))
        carry = to_mask(given(wave), lanes).astype(np.int64) if given is not None else np.int64(0)
        total = x + y + carry if kind.startswith("add") else y - x - carry if kind.endswith("rev") else x - y - carry
        wave.write(target, (total & 0xFFFFFFFF).astype(np.uint32))
        over = np.broadcast_to(total >> 32 != 0, lanes)
        wave.write_scalar(carried, to_bits(over & wave.mask), lanes // 32)

    return step


def _mad64(name: str, operands: tuple[str, ...], lanes: int) -> Step:
    """A product of 32-bit numbers and a sum of 64 bits, and its carry."""
    target, carried = ref(operands[0]).index, ref(operands[1]).index
    narrow, wide = ("u32", "u64") if "u64" in name else ("i32", "i64")
    a, b, c = (value(ref(x), kind) for x, kind in zip(operands[2:], (narrow, narrow, wide), strict=True))
    dtype = np.uint64 if wide == "u64" else np.int64

    def step(wave: Wave) -> None:
        product, more = np.asarray(a(wave), dtype) * np.asarray(b(wave), dtype), c(wave)
        total = product + more
        low, high = bits_of(total, wide)
        wave.write(target, low)
        wave.write(target + 1, high)
        over = total < more if wide == "u64" else (product ^ total) & (more ^ total) < 0
        wave.write_scalar(carried, to_bits(np.broadcast_to(over, lanes) & wave.mask), lanes // 32)

    return step


def _divided(name: str, operands: tuple[str, ...], lanes: int) -> Step:
    """v_div_scale leaves numbers far from the ends of the range as they are, and v_div_fmas is a sum then; no other case is
    modelled."""
    kind = name[-3:]
    target = ref(operands[0]).index
    if name.startswith("div_fmas"):
        gets, function = [value(ref(x), kind) for x in operands[1:]], TABLE[f"fma_{kind}"][2]

        def fused(wave: Wave) -> None:
            for i, word in enumerate(bits_of(function(*[get(wave) for get in gets]), kind)):
                wave.write(target + i, word)

        return fused
    carried = ref(operands[1]).index
    taken, denominator, numerator = (value(ref(x), kind) for x in operands[2:])
    least, most = (-100, 90) if kind == "f32" else (-900, 900)

    def scaled(wave: Wave) -> None:
        n, d = (np.broadcast_to(get(wave), lanes)[wave.mask] for get in (numerator, denominator))
        usual = (n != 0) & (d != 0) & np.isfinite(n) & np.isfinite(d)
        exponents = [np.frexp(x[usual])[1] for x in (n, d)]
        if any(((x < least) | (x > most)).any() for x in (*exponents, exponents[0] - exponents[1])):
            raise UnknownInstructionError(f"v_{name} of numbers that it has to scale")
        for i, word in enumerate(bits_of(taken(wave), kind)):
            wave.write(target + i, word)
        wave.write_scalar(carried, 0, lanes // 32)

    return scaled
