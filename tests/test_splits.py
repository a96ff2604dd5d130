"""Few queries over many keys: the keys in splits, whose results are joined."""

import pytest
import torch
from support import oracle
from support.features import FEATURES, Call, Shape
from support.guard import is_poison, memory_guard
from support.launches import recorded

from fused_attn import attention, attention_varlen, reference_attention
from fused_attn.kernels.launch import counted
from fused_attn.plan import tiles

pytestmark = pytest.mark.kernels

# Not those with lengths or a window of their own, nor those that keep the output's residual.
SHARED = [feature.name for feature in FEATURES
          if feature.name not in ("precise", "additive", "tree", "soft_tree", "lengths", "window")]
KEYS = 193  # at 32 keys a tile and a split: six splits, and one of a single key


@pytest.fixture
def small_splits(monkeypatch):
    """Shares of 32 keys from 64 on, so that a test need not attend to thousands."""
    monkeypatch.setattr(tiles, "MANY_KEYS", 64)
    monkeypatch.setattr(tiles, "SPLIT", 32)
    monkeypatch.setattr(tiles, "SPLIT_A_ROW", 1)


def shared(inputs):
    """What kernels gave, under the memory guard; out and LSE must come from splits."""
    with memory_guard() as guard:
        got = inputs.run("triton")
    assert guard.kernels.count("combine_kernel") == 1
    return got


@pytest.mark.few(3)
@pytest.mark.parametrize("n_queries", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SHARED)
def test_every_feature_over_splits_is_exact(name, n_queries, small_splits):
    inputs = Call((name,), Shape(2, 4, 2, n_queries, KEYS)).draw(torch.float64)
    got, want = shared(inputs), inputs.run("reference")
    for key, expected in want.items():
        assert not is_poison(got[key]).any(), key
        torch.testing.assert_close(got[key], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.few(2)
@pytest.mark.parametrize("arguments", [{"causal": True}, {"window": (1100, 3)}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize(("heads", "n_queries"), [
    ((8, 1), 1), ((2, 2), 64), pytest.param((6, 2), 3, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_halves_lose_no_more_than_in_one_sweep(arguments, heads, n_queries, dtype):
    """At the lengths at which users get splits; the limits are those of every other call."""
    case = oracle.Case(*heads, n_queries, 1300, 64, arguments=arguments)
    inputs, dout, dlse = case.draw(dtype)
    kernel_arguments = {**arguments, "backend": "triton"}
    with counted() as launches:
        got = oracle.run(inputs, dout, dlse, kernel_arguments)
    assert launches["combine_kernel"] == 1
    want = oracle.exact(inputs, dout, dlse, arguments)
    limit_out, limit_grad = oracle.max_r(dtype, 64)
    for name, limit in (("out", limit_out), ("dq", limit_grad), ("dk", limit_grad)):
        assert oracle.error_ratio(got[name], want[name]) <= limit, name
    torch.testing.assert_close(got["lse"].double(), want["lse"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("arguments", "rows"), [
    ({"causal": True}, (1, 2, 4, 16)), ({"window": (127, 9)}, (1, 2, 4, 16)), ({"window": (100, 0)}, (1, 2, 4, 16)),
    ({"key_lengths": torch.tensor([70])}, (1, 2, 4, 16)), ({"sinks": torch.zeros(8)}, (1, 2, 4, 16)),
    ({"key_lengths": torch.tensor([70]), "window": (100, 0)}, (1, 8, 1, 16)), ({"alibi_slopes": torch.ones(8)}, (1, 8, 1, 16)),
    ({"mask": torch.ones(128, dtype=torch.bool)}, (1, 8, 1, 16)), ({"dropout_p": 0.5}, (1, 8, 1, 16))], ids=str)
def test_keys_are_read_once_for_a_group(arguments, rows, small_splits):
    """The query heads of a group become rows of one tile, where nothing tells them apart."""
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 128, 16)
    with recorded() as launches:
        attention(q, k, k, backend="triton", **arguments)
    assert [launch.arguments[0].shape for launch in launches if launch.name == "forward_kernel"] == [rows]


@pytest.mark.parametrize("arguments", [{}, {"window": (100, 0)}, {"sinks": torch.randn(4)},
                                       {"key_lengths": torch.tensor([0, 70, 193])}],
                         ids=lambda arguments: "-".join(arguments) or "plain")
def test_the_batch_changes_no_bit(arguments, small_splits):
    q, k, v = torch.randn(3, 4, 1, 16), torch.randn(3, 2, KEYS, 16), torch.randn(3, 2, KEYS, 16)
    together = attention(q, k, v, backend="triton", return_lse=True, **arguments)
    for i in range(3):
        own = {name: x[i : i + 1] if name == "key_lengths" else x for name, x in arguments.items()}
        alone = attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], backend="triton", return_lse=True, **own)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


def test_packed_sequences_of_one_query_each(small_splits):
    """The step of a generation whose sequences have come to different lengths; one of them is empty, rows follow the last."""
    lengths = [150, 0, 64, 7]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q, k, v = torch.randn(6, 4, 16), torch.randn(230, 2, 16), torch.randn(230, 2, 8)
    starts = torch.arange(5, dtype=torch.int32)
    with counted() as launches:
        out, lse = attention_varlen(q, k, v, starts, ends, 1, 150, window=(80, 0), return_lse=True, backend="triton")
    assert launches["combine_kernel"] == 1
    for i, length in enumerate(lengths):
        part = (x[ends[i] : ends[i + 1]].transpose(0, 1)[None] for x in (k, v))
        want, want_lse = reference_attention(q[i][None, :, None], *part, window=(80, 0), return_lse=True)
        torch.testing.assert_close(out[i], want[0, :, 0])
        torch.testing.assert_close(lse[:, i], want_lse[0, :, 0])
        assert length or not out[i].any()
    assert not out[4:].any()
    assert (lse[:, 4:] == float("-inf")).all()


@pytest.mark.parametrize(("lengths", "group", "expected"), [
    ((1, 1023), 1, 1), ((1, 1024), 1, 4), ((64, 1024), 1, 2), ((65, 10**6), 1, 1), ((1, 32768), 1, 128), ((1, 32769), 1, 65),
    ((1, 10**6), 1, 123), ((1, 4096), 128, 4), ((64, 1024), 32, 1)])
def test_how_many_splits(lengths, group, expected):
    assert tiles.n_splits(*lengths, *lengths, group) == expected


def test_packed_sequences_share_within_their_tokens():
    """What splits write stays a fraction of the keys, however long one sequence may be beside many short ones."""
    assert tiles.n_splits(10_000, 1_100_000, 1, 10**5, 1) == 13
    assert tiles.n_splits(10_000, 30_000, 1, 10**4, 1) == 1
    assert tiles.n_splits(0, 4096, 1, 4096, 1) > 1
