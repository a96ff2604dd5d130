"""Every derivative of attention by blocks: forward mode, second order, vmap, and what they make together."""

import functools

import pytest
import torch
from support.features import FEATURES, Call, Shape
from torch.autograd import forward_ad

from fused_attn import attention
from fused_attn.run.blocked import dense

SHAPE = Shape(2, 2, 2, 9, 9, 4, 4)
ELSEWHERE = ("nested", "dims_192", "dims_576", "lengths", "gqa", "dims", "lse", "precise")
NAMES = [f.name for f in FEATURES if f.name not in ELSEWHERE]
CALLS = [*(Call((name,), SHAPE) for name in NAMES), Call(("gqa", "causal", "sinks", "softcap", "alibi"), SHAPE),
         Call(("gqa", "packed", "sinks", "bias", "softcap"), SHAPE), Call(("dims", "lengths", "mask", "relative"), SHAPE)]
FAST = ("causal", "softcap", "score_mod", "sinks", "packed", "gqa")
every_call = pytest.mark.parametrize("call", [
    pytest.param(call, id=str(call), marks=() if call.features[0] in FAST else pytest.mark.slow) for call in CALLS])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(dense, "ROWS", 4)
    monkeypatch.setattr(dense, "SCORES", 64)


def function(inputs, backend):
    """(out, lse) of leaves, the LSE without infinities."""
    def call(*tensors):
        torch.manual_seed(1)
        out, lse = inputs.attention(dict(zip(inputs.leaves, tensors, strict=True)), backend)
        return out, lse.masked_fill(lse.detach() == -torch.inf, 0)

    return call


def loss(inputs, backend):
    def call(*tensors):
        out, lse = function(inputs, backend)(*tensors)
        return (out * inputs.dout).sum().sin() + (lse * inputs.dlse).sum()

    return call


def compare(of, inputs):
    """``of(call, loss)`` of both backends."""
    got, want = (of(function(inputs, backend), loss(inputs, backend)) for backend in ("blocked", "reference"))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * max(1.0, float(b.abs().max())))


def drawn(call):
    inputs = call.draw(torch.float64)
    generator = torch.Generator().manual_seed(7)
    return inputs, tuple(inputs.leaves.values()), tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype)
                                                        for x in inputs.leaves.values())


@every_call
def test_second_derivatives(call):
    inputs, leaves, _ = drawn(call)

    def second(_, loss):
        tensors = [x.clone().requires_grad_() for x in leaves]
        first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum(x.sin().sum() for x in first), tensors, materialize_grads=True)

    compare(second, inputs)


@every_call
def test_tangents(call):
    inputs, leaves, tangents = drawn(call)
    compare(lambda call, _: [x for pair in torch.func.jvp(call, leaves, tangents) for x in pair], inputs)

    def duals(call, _):
        with forward_ad.dual_level():
            return [forward_ad.unpack_dual(x).tangent for x in call(*map(forward_ad.make_dual, leaves, tangents))]

    compare(duals, inputs)


@every_call
def test_derivatives_of_derivatives(call):
    inputs, leaves, tangents = drawn(call)
    every = tuple(range(len(leaves)))
    compare(lambda _, loss: torch.func.grad(loss, every)(*leaves), inputs)
    compare(lambda _, loss: torch.func.jvp(torch.func.grad(loss, every), leaves, tangents)[1], inputs)
    compare(lambda _, loss: torch.func.grad(lambda *x: torch.func.jvp(loss, x, tangents)[1], every)(*leaves), inputs)


@every_call
def test_batches(call):
    if "dropout" in call.features:
        return
    inputs, leaves, tangents = drawn(call)
    stacked = tuple(torch.stack([x, x + 0.1 * t, x / 2]) for x, t in zip(leaves, tangents, strict=True))
    every = tuple(range(len(leaves)))
    compare(lambda call, _: torch.vmap(call)(*stacked), inputs)
    compare(lambda _, loss: torch.vmap(torch.func.grad(loss, every))(*stacked), inputs)
    dims = (0, *[None] * (len(leaves) - 1))
    compare(lambda call, _: torch.vmap(call, in_dims=dims)(stacked[0], *leaves[1:]), inputs)
    compare(lambda _, loss: torch.vmap(torch.func.grad(loss), in_dims=dims)(stacked[0], *leaves[1:]), [inputs][0])


def test_a_tangent_of_a_tangent_and_a_hessian():
    q, k, v = (torch.randn(1, 1, 6, 3, dtype=torch.float64) for _ in range(3))

    def of(backend):
        return functools.partial(attention, k=k, v=v, causal=True, backend=backend)

    def both(make):
        torch.testing.assert_close(make(of("blocked")), make(of("reference")), rtol=1e-10, atol=1e-11)

    both(lambda f: torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (v,))[1], (q,), (k,))[1])
    both(lambda f: torch.func.hessian(lambda x: f(x).sin().sum())(q))
    both(lambda f: torch.func.jacfwd(f)(q))
    both(lambda f: torch.func.jacrev(f)(q))


@pytest.mark.parametrize("arguments", [{}, {"causal": True, "softcap": 2.0}], ids=str)
def test_gradcheck_and_gradgradcheck(arguments):
    leaves = [torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*tensors):
        return attention(*tensors, backend="blocked", return_lse=True, **arguments)

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_second_derivatives_keep_their_digits_in_narrow_types(dtype):
    """Held to fp64, beside the reference in the same type, which computes in fp32."""
    narrow = [torch.randn(1, 2, 40, 16).to(dtype).requires_grad_() for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in narrow]

    def second(leaves, backend):
        out = attention(*leaves, causal=True, backend=backend)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    want = second(wide, "reference")
    errors = {}
    for backend in ("blocked", "reference"):
        each = zip(second(narrow, backend), want, strict=True)
        errors[backend] = max(float((a.double() - b).norm() / b.norm()) for a, b in each)
    assert errors["blocked"] <= 2 * errors["reference"]


def test_memory_of_second_derivatives_is_linear():
    n = 2048
    leaves = [torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3)]
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(x.untyped_storage().nbytes() for x in torch.utils._pytree.tree_leaves(result)
                        if isinstance(x, torch.Tensor) and not func.is_view)
            return result

    out = attention(*leaves, causal=True, backend="blocked")
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    with Sizes():
        torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    assert made
    assert max(made) < n * n  # bytes: a quarter of the scores
