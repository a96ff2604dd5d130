"""Pictures of attention: that they show the weights, of any model with these layers, and leave the model as it was."""

import re

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from fused_attn import replace_attention, viz
from fused_attn.nn import KVCache, MultiheadAttention, Transformer, TransformerEncoder, TransformerEncoderLayer

E, H = 16, 2


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64, **options)
    return TransformerEncoder(layer, layers).eval()


def pictured(axes):
    """The numbers that a map shows."""
    return torch.from_numpy(axes.images[0].get_array().data.copy()).double()


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (2, 0), "softcap": 3.0, "sinks": True, "num_kv_heads": 1}],
                         ids=["plain", "options"])
def test_what_is_recorded_are_the_weights_of_the_call(options):
    model, x = encoder(1, **options), torch.randn(2, 6, E, dtype=torch.float64)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with viz.record(model) as recorded:
        model(x, src_key_padding_mask=padding)
    weights = recorded["layers.0.self_attn"]
    attended = model.layers[0].self_attn
    _, expected = attended(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad
    assert not weights[1, :, :, 4:].any()


def test_recording_changes_nothing():
    """Outputs, gradients, random numbers and hooks are what they were."""
    torch.manual_seed(1)
    model = TransformerEncoder(TransformerEncoderLayer(E, H, 16, 0.3, batch_first=True), 2).train()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    x = torch.randn(2, 5, E)

    def run():
        torch.manual_seed(2)
        out = model(x)
        return out, *torch.autograd.grad(out.sum(), list(model.parameters()))

    plain = run()
    with viz.record(model) as recorded:
        watched = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert list(recorded) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), viz.record(model):
        raise RuntimeError("stop")
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_models_of_torch_after_replacement_and_models_without_attention():
    model = nn.Transformer(E, H, 1, 1, 16, batch_first=True).eval()
    with pytest.raises(ValueError, match="replace_attention"), viz.record(model):
        pass
    with replace_attention(model), viz.record(model) as recorded:
        model(torch.randn(1, 4, E), torch.randn(1, 3, E))
    assert {name: x.shape[2:] for name, x in recorded.items()} == {
        "encoder.layers.0.self_attn": (4, 4), "decoder.layers.0.self_attn": (3, 3), "decoder.layers.0.multihead_attn": (3, 4)}


def test_calls_that_leave_nothing():
    model = encoder(1, causal=True)
    with viz.record(model) as recorded, torch.no_grad():
        model(torch.randn(1, 3, E, dtype=torch.float64), cache=[KVCache()])
    assert recorded == {}
    with pytest.raises(ValueError, match="at least one layer"):
        viz.layer_maps(recorded)


def test_rollout_by_hand():
    """Two layers of two tokens, half residual: the product of (A + 1) / 2."""
    first = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]])  # mean of its heads: all 1/2
    second = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    mixed_first = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    mixed_second = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    torch.testing.assert_close(viz.rollout([first, second])[0], mixed_second @ mixed_first)
    torch.testing.assert_close(viz.rollout([second], residual=0.0)[0], second[0, 0])
    torch.testing.assert_close(viz.rollout([second], residual=1.0)[0], torch.eye(2))
    lost = torch.tensor([[[[0.2, 0.2], [0.0, 0.0]]]])  # a sink took the rest; a query without keys stays itself
    torch.testing.assert_close(viz.rollout([lost], residual=0.0)[0], torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    flow = viz.rollout([torch.rand(3, 4, 7, 7).softmax(-1) for _ in range(5)])
    torch.testing.assert_close(flow.sum(-1), torch.ones(3, 7))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: viz.rollout([]), "weights"), (lambda: viz.rollout([torch.rand(1, 2, 3, 4)]), "self-attention"),
    (lambda: viz.rollout([torch.rand(1, 1, 2, 2)], residual=2), "residual"),
    (lambda: viz.attention_map(torch.rand(1, 2, 3, 3)), r"\[L, S\]"),
    (lambda: viz.attention_map(torch.rand(2, 3), ["a"], ["b"] * 3), "labels: expected 2"),
    (lambda: viz.side_by_side({}), "maps"), (lambda: viz.side_by_side({"a": torch.rand(1, 2, 2)}), "maps"),
])
def test_bad_calls_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_maps_show_the_weights_and_the_tokens():
    weights = torch.rand(3, 4, 5)
    figure = viz.attention_map(weights, ["a\n", "$b$", "", "d"], list("vwxyz"), "layer")
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == ["layer head 0", "layer head 1", "layer head 2"]
    for axes, head in zip(figure.axes, weights, strict=True):
        torch.testing.assert_close(pictured(axes), head.double())
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a\\n", r"\$b\$", "\u2423", "d"]
        assert [label.get_text() for label in axes.get_xticklabels()] == list("vwxyz")
    assert not viz.attention_map(torch.rand(70, 70), ["x"] * 70, ["x"] * 70).axes[0].get_xticks().size  # too many to read
    both = viz.side_by_side({"one": weights[0], "two": weights[1]}, list("abcd"), list("vwxyz"))
    assert [axes.get_title() for axes in both.axes] == ["one", "two"]
    torch.testing.assert_close(pictured(both.axes[1]), weights[1].double())


def test_a_map_for_every_head_of_every_layer():
    recorded = {"first": torch.rand(2, 2, 4, 4), "second": torch.rand(2, 3, 4, 6)}
    figure = viz.layer_maps(recorded, list("abcd"), batch=1)
    shown = [axes for axes in figure.axes if axes.images]
    titles = [axes.get_title() for axes in shown]
    assert titles == ["first head 0", "first head 1", "second head 0", "second head 1", "second head 2"]
    torch.testing.assert_close(pictured(shown[-1]), recorded["second"][1, 2].double())
    assert not shown[-1].get_xticks().size  # six keys, of which four tokens say nothing


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "html"])
def test_files(tmp_path, suffix):
    path = viz.save(viz.attention_map(torch.rand(3, 3)), tmp_path / "new" / f"map.{suffix}", "a <title>")
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>"}[suffix])
    if suffix == "html":
        text = content.decode()
        assert "a &lt;title&gt;" in text
        assert re.search(r'src="data:image/png;base64,iVBORw0KGgo[A-Za-z0-9+/=]{1000,}"', text)


@pytest.mark.parametrize("name", ["", ".", "..", "new", "new/", "map.", "map.foo", ".png", "map.png.txt", "folder.png", "v1.5"])
def test_what_is_no_picture_is_not_written_elsewhere(tmp_path, name):
    """matplotlib would write folder.png for a folder, and new.png for new."""
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.parent.glob("**/*"))
    with pytest.raises(ValueError, match=r"path: expected a file's name that ends in one of \.html"):
        viz.save(viz.attention_map(torch.rand(3, 3)), f"{tmp_path}/{name}" if name else tmp_path)
    assert sorted(tmp_path.parent.glob("**/*")) == before


@pytest.mark.parametrize("name", ["MAP.PNG", "map.HTML", "a.b.svg"])
def test_the_path_that_is_returned_is_the_file(tmp_path, name):
    path = viz.save(viz.attention_map(torch.rand(3, 3)), tmp_path / name)
    assert path.stat().st_size > 0
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_jagged_calls_leave_nothing_and_run():
    module = MultiheadAttention(E, H, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(n, E) for n in (2, 4)], layout=torch.jagged)
    with viz.record(module) as recorded:
        module(x, x, x, need_weights=False)
    assert recorded == {}


def test_every_attention_of_a_transformer_is_seen():
    model = Transformer(E, H, 2, 2, 16, 0.0, batch_first=True, causal=True).eval()
    with viz.record(model) as recorded:
        model(torch.randn(1, 4, E), torch.randn(1, 3, E))
    assert len(recorded) == 6
    causal = recorded["decoder.layers.1.self_attn"]
    assert not causal.triu(1).any()
    assert recorded["encoder.layers.1.self_attn"].triu(1).any()
