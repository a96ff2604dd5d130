"""Equality to the bit: a sequence gives the same whatever stands beside it, however it is packed, whatever else is asked."""

from dataclasses import replace

import pytest
import torch
from support.features import FEATURES, Call, Shape

from fused_attn import attention, attention_varlen

pytestmark = pytest.mark.kernels

NAMES = ("out", "lse", "dq", "dk", "dv")


def run(q, k, v, dout, *, function=attention, **arguments):
    """out, lse, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_lse=True, backend="triton", **arguments)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


def assert_same(got, want, names=NAMES):
    for name, x, expected in zip(names, got, want, strict=False):
        assert torch.equal(x, expected), f"{name}: {int((x != expected).sum())} elements differ"


def entry(results, i):
    return [results[name][i] for name in NAMES]


DENSE = [feature.name for feature in FEATURES if feature.shape.get("layout", "dense") == "dense" and feature.name != "dims_576"]


@pytest.mark.few(4)
@pytest.mark.parametrize("name", DENSE)
def test_a_batch_entry_does_not_depend_on_its_neighbours(name):
    inputs = Call((name,), Shape(2, 1, 1, 40, 40)).draw(torch.bfloat16)
    first = inputs.run("triton")
    changed = {key: x.clone() for key, x in inputs.leaves.items()}
    for key in "qkv":
        changed[key][0] = torch.randn(changed[key][0].shape) * 3
    assert_same(entry(replace(inputs, leaves=changed).run("triton"), 1), entry(first, 1))
    if inputs.leaves.keys() - set("qkv"):
        again = inputs.run("triton")
        assert_same(again.values(), first.values(), again.keys())


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["causal", "window", "gqa", "lengths", "relative", "score_mod", "sinks", "precise"])
def test_a_batch_entry_alone_gives_the_same(name):
    inputs = Call((name,), Shape(n_queries=40, n_keys=40)).draw(torch.bfloat16)
    together = inputs.run("triton")
    alone = {key: x[1:] if key in "qkv" else x for key, x in inputs.leaves.items()}
    assert_same(entry(replace(inputs, leaves=alone, dout=inputs.dout[1:], dlse=inputs.dlse[1:]).run("triton"), 0),
                entry(together, 1))


ALONE = [{}, {"causal": True}, {"window": (9, 3), "softcap": 2.0}, {"alibi_slopes": torch.tensor([0.3, 0.1]), "causal": True},
         {"sinks": torch.tensor([0.5, -1.0])}, {"precise": True}]


@pytest.mark.few(2)
@pytest.mark.parametrize("arguments", ALONE, ids=lambda a: "+".join(a) or "plain")
def test_packed_sequences_equal_each_alone(arguments):
    """Empty sequences stand first, last and between; a sequence neither sees nor feels the others."""
    lengths_q, lengths_k = [0, 40, 0, 33, 70, 0], [5, 37, 0, 70, 0, 3]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    q, k, v, dout = (torch.randn(int(cu[-1]), 2, 16).bfloat16() for cu in (cu_q, cu_k, cu_k, cu_q))
    out, lse, dq, dk, dv = run(q, k, v, dout, function=attention_varlen, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
                               max_seqlen_q=70, max_seqlen_k=70, **arguments)
    for s in range(len(lengths_q)):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        alone = run(*(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys], dout[rows])), **arguments)
        packed = [x.transpose(0, 1)[None] for x in (out[rows], dq[rows], dk[keys], dv[keys])]
        assert_same([packed[0], lse[None, :, rows], *packed[1:]], alone)


def test_nan_in_one_packed_sequence_stays_there():
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)
    for precise in (False, True):
        tensors = [torch.randn(50, 2, 16) for _ in range(4)]
        tensors[2][3] = torch.nan
        results = run(*tensors, function=attention_varlen, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=30, max_seqlen_k=30,
                      precise=precise)
        for name, x in zip(NAMES, results, strict=True):
            assert (x[:, 20:] if name == "lse" else x[20:]).isfinite().all(), f"{name}, precise={precise}"


@pytest.mark.parametrize("more", [{}, {"causal": True, "sinks": torch.tensor([0.1, 0.2])}], ids=["plain", "causal+sinks"])
def test_nested_tensors_equal_a_loop_over_sequences(more):
    lengths = (40, 1, 33)
    leaves = [[torch.randn(n, 2, 16, requires_grad=True) for n in lengths] for _ in range(3)]
    nested = [torch.nested.nested_tensor(x, layout=torch.jagged, requires_grad=True) for x in leaves]
    out, lse = attention(*(x.transpose(1, 2) for x in nested), return_lse=True, backend="triton", **more)
    weight = [torch.randn(n, 2, 16) for n in lengths]
    (out.transpose(1, 2).values() * torch.cat(weight)).sum().backward()
    for s, (rows, rows_lse) in enumerate(zip(out.transpose(1, 2).unbind(), lse.transpose(1, 2).unbind(), strict=True)):
        alone, alone_lse = attention(*(x[s].transpose(0, 1)[None] for x in leaves), return_lse=True, backend="triton", **more)
        assert torch.equal(rows, alone[0].transpose(0, 1))
        assert torch.equal(rows_lse, alone_lse[0].T)
        grads = torch.autograd.grad((alone[0].transpose(0, 1) * weight[s]).sum(), [x[s] for x in leaves])
        assert_same([x.grad.unbind()[s] for x in nested], grads, ("dq", "dk", "dv"))


def test_every_gradient_can_be_asked_for_alone():
    """A gradient is the same, to the bit, whichever others are wanted."""
    call = Call(("alibi", "bias_keys", "mask", "score_mod", "sinks", "softcap"), Shape(1, 2, 1, 40, 40))
    inputs = call.draw(torch.float32)
    everything = inputs.run("triton")
    for name, x in inputs.leaves.items():
        leaves = {**inputs.leaves, name: x.detach().requires_grad_()}
        out, lse = inputs.attention(leaves, "triton")
        gradient, = torch.autograd.grad((out, lse), leaves[name], (inputs.dout, inputs.dlse))
        assert torch.equal(gradient, everything[f"d{name}"]), name


@pytest.mark.few(8)
@pytest.mark.parametrize("arguments", [{}, {"precise": True}, {"causal": True, "sinks": torch.tensor([0.3, -0.2, 0.1])}],
                         ids=str)
@pytest.mark.parametrize(("cu", "longest", "used"), [([0, 21], 21, None), ([0, 11], 20, None), ([0, 21], 40, None),
                                                     ([0, 21], 21, 7)], ids=str)
def test_a_packed_batch_of_one(cu, longest, used, arguments):
    """One sequence is still packed: it ends where it says, and its LSE lies as packed ones do."""
    tensors = [torch.randn(21, 3, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bounds = torch.tensor(cu, dtype=torch.int32)
    more = {} if used is None else {"seqused_q": torch.tensor([used]), "seqused_k": torch.tensor([used + 2])}
    results = []
    for backend in ("triton", "reference"):
        out, lse = attention_varlen(*tensors, bounds, bounds, longest, longest, return_lse=True, backend=backend,
                                               **arguments, **more)
        loss = out.sin().sum() + lse[:, : used or cu[1]].cos().sum()
        results.append((out, lse, *torch.autograd.grad(loss, tensors)))
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
