"""Caches under whatever runs or fakes their tensors: right there, and right afterwards."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fused_attn.nn import (
    MemoryCache,
    MultiheadAttention,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

EMBED, HEADS = 24, 3


def filled(cls, capacity=None):
    model = cls({TransformerEncoder: TransformerEncoderLayer, TransformerDecoder: TransformerDecoderLayer}[cls](
        EMBED, HEADS, 16, batch_first=True, causal=True), 2).eval()
    memory = () if cls is TransformerEncoder else (torch.randn(2, 4, EMBED),)
    return model, model.new_cache(capacity), memory


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("capacity", [None, 12])
@pytest.mark.parametrize("cls", [TransformerEncoder, TransformerDecoder])
def test_a_cache_outlives_inference_mode(cls, capacity, ragged):
    """Filled, reordered into as many and into more, under inference mode; then changed in every way outside of it."""
    model, cache, memory = filled(cls, capacity)
    name = "src_key_padding_mask" if cls is TransformerEncoder else "tgt_key_padding_mask"
    padding = {name: torch.tensor([[False, False, False], [False, False, True]])} if ragged else {}
    x, index = torch.randn(2, 4, EMBED), torch.tensor([1, 0])
    expected = model.new_cache(capacity)
    with torch.no_grad():
        model(x[:, :3], *memory, cache=expected, **padding)
    with torch.inference_mode():
        model(x[:, :3], *memory, cache=cache, **padding)
        for one in cache:
            one.reorder(torch.tensor([1, 0, 1, 0]))
    with torch.no_grad():
        for one, other in zip(cache, expected, strict=True):
            one.reorder(torch.tensor([0, 1]))
            other.reorder(index)
        again = model(x[:, 3:], *memory, cache=cache)
        assert torch.equal(again, model(x[:, 3:], *[y[index] for y in memory], cache=expected))
        for one in cache:
            own, *rest = one if isinstance(one, tuple) else (one,)
            own.truncate(2)
            for each in (own, *rest):
                each.clear()
        model(x, *memory, cache=cache)


@pytest.mark.parametrize("capacity", [None, 12])
@pytest.mark.parametrize("cls", [TransformerEncoder, TransformerDecoder])
def test_a_cache_is_not_both_real_and_fake(cls, capacity):
    """What a tracer filled is refused where there are values, and the other way round, until it is cleared."""
    model, cache, memory = filled(cls, capacity)
    x = torch.randn(2, 3, EMBED)

    def fake(cache):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return model(mode.from_tensor(x), *map(mode.from_tensor, memory), cache=cache)

    with torch.no_grad():
        model(x, *memory, cache=cache)
        with pytest.raises((RuntimeError, ValueError), match="tracer"):
            fake(cache)
        expected = model(torch.cat((x, x), 1), *memory, cache=model.new_cache())[:, 3:]
        torch.testing.assert_close(model(x, *memory, cache=cache), expected)
        other = model.new_cache(capacity)
        assert isinstance(fake(other), FakeTensor)
        with pytest.raises((RuntimeError, ValueError), match="tracer"):
            model(x, *memory, cache=other)
        for one in other:
            for each in one if isinstance(one, tuple) else (one,):
                each.clear()
        assert type(model(x, *memory, cache=other)) is torch.Tensor


def test_a_memory_is_of_the_modules_type():
    module, cache = MultiheadAttention(EMBED, HEADS, batch_first=True).eval(), MemoryCache()
    x, memory = torch.randn(2, 1, EMBED), torch.randn(2, 4, EMBED)
    with torch.no_grad():
        module(x, memory, memory, need_weights=False, cache=cache)
        module.double()
        with pytest.raises(ValueError, match=r"MemoryCache: expected queries in torch.float32.*clear"):
            module(x.double(), memory.double(), memory.double(), need_weights=False, cache=cache)
