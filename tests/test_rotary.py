"""The rotary kernel against its plain form: sizes, strides, derivatives, and what it refuses."""

import contextlib
import itertools

import pytest
import torch
from support.guard import memory_guard
from support.layouts import LAYOUTS
from support.oracle import EPS
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_attn.rotary import apply_rotary


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def drawn(batch, heads, length, dim, pairs, dtype=torch.float64, tables=3):
    """x, and cos and sin [N, pairs], [1, N, pairs] or [B, N, pairs] by ``tables`` 2, 1 or 3."""
    angles = normal(*{2: (), 1: (1,), 3: (batch,)}[tables], length, pairs) * 10
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return normal(batch, heads, length, dim, dtype=dtype), angles.cos().to(wide), angles.sin().to(wide)


SIZES = [  # batch, heads, length, head dim, pairs: odd, one of each, more heads than a program takes, more rows than a tile
    (2, 3, 7, 10, 5), (2, 3, 7, 11, 3), (1, 1, 1, 2, 1), (3, 9, 70, 16, 4), (1, 2, 130, 96, 48), (2, 5, 3, 300, 65),
    (2, 2, 0, 8, 4)]


@pytest.mark.kernels
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, *(
    pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))], ids=str)
@pytest.mark.parametrize(("size", "tables"), [*zip(SIZES, itertools.cycle((3, 2, 1)), strict=False)], ids=str)
def test_kernel_is_its_plain_form(size, tables, dtype, interleaved):
    """Both round once: what is computed in fp64 from the same numbers, and then rounded."""
    x, cos, sin = drawn(*size, dtype, tables)
    with memory_guard() as guard:
        out = apply_rotary(x, cos, sin, interleaved=interleaved, backend="triton")
    assert guard.kernels == (["rotary_kernel"] if x.numel() else [])
    exact = apply_rotary(x.double(), cos.double(), sin.double(), interleaved=interleaved, backend="reference")
    terms = x.double().norm(dim=-1, keepdim=True)
    for result in (out, apply_rotary(x, cos, sin, interleaved=interleaved)):
        assert (result.dtype, result.shape) == (x.dtype, x.shape)
        unit = 0.0 if dtype == torch.float64 else EPS[dtype]
        assert ((result.double() - exact).abs() <= unit * exact.abs() * 1.01 + 4 * EPS[cos.dtype] * terms).all()
    assert torch.equal(out[..., 2 * cos.shape[-1] :], x[..., 2 * cos.shape[-1] :])


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_takes_any_strides(layout):
    x = LAYOUTS[layout](2, 3, 9, 12).double().requires_grad_()
    cos, sin = (t.T for t in normal(2, 5, 9))  # transposed too
    with memory_guard():
        out = apply_rotary(x, cos, sin, backend="triton")
        (grad,) = torch.autograd.grad(out.sin().sum(), x)
    exact = apply_rotary(x, cos, sin, backend="reference")
    close((out, grad), (exact, *torch.autograd.grad(exact.sin().sum(), x)))


@pytest.mark.kernels
@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "heads", "length", "columns"])
def test_kernel_addresses_beyond_31_bits(dim, address_space):
    x, cos, sin = drawn(3, 5, 3, 6, 2, torch.float16)
    strides = list(x.stride())
    strides[dim] = 2**30 + 7
    far = address_space(x, strides)
    with memory_guard():
        out = apply_rotary(far, cos, sin, backend="triton")
    assert torch.equal(out, apply_rotary(x, cos, sin, backend="triton"))


@pytest.mark.kernels
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_kernel_has_derivatives_of_any_order(interleaved):
    x, cos, sin = drawn(1, 2, 2, 5, 2)

    def run(x):
        return apply_rotary(x, cos, sin, interleaved=interleaved, backend="triton").sin()

    torch.autograd.gradcheck(run, (x.requires_grad_(),))
    torch.autograd.gradgradcheck(run, (x,), fast_mode=True)


@pytest.mark.kernels
def test_kernel_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: apply_rotary(*x, backend="triton"), fullgraph=True, backend=counter)
    for length in (6, 9, 17, 5):
        x, cos, sin = drawn(2, 3, length, 8, 4)
        x.requires_grad_()
        found, exact = (f(x, cos, sin) for f in (compiled, apply_rotary))
        close((found, *torch.autograd.grad(found.sin().sum(), x)), (exact, *torch.autograd.grad(exact.sin().sum(), x)))
    assert counter.frame_count <= 2  # static, dynamic
    torch._dynamo.reset()


@pytest.mark.few(3)
@pytest.mark.kernels
@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", torch.float64), ("length before heads", torch.bfloat16),
                                               ("expanded heads", torch.float32), ("every second column", torch.float32)])
def test_op_keeps_torchs_rules(layout, dtype):
    x, tables = LAYOUTS[layout](2, 3, 5, 8).to(dtype), [t.expand(2, 5, 3) for t in normal(2, 5, 3, dtype=torch.float32)]
    torch.library.opcheck(torch.ops.fused_attn.rotary.default, (x, *tables, True, False))
    torch.library.opcheck(torch.ops.fused_attn.rotary.default, (x, *tables, False, True))


BAD_TABLES = {  # what the error says, x, cos and sin of a call of the op
    "too few rows": ("cos", lambda x, t: (x, t[:, :4], t[:, :4])), "too few of one": ("sin", lambda x, t: (x, t, t[:, :4])),
    "too few batches": ("cos", lambda x, t: (x, t[:1], t[:1])), "no batch": ("cos", lambda x, t: (x, t[0], t[0])),
    "too many pairs": ("cos", lambda x, t: (x, t.repeat(1, 1, 2), t.repeat(1, 1, 2))),
    "other pairs": ("sin", lambda x, t: (x, t, t[..., :1])), "no pairs": ("cos", lambda x, t: (x, t[..., :0], t[..., :0])),
    "integers": ("cos", lambda x, t: (x, t.long(), t)), "another device": ("sin", lambda x, t: (x, t, t.to("meta"))),
    "no heads": ("x", lambda x, t: (x[0], t, t)), "integer rows": ("x", lambda x, t: (x.long(), t, t)),
}


@pytest.mark.kernels
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("case", BAD_TABLES)
def test_op_checks_the_sizes_that_its_kernel_trusts(case, fake):
    name, arguments = BAD_TABLES[case]
    tensors = arguments(normal(2, 3, 5, 8), normal(2, 5, 4))
    with FakeTensorMode() if fake else contextlib.nullcontext() as mode:
        tensors = [mode.from_tensor(x) if fake else x for x in tensors]
        with pytest.raises(ValueError, match=f"^{name}: expected floats"):
            torch.ops.fused_attn.rotary(*tensors, False, False)


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_kernel_under_transforms_is_right():
    x, cos, sin = drawn(2, 1, 3, 4, 2)

    def run(x):
        return apply_rotary(x, cos, sin, backend="triton")

    assert torch.equal(torch.func.vmap(run)(x[None])[0], run(x))
    close(torch.func.jvp(run, (x,), (2 * x,))[1], 2 * run(x))  # it is linear
    of_kernel, of_formula = (torch.func.grad(lambda x, b=b: apply_rotary(x, cos, sin, backend=b).sin().sum())(x)
                             for b in ("triton", "reference"))
    close(of_kernel, of_formula)
    op = torch.ops.fused_attn.rotary
    close(torch.autograd.grad(op(x.requires_grad_(), cos, sin, False, False).sin().sum(), x)[0], of_formula)
    with pytest.raises(RuntimeError, match="cos and sin without gradients"):
        op(x, cos.requires_grad_(), sin, False, False)


X, COS = torch.zeros(2, 3, 5, 8), torch.ones(5, 4)
BAD_CALLS = {  # what the error says, arguments
    "x: expected a float tensor; got torch.int64": (X.long(), COS, COS), "x: expected a float tensor; got 3": (3, COS, COS),
    "cos: expected a float tensor; got torch.int32": (X, COS.int(), COS), "sin: expected a float tensor": (X, COS, None),
    "x: expected 4 dimensions": (X[0], COS, COS), "cos: expected .5, pairs.*at most 4": (X, torch.ones(5, 5), torch.ones(5, 5)),
    "cos: expected.*got shape .4, 4.": (X, COS[1:], COS), "sin: expected.*got shape .5, 3.": (X, COS, COS[:, 1:]),
    "cos: expected.*2, 5, pairs": (X, COS.expand(3, 5, 4), COS.expand(3, 5, 4)), "cos: expected.*got shape .5, 0.": (
        X, COS[:, :0], COS[:, :0]), "cos: expected x's device cpu; got meta": (X, COS.to("meta"), COS),
    "sin: expected no gradient": (X, COS, torch.ones(5, 4, requires_grad=True)),
}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_bad_calls_are_named(text):
    with pytest.raises((TypeError, ValueError), match=f"^{text}"):
        apply_rotary(*BAD_CALLS[text])


def test_backends_are_named():
    with pytest.raises(ValueError, match="backend: expected 'triton', 'reference' or None; got 'torch'"):
        apply_rotary(X, COS, COS, backend="torch")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this call: there are no kernels for device type 'meta'"):
        apply_rotary(X.to("meta"), COS.to("meta"), COS.to("meta"), backend="triton")
