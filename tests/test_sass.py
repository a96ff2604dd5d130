"""Reading machine code: listings written by hand, small enough to count by eye."""

import pytest

from fused_attn.tools.compile import sass
from fused_attn.tools.compile.sass import Instruction


def nvidia(text: str) -> sass.Listing:
    """A listing as nvdisasm prints it, from lines without addresses; labels stand alone."""
    lines = (line.strip() for line in text.strip().splitlines())
    return sass.parse_nvidia("\n".join(
        line if line.startswith(".L") else f"        /*{16 * index:04x}*/                   {line} ;"
        for index, line in enumerate(lines)))


def only_loop(text: str) -> sass.Loop:
    (loop,) = nvidia(text).main_loops()
    return loop


def opcodes(loop: sass.Loop) -> list[str]:
    return [x.op for x in loop.instructions]


HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
GROUP = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
EXP2 = "MUFU.EX2 R3, R3"


def around(*body: str) -> str:
    return "\n".join([".L_x_0:", *body, "@P0 BRA `(.L_x_0)", "EXIT"])


def test_a_line_in_its_parts():
    listing = nvidia("@!P0 LDG.E.128 R4, desc[UR4][R2.64]\n.L_x_7:\nEXIT")
    assert listing.instructions == (Instruction("LDG.E.128", "R4, desc[UR4][R2.64]", "!P0"), Instruction("EXIT"))
    assert listing.labels == {".L_x_7": 1}


@pytest.mark.parametrize(("op", "family"), [
    ("HGMMA.64x128x16.F32.BF16", "tensor"), ("UTCHMMA", "tensor"), ("v_mfma_f32_16x16x16_bf16", "tensor"),
    ("MUFU.EX2", "exp2"), ("v_exp_f32_e32", "exp2"), ("FFMA.FTZ", "fma"), ("IMAD.MOV.U32", "fma"), ("FADD2", "fma"),
    ("v_pk_mul_f32", "fma"), ("v_add_f32_e32", "fma"), ("v_add_u32_e32", "alu"),
    ("FMNMX3.FTZ", "alu"), ("F2FP.BF16.F32.PACK_AB", "alu"),
    ("SHFL.BFLY", "shuffle"), ("REDUX.MAX", "shuffle"), ("LDSM.16.M88.4", "shared"), ("LDS.128", "shared"),
    ("ds_read_b128", "shared"), ("ds_bpermute_b32", "shuffle"), ("LDGSTS.E.BYPASS.128", "global"), ("REDG.E.ADD.F32", "global"),
    ("buffer_load_dwordx4", "global"), ("UTMALDG.4D", "global"), ("LDGDEPBAR", "sync"), ("WARPGROUP.DEPBAR.LE", "sync"),
    ("BAR.SYNC.DEFER_BLOCKING", "sync"), ("s_barrier", "sync"),
    ("LDL.64", "local"), ("STL", "local"), ("scratch_load_dword", "local"),
    ("LDTM.x32", "tensor memory"), ("UMOV", "other"), ("ULEA", "other"), ("USEL", "other"), ("BRA", "other"), ("LDC", "other"),
])
def test_what_an_instruction_is_for(op, family):
    assert Instruction(op).family == family


def test_what_is_never_executed_counts_as_nothing():
    assert Instruction("LDS", "RZ, [RZ]", "!PT").family == "other"


@pytest.mark.parametrize(("op", "args", "registers"), [
    ("FADD", "R7, R7, R8", {7}),
    ("LDS.128", "R4, [R9]", {4, 5, 6, 7}),
    ("LDG.E.64", "R4, desc[UR4][R2.64]", {4, 5}),
    ("CS2R", "R6, SRZ", {6, 7}),
    ("CS2R.32", "R6, SR_CLOCKLO", {6}),
    ("LDSM.16.MT88.4", "R8, [R2]", {8, 9, 10, 11}),
    ("SHFL.BFLY", "PT, R5, R6, 0x1, 0x1f", {5}),
    ("IMAD.WIDE", "R2, R3, 0x4, R6", {2, 3}),
    ("SHF.R.S64", "R3, RZ, 0x5, R6", {3}),
    ("FSETP.GT.AND", "P0, PT, R4, R5, PT", set()),
    ("STS.128", "[R4], R8", set()),
    ("STG.E", "desc[UR4][R2.64], R8", set()),
    ("HGMMA.64x128x16.F32.BF16", "R24, R152, gdesc[UR8], R24", set()),
    ("BAR.SYNC.DEFER_BLOCKING", "R4, 0x80", set()),
    ("R2UR", "UR4, R5", set()),
])
def test_registers_that_are_written(op, args, registers):
    assert Instruction(op, args).written() == registers


def test_the_innermost_loops_that_multiply_are_the_main_ones():
    listing = nvidia(f"""
        .L_x_0:
        MOV R1, R2
        .L_x_1:
        {HMMA}
        @P0 BRA `(.L_x_1)
        FADD R1, R1, R2
        .L_x_2:
        IADD3 R1, R1, R2
        @P1 BRA `(.L_x_2)
        .L_x_3:
        {HMMA}
        {HMMA}
        @P2 BRA `(.L_x_3)
        @P3 BRA `(.L_x_0)
        EXIT
    """)
    assert [opcodes(loop) for loop in listing.main_loops()] == [
        ["HMMA.16816.F32.BF16", "BRA"], ["HMMA.16816.F32.BF16", "HMMA.16816.F32.BF16", "BRA"]]


def test_without_matrix_instructions_a_main_loop_has_fused_multiply_adds():
    assert opcodes(only_loop(around("FFMA R1, R1, R2, R3"))) == ["FFMA", "BRA"]
    assert nvidia(around("MOV R1, R2")).main_loops() == []


def test_a_wait_spun_on_out_of_line_neither_makes_nor_lengthens_a_loop():
    """Its jump back into the loop goes from a high address to a low one, as a loop's does."""
    loop = only_loop(f"""
        .L_x_0:
        FADD R1, R1, R2
        @!P1 BRA `(.L_x_2)
        .L_x_1:
        {HMMA}
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2
        @!P1 BRA `(.L_x_2)
        BRA `(.L_x_1)
    """)
    assert opcodes(loop) == ["FADD", "BRA", "HMMA.16816.F32.BF16", "BRA"]


def test_a_loop_whose_head_lies_behind_its_end():
    """LLVM lays some loops out so that the end falls through to the head."""
    (loop,) = sass.parse_amd("""
    s_branch .LBB0_9
.LBB0_8:
    v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
    s_cbranch_scc0 .LBB0_41
.LBB0_9:
    v_exp_f32_e32 v4, v4
    s_cbranch_execz .LBB0_8
    v_perm_b32 v4, v4, v5, v6
    s_branch .LBB0_8
.LBB0_41:
    s_endpgm
""").main_loops()
    assert opcodes(loop) == ["v_mfma_f32_16x16x16_bf16", "s_cbranch_scc0", "v_exp_f32_e32", "s_cbranch_execz", "v_perm_b32",
                             "s_branch"]


def test_both_sides_of_a_branch_belong_to_the_loop():
    assert opcodes(only_loop(around("@P1 BRA `(.L_x_1)", "FSEL R1, R1, R2, P2", ".L_x_1:", HMMA))) == [
        "BRA", "FSEL", "HMMA.16816.F32.BF16", "BRA"]


def test_partitions_of_a_warp_specialised_kernel():
    """Workers wait in a loop of their own and are sent to partitions by register; a setmaxnreg that is tried again goes back
    over whole partitions. What counts is each consumer's loop over tiles."""
    listing = nvidia(f"""
        @!P0 BRA `(.L_x_9)
        .L_x_1:
        USETMAXREG.DEALLOC.CTAPOOL 0x78
        BAR.SYNC.DEFER_BLOCKING 0x1
        BRX R2 -0x210 (*"BRANCH_TARGETS .L_x_2,.L_x_4,.L_x_8"*)
        .L_x_2:
        USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
        @!P0 BRA `(.L_x_2)
        .L_x_3:
        {GROUP}
        {EXP2}
        @P0 BRA `(.L_x_3)
        BRA `(.L_x_1)
        .L_x_4:
        UTMALDG.4D [UR4], [UR6], desc[UR8]
        @P0 BRA `(.L_x_4)
        BRA `(.L_x_1)
        .L_x_8:
        EXIT
        .L_x_9:
        USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
        {GROUP}
        @!P0 BRA `(.L_x_9)
        .L_x_10:
        {GROUP}
        @P0 BRA `(.L_x_10)
        EXIT
    """)
    assert [opcodes(loop)[1:] for loop in listing.main_loops()] == [["MUFU.EX2", "BRA"], ["BRA"]]


@pytest.mark.parametrize(("body", "share"), [
    ([GROUP, "WARPGROUP.DEPBAR.LE gsb0, 0x0", EXP2], 0.0),
    ([GROUP, EXP2, "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 1.0),
    ([GROUP, EXP2, EXP2, EXP2, "WARPGROUP.DEPBAR.LE gsb0, 0x0", EXP2], 0.75),
    ([GROUP, GROUP, "WARPGROUP.DEPBAR.LE gsb0, 0x1", EXP2, "WARPGROUP.DEPBAR.LE gsb0, 0x0", EXP2], 0.5),
    ([EXP2, "WARPGROUP.DEPBAR.LE gsb0, 0x0", GROUP], 1.0),  # what the turn before left in flight
    (["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", EXP2, GROUP, "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 0.0),  # group still open
    ([GROUP, "WARPGROUP.DEPBAR.LE gsb0, 0x0"], None),
    ([HMMA, EXP2], None),
])
def test_share_of_exp2_under_a_wgmma(body, share):
    assert only_loop(around(*body)).exp2_under_wgmma() == share


FROM_REGISTERS = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0"


@pytest.mark.parametrize(("body", "found"), [
    ([FROM_REGISTERS, "FADD R153, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 1),
    ([FROM_REGISTERS, "FADD R155, R1, R2", "FADD R152, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 2),
    ([FROM_REGISTERS, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R153, R1, R2"], 0),
    ([FROM_REGISTERS, "FADD R156, R153, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 0),  # reads one, writes another
    ([FROM_REGISTERS, "LDS.128 R149, [R2]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 1),  # the last of four
    (["FADD R152, R1, R2", FROM_REGISTERS], 1),  # in flight from the turn before
    ([GROUP, FROM_REGISTERS, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R152, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 1),
    ([FROM_REGISTERS, GROUP, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R152, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 0),
    ([GROUP, "FADD R152, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 0),
])
def test_writes_to_registers_that_a_wgmma_reads(body, found):
    assert only_loop(around(*body)).hazards() == found


def test_barriers_of_the_whole_program():
    loop = only_loop(around(HMMA, "BAR.SYNC.DEFER_BLOCKING 0x0", "BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", "BAR.ARV 0x1, 0x100",
                            "BAR.SYNC.DEFER_BLOCKING 0x2, 0x100", "BAR.SYNC.DEFER_BLOCKING R4, R5"))
    assert loop.wide_barriers(256) == 2  # one without a count, one of all 256 threads
    assert loop.wide_barriers(384) == 1


def test_shapes_of_matrix_instructions():
    loop = only_loop(around(
        GROUP, HMMA, "UMOV UR53, 0x8200490", "UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR11], tmem[UR52], idesc[UR53], UPT",
        "UMOV UR53, 0x4100490", "UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR11], tmem[UR52], idesc[UR53], UPT",
        "UIADD3.X UR53, UPT, UPT, UR27, URZ, URZ, UP1, !UPT",
        "UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR11], tmem[UR52], idesc[UR53], UPT"))
    assert loop.shapes == ((64, 128, 16), (16, 8, 16), None, (128, 128, 16), None, (64, 64, 16), None, None, None)


def test_amd_assembly():
    listing = sass.parse_amd("""
.LBB0_1:                                ; %loop
    v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
    v_exp_f32_e32 v4, v4
    s_barrier
    s_cbranch_scc1 .LBB0_1
; %bb.2:
    s_endpgm
""")
    (loop,) = listing.main_loops()
    assert opcodes(loop) == ["v_mfma_f32_16x16x16_bf16", "v_exp_f32_e32", "s_barrier", "s_cbranch_scc1"]
    assert loop.shapes[0] == (16, 16, 16)
    assert loop.wide_barriers(256) == 1
    assert loop.exp2_under_wgmma() is None
