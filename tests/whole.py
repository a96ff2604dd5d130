"""Every test that needs no GPU, kept by file in docs/test-all.json; what passed on this code is not run again.

    python -m tests.whole                        # those files whose tests have not passed on this code
    python -m tests.whole tests/test_ops.py      # ... of these

All of them take hours on two cores. A file that is through is written at once, with the commit that it ran on, so Ctrl-C loses
no more than the files that are under way. "This code" is what lies in the folders of CODE; a change beside them makes nothing
stale.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fused_attn import files
from fused_attn.tools.report import conditions, git, print_table

OUT = ROOT / "docs" / "test-all.json"
CODE = ("fused_attn", "kernels", "tests", "benchmarks", "examples", "setup.py", "pyproject.toml", "constraints.txt",
        ":(exclude)fused_attn/versions.json")  # which `make versions` writes


def revision() -> str:
    """The commit that the code is of, with "-dirty" where something of it is changed or not in git."""
    changed = git("status", "--porcelain", "--", *CODE)
    return f"{git('rev-parse', '--short', 'HEAD')}{'-dirty' if changed or changed is None else ''}"


def unchanged(commit: str) -> bool:
    """Whether the code is that of a commit."""
    return git("diff", "--name-only", commit, "--", *CODE) == ""


def passed(row: dict[str, Any]) -> bool:
    """Whether all tests of a file passed on this code and these versions."""
    clean = not row["commit"].endswith("-dirty") and not revision().endswith("-dirty")
    return not row["failed"] and clean and row["versions"] == versions() and unchanged(row["commit"])


def versions() -> str:
    """Of what the tests run on, such as "torch 2.13.0, Triton 3.7.1, Python 3.11.7"."""
    found = conditions()
    return f"torch {found['torch']}, Triton {found['triton']}, Python {found['python']}"


class Record:
    """Counts the tests of each file, and writes those of a file as soon as none of them is left."""

    def __init__(self, rows: dict[str, Any], commit: str) -> None:
        self.rows, self.commit = rows, commit
        self.left: Counter[str] = Counter()
        self.told: dict[str, Counter[str]] = defaultdict(Counter)
        self.failed: dict[str, list[str]] = defaultdict(list)
        self.seconds: Counter[str] = Counter()

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Each of the workers has the same tests; one that takes the place of a worker that died has them too."""
        self.left = self.left or Counter(Path(name.partition("::")[0]).name for name in ids)

    def pytest_collection_finish(self, session: Any) -> None:
        """Without workers, the tests are this process's own."""
        if session.items:
            self.left = Counter(item.path.name for item in session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, call and teardown of a test, in this order."""
        file = Path(report.nodeid.partition("::")[0]).name
        self.seconds[file] += report.duration
        if report.outcome == "failed":
            self.failed[file].append(report.nodeid.partition("::")[2])
        if report.when == "call" or report.outcome == "skipped":
            self.told[file][report.outcome] += 1
        if report.when == "teardown":
            self.left[file] -= 1
            if not self.left[file]:
                self.keep(file)

    def keep(self, file: str) -> None:
        """Writes what there is to tell of a file."""
        told = self.told[file]
        commit = self.commit if revision() == self.commit else f"{self.commit}-dirty"  # of code that changed meanwhile
        self.rows[file] = {"commit": commit, "versions": versions(), "passed": told["passed"], "skipped": told["skipped"],
                           "failed": sorted(set(self.failed[file])), "seconds": round(self.seconds[file], 1)}
        write(self.rows)


def write(rows: dict[str, Any]) -> None:
    """All rows, in the order of their names."""
    files.write(OUT, json.dumps({"files": dict(sorted(rows.items()))}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where a test failed, or was not run."""
    asked = [Path(name).name for name in (sys.argv[1:] if argv is None else argv)]
    present = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    if unknown := [name for name in asked if name not in present]:
        print(f"tests.whole: expected files of tests/; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    before = json.loads(OUT.read_text(encoding="utf-8"))["files"] if OUT.exists() else {}
    rows = {name: row for name, row in before.items() if name in present}
    stale = [name for name in asked or present if name not in rows or not passed(rows[name])]
    print(f"{len(asked or present) - len(stale)} files have passed on this code, {len(stale)} are to be run")
    if stale:
        options = ["-m", "not gpu", "-n", "2", "--dist", "worksteal", "-q", *(f"tests/{name}" for name in stale)]
        pytest.main([*options, "--rootdir", str(ROOT / "tests")], plugins=[Record(rows, revision())])
    whole = [name for name in present if name in rows and passed(rows[name])]
    sums = {name: round(sum(rows[file][name] for file in whole)) for name in ("passed", "skipped", "seconds")}
    print_table([{"files": f"{len(whole)} of {len(present)}", **sums}], "passed on this code")
    return 0 if all(name in whole for name in asked or present) else 1


if __name__ == "__main__":
    sys.exit(main())
