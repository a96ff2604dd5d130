"""Second derivatives of the kernels: every feature, by every way to take them, against the reference in fp64."""

import pytest
import torch
from support.features import FEATURES, Call, Shape, covering
from support.seconds import LACK_SECOND, TORCH_LACKS, WAYS, second
from torch.autograd import forward_ad

import fused_attn
from fused_attn import attention

pytestmark = pytest.mark.kernels
SMALL = Shape(n_queries=37, n_keys=37)
TAKEN = [feature.name for feature in FEATURES if feature.name not in (*LACK_SECOND, TORCH_LACKS)]
PAIRS = [names for names in covering(3) if not {*names} & {*LACK_SECOND, TORCH_LACKS, "dims_576"}]


def check(names, way, dtype=torch.float64):
    inputs = Call(names, SMALL).draw(dtype)
    want = second(inputs.to(torch.float64), "reference", way)
    got = second(inputs, "triton", way)
    for name, x in want.items():
        scale = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        torch.testing.assert_close(got[name], x, rtol=1e-11, atol=1e-12 * scale, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.few(8)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TAKEN)
def test_every_feature(name, way):
    """Derivatives by every tensor of the call, along random directions of all of them."""
    check((name,), way)


@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_features_together(names, way):
    check(names, way)


@pytest.mark.parametrize("name", LACK_SECOND)
def test_what_has_no_second_derivatives_says_so(name):
    inputs = Call((name,), SMALL).draw(torch.float64)
    with pytest.raises(NotImplementedError, match=LACK_SECOND[name]):
        second(inputs, "triton", "vjp of vjp")


# An error of the norm, in units of the type's rounding: products of rounded second-order terms, summed in fp32.
UNITS = {torch.float16: 6, torch.bfloat16: 6, torch.float32: 60}


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["causal", "gqa", "softcap", "bias", "dropout", "sinks", "packed", "function", "precise"])
def test_narrow_types(name, way, dtype):
    inputs = Call((name,), SMALL).draw(dtype)
    want, got = second(inputs.to(torch.float64), "reference", way), second(inputs, "triton", way)
    for leaf, x in want.items():
        error = (got[leaf].double() - x).norm() / x.norm()
        assert error < UNITS[dtype] * torch.finfo(dtype).eps, (leaf, error / torch.finfo(dtype).eps)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.slow
def test_torch_checks_every_derivative():
    """torch's own checks: by finite differences, batched, forward over backward."""
    inputs = [normal(1, 1, n, 2).requires_grad_() for n in (2, 3, 3)]

    def function(q, k, v):
        return attention(q, k, v, causal=True, softcap=3.0, backend="triton")

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True,
                                    check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.3}, {"bias": normal(2, 1, 3)}], ids=["plain", "dropout", "bias"])
def test_hessians_both_ways(arguments):
    """vmap goes over the tangents, or the cotangents, of a second derivative; dropout stays what it was drawn as."""
    q, k, v = (normal(1, 2, n, 2) for n in (2, 3, 3))

    def function(q, backend):
        torch.manual_seed(2)
        return attention(q, k, v, backend=backend, **arguments).sin().sum()

    want = torch.func.hessian(lambda q: function(q, "reference"))(q) if not arguments.get("dropout_p") else None
    forward = torch.func.vmap(lambda t: torch.func.jvp(torch.func.grad(lambda q: function(q, "triton")), (q,), (t,))[1],
                              randomness="same")(torch.eye(q.numel(), dtype=q.dtype).view(-1, *q.shape))
    if want is None:  # draws its seed within no vmap, which the reference's hessian cannot
        want = torch.stack([torch.func.jvp(torch.func.grad(lambda q: function(q, "reference")), (q,), (t,))[1]
                            for t in torch.eye(q.numel(), dtype=q.dtype).view(-1, *q.shape)])
    torch.testing.assert_close(forward.flatten(), want.flatten(), rtol=1e-11, atol=1e-12)
    if not arguments.get("dropout_p"):
        for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
            torch.testing.assert_close(transform(lambda q: function(q, "triton"))(q), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_batched_gradients(which, create_graph):
    """The older vmap, of ``is_grads_batched``, also where the gradients are differentiated again."""
    q, k, v = (normal(2, 2, n, 4) for n in (5, 7, 7))
    found = []
    for backend in ("triton", "reference"):
        x = q.clone().requires_grad_()
        out = attention(x, k, v, backend=backend, return_lse=True)[which]
        dout = torch.linspace(-1, 1, 3 * out.numel(), dtype=out.dtype).view(3, *out.shape)
        grad, = torch.autograd.grad(out, x, dout, is_grads_batched=True, create_graph=create_graph)
        again = torch.autograd.grad(grad.sin().sum(), x)[0] if create_graph else grad
        found.append((grad, again))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_batches_of_second_gradients():
    """The older vmap over a gradient of a gradient, and over one of a tangent."""
    q, k, v = (normal(1, 2, n, 4) for n in (5, 7, 7))
    found = []
    for backend in ("triton", "reference"):
        x, t = q.clone().requires_grad_(), q.cos().requires_grad_()
        grad, = torch.autograd.grad(attention(x, k, v, backend=backend).sin().sum(), x, create_graph=True)
        rate = torch.func.jvp(lambda q, b=backend: attention(q, k, v, backend=b), (x,), (t,))[1]
        several = torch.stack([q, q.cos()])
        found.append((*torch.autograd.grad(grad, x, several, is_grads_batched=True),
                      *torch.autograd.grad(rate, (x, t), several, is_grads_batched=True)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_flops_count_the_products():
    """Of a full call, 2 D FLOPs a pair and product: two in the forward, five in its tangent; in the backward five, and in its
    tangent ten where dout does not move, each counted once though two kernels make some of them."""
    from torch.utils.flop_counter import FlopCounterMode

    q = normal(1, 2, 5, 4)
    product = 2 * 4 * 2 * 25
    for function, products in ((lambda q: attention(q, q, q, backend="triton"), 2 + 5),
                               (torch.func.grad(lambda q: attention(q, q, q, backend="triton").sum()), 2 + 5 + 5 + 10)):
        with FlopCounterMode(display=False) as counter:
            torch.func.jvp(function, (q,), (q,))
        assert counter.get_total_flops() == products * product, counter.get_total_flops() / product


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobians(strategy):
    q, k, v = (normal(1, 2, n, 4) for n in (5, 7, 7))
    got, want = (torch.autograd.functional.jacobian(lambda q, b=b: attention(q, k, v, backend=b), q, vectorize=True,
                                                    strategy=strategy) for b in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_a_gradient_taken_within_a_dual_level_has_its_tangent():
    q, k, v = (normal(1, 2, n, 4) for n in (5, 7, 7))
    found = []
    for backend in ("triton", "reference"):
        x = q.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, q)
            grad, = torch.autograd.grad(attention(dual, k, v, backend=backend).sin().sum(), x)
            found.append(forward_ad.unpack_dual(grad).tangent)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_rows_without_a_key_stay_zero():
    q, k, v = (normal(1, 2, 6, 4) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril(-1)

    def function(q):
        return attention(q, k, v, mask=mask, backend="triton").sin().sum()

    moved = torch.func.jvp(torch.func.grad(function), (q,), (q,))[1]
    assert moved.isfinite().all()
    assert torch.equal(moved[:, :, 0], torch.zeros(1, 2, 4, dtype=torch.float64))
    assert moved[:, :, 1:].any()


@pytest.mark.parametrize("which", [3, "jvp of jvp"])
def test_third_derivatives_say_so(which):
    q = normal(1, 1, 4, 4)

    def function(q):
        return attention(q, q, q, backend="triton").sin().sum()

    if which == 3:
        third = torch.func.grad(lambda q: torch.func.grad(lambda q: torch.func.grad(function)(q).sin().sum())(q).sin().sum())
        with pytest.raises(NotImplementedError, match="third derivatives are not built for backend 'triton'"):
            third(q)
    else:
        with pytest.raises(NotImplementedError, match="forward mode AD within forward mode AD"):
            torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (q,))[1], (q,), (q,))


def test_rotary_moves_along():
    x, cos, sin = normal(1, 2, 5, 8), torch.rand(5, 4), torch.rand(5, 4)
    got, want = (torch.func.jvp(lambda x, b=b: fused_attn.apply_rotary(x, cos, sin, backend=b).sin(), (x,), (x,))
                 for b in ("triton", "reference"))
    torch.testing.assert_close(got, want)
    with pytest.raises(NotImplementedError, match="no tangent by cos and sin"):
        torch.func.jvp(lambda cos: fused_attn.apply_rotary(x, cos, sin, backend="triton"), (cos,), (cos,))


def test_wide_tangents_of_operands_get_wide_offsets():
    """A tile's 32-bit offsets would overflow along a tangent whose rows lie far apart, however its operand lies."""
    from fused_attn.call.schema import Directions
    from fused_attn.kernels.launch import WIDEST_STRIDE
    from fused_attn.plan import tangent
    from fused_attn.plan.problem import Problem

    inputs = Call(("bias_pairs",), SMALL).draw(torch.float64)
    q, k, v, spec, others = inputs.described(inputs.leaves)
    call = Problem.of(q, k, v, spec, others).call
    bias, = others.operands
    for stride in (37, WIDEST_STRIDE):
        moved = torch.empty_strided(bias.shape, (0, 0, stride, 1), device="meta")
        assert tangent.widened(call, Directions(None, None, None, None, None, (moved,))).widest == stride
