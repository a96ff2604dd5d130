"""One query a head over few keys: a tile of few rows, in which a group's heads are rows; right, and read once."""

import pytest
import torch
from support.features import FEATURES, Call, Shape
from support.guard import is_poison, memory_guard
from support.launches import recorded

import fused_attn
from fused_attn import attention
from fused_attn.kernels.launch import counted
from fused_attn.plan import tiles

pytestmark = pytest.mark.kernels

# Not those that keep the output's residual, nor those whose tensors ask for more than one query.
NAMES = [feature.name for feature in FEATURES if feature.name not in ("precise", "additive", "tree", "soft_tree")]


@pytest.mark.few(4)
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_feature_is_exact(name, heads):
    """Forward and gradients in fp64, no byte outside of the tensors, and none left unwritten."""
    inputs = Call((name,), Shape(2, *heads, 1, 77)).draw(torch.float64)
    with memory_guard() as guard:
        got = inputs.run("triton")
    assert "combine_kernel" not in guard.kernels
    for key, expected in inputs.run("reference").items():
        assert not is_poison(got[key]).any(), key
        torch.testing.assert_close(got[key], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.few(6)
@pytest.mark.parametrize("n_keys", [1, 2, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window": (40, 0)}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_number_of_keys(n_keys, arguments, dtype):
    q, k, v = (torch.randn(2, heads, n, 40, dtype=dtype) for heads, n in ((8, 1), (2, n_keys), (2, n_keys)))
    out, lse = attention(q, k, v, backend="triton", return_lse=True, **arguments)
    want, want_lse = attention(q.double(), k.double(), v.double(), backend="reference", return_lse=True, **arguments)
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("arguments", "rows", "programs"), [
    ({}, (3, 2, 4, 16), 6), ({"causal": True}, (3, 2, 4, 16), 6), ({"window": (69, 0)}, (3, 2, 4, 16), 6),
    ({"key_lengths": torch.tensor([70, 3, 0])}, (3, 2, 4, 16), 6),
    # heads that something tells apart, or a window that leaves keys out
    ({"window": (20, 0)}, (3, 8, 1, 16), 24), ({"sinks": torch.zeros(8)}, (3, 8, 1, 16), 24),
    ({"alibi_slopes": torch.ones(8)}, (3, 8, 1, 16), 24), ({"mask": torch.ones(70, dtype=torch.bool)}, (3, 8, 1, 16), 24),
    ({"dropout_p": 0.5}, (3, 8, 1, 16), 24)], ids=str)
def test_keys_are_read_once_for_a_group(arguments, rows, programs):
    q, k = torch.randn(3, 8, 1, 16), torch.randn(3, 2, 70, 16)
    with recorded() as launches:
        attention(q, k, k, backend="triton", **arguments)
    (launch,) = (launch for launch in launches if launch.name == "forward_kernel")
    assert (launch.arguments[0].shape, launch.programs) == (rows, programs)
    assert launch.config == tiles.choose_splits(rows[2], 16, 16, torch.float32, "interpreter")


@pytest.mark.parametrize(("n_queries", "n_keys", "schedule"), [
    (1, 1, "decode"), (1, 1023, "decode"), (1, 1100, "splits"), (2, 100, "pointers"), (0, 5, "pointers"), (1, 0, "decode")])
def test_what_explain_tells(n_queries, n_keys, schedule):
    q, k = torch.randn(1, 2, n_queries, 16), torch.randn(1, 2, n_keys, 16)
    assert fused_attn.explain(q, k, k, backend="triton").schedule["forward"] == schedule


def test_no_keys_and_no_heads():
    q = torch.randn(2, 4, 1, 16)
    empty = torch.randn(2, 2, 0, 16)
    out, lse = attention(q, empty, empty, backend="triton", return_lse=True)
    assert not out.any()
    assert (lse == float("-inf")).all()
    with counted() as launches:
        assert attention(q[:0], empty[:0], empty[:0], backend="triton").shape == (0, 4, 1, 16)
    assert not launches


@pytest.mark.parametrize("arguments", [{}, {"window": (30, 0)}, {"key_lengths": torch.tensor([0, 70, 44])}], ids=str)
def test_the_batch_changes_no_bit(arguments):
    q, k, v = torch.randn(3, 4, 1, 16), torch.randn(3, 2, 70, 16), torch.randn(3, 2, 70, 16)
    together = attention(q, k, v, backend="triton", return_lse=True, **arguments)
    for i in range(3):
        own = {name: x[i : i + 1] if name == "key_lengths" else x for name, x in arguments.items()}
        alone = attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], backend="triton", return_lse=True, **own)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


def test_a_repeated_step_is_a_plan():
    """The third call and later ones give what the first gave, of other tensors and in a cache's layout."""
    k, v = (x[:, :, :50] for x in torch.randn(2, 1, 2, 128, 16, dtype=torch.bfloat16))
    for _ in range(5):
        q = torch.randn(1, 8, 1, 16, dtype=torch.bfloat16)
        got = attention(q, k, v, backend="triton")
        want = attention(q.double(), k.double(), v.double(), backend="reference")
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
