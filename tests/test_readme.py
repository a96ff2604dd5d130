"""Programs in README.md and docs/ run as they are pasted, the blocks of a page one after the other."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a page loads from Hugging Face is made here, small and of random weights.
WITHOUT_NETWORK = """
import transformers

def made(name, **arguments):
    config = transformers.Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    return transformers.AutoModelForCausalLM.from_config(config, **arguments)

transformers.AutoModelForCausalLM.from_pretrained = made
"""
RESULTS = """
assert out.shape == tokens.shape and out.isfinite().all()
assert lse.shape == (2, 8, 256)
for x in (q, k, v, bias, sinks):
    assert x.grad is not None and x.grad.isfinite().all()
"""
NEEDS = {"import AutoModel": "transformers", "import triton": "triton", "viz.save": "matplotlib"}


def blocks(page: Path) -> list[str]:
    """The programs of a page that what is installed can run."""
    missing = [sign for sign, module in NEEDS.items() if importlib.util.find_spec(module) is None]
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [block for block in found if not any(sign in block for sign in missing)]


def test_programs_run_as_pasted(tmp_path):
    """Each page is one file, whose names are its own; elsewhere, without the switches that tests set, as a new user would. One
    process for all, since most of the time goes into imports."""
    run = ["import runpy"]
    for page in PAGES:
        program = blocks(page)
        if page.name == "README.md":
            program.insert(1, RESULTS)
        if program:
            (tmp_path / f"{page.stem}.py").write_text("\n".join(program), encoding="utf-8")
            run += [WITHOUT_NETWORK] * ("from_pretrained" in "".join(program)) + [f"runpy.run_path('{page.stem}.py')"]
    plain = {name: value for name, value in os.environ.items()
             if not name.startswith("FUSED_ATTN_") and name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", "\n".join(run)], cwd=tmp_path, text=True,
                          capture_output=True, check=False, env={**plain, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend: ")
    assert {path.name for path in tmp_path.glob("*.py")} >= {"README.py", "features.py", "layers.py", "speed.py"}
