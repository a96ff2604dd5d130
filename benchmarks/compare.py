"""Two revisions beside each other: ``python -m benchmarks.compare BASE [--out FILE] [--rounds N] [--only TEXT]``.

The working tree as it is, and BASE checked out in a temporary worktree, each in a process of its own that stays; the same
harness, that of the working tree, measures both in turns. On a GPU the timing cases; elsewhere the host's part of a call,
calls on the CPU, and layers, by one thread on one core, in CPU time, which other programs disturb less than the clock. A ratio
is the time of now over that of BASE in one round: above 1, slower than before.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from fused_attn import files
from fused_attn.tools import options
from fused_attn.tools.report import print_table, track

ROOT = Path(__file__).resolve().parent.parent
MEASURED_MS = 20.0  # of each revision in each round, on a CPU

Row = dict[str, Any]


class Revision:
    """A process that measures one revision when it is asked to."""

    def __init__(self, tree: Path, device: str) -> None:
        self._process = subprocess.Popen([sys.executable, str(ROOT / "benchmarks" / "revision.py"), str(tree), device],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> Row:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks.compare: a revision's process ended, status {self._process.wait()}; see above")
        answer: Row = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def checked_out(revision: str, root: Path) -> Iterator[tuple[Path, str]]:
    """A temporary worktree of a revision, and its commit."""

    def git(*command: str) -> str:
        done = subprocess.run(("git", "-C", str(root), *command), capture_output=True, text=True, check=False)
        if done.returncode:
            raise options.BadInputError(f"git {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree, commit
        finally:
            git("worktree", "remove", "--force", str(tree))


def compare(name: str, now: Revision, base: Revision, rounds: int) -> list[Row]:
    """One row a pass: medians of both, and of their ratio the median and the 20th and 80th percentiles over the rounds."""
    prepared = {"now": now.ask(prepare=name), "base": base.ask(prepare=name)}
    errors = {f"{side}_error": answer["error"] for side, answer in prepared.items() if "error" in answer}
    if errors:
        return [{"case": name, **errors}]
    rows: list[Row] = []
    for which in prepared["now"]["passes"]:
        slowest = max(answer["passes"][which] for answer in prepared.values())
        repeat = max(1, int(MEASURED_MS / max(1e-6, slowest)))
        times: dict[str, list[float]] = {"now": [], "base": []}
        for i in range(rounds + 1):  # the first one warms up
            for side, revision in (("now", now), ("base", base))[:: 1 if i % 2 else -1]:
                answer = revision.ask(measure=which, repeat=repeat)
                if "error" in answer:
                    return [*rows, {"case": name, "pass": which, f"{side}_error": answer["error"]}]
                times[side].append(answer["ms"])
        ratios = sorted(x / y for x, y in zip(times["now"][1:], times["base"][1:], strict=True))
        rows.append({"case": name, "pass": which, "ms": statistics.median(times["now"][1:]),
                     "base_ms": statistics.median(times["base"][1:]), "ratio": statistics.median(ratios),
                     "p20": ratios[round(0.2 * (rounds - 1))], "p80": ratios[round(0.8 * (rounds - 1))], "rounds": rounds})
    return rows


def _shown(row: Row) -> Row:
    if "ratio" not in row:
        error = "; ".join(f"{key.removesuffix('_error')}: {row[key]}" for key in row if key.endswith("_error"))
        return {"case": row["case"], "pass": row.get("pass", ""), "now_ms": error, "base_ms": "", "now / base": "", "": ""}
    beyond = "slower" if row["p20"] > 1.02 else "faster" if row["p80"] < 0.98 else ""
    return {"case": row["case"], "pass": row["pass"], "now_ms": f"{row['ms']:.4g}", "base_ms": f"{row['base_ms']:.4g}",
            "now / base": f"{row['ratio']:.3f} ({row['p20']:.3f} to {row['p80']:.3f})", "": beyond}


def main(arguments: list[str] | None = None) -> int:
    parser = options.Parser(prog="python -m benchmarks.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="revision to compare the working tree with")
    parser.add_argument("--out", type=options.file(), help="write the rows and their conditions to this JSON file")
    parser.add_argument("--rounds", type=options.whole(*options.COUNTS), default=11)
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--device", choices=options.DEVICES, help="a GPU where there is one")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to compare; by default this one")
    return options.run(parser, arguments, measure)


def measure(asked: argparse.Namespace) -> int:
    """Compares, prints and writes; Ctrl-C ends the comparing and nothing else."""
    device = options.device(asked.device)
    rows: list[Row] = []
    with checked_out(asked.base, asked.root) as (tree, commit), contextlib.ExitStack() as stack:
        now, base = Revision(asked.root, device), Revision(tree, device)
        for revision in (now, base):
            stack.callback(revision.close)
        base.ask(list=True)
        names = [name for name in now.ask(list=True)["names"] if asked.only in name]
        if not names:
            raise options.BadInputError(f"--only: no case contains {asked.only!r}")
        with options.until_interrupted() as interrupted:
            for name in track(names, "comparing"):
                rows += compare(name, now, base, asked.rounds)
    print_table([_shown(row) for row in rows], f"the working tree over {asked.base} ({commit[:12]}): medians of "
                f"{asked.rounds} rounds in turns, 20th to 80th percentile; slower or faster where these lie 2% from 1")
    complete = not interrupted.is_set()
    if asked.out is not None and (rows or complete):
        found = conditions(device, None) if device != "cpu" else conditions(device, None) | {"gpu": None, "interpreter": False}
        result = {"conditions": {**found, "base": commit}, "complete": complete, "rows": rows}
        files.write(asked.out, json.dumps(result, indent=1) + "\n")
    return options.status(complete, all("ratio" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
