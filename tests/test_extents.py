"""Sizes that a launch does not expect: none of something, more than was promised, more than a card has room for."""

import pytest
import torch
import torch.nn.functional as F
from support.guard import memory_guard
from support.mods import larger

import fused_attn
from fused_attn import attention, attention_varlen, scaled_dot_product_attention
from fused_attn.call.spec import TileConfig
from fused_attn.plan import backends, tiles

pytestmark = pytest.mark.kernels


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(0, 2, 2), (2, 0, 2)])
@pytest.mark.parametrize("arguments", [
    lambda b, h: {"mask": torch.ones(b, h, 7, 7, dtype=torch.bool)},
    lambda b, h: {"mask_mod": fused_attn.document_mask(torch.arange(7))},
    lambda b, h: {"alibi_slopes": torch.ones(b, h)}, lambda b, h: {"bias": torch.ones(b, h, 7, 7)},
    lambda b, h: {"key_lengths": torch.ones(b, dtype=torch.int32)}, lambda b, h: {"dropout_p": 0.5},
    lambda b, h: {"sinks": torch.ones(h)},
], ids=["mask", "document", "alibi", "bias", "lengths", "dropout", "sinks"])
def test_no_batch_and_no_heads(batch, heads, kv_heads, arguments):
    q, k, v = normal(batch, heads, 7, 16), normal(batch, kv_heads, 7, 16), normal(batch, kv_heads, 7, 16)
    with memory_guard():
        out = attention(q, k, v, backend="triton", **arguments(batch, heads))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("arguments", [{}, {"mask_mod": fused_attn.document_mask(torch.zeros(20, dtype=torch.int32))},
                                       {"bias": torch.ones(1, 1, 20, 20, dtype=torch.float64)}], ids=["plain", "mask", "bias"])
def test_sequences_longer_than_promised_are_cut(monkeypatch, arguments):
    """On a GPU nobody looks at the lengths: nothing may be read or written beyond what max_seqlen makes room for."""
    monkeypatch.setattr(fused_attn.call.describe, "_check_packing", lambda *_: None)
    q, k, v = (torch.randn(300, 2, 16, dtype=torch.float64) for _ in range(3))
    cu = torch.tensor([0, 300], dtype=torch.int32)
    with memory_guard():
        out = attention_varlen(q, k, v, cu, cu, 20, 20, backend="triton", **arguments)
    first = attention(*(x[None, :20].transpose(1, 2) for x in (q, k, v)), backend="reference", **arguments)
    torch.testing.assert_close(out[:20], first[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
    assert (out[20:] == 0).all()


@pytest.mark.parametrize("shapes", [
    ((3, 0, 8), (3, 7, 8), (3, 7, 8)), ((3, 5, 8), (3, 0, 8), (3, 0, 8)), ((0, 8), (7, 8), (7, 8)),
    ((2, 3, 5, 8), (1, 2, 3, 7, 8), (1, 2, 3, 7, 8)), ((2, 0, 3, 5, 8), (2, 1, 3, 7, 8), (2, 1, 3, 7, 8)),
], ids=str)
def test_shapes_of_torchs_attention(monkeypatch, shapes):
    monkeypatch.setattr(backends.settings, "BACKEND", "triton")
    tensors = [normal(*shape) for shape in shapes]
    ours, theirs = scaled_dot_product_attention(*tensors), F.scaled_dot_product_attention(*tensors)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_vmap_of_torchs_attention_is_torchs(monkeypatch):
    monkeypatch.setattr(backends.settings, "BACKEND", "triton")
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mapped = torch.vmap(scaled_dot_product_attention)(q, k, v)
    torch.testing.assert_close(mapped, F.scaled_dot_product_attention(q, k, v))


def test_masks_compare_doubles_as_doubles():
    """A float argument of a mask is not rounded to what the scores are computed in."""
    mod = fused_attn.MaskMod("larger", larger, reference=lambda q, k, h, b, args: args[0] > args[1])
    q, k, v = (torch.randn(1, 1, n, 16) for n in (5, 7, 7))
    high = torch.tensor([1 + 1e-12] * 4 + [1.0] * 3, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    out = attention(q, k, v, mask_mod=mod(high, one), backend="triton")
    torch.testing.assert_close(out, attention(q, k[:, :, :4], v[:, :, :4], backend="reference"))
    torch.testing.assert_close(out, attention(q, k, v, mask_mod=mod(high, one), backend="reference"))


def test_wide_operands_are_not_pipelined():
    pipelined = TileConfig(128, 32, 8, 3, edge_stages=1)
    assert tiles.fit_operands(pipelined, 2, torch.bfloat16) == pipelined
    assert tiles.fit_operands(pipelined, 5, torch.bfloat16) == TileConfig(128, 32, 8, 1)


def test_unknown_arguments_are_named():
    q = torch.randn(5, 2, 16)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(TypeError, match="unexpected argument 'key_lengths'; did you mean seqused_k"):
        attention_varlen(q, q, q, cu, cu, 5, 5, key_lengths=torch.tensor([3]))
