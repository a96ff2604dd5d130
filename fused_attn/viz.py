"""Seeing attention: which token looks at which, head by head and layer by layer, of any model that uses ``fused_attn.nn``.

    with viz.record(model) as recorded:
        model(tokens)
    viz.save(viz.layer_maps(recorded, labels), "attention.png")

Recording computes weights beside the forward pass, for that pass alone: the model runs, and trains, as it always does.
Drawing needs matplotlib (``pip install 'fused-attn[examples]'``).
"""

import base64
import contextlib
import copy
import html
import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from fused_attn import files
from fused_attn.inspection import attention_weights
from fused_attn.nn import KVCache, MemoryCache, MultiheadAttention

_CELL, _SMALL, _LARGE = 0.16, 2.4, 14.0  # inches: of one cell, and the least and most that one map measures
_LABELLED = 64  # tokens; more labels than that cannot be read


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Within this context, every ``MultiheadAttention`` of ``model`` leaves its last call's weights: {name: [B, H, L, S]}.

    They are in the dtype of the call, on its device, without gradients and before dropout. Layers that replaced torch's count
    too. The order is that in which layers first run; calls with a ``KVCache`` or nested tensors leave nothing.
    """
    recorded: dict[str, torch.Tensor] = {}
    signature = inspect.signature(MultiheadAttention.forward)

    def hook(name: str) -> Any:
        def before(module: MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind(module, *args, **kwargs).arguments
            if given["query"].is_nested or isinstance(given.get("cache"), KVCache):
                return
            names = ("query", "key", "value", "key_padding_mask", "attn_mask", "is_causal", "cache")
            if isinstance(given.get("cache"), MemoryCache):
                given["cache"] = copy.copy(given["cache"])  # recording must not fill the cache
            with torch.no_grad():
                q, k, _, arguments = module.heads(**{name: given[name] for name in names if name in given})
                recorded[name] = attention_weights(q, k, **arguments)

        return before

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()
               if isinstance(module, MultiheadAttention)]
    if not handles:
        raise ValueError("model: expected a fused_attn.nn.MultiheadAttention in it; replace_attention(model) makes them")
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def rollout(weights: Sequence[torch.Tensor], residual: float = 0.5) -> torch.Tensor:
    """How much of each input token reaches each token of the last layer: [B, N, N], rows that sum to 1.

    Each layer's weights [B, H, N, N], averaged over heads, are mixed with the residual stream, ``residual`` of the whole,
    and multiplied, first layer first. Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers".
    """
    if not weights or not 0 <= residual <= 1:
        raise ValueError(f"weights, residual: expected at least one layer and 0 to 1; got {len(weights)} and {residual!r}")
    flow: torch.Tensor | None = None
    for layer in weights:
        if layer.dim() != 4 or layer.shape[-1] != layer.shape[-2]:
            raise ValueError(f"weights: expected self-attention [B, H, N, N]; got shape {tuple(layer.shape)}")
        mean = layer.mean(1).to(torch.promote_types(layer.dtype, torch.float32))
        seen = mean.sum(-1, keepdim=True)
        mean = mean / torch.where(seen == 0, 1, seen)  # weight that was dropped, or went to a sink, is no token's
        mixed = (1 - residual) * mean + residual * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mixed = torch.where(seen == 0, torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device), mixed)
        flow = mixed if flow is None else mixed @ flow
    assert flow is not None
    return flow


def _draw(axes: Axes, weights: torch.Tensor, rows: Sequence[str] | None, columns: Sequence[str] | None, title: str) -> None:
    picture = weights.detach().float().cpu()
    axes.imshow(picture.numpy(), cmap="magma", vmin=0.0, vmax=max(float(picture.max()), 1e-6) if picture.numel() else 1.0,
                aspect="equal", interpolation="nearest")
    axes.set_title(title, fontsize=8)
    for axis, labels, length in ((axes.yaxis, rows, picture.shape[0]), (axes.xaxis, columns, picture.shape[1])):
        if labels is not None and len(labels) != length:
            raise ValueError(f"labels: expected {length}, one for each token; got {len(labels)}")
        if labels is None or length > _LABELLED:
            axis.set_ticks([])
        else:
            axis.set_ticks(range(length), [_plain(label) for label in labels], fontsize=6, family="monospace",
                           rotation=90 if axis is axes.xaxis else 0)


def _plain(label: str) -> str:
    """A token as one line that matplotlib takes literally."""
    return label.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$") or "\u2423"


def _size(shape: torch.Size) -> tuple[float, float]:
    """Width and height in inches of a map [rows, columns]."""
    height, width = (min(max(n * _CELL, _SMALL), _LARGE) for n in shape[-2:])
    return width, height


def attention_map(weights: torch.Tensor, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None,
                  title: str = "") -> Figure:
    """One map of weights [L, S], or of each head of [H, L, S] side by side: queries downwards, keys to the right.

    ``rows`` and ``columns`` are the tokens of queries and keys; more than 64 are not written out.
    """
    if weights.dim() not in (2, 3):
        raise ValueError(f"weights: expected [L, S] or [H, L, S], of one sequence; got shape {tuple(weights.shape)}")
    heads = weights[None] if weights.dim() == 2 else weights
    width, height = _size(heads.shape)
    figure = Figure(figsize=(len(heads) * (width + 0.5), height + 0.9), layout="constrained")
    for i, (axes, head) in enumerate(zip(figure.subplots(1, len(heads), squeeze=False)[0], heads, strict=True)):
        _draw(axes, head, rows, columns, f"{title} head {i}".strip() if weights.dim() == 3 else title)
    return figure


def layer_maps(recorded: Mapping[str, torch.Tensor], rows: Sequence[str] | None = None, columns: Sequence[str] | None = None,
               batch: int = 0) -> Figure:
    """Every head of every layer that ``record`` left, of one sequence of the batch: a row of maps for each layer.

    ``columns`` are the tokens of the keys where they are not those of the queries; maps of another width go without labels.
    """
    if not recorded:
        raise ValueError("recorded: expected at least one layer; run the model within record()")
    columns = rows if columns is None else columns
    layers = [(name, weights[batch]) for name, weights in recorded.items()]
    most = max(len(weights) for _, weights in layers)
    sizes = [_size(weights.shape) for _, weights in layers]
    figure = Figure(figsize=(most * (max(w for w, _ in sizes) + 0.4), sum(h + 0.7 for _, h in sizes)), layout="constrained")
    grid = figure.subplots(len(layers), most, squeeze=False, gridspec_kw={"height_ratios": [h for _, h in sizes]})
    for (name, weights), line in zip(layers, grid, strict=True):
        down, across = (labels if labels is not None and len(labels) == n else None
                        for labels, n in zip((rows, columns), weights.shape[1:], strict=True))
        for i, axes in enumerate(line):
            if i < len(weights):
                _draw(axes, weights[i], down, across, f"{name} head {i}")
            else:
                axes.set_axis_off()
    return figure


def side_by_side(maps: Mapping[str, torch.Tensor], rows: Sequence[str] | None = None,
                 columns: Sequence[str] | None = None) -> Figure:
    """Maps [L, S] of several models over the same tokens, each under its name."""
    if not maps or any(weights.dim() != 2 for weights in maps.values()):
        raise ValueError(f"maps: expected [L, S] for each name; got {({name: tuple(x.shape) for name, x in maps.items()})}")
    width, height = _size(next(iter(maps.values())).shape)
    figure = Figure(figsize=(len(maps) * (width + 0.6), height + 0.9), layout="constrained")
    for axes, (name, weights) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        _draw(axes, weights, rows, columns, name)
    return figure


def save(figure: Figure, path: str | Path, title: str = "attention") -> Path:
    """Writes a figure as .png, .svg or .pdf, or as one self-contained .html page; returns the path. A link there is replaced.

    Raises ValueError for a name with another ending, which would go to another file, and for a folder.
    """
    path = Path(path)
    known = (".html", *(f".{ending}" for ending in figure.canvas.get_supported_filetypes()))
    if path.suffix.lower() not in known or path.is_dir():
        raise ValueError(f"path: expected a file's name that ends in one of {', '.join(known)}; got {str(path)!r}")
    if path.suffix.lower() != ".html":
        files.write_figure(path, figure, dpi=150)
        return path
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    data = base64.b64encode(picture.getvalue()).decode()
    name = html.escape(title)
    files.write(path, f'<!doctype html><meta charset="utf-8"><title>{name}</title><h1>{name}</h1>'
                      f'<img alt="{name}" style="max-width:none" src="data:image/png;base64,{data}">\n')
    return path
