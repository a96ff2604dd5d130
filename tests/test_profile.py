"""The static profile: occupancy and the pipe model by hand, and the gate that holds default kernels to docs/profile.json."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from fused_attn.targets import TARGETS
from fused_attn.tools.compile import matrix, profile, sass
from fused_attn.tools.compile.matrix import Job, profiled
from fused_attn.tools.compile.sass import Instruction

ROOT = Path(__file__).parents[1]
KIB = 1024


# Registers: 16384 of a scheduler go to warps in 256s, a thread's in 8s. Shared memory: 1 KiB more for each program, in 128s.
@pytest.mark.parametrize(("target", "registers", "shared", "warps", "programs", "limited_by"), [
    ("sm_90", 128, 0, 8, 2, "registers"),
    ("sm_90", 129, 0, 8, 1, "registers"),  # rounded to 136: 3 warps a scheduler
    ("sm_90", 120, 0, 8, 2, "registers"),
    ("sm_90", 168, 0, 12, 1, "registers"),
    ("sm_90", 176, 0, 12, 0, "registers"),  # a program needs 3 warps of every scheduler, 2 fit
    ("sm_90", 255, 0, 4, 2, "registers"),
    ("sm_90", 255, 0, 3, 2, "registers"),
    ("sm_90", 16, 0, 1, 32, "threads"),
    ("sm_90", 32, 0, 8, 8, "registers, threads"),
    ("sm_90", 32, 113 * KIB, 4, 2, "shared memory"),
    ("sm_90", 32, 113 * KIB + 1, 4, 1, "shared memory"),
    ("sm_80", 64, 81 * KIB, 4, 2, "shared memory"),
    ("sm_80", 64, 81 * KIB + 1, 4, 1, "shared memory"),
    ("sm_80", 64, 40 * KIB, 4, 4, "shared memory"),
    ("sm_86", 16, 0, 1, 16, "threads"),
    ("sm_86", 32, 0, 8, 6, "threads"),  # 48 warps
    ("sm_86", 32, 49 * KIB, 4, 2, "shared memory"),
    ("gfx942", 128, 0, 4, 4, "registers"),
    ("gfx942", 129, 0, 4, 3, "registers"),
    ("gfx942", 64, 0, 4, 8, "registers, threads"),
    ("gfx942", 64, 32 * KIB, 4, 2, "shared memory"),
    ("gfx942", 64, 32 * KIB + 1, 4, 1, "shared memory"),
])
def test_programs_on_a_multiprocessor(target, registers, shared, warps, programs, limited_by):
    assert profile.occupancy(TARGETS[target].machine, registers, shared, warps) == (programs, limited_by)


def test_tensor_memory_limits_programs():
    assert profile.occupancy(TARGETS["sm_100"].machine, 64, 0, 4, 256) == (2, "tensor memory")


def loop_of(*instructions: tuple[Instruction, tuple[int, int, int] | None]) -> sass.Loop:
    return sass.Loop(tuple(x for x, _ in instructions), tuple(shape for _, shape in instructions))


def times(count: int, op: str, shape: tuple[int, int, int] | None = None) -> list:
    return [(Instruction(op), shape)] * count


def modelled(target: str, warps: int, *instructions) -> profile.LoopProfile:
    return profile.profile_loop(loop_of(*instructions), warps, 32 * warps, TARGETS[target].machine.rates)


def test_the_model_of_wgmma():
    """Two warpgroups, two warps a scheduler. m64n128k16: 64 cycles of the tensor cores for each warpgroup."""
    loop = modelled("sm_90", 8, *times(4, "HGMMA.64x128x16.F32.BF16", (64, 128, 16)), *times(40, "MUFU.EX2"),
                    *times(30, "FFMA"), *times(10, "IMAD"), *times(20, "FMNMX"), *times(6, "UMOV"))
    assert loop.cycles == {
        "tensor": 2 * 4 * 64, "exp2": 2 * 40 * 8, "fma": 2 * (30 + 2 * 10), "alu": 2 * 20 * 2, "issue": 2 * 110}
    assert loop.bound == "exp2"
    assert loop.cycles_overlapped == 640
    assert loop.cycles_in_turn == 512 + 640
    assert loop.utilisation_overlapped == 0.8
    assert loop.utilisation_in_turn == 0.444
    assert loop.other_per_matrix is None


def test_the_model_of_mma_sync():
    """One warp a scheduler. 16 x 8 x 16: 8 cycles on sm_80, whose FMA pipe is half as wide."""
    loop = modelled("sm_80", 4, *times(10, "HMMA.16816.F32.BF16", (16, 8, 16)), *times(20, "FFMA"), *times(5, "LDSM.16.M88.4"))
    assert loop.cycles == {"tensor": 80, "exp2": 0, "fma": 40, "alu": 0, "issue": 35}
    assert (loop.bound, loop.utilisation_overlapped, loop.utilisation_in_turn) == ("tensor", 1.0, 0.667)
    assert loop.other_per_matrix == 2.5


def test_the_model_of_tcgen05():
    """Issued once for all warps: 128 x 128 x 16 in 64 cycles, whatever their number. A packed FADD2 is two."""
    for warps in (4, 8):
        loop = modelled("sm_100", warps, *times(3, "UTCHMMA", (128, 128, 16)), *times(10, "FADD2"))
        assert loop.cycles["tensor"] == 3 * 64
        assert loop.cycles["fma"] == warps // 4 * 20


def test_the_model_of_mfma():
    """16 x 16 x 16 takes a SIMD 16 cycles; a wave's other vector instructions take 4 of its one pipe, exp2 16."""
    loop = modelled("gfx942", 4, *times(2, "v_mfma_f32_16x16x16_bf16", (16, 16, 16)), *times(3, "v_exp_f32_e32"),
                    *times(4, "v_add_f32_e32"), *times(5, "v_perm_b32"))
    assert loop.cycles == {"tensor": 32, "vector": 3 * 16 + 4 * 4 + 5 * 4}
    assert loop.bound == "vector"


def test_what_the_model_does_not_know_it_leaves_out():
    """mma.sync has no published rate on sm_90; a tcgen05 descriptor that is no constant has no shape."""
    for target, op, shape in (("sm_90", "HMMA.16816.F32.BF16", (16, 8, 16)), ("sm_100", "UTCHMMA", None)):
        loop = modelled(target, 4, *times(1, op, shape), *times(1, "FFMA"))
        assert "tensor" not in loop.cycles
        assert (loop.bound, loop.cycles_in_turn, loop.utilisation_overlapped) == (None, None, None)
    assert profile.profile_loop(loop_of(*times(1, "FFMA")), 4, 128, None).cycles == {}


def test_the_leanest_loop_stands_for_a_kernel():
    masked, plain = {"instructions": 836, "mix": {"tensor": 16}}, {"instructions": 524, "mix": {"tensor": 16}}
    assert profile.steady([masked, plain]) is plain


# --- The gate ---


@functools.cache
def committed() -> list[dict]:
    return json.loads((ROOT / "docs/profile.json").read_text())


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("target", "kernel", "dtype", "head_dim", "causal", "feature", "hopper"))


def what_got_worse(now: list[dict], before: list[dict]) -> list[str]:
    """In words; a kernel that is on one side alone is worse, too."""
    old, new = ({key(row): row for row in rows} for rows in (before, now))
    found = [f"{' '.join(map(str, name))}: only {'now' if name in new else 'before'}" for name in old.keys() ^ new.keys()]
    return found + [f"{' '.join(map(str, name))}: {'; '.join(figures)}" for name in old.keys() & new.keys()
                    if (figures := profile.worse(new[name], old[name]))]


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
                            env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return result.stdout


SOME = [Job("sm_90", ("bf16",), (128,), True), Job("sm_80", ("bf16",), (128,), False), Job("gfx942", ("bf16",), (64,), True),
        Job("sm_90", ("bf16",), (128,), True, hopper="gluon")]


def name(job: Job) -> str:
    dims = "-".join(map(str, job.head_dims))
    return f"{job.target}-D{dims}-{'causal' if job.causal else 'full'}-{job.feature}-{job.hopper}"


def of_job(rows: list[dict], job: Job) -> list[dict]:
    return [row for row in rows if row["head_dim"] in job.head_dims and row["dtype"] in job.dtypes
            and all(row[name] == getattr(job, name) for name in ("target", "causal", "feature", "hopper"))]


@pytest.mark.few(2)
@pytest.mark.kernels
@pytest.mark.parametrize("job", [*(pytest.param(job, id=name(job)) for job in SOME),
                                 *(pytest.param(job, id=f"all-{name(job)}", marks=pytest.mark.slow) for job in profiled())])
def test_default_kernels_are_no_worse_than_committed(job):
    """Registers spilled, programs that fit, ptxas's warnings, hazards, barriers, overlap and cycles of the main loops.

    After a change for the better, or a trade, `make profile` writes the file anew, and its diff is what to look at.
    """
    before = of_job(committed(), job)
    assert before, "no such rows in docs/profile.json"
    if before[0]["triton"] != triton.__version__:
        pytest.skip(f"docs/profile.json is of Triton {before[0]['triton']}, and this is {triton.__version__}, another compiler")
    lines = python("-m", "fused_attn", "compile", "--profile", "--json", *job.arguments())
    worse = what_got_worse([json.loads(line) for line in lines.splitlines()], before)
    assert not worse, "\n".join(worse)


@pytest.mark.kernels
@pytest.mark.parametrize("row", [
    pytest.param(row, id=f"{row['kernel']}-D{row['head_dim']}-{'causal' if row['causal'] else 'full'}")
    for row in committed() if row["hopper"] == "gluon" and row["kernel"] in ("forward", "backward")])
def test_gluon_kernels_hide_every_exponential(row):
    """At least 95 % of exp2 under a wgmma in every main loop, no spill in one, nothing serialised, no wait for everyone."""
    assert row["spill_bytes"] <= (4 if row["kernel"] == "backward" else 0)
    assert row["warnings"] == []
    products = [loop for loop in row["loops"] if loop["mix"].get("exp2")]
    assert len(products) >= 2  # a consumer each
    for loop in products:
        assert loop["exp2_under_wgmma"] >= 0.95
        assert (loop["mix"].get("local", 0), loop["wide_barriers"], loop["hazards"]) == (0, 0, 0)


def test_the_gate_sees_a_worse_configuration():
    """sm_80's forward with four warps where the default has eight: the registers do not suffice."""
    lines = python("-c", """if True:
        import dataclasses, json
        from fused_attn.tools.compile import offline, profile
        from fused_attn.call.spec import TileConfig
        report, = offline.compile_kernel("sm_80", "forward", 128, "bf16", True, config=TileConfig(128, 64, 4, 3))
        print(json.dumps(dataclasses.asdict(profile.profile(report))))
    """)
    now = json.loads(lines)
    (before,) = (row for row in committed() if key(row) == key(now))
    (found,) = what_got_worse([now], [before])
    assert f"spill bytes from {before['spill_bytes']} to {now['spill_bytes']}" in found
    assert f"main loop 0: local memory from {before['loops'][0]['mix'].get('local', 0)} to" in found


def row_of_sm_90() -> dict:
    name = ("sm_90", "forward", "bf16", 128, True, "plain", "pointers")
    return copy.deepcopy(next(row for row in committed() if key(row) == name))


def test_a_row_is_no_worse_than_itself():
    assert what_got_worse(committed(), committed()) == []


@pytest.mark.parametrize(("change", "said"), [
    (lambda row: row.update(spill_bytes=4), "spill bytes from 0 to 4"),
    (lambda row: row.update(programs=0), "programs a multiprocessor from 1 to 0 (registers, shared memory)"),
    (lambda row: row.update(warnings=["C7515"]), "warnings from [] to ['C7515']: C7515 new"),
    (lambda row: row["loops"].pop(), "main loops from 2 to 1"),
    (lambda row: row["loops"][1]["mix"].update(local=2), "main loop 1: local memory from 0 to 2"),
    (lambda row: row["loops"][0].update(wide_barriers=3), "main loop 0: wide barriers from 2 to 3"),
    (lambda row: row["loops"][0].update(hazards=1), "main loop 0: hazards from 0 to 1"),
    (lambda row: row["loops"][0].update(instructions=535), "main loop 0: instructions from 524 to 535"),
    (lambda row: row["loops"][0].update(cycles_overlapped=2090), "main loop 0: cycles overlapped from 2048 to 2090"),
    (lambda row: row["loops"][0].update(cycles_in_turn=3930), "main loop 0: cycles in turn from 3840 to 3930"),
])
def test_every_figure_that_gets_worse_is_named(change, said):
    now = row_of_sm_90()
    change(now)
    assert profile.worse(now, row_of_sm_90()) == [said]
    assert profile.worse(row_of_sm_90(), now) in ([], ["main loops from 1 to 2"])  # better is not worse


def test_less_overlap_is_worse():
    now, before = row_of_sm_90(), row_of_sm_90()
    before["loops"][0]["exp2_under_wgmma"] = 1.0
    now["loops"][0]["exp2_under_wgmma"] = 0.99
    assert profile.worse(now, before) == []
    now["loops"][0]["exp2_under_wgmma"] = 0.97
    assert profile.worse(now, before) == ["main loop 0: exp2 under wgmma from 1.0 to 0.97"]


def test_noise_of_the_compiler_is_not_worse():
    now = row_of_sm_90()
    now["loops"][0].update(instructions=534, cycles_overlapped=2088, cycles_in_turn=3160)
    assert profile.worse(now, row_of_sm_90()) == []


def test_a_kernel_that_vanished_is_told():
    (told,) = what_got_worse([], [row_of_sm_90()])
    assert told == "sm_90 forward bf16 128 True plain pointers: only before"


def test_one_command_writes_the_rows_and_the_readable_table(tmp_path, monkeypatch):
    """Given the committed rows, the whole run writes the committed files."""

    def compiled(job, static_profile):
        assert static_profile
        return of_job(committed(), job), ""

    monkeypatch.setattr(matrix, "_subprocess", compiled)
    assert matrix.run(tmp_path / "profile.json", static_profile=True) == 0
    for file in ("profile.json", "profile.md"):
        assert (tmp_path / file).read_text() == (ROOT / "docs" / file).read_text()
