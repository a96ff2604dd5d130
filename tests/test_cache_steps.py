"""A step that fails is taken back, so that the next try is right; a cache is one layer's."""


import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from support.caches import close, normal, same, state
from torch import nn

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
    all_or_nothing,
    generate,
)

EMBED, HEADS = 16, 2
CAPACITIES = pytest.mark.parametrize("capacity", [None, 12], ids=["growing", "static"])
K, V = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 6)
COUNTS = torch.tensor([3, 4])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def made(cls=TransformerEncoder, **options):
    layer = {TransformerEncoder: TransformerEncoderLayer, TransformerDecoder: TransformerDecoderLayer}[cls]
    model = cls(layer(EMBED, HEADS, 16, batch_first=True, dtype=torch.float64, causal=True, **options), 3,
                nn.LayerNorm(EMBED, dtype=torch.float64)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


class Failure(Exception):
    pass


def failing(module):
    def fail(*_):
        raise Failure

    return module.register_forward_hook(fail)


PLACES = {
    "attention": lambda model: model.layers[1].self_attn, "projection": lambda model: model.layers[1].self_attn.out_proj,
    "feed-forward": lambda model: model.layers[1].linear2, "last layer": lambda model: model.layers[2],
    "norm": lambda model: model.norm,
}


@CAPACITIES
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cls", [TransformerEncoder, TransformerDecoder])
@pytest.mark.parametrize("place", PLACES)
def test_a_failed_step_is_taken_back(place, cls, ragged, capacity):
    model, x = made(cls, rope=RotaryEmbedding(8), alibi=True), normal(2, 7, EMBED)
    memory = () if cls is TransformerEncoder else (normal(2, 4, EMBED),)
    name = "src_key_padding_mask" if cls is TransformerEncoder else "tgt_key_padding_mask"
    counts = [3, 1] if ragged else [3, 3]
    given = {name: torch.arange(3) >= torch.tensor(counts)[:, None]} if ragged else {}
    cache = model.new_cache(capacity)
    own = [one if isinstance(one, KVCache) else one.own for one in cache]

    def step(part, **given):
        before = [state(one) for one in own]
        hook = failing(PLACES[place](model))
        with pytest.raises(Failure):
            model(part, *[torch.full_like(x, 7.0) for x in memory], cache=cache, **given)
        hook.remove()
        for one, was in zip(own, before, strict=True):  # what lies behind the lengths does not count
            assert all(was[key] == vars(one)[key] for key in ("length", "even", "_owner", "_open", "_replays"))
            assert (one.lengths is None and was["lengths"] is None) or torch.equal(one.lengths, was["lengths"])
        return model(part, *memory, cache=cache, **given)

    out = [step(x[:, :3], **given)]
    out = torch.cat([*out, model(x[:, 3:4], *memory, cache=cache), model(x[:, 4:], *memory, cache=cache)], 1)
    for i, n in enumerate(counts):
        whole = torch.cat((x[i, :n], x[i, 3:]))[None]
        close(torch.cat((out[i, :n], out[i, 3:])), model(whole, *[y[i : i + 1] for y in memory])[0])


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_and_models_by_themselves(wrapped):
    """A layer takes its own step back; of layers that a model stacks by itself it is told."""
    layers, x = made(rope=RotaryEmbedding(8)).layers, normal(2, 6, EMBED)

    def model(x, caches):
        for layer, cache in zip(layers, caches, strict=True):
            x = layer(x, cache=cache)
        return x

    caches = [KVCache() for _ in layers]
    expected = model(x, [KVCache() for _ in layers])
    model(x[:, :3], caches)
    hook = failing(layers[1].linear1)
    with pytest.raises(Failure), all_or_nothing(caches if wrapped else None):
        model(x[:, 3:], caches)
    hook.remove()
    assert [one.length for one in caches] == ([3, 3, 3] if wrapped else [6, 3, 3])
    if not wrapped:
        with pytest.raises(ValueError, match=r"cache: expected caches that hold the same tokens; got lengths \[6, 3, 3\]"):
            TransformerEncoder(layers[0], 3)(x[:, 3:], cache=caches)
        caches[0].truncate(3)
    close(model(x[:, 3:], caches), expected[:, 3:])


def test_several_steps_are_taken_back_together():
    cache = KVCache(12)
    cache.append(K, V, COUNTS)

    def steps():
        cache.append(K, V)
        cache.truncate(5)
        cache.append(K[:, :, :1], V[:, :, :1], torch.tensor([0, 1]))
        with all_or_nothing(cache):
            raise Failure

    with pytest.raises(Failure), all_or_nothing([cache]):
        steps()
    assert (cache.length, cache.lengths.tolist(), cache.even) == (4, [3, 4], False)
    with all_or_nothing(cache):
        cache.append(K, V)
    assert cache.lengths.tolist() == [7, 8]


class Speaker(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, EMBED, dtype=torch.float64), made(rope=RotaryEmbedding(8)).layers

    def new_cache(self):
        return [KVCache() for _ in self.layers]

    def forward(self, tokens, cache, padding):
        x = self.embed(tokens)
        for layer, one in zip(self.layers, cache, strict=True):
            x = layer(x, cache=one)
        return x @ self.embed.weight.T


def test_generation_is_tried_again():
    """A layer fails in the third step, or a draw does: the cache is as it was before it, and the rest is what it would be."""
    model, prompt = Speaker().eval(), torch.randint(11, (2, 4))
    expected = generate(model, prompt, 6, temperature=0)
    cache = model.new_cache()
    begun = generate(model, prompt, 3, temperature=0, cache=cache)
    hook = failing(model.layers[2].norm2)
    with pytest.raises(Failure):
        generate(model, begun[:, -1:], 3, temperature=0, cache=cache)
    hook.remove()
    with pytest.raises(ValueError, match="top_k"):
        generate(model, begun[:, -1:], 3, top_k=0, cache=cache)
    with pytest.raises(RuntimeError):  # NaN is no probability: after the layers, in the draw
        generate(lambda *args, **given: model(*args, **given) * torch.nan, begun[:, -1:], 3, cache=cache)
    rest = generate(model, begun[:, -1:], 3, temperature=0, cache=cache)
    assert torch.equal(torch.cat((begun, rest), 1), expected)


# --- one cache, one layer ---


def test_a_stack_is_given_one_cache_twice():
    model, x, one = made(), normal(2, 3, EMBED), KVCache()
    for bad in ([one] * 3, [KVCache(), one, one]):
        with pytest.raises(ValueError, match="cache: expected a cache of its own for each layer"):
            model(x, cache=bad)
    decoder, memory = made(TransformerDecoder), MemoryCache()
    with pytest.raises(ValueError, match="cache: expected a cache of its own for each layer"):
        decoder(x, x, cache=[DecoderCache(KVCache(), memory) for _ in range(3)])
    assert one.length == 0
    assert memory.k is None


@CAPACITIES
def test_two_layers_are_given_one_cache(capacity):
    first, second = made().layers[:2]
    x, cache = normal(2, 3, EMBED), KVCache(capacity)
    expected = second(x)
    first(x, cache=cache)
    before = state(cache)
    for layer in (second, second.self_attn):
        arguments = (x,) if layer is second else (x, x, x)
        with pytest.raises(ValueError, match="cache: expected one that is empty or that this layer filled"):
            layer(*arguments, cache=cache, **({} if layer is second else {"need_weights": False}))
    assert same(before, state(cache))
    for empty in (cache.clear, lambda: cache.truncate(0)):
        empty()
        close(second(x, cache=cache), expected)
    both = copy.deepcopy((second, cache))
    for copied in (both, (second, copy.copy(cache)), (second, pickle.loads(pickle.dumps(cache)))):
        copied[1].clear() if capacity is None else copied[1].truncate(0)
        close(copied[0](x, cache=copied[1]), expected)


def test_a_copy_of_model_and_cache_goes_on():
    layer, x, cache = made().layers[0], normal(2, 5, EMBED), KVCache()
    expected = layer(x)
    layer(x[:, :3], cache=cache)
    other, copied = copy.deepcopy((layer, cache))
    close(other(x[:, 3:], cache=copied), expected[:, 3:])
    close(layer(x[:, 3:], cache=cache), expected[:, 3:])


def test_two_layers_are_given_one_memory():
    first, second = (MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64) for _ in range(2))
    x, memory, cache = normal(2, 3, EMBED), normal(2, 4, EMBED), MemoryCache()
    first(x, memory, memory, cache=cache)
    with pytest.raises(ValueError, match="cache: expected one that is empty or that this layer filled"):
        second(x, memory, memory, cache=cache)
    cache.clear()
    close(second(x, memory, memory, cache=cache)[0], second(x, memory, memory)[0])


@pytest.mark.parametrize("case", ["list", "memory", "own", "decoder's", "of another kind"])
def test_a_cache_of_another_kind(case):
    encoder, decoder, x = made().layers[0], made(TransformerDecoder).layers[0], normal(2, 3, EMBED)
    call = {"list": lambda: encoder(x, cache=[KVCache()]), "memory": lambda: encoder(x, cache=MemoryCache()),
            "own": lambda: decoder(x, x, cache=KVCache()),
            "decoder's": lambda: encoder(x, cache=DecoderCache(KVCache(), MemoryCache())),
            "of another kind": lambda: encoder.self_attn(x, x, x, cache={})}[case]
    with pytest.raises(TypeError, match=r"^cache: expected a .*; got"):
        call()


CHANGES = {
    "append": lambda c: c.append(*rows(2, sequences(c))),
    "some of it": lambda c: c.append(*rows(2, sequences(c)), torch.arange(sequences(c)) % 3),
    "grow": lambda c: c.append(*rows(70, sequences(c))),
    "truncate": lambda c: c.truncate(min(1, c.length)),
    "truncate each": lambda c: c.truncate(torch.arange(sequences(c)).clamp(max=c.length)),
    "clear": lambda c: c.clear(),
    "reorder": lambda c: c.reorder(torch.arange(sequences(c)).flip(0)),
    "reorder into more": lambda c: c.reorder(torch.arange(2 * sequences(c)) // 2),
}


def sequences(cache):
    return 2 if cache.lengths is None else len(cache.lengths)


def rows(n, batch=2):
    return normal(batch, 2, n, 8), normal(batch, 2, n, 6)


def contents(cache):
    lengths = [] if cache.lengths is None else cache.lengths.tolist()
    return [(cache.k[b, :n].clone(), cache.v[b, :n].clone()) for b, n in enumerate(lengths)], cache.length, cache.even


def same_contents(found, expected):
    assert found[1:] == expected[1:]
    assert len(found[0]) == len(expected[0])
    assert all(torch.equal(x, y) for pair, other in zip(found[0], expected[0], strict=True)
               for x, y in zip(pair, other, strict=True))


@pytest.mark.parametrize("capacity", [None, 150], ids=["growing", "static"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("first", CHANGES)
def test_everything_is_taken_back(first, replays, ragged, capacity):
    """Two changes, of which the second writes over what the first one forgot."""
    for second in CHANGES:
        cache = KVCache(capacity)
        cache._replays, cache.even = (True, False) if replays else (None, True)  # as a device's static cache steps
        cache.append(*rows(4), torch.tensor([4, 2]) if ragged else None)
        before = contents(cache)
        with contextlib.suppress(Failure), all_or_nothing(cache):
            CHANGES[first](cache)
            if cache.lengths is not None or second not in ("truncate each", "reorder", "reorder into more"):
                CHANGES[second](cache)
            raise Failure
        same_contents(contents(cache), before)
        cache.append(*rows(2))
        assert not cache._open


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_overlapping_tries_are_told_apart(order):
    """Three, entered one after the other: each takes back what came after its own beginning, in whatever order they end."""
    for failed in range(3):
        cache, tries, before = KVCache(), [], []
        for _ in range(3):
            tries.append(all_or_nothing(cache))
            before.append(contents(cache))
            tries[-1].__enter__()
            cache.append(*rows(2))
        after = contents(cache)
        for i in order[: order.index(failed)]:
            tries[i].__exit__(None, None, None)
        tries[failed].__exit__(Failure, None, None)
        same_contents(contents(cache), before[failed])
        assert after[1] == 6


def test_a_try_may_be_entered_twice_and_a_cache_copied_within():
    cache = KVCache()
    cache.append(*rows(2))
    again = all_or_nothing(cache)
    with contextlib.suppress(Failure), again:
        cache.append(*rows(1))
        with contextlib.suppress(Failure), again:
            cache.append(*rows(1))
            copied = copy.deepcopy(cache)
            raise Failure
        assert cache.length == 3
        raise Failure
    assert (cache.length, cache._open, copied._open) == (2, [], [])
    with contextlib.suppress(Failure), all_or_nothing(copied):
        copied.append(*rows(1))
        raise Failure
    assert copied.length == 4


def test_a_shallow_copy_shares_no_memory():
    cache = KVCache(8)
    cache.append(*rows(2))
    other = copy.copy(cache)
    other.append(*rows(3))
    assert (cache.length, cache.lengths.tolist(), other.lengths.tolist()) == (2, [2, 2], [5, 5])
    assert not cache.k[:, 2:].any()


BAD_MASKS = {"attn_mask": torch.zeros(3, 3, dtype=torch.bool), "key_padding_mask": torch.zeros(2, 9, dtype=torch.bool)}


@pytest.mark.parametrize("bad", BAD_MASKS)
def test_a_refused_call_leaves_no_memory(bad):
    module = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64).eval()
    q, first, second = normal(2, 1, EMBED), normal(2, 5, EMBED), normal(2, 5, EMBED)
    cache = MemoryCache()
    with pytest.raises((RuntimeError, AssertionError)):
        module(q, first, first, need_weights=False, cache=cache, **{bad: BAD_MASKS[bad]})
    close(module(q, second, second, need_weights=False, cache=cache)[0], module(q, second, second, need_weights=False)[0])


def test_a_layer_at_the_address_of_another_one_is_another_one():
    cache, x = KVCache(), normal(1, 3, EMBED)

    def called():
        module = MultiheadAttention(EMBED, HEADS, batch_first=True, causal=True, dtype=torch.float64).eval()
        module(x, x, x, need_weights=False, cache=cache)

    called()
    for _ in range(20):
        with pytest.raises(ValueError, match="another layer's"):
            called()


@pytest.mark.parametrize("cls", [TransformerEncoder, TransformerDecoder])
def test_a_stack_takes_a_cache_for_each_layer(cls):
    model, x = made(cls), normal(2, 3, EMBED)
    memory = () if cls is TransformerEncoder else (normal(2, 4, EMBED),)
    good = model.new_cache()
    other = made(TransformerEncoder if memory else TransformerDecoder).new_cache()
    for bad in ([good[0], None, good[2]], KVCache(), DecoderCache(KVCache(), MemoryCache()), iter(good), {0: good[0]},
                ["a", "b", "c"], other):
        with pytest.raises(TypeError, match=r"^cache: expected a "):
            model(x, *memory, cache=bad)
    close(model(x, *memory, cache=good), model(x, *memory))
