"""Where AMD's vector instructions take their operands from and put results: other lanes, parts of registers."""

import itertools

import numpy as np
import pytest
from support.amd import execute

from fused_attn.emulator.schedule import UnknownInstructionError

LANE = np.arange(64, dtype=np.uint32)
RANDOM = np.random.default_rng(0).integers(0, 2**32, (32, 64), np.uint32)

# --- other lanes: (controls, lane of 64 -> the lane it reads, or None) ---
CONTROLS = [
    ("quad_perm:[2,3,0,1]", lambda i: i - i % 4 + (2, 3, 0, 1)[i % 4]),
    ("quad_perm:[0,0,3,3]", lambda i: i - i % 4 + (0, 0, 3, 3)[i % 4]),
    ("row_shl:4", lambda i: i + 4 if i % 16 < 12 else None),
    ("row_shr:1", lambda i: i - 1 if i % 16 else None),
    ("row_ror:3", lambda i: i - i % 16 + (i % 16 - 3) % 16),
    ("row_mirror", lambda i: i - i % 16 + 15 - i % 16),
    ("row_half_mirror", lambda i: i - i % 8 + 7 - i % 8),
    ("row_bcast:15", lambda i: i // 16 * 16 - 1 if i >= 16 else None),
    ("row_bcast:31", lambda i: i // 32 * 32 - 1 if i >= 32 else None),
    ("row_newbcast:5", lambda i: i - i % 16 + 5),
    ("row_share:5", lambda i: i - i % 16 + 5),
    ("row_xmask:6", lambda i: i - i % 16 + (i % 16 ^ 6)),
    ("wave_shr:1", lambda i: i - 1 if i else None),
    ("wave_shl:1", lambda i: i + 1 if i < 63 else None),
    ("wave_ror:1", lambda i: (i - 1) % 64),
]


@pytest.mark.parametrize(("control", "source"), CONTROLS, ids=[control for control, _ in CONTROLS])
@pytest.mark.parametrize(("rows", "banks", "bound"), [(15, 15, False), (15, 15, True), (0b1010, 15, False), (15, 0b0101, True)])
def test_dpp_reads_other_lanes(control, source, rows, banks, bound):
    active = np.random.default_rng(1).random(64) < 0.8
    end = " bound_ctrl:0" if bound else ""
    wave = execute(
        f"v_mov_b32_dpp v2, v1 {control} row_mask:{rows:#x} bank_mask:{banks:#x}{end}",
        {1: RANDOM[1], 2: RANDOM[2]},
        active=active,
    )
    for i in range(64):
        at = source(i)
        there = at is not None and active[at]
        written = active[i] and rows >> i // 16 & 1 and banks >> i % 16 // 4 & 1 and (there or bound)
        assert wave.v[2][i] == (RANDOM[2][i] if not written else RANDOM[1][at] if there else 0), i


def test_dpp_in_a_sum_moves_the_first_source_alone():
    wave = execute("v_add_u32_dpp v2, v2, v2 row_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:0", {2: LANE})
    assert wave.v[2].tolist() == [i + (i - 1 if i % 16 else 0) for i in range(64)]


PARTS = {
    "DWORD": (0, 32),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
}


def cut(x, part, signed=False):
    shift, bits = PARTS[part]
    field = x >> shift & (1 << bits) - 1
    return (field - (1 << bits)) % 2**32 if signed and field >> bits - 1 else field


@pytest.mark.parametrize(("part", "other"), list(itertools.product(PARTS, ("DWORD", "WORD_1", "BYTE_2"))))
@pytest.mark.parametrize("signed", [False, True])
def test_sdwa_reads_parts(part, other, signed):
    first = "sext(v0)" if signed else "v0"
    wave = execute(
        f"v_or_b32_sdwa v2, {first}, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{part} src1_sel:{other}",
        {0: RANDOM[0], 1: RANDOM[1]},
    )
    assert wave.v[2].tolist() == [cut(int(a), part, signed) | cut(int(b), other) for a, b in RANDOM[:2].T]


@pytest.mark.parametrize("part", [part for part in PARTS if part != "DWORD"])
@pytest.mark.parametrize("unused", ["UNUSED_PAD", "UNUSED_PRESERVE", "UNUSED_SEXT"])
def test_sdwa_writes_parts(part, unused):
    shift, bits = PARTS[part]
    wave = execute(
        f"v_and_b32_sdwa v2, v0, v1 dst_sel:{part} dst_unused:{unused} src0_sel:DWORD src1_sel:DWORD",
        {0: RANDOM[0], 1: RANDOM[1], 2: RANDOM[2]},
    )
    for i in range(64):
        field = int(RANDOM[0][i] & RANDOM[1][i]) & (1 << bits) - 1
        rest = int(RANDOM[2][i]) & ~((1 << bits) - 1 << shift) if unused == "UNUSED_PRESERVE" else 0
        if unused == "UNUSED_SEXT" and field >> bits - 1:
            rest = 2**32 - (1 << shift + bits)
        assert wave.v[2][i] == field << shift | rest, i


def test_sdwa_of_floats_and_comparisons():
    halves = np.random.default_rng(3).standard_normal((64, 2)).astype(np.float16)
    wave = execute(
        "v_cvt_f32_f16_sdwa v1, v0 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1\n"
        "v_cmp_ne_u16_sdwa s[4:5], v0, v2 src0_sel:BYTE_0 src1_sel:DWORD",
        {0: halves.view(np.uint32)[:, 0], 2: 0},
    )
    assert (wave.v[1].view(np.float32) == halves[:, 1]).all()
    assert wave.scalar(4, 2) == sum(1 << i for i, x in enumerate(halves.view(np.uint8)[:, 0]) if x)


def test_halves_stay_or_go_as_the_card_has_it():
    given = {0: np.float32(1.5), 2: np.uint32(0xABCD1234)}
    assert execute("v_cvt_f16_f32_e32 v2, v0", given).v[2][0] == 0x3E00  # of gfx9 the rest is zero
    assert execute("v_cvt_f16_f32_e32 v2, v0", given, arch="gfx1100").v[2][0] == 0xABCD3E00
    assert execute("v_cvt_f16_f32_e64 v2, v0 op_sel:[0,1]", given, arch="gfx1100").v[2][0] == 0x3E001234
    assert (
        execute("v_add_f16_e64 v2, v0, v1 op_sel:[1,0,0]", {0: np.uint32(0x3C004000), 1: np.uint32(0x3C00)}).v[2][0] == 0x4000
    )


def test_packed_numbers_take_their_halves_as_they_are_told():
    pairs = np.random.default_rng(4).standard_normal((6, 64)).astype(np.float32)
    given = dict(enumerate(pairs))
    wave = execute(
        "v_pk_fma_f32 v[10:11], v[0:1], v[2:3], v[4:5] op_sel:[0,1,0] op_sel_hi:[1,0,1] neg_lo:[0,0,1] neg_hi:[1,0,0]", given
    )
    wide = pairs.astype(np.float64)
    assert (wave.v[10].view(np.float32) == (wide[0] * wide[3] - wide[4]).astype(np.float32)).all()
    assert (wave.v[11].view(np.float32) == (-wide[1] * wide[2] + wide[5]).astype(np.float32)).all()
    wave = execute(
        "v_pk_mul_f32 v[10:11], v[0:1], s[4:5] op_sel_hi:[1,0]", given, {4: int(np.float32(3).view(np.uint32)), 5: 0}
    )
    assert (wave.v[11].view(np.float32) == pairs[1] * 3).all()
    wave = execute("v_pk_mov_b32 v[10:11], v[0:1], v[2:3] op_sel:[1,0]", given)
    assert (wave.v[10].view(np.float32) == pairs[1]).all()
    assert (wave.v[11].view(np.float32) == pairs[2]).all()
    halves = pairs[:2].astype(np.float16).T.copy()
    wave = execute("v_pk_add_f16 v2, v0, v0 op_sel:[0,1] op_sel_hi:[1,0]", {0: halves.view(np.uint32)[:, 0]})
    total = (halves[:, 0] + halves[:, 1]).view(np.uint16).astype(np.uint32)
    assert (wave.v[2] == (total | total << 16)).all()


def test_sums_of_mixed_types():
    a, c = np.random.default_rng(5).standard_normal((2, 64)).astype(np.float32)
    b = np.random.default_rng(6).standard_normal((64, 2)).astype(np.float16)
    given = {0: a, 1: b.view(np.uint32)[:, 0], 2: c, 3: np.uint32(0x12345678)}
    exact = (a.astype(np.float64) * b[:, 1].astype(np.float64) - c).astype(np.float32)
    wave = execute("v_fma_mix_f32 v3, v0, v1, -v2 op_sel:[0,1,0] op_sel_hi:[0,1,0]", given)
    assert (wave.v[3].view(np.float32) == exact).all()
    low = exact.astype(np.float16).view(np.uint16).astype(np.uint32)
    for half, want in (("lo", low | 0x12340000), ("hi", low << 16 | 0x5678)):
        wave = execute(f"v_fma_mix{half}_f16 v3, v0, v1, -v2 op_sel:[0,1,0] op_sel_hi:[0,1,0]", given)
        assert (wave.v[3] == want).all(), half


def test_signs_factors_and_limits():
    x = np.linspace(-3, 3, 64).astype(np.float32)
    for line, want in (
        ("v_add_f32_e64 v1, -v0, |v0|", -x + abs(x)),
        ("v_mul_f32_e64 v1, v0, 1.0 clamp", np.clip(x, 0, 1)),
        ("v_mul_f32_e64 v1, v0, -|v0| mul:4", -x * abs(x) * 4),
        ("v_add_f32_e64 v1, v0, v0 div:2", x),
    ):
        np.testing.assert_array_equal(execute(line, {0: x}).v[1].view(np.float32), want.astype(np.float32), line)
    for line, want in (
        ("v_fmac_f32_e32 v1, v0, v0", x * x + 2),
        ("v_fmamk_f32 v1, v0, 0x40000000, v0", 3 * x),
        ("v_fmaak_f32 v1, v0, v0, 0x40000000", x * x + 2),
    ):
        np.testing.assert_allclose(execute(line, {0: x, 1: np.float32(2)}).v[1].view(np.float32), want, rtol=1e-6, err_msg=line)


def test_both_halves_of_a_dual_instruction_read_before_either_writes():
    wave = execute("v_dual_mov_b32 v0, v1 :: v_dual_add_nc_u32 v1, v0, v1", {0: 3, 1: 5}, arch="gfx1100")
    assert (wave.v[0][0], wave.v[1][0]) == (5, 8)


def test_choices_by_masks():
    wave = execute(
        "v_cndmask_b32_e32 v2, v0, v1, vcc\nv_cndmask_b32_e64 v3, 7, v1, s[4:5]",
        {0: LANE, 1: LANE + 100},
        {106: 0b1010, 107: 0, 4: 1, 5: 0},
    )
    assert wave.v[2][:5].tolist() == [0, 101, 2, 103, 4]
    assert wave.v[3][:2].tolist() == [100, 7]


def test_choices_of_halves_and_signs_of_constants():
    wave = execute("v_cndmask_b16 v2, v0, v1, s4", {0: 0x11112222, 1: 0x33334444, 2: 0xAAAABBBB}, {4: 2}, arch="gfx1100")
    assert [hex(x) for x in wave.v[2][:2]] == ["0xaaaa2222", "0xaaaa4444"]
    assert execute("v_fma_f32 v1, v0, v0, neg(0)", {0: np.float32(0)}).v[1][0] == 0
    assert execute("v_mul_f32_e64 v1, v0, neg(1.0)", {0: np.float32(2)}).v[1].view(np.float32)[0] == -2


def test_registers_with_halves():
    """As Triton 3.9 writes them for RDNA 3: each against what the halves hold."""
    given = {0: np.uint32(0x40003C00), 1: np.uint32(0x11112222), 2: np.uint32(0xAAAABBBB), 3: np.float32(1.5)}

    def after(line, register=2, scalars=None):
        return hex(execute(line, given, scalars, arch="gfx1100").v[register][0])

    assert after("v_mov_b16_e32 v2.h, v1.l") == "0x2222bbbb"
    assert after("v_mov_b16_e32 v2.l, v1.h") == "0xaaaa1111"
    assert after("v_cvt_f16_f32_e32 v2.h, v3") == "0x3e00bbbb"
    assert after("v_cvt_f32_f16_e32 v2, v0.h") == "0x40000000"
    assert after("v_cvt_f32_f16_e64 v2, -|v0.h|") == "0xc0000000"
    assert after("v_add_f16_e32 v2.l, v0.l, v0.h") == "0xaaaa4200"
    assert after("v_fma_f16 v2.h, v0.h, v0.h, v0.l") == "0x4500bbbb"
    assert after("v_pack_b32_f16 v2, v1.h, v0.l") == "0x3c001111"
    assert after("v_cndmask_b16 v2.h, v1.l, v0.h, s4", scalars={4: 1}) == "0x4000bbbb"
    assert after("v_cndmask_b16 v2.l, 0x7fff, v1.h, s4", scalars={4: 0}) == "0xaaaa7fff"
    for right, bits in (("l", 0xFFFFFFFF), ("h", 0)):
        wave = execute(f"v_cmp_eq_u16_e64 s4, 0x2222, v1.{right}", given, arch="gfx1100")
        assert wave.s[4] == bits
    for line in ("v_fmac_f16_e32 v2.l, v0.l, v0.h", "v_add_f16 v2.l, v0.l, v0.h op_sel:[0,1,0]", "ds_store_b16 v2, v1.h"):
        with pytest.raises(UnknownInstructionError):
            execute(line, given, arch="gfx1100")


def test_lanes_to_scalars_and_back():
    wave = execute(
        "v_readlane_b32 s4, v0, 9\nv_readfirstlane_b32 s5, v0\nv_writelane_b32 v1, s4, 3", {0: LANE, 1: 0}, active=LANE > 6
    )
    assert (wave.s[4], wave.s[5], wave.v[1][3]) == (9, 7, 9)
    wave = execute("v_mbcnt_lo_u32_b32 v1, -1, 0\nv_mbcnt_hi_u32_b32 v1, -1, v1")
    assert wave.v[1].tolist() == list(range(64))


def test_permutes():
    lane = np.arange(32, dtype=np.uint32)
    wave = execute("v_permlanex16_b32 v1, v0, s4, s5", {0: lane, 1: 0}, {4: 0x76543210, 5: 0xFEDCBA98}, arch="gfx1100")
    assert wave.v[1].tolist() == [*range(16, 32), *range(16)]
    wave = execute("v_permlanex16_b32 v1, v0, s4, 0xfedcba98 op_sel:[1,0]", {0: lane, 1: 0}, {4: 0x76543210}, arch="gfx1100")
    assert wave.v[1].tolist() == [*range(16, 32), *range(16)]
    wave = execute("v_permlane16_b32 v1, v0, 0, 0", {0: lane, 1: 0}, arch="gfx1100")
    assert wave.v[1].tolist() == [0] * 16 + [16] * 16
    wave = execute("v_permlane32_swap_b32 v0, v1", {0: LANE, 1: LANE + 100}, arch="gfx950")
    assert wave.v[0].tolist() == [*range(32), *range(100, 132)]
    assert wave.v[1].tolist() == [*range(32, 64), *range(132, 164)]
    wave = execute("v_permlane16_swap_b32 v0, v1", {0: LANE, 1: LANE + 100}, arch="gfx950")
    assert wave.v[0].tolist() == [*range(16), *range(100, 116), *range(32, 48), *range(132, 148)]


@pytest.mark.parametrize(
    ("offset", "source"),
    [
        ("swizzle(SWAP,16)", lambda i: i ^ 16),
        ("swizzle(REVERSE,8)", lambda i: i ^ 7),
        ("swizzle(BROADCAST,4,2)", lambda i: i - i % 4 + 2),
        ('swizzle(BITMASK_PERM,"01pi1")', lambda i: i - i % 32 + (8 | i & 4 | (~i & 2) | 1)),
        ("swizzle(QUAD_PERM,1,0,3,2)", lambda i: i ^ 1),
        ("0x401f", lambda i: i ^ 16),
        ("0x80b1", lambda i: i ^ 1),
    ],
)
def test_swizzles(offset, source):
    wave = execute(f"ds_swizzle_b32 v1, v0 offset:{offset}\ns_waitcnt lgkmcnt(0)", {0: LANE})
    assert wave.v[1].tolist() == [source(i) for i in range(64)]


def test_numbers_by_way_of_lds():
    turned = (LANE * 7 % 64).astype(np.uint32)
    wave = execute("ds_bpermute_b32 v2, v0, v1\nds_permute_b32 v3, v0, v1", {0: turned * 4, 1: LANE + 5})
    assert (wave.v[2] == turned + 5).all()
    assert (wave.v[3][turned] == LANE + 5).all()


@pytest.mark.parametrize(
    "line",
    [
        "v_add_co_u32_sdwa v0, vcc, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_0 src1_sel:DWORD",
        "v_add_co_u32_dpp v0, vcc, v1, v2 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf",
        "v_cmp_eq_u32_e64_dpp s[4:5], v1, v2 quad_perm:[1,1,1,1] row_mask:0xf bank_mask:0xf",
        "v_pk_add_u16 v0, v3, v3 clamp",
        "v_fma_mix_f32 v0, v1, v2, v3 clamp",
        "v_add_co_u32_e64 v0, vcc, v3, v3 clamp",
        "v_mov_b32_dpp v0, v1 row_xmask:1 row_mask:0xf bank_mask:0xf fi:1",
        "v_dot2_f32_f16 v0, v3, v4, v5 neg_lo:[1,0,0] neg_hi:[1,0,0]",
        "v_mov_b64_dpp v[0:1], v[2:3] row_newbcast:1 row_mask:0x1 bank_mask:0xf",
        "v_pk_mul_f32 v[0:1], v[2:3], 2.0",
        "v_mfma_f32_32x32x4f16 v[0:15], v[20:21], v[22:23], 0",
        "ds_swizzle_b32 v0, v1 offset:0xc020",
        "s_waitcnt vmcnt_lgkmcnt_sat(3)",
        "flat_load_dword v0, v[2:3]",
    ],
)
def test_what_would_be_left_out_is_refused(line):
    with pytest.raises(UnknownInstructionError):
        execute(line, arch="gfx942")


def test_constants_of_halves_are_32_bits_of_which_each_half_takes_its_own():
    assert execute("v_pk_add_f16 v0, v3, 1.0", {3: 0}).v[0][0] == 0x00003C00
    assert execute("v_pk_add_f16 v0, v3, 1.0 op_sel_hi:[1,0]", {3: 0}).v[0][0] == 0x3C003C00
    assert execute("v_pk_lshrrev_b16 v0, 8, v3", {3: 0x12345678}).v[0][0] == 0x12340056
    assert execute("v_pk_lshrrev_b16 v0, 8, v3 op_sel_hi:[0,1]", {3: 0x12345678}).v[0][0] == 0x00120056
    assert execute("v_pk_add_f16 v0, v3, 0x40003c00", {3: 0}, arch="gfx1100").v[0][0] == 0x40003C00


def test_constants_of_64_bits():
    assert execute("s_mov_b64 s[4:5], 1.0").scalar(4, 2) == 0x3FF0000000000000
    assert execute("s_mov_b64 s[4:5], -1").scalar(4, 2) == 2**64 - 1
    wave = execute("v_mov_b64_e32 v[0:1], 1.0\nv_add_f64 v[2:3], v[0:1], 0.5\nv_mul_f64 v[4:5], v[0:1], 0x40080000")
    assert [int(wave.v[i][0]) for i in (1, 3, 5)] == [0x3FF00000, 0x3FF80000, 0x40080000]


def test_null_reads_as_zero_and_keeps_nothing():
    wave = execute(
        "v_mad_u64_u32 v[2:3], null, v0, v0, v[0:1]\ns_mov_b32 m0, 5\nv_add_nc_u32 v4, null, v0",
        {0: 0xFFFFFFFF, 1: 0xFFFFFFFF},
        arch="gfx1100",
    )
    assert wave.v[4][0] == 0xFFFFFFFF


def test_sums_that_are_rounded_once():
    a, b, c = np.float32(172961), np.float32(97 * 2.0**-24), np.float32(2.0**-60)
    assert execute("v_fma_f32 v3, v0, v1, v2", {0: a, 1: b, 2: c}).v[3][0] == 0x3F800001
    near = int(np.float64(1 + 2.0**-52).view(np.uint64))
    less = int(np.float64(-(1 + 2.0**-51)).view(np.uint64))
    wave = execute(
        "v_fma_f64 v[4:5], v[0:1], v[0:1], v[2:3]", {0: near & 0xFFFFFFFF, 1: near >> 32, 2: less & 0xFFFFFFFF, 3: less >> 32}
    )
    assert wave.v[4:6, 0].copy().view(np.float64)[0] == 2.0**-104


def test_ends_of_the_range():
    assert execute("v_med3_f32 v0, v3, 1.0, 2.0", {3: np.float32(np.nan)}).v[0].view(np.float32)[0] == 1
    assert execute("v_fract_f32 v0, v3", {3: 0xB0000000}).v[0][0] == 0x3F7FFFFF
    for name, want in (("max", 0), ("min", 0x80000000)):
        for a, b in ((0, 0x80000000), (0x80000000, 0)):
            assert execute(f"v_{name}_f32 v2, v0, v1", {0: a, 1: b}).v[2][0] == want
    for x, over in ((1, False), (0x7FFFFFFF, True)):
        wave = execute("v_mad_i64_i32 v[4:5], s[4:5], v0, v0, v[2:3]", {0: x, 2: 0xFFFFFFFF, 3: 0x7FFFFFFF if over else 0})
        assert bool(wave.scalar(4, 2)) == over
    assert not execute("s_cmpk_lt_i32 s0, 0xff80", s={0: 5}).scc
    assert execute("s_cmpk_lt_u32 s0, 0xff80", s={0: 5}).scc
