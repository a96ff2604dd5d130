"""What a cache refuses leaves no trace, and a step that fails is taken back: the next try is right."""


import pytest
import torch
from support.caches import close, normal, same, state
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_attn.nn import (
    DecoderCache,
    KVCache,
    MemoryCache,
    RotaryEmbedding,
    TransformerEncoderLayer,
)

EMBED, HEADS = 16, 2
CAPACITIES = pytest.mark.parametrize("capacity", [None, 12], ids=["growing", "static"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


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
    memory.get(2, 4, K, lambda: (K, V))
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_counts_of_any_integer_type(dtype):
    """More tokens than the type has numbers."""
    k, v = normal(2, 1, 300, 4), normal(2, 1, 300, 4)
    for cache in (KVCache(), KVCache(400)):
        cache.append(k, v, torch.tensor([100, 90], dtype=dtype))
        assert cache.lengths.tolist() == [100, 90]
        cache.truncate(torch.tensor([70, 100], dtype=dtype))
        assert cache.lengths.tolist() == [70, 90]
        cache.reorder(torch.tensor([1, 0], dtype=dtype))
        assert cache.lengths.tolist() == [90, 70]


def test_queries_are_those_of_the_tokens_appended():
    cache = KVCache()
    cache.append(normal(2, 1, 3, 4), normal(2, 1, 3, 4), torch.tensor([3, 1]))
    cache.attend(normal(2, 1, 3, 4))
    for n in (1, 2, 8):
        with pytest.raises(ValueError, match=f"q: expected the queries of the 3 tokens that were appended last; got {n}"):
            cache.attend(normal(2, 1, n, 4))


@pytest.mark.parametrize("count", [-1, 1.5, True, None])
def test_positions_are_of_a_number_of_tokens(count):
    cache = KVCache()
    cache.append(normal(2, 1, 3, 4), normal(2, 1, 3, 4), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="count: expected a non-negative int; got"):
        cache.positions(count)
