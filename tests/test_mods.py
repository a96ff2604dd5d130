"""Custom score and mask functions: their derivatives and arguments, and what is told where one lacks something."""

import contextlib
import copy
import gc
import types
import weakref

import pytest
import torch
import triton
import triton.language as tl
from support.mods import COMB, NEAR, comb, near

import fused_attn
from fused_attn import MaskMod, ScoreMod, attention
from fused_attn.call import mods
from fused_attn.kernels.score import one

pytestmark = pytest.mark.kernels


def qkv(n_queries=70, n_keys=90, dtype=torch.float64):
    return [torch.randn(1, 2, n, 16, dtype=dtype) for n in (n_queries, n_keys, n_keys)]


def run(q, k, v, *others, backend="triton", **arguments):
    """out, dq, dk, dv and the gradients of ``others``, of a loss that weighs every element by another number."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, backend=backend, **arguments)
    dout = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return out.detach(), *torch.autograd.grad(out, [*leaves, *others], dout)


def check(*others, **arguments):
    tensors = qkv()
    got = run(*tensors, *others, **arguments)
    for i, (x, expected) in enumerate(zip(got, run(*tensors, *others, backend="reference", **arguments), strict=True)):
        torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11, msg=lambda text, i=i: f"result {i}: {text}")
    return got


# --- derivatives ---


@triton.jit
def curved(score, q_pos, k_idx, head, batch, args):
    return args[0] * score * tl.abs(score) + args[1] * (head + 1) - args[2] * batch


@triton.jit
def curved_slope(score, modded, q_pos, k_idx, head, batch, args):
    return 2.0 * args[0] * tl.abs(score)


@triton.jit
def curved_gain(score, modded, q_pos, k_idx, head, batch, args):
    return score * tl.abs(score)


CURVED = ScoreMod("curved", curved, curved_slope, (curved_gain, one, None),
                  reference=lambda s, q, k, h, b, args: args[0] * s * s.abs() + args[1] * (h + 1) - args[2] * b)
# The derivative by the second argument is head + 1, not 1: a mod that lies, so that the test below can see it.


@triton.jit
def head_slope(score, modded, q_pos, k_idx, head, batch, args):
    return tl.zeros_like(score) + (head + 1)


HONEST = ScoreMod("curved", curved, curved_slope, (curved_gain, head_slope, None), reference=CURVED.reference)


@pytest.mark.few(2)
@pytest.mark.parametrize(("shape", "more"), [
    ((), {}), ((1, 2, 70, 90), {}), ((1, 1, 70, 1), {"causal": True, "softcap": 2.0}),
    ((2, 1, 1), {"mask_mod": COMB(torch.ones(1, 1, 1, 90, dtype=torch.int32), 3)}),
    ((90,), {"alibi_slopes": torch.tensor([0.1, 0.2]), "scale": -0.3}),
], ids=lambda x: str(x) if isinstance(x, tuple) else "+".join(x))
def test_a_curved_score_mod(shape, more):
    """Slopes that depend on the score, and gradients of two arguments of any shape, in the right order."""
    gain = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    shift = torch.rand(1, 1, 90, dtype=torch.float64, requires_grad=True)
    check(gain, shift, score_mod=HONEST(gain, shift, 3), **more)


def test_a_wrong_slope_shows():
    gain, shift = (torch.rand(size, dtype=torch.float64, requires_grad=True) for size in ((2, 1, 1), (1, 1, 90)))
    with pytest.raises(AssertionError, match="result 5"):
        check(gain, shift, score_mod=CURVED(gain, shift, 3))


@pytest.mark.few(4)
@pytest.mark.parametrize("number", [1, -3, 0.1, -0.25, 1e-9, 2.0**70, 2**40, True])
def test_numbers_as_arguments(number):
    weight = torch.rand(2, 1, 1, dtype=torch.float64)
    if number is True:
        with pytest.raises(TypeError, match="score_mod: expected argument 1 to be a tensor or a number; got True"):
            check(score_mod=NEAR(weight, number))
        return
    q, k, v = qkv()
    q = q / max(1.0, abs(number))  # scores stay where a weight is not all or nothing
    got, want = (run(q, k, v, score_mod=NEAR(weight, number), backend=backend) for backend in ("triton", "reference"))
    for x, expected in zip(got, want, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11 * max(1.0, abs(number)))


def test_arguments_may_come_beside_the_mod():
    weight = torch.rand(2, 1, 1, dtype=torch.float64)
    tensors = qkv()
    beside = run(*tensors, score_mod=NEAR, mod_args=(weight, 0.5))
    for x, bound in zip(beside, run(*tensors, score_mod=NEAR(weight, 0.5)), strict=True):
        assert torch.equal(x, bound)


def test_strided_and_shared_arguments():
    """One tensor as both arguments of a mod, transposed and expanded."""
    both = torch.rand(90, 70, dtype=torch.float64, requires_grad=True)
    check(both, score_mod=HONEST(both.T, both.T.expand(2, 70, 90), 1))


# --- mods that share something ---


def test_two_mods_of_one_name_keep_their_own_references():
    mods = [ScoreMod("same", reference=lambda s, q, k, h, b, args, n=n: s * n) for n in (1.0, 0.0)]
    q, k, v = qkv()
    plain = attention(q, k, v, backend="reference")
    assert torch.equal(attention(q, k, v, score_mod=mods[0], backend="reference"), plain)
    assert not torch.equal(attention(q, k, v, score_mod=mods[1], backend="reference"), plain)


@triton.jit
def stripes(q_pos, k_idx, head, batch, args):
    return (k_idx + head) % args[0] != 0


def test_two_mods_of_one_function_keep_their_own_settings():
    """A function that differs by head, once told so and once not, and without a reference: the first must not change."""
    by_head = MaskMod("stripes", stripes, by_head=True, reference=lambda q, k, h, b, args: (k + h) % args[0] != 0)
    tensors = qkv()
    want = attention(*tensors, mask_mod=by_head(3), backend="reference")
    MaskMod("stripes", stripes)
    for backend in ("triton", "reference"):
        torch.testing.assert_close(attention(*tensors, mask_mod=by_head(3), backend=backend), want)


def test_a_custom_mod_may_have_the_name_of_a_shipped_one():
    own = ScoreMod("bias", reference=lambda s, q, k, h, b, args: s * 0)
    bias = torch.randn(70, 90, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv()
    want = torch.softmax(q @ k.mT / 4 + bias, -1) @ v
    for backend in ("triton", "reference"):
        torch.testing.assert_close(attention(q, k, v, bias=bias, backend=backend), want)
    both = attention(q, k, v, bias=bias, score_mod=own, backend="reference")
    torch.testing.assert_close(both, (torch.softmax(bias, -1) @ v).expand_as(both))


def test_any_word_is_a_name():
    """Names travel as text, with the arguments behind them."""
    weight = torch.rand(2, 1, 1, dtype=torch.float64, requires_grad=True)
    mod = ScoreMod("ünicode_2", near, NEAR.slope, NEAR.arg_slopes, reference=NEAR.reference)
    check(weight, score_mod=mod(weight, 0.5), alibi_slopes=torch.tensor([0.1, 0.2]))
    for name in ("a:b", "a;b", "a,b", "two words", "", None):
        for kind, function in ((ScoreMod, near), (MaskMod, comb)):
            with pytest.raises(ValueError, match="name: expected a word"):
                kind(name, function)


# --- how long a mod lives, and what it is known by ---


FACTOR = tl.constexpr(1.0)


def times_factor(score, q_pos, k_idx, head, batch, args):
    return score * FACTOR


def factor_alone(score, modded, q_pos, k_idx, head, batch, args):
    return score * 0 + FACTOR


def scaled_by(factor, *, captured=None):
    """A mod made anew, of functions with a FACTOR of their own and a reference that captures a tensor."""
    own = {**globals(), "FACTOR": tl.constexpr(factor)}
    functions = [triton.jit(types.FunctionType(f.__code__, own, f.__name__)) for f in (times_factor, factor_alone)]
    return ScoreMod("scaled", *functions, reference=lambda s, q, k, h, b, args: s * (factor + 0 * captured.sum()))


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_mod_made_for_a_call_goes_with_it(grad, backend):
    q, k, v = (x.requires_grad_(grad) for x in qkv(9, 9))
    captured = torch.zeros(1000, dtype=torch.float64)
    mod = scaled_by(1.5, captured=captured)
    alive = weakref.ref(mod), weakref.ref(captured)
    out = attention(q, k, v, score_mod=mod, backend=backend)
    del mod, captured
    gc.collect()
    if grad:  # the graph refers to it
        want = torch.autograd.grad(attention(q, k, v, scale=0.25 * 1.5, backend="reference").sum(), q)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), q), want)
    del out
    gc.collect()
    assert [x() for x in alive] == [None, None]


def test_mods_made_for_every_call_leave_nothing():
    q, k, v = qkv(4, 4)
    before = len(mods._ALIVE)
    for i in range(40):
        attention(q, k, v, backend="reference", score_mod=ScoreMod("own", reference=lambda s, *_, i=i: s * i))
        own = MaskMod("own", stripes, reference=lambda q, k, h, b, args, i=i: k >= i)
        attention(q, k, v, backend="reference", mask_mod=own(2))
    gc.collect()
    assert len(mods._ALIVE) <= before + 1


def test_what_a_function_is_names_it():
    """Its code and what it captures, whenever it was made; nothing that it captures goes unseen."""
    keys = [scaled_by(factor).code.key for factor in (1.5, 1.5, 2.5, 1.5)]
    assert keys[0] == keys[1] == keys[3] != keys[2]
    assert MaskMod("stripes", stripes).code != MaskMod("stripes", stripes, by_head=True).code
    assert ScoreMod("near", near).code != ScoreMod("near", near, NEAR.slope).code
    mods = [ScoreMod("same", reference=lambda s, *_: s).code for _ in range(2)]
    assert mods[0] != mods[1], "nothing tells what a reference computes"


def test_functions_of_one_source_and_other_values_do_not_meet():
    q, k, v = qkv(9, 9)
    made = [scaled_by(factor, captured=torch.zeros(1)) for factor in (0.5, 3.0)]
    for watched in (contextlib.nullcontext(), torch.profiler.profile()):  # past the ops, and through them
        with watched:
            for mod, factor in zip(made, (0.5, 3.0), strict=True):
                want = attention(q, k, v, scale=0.25 * factor, backend="reference")
                torch.testing.assert_close(attention(q, k, v, score_mod=mod, backend="triton"), want)


def test_a_graph_that_knows_a_mod_by_name():
    """As long as graphs are few; one that was never made here says what is missing."""
    q, k, v = qkv(9, 9)
    program = torch.export.export(Scaled(scaled_by(1.5, captured=torch.zeros(1))), (q, k, v))
    gc.collect()
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v, scale=0.25 * 1.5, backend="reference"))
    with pytest.raises(LookupError, match="near_0123456789abcdef: no ScoreMod or MaskMod of this code is alive"):
        mods.named("near_0123456789abcdef", "")


class Scaled(torch.nn.Module):
    def __init__(self, mod):
        super().__init__()
        self.mod = mod

    def forward(self, q, k, v):
        return attention(q, k, v, score_mod=self.mod, backend="triton")


def test_copies_of_mods_are_what_they_copy():
    for bound in (fused_attn.document_mask(torch.arange(9)), scaled_by(2.0)()):
        assert copy.deepcopy(bound).mod.code == bound.mod.code


# --- what is missing is told ---


def test_a_missing_function_is_told():
    mod = ScoreMod("idea", reference=lambda s, q, k, h, b, args: s)
    mask = MaskMod("idea", reference=lambda q, k, h, b, args: k >= 0)
    for arguments in ({"score_mod": mod}, {"mask_mod": mask}):
        with pytest.raises(ValueError, match="idea has no jit function"):
            attention(*qkv(), backend="triton", **arguments)
        assert attention(*qkv(), **arguments).isfinite().all(), "the reference runs it"


def test_a_missing_reference_is_told():
    weight, marks = torch.rand(2, 1, 1), torch.ones(90, dtype=torch.int32)
    for arguments in ({"score_mod": ScoreMod("lone", near)(weight, 1)}, {"mask_mod": MaskMod("lone", comb)(marks, 3)}):
        assert attention(*qkv(), backend="triton", **arguments).isfinite().all()
        with pytest.raises(ValueError, match="plain PyTorch reference"):
            attention(*qkv(), backend="reference", **arguments)


def test_a_missing_slope_is_told_where_a_gradient_is_wanted():
    mod = ScoreMod("near", near, reference=NEAR.reference)
    weight = torch.rand(2, 1, 1, dtype=torch.float64)
    tensors = qkv()
    torch.testing.assert_close(attention(*tensors, score_mod=mod(weight, 0.5), backend="triton"),
                               attention(*tensors, score_mod=mod(weight, 0.5), backend="reference"))
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"near.*slope|slope.*near"):
        run(*tensors, score_mod=mod(weight, 0.5))


@pytest.mark.parametrize("arg_slopes", [(), (None, None)], ids=str)
def test_a_missing_slope_of_an_argument_is_told_where_its_gradient_is_wanted(arg_slopes):
    mod = ScoreMod("near", near, NEAR.slope, arg_slopes, reference=NEAR.reference)
    weight = torch.rand(2, 1, 1, dtype=torch.float64)
    check(score_mod=mod(weight, 0.5))  # nobody asked for it
    weight.requires_grad_()
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"near.*slope|slope.*near"):
        run(*qkv(), weight, score_mod=mod(weight, 0.5))


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"score_mod": COMB}, TypeError, "score_mod: expected a fused_attn.ScoreMod"),
    ({"mask_mod": NEAR}, TypeError, "mask_mod: expected a fused_attn.MaskMod"),
    ({"score_mod": curved}, TypeError, "score_mod: expected a fused_attn.ScoreMod"),  # a jit function by itself
    ({"score_mod": NEAR("1", 2)}, TypeError, "score_mod: expected argument 0 to be a tensor or a number"),
    ({"score_mod": NEAR(torch.rand(2, 1, 1), float("inf"))}, ValueError, "score_mod: expected argument 1 to be finite"),
    ({"score_mod": NEAR(torch.rand(3, 1, 1), 2)}, ValueError, "argument 0.*: expected a shape that broadcasts to"),
    ({"score_mod": NEAR(torch.rand(1, 1, 2, 1, 1), 2)}, ValueError, "argument 0.*: expected a shape that broadcasts to"),
    ({"score_mod": NEAR(torch.rand(2, 1, 1).cfloat(), 2)}, TypeError, "argument 0.*: expected a float tensor"),
    ({"mod_args": (1,)}, ValueError, "mod_args: expected none without"),
    ({"mask": torch.rand(70, 90)}, TypeError, "mask: expected a bool tensor"),
    ({"mask": torch.ones(90, 70, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts to"),
    ({"bias": torch.ones(70, 90, dtype=torch.bool)}, TypeError, "bias: expected a float tensor"),
    ({"bias": fused_attn.RelativeBias(torch.rand(2, 160))}, ValueError, "bias: expected RelativeBias values"),
    ({"alibi_slopes": torch.rand(3)}, ValueError, "alibi_slopes: expected shape"),
    ({"sinks": torch.rand(2, 1)}, ValueError, "sinks: expected shape"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a float from 0 to 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a float from 0 to 1"),
    ({"key_lengths": torch.tensor([70.0])}, TypeError, "key_lengths: expected an int32 or int64 tensor"),
    ({"key_lengths": torch.tensor([70, 70])}, ValueError, "key_lengths: expected shape"),
], ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_arguments_that_do_not_fit_are_told(arguments, error, message):
    for backend in ("triton", "reference", None):
        with pytest.raises(error, match=message):
            attention(*qkv(), backend=backend, **arguments)
