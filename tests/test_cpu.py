"""The default on CPU tensors: torch's own fused kernel where it computes exactly this call in the least time, else blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_attn
from fused_attn import attention, attention_varlen, explain, reference_attention

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Recorder(TorchDispatchMode):
    """The ops that ran, and the shape of every floating-point tensor that they made."""

    def __init__(self):
        super().__init__()
        self.ops, self.shapes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.append(func)
        self.shapes += [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return result


def qkv(n_queries=37, n_keys=37, *, heads=2, kv_heads=2, dim=8, dim_v=8, batch=2, dtype=torch.float64):
    shapes = (batch, heads, n_queries, dim), (batch, kv_heads, n_keys, dim), (batch, kv_heads, n_keys, dim_v)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def against_reference(inputs, tolerance=1e-12, **arguments):
    """Values and gradients of the default path and of the oracle in fp64; returns what ran."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with Recorder() as recorder:
        out = attention(*inputs, **arguments)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        grads = torch.autograd.grad(out, inputs, dout)
    expected = reference_attention(*exact, **arguments)
    for actual, wanted in zip((out, *grads), (expected, *torch.autograd.grad(expected, exact, dout.double())), strict=True):
        assert actual.dtype == inputs[0].dtype
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)
    return recorder


GENERATOR = torch.Generator().manual_seed(0)
KEEP = torch.rand(37, 37, generator=GENERATOR) < 0.6
BIAS = torch.randn(37, 37, generator=GENERATOR, dtype=torch.float64)
CALLS = {  # shapes, arguments
    "full": ({}, {}),
    "causal": ({}, {"causal": True}),
    "causal, more keys": ({"n_queries": 20}, {"causal": True}),
    "causal, fewer keys": ({"n_keys": 20}, {"causal": True}),
    "decoding": ({"n_queries": 1}, {"causal": True}),
    "decoding in a window": ({"n_queries": 1}, {"causal": True, "window": (5, 0)}),
    "one key": ({"n_keys": 1}, {"causal": True}),
    "window": ({}, {"window": (3, 2)}),
    "left window": ({}, {"window": (3, None)}),
    "right window": ({}, {"window": (None, 2)}),
    "left window that masks one pair": ({}, {"window": (35, None)}),
    "right window that masks one pair": ({}, {"window": (None, 35)}),
    "the narrowest window that does not": ({}, {"window": (36, 36)}),
    "causal in a window that does not mask": ({}, {"causal": True, "window": (36, 5)}),
    "window, fewer keys": ({"n_keys": 20}, {"window": (1, 1)}),
    "full, other length": ({"n_queries": 11}, {}),
    "scale": ({}, {"scale": 1.5}),
    "grouped": ({"heads": 6}, {"causal": True}),
    "one key head": ({"heads": 3, "kv_heads": 1}, {"window": (4, 4)}),
    "wider values": ({"dim_v": 13}, {"causal": True}),
    "narrower values": ({"dim": 13, "dim_v": 3}, {}),
    "head dim 1": ({"dim": 1, "dim_v": 1}, {}),
    "mask": ({}, {"mask": KEEP}), "mask by head, causal": ({"heads": 4}, {"mask": KEEP[None].repeat(4, 1, 1), "causal": True}),
    "mask by batch and key": ({}, {"mask": KEEP[:2, None, None]}), "mask that empties rows": ({}, {"mask": KEEP & KEEP[:, :1]}),
    "bias": ({}, {"bias": BIAS}), "bias by head, window": ({}, {"bias": BIAS[:2, None, :1], "window": (9, 3)}),
    "bias that empties rows": ({}, {"bias": BIAS.masked_fill(~KEEP[:, :1], -torch.inf)}),
    "bias and masks": ({"n_queries": 20}, {"bias": BIAS[:20], "mask": KEEP[:20], "causal": True, "scale": 0.7}),
    "key lengths": ({}, {"key_lengths": torch.tensor([37, 11])}),
    "no keys counted": ({}, {"key_lengths": torch.tensor([0, 50])}),
    "key lengths, causal, bias": ({}, {"key_lengths": torch.tensor([30, 9]), "causal": True, "bias": BIAS}),
    "head dim 300": ({"dim": 300, "dim_v": 300, "n_queries": 5, "n_keys": 5}, {"causal": True}),
}


@pytest.mark.parametrize("case", CALLS)
def test_default_is_torchs_fused_kernel_and_right(case):
    shape, arguments = CALLS[case]
    recorder = against_reference(qkv(**shape), **arguments)
    times = 0 if "bias" in arguments else 1  # torch's backward loses rows that a bias moves far away
    assert recorder.ops.count(FORWARD) == recorder.ops.count(BACKWARD) == times
    if times == 0:
        with torch.no_grad(), Recorder() as recorder:
            attention(*qkv(**shape), **arguments)
        assert recorder.ops.count(FORWARD) == 1


@pytest.mark.parametrize(("dtype", "tolerance", "times"), [
    (torch.float32, 2e-5, 1), (torch.bfloat16, 4e-2, 1), (torch.float16, 4e-3, 0)], ids=str)
def test_dtypes(dtype, tolerance, times):
    """In fp16 calls that train go by blocks, since the backward of torch's kernel is slow."""
    recorder = against_reference(qkv(dtype=dtype), tolerance, causal=True)
    assert recorder.ops.count(FORWARD) == times


LAYOUTS = {
    "length before heads": lambda n: torch.randn(2, n, 3, 8).transpose(1, 2),
    "head dim before length": lambda n: torch.randn(2, 3, 8, n).transpose(2, 3),
    "every second column": lambda n: torch.randn(2, 3, n, 16)[..., ::2],
    "every second row, from the third": lambda n: torch.randn(2, 3, 2 * n + 2, 8)[:, :, 2::2],
    "expanded batch": lambda n: torch.randn(1, 3, n, 8).expand(2, 3, n, 8),
    "expanded heads": lambda n: torch.randn(2, 1, n, 8).expand(2, 3, n, 8),
    "expanded head dim": lambda n: torch.randn(2, 3, n, 1).expand(2, 3, n, 8),
    "offset 1": lambda n: torch.randn(2 * 3 * n * 8 + 1)[1:].view(2, 3, n, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout):
    inputs = [LAYOUTS[layout](n).requires_grad_() for n in (9, 12, 12)]
    recorder = against_reference(inputs, 1e-5, causal=True)
    assert recorder.ops.count(FORWARD) == 1


def test_empty_rows_are_zero_with_finite_gradients():
    inputs = qkv(30, 12)
    out = attention(*inputs, causal=True)
    assert (out[:, :, :18] == 0).all()
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, :18] == 0).all()
    against_reference(inputs, causal=True)


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window": (3, 1)}], ids=str)
@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scale_that_is_not_positive(scale, arguments):
    against_reference(qkv(11, 11), scale=scale, **arguments)


@pytest.mark.parametrize("arguments", [
    {"softcap": 2.0}, {"softcap": 2.0, "causal": True, "scale": -1.0}, {"return_lse": True}, {"sinks": torch.ones(2)},
    {"alibi_slopes": torch.ones(2)}, {"bias": torch.ones(11, requires_grad=True)},
    {"bias": fused_attn.RelativeBias(torch.ones(2, 21))}, {"mask_mod": fused_attn.document_mask(torch.arange(11) // 4)},
], ids=lambda arguments: ", ".join(arguments))
def test_what_torch_lacks_is_answered_by_blocks(arguments):
    inputs = qkv(11, 11)
    assert explain(*inputs, **arguments).backend == "blocked"
    with fused_attn.strict(), Recorder() as recorder:
        results = attention(*inputs, **arguments)
    assert FORWARD not in recorder.ops
    results, want = (x if isinstance(x, tuple) else (x,) for x in (results, reference_attention(*inputs, **arguments)))
    for a, b in zip(results, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_is_torchs_own():
    """Its rate, and a mean that stays."""
    q, k, v = qkv(11, 11)
    everything = torch.ones_like(v)
    assert not attention(q, k, everything, dropout_p=1.0).any()
    with torch.no_grad():
        torch.manual_seed(0)
        kept = torch.stack([attention(q, k, everything, dropout_p=0.25, causal=True) for _ in range(4000)])
    first = kept[:, :, :, 0]  # of one key, of weight 1: kept and grown, or dropped
    assert set(first.unique().tolist()) == {0.0, 1 / 0.75}
    torch.testing.assert_close(kept.mean(0), torch.ones_like(kept[0]), atol=0.05, rtol=0)
    torch.testing.assert_close((first == 0).double().mean(), torch.tensor(0.25, dtype=torch.float64), atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"causal": True}], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_dropout_of_a_seed_is_torchs_of_that_seed(dtype, arguments, kv_heads, monkeypatch):
    """Value for value, gradients too, and the generator goes on from where torch would leave it."""
    monkeypatch.setattr("fused_attn.run.blocked.dense.ROWS", 16)
    q, k, v = qkv(37, 37, heads=4, kv_heads=kv_heads, dtype=dtype)
    results = []
    for function, named in ((attention, arguments), (torch.nn.functional.scaled_dot_product_attention,
                                                     {"is_causal": "causal" in arguments, "enable_gqa": kv_heads < 4})):
        torch.manual_seed(5)
        out = function(q, k, v, dropout_p=0.3, **named)
        after = torch.rand(3)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v)), after))
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(results[0][-1], results[1][-1])


def test_dropout_is_drawn_again_where_a_checkpoint_repeats_a_call():
    q, k, v = qkv(37, 37)

    def gradients(through):
        torch.manual_seed(5)
        return torch.autograd.grad(through(lambda *x: attention(*x, dropout_p=0.4), q, k, v).sin().sum(), (q, k, v))

    plain = gradients(lambda call, *x: call(*x))
    again = gradients(lambda call, *x: torch.utils.checkpoint.checkpoint(call, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_keys_that_do_not_count_may_be_nan():
    q, k, v = qkv()
    lengths = torch.tensor([37, 11])
    clean = attention(q, k, v, key_lengths=lengths)
    expected = torch.autograd.grad(clean.sin().sum(), (q, k, v))
    with torch.no_grad():
        k[1, :, 11:] = v[1, :, 11:] = torch.nan
    out = attention(q, k, v, key_lengths=lengths)
    for a, b in zip((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))), (clean, *expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window": (3, 1)}], ids=str)
def test_packed_sequences_by_torch_are_one_by_one(arguments):
    q, k, v = (x[0].transpose(0, 1).detach().requires_grad_() for x in qkv(heads=4))
    cu_q, cu_k = torch.tensor([0, 5, 5, 30]), torch.tensor([0, 9, 20, 20])
    with Recorder() as recorder:
        out = attention_varlen(q, k, v, cu_q, cu_k, 25, 11, seqused_k=torch.tensor([7, 11, 0]), backend="torch", **arguments)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
    assert recorder.ops.count(FORWARD) == recorder.ops.count(BACKWARD) == 1  # the others have no queries or no keys
    inner = [x[None, a:b].transpose(1, 2) for x, a, b in ((q, 0, 5), (k, 0, 7), (v, 0, 7))]
    one = reference_attention(*inner, **arguments)[0].transpose(0, 1)
    expected = torch.cat((one, torch.zeros(32, 4, 8)))
    for a, b in zip((out, *grads), (expected, *torch.autograd.grad(expected.sin().sum(), (q, k, v))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [{"n_queries": 0}, {"n_keys": 0}, {"batch": 0}], ids=str)
def test_empty_tensors(shape):
    against_reference(qkv(**shape))


@pytest.mark.parametrize("shape", [{}, {"n_queries": 1}, {"heads": 4}, {"dim": 5, "dim_v": 9}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_not_quadratic(shape, causal):
    inputs = qkv(n_keys=67, **{"n_queries": 67, **shape})
    with Recorder() as recorder, fused_attn.strict():
        torch.autograd.grad(attention(*inputs, causal=causal).sum(), inputs)
    assert recorder.shapes
    pairs = inputs[0].shape[2] * 67
    square = [s for s in recorder.shapes if len(s) >= 2 and s[-2] * s[-1] == pairs and s[-1] == 67]
    assert square == []


@pytest.mark.parametrize("arguments", [{"window": (3, 1)}, {"causal": True}], ids=str)
def test_a_mask_that_torch_needs_is_shared_by_batch_and_heads(arguments):
    # torch's kernel has no window and aligns causality with the first key: both need a mask, one for the whole call.
    inputs = qkv(33, 67, heads=4)
    with Recorder() as recorder:
        attention(*inputs, **arguments)
    assert recorder.ops.count(FORWARD) == 1
    assert all(s[:-2].count(1) == len(s) - 2 for s in recorder.shapes if s[-2:] == (33, 67))


@pytest.mark.few(3)
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window": (4, 1)}, {"softcap": 2.0}, {"scale": -1.0}], ids=str)
def test_compile_without_graph_breaks_at_every_length(arguments):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, **arguments), fullgraph=True, backend=counter)
    compiles = []
    for n_queries, n_keys in ((8, 12), (9, 16), (16, 16), (33, 40), (17, 7)):
        inputs = qkv(n_queries, n_keys)
        out = compiled(*inputs)
        grads = torch.autograd.grad(out.sin().sum(), inputs)
        eager = attention(*inputs, **arguments)
        wanted = torch.autograd.grad(eager.sin().sum(), inputs)
        for a, b in zip((out, *grads), (eager, *wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        compiles.append(counter.frame_count)
    assert compiles[-1] <= 4  # static, dynamic, and where torch is called in another way: as many keys, fewer keys


def test_autocast_like_torch():
    inputs = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs, causal=True)
        expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert [grad.dtype for grad in torch.autograd.grad(out.sum(), inputs)] == [torch.float32] * 3


def test_second_derivatives_of_torchs_kernel_are_no_silent_constants():
    q, k, v = qkv(5, 5)
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.grad(dq.sum(), q)


def test_forward_mode_is_answered_by_blocks():
    q, k, v = (x.detach() for x in qkv(5, 5))
    got, want = (torch.func.jvp(lambda q, b=b: attention(q, k, v, backend=b), (q,), (v,)) for b in (None, "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_importing_and_calling_on_a_cpu_load_no_compiler():
    code = ("import sys, torch, fused_attn; q = torch.randn(1, 1, 4, 8); fused_attn.attention(q, q, q, causal=True)\n"
            "print([name for name in ('triton', 'torch._dynamo', 'fused_attn.run.execution') if name in sys.modules])")
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": root, "FUSED_ATTN_BACKEND": ""})
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
