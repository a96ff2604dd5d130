"""What stands in for the functions of the language (gl), by their names there."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl

from support.gluon import memory, shared
from support.gluon.schedule import Fault, current
from support.gluon.values import (
    HALVES,
    Int,
    Tile,
    Values,
    converted,
    dimensions,
    elementwise,
    exact,
    matched,
    rounded,
    runtime,
    simplified,
)

# --- programs and loops ---


class Grid:
    """Which program runs, of how many."""

    program = programs = 0


def program_id(axis: Any) -> Int:
    return Int(Grid.program if int(axis) == 0 else 0)


def num_programs(axis: Any) -> Int:
    return Int(Grid.programs if int(axis) == 0 else 1)


def run_time_range(*bounds: Any, **_: Any) -> Iterator[Int]:
    bits = max(runtime(bound).bits for bound in bounds)
    return (Int(i, bits) for i in range(*map(int, bounds)))


def static_range(*bounds: Any, **_: Any) -> range:
    for bound in bounds:
        if isinstance(bound, Int):
            raise TypeError("static_range over a number that is known at run time only")
    return range(*bounds)


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
    parts = [(function, tuple(args)) for function, args in functions_and_args]
    for numbers in (worker_num_warps, worker_num_regs):
        if numbers is not None and len(numbers) != len(parts) - 1:
            raise Fault(f"{len(numbers)} numbers for {len(parts) - 1} workers of warp_specialize")
    return current().specialize(parts)


def barrier(cluster: Any = False) -> None:
    current().point()


# --- tiles from nothing ---


def arange(start: Any, end: Any, layout: Any = None) -> Tile:
    return Tile(np.arange(int(start), int(end), dtype=np.int32), tl.int32)


def full(shape: Any, value: Any, dtype: tl.dtype, layout: Any = None) -> Tile | Int:
    tile = Tile.of(value, dtype)
    return simplified(np.full(dimensions((tuple(shape),)), converted(tile.values, tile.dtype, dtype)), dtype)


def zeros(shape: Any, dtype: tl.dtype, layout: Any = None) -> Tile | Int:
    return full(shape, 0, dtype)


def full_like(input: Tile, value: Any, shape: Any = None, dtype: tl.dtype | None = None, layout: Any = None) -> Tile | Int:
    return full(input.shape if shape is None else shape, value, dtype or input.dtype)


def zeros_like(input: Tile, shape: Any = None, dtype: tl.dtype | None = None, layout: Any = None) -> Tile | Int:
    return full_like(input, 0, shape, dtype)


# --- element by element ---


def cast(input: Any, dtype: tl.dtype, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Any:
    return runtime(input).to(dtype, bitcast)


def cdiv(x: Any, div: Any) -> Any:
    return (x + (div - 1)) // div


def where(condition: Any, x: Any, y: Any) -> Any:
    a, b, dtype = matched(x, y)
    return simplified(np.where(condition.values if isinstance(condition, Tile) else bool(condition), a, b), dtype)


def _extremum(whole: Callable[..., Values], numbers: Callable[..., Values]) -> Callable[..., Any]:
    """A NaN loses against a number, as on the device, unless it is asked to propagate."""

    def extremum(x: Any, y: Any, propagate_nan: Any = tl.PropagateNan.NONE) -> Any:
        return elementwise(numbers if propagate_nan == tl.PropagateNan.NONE else whole, x, y)

    return extremum


maximum, minimum = _extremum(np.maximum, np.fmax), _extremum(np.minimum, np.fmin)


def _floating(function: Callable[..., Values]) -> Callable[..., Tile]:
    def apply(*operands: Any) -> Tile:
        tiles = [Tile.of(operand) for operand in operands]
        dtype = tiles[0].dtype
        if any(tile.dtype != dtype for tile in tiles) or not dtype.is_floating():
            raise TypeError(f"{function.__name__} of {', '.join(str(tile.dtype) for tile in tiles)}")
        result = function(*[tile.values for tile in tiles])
        return Tile(rounded(result, dtype) if dtype in HALVES else result, dtype)

    return apply


def absolute(x: Any) -> Any:
    x = runtime(x)
    return Int(abs(x.value), x.bits) if isinstance(x, Int) else Tile(np.abs(x.values), x.dtype)


def fdiv(x: Any, y: Any, ieee_rounding: Any = False) -> Any:
    return runtime(x) / y


def fma(x: Any, y: Any, z: Any) -> Any:
    return x * y + z


def _reciprocal_root(x: Values) -> Values:
    return np.reciprocal(np.sqrt(x))


# Instructions of one operand. Their errors, of 2**-22 and for tanh of 2**-11, are not modelled.
INSTRUCTIONS: dict[str, Callable[..., Values]] = {
    "rcp": np.reciprocal, "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh, "sqrt": np.sqrt,
    "rsqrt": _reciprocal_root,
}


def inline_asm_elementwise(asm: str, constraints: str, args: Any, dtype: tl.dtype, is_pure: Any, pack: Any) -> Tile:
    found = re.fullmatch(r"\s*(\w+)\.approx(\.ftz)?\.f32 \$0, \$1;\s*", asm)
    if found is None or found[1] not in INSTRUCTIONS or constraints.replace(" ", "") not in ("=f,f", "=r,r"):
        raise NotImplementedError(f"inline assembly: {asm}")
    return _floating(INSTRUCTIONS[found[1]])(*args)


# --- over an axis ---


def _reduction(function: Callable[..., Values]) -> Callable[..., Any]:
    def reduced(input: Tile, axis: Any = None, *, keep_dims: Any = False, dtype: Any = None, **unknown: Any) -> Any:
        if unknown:
            raise NotImplementedError(f"a reduction with {', '.join(unknown)}")
        kind = dtype or input.dtype
        if function is np.add and kind.is_int() and kind.primitive_bitwidth < 32:
            kind = tl.int32
        values = converted(input.values, input.dtype, kind)

        def over_axis(values: Values) -> Values:
            return function.reduce(values, axis=axis, keepdims=bool(keep_dims))  # type: ignore[attr-defined]

        result = exact(over_axis, kind, values) if kind.is_int() else over_axis(values)
        return simplified(rounded(result, kind) if kind in HALVES else result, kind)

    return reduced


def reduce(input: Tile, axis: Any, combine_fn: Callable[..., Any], keep_dims: Any = False) -> Any:
    """Combines neighbours, then neighbours of those: as good an order as any."""
    values = np.moveaxis(input.values, axis, 0)
    while len(values) > 1:
        values = combine_fn(Tile(values[::2], input.dtype), Tile(values[1::2], input.dtype)).values
    return simplified(np.expand_dims(values[0], axis) if keep_dims else values[0], input.dtype)


# --- shapes ---


def same(value: Any, *_: Any, **__: Any) -> Any:
    """What a layout, or a hint to the compiler, does to the values."""
    return value


def reshape(input: Tile, *shape: Any, **_: Any) -> Tile:
    return input.reshape(*shape)


def permute(input: Tile, *order: Any) -> Tile:
    return input.permute(*order)


def expand_dims(input: Tile, axis: Any) -> Tile:
    return Tile(np.expand_dims(input.values, axis), input.dtype)


def broadcast(input: Tile, other: Tile) -> tuple[Tile, Tile]:
    a, b = np.broadcast_arrays(input.values, other.values)
    return Tile(a, input.dtype), Tile(b, other.dtype)


def static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def device_assert(condition: Any, message: str = "", mask: Any = None) -> None:
    holds = Tile.of(condition).values | ~np.asarray(True if mask is None else Tile.of(mask).values)
    if not np.all(holds):
        raise Fault(f"device_assert: {message}")


def nothing(*_: Any, **__: Any) -> None:
    """Of what prints."""


class constexpr:
    """gl.constexpr(x), which is x: what a kernel knows when it is compiled are Python's own values."""

    def __new__(cls, value: Any) -> Any:
        return getattr(value, "value", value) if isinstance(value, tl.constexpr) else value


def atomic_add(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None, **_: Any) -> Any:
    current().point()
    return memory.atomic_add(pointer, val, mask)


GL: dict[str, Any] = {
    "program_id": program_id, "num_programs": num_programs, "range": run_time_range, "static_range": static_range,
    "warp_specialize": warp_specialize, "barrier": barrier, "thread_barrier": barrier, "debug_barrier": barrier,
    "arange": arange, "full": full, "zeros": zeros, "full_like": full_like, "zeros_like": zeros_like,
    "cast": cast, "cdiv": cdiv, "where": where, "maximum": maximum, "minimum": minimum, "abs": absolute,
    "exp2": _floating(np.exp2), "exp": _floating(np.exp), "log2": _floating(np.log2), "log": _floating(np.log),
    "sqrt": _floating(np.sqrt), "sqrt_rn": _floating(np.sqrt), "rsqrt": _floating(_reciprocal_root),
    "floor": _floating(np.floor), "ceil": _floating(np.ceil), "fdiv": fdiv, "div_rn": fdiv, "fma": fma,
    "inline_asm_elementwise": inline_asm_elementwise,
    "max": _reduction(np.fmax), "min": _reduction(np.fmin), "sum": _reduction(np.add), "reduce": reduce,
    "convert_layout": same, "set_auto_layout": same, "multiple_of": same, "max_contiguous": same, "max_constancy": same,
    "assume": nothing, "reshape": reshape, "permute": permute, "expand_dims": expand_dims, "broadcast": broadcast,
    "static_assert": static_assert, "static_print": nothing, "device_assert": device_assert, "device_print": nothing,
    "constexpr": constexpr, "to_tensor": runtime, "tuple": tuple, "load": memory.load, "store": memory.store,
    "atomic_add": atomic_add, "allocate_shared_memory": shared.allocate_shared_memory,
}
