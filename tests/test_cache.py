"""Generation from caches is the whole prefix computed again: token by token, in chunks, from prompts of several lengths."""

import itertools

import pytest
import torch
from support.caches import close, normal
from torch import nn
from torch.nn import functional

from fused_attn import attention, settings
from fused_attn.nn import (
    DecoderCache,
    KVCache,
    MemoryCache,
    MultiheadAttention,
    RotaryEmbedding,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

EMBED, HEADS, LENGTH = 32, 4, 8
OPTIONS = {
    "none": {}, "window": {"window": (3, 0)}, "alibi": {"alibi": True}, "rope": {"rope": RotaryEmbedding(8)},
    "sinks": {"sinks": True}, "softcap": {"softcap": 1.5}, "groups": {"num_kv_heads": 2},
    "together": {"window": (4, 0), "alibi": True, "rope": RotaryEmbedding(4, interleaved=True), "sinks": True, "softcap": 3.0,
                 "num_kv_heads": 1},
}
SPLITS = {"tokens": [1] * LENGTH, "prompt, tokens": [5, 1, 1, 1], "chunks": [2, 3, 1, 2]}
CAPACITIES = pytest.mark.parametrize("capacity", [None, 20], ids=["growing", "static"])


def on_the_kernels(option, capacity):
    slow = () if (option, capacity) == ("together", None) else (pytest.mark.slow,)
    return pytest.param("triton", option, capacity, marks=(pytest.mark.kernels, *slow))


# Every option by torch and the reference, and some on the kernels.
EVERY = list(itertools.product(OPTIONS, (None, 20)))
CASES = pytest.mark.parametrize(("backend", "option", "capacity"), [
    *((None, *case) for case in EVERY), *(on_the_kernels(*case) for case in EVERY)], indirect=["backend"])


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    """The default backend, and no gradients."""
    monkeypatch.setattr(settings, "BACKEND", getattr(request, "param", None))
    with torch.no_grad():
        yield


def made(cls=TransformerEncoder, **options):
    """Two causal layers and a norm with random weights, in evaluation."""
    layer = {TransformerEncoder: TransformerEncoderLayer, TransformerDecoder: TransformerDecoderLayer}[cls]
    model = cls(layer(EMBED, HEADS, 16, batch_first=True, dtype=torch.float64, causal=True, **options), 2,
                nn.LayerNorm(EMBED, dtype=torch.float64)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def generated(model, x, splits, cache, *memory, **arguments):
    """What the model gives for x [B, N, E], handed over in parts."""
    return torch.cat([model(part, *memory, cache=cache, **arguments) for part in x.split(splits, 1)], 1)


# --- sequences of one length ---


@pytest.mark.few(1)
@pytest.mark.parametrize("splits", SPLITS)
@CASES
def test_even_sequences(backend, option, capacity, splits):
    model, x = made(**OPTIONS[option]), normal(2, LENGTH, EMBED)
    cache = model.new_cache(capacity)
    close(generated(model, x, SPLITS[splits], cache), model(x))
    assert [(one.length, one.lengths.tolist()) for one in cache] == [(LENGTH, [LENGTH] * 2)] * 2


def test_sequence_first():
    layer = TransformerEncoderLayer(EMBED, HEADS, 16, dtype=torch.float64, causal=True, rope=RotaryEmbedding(8)).eval()
    x, cache = normal(LENGTH, 2, EMBED), KVCache()
    close(torch.cat([layer(part, cache=cache) for part in x.split([4, 1, 3])]), layer(x))


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_of_both_kinds_of_norm(norm_first):
    layers = [cls(EMBED, HEADS, 16, batch_first=True, norm_first=norm_first, dtype=torch.float64, causal=True).eval()
              for cls in (TransformerEncoderLayer, TransformerDecoderLayer)]
    x, memory = normal(2, 5, EMBED), normal(2, 3, EMBED)
    close(generated(layers[0], x, 2, KVCache()), layers[0](x))
    close(generated(layers[1], x, 2, DecoderCache(KVCache(), MemoryCache()), memory), layers[1](x, memory))


# --- sequences of several lengths ---

ROUNDS = [[3, 7, 0, 1], [1, 1, 1, 1], [2, 0, 4, 3], [1, 1, 1, 1], [1, 1, 1, 1]]  # new tokens of each sequence


def ragged(model, sequences, cache, *memory, **arguments):
    """The outputs of each sequence, handed over in ``ROUNDS``, padded on the right."""
    outs, at = [[] for _ in sequences], [0] * len(sequences)
    for counts in ROUNDS:
        new = [x[a : a + n] for x, a, n in zip(sequences, at, counts, strict=True)]
        x = nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=7.0)
        padding = torch.arange(x.shape[1]) >= torch.tensor(counts)[:, None]
        name = "tgt_key_padding_mask" if memory else "src_key_padding_mask"
        given = {name: padding} if padding.any() else {}
        out = model(x, *memory, cache=cache, **given, **arguments)
        assert out.isfinite().all()
        for one, row, n in zip(outs, out, counts, strict=True):
            one.append(row[:n])
        at = [a + n for a, n in zip(at, counts, strict=True)]
    return [torch.cat(one) for one in outs]


@CASES
def test_ragged_sequences(backend, option, capacity):
    model, lengths = made(**OPTIONS[option]), torch.tensor(ROUNDS).sum(0).tolist()
    sequences, cache = [normal(n, EMBED) for n in lengths], model.new_cache(capacity)
    for out, x in zip(ragged(model, sequences, cache), sequences, strict=True):
        close(out, model(x[None])[0])
    assert all(one.lengths.tolist() == lengths for one in cache)


def test_positions_of_the_next_tokens():
    cache, x = KVCache(), normal(2, 1, 4, 8)
    assert cache.positions(3) == 0
    cache.append(x, x)
    assert cache.positions(3) == 4
    cache.append(x, x, torch.tensor([1, 3]))
    assert cache.positions(2).tolist() == [[5, 6], [7, 8]]


# --- decoders ---


@CASES
def test_decoder(backend, option, capacity, monkeypatch):
    """The memory is projected by the first call, and never looked at again."""
    model, x, memory = made(TransformerDecoder, **OPTIONS[option]), normal(2, LENGTH, EMBED), normal(2, 6, EMBED)
    padding = torch.arange(6) >= torch.tensor([[6], [2]])
    expected = model(x, memory, memory_key_padding_mask=padding)
    sizes, linear = [], functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, *rest: sizes.append(x.shape) or linear(x, *rest))
    cache, outs = model.new_cache(capacity), []
    for part in x.split([5, 1, 1, 1], 1):
        outs.append(model(part, memory, memory_key_padding_mask=padding, cache=cache))
        memory = torch.full_like(memory, torch.nan)
    close(torch.cat(outs, 1), expected)
    assert sizes.count(memory.shape) == 2  # once for each of two layers: keys and values in one product


def test_decoder_of_ragged_sequences():
    model = made(TransformerDecoder, rope=RotaryEmbedding(8))
    sequences, memory = [normal(n, EMBED) for n in torch.tensor(ROUNDS).sum(0).tolist()], normal(4, 6, EMBED)
    outs = ragged(model, sequences, model.new_cache(), memory)
    for i, x in enumerate(sequences):
        close(outs[i], model(x[None], memory[i : i + 1])[0])


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True},
                                     {"kdim": 20, "vdim": 12, "num_kv_heads": 2}], ids=str)
def test_memory_cache(options):
    module = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    x, k, v = normal(2, 5, EMBED), normal(2, 6, module.kdim), normal(2, 6, module.vdim)
    v = v if "kdim" in options else k
    given = {"key_padding_mask": torch.arange(6) >= torch.tensor([[6], [2]]), "attn_mask": torch.ones(5, 6).triu(3).bool()}
    expected, cache = module(x, k, v, **given), MemoryCache()
    other = torch.full_like(k, torch.nan)
    for key in (k, other, other):
        close(module(x, key, v if key is k else torch.full_like(v, torch.nan), **given, cache=cache), expected)
    cache.reorder(torch.tensor([1, 0]))
    flipped = {**given, "key_padding_mask": given["key_padding_mask"].flip(0)}
    close(module(x.flip(0), other, torch.full_like(v, torch.nan), **flipped, cache=cache), tuple(y.flip(0) for y in expected))
    cache.clear()
    assert module(x, other, other if v is k else v, **given, cache=cache)[0].isnan().any()  # the next memory


# --- memory ---


def test_growth_keeps_what_is_there():
    """From 64 rows by doubling; what was written stays, to the bit."""
    cache, k, v = KVCache(), normal(2, 3, 200, 8), normal(2, 3, 200, 4)
    rows, at = [], 0
    for n in (1, 63, 1, 60, 75):
        cache.append(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
        rows.append(cache.k.shape[1])
        assert torch.equal(cache.k[:, :at].transpose(1, 2), k[:, :, :at])
        assert torch.equal(cache.v[:, :at].transpose(1, 2), v[:, :, :at])
        assert not cache.k[:, at:].any()  # no NaN where a kernel may look
    assert rows == [64, 64, 128, 128, 256]
    q = normal(2, 6, 5, 8)
    close(cache.attend(q), attention(q, k, v, causal=True))
    assert repr(cache) == "KVCache(length=200, rows=256, capacity=None)"


def test_ragged_growth_keeps_what_is_there():
    cache, k = KVCache(), normal(2, 3, 100, 8)
    cache.append(k[:, :, :60], k[:, :, :60], torch.tensor([60, 2]))
    cache.append(k[:, :, 60:], k[:, :, 60:])
    assert torch.equal(cache.k[0, :100].transpose(0, 1), k[0])
    assert torch.equal(cache.k[1, :42].transpose(0, 1), torch.cat((k[1, :, :2], k[1, :, 60:]), 1))


def places(cache):
    return [x.data_ptr() for x in (cache.k, cache.v, cache.lengths)]


def test_static_memory_ends():
    model, x = made(rope=RotaryEmbedding(8)), normal(2, 9, EMBED)
    cache = model.new_cache(8)
    expected = model(x)
    close(model(x[:, :5], cache=cache), expected[:, :5])
    before = [places(one) for one in cache]
    with pytest.raises(ValueError, match="KVCache: expected at most 8 tokens, its capacity; got 9"):
        model(x[:, 5:], cache=cache)
    close(model(x[:, 5:8], cache=cache), expected[:, 5:8])  # the refused ones left nothing behind
    assert [places(one) for one in cache] == before
    assert repr(cache[0]) == "KVCache(length=8, rows=8, capacity=8)"
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="capacity: expected a positive int or None"):
            KVCache(bad)


@pytest.mark.parametrize("step", [lambda cache: cache.truncate(2), lambda cache: cache.reorder(torch.tensor([1, 0]))],
                         ids=["truncate", "reorder"])
def test_static_memory_stays(step):
    """A captured CUDA graph goes on reading where it read."""
    cache, x = KVCache(capacity=9), normal(2, 1, 4, 8)
    cache.append(x, x)
    before = places(cache)
    step(cache)
    assert places(cache) == before


def test_inference_mode():
    model, x = made(rope=RotaryEmbedding(8), sinks=True), normal(2, LENGTH, EMBED)
    with torch.inference_mode():
        out = generated(model, x, [3, 1, 1, 3], model.new_cache())
    close(out.clone(), model(x))


# --- taking back, choosing, forgetting ---


@CAPACITIES
@pytest.mark.parametrize("counts", [None, [6, 3]], ids=["even", "ragged"])
def test_truncate(counts, capacity):
    """What was only tried is taken back, and other tokens follow."""
    model, tried, x = made(rope=RotaryEmbedding(8), window=(6, 0)), normal(2, 6, EMBED), normal(2, 5, EMBED)
    cache = model.new_cache(capacity)
    given = {} if counts is None else {"src_key_padding_mask": torch.arange(6) >= torch.tensor(counts)[:, None]}
    model(tried, cache=cache, **given)
    for one in cache:
        one.truncate(4)
        assert (one.length, one.lengths.tolist()) == (4, [min(n, 4) for n in counts or [6, 6]])
    out = generated(model, x, [1, 3, 1], cache)
    for i, n in enumerate(counts or [6, 6]):
        close(out[i], model(torch.cat((tried[i, : min(n, 4)], x[i]))[None])[0, -5:])
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=f"length: expected 0 to 9; got {bad}"):
            cache[0].truncate(bad)


@CAPACITIES
@pytest.mark.parametrize("counts", [None, [6, 3]], ids=["even", "ragged"])
def test_reorder(counts, capacity):
    """A step of a beam search: one sequence twice, the other once, with the memories they belong to."""
    model, index = made(TransformerDecoder, rope=RotaryEmbedding(8)), torch.tensor([1, 0, 1])
    prompt, memory, x = normal(2, 6, EMBED), normal(2, 5, EMBED), normal(3, 4, EMBED)
    cache = model.new_cache(capacity)
    given = {} if counts is None else {"tgt_key_padding_mask": torch.arange(6) >= torch.tensor(counts)[:, None]}
    model(prompt, memory, cache=cache, **given)
    for one in cache:
        one.reorder(index)
    out = generated(model, x, [1, 2, 1], cache, memory[index])
    for i, j in enumerate(index.tolist()):
        whole = torch.cat((prompt[j, : (counts or [6, 6])[j]], x[i]))[None]
        close(out[i], model(whole, memory[j : j + 1])[0, -4:])


def test_clear():
    model, cache = made(), KVCache()
    layer = model.layers[0]
    layer(normal(2, 3, EMBED), src_key_padding_mask=torch.tensor([[False] * 3, [False, True, True]]), cache=cache)
    cache.clear()
    cache.reorder(torch.tensor([0]))  # nothing to reorder
    cache.truncate(0)
    assert (cache.length, cache.lengths, cache.k, cache.positions(1)) == (0, None, None, 0)
    x = normal(3, 5, EMBED)  # another batch
    close(generated(layer, x, 2, cache), layer(x))


# --- errors ---


def test_gradients_and_training_are_refused():
    layer, x = made().layers[0], normal(2, 3, EMBED)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="KVCache: expected tensors without gradients"):
        layer(x, cache=KVCache())
    with pytest.raises(ValueError, match=r"^cache: .*eval\(\)"):
        layer.train()(x, cache=KVCache())


X = torch.zeros(2, 3, EMBED, dtype=torch.float64)
PADDING = torch.zeros(2, 3, dtype=torch.bool)
BAD_CALLS = {  # error, what it says, options, arguments
    "weights": (ValueError, "cache: .*need_weights=False", {}, (X, X, X), {"need_weights": True}),
    "mask": (ValueError, "cache: .*attn_mask", {}, (X, X, X), {"attn_mask": torch.zeros(3, 3)}),
    "learned keys": (ValueError, "cache: .*add_bias_kv", {"add_bias_kv": True}, (X, X, X), {}),
    "zero keys": (ValueError, "cache: .*add_zero_attn", {"add_zero_attn": True}, (X, X, X), {}),
    "cross-attention": (ValueError, "cache: .*self-attention.*MemoryCache", {}, (X, X + 1, X + 1), {}),
    "unbatched": (ValueError, "cache: expected batched", {}, (X[0],) * 3, {}),
    "float padding": (TypeError, "key_padding_mask: expected bool", {}, (X, X, X), {"key_padding_mask": PADDING.double()}),
    "padding of other tokens": (Exception, "key_padd", {}, (X, X, X), {"key_padding_mask": PADDING[:, :2]}),
    "padding of another batch": (Exception, "key_padd", {}, (X, X, X), {"key_padding_mask": PADDING[:1]}),
    "embed dim": (AssertionError, "embedding dimension", {}, (X[..., :8],) * 3, {}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    error, text, options, args, given = BAD_CALLS[case]
    module = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options).eval()
    cache = KVCache()
    with pytest.raises(error, match=text):
        module(*((args[0],) * 3 if args[0] is args[1] else args), **{"need_weights": False, **given}, cache=cache)
    assert cache.length == 0


def test_another_batch_or_dtype_is_refused():
    layer, cache = made().layers[0], KVCache()
    layer(X, cache=cache)
    with pytest.raises(ValueError, match=r"^k: expected shape \(2, 4, 3, 8\), .*; got \(1, 4, 3, 8\)"):
        layer(X[:1], cache=cache)
    with pytest.raises(ValueError, match=r"^k: expected .* torch.float64 on cpu, .*; got .* torch.float32"):
        layer.float()(X.float(), cache=cache)
    with pytest.raises(RuntimeError, match="KVCache: expected keys and values before queries"):
        KVCache().attend(X[None])
    with pytest.raises(ValueError, match="cache: expected one for each of 2 layers; got 1"):
        made()(X, cache=[cache])
