"""Every arithmetic opcode of the emulator against NumPy, written from the PTX ISA, on random lanes and the values that hurt."""

import re
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("triton")

from fused_attn.emulator import machine, opcodes
from fused_attn.emulator.encode import encode
from fused_attn.emulator.ptx import parse
from fused_attn.interpreter import bf16_to_fp32, fp32_to_bf16

pytestmark = pytest.mark.kernels
N = 8  # launches' worth of lanes, of 32 each
DTYPES = {
    "pred": np.uint32, "u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32,
    "u64": np.uint64, "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.float32,
}
WORDS = {4: "b32", 8: "b64"}


def words(kind):
    """How a value of a type travels: bytes of its register, and of one value in memory."""
    if kind in ("u8", "s8", "u16", "s16", "f16", "bf16"):
        return "b16", 2
    return ("b64", 8) if opcodes.lane_bytes(kind) == 8 else ("b32", 4)


def kernel(op):
    """PTX that applies an opcode to arrays: parameters are the result's address, then the operands'."""
    lines, names = [], []
    for k, kind in enumerate(op.types):
        word, size = words(kind)
        lines += [f".reg .{word} %x{k}_; .reg .b64 %p{k}_;", f"ld.param.b64 %p{k}_, [f_param_{k}];",
                  f"mad.wide.u32 %p{k}_, %at, {size}, %p{k}_;"]
        if k:
            lines.append(f"ld.global.{word} %x{k}_, [%p{k}_];")
        if kind == "pred":
            lines.append(f".reg .pred %q{k}_;" + f" setp.ne.u32 %q{k}_, %x{k}_, 0;" * (k > 0))
        names.append(f"%q{k}_" if kind == "pred" else f"%x{k}_")
    done = "selp.b32 %x0_, 1, 0, %q0_;" if op.types[0] == "pred" else ""
    word, _ = words(op.types[0])
    params = ", ".join(f".param .u64 f_param_{k}" for k in range(len(op.types)))
    return "\n".join([
        f".visible .entry f({params}) .reqntid 32 {{",
        ".reg .b32 %at, %cta;", "mov.u32 %at, %tid.x; mov.u32 %cta, %ctaid.x;", "mad.lo.s32 %at, %cta, 32, %at;",
        *lines,
        f"{op.name.partition(' ')[0]} {', '.join(names)};", done,
        f"st.global.{word} [%p0_], %x0_;", "ret; }",
    ])


def run(op, operands):
    """The bits of the result, as stored."""
    _, size = words(op.types[0])
    out = np.zeros(N * 32, f"u{size}")
    arrays = [out, *operands]
    params = b"".join(np.uint64(x.ctypes.data).tobytes() for x in arrays)
    program = encode(parse(kernel(op)), (N, 1, 1), 0)
    ranges = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays]
    machine.run(program, (N, 1, 1), params, 0, ranges, machine.Schedule(seed=1))
    return out


def draw(kind, rng):
    """Bits of values of a type, random and special."""
    _, size = words(kind)
    if kind == "pred":
        return rng.integers(0, 2, N * 32).astype(np.uint32)
    if kind[0] in "us":
        bits = rng.integers(0, 2**64, N * 32, np.uint64, endpoint=False)
        bits >>= rng.integers(0, 64, N * 32).astype(np.uint64) * (rng.integers(0, 2, N * 32) > 0)
        bits[:5] = 0, 1, 2**63, 2**31, 2**64 - 1
        return bits.astype(f"u{size}")
    of = opcodes.PAIRS.get(kind, kind)
    n = N * 32 * (2 if kind in opcodes.PAIRS else 1)
    values = rng.standard_normal(n) * 2.0 ** rng.integers(-8, 8, n)
    values[:12] = 0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 0.5, 2.5, 1e-41, -1e-40, 3e38
    return bits_of(rng.permutation(values), of).view(f"u{size}")


def bits_of(values, kind):
    with np.errstate(over="ignore"):
        if kind == "bf16":
            return fp32_to_bf16(values.astype(np.float32))
        return values.astype(DTYPES[kind]).view(f"u{np.dtype(DTYPES[kind]).itemsize}")


def values_of(bits, kind):
    if kind == "bf16":
        return bf16_to_fp32(bits.astype(np.uint16))
    if kind == "pred":
        return bits != 0
    dtype = np.dtype(DTYPES[kind])
    return bits.astype(f"u{dtype.itemsize}").view(dtype)


def flush(x):
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), x), x)


def wide(x):
    """More digits than the type has, so that one rounding is left to do; fp64 rounds as it goes."""
    return x if x.dtype == np.float64 else x.astype(np.longdouble)


def fused(a, b, c):
    if a.dtype != np.float64:
        return wide(a) * wide(b) + wide(c)
    plain = a * b + c
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) if np.isfinite(p) and p else p
             for x, y, z, p in zip(a, b, c, plain, strict=True)]
    return np.array(exact)


def shifted(name, t, a, b):
    bits, signed = int(t[1:]), t[0] == "s"
    by = np.minimum(b, bits).astype(np.uint64)
    if name == "shl":
        return np.array([(int(x) << int(y)) % 2**bits for x, y in zip(a, by, strict=True)], np.uint64)
    return np.array([int(x) >> int(min(y, bits - 1) if signed else y) for x, y in zip(a, by, strict=True)], object)


def each(function, *arrays):
    return np.array([function(*(int(x) for x in lane)) for lane in zip(*arrays, strict=True)], object)


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(x, start, count, signed):
    if count == 0:
        return 0
    top = min(start + count - 1, 31)
    value = (x >> start) & ((1 << count) - 1) if start < 32 else 0
    value &= 2**32 - 1
    width = max(top - start + 1, 0)
    return value - (1 << width) if signed and x >> top & 1 and width else -1 if signed and x >> top & 1 else value


def permuted(a, b, how):
    pool = (b << 32 | a).to_bytes(8, "little")
    picked = [(pool[how >> 4 * k & 7], how >> 4 * k & 8) for k in range(4)]
    return int.from_bytes(bytes((0xFF if byte & 0x80 else 0) if sign else byte for byte, sign in picked), "little")


def inserted(a, b, start, count):
    ones = ((1 << count) - 1) << start & (2**32 - 1)
    return b & ~ones | a << start & ones


def looked_up(a, b, c, table):
    return sum((table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k for k in range(32))


WHOLE = {  # by whole name, on Python's integers
    "popc.b32": lambda a: a.bit_count(), "popc.b64": lambda a: a.bit_count(), "clz.b32": lambda a: 32 - a.bit_length(),
    "clz.b64": lambda a: 64 - a.bit_length(), "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfe.u32": lambda a, b, c: field(a, b & 255, c & 255, False),
    "bfe.s32": lambda a, b, c: field(a % 2**32, b & 255, c & 255, True),
    "bfi.b32": lambda a, b, c, e: inserted(a, b, c & 255, e & 255),
    "prmt.b32": permuted, "lop3.b32": lambda a, b, c, e: looked_up(a, b, c, e & 255),
    "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
    "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "min.relu.s32": lambda a, b: max(min(a, b), 0), "max.relu.s32": lambda a, b: max(a, b, 0),
}
INTEGER = {  # by family
    "mov": lambda a: a, "cvt": lambda a: a, "selp": lambda a, b, c: a if c else b,
    "not": lambda a: ~a, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "neg": lambda a: -a, "abs": abs, "min": min, "max": max,
    "mul.lo": lambda a, b: a * b, "mad.lo": lambda a, b, c: a * b + c,
    "mul.wide": lambda a, b: a * b, "mad.wide": lambda a, b, c: a * b + c,
}
COMPARED = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
            "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}
ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def of_integers(op, operands):
    """Results as Python's integers, of any size: the register keeps the low bits."""
    family = re.sub(r"\.([busf]\d+|pred)$", "", op.name)
    t = op.name.rsplit(".", 1)[1]
    if op.name in WHOLE:
        return each(WHOLE[op.name], *operands)
    if family in ("shl", "shr"):
        return shifted(family, "u" + t[1:] if t[0] == "b" else t, operands[0], operands[1])
    if family.startswith("setp"):
        return COMPARED[family.split(".")[1]](operands[0], operands[1]).astype(np.uint32)
    if family == "mul.hi":
        return each(lambda a, b: a * b >> int(t[1:]), *operands)
    if family == "div":
        return each(lambda a, b: quotient(a, b) if b else -1, *operands)
    if family == "rem":
        return each(lambda a, b: a - quotient(a, b) * b if b else a, *operands)
    if op.name.endswith((opcodes.FROM_64, opcodes.TO_64)):
        to, source = op.name.partition(" ")[0].split(".")[1:]
        return operands[0].astype(DTYPES[source]).astype(DTYPES[to])
    return each(INTEGER["cvt" if family.startswith("cvt") else family], *operands)


def smaller(a, b, sign):
    """min (max, of sign -1) of IEEE 754-2019's minimumNumber: a number before NaN, -0 below +0."""
    first = (a * sign < b * sign) | ((a == b) & (np.signbit(a) == (sign > 0))) | np.isnan(b)
    return np.where(first & ~np.isnan(a), a, np.where(np.isnan(b), a, b))


def of_floats(op, operands):
    """Results as values, before they are rounded to the type of the result."""
    base, *mods = op.name.split(".")
    ftz = "ftz" in mods
    a, b, c = (*[flush(x) if ftz and op.types[1] == "f32" else x for x in operands], None, None)[:3]
    unary = {
        "neg": lambda: -a, "abs": lambda: abs(a), "copysign": lambda: np.copysign(b, a),
        "rcp": lambda: 1 / wide(a), "sqrt": lambda: np.sqrt(wide(a)), "rsqrt": lambda: 1 / np.sqrt(wide(a)),
        "ex2": lambda: np.exp2(wide(a)), "lg2": lambda: np.log2(wide(a)),
        "sin": lambda: np.sin(wide(a)), "cos": lambda: np.cos(wide(a)), "tanh": lambda: np.tanh(wide(a)),
        "add": lambda: wide(a) + wide(b), "sub": lambda: wide(a) - wide(b),
        "mul": lambda: wide(a) * wide(b), "div": lambda: wide(a) / wide(b), "fma": lambda: fused(a, b, c),
    }
    if base == "setp":
        how, unordered = mods[0].removesuffix("u") if mods[0] not in ("num", "nan") else mods[0], np.isnan(a) | np.isnan(b)
        if how in ("num", "nan"):
            return unordered == (how == "nan")
        return np.where(unordered, mods[0].endswith("u"), COMPARED[how](a, b))
    if base in ("min", "max"):
        sign = 1 if base == "min" else -1
        value = smaller(a, b, sign) if c is None else smaller(smaller(a, b, sign), c, sign)
        return np.where(np.isnan(a) | np.isnan(b), np.nan, value) if "NaN" in mods else value
    if base == "cvt":
        if mods[0] == "sat":
            return np.where(np.isnan(a), 0, np.clip(a, 0, 1))
        return ROUNDED[mods[0]](a) if mods[0] in ROUNDED else a
    return flush(unary[base]().astype(np.float32)) if ftz and op.types[0] == "f32" else unary[base]()


def saturated(values, kind):
    low, high = np.iinfo(DTYPES[kind]).min, np.iinfo(DTYPES[kind]).max
    return np.array([0 if np.isnan(x) else int(min(max(x, low), high)) if np.isfinite(x) else (high if x > 0 else low)
                     for x in wide(values)], object)


@pytest.mark.parametrize("op", opcodes.table(), ids=lambda op: f"{op.name}-{len(op.types) - 1}")
@np.errstate(all="ignore")
def test_every_opcode_is_numpys(op):
    rng = np.random.default_rng(sum(map(ord, op.name)))
    bits = [draw(kind, rng) for kind in op.types[1:]]
    if op.name.startswith(("bfi", "bfe")):  # fields of at most 32 bits, most of them within the word
        bits[-1], bits[-2] = bits[-1] % 33, bits[-2] % 32
    if op.name.split(".")[0] in ("shl", "shr"):
        bits[1] %= 70
    got = run(op, bits)
    out = op.types[0]
    if op.name in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):
        half = op.name.split(".")[2][:-2]
        high, low = (bits_of(values_of(x, "f32").astype(np.float64), half).astype(np.uint32) for x in bits)
        return equal(np.stack((got & 0xFFFF, got >> 16)), np.stack((low, high)), half)
    if op.name == "cvt.rna.tf32.f32":
        rounded = np.where(np.isfinite(values_of(bits[0], "f32")), bits[0] + np.uint32(0x1000), bits[0])
        return equal(got, rounded & np.uint32(0xFFFFE000), "f32")
    if out in opcodes.PAIRS:
        of = opcodes.PAIRS[out]
        half = op._replace(name=op.name.removesuffix("x2"), types=(of,) * len(op.types))
        parts = [x.view(f"u{np.dtype(DTYPES[of]).itemsize if of != 'bf16' else 2}") for x in bits]
        expected = bits_of(of_floats(half, [values_of(x, of) for x in parts]), of)
        return equal(got.view(expected.dtype), expected, of)
    values = [values_of(x, kind) for x, kind in zip(bits, op.types[1:], strict=True)]
    if all(kind[0] in "usp" for kind in op.types):
        if out == "pred" or op.types[1] == "pred":
            expected = of_integers(op, values).astype(bool) if not op.name.startswith("not") else ~values[0]
            return np.testing.assert_array_equal(got.astype(bool), expected)
        size = 8 * np.dtype(DTYPES[out]).itemsize
        expected = np.array([int(x) % 2**size for x in of_integers(op, values)], np.uint64)
        return np.testing.assert_array_equal(got & np.uint64(2**size - 1), expected)
    if op.name.startswith("selp"):
        expected = np.where(values[2], bits[0], bits[1])
        return np.testing.assert_array_equal(got, expected)
    expected = of_floats(op, [x.astype(np.float64) if op.types[1][0] in "us" else x for x in values])
    if out == "pred":
        return np.testing.assert_array_equal(got.astype(bool), expected)
    if out[0] in "us":
        size = 8 * np.dtype(DTYPES[out]).itemsize
        return np.testing.assert_array_equal(got, np.array([int(x) % 2**size for x in saturated(expected, out)], got.dtype))
    if op.name == "rcp.approx.ftz.f64":
        return np.testing.assert_allclose(values_of(got, "f64"), expected.astype(float), rtol=2e-6)
    return equal(got, bits_of(expected, out), out, "approx" in op.name or "full" in op.name)


def equal(got, expected, kind, nearly=False):
    """To the bit, but for what a NaN holds; ``nearly``: to an ulp, since two libraries round their functions differently."""
    x, y = values_of(got, kind), values_of(expected, kind)
    np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
    same = np.isnan(x) | (got == expected.astype(got.dtype))
    if nearly:
        same |= np.abs(x.astype(np.float64) - y) <= 2.0**-23 * np.abs(y)
    np.testing.assert_array_equal(x[~same], y[~same])
