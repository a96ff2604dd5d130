"""Every scalar instruction of AMD's by itself, against plain Python."""

import random

import numpy as np
import pytest
from support.amd import execute

WORD = 0xFFFFFFFF


def signed(x):
    return x - 2**32 if x >> 31 else x


def cut_signed(x, offset, width):
    field = x >> offset & (1 << width) - 1
    return field - (1 << width) if width and field >> width - 1 else field


SCALARS = {
    "add_u32": (lambda a, b, c: a + b, lambda a, b, c: a + b > WORD),
    "addc_u32": (lambda a, b, c: a + b + c, lambda a, b, c: a + b + c > WORD),
    "sub_u32": (lambda a, b, c: a - b, lambda a, b, c: b > a),
    "subb_u32": (lambda a, b, c: a - b - c, lambda a, b, c: b + c > a),
    "and_b32": (lambda a, b, c: a & b, None),
    "or_b32": (lambda a, b, c: a | b, None),
    "xor_b32": (lambda a, b, c: a ^ b, None),
    "andn2_b32": (lambda a, b, c: a & ~b, None),
    "orn2_b32": (lambda a, b, c: a | ~b, None),
    "nand_b32": (lambda a, b, c: ~(a & b), None),
    "nor_b32": (lambda a, b, c: ~(a | b), None),
    "xnor_b32": (lambda a, b, c: ~(a ^ b), None),
    "lshl_b32": (lambda a, b, c: a << b % 32, None),
    "lshr_b32": (lambda a, b, c: a >> b % 32, None),
    "ashr_i32": (lambda a, b, c: signed(a) >> b % 32, None),
    "bfe_u32": (lambda a, b, c: a >> b % 32 & (1 << (b >> 16 & 127)) - 1, None),
    "bfe_i32": (lambda a, b, c: cut_signed(a, b % 32, b >> 16 & 127), None),
    "mul_i32": (lambda a, b, c: a * b, "same"),
    "mul_hi_u32": (lambda a, b, c: a * b >> 32, "same"),
    "mul_hi_i32": (lambda a, b, c: signed(a) * signed(b) >> 32, "same"),
    "cselect_b32": (lambda a, b, c: a if c else b, "same"),
    "min_i32": (lambda a, b, c: min(signed(a), signed(b)), lambda a, b, c: signed(a) < signed(b)),
    "max_i32": (lambda a, b, c: max(signed(a), signed(b)), lambda a, b, c: signed(a) > signed(b)),
    "min_u32": (lambda a, b, c: min(a, b), lambda a, b, c: a < b),
    "max_u32": (lambda a, b, c: max(a, b), lambda a, b, c: a > b),
    "bfm_b32": (lambda a, b, c: (1 << a % 32) - 1 << b % 32, "same"),
    "add_i32": (lambda a, b, c: a + b, lambda a, b, c: not -(2**31) <= signed(a) + signed(b) < 2**31),
    "sub_i32": (lambda a, b, c: a - b, lambda a, b, c: not -(2**31) <= signed(a) - signed(b) < 2**31),
    "lshl1_add_u32": (lambda a, b, c: 2 * a + b, lambda a, b, c: 2 * a + b > WORD),
    "lshl3_add_u32": (lambda a, b, c: 8 * a + b, lambda a, b, c: 8 * a + b > WORD),
    "pack_ll_b32_b16": (lambda a, b, c: a % 2**16 | b % 2**16 << 16, "same"),
    "pack_hh_b32_b16": (lambda a, b, c: a >> 16 | b >> 16 << 16, "same"),
    "pack_lh_b32_b16": (lambda a, b, c: a % 2**16 | b >> 16 << 16, "same"),
}


@pytest.mark.parametrize("name", sorted(SCALARS))
def test_every_scalar_instruction_is_plain_pythons(name):
    result, told = SCALARS[name]
    generator = random.Random(name)
    for _ in range(60):
        a, b = (generator.choice((generator.getrandbits(32), 0, 1, 31, WORD, 1 << 31)) for _ in range(2))
        if "bfe" in name:
            b = generator.randrange(32) | generator.randrange(33) << 16
        before = generator.random() < 0.5
        wave = execute(f"s_{name} s6, s4, s5", s={4: a, 5: b}, scc=before)
        want = result(a, b, int(before)) % 2**32
        assert wave.s[6] == want, (name, a, b)
        assert wave.scc == (before if told == "same" else want != 0 if told is None else told(a, b, int(before))), (name, a, b)


@pytest.mark.parametrize(
    ("line", "given", "want", "scc"),
    [
        ("s_not_b32 s6, s4", 0xFFFFFFFE, 1, True),
        ("s_abs_i32 s6, s4", 0xFFFFFFFE, 2, True),
        ("s_brev_b32 s6, s4", 1, 1 << 31, None),
        ("s_bcnt1_i32_b32 s6, s4", 0xF0F, 8, True),
        ("s_ff1_i32_b32 s6, s4", 0x50, 4, None),
        ("s_flbit_i32_b32 s6, s4", 1 << 20, 11, None),
        ("s_sext_i32_i16 s6, s4", 0x18000, 0xFFFF8000, None),
        ("s_sext_i32_i8 s6, s4", 0x180, 0xFFFFFF80, None),
        ("s_movk_i32 s6, 0xffc0", 0, 0xFFFFFFC0, None),
        ("s_cmp_lt_i32 s4, 1", 0xFFFFFFFF, None, True),
        ("s_cmp_lt_u32 s4, 1", 0xFFFFFFFF, None, False),
        ("s_bitcmp0_b32 s4, 3", 8, None, False),
        ("s_bitcmp1_b32 s4, 3", 8, None, True),
        ("s_mov_b32 s6, 0x3fb8aa3b", 0, 0x3FB8AA3B, None),
        ("s_mov_b32 s6, 1.0", 0, 0x3F800000, None),
        ("s_mov_b32 s6, -4", 0, 0xFFFFFFFC, None),
    ],
)
def test_scalars_of_one_operand(line, given, want, scc):
    for before in (False, True):
        wave = execute(line, s={4: given}, scc=before)
        assert want is None or wave.s[6] == want
        assert wave.scc == (before if scc is None else scc)


def test_scalars_of_64_bits_and_saved_masks():
    wave = execute("s_lshl_b64 s[6:7], s[4:5], 33", s={4: 5, 5: 9})
    assert wave.scalar(6, 2) == (5 | 9 << 32) << 33 & 2**64 - 1
    wave = execute("s_ashr_i32 s7, s4, 31\ns_add_u32 s8, s4, s4\ns_addc_u32 s9, s7, s7", s={4: 2**31})
    assert (wave.s[7], wave.s[8], wave.s[9]) == (WORD, 0, 0xFFFFFFFF)
    lines = """v_cmp_gt_u32 vcc, 5, v0
        s_and_saveexec_b64 s[4:5], vcc
        v_mov_b32 v1, 7
        s_or_b64 exec, exec, s[4:5]
        v_add_u32 v1, 1, v1"""
    wave = execute(lines, {0: np.arange(64, dtype=np.uint32), 1: np.zeros(64, np.uint32)})
    assert wave.v[1].tolist() == [8] * 5 + [1] * 59
    assert wave.scalar(4, 2) == 2**64 - 1


def test_branches_go_where_they_say():
    lines = "s_mov_b32 s4, 0\nagain:\ns_add_i32 s4, s4, 1\ns_cmp_lt_i32 s4, 5\ns_cbranch_scc1 again\ns_mov_b32 s5, s4"
    assert execute(lines).s[5] == 5
    for name, vcc, there in (
        ("vccz", 0, True),
        ("vccnz", 1 << 40, True),
        ("vccz", 1, False),
        ("execz", 0, False),
        ("execnz", 0, True),
    ):
        wave = execute(f"s_mov_b32 s4, 1\ns_cbranch_{name} out\ns_mov_b32 s4, 2\nout:\ns_nop 0", s={106: vcc, 107: vcc >> 32})
        assert wave.s[4] == (1 if there else 2), name
