"""The pictures of a run, in the manner of the FlashAttention papers: bars over sequence lengths, a panel for each head dim.

python -m benchmarks.plots DIRECTORY draws them again from the summary.json there.
"""

import json
import sys
from pathlib import Path
from typing import Any

from fused_attn.bench.plots import STYLE, bars, legend, short

Row = dict[str, Any]

FAMILIES = {"window": "sliding window", "gqa": "grouped queries", "softcap": "softcap", "fp16": "fp16", "fp32": "fp32",
            "decode": "decoding"}
PANELS = {"TFLOP/s, halves": ("window", "gqa", "softcap", "fp16"), "TFLOP/s, fp32": ("fp32",), "TFLOP/s, decoding": ("decode",)}


def _grid(plt: Any, rows: list[Row], which: str, conditions: Row) -> Any:
    """Panels: causal or not by head dim."""
    rows = [row for row in rows if row["family"] == "grid" and row["pass"] == which]
    head_dims = sorted({row["head_dim"] for row in rows})
    masks = sorted({row["causal"] for row in rows})
    figure, panels = plt.subplots(len(masks), len(head_dims), figsize=(4.3 * len(head_dims), 2.8 * len(masks) + 0.7),
                                  squeeze=False, sharey="row", layout="constrained")
    for causal, line in zip(masks, panels, strict=True):
        for head_dim, axes in zip(head_dims, line, strict=True):
            members = sorted((row for row in rows if (row["head_dim"], row["causal"]) == (head_dim, causal)),
                             key=lambda row: row["n_keys"])
            bars(axes, members, [short(row["n_keys"]) for row in members])
            axes.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'}", fontsize=9)
            axes.set_xlabel("sequence length")
        line[0].set_ylabel("TFLOP/s")
    figure.suptitle(f"Attention {which}, {'/'.join(sorted({row['dtype'] for row in rows}))}: {_where(conditions)}", fontsize=10)
    legend(figure)
    return figure


def _where(conditions: Row) -> str:
    note = ", NOT A GPU" if conditions["interpreter"] else ""
    return f"{conditions['gpu']}, torch {conditions['torch']}, Triton {conditions['triton']}{note}"


def _ratios(plt: Any, rows: list[Row], conditions: Row) -> Any:
    """Best peer's time over ours along the length: above 1 we win."""
    rows = [row for row in rows if row["family"] == "grid" and "ratio_to_best_peer" in row]
    passes = [which for which in ("forward", "backward") if any(row["pass"] == which for row in rows)]
    figure, panels = plt.subplots(1, len(passes), figsize=(4.8 * len(passes), 3.4), squeeze=False, sharey=True,
                                  layout="constrained")
    lines = sorted({(row["head_dim"], row["causal"]) for row in rows})
    colours = dict(zip(sorted({head_dim for head_dim, _ in lines}), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False))
    for which, axes in zip(passes, panels[0], strict=True):
        for head_dim, causal in lines:
            points = sorted((row["n_keys"], row["ratio_to_best_peer"]) for row in rows
                            if (row["pass"], row["head_dim"], row["causal"]) == (which, head_dim, causal))
            axes.plot([n for n, _ in points], [ratio for _, ratio in points], "o-" if causal else "s--", markersize=4,
                      color=colours[head_dim], label=f"{head_dim} {'causal' if causal else 'full'}")
        axes.axhspan(0, 1, color="#F3F3F3")
        axes.axhline(1, color="#222222", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["n_keys"] for row in rows})
        axes.set_xticks(ticks, [short(n) for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel("sequence length")
        axes.set_title(which, fontsize=9)
    panels[0][0].set_ylabel("best peer's time / ours")
    panels[0][0].set_ylim(bottom=0)
    panels[0][-1].legend(title="head dim", fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"Above 1 ours is the fastest: {_where(conditions)}", fontsize=10)
    return figure


def _features(plt: Any, rows: list[Row], conditions: Row) -> Any:
    """Panels: each pass by kind of case, since fp32 and decoding live on scales of their own."""
    passes = [which for which in ("forward", "backward") if any(r["pass"] == which and r["family"] in FAMILIES for r in rows)]
    kinds = {title: families for title, families in PANELS.items() if any(row["family"] in families for row in rows)}
    widths = [max(2, len({row["case"] for row in rows if row["family"] in families})) for families in kinds.values()]
    figure, panels = plt.subplots(len(passes), len(kinds), figsize=(2.5 + 1.05 * sum(widths), 2.7 * len(passes) + 0.7),
                                  squeeze=False, layout="constrained", width_ratios=widths)
    for which, line in zip(passes, panels, strict=True):
        for (title, families), axes in zip(kinds.items(), line, strict=True):
            members = [row for family in families for row in rows if (row["family"], row["pass"]) == (family, which)]
            labels = [f"{FAMILIES[row['family']]}\n{short(row['n_keys'])}, D {row['head_dim']}" for row in members]
            axes.set_visible(bool(members))
            bars(axes, members, labels)
            axes.tick_params(axis="x", labelsize=7)
            axes.set_ylabel(title)
            axes.set_title(which, fontsize=9)
    figure.suptitle(f"Features: {_where(conditions)}", fontsize=10)
    legend(figure)
    return figure


def draw(timed: list[Row], conditions: Row, out: Path) -> str:
    """Draws forward.png, backward.png, ratio.png and features.png as far as there are rows; says what was drawn or why not."""
    try:
        import matplotlib
    except ImportError:
        return "No pictures: matplotlib is not installed."
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timed = [row for row in timed if "ms" in row and row.get("family") != "overhead"]
    grid = {row["pass"] for row in timed if row["family"] == "grid"}
    makers = {
        "forward": lambda: _grid(plt, timed, "forward", conditions) if "forward" in grid else None,
        "backward": lambda: _grid(plt, timed, "backward", conditions) if "backward" in grid else None,
        "ratio": lambda: _ratios(plt, timed, conditions)
        if any(row["family"] == "grid" and "ratio_to_best_peer" in row for row in timed) else None,
        "features": lambda: _features(plt, timed, conditions) if any(row["family"] in FAMILIES for row in timed) else None,
    }
    drawn = []
    with plt.rc_context(STYLE):
        for name, make in makers.items():
            figure = make()
            if figure is not None:
                figure.savefig(out / f"{name}.png")
                plt.close(figure)
                drawn.append(f"{name}.png")
    return f"Pictures: {', '.join(drawn)}" if drawn else "No pictures: nothing was timed."


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    print(draw([row for row in found["rows"] if row["stage"] == "timing"], found["conditions"], directory))
