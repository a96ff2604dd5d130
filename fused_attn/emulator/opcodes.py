"""What each arithmetic opcode computes, lane by lane: the table that the machine's C is generated from.

An entry names opcodes as PTX spells them, gives the types of the result and of the operands a, b, c, e, and a C expression in
them. Values come as C's own types (halves as f64, predicates as 0 and 1); ``approx`` marks what a card computes to 2 ulp.
"""

import functools
import itertools
import re
from typing import NamedTuple

# How a type stands in a lane: bytes of the lane, a C value from the stored word x, and back from a value v.
LANES = {
    "pred": (4, "(x != 0)", "(v ? ~0u : 0)"),
    "u8": (4, "(u8)x", "(u32)(u8)(v)"), "s8": (4, "(s8)x", "(u32)(u8)(v)"),
    "u16": (4, "(u16)x", "(u32)(u16)(v)"), "s16": (4, "(s16)x", "(u32)(u16)(v)"),
    "u32": (4, "x", "(u32)(v)"), "s32": (4, "(s32)x", "(u32)(v)"),
    "u64": (8, "x", "(u64)(v)"), "s64": (8, "(s64)x", "(u64)(v)"),
    "f16": (4, "f16_f64(x)", "f64_f16(v)"), "bf16": (4, "bf16_f64(x)", "f64_bf16(v)"),
    "f32": (4, "as_f32(x)", "as_u32(v)"), "f64": (8, "as_f64(x)", "as_u64(v)"),
}
# Two of a kind in one word, computed one by one.
PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
FROM_64, TO_64 = " from 64", " to 64"
C_TYPE = {"pred": "u32", "f16": "f64", "bf16": "f64"}  # of values that are not what PTX calls them


class Op(NamedTuple):
    """One opcode: types of the result and the operands, and the expression.

    A conversion may take or fill a register wider than its type: such an entry has ``FROM_64`` or ``TO_64`` after its name.
    """

    name: str
    types: tuple[str, ...]
    expression: str


def lane_bytes(kind: str) -> int:
    """4 or 8: what a register of this type takes in each lane."""
    return LANES[kind][0] if kind in LANES else 8 if kind == "f32x2" else 4


def spelled(pattern: str) -> list[str]:
    """``add.{u,s}32`` as add.u32, add.s32."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    parts = [part if i % 2 else [",".join(part)] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _unsigned(kind: str) -> str:
    return "u" + kind[1:]


def _bits() -> list[tuple[str, str, str]]:
    found = [("mov.pred", "pred pred", "a"), ("not.pred", "pred pred", "!a")]
    found += [(f"{name}.pred", "pred pred pred", f"a {c} b") for name, c in (("and", "&"), ("or", "|"), ("xor", "^"))]
    for bits in ("16", "32", "64"):
        t = "u" + bits
        found += [(f"mov.{{b,u,s{',f' * (bits != '16')}}}{bits}", f"{t} {t}", "a"), (f"not.b{bits}", f"{t} {t}", "~a")]
        found += [(f"{name}.b{bits}", f"{t} {t} {t}", f"a {c} b") for name, c in (("and", "&"), ("or", "|"), ("xor", "^"))]
        found += [(f"selp.{{b,u,s{',f' * (bits != '16')}}}{bits}", f"{t} {t} {t} pred", "c ? a : b"),
                  (f"shl.b{bits}", f"{t} {t} u32", f"b > {int(bits) - 1} ? 0 : ({t})(a << b)"),
                  (f"shr.{{u,b}}{bits}", f"{t} {t} u32", f"b > {int(bits) - 1} ? 0 : ({t})(a >> b)"),
                  (f"shr.s{bits}", f"s{bits} s{bits} u32", f"a >> (b > {int(bits) - 1} ? {int(bits) - 1} : b)")]
    return [
        *found,
        ("popc.b32", "u32 u32", "__builtin_popcount(a)"), ("popc.b64", "u32 u64", "__builtin_popcountll(a)"),
        ("clz.b32", "u32 u32", "a ? __builtin_clz(a) : 32"), ("clz.b64", "u32 u64", "a ? __builtin_clzll(a) : 64"),
        ("brev.b32", "u32 u32", "reversed(a)"),
        ("bfe.u32", "u32 u32 u32 u32", "bits_from(a, b & 255, c & 255)"),
        ("bfe.s32", "s32 s32 u32 u32", "signed_bits_from(a, b & 255, c & 255)"),
        ("bfi.b32", "u32 u32 u32 u32 u32", "bits_into(a, b, c & 255, e & 255)"),
        ("prmt.b32", "u32 u32 u32 u32", "permuted(a, b, c)"),
        ("lop3.b32", "u32 u32 u32 u32 u32", "by_table(a, b, c, e)"),
        ("shf.l.wrap.b32", "u32 u32 u32 u32", "((u64)b << 32 | a) << (c & 31) >> 32"),
        ("shf.r.wrap.b32", "u32 u32 u32 u32", "((u64)b << 32 | a) >> (c & 31)"),
        ("shf.l.clamp.b32", "u32 u32 u32 u32", "c > 31 ? a : ((u64)b << 32 | a) << c >> 32"),
        ("shf.r.clamp.b32", "u32 u32 u32 u32", "c > 31 ? b : ((u64)b << 32 | a) >> c"),
    ]


def _integers() -> list[tuple[str, str, str]]:
    found = []
    for t in INTEGERS:
        u = _unsigned(t)
        found += [(f"{name}.{t}", f"{u} {u} {u}", f"a {c} b") for name, c in (("add", "+"), ("sub", "-"))]
        found += [(f"mul.lo.{t}", f"{u} {u} {u}", f"({u})((u64)a * b)"),
                  (f"mad.lo.{t}", f"{u} {u} {u} {u}", f"({u})((u64)a * b + c)"),
                  (f"min.{t}", f"{t} {t} {t}", "a < b ? a : b"), (f"max.{t}", f"{t} {t} {t}", "a > b ? a : b")]
        if t[0] == "s":
            found += [(f"neg.{t}", f"{u} {u}", "-a"), (f"abs.{t}", f"{u} {t}", f"a < 0 ? -({u})a : ({u})a")]
    for t in ("u32", "s32", "u64", "s64"):
        wide = {"u32": "u64", "s32": "s64", "u64": "u128", "s64": "s128"}[t]
        overflows = f"b == -1 ? ({t})-({_unsigned(t)})a : " if t[0] == "s" else ""
        found += [(f"div.{t}", f"{t} {t} {t}", f"b == 0 ? ({t})-1 : {overflows}a / b"),
                  (f"rem.{t}", f"{t} {t} {t}", f"b == 0 ? a : {'b == -1 ? 0 : ' if t[0] == 's' else ''}a % b"),
                  (f"mul.hi.{t}", f"{t} {t} {t}", f"({wide})a * b >> {t[1:]}")]
    for t, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
        found += [(f"mul.wide.{t}", f"{wide} {t} {t}", f"({wide})a * b"),
                  (f"mad.wide.{t}", f"{_unsigned(wide)} {t} {t} {_unsigned(wide)}", f"({_unsigned(wide)})(({wide})a * b) + c")]
    return [*found, ("min.relu.s32", "s32 s32 s32", "(a < b ? a : b) < 0 ? 0 : a < b ? a : b"),
            ("max.relu.s32", "s32 s32 s32", "(a > b ? a : b) < 0 ? 0 : a > b ? a : b")]


def _comparisons() -> list[tuple[str, str, str]]:
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    found = []
    for t in INTEGERS:
        found += [(f"setp.{name}.{t}", f"pred {t} {t}", f"a {c} b") for name, c in signs.items()]
        if t[0] == "u":
            found += [(f"setp.{name}.b{t[1:]}", f"pred {t} {t}", f"a {signs[name]} b") for name in ("eq", "ne")]
    for t in ("f32", "f64", "f16", "bf16"):
        for name, c in signs.items():
            ordered = "a == a && b == b && " if name == "ne" else ""
            found += [(f"setp.{name}.{t}", f"pred {t} {t}", f"{ordered}a {c} b"),
                      (f"setp.{name}u.{t}", f"pred {t} {t}", f"a != a || b != b || a {c} b")]
        found += [(f"setp.num.{t}", f"pred {t} {t}", "a == a && b == b"),
                  (f"setp.nan.{t}", f"pred {t} {t}", "a != a || b != b")]
    return found


def _floats() -> list[tuple[str, str, str]]:
    found = []
    for t in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"):
        fma = "fmaf(a, b, c)" if t in ("f32", "f32x2") else "fma(a, b, c)"
        found += [(f"{name}{{,.rn}}.{t}", f"{t} {t} {t}", f"a {c} b") for name, c in (("add", "+"), ("sub", "-"), ("mul", "*"))]
        found += [(f"fma.rn.{t}", f"{t} {t} {t} {t}", fma)]
        if t != "f32x2":
            found += [(f"{name}.{t}", f"{t} {t} {t}", f"{name}imum(a, b)") for name in ("min", "max")]
            found += [(f"neg.{t}", f"{t} {t}", "-a"), (f"abs.{t}", f"{t} {t}", "fabsf(a)" if t == "f32" else "fabs(a)")]
        if t not in ("f32x2", "f64"):
            found += [(f"{name}.NaN.{t}", f"{t} {t} {t}", f"a != a || b != b ? NAN : {name}imum(a, b)")
                      for name in ("min", "max")]
    for half in ("f16", "bf16"):  # halves into fp32
        found += [(f"{name}.rn.f32.{half}", f"f32 {half} f32", f"(f32)a {c} b") for name, c in (("add", "+"), ("sub", "-"))]
        found += [(f"fma.rn.f32.{half}", f"f32 {half} {half} f32", "fmaf((f32)a, (f32)b, c)")]
    for name, c in (("add", "+"), ("sub", "-"), ("mul", "*")):
        found += [(f"{name}{{,.rn}}.ftz.f32", "f32 f32 f32", f"ftz(ftz(a) {c} ftz(b))")]
    found += [
        ("fma.rn.ftz.f32", "f32 f32 f32 f32", "ftz(fmaf(ftz(a), ftz(b), ftz(c)))"),
        *((f"{name}.f32", "f32 f32 f32 f32", f"{name}imum({name}imum(a, b), c)") for name in ("min", "max")),
        ("div.full.f32", "f32 f32 f32", "approx(a / b)"), ("div.rn.f32", "f32 f32 f32", "a / b"),
        ("div.full.ftz.f32", "f32 f32 f32", "approx(ftz(ftz(a) / ftz(b)))"), ("div.rn.f64", "f64 f64 f64", "a / b"),
        ("rcp.rn.f32", "f32 f32", "1 / a"), ("rcp.approx.f32", "f32 f32", "approx(1 / a)"),
        ("rcp.approx.ftz.f32", "f32 f32", "approx(ftz(1 / ftz(a)))"), ("rcp.rn.f64", "f64 f64", "1 / a"),
        ("sqrt.rn.f32", "f32 f32", "sqrtf(a)"), ("sqrt.approx.f32", "f32 f32", "approx(sqrtf(a))"),
        ("sqrt.approx.ftz.f32", "f32 f32", "approx(ftz(sqrtf(ftz(a))))"), ("sqrt.rn.f64", "f64 f64", "sqrt(a)"),
        ("rsqrt.approx.f32", "f32 f32", "approx(1 / sqrtf(a))"),
        ("rsqrt.approx.ftz.f32", "f32 f32", "approx(1 / sqrtf(ftz(a)))"),
        ("abs.ftz.f32", "f32 f32", "ftz(fabsf(a))"), ("neg.ftz.f32", "f32 f32", "ftz(-a)"),
        ("rcp.approx.ftz.f64", "f64 f64", "as_f64(as_u64(1 / a) & ~0xffffffffull)"),  # of the upper word alone
        ("ex2.approx.f32", "f32 f32", "approx(exp2f(a))"), ("ex2.approx.ftz.f32", "f32 f32", "approx(ftz(exp2f(ftz(a))))"),
        ("lg2.approx.f32", "f32 f32", "approx(log2f(a))"), ("lg2.approx.ftz.f32", "f32 f32", "approx(log2f(ftz(a)))"),
        ("sin.approx.f32", "f32 f32", "approx(sinf(a))"), ("cos.approx.f32", "f32 f32", "approx(cosf(a))"),
        ("tanh.approx.f32", "f32 f32", "approx(tanhf(a))"),
        ("copysign.f32", "f32 f32 f32", "copysignf(b, a)"), ("copysign.f64", "f64 f64 f64", "copysign(b, a)"),
    ]
    return found


def _conversions() -> list[tuple[str, str, str]]:
    integers = ("u8", "s8", *INTEGERS)
    found = [(f"cvt.{to}.{source}", f"{to} {source}", f"({to})a") for to in integers for source in integers if to != source]
    narrow = integers[:-2]
    found += [(f"cvt.{to}.{source}{FROM_64}", f"{to} u64", f"({to})({source})a")
              for to, source in itertools.product(integers, narrow) if to != source]
    found += [(f"cvt.{to}.{source}{TO_64}", f"{to[0]}64 {source}", f"({to})a")
              for to, source in itertools.product(narrow, integers) if to != source]
    for t in integers:
        found += [(f"cvt.rn.f32.{t}", f"f32 {t}", "(f32)a"), (f"cvt.rn.f64.{t}", f"f64 {t}", "(f64)a"),
                  (f"cvt.rn.f16.{t}", f"f16 {t}", "(f64)a")]
        for source, (rounding, function) in itertools.product(("f32", "f64", "f16", "bf16"), _ROUNDINGS.items()):
            low, high = (0, 2 ** int(t[1:]) - 1) if t[0] == "u" else (-(2 ** (int(t[1:]) - 1)), 2 ** (int(t[1:]) - 1) - 1)
            expression = f"TO_INTEGER({t}, {function}((f64)a), {_c(low)}, {_c(high)})"
            found.append((f"cvt.{rounding}.{t}.{source}", f"{t} {source}", expression))
    found += [
        ("cvt.f64.f32", "f64 f32", "a"), ("cvt.rn.f32.f64", "f32 f64", "(f32)a"),
        *((f"cvt.{to}.{half}", f"{to} {half}", "a") for to in ("f32", "f64") for half in ("f16", "bf16")),
        *((f"cvt.rn.{half}.{source}", f"{half} {source}", "a") for source in ("f32", "f64") for half in ("f16", "bf16")),
        *((f"cvt.{rounding}.f32.f32", "f32 f32", f"(f32){function}(a)") for rounding, function in _ROUNDINGS.items()),
        *((f"cvt.{rounding}.ftz.f32.f32", "f32 f32", f"(f32){function}(ftz(a))") for rounding, function in _ROUNDINGS.items()),
        ("cvt.sat.f32.f32", "f32 f32", "a != a || a < 0 ? 0 : a > 1 ? 1 : a"),
        ("cvt.rn.bf16x2.f32", "u32 f32 f32", "f32_bf16(a) << 16 | f32_bf16(b)"),
        ("cvt.rn.f16x2.f32", "u32 f32 f32", "f32_f16(a) << 16 | f32_f16(b)"),
        ("cvt.rna.tf32.f32", "u32 f32", "f32_tf32(a)"),
    ]
    return found


_ROUNDINGS = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


def _c(bound: int) -> str:
    return f"{float(bound)!r}" if abs(bound) > 2**53 else str(bound)


@functools.cache
def table() -> tuple[Op, ...]:
    """Every arithmetic opcode, in a fixed order: the position is the number that the machine knows it by."""
    rows = [*_bits(), *_integers(), *_comparisons(), *_floats(), *_conversions()]
    return tuple(Op(name, tuple(types.split()), expression) for pattern, types, expression in rows for name in spelled(pattern))


@functools.cache
def numbers() -> dict[tuple[str, int], int]:
    """Position in the table by name and number of operands, result included."""
    return {(op.name, len(op.types)): i for i, op in enumerate(table())}
