"""README's first minute: its first program runs as it is pasted."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_first_program_runs_as_pasted(tmp_path):
    """In a process of its own and elsewhere, without the switches that tests set: as a new user would."""
    program = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[0]
    plain = {name: value for name, value in os.environ.items()
             if not name.startswith("FUSED_ATTN_") and name != "TRITON_INTERPRET"}
    plain["PYTHONPATH"] = str(README.parent)
    checks = """
assert out.shape == tokens.shape and out.isfinite().all()
assert lse.shape == (2, 8, 256)
for x in (q, k, v, bias, sinks):
    assert x.grad is not None and x.grad.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program + checks], cwd=tmp_path, env=plain, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend: ")
