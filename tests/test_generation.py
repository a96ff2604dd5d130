"""Sampling against arithmetic by hand, and generation, token for token, against recomputing every prefix without a cache."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fused_attn import nn as fused
from fused_attn import settings
from fused_attn.kernels import launch
from fused_attn.nn import RotaryEmbedding, generate, sample, stream

WORDS, WIDTH = 31, 16


# --- sample ---


def frequencies(probabilities, draws=20_000, **arguments):
    """How often each token is drawn, from logits of these probabilities."""
    rows = torch.tensor(probabilities).log().expand(draws, -1)
    return torch.bincount(sample(rows, **arguments), minlength=len(probabilities)) / draws


def renormalised(probabilities, kept):
    p = torch.tensor([x if i in kept else 0.0 for i, x in enumerate(probabilities)])
    return p / p.sum()


def follow(drawn, expected, draws=20_000):
    """Nothing that is excluded, and everything else as often as it should be: five standard deviations."""
    assert not drawn[expected == 0].any()
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all(), (drawn, expected)


P = [0.05, 0.4, 0.15, 0.15, 0.25]
DRAWS = {  # arguments, the tokens that may be drawn
    "all": ({}, {0, 1, 2, 3, 4}), "top_k": ({"top_k": 2}, {1, 4}), "top_k of 1": ({"top_k": 1}, {1}),
    "top_k with ties": ({"top_k": 3}, {1, 2, 3, 4}), "top_k of more than there are": ({"top_k": 50}, {0, 1, 2, 3, 4}),
    "top_p": ({"top_p": 0.6}, {1, 4}), "top_p just beyond": ({"top_p": 0.66}, {1, 4, 2}),
    "top_p of 1": ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
    "top_p below every one": ({"top_p": 1e-9}, {1}), "top_p after top_k": ({"top_k": 2, "top_p": 0.6}, {1}),
}


@pytest.mark.parametrize("case", DRAWS)
def test_frequencies_are_the_renormalised_probabilities(case):
    arguments, kept = DRAWS[case]
    follow(frequencies(P, **arguments), renormalised(P, kept))


@pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
def test_temperature_divides_the_logits_before_everything_else(temperature):
    hot = torch.tensor(P) ** (1 / temperature)
    follow(frequencies(P, temperature=temperature), hot / hot.sum())
    ordered, order = (hot / hot.sum()).sort(descending=True, stable=True)
    kept = order[: int((ordered.cumsum(0) < 0.6).sum()) + 1].tolist()
    follow(frequencies(P, temperature=temperature, top_p=0.6), renormalised(hot.tolist(), kept))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_the_nucleus_is_the_fewest_tokens_that_reach_p(top_p):
    """Row by row: what is drawn in many draws is the shortest prefix, by probability, that holds p."""
    logits = torch.randn(6, 9)
    drawn = sample(logits.repeat_interleave(4000, 0), top_p=top_p).view(6, 4000)
    for row, tokens in zip(logits.double().softmax(-1), drawn, strict=True):
        nucleus, held = set(), 0.0
        for token in row.argsort(descending=True).tolist():
            if held < top_p:
                nucleus.add(token)
                held += row[token].item()
        likely = {token for token in nucleus if row[token] / held > 0.01}  # 4000 draws leave out one of these once in 1e17
        assert likely <= set(tokens.tolist()) <= nucleus
        assert held >= top_p


def test_a_nucleus_that_is_exactly_reached_takes_no_further_token():
    assert set(sample(torch.zeros(500, 4), top_p=0.5).tolist()) == {0, 1}
    assert set(sample(torch.zeros(500, 4), top_p=0.75).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_the_largest_and_draws_nothing(dtype):
    logits = torch.randn(5, 40).to(dtype)
    before = torch.get_rng_state()
    for temperature in (0, 0.0):
        tokens = sample(logits, temperature=temperature, top_k=3, top_p=0.2)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_draws_are_int64_rows_of_any_dtype_and_leave_the_logits_alone(dtype):
    logits = torch.randn(3, 8).to(dtype)
    copy = logits.clone()
    tokens = sample(logits, temperature=0.7, top_k=4, top_p=0.9)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (3,))
    assert torch.equal(logits, copy)
    assert all((row >= row[token]).sum() <= 4 for row, token in zip(logits, tokens, strict=True))


def test_tokens_of_no_probability_are_never_drawn():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0]]).expand(500, -1)
    for arguments in ({}, {"top_k": 3}, {"top_p": 0.999}, {"temperature": 5.0}):
        assert set(sample(logits, **arguments).tolist()) == {1, 3}


@pytest.mark.parametrize("temperature", [1e-6, 1e-38])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = torch.tensor([[50.0, 80.0, -90.0, 79.0]])
    assert sample(logits, temperature=temperature).tolist() == [1]


EDGES = [5e-324, 1e-310, 1e-46, 1e-40, 1e-30]


@pytest.mark.parametrize("top_p", [*EDGES, 1e-9])
def test_a_nucleus_of_next_to_nothing_is_the_likeliest_token(top_p):
    logits = torch.randn(50, 20)
    for given in ({}, {"top_k": 3}, {"temperature": 1e-46}, {"temperature": 3.0}):
        assert torch.equal(sample(logits, top_p=top_p, **given), logits.argmax(-1))
    assert set(sample(torch.zeros(500, 4), top_p=top_p).tolist()) == {0}  # one token even where all are alike


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
@pytest.mark.parametrize("temperature", EDGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_temperatures_down_to_the_last_are_greedy(dtype, temperature, flush):
    logits = torch.tensor([[50.0, 80.0, -math.inf, 79.0], [0.0, 1.0, -60000.0, -1.0], [-7.0, 0.0, -math.inf, -9.0]]).to(dtype)
    torch.set_flush_denormal(flush)
    try:
        for given in ({}, {"top_p": 0.5}, {"top_k": 2}):
            assert sample(logits, temperature=temperature, **given).tolist() == [1, 1, 1]
        ties = torch.tensor([[3.0, 3.0, 2.0]]).expand(200, -1).to(dtype)
        zero = flush and temperature < 1e-307  # Python's own numbers are flushed too: 0 takes the first of the largest
        assert set(sample(ties, temperature=temperature).tolist()) == ({0} if zero else {0, 1})
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("temperature", [1e30, 3e38, 1e39, 1e308, 10**400])
def test_temperatures_up_to_the_last_are_even(temperature):
    """Over all tokens that may be drawn at all."""
    logits = torch.tensor([[50.0, -80.0, -math.inf, 0.0]]).expand(600, -1)
    assert set(sample(logits, temperature=temperature).tolist()) == {0, 1, 3}


@pytest.mark.parametrize(("logits", "temperature"), [([3e38, -3e38, 0.0], 3e38), ([3e38, 2.9e38, -3e38], 1.0)])
def test_logits_as_far_apart_as_their_numbers_reach(logits, temperature):
    exact = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0)
    drawn = sample(torch.tensor([logits]).expand(20_000, -1), temperature=temperature)
    follow(torch.bincount(drawn, minlength=3) / 20_000, exact)


@pytest.mark.parametrize(("arguments", "text"), [
    ({"top_p": True}, "top_p"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.0000001}, "top_p"), ({"top_p": math.nan}, "top_p"),
    ({"top_p": "0.5"}, "top_p"), ({"temperature": math.nan}, "temperature"), ({"temperature": math.inf}, "temperature"),
    ({"temperature": -5e-324}, "temperature"), ({"temperature": None}, "temperature"), ({"top_k": 1.0}, "top_k"),
    ({"top_k": -1}, "top_k")], ids=str)
def test_what_is_no_parameter_of_sampling_is_refused_before_the_model_runs(arguments, text):
    with pytest.raises(ValueError, match=f"^{text}: expected"):
        sample(torch.zeros(1, 3), **arguments)
    with pytest.raises(ValueError, match=f"^{text}: expected"):
        stream(lambda *_, **__: 1 / 0, prompts(), 3, cache=[], **arguments)


def test_numbers_of_numpy_are_numbers():
    logits = torch.randn(50, 20)
    draws = [sample(logits, generator=torch.Generator().manual_seed(1), temperature=t, top_k=k, top_p=p) for t, k, p in (
        (0.5, 5, 0.75), (np.float32(0.5), np.int64(5), np.float64(0.75)))]
    assert torch.equal(*draws)


def test_a_generator_makes_draws_reproducible_and_leaves_torchs_own_alone():
    logits = torch.randn(50, 20)
    before = torch.get_rng_state()
    one, two, other = (sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "value"), [
    *(("temperature", x) for x in (-1, math.inf, math.nan, True, "hot", None)), *(("top_k", x) for x in (0, -3, 1.5, True)),
    *(("top_p", x) for x in (0, -0.1, 1.01, math.nan, "half")),
])
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*; got {value!r}$"):
        sample(torch.zeros(2, 3), **{name: value})


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
    (torch.zeros(2, 3, dtype=torch.int64), {"cache": None}, TypeError, r"cache: expected one.* no new_cache\(\)"),
], ids=["1-D prompt", "empty prompt", "lengths", "no cache"])
def test_a_stream_tells_what_is_wrong_at_once(prompt, arguments, error, text):
    with pytest.raises(error, match=text):
        stream(lambda *_, **__: None, prompt, 3, **{"cache": [], **arguments})


def test_what_sample_refuses_is_refused_while_generating():
    with pytest.raises(ValueError, match=r"top_k: .*got 0"):
        generate(MODELS["plain"](), prompts(), 3, top_k=0)
