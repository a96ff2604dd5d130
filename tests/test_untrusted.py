"""Indices that the device reads are not trusted: whatever they say, nothing outside the tensors is read or written."""

import itertools

import pytest
import torch
from support.guard import memory_guard
from support.launches import recorded

import fused_attn
from fused_attn import attention, attention_varlen
from fused_attn.call import describe

pytestmark = pytest.mark.kernels

TOKENS = 14
# What cu_seqlens may hold when nobody looks: behind 0, beyond the end, falling, all at once, and the ends of int32 and int64.
WILD = [[0, -3, 10], [0, 12, 18], [-7, 20, 30], [5, 2, 9], [40, 50, 60], [-9, -5, -1], [0, 2**31 - 1, 4],
        [-(2**31), 0, 2**31 - 1], [0, 14, 14], [14, 0, 14]]


@pytest.fixture(autouse=True)
def unseen(monkeypatch):
    """On a GPU nobody looks at the lengths."""
    monkeypatch.setattr(describe, "_check_packing", lambda *_: None)


def run(cu_q, cu_k, longest=18, **arguments):
    q, k, v = (torch.randn(TOKENS, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with memory_guard():
        out, lse = attention_varlen(q, k, v, cu_q, cu_k, longest, longest, return_lse=True, backend="triton", **arguments)
        gradients = torch.autograd.grad((out, lse[lse > -torch.inf]), (q, k, v), (torch.ones_like(out), lse[lse > -torch.inf]))
    assert all(x.isfinite().all() for x in (out, *gradients))
    return q, k, v, out


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("starts", WILD, ids=str)
def test_starts_anywhere(starts, dtype):
    cu = torch.tensor(starts, dtype=torch.int64).to(dtype)
    q, k, v, out = run(cu, cu)
    rising = cu.clamp(0, TOKENS).tolist()
    if rising == sorted(rising):  # then it is clear what the sequences are: the parts that exist
        for start, stop in itertools.pairwise(rising):
            one = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            torch.testing.assert_close(out[start:stop], attention(*one, backend="reference")[0].transpose(0, 1))


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("arguments", [
    {"causal": True}, {"window": (3, 2)}, {"seqused_q": torch.tensor([2**31 - 1, -4])}, {"seqused_k": torch.tensor([-1, 99])},
    {"mask": torch.ones(18, 18, dtype=torch.bool)}, {"bias": torch.zeros(2, 2, 18, 18, dtype=torch.float64)},
    {"bias": fused_attn.RelativeBias(torch.zeros(2, 35, dtype=torch.float64))}, {"alibi_slopes": torch.ones(2)},
], ids=["causal", "window", "used q", "used k", "mask", "bias", "relative", "alibi"])
def test_one_side_is_wild(which, arguments):
    wild, tame = (torch.tensor(x, dtype=torch.int32) for x in ([0, 12, 40], [0, 5, 14]))
    run(*((wild, tame) if which == "q" else (tame, wild)), **arguments)


@pytest.mark.parametrize("lengths", [[-1, 3], [2**31 - 1, 0], [-(2**31), 41]], ids=str)
def test_key_lengths_anywhere(lengths):
    q, k, v = (torch.randn(2, 2, 40, 16, requires_grad=True) for _ in range(3))
    lengths = torch.tensor(lengths, dtype=torch.int32)
    with memory_guard():
        out = attention(q, k, v, key_lengths=lengths, backend="triton")
        torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(out, attention(q, k, v, key_lengths=lengths.clamp(0, 40), backend="reference"))


@pytest.mark.parametrize("arguments", [
    {}, {"bias": torch.randn(2, 2, 500, 300)}, {"bias": torch.randn(1, 1, 1, 300)}, {"mask": torch.rand(500, 300) < 0.8},
    {"bias": fused_attn.RelativeBias(torch.randn(2, 799))}, {"bias": torch.randn(500, 1)},
], ids=["plain", "bias", "row", "mask", "relative", "column"])
def test_a_careless_longest_length_costs_nothing(arguments):
    """Neither programs nor gradients of more than the tokens that there are, and the same numbers."""
    cu = torch.tensor([0, 9, TOKENS], dtype=torch.int32)
    leaves = [torch.randn(TOKENS, 2, 16, requires_grad=True) for _ in range(3)]
    bias = arguments.get("bias")
    operand = bias.values if isinstance(bias, fused_attn.RelativeBias) else bias
    if operand is not None:
        leaves.append(operand.requires_grad_())
    found = []
    for backend in ("triton", "reference"):
        with recorded() as launches:
            out = attention_varlen(*leaves[:3], cu, cu, 500, 300, backend=backend, **arguments)
            found.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
        for launch in launches:
            assert launch.programs <= 2 * 2 * 512 // 32 or launch.name == "operand_grad_kernel", launch.name
            if launch.name == "forward_kernel":
                assert launch.programs == 4  # one tile for each head of each sequence
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want)
