"""The package at its main job, on real text: check the kernels, train a small GPT twice, look at what it learned."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_attn.tools.demo.data import DemoError
from fused_attn.tools.demo.train import FULL, QUICK


def run(out: Path, quick: bool, seed: int, check: Callable[[], dict[str, Any]]) -> int:
    """Runs the whole demonstration and fills the folder ``out``; returns the exit status.

    0 when the kernels pass ``check``, the model learns the text clearly better than byte frequencies could, and training
    with ``attention`` and with ``reference_attention`` agree. Where the check fails, nothing is trained and nothing written;
    where a later criterion fails, everything is written, and the summary says so.

    Args:
        out: folder for the results; created where missing. Files of an earlier run are overwritten, announced beforehand.
        quick: fewer steps, and a smaller margin to beat.
        seed: decides weights, order of the data, and the sample.
        check: runs the kernels against the reference, prints what it finds, and returns it, JSON-able, with at least
            "backend" and "passed".
    """
    try:
        from rich.console import Console

        from fused_attn.tools.demo import pipeline
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in ("rich", "matplotlib"):
            raise
        print(f"fused-attn demo: {error.name} is missing: pip install 'fused-attn[examples]'", file=sys.stderr)
        return 2
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        return pipeline.run(console, out, QUICK if quick else FULL, seed, check)
    except DemoError as error:
        console.print(f"demo failed: {error}")
        return 1
