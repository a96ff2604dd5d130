"""The package as users get it: a pure wheel built without torch, beside other projects' packages, with and without Triton."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo-output", "gpu-output")

IMPORT_BOTH = """
import fused_attn, kernels
print(fused_attn.__file__)
assert kernels.STAND_IN
if {with_triton}:
    import fused_attn.kernels.forward as forward
    print(forward.__file__)
"""


def run(*command: object, cwd: Path, path: list[Path] | None = None, **variables: str) -> str:
    """Output of a command that must succeed, outside the checkout and with only ``path`` on PYTHONPATH."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FUSED_ATTN_", "TRITON_", "PYTHON"))}
    clean["PYTHONPATH"] = os.pathsep.join(map(str, path or []))
    result = subprocess.run([str(part) for part in command], cwd=cwd, env={**clean, **variables}, text=True, check=False,
                            capture_output=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def python(code: str, *, cwd: Path, path: list[Path], executable: object = sys.executable, **variables: str) -> str:
    return run(executable, "-c", code, cwd=cwd, path=path, **variables)


def has_triton() -> bool:
    return bool(python("import importlib.util as u; print(u.find_spec('triton') or '')", cwd=ROOT, path=[]).strip())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of the tree."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "fused-attn", symlinks=True, ignore=GENERATED)


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory) -> Path:
    """A directory whose ``torch`` cannot be imported."""
    directory = tmp_path_factory.mktemp("no-torch")
    (directory / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    return directory


@pytest.fixture(scope="module")
def wheel(source, no_torch, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip_wheel(source, out, no_torch)
    return next(out.glob("*.whl"))


def pip_wheel(source: Path, out: Path, no_torch: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", out,
        source, cwd=out, path=[no_torch])


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A directory with a top-level package ``kernels``, as Hugging Face's is."""
    directory = tmp_path / "stand-in"
    (directory / "kernels").mkdir(parents=True)
    (directory / "kernels" / "__init__.py").write_text("STAND_IN = True\n")
    return directory


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def test_wheel_is_pure_and_holds_each_module_once(wheel):
    assert re.fullmatch(r"fused_attn-[0-9.]+-py3-none-any\.whl", wheel.name)
    names = contents(wheel)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_attn").rglob("*.py")}
    modules |= {f"fused_attn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    modules |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_attn" / "emulator" / "machine").iterdir()}
    packaged = [name for name in names if ".dist-info/" not in name]
    assert packaged == sorted(modules | {"fused_attn/py.typed", "fused_attn/versions.json"})
    assert packaged.count("fused_attn/kernels/forward.py") == 1
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(member for member in archive.namelist() if member.endswith(f".dist-info/{name}"))).decode()


def requirements(wheel: Path) -> set[str]:
    """Names of what the wheel requires whatever extra is asked for."""
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata(wheel, "METADATA"), re.MULTILINE)
    return {re.match(r"[\w-]+", line)[0] for line in lines if "extra ==" not in line}


def test_wheel_metadata(wheel):
    text = metadata(wheel, "METADATA")
    assert requirements(wheel) <= {"torch", "numpy"}
    assert "License-Expression: MIT" in text
    extras = set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE))
    assert extras == {"triton", "cli", "examples", "bench", "transformers", "test"}
    assert "fused-attn = fused_attn.tools.cli:main" in metadata(wheel, "entry_points.txt")


def test_import_needs_only_what_the_wheel_requires(wheel, tmp_path):
    absent = {"numpy", "triton", "rich", "matplotlib"} - requirements(wheel)
    python(f"import sys; sys.modules.update(dict.fromkeys({absent})); import fused_attn", cwd=tmp_path, path=[ROOT])


@pytest.fixture(scope="module")
def sdist(source, no_torch, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    python(f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})", cwd=source, path=[no_torch])
    return next(out.glob("*.tar.gz"))


def test_wheel_from_the_sdist_is_the_same(sdist, no_torch, wheel, tmp_path):
    pip_wheel(sdist, tmp_path, no_torch)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(wheel)


def test_the_sdist_holds_what_its_tests_need_and_runs_them(sdist, source, tmp_path):
    """Every file of the tree but the git's own; there are no symlinks in it, so its kernels are found without."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    missing = {path.relative_to(source).as_posix() for path in source.rglob("*")
               if path.is_file() and not (root / path.relative_to(source)).is_file()}
    assert {path for path in missing if not path.startswith((".", "build/")) and ".egg-info" not in path} == set()
    assert not (root / "fused_attn" / "kernels").exists()
    shown = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "counting", "tests/test_regressions.py",
                cwd=root, path=[root], TRITON_INTERPRET="1")
    assert "1 passed" in shown


@pytest.mark.few(1)
@pytest.mark.parametrize("left", ["text", "nothing"])
def test_a_checkout_without_symlinks_runs_its_kernels(source, stand_in, tmp_path, left):
    """Git on Windows leaves a text file in the place of the link, some archives leave nothing."""
    root = shutil.copytree(source, tmp_path / "checkout", symlinks=True)
    (root / "fused_attn" / "kernels").unlink()
    if left == "text":
        (root / "fused_attn" / "kernels").write_text("../kernels")
    code = IMPORT_BOTH.format(with_triton=has_triton()) + """
import os, torch
import fused_attn.kernels.hopper.problem, importlib
assert importlib.import_module("fused_attn.kernels.launch") is fused_attn.kernels.launch
q = torch.randn(1, 1, 8, 16)
print(fused_attn.attention(q, q, q, softcap=1.0, backend="triton").isfinite().all().item())
"""
    *files, finite = python(code, cwd=tmp_path, path=[root, stand_in], TRITON_INTERPRET="1").split()
    assert all(Path(file).is_relative_to(root) for file in files), files
    assert finite == "True"


def test_nothing_is_made_up_where_there_are_no_kernels(source, tmp_path):
    """Neither the link nor the folder, but another project's ``kernels`` beside the package."""
    shutil.copytree(source / "fused_attn", tmp_path / "fused_attn", ignore=lambda *_: ["kernels"])
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    shown = python("import sys, fused_attn; print('fused_attn.kernels' in sys.modules)", cwd=tmp_path, path=[tmp_path])
    assert shown == "False\n"


def test_installed_wheel_lives_beside_another_kernels_package(wheel, stand_in, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    shutil.copytree(stand_in / "kernels", site / "kernels")
    files = python(IMPORT_BOTH.format(with_triton=has_triton()), cwd=tmp_path, path=[site]).split()
    assert all(Path(file).is_relative_to(site) for file in files), files


@pytest.mark.few(1)
@pytest.mark.parametrize("inside", [False, True], ids=["from-elsewhere", "from-the-checkout"])
def test_checkout_lives_beside_another_kernels_package(stand_in, tmp_path, inside):
    """``kernels/`` of the checkout is first on the path and still loses, because it has no __init__.py."""
    code = IMPORT_BOTH.format(with_triton=has_triton())
    files = python(code, cwd=ROOT if inside else tmp_path, path=[ROOT, stand_in]).split()
    assert all(Path(file).is_relative_to(ROOT) for file in files), files


@pytest.mark.slow
def test_editable_install_lives_beside_another_kernels_package(source, stand_in, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    interpreter = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=interpreter,
                       cwd=tmp_path, path=[]).strip())
    ours = python("import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path, path=[]).strip()
    (site / "torch-and-tools.pth").write_text(ours + "\n")
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index",
        "--no-build-isolation", "--editable", source, cwd=tmp_path)
    shutil.copytree(stand_in / "kernels", site / "kernels")
    files = python(IMPORT_BOTH.format(with_triton=has_triton()), executable=interpreter, cwd=tmp_path, path=[]).split()
    assert all(Path(file).is_relative_to(source) for file in files), files


def test_import_touches_neither_triton_nor_cuda(tmp_path):
    python(
        "import torch, sys; before = set(sys.modules)\n"
        "import fused_attn\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not new & {'triton', 'matplotlib', 'rich', 'transformers'}, new\n",
        cwd=tmp_path, path=[ROOT],
    )


def test_without_triton_attention_answers_and_explain_says_why(tmp_path):
    report = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fused_attn\n"
        "q, k, v = torch.randn(3, 1, 2, 5, 8)\n"
        "expected = torch.softmax(q @ k.mT / 8**0.5, -1) @ v\n"
        "assert torch.allclose(fused_attn.attention(q, k, v), expected, atol=1e-6)\n"
        "assert torch.allclose(fused_attn.scaled_dot_product_attention(q, k, v), expected, atol=1e-6)\n"
        "print(fused_attn.explain(q, k, v))\n"
        "try: fused_attn.attention(q, k, v, backend='triton')\n"
        "except ValueError as error: print(error)\n",
        cwd=tmp_path, path=[ROOT],
    )
    assert "triton: Triton is not installed" in report
    assert "cannot run this call: Triton is not installed" in report
