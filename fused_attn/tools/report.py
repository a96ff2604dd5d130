"""What commands print: tables, progress, and the conditions under which something was measured."""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch

import fused_attn

T = TypeVar("T")


def conditions() -> dict[str, Any]:
    """Versions and devices, as JSON takes them, to be kept beside every result."""
    has_triton = importlib.util.find_spec("triton") is not None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fused_attn": fused_attn.__version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_triton else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": gpus,
    }


def git(*command: str) -> str | None:
    """The output of git for the checkout that the package runs from; None for an installed package, or without git."""
    root = Path(fused_attn.__file__).parent.parent
    if not (root / ".git").exists():  # site-packages may lie in somebody else's checkout
        return None
    try:
        done = subprocess.run(("git", *command), cwd=root, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yields items with a progress bar on stderr, or a line for each without rich; ``total`` is for items without a length."""
    total = len(items) if isinstance(items, Sized) else total
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ImportError:
        for i, item in enumerate(items):
            print(f"{what}: {i + 1} of {total}", file=sys.stderr, flush=True)
            yield item
    else:
        yield from bar(items, what, total, console=Console(stderr=True))


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints rows as a table; the keys of the first are the columns. Plain where rich is not installed."""
    if not rows:
        print(f"{title}: none")
        return
    columns = [column.replace("_", " ") for column in rows[0]]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [columns, *([str(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        print("\n".join([title, *text]))
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    # A pipe has no width of its own: let the table be as wide as it is.
    (console if console.is_terminal else Console(width=160)).print(table)
