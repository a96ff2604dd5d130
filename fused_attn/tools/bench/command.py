"""``fused-attn bench``: attention() on the user's own shapes beside what else this machine has.

On a GPU the kernels are timed by events, with a cold L2 cache; on a CPU, by the clock, what answers there by default: torch's
own kernel, so that what is seen is what a call adds to it. Each implementation is checked before it is timed.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

import fused_attn
from fused_attn import files, settings
from fused_attn.tools import options
from fused_attn.tools.bench import contest, peers
from fused_attn.tools.bench.cases import DTYPES, Case, case, grid
from fused_attn.tools.bench.oracle import Row
from fused_attn.tools.report import conditions, git, print_table, track

PASSES = ("forward", "backward")
# Defaults of the arguments: on a GPU, and on a CPU, where larger ones would take minutes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"batch": 2, "heads": 16, "length": [1024, 4096], "head_dim": [128], "dtype": ["bf16"]},
    "cpu": {"batch": 1, "heads": 4, "length": [128, 512, 1024], "head_dim": [64], "dtype": ["fp32"]},
}


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options that describe a call; those that take several values stand for every combination."""
    size = options.whole(*options.SIZES)
    parser.add_argument("--batch", type=size, metavar="B")
    parser.add_argument("--heads", type=size, metavar="H")
    parser.add_argument("--kv-heads", type=size, metavar="H", help="heads of keys and values, a divisor of --heads")
    parser.add_argument("--length", type=size, nargs="+", metavar="N", help="queries, and keys unless --keys says otherwise")
    parser.add_argument("--keys", type=size, metavar="N")
    parser.add_argument("--head-dim", type=size, nargs="+", metavar="D")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), nargs="+")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=options.whole(-1, options.SIZES[1]), nargs=2, metavar=("LEFT", "RIGHT"),
                        help="keys on either side; -1: all")
    parser.add_argument("--softcap", type=options.real(0, open_below=True))
    parser.add_argument("--backend", choices=settings.BACKENDS, help="of ours; by default what a call chooses")
    parser.add_argument("--device", choices=options.DEVICES, help="a GPU where there is one")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--preset", choices=("papers", "decode"), help="papers: H D = 2048 and B N = 16384, lengths 512 to "
                        "16384, both masks; decode: one query over many keys. Shapes given beside it are not looked at")
    add_shape(parser)
    parser.add_argument("--pass", dest="which", choices=PASSES, nargs="+", default=PASSES)
    parser.add_argument("--rounds", type=options.whole(*options.COUNTS),
                        help="timed calls of each; by default what fits 120 ms, 10 at least")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=options.file(), help="write rows and conditions to this JSON file")
    parser.add_argument("--plot", type=options.file(*options.PICTURES), help="draw bars into this picture; needs matplotlib")


def cases(asked: argparse.Namespace, device: str) -> list[Case]:
    """The calls that the options describe."""
    own = {name: default if (given := getattr(asked, name)) is None else given for name, default in DEFAULTS[device].items()}
    window = None if asked.window is None else tuple(None if side < 0 else side for side in asked.window)
    return [case(n, d, batch=own["batch"], heads=own["heads"], kv_heads=asked.kv_heads, n_keys=asked.keys, dtype=dtype,
                 causal=asked.causal, window=window, softcap=asked.softcap, family="user", backend=asked.backend)
            for n, d, dtype in product(own["length"], own["head_dim"], own["dtype"])]


def _timed(asked: argparse.Namespace, device: str) -> list[Case]:
    """What is timed: a preset, or what the options describe, in the passes that are asked for."""
    dtypes, found = asked.dtype or ["bf16"], cases(asked, device)
    if asked.preset == "papers":
        found = [grid(n, d, causal, dtype=dtype) for n in (4096, 16384, 1024, 8192, 2048, 512) for d in (128, 64, 256)
                 for causal in (True, False) for dtype in dtypes]
    elif asked.preset == "decode":
        found = [case(1, 128, batch=batch, heads=32, kv_heads=8, n_keys=n, dtype=dtype, passes=("forward",), family="decode")
                 for batch, n in ((16, 8192), (1, 131072)) for dtype in dtypes]
    found = [replace(subject, backend=asked.backend, passes=tuple(which for which in subject.passes if which in asked.which))
             for subject in found]
    if not all(subject.passes for subject in found):
        raise options.BadInputError("--pass: nothing is left; decoding has a forward alone")
    return found


# What a call may have besides, as arguments of attention() made from nothing but its shape.
ADDED: dict[str, Callable[[Case, torch.Tensor], dict[str, Any]]] = {
    "bias": lambda subject, zero: {"bias": zero.expand(1, subject.heads, subject.n_queries, subject.n_keys)},
    "mask": lambda subject, zero: {"mask": zero.bool().expand(1, 1, subject.n_queries, subject.n_keys)},
    "alibi": lambda subject, zero: {"alibi_slopes": zero.float().expand(subject.heads)},
    "sinks": lambda subject, zero: {"sinks": zero.float().expand(subject.heads)},
    "dropout": lambda subject, zero: {"dropout_p": 0.1},
    "lse": lambda subject, zero: {"return_lse": True},
    "precise": lambda subject, zero: {"precise": True},
}


def explanation(subject: Case, device: str, added: Sequence[str] = ()) -> fused_attn.Explanation:
    """What ``explain`` says of a call. Raises BadInputError for one that attention() refuses."""
    zero = torch.zeros((), dtype=DTYPES[subject.dtype], device=device)  # expanded: a shape that takes no memory
    try:
        q, k, v = (zero.expand(subject.batch, heads, length, subject.head_dim)
                   for heads, length in ((subject.heads, subject.n_queries), *[(subject.kv_heads, subject.n_keys)] * 2))
        arguments = {name: value for one in added for name, value in ADDED[one](subject, zero).items()}
        return fused_attn.explain(q, k, v, **subject.arguments, backend=subject.backend, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise options.BadInputError(f"{subject.name}: {str(error).splitlines()[0]}") from error


def _entrants(device: str) -> list[peers.Peer]:
    """The peers on a device. On a CPU torch has one fused kernel and chooses it itself."""
    found = peers.found(device)
    return found if device != "cpu" else [peers.SDPA_DEFAULT, *(peer for peer in found if not peer.name.startswith("sdpa"))]


def _shown(row: Row) -> Row:
    """A row as the table shows it."""
    if "error" in row:
        return {"case": row["case"], "pass": row["pass"], "ms": f"FAILED {row['error']}", "TFLOP/s": "", "answered_by": "",
                "best_peer": "", "its_ms": "", "its_time_/_ours": ""}
    best, ratio = row["best_peer"], row.get("ratio_to_best_peer")
    return {"case": row["case"], "pass": row["pass"], "ms": f"{row['ms']:.3f} ({row['p20']:.3f} to {row['p80']:.3f})",
            "TFLOP/s": f"{row['tflops']:.4g}", "answered_by": row["backend"], "best_peer": best or "none",
            "its_ms": f"{row['peers'][best]['ms']:.3f}" if best else "",
            "its_time_/_ours": "" if ratio is None else f"{ratio:.2f}{' LOSES' if round(ratio, 2) < 1 else ''}"}


def _rows(subject: Case, device: str, entrants: list[peers.Peer], rounds: int | None) -> Iterator[Row]:
    """The rows of a case, also of one that is too large for the memory."""
    try:
        yield from contest.time_case(subject, device, entrants, rounds)
    except torch.OutOfMemoryError:
        yield {"pass": " and ".join(subject.passes), "ok": None, "error": "does not fit the GPU's memory"}
    except RuntimeError as error:  # a lack of CPU memory has no error class of its own
        if "allocate" not in str(error):
            raise
        yield {"pass": " and ".join(subject.passes), "ok": None, "error": "does not fit the memory"}


def run(asked: argparse.Namespace) -> int:
    """Times, prints, writes; the status is 1 where ours was wrong or raised. Ctrl-C ends the timing and nothing else."""
    device = options.device(asked.device)
    if asked.plot is not None:
        options.need("matplotlib", "bench")
    subjects = _timed(asked, device)
    for subject in subjects:
        explanation(subject, device)
    found = {**conditions(), "commit": git("rev-parse", "HEAD"), "device": device, "cpu_count": os.cpu_count(),
             "threads": torch.get_num_threads()}
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    key = "/".join((where, f"torch {found['torch']}", f"triton {found['triton']}"))
    rows: list[Row] = []
    entrants = _entrants(device)
    with options.until_interrupted() as interrupted:
        for subject in track(subjects, "timing"):
            for row in _rows(subject, device, entrants, asked.rounds):
                rows.append({"case": subject.name, **row, "commit": found["commit"], "conditions": key})
    title = f"attention() on {where}, torch {found['torch']}, Triton {found['triton']}; medians, 20th to 80th percentile"
    if device == "cpu":
        title += ". CPU times: they say nothing about a GPU"
    complete = not interrupted.is_set()
    text = json.dumps({"conditions": found, "complete": complete, "rows": rows}, indent=1)
    if asked.json:
        print(text)
    else:
        print_table([_shown(row) for row in rows], title)
    if asked.out is not None and (rows or complete):
        files.write(asked.out, text + "\n")
    timed = [row for row in rows if "ms" in row]
    if asked.plot is not None and timed:
        from fused_attn.tools.bench import plots

        plots.save(timed, title, asked.plot)
    return options.status(complete, all(row["ok"] is not False for row in rows))
