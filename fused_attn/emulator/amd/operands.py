"""Operands of AMD's instructions, as functions of a wave that give what they hold, and as places to write to."""

import dataclasses
import re
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from fused_attn.emulator.amd.state import EXEC, M0, NULL, VCC, Array, Wave
from fused_attn.emulator.schedule import UnknownInstructionError

Get: TypeAlias = Callable[[Wave], Any]
_NAMED = {"vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1), "exec": (EXEC, 2), "exec_lo": (EXEC, 1),
          "exec_hi": (EXEC + 1, 1), "m0": (M0, 1), "null": (NULL, 1)}
_REGISTER = re.compile(r"^([vsa])(?:(\d+)|\[(\d+)(?::(\d+))?\])$")
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
DTYPES = {"f16": np.float16, "u16": np.uint16, "i16": np.int16, "f32": np.float32, "u32": np.uint32, "i32": np.int32,
          "f64": np.float64, "u64": np.uint64, "i64": np.int64}
SCALAR = 1000  # the scalar registers' numbers, beside those of vector registers
TWO_PI_RECIPROCAL = "0.15915494"


@dataclasses.dataclass(frozen=True)
class Ref:
    """A register ("v" or "s"; ``count`` of them) or a constant ("c", as it is written)."""

    kind: str
    index: int = 0
    count: int = 1
    constant: str = ""
    negative: bool = False
    absolute: bool = False

    def registers(self) -> set[int]:
        """By the numbers that ``Pending`` has them under."""
        base = {"v": 0, "s": SCALAR}.get(self.kind)
        return set() if base is None else {base + self.index + i for i in range(self.count)}

    def part(self, first: int, count: int = 1) -> "Ref":
        return dataclasses.replace(self, index=self.index + first, count=count) if self.kind != "c" else self


def ref(text: str) -> Ref:
    """An operand. Raises UnknownInstructionError for one that is not known."""
    negative = absolute = False
    if text.startswith("-") and not re.match(r"^-[\d.]", text):
        negative, text = True, text[1:]
    if text.startswith("neg("):  # of a constant
        negative, text = True, text[4:-1]
    if text.startswith("|") and text.endswith("|"):
        absolute, text = True, text[1:-1]
    if found := _REGISTER.match(text):
        first = int(found[2] or found[3])
        count = int(found[4]) - first + 1 if found[4] else 1
        return Ref("s" if found[1] == "s" else "v", first + 256 * (found[1] == "a"), count, "", negative, absolute)
    if text in _NAMED:
        return Ref("s", *_NAMED[text], "", negative, absolute)
    if re.match(r"^-?(0x[0-9a-f]+|\d+(\.\d+)?)$", text):
        return Ref("c", 0, 1, text, negative, absolute)
    raise UnknownInstructionError(f"operand {text!r}")


def constant_bits(text: str, kind: str) -> int:
    """A constant in the bits of an operand's type. Decimals are floats, of that type if it is one; a hexadecimal literal is the
    upper half of a 64-bit float."""
    if "." in text:
        value = 0.15915494309189532 if text == TWO_PI_RECIPROCAL else float(text)
        code = "<e" if kind == "f16" else "<d" if kind.endswith("64") else "<f"
        return int.from_bytes(struct.pack(code, value), "little")
    number = int(text, 0)
    if kind == "f64" and text.startswith("0x"):
        return number << 32
    bits = 64 if kind in ("u64", "i64", "f64") else 32
    return number & (1 << bits) - 1


def scalar(source: Ref, count: int | None = None, kind: str = "u32") -> Callable[[Wave], int]:
    """A scalar operand as a number without sign."""
    if source.kind == "c":
        value = constant_bits(source.constant, "u64" if (count or 1) > 1 else kind)
        return lambda wave: value
    if source.kind != "s":
        raise UnknownInstructionError(f"a vector register where a scalar one is expected: {source}")
    index, number = source.index, count or source.count
    if number == 1:
        return lambda wave: wave.s[index]
    return lambda wave: wave.scalar(index, number)


def words(source: Ref, kind: str, which: int) -> Get:
    """One 32-bit word of an operand: [lanes], or a number that all lanes share."""
    if source.kind == "v":
        index = source.index + which
        return lambda wave: wave.v[index]
    if source.kind == "s":
        index = source.index + which
        return lambda wave: np.uint32(wave.s[index])
    wide = kind in ("f64", "u64", "i64")
    fixed = np.uint32(constant_bits(source.constant, kind) >> 32 * which & 0xFFFFFFFF if wide or not which else 0)
    return lambda wave: fixed


def as_type(word: Any, kind: str) -> Any:
    """32-bit words [lanes] as a type of at most 32 bits: of 16-bit ones the lower half."""
    dtype = DTYPES[kind]
    if np.dtype(dtype).itemsize == 4:
        return word.view(dtype)
    return (word & np.uint32(0xFFFF)).astype(np.uint16).view(dtype)


def value(source: Ref, kind: str) -> Get:
    """An operand [lanes] of a type, with its sign and magnitude as they are written."""
    if kind in ("f64", "u64", "i64"):
        low, high, dtype = words(source, kind, 0), words(source, kind, 1), DTYPES[kind]

        def get(wave: Wave) -> Any:
            both = np.asarray(low(wave), np.uint64) | np.asarray(high(wave), np.uint64) << np.uint64(32)
            return both.view(dtype)
    else:
        word = words(source, kind, 0)

        def get(wave: Wave) -> Any:
            return as_type(word(wave), kind)
    return _signed(get, source)


def _signed(get: Get, source: Ref) -> Get:
    if source.absolute and source.negative:
        return lambda wave: -np.abs(get(wave))
    if source.absolute:
        return lambda wave: np.abs(get(wave))
    if source.negative:
        return lambda wave: np.negative(get(wave))
    return get


def bits_of(result: Any, kind: str) -> tuple[Array, ...]:
    """A result of a type as 32-bit words, the lower first; 16-bit ones in the lower half of one."""
    found = np.asarray(result, DTYPES[kind])
    size = found.dtype.itemsize
    if size == 2:
        return (found.view(np.uint16).astype(np.uint32),)
    if size == 4:
        return (found.view(np.uint32),)
    whole = found.view(np.uint64)
    return (whole & np.uint64(0xFFFFFFFF)).astype(np.uint32), (whole >> np.uint64(32)).astype(np.uint32)


def is_float(kind: str) -> bool:
    return kind in _FLOATS
