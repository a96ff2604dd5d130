"""What a second reading of the layers found: each case was wrong once."""

import copy

import pytest
import torch
from torch import nn

from fused_attn import apply_rotary, settings, viz
from fused_attn.kernels import launch
from fused_attn.nn import (
    KVCache,
    MemoryCache,
    MultiheadAttention,
    RotaryEmbedding,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    stream,
)

E, H = 24, 4


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def attended(**options):
    torch.manual_seed(0)
    return MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("options", [{"rope": RotaryEmbedding(6)}, {"alibi": True}, {"window": (2, 0)}, {}], ids=str)
def test_the_last_query_stands_at_the_last_key(options):
    """Of fewer queries than keys, with every option about positions alike."""
    module, x = attended(causal=True, **options), normal(2, 9, E)
    whole, last = (module(q, x, x, need_weights=False)[0] for q in (x, x[:, -3:]))
    torch.testing.assert_close(last, whole[:, -3:])
    parts = [x[0, :5], x[1]]
    nested, ends = (torch.nested.nested_tensor(rows, layout=torch.jagged) for rows in (parts, [p[-2:] for p in parts]))
    out = module(ends, nested, nested, need_weights=False)[0]
    for one, part in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(one, module(part, part, part, need_weights=False)[0][-2:])


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (3, 3)}, {"alibi": True}, {"rope": RotaryEmbedding(6)}],
                         ids=lambda options: next(iter(options)))
def test_a_memory_has_no_positions(options):
    with pytest.raises(ValueError, match="cache: expected no causal, window, alibi or rope with a MemoryCache"):
        attended(**options)(normal(1, 1, E), *[normal(1, 5, E)] * 2, need_weights=False, cache=MemoryCache())


def test_a_memory_cache_knows_the_shape_of_its_memory_and_no_gradients():
    module, cache, memory = attended(), MemoryCache(), normal(2, 5, E)
    with pytest.raises(RuntimeError, match="without gradients"):
        module(normal(2, 1, E), memory, memory, need_weights=False, cache=cache)
    with torch.no_grad():
        module(normal(2, 1, E), memory, memory, need_weights=False, cache=cache)
        with pytest.raises(ValueError, match="batch 2 and length 5; got 2 and 6: clear"):
            module(normal(2, 1, E), *[normal(2, 6, E)] * 2, need_weights=False, cache=cache)


def test_recording_fills_no_cache():
    decoder = TransformerDecoder(TransformerDecoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64), 1).eval()
    cache = decoder.new_cache()
    with viz.record(decoder) as recorded, pytest.raises(RuntimeError, match="without gradients"):
        decoder(normal(1, 1, E), normal(1, 4, E), cache=cache)
    assert cache[0].memory.k is None
    with viz.record(decoder) as recorded, torch.no_grad():
        decoder(normal(1, 1, E), normal(1, 4, E), cache=cache)
    weights = recorded["layers.0.multihead_attn"]
    assert weights.shape == (1, H, 1, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, H, 1, dtype=torch.float64))


def test_an_encoder_that_looks_both_ways_takes_no_cache():
    encoder = TransformerEncoder(TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64), 1).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="cache: expected a module with causal=True"):
        encoder(normal(1, 3, E), cache=encoder.new_cache())


@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_a_causal_mask_that_says_more_is_torchs(need_weights, padding):
    """Beside is_causal torch drops a floating mask only where neither weights nor padding ask for it."""
    ours, x = attended(), normal(2, 5, E)
    theirs = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) + normal(5, 5)
    more = {"key_padding_mask": torch.tensor([[0.0] * 5, [0.0] * 4 + [float("-inf")]], dtype=torch.float64)} if padding else {}
    for mine, other in zip(*(m(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights, **more)
                             for m in (ours, theirs.train())), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other)


def test_a_causal_module_needs_no_mask_to_be_told_so():
    layer, x = TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64, causal=True), normal(1, 4, E)
    assert torch.equal(layer(x, is_causal=True), layer(x))


@pytest.mark.kernels
def test_layers_share_the_callers_mask():
    """No layer keeps an inverted copy for its backward."""
    encoder = TransformerEncoder(TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64), 3)
    mask, kept = torch.ones(40, 40, dtype=torch.bool).triu(1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "BACKEND", "triton")
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            encoder(normal(1, 40, E), mask)
    quadratic = {x.untyped_storage().data_ptr() for x in kept if x.numel() == 40 * 40}
    assert quadratic == {mask.untyped_storage().data_ptr()}


def test_a_cache_filled_in_inference_mode_serves_without():
    module, x = attended(causal=True), normal(1, 4, E)
    cache, other = KVCache(), KVCache()
    with torch.inference_mode():
        module(*[x[:, :3].clone()] * 3, need_weights=False, cache=cache)
    with torch.no_grad():
        token = x[:, 3:]
        found = module(token, token, token, need_weights=False, cache=cache)[0]
        start = x[:, :3]
        module(start, start, start, need_weights=False, cache=other)
        torch.testing.assert_close(found, module(token, token, token, need_weights=False, cache=other)[0])


def test_steps_that_a_graph_may_replay():
    """A static cache on a GPU goes by what the device knows; the same steps on the CPU."""
    module, x = attended(causal=True, rope=RotaryEmbedding(6), window=(4, 0)), normal(2, 6, E)
    expected, cache = module(x, x, x, need_weights=False)[0], KVCache(8)
    cache._replays, cache._even = True, False
    cache.lengths = torch.zeros(2, dtype=torch.int32)
    with torch.no_grad():
        for _ in range(2):
            outs = []
            for i in range(6):
                token = x[:, i : i + 1]
                outs.append(module(token, token, token, need_weights=False, cache=cache)[0])
            torch.testing.assert_close(torch.cat(outs, 1), expected)
            address = cache.k.data_ptr()
            cache.clear()
            assert cache.k.data_ptr() == address
            assert cache.lengths.tolist() == [0, 0]


def test_options_leave_torchs_weights_as_they_were_drawn():
    torch.manual_seed(3)
    theirs = nn.Transformer(E, H, 1, 1, 16, batch_first=True)
    torch.manual_seed(3)
    ours = Transformer(E, H, 1, 1, 16, batch_first=True, causal=True, softcap=5.0, sinks=True, alibi=True)
    drawn = ours.state_dict()
    assert all(torch.equal(drawn[name], weight) for name, weight in theirs.state_dict().items())
    assert {name for name in drawn if name not in theirs.state_dict()} == {
        f"{layer}.sinks" for layer in ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn",
                                       "decoder.layers.0.multihead_attn")}


def test_slopes_beside_a_projection_that_was_wrapped():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    module, x = attended(alibi=True), normal(1, 5, E)
    expected = module(x, x, x, need_weights=False)[0]
    wrapped = copy.deepcopy(module)
    wrapped.out_proj = Wrapped(wrapped.out_proj)
    assert torch.equal(wrapped(x, x, x, need_weights=False)[0], expected)


def test_unknown_options_are_told():
    with pytest.raises(TypeError, match="bogus"):
        TransformerEncoderLayer(E, H, bogus=1)
    with pytest.raises(TypeError, match="bogus"):
        Transformer(E, H, custom_encoder=nn.Identity(), custom_decoder=nn.Identity(), bogus=1)


@pytest.mark.kernels
def test_rotary_follows_the_backend_of_the_environment(monkeypatch):
    x, angle = normal(1, 1, 4, 8), normal(4, 4)
    monkeypatch.setattr(settings, "BACKEND", "triton")
    with launch.counted() as launches:
        turned = apply_rotary(x, angle.cos(), angle.sin())
    assert launches["rotary_kernel"] == 1
    monkeypatch.setattr(settings, "BACKEND", "reference")
    with launch.counted() as launches:
        torch.testing.assert_close(apply_rotary(x, angle.cos(), angle.sin()), turned)
    assert not launches


@pytest.mark.parametrize("lengths", [[0, 2], [3, 4]], ids=str)
def test_prompts_have_at_least_a_token_and_at_most_their_row(lengths):
    with pytest.raises(ValueError, match="lengths: expected 1 to 3"):
        stream(lambda *_, **__: None, torch.zeros(2, 3, dtype=torch.int64), 1, lengths=torch.tensor(lengths), cache=[])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_are_their_sequences_alone():
    """What torch's own encoder makes of padding."""
    module, parts = attended(), [torch.randn(n, E, dtype=torch.float64) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts)
    out, _ = module(x, x, x, need_weights=False)
    assert out.layout == torch.strided
    for one, part in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(one, module(part, part, part, need_weights=False)[0])


@pytest.mark.parametrize("bad", [{"num_kv_heads": 3}, {"num_kv_heads": True}, {"rope": RotaryEmbedding(16)}, {"rope": 3},
                                 {"window": 4}, {"softcap": -1.0}, {"causal": 1}, {"colour": 3}], ids=str)
def test_a_module_is_adopted_whole_or_not_at_all(bad):
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    before, hooks = {name: x.clone() for name, x in module.state_dict().items()}, len(module._forward_pre_hooks)
    with pytest.raises((TypeError, ValueError)):
        MultiheadAttention.adopt(module, **{"causal": True, "sinks": True, "num_kv_heads": 1, **bad})
    assert type(module) is torch.nn.MultiheadAttention
    assert len(module._forward_pre_hooks) == hooks
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not vars(module).keys() - vars(torch.nn.MultiheadAttention(16, 2)).keys()
