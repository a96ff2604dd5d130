"""Bar charts in the manner of the FlashAttention papers; the caller must have matplotlib."""

import textwrap
from pathlib import Path
from typing import Any

from fused_attn import files

Row = dict[str, Any]

# One colour for each implementation everywhere; all tell apart without colour vision (Okabe and Ito).
COLOURS = {"ours": "#D55E00", "sdpa": "#0072B2", "sdpa cudnn": "#0072B2", "sdpa flash": "#56B4E9", "sdpa efficient": "#BBBBBB",
           "flex": "#009E73", "eager": "#777777", "flash_attn 2": "#CC79A7", "flash_attn 3": "#222222"}
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
                   "grid.color": "#DDDDDD", "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 150}


def short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def speeds(row: Row) -> dict[str, Row]:
    """Implementation -> its timing, for those that have one."""
    timed = {"ours": row, **row.get("peers", {})}
    return {name: timed[name] for name in COLOURS if "tflops" in timed.get(name, {})}


def bars(axes: Any, rows: list[Row], labels: list[str]) -> None:
    """Groups of bars, TFLOP/s with the 20th to 80th percentile; the number of ours stands in its bar."""
    widest = max((len(speeds(row)) for row in rows), default=1)
    width = 0.84 / max(3, widest)
    top = max((timed["tflops"] for row in rows for timed in speeds(row).values()), default=1.0)
    for group, row in enumerate(rows):
        found = speeds(row)
        for place, (name, timed) in enumerate(found.items()):
            x, height = group + (place - (len(found) - 1) / 2) * width, timed["tflops"]
            low, high = (row["flops"] / timed[end] / 1e9 for end in ("p80", "p20"))
            axes.bar(x, height, 0.92 * width, color=COLOURS[name], label=name,
                     yerr=[[max(0.0, height - low)], [max(0.0, high - height)]],
                     error_kw={"elinewidth": 0.6, "ecolor": "#444444"})
            if name == "ours":
                inside = height > 0.25 * top
                axes.annotate(f"{height:.3g}", (x, height), (0, -6 if inside else 4), textcoords="offset points", rotation=90,
                              ha="center", va="top" if inside else "bottom", fontsize=6.5, color="white" if inside else "black")
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlim(-0.6, max(1, len(rows)) - 0.4)


def legend(figure: Any) -> None:
    """One legend of everything drawn, in the order of COLOURS, below the panels."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [name for name in COLOURS if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=len(order))


def save(rows: list[Row], title: str, path: Path) -> None:
    """Draws rows of timings, a panel for each pass, into a picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, 1.2 * len(rows) / len(passes)), 2.6 * len(passes) + 0.8), layout="constrained")
        for which, axes in zip(passes, figure.subplots(len(passes), squeeze=False)[:, 0], strict=True):
            members = [row for row in rows if row["pass"] == which]
            bars(axes, members, [_label(row) for row in members])
            axes.set_ylabel("TFLOP/s")
            axes.set_title(which, fontsize=9)
        figure.suptitle(textwrap.fill(title, int(16 * figure.get_figwidth())), fontsize=8)
        legend(figure)
        files.write_figure(path, figure)


def _label(row: Row) -> str:
    lengths = short(row["n_queries"]) + (f" x {short(row['n_keys'])}" if row["n_keys"] != row["n_queries"] else "")
    ratio = row.get("ratio_to_best_peer")
    verdict = "" if ratio is None else f"\n{ratio:.2f}{' LOSES' if round(ratio, 2) < 1 else ''}"
    return f"{lengths}, D {row['head_dim']}\n{row['dtype']}{' causal' if row['causal'] else ''}{verdict}"
