"""Scalars that are no Python numbers: what NumPy gives, and tensors without dimensions, wherever a number is taken."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.mods import NEAR

import fused_attn
from fused_attn import attention, attention_varlen, scaled_dot_product_attention
from fused_attn.call import describe
from fused_attn.plan import backends

Q = torch.randn(1, 2, 6, 8)
PACKED = torch.randn(6, 2, 8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)

FLOATS = (np.float16, np.float32, np.float64, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64))
INTS = (np.int8, np.int32, np.int64, np.uint8, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32))
BOOLS = (np.bool_, np.array, torch.tensor)


def packed(*longest):
    return attention_varlen(PACKED, PACKED, PACKED, CU, CU, *longest)


CALLS = {  # a call with one scalar, a value that every type holds, and the types
    "scale": (lambda x: attention(Q, Q, Q, scale=x), 0.5, (*FLOATS, lambda _: 0.5)),
    "whole scale": (lambda x: attention(Q, Q, Q, scale=x), 2, INTS),
    "softcap": (lambda x: attention(Q, Q, Q, softcap=x), 2.0, FLOATS),
    "whole softcap": (lambda x: attention(Q, Q, Q, softcap=x), 2, INTS),
    "dropout_p": (lambda x: attention(Q, Q, Q, dropout_p=x), 1.0, FLOATS),
    "no dropout": (lambda x: attention(Q, Q, Q, dropout_p=x), 0, (*FLOATS, *INTS)),
    "window": (lambda x: attention(Q, Q, Q, window=(x, None)), 2, INTS),
    "right": (lambda x: attention(Q, Q, Q, window=[None, x]), 2, INTS),
    "causal": (lambda x: attention(Q, Q, Q, causal=x), True, BOOLS),
    "precise": (lambda x: attention(Q, Q, Q, precise=x, backend="reference"), True, BOOLS),
    "deterministic": (lambda x: attention(Q, Q, Q, deterministic=x), True, BOOLS),
    "strict": (lambda x: attention(Q, Q, Q, strict=x), True, BOOLS),
    "return_lse": (lambda x: attention(Q, Q, Q, return_lse=x)[1], True, BOOLS),
    "explain": (lambda x: torch.tensor(fused_attn.explain(Q, Q, Q, window=(x, x), strict=False).backend == "torch"), 2, INTS),
    "weights": (lambda x: fused_attn.attention_weights(Q, Q, window=(x, 0)), 2, INTS),
    "stats": (lambda x: fused_attn.attention_stats(Q, Q, window=(x, 0)).entropy, 2, INTS),
    "longest queries": (lambda x: packed(x, 4), 4, INTS),
    "longest keys": (lambda x: packed(4, x), 4, INTS),
    "a mod's number": (lambda x: attention(Q, Q, Q, score_mod=NEAR(1.0, x), backend="reference"), 0.5, FLOATS[:3]),
    "torch's scale": (lambda x: scaled_dot_product_attention(Q, Q, Q, scale=x), 0.5, (*FLOATS[:3], *FLOATS[4:])),
    "torch's dropout": (lambda x: scaled_dot_product_attention(Q, Q, Q, dropout_p=x), 1.0, (*FLOATS[:3], *FLOATS[4:])),
}
KINDS = [pytest.param(*call[:2], kind, id=f"{name}-{i}") for name, call in CALLS.items() for i, kind in enumerate(call[2])]


@pytest.mark.parametrize(("call", "value", "kind"), KINDS)
def test_a_scalar_is_the_number_it_holds(call, value, kind):
    assert torch.equal(call(kind(value)), call(value))


@pytest.mark.kernels
@pytest.mark.parametrize(("call", "value", "kind"), [case for case in KINDS if "torch's" in case.id])
def test_on_the_kernels_too(call, value, kind, monkeypatch):
    monkeypatch.setattr(backends.settings, "BACKEND", "triton")
    monkeypatch.setattr(backends, "warn_once", pytest.fail)
    assert torch.equal(call(kind(value)), call(value))


@pytest.mark.parametrize("scale", [np.float32(0.3), torch.tensor(0.3), 0.3], ids=["numpy", "tensor", "float"])
@pytest.mark.parametrize("dropout_p", [np.float64(0.0), torch.tensor(0), np.float32(0.25)], ids=["numpy", "tensor", "drops"])
def test_torchs_function_takes_what_torch_takes(scale, dropout_p):
    drawn = []
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        torch.manual_seed(0)
        drawn.append(function(Q, Q, Q, scale=scale, dropout_p=dropout_p))
    assert torch.equal(*drawn)


BAD = {
    "scale": (torch.tensor(0.5, requires_grad=True), torch.tensor([0.5]), np.array([0.5]), np.bool_(True), torch.tensor(True),
              np.float32("nan"), torch.tensor(float("inf")), np.complex64(1)),
    "softcap": (np.float32(0), torch.tensor(-1.0), np.bool_(True), np.array([2.0])),
    "dropout_p": (np.float32(1.5), torch.tensor(-0.5), np.bool_(False), np.array([0.5])),
    "window": tuple((x, None) for x in (np.float32(2), torch.tensor(2.0), np.int64(-1), np.bool_(True), np.array([2]))),
    "causal": (np.int64(1), torch.tensor(1), np.float32(1), np.array([True]), torch.tensor([True])),
    "precise": (np.int64(1), torch.tensor(0)), "deterministic": (np.int64(1), torch.tensor(1.0)), "strict": (np.int8(1),),
}
BAD_KINDS = [pytest.param(name, x, id=f"{name}-{i}") for name, values in BAD.items() for i, x in enumerate(values)]


@pytest.mark.parametrize(("name", "value"), BAD_KINDS)
def test_what_is_no_such_scalar_is_refused_by_name(name, value):
    for call in (attention, fused_attn.explain, fused_attn.reference_attention):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
            call(Q, Q, Q, **{name: value})


@pytest.mark.parametrize("value", [np.float32(4), torch.tensor(4.0), np.int64(-4), np.bool_(True), np.array([4]), CU])
def test_a_longest_length_is_whole(value):
    with pytest.raises(TypeError, match=r"^max_seqlen_k: expected a non-negative int"):
        packed(4, value)


def test_a_mods_whole_number_stays_whole():
    """A mod computes % and // with it, and its kernel is compiled for it."""
    for whole, kind in itertools.product((3, -2), (np.int64, np.int32)):
        member = describe.describe(Q, Q, Q, score_mod=NEAR(1.0, kind(whole))).spec.score_mods[0]
        assert member.args == ("1.0", str(whole))
