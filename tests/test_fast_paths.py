"""torch's code around modules of ours: its C++ path, which reads their weights and goes past them, is never taken."""

import pytest
import torch
from support.own_layers import OwnEncoder, OwnLayer
from torch import nn

from fused_attn import nn as fused
from fused_attn import replace_attention

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}:UserWarning") for text in (  # of torch's own stacks
    "enable_nested_tensor is True", "The PyTorch API of nested tensors")]

WIDTH, LENGTH = 16, 6
PADDING = torch.arange(LENGTH) >= torch.tensor([[4], [6], [1]])


def layer(cls=nn.TransformerEncoderLayer):
    return cls(WIDTH, 2, 24, 0.0, batch_first=True)


def encoder(one=None, cls=nn.TransformerEncoder):
    return cls(layer() if one is None else one, 2)


def fused_layer():
    return layer(fused.TransformerEncoderLayer)


def replaced(model):
    replace_attention(model)
    return model


def with_ours(model, ours=None):
    model.self_attn = ours or fused.MultiheadAttention(WIDTH, 2, batch_first=True)
    return model


STOCK = {  # torch's own code, or code that ends in it, around modules of ours; the same without
    "our layer in torch's encoder": (lambda: encoder(fused_layer()), encoder),
    "our attention in torch's layer": (lambda: with_ours(layer()), layer),
    "replaced attention, put in torch's layer": (
        lambda: with_ours(layer(), replaced(nn.MultiheadAttention(WIDTH, 2, batch_first=True))), layer),
    "our attention in a layer of torch's encoder": (lambda: encoder(with_ours(layer())), encoder),
    "a replaced layer, put in torch's encoder": (lambda: encoder(replaced(layer())), encoder),
    "a replaced layer in an encoder of one's own": (lambda: replaced(encoder(cls=OwnEncoder)), lambda: encoder(cls=OwnEncoder)),
    "replaced attention in a layer of one's own": (lambda: replaced(layer(OwnLayer)), lambda: layer(OwnLayer)),
    "one's own layer in a replaced encoder": (lambda: replaced(encoder(layer(OwnLayer))), lambda: encoder(layer(OwnLayer))),
    "all of it": (lambda: replaced(encoder()), encoder),
}


def refuse(*args, **kwargs):
    raise RuntimeError("a fast path")


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("case", STOCK)
def test_no_fast_path_around_our_modules(case, padding, monkeypatch):
    ours, theirs = (make().double().eval() for make in STOCK[case])
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=padding)
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        monkeypatch.setattr(torch, name, refuse)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="a fast path"):
            theirs(x, src_key_padding_mask=padding)
        out = ours(x, src_key_padding_mask=padding)
    counts = torch.ones(3, LENGTH, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(out[counts], expected[counts], rtol=1e-10, atol=1e-10)
    assert out.shape == x.shape
    assert out.isfinite().all()
