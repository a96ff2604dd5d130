"""The compiled kernels, executed: every feature on emulated cards against fp64, searched for races; planted faults are seen."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from support.emulation import ROOT, SEVERAL, Emulation, Worker
from support.emulations import every
from support.features import Shape

import fused_attn
from fused_attn import emulator, settings
from fused_attn.emulator import build
from fused_attn.targets import triton_version

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def worker():
    process = Worker()
    yield process
    process.close()


def one(*arguments, **others):
    emulation = Emulation(*arguments, **others)
    return pytest.param(emulation, id=str(emulation))


FEW = [
    one(("causal",), "sm_80", shape=SEVERAL), one(("bias_keys",), "sm_80"),
    one(("packed",), "sm_90", shape=Shape(3, 2, 1, 65, 129, 64, 64, "packed")), one(("causal",), "sm_90", shape=SEVERAL),
    one(("causal",), "sm_90", hopper="descriptors", shape=SEVERAL),
    one(("causal", "gqa"), "sm_90", hopper="gluon", shape=SEVERAL), one(("causal",), "sm_86", "tf32x3"),
    one((), "sm_80", "fp64"),
    one(("causal",), "sm_90", hopper="specialized", shape=SEVERAL), one(("causal",), "sm_100", shape=SEVERAL),
    one((), "gfx942", "fp16"), one(("causal",), "gfx1100"),
    one((), "sm_80", what="rotary"), one(("window", "sinks"), "sm_80", what="weights"),
]
MANY = [pytest.param(emulation, id=str(emulation), marks=pytest.mark.slow) for emulation in every()]


@pytest.mark.few(6)
@pytest.mark.parametrize("emulation", [*FEW, *MANY])
def test_compiled_kernels_are_right_and_race_nowhere(worker, emulation):
    told = worker(emulation)
    assert told["verdict"] == "ok", f"{emulation!r}: {told['verdict']}"
    first = {"attention": "forward_kernel", "rotary": "rotary_kernel", "weights": "weights_kernel"}[emulation.what]
    assert first in {kernel["name"] for kernel in told["kernels"]}
    assert all(kernel["instructions"] > 0 for kernel in told["kernels"])


SHORT = Shape(1, 1, 1, 300, 300, 128, 128)
DROPPED = [  # (fault, what it is called for)
    ("sm_80", "pointers", ("forward_kernel", "cp.async.wait_group", 0, "cp.async.wait_group 9;"), "race"),
    ("sm_80", "pointers", ("forward_kernel", "bar.sync", 1, ""), "race"),
    ("sm_90", "pointers", ("forward_kernel", "wgmma.wait_group", 0, ""), "not waited for"),
    ("sm_90", "pointers", ("forward_kernel", "fence.proxy.async", int(triton_version() < (3, 9)), ""), "fence.proxy.async"),
    ("sm_90", "gluon", ("forward_kernel", "wgmma.wait_group", 0, ""), "not waited for"),
    ("gfx942", "pointers", ("forward_kernel", "s_waitcnt vmcnt", 0, ""), "no s_waitcnt between"),
    ("gfx1100", "pointers", ("forward_kernel", "s_barrier", 2, ""), "race"),
]


@pytest.mark.few(4)
@pytest.mark.parametrize(("target", "hopper", "fault", "called"), DROPPED,
                         ids=lambda value: value[1] if isinstance(value, tuple) else None)
def test_planted_faults_are_found(worker, target, hopper, fault, called):
    told = worker(Emulation(("causal",), target, hopper=hopper, shape=SHORT, fault=fault))
    assert called in told["verdict"], told["verdict"]


LACKING = [(Emulation(("causal",), "sm_90", shape=SEVERAL), (3, 7)), (Emulation(("bias",), "sm_90"), (3, 7)),
           (Emulation(("causal",), "sm_90", hopper="specialized"), (3, 8)), (Emulation(("gqa",), "sm_100"), (3, 9))]


@pytest.mark.few(1)
@pytest.mark.parametrize(("emulation", "complete"), [
    pytest.param(emulation, complete, id=str(emulation), marks=[pytest.mark.slow] * (triton_version() >= complete))
    for emulation, complete in LACKING])
def test_fences_that_triton_leaves_out_are_put_in(worker, emulation, complete):
    told = worker(replace(emulation, fenced=False))["verdict"]
    assert told == "ok" if triton_version() >= complete else "no fence.proxy.async between" in told
    assert worker(emulation)["verdict"] == "ok"


LEFT_OUT = {(3, 6): {"sm_90": {"pointers", "chained", "specialized"}, "sm_100": {"pointers", "chained", "specialized"}},
            (3, 7): {"sm_90": {"specialized"}, "sm_100": {"chained"}}, (3, 8): {"sm_90": set(), "sm_100": {"chained"}}}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_smallest_kernels_show_what_docs_say_of_triton(target):
    command = [sys.executable, "-m", "tests.support.upstream", target]
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    lacking = {line.split()[0] for line in told if "no fence.proxy.async between" in line}
    assert lacking == LEFT_OUT.get(triton_version(), {}).get(target, set()), told


@pytest.mark.few(3)
@pytest.mark.parametrize("schedule", [{"landing": emulator.EAGER, "turn": 0}, {"landing": emulator.LATE},
                                      {"seed": 5, "resident": 4}, {"perturb": True, "truncate": True}], ids=str)
@pytest.mark.parametrize("hopper", ["pointers", "gluon"])
def test_every_schedule_gives_the_answer(worker, schedule, hopper):
    told = worker(Emulation(("causal",), "sm_90", hopper=hopper, shape=SEVERAL, schedule=schedule))
    assert told["verdict"] == "ok"


def test_what_it_cannot_do_is_told(monkeypatch):
    with pytest.raises(ValueError, match=r"target: expected one of sm_80.*; got 'sm_75'"), fused_attn.emulated("sm_75"):
        pass
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), fused_attn.emulated("sm_80"):
        pass
    assert settings.emulated_target() is None
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="install a C compiler, or name one in CC"):
        build.compiler()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler was not found"):
        build.compiler()


SNIPPET = """
import torch, fused_attn
q, k, v = (torch.randn(1, 2, 70, 32, requires_grad=True) for _ in range(3))
with fused_attn.emulated("sm_80") as launches:
    out = fused_attn.attention(q, k, v, causal=True, backend="triton")
    out.sum().backward()
    assert "backend: triton" in str(fused_attn.explain(q, k, v, backend="triton"))
assert torch.allclose(out, fused_attn.attention(q, k, v, causal=True, backend="reference"), atol=1e-5)
assert [name for name, _ in launches] == ["forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel"], launches
try:
    fused_attn.attention(q, k, v, backend="triton")
except ValueError as error:
    assert "TRITON_INTERPRET" in str(error)
"""


def test_a_users_first_minute():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "FUSED_ATTN_DETERMINISTIC": "1"}
    subprocess.run([sys.executable, "-c", SNIPPET], check=True, env=environment)
