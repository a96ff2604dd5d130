"""Blocks under attack: what references capture and return, what masks hide, who else uses torch's generator and defaults."""

import threading

import pytest
import torch
import torch.nn.functional as F

import fused_attn
from fused_attn import MaskMod, ScoreMod, attention, attention_varlen, explain, scaled_dot_product_attention
from fused_attn.call import identity
from fused_attn.run import ops


def qkv(*lengths, dtype=torch.float64, grad=False):
    return tuple(torch.randn(1, 2, n, 8, dtype=dtype, requires_grad=grad) for n in (lengths or (9, 9, 9)))


# --- functions of one's own ---


def test_a_captured_tensor_keeps_its_gradient():
    """Blocks cannot give it one: the reference answers, unless blocks or strictness were asked for."""
    q, k, v = qkv()
    weight = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)
    mod = ScoreMod("captures", reference=lambda s, q, k, h, b, args: s * weight[h])
    assert explain(q, k, v, score_mod=mod).backend == "reference"
    (grad,) = torch.autograd.grad(attention(q, k, v, score_mod=mod).sin().sum(), weight)
    assert grad.count_nonzero() == 2
    with pytest.raises(ValueError, match="captures a tensor that wants derivatives"):
        attention(q, k, v, score_mod=mod, backend="blocked")
    with pytest.raises(RuntimeError, match=r"strict.*captures"):
        attention(q, k, v, score_mod=mod, strict=True)
    (asked,) = torch.autograd.grad(attention(q, k, v, score_mod=mod, backend="reference").sin().sum(), weight)
    assert torch.equal(asked, grad)
    with torch.no_grad():
        assert explain(q, k, v, score_mod=mod).backend == "blocked"


def test_a_captured_tensor_keeps_its_derivatives_under_transforms():
    q, k, v = qkv()

    def loss(weight):
        mod = ScoreMod("captures", reference=lambda s, q, k, h, b, args: s * weight[h])
        return attention(q, k, v, score_mod=mod).sin().sum()

    weight = torch.tensor([0.5, 0.7], dtype=torch.float64)
    assert torch.func.grad(loss)(weight).count_nonzero() == 2
    assert torch.func.jvp(loss, (weight,), (weight,))[1] != 0


@pytest.mark.parametrize("reference", [
    lambda s, *_: s.mul_(2), lambda s, q, k, *_: (k * 0.01).to(s.dtype)[None, None],
    lambda s, *_: torch.zeros((), dtype=s.dtype), lambda s, q, k, h, b, args: args[0].expand_as(s)],
    ids=["in place", "fewer dimensions", "a number", "an argument itself"])
def test_references_that_return_what_they_like(reference):
    q, k, v = qkv(70, 70, 70, grad=True)
    tensor = torch.randn(70, dtype=torch.float64, requires_grad=True)
    mod = ScoreMod("own", reference=reference)
    results = []
    for backend in ("blocked", "reference"):
        out = attention(q, k, v, score_mod=mod(tensor), backend=backend)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v, tensor), materialize_grads=True)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_functions_of_one_line_or_of_one_name_are_told_apart():
    two, three = (lambda s: s * 2), (lambda s: s * 3)
    assert identity.content(two, []) != identity.content(three, [])
    assert identity.content(two, []) == identity.content(two, [])

    def scaled(by):
        class Scale:
            factor = by

        return lambda s: s * Scale.factor

    assert identity.content(scaled(2), []) != identity.content(scaled(3), [])


def test_mods_of_packed_sequences_see_positions_that_exist():
    """Also where shorter sequences are filled up beside longer ones."""
    documents = torch.arange(100) % 3
    cu_q, cu_k = torch.tensor([0, 5, 11, 18]), torch.tensor([0, 100, 199, 297])
    q, k = torch.randn(18, 2, 8, dtype=torch.float64), torch.randn(297, 2, 8, dtype=torch.float64)
    mod = MaskMod("same", reference=lambda q, k, h, b, args: documents[q] == documents[k])
    got, want = (attention_varlen(q, k, k, cu_q, cu_k, 7, 100, mask_mod=mod, backend=backend)
                 for backend in ("blocked", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# --- what is hidden ---


def test_a_gradient_of_the_lse_of_an_empty_row_is_nothing():
    tensors = [x.requires_grad_() for x in qkv(6, 3, 3)]
    out, lse = attention(*tensors, causal=True, return_lse=True, backend="blocked")
    grads = torch.autograd.grad(lse.square().sum() + out.sum(), tensors)  # infinite where the LSE is
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("arguments", [{"window": (3, 0)}, {"mask": torch.ones(6, 6).tril().bool()}],
                         ids=lambda arguments: next(iter(arguments)))
def test_a_hidden_key_may_be_nan(dtype, arguments):
    q, k, v = qkv(6, 6, 6, dtype=dtype)
    k[:, :, 5] = torch.nan
    out = attention(q, k, v, causal=True, backend="blocked", **arguments)
    assert out[:, :, :5].isfinite().all()


def test_a_hidden_bias_may_be_nan():
    q, k, v = qkv(8, 8, 8, grad=True)
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[:, 2:6:2] = False
    bias = torch.randn(8, 8, dtype=torch.float64).masked_fill(~keep, torch.nan)
    out = attention(q, k, v, bias=bias, mask=keep, backend="blocked")
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


# --- what surrounds a call ---


def test_transforms_compute_in_full_under_autocast():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (torch.func.jvp(lambda q, b=b: attention(q, k, v, return_lse=True, backend=b), (q,), (v,))[0][1]
                     for b in ("blocked", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(default):
    x = torch.randn(1, 2, 300, 16)
    want = attention(x, x, x, window=(8, 0))
    torch.set_default_dtype(default)
    try:
        assert torch.equal(attention(x, x, x, window=(8, 0)), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("arguments", [{"window": (8, 0)}, {"dropout_p": 0.5}, {"softcap": 3.0}], ids=lambda a: next(iter(a)))
def test_the_default_device_does_not_matter(arguments):
    x = torch.randn(1, 2, 300, 16)
    with torch.device("meta"):
        assert attention(x, x, x, **arguments).device.type == "cpu"


def test_dropout_in_two_threads_differs():
    q, k, v = qkv(256, 256, 256)
    barrier, outs = threading.Barrier(2), []

    def run():
        barrier.wait()
        outs.append(attention(q, k, v, dropout_p=0.5))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*outs)


def test_dropout_of_values_that_share_their_weights_is_torchs():
    q, k = (torch.randn(1, 2, 6, 8) for _ in range(2))
    v = torch.randn(3, 2, 6, 8)
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        results.append((function(q, k, v, None, 0.3), torch.rand(1)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_where_torch_draws_otherwise_dropout_has_a_seed(monkeypatch):
    monkeypatch.setattr(ops, "_draws_one_by_one", lambda: False)
    q, k, v = qkv(40, 40, 40)
    torch.manual_seed(1)
    got = attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(1)
    torch.testing.assert_close(got, attention(q, k, v, dropout_p=0.3, backend="blocked"))


def test_gradients_of_narrow_operands_are_rounded_once():
    q, k, v = (x.half() for x in qkv(1024, 1024, 1024))
    bias = torch.randn(1, 2, 1, 1024).half().requires_grad_()

    def gradient(backend, *tensors):
        *tensors, bias = tensors
        return torch.autograd.grad(attention(*tensors, bias=bias, backend=backend).sum(), bias)[0]

    exact = gradient("reference", *(x.detach().double().requires_grad_(x is bias) for x in (q, k, v, bias)))
    got = gradient("blocked", q, k, v, bias)
    once = (exact.half().double() - exact).norm()
    assert (got.double() - exact).norm() < 2 * once


def test_the_package_keeps_its_names():
    assert fused_attn.scaled_dot_product_attention is scaled_dot_product_attention
