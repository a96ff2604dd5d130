"""Rules about the source itself: one-way imports that can fail, sizes, and commands that exist."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_KERNEL_LINES = 150
MAX_RUNTIME_PARAMETERS, MAX_COMPILED_IN = 19, 2  # of kernels

# Edges against the contracts: file, and the import planted in it.
FORBIDDEN_IMPORTS = {
    "fused_attn/call/functions/placing.py": "fused_attn.call.functions.texts",
    "fused_attn/run/blocked/tile.py": "fused_attn.run.blocked.dense",
    "fused_attn/emulator/amd/state.py": "fused_attn.emulator.amd.machine",
    "kernels/hopper/ring.py": "fused_attn.kernels.hopper.forward",
    "kernels/tiles.py": "fused_attn.kernels.forward",
    "kernels/window.py": "fused_attn.kernels.score",
    "kernels/forward.py": "fused_attn.reference",
    "kernels/backward.py": "fused_attn.run.ops",
    "fused_attn/reference.py": "fused_attn.kernels.softmax",
    "fused_attn/call/spec.py": "fused_attn.settings",
    "fused_attn/call/layout.py": "fused_attn.call.describe",
    "fused_attn/plan/tiles.py": "fused_attn.run.ops",
    "fused_attn/run/ops.py": "fused_attn.run.autograd",
    "fused_attn/run/autograd.py": "fused_attn.api",
    "fused_attn/emulator/ptx.py": "fused_attn.emulator.driver",
    "fused_attn/plan/problem.py": "fused_attn.plan.forward",
    "fused_attn/tools/report.py": "fused_attn.tools.check",
    "fused_attn/tools/compile/sass.py": "fused_attn.tools.compile.offline",
}


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, without what was generated; symlinks are not followed."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
                            cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache", "--no-logo"], cwd=root, capture_output=True, text=True, check=False)


def test_imports_go_one_way():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_contracts_see_every_forbidden_edge(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    shutil.copytree(ROOT / "fused_attn", tmp_path / "fused_attn", symlinks=True)
    for file, module in FORBIDDEN_IMPORTS.items():
        with (tmp_path / file).open("a") as source:
            source.write(f"\n\ndef planted():\n    import {module}\n")
    (tmp_path / "kernels" / "unplaced.py").touch()

    report = lint_imports(tmp_path).stdout
    for file, module in FORBIDDEN_IMPORTS.items():
        importer = file.removesuffix(".py").replace("/", ".")
        importer = importer if importer.startswith("fused_attn.") else f"fused_attn.{importer}"
        assert re.search(rf"{importer} -> {module} \(l\.\d+", report), f"not seen: {importer} imports {module}\n{report}"
    assert "fused_attn.kernels.unplaced" in report
    assert "0 kept" in report, report


def test_kernels_directory_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "`kernels` would shadow Hugging Face's package of that name"
    assert (ROOT / "fused_attn" / "kernels").is_symlink()
    assert (ROOT / "fused_attn" / "kernels").readlink() == Path("../kernels")


def test_files_stay_readable():
    long = {str(file.relative_to(ROOT)): lines for file in tracked("*.py")
            if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines; split them: {long}"


def jit_functions() -> dict[str, ast.FunctionDef]:
    """Every @triton.jit function under kernels/, by file and name."""
    found = {}
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                found[f"{file.stem}.{node.name}"] = node
    return found


def test_kernels_stay_readable():
    functions = jit_functions()
    assert "forward.forward_kernel" in functions
    for name, node in functions.items():
        assert node.end_lineno - node.lineno < MAX_KERNEL_LINES, f"{name} has {node.end_lineno - node.lineno} lines"
        runtime = [a.arg for a in node.args.args if a.annotation is None or "constexpr" not in ast.unparse(a.annotation)]
        assert len(runtime) <= MAX_RUNTIME_PARAMETERS, f"{name} takes {len(runtime)} runtime parameters: {runtime}"
        if name.endswith("_kernel"):
            assert len(node.args.args) - len(runtime) <= MAX_COMPILED_IN, f"{name} takes more than its kind and its tiles"


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"help", "test", "gpu"} <= targets
    code = {ROOT / ".ci" / "run": (ROOT / ".ci" / "run").read_text(encoding="utf-8")}
    for page in tracked("*.md"):
        blocks = re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), re.DOTALL)
        code[page] = "\n".join(blocks)
    for page, text in code.items():
        named = set(re.findall(r"\bmake ([a-z][a-z-]*)", text))
        assert named <= targets, f"{page.name} names {sorted(named - targets)}; the Makefile has {sorted(targets)}"


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraint_files_differ_only_in_triton_and_its_numpy():
    own, oldest, newest = (pins(f"constraints{name}.txt") for name in ("", "-triton-3.6", "-triton-3.9"))
    assert own | {"triton": "3.6.0", "numpy": oldest["numpy"]} == oldest
    assert own | {"triton": "3.9.0"} == newest
    assert tuple(map(int, oldest["numpy"].split(".")[:2])) < (2, 4), "Triton 3.6's interpreter breaks on NumPy 2.4"
