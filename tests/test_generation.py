"""Generation, token for token, against recomputing every prefix without a cache."""

import pytest
import torch
from torch import nn

from fused_attn import nn as fused
from fused_attn import settings
from fused_attn.kernels import launch
from fused_attn.nn import RotaryEmbedding, generate, sample, stream

WORDS, WIDTH = 31, 16


# --- models ---


class LanguageModel(nn.Module):
    """Decoder-only. Without a cache, causal attention to everything it is given. Counts its calls."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        layer = fused.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=True, norm_first=True, causal=True, **options)
        self.body = fused.TransformerEncoder(layer, 2)
        self.calls = []
        ready(self)

    def new_cache(self, capacity=None):
        return self.body.new_cache(capacity)

    def forward(self, tokens, cache=None, padding=None):
        self.calls.append((tokens.shape, padding, torch.is_grad_enabled()))
        return erratic(self.head(self.body(self.words(tokens), src_key_padding_mask=padding, cache=cache)))

    def row(self, _):
        return self


class Translator(nn.Module):
    """The decoder of an encoder-decoder, with a memory for each sequence of a batch, padded where they differ."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        layer = fused.TransformerDecoderLayer(WIDTH, 2, 24, 0.0, batch_first=True, causal=True, **options)
        self.body = fused.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))
        self.memory = torch.randn(3, 6, WIDTH, dtype=torch.float64)
        self.padding = torch.arange(6) >= torch.tensor([6, 2, 5])[:, None]
        ready(self)

    def new_cache(self, capacity=None):
        return self.body.new_cache(capacity)

    def forward(self, tokens, cache=None, padding=None, row=slice(None)):
        heard = self.body(self.words(tokens), self.memory[row], tgt_key_padding_mask=padding, cache=cache,
                          memory_key_padding_mask=self.padding[row])
        return erratic(self.head(heard))

    def row(self, index):
        """This model for one sequence of its batch."""
        return lambda tokens: self(tokens, row=slice(index, index + 1))


def ready(model):
    """fp64, in evaluation, with random norms and biases too."""
    for parameter in model.double().eval().parameters():
        nn.init.normal_(parameter, std=0.5)


def erratic(logits):
    """Random models say one word for ever; these change theirs with the smallest change of anything before it."""
    return 4 * (1e4 * logits).sin()


MODELS = {
    "plain": lambda: LanguageModel(), "rope, grouped": lambda: LanguageModel(rope=RotaryEmbedding(4), num_kv_heads=1),
    "alibi, window": lambda: LanguageModel(alibi=True, window=(4, 0)),
    "sinks, softcap": lambda: LanguageModel(sinks=True, softcap=3.0), "encoder-decoder": lambda: Translator(),
    "encoder-decoder, rope": lambda: Translator(rope=RotaryEmbedding(4)),
}
LENGTHS = torch.tensor([5, 2, 7])


def prompts(length=7):
    return torch.randint(0, WORDS, (3, length))


@torch.no_grad()
def recomputed(model, prompt, count, lengths=None, draw=lambda logits: logits.argmax(-1)):
    """Every token from its whole prefix, each sequence alone, without padding and without a cache."""
    ends = [prompt.shape[1]] * len(prompt) if lengths is None else lengths.tolist()
    prefixes = [row[:end] for row, end in zip(prompt, ends, strict=True)]
    for _ in range(count):
        logits = torch.cat([model.row(i)(prefix[None])[:, -1] for i, prefix in enumerate(prefixes)])
        prefixes = [torch.cat((prefix, token[None])) for prefix, token in zip(prefixes, draw(logits), strict=True)]
    return torch.stack([prefix[end:] for prefix, end in zip(prefixes, ends, strict=True)])


SAMPLING = {"temperature": 1.3, "top_k": 12, "top_p": 0.95}


# --- generation ---


@pytest.mark.parametrize("capacity", [None, 20], ids=["growing", "static"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "uneven"])
@pytest.mark.parametrize("model", MODELS)
def test_generation_is_recomputing_every_prefix(model, lengths, capacity):
    model, prompt = MODELS[model](), prompts()
    expected = recomputed(model, prompt, 9, lengths)
    out = generate(model, prompt, 9, lengths=lengths, temperature=0, cache=model.new_cache(capacity))
    assert out.dtype == torch.int64
    assert torch.equal(out, expected)
    assert len(expected.unique()) > 4


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "uneven"])
@pytest.mark.parametrize("model", ["rope, grouped", "encoder-decoder"])
def test_sampling_is_recomputing_every_prefix(model, lengths):
    model, prompt = MODELS[model](), prompts()
    twin = torch.Generator().manual_seed(3)
    expected = recomputed(model, prompt, 9, lengths, lambda logits: sample(logits, **SAMPLING, generator=twin))
    out = generate(model, prompt, 9, lengths=lengths, generator=torch.Generator().manual_seed(3), **SAMPLING)
    assert torch.equal(out, expected)
    assert not torch.equal(out, generate(model, prompt, 9, lengths=lengths, temperature=0))


@pytest.mark.parametrize("lengths", [None, torch.tensor([60, 3, 31])], ids=["even", "uneven"])
@pytest.mark.parametrize("model", ["rope, grouped", "encoder-decoder"])
def test_a_cache_that_grows_on_the_way(model, lengths):
    model, prompt = MODELS[model](), prompts(60)
    cache = model.new_cache()
    generate(model, prompt[:, :1], 1, cache=cache)  # a first round takes the first rows
    own = [getattr(layer, "own", layer) for layer in cache]
    rows = own[0].k.shape[1]
    for layer in own:
        layer.truncate(0)
    expected = recomputed(model, prompt, 9, lengths)
    assert torch.equal(generate(model, prompt, 9, lengths=lengths, temperature=0, cache=cache), expected)
    assert own[0].k.shape[1] > rows


@pytest.mark.few(2)
@pytest.mark.kernels
@pytest.mark.parametrize(("model", "lengths", "capacity"), [
    ("rope, grouped", None, None), ("alibi, window", LENGTHS, 16), ("encoder-decoder", LENGTHS, None)])
def test_generation_on_the_kernels(model, lengths, capacity, monkeypatch):
    model, prompt = MODELS[model](), prompts()
    expected = recomputed(model, prompt, 3, lengths)
    monkeypatch.setattr(settings, "BACKEND", "triton")
    with launch.counted() as launches:
        out = generate(model, prompt, 3, lengths=lengths, temperature=0, cache=model.new_cache(capacity))
    assert torch.equal(out, expected)
    assert launches["forward_kernel"] == 3 * (4 if isinstance(model, Translator) else 2)


# --- rounds ---


@pytest.mark.parametrize(("model", "backend"), [
    ("rope, grouped", None), ("encoder-decoder", None), pytest.param("rope, grouped", "triton", marks=pytest.mark.kernels),
    pytest.param("encoder-decoder", "triton", marks=(pytest.mark.kernels, pytest.mark.slow))])
def test_a_filled_cache_goes_on_for_another_round(model, backend, monkeypatch):
    """The second prompt is the last token drawn, which the model has not been given yet, and what is said then."""
    model, prompt, more = MODELS[model](), prompts(), prompts(3)
    said = torch.tensor([1, 3, 2])
    first = recomputed(model, prompt, 4, LENGTHS)
    whole = [torch.cat((prompt[i, : LENGTHS[i]], first[i], more[i, : said[i]])) for i in range(3)]
    expected = recomputed(model, nn.utils.rnn.pad_sequence(whole, batch_first=True), 5, LENGTHS + 4 + said)
    monkeypatch.setattr(settings, "BACKEND", backend)
    cache = model.new_cache()
    assert torch.equal(generate(model, prompt, 4, lengths=LENGTHS, temperature=0, cache=cache), first)
    second = torch.cat((first[:, -1:], more), 1)
    assert torch.equal(generate(model, second, 5, lengths=said + 1, temperature=0, cache=cache), expected)


# --- eos ---


def first_seen(row, token):
    """Where a sequence ends: its tokens up to the first ``token``."""
    return row.tolist().index(token) + 1 if token in row.tolist() else len(row)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "uneven"])
@pytest.mark.parametrize("model", ["plain", "encoder-decoder"])
def test_ended_sequences_repeat_eos_and_do_not_disturb_the_others(model, lengths):
    model, prompt = MODELS[model](), prompts()
    free = recomputed(model, prompt, 12, lengths)
    eos = next(token for token in free.flatten().tolist() if len({first_seen(row, token) for row in free}) > 1)
    out = generate(model, prompt, 12, lengths=lengths, temperature=0, eos=eos)
    ends = [first_seen(row, eos) for row in free]
    assert out.shape[1] == max(ends)
    for row, alone, end in zip(out, free, ends, strict=True):
        assert torch.equal(row[:end], alone[:end])
        assert (row[end:] == eos).all()


def test_generation_stops_where_all_have_ended():
    model, prompt = MODELS["plain"](), prompts()[:1]
    free = generate(model, prompt, 8, temperature=0)[0]
    assert free[0] != free[2]
    model.calls.clear()
    out = generate(model, prompt, 8, temperature=0, eos=int(free[2]))
    assert out.tolist() == [free[: first_seen(free, free[2])].tolist()]
    assert len(model.calls) == out.shape[1]
    assert generate(model, prompt, 8, temperature=0, eos=WORDS).shape == (1, 8)  # never drawn


# --- streaming ---


def test_a_stream_is_lazy():
    model = MODELS["plain"]()
    tokens = stream(model, prompts(), 5, lengths=LENGTHS, temperature=0)
    assert len(model.calls) == 0
    for n in range(1, 6):
        token = next(tokens)
        assert (token.dtype, token.shape) == (torch.int64, (3,))
        assert len(model.calls) == n
        assert torch.is_grad_enabled()  # what the caller does in between is the caller's
    assert next(tokens, None) is None
    assert len(model.calls) == 5
    shapes, paddings, gradients = zip(*model.calls, strict=True)
    assert shapes == ((3, 7), *[(3, 1)] * 4)
    assert torch.equal(paddings[0], torch.arange(7) >= LENGTHS[:, None])
    assert paddings[1:] == (None,) * 4
    assert not any(gradients)


def test_what_is_streamed_is_what_is_generated():
    model, prompt = MODELS["plain"](), prompts()
    one, two = (torch.Generator().manual_seed(1) for _ in range(2))
    streamed = list(stream(model, prompt, 6, lengths=LENGTHS, generator=one, **SAMPLING))
    assert torch.equal(torch.stack(streamed, 1), generate(model, prompt, 6, lengths=LENGTHS, generator=two, **SAMPLING))


def test_a_stream_left_early_leaves_its_cache_filled():
    model, prompt = MODELS["plain"](), prompts()
    cache = model.new_cache()
    tokens = stream(model, prompt, 100, temperature=0, cache=cache)
    begun = [next(tokens) for _ in range(3)]
    tokens.close()
    assert [layer.length for layer in cache] == [9, 9]
    rest = generate(model, begun[-1][:, None], 4, temperature=0, cache=cache)
    assert torch.equal(torch.cat((torch.stack(begun, 1), rest), 1), recomputed(model, prompt, 7))


def test_nothing_to_draw():
    model = MODELS["plain"]()
    out = generate(model, prompts().int(), 0)
    assert (out.shape, out.dtype, model.calls) == ((3, 0), torch.int64, [])


def test_any_callable_with_any_cache():
    """A model is what it does: here, it counts in its cache and says how many tokens it was given."""
    def model(tokens, cache, padding):
        assert padding is None
        cache.append(tokens.shape[1])
        return nn.functional.one_hot(torch.full(tokens.shape, sum(cache)), 20).double()

    cache = []
    assert generate(model, torch.zeros(2, 4, dtype=torch.int32), 3, temperature=0, cache=cache).tolist() == [[4, 5, 6]] * 2
    assert cache == [4, 1, 1]


@pytest.mark.parametrize(("prompt", "arguments", "error", "text"), [
    (torch.zeros(4, dtype=torch.int64), {}, ValueError, r"prompt: expected tokens .*; got shape \(4,\)"),
    (torch.zeros(2, 0, dtype=torch.int64), {}, ValueError, r"prompt: expected tokens .*; got shape \(2, 0\)"),
    (torch.zeros(2, 3, dtype=torch.int64), {"lengths": torch.ones(3, dtype=torch.int64)}, ValueError,
     r"lengths: expected shape \(2,\); got \(3,\)"),
    (torch.zeros(2, 3, dtype=torch.int64), {"lengths": [1, 2]}, TypeError,
     r"lengths: expected int32 or int64 \[2\]; got \[1, 2\]"),
    (torch.zeros(2, 3, dtype=torch.int64), {"lengths": torch.ones(2)}, TypeError, "lengths: expected .*; got torch.float32"),
    (torch.zeros(2, 3, dtype=torch.int64), {"cache": None}, TypeError, r"cache: expected one.* no new_cache\(\)"),
    ([[1, 2]], {}, ValueError, r"prompt: expected tokens .*; got \[\[1, 2\]\]"),
    (torch.zeros(2, 3, dtype=torch.int64), {"eos": 2.5}, TypeError, "eos: expected an int or None; got 2.5"),
    *[(torch.zeros(2, 3, dtype=torch.int64), {"max_new_tokens": bad}, ValueError, f"max_new_tokens: expected .*; got {bad}")
      for bad in (-1, True, 2.5)],
])
def test_a_stream_tells_what_is_wrong_at_once(prompt, arguments, error, text):
    with pytest.raises(error, match=text):
        stream(lambda *_, **__: None, prompt, **{"max_new_tokens": 3, "cache": [], **arguments})


def test_what_sample_refuses_is_refused_while_generating():
    with pytest.raises(ValueError, match=r"top_k: .*got 0"):
        generate(MODELS["plain"](), prompts(), 3, top_k=0)
