"""The additive score: against the formula written out, alone and beside what attention adds to it; memory, names, errors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_attn
from fused_attn import additive_attention, attention_weights, explain

B, H, NQ, NK, D, DV = 2, 4, 37, 50, 24, 8
BACKENDS = [pytest.param("triton", marks=pytest.mark.kernels), "reference"]


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def draw(kv_heads=H, dim=D, shared=False, dtype=torch.float64):
    weight = normal(dim, dtype=dtype) if shared else normal(H, dim, dtype=dtype)
    shapes = (B, H, NQ, dim), (B, kv_heads, NK, dim), (B, kv_heads, NK, DV)
    return [*(normal(*shape, dtype=dtype) for shape in shapes), weight]


def by_hand(q, k, v, weight, keep=None, scale=1.0):
    """softmax_j(scale sum_d w_d tanh(q_id + k_jd)) v_j, head by head."""
    outs = []
    for head in range(H):
        kv = head * k.shape[1] // H
        w = weight if weight.dim() == 1 else weight[head]
        score = scale * torch.einsum("bijd,d->bij", torch.tanh(q[:, head, :, None] + k[:, kv, None]), w)
        score = score if keep is None else score.masked_fill(~keep, float("-inf"))
        outs.append(score.softmax(-1) @ v[:, kv])
    return torch.stack(outs, 1)


@pytest.mark.few(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kv_heads", "dim", "shared", "scale"), [
    (4, 24, False, None), (2, 16, True, None), (1, 1, False, 2.5), pytest.param(4, 200, True, -0.5, marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_the_formula(backend, kv_heads, dim, shared, scale):
    leaves = draw(kv_heads, dim, shared)
    more = {} if scale is None else {"scale": scale}
    out = additive_attention(*leaves, backend=backend, **more)
    expected = by_hand(*leaves, **more)
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted):
    leaves = draw(2)
    alone = [x if i == wanted else x.detach() for i, x in enumerate(leaves)]
    (grad,) = torch.autograd.grad(additive_attention(*alone, backend="triton", causal=True).sin().sum(), [leaves[wanted]])
    out = additive_attention(*leaves, backend="reference", causal=True)
    torch.testing.assert_close(grad, torch.autograd.grad(out.sin().sum(), leaves)[wanted], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alignment_weights(backend):
    """What the alignment maps are drawn from: rows that sum to 1, of which the output is the average of the values."""
    q, k, v, weight = draw()
    keep = torch.ones(NQ, NK, dtype=torch.bool).tril(NK - NQ)
    weights = attention_weights(q, k, score_weight=weight, causal=True, backend=backend)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, NQ, dtype=torch.float64))
    torch.testing.assert_close(weights @ v, by_hand(q, k, v, weight, keep))
    assert not weights[..., ~keep].any()


@pytest.mark.kernels
def test_saturated_scores_stay_finite():
    leaves = draw()
    with torch.no_grad():
        leaves[0] *= 1e4
        leaves[3] *= 300
    out = additive_attention(*leaves, backend="triton")
    grads = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(out, by_hand(*leaves))
    assert all(grad.isfinite().all() for grad in grads)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.kernels
def test_no_tensor_of_queries_by_keys_exists():
    leaves = [normal(1, 1, 256, 16), normal(1, 1, 256, 16), normal(1, 1, 256, 16), normal(16)]
    with Largest() as largest:
        torch.autograd.grad(additive_attention(*leaves, backend="triton").sum(), leaves)
    assert largest.elements <= 256 * 16


@pytest.mark.kernels
def test_packed_sequences_are_those_alone():
    q, k, v = normal(9, H, D), normal(11, H, D), normal(11, H, DV)
    weight = normal(D)
    out = fused_attn.attention_varlen(q, k, v, torch.tensor([0, 4, 9]), torch.tensor([0, 8, 11]), 5, 8, score_weight=weight,
                                      backend="triton")
    for (q0, q1), (k0, k1) in (((0, 4), (0, 8)), ((4, 9), (8, 11))):
        one = [x[a:b].transpose(0, 1)[None] for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1))]
        torch.testing.assert_close(out[q0:q1].transpose(0, 1)[None], by_hand(*one, weight))


@pytest.mark.slow
@pytest.mark.kernels
def test_compiles_whole_and_is_checkpointed():
    leaves = draw(2)

    def function(*tensors):
        return additive_attention(*tensors, backend="triton", dropout_p=0.25)

    def run(function):
        torch.manual_seed(3)
        out = function(*leaves)
        return out, *torch.autograd.grad(out.sin().sum(), leaves)

    eager = run(function)
    torch._dynamo.reset()
    for other in (torch.compile(function, fullgraph=True, backend="aot_eager"),
                  lambda *xs: checkpoint(function, *xs, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(run(other), eager, strict=True))


def test_who_answers():
    q, k, v, weight = draw()
    found = explain(q, k, v, score_weight=weight)
    assert found.backend == "blocked"
    assert "additive" in found.reasons["torch"][0]
    wide = draw(dim=257)
    assert "additive scores up to 256" in explain(*wide[:3], score_weight=wide[3]).reasons["triton"][0]
    with pytest.raises(ValueError, match="additive scores up to 256"):
        additive_attention(*wide, backend="triton")


@pytest.mark.parametrize(("weight", "error", "message"), [
    (None, TypeError, "score_weight: expected a float tensor"), (torch.ones(D, dtype=torch.int64), TypeError, r"\[24\].*int64"),
    (torch.ones(D + 1), ValueError, r"expected shape \(24,\) or \(4, 24\)"), (torch.ones(2, D), ValueError, r"got \(2, 24\)"),
    (3.0, TypeError, "got 3.0")])
def test_bad_weights_are_told(weight, error, message):
    q, k, v, _ = draw()
    with pytest.raises(error, match=message):
        additive_attention(q, k, v, weight)
