"""Bugs that were found here, each by a test that fails without its fix."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support.guard import memory_guard
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn
from fused_attn import targets
from fused_attn.call.schema import FORWARD, INSPECTION, Inputs, Pair
from fused_attn.call.spec import AttentionSpec, OtherTensors
from fused_attn.kernels import launch

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).parents[1]


def qkv(n_queries=6, n_keys=6, dim=16, **kwargs):
    return tuple(torch.randn(1, 2, n, dim, **kwargs) for n in (n_queries, n_keys, n_keys))


def loss(*inputs):
    return fused_attn.attention(*inputs, backend="triton").square().sum()


@pytest.mark.parametrize("transform", [
    lambda *x: torch.func.grad(loss, argnums=(0, 1, 2))(*x),
    lambda *x: torch.func.jvp(lambda q: loss(q, *x[1:]), (x[0],), (x[0],))[1],
], ids=["grad", "jvp"])
def test_torch_func_inside_compile_raises_instead_of_giving_zeros(transform):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch.func within torch.compile is not built yet|forward mode"):
        torch.compile(transform, backend="aot_eager", fullgraph=True)(*qkv())


def test_the_raw_op_is_not_a_constant():
    q, k, v = qkv(requires_grad=True)
    out, lse, _ = torch.ops.fused_attn.forward(*FORWARD.flat(Inputs(q, k, v), OtherTensors(), AttentionSpec(0.25)))
    want = fused_attn.attention(q, k, v, scale=0.25, backend="triton", return_lse=True)
    both = [torch.autograd.grad(x.sin().sum() + y.sin().sum(), (q, k, v)) for x, y in ((out, lse), want)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    for name in ("weights", "statistics"):
        with pytest.raises(NotImplementedError, match="no gradients"):
            getattr(torch.ops.fused_attn, name)(*INSPECTION.flat(Pair(q, k), OtherTensors(), AttentionSpec(0.25)))


@pytest.mark.parametrize("arguments", [{"softcap": 5.0}, {"return_lse": True}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_keeps_its_precision_under_autocast(arguments, dtype):
    q, k, v = qkv(40, 40)
    with torch.autocast("cpu", dtype):
        got = fused_attn.attention(q, k, v, **arguments)
    want = fused_attn.attention(q.to(dtype), k.to(dtype), v.to(dtype), **arguments)
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (got, want)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_lse_gradient_of_a_row_without_a_key_does_not_count(poison):
    """logaddexp(-inf, -inf), as in merging two parts by their LSE, sends NaN to such rows."""
    inputs = [x.requires_grad_() for x in qkv(6, 4)]
    dlse = torch.randn(1, 2, 6)
    dlse[:, :, :2] = poison
    gradients = []
    for backend in ("triton", "reference"):
        out, lse = fused_attn.attention(*inputs, causal=True, return_lse=True, backend=backend)
        clean = dlse if backend == "triton" else dlse.masked_fill(lse == -torch.inf, 0)
        gradients.append(torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), clean)))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


def test_counting_launches_may_nest():
    q, k, v = qkv()
    with launch.counted() as outer:
        with launch.counted() as inner:
            fused_attn.attention(q, k, v, backend="triton")
        fused_attn.attention(q, k, v, backend="triton")
    assert outer == {"forward_kernel": 2}
    assert inner == {"forward_kernel": 1}


def test_strict_holds_for_calls_compiled_outside_it():
    torch._dynamo.reset()
    mod = fused_attn.ScoreMod("doubled", reference=lambda score, *_: 2 * score)  # whose statistics no kernel computes
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: fused_attn.attention_stats(q, k, score_mod=mod).entropy, backend="eager",
                             fullgraph=True)
    compiled(q, k, v)
    with fused_attn.strict(), pytest.raises(Exception, match="strict"):
        compiled(q, k, v)
    compiled(q, k, v)


def test_tf32_only_where_triton_has_it():
    with_tf32 = {name for name, target in targets.TARGETS.items() if target.tf32}
    assert with_tf32 == {"gfx942", *(name for name in targets.KNOWN if name.startswith("sm_"))}


def test_cards_without_tiles_are_known():
    assert "gfx90a" in targets.TARGETS
    assert "gfx906" not in targets.TARGETS


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"causal": "no"}, TypeError, "causal: expected a bool; got 'no'"),
    ({"deterministic": "x"}, TypeError, "deterministic: expected a bool or None; got 'x'"),
    ({"strict": "no"}, TypeError, "strict: expected a bool or None; got 'no'"),
    ({"backend": ""}, ValueError, "backend: expected one of"),
], ids=str)
def test_switches_of_the_wrong_type_are_told(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fused_attn.attention(*qkv(), **arguments)


@pytest.mark.parametrize("backend", ["triton", "reference", "torch"])
def test_a_window_wider_than_64_bits_is_no_window(backend):
    q, k, v = qkv(20, 30)
    wide = fused_attn.attention(q, k, v, window=(2**70, 2**63), backend=backend)
    torch.testing.assert_close(wide, fused_attn.attention(q, k, v, backend=backend))


def test_an_empty_list_asks_for_nothing():
    q, k, v = qkv()
    assert torch.equal(fused_attn.attention(q, k, v, mod_args=[]), fused_attn.attention(q, k, v))


@pytest.mark.parametrize("arguments", [
    {"key_lengths": torch.tensor([3, 9, 5, 9])[::2]}, {"key_lengths": torch.tensor([3]).expand(2)},
    {"sinks": torch.linspace(-2, 2, 8)[::2]}, {"sinks": torch.ones(1).expand(4)},
], ids=["key_lengths strided", "key_lengths expanded", "sinks strided", "sinks expanded"])
def test_small_tensors_of_any_stride(arguments):
    q, k, v = torch.randn(2, 4, 5, 16), *(torch.randn(2, 2, 7, 16) for _ in range(2))
    with memory_guard():
        out = fused_attn.attention(q, k, v, backend="triton", **arguments)
    torch.testing.assert_close(out, fused_attn.reference_attention(q, k, v, **arguments))


def test_seqused_of_any_stride():
    x, cu = torch.randn(10, 2, 16), torch.tensor([0, 4, 10], dtype=torch.int32)
    used = torch.tensor([3, 9, 5, 9])[::2]
    with memory_guard():
        out = fused_attn.attention_varlen(x, x, x, cu, cu, 6, 6, seqused_q=used, seqused_k=used, backend="triton")
    torch.testing.assert_close(out[4:9], fused_attn.attention(*[x[4:9].transpose(0, 1)[None]] * 3)[0].transpose(0, 1))
    assert (out[[3, 9]] == 0).all()


def test_mods_of_one_name_are_not_mixed_up():
    """Reference-only mods had their name for a key, which also named the shipped ones."""
    q, k, v = qkv()
    bias = torch.randn(6)
    biased = fused_attn.attention(q, k, v, bias=bias, backend="reference")
    twice, zero = (fused_attn.ScoreMod("bias", reference=lambda s, *_, f=f: s * f) for f in (2, 0))
    assert torch.equal(fused_attn.attention(q, k, v, bias=bias, backend="reference"), biased)
    doubled = fused_attn.attention(q, k, v, score_mod=twice, backend="reference")
    torch.testing.assert_close(doubled, fused_attn.attention(q, k, v, scale=0.5, backend="reference"))
    torch.testing.assert_close(fused_attn.attention(q, k, v, score_mod=zero, backend="reference"), v.mean(2, True).expand_as(v))


@triton.jit
def times(score, q_pos, k_idx, head, batch, args):
    return score * tl.abs(args[0])


@pytest.mark.parametrize(("wanted", "message"), [
    ("q", "times has no slope, which gradients need"), ("k", "times has no slope, which gradients need"),
    ("w", "times has no slope for argument 0, which its gradient needs")])
def test_a_slope_that_is_missing_is_told_and_not_taken_for_1(wanted, message):
    mod = fused_attn.ScoreMod("times", times, None, (), lambda s, q, k, h, b, args: s * args[0].abs())
    tensors = dict(zip("qkv", qkv(), strict=True)) | {"w": torch.full((2, 1, 1), 3.0)}
    call = lambda **more: fused_attn.attention(*(tensors[x] for x in "qkv"), score_mod=mod(tensors["w"]), **more)  # noqa: E731
    expected = call(backend="reference")
    tensors[wanted].requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(call(backend="triton"), expected)
    with pytest.raises(ValueError, match=message):
        call(backend="triton")


def test_explaining_a_call_draws_no_numbers():
    q, k, v = qkv()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fused_attn.explain(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match="triton"):
        fused_attn.attention(q, k, v, dropout_p=0.5, score_mod=fused_attn.ScoreMod("own"), backend="triton")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64], ids=str)
def test_torch_keeps_the_digits_of_a_bias_beside_halves(dtype, bias_dtype):
    q, k, v = (x.to(dtype) for x in qkv(40, 40))
    bias = 100 + torch.randn(40, 40, dtype=bias_dtype)
    exact = fused_attn.reference_attention(q.double(), k.double(), v.double(), bias=bias)
    error = (fused_attn.attention(q, k, v, bias=bias, backend="torch").double() - exact).abs().max()
    assert error < 4 * torch.finfo(dtype).eps


def test_the_lse_of_packed_sequences_may_lose_its_strides():
    """Hooks on saved tensors (offloading, compression) give them back contiguous, while packed rows lie padded."""
    inputs, cu = [torch.randn(10, 2, 16).requires_grad_() for _ in range(3)], torch.tensor([0, 4, 10], dtype=torch.int32)

    def gradients():
        out, lse = fused_attn.attention_varlen(*inputs, cu, cu, 6, 6, return_lse=True, backend="triton")
        return torch.autograd.grad(out.sin().sum() + lse.sin().sum(), inputs)

    plain = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x), \
            memory_guard():
        assert all(torch.equal(x, y) for x, y in zip(gradients(), plain, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_gradients_of_a_relative_bias(heads):
    torch._dynamo.reset()
    inputs = (*qkv(), torch.randn(heads, 11, requires_grad=True))

    def call(q, k, v, values):
        return fused_attn.attention(q, k, v, bias=fused_attn.RelativeBias(values), backend="triton").sin().sum()

    (expected,) = torch.autograd.grad(call(*inputs), inputs[3])
    (grad,) = torch.autograd.grad(torch.compile(call, backend="inductor", fullgraph=True)(*inputs), inputs[3])
    assert grad.stride() == expected.stride()
    torch.testing.assert_close(grad, expected)


def test_packed_sequences_are_traced_without_looking_at_them():
    torch._dynamo.reset()
    x, cu = torch.randn(10, 2, 16), torch.tensor([0, 4, 10], dtype=torch.int32)

    def call(x, cu):
        return fused_attn.attention_varlen(x, x, x, cu, cu, 6, 6, causal=True, backend="triton")

    out = call(x, cu)
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x, cu), out)
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor(x), mode.from_tensor(cu)).stride() == out.stride()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


FORKED = """
import os, signal, threading, torch, fused_attn

torch.set_num_threads(1)
q = torch.randn(1, 2, 150, 16)
want = fused_attn.attention(q, q, q, backend="triton")
stop = threading.Event()

def busy():
    while not stop.is_set():
        fused_attn.attention(q, q, q, backend="triton")

thread = threading.Thread(target=busy)
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(fused_attn.attention(q, q, q, backend="triton"), want) else 1)
    print(os.waitpid(child, 0)[1])
stop.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forks_between_launches():
    """A child that was made while another thread launched would wait for that thread, which it does not have."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"})
    assert (done.returncode, done.stdout.split()) == (0, ["0"] * 5), done.stdout + done.stderr[-2000:]
