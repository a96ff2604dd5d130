"""A process that does the work, and one that watches it: a step that hangs is ended, told, and gone past."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_attn import files

AGAIN = 75  # exit status of a worker that wants to be started anew
SILENT_STARTS = 3  # workers that hang before their first step, after which no other one is started
Row = dict[str, Any]


class Note:
    """What a worker is at, in a file, whose age says since when it has given no sign of life."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: Row) -> None:
        files.write(self.path, json.dumps(step) + "\n")

    def alive(self) -> None:
        """A sign of life in the middle of a step, or between two."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path)

    def read(self) -> Row | None:
        try:
            step: Row = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return step

    def seen(self) -> float:
        """When it was written last, in seconds since the epoch; 0 where it is not there."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0


def supervise(command: Callable[[float], list[str]], note: Note, deadline: float, patience: float,
              hung: Callable[[Row], None]) -> int:
    """Runs ``command(minutes left)`` until it ends by itself, and returns its exit status.

    A worker that gives no sign of life for ``patience`` seconds is killed with everything that it started, ``hung`` is told its
    step, which it must keep from being tried again, and another one is started, also after ``deadline``: it has to write the
    report. SIGINT and SIGTERM go to the worker. Returns 1 where workers hang before their first step.
    """
    silent = 0
    while silent < SILENT_STARTS:
        note.path.unlink(missing_ok=True)
        left = max(0.5, (deadline - time.monotonic()) / 60)
        status = _watched(command(left), note, patience)
        if status not in (AGAIN, None):
            return status
        step = note.read()
        if status is None and step is not None:
            hung(step)
        silent = silent + 1 if step is None else 0
    print(f"the work hung {silent} times before its first step", file=sys.stderr)
    return 1


def _watched(command: list[str], note: Note, patience: float) -> int | None:
    """The exit status of a command, or None where it was killed since it gave no sign of life."""
    sys.stdout.flush()
    started = time.time()
    process = subprocess.Popen(command, start_new_session=True)
    before = {number: signal.signal(number, lambda received, _: _send(process, received))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(1.0, patience / 4))
            if time.time() - max(started, note.seen()) > patience:
                _send(process, signal.SIGKILL)
                process.wait()
                return None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """To a worker; a kill to its whole group."""
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
