"""Matrix products: MFMA of the CDNA cards, WMMA of RDNA 3. Products are exact, and their sum is rounded once."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fused_attn.emulator.amd.operands import Ref, constant_bits, ref
from fused_attn.emulator.amd.scalar import Step
from fused_attn.emulator.amd.state import Array, Wave
from fused_attn.emulator.amd.text import Instruction
from fused_attn.emulator.schedule import EmulatorFault, UnknownInstructionError

_MFMA = re.compile(r"^mfma_(f32|f64)_(16x16|32x32)x(\d+)_?(f16|bf16_1k|bf16|f32|xf32|f64)$")
_EACH = {"f16": (4, 8), "bf16": (2, 4, 8), "f32": (1,), "xf32": (2,), "f64": (1,)}  # numbers of a lane, of the one block
_WMMA = re.compile(r"^wmma_f32_16x16x16_(f16|bf16)$")


def encode(instruction: Instruction, lanes: int) -> Step | None:
    """What a matrix product does; None for another instruction."""
    name = instruction.op.removeprefix("v_")
    if name.startswith(("mfma", "wmma", "smfmac")) and instruction.modifiers:
        raise UnknownInstructionError(f"matrix products with {instruction.modifiers}")
    if found := _MFMA.match(name):
        size, depth, kind = int(found[2][:2]), int(found[3]), found[4].removesuffix("_1k")
        if depth * size // 64 not in _EACH[kind]:
            raise UnknownInstructionError(f"v_{name}: several blocks")
        return _mfma(instruction, found[1], size, depth, kind)
    if (found := _WMMA.match(name)) and lanes == 32:
        return _wmma(instruction, found[1])
    return None


def elements(words: Array, kind: str) -> Array:
    """Registers [n, lanes] as the numbers [elements, lanes] that they hold, in fp64."""
    if kind == "f64":
        pairs = words[0::2].astype(np.uint64) | words[1::2].astype(np.uint64) << np.uint64(32)
        return pairs.view(np.float64)
    if kind in ("f32", "xf32"):
        if kind == "xf32":  # ten bits of mantissa stay
            words = words & np.uint32(0xFFFFE000)
        return words.view(np.float32).astype(np.float64)
    halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), 1).reshape(-1, words.shape[1])
    if kind == "bf16":
        return (halves << np.uint32(16)).view(np.float32).astype(np.float64)
    return halves.astype(np.uint16).view(np.float16).astype(np.float64)


def rows_of(size: int, kind: str) -> Array:
    """[numbers of a lane, 64]: the row of the result that each is of; its column is the lane modulo the size."""
    lane, number = np.arange(64), np.arange(size * size // 64)[:, None]
    if kind == "f64":
        return 4 * number + lane // 16
    if size == 16:
        return number + 4 * (lane // 16)
    return 8 * (number // 4) + 4 * (lane // 32) + number % 4


def _read(source: Ref) -> Callable[[Wave], Array]:
    if source.kind != "v":
        raise UnknownInstructionError(f"a matrix of {source}")
    first, last = source.index, source.index + source.count
    return lambda wave: wave.v[first:last]


def _sum(source: Ref, kind: str) -> Callable[[Wave], Any]:
    """The third operand: registers, or a constant for all."""
    if source.kind == "v":
        read = _read(source)
        return lambda wave: elements(read(wave), kind)
    bits = np.array([constant_bits(source.constant, kind)], np.uint64)
    fixed = bits.view(np.float64) if kind == "f64" else bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return lambda wave: fixed


def _mfma(instruction: Instruction, result: str, size: int, depth: int, kind: str) -> Step:
    """a [size, depth], b [depth, size]: a lane holds ``depth * size / 64`` neighbours of a row of a, and of a column of b."""
    target, a, b, c = (ref(operand) for operand in instruction.operands)
    read_a, read_b, read_c = _read(a), _read(b), _sum(c, result)
    rows, columns = rows_of(size, result), np.arange(64) % size
    dtype = np.float64 if result == "f64" else np.float32

    def operand(words: Array) -> Array:
        held = elements(words, kind)  # [e, 64], of lane row + size * group the numbers e * group + i
        return held.reshape(-1, 64 // size, size).transpose(1, 0, 2).reshape(depth, size)

    def step(wave: Wave) -> None:
        product = operand(read_a(wave)).T @ operand(read_b(wave))
        _store(wave, target.index, (product[rows, columns] + read_c(wave)).astype(dtype))

    return step


def _store(wave: Wave, first: int, numbers: Array) -> None:
    """Matrix products heed no mask, and Triton's are never made by a part of a wave."""
    if not wave.all:
        raise EmulatorFault("a matrix product by some lanes of a wave")
    if numbers.dtype == np.float64:
        whole = numbers.view(np.uint64)
        wave.v[first : first + 2 * len(numbers) : 2] = (whole & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        wave.v[first + 1 : first + 2 * len(numbers) : 2] = (whole >> np.uint64(32)).astype(np.uint32)
    else:
        wave.v[first : first + len(numbers)] = numbers.view(np.uint32)


def _wmma(instruction: Instruction, kind: str) -> Step:
    """a [16, 16], b [16, 16]: a lane holds a row of a, a column of b, the upper 16 lanes those of the lower once more."""
    target, a, b, c = (ref(operand) for operand in instruction.operands)
    read_a, read_b, read_c = _read(a), _read(b), _sum(c, "f32")
    lane = np.arange(32)
    rows, columns = 2 * np.arange(8)[:, None] + lane // 16, lane % 16

    def operand(words: Array, which: str) -> Array:
        if (words[:, :16] != words[:, 16:]).any():
            raise EmulatorFault(f"the upper 16 lanes hold another {which} than the lower ones")
        return elements(words[:, :16], kind)

    def step(wave: Wave) -> None:
        product = operand(read_a(wave), "a").T @ operand(read_b(wave), "b")
        _store(wave, target.index, (product[rows, columns] + read_c(wave)).astype(np.float32))

    return step
