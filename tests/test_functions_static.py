"""Compiled, a function in plain Python costs what the one written by hand does; and the gallery is what its page says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import functions

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.kernels


def compared(*arguments):
    """The rows of ``benchmarks.functions``, which compiles and so has a process of its own."""
    program = ("import os, json; os.environ['TRITON_INTERPRET'] = '0'; from benchmarks import functions; "
               f"print(json.dumps([[functions.figures('sm_80', kernel, 64, x) for x in functions.ways()[feature]] "
               f"for kernel, feature in {list(arguments)!r}]))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("jobs", [
    [("dq", "alibi")],
    pytest.param([(kernel, name) for kernel in functions.KERNELS for name in ("alibi", "bias", "document", "causal")],
                 marks=pytest.mark.slow)], ids=["few", "all"])
def test_traced_functions_compile_to_what_is_written_by_hand(jobs):
    """As many registers but for two, and instructions of the main loops but for two in a hundred; no more spill."""
    for (kernel, name), (by_hand, traced) in zip(jobs, compared(*jobs), strict=True):
        what = f"{kernel}, {name}: {by_hand} and {traced}"
        loops = [sum(map(sum, x["loop_instructions"])) for x in (by_hand, traced)]
        assert max(traced["registers"]) <= max(by_hand["registers"]) + 2, what
        assert sum(traced["spill_bytes"]) <= sum(by_hand["spill_bytes"]), what
        assert loops[1] <= 1.02 * loops[0], what


def test_the_gallery_is_what_its_page_says(tmp_path):
    done = subprocess.run([sys.executable, "examples/gallery.py", "--out", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8") == (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert (tmp_path / "gallery.png").stat().st_size > 10_000
