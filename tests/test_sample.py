"""Sampling against arithmetic by hand, up to the edges of what its parameters may be."""

import math

import numpy as np
import pytest
import torch

from fused_attn.nn import sample, stream


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
        stream(lambda *_, **__: 1 / 0, torch.zeros(2, 3, dtype=torch.int64), 3, cache=[], **arguments)


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
