"""``F.scaled_dot_product_attention = fused_attn.scaled_dot_product_attention``: torch's own function is torch's wherever ours
needs it, and what torch tells by the function that stands in its place still works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused_attn
from fused_attn import patch_sdpa, settings
from fused_attn.run import autograd

own = F.scaled_dot_product_attention


@pytest.fixture(params=["default", pytest.param("kernels", marks=pytest.mark.kernels)])
def path(request, monkeypatch):
    """The default path of CPU tensors, or the one that GPU tensors take, with the kernels in the interpreter."""
    if request.param == "kernels":
        monkeypatch.setattr(settings, "BACKEND", "triton")
    return request.param


PLACES = {
    "ours": fused_attn.scaled_dot_product_attention,
    "around ours": lambda *args, **kwargs: fused_attn.scaled_dot_product_attention(*args, **kwargs),
    "around attention": lambda q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False:
        fused_attn.attention(q, k, v, mask=attn_mask, causal=is_causal, scale=scale, dropout_p=dropout_p),
}


@pytest.fixture(params=PLACES)
def replaced(request, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", PLACES[request.param])
    return request.param


def drawn(n_queries=5, n_keys=5):
    return [torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (n_queries, n_keys, n_keys)]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def as_before(arguments, *shape):
    """A call through torch.nn.functional gives what torch's own gives, gradients too."""
    inputs = drawn(*shape)
    out, want = F.scaled_dot_product_attention(*inputs, **arguments), own(*inputs, **arguments)
    close(out, want)
    close(torch.autograd.grad(out.sin().sum(), inputs), torch.autograd.grad(want.sin().sum(), inputs))


ARGUMENTS = {"plain": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3},
             "mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)}}


@pytest.mark.usefixtures("path", "replaced")
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_way_to_call_it(arguments):
    as_before(arguments)


@pytest.mark.usefixtures("path", "replaced")
def test_attention_and_what_it_falls_back_to():
    q, k, v = drawn()
    close(fused_attn.attention(q, k, v, backend="torch"), own(q, k, v))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    parts = [own(*(x[:, :, a:b] for x in (q, k, v))) for a, b in ((0, 2), (2, 5))]
    close(fused_attn.attention_varlen(*packed, cu, cu, 3, 3), torch.cat(parts, 2)[0].transpose(0, 1))


def test_what_the_kernels_refuse(path, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attn.scaled_dot_product_attention)
    wide = torch.randn(1, 2, 3, 577)
    close(F.scaled_dot_product_attention(wide, wide, wide), own(wide, wide, wide))
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(wide, wide[..., :3], wide)
    with pytest.raises(TypeError):
        F.scaled_dot_product_attention([1.0], wide, wide)


BIASES = {"square": (causal_lower_right, 5, 5), "more keys": (causal_lower_right, 5, 9),
          "upper left": (causal_upper_left, 5, 9), "more queries": (causal_upper_left, 9, 5)}


@pytest.mark.parametrize("bias", BIASES)
def test_a_causal_bias_means_what_it_means(bias, path, replaced, monkeypatch):
    build, n_queries, n_keys = BIASES[bias]
    inputs = drawn(n_queries, n_keys)
    offset = n_keys - n_queries if build is causal_lower_right else 0
    want = own(*inputs, torch.ones(n_queries, n_keys, dtype=torch.bool).tril(offset))
    ran, real = [], autograd.attention
    monkeypatch.setattr(autograd, "attention", lambda *args: ran.append(args) or real(*args))
    close(fused_attn.scaled_dot_product_attention(*inputs, build(n_queries, n_keys)), want)
    assert len(ran) == (path == "kernels")
    if replaced == "ours":
        close(F.scaled_dot_product_attention(*inputs, build(n_queries, n_keys)), want)
    with pytest.raises((ValueError, RuntimeError), match=r"should not be (used with causal=True|set when is_causal=True)"):
        fused_attn.scaled_dot_product_attention(*inputs, build(n_queries, n_keys), is_causal=True)


@pytest.mark.usefixtures("path")
def test_a_causal_bias_of_other_lengths_is_torchs(monkeypatch):
    inputs, bias = drawn(5, 9), causal_lower_right(5, 8)
    with pytest.raises(RuntimeError):
        own(*inputs, bias)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attn.scaled_dot_product_attention)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*inputs, bias)


@pytest.mark.usefixtures("replaced")
def test_jagged_tensors_stay_torchs():
    jagged = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    close(fused_attn.scaled_dot_product_attention(jagged, jagged, jagged).values(), own(jagged, jagged, jagged).values())


@pytest.mark.usefixtures("path", "replaced")
def test_patch_sdpa_around_it():
    q, k, v = drawn()
    bias = causal_lower_right(5, 5)
    with patch_sdpa() as report:
        close(F.scaled_dot_product_attention(q, k, v), own(q, k, v))
        close(own(q, k, v, bias), own(q, k, v, is_causal=True))
    assert report.fused.total() + report.kept.total() >= 3


@pytest.mark.usefixtures("path", "replaced")
def test_torchs_modules(monkeypatch):
    module, x = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64), torch.randn(2, 5, 16).double()
    out = module(x, x, x, need_weights=False)[0]
    monkeypatch.setattr(F, "scaled_dot_product_attention", own)
    close(out, module(x, x, x, need_weights=False)[0])


@pytest.mark.usefixtures("path", "replaced")
def test_compiled():
    torch._dynamo.reset()
    q, k, v = drawn()
    call = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), fullgraph=True,
                         backend="aot_eager")
    close(call(q, k, v), own(q, k, v, is_causal=True))


def test_replaced_before_the_package_is_imported():
    code = ("import torch, torch.nn.functional as F\n"
            "own = F.scaled_dot_product_attention\n"
            "def theirs(*a, **k): raise SystemExit('not torch')\n"
            "F.scaled_dot_product_attention = theirs\n"
            "import fused_attn\n"
            "x = torch.randn(1, 2, 4, 8)\n"
            "assert torch.equal(fused_attn.scaled_dot_product_attention(x, x, x), own(x, x, x))\n"
            "assert torch.equal(fused_attn.attention(x, x, x), own(x, x, x))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr
