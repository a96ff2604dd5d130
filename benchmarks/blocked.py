"""What calls cost where no kernel of ours runs: on a CPU, beside what people use there today.

    python -m benchmarks.blocked --out benchmarks/results/cpu/blocked.json      # --threads, --dtype, --case for a part

Each case is a feature at one shape, in inference, forward and backward, answered by whatever backend the package chooses; every
result is held to fp64 first. Beside it: torch's SDPA with the mask or bias that a program has to make for it, FlexAttention
compiled (inference alone: it has no backward on a CPU), and the scores as one matrix in plain PyTorch, which is what models do
without either.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import alternatives, features
from benchmarks.features import FEATURES, Call, Feature, Shape
from fused_attn.tools.bench.contest import Contest, Entry, Subject

Row = dict[str, Any]
ROUNDS = 7
SHAPE = Shape(1, 8, 8, 2048, 64, 64, "fp32")
LONG: dict[str, Any] = {"length": 4096}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: a feature, and what of the shape differs
    "window 256 of 4096": ("window 256", LONG), "window 1024 of 4096": ("window 1024", LONG),
    "softcap": ("softcap", {}), "ALiBi": ("alibi", {}), "bias": ("bias", {}), "sinks": ("sinks", {}),
    "key lengths": ("key lengths", {"batch": 4, "length": 1024}), "documents": ("document mask", {}),
    "prefix LM": ("prefix LM", {}), "grouped heads": ("plain", {"kv_heads": 2}), "dropout": ("dropout", {}),
    "additive score": ("additive score", {"length": 256}),
}


def subject(name: str, shape: Shape, inference: bool) -> Subject:
    """One case, with the matrix of scores among its peers, and in inference FlexAttention."""
    feature_name, differs = CASES[name]
    feature = next(x for x in FEATURES if x.name == feature_name)
    shape = replace(shape, **differs)
    # Unasked, dropout draws torch's mask, which is not the reference's.
    made = features.subject(feature, shape, "cpu", backend=lambda device: "blocked" if feature_name == "dropout" else None)
    peers: dict[str, Callable[[], Entry] | str] = {**made.peers, "matrix of scores": partial(_matrix, feature, shape)}
    made = replace(made, peers=peers, yardstick=None, facts={**made.facts, "family": "blocked"})
    if not inference:
        return made
    if feature_name in alternatives.ALTERNATIVES:
        peers["flex"] = partial(_flex, feature, shape)
    inferred: dict[str, Callable[[], Entry] | str] = {
        peer: prepare if isinstance(prepare, str) else partial(_without_graph, prepare) for peer, prepare in peers.items()}
    return replace(made, passes=("forward",), ours=partial(_without_graph, made.ours), peers=inferred)


def _without_graph(prepare: Callable[[], Entry]) -> Entry:
    """An implementation that builds no graph."""
    return Entry(torch.no_grad()(prepare().call))


def _flex(feature: Feature, shape: Shape) -> Entry:
    """FlexAttention, compiled for a case."""
    call = Call(feature, shape, "cpu")
    leaves = {name: x.detach() for name, x in call.leaves(False).items()}
    tensors = call.tensors | {"n": torch.tensor(call.shape.length)}
    attend = alternatives.flex(alternatives.ALTERNATIVES[feature.name], tensors, feature.causal, "cpu",
                               call.shape.heads != call.shape.kv_heads)
    return Entry(partial(attend, leaves), leaves, call.dout)


def _matrix(feature: Feature, shape: Shape) -> Entry:
    """The reference: weights as one tensor."""
    call = Call(feature, shape, "cpu")
    leaves = call.leaves(False)
    return Entry(partial(call.attend, leaves, "reference"), leaves, call.dout)


def subjects(shape: Shape = SHAPE) -> dict[str, Callable[[], Subject]]:
    """Every case, by name."""
    return {name: partial(subject, name, shape, inference=False) for name in CASES}


def rows(dtypes: list[str], threads: list[int], cases: list[str], rounds: int, shape: Shape = SHAPE) -> Iterator[Row]:
    """The rows of some cases, in turns with their peers."""
    from fused_attn.tools.report import track

    asked = [(dtype, count, name) for dtype in dtypes for count in threads for name in cases]
    before = torch.get_num_threads()
    try:
        for dtype, count, name in track(asked, "timing"):
            torch.set_num_threads(count)
            for inference in (True, False):
                for row in Contest(subject(name, replace(shape, dtype=dtype), inference), "cpu", rounds).rows():
                    yield {"case": name, "threads": count, **row, **({"pass": "inference"} if inference else {})}
    finally:
        torch.set_num_threads(before)


def shown(row: Row) -> Row:
    """A row as the table has it: its times over ours."""
    others = {name: f"{peer['ms'] / row['ms']:.2f}" for name, peer in row["peers"].items() if "ms" in peer and "ms" in row}
    ours = f"{row['ms']:.1f} ms" if "ms" in row else f"FAILED {row.get('error')}"
    return {"case": row["case"], "dtype": row["dtype"], "threads": row["threads"], "pass": row["pass"], "ours": ours,
            **{f"{name}_/_ours": others.get(name, "") for name in ("sdpa", "flex", "matrix of scores")}}


def table(done: list[Row]) -> str:
    """The rows as a table in Markdown: others' times over ours, those of who is quicker in bold."""
    lines = ["| case | dtype | threads | | ours | SDPA | FlexAttention | matrix of scores |", f"|{'---|' * 8}"]
    for row in map(shown, done):
        cells = [row["case"], row["dtype"], row["threads"], row["pass"], row["ours"]]
        ratios = [row[f"{name}_/_ours"] for name in ("sdpa", "flex", "matrix of scores")]
        lines.append(f"| {' | '.join(map(str, cells))} | "
                     + " | ".join(f"**{x}**" if x and float(x) < 1 else x for x in ratios) + " |")
    return "\n".join(lines) + "\n"


def draw(done: list[Row], path: Path) -> None:
    """How many times as long each peer takes, a panel for inference and one for training's backward, fp32 on most threads."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fused_attn import files
    from fused_attn.tools.bench.plots import STYLE

    colours = {"sdpa": "#0072B2", "flex": "#E69F00", "matrix of scores": "#999999"}
    threads = max(row["threads"] for row in done)
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, which in zip(panels, ("inference", "backward"), strict=True):
            members = [row for row in done if row["pass"] == which and row["threads"] == threads and row["dtype"] == "fp32"
                       and "ms" in row]
            for place, (peer, colour) in enumerate(colours.items()):
                ratios = {i: row["peers"][peer]["ms"] / row["ms"] for i, row in enumerate(members)
                          if "ms" in row["peers"].get(peer, {})}
                axes.barh([i + (place - 1) * 0.27 for i in ratios], list(ratios.values()), 0.25, color=colour,
                          label={"sdpa": "torch SDPA with a mask", "flex": "FlexAttention, compiled"}.get(peer, peer))
            axes.set_yticks(range(len(members)), [row["case"] for row in members])
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set_xscale("log")
            axes.set_xlabel("times as long as ours")
            axes.set_title(f"{which}, fp32, {threads} threads", fontsize=9)
        panels[0].invert_yaxis()
        panels[0].legend(fontsize=7)  # where all of them are
        files.write_figure(path, figure)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    from fused_attn.tools import options

    parser = options.Parser(prog="python -m benchmarks.blocked", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=options.file(), help="write the rows and their conditions to this JSON file")
    parser.add_argument("--plot", type=options.file(), help="draw the ratios into this PNG")
    parser.add_argument("--case", choices=CASES, action="append", help="this case alone; may be given again")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), action="append", help="fp32 and bf16 unless given")
    parser.add_argument("--threads", type=options.whole(1, 1024), action="append",
                        help="1 and as many as torch has, unless given")
    parser.add_argument("--rounds", type=options.whole(*options.COUNTS), default=ROUNDS, help=f"times of each ({ROUNDS})")
    parser.add_argument("--small", action="store_true", help="the smallest shapes")
    return options.run(parser, arguments, measure)


def measure(asked: argparse.Namespace) -> int:
    """Times the cases, prints and writes their rows; Ctrl-C ends the measuring and nothing else."""
    from benchmarks.conditions import conditions
    from fused_attn import files
    from fused_attn.tools import options
    from fused_attn.tools.report import print_table

    options.check_call("cpu")
    found = {**conditions("cpu", None), "gpu": None, "interpreter": False}
    threads = asked.threads or sorted({1, torch.get_num_threads()})
    shape = replace(SHAPE, heads=2, kv_heads=2, head_dim=16, head_dim_v=16) if asked.small else SHAPE
    done: list[Row] = []
    with options.until_interrupted() as interrupted:
        for row in rows(asked.dtype or ["fp32", "bf16"], threads, asked.case or list(CASES), asked.rounds, shape):
            done.append(row)
            if asked.out is not None:
                files.write(asked.out, json.dumps({"conditions": found, "complete": False, "rows": done}, indent=1) + "\n")
    complete = not interrupted.is_set()
    print_table([shown(row) for row in done], f"on a CPU, torch {found['torch']}; times of others over ours, medians")
    if asked.out is not None and (done or complete):
        files.write(asked.out, json.dumps({"conditions": found, "complete": complete, "rows": done}, indent=1) + "\n")
    if asked.plot is not None and done:
        draw(done, asked.plot)
    return options.status(complete, not any(row.get("error") for row in done))


if __name__ == "__main__":
    sys.exit(main())
