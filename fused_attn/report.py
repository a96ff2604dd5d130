"""What commands print: tables, and the conditions under which something was measured."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from typing import Any

import torch

import fused_attn


def conditions() -> dict[str, Any]:
    """Versions and devices, as JSON takes them: what must stand beside every result."""
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


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints rows as a table; the keys of the first are the columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise SystemExit("fused-attn: tables need rich: pip install 'fused-attn[cli]'") from None
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    # A pipe has no width of its own: let the table be as wide as it is.
    (console if console.is_terminal else Console(width=160)).print(table)
