"""Padding that a sum meets: keys and queries past an end weigh nothing, however far below 0 the LSE of a row lies.

exp(0 - LSE) of a padded score overflows from an LSE of -88 on, in fp16 from -11; infinity times the zeros of padding is NaN.
"""

import pytest
import torch
from support import oracle
from support.guard import memory_guard

import fused_attn
from fused_attn import settings
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import counted
from fused_attn.plan import problem

pytestmark = pytest.mark.kernels

# Scores about this far below 0, and how near the gradients come: a score that large has lost digits of a weight.
DEPTHS = {torch.float16: (16.0, 3e-2), torch.bfloat16: (700.0, 0.2), torch.float32: (100.0, 1e-3)}
CASES = {
    "one tile of keys": ((1, 2, 2, 96, 17), {}),
    "keys past a tile": ((1, 2, 2, 130, 77), {}),
    "grouped": ((1, 4, 2, 70, 77), {}),
    "multi-query": ((2, 3, 1, 70, 33), {}),
    "causal": ((1, 2, 2, 130, 77), {"causal": True}),
    "more keys": ((1, 2, 2, 66, 140), {"causal": True}),
    "window": ((1, 2, 2, 130, 99), {"window": (40, 0)}),
    "window on both sides": ((1, 2, 2, 99, 130), {"window": (50, 30)}),
    "key lengths": ((3, 2, 2, 70, 77), {"key_lengths": torch.tensor([77, 0, 20])}),
    "sinks": ((1, 2, 2, 70, 77), {"sinks": True}),
    "packed": ((1, 2, 2, 150, 120), {"packed": ([0, 70, 70, 140], [0, 33, 50, 115])}),
}


def deep(dtype, shape, depth):
    """q, k, v whose scores are all about -depth, and dO."""
    batch, heads, kv_heads, n_queries, n_keys = shape
    q, k, v = (torch.randn(batch, h, n, 64) for h, n in ((heads, n_queries), (kv_heads, n_keys), (kv_heads, n_keys)))
    q[..., 0], k[..., 0] = (depth * 8) ** 0.5, -((depth * 8) ** 0.5)
    return [x.to(dtype) for x in (q, k, v)], torch.randn(batch, heads, n_queries, 64).to(dtype)


def gradients(inputs, dout, backend, deterministic, arguments):
    leaves = [x.detach().requires_grad_() for x in inputs]
    arguments = dict(arguments)
    if "packed" in arguments:
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in arguments.pop("packed"))
        out = fused_attn.attention_varlen(*(x[0].transpose(0, 1) for x in leaves), cu_q, cu_k, int(cu_q.diff().max()),
                                          int(cu_k.diff().max()), backend=backend, deterministic=deterministic, **arguments)
        out = out.transpose(0, 1)[None]
    else:
        out = fused_attn.attention(*leaves, backend=backend, deterministic=deterministic, **arguments)
    return torch.autograd.grad(out, leaves, dout)


@pytest.mark.few(10)
@pytest.mark.few(11)
@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fused", "separate"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)],
                         ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_rows_far_below_0(name, dtype, deterministic):
    shape, arguments = CASES[name]
    depth, limit = DEPTHS[dtype]
    inputs, dout = deep(dtype, shape, depth)
    if "sinks" in arguments:
        arguments = {"sinks": torch.full((shape[1],), -depth)}
    got = gradients(inputs, dout, "triton", deterministic, arguments)
    want = gradients([x.double() for x in inputs], dout.double(), "reference", None, arguments)
    for which, x, expected in zip("qkv", got, want, strict=True):
        assert x.isfinite().all(), f"d{which}"
        assert (x.double() - expected).norm() <= limit * expected.norm(), f"d{which}"


@pytest.mark.parametrize("n_keys", [1, 31, 33, 63, 65, 77])
def test_every_remainder_of_keys_in_the_fused_backward(n_keys):
    inputs, dout = deep(torch.bfloat16, (1, 2, 1, 70, n_keys), 200.0)
    with counted() as launches, memory_guard():
        got = gradients(inputs, dout, "triton", False, {})
    assert not launches["dq_kernel"]
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("tile", [TileConfig(16, 64, 1, 1), TileConfig(64, 16, 1, 1), TileConfig(32, 128, 1, 1)], ids=str)
def test_every_shape_of_tile(monkeypatch, tile):
    monkeypatch.setattr(problem, "choose_fused", lambda *_: tile)
    inputs, dout = deep(torch.float16, (1, 2, 2, 256, 77), 16.0)
    got = gradients(inputs, dout, "triton", False, {})
    want = gradients([x.double() for x in inputs], dout.double(), "reference", None, {})
    for x, expected in zip(got, want, strict=True):
        assert (x.double() - expected).norm() <= 3e-2 * expected.norm()


def test_torchs_causality_with_more_queries_than_keys(monkeypatch):
    """Upper-left alignment: the last queries see every key, and no mask, of a tile that is not full."""
    monkeypatch.setattr(settings, "BACKEND", "triton")
    monkeypatch.setattr(settings, "DETERMINISTIC", False)
    inputs, dout = deep(torch.float16, (1, 1, 1, 256, 77), 16.0)
    leaves = [x.requires_grad_() for x in inputs]
    got = torch.autograd.grad(fused_attn.scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True), exact, dout.double())
    for x, expected in zip(got, want, strict=True):
        assert (x.double() - expected).norm() <= 3e-2 * expected.norm()


def test_such_rows_are_as_accurate_as_others():
    """By the bounded error E, which knows what the size of a score costs."""
    inputs, dout = deep(torch.bfloat16, (1, 2, 2, 130, 77), 100.0)
    arguments = {"deterministic": False, "backend": "triton"}
    got = oracle.run(inputs, dout, None, arguments)
    want = oracle.exact(inputs, dout, None, {})
    amplitude, largest = oracle.amplitudes(inputs, dout, None, {})
    for name in ("out", "dq", "dk", "dv"):
        whole, _ = oracle.bounded_error(got[name], want[name], amplitude[name], largest)
        assert whole <= oracle.E_LIMIT[torch.bfloat16], name


def test_keys_past_the_length_cost_no_program():
    """A program whose keys all lie past the length leaves at once: what it would read is never touched."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (40, 200, 200))
    k[1, :, 10:], v[1, :, 10:] = float("nan"), float("nan")
    lengths = torch.tensor([200, 10])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with memory_guard():
        out = fused_attn.attention(*leaves, key_lengths=lengths, backend="triton", deterministic=False)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert (grads[1][1, :, 10:] == 0).all()
    assert (grads[2][1, :, 10:] == 0).all()
