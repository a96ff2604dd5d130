"""What a kernel computes with: scalars, and tiles in registers, with the types and the promotions of the language.

Halves are kept as float32 values that a half can hold: every result of theirs is rounded, to nearest even.
"""

import math
import operator
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import triton.language as tl

NUMPY = {
    tl.float64: np.float64, tl.float32: np.float32, tl.float16: np.float32, tl.bfloat16: np.float32,
    tl.int1: np.bool_, tl.int8: np.int8, tl.int16: np.int16, tl.int32: np.int32, tl.int64: np.int64,
    tl.uint8: np.uint8, tl.uint16: np.uint16, tl.uint32: np.uint32, tl.uint64: np.uint64,
}
TORCH = {
    tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
    tl.int1: torch.bool, tl.int8: torch.int8, tl.int16: torch.int16, tl.int32: torch.int32, tl.int64: torch.int64,
    tl.uint8: torch.uint8,
}
DTYPES = {dtype: name for name, dtype in TORCH.items()}
HALVES = (tl.float16, tl.bfloat16)
INTEGERS = {1: tl.int1, 8: tl.int8, 16: tl.int16, 32: tl.int32, 64: tl.int64}
POISON = 0x7FDEADED  # an unlikely integer: what no operation has written

Values: TypeAlias = Any  # an array, or one of NumPy's scalars, which are what operations on arrays of no dimension return


def rounded(values: Values, dtype: tl.dtype) -> Values:
    """float32 values, each to the nearest that a half type holds; torch's conversion is the one that results are held to."""
    array = np.ascontiguousarray(values, np.float32)
    return torch.from_numpy(array).to(TORCH[dtype]).to(torch.float32).numpy().reshape(np.shape(values))


def converted(values: Values, source: tl.dtype, target: tl.dtype) -> Values:
    if target in HALVES:
        return values if source is target else rounded(np.asarray(values, np.float32), target)
    if target is tl.int1:
        return np.asarray(values) != 0
    return np.asarray(values).astype(NUMPY[target])


def poison(shape: tuple[int, ...], dtype: tl.dtype) -> np.ndarray:
    """What memory holds that nobody has written."""
    if dtype.is_floating():
        return np.full(shape, np.nan, NUMPY[dtype])
    return np.full(shape, POISON & (1 << dtype.primitive_bitwidth - 1) - 1, NUMPY[dtype])


def _truncated(a: int, b: int) -> int:
    """a // b as machines divide: towards zero."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _remainder(a: int, b: int) -> int:
    return a - b * _truncated(a, b)


class Int:
    """A run-time integer or truth value.

    No subclass of int: 2.0 * n would then be Python's float, and never ask for the product of the language.
    """

    __slots__ = ("bits", "value")
    __array_ufunc__ = None  # NumPy's scalars leave operators to this class

    def __init__(self, value: int, bits: int = 32) -> None:
        half = 1 << bits - 1
        if not (0 <= value <= 1 if bits == 1 else -half <= value < half):
            raise OverflowError(f"{value} does not fit {bits} bits")
        self.value, self.bits = int(value), bits

    @property
    def dtype(self) -> tl.dtype:
        return INTEGERS[self.bits]

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def to(self, dtype: tl.dtype, bitcast: bool = False) -> "Int | Tile":
        if bitcast:
            raise NotImplementedError("bitcast")
        if dtype is tl.int1:
            return Int(self.value != 0, 1)
        if dtype not in INTEGERS.values():
            return Tile(converted(self.value, self.dtype, dtype), dtype)
        return Int(self.value, dtype.primitive_bitwidth)

    def __index__(self) -> int:
        return self.value

    __int__ = __index__

    def __bool__(self) -> bool:
        return self.value != 0

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return f"{self.value}:i{self.bits}"

    def __neg__(self) -> "Int":
        return Int(-self.value, self.bits)

    def __invert__(self) -> "Int":
        return Int(1 - self.value if self.bits == 1 else ~self.value, self.bits)

    def __truediv__(self, other: Any) -> "Tile":
        return Tile.of(self) / other

    def __rtruediv__(self, other: Any) -> "Tile":
        return other / Tile.of(self)


def _bits(value: Any, beside: int) -> int:
    """Width of an operand; a Python integer takes that of what is ``beside`` it."""
    if type(value) is Int:
        return value.bits
    if type(value) is bool:
        return 1
    return beside if beside > 1 else 32


def _integer_operator(name: str, function: Callable[[int, int], int], compares: bool) -> None:
    reflected = getattr(operator, f"__{name}__")

    def forward(a: Int, b: Any) -> Any:
        if type(b) is Int or isinstance(b, int):
            bits = 1 if compares else max(a.bits, _bits(b, a.bits))
            return Int(function(a.value, int(b)), bits)
        return reflected(Tile.of(a), b) if isinstance(b, float) else NotImplemented

    def backward(a: Int, b: Any) -> Any:
        if isinstance(b, int):
            return Int(function(int(b), a.value), max(a.bits, _bits(b, a.bits)))
        return reflected(b, Tile.of(a)) if isinstance(b, float) else NotImplemented

    setattr(Int, f"__{name}__", forward)
    if not compares:
        setattr(Int, f"__r{name}__", backward)


for _name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift"):
    _integer_operator(_name, getattr(operator, f"__{_name}__"), False)
_integer_operator("floordiv", _truncated, False)
_integer_operator("mod", _remainder, False)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _integer_operator(_name, getattr(operator, f"__{_name}__"), True)


class Tile:
    """Values in registers, of one dtype; those without dimensions are scalars."""

    __slots__ = ("dtype", "values")
    __array_ufunc__ = None
    __hash__ = object.__hash__

    def __init__(self, values: Values, dtype: tl.dtype) -> None:
        self.values, self.dtype = values, dtype

    @staticmethod
    def of(value: Any, dtype: tl.dtype | None = None) -> "Tile":
        """A scalar or a tile as a tile; a Python number takes ``dtype``, or the one that it has on its own."""
        if isinstance(value, Tile):
            return value
        if type(value) is Int:
            return Tile(NUMPY[value.dtype](value.value), value.dtype)
        if dtype is None:
            dtype = tl.float32 if isinstance(value, float) else tl.int1 if isinstance(value, bool) else tl.int32
        return Tile(np.asarray(value).astype(NUMPY[dtype]) if dtype.is_floating() else NUMPY[dtype](value), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.values)

    @property
    def T(self) -> "Tile":
        return self.permute((1, 0))

    def to(self, dtype: tl.dtype, bitcast: bool = False) -> "Tile | Int":
        if bitcast:
            raise NotImplementedError("bitcast")
        if self.dtype.is_int() and dtype.is_int_signed():
            return simplified(exact(np.asarray, dtype, self.values), dtype)
        return simplified(converted(self.values, self.dtype, dtype), dtype)

    def reshape(self, *shape: Any) -> "Tile":
        return Tile(np.reshape(self.values, dimensions(shape)), self.dtype)

    def permute(self, *order: Any) -> "Tile":
        return Tile(np.transpose(self.values, dimensions(order)), self.dtype)

    def __getitem__(self, index: Any) -> "Tile":
        for one in index if isinstance(index, tuple) else (index,):
            if one is not None and one != slice(None):
                raise TypeError(f"a tile in registers can be given dimensions, not indexed by {one}")
        return Tile(self.values[index], self.dtype)

    def __bool__(self) -> bool:
        if self.shape:
            raise TypeError(f"a tile {list(self.shape)} is neither true nor false")
        return bool(self.values)

    def __truediv__(self, other: Any) -> "Tile":
        return _quotient(self, other)

    def __rtruediv__(self, other: Any) -> "Tile":
        return _quotient(other, self)

    def __neg__(self) -> "Tile":
        return Tile(-self.values, self.dtype)

    def __invert__(self) -> "Tile":
        return Tile(np.invert(self.values), self.dtype)

    @property
    def type(self) -> types.SimpleNamespace:
        """Kernels ask it for a layout, of which nothing is known here."""
        return types.SimpleNamespace(shape=list(self.shape), layout=None)

    def __repr__(self) -> str:
        return f"Tile {self.dtype} {list(self.shape)}"


def dimensions(shape: Any) -> tuple[int, ...]:
    """Of reshape(2, 3) and reshape((2, 3)) alike."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = shape[0]
    return tuple(int(length) for length in shape)


def simplified(values: Values, dtype: tl.dtype) -> Tile | Int:
    """A tile, or the integer that it is where it has no dimensions."""
    if not np.shape(values) and dtype in INTEGERS.values():
        return Int(int(values), dtype.primitive_bitwidth)
    return Tile(values, dtype)


def each(function: Callable[[Any], Any], items: Any) -> Any:
    """A tuple, or a named one, of what a function makes of its items."""
    made = [function(item) for item in items]
    return type(items)._make(made) if hasattr(items, "_fields") else tuple(made)


def runtime(value: Any) -> Any:
    """A Python number as the run-time scalar that it becomes when a kernel assigns or returns it."""
    kind = type(value)
    if kind is bool:
        return Int(value, 1)
    if kind is int:
        return Int(value, 32 if -(1 << 31) <= value < 1 << 31 else 64)
    if kind is float:
        return Tile(np.float32(value), tl.float32)
    return each(runtime, value) if isinstance(value, tuple) else value


def _dtype_of(value: Any) -> tl.dtype | None:
    return value.dtype if isinstance(value, (Tile, Int)) else None


def promoted(a: tl.dtype, b: tl.dtype) -> tl.dtype:
    """The dtype in which two tiles meet."""
    if a is b or a == b:
        return a
    if a.is_floating() and b.is_floating():
        if tl.float64 in (a, b):
            raise TypeError(f"{a} meets {b}: convert one of them")
        return tl.float32
    if a.is_floating() or b.is_floating():
        return a if a.is_floating() else b
    return max(a, b, key=lambda dtype: (dtype.primitive_bitwidth, dtype.is_int_unsigned()))


def _number_dtype(number: float, beside: tl.dtype | None) -> tl.dtype:
    """The dtype of a Python number beside a tile."""
    if isinstance(number, bool):
        return beside or tl.int1
    if isinstance(number, int):
        return tl.int32 if beside is None or beside is tl.int1 else beside
    return beside if beside is not None and beside.is_floating() else tl.float32


def matched(a: Any, b: Any) -> tuple[Values, Values, tl.dtype]:
    """The values of two operands and the dtype in which they meet."""
    first, second = _dtype_of(a), _dtype_of(b)
    if first is None:
        first = _number_dtype(a, second)
    if second is None:
        second = _number_dtype(b, first)
    dtype = promoted(first, second)
    return _as(a, dtype), _as(b, dtype), dtype


def _as(operand: Any, dtype: tl.dtype) -> Values:
    if isinstance(operand, Tile):
        return operand.values if operand.dtype is dtype else converted(operand.values, operand.dtype, dtype)
    kind = NUMPY[dtype]
    return kind(int(operand)) if type(operand) is Int else rounded(operand, dtype) if dtype in HALVES else kind(operand)


def exact(function: Callable[..., Values], dtype: tl.dtype, *operands: Values) -> Values:
    """Of signed integers, in 64 bits: what the dtype does not hold is an error. Unsigned ones wrap, as they are meant to."""
    if dtype is tl.int64 or not dtype.is_int_signed():
        return function(*operands).astype(NUMPY[dtype])
    wide = function(*[np.asarray(operand, np.int64) for operand in operands])
    narrow = wide.astype(NUMPY[dtype])
    if not np.array_equal(wide, narrow):
        raise OverflowError(f"a tile of {dtype} holds {wide[wide != narrow].ravel()[0] if wide.shape else wide}")
    return narrow


def _divided(a: Values, b: Values) -> Values:
    quotient = np.floor_divide(np.abs(a), np.abs(b))
    return np.where((a < 0) == (b < 0), quotient, -quotient).astype(quotient.dtype)


def elementwise(function: Callable[[Values, Values], Values], a: Any, b: Any) -> Tile | Int:
    """A function of two operands in the dtype in which they meet."""
    x, y, dtype = matched(a, b)
    result = exact(function, dtype, x, y) if function in _LEAVING and dtype.is_int() else function(x, y)
    return simplified(rounded(result, dtype) if dtype in HALVES else result, dtype)


# Of two integers, these leave the range of their dtype.
_LEAVING = (np.add, np.subtract, np.multiply, np.left_shift)


def _tile_operator(name: str, function: Callable[[Values, Values], Values]) -> None:
    operands = (Tile, Int, int, float)

    def forward(a: Tile, b: Any) -> Any:
        return elementwise(function, a, b) if isinstance(b, operands) else NotImplemented

    def backward(a: Tile, b: Any) -> Any:
        return elementwise(function, b, a) if isinstance(b, operands) else NotImplemented

    setattr(Tile, f"__{name}__", forward)
    setattr(Tile, f"__r{name}__", backward)


def _tile_comparison(name: str, function: Callable[[Values, Values], Values]) -> None:
    def compare(a: Tile, b: Any) -> Any:
        x, y, _ = matched(a, b)
        return simplified(function(x, y), tl.int1)

    setattr(Tile, f"__{name}__", compare)


def _quotient(a: Any, b: Any) -> Tile:
    """Integers and halves are divided in float32."""
    x, y, dtype = matched(a, b)
    if dtype is not tl.float64:
        dtype, x, y = tl.float32, np.asarray(x, np.float32), np.asarray(y, np.float32)
    return Tile(np.divide(x, y), dtype)


ARITHMETIC: dict[str, Callable[..., Values]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": _divided, "mod": np.fmod, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift,
}
COMPARISONS: dict[str, Callable[..., Values]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}
for _name, _function in ARITHMETIC.items():
    _tile_operator(_name, _function)
for _name, _function in COMPARISONS.items():
    _tile_comparison(_name, _function)


def bytes_of(shape: tuple[int, ...], dtype: tl.dtype) -> int:
    return math.prod(shape) * dtype.primitive_bitwidth // 8
