"""What the emulator must refuse: small kernels, each with one fault, beside the same kernel without it."""

import numpy as np
import pytest

pytest.importorskip("triton")

from support.ptx import launch

from fused_attn.emulator import EAGER, LATE, RANDOM, EmulatorFault, Schedule, UnknownInstructionError

pytestmark = pytest.mark.kernels
EXCHANGE = """
.reg .b32 %s, %v, %o; .reg .b64 %p;
mov.u32 %s, smem; mad.lo.s32 %o, %t, 4, %s; st.shared.b32 [%o], %t;
{between}
xor.b32 %v, %t, 32; mad.lo.s32 %o, %v, 4, %s; ld.shared.b32 %v, [%o];
mad.wide.u32 %p, %t, 4, %a0; st.global.b32 [%p], %v;
"""
ASYNC = """
.reg .b32 %s, %v; .reg .b64 %p;
mov.u32 %s, smem; mad.lo.s32 %s, %t, 16, %s; mad.wide.u32 %p, %t, 16, %a0;
cp.async.cg.shared.global [%s], [%p], 16; cp.async.commit_group; {wait}
ld.shared.b32 %v, [%s]; mad.wide.u32 %p, %t, 4, %a1; st.global.b32 [%p], %v;
"""
HANDOVER = """
.reg .b32 %s, %v; .reg .b64 %p; .reg .pred %one, %done;
mov.u32 %s, smem; setp.eq.s32 %one, %t, 0;
@%one mbarrier.init.shared::cta.b64 [%s], {count}; bar.sync 0;
@%one mbarrier.arrive.shared::cta.b64 _, [%s];
$wait: mbarrier.try_wait.parity.shared::cta.b64 %done, [%s], 0; @!%done bra $wait;
mad.wide.u32 %p, %t, 4, %a0; st.global.b32 [%p], %t;
"""
ADD = ".reg .b32 %v; .reg .b64 %p; mov.u32 %v, 1; mov.b64 %p, %a0; {how}"


def numbers(n, dtype=np.int32):
    return np.zeros(n, dtype)


@pytest.mark.parametrize("landing", [EAGER, LATE, RANDOM])
def test_races_of_shared_memory(landing):
    out = numbers(64)
    launch(EXCHANGE.format(between="bar.sync 0;"), [out], threads=64, shared=256, schedule=Schedule(landing))
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)
    with pytest.raises(EmulatorFault, match=r"race: (read|write) of shared byte \d+ is not after its"):
        launch(EXCHANGE.format(between=""), [out], threads=64, shared=256, schedule=Schedule(landing))
    launch(EXCHANGE.format(between="bar.sync 1, 64;"), [out], threads=64, shared=256)
    with pytest.raises(EmulatorFault, match=r"deadlock: no warp can go on, and warp \d waits at barrier 1"):
        launch(EXCHANGE.format(between="bar.sync 1, 96;"), [out], threads=64, shared=256)


def test_copies_are_waited_for():
    source, out = np.arange(128, dtype=np.int32), numbers(32)
    launch(ASYNC.format(wait="cp.async.wait_group 0;"), [source, out], shared=512, schedule=Schedule(LATE))
    np.testing.assert_array_equal(out, source[::4])
    for landing in (EAGER, LATE, RANDOM):
        with pytest.raises(EmulatorFault, match=r"race: read of shared byte 0 is not after its write by cp\.async of warp 0"):
            launch(ASYNC.format(wait="cp.async.wait_group 1;"), [source, out], shared=512, schedule=Schedule(landing))
    launch(ASYNC.format(wait=""), [source, out], shared=512, schedule=Schedule(LATE, races=False))
    assert (out == -1).all(), "late, it has not landed: what was there before is NaN's bits"


def test_mbarriers_deadlock_and_are_misused():
    out = numbers(32)
    launch(HANDOVER.format(count=1), [out], shared=64)
    np.testing.assert_array_equal(out, np.arange(32))
    with pytest.raises(EmulatorFault, match="deadlock: every warp spins on an mbarrier that nothing completes"):
        launch(HANDOVER.format(count=2), [out], shared=64)
    with pytest.raises(EmulatorFault, match="1 arrivals at an mbarrier that expects 0"):
        launch(HANDOVER.format(count=0), [out], shared=64)
    with pytest.raises(EmulatorFault, match="mbarrier at shared byte 0 was not initialised"):
        launch(HANDOVER.format(count=1).replace("@%one mbarrier.init", "//"), [out], shared=64)


@pytest.mark.parametrize("resident", [1, 3])
def test_races_of_global_memory_between_programs(resident):
    """Nothing orders the programs of a launch, whichever of them runs first."""
    out, schedule = numbers(1), Schedule(resident=resident)
    launch(ADD.format(how=".reg .pred %one; setp.eq.s32 %one, %t, 0; @%one red.global.add.u32 [%p], %v;"), [out], grid=5,
           schedule=schedule)
    assert out[0] == 5
    mine = "add.s32 %v, %cta, 7; .reg .pred %one; setp.eq.s32 %one, %t, 0; @%one st.global.b32 [%p], %v;"
    with pytest.raises(EmulatorFault, match=r"race: write of global memory that program \d has written"):
        launch(ADD.format(how=mine), [out], grid=5, schedule=schedule)
    reading = "ld.global.b32 %v, [%p]; add.s32 %v, %v, %cta; add.s32 %v, %v, 1; .reg .pred %one; setp.eq.s32 %one, %t, 0; "
    with pytest.raises(EmulatorFault, match=r"race: (read|write) of global memory that"):
        launch(ADD.format(how=reading + "@%one st.global.b32 [%p], %v;"), [out], grid=2, schedule=schedule)
    same = numbers(1)
    launch(ADD.format(how="st.global.b32 [%p], %v;"), [same], grid=5, schedule=schedule)  # what is there already may be written


@pytest.mark.parametrize(("body", "said"), [
    ("ld.global.b32 %v, [%a0 + 128];", "global read of 4 bytes at .*: outside of every tensor"),
    ("ld.global.b32 %v, [%a0 + -4];", "outside of every tensor"),
    ("st.global.b32 [%a0 + 2], %v;", "global access of 4 bytes at .* is not aligned"),
    ("mov.u32 %v, smem; ld.shared.b32 %v, [%v + 64];", "shared read of 4 bytes at 64: outside of the 64 bytes"),
    ("mov.u32 %v, 0; ld.shared.b32 %v, [%v];", "outside of the 64 bytes"),
    (".reg .pred %low; setp.lt.s32 %low, %t, 8; @%low shfl.sync.idx.b32 %v, %v, 9, 31, -1;", "lane 9, which is not active"),
    (".reg .pred %low; setp.lt.s32 %low, %t, 8; @%low bra $on; bar.sync 0; $on:", "bar.sync in a diverged warp"),
    ("$round: bra $round;", "the launch does not end"),
], ids=["beyond", "before", "misaligned", "shared", "null", "shuffle", "barrier", "endless"])
def test_what_no_kernel_may_do(body, said, monkeypatch):
    monkeypatch.setattr("fused_attn.emulator.machine.FUEL", 10_000)
    with pytest.raises(EmulatorFault, match=said) as told:
        launch(".reg .b32 %v; mov.u32 %v, 1; " + body, [numbers(32)], shared=64)
    assert "in warp 0 of program 0" in str(told.value)


def test_what_nobody_wrote_is_nan():
    out = np.zeros(32, np.float32)
    launch(".reg .b32 %s, %v, %w; .reg .b64 %p; mov.u32 %s, smem; ld.shared.b32 %v, [%s]; add.f32 %v, %v, %w;"
           " mad.wide.u32 %p, %t, 4, %a0; st.global.b32 [%p], %v;", [out], shared=64)
    assert np.isnan(out).all()


def test_what_is_unknown_is_named():
    with pytest.raises(UnknownInstructionError, match=r"the emulator does not know sad\.s32 %v, %v, %v, %v"):
        launch(".reg .b32 %v; sad.s32 %v, %v, %v, %v;", [numbers(1)])


def test_branches_diverge_and_meet():
    """Nested, in a loop whose trips differ from lane to lane: the sum of 0 ... l % 5, negative for odd lanes."""
    out = numbers(32)
    launch("""
        .reg .b32 %n, %i, %v, %odd; .reg .pred %more, %is_odd; .reg .b64 %p;
        rem.u32 %n, %t, 5; mov.u32 %i, 0; mov.u32 %v, 0; and.b32 %odd, %t, 1; setp.ne.s32 %is_odd, %odd, 0;
        $loop: @%is_odd bra $minus; add.s32 %v, %v, %i; bra $both; $minus: sub.s32 %v, %v, %i; $both:
        add.s32 %i, %i, 1; setp.le.s32 %more, %i, %n; @%more bra $loop;
        mad.wide.u32 %p, %t, 4, %a0; st.global.b32 [%p], %v;""", [out])
    lanes = np.arange(32)
    np.testing.assert_array_equal(out, lanes % 5 * (lanes % 5 + 1) // 2 * np.where(lanes % 2, -1, 1))
