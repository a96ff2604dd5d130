"""The two pictures of the demo, drawn without a display."""

import io
from typing import Any

import torch
from matplotlib.figure import Figure

from fused_attn.tools.demo.train import EARLY_STEPS, EARLY_TOLERANCE, History

INK, MUTED, FUSED, REFERENCE, LIMIT = "#1f2430", "#6b7280", "#f4a259", "#1d4e89", "#bc4b51"
STYLE: dict[str, Any] = {"color": INK, "fontsize": 11}
SIGNS = {" ": "·", "\n": "↵", "\t": "→"}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.2)
    return buffer.getvalue()


def losses(fused: History, reference: History, fused_backend: str, unigram: float) -> bytes:
    """PNG: both loss curves over the unigram entropy, and below them how far they lie apart."""
    figure = Figure(figsize=(10, 7), dpi=130, layout="constrained")
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    steps = range(1, len(fused.losses) + 1)

    curves.plot(steps, fused.losses, color=FUSED, linewidth=3.2, label=f"fused_attn.attention (backend {fused_backend})")
    curves.plot(steps, reference.losses, color=REFERENCE, linewidth=0.8, label="reference_attention")
    curves.plot(*zip(*fused.validation, strict=True), "o", color=FUSED, markeredgecolor=INK, markersize=8,
                label="validation, fused", zorder=3)
    curves.plot(*zip(*reference.validation, strict=True), "x", color=REFERENCE, markersize=5, label="validation, reference",
                zorder=4)
    curves.axhline(unigram, color=LIMIT, linewidth=1.2, linestyle="--")
    curves.annotate(f"unigram entropy {unigram:.2f}", (1, unigram), (-4, 5), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", color=LIMIT, fontsize=10)
    curves.set_ylabel("loss, nats per byte", **STYLE)
    curves.legend(frameon=False, fontsize=10)
    curves.set_title(f"Byte-level GPT on the Python standard library: validation loss {fused.validation[-1][1]:.3f} fused, "
                     f"{reference.validation[-1][1]:.3f} reference", loc="left", color=INK, fontsize=12, weight="bold")

    # Equal losses have no logarithm: they are drawn just below the rounding step of fp32 near 2, which is 2.4e-7.
    differences = [max(abs(a - b), 1e-7) for a, b in zip(fused.losses, reference.losses, strict=True)]
    gap.semilogy(steps, differences, ".", color=MUTED, markersize=3)
    early = min(EARLY_STEPS, len(differences))
    gap.plot([1, early], [EARLY_TOLERANCE] * 2, color=LIMIT, linewidth=1.6)
    gap.annotate(f"allowed: {EARLY_TOLERANCE:g} up to step {early}", (early, EARLY_TOLERANCE), (5, -3),
                 textcoords="offset points", color=LIMIT, fontsize=9)
    gap.set_ylim(5e-8, max(1e-3, 3 * max(differences)))
    gap.set_ylabel("|difference|", **STYLE)
    gap.set_xlabel("training step", **STYLE)
    for axes in (curves, gap):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.margins(x=0.01)
    return _png(figure)


def attention_map(weights: torch.Tensor, text: bytes, head: str) -> bytes:
    """PNG: ``weights`` [N, N] of one head, a row for each character of ``text`` [N] that looks back at the others."""
    figure = Figure(figsize=(9.4, 8.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    # The square root lets small weights show; it is undone in the labels of the bar.
    image = axes.imshow(weights.sqrt().masked_fill(future, float("nan")).numpy(), cmap="magma_r", vmin=0, vmax=1)
    labels = [SIGNS.get(c, c if c.isascii() and c.isprintable() else "?") for c in text.decode("latin-1")]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(labels)), labels, family="monospace", fontsize=8.5, color=INK)
        axis.set_tick_params(length=0, pad=2)
    axes.set_xlabel("looks at", **STYLE)
    axes.set_ylabel("character", **STYLE)
    axes.set_title(f"Attention of {head}: each row is one character's look back, and sums to 1", loc="left", color=INK,
                   fontsize=12, weight="bold")
    axes.spines[:].set_visible(False)
    ticks = (0, 0.05, 0.2, 0.5, 1)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    bar.set_label("weight", **STYLE)
    bar.outline.set_visible(False)
    return _png(figure)
