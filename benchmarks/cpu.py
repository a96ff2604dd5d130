"""What a machine without a GPU can tell: ``python -m benchmarks.cpu [--out FILE] [--stage NAME ...]``.

calls    attention() beside torch's SDPA, which answers it there: what a call adds
layers   fused_attn.nn beside torch.nn, of the same weights
models   a GPT and a Llama in training and in generation, by SDPA, by the matrix of scores, and by ours
steps    packed documents, rotary positions, a cache of keys and values
cold     first calls in fresh processes, of ours, SDPA and FlexAttention
imports  ``import torch`` and ``import fused_attn``, in fresh processes
memory   peak of the resident size over long sequences, in fresh processes
compile  the kernels for cards that are not here: seconds of every default kernel

Everything is timed in turns in one run and the medians compared: machines are noisy, ratios in one run much less so.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.layers import Sizes, layers
from fused_attn.tools.bench.cases import case
from fused_attn.tools.bench.contest import Contest, Subject, subject_of
from fused_attn.tools.bench.peers import SDPA_DEFAULT

Row = dict[str, Any]

SHAPES = (("tiny", 1, 1, 4, 8), ("layer", 8, 8, 128, 64), ("long", 1, 8, 2048, 64))  # name, batch, heads, length, head dim
ROUNDS = 41
LAYER = Sizes(8, 128, 512, 8, 2048, "fp32")


def calls() -> dict[str, Callable[[], Subject]]:
    """attention(causal=True) as a user's program calls it, by name."""
    made = {name: case(n, d, batch=batch, heads=heads, dtype="fp32", causal=True, family="calls")
            for name, batch, heads, n, d in SHAPES}
    return {f"{name}, {one.name}": partial(subject_of, one, "cpu", [SDPA_DEFAULT]) for name, one in made.items()}


def subjects() -> dict[str, Callable[[], Subject]]:
    """Everything that is timed in this process: what benchmarks.compare compares."""
    return {**calls(), **layers(LAYER, "cpu")}


def timed(named: dict[str, Callable[[], Subject]], rounds: int) -> Iterator[Row]:
    """The rows of some subjects."""
    from fused_attn.tools.report import track

    for name in track(list(named), "timing"):
        for row in Contest(named[name](), "cpu", rounds).rows():
            best = row.get("best_peer")
            added = {"added_us": round(1e3 * (row["ms"] - row["peers"][best]["ms"]), 2)} if best else {}
            yield {"case": name, **row, **added}


def _cold() -> Iterator[Row]:
    from benchmarks import fresh

    for one in fresh.cold_cases("cpu"):
        for row in fresh.cold(one, "cpu"):
            yield {"case": f"cold {one.name}, {'trained' if len(one.passes) > 1 else 'alone'}", **row}


def _stages(rounds: int = ROUNDS, small: bool = False) -> dict[str, Callable[[], Iterable[Row]]]:
    from benchmarks import fresh, models, packed, steps

    return {"calls": lambda: timed(calls(), rounds), "layers": lambda: timed(layers(LAYER, "cpu"), rounds),
            "models": lambda: timed(models.subjects("cpu", small), rounds),
            "steps": lambda: timed({**packed.subjects("cpu", small), **steps.subjects("cpu")}, rounds),
            "cold": _cold, "imports": fresh.imports, "memory": fresh.memory, "compile": fresh.compile_times}


def _shown(row: Row) -> Row:
    """A row as the table has it: what it measured, and the best other's."""
    best, ratio = row.get("best_peer"), row.get("ratio_to_best_peer")
    speed = f"{row['ms']:.4g} ms" if "ms" in row else f"FAILED {row['error']}" if "error" in row else ""
    other = row["peers"][best] if best else {}
    beside = f"{best}: {other['ms']:.4g} ms" if "ms" in other else ""
    extra = ("cold_ms", "disk_ms", "tokens_per_s", "peak_mib", "spill_bytes", "registers", "compile_s")
    more = ", ".join(f"{key} {row[key]}" for key in extra if row.get(key) is not None)
    return {"case": row["case"], "pass": row["pass"], "ours": speed, "beside": beside,
            "its_time_/_ours": "" if ratio is None else f"{ratio:.3f}", "more": more}


def main(arguments: list[str] | None = None) -> int:
    from fused_attn.tools import options  # here, as benchmarks.compare runs the rest on revisions without it

    parser = options.Parser(prog="python -m benchmarks.cpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=options.file(), help="write the rows and their conditions to this JSON file")
    parser.add_argument("--stage", choices=_stages(), action="append", help="this stage alone; may be given again")
    parser.add_argument("--rounds", type=options.whole(*options.COUNTS), default=ROUNDS,
                        help=f"times of each, quick calls many at a time ({ROUNDS})")
    parser.add_argument("--small", action="store_true", help="models of the smallest sizes")
    return options.run(parser, arguments, measure)


def measure(asked: argparse.Namespace) -> int:
    """Runs the stages, prints and writes their rows; Ctrl-C ends the measuring and nothing else."""
    from benchmarks.conditions import conditions
    from fused_attn import files
    from fused_attn.tools import options
    from fused_attn.tools.report import print_table

    options.check_call("cpu")
    found = {**conditions("cpu", None), "gpu": None, "interpreter": False, "threads": torch.get_num_threads(),
             "load": os.getloadavg()}
    key = f"CPU, {found['threads']} threads/torch {found['torch']}/triton {found['triton']}/{found['source']}"
    common = {"commit": found["commit"], "conditions": key}
    rows: list[Row] = []
    with options.until_interrupted() as interrupted:
        for stage, run in _stages(asked.rounds, asked.small).items():
            for row in run() if asked.stage is None or stage in asked.stage else ():
                rows.append({"stage": stage, **row, **common})
    complete = not interrupted.is_set()
    print_table([_shown(row) for row in rows], f"on a CPU, {found['threads']} threads, torch {found['torch']}; medians")
    if asked.out is not None and (rows or complete):
        result = {"conditions": {**found, "key": key}, "complete": complete, "rows": rows}
        files.write(asked.out, json.dumps(result, indent=1) + "\n")
    return options.status(complete, not any(row.get("error") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
