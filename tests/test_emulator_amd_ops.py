"""Every vector instruction of AMD's by itself, against plain Python on the numbers of single lanes, from the ISA documents."""

import itertools
import math
import random

import numpy as np
import pytest
from support.amd import execute
from support.amd_oracle import LANES, TAME, WORD, drawn, exactly, number, oracle, ordinal, pack, permuted, unpack

from fused_attn.emulator.amd.arithmetic import COMPARED, TABLE
from fused_attn.emulator.amd.operands import DTYPES
from fused_attn.emulator.schedule import UnknownInstructionError


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_vector_instruction_is_plain_pythons(name):
    kind, kinds, _ = TABLE[name]
    function, limit = oracle(name)
    generator = random.Random(name)
    tame = any(name.startswith(stem + "_") for stem in TAME) or name.startswith("dot2")
    columns = [
        [pack(generator.uniform(0.1, 9), k) if tame and k[0] == "f" else drawn(k, generator) for _ in range(LANES)]
        for k in kinds
    ]
    if name.startswith("dot2"):
        columns[:2] = [[generator.choice((0x3C003E00, 0xBF004200, 0x40403F80)) for _ in range(LANES)] for _ in range(2)]
    registers, operands = {}, []
    for i, (k, column) in enumerate(zip(kinds, columns, strict=True)):
        wide = int(k[1:]) == 64
        for half in range(1 + wide):
            registers[2 * i + half] = np.array([x >> 32 * half & WORD for x in column], np.uint32)
        operands.append(f"v[{2 * i}:{2 * i + 1}]" if wide else f"v{2 * i}")
    wide = int(kind[1:]) == 64
    wave = execute(f"v_{name} {'v[20:21]' if wide else 'v20'}, {', '.join(operands)}", registers)
    bits = int(kind[1:])
    for lane, sources in enumerate(zip(*columns, strict=True)):
        got = int(wave.v[20][lane]) | int(wave.v[21][lane]) << 32 if wide else int(wave.v[20][lane])
        numbers = [number(x, k) for x, k in zip(sources, kinds, strict=True)]
        try:
            result = function(*numbers)
        except (ValueError, OverflowError, ZeroDivisionError):
            continue  # of no number that a test could tell
        told = f"{name} of {numbers}: {got:#x}"
        if kind[0] != "f":
            assert got == result % (1 << bits), told
            continue
        if isinstance(result, float) and math.isnan(result):
            assert math.isnan(unpack(got, kind)), told
            continue
        want = exactly(result, kind)
        if limit or name.startswith(("max", "min")):  # which zero it is, is not told
            assert abs(ordinal(got, bits) - ordinal(want, bits)) <= limit, f"{told}; expected {want:#x}"
        elif want % (1 << bits - 1) or got % (1 << bits - 1):
            assert got == want, f"{told}; expected {want:#x}"


@pytest.mark.parametrize("selector", [0x05010400, 0x07060706, 0x0C080D0B, 0xFF0C0900])
def test_bytes_that_are_the_same_for_all_lanes(selector):
    a, b = np.random.default_rng(9).integers(0, 2**32, (2, 64), np.uint32)
    wave = execute("v_perm_b32 v2, v0, v1, s4", {0: a, 1: b}, {4: selector})
    assert wave.v[2].tolist() == [permuted(int(x), int(y), selector) for x, y in zip(a, b, strict=True)]


def test_any_function_of_three_bits():
    generator = np.random.default_rng(8)
    a, b, c = generator.integers(0, 2**32, (3, 64), np.uint32)
    for table, want in (
        (0xC0, a & b),
        (0x6C, b ^ a & c),
        (0xFE, a | b | c),
        (0x96, a ^ b ^ c),
        (0xCA, a & b | ~a & c),
        (0, 0 * a),
    ):
        assert (execute(f"v_bitop3_b32 v3, v0, v1, v2 bitop3:{table:#x}", {0: a, 1: b, 2: c}, arch="gfx950").v[3] == want).all()


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "lg": lambda a, b: a < b or a > b,
    "neq": lambda a, b: a != b,
    "nlt": lambda a, b: not a < b,
    "nle": lambda a, b: not a <= b,
    "ngt": lambda a, b: not a > b,
    "nge": lambda a, b: not a >= b,
    "nlg": lambda a, b: not (a < b or a > b),
    "o": lambda a, b: a == a and b == b,
    "u": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in COMPARISONS for kind in DTYPES if kind[0] == "f" or name in ("eq", "ne", "gt", "ge", "lt", "le")],
)
def test_comparisons_write_a_mask_of_the_active_lanes(name, kind):
    generator = random.Random(name + kind)
    pairs = [(drawn(kind, generator), drawn(kind, generator)) for _ in range(LANES)]
    pairs[::5] = [(a, a) for a, _ in pairs[::5]]
    active = np.array([generator.random() < 0.8 for _ in range(LANES)])
    registers = {
        2 * i + half: np.array([pair[i] >> 32 * half & WORD for pair in pairs], np.uint32)
        for i in range(2)
        for half in range(2)
    }
    operands = ("v[0:1]", "v[2:3]") if kind.endswith("64") else ("v0", "v2")
    wave = execute(f"v_cmp_{name}_{kind}_e64 s[10:11], {', '.join(operands)}", registers, active=active)
    want = [COMPARISONS[name](number(a, kind), number(b, kind)) and bool(on) for (a, b), on in zip(pairs, active, strict=True)]
    assert wave.scalar(10, 2) == sum(1 << i for i, x in enumerate(want) if x)
    assert set(COMPARED) == {*COMPARISONS, "class"}


def test_classes_of_numbers():
    kinds = (math.nan, -math.inf, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, math.inf)  # from bit 1 on
    for (own, x), bit in itertools.product(enumerate(kinds, 1), range(10)):
        wave = execute(f"v_cmp_class_f32_e64 s[10:11], v0, {1 << bit}", {0: np.float32(x)})
        assert bool(wave.scalar(10, 2)) == (bit == own), (x, bit)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_carries_go_on(arch):
    carry = ("vcc", "s[4:5]") if arch == "gfx942" else ("vcc_lo", "s4")
    generator = np.random.default_rng(0)
    lanes = 64 if arch == "gfx942" else 32
    a, b = (generator.integers(0, 2**64, lanes, np.uint64) for _ in range(2))
    a[:2] = 2**64 - 1, 0
    registers = {
        i: (x >> np.uint64(32 * half) & np.uint64(WORD)).astype(np.uint32)
        for i, (x, half) in enumerate(((a, 0), (a, 1), (b, 0), (b, 1)))
    }
    more = (
        {"add": "addc", "sub": "subb", "subrev": "subbrev"}
        if arch == "gfx942"
        else {x: f"{x}" for x in ("add", "sub", "subrev")}
    )
    ci = "" if arch == "gfx942" else "_ci"
    for name, want in (("add", a + b), ("sub", a - b), ("subrev", b - a)):
        wave = execute(
            f"v_{name}_co_u32 v10, {carry[0]}, v0, v2\nv_{more[name]}_co{ci}_u32 v11, {carry[1]}, v1, v3, {carry[0]}",
            registers,
            arch=arch,
        )
        got = wave.v[10].astype(np.uint64) | wave.v[11].astype(np.uint64) << np.uint64(32)
        assert (got == want).all(), name
        over = {"add": a + b < a, "sub": a < b, "subrev": b < a}[name]
        assert wave.scalar(4, lanes // 32) == sum(1 << i for i, x in enumerate(over) if x), name


def test_a_product_and_a_sum_of_64_bits():
    generator = np.random.default_rng(1)
    a, b = (generator.integers(0, 2**32, 64, np.uint64) for _ in range(2))
    c = generator.integers(0, 2**64, 64, np.uint64)
    registers = {
        0: a.astype(np.uint32),
        1: b.astype(np.uint32),
        2: (c & np.uint64(WORD)).astype(np.uint32),
        3: (c >> np.uint64(32)).astype(np.uint32),
    }
    wave = execute("v_mad_u64_u32 v[10:11], s[4:5], v0, v1, v[2:3]", registers)
    exact = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    assert [int(low) | int(high) << 32 for low, high in zip(wave.v[10], wave.v[11], strict=True)] == [x % 2**64 for x in exact]
    assert wave.scalar(4, 2) == sum(1 << i for i, x in enumerate(exact) if x >> 64)


def test_a_quotient_is_refined_and_what_would_be_scaled_is_refused():
    lines = """v_div_scale_f32 v2, s[4:5], v1, v1, v0
        v_div_scale_f32 v3, vcc, v0, v1, v0
        v_rcp_f32 v4, v2
        v_fma_f32 v5, -v2, v4, 1.0
        v_fma_f32 v4, v5, v4, v4
        v_mul_f32 v5, v3, v4
        v_fma_f32 v6, -v2, v5, v3
        v_fma_f32 v5, v6, v4, v5
        v_fma_f32 v2, -v2, v5, v3
        v_div_fmas_f32 v2, v2, v4, v5
        v_div_fixup_f32 v2, v2, v1, v0"""
    generator = np.random.default_rng(2)
    n, d = (generator.standard_normal(64).astype(np.float32) for _ in range(2))
    d[:2], n[1:3] = 0, (0, 0)
    wave = execute(lines, {0: n, 1: d})
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(wave.v[2].view(np.float32), n / d)
    with pytest.raises(UnknownInstructionError, match="has to scale"):
        execute(lines, {0: np.float32(1), 1: np.float32(1e-40)})
