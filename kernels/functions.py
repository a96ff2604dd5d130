"""What score and mask functions that are traced from plain Python call: torch's arithmetic where Triton's is another one."""

import functools
import hashlib
import linecache
from typing import Any

import triton
import triton.language as tl

from fused_attn.kernels.product import tanh_of, tanh_slope


@triton.jit
def as_score(x, score):
    """x in the type and shape of the score."""
    return tl.broadcast_to(tl.cast(x, score.dtype), score.shape)


@triton.jit
def widened(x):
    """Floats of fewer than 32 bits as such of 32."""
    if x.dtype.primitive_bitwidth < 32:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def as_wide(number: tl.constexpr, DTYPE: tl.constexpr):
    """A number in a type of floats, or in fp32 where that is narrower."""
    WIDE: tl.constexpr = DTYPE if DTYPE.primitive_bitwidth >= 32 else tl.float32
    return tl.full([], number, WIDE)


@triton.jit
def quotient(a, b):
    """a / b, rounded as IEEE and torch have it; integers as fp32. Triton's own division of fp32 is off by two units."""
    if a.dtype == tl.float64 or b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 of NaN, as torch has it."""
    return ((x > 0).to(tl.int32) - (x < 0).to(tl.int32)).to(x.dtype)


@triton.jit
def whole_quotient(a, b):
    """a // b of integers, rounded down; Triton's own rounds towards 0.

    Only numbers from 0 on are divided: LLVM takes (x | 1) / 4 of signed integers for x / 4, and -3 / 4 is not -4 / 4.
    """
    of_b = tl.where(b < 0, -b, b)
    of_a = tl.where(b < 0, -a, a)
    whole = tl.where(of_a < 0, -1 - of_a, of_a) // of_b
    return tl.where(of_a < 0, -1 - whole, whole)


@triton.jit
def whole_modulo(a, b):
    """a % b of integers, with the sign of b; Triton's own has that of a."""
    return a - whole_quotient(a, b) * b


@triton.jit
def modulo(a, b):
    """a % b of floats, with the sign of b; Triton's own has that of a."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floor_quotient(a, b):
    """a // b of floats, by way of the exact remainder."""
    rest = a % b
    quotient = (a - rest) / b - tl.where((rest != 0) & ((rest < 0) != (b < 0)), 1.0, 0.0)
    whole = tl.floor(quotient)
    return tl.where(b == 0, a / b, tl.where(quotient - whole > 0.5, whole + 1.0, whole))


@triton.jit
def to_even(x):
    """x rounded to the nearest integer, ties to the even one."""
    down = tl.floor(x)
    rest = x - down
    odd = down - 2.0 * tl.floor(down * 0.5)
    return tl.where((rest > 0.5) | ((rest == 0.5) & (odd != 0.0)), down + 1.0, down)


@triton.jit
def log1p(x):
    """log(1 + x) with the digits of a small x. Source: Kahan, as told in Goldberg 1991, theorem 4."""
    up = 1.0 + x
    exact = (up == 1.0) | (up == float("inf"))
    return tl.where(exact, x, tl.log(up) * (x / tl.where(exact, 1.0, up - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 with the digits of a small x. Source: Kahan, as told in Higham 2002, section 1.14.1."""
    up = tl.exp(x)
    log = tl.log(tl.where(up > 0.0, up, 1.0))
    inner = (up != 1.0) & (up > 0.0) & (up < float("inf"))
    return tl.where(inner, (up - 1.0) * (x / tl.where(inner, log, 1.0)), tl.where(up == 1.0, x, up - 1.0))


@triton.jit
def power(x, y):
    """x ** y: by 2 ** (y log2 |x|), with the sign that a whole y gives a negative x."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    half = y * 0.5
    whole = tl.where(tl.floor(y) == y, 1, 0)
    odd = tl.where(tl.floor(half) == half, 0, whole)
    of_negative = tl.where(odd == 1, -size, tl.where(whole == 1, size, float("nan")))
    return tl.where(y == 0.0, 1.0, tl.where(x == 1.0, 1.0, tl.where(x < 0.0, of_negative, size)))


@triton.jit
def whole_power(x, y):
    """x ** y of integers, y from 0 to 63, by squares."""
    result = x * 0 + 1
    exponent = x * 0 + y
    for _ in tl.static_range(6):
        result = tl.where(exponent % 2 == 1, result * x, result)
        x = x * x
        exponent = exponent // 2
    return result


@triton.jit
def within(index, size):
    """An index as torch counts it, from the end where it is negative; the nearest that there is where it lies outside."""
    index = tl.where(index < 0, index + size, index)
    return tl.minimum(tl.maximum(index, 0), size - 1).to(tl.int64)


_FUNCTIONS = (as_score, widened, as_wide, quotient, sign, whole_quotient, whole_modulo, modulo, floor_quotient, to_even, log1p,
              expm1, power, whole_power, within, tanh_of, tanh_slope)
NAMES = {"triton": triton, "tl": tl, **{function.__name__: function for function in _FUNCTIONS}}


@functools.lru_cache(512)
def loaded(source: str) -> dict[str, Any]:
    """The jit functions of a generated text, by name; equal texts give the same ones, and so share what is compiled."""
    path = f"<fused_attn {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # Triton reads a function's source as inspect finds it, and that is here; an entry without a time is never dropped.
    linecache.cache[path] = len(source), None, source.splitlines(True), path
    names = {"__name__": "fused_attn.kernels.functions", **NAMES}
    exec(compile(source, path, "exec"), names)
    return names
