"""AMD's memory and matrices by themselves: LDS, tensors, atomics, scratch, layouts of products; faults that are seen."""

import itertools

import numpy as np
import pytest
from support.amd import execute, launch

from fused_attn.emulator.amd.state import Shared
from fused_attn.emulator.schedule import EmulatorFault, UnknownInstructionError

LANE = np.arange(64, dtype=np.uint32)
RANDOM = np.random.default_rng(0).integers(0, 2**32, (32, 64), np.uint32)


# --- LDS, tensors ---
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
@pytest.mark.parametrize(
    ("old", "new", "size"),
    [
        ("b32", "b32", 4),
        ("b64", "b64", 8),
        ("b128", "b128", 16),
        ("u8", "u8", 1),
        ("i8", "i8", 1),
        ("u16", "u16", 2),
        ("i16", "i16", 2),
    ],
)
def test_lds_keeps_what_is_written(arch, old, new, size):
    lanes, read, write = (64, "ds_read", "ds_write") if arch == "gfx942" else (32, "ds_load", "ds_store")
    words = max(1, size // 4)
    stored = {"u8": "b8", "i8": "b8", "u16": "b16", "i16": "b16"}.get(old, old)
    span = f"v[2:{1 + words}]" if words > 1 else "v2"
    back = f"v[10:{9 + words}]" if words > 1 else "v10"
    given = {0: (np.arange(lanes) * size).astype(np.uint32), **{2 + i: RANDOM[i][:lanes] for i in range(words)}}
    wave = execute(
        f"{write}_{stored} v0, {span} offset:32\n{read}_{old} {back}, v0 offset:32\ns_waitcnt lgkmcnt(0)", given, arch=arch
    )
    for i in range(words):
        want = RANDOM[i][:lanes]
        if size < 4:
            want = want & np.uint32(2 ** (8 * size) - 1)
            if old[0] == "i":
                want = want.astype(f"u{size}").view(f"i{size}").astype(np.int32).view(np.uint32)
        assert (wave.v[10 + i] == want).all()


def test_lds_in_pairs_and_halves():
    given = {0: LANE * 8, 2: RANDOM[0], 3: RANDOM[1], 4: RANDOM[2], 5: RANDOM[3], 7: RANDOM[4], 8: 0xAAAABBBB}
    wave = execute("ds_write2_b32 v0, v2, v3 offset1:1\nds_read_b64 v[10:11], v0\nds_read2_b32 v[12:13], v0 offset0:1", given)
    assert (wave.v[10:12] == RANDOM[:2]).all()
    assert (wave.v[12:14] == RANDOM[[1, 0]]).all()
    wave = execute("ds_write2st64_b64 v0, v[2:3], v[4:5] offset1:1\nds_read2st64_b64 v[10:13], v0 offset0:1", given)
    assert (wave.v[10:12] == RANDOM[2:4]).all()
    assert (wave.v[12:14] == RANDOM[:2]).all()
    wave = execute(
        "ds_write_b16_d16_hi v0, v7\nds_read_u16_d16_hi v8, v0\ns_waitcnt lgkmcnt(0)\nds_read_u16_d16 v8, v0 offset:2", given
    )
    assert (wave.v[8] >> 16 == RANDOM[4] >> 16).all()
    assert (wave.v[8] & 0xFFFF == (0x7FC0DEAD >> 16)).all()  # what nobody wrote


def test_a_transposing_load_gives_columns():
    """Of 16 lanes: 4 rows of 16 numbers of 16 bits, of which lane i is given column i."""
    shared = Shared(4096)
    shared.bytes[:512] = np.arange(256, dtype=np.uint16).view(np.uint8)
    wave = execute("ds_read_b64_tr_b16 v[2:3], v0\ns_waitcnt lgkmcnt(0)", {0: LANE * 8}, arch="gfx950", shared=shared)
    got = np.ascontiguousarray(wave.v[2:4].T).view(np.uint16)
    assert got.tolist() == [[64 * (i // 16) + 16 * row + i % 16 for row in range(4)] for i in range(64)]


def test_tensors_are_read_and_written():
    x, out = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    body = """v_lshlrev_b32 v1, 4, v0
        global_load_dwordx4 v[2:5], v1, s[4:5]
        s_waitcnt vmcnt(0)
        v_mul_f32 v3, 2.0, v3
        global_store_dwordx4 v1, v[2:5], s[6:7]"""
    launch(body, x, out)
    want = x.copy()
    want[1::4] *= 2
    np.testing.assert_array_equal(out, want)
    buffer = """s_mov_b32 s11, 0
        s_mov_b64 s[8:9], s[4:5]
        s_mov_b32 s10, 64
        v_lshlrev_b32 v1, 2, v0
        buffer_load_dword v2, v1, s[8:11], 0 offen
        s_waitcnt vmcnt(0)
        s_mov_b64 s[8:9], s[6:7]
        s_mov_b32 s10, 1024
        buffer_store_dword v2, v1, s[8:11], 0 offen offset:4"""
    out[:] = 7
    launch(buffer, x, out)  # beyond a buffer's bytes there are zeros
    np.testing.assert_array_equal(out[:66], [7, *range(16), *[0] * 48, 7])
    small = np.array([-1, 2, -3, 4] * 64, np.int8)
    launch(
        "global_load_sbyte v1, v0, s[4:5]\nv_lshlrev_b32 v2, 2, v0\ns_waitcnt vmcnt(0)\nv_cvt_f32_i32 v1, v1\n"
        "global_store_dword v2, v1, s[6:7]",
        small,
        out,
    )
    np.testing.assert_array_equal(out[:64], small[:64])


@pytest.mark.parametrize(("what", "dtype"), [("add_f32", np.float32), ("add_f64", np.float64), ("add", np.uint32)])
def test_atomics_add_up(what, dtype):
    total = np.zeros(4, dtype)
    words = np.dtype(dtype).itemsize // 4
    data = "v3" if words == 1 else "v[2:3]"
    one = {"add_f32": "v_mov_b32 v3, 1.0", "add": "v_mov_b32 v3, 1", "add_f64": "v_mov_b32 v2, 0\nv_mov_b32 v3, 0x3ff00000"}[
        what
    ]
    launch(
        f"v_and_b32 v1, 3, v0\nv_lshlrev_b32 v1, {1 + words}, v1\n{one}\nglobal_atomic_{what} v1, {data}, s[4:5]",
        total,
        grid=3,
        waves=2,
    )
    assert total.tolist() == [96] * 4


def test_numbers_are_exchanged_if_they_are_still_there():
    """What LLVM makes of an atomic sum where the card has none: look, add, exchange, and again where another came first."""
    total = np.zeros(2, np.float32)
    launch(
        """v_and_b32 v1, 1, v0
        v_lshlrev_b32 v1, 2, v1
        global_load_dword v3, v1, s[4:5]
        s_waitcnt vmcnt(0)
        s_mov_b64 s[8:9], 0
        again:
        v_add_f32 v2, 1.0, v3
        global_atomic_cmpswap v4, v1, v[2:3], s[4:5] glc
        s_waitcnt vmcnt(0)
        v_cmp_eq_u32 vcc, v4, v3
        s_or_b64 s[8:9], vcc, s[8:9]
        v_mov_b32 v3, v4
        s_andn2_b64 exec, exec, s[8:9]
        s_cbranch_execnz again""",
        total,
        grid=2,
        waves=2,
    )
    assert total.tolist() == [128, 128]


def test_a_lanes_own_scratch():
    wave = execute(
        "scratch_store_dword off, v0, off offset:8\nscratch_load_dword v1, off, off offset:8\ns_waitcnt vmcnt(0)", {0: LANE}
    )
    assert (wave.v[1] == LANE).all()
    with pytest.raises(EmulatorFault, match="scratch byte 64 of 64"):
        execute("scratch_load_dword v1, off, off offset:64")


# --- matrices: operands laid out by hand, as AMD's instruction calculator has them ---
HALVES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def to_words(numbers, kind):
    """[n, lanes] numbers as registers [words, lanes]."""
    if kind == "bf16":
        bits = (np.ascontiguousarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif kind == "xf32":
        return np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    else:
        bits = np.ascontiguousarray(numbers, HALVES[kind])
    return np.ascontiguousarray(bits.T).view(np.uint32).T


def small_integers(*shape):
    return np.random.default_rng(7).integers(-4, 5, shape).astype(np.float64)


@pytest.mark.parametrize(
    ("name", "size", "depth", "kind", "result"),
    [
        ("f32_16x16x16_f16", 16, 16, "f16", "f32"),
        ("f32_16x16x16_bf16", 16, 16, "bf16", "f32"),
        ("f32_16x16x16bf16_1k", 16, 16, "bf16", "f32"),
        ("f32_32x32x8_f16", 32, 8, "f16", "f32"),
        ("f32_16x16x32_f16", 16, 32, "f16", "f32"),
        ("f32_32x32x16_bf16", 32, 16, "bf16", "f32"),
        ("f32_16x16x4f32", 16, 4, "f32", "f32"),
        ("f32_32x32x2_f32", 32, 2, "f32", "f32"),
        ("f32_16x16x8_xf32", 16, 8, "xf32", "f32"),
        ("f64_16x16x4_f64", 16, 4, "f64", "f64"),
    ],
)
def test_mfma_by_its_layout(name, size, depth, kind, result):
    a, b, c = small_integers(size, depth), small_integers(depth, size), small_integers(size, size)
    each = depth * size // 64
    held_a, held_b = np.zeros((each, 64)), np.zeros((each, 64))
    for lane, i in itertools.product(range(64), range(each)):
        held_a[i, lane] = a[lane % size, lane // size * each + i]
        held_b[i, lane] = b[lane // size * each + i, lane % size]
    place = np.zeros((size * size // 64, 64, 2), int)
    for lane, i in itertools.product(range(64), range(len(place))):
        row = (
            (4 * i + lane // 16 if kind == "f64" else i + 4 * (lane // 16))
            if size == 16
            else i % 4 + i // 4 * 8 + lane // 32 * 4
        )
        place[i, lane] = row, lane % size
    held_c = c[place[..., 0], place[..., 1]]
    registers = [to_words(held_a, kind), to_words(held_b, kind), to_words(held_c, result)]
    given, spans, at = {}, [], 0
    for words in registers:
        given |= {at + i: word for i, word in enumerate(words)}
        spans.append(f"v[{at}:{at + len(words) - 1}]")
        at += len(words)
    wave = execute(f"v_mfma_{name} v[100:{99 + len(registers[2])}], {', '.join(spans)}", given)
    want = (a @ b + c)[place[..., 0], place[..., 1]]
    assert (wave.v[100 : 100 + len(registers[2])] == to_words(want, result)).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wmma_by_its_layout(kind):
    a, b, c = (small_integers(16, 16) for _ in range(3))
    lane = np.arange(32)
    words = [to_words(a[lane % 16].T, kind), to_words(b[:, lane % 16], kind)]
    rows = np.array([[2 * i + part // 16 for part in range(32)] for i in range(8)])
    given = dict(enumerate(np.concatenate([*words, to_words(c[rows, lane % 16], "f32")])))
    wave = execute(f"v_wmma_f32_16x16x16_{kind} v[30:37], v[0:7], v[8:15], v[16:23]", given, arch="gfx1100")
    assert (wave.v[30:38].view(np.float32) == (a @ b + c)[rows, lane % 16]).all()
    given[3] = given[3] * (lane < 16).astype(np.uint32)
    with pytest.raises(EmulatorFault, match="upper 16 lanes hold another a"):
        execute(f"v_wmma_f32_16x16x16_{kind} v[30:37], v[0:7], v[8:15], v[16:23]", given, arch="gfx1100")


# --- faults ---
FAULTS = {
    "touches a register that a memory operation fills": "global_load_dword v1, v0, s[4:5]\nv_add_u32 v2, v1, v1",
    "out of bounds": "v_lshlrev_b32 v1, 6, v0\nglobal_load_dword v1, v1, s[4:5]",
    "misaligned": "global_load_dword v1, v0, s[4:5]",
    "LDS byte": "v_lshlrev_b32 v1, 4, v0\nds_write_b32 v1, v0",
    "no end after": "again:\ns_branch again",
    "a matrix product by some lanes": "s_mov_b64 exec, 7\nv_mfma_f32_16x16x16_f16 v[10:13], v[2:3], v[4:5], 0",
}


@pytest.mark.parametrize("told", FAULTS)
def test_faults_are_told(told, monkeypatch):
    monkeypatch.setattr("fused_attn.emulator.amd.machine._FUEL", 1000)
    body = FAULTS[told] if "v_lshl" in FAULTS[told] or told == "misaligned" else "v_lshlrev_b32 v0, 2, v0\n" + FAULTS[told]
    with pytest.raises(EmulatorFault, match=told) as fault:
        launch(body, np.zeros(100, np.float32), shared=512)
    assert "in wave 0 of program 0, at here:1:1: " in str(fault.value)


@pytest.mark.parametrize(
    "lines",
    [
        "ds_bpermute_b32 v8, v9, v7\nds_bpermute_b32 v8, v9, v8",  # its own source is awaited
        "ds_read_b32 v1, v0\nds_read_b32 v1, v1",
        "global_load_dword v1, v0, s[4:5]\nds_read_b32 v1, v0",  # two queues, one register
        "s_load_dword s8, s[4:5], 0x0\ns_load_dword s8, s[4:5], 0x4",  # scalars come in any order
        "s_load_dwordx2 s[4:5], s[4:5], 0x0\ns_load_dwordx2 s[4:5], s[4:5], 0x8",
    ],
)
def test_a_load_is_held_to_what_it_reads_and_to_the_other_queues(lines):
    with pytest.raises(EmulatorFault, match="no s_waitcnt between"):
        launch(f"v_lshlrev_b32 v0, 2, v0\nv_mov_b32 v9, 0\nv_mov_b32 v7, 0\n{lines}", np.zeros(64, np.float32), shared=512)


def test_stores_to_scratch_are_counted_with_stores():
    lines = """v_lshlrev_b32 v0, 2, v0
        global_load_dword v1, v0, s[4:5]
        scratch_store_dword off, v0, off
        s_waitcnt vmcnt(1)
        v_mov_b32 v2, v1"""
    launch(lines, np.zeros(64, np.float32))
    with pytest.raises(EmulatorFault, match="no s_waitcnt between"):
        launch(lines, np.zeros(64, np.float32), arch="gfx1100")
    launch(lines.replace("vmcnt(1)", "vmcnt(0)"), np.zeros(64, np.float32), arch="gfx1100")


def test_reads_under_way_at_a_barrier_are_all_remembered():
    body = """v_mov_b32 v1, 0
        ds_read_b32 v3, v1
        s_barrier
        v_readfirstlane_b32 s8, v0
        s_cmp_eq_u32 s8, {writer}
        s_cbranch_scc0 out
        ds_write_b32 v1, v0
        out:
        s_waitcnt lgkmcnt(0)"""
    for writer in (0, 64):
        with pytest.raises(EmulatorFault, match="race: write of LDS byte 0"):
            launch(body.format(writer=writer), waves=2, shared=64)


def test_addresses_of_lds_wrap_and_those_of_buffers_do_not():
    shared = Shared(256)
    shared.bytes[16:20] = 7
    wave = execute("ds_read_b32 v1, v0 offset:32\ns_waitcnt lgkmcnt(0)", {0: 0xFFFFFFF0}, shared=shared)
    assert wave.v[1][0] == 0x07070707
    x = np.arange(64, dtype=np.float32)
    resource = "s_mov_b64 s[8:9], s[4:5]\ns_mov_b32 s10, 256\ns_mov_b32 s11, 0"
    out = np.ones(64, np.float32)
    beyond = """v_mov_b32 v1, -16
        buffer_load_dword v2, v1, s[8:11], 0 offen offset:32
        v_lshlrev_b32 v3, 2, v0
        s_waitcnt vmcnt(0)
        global_store_dword v3, v2, s[6:7]"""
    launch(f"{resource}\n{beyond}", x, out)
    assert (out == 0).all()
    launch("s_add_u32 s4, s4, 16\ns_addc_u32 s5, s5, 0\ns_load_dword s8, s[4:5], -0x10\ns_waitcnt lgkmcnt(0)", x)


def test_loads_of_one_register_come_in_order_and_scalars_do_not():
    execute("ds_read_u16_d16 v1, v0\nds_read_u16_d16_hi v1, v0\ns_waitcnt lgkmcnt(0)\nv_mov_b32 v2, v1", {0: LANE * 2})
    x = np.zeros(64, np.float32)
    with pytest.raises(EmulatorFault, match="no s_waitcnt"):
        launch("s_load_dword s8, s[4:5], 0x0\ns_load_dword s9, s[4:5], 0x4\ns_waitcnt lgkmcnt(1)\ns_mov_b32 s10, s8", x)


EXCHANGE = """v_lshlrev_b32 v1, 2, v0
    v_xor_b32 v2, 0x100, v1
    ds_write_b32 v1, v0
    {wait}
    {barrier}
    ds_read_b32 v3, v2
    s_waitcnt lgkmcnt(0)
    {again}
    ds_write_b32 v1, v3 offset:0
    s_waitcnt lgkmcnt(0)
    global_store_dword v1, v3, s[4:5]"""


@pytest.mark.parametrize(
    ("left_out", "told"),
    [(None, None), ("wait", "race: read of LDS"), ("barrier", "race: read|race: write"), ("again", "race: write|race: read")],
)
def test_races_between_waves(left_out, told):
    parts = {"wait": "s_waitcnt lgkmcnt(0)", "barrier": "s_barrier", "again": "s_barrier"}
    out = np.zeros(128, np.uint32)
    body = EXCHANGE.format(**{name: "" if name == left_out else line for name, line in parts.items()})
    if told is None:
        launch(body, out, waves=2, shared=512)
        assert out.tolist() == [*range(64, 128), *range(64)]
    else:
        with pytest.raises(EmulatorFault, match=told):
            launch(body, out, waves=2, shared=512)


def test_races_between_programs():
    x = np.zeros(64, np.uint32)
    with pytest.raises(EmulatorFault, match="this program writes what another one touches"):
        launch("v_lshlrev_b32 v1, 2, v0\nv_add_u32 v2, s2, v0\nglobal_store_dword v1, v2, s[4:5]", x, grid=2)
    launch("v_lshlrev_b32 v1, 2, v0\nglobal_store_dword v1, v0, s[4:5]", x, grid=2)  # what is there already is no race


def test_what_is_not_known_is_named():
    for line in (
        "v_no_such_f32 v0, v1",
        "s_no_such_b32 s0, s1",
        "v_mfma_f32_4x4x4_16b_f16 v[0:3], v[4:5], v[6:7], 0",
        "global_atomic_fmax v0, v1, s[4:5]",
        "v_mov_b32_dpp v0, v1 row_no:1 row_mask:0xf bank_mask:0xf",
        "ds_no_such v0, v1",
    ):
        with pytest.raises(UnknownInstructionError, match=r"gfx942: .*at here:1:1: "):
            execute(line)


def test_lds_that_nobody_wrote_is_nan():
    wave = execute("ds_read_b32 v1, v0\ns_waitcnt lgkmcnt(0)", {0: LANE * 4}, shared=Shared(256))
    assert np.isnan(wave.v[1].view(np.float32)).all()
