"""Tensors of other classes as arguments: read where they are plain storage, taken for what they mean, or refused by name."""

import pytest
import torch
from support.mods import NEAR
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused_attn
from fused_attn import attention

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")]


class Plain(torch.Tensor):
    """A class that adds nothing."""


class Speaking(torch.Tensor):
    """A class that tells torch's functions what it means, which may not be what it stores."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


QUERIES, KEYS = 5, 9
OPERANDS = {
    "bias": lambda: torch.randn(QUERIES, KEYS), "mask": lambda: torch.rand(QUERIES, KEYS) < 0.7,
    "sinks": lambda: torch.randn(2),
    "alibi_slopes": lambda: torch.rand(2), "key_lengths": lambda: torch.tensor([4]), "score_weight": lambda: torch.randn(8),
    "mask_mod": lambda: torch.tensor([3]), "score_mod": lambda: torch.rand(2, 1, 1),
}


def given(name, x):
    made = {"mask_mod": fused_attn.prefix_lm_mask, "score_mod": lambda x: NEAR(x, 0.5)}
    return {name: made[name](x) if name in made else x}


@pytest.mark.parametrize("backend", ["triton", "reference", None])
@pytest.mark.parametrize("name", OPERANDS)
def test_what_a_class_means_is_not_read_as_what_it_stores(name, backend):
    q, k, v = (torch.randn(1, 2, n, 8) for n in (QUERIES, KEYS, KEYS))
    x = OPERANDS[name]()
    want = attention(q, k, v, backend=backend, **given(name, x))
    for kind in (Plain, torch.nn.Buffer):
        same = torch.nn.Buffer(x) if kind is torch.nn.Buffer else x.as_subclass(kind)
        assert torch.equal(attention(q, k, v, backend=backend, **given(name, same)), want)
    with pytest.raises(TypeError, match=f"{name}: expected a plain tensor; got a Speaking"):
        attention(q, k, v, backend=backend, **given(name, x.as_subclass(Speaking)))


@pytest.mark.parametrize("backend", ["triton", "reference", None])
@pytest.mark.parametrize("name", ["bias", "mask"])
@pytest.mark.parametrize("n_queries", [1, 5, 9])
def test_torchs_causal_bias_is_causality(n_queries, name, backend):
    q, k, v = (torch.randn(1, 2, n, 8) for n in (n_queries, KEYS, KEYS))
    want = attention(q, k, v, causal=True, window=(3, 1), backend=backend)
    assert torch.equal(attention(q, k, v, window=(3, 1), backend=backend, **{name: causal_lower_right(n_queries, KEYS)}), want)
    explained = fused_attn.explain(q, k, v, backend=backend, **{name: causal_lower_right(n_queries, KEYS)})
    assert explained.backend == (backend or "torch")
    for wrong in (causal_lower_right(n_queries, KEYS + 1), causal_upper_left(n_queries + 1, KEYS)):
        with pytest.raises(ValueError, match=f"{name}: expected a CausalBias of {n_queries} queries and {KEYS} keys"):
            attention(q, k, v, backend=backend, **{name: wrong})
    upper = {name: causal_upper_left(n_queries, KEYS)}
    if n_queries == KEYS:
        assert torch.equal(attention(q, k, v, window=(3, 1), backend=backend, **upper), want)
    else:
        with pytest.raises(ValueError, match=f"{name}: expected causal_lower_right"):
            attention(q, k, v, backend=backend, **upper)
