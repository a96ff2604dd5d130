"""Bias, ALiBi, KERPLE, T5's bias, sinks and dropout, each against its definition written out."""

import itertools
import math

import pytest
import torch
from support.features import Call, Shape

from fused_attn import RelativeBias, attention, attention_varlen, kerple, t5_bias
from fused_attn.call.spec import TileConfig
from fused_attn.plan import problem

pytestmark = pytest.mark.kernels


NQ, NK = 45, 70  # three tiles of keys in the forward, two of queries in the backward


def qkv(n_queries=NQ, n_keys=NK, heads=2, batch=2, dim=16, dtype=torch.float64):
    """q, k, v and dout."""
    return [torch.randn(batch, heads, n, dim, dtype=dtype) for n in (n_queries, n_keys, n_keys, n_queries)]


def run(q, k, v, dout, *others, **arguments):
    """out, lse, dq, dk, dv and the gradients of ``others``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True, **{"backend": "triton", **arguments})
    return out.detach(), lse.detach(), *torch.autograd.grad(out, [*leaves, *others], dout)


def assert_close(got, want):
    for i, (x, expected) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11, msg=lambda text, i=i: f"result {i}: {text}")


def position(n_queries, n_keys):
    """k - q of every pair, the last query standing at the last key."""
    return torch.arange(n_keys)[None, :] - (torch.arange(n_queries)[:, None] + n_keys - n_queries)


# --- bias ---


@pytest.mark.few(6)
@pytest.mark.parametrize("dims", ["".join(c) for n in range(5) for c in itertools.combinations("bhqk", n)])
def test_biases_of_every_broadcast_shape(dims):
    size = [full if name in dims else 1 for name, full in zip("bhqk", (2, 2, NQ, NK), strict=True)]
    bias = torch.randn(size, dtype=torch.float64, requires_grad=True)
    tensors = qkv()
    got = run(*tensors, bias, bias=bias, causal=True)
    assert_close(got, run(*tensors, bias, bias=bias, causal=True, backend="reference"))
    assert got[-1].shape == bias.shape


@pytest.mark.parametrize("size", [(), (NK,), (NQ, NK), (2, 1, 1)], ids=str)
def test_biases_of_fewer_dimensions(size):
    bias = torch.randn(size, dtype=torch.float64, requires_grad=True)
    tensors = qkv()
    assert_close(run(*tensors, bias, bias=bias), run(*tensors, bias, bias=bias, backend="reference"))


def test_expanded_biases_and_masks_equal_what_they_expand():
    """Stride 0, a transpose and a slice; the gradient sums over what was expanded."""
    tensors = qkv()
    bias, mask = torch.randn(NK, 1, dtype=torch.float64), torch.rand(NK, 2 * NQ) < 0.7
    leaf = bias.clone().requires_grad_()
    mask_view = mask.T[::2]
    got = run(*tensors, leaf, bias=leaf.T.expand(2, 2, NQ, NK), mask=mask_view.expand(2, 2, NQ, NK))
    leaf = bias.T.contiguous().requires_grad_()
    want = run(*tensors, leaf, bias=leaf, mask=mask_view.contiguous())
    for x, expected in zip(got[:5], want[:5], strict=True):
        assert torch.equal(x, expected)
    assert_close(got[5].T[None], want[5][None])


def test_biases_of_minus_infinity():
    """Entries, a whole tile before anything else was seen, and a whole row."""
    tensors = qkv()
    bias = torch.randn(2, 1, NQ, NK, dtype=torch.float64).masked_fill(torch.rand(2, 1, NQ, NK) < 0.3, -torch.inf)
    bias[..., :32] = -torch.inf
    bias[0, :, 5] = -torch.inf
    for dtype in (torch.float64, torch.bfloat16):
        leaf = bias.to(dtype).requires_grad_()
        got = run(*(x.to(dtype) for x in tensors), leaf, bias=leaf)
        assert all(x.isfinite().all() for i, x in enumerate(got) if i != 1)
        assert (got[5][bias == -torch.inf] == 0).all()
        if dtype == torch.float64:
            assert_close(got, run(*tensors, leaf, bias=leaf, backend="reference"))


@pytest.mark.parametrize(("dtype", "bias_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_bias_may_have_a_type_of_its_own(dtype, bias_dtype):
    """So has its gradient: that of an fp32 bias is not rounded to the type of q."""
    bias = torch.randn(NQ, NK).to(bias_dtype).requires_grad_()
    tensors = qkv(dtype=dtype)
    gradient = run(*tensors, bias, bias=bias)[-1]
    wide = bias.detach().double().requires_grad_()
    want = run(*(x.double() for x in tensors), wide, bias=wide, backend="reference")[-1]
    assert gradient.dtype == bias_dtype
    assert float((gradient.double() - want).norm() / want.norm()) < 4e-3  # of O, or of the gradient, in bf16
    assert bool((gradient == gradient.bfloat16()).all()) is (bias_dtype == torch.bfloat16)


@pytest.mark.parametrize("size", [(2,), (2, 2), (2, 1)], ids=str)
def test_a_relative_bias_equals_the_bias_it_stands_for(size):
    values = torch.randn(*size, NQ + NK - 1, dtype=torch.float64, requires_grad=True)
    tensors = qkv()
    index = torch.arange(NK)[None, :] - torch.arange(NQ)[:, None] + NQ - 1
    assert_close(run(*tensors, values, bias=RelativeBias(values), causal=True),
                 run(*tensors, values, bias=values[..., index], causal=True))


def hugging_face_bucket(relative_position, bidirectional, num_buckets, max_distance):
    """T5Attention._relative_position_bucket of Hugging Face's transformers, of memory position - query position."""
    relative_buckets = torch.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        relative_buckets += (relative_position > 0).to(torch.long) * num_buckets
        relative_position = relative_position.abs()
    else:
        relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    max_exact = num_buckets // 2
    is_small = relative_position < max_exact
    if_large = max_exact + (torch.log(relative_position.float() / max_exact) / math.log(max_distance / max_exact)
                            * (num_buckets - max_exact)).to(torch.long)
    if_large = torch.min(if_large, torch.full_like(if_large, num_buckets - 1))
    return relative_buckets + torch.where(is_small, relative_position, if_large)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(70, 70), (70, 93), (93, 70), (1, 400), (300, 300)])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (12, 40)])
def test_t5_buckets_are_hugging_faces(n_queries, n_keys, bidirectional, buckets, farthest):
    table = torch.arange(buckets)[:, None] + torch.tensor([0, 1000])
    values = t5_bias(table.float(), n_queries, n_keys, bidirectional=bidirectional, max_distance=farthest).values
    index = torch.arange(n_keys)[None, :] - torch.arange(n_queries)[:, None] + n_queries - 1
    want = table[hugging_face_bucket(position(n_queries, n_keys), bidirectional, buckets, farthest)].permute(2, 0, 1)
    assert torch.equal(values[..., index].reshape(want.shape).long(), want)


@pytest.mark.few(3)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(45, 70), (70, 45)])
@pytest.mark.parametrize("by_batch", [False, True])
def test_alibi_equals_the_bias_it_stands_for(n_queries, n_keys, by_batch):
    slopes = torch.rand((2, 2) if by_batch else (2,), dtype=torch.float64, requires_grad=True)
    tensors = qkv(n_queries, n_keys)
    bias = -slopes[..., None, None] * position(n_queries, n_keys).abs()
    assert_close(run(*tensors, slopes, alibi_slopes=slopes), run(*tensors, slopes, bias=bias))


@pytest.mark.few(3)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(45, 70), (70, 45)])
@pytest.mark.parametrize("by_batch", [False, True])
def test_kerple_equals_the_bias_it_stands_for(n_queries, n_keys, by_batch):
    """Its gradients by r1 and r2 are those that autograd finds through the formula as it is printed."""
    r1, r2 = (torch.rand((2, 2) if by_batch else (2,), dtype=torch.float64, requires_grad=True) for _ in range(2))
    tensors = qkv(n_queries, n_keys)
    bias = -r1[..., None, None] * torch.log(1 + r2[..., None, None] * position(n_queries, n_keys).abs())
    assert_close(run(*tensors, r1, r2, score_mod=kerple(r1, r2)), run(*tensors, r1, r2, bias=bias))


def test_softcap_comes_before_bias_and_bias_before_masks():
    """A bias far above the cap is not capped, and what a mask or the window leaves out stays out."""
    q, k, v, dout = qkv()
    q = q * 10
    bias = (torch.randn(2, 1, NQ, NK, dtype=torch.float64) * 50).requires_grad_()
    slopes = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, NQ, NK) < 0.7
    got = run(q, k, v, dout, bias, slopes, bias=bias, alibi_slopes=slopes, mask=mask, softcap=2.0, scale=0.7, window=(40, 3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    at = position(NQ, NK)
    scores = 2 * torch.tanh(0.7 * q @ k.mT / 2) + bias - slopes[:, None, None] * at.abs()
    scores = scores.masked_fill(~(mask & (at <= 3) & (at >= -40)), -torch.inf)
    out = torch.softmax(scores, -1) @ v
    assert_close(got, (out, torch.logsumexp(scores, -1), *torch.autograd.grad(out, [*leaves, bias, slopes], dout)))


# --- sinks ---


def test_sinks_are_a_key_without_a_value():
    q, k, v, dout = qkv()
    sinks = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    got = run(q, k, v, dout, sinks, sinks=sinks)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = torch.cat((q @ k.mT / 4, sinks[:, None, None].expand(2, 2, NQ, 1)), -1)
    out = torch.softmax(scores, -1)[..., :-1] @ v
    assert_close(got, (out, torch.logsumexp(scores, -1), *torch.autograd.grad(out, [*leaves, sinks], dout)))


@pytest.mark.parametrize("arguments", [{}, {"causal": True, "precise": True}, {"dropout_p": 0.0, "softcap": 3.0}], ids=str)
def test_sinks_of_minus_infinity_are_no_sinks(arguments):
    tensors = qkv(70, 45, dtype=torch.float32)
    sinks = torch.full((2,), -torch.inf, requires_grad=True)
    *got, dsinks = run(*tensors, sinks, sinks=sinks, **arguments)
    for x, expected in zip(got, run(*tensors, **arguments), strict=True):
        assert torch.equal(x, expected)
    assert (dsinks == 0).all()


@pytest.mark.parametrize("precise", [False, True])
def test_huge_sinks_take_everything_or_nothing(precise):
    tensors = qkv(dtype=torch.bfloat16)
    sinks = torch.tensor([1e4, -1e4], requires_grad=True)
    out, lse, *gradients = run(*tensors, sinks, sinks=sinks, precise=precise)
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == 1e4).all()
    without = run(*tensors, precise=precise)
    for x, expected in zip((out, lse, *gradients), without, strict=False):
        assert torch.equal(x[:, 1], expected[:, 1])
    assert all((x[:, 0] == 0).all() for x in gradients[:3])
    assert (gradients[3] == 0).all()


# --- dropout ---


def weights_kept(n_queries=64, n_keys=96, **arguments):
    """Which weights stay: with V the identity and equal scores, the output shows every weight."""
    q, k = torch.zeros(2, 2, n_queries, 16), torch.zeros(2, 2, n_keys, 16)
    v = torch.eye(n_keys).expand(2, 2, -1, -1)
    return attention(q, k, v, backend="triton", **arguments)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_keep_rate_and_the_mean_of_dropout(p):
    weights = weights_kept(dropout_p=p) * 96
    kept = (weights != 0).double()
    torch.testing.assert_close(weights[weights != 0], torch.full_like(weights[weights != 0], 1 / (1 - p)))
    error = math.sqrt(p * (1 - p))
    for sums in (kept, *kept.flatten(0, 1), kept.sum((0, 1, 2)) / 256, kept.sum((0, 1, 3)) / 384):
        assert abs(float(sums.mean()) - (1 - p)) < 5 * error / math.sqrt(64 * 96)
    assert float((kept.mean((0, 1, 2)) - (1 - p)).abs().max()) < 5 * error / 16, "some key is kept too often"
    assert float((kept.mean((0, 1, 3)) - (1 - p)).abs().max()) < 5 * error / math.sqrt(384), "some query is kept too often"
    centred = (kept - (1 - p)).flatten(0, 1)
    neighbours = centred[:, :, 1:] * centred[:, :, :-1]
    assert abs(float(neighbours.mean())) < 5 * error**2 / math.sqrt(neighbours.numel()), "neighbours agree"
    for a, b in itertools.combinations(centred, 2):
        assert abs(float((a * b).mean())) < 5 * error**2 / math.sqrt(64 * 96), "heads or batch entries agree"


def test_dropout_follows_the_generator():
    torch.manual_seed(3)
    first, second = weights_kept(dropout_p=0.4), weights_kept(dropout_p=0.4)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(weights_kept(dropout_p=0.4), first)
    state = torch.get_rng_state()
    assert torch.equal(weights_kept(dropout_p=0.0), weights_kept())
    assert torch.equal(torch.get_rng_state(), state), "no dropout draws no seed"


def test_dropping_nothing_and_everything():
    tensors = qkv(dtype=torch.float32)
    sinks = torch.zeros(2, requires_grad=True)
    plain = run(*tensors, sinks, sinks=sinks)
    for x, expected in zip(run(*tensors, sinks, sinks=sinks, dropout_p=0.0), plain, strict=True):
        assert torch.equal(x, expected)
    out, lse, *gradients = run(*tensors, sinks, sinks=sinks, dropout_p=1.0)
    assert torch.equal(lse, plain[1])
    assert all((x == 0).all() for x in (out, *gradients))


def test_the_dropout_mask_does_not_depend_on_tiles(monkeypatch):
    results = []
    for block in ((64, 32), (16, 16), (32, 128)):
        monkeypatch.setattr(problem, "choose", lambda *_, block=block: TileConfig(*block, 1, 1))
        torch.manual_seed(0)
        results.append(weights_kept(70, 93, dropout_p=0.3, causal=True) != 0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_backward_drops_what_the_forward_dropped():
    """Seen through dV, with dO the identity."""
    n = 70
    q, k = torch.zeros(2, 2, n, 16), torch.zeros(2, 2, n, 16)
    v = torch.eye(n).expand(2, 2, -1, -1).clone().requires_grad_()
    out = attention(q, k, v, backend="triton", dropout_p=0.3)
    gradient, = torch.autograd.grad(out, v, torch.eye(n).expand(2, 2, -1, -1))
    torch.testing.assert_close(gradient.mT, out.detach(), rtol=1e-5, atol=0)
    assert 0.6 < float((gradient != 0).float().mean()) < 0.8


def test_packed_dropout_is_that_of_the_batch():
    """Sequence s draws what batch entry s draws, whatever its length and place."""
    lengths = (70, 40)
    q, k, v, _ = qkv(70, 70, dtype=torch.float32)
    torch.manual_seed(5)
    dense = attention(q, k, v, dropout_p=0.4, key_lengths=torch.tensor(lengths), backend="triton")
    packed = [torch.cat([x[s, :, :n] for s, n in enumerate(lengths)], 1).transpose(0, 1) for x in (q, k, v)]
    cu = torch.tensor([0, 70, 110], dtype=torch.int32)
    torch.manual_seed(5)
    out = attention_varlen(*packed, cu, cu, 70, 70, dropout_p=0.4, backend="triton")
    for s, n in enumerate(lengths):
        torch.testing.assert_close(out[cu[s] : cu[s + 1]], dense[s, :, :n].transpose(0, 1))


@pytest.mark.few(1)
@pytest.mark.parametrize("names", [("alibi", "bias", "causal", "mask", "sinks", "softcap"),
                                   ("dropout", "packed", "relative", "score_mod", "sinks", "window")], ids="+".join)
def test_multi_query_attention_with_everything(names):
    """One key head under five query heads: the gradients of k and v sum over the group."""
    inputs = Call(names, Shape(heads=5, kv_heads=1)).draw(torch.float64)
    assert inputs.leaves["k"].shape[-3 if inputs.call.shape.layout == "dense" else -2] == 1
    assert_close(inputs.run("triton").values(), inputs.run("reference").values())
