"""The Gluon backward for Hopper on the CPU: fp64's gradients under adversarial schedules, and planted bugs that are caught."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import oracle
from support.gluon import mutated
from support.hopper import framed, gluon

import fused_attn
from fused_attn import settings
from fused_attn.call.spec import TileConfig

SCHEDULES = 200
TILE = {64: TileConfig(128, 128, 4, 2), 128: TileConfig(64, 128, 4, 2)}


@dataclass(frozen=True)
class Case:
    """One call and its gradients."""

    n_queries: int
    n_keys: int
    arguments: dict[str, Any] = field(default_factory=dict)
    dim: int = 64
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    tile: TileConfig | None = None
    mean: float = 0.0  # of q, and the opposite of that of k: scores far below 0
    sinks: bool = False

    def draw(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """The leaves, framed by NaN, and the gradients of out and LSE."""
        generator = torch.Generator().manual_seed(7)

        def normal(heads: int, length: int, mean: float = 0.0) -> torch.Tensor:
            x = torch.randn(self.batch, heads, length, self.dim, generator=generator) * (0.25 if mean else 1.0) + mean
            return framed(x.to(self.dtype))

        leaves = {"q": normal(self.heads, self.n_queries, self.mean), "k": normal(self.kv_heads, self.n_keys, -self.mean),
                  "v": normal(self.kv_heads, self.n_keys)}
        if self.sinks:
            leaves["sinks"] = torch.linspace(-1, 2, self.heads)
        dlse = torch.randn(self.batch, self.heads, self.n_queries, generator=generator)
        return leaves, normal(self.heads, self.n_queries), dlse

    def gradients(self, leaves: dict[str, torch.Tensor], dout: torch.Tensor, dlse: torch.Tensor,
                  backend: str) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        out, lse = fused_attn.attention(*(leaves[name] for name in "qkv"), sinks=leaves.get("sinks"), return_lse=True,
                                        backend=backend, deterministic=False, **self.arguments)
        found = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
        return dict(zip(leaves, found, strict=True))

    def sink_terms(self, leaves: dict[str, torch.Tensor], dout: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
        """[H]: the sum over queries of what a sink's gradient adds up, without signs."""
        q, k, v, sinks = (x.double() for x in leaves.values())
        out, lse = fused_attn.reference_attention(q, k, v, sinks=sinks, return_lse=True, **self.arguments)
        terms = (dout.double() * out).abs().sum(-1) + dlse.abs()
        return (torch.exp(sinks[None, :, None] - lse) * terms).sum((0, 2))


CASES = {
    "head dim 64": Case(200, 160),
    "head dim 64, causal": Case(256, 256, {"causal": True}),
    "head dim 64, causal, grouped heads, tails": Case(150, 200, {"causal": True}, heads=4, kv_heads=2),
    "head dim 64, queries without a key": Case(300, 150, {"causal": True}),
    "head dim 64, window": Case(400, 400, {"window": (140, 0)}),
    "head dim 64, window on both sides, fp16": Case(300, 410, {"window": (90, 70)}, dtype=torch.float16),
    "head dim 64, window past the keys": Case(400, 140, {"window": (5, 0)}),
    "head dim 64, scores far below 0": Case(130, 129, mean=8.0),
    "head dim 64, three stages": Case(384, 256, {"causal": True}, tile=TileConfig(128, 128, 4, 3)),
    "one query, one key": Case(1, 1, {"causal": True}),
    "head dim 40 in tiles of 64": Case(70, 90, {"causal": True}, dim=40),
    "head dim 128": Case(130, 140, dim=128),
    "head dim 128, causal, groups of three, tails": Case(100, 201, {"causal": True}, dim=128, heads=3),
    "head dim 128, queries without a key, batch 2": Case(190, 100, {"causal": True}, dim=128, batch=2),
    "head dim 128, window, fp16": Case(257, 257, {"window": (100, 0)}, dim=128, dtype=torch.float16),
    "head dim 128, scores far below 0": Case(65, 200, dim=128, mean=8.0),
    "head dim 80 in tiles of 128": Case(70, 90, dim=80),
    "sinks": Case(130, 130, {"causal": True}, heads=2, kv_heads=2, sinks=True),
    "scale": Case(100, 100, {"scale": 0.5}),
}
FAST = ("head dim 64, causal",)


def check(case: Case, schedules: range, modules: dict[str, Any] | None = None) -> None:
    """Every schedule: dK and dV have the same bits, dQ the same values but for the order of its sums, all of them fp64's."""
    inputs = case.draw()
    want = case.gradients(*({name: x.double() for name, x in inputs[0].items()} if i == 0 else x.double()
                            for i, x in enumerate(inputs)), "reference")
    first = None
    tile = case.tile or TILE[64 if case.dim <= 64 else 128]
    for seed in schedules:
        with gluon(seed=seed, modules=modules, backward_config=tile) as launches:
            got = case.gradients(*inputs, "triton")
        assert launches == ["forward_kernel", "backward_kernel"]
        for name, x in got.items():
            assert not x.isnan().any(), f"{name}, seed {seed}"
            if first is not None and name in ("k", "v"):
                assert torch.equal(x, first[name]), f"{name}, seed {seed} differs"
                continue
            error = (x.double() - want[name]).abs()
            if name == "sinks":  # a sum over queries in which much cancels: every term has the rounding of out
                assert (error < oracle.EPS[case.dtype] * case.sink_terms(*inputs)).all(), f"sinks: {error}"
                continue
            off = error.norm() / want[name].norm().clamp(min=1e-30)
            # means of 8 multiply what rounding dS takes
            limit = 0.2 if case.mean else 1.5 * oracle.EPS[case.dtype]
            assert off < limit or error.max() < 1e-6, f"{name}: {off:.1e}, seed {seed}"
        first = first or got


@pytest.mark.parametrize("name", FAST)
def test_gradients_under_adversarial_schedules(name):
    check(CASES[name], range(SCHEDULES))


@pytest.mark.kernels
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_gradients(name):
    check(CASES[name], range(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_gradients_under_all_schedules(name):
    check(CASES[name], range(SCHEDULES))


BACKWARD, RING, WORKSPACE = (f"fused_attn.kernels.hopper.{name}" for name in ("backward", "ring", "workspace"))
FULL, CAUSAL, WIDE = CASES["head dim 64"], CASES["head dim 64, causal"], CASES["head dim 128"]
GROUPS, WINDOW = CASES["head dim 64, causal, grouped heads, tails"], CASES["head dim 64, window"]
BUGS: dict[str, tuple[str, str, str, Case]] = {  # a module, what stands there, what is put in its place, and a call
    "slot freed before dK has read it": (
        BACKWARD,
        "        dk = warpgroup_mma_wait(0, deps=(dk,))\n        mbarrier.arrive(barrier_at(shared.free, step), count=1)\n",
        "        mbarrier.arrive(barrier_at(shared.free, step), count=1)\n        dk = warpgroup_mma_wait(0, deps=(dk,))\n",
        Case(512, 128)),
    "dS read before the other consumer has stored it": (
        BACKWARD, "        await_step(shared.stored, step)\n", "", FULL),
    "no fence after dS is stored": (
        BACKWARD, "        fence_async_shared()\n        mbarrier.arrive(", "        mbarrier.arrive(", FULL),
    "one dS for all slots": (BACKWARD, "ds = shared.ds.index(slot)", "ds = shared.ds.index(0)", Case(512, 128)),
    "dQ added before its product is done": (
        BACKWARD, "dv, dq = warpgroup_mma_wait(2 if TWO else 1", "dv, dq = warpgroup_mma_wait(3 if TWO else 2", WIDE),
    "dP used too early": (
        BACKWARD, "dp0 = warpgroup_mma_wait(2 if TWO else 1", "dp0 = warpgroup_mma_wait(3 if TWO else 2", FULL),
    "the second dP used too early": (BACKWARD, "dp1 = warpgroup_mma_wait(1,", "dp1 = warpgroup_mma_wait(2,", FULL),
    "the second scores used too early": (BACKWARD, "s1 = warpgroup_mma_wait(2,", "s1 = warpgroup_mma_wait(3,", FULL),
    "the producer waits with the wrong parity": (RING, "shape[0] + 1) & 1)", "shape[0]) & 1)", FULL),
    "the producer does not wait": (
        BACKWARD, "            await_step_before(shared.free, step)\n", "", Case(512, 128)),
    "free counts one consumer": (
        BACKWARD, "allocate_barriers(STAGES, CONSUMERS),\n    )", "allocate_barriers(STAGES, 1),\n    )", CAUSAL),
    "stored counts one consumer": (
        BACKWARD, "allocate_barriers(STAGES, CONSUMERS)", "allocate_barriers(STAGES, 1)", FULL),
    "a statistic's bytes not expected": (BACKWARD, "2 * stats_desc.block_type", "stats_desc.block_type", FULL),
    "the values' bytes not expected": (
        BACKWARD, "k_desc.block_type.nbytes + v_desc.block_type.nbytes", "k_desc.block_type.nbytes", FULL),
    "keys and values not awaited": (BACKWARD, "    mbarrier.wait(shared.kv_loaded, 0)\n", "", FULL),
    "queries not awaited": (BACKWARD, "        await_step(shared.loaded, step)\n", "", FULL),
    "dK stored over keys still in use": (
        BACKWARD, "pred=n_steps > 0)", "pred=n_steps < 0)", CAUSAL),
    "no fence before the last stores": (BACKWARD, "    fence_async_shared()\n    tma_store", "    tma_store", FULL),
    "the last stores not awaited": (BACKWARD, "    tma.store_wait(0)\n", "", FULL),
    "parity never turns": (RING, "(step // barriers.shape[0]) & 1, pred", "step * 0, pred", Case(600, 128)),
    "diagonal off by one": (BACKWARD, "distance <= work.right[0]", "distance < work.right[0]", CAUSAL),
    "window off by one": (BACKWARD, "distance >= -work.left[0]", "distance > -work.left[0]", WINDOW),
    "one tile too few masked on the diagonal": (
        BACKWARD, "inner_first = gl.cdiv(gl.maximum(start + BLOCK_N - 1, 0), BLOCK_M)",
        "inner_first = gl.maximum(start + BLOCK_N - 1, 0) // BLOCK_M", GROUPS),
    "one tile too few masked at the window's end": (
        BACKWARD, "gl.minimum(gl.maximum(reach + 1, 0) // BLOCK_M, stop)",
        "gl.minimum(gl.cdiv(gl.maximum(reach + 1, 0), BLOCK_M), stop)", WINDOW),
    "the first tile one too late": (
        BACKWARD, "gl.minimum(gl.maximum(start, 0) // BLOCK_M, stop)",
        "gl.minimum(gl.cdiv(gl.maximum(start, 0), BLOCK_M), stop)", GROUPS),
    "the last tile one too early": (
        BACKWARD, "gl.minimum(gl.cdiv(gl.maximum(reach + BLOCK_N, 0), BLOCK_M), stop)",
        "gl.minimum(gl.maximum(reach + BLOCK_N, 0) // BLOCK_M, stop)", WINDOW),
    "keys past the end not masked": (
        BACKWARD, "    if first_key + BLOCK_N > work.n_keys:", "    if first_key > work.n_keys:",
        CASES["head dim 64, scores far below 0"]),
    "the second half masked as the first": (BACKWARD, "keys, i * BLOCK_M + ROWS, masked", "keys, i * BLOCK_M, masked", CAUSAL),
    "the group's next head adds to the same dQ": (BACKWARD, "            tile += tiles - stop + first\n", "            pass\n",
                                                  Case(200, 200, {"causal": True}, dim=128, heads=2)),
    "dK not scaled": (BACKWARD, "(dk * work.scale)", "dk", FULL),
    "fragments out of order": (BACKWARD, "[3, 0, 2, 4, 1, 5]), [ROWS * COLS]", "[0, 3, 2, 4, 1, 5]), [ROWS * COLS]", FULL),
    "the consumers' columns of dQ swapped": (
        BACKWARD, "shared.k.slice(which * COLS, COLS, dim=1)", "shared.k.slice((1 - which) * COLS, COLS, dim=1)", WIDE),
    "LSE of queries without a key kept": (
        WORKSPACE, "lse_to_log2(lse))", "lse * 1.4426950408889634)", CASES["head dim 64, queries without a key"]),
    "delta in the place of LSE": (BACKWARD, "[0, row_of_tiles + i, 0]", "[1, row_of_tiles + i, 0]", WIDE),
    "the wrong query head": (BACKWARD, "head = kv_head * work.group + g", "head = kv_head + g * work.kv_heads", GROUPS),
}


@pytest.mark.few(21)
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name):
    """Each within 60 schedules, by a wrong value, a fault or a deadlock."""
    module, old, new, case = BUGS[name]
    with mutated({module: [(old, new)]}) as modules, pytest.raises((AssertionError, RuntimeError, OverflowError)):
        check(case, range(60), modules)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(150, 70), (70, 150), (129, 129)])
def test_torchs_causality_aligns_the_first_ones(monkeypatch, n_queries, n_keys):
    """Forward and backward of scaled_dot_product_attention(is_causal=True): query 0 stands at key 0."""
    monkeypatch.setattr(settings, "BACKEND", "triton")
    monkeypatch.setattr(settings, "DETERMINISTIC", False)
    inputs = [torch.randn(1, 2, n, 64).bfloat16().requires_grad_() for n in (n_queries, n_keys, n_keys)]
    dout = torch.randn(1, 2, n_queries, 64)
    with gluon() as launches:
        out = fused_attn.scaled_dot_product_attention(*inputs, is_causal=True)
        got = torch.autograd.grad(out, inputs, dout.bfloat16())
    assert launches == ["forward_kernel", "backward_kernel"]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    for x, y in zip((out, *got), (exact, *torch.autograd.grad(exact, wide, dout.bfloat16().double())), strict=True):
        assert (x.double() - y).norm() < 8e-3 * y.norm()


def test_a_sums_gradient_is_one_number_and_rows_may_lie_far_apart(address_space):
    """dO of strides 0, and dO whose rows lie 2**25 elements apart: what its boxes or 32-bit offsets cannot hold."""
    inputs = [torch.randn(1, 1, 128, 64).bfloat16().requires_grad_() for _ in range(3)]
    far = address_space(torch.randn(1, 1, 128, 64).bfloat16(), (2**32, 2**32, 2**25, 1))
    for dout in (torch.ones(()).bfloat16().expand(1, 1, 128, 64), far):
        with gluon() as launches:
            out = fused_attn.attention(*inputs, backend="triton", deterministic=False)
            got = torch.autograd.grad(out, inputs, dout)
        assert launches == ["forward_kernel", "backward_kernel"]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        want = torch.autograd.grad(fused_attn.attention(*wide, backend="reference"), wide, dout.double())
        for x, y in zip(got, want, strict=True):
            assert (x.double() - y).norm() < 8e-3 * y.norm() + 1e-2


@pytest.mark.parametrize("arguments", [{"deterministic": True}, {"softcap": 3.0}, {"key_lengths": torch.tensor([40])}])
def test_what_it_does_not_take_runs_elsewhere(arguments):
    """The same values as without Hopper's kernels."""
    inputs = [torch.randn(1, 2, 90, 64).bfloat16().requires_grad_() for _ in range(3)]

    def run():
        out = fused_attn.attention(*inputs, backend="triton", **{"deterministic": False, **arguments})
        return torch.autograd.grad(out.sum(), inputs)

    want = run()
    with gluon() as launches:
        got = run()
    assert "backward_kernel" not in launches
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
