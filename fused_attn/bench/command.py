"""``fused-attn bench``: attention() on the user's own shapes beside what else this machine has.

On a GPU the kernels are timed by events, with a cold L2 cache; on a CPU, by the clock, what answers there by default: torch's
own kernel, so that what is seen is what a call adds to it. Each implementation is checked before it is timed.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fused_attn.bench import contest, peers
from fused_attn.bench.cases import DTYPES, Case, case, grid
from fused_attn.bench.oracle import Row
from fused_attn.report import conditions, git, print_table, track

# What an argument is where it is not given: on a GPU, and on a CPU, where larger ones would take minutes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"batch": 2, "heads": 16, "length": [1024, 4096], "head_dim": [128], "dtype": ["bf16"]},
    "cpu": {"batch": 1, "heads": 4, "length": [128, 512, 1024], "head_dim": [64], "dtype": ["fp32"]},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; those that take several values are timed in every combination."""
    parser.add_argument("--preset", choices=("papers", "decode"), help="papers: H D = 2048 and B N = 16384, lengths 512 to "
                        "16384, both masks; decode: one query over many keys. Shapes given beside it are not looked at")
    parser.add_argument("--batch", type=int, metavar="B")
    parser.add_argument("--heads", type=int, metavar="H")
    parser.add_argument("--kv-heads", type=int, metavar="H", help="heads of keys and values, a divisor of --heads")
    parser.add_argument("--length", type=int, nargs="+", metavar="N", help="queries, and keys unless --keys says otherwise")
    parser.add_argument("--keys", type=int, metavar="N")
    parser.add_argument("--head-dim", type=int, nargs="+", metavar="D")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), nargs="+")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="keys on either side; -1: all")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--pass", dest="which", choices=("forward", "backward"), nargs="+", default=["forward", "backward"])
    parser.add_argument("--backend", choices=("triton", "torch", "reference"), help="of ours; by default what a call chooses")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU where there is one")
    parser.add_argument("--rounds", type=int, help="timed calls of each; by default what fits 120 ms, 10 at least")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="write rows and conditions to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw bars into this picture; needs matplotlib")


def cases(options: argparse.Namespace, device: str) -> list[Case]:
    """What the options ask for."""
    if options.preset == "papers":
        found = [grid(n, d, causal, dtype=dtype) for n in (4096, 16384, 1024, 8192, 2048, 512) for d in (128, 64, 256)
                 for causal in (True, False) for dtype in options.dtype or ["bf16"]]
    elif options.preset == "decode":
        found = [case(1, 128, batch=batch, heads=32, kv_heads=8, n_keys=n, dtype=dtype, passes=("forward",), family="decode")
                 for batch, n in ((16, 8192), (1, 131072)) for dtype in options.dtype or ["bf16"]]
    else:
        own = {name: getattr(options, name) or default for name, default in DEFAULTS[device].items()}
        window = None if options.window is None else tuple(None if side < 0 else side for side in options.window)
        found = [case(n, d, batch=own["batch"], heads=own["heads"], kv_heads=options.kv_heads, n_keys=options.keys, dtype=dtype,
                      causal=options.causal, window=window, softcap=options.softcap, family="user")
                 for n, d, dtype in product(own["length"], own["head_dim"], own["dtype"])]
    asked = tuple(which for which in ("forward", "backward") if which in options.which)
    return [replace(subject, backend=options.backend, passes=tuple(which for which in subject.passes if which in asked))
            for subject in found]


def _check(subjects: list[Case], device: str) -> None:
    """Refuses what attention() would refuse, before anything is timed."""
    for subject in subjects:
        sizes = (subject.batch, subject.heads, subject.kv_heads, subject.n_queries, subject.n_keys, subject.head_dim)
        if min(sizes) < 1:
            raise ValueError(f"{subject.name}: expected sizes of at least 1")
        if not subject.passes:
            raise ValueError(f"{subject.name}: nothing is left of it; decoding has a forward alone")
        nothing = torch.zeros((), dtype=DTYPES[subject.dtype], device=device)
        q, k, v = (nothing.expand(subject.batch, heads, length, subject.head_dim)
                   for heads, length in ((subject.heads, subject.n_queries), *[(subject.kv_heads, subject.n_keys)] * 2))
        subject.answered_by(q, k, v)


def _entrants(device: str) -> list[peers.Peer]:
    """On a CPU torch has one fused kernel and chooses it itself."""
    found = peers.found(device)
    return found if device != "cpu" else [peers.SDPA_DEFAULT, *(peer for peer in found if not peer.name.startswith("sdpa"))]


def _shown(row: Row) -> Row:
    """A row as the table has it."""
    if "error" in row:
        return {"case": row["case"], "pass": row["pass"], "ms": f"FAILED {row['error']}", "TFLOP/s": "", "answered_by": "",
                "best_peer": "", "its_ms": "", "its_time_/_ours": ""}
    best, ratio = row["best_peer"], row.get("ratio_to_best_peer")
    return {"case": row["case"], "pass": row["pass"], "ms": f"{row['ms']:.3f} ({row['p20']:.3f} to {row['p80']:.3f})",
            "TFLOP/s": f"{row['tflops']:.4g}", "answered_by": row["backend"], "best_peer": best or "none",
            "its_ms": f"{row['peers'][best]['ms']:.3f}" if best else "",
            "its_time_/_ours": "" if ratio is None else f"{ratio:.2f}{' LOSES' if round(ratio, 2) < 1 else ''}"}


def _rows(subject: Case, device: str, entrants: list[peers.Peer], rounds: int | None) -> Iterator[Row]:
    """The rows of a case, those of one too large for the memory too."""
    try:
        yield from contest.time_case(subject, device, entrants, rounds)
    except torch.OutOfMemoryError:
        yield {"pass": " and ".join(subject.passes), "ok": None, "error": "does not fit the GPU's memory"}


def run(options: argparse.Namespace) -> int:
    """Times, prints, writes; the status is 1 where ours was wrong or raised."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    subjects = cases(options, device)
    try:
        _check(subjects, device)
    except (TypeError, ValueError) as error:
        print(f"fused-attn bench: {error}", file=sys.stderr)
        return 2
    found = {**conditions(), "commit": git("rev-parse", "HEAD"), "device": device, "cpu_count": os.cpu_count(),
             "threads": torch.get_num_threads()}
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    key = "/".join((where, f"torch {found['torch']}", f"triton {found['triton']}"))
    rows = []
    entrants = _entrants(device)
    for subject in track(subjects, "timing"):
        rows += [{"case": subject.name, **row, "commit": found["commit"], "conditions": key}
                 for row in _rows(subject, device, entrants, options.rounds)]
    title = f"attention() on {where}, torch {found['torch']}, Triton {found['triton']}; medians, 20th to 80th percentile"
    if device == "cpu":
        title += ". CPU times: they say nothing about a GPU"
    text = json.dumps({"conditions": found, "rows": rows}, indent=1)
    if options.json:
        print(text)
    else:
        print_table([_shown(row) for row in rows], title)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    timed = [row for row in rows if "ms" in row]
    if options.plot is not None and timed:
        from fused_attn.bench import plots

        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plots.save(timed, title, str(options.plot))
    return 0 if all(row["ok"] is not False for row in rows) else 1
