"""What was tried on the versions that this Python has, kept in fused_attn/versions.json.

    python -m tests.versions                       # compiles and emulates sm_90's schedules, runs the kernels' fast tests
    python -m tests.versions tests/test_ops.py     # ... or the tests that pytest's own arguments name

One row for each pair of torch and Triton; a new one takes the place of that pair's last. ``proven`` reads it.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fused_attn.plan.proven import VERSIONS, YOUNG
from fused_attn.tools.report import git

TESTS = ("-m", "kernels and not slow and not gpu", "tests")
Row = dict[str, Any]


def compiled(schedule: str) -> bool:
    """Whether the kernels of a schedule compile for sm_90, forward and, where there is one, backward."""
    which = "all" if schedule == "gluon" else "forward"
    command = ("-m", "fused_attn", "compile", "--target", "sm_90", "--hopper", schedule, "--pass", which,
               "--head-dim", "64", "128")
    return subprocess.run((sys.executable, *command), cwd=ROOT, env=_environment()).returncode == 0


def emulated(schedule: str) -> bool:
    """Whether what this Triton compiles of a schedule gives the right answers in the emulator, with no fault."""
    command = (sys.executable, "-m", "tests.emulated", "sm_90", schedule)
    return subprocess.run(command, cwd=ROOT, env=_environment()).returncode == 0


def tested(arguments: Sequence[str]) -> Row:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run((sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments), cwd=ROOT, env=_environment())
        cases = list(ET.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"arguments": list(arguments), "passed": len(cases) - len(failed) - skipped, "skipped": skipped,
            "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed)}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep(row: Row) -> None:
    """Writes a row in the place of the one of its versions."""
    pair = lambda row: (row["triton"], row["torch"])  # noqa: E731
    others = [other for other in json.loads(VERSIONS.read_text(encoding="utf-8")) if pair(other) != pair(row)]
    VERSIONS.write_text(json.dumps(sorted([*others, row], key=pair), indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where something neither compiled nor passed."""
    arguments = tuple(sys.argv[1:] if argv is None else argv) or TESTS
    row = {**{name: _version(name) for name in ("torch", "triton", "numpy", "transformers")},
           "python": platform.python_version(), "commit": git("describe", "--always", "--dirty"),
           "compiled": {name: compiled(name) for name in YOUNG}, "emulated": {name: emulated(name) for name in YOUNG},
           "tests": {}}
    keep(row)  # before the tests, which run what compiled
    row["tests"] = tested(arguments)
    keep(row)
    print(json.dumps(row, indent=1))
    return 0 if all((*row["compiled"].values(), *row["emulated"].values())) and not row["tests"]["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
