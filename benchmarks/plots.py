"""The pictures of a run, in the manner of the FlashAttention papers: bars over sequence lengths, a panel for each head dim.

python -m benchmarks.plots DIRECTORY draws them again from the summary.json there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fused_attn import files
from fused_attn.tools import options
from fused_attn.tools.bench.plots import COLOURS, STYLE, bars, legend, short

Row = dict[str, Any]

FAMILIES = {"window": "sliding window", "gqa": "grouped queries", "softcap": "softcap", "fp16": "fp16", "fp32": "fp32",
            "decode": "decoding"}
PANELS = {"TFLOP/s, fp16 and bf16": ("window", "gqa", "softcap", "fp16"),
          "TFLOP/s, fp32": ("fp32",), "TFLOP/s, decoding": ("decode",)}


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


def _standing(plt: Any, rows: list[Row], roofs: list[Row], conditions: Row) -> Any:
    """Above, ratios along the length; below, if the card's roofs were measured, how far from them each case is."""
    figure = plt.figure(figsize=(9.6, 3.6 * (1 + bool(roofs))), layout="constrained")
    above, *below = figure.subfigures(1 + bool(roofs), 1, squeeze=False)[:, 0]
    _ratios(above, [row for row in rows if row["family"] == "grid" and "ratio_to_best_peer" in row])
    for part in below:
        _roofline(part, rows, roofs)
    figure.suptitle(f"Above 1 ours is the fastest; hollow: it loses. {_where(conditions)}", fontsize=10)
    return figure


def _passes(rows: list[Row]) -> list[str]:
    return [which for which in ("forward", "backward") if any(row["pass"] == which for row in rows)]


def _ratios(figure: Any, rows: list[Row]) -> None:
    """Best peer's time over ours along the length."""
    passes = _passes(rows)
    panels = figure.subplots(1, len(passes), squeeze=False, sharey=True)
    lines = sorted({(row["head_dim"], row["causal"]) for row in rows})
    colours = dict(zip(sorted({head_dim for head_dim, _ in lines}), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False))
    for which, axes in zip(passes, panels[0], strict=True):
        for head_dim, causal in lines:
            points = sorted((row["n_keys"], row["ratio_to_best_peer"]) for row in rows
                            if (row["pass"], row["head_dim"], row["causal"]) == (which, head_dim, causal))
            axes.plot([n for n, _ in points], [ratio for _, ratio in points], "o-" if causal else "s--", markersize=4,
                      color=colours[head_dim], label=f"{head_dim} {'causal' if causal else 'full'}")
            losing = [point for point in points if point[1] < 1]
            axes.plot([n for n, _ in losing], [ratio for _, ratio in losing], "o" if causal else "s", markersize=4,
                      color=colours[head_dim], markerfacecolor="white", zorder=3)
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


def roofline_of(rows: list[Row]) -> tuple[float, float] | None:
    """(bytes, FLOPs a second) that the card was measured to copy and, in fp16 or bf16, to multiply at best, or None."""
    copied = [row["gbytes_per_s"] * 1e9 for row in rows if row["case"] == "copy"]
    multiplied = [row["tflops"] * 1e12 for row in rows if row.get("dtype") in ("bf16", "fp16")]
    return (max(copied), max(multiplied)) if copied and multiplied else None


def _roofline(figure: Any, rows: list[Row], roofs: list[Row]) -> None:
    """TFLOP/s over FLOPs a byte: both ceilings as measured, a point for each fp16 or bf16 case, joined to the best peer's."""
    found = roofline_of(roofs)
    rows = [row for row in rows if row.get("dtype") in ("bf16", "fp16") and row.get("bytes") and row.get("tflops")]
    passes = _passes(rows)
    if found is None or not passes:
        return
    bandwidth, rate = found
    ridge = rate / bandwidth
    for which, axes in zip(passes, figure.subplots(1, len(passes), squeeze=False, sharey=True)[0], strict=True):
        members = [row for row in rows if row["pass"] == which]
        x = [row["flops"] / row["bytes"] for row in members]
        span = (min(*x, ridge) / 2, max(*x, ridge) * 2)
        axes.plot([span[0], ridge, span[1]], [span[0] * bandwidth / 1e12, rate / 1e12, rate / 1e12], color="#222222",
                  label=f"copy {bandwidth / 1e9:.4g} GB/s, matmul {rate / 1e12:.4g} TFLOP/s")
        for at, row in zip(x, members, strict=True):
            best = row["peers"].get(row.get("best_peer"), {}).get("tflops")
            if best:
                axes.plot([at, at], [row["tflops"], best], color="#BBBBBB", linewidth=0.6, zorder=1)
                axes.plot(at, best, "x", color="#0072B2", markersize=4, label="best peer")
            loses = row.get("ratio_to_best_peer", 1) < 1
            axes.plot(at, row["tflops"], "o", color=COLOURS["ours"], markersize=4, label="ours",
                      markerfacecolor="white" if loses else COLOURS["ours"])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs a byte")
        axes.set_title(which, fontsize=9)
    figure.axes[0].set_ylabel("TFLOP/s")
    named = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.axes[-1].legend(list(named.values()), list(named), fontsize=7, loc="lower right", frameon=True)


def _beyond(plt: Any, rows: list[Row], rest: list[Row], conditions: Row) -> Any:
    """Above, features of plain attention as bars of TFLOP/s; below, a ratio for each case that is no bar anywhere."""
    featured = [row for row in rows if row["family"] in FAMILIES]
    kinds = {title: families for title, families in PANELS.items() if any(row["family"] in families for row in featured)}
    widths = [max(2, len({row["case"] for row in featured if row["family"] in families})) for families in kinds.values()]
    heights = [height for height in (2.7 * len(_passes(featured)), 0.5 + 0.2 * len(rest) if rest else 0.0) if height]
    figure = plt.figure(figsize=(max(9.6, 2.5 + 1.05 * sum(widths)), 0.9 + sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if featured:
        _features(parts.pop(0), featured, kinds, widths)
    if rest:
        _rest(parts.pop(0), rest)
    figure.suptitle(f"Beyond plain attention; hatched: ours loses. {_where(conditions)}", fontsize=10)
    return figure


def _features(figure: Any, rows: list[Row], kinds: dict[str, tuple[str, ...]], widths: list[int]) -> None:
    """Panels: each pass by kind of case, since fp32 and decoding live on scales of their own."""
    panels = figure.subplots(len(_passes(rows)), len(kinds), squeeze=False, width_ratios=widths)
    for which, line in zip(_passes(rows), panels, strict=True):
        for (title, families), axes in zip(kinds.items(), line, strict=True):
            members = [row for family in families for row in rows if (row["family"], row["pass"]) == (family, which)]
            labels = [f"{FAMILIES[row['family']]}\n{short(row['n_keys'])}, D {row['head_dim']}" for row in members]
            axes.set_visible(bool(members))
            bars(axes, members, labels)
            axes.tick_params(axis="x", labelsize=7)
            axes.set_ylabel(title)
            axes.set_title(which, fontsize=9)
    legend(figure)


def _rest(figure: Any, rows: list[Row]) -> None:
    """A bar for each case: the best peer's time over ours, those that lose hatched."""
    rows = sorted(rows, key=lambda row: row["ratio_to_best_peer"])
    axes = figure.subplots()
    for at, row in enumerate(rows):
        ratio = row["ratio_to_best_peer"]
        axes.barh(at, ratio, 0.7, color=COLOURS["ours"] if ratio >= 1 else "#F3D3C0", edgecolor=COLOURS["ours"],
                  hatch="" if ratio >= 1 else "////")
        axes.annotate(f"{ratio:.2f} of {row['best_peer']}", (ratio, at), (3, 0), textcoords="offset points", va="center",
                      fontsize=6.5)
    axes.set_yticks(range(len(rows)), [f"{row['case']}, {row['pass']}" for row in rows], fontsize=6.5)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.grid(axis="x")
    axes.set_xlabel("best peer's time / ours")
    axes.margins(x=0.25, y=0.01)


def pictures(out: Path) -> list[Path]:
    """Those that ``draw`` may make."""
    return [out / f"{name}.png" for name in ("forward", "backward", "ratio", "features")]


def draw(timed: list[Row], conditions: Row, out: Path) -> str:
    """Draws forward.png, backward.png, ratio.png and features.png as far as there are rows; says what was drawn."""
    try:
        import matplotlib
    except ImportError:
        return "No pictures: matplotlib is not installed."
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    roofs = [row for row in timed if row.get("family") == "roofline" and "ms" in row]
    timed = [row for row in timed if "ms" in row and row.get("family") not in ("overhead", "roofline")]
    compared = [row for row in timed if "ratio_to_best_peer" in row]
    grid = {row["pass"] for row in timed if row["family"] == "grid"}
    rest = [row for row in compared if row["family"] not in (*FAMILIES, "grid", "cold")]
    makers = {
        "forward": lambda: _grid(plt, timed, "forward", conditions) if "forward" in grid else None,
        "backward": lambda: _grid(plt, timed, "backward", conditions) if "backward" in grid else None,
        "ratio": lambda: _standing(plt, timed, roofs if roofline_of(roofs) else [], conditions)
        if any(row["family"] == "grid" for row in compared) else None,
        "features": lambda: _beyond(plt, timed, rest, conditions)
        if rest or any(row["family"] in FAMILIES for row in timed) else None,
    }
    drawn = []
    with plt.rc_context(STYLE):
        for name, make in makers.items():
            figure = make()
            if figure is not None:
                files.write_figure(out / f"{name}.png", figure)
                plt.close(figure)
                drawn.append(f"{name}.png")
    return f"Pictures: {', '.join(drawn)}" if drawn else "No pictures: nothing was timed."


def redraw(asked: argparse.Namespace) -> int:
    """Draws the pictures of a run that was measured before."""
    options.need("matplotlib", "bench")
    options.writable(*pictures(asked.directory))
    file = asked.directory / "summary.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows, conditions = [row for row in found["rows"] if row.get("family")], dict(found["conditions"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise options.BadInputError(f"{file}: expected the summary of a run of benchmarks.gpu; {error!r:.200}") from error
    print(draw(rows, conditions, asked.directory))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = options.Parser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("directory", type=options.folder, help="where benchmarks.gpu left its results")
    return options.run(parser, arguments, redraw)


if __name__ == "__main__":
    sys.exit(main())
