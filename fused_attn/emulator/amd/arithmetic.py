"""What vector instructions compute, lane by lane: name -> (type of the result, types of the sources, function of arrays)."""

from collections.abc import Callable
from typing import Any

import numpy as np

Function = Callable[..., Any]
_KINDS = ("f16", "f32", "f64")
_U32, _F32, _F64 = np.uint32, np.float32, np.float64


def _count(by: Any, bits: int = 32) -> Any:
    return by & np.asarray(bits - 1, by.dtype)


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """A sum of fp64, and exactly what rounding took from it."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _to_odd(total: Any, rest: Any) -> Any:
    """A sum and its rest, rounded to the neighbour whose last bit is 1: what is rounded again afterwards is rounded once."""
    bits = np.asarray(total, _F64).view(np.int64)
    nudge = np.where((rest > 0) == (total > 0), 1, -1)
    return np.where((rest != 0) & (bits & 1 == 0) & np.isfinite(total), bits + nudge, bits).view(_F64)


def _fma32(a: Any, b: Any, c: Any) -> Any:
    """Rounded once: a product of two 24-bit numbers is exact in fp64."""
    total, rest = _two_sum(np.asarray(a, _F64) * np.asarray(b, _F64), np.asarray(c, _F64))
    return _to_odd(total, rest).astype(_F32)


def _fma64(a: Any, b: Any, c: Any) -> Any:
    """Rounded once (Boldo and Melquiond, 2008), for numbers far from the ends of the range; near them by 64 bits."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, _F64) for x in (a, b, c)))
    wide = (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(_F64)
    product = a * b
    halves = [(x * 134217729.0 - (x * 134217729.0 - x)) for x in (a, b)]
    (a1, a0), (b1, b0) = ((high, x - high) for high, x in zip(halves, (a, b), strict=True))
    error = a0 * b0 - (((product - a1 * b1) - a0 * b1) - a1 * b0)
    low, lower = _two_sum(c, error)
    high, middle = _two_sum(product, low)
    small, rest = _two_sum(lower, middle)
    exact = high + _to_odd(small, rest)
    usual = np.ones(a.shape, bool)
    for x, most in ((a, 1e140), (b, 1e140), (c, 1e290)):
        usual &= (np.abs(x) < most) & ((np.abs(x) > 1e-120) | (x == 0))
    return np.where(usual, exact, wide)


def _to_integer(x: Any, dtype: Any) -> Any:
    """Towards zero, held to the type's range; NaN is 0."""
    limits = np.iinfo(dtype)
    wide = np.trunc(np.nan_to_num(np.asarray(x, _F64), nan=0.0, posinf=float(limits.max), neginf=float(limits.min)))
    return np.clip(wide, limits.min, limits.max).astype(np.int64).astype(dtype)


def _bfe_u32(x: Any, offset: Any, width: Any) -> Any:
    width = _count(width)
    return np.where(width == 0, _U32(0), x >> _count(offset) & (_U32(1) << width) - _U32(1))


def _bfe_i32(x: Any, offset: Any, width: Any) -> Any:
    width = np.asarray(_count(width), np.int64)
    field = np.asarray(np.asarray(x, np.int32), np.int64) >> _count(np.asarray(offset, np.int64)) & (1 << width) - 1
    sign = np.where(width == 0, 0, field >> np.maximum(width - 1, 0) & 1)
    return np.where(width == 0, 0, field - (sign << width)).astype(np.int32)


def _perm(high: Any, low: Any, selector: Any) -> Any:
    """Bytes of (high, low) by the four of the selector: 0 to 7 a byte, 8 to 11 a sign, 12 zero, above that ones."""
    whole = np.asarray(high, np.uint64) << np.uint64(32) | np.asarray(low, np.uint64)
    result = np.uint64(0)
    chosen = [int(selector) >> 8 * i & 0xFF for i in range(4)] if np.ndim(selector) == 0 else [8]
    if max(chosen) < 8:  # as a rule: bytes that are the same for all lanes
        for i, which in enumerate(chosen):
            result = result | (whole >> np.uint64(8 * which) & np.uint64(0xFF)) << np.uint64(8 * i)
        return result.astype(_U32)
    for i in range(4):
        which = np.asarray(selector, np.uint64) >> np.uint64(8 * i) & np.uint64(0xFF)
        byte = whole >> np.uint64(8) * np.minimum(which, np.uint64(7)) & np.uint64(0xFF)
        place = np.uint64(16) * (np.clip(which, 8, 11) - np.uint64(8)) + np.uint64(15)
        sign = (whole >> place & np.uint64(1)) * np.uint64(0xFF)
        byte = np.where(which < 8, byte, np.where(which < 12, sign, np.where(which == 12, np.uint64(0), np.uint64(0xFF))))
        result = result | byte << np.uint64(8 * i)
    return result.astype(_U32)


def _reversed_bits(x: Any) -> Any:
    bits = np.unpackbits(np.atleast_1d(x).view(np.uint8), bitorder="little").reshape(-1, 32)
    return np.packbits(bits[:, ::-1], axis=-1, bitorder="little").view(_U32).reshape(np.shape(x))


def _ones(x: Any, more: Any) -> Any:
    """How many bits are set, and a number."""
    bits = np.unpackbits(np.atleast_1d(x).view(np.uint8)).reshape(-1, 32)
    return bits.sum(-1, dtype=_U32).reshape(np.shape(x)) + more


def _leading(x: Any) -> Any:
    """Zeros before the highest bit that is set; -1 where none is."""
    exponent = np.frexp(np.asarray(x, _F64))[1]
    return np.where(np.asarray(x) == 0, -1, 32 - exponent).astype(np.int32).view(_U32)


def _rtz16(x: Any) -> Any:
    """fp32 to fp16, towards zero."""
    near = np.asarray(x, _F32).astype(np.float16)
    over = np.abs(near.astype(_F32)) > np.abs(x)
    return np.where(over & np.isfinite(x), np.nextafter(near, np.float16(0)), near)


def _aligned(a: Any, b: Any, by: Any) -> Any:
    """32 bits of (a, b), from bit ``by`` on."""
    whole = np.asarray(a, np.uint64) << np.uint64(32) | np.asarray(b, np.uint64)
    return whole >> np.asarray(by, np.uint64) & np.uint64(0xFFFFFFFF)


def _packed16(low: Any, high: Any) -> Any:
    return np.asarray(low).view(np.uint16).astype(_U32) | np.asarray(high).view(np.uint16).astype(_U32) << _U32(16)


def _bf16(x: Any) -> Any:
    """fp32 to the bits of bf16, to the nearest even."""
    bits = np.asarray(x, _F32).view(_U32)
    near = bits + _U32(0x7FFF) + (bits >> _U32(16) & _U32(1)) >> _U32(16)
    return np.where(np.isnan(x), bits >> _U32(16) | _U32(64), near)


def any_of_three(a: Any, b: Any, c: Any, table: int) -> Any:
    """v_bitop3: bit by bit, what an 8-bit table has for (a, b, c)."""
    found = np.zeros(1, np.asarray(a).dtype)
    for i in range(8):
        if table >> i & 1:
            found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _dot2(a: Any, b: Any, c: Any, dtype: Any) -> Any:
    halves = [[(x >> _U32(16 * i) & _U32(0xFFFF)) for i in range(2)] for x in (a, b)]
    if dtype == "bf16":
        (a0, a1), (b0, b1) = [[(x << _U32(16)).view(_F32).astype(_F64) for x in pair] for pair in halves]
    else:
        (a0, a1), (b0, b1) = [[x.astype(np.uint16).view(np.float16).astype(_F64) for x in pair] for pair in halves]
    return (a0 * b0 + a1 * b1 + c.astype(_F64)).astype(_F32)


def _div_fixup(quotient: Any, denominator: Any, numerator: Any) -> Any:
    """A quotient, with what a refinement of it cannot give: signs of zeros and infinities, NaN."""
    sign = np.signbit(denominator) ^ np.signbit(numerator)
    with_sign = lambda x: np.where(sign, -x, x)  # noqa: E731
    result = with_sign(np.abs(quotient))
    result = np.where(np.isinf(numerator) | (denominator == 0), with_sign(np.asarray(np.inf, quotient.dtype)), result)
    result = np.where(np.isinf(denominator) | (numerator == 0), with_sign(np.asarray(0.0, quotient.dtype)), result)
    invalid = ((numerator == 0) & (denominator == 0)) | (np.isinf(numerator) & np.isinf(denominator))
    return np.where(invalid | np.isnan(numerator) | np.isnan(denominator), np.asarray(np.nan, quotient.dtype), result)


def _larger(a: Any, b: Any) -> Any:
    """Of floats; a NaN gives way to a number, as in IEEE mode, and +0 is larger than -0."""
    zero = np.where(np.signbit(a) & np.signbit(b), np.asarray(-0.0, a.dtype), np.asarray(0.0, a.dtype))
    return np.where((a == 0) & (b == 0), zero, np.fmax(a, b))


def _smaller(a: Any, b: Any) -> Any:
    zero = np.where(np.signbit(a) | np.signbit(b), np.asarray(-0.0, a.dtype), np.asarray(0.0, a.dtype))
    return np.where((a == 0) & (b == 0), zero, np.fmin(a, b))


def _middle(a: Any, b: Any, c: Any) -> Any:
    """Of floats: the smallest where one is NaN."""
    unordered = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(unordered, _smaller(_smaller(a, b), c), _median(a, b, c))


def _fraction(a: Any) -> Any:
    """Less than 1, even of what is just below 0."""
    return np.minimum(a - np.floor(a), np.nextafter(np.asarray(1, a.dtype), np.asarray(0, a.dtype)))


def _median(a: Any, b: Any, c: Any) -> Any:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


# Floats of every width; "T" stands for f16, f32 or f64.
_FLOATS: dict[str, tuple[str, Function]] = {
    "add": ("T T", np.add), "sub": ("T T", np.subtract), "subrev": ("T T", lambda a, b: b - a), "mul": ("T T", np.multiply),
    "max": ("T T", _larger), "min": ("T T", _smaller), "max3": ("T T T", lambda a, b, c: _larger(_larger(a, b), c)),
    "min3": ("T T T", lambda a, b, c: _smaller(_smaller(a, b), c)), "med3": ("T T T", _middle), "sqrt": ("T", np.sqrt),
    "rcp": ("T", lambda a: np.asarray(1, a.dtype) / a), "rsq": ("T", lambda a: np.asarray(1, a.dtype) / np.sqrt(a)),
    "trunc": ("T", np.trunc), "floor": ("T", np.floor), "ceil": ("T", np.ceil), "rndne": ("T", np.rint),
    "maximum3": ("T T T", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "minimum3": ("T T T", lambda a, b, c: np.minimum(np.minimum(a, b), c)), "fract": ("T", _fraction),
    "exp": ("T", np.exp2), "log": ("T", np.log2),
    "frexp_mant": ("T", lambda a: np.frexp(a)[0]), "div_fixup": ("T T T", _div_fixup),
}
# Integers: "T" stands for u16, i16, u32 or i32. The names with "_nc" are RDNA's.
_INTEGERS: dict[str, tuple[str, Function]] = {
    **{f"add{nc}": ("T T", np.add) for nc in ("", "_nc")}, **{f"sub{nc}": ("T T", np.subtract) for nc in ("", "_nc")},
    **{f"subrev{nc}": ("T T", lambda a, b: b - a) for nc in ("", "_nc")}, "mul_lo": ("T T", np.multiply),
    "max": ("T T", np.maximum), "min": ("T T", np.minimum), "med3": ("T T T", _median),
    "max3": ("T T T", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "min3": ("T T T", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
}
# Bits: "T" stands for u16 or u32, of the names' b16 and b32.
_BITS: dict[str, tuple[str, Function]] = {
    "and": ("T T", np.bitwise_and), "or": ("T T", np.bitwise_or), "xor": ("T T", np.bitwise_xor),
    "xnor": ("T T", lambda a, b: ~(a ^ b)), "not": ("T", np.invert), "mov": ("T", lambda a: a),
}
# Of 32 bits alone, without a sign.
_WORDS: dict[str, tuple[str, Function]] = {
    "add3_u32": ("T T T", lambda a, b, c: a + b + c), "xad_u32": ("T T T", lambda a, b, c: (a ^ b) + c),
    "lshl_add_u32": ("T T T", lambda a, b, c: (a << _count(b)) + c),
    "add_lshl_u32": ("T T T", lambda a, b, c: (a + b) << _count(c)),
    "or3_b32": ("T T T", lambda a, b, c: a | b | c), "xor3_b32": ("T T T", lambda a, b, c: a ^ b ^ c),
    "and_or_b32": ("T T T", lambda a, b, c: a & b | c), "lshl_or_b32": ("T T T", lambda a, b, c: a << _count(b) | c),
    "bfi_b32": ("T T T", lambda a, b, c: a & b | ~a & c),
    "bfm_b32": ("T T", lambda a, b: (_U32(1) << _count(a)) - _U32(1) << _count(b)),
    **{f"accvgpr_{what}_b32": ("T", lambda a: a) for what in ("read", "write", "mov")},
    "bfe_u32": ("T T T", _bfe_u32), "bfrev_b32": ("T", _reversed_bits), "perm_b32": ("T T T", _perm),
    "bcnt_u32_b32": ("T T", _ones), "ffbh_u32": ("T", _leading), "clz_i32_u32": ("T", _leading),
    "alignbit_b32": ("T T T", lambda a, b, c: _aligned(a, b, _count(c))),
    "alignbyte_b32": ("T T T", lambda a, b, c: _aligned(a, b, 8 * (c & _U32(3)))),
    "mul_u32_u24": ("T T", lambda a, b: (a & _U32(0xFFFFFF)) * (b & _U32(0xFFFFFF))),
    "mad_u32_u24": ("T T T", lambda a, b, c: (a & _U32(0xFFFFFF)) * (b & _U32(0xFFFFFF)) + c),
    "mul_hi_u32": ("T T", lambda a, b: np.asarray(a, np.uint64) * np.asarray(b, np.uint64) >> np.uint64(32)),
}


def _shifts() -> dict[str, tuple[str, str, Function]]:
    """By the lower bits of the first source: lshlrev, lshrrev of bits, ashrrev of numbers with a sign."""
    found: dict[str, tuple[str, str, Function]] = {}
    for bits in (16, 32, 64):
        by = 32 if bits == 64 else bits  # bits of the count

        def left(a: Any, b: Any, n: int = bits) -> Any:
            return b << np.asarray(_count(a, n), b.dtype)

        def right(a: Any, b: Any, n: int = bits) -> Any:
            return b >> np.asarray(_count(a, n), b.dtype)

        found[f"lshlrev_b{bits}"] = f"u{bits}", f"u{by} u{bits}", left
        found[f"lshrrev_b{bits}"] = f"u{bits}", f"u{by} u{bits}", right
        found[f"ashrrev_i{bits}"] = f"i{bits}", f"u{by} i{bits}", right
    return found


_OTHERS: dict[str, tuple[str, str, Function]] = {
    **_shifts(), "mov_b64": ("u64", "u64", lambda a: a),
    "rcp_iflag_f32": ("f32", "f32", lambda a: _F32(1) / a), "ldexp_f32": ("f32", "f32 i32", np.ldexp),
    "ldexp_f64": ("f64", "f64 i32", np.ldexp), "ldexp_f16": ("f16", "f16 i16", np.ldexp),
    **{f"frexp_exp_i32_{kind}": ("i32", kind, lambda a: np.where(np.isfinite(a), np.frexp(a)[1], 0)) for kind in _KINDS},
    "sin_f32": ("f32", "f32", lambda a: np.sin(2 * np.pi * a.astype(_F64)).astype(_F32)),
    "cos_f32": ("f32", "f32", lambda a: np.cos(2 * np.pi * a.astype(_F64)).astype(_F32)),
    "fma_f32": ("f32", "f32 f32 f32", _fma32), "fma_f64": ("f64", "f64 f64 f64", _fma64),
    "fma_f16": ("f16", "f16 f16 f16", lambda a, b, c: (a.astype(_F64) * b.astype(_F64) + c.astype(_F64)).astype(np.float16)),
    "mul_legacy_f32": ("f32", "f32 f32", lambda a, b: np.where((a == 0) | (b == 0), _F32(0), a * b)),
    **{f"dot2_f32_{kind}": ("f32", "u32 u32 f32", lambda a, b, c, kind=kind: _dot2(a, b, c, kind)) for kind in ("f16", "bf16")},
    "mul_hi_i32": ("i32", "i32 i32", lambda a, b: np.asarray(a, np.int64) * np.asarray(b, np.int64) >> np.int64(32)),
    "mul_i32_i24": ("i32", "i32 i32", lambda a, b: (a << 8 >> 8) * (b << 8 >> 8)),
    "mad_i32_i24": ("i32", "i32 i32 i32", lambda a, b, c: (a << 8 >> 8) * (b << 8 >> 8) + c),
    "lshl_add_u64": ("u64", "u64 u32 u64", lambda a, b, c: (a << np.asarray(b & _U32(7), np.uint64)) + c),
    "bfe_i32": ("i32", "i32 u32 u32", _bfe_i32),
    # conversions
    "cvt_f16_f32": ("f16", "f32", lambda a: a.astype(np.float16)), "cvt_f32_f16": ("f32", "f16", lambda a: a.astype(_F32)),
    "cvt_f32_f64": ("f32", "f64", lambda a: a.astype(_F32)), "cvt_f64_f32": ("f64", "f32", lambda a: np.asarray(a, _F64)),
    **{f"cvt_f32_{kind}": ("f32", kind, lambda a: np.asarray(a, _F64).astype(_F32)) for kind in ("u32", "i32")},
    **{f"cvt_f64_{kind}": ("f64", kind, lambda a: np.asarray(a, _F64)) for kind in ("u32", "i32")},
    **{f"cvt_f16_{kind}": ("f16", kind, lambda a: a.astype(np.float16)) for kind in ("u16", "i16")},
    **{f"cvt_{kind}_{given}": (kind, given, lambda a, dtype=dtype: _to_integer(a, dtype))
       for kind, dtype in (("u32", _U32), ("i32", np.int32), ("u16", np.uint16), ("i16", np.int16)) for given in _KINDS},
    **{f"cvt_f32_ubyte{i}": ("f32", "u32", lambda a, i=i: (a >> _U32(8 * i) & _U32(0xFF)).astype(_F32)) for i in range(4)},
    **{f"cvt_pk{rtz}_f16_f32": ("u32", "f32 f32", lambda a, b: _packed16(_rtz16(a), _rtz16(b))) for rtz in ("rtz", "_rtz")},
    "cvt_pk_f16_f32": ("u32", "f32 f32", lambda a, b: _packed16(a.astype(np.float16), b.astype(np.float16))),
    "cvt_pk_bf16_f32": ("u32", "f32 f32", lambda a, b: _bf16(a) | _bf16(b) << _U32(16)),
    "pack_b32_f16": ("u32", "f16 f16", _packed16),
}


def _table() -> dict[str, tuple[str, tuple[str, ...], Function]]:
    table = {name: (result, tuple(sources.split()), function) for name, (result, sources, function) in _OTHERS.items()}
    groups = ((_FLOATS, _KINDS, "{}_{}"), (_INTEGERS, ("u16", "i16", "u32", "i32"), "{}_{}"), (_WORDS, ("u32",), "{}"))
    for group, kinds, named in groups:
        for name, (sources, function) in group.items():
            table.update({named.format(name, kind): (kind, (kind,) * len(sources.split()), function) for kind in kinds})
    for name, (sources, function) in _BITS.items():
        table.update({f"{name}_b{kind[1:]}": (kind, (kind,) * len(sources.split()), function) for kind in ("u16", "u32")})
    return table


TABLE = _table()


def classes(x: Any, which: Any) -> Any:
    """v_cmp_class: whether x is of a kind that ``which`` has a bit of, from signalling NaN (0) to positive infinity (9)."""
    tiny, zero, inf, sign = np.abs(x) < np.finfo(x.dtype).tiny, x == 0, np.isinf(x), np.signbit(x)
    normal = ~(tiny | inf | np.isnan(x))
    kinds = (np.zeros_like(zero), np.isnan(x), inf & sign, normal & sign, tiny & ~zero & sign, zero & sign, zero & ~sign,
             tiny & ~zero & ~sign, normal & ~sign, inf & ~sign)
    return np.any([kind & (which >> np.asarray(i, which.dtype) & 1).astype(bool) for i, kind in enumerate(kinds)], axis=0)


COMPARED: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal,
    "lg": lambda a, b: (a < b) | (a > b), "neq": np.not_equal, "nlt": lambda a, b: ~(a < b), "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b), "nge": lambda a, b: ~(a >= b), "nlg": lambda a, b: ~((a < b) | (a > b)),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "u": lambda a, b: np.isnan(a) | np.isnan(b), "class": classes,
}
