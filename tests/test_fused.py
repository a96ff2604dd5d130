"""The fused backward, asked for by ``deterministic=False``: the gradients of the other one, dQ summed by atomics."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import oracle
from support.features import FEATURES, Call, Shape
from support.guard import is_poison, memory_guard

import fused_attn
from fused_attn import attention, settings
from fused_attn.kernels.launch import counted
from fused_attn.plan.tiles import choose_fused

pytestmark = pytest.mark.kernels

FUSED = {"plain", "causal", "window", "scale", "gqa", "lengths", "dims", "dims_192", "key_lengths", "sinks",
         "precise", "packed", "seqused", "nested", "lse", "dims_576"}  # the last one in the interpreter alone


@pytest.mark.few(8)
@pytest.mark.parametrize("name", [feature.name for feature in FEATURES])
def test_every_feature_keeps_its_gradients(name):
    """Fused where nothing takes registers beside the scores, and by the two kernels elsewhere."""
    inputs = Call((name,), Shape(n_queries=70, n_keys=93 if name == "lengths" else 70)).draw(torch.float64)
    inputs = replace(inputs, extra={**dict(inputs.extra), "deterministic": False})
    with memory_guard() as guard:
        got = inputs.run("triton")
    assert ("dq_kernel" not in guard.kernels) == (name in FUSED)
    want = inputs.run("reference")
    for key, expected in want.items():
        assert not is_poison(got[key]).any(), key
        torch.testing.assert_close(got[key], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_as_accurate(dtype):
    case = oracle.Case(4, 2, 256, 300, 64, arguments={"causal": True})
    inputs, dout, dlse = case.draw(dtype)
    got = oracle.run(inputs, dout, dlse, {"causal": True, "deterministic": False, "backend": "triton"})
    want = oracle.exact(inputs, dout, dlse, {"causal": True})
    for name in ("dq", "dk", "dv"):
        assert oracle.error_ratio(got[name], want[name]) <= oracle.max_r(dtype, 64)[1], name


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, True), (False, True, True), (True, False, False)],
                         ids=str)
def test_it_runs_where_all_three_gradients_are_wanted(wanted):
    q, k, v = (torch.randn(1, 2, 40, 16).requires_grad_(need) for need in wanted)
    with counted() as launches:
        attention(q, k, v, deterministic=False, backend="triton").sum().backward()
    assert launches["dq_kernel"] == (wanted[0] and not all(wanted))
    for x, need in zip((q, k, v), wanted, strict=True):
        assert (x.grad is not None) == need


def test_determinism_keeps_two_kernels(monkeypatch):
    monkeypatch.setattr(settings, "DETERMINISTIC", False)
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    with counted() as launches:
        attention(q, q, q, deterministic=True, backend="triton").sum().backward()
    assert launches["dq_kernel"] == 1


@pytest.mark.parametrize("call", ["attention", "scaled_dot_product_attention"])
def test_calls_that_do_not_say_follow_torch_and_the_environment(monkeypatch, call):
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    monkeypatch.setattr(settings, "BACKEND", "triton")

    def split():
        with counted() as launches:
            getattr(fused_attn, call)(q, q, q).sum().backward()
        return bool(launches["dq_kernel"])

    assert split()  # the tests' own environment
    monkeypatch.setattr(settings, "DETERMINISTIC", False)
    assert not split()
    torch.use_deterministic_algorithms(True)
    try:
        assert split()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_the_environment_asks_for_determinism():
    command = [sys.executable, "-c", "import fused_attn.settings as s; print(s.DETERMINISTIC)"]
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        done = subprocess.run(command, env={**os.environ, "FUSED_ATTN_DETERMINISTIC": value}, capture_output=True, text=True,
                              cwd=Path(__file__).parents[1], check=True)
        assert done.stdout.strip() == expected


def test_targets_without_tiles_keep_to_two_kernels():
    assert choose_fused(128, 128, torch.bfloat16, "sm_80") == choose_fused(96, 80, torch.float16, "sm_80") is not None
    for others in ((160, 64, torch.bfloat16, "sm_90"), (64, 64, torch.float32, "sm_90"), (64, 64, torch.bfloat16, "gfx1100")):
        assert choose_fused(*others) is None


@pytest.mark.slow
def test_it_compiles():
    """Through torch.compile the choice is part of the op's arguments."""
    q = torch.randn(1, 2, 40, 16, requires_grad=True)

    def attend(q):
        return attention(q, q, q, deterministic=False, backend="triton")

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with counted() as launches:
        (found,) = torch.autograd.grad(compiled(q).sum(), q)
    assert not launches["dq_kernel"]
    (want,) = torch.autograd.grad(attention(q, q, q, backend="reference").sum(), q)
    torch.testing.assert_close(found, want)
