"""The kernels as a citizen of PyTorch: compile, autograd, autocast, checkpointing, transforms."""

import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from support.guard import memory_guard
from support.layouts import LAYOUTS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fused_attn
from fused_attn import reference_attention as reference

pytestmark = pytest.mark.kernels

INDUCTOR = "inductor" if shutil.which("g++") else "aot_eager"


def attention(q, k, v, **arguments):
    return fused_attn.attention(q, k, v, backend="triton", **arguments)


def qkv(n_queries=9, n_keys=9, *, heads=2, kv_heads=2, dim=8, dim_v=8, batch=1, dtype=torch.float64, grad=(True, True, True)):
    shapes = (batch, heads, n_queries, dim), (batch, kv_heads, n_keys, dim), (batch, kv_heads, n_keys, dim_v)
    return tuple(torch.randn(s, dtype=dtype, requires_grad=g) for s, g in zip(shapes, grad, strict=True))


def again(tensors):
    return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in tensors)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def close_all(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        close(a, e, tolerance)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True, assume_static_by_default=True):
        yield
    torch._dynamo.reset()


# --- torch.compile ---


@pytest.mark.usefixtures("dynamo")
def test_compile_with_one_tensor_as_q_k_and_v():
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    compiled = torch.compile(lambda x: attention(x, x, x, causal=True), fullgraph=True, backend=INDUCTOR)
    out = compiled(x)
    assert torch.equal(out, attention(x, x, x, causal=True))
    (dx,) = torch.autograd.grad(out.sin().sum(), x)
    close(dx, torch.autograd.grad(attention(x, x, x, causal=True).sin().sum(), x)[0], 1e-6)


@pytest.mark.usefixtures("dynamo")
def test_compile_with_distinct_tensors():
    inputs = qkv(9, 12, heads=4, dim_v=5)
    arguments = {"window": (4, 2), "softcap": 2.0, "return_lse": True}
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v, **arguments), fullgraph=True, backend=INDUCTOR)
    out, lse = compiled(*inputs)
    eager_out, eager_lse = attention(inputs[0] * 2, *inputs[1:], **arguments)
    close_all((out, lse), (eager_out, eager_lse))
    grads = torch.autograd.grad(out.sin().sum() + lse.square().sum(), inputs)
    close_all(grads, torch.autograd.grad(eager_out.sin().sum() + eager_lse.square().sum(), inputs))


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("mark", [False, True], ids=["automatic", "marked"])
def test_compile_once_for_all_lengths(mark):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True, backend=counter)
    compiles = []
    for n_queries, n_keys in ((8, 12), (9, 16), (16, 16), (33, 40), (17, 7)):
        inputs = qkv(n_queries, n_keys, dtype=torch.float32)
        for x in inputs if mark else ():
            torch._dynamo.mark_dynamic(x, 2)
        out = compiled(*inputs)
        grads = torch.autograd.grad(out.sum(), inputs)
        copies = again(inputs)
        eager = attention(*copies, causal=True)
        assert torch.equal(out, eager)
        close_all(grads, torch.autograd.grad(eager.sum(), copies), 1e-6)
        compiles.append(counter.frame_count)
    assert compiles == ([1] * 5 if mark else [1] + [2] * 4)


@pytest.mark.few(2)
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("name", "values"), [("scale", (0.1, 0.2, 0.35, -1.0)), ("softcap", (1.0, 2.0, 3.5, 9.0)),
                                              ("window", ((1, 0), (2, 0), (3, 1), (6, 2)))])
def test_compile_with_arguments_that_change(name, values):
    inputs = qkv(grad=(False, False, False))
    compiled = torch.compile(lambda q, k, v, x: attention(q, k, v, **{name: x}), fullgraph=True, backend="eager")
    for value in values:
        close(compiled(*inputs, value), attention(*inputs, **{name: value}))


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_keeps_strides(layout):
    q, k, v = (LAYOUTS[layout](2, 3, 5, 8) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, return_lse=True), fullgraph=True, backend="aot_eager")
    for x, eager in zip(compiled(q, k, v), attention(q, k, v, return_lse=True), strict=True):
        assert x.stride() == eager.stride()
        assert torch.equal(x, eager)


def test_export_with_a_dynamic_length():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    length = torch.export.Dim("length", min=2, max=128)
    inputs = qkv(grad=(False,) * 3)
    program = torch.export.export(Module(), inputs, dynamic_shapes={name: {2: length} for name in "qkv"})
    other = qkv(33, 33, grad=(False,) * 3)
    assert torch.equal(program.module()(*other), attention(*other, causal=True))


# --- autograd: what is computed and kept ---

NEEDED = {  # kernels beside delta_kernel, needs of q, k, v, bias and sinks
    "q": (["dq_kernel"], (True, False, False, False, False)), "k": (["dkv_kernel"], (False, True, False, False, False)),
    "v": (["dkv_kernel"], (False, False, True, False, False)), "sinks": ([], (False, False, False, False, True)),
    "bias": (["operand_grad_kernel"], (False, False, False, True, False)),
    "q and bias": (["dq_kernel", "operand_grad_kernel"], (True, False, False, True, False)),
}


class BackwardNeeds(TorchDispatchMode):
    """The need_dq, need_dk, need_dv, need_dsinks and need_operands of every backward op."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fused_attn.backward.default:
            self.seen.append(tuple(args[-6:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NEEDED)
def test_only_wanted_gradients_are_computed(name):
    kernels, needs = NEEDED[name]
    bias, sinks = (torch.randn(*shape, dtype=torch.float64, requires_grad=need)
                   for shape, need in zip(((9, 9), (2,)), needs[3:], strict=True))
    inputs = (*qkv(grad=needs[:3]), bias, sinks)
    exact = again(inputs)
    out = attention(*inputs[:3], bias=bias, sinks=sinks, causal=True)
    with memory_guard() as guard, BackwardNeeds() as mode:
        out.sin().sum().backward()
    assert [launched for launched in guard.kernels if launched != "delta_kernel"] == kernels
    assert mode.seen == [(*needs[:3], needs[4], False, [needs[3]])]
    reference(*exact[:3], bias=exact[3], sinks=exact[4], causal=True).sin().sum().backward()
    for x, e in zip(inputs, exact, strict=True):
        assert (x.grad is None) == (e.grad is None)
        if e.grad is not None:
            close(x.grad, e.grad)


@pytest.fixture
def saved():
    """Every tensor that autograd keeps."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
        yield tensors


@pytest.mark.parametrize("why", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_nothing_is_saved_without_gradients(why, saved):
    inputs = qkv(grad=(why is not contextlib.nullcontext,) * 3)
    with why():
        out, lse = attention(*inputs, return_lse=True)
    assert not out.requires_grad
    assert not lse.requires_grad
    assert saved == []


def test_saved_are_the_inputs_out_and_lse(saved):
    inputs = qkv()
    out, lse = attention(*inputs, return_lse=True)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in (*inputs, out, lse)]


def test_saved_once_where_q_k_and_v_are_one_tensor(saved):
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    out, lse = attention(x, x, x, return_lse=True)
    assert {s.data_ptr() for s in saved} == {x.data_ptr(), out.data_ptr(), lse.data_ptr()}


@pytest.mark.parametrize("which", ["q", "out"])
def test_changed_in_place_before_backward(which):
    q, k, v = qkv()
    q = q * 1
    out = attention(q, k, v)
    with torch.no_grad():
        {"q": q, "out": out}[which].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?in-?place"):
        out.sum().backward()


LOSSES = {
    "out alone, expanded gradient": lambda out, lse: out.sum(),
    "out alone": lambda out, lse: out.sin().sum(),
    "LSE alone": lambda out, lse: lse.sin().sum(),
    "LSE alone, expanded gradient": lambda out, lse: lse.sum(),
    "both": lambda out, lse: out.sin().sum() + lse.square().sum(),
    "transposed gradients": lambda out, lse: (out.transpose(1, 3) ** 2 * torch.arange(9).view(9, 1)).sum()
    + (lse.transpose(1, 2) ** 3).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window": (2, 1), "softcap": 1.5}], ids=str)
def test_gradients_through_out_and_lse(loss, arguments):
    inputs = qkv(9, 14, kv_heads=1, dim_v=5)
    exact = again(inputs)
    grads = torch.autograd.grad(LOSSES[loss](*attention(*inputs, return_lse=True, **arguments)), inputs)
    wanted = torch.autograd.grad(LOSSES[loss](*reference(*exact, return_lse=True, **arguments)), exact, materialize_grads=True)
    close_all(grads, wanted)


def test_gradients_of_rows_with_no_key():
    inputs = qkv(14, 9)
    exact = again(inputs)
    out, lse = attention(*inputs, causal=True, return_lse=True)
    assert (lse[:, :, :5] == -torch.inf).all()
    grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    out, lse = reference(*exact, causal=True, return_lse=True)
    close_all(grads, torch.autograd.grad((out, lse), exact, (torch.ones_like(out), torch.ones_like(lse))))
    assert (grads[0][:, :, :5] == 0).all()


# --- activation checkpointing ---


def test_checkpoint():
    inputs = qkv()
    plain = torch.autograd.grad(attention(*inputs, causal=True).sin().sum(), inputs)
    with memory_guard() as guard:
        out = checkpoint(lambda *x: attention(*x, causal=True).sin(), *inputs, use_reentrant=False)
        grads = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    assert guard.kernels.count("forward_kernel") == 2


def test_selective_checkpoint_keeps_the_op():
    inputs = qkv()
    plain = torch.autograd.grad(attention(*inputs).sin().sum(), inputs)

    def policy(context, op, *args, **kwargs):
        kept = op is torch.ops.fused_attn.forward.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    with memory_guard() as guard:
        out = checkpoint(lambda *x: attention(*x).sin(), *inputs, use_reentrant=False,
                         context_fn=lambda: create_selective_checkpoint_contexts(policy))
        grads = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    assert guard.kernels.count("forward_kernel") == 1


# --- autocast ---


def test_autocast_like_torch():
    inputs = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs, causal=True)
        assert out.dtype == F.scaled_dot_product_attention(*inputs).dtype == torch.bfloat16
    assert torch.equal(out, attention(*(x.bfloat16() for x in inputs), causal=True))
    grads = torch.autograd.grad(out.float().sin().sum(), inputs)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    exact = torch.autograd.grad(reference(*inputs, causal=True).sin().sum(), inputs)
    close_all(grads, exact, 5e-2)


def test_autocast_brings_mixed_dtypes_together():
    q, k, v = qkv(dtype=torch.float32, grad=(False,) * 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = (q, k.bfloat16(), v.half())
        assert F.scaled_dot_product_attention(*mixed).dtype == torch.bfloat16
        assert torch.equal(attention(*mixed), attention(q, k, v.half().float()))


def test_autocast_leaves_alone_what_torch_leaves_alone():
    inputs = qkv(grad=(False,) * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*inputs).dtype == F.scaled_dot_product_attention(*inputs).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert attention(*(x.float() for x in inputs)).dtype == torch.float32
