"""What AMD's vector instructions give, in plain Python: numbers of one lane, floats exact and rounded once."""

import math
import struct
from fractions import Fraction

WORD, CODES = 0xFFFFFFFF, {"f16": ("<e", "<H"), "f32": ("<f", "<I"), "f64": ("<d", "<Q")}
LANES = 64
HARD = {
    "f16": (0.0, -0.0, 1.0, -2.5, 65504.0, 6e-8, math.inf, -math.inf, math.nan, 0.333),
    "f32": (0.0, -0.0, 1.0, -2.5, 3.4e38, 1e-40, math.inf, -math.inf, math.nan, 0.333, 16777217.0, 2147483648.0, -1e10),
    "f64": (0.0, -0.0, 1.0, -2.5, 1.7e308, 1e-310, math.inf, -math.inf, math.nan, 1 / 3, 4294967296.0, -1e300),
}


def pack(x, kind):
    """A float's bits, rounded to the nearest, and to infinity beyond the range."""
    try:
        return struct.unpack(CODES[kind][1], struct.pack(CODES[kind][0], x))[0]
    except OverflowError:
        return pack(math.copysign(math.inf, x), kind)


def unpack(bits, kind):
    return struct.unpack(CODES[kind][0], struct.pack(CODES[kind][1], bits))[0]


def drawn(kind, generator):
    """Bits of one number of a type."""
    bits = int(kind[1:])
    if kind[0] == "f":
        if generator.random() < 0.4:
            return pack(generator.choice(HARD[kind]), kind)
        return pack(generator.choice((-1, 1)) * 2.0 ** generator.uniform(-12, 12), kind)
    return generator.choice(
        (generator.getrandbits(bits), generator.choice((0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, 31)))
    )


def number(bits, kind):
    """What bits stand for."""
    if kind[0] == "f":
        return unpack(bits, kind)
    width = int(kind[1:])
    return bits - (1 << width) if kind[0] == "i" and bits >> width - 1 else bits


def exactly(x, kind):
    """A float, or a fraction rounded once, to the nearest even."""
    if isinstance(x, float):
        return pack(x, kind)
    if x == 0:
        return pack(0.0, kind)
    digits, least = {"f16": (11, -14), "f32": (24, -126), "f64": (53, -1022)}[kind]
    exponent = max(abs(x.numerator).bit_length() - x.denominator.bit_length(), least)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent and exponent > least:
        exponent -= 1
    unit = Fraction(2) ** (exponent - digits + 1)
    x = round(x / unit) * unit
    return pack(float(x) if abs(x) < Fraction(2) ** 1024 else math.inf if x > 0 else -math.inf, kind)


def finite(*xs):
    return all(math.isfinite(x) for x in xs)


def added(a, b):
    return Fraction(a) + Fraction(b) if finite(a, b) and (a or b) else a + b


def times(a, b):
    return Fraction(a) * Fraction(b) if finite(a, b) and a and b else a * b


def fused(a, b, c):
    if finite(a, b, c) and a and b:
        total = Fraction(a) * Fraction(b) + Fraction(c)
        return total if total else 0.0
    return a * b + c


def larger(a, b):
    return b if math.isnan(a) else a if math.isnan(b) else max(a, b)


def smaller(a, b):
    return b if math.isnan(a) else a if math.isnan(b) else min(a, b)


def divided(a, b):
    if b == 0 or not finite(a, b):
        return (
            math.nan
            if a == 0 or math.isnan(a) or math.isnan(b) or (math.isinf(a) and math.isinf(b))
            else (math.copysign(1, a) * math.copysign(math.inf, b) if b == 0 else a / b)
        )
    return Fraction(a) / Fraction(b) if a else a / b


def rounded(function):
    return lambda a: float(function(a)) if finite(a) else a


def median(a, b, c):
    return sorted((a, b, c))[1]


def bytes_of(x):
    return [x >> 8 * i & 255 for i in range(8)]


def permuted(high, low, selector):
    pool, result = bytes_of(low | high << 32), 0
    for i in range(4):
        which = selector >> 8 * i & 255
        byte = pool[which] if which < 8 else 255 * (pool[2 * (which - 8) + 1] >> 7) if which < 12 else 0 if which == 12 else 255
        result |= byte << 8 * i
    return result


def saturated(x, kind):
    low, high = (0, (1 << int(kind[1:])) - 1) if kind[0] == "u" else (-(1 << int(kind[1:]) - 1), (1 << int(kind[1:]) - 1) - 1)
    return 0 if math.isnan(x) else max(low, min(high, int(x) if finite(x) else (high if x > 0 else low)))


def towards_zero(x):
    """fp16 bits."""
    bits = pack(x, "f16")
    return bits - 1 if finite(x) and abs(unpack(bits, "f16")) > abs(x) else bits


# Functions of numbers; floats give a number, or a fraction to be rounded, of any width; integers are cut to the result's bits.
FLOATS = {
    "maximum3": lambda *x: math.nan if any(map(math.isnan, x)) else max(x),
    "minimum3": lambda *x: math.nan if any(map(math.isnan, x)) else min(x),
    "add": added,
    "sub": lambda a, b: added(a, -b),
    "subrev": lambda a, b: added(b, -a),
    "mul": times,
    "max": larger,
    "min": smaller,
    "max3": lambda a, b, c: larger(larger(a, b), c),
    "min3": lambda a, b, c: smaller(smaller(a, b), c),
    "med3": median,
    "rcp": lambda a: divided(1.0, a),
    "trunc": rounded(math.trunc),
    "floor": rounded(math.floor),
    "ceil": rounded(math.ceil),
    "rndne": rounded(round),
    "fract": lambda a: Fraction(a) - math.floor(a),
    "fma": fused,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "rsq": lambda a: 1 / math.sqrt(a),
    "exp": lambda a: 2.0**a,
    "log": math.log2,
    "frexp_mant": lambda a: math.frexp(a)[0],
    "sin": lambda a: math.sin(2 * math.pi * a),
    "cos": lambda a: math.cos(2 * math.pi * a),
}
LIMITS = {
    "sqrt": 2,
    "rsq": 4,
    "exp": 8,
    "log": 8,
    "sin": 1 << 12,
    "cos": 1 << 12,
    "rcp": 0,
}  # units in the last place; others 0
TAME = ("fract", "rsq", "exp", "log", "frexp_mant", "sin", "cos", "med3", "div_fixup")  # drawn from ordinary positive numbers
INTEGERS = {
    "add": lambda a, b: a + b,
    "add_nc": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "sub_nc": lambda a, b: a - b,
    "subrev": lambda a, b: b - a,
    "subrev_nc": lambda a, b: b - a,
    "mul_lo": lambda a, b: a * b,
    "max": max,
    "min": min,
    "med3": median,
    "max3": max,
    "min3": min,
    "mad": lambda a, b, c: a * b + c,
    "add3": lambda a, b, c: a + b + c,
    "xad": lambda a, b, c: (a ^ b) + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "xnor": lambda a, b: ~(a ^ b),
    "not": lambda a: ~a,
    "mov": lambda a: a,
    "or3": lambda a, b, c: a | b | c,
    "xor3": lambda a, b, c: a ^ b ^ c,
    "and_or": lambda a, b, c: a & b | c,
    "bfi": lambda a, b, c: a & b | ~a & c,
    "accvgpr_read": lambda a: a,
    "accvgpr_write": lambda a: a,
    "accvgpr_mov": lambda a: a,
}
SHIFTED = {  # of the bits of the result
    "lshlrev": lambda a, b, n: b << a % n,
    "lshrrev": lambda a, b, n: b >> a % n,
    "ashrrev": lambda a, b, n: b >> a % n,
    "lshl_add": lambda a, b, c, n: (a << b % n) + c,
    "add_lshl": lambda a, b, c, n: (a + b) << c % n,
    "lshl_or": lambda a, b, c, n: a << b % n | c,
    "bfm": lambda a, b, n: (1 << a % n) - 1 << b % n,
}
OTHERS = {
    "mul_hi_u32": lambda a, b: a * b >> 32,
    "mul_hi_i32": lambda a, b: a * b >> 32,
    "mul_u32_u24": lambda a, b: a % 2**24 * (b % 2**24),
    "mad_u32_u24": lambda a, b, c: a % 2**24 * (b % 2**24) + c,
    "mul_i32_i24": lambda a, b: number24(a) * number24(b),
    "mad_i32_i24": lambda a, b, c: number24(a) * number24(b) + c,
    "lshl_add_u64": lambda a, b, c: (a << b % 8) + c,
    "bfe_u32": lambda a, b, c: a >> b % 32 & (1 << c % 32) - 1,
    "bfe_i32": lambda a, b, c: cut_signed(a, b % 32, c % 32),
    "bfrev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "perm_b32": permuted,
    "ffbh_u32": lambda a: 32 - a.bit_length() if a else -1,
    "clz_i32_u32": lambda a: 32 - a.bit_length() if a else -1,
    "alignbit_b32": lambda a, b, c: (a << 32 | b) >> c % 32,
    "alignbyte_b32": lambda a, b, c: (a << 32 | b) >> 8 * (c % 4),
    "bcnt_u32_b32": lambda a, b: a.bit_count() + b,
    "mov_b64": lambda a: a,
    **{f"cvt_f32_ubyte{i}": lambda a, i=i: float(a >> 8 * i & 255) for i in range(4)},
    "pack_b32_f16": lambda a, b: pack(a, "f16") | pack(b, "f16") << 16,
    **{f"cvt_pk{rtz}_f16_f32": lambda a, b: towards_zero(a) | towards_zero(b) << 16 for rtz in ("rtz", "_rtz")},
    "cvt_pk_f16_f32": lambda a, b: pack(a, "f16") | pack(b, "f16") << 16,
    "cvt_pk_bf16_f32": lambda a, b: bfloat16(a) | bfloat16(b) << 16,
    "mul_legacy_f32": lambda a, b: 0.0 if a == 0 or b == 0 else times(a, b),
    "rcp_iflag_f32": lambda a: divided(1.0, a),
    **{
        f"ldexp_{kind}": lambda a, b: times(a, Fraction(2) ** max(-3000, min(3000, b))) if finite(a) and a else a
        for kind in CODES
    },
    **{f"frexp_exp_i32_{kind}": lambda a: math.frexp(a)[1] if finite(a) else 0 for kind in CODES},
    **{f"div_fixup_{kind}": lambda q, d, n: math.copysign(q, d * n) for kind in CODES},
    **{f"dot2_f32_{kind}": lambda a, b, c, kind=kind: dot2(a, b, c, kind) for kind in ("f16", "bf16")},
}


def bfloat16(x):
    """The bits of the nearest: of two as near, the even one."""
    bits = pack(x, "f32")
    if math.isnan(x):
        return bits >> 16 | 64
    low, rest = bits >> 16, bits & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low & 1))


def number24(x):
    x %= 2**24
    return x - 2**24 if x >> 23 else x


def cut_signed(x, offset, width):
    field = x >> offset & (1 << width) - 1
    return field - (1 << width) if width and field >> width - 1 else field


def dot2(a, b, c, kind):
    half = (lambda x: unpack(x & 0xFFFF, "f16")) if kind == "f16" else (lambda x: unpack((x & 0xFFFF) << 16, "f32"))
    return Fraction(half(a)) * Fraction(half(b)) + Fraction(half(a >> 16)) * Fraction(half(b >> 16)) + Fraction(c)


def oracle(name):
    """(function of the sources' numbers, units in the last place that it may be off)."""
    if name in OTHERS:
        return OTHERS[name], 1 if name.startswith("dot2") else 0
    stem, _, kind = name.rpartition("_")
    if name.startswith("cvt_"):
        given = name.split("_")[2]
        return (lambda a: saturated(a, name.split("_")[1])) if given[0] == "f" and name[4] in "ui" else (lambda a: a), 0
    if stem in SHIFTED:
        return lambda *x: SHIFTED[stem](*x, int(kind[1:])), 0
    if kind[0] == "f" and stem in FLOATS:
        return FLOATS[stem], LIMITS.get(stem, 0)
    return INTEGERS[stem], 0


def ordinal(bits, width):
    """Neighbouring floats have neighbouring ones."""
    return -(bits & (1 << width - 1) - 1) if bits >> width - 1 else bits
