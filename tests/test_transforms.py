"""torch.func, batched gradients and exported programs: first derivatives are right, what is missing says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import fused_attn.nn
from fused_attn import attention

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).parents[1]
CALLS = {
    "plain": {"causal": True}, "dropout": {"dropout_p": 0.4, "sinks": torch.rand(2)}, "precise": {"precise": True},
    "bias": {"bias": torch.randn(5, 7, dtype=torch.float64), "mask": torch.rand(5, 7) < 0.8},
    "additive": {"score_weight": torch.rand(8, dtype=torch.float64)},
}


def qkv():
    return tuple(torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (5, 7, 7))


def loss(q, k, v, arguments, backend="triton"):
    torch.manual_seed(3)
    out, lse = attention(q, k, v, return_lse=True, backend=backend, **arguments)
    return out.sin().sum() + lse.square().sum()


@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives_of_torch_func(name):
    inputs = qkv()
    tensors = {key: x for key, x in CALLS[name].items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    others = {key: x for key, x in CALLS[name].items() if key not in tensors}

    def of(backend):
        def function(q, k, v, tensors):
            return loss(q, k, v, {**others, **tensors}, backend)
        return torch.func.grad(function, argnums=(0, 1, 2, 3))(*inputs, tensors)

    got, want = of("triton"), of("reference")
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    value, pull = torch.func.vjp(lambda q: loss(q, *inputs[1:], CALLS[name]), inputs[0])
    torch.testing.assert_close(pull(2 * torch.ones_like(value))[0], 2 * want[0], rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_first_derivatives_of_rotary_and_weights():
    x, cos, sin = torch.randn(1, 2, 5, 8), torch.rand(5, 4), torch.rand(5, 4)

    def turned(x, backend):
        return fused_attn.apply_rotary(x, cos, sin, backend=backend).sin().sum()

    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None))):
        inputs = x if transform is torch.func.grad else torch.stack((x, 2 * x))
        torch.testing.assert_close(*(transform(turned)(inputs, backend) for backend in ("triton", "reference")))
    y = x.clone().requires_grad_()
    out = fused_attn.apply_rotary(y, cos, sin, backend="triton")
    dout = torch.randn(3, *out.shape)
    want = torch.stack([torch.autograd.grad(out, y, d, retain_graph=True)[0] for d in dout])
    torch.testing.assert_close(torch.autograd.grad(out, y, dout, is_grads_batched=True)[0], want)
    grads = [torch.func.grad(lambda x, b=b: fused_attn.attention_weights(x, x, backend=b).sin().sum())(x)
             for b in (None, "reference")]
    torch.testing.assert_close(*grads)


def tangent(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(Q, Q))).tangent


Q, K, V = qkv()
MISSING = {  # what is asked, and what the error says
    "forward AD of weights": (lambda: tangent(lambda q: fused_attn.attention_weights(q, K, backend="triton")),
                              "forward AD over backend"),
    "forward AD of statistics": (lambda: tangent(lambda q: fused_attn.attention_stats(q, K, backend="triton").entropy),
                                 "forward AD over backend"),
    "statistics": (lambda: torch.func.grad(
        lambda q: fused_attn.attention_stats(q, K, backend="triton").entropy.sum())(Q), "no transforms of torch.func"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_says_so(name):
    run, message = MISSING[name]
    with pytest.raises((NotImplementedError, ValueError), match=message):
        run()


LOAD = """
import sys, torch, fused_attn
program, inputs, want = torch.export.load(sys.argv[1]), *torch.load(sys.argv[2])
assert torch.equal(program.module()(*inputs), want)
"""


def test_an_exported_program_loads_in_another_process(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            q = fused_attn.apply_rotary(q, torch.ones(5, 4), torch.ones(5, 4), backend="triton")
            return attention(q, k, v, backend="triton", mask_mod=fused_attn.prefix_lm_mask(torch.tensor([3])), softcap=3.0)

    torch.export.save(torch.export.export(Module(), (Q, K, V)), tmp_path / "program.pt2")
    torch.save(((Q, K, V), Module()(Q, K, V)), tmp_path / "tensors.pt")
    subprocess.run([sys.executable, "-c", LOAD, tmp_path / "program.pt2", tmp_path / "tensors.pt"], check=True, cwd=ROOT)


LEARNED = {
    "projections": {}, "sinks": {"sinks": (4,)}, "slopes": {"alibi_slopes": (4,)}, "bias": {"bias": (9, 9)},
    "additive": {"score_weight": (4, 8)}, "precise": {"bias": (4, 1, 9)},
}


@pytest.mark.few(3)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("name", LEARNED)
def test_an_exported_program_has_the_gradients_of_its_parameters(name, backend, strict):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = torch.nn.Linear(32, 32, dtype=torch.float64)
            self.learned = torch.nn.ParameterDict({key: torch.randn(shape).double() for key, shape in LEARNED[name].items()})

        def forward(self, x):
            q = self.projection(x).unflatten(-1, (4, 8)).transpose(1, 2)
            k = fused_attn.apply_rotary(q, torch.full((9, 4), 0.6), torch.full((9, 4), 0.8), backend=backend and "triton")
            return attention(q, k, q.sin(), backend=backend, precise=name == "precise", **self.learned)

    module, x = Module(), torch.randn(2, 9, 32, dtype=torch.float64)
    program = torch.export.export(module, (x,), strict=strict).module()
    for one in (module, program):
        one(x).sin().sum().backward()
    want = dict(module.named_parameters())
    found = dict(program.named_parameters())
    assert found.keys() == want.keys()
    for key, parameter in want.items():
        torch.testing.assert_close(found[key].grad, parameter.grad, rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_vmap_draws_dropout_by_its_own_rules(backend):
    q = torch.randn(1, 1, 4, 8).expand(2, -1, -1, -1)[:, None]

    def of(randomness):
        return torch.vmap(lambda x: attention(x, x, x, dropout_p=0.5, backend=backend), randomness=randomness)(q)

    same, different = of("same"), of("different")
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        of("error")


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("make", [
    lambda: fused_attn.nn.MultiheadAttention(16, 2), lambda: fused_attn.nn.TransformerEncoderLayer(16, 2, 32),
    lambda: fused_attn.nn.TransformerDecoderLayer(16, 2, 32), lambda: fused_attn.nn.Transformer(16, 2, 1, 1, 32),
    lambda: torch.nn.Sequential(torch.nn.Linear(16, 16), fused_attn.nn.TransformerEncoderLayer(16, 2, 32)),
], ids=["attention", "encoder layer", "decoder layer", "transformer", "a model with one"])
def test_script_says_what_to_do_instead(make):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script: .*torch\.export\.export and torch\.compile"):
        torch.jit.script(make())
