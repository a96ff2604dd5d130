"""What comes before the rest of the package: finding its kernels in a checkout, and commands in a bad environment."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

PROGRAM = "fused-attn"


def find_kernels() -> None:
    """Has ``fused_attn.kernels`` found in ``kernels/`` beside the package where the symlink to it is missing.

    Git leaves a text file in its place where symlinks are not allowed (Windows), source distributions leave nothing.
    """
    package = Path(__file__).parent
    name, folder = f"{package.name}.kernels", package.parent / "kernels"
    if name in sys.modules or (package / "kernels").is_dir() or not (folder / "launch.py").is_file():
        return
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = sys.modules[package.name].kernels = importlib.util.module_from_spec(spec)  # type: ignore[attr-defined]


def command() -> str | None:
    """The project's own command that this process runs, or None within any other program."""
    n, script = len(sys.argv), Path(sys.argv[0])
    # By the interpreter's own words: argv[0] is not the module's path yet while the package of that module is imported.
    module = sys.orig_argv[-n] if sys.orig_argv[-n - 1 : -n] == ["-m"] else ""
    if module == "fused_attn" or script.stem == PROGRAM:
        return PROGRAM
    return f"python -m {module}" if module.startswith("benchmarks.") else None


find_kernels()
try:
    from fused_attn import settings  # noqa: F401  # reads the environment
except ValueError as error:
    if program := command():  # whose user sees no traceback
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise
