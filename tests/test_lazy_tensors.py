"""Tensors whose values are not those that they store: negated in name alone, zeros that have no memory, other layouts."""

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

import fused_attn
from fused_attn import attention
from fused_attn.call.schema import FORWARD, INSPECTION, Inputs, Pair
from fused_attn.call.spec import AttentionSpec, OtherTensors

pytestmark = pytest.mark.kernels

N, D, H = 16, 8, 2
SPEC = AttentionSpec(0.3)
STARTS = torch.tensor([0, N], dtype=torch.int32)


def negative(*shape):
    """What it stores has the other sign."""
    x = torch.randn(*shape, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    return x


def zero(*shape):
    x = torch._efficientzerotensor(shape, dtype=torch.float64)
    assert x._is_zerotensor()
    return x


SHAPES = {
    "q": (1, H, N, D), "k": (1, H, N, D), "v": (1, H, N, D), "bias": (H, N, N), "sinks": (H,), "alibi_slopes": (H,),
    "score_weight": (H, D), "relative": (H, 2 * N - 1),
}
CALLS = {
    "attention": lambda backend, q, k, v, **named: attention(q, k, v, backend=backend, **named),
    "weights": lambda backend, q, k, v, **named: fused_attn.attention_weights(q, k, backend=backend, **named),
    "statistics": lambda backend, q, k, v, **named: torch.cat([x.sum(-1) for x in fused_attn.attention_stats(
        q, k, backend=backend, **named)]),
    "packed": lambda backend, q, k, v, **named: fused_attn.attention_varlen(
        *(x[0].transpose(0, 1) for x in (q, k, v)), STARTS, STARTS, N, N, backend=backend, **named),
}


@pytest.mark.few(28)
@pytest.mark.parametrize("make", [negative, zero])
@pytest.mark.parametrize("which", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_they_are_what_they_stand_for(call, which, make):
    arguments = {name: torch.randn(*SHAPES[name], dtype=torch.float64) for name in "qkv"}
    arguments[which] = make(*SHAPES[which])
    plain = {name: x.clone() for name, x in arguments.items()}
    for given in (arguments, plain):
        if which == "relative":
            given["bias"] = fused_attn.RelativeBias(given.pop("relative"))
    assert not any(x.is_neg() for x in plain.values() if isinstance(x, torch.Tensor))
    want = CALLS[call]("reference", **plain)
    torch.testing.assert_close(CALLS[call]("triton", **arguments), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [negative, zero])
@pytest.mark.parametrize("dlse", [False, True])
def test_gradients_are_of_what_they_stand_for(make, dlse):
    """Complex autograd makes gradients like these."""
    tensors = [torch.randn(1, H, N, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    both = []
    dout = make(1, H, N, D), make(1, H, N)
    for backend in ("triton", "reference"):
        out, lse = attention(*tensors, backend=backend, return_lse=True)
        both.append(torch.autograd.grad([out, lse] if dlse else [out], tensors, list(dout if dlse else dout[:1])))
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [negative, zero])
@pytest.mark.parametrize("which", range(3))
def test_rotary_turns_what_they_stand_for(make, which):
    tensors = [torch.randn(1, H, N, D, dtype=torch.float64), *torch.randn(2, N, 3, dtype=torch.float64)]
    tensors[which] = make(*tensors[which].shape)
    torch.testing.assert_close(*(fused_attn.apply_rotary(*tensors, backend=backend) for backend in ("triton", "reference")))


def test_a_repeated_call_looks_again():
    q = torch.randn(1, H, N, D, dtype=torch.float16)
    for _ in range(3):
        attention(q, q, q, backend="triton")
    assert torch.equal(attention(torch._neg_view(q), q, q, backend="triton"), attention(-q, q, q, backend="triton"))


STORED = {"sparse": torch.Tensor.to_sparse, "rows": torch.Tensor.to_sparse_csr, "mkldnn": torch.Tensor.to_mkldnn}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("backend", ["triton", "torch", "reference", None])
@pytest.mark.parametrize("layout", STORED)
@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "mask", "sinks", "alibi_slopes", "score_weight"])
def test_other_layouts_are_refused_by_name(which, layout, backend):
    arguments = {name: torch.randn(SHAPES[name]) for name in "qkv"}
    x = torch.ones(SHAPES.get(which, (N, N)))
    x = x > 0 if which == "mask" else x
    if (layout == "mkldnn" and x.dtype == torch.bool) or (layout == "rows" and x.dim() < 2):
        pytest.skip("torch has no such tensor")
    arguments[which] = STORED[layout](x)
    with pytest.raises((TypeError, ValueError), match=f"^{which}: expected a dense tensor"):
        attention(**arguments, backend=backend)


def test_a_causal_bias_of_packed_sequences_is_told_what_it_means():
    q, cu = torch.randn(6, H, D), torch.tensor([0, 2, 6], dtype=torch.int32)
    bias = causal_lower_right(6, 6)
    for name in ("bias", "mask"):
        with pytest.raises(ValueError, match=f"{name}: expected none of torch's causal biases.*causal=True"):
            fused_attn.attention_varlen(q, q, q, cu, cu, 4, 4, **{name: bias})


@pytest.mark.parametrize("which", ["bias", "sinks", "alibi_slopes", "relative"])
def test_floats_that_no_kernel_reads_are_refused(which):
    x = torch.ones(SHAPES[which]).to(torch.float8_e4m3fn)
    name, x = ("bias", fused_attn.RelativeBias(x)) if which == "relative" else (which, x)
    q = torch.randn(SHAPES["q"])
    for backend in ("triton", "reference", None):
        with pytest.raises(TypeError, match=f"^{name}: expected .*float"):
            attention(q, q, q, backend=backend, **{name: x})


STRIDED = {
    "sinks": ((H,), {}), "score_weight": ((H, D), {}), "used_k": ((2,), {"dtype": torch.int32}),
}


@pytest.mark.parametrize("which", STRIDED)
def test_ops_read_other_tensors_of_any_stride(which):
    """Called by themselves, past the checks of ``attention``, or in a program whose passes laid them out anew."""
    q, k = torch.randn(2, H, 5, D), torch.randn(2, H, N, D)
    shape, options = STRIDED[which]
    x = torch.randint(1, 9, shape, **options) if options else torch.rand(shape)
    spread = torch.stack((x, torch.full_like(x, 99)), -1)[..., 0]
    assert spread.stride(-1) == 2
    for of, flat in ((torch.ops.fused_attn.forward, lambda c: FORWARD.flat(Inputs(q, k, k), c, SPEC)),
                     (torch.ops.fused_attn.weights, lambda c: INSPECTION.flat(Pair(q, k), c, SPEC)),
                     (torch.ops.fused_attn.statistics, lambda c: INSPECTION.flat(Pair(q, k), c, SPEC))):
        want, found = (of(*flat(OtherTensors(**{which: y}))) for y in (x, spread))
        torch.testing.assert_close(found, want, rtol=0, atol=0)
