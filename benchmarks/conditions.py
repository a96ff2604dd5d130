"""What a number means nothing without: the card, the versions, the commit, the clocks."""

import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fused_attn
from fused_attn.tools.report import git


def source_hash() -> str:
    """What the numbers depend on in this checkout, whatever git knows of it."""
    package = Path(fused_attn.__file__).parent
    kernels = (package / "kernels").resolve()  # a link in a checkout, which rglob does not follow
    digest = hashlib.sha256()
    for folder in (package, kernels, Path(__file__).parent):
        for file in sorted(set(folder.rglob("*.py"))):
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def clocks() -> dict[str, str] | None:
    """Driver, clocks, power and temperature as nvidia-smi tells them."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit",
             "temperature.gpu")
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    which = [] if uuid is None else ["-i", f"GPU-{uuid}"]
    line = _output("nvidia-smi", *which, f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return None if not line else dict(zip(names, line.splitlines()[0].split(", "), strict=False))


def conditions(device: str, commit: str | None) -> dict[str, Any]:
    """What a number means nothing without. ``key`` names them in each row: rows of other conditions are not mixed in."""
    import triton

    status = git("status", "--porcelain")
    found: dict[str, Any] = {
        "gpu": "CPU, Triton's interpreter", "interpreter": device == "cpu", "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "fused_attn": fused_attn.__version__,
        "commit": commit or git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status),
        "source": source_hash(), "cpu_count": os.cpu_count(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device != "cpu":
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "sm_count": card.multi_processor_count, "memory_gib": round(card.total_memory / 2**30, 1),
                  "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda, "hip": torch.version.hip,
                  "cudnn": torch.backends.cudnn.version(), "clocks": clocks()}
    found["key"] = "/".join((found["gpu"], f"torch {found['torch']}", f"triton {found['triton']}", found["source"]))
    return found
