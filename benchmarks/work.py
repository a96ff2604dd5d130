"""What a run of ``benchmarks.gpu`` does, case by case, and the rows that it keeps of each."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import correctness, report
from benchmarks.supervise import Note
from fused_attn import files

Row = dict[str, Any]

# Most of the whole budget that a stage may take; the last one takes what is left.
SHARES = {"compile": 0.25, "correctness": 0.16, "features": 0.1, "determinism": 0.04, "roofline": 0.02, "layers": 0.07,
          "models": 0.05, "timing": 0.34, "cold": 1.0}
REPORT_SECONDS = 15.0


class PoisonedError(Exception):
    """The CUDA context is lost, as after an illegal access: only a new process can go on."""


class Job(NamedTuple):
    """A case of a stage: its rows, one for each of ``passes``, as they are measured."""

    name: str
    rows: Callable[[], Iterable[Row]]
    passes: tuple[str | None, ...] = (None,)


def append(path: Path, row: Row) -> None:
    """Adds a row to a file of rows."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class Rows:
    """rows.jsonl: every result of every run, appended and flushed as it is made. Only rows of these conditions count."""

    def __init__(self, path: Path, common: Row) -> None:
        self.path, self.common = path, common
        self.rows: list[Row] = []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # a run was killed while it wrote
            files.write(path, text + "\n")
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if row["conditions"] == common["conditions"]:
                    self.rows.append(row)

    def add(self, row: Row) -> None:
        row = _finite({**row, **self.common})
        self.rows.append(row)
        append(self.path, row)

    def of(self, *stages: str) -> list[Row]:
        """Rows of some stages; of a pass measured twice, the later one."""
        return list({(r["stage"], r["case"], r.get("pass")): r for r in self.rows if r["stage"] in stages}.values())

    def done(self, stage: str, job: Job) -> bool:
        """Whether every pass of a job has its row, where the rows tell how many there are, or else of ``job.passes``."""
        rows = [row for row in self.rows if (row["stage"], row["case"]) == (stage, job.name)]
        passes = {row.get("pass") for row in rows}
        return None in passes or passes >= set(job.passes).union(*(row.get("passes", ()) for row in rows))


def _finite(x: Any) -> Any:
    """``x`` as strict JSON can hold it."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


@dataclass
class Run:
    """One run of the command: where results go, and how much time is left."""

    device: str
    smoke: bool
    deadline: float
    conditions: Row
    rows: Rows
    budget: float
    note: Note
    stages: dict[str, Row] = field(default_factory=dict)

    def until(self, stage: str) -> float:
        return min(self.deadline - REPORT_SECONDS, time.monotonic() + SHARES[stage] * self.budget)

    def work(self, stage: str, jobs: list[Job]) -> None:
        """Runs jobs one after another until the stage's time is up, and says how many that left."""
        until, start, left = self.until(stage), time.monotonic(), list(jobs)
        try:
            while left and time.monotonic() < until:
                if not self.rows.done(stage, left[0]):
                    self.attempt(stage, left[0])
                left.pop(0)
        finally:
            self.stages[stage] = {"seconds": round(time.monotonic() - start, 1), "truncated": len(left)}

    def attempt(self, stage: str, job: Job) -> None:
        """Adds the rows of a job; one that raises gets a row that says so."""
        self.note.begin({"stage": stage, "case": job.name, **self.rows.common})
        try:
            for row in job.rows():
                self.add(stage, job.name, row)
                self.note.alive()
        except correctness.Skipped as reason:
            self.add(stage, job.name, {"ok": None, "skipped": str(reason)})
        except torch.OutOfMemoryError as error:
            self.add(stage, job.name, {"ok": None, "skipped": f"out of memory: {str(error)[:200]}"})
        except Exception as error:
            self.add(stage, job.name, {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]}"})
        if self.device != "cpu":
            try:
                torch.cuda.synchronize()
            except Exception as error:
                raise PoisonedError(str(error)[:200]) from error

    def add(self, stage: str, case: str, row: Row) -> None:
        self.rows.add({"stage": stage, "case": case, **row})
        print(report.line(self.rows.rows[-1]), flush=True)
