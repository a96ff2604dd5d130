"""Plain functions that once gave wrong numbers, the answer of an older call, or no answer: each with what is right."""

import functools
import operator
import threading

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks

import fused_attn
from fused_attn import ScoreMod, attention, check_mod
from fused_attn.call.functions import expressions, functions, operations
from fused_attn.compat import flash_attn, flex, sageattention, xformers

pytestmark = pytest.mark.kernels

N = 64
SLOPES = torch.tensor([0.25, 0.5], dtype=torch.float64)
BACKENDS = ("triton", "blocked", "reference")
LONG_AGO, IDS = 3, torch.arange(N) // 8


def qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, N, 16, dtype=dtype, generator=generator) for _ in range(3)]


def scaled(factor):
    """Attention whose scores are multiplied by a factor."""
    q, k, v = qkv()
    return torch.softmax(q @ k.mT / 4 * factor, -1) @ v


class Setting:
    def __init__(self, scale):
        self.scale = scale

    def mod(self, score, b, h, q_idx, kv_idx):
        return score * self.scale


class Derived(Setting):
    def mod(self, *args):
        return super().mod(*args)


class Cached(Setting):
    @functools.cached_property
    def mod(self):
        scale = self.scale
        return lambda score, b, h, q_idx, kv_idx: score * scale


class Layer(torch.nn.Module):
    def forward(self, score):
        return score * 1.0


def changed_inside_of_anothers_closure(x):
    numbers = {"W": x}
    mask = and_masks(lambda b, h, q, k: q < N, lambda b, h, q, k: (q - k).abs() < numbers["W"] * 8)

    def want(y):
        q, k, v = qkv()
        outside = (torch.arange(N)[:, None] - torch.arange(N)).abs() >= y * 8
        return torch.softmax((q @ k.mT / 4).masked_fill(outside, -torch.inf), -1) @ v

    return lambda: attention(*qkv(), mask_mod=mask), lambda y: numbers.update(W=y), want


def changed_attribute(x):
    def function(score, *_):
        return score * function.scale

    function.scale = x
    return lambda: attention(*qkv(), score_mod=function), lambda y: setattr(function, "scale", y), scaled


def changed_by_super(x):
    own = Derived(x)
    return lambda: attention(*qkv(), score_mod=own.mod), lambda y: setattr(own, "scale", y), scaled


def changed_cached_property(x):
    settings = [Cached(x)]
    return lambda: attention(*qkv(), score_mod=settings[0].mod), lambda y: settings.__setitem__(0, Cached(y)), scaled


def changed_dict_by_its_method(x):
    numbers = {"scale": x}
    get = numbers.get
    return lambda: attention(*qkv(), score_mod=lambda s, *_: s * get("scale")), lambda y: numbers.update(scale=y), scaled


def changed_by_a_getter(x):
    own, get = Setting(x), operator.attrgetter("scale")
    return lambda: attention(*qkv(), score_mod=lambda s, *_: s * get(own)), lambda y: setattr(own, "scale", y), scaled


def changed_on_a_tensor(x):
    tensor = torch.ones(2, dtype=torch.float64)
    tensor.scale = x
    return (lambda: attention(*qkv(), score_mod=lambda s, b, h, q, k: s * tensor[h] * tensor.scale),
            lambda y: setattr(tensor, "scale", y), scaled)


def changed_by_a_hook(x):
    layer = Layer()
    layer.register_forward_hook(lambda module, args, result: result * x)
    handles = []
    return (lambda: attention(*qkv(), score_mod=lambda s, *_: layer(s)), lambda y: handles.append(
        layer.register_forward_hook(lambda module, args, result: result * (y / x))), scaled)


@pytest.mark.parametrize("make", [
    changed_inside_of_anothers_closure, changed_attribute, changed_by_super, changed_cached_property,
    changed_dict_by_its_method, changed_by_a_getter, changed_on_a_tensor, changed_by_a_hook], ids=lambda make: make.__name__)
def test_what_changed_is_seen(make):
    call, change, want = make(2.0)
    torch.testing.assert_close(call(), want(2.0), rtol=1e-9, atol=1e-9)
    change(3.0)
    torch.testing.assert_close(call(), want(3.0), rtol=1e-9, atol=1e-9)


SMALL = IDS.to(torch.uint8)
CLOSE = torch.tensor([0.1, 0.1 + 1e-10], dtype=torch.float64).repeat(8, 4)  # which fp32 does not tell apart
WITH_GRADIENT = torch.rand(8, 80, dtype=torch.float64, requires_grad=True)
FIFTHS = torch.arange(64, dtype=torch.float64).view(8, 8) / 5 + 0.05
MASKS = {
    "floor of a quotient": (lambda b, h, q, k: torch.floor(q.float() / 41.0) == torch.floor(k.float() / 41.0),
                            lambda q, k: q // 41 == k // 41),
    "true division": (lambda b, h, q, k: torch.floor(q / 47) == torch.floor(k / 47), lambda q, k: q // 47 == k // 47),
    "bytes": (lambda b, h, q, k: ((SMALL[q] - SMALL[k]) <= 1) | (q == k), lambda q, k: (q // 8 - k // 8 <= 1) | (q == k)),
    "digits of fp64": (lambda b, h, q, k: (CLOSE[IDS[q], k % 8] > 0.1) | (q == k), lambda q, k: (k % 2 == 1) | (q == k)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, backend):
    mask, keep = MASKS[name]
    q, k, v = qkv()
    kept = keep(torch.arange(N)[:, None], torch.arange(N))
    want = torch.softmax((q @ k.mT / 4).masked_fill(~kept, -torch.inf), -1) @ v
    torch.testing.assert_close(attention(q, k, v, mask_mod=mask, backend=backend), want, rtol=1e-9, atol=1e-9)


SCORES = {
    "a table by distances": lambda s, b, h, q, k: s + WITH_GRADIENT[
        IDS[q], ((q - k).abs().to(s.dtype) * 0.25).to(torch.int64)],
    "a table by a table": lambda s, b, h, q, k: s + WITH_GRADIENT[IDS[q], (FIFTHS[IDS[q], IDS[k]] * 5).to(torch.int64)],
    "half precision": lambda s, b, h, q, k: s * torch.exp(-(q - k).abs().half() * 0.125) + WITH_GRADIENT[0, k],
}


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    """Values and gradients, of which all backends agree to the digits of fp32."""
    found = []
    for backend in BACKENDS:
        leaves = [x.requires_grad_() for x in qkv()]
        out = attention(*leaves, score_mod=SCORES[name], backend=backend, deterministic=False)
        found.append((out, *torch.autograd.grad(out.sin().sum(), [*leaves, WITH_GRADIENT])))
    for got in found[:2]:
        for x, want in zip(got, found[2], strict=True):
            torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)


def test_an_expression_that_uses_its_parts_often_is_not_written_out():
    """2 ** 40 terms, if it were."""
    def function(score, b, h, q_idx, kv_idx):
        x = score * 0.1
        for _ in range(40):
            x = x * (2.0 - x)
        return x

    x = torch.softmax(scaled_scores(), -1) @ qkv()[2]
    torch.testing.assert_close(attention(*qkv(), score_mod=function), x, rtol=1e-9, atol=1e-9)


def scaled_scores():
    q, k, _ = qkv()
    x = q @ k.mT / 4 * 0.1
    for _ in range(40):
        x = x * (2.0 - x)
    return x


def test_threads_make_one_expression_once():
    made, barrier = [], threading.Barrier(4)

    def make():
        barrier.wait()
        for i in range(2000):
            made.append((i, operations.make("add", expressions.SCORE, expressions.constant(float(i) + 0.123))))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({x for _, x in made}) == 2000


def test_a_mask_made_of_others_anew_leaves_nothing_behind():
    before = len(functions._TRACED)
    for _ in range(5):
        attention(*qkv(), mask_mod=and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 7))
    assert len(functions._TRACED) <= before + 1


def recursive(score, b, h, q_idx, kv_idx):
    return score * 2.0 if recursive is not None else score


def test_a_function_that_names_itself_compiles():
    def call(q, k, v):
        return attention(q, k, v, score_mod=recursive)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv()), scaled(2.0), rtol=1e-9, atol=1e-9)


class WithFn:
    fn = None

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score * 2.0


def test_an_object_with_any_attribute_is_a_function():
    torch.testing.assert_close(attention(*qkv(), score_mod=WithFn()), scaled(2.0), rtol=1e-9, atol=1e-9)


def test_check_mod_sees_what_cancels_in_the_weights():
    """A number added to all scores of a row changes nothing but the LSE; a mod without the score has no slope at all."""
    import triton  # noqa: F401  # jit functions live in a file: those of the kernels serve here

    from fused_attn.kernels.score import add, alibi_distance, one

    reference = lambda s, q, k, h, b, args: s + args[0]  # noqa: E731
    row = torch.rand(1, 2, 40, 1)
    check_mod(ScoreMod("added", add, one, (one,), reference), row)
    with pytest.raises(ValueError, match="added: its slope of argument 0"):
        check_mod(ScoreMod("added", add, one, (alibi_distance,), reference), row)


def test_compatible_names():
    q, k, v = (x.transpose(1, 2) for x in qkv())
    with pytest.raises(TypeError, match=r"'scale'; did you mean sm_scale\?"):
        sageattention.sageattn(q, k, v, scale=3.0)
    with pytest.raises(TypeError, match="attn_mask"):
        sageattention.sageattn(q, k, v, attn_mask=None)
    with pytest.raises(ValueError, match="window_size: expected"):
        flash_attn.flash_attn_func(q, k, v, window_size=4)
    with pytest.raises(TypeError, match="BLOCKSIZE"):
        flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, N, N, BLOCKSIZE=64)
    mask = flex.create_mask(lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), None, None, 5, 5)
    assert torch.equal(mask[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())
    bias = torch.randn(1, N, N, dtype=torch.float64)
    one_head = [x[:, :, 0] for x in (q, k, v)]
    got = xformers.memory_efficient_attention(*one_head, xformers.LowerTriangularMask().add_bias(bias))
    want = fused_attn.attention(*(x[:, None] for x in one_head), bias=bias[:, None], causal=True)[:, 0]
    torch.testing.assert_close(got, want)
    five = torch.randn(1, 6, 2, 1, 8)
    got = xformers.memory_efficient_attention(five.expand(1, 6, 2, 3, 8), five.expand(1, 6, 2, 3, 8),
                                              five.expand(1, 6, 2, 3, 8).contiguous())
    assert got.shape == (1, 6, 2, 3, 8)


@pytest.mark.parametrize(("function", "same"), [
    (lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0), {"softcap": 2.0}),
    (lambda s, b, h, q, k: torch.tanh(s / 2) * 2, {"softcap": 2.0}),
    (lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0) - SLOPES[h] * (q - k).abs(), {"softcap": 2.0, "alibi_slopes": SLOPES}),
], ids=["alone", "the other way round", "with more after it"])
def test_a_softcap_is_attentions_own(function, same):
    """To the bit, and with gradients that cost what those of softcap= cost."""
    q, k, v = qkv()
    told = fused_attn.attention(q, k, v, score_mod=function, backend="blocked")
    assert torch.equal(told, attention(q, k, v, **same, backend="blocked"))


@pytest.mark.parametrize("function", [
    lambda s, b, h, q, k: 2.0 * torch.tanh(s / 3.0), lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0) + s * 0.1,
    lambda s, b, h, q, k: -2.0 * torch.tanh(s / -2.0), lambda s, b, h, q, k: 2.0 * torch.tanh((s + 1) / 2.0)], ids=range(4))
def test_what_is_no_softcap(function):
    q, k, v = qkv()
    want = torch.softmax(function(q @ k.mT / 4, *[0] * 4), -1) @ v
    for arguments in ({"score_mod": function}, {"score_mod": [lambda s, *_: s * 1.0, function]}):
        torch.testing.assert_close(attention(q, k, v, **arguments), want, rtol=1e-9, atol=1e-9)


def test_a_softcap_keeps_its_place():
    """After another function, or after softcap=, it is one more."""
    q, k, v = qkv()
    capped = lambda s, *_: 2.0 * torch.tanh(s / 2.0)  # noqa: E731
    scores = q @ k.mT / 4
    for arguments, changed in (({"score_mod": [lambda s, *_: s * 3.0, capped]}, capped(scores * 3.0)),
                               ({"softcap": 5.0, "score_mod": capped}, capped(5 * torch.tanh(scores / 5))),
                               ({"score_mod": [capped, lambda s, *_: s * 3.0]}, capped(scores) * 3.0)):
        torch.testing.assert_close(attention(q, k, v, **arguments), torch.softmax(changed, -1) @ v, rtol=1e-9, atol=1e-9)
