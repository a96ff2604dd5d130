"""Weights on request and statistics of them: against arithmetic by hand, the reference, and a budget of memory."""

import math

import pytest
import torch
from support.guard import memory_guard
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import attention, attention_stats, attention_weights, document_mask
from fused_attn.run import ops  # noqa: F401  # repairs first

NQ, NK = 70, 90


def normal(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def tensors(dtype=torch.float64, grad=False):
    return normal(2, 4, NQ, 24, dtype=dtype, grad=grad), normal(2, 2, NK, 24, dtype=dtype, grad=grad)


def masked():
    mask = torch.rand(2, 1, NQ, NK) > 0.6
    mask[0, 0, 4] = False
    return {"mask": mask}


CALLS = {
    "full": lambda: {}, "causal": lambda: {"causal": True}, "window": lambda: {"causal": True, "window": (10, 0)},
    "a row without keys": masked, "softcap, sinks": lambda: {"sinks": normal(4), "softcap": 3.0},
    "lengths": lambda: {"key_lengths": torch.tensor([0, 30])},
    "lengths, sinks": lambda: {"key_lengths": torch.tensor([0, 30]), "sinks": normal(4)},
    "scores of hundreds": lambda: {"bias": 40 * normal(1, 4, NQ, NK)}, "alibi, negative scale": lambda: {
        "alibi_slopes": torch.rand(4), "scale": -1.0},
}


@pytest.mark.few(2)
@pytest.mark.kernels
@pytest.mark.parametrize("call", CALLS)
def test_kernels_equal_the_reference(call):
    q, k = tensors()
    arguments = CALLS[call]()
    with memory_guard() as guard:
        ours = attention_stats(q, k, backend="triton", **arguments)
        weights = attention_weights(q, k, backend="triton", **arguments)
    assert {"row_stats_kernel", "column_sums_kernel", "weights_kernel"} <= set(guard.kernels)
    theirs = attention_stats(q, k, backend="reference", **arguments)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, attention_weights(q, k, backend="reference", **arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.kernels), "reference"])
def test_uniform_weights_by_hand(backend):
    """Queries of zeros see their keys alike: query i of 4, causal, has i + 1 keys, entropy ln(i + 1), maximum 1 / (i + 1), and
    keys from 0 to i away."""
    q, k = torch.zeros(1, 1, 4, 16), torch.randn(1, 1, 4, 16)
    stats = attention_stats(q, k, causal=True, backend=backend)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(stats.entropy[0, 0], torch.tensor([0.0, math.log(2), math.log(3), math.log(4)]), **close)
    torch.testing.assert_close(stats.maximum[0, 0], torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]), **close)
    torch.testing.assert_close(stats.distance[0, 0], torch.tensor([0, 1 / 2, 1, 3 / 2]), **close)
    received = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    torch.testing.assert_close(stats.received[0, 0], torch.tensor(received), **close)
    weights = attention_weights(q, k, causal=True, backend=backend)
    torch.testing.assert_close(weights[0, 0], torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None], **close)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.kernels), "reference"])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(NQ, NK), (NK, NQ)])
def test_the_distance_is_of_weights_and_positions(n_queries, n_keys, backend):
    """The last query stands at the last key, and of more queries than keys the first ones before all of them."""
    q, k, sinks = normal(2, 4, n_queries, 24), normal(2, 2, n_keys, 24), normal(4)
    scores = q @ k.repeat_interleave(2, 1).mT / 24**0.5
    weights = torch.softmax(torch.cat((scores, sinks[:, None, None].expand(2, 4, n_queries, 1)), -1), -1)[..., :-1]
    apart = torch.tensor([[abs(i + n_keys - n_queries - j) for j in range(n_keys)] for i in range(n_queries)])
    stats = attention_stats(q, k, sinks=sinks, backend=backend)
    torch.testing.assert_close(stats.distance, (weights * apart).sum(-1), rtol=1e-12, atol=1e-12)


def test_the_distance_of_the_reference_is_differentiable():
    q, k = tensors(grad=True)
    gradients = torch.autograd.grad(attention_stats(q, k, backend="reference").distance.sin().sum(), (q, k))
    apart = (torch.arange(NQ)[:, None] + NK - NQ - torch.arange(NK)).abs()
    exact = (torch.softmax(q @ k.repeat_interleave(2, 1).mT / 24**0.5, -1) * apart).sum(-1)
    for mine, theirs in zip(gradients, torch.autograd.grad(exact.sin().sum(), (q, k)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.kernels), "reference"])
def test_a_sink_takes_weight_that_no_key_receives(backend):
    """Scores of zero and a sink of ln 3: one key keeps a quarter."""
    q = k = torch.zeros(1, 1, 1, 16)
    stats = attention_stats(q, k, sinks=torch.tensor([math.log(3.0)]), backend=backend)
    torch.testing.assert_close(stats.received.flatten(), torch.tensor([0.25]))
    torch.testing.assert_close(stats.maximum.flatten(), torch.tensor([0.25]))
    torch.testing.assert_close(stats.entropy.flatten(), torch.tensor([0.25 * math.log(4.0)]))


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.kernels), "reference"])
def test_weights_times_values_are_the_output(backend):
    q, k = tensors()
    v = normal(2, 2, NK, 8)
    arguments = {"causal": True, "dropout_p": 0.3, "sinks": normal(4), "mask_mod": document_mask(torch.arange(NK) // 40,
                                                                                                torch.arange(NQ) // 40)}
    torch.manual_seed(3)
    out = attention(q, k, v, backend=backend, **arguments)
    torch.manual_seed(3)
    weights = attention_weights(q, k, v, backend=backend, **arguments)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out, rtol=1e-12, atol=1e-12)


@pytest.mark.kernels
def test_weights_are_differentiable_and_kept_by_nobody():
    q, k = tensors(grad=True)
    bias = normal(1, 4, NQ, NK, grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        weights = attention_weights(q, k, bias=bias, backend="triton")
    assert sum(n >= weights.numel() for n in kept) == 0
    grads = torch.autograd.grad(weights.sin().sum(), (q, k, bias))
    scores = q @ k.repeat_interleave(2, 1).mT / 24**0.5 + bias
    exact = torch.autograd.grad(torch.softmax(scores, -1).sin().sum(), (q, k, bias))
    for mine, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.kernels
def test_statistics_hold_nothing_of_the_size_of_the_scores():
    q, k = normal(1, 1, 300, 16, dtype=torch.float32), normal(1, 1, 300, 16, dtype=torch.float32)
    with Largest() as largest:
        attention_stats(q, k, causal=True, backend="triton")
    assert largest.elements <= 300 * 16


def test_bad_arguments_are_told():
    q, k = tensors()
    with pytest.raises(ValueError, match=r"dropout_p: expected 0.*got 0.5"):
        attention_stats(q, k, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"backend: expected 'triton', 'reference' or None; got 'torch'"):
        attention_weights(q, k, backend="torch")
    with pytest.raises(TypeError, match="casual"):
        attention_weights(q, k, casual=True)
