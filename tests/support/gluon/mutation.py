"""Copies of modules with bugs planted in them."""

import ast
import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Edits = dict[str, Sequence[tuple[str, str]]]


@functools.cache
def _imports(file: str, module: str) -> frozenset[str]:
    """Modules that the source of ``module`` may import: of `from a import b`, both a and a.b."""
    found = set()
    package = module if Path(file).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _reached(edited: set[str], package: str) -> set[str]:
    """The edited modules, and those of the package that import them, directly or not."""
    files = {name: module.__file__ for name, module in list(sys.modules.items())
             if name.startswith(f"{package}.") and getattr(module, "__file__", None)}
    reached, grown = set(edited), True
    while grown:
        importers = {name for name, file in files.items() if _imports(str(file), name) & reached}
        grown = not importers <= reached
        reached |= importers
    return reached


class _Copies(importlib.abc.MetaPathFinder):
    """Finds the copies."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        file = self.files.get(fullname)
        return None if file is None else importlib.util.spec_from_file_location(fullname, file)


@contextlib.contextmanager
def mutated(edits: Edits) -> Iterator[dict[str, ModuleType]]:
    """Copies of the edited modules and of the modules of their package that import them, by name.

    ``edits`` maps a module's name to pairs (old, new); the first occurrence of old is replaced, and it must occur. The
    package is the innermost one that holds all edited modules. The copies' files last as long as the context, because
    Triton reads the sources of its functions; sys.modules has the originals again before it begins.
    """
    parents = [name.rpartition(".")[0].split(".") for name in edits]
    package = ".".join(parts[0] for parts in zip(*parents, strict=False) if len(set(parts)) == 1)
    if not package:
        raise ValueError(f"no package holds all of {', '.join(edits)}")
    originals = {name: importlib.import_module(name) for name in edits}
    reached = _reached(set(edits), package)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in sorted(reached):
            source = Path(str(originals.get(name, sys.modules[name]).__file__))
            if source.name == "__init__.py":
                raise ValueError(f"{name} is a package: its copy would have no modules")
            text = source.read_text(encoding="utf-8")
            for old, new in edits.get(name, ()):
                if old not in text:
                    raise ValueError(f"{name} has no {old!r}")
                text = text.replace(old, new, 1)
            files[name] = Path(folder, *name.split(".")).with_suffix(".py")
            files[name].parent.mkdir(parents=True, exist_ok=True)
            files[name].write_text(text, encoding="utf-8")
        yield _imported(files, package)


def _imported(files: dict[str, Path], package: str) -> dict[str, ModuleType]:
    """Imports the copies, and undoes what that does to sys.modules and to the packages that hold the modules."""
    before = {name: module for name, module in sys.modules.items() if name.startswith(f"{package}.")}
    holders = {name: (sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in files}
    attributes = {name: getattr(holder, child) for name, (holder, child) in holders.items() if hasattr(holder, child)}
    finder = _Copies(files)
    for name in files:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        return {name: importlib.import_module(name) for name in files}
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.startswith(f"{package}.") and name not in before]:
            del sys.modules[name]
        sys.modules.update(before)
        for name, (holder, child) in holders.items():
            if name in attributes:
                setattr(holder, child, attributes[name])
            elif hasattr(holder, child):
                delattr(holder, child)
