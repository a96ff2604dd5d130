"""What a cache refuses leaves no trace, and a step that fails is taken back: the next try is right."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def state(cache):
    """All that a cache holds, down to the values."""
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in vars(cache).items()}


def same(before, after):
    return before.keys() == after.keys() and all(
        torch.equal(x, after[name]) if isinstance(x, torch.Tensor) and isinstance(after[name], torch.Tensor)
        else x == after[name] for name, x in before.items())


# --- append ---

K, V = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 6)
COUNTS = torch.tensor([3, 4])
BAD = {  # what the error says, arguments
    "k: expected a float tensor; got list": ([1], V), "k: expected a float tensor; got torch.int64": (K.long(), V),
    "v: expected a float tensor; got NoneType": (K, None), "k: expected 4 dim.*shape .3, 4, 8": (K[0], V),
    "v: expected 4 dim.*shape .3, 4, 6": (K, V[0]),
    r"v: expected shape \(2, 3, 4, 6\).*got \(1, 3, 4, 6\)": (K, V[:1]), r"v: expected.*got \(2, 1, 4, 6\)": (K, V[:, :1]),
    r"v: expected.*got \(2, 3, 1, 6\)": (K, V[:, :, :1]), "v: expected.*torch.float32 on cpu.*got .*float64": (K, V.double()),
    "v: expected.*torch.float32 on cpu.*got .*float16": (K, V.half()), "v: expected.*on cpu.*got .*on meta": (K, V.to("meta")),
    "KVCache: expected at most 12 tokens, its capacity; got": (K.repeat(1, 1, 4, 1), V.repeat(1, 1, 4, 1)),
    "counts: expected an integer tensor; got torch.float32": (K, V, COUNTS.float()),
    "counts: expected an integer tensor; got torch.bool": (K, V, COUNTS.bool()),
    r"counts: expected an integer tensor; got \[3, 4\]": (K, V, [3, 4]),
    r"counts: expected shape \(2,\).*\(1,\)": (K, V, COUNTS[:1]),
    r"counts: expected shape \(2,\).*\(2, 1\)": (K, V, COUNTS[:, None]),
    r"counts: expected shape .* got \(\)": (K, V, COUNTS[0]),
    "counts: expected .* on cpu; got .* on meta": (K, V, COUNTS.to("meta")),
    r"counts: expected 0 to 4, the tokens that came; got \[3, 9\]": (K, V, torch.tensor([3, 9])),
    r"counts: expected 0 to 4.*got \[-1, 2\]": (K, V, torch.tensor([-1, 2])),
    r"counts: expected 0 to 4.*got \[4, 5\]": (K, V, torch.tensor([4, 5], dtype=torch.uint8)),
    "KVCache: expected tensors without gradients": (K, V.clone().requires_grad_()),
}
BAD_AFTERWARDS = {
    r"k: expected shape \(2, 3, 4, 8\).*got \(1, 3, 4, 8\)": (K[:1], V[:1]),
    r"k: expected.*got \(2, 1, 4, 8\)": (K[:, :1], V[:, :1]),
    r"k: expected.*got \(2, 3, 4, 1\)": (K[..., :1], V),
    r"v: expected.*as k and the cache.*got \(2, 3, 4, 1\)": (K, V[..., :1]),
    "k: expected.*float32.*got .*float16": (K.half(), V.half()),
    "k: expected.*on cpu.*got .*meta": (K.to("meta"), V.to("meta")),
}


@CAPACITIES
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("text", [*BAD, *BAD_AFTERWARDS])
def test_what_append_refuses_leaves_no_trace(text, ragged, capacity):
    if "capacity" in text and capacity is None:
        capacity = 12
    arguments = {**BAD, **BAD_AFTERWARDS}[text]
    for held in ([], [3])[text in BAD_AFTERWARDS :]:
        cache = KVCache(capacity)
        for n in held:
            cache.append(K[:, :, :n], V[:, :, :n], torch.tensor([1, n]) if ragged else None)
        before = state(cache)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"^{text}"):
            cache.append(*arguments)
        assert same(before, state(cache))
        cache.append(K, V)
        for i, n in enumerate(cache.lengths.tolist()):
            assert torch.equal(cache.k[i, n - 4 : n].transpose(0, 1), K[i])
            assert torch.equal(cache.v[i, n - 4 : n].transpose(0, 1), V[i])


@CAPACITIES
def test_memory_that_cannot_be_had_leaves_no_trace(capacity, monkeypatch):
    """Of the first append and of a growth: keys had their memory, values did not."""
    cache = KVCache(capacity)
    for k, v in ((K, V), (K.repeat(1, 1, 2, 1), V.repeat(1, 1, 2, 1)), (K.repeat(1, 1, 20, 1), V.repeat(1, 1, 20, 1))):
        before, zeros = state(cache), torch.zeros

        def full(*shape, zeros=zeros, **options):
            if shape[-1] == 6:
                raise torch.OutOfMemoryError("no memory")
            return zeros(*shape, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", full)
            try:
                cache.append(k, v)
            except (torch.OutOfMemoryError, ValueError):
                assert same(before, state(cache))
    cache.append(K[:, :, :1], V[:, :, :1])


def test_another_batch_after_a_first_append_that_failed():
    cache = KVCache(12)
    with pytest.raises(ValueError, match=r"^v: expected shape"):
        cache.append(K, V[:1])
    cache.append(K[:1], V[:1])
    assert cache.lengths.tolist() == [4]


def test_counts_that_nobody_may_look_at_stay_in_bounds():
    with FakeTensorMode():
        cache = KVCache()
        cache.append(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 6), torch.tensor([3, 9]))
        assert cache.lengths.shape == (2,)
    cache, counter = KVCache(), torch.compile(lambda cache, counts: cache.append(K, V, counts), backend="eager", fullgraph=True)
    counter(cache, torch.tensor([-5, 99]))
    assert cache.lengths.tolist() == [0, 4]
    torch._dynamo.reset()


@CAPACITIES
def test_attend_needs_queries_of_its_batch(capacity):
    cache = KVCache(capacity)
    cache.append(K, V)
    for bad in (K[:1], K[0]):
        with pytest.raises(ValueError, match=r"^q: expected \[2, heads, tokens, 8\]; got shape"):
            cache.attend(bad)


# --- truncate ---


@CAPACITIES
@pytest.mark.parametrize(("kept", "left"), [
    (torch.tensor([5, 2]), [5, 2]), (torch.tensor([5, 6], dtype=torch.int32), [5, 4]), (torch.tensor(3), [3, 3]),
    (torch.tensor([0, 0]), [0, 0]), (torch.tensor([4, 4]), [4, 4]), (torch.tensor([6, 0], dtype=torch.uint8), [6, 0])], ids=str)
def test_truncate_to_counts_of_each_sequence(kept, left, capacity):
    """What speculative decoding takes back: of every sequence as many tokens as were refused."""
    layer = TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True, dtype=torch.float64, causal=True,
                                    rope=RotaryEmbedding(8)).eval()
    cache, x, more = KVCache(capacity), normal(2, 6, EMBED), normal(2, 5, EMBED)
    layer(x, cache=cache, src_key_padding_mask=torch.arange(6) >= torch.tensor([[6], [4]]))
    cache.truncate(kept)
    assert cache.lengths.tolist() == left
    assert cache.length == max(left)
    out = torch.cat([layer(part, cache=cache) for part in more.split([1, 3, 1], 1)], 1)
    for i, n in enumerate(left):
        close(out[i], layer(torch.cat((x[i, :n], more[i]))[None])[0, -5:])


@pytest.mark.parametrize(("length", "error", "text"), [
    (2.0, TypeError, "expected an int, or an integer tensor"), (True, TypeError, "expected an int, or"),
    (None, TypeError, "expected an int, or"), (torch.tensor([1.0, 2.0]), TypeError, "expected an integer tensor; got"),
    (torch.tensor([1]), ValueError, r"expected shape \(2,\)"), (torch.tensor([[1, 1]]), ValueError, r"expected shape \(2,\)"),
    (torch.tensor([1, 5]), ValueError, r"expected 0 to 4; got \[1, 5\]"),
    (torch.tensor(-1), ValueError, "expected 0 to 4; got -1"),
    (5, ValueError, "expected 0 to 4; got 5"), (-1, ValueError, "expected 0 to 4; got -1")], ids=str)
def test_truncate_refuses(length, error, text):
    cache = KVCache()
    cache.append(K, V)
    before = state(cache)
    with pytest.raises(error, match=f"^length: {text}"):
        cache.truncate(length)
    assert same(before, state(cache))


def test_a_cache_truncated_to_nothing_is_even_again():
    cache = KVCache(12)
    cache.append(K, V, COUNTS)
    cache.truncate(0)
    assert cache.positions(3) == 0
    empty = KVCache()
    empty.truncate(torch.tensor([0, 0]))
    assert empty.length == 0


# --- reorder ---


@pytest.mark.parametrize(("index", "error", "text"), [
    ([1, 0], TypeError, "expected an integer tensor"), (torch.tensor([1.0]), TypeError, "expected an integer tensor"),
    (torch.tensor([True, False]), TypeError, "expected an integer tensor"), (torch.tensor(1), ValueError, "expected one dim"),
    (torch.tensor([[1, 0]]), ValueError, "expected one dimension"), (torch.tensor([0, 2]), ValueError, "expected 0 to 1, of 2"),
    (torch.tensor([-1, 0]), ValueError, "expected 0 to 1, of 2"), (torch.tensor([0]).to("meta"), ValueError, "expected shape")],
    ids=str)
@pytest.mark.parametrize("which", ["own", "memory", "both"])
def test_reorder_refuses(which, index, error, text):
    own, memory = KVCache(12), MemoryCache()
    own.append(K, V)
    memory.get(2, 4, lambda: (K, V))
    before = state(own), state(memory)
    with pytest.raises(error, match=f"^index: {text}"):
        {"own": own, "memory": memory, "both": DecoderCache(own, memory)}[which].reorder(index)
    assert same(before[0], state(own))
    assert same(before[1], state(memory))


def test_reordering_takes_the_counts_along():
    cache, q, index = KVCache(), torch.randn(2, 3, 4, 8), torch.tensor([1, 0, 1], dtype=torch.int32)
    cache.append(K, V, torch.tensor([2, 4]))
    expected = cache.attend(q)[index]
    cache.reorder(index)
    torch.testing.assert_close(cache.attend(q[index]), expected)


def test_reordering_runs_out_of_memory(monkeypatch):
    cache, select = KVCache(12), torch.Tensor.index_select
    cache.append(K, V)
    before = state(cache)

    def full(x, *rest):
        if x.shape[-1] == 6:
            raise torch.OutOfMemoryError("no memory")
        return select(x, *rest)

    monkeypatch.setattr(torch.Tensor, "index_select", full)
    with pytest.raises(torch.OutOfMemoryError):
        cache.reorder(torch.tensor([1, 0]))
    assert same(before, state(cache))


# --- steps that fail ---


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
            assert all(was[key] == vars(one)[key] for key in ("length", "even", "_owner", "_held", "_replays"))
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
