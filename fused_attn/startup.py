"""What comes before the rest of the package: finding its kernels in a checkout, and errors of commands in a bad environment."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

PROGRAM = "fused-attn"
PROGRAMS = ("benchmarks", "examples", "tests")  # folders of a checkout that have programs of their own


def find_kernels() -> None:
    """Makes ``fused_attn.kernels`` importable from ``kernels/`` beside the package where the symlink to it is missing.

    Git leaves a text file in its place where symlinks are not allowed (Windows), and source distributions leave nothing.
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
    script, module = Path(sys.argv[0]), _module()
    if module.partition(".")[0] == "fused_attn" or script.stem == PROGRAM:
        return PROGRAM
    main = getattr(sys.modules["__main__"], "__file__", None)
    checkout = Path(__file__).resolve().parent.parent
    if main is None or not any(Path(main).resolve().is_relative_to(checkout / folder) for folder in PROGRAMS):
        return None
    return f"python -m {module}" if module else script.name


def _module() -> str:
    """The module that ``python -m`` runs, or "" where the program was started in another way.

    It reads the interpreter's own arguments: argv[0] is not the module's path yet while the package of that module is imported.
    """
    at = len(sys.orig_argv) - len(sys.argv)
    if not 0 < at < len(sys.orig_argv) or sys.argv[0] == "-c":
        return ""
    option, word = sys.orig_argv[at - 1], sys.orig_argv[at]
    if word.startswith("-"):
        return word.partition("m")[2]  # -mfused_attn
    return word if option.startswith("-") and option.endswith("m") else ""


find_kernels()
try:
    from fused_attn import settings  # noqa: F401  # reads the environment
except ValueError as error:
    if program := command():  # whose user sees no traceback
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise
