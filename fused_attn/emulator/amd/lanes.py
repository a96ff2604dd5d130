"""Where a lane's operands come from: other lanes (DPP, permutes), parts of a register (SDWA)."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fused_attn.emulator.amd.operands import Ref, as_type, ref, value, words
from fused_attn.emulator.amd.state import Array, Wave
from fused_attn.emulator.amd.text import Instruction
from fused_attn.emulator.schedule import UnknownInstructionError

Get = Callable[[Wave], Any]
_PARTS = {"DWORD": (0, 32), "WORD_0": (0, 16), "WORD_1": (16, 16), **{f"BYTE_{i}": (8 * i, 8) for i in range(4)}}


def numbers(modifiers: dict[str, str], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A modifier such as op_sel:[0,1]."""
    return tuple(int(x) for x in modifiers[name].strip("[]").split(",")) if name in modifiers else default


def dpp(modifiers: dict[str, str], lanes: int) -> tuple[Array, Array, Array, bool]:
    """([lanes] the lane that each reads, whether there is one, whether it is written at all, whether none reads as 0)."""
    if "fi" in modifiers:
        raise UnknownInstructionError("DPP that reads lanes which are not active")
    lane = np.arange(lanes)
    row, place = lane - lane % 16, lane % 16
    source, there = _moved(modifiers, lane, row, place, lanes)
    rows, banks = (int(modifiers.get(name, "0xf"), 0) for name in ("row_mask", "bank_mask"))
    written = (rows >> lane // 16 % 4 & 1).astype(bool) & (banks >> place // 4 & 1).astype(bool)
    return np.where(there, source, lane), there, written, "bound_ctrl" in modifiers


def _moved(modifiers: dict[str, str], lane: Array, row: Array, place: Array, lanes: int) -> tuple[Array, Array]:
    every = np.ones(lane.size, bool)
    for name, text in modifiers.items():
        if name == "quad_perm":
            return lane - lane % 4 + np.array(numbers(modifiers, name, ()))[lane % 4], every
        if name == "row_mirror":
            return row + 15 - place, every
        if name == "row_half_mirror":
            return lane - lane % 8 + 7 - lane % 8, every
        by = int(text, 0) if re.match(r"^(0x)?\d+$", text) else 0
        if name == "row_shl":
            return lane + by, place + by < 16
        if name == "row_shr":
            return lane - by, place >= by
        if name == "row_ror":
            return row + (place - by) % 16, every
        if name in ("row_share", "row_newbcast"):
            return row + by, every
        if name == "row_xmask":
            return row + (place ^ by), every
        if name == "row_bcast":  # the last lane of a row, or of two, to all of the next
            width = by + 1
            return lane // width * width - 1, lane >= width
        if name in ("wave_shl", "wave_shr", "wave_rol", "wave_ror"):
            moved = lane + (1 if name.endswith("l") else -1)
            return moved % lanes, every if "_ro" in name else (moved >= 0) & (moved < lanes)
    raise UnknownInstructionError(f"DPP with {modifiers}")


def moved(get: Get, how: tuple[Array, Array, Array, bool]) -> tuple[Get, Callable[[Wave], Array]]:
    """A source through DPP; and which lanes are written."""
    source, there, written, zero = how

    def read(wave: Wave) -> Any:
        found = np.broadcast_to(get(wave), wave.lanes)[source]
        return np.where(there & wave.mask[source], found, np.zeros(1, found.dtype))

    def enabled(wave: Wave) -> Array:
        found: Array = wave.mask & written & (zero | there & wave.mask[source])
        return found

    return read, enabled


def part(word: Get, selected: str, signed: bool) -> Get:
    """A part of 32-bit words, as SDWA selects it, widened."""
    shift, bits = _PARTS[selected]
    if bits == 32:
        return word
    low, cut = np.uint32(shift), np.uint32((1 << bits) - 1)
    if not signed:
        return lambda wave: word(wave) >> low & cut
    up = np.int32(32 - bits)
    return lambda wave: ((word(wave) >> low & cut).view(np.int32) << up >> up).view(np.uint32)


def placed(result: Any, before: Array, modifiers: dict[str, str]) -> Any:
    """32-bit results where SDWA puts them in what was there."""
    shift, bits = _PARTS[modifiers.get("dst_sel", "DWORD")]
    if bits == 32:
        return result
    cut = np.uint32((1 << bits) - 1)
    field = (np.asarray(result, np.uint32) & cut) << np.uint32(shift)
    unused = modifiers.get("dst_unused", "UNUSED_PAD")
    if unused == "UNUSED_PRESERVE":
        return field | before & ~np.uint32(int(cut) << shift)
    if unused == "UNUSED_SEXT":
        up = np.int32(32 - bits - shift)
        return (field.view(np.int32) << up >> up).view(np.uint32)
    return field


def half(result: Any, before: Array, upper: bool) -> Any:
    """16 bits in the lower or upper half of what was there."""
    return before & np.uint32(0xFFFF if upper else 0xFFFF0000) | result << np.uint32(16 * upper)


def swizzled(text: str, lanes: int) -> Array:
    """The lane that each reads by ds_swizzle's offset."""
    lane = np.arange(lanes)
    if found := re.match(r"^swizzle\(SWAP,\s*(\d+)\)$", text):
        return lane ^ int(found[1])
    if found := re.match(r"^swizzle\(REVERSE,\s*(\d+)\)$", text):
        return lane ^ int(found[1]) - 1
    if found := re.match(r"^swizzle\(BROADCAST,\s*(\d+),\s*(\d+)\)$", text):
        return lane - lane % int(found[1]) + int(found[2])
    if found := re.match(r"^swizzle\(QUAD_PERM,\s*(\d),\s*(\d),\s*(\d),\s*(\d)\)$", text):
        return lane - lane % 4 + np.array([int(x) for x in found.groups()])[lane % 4]
    if found := re.match(r'^swizzle\(BITMASK_PERM,\s*"([01pi]{5})"\)$', text):  # of the five bits of a lane, the highest first
        letters = {"0": lambda b: 0 * b, "1": lambda b: 0 * b + 1, "p": lambda b: b, "i": lambda b: 1 - b}
        bits = [letters[letter] for letter in found[1]]
        within = sum(bit(lane >> 4 - i & 1) << 4 - i for i, bit in enumerate(bits))
        return lane - lane % 32 + within
    if re.match(r"^(0x)?[0-9a-f]+$", text):
        code = int(text, 0)
        if code >= 0xC000:
            raise UnknownInstructionError(f"ds_swizzle with {text}")
        if code >> 15:
            return lane - lane % 4 + np.array([code >> 2 * i & 3 for i in range(4)])[lane % 4]
        return lane - lane % 32 + ((lane % 32 & (code & 31) | code >> 5 & 31) ^ code >> 10 & 31)
    raise UnknownInstructionError(f"ds_swizzle with {text}")


def permlane16(instruction: Instruction, lanes: int, selector: int) -> Array:
    """The lane that each reads: of its own row of 16, or (x16) of the row beside it, by a nibble each of 64 bits."""
    lane = np.arange(lanes)
    place = np.array([selector >> 4 * i & 15 for i in range(16)])[lane % 16]
    row = lane - lane % 16
    return (row ^ 16 if "permlanex16" in instruction.op else row) + place


def sources(instruction: Instruction, kinds: tuple[str, ...], operands: list[str]) -> list[Get]:
    """The operands as their types, through SDWA and op_sel where the instruction has them."""
    halves = numbers(instruction.modifiers, "op_sel", ())
    found = []
    for i, (operand, kind) in enumerate(zip(operands, kinds, strict=True)):
        inner = re.match(r"^(-?\|?)(sext)\((.*)\)$", operand)
        source = ref(inner[3] if inner else operand)
        selected = instruction.modifiers.get(f"src{i}_sel", "DWORD")
        if "sdwa" in instruction.form and (selected != "DWORD" or inner):
            found.append(_signed_part(source, kind, selected, inner is not None))
        elif i < len(halves) and halves[i]:
            found.append(_signed_part(source, kind, "WORD_1", False))
        else:
            found.append(value(source, kind))
    return found


def _signed_part(source: Ref, kind: str, selected: str, signed: bool) -> Get:
    word = part(words(source, kind, 0), selected, signed)

    def get(wave: Wave) -> Any:
        x = as_type(word(wave), kind)
        x = np.abs(x) if source.absolute else x
        return np.negative(x) if source.negative else x

    return get
