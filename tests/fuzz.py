"""A fuzzer of whole calls: shape, layout, features, types, backend, compiled or not, against fp64, gradients too.

    python -m tests.fuzz --minutes 60            # until a call fails, from a seed of its own, which it prints
    python -m tests.fuzz --seed 7 --count 500

A failure is made small, and printed as a command that makes it again. ``--record`` counts what passed since the last failure in
docs/fuzz.json and says so in docs/numerics.md.
"""

import argparse
import contextlib
import json
import math
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from support.features import Shape
from support.fuzzing import Trial, check, search

from fused_attn import files
from fused_attn.tools import options
from fused_attn.tools.report import conditions, git

__all__ = ["Shape", "Trial", "check", "main"]

RECORD, PAGE = ROOT / "docs" / "fuzz.json", ROOT / "docs" / "numerics.md"
START, END = "<!-- fuzz -->\n", "<!-- end of fuzz -->\n"
AT_ONCE = 40  # trials of one seed: few enough that the clock is looked at often
Failure = tuple[Trial, Exception]
AXES = ("backend", "dtype", "compiled")


def command(trial: Trial) -> str:
    """What makes a trial again, for a shell in the checkout."""
    return f'{sys.executable} -c "from tests.fuzz import *; check({trial!r})"'


def sentence(record: dict[str, Any]) -> str:
    """What a record says, for docs/numerics.md."""
    ran, passed = record["last run"], record["since the last failure"].get("calls", 0)
    return f"{passed} calls have passed since the last failure, the last on torch {ran['torch']} with Triton {ran['triton']}.\n"


def with_sentence(page: str, record: dict[str, Any]) -> str:
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"docs/numerics.md: expected {START.strip()} and {END.strip()}")
    return f"{before}{START}{sentence(record)}{END}{after}"


def recorded(before: dict[str, Any], run: dict[str, Any], seen: Counter[str], failure: Trial | None) -> dict[str, Any]:
    """The record after a run: a failure sets the count to 0."""
    since = Counter() if failure else Counter(before.get("since the last failure", {})) + seen
    return {"since the last failure": dict(sorted(since.items())),
            "last failure": repr(failure) if failure else before.get("last failure"), "last run": run}


def fuzz(seed: int, count: int | None, minutes: float, progress: Progress) -> tuple[Counter[str], Failure | None]:
    """How many trials passed, by axis and value; and the first failure, or None after ``count`` trials, or ``minutes``."""
    began, seen, failure = time.monotonic(), Counter[str](), None
    task = progress.add_task("", total=count or 60 * minutes)

    def passing(trial: Trial) -> None:
        seen.update(["calls", *(f"{axis} {getattr(trial, axis)}" for axis in AXES)])
        done = seen["calls"] if count else time.monotonic() - began
        progress.update(task, completed=done, description=f"{seen['calls']} calls")

    with contextlib.suppress(KeyboardInterrupt):  # what has passed has passed
        while failure is None and (count is None or seen["calls"] < count) and time.monotonic() < began + 60 * minutes:
            failure = search(seed, AT_ONCE if count is None else min(AT_ONCE, count - seen["calls"]), passing)
            seed += 1
    return seen, failure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where a call failed."""
    parser = options.Parser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=options.whole(*options.SEEDS), help="of the first calls; drawn where none is given")
    parser.add_argument("--count", type=options.whole(*options.COUNTS), help="how many calls")
    parser.add_argument("--minutes", type=options.real(0, open_below=True), help="for how long; 10 where no count is given")
    parser.add_argument("--record", action="store_true", help="count in docs/fuzz.json and docs/numerics.md what passed")
    return options.run(parser, argv, run)


def run(asked: argparse.Namespace) -> int:
    """Fuzzes as it was asked, and tells what came of it."""
    seed = random.SystemRandom().randrange(10**9) if asked.seed is None else asked.seed
    minutes = asked.minutes or (10.0 if asked.count is None else math.inf)
    torch.set_num_threads(1)
    began = time.monotonic()
    with Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        seen, failure = fuzz(seed, asked.count, minutes, progress)
    if asked.record:
        ran = {"seed": seed, "calls": seen["calls"], "minutes": round((time.monotonic() - began) / 60, 1),
               "commit": git("describe", "--always", "--dirty"),
               **{name: value for name, value in conditions().items() if name in ("torch", "triton")}}
        before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        record = recorded(before, ran, seen, failure and failure[0])
        files.write(RECORD, json.dumps(record, indent=1) + "\n")
        files.write(PAGE, with_sentence(PAGE.read_text(encoding="utf-8"), record))
    if failure is None:
        print(f"{seen['calls']} calls passed; seed {seed}")
        return 0
    trial, error = failure
    print("".join(traceback.format_exception(error, limit=-3)), f"after {seen['calls']} calls; seed {seed}. Once more:\n\n",
          command(trial), sep="", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
