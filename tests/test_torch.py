"""The kernels as a citizen of PyTorch: compile, autograd, autocast, checkpointing, transforms, FLOP counts, devices."""

import contextlib
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.guard import memory_guard
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fused_attn
from fused_attn import reference_attention as reference
from fused_attn.spec import TileConfig

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


LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "length before heads": lambda b, h, n, d: torch.randn(b, n, h, d).transpose(1, 2),
    "head dim before length": lambda b, h, n, d: torch.randn(b, h, d, n).transpose(2, 3),
    "expanded heads": lambda b, h, n, d: torch.randn(b, 1, n, d).expand(b, h, n, d),
    "every second column": lambda b, h, n, d: torch.randn(b, h, n, 2 * d)[..., ::2],
    "part of a packed tensor": lambda b, h, n, d: torch.randn(b, n, 3, h, d)[:, :, 1].transpose(1, 2),
}


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


# --- the ops ---

FULL, CAUSAL, CAPPED = (0.3, None, None, True, None), (0.3, None, 0, True, None), (0.3, 3, 1, False, 1.5)
NEEDS = [(True, True, True), (False, True, False), (True, False, True)]
OP_CASES = [  # layout, dtype, (scale, left, right, bottom_right, softcap), which gradients
    ("contiguous", torch.float64, FULL, NEEDS[0]), ("length before heads", torch.bfloat16, CAUSAL, NEEDS[2]),
    ("expanded heads", torch.float32, CAPPED, NEEDS[1]),
    pytest.param("contiguous", torch.float16, CAPPED, NEEDS[1], marks=pytest.mark.slow),
    *(pytest.param(layout, torch.float32, CAUSAL, NEEDS[0], marks=pytest.mark.slow) for layout in LAYOUTS)]


@pytest.mark.parametrize(("layout", "dtype", "spec", "needs"), OP_CASES)
def test_ops_keep_torchs_rules(layout, dtype, spec, needs):
    tensors = [LAYOUTS[layout](2, heads, n, 8) for heads, n in ((4, 5), (2, 7), (2, 7))]
    tensors = [x if dtype == x.dtype else x.to(dtype) for x in tensors]
    attention(*tensors)  # the ops exist from the first call on
    forward, backward = torch.ops.fused_attn.forward.default, torch.ops.fused_attn.backward.default
    out, lse = forward(*tensors, *spec)
    rest = (torch.randn_like(out), torch.randn_like(lse) if all(needs) else None, *tensors, out, lse)
    torch.library.opcheck(forward, (*tensors, *spec))
    torch.library.opcheck(backward, (*rest, *spec, *needs))

    with FakeTensorMode() as mode:
        fakes = [None if x is None else mode.from_tensor(x) for x in rest]
        fake = (*forward(*fakes[2:5], *spec), *backward(*fakes, *spec, *needs))
    for r, f in zip((out, lse, *backward(*rest, *spec, *needs)), fake, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


# --- autograd: what is computed and kept ---

NEEDED = {"q": ("dq_kernel", (True, False, False)), "k": ("dkv_kernel", (False, True, False)),
          "v": ("dkv_kernel", (False, False, True))}


class BackwardNeeds(TorchDispatchMode):
    """The need_dq, need_dk, need_dv of every backward op."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fused_attn.backward.default:
            self.seen.append(tuple(args[-3:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NEEDED)
def test_only_wanted_gradients_are_computed(name):
    kernel, needs = NEEDED[name]
    inputs = qkv(grad=needs)
    exact = again(inputs)
    out = attention(*inputs, causal=True)
    with memory_guard() as guard, BackwardNeeds() as mode:
        out.sin().sum().backward()
    assert [launched for launched in guard.kernels if launched != "delta_kernel"] == [kernel]
    assert mode.seen == [needs]
    reference(*exact, causal=True).sin().sum().backward()
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


# --- FLOPs, devices ---


# B 2, H 4, D 8, Dv 4; 6 queries, 10 keys. Query i stands at i + 4. Kept pairs: full 6 * 10 = 60; causal 5 + 6 + ... + 10 = 45;
# window (2, 1): keys i + 2 ... i + 5, 4 for i = 0 ... 4 and 3 for i = 5: 23. A product of depth d costs 2 d FLOPs a pair.
@pytest.mark.parametrize(("arguments", "pairs"), [({}, 60), ({"causal": True}, 45), ({"window": (2, 1)}, 23)], ids=str)
@pytest.mark.parametrize(("grad", "qk", "pv"), [((True, True, True), 3, 2), ((True, False, False), 2, 1),
                                               ((False, False, True), 1, 1)])
def test_flops(arguments, pairs, grad, qk, pv):
    with FakeTensorMode():  # what is counted are shapes
        q, k, v = qkv(6, 10, batch=2, heads=4, dim_v=4, grad=grad)
        with FlopCounterMode(display=False) as forward:
            out = attention(q, k, v, **arguments)
        with FlopCounterMode(display=False) as backward:  # S, dQ, dK and dP, dV, as far as they are needed
            out.sum().backward()
    assert forward.get_total_flops() == 2 * 4 * pairs * 2 * (8 + 4)
    assert backward.get_total_flops() == 2 * 4 * pairs * 2 * (qk * 8 + pv * 4)


class FakeAccelerator:
    """torch.accelerator for a machine with several devices, of which ``current`` is the active one."""

    def __init__(self, monkeypatch, current):
        self.current, self.entered = current, []
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: self.current)
        monkeypatch.setattr(torch.accelerator, "device_index", self.device_index)

    @contextlib.contextmanager
    def device_index(self, index):
        before, self.current = self.current, index
        self.entered.append(index)
        try:
            yield
        finally:
            self.current = before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("device", "current", "entered"), [("cuda:1", 0, [1]), ("cuda:1", 1, []), ("cuda:0", 1, [0])])
def test_launch_on_the_tensors_device(monkeypatch, device, current, entered, fails):
    from fused_attn.kernels import launch

    accelerator, seen = FakeAccelerator(monkeypatch, current), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, accelerator.current, args, options)) or 1 / (not fails)

    tensor, config = SimpleNamespace(device=torch.device(device)), TileConfig(16, 32, 8, 3, options=(("waves_per_eu", 2),))
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        launch.run(Kernel(), 7, (tensor, 5), config)
    options = {"num_warps": 8, "num_stages": 3, "waves_per_eu": 2}
    assert seen == [((7,), torch.device(device).index, (tensor, 5, config), options)]
    assert accelerator.current == current
    assert accelerator.entered == entered


def test_launch_on_the_cpu_asks_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: pytest.fail("no accelerator is concerned"))
    attention(*qkv())
