"""Tiles that ``fused-attn tune`` found on a card: the file that keeps them, and which of them a launch takes.

The file is JSON and can be given to others who have the same card: {"format": 1, "arch", "gpu", "triton", "torch",
"fused_attn", "tiles": [{"kernel", "head_dim", "config": {fields of TileConfig}, "ms", "shipped_ms", ...}]}.
"""

import dataclasses
import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from fused_attn import settings
from fused_attn.spec import TileConfig
from fused_attn.tuning import arch_of, served, triton_version

FORMAT = 1
Found = dict[tuple[str, int], TileConfig]  # (kernel, widest head dim it serves) -> configuration


def gpu_name(device: torch.device) -> str:
    """Of a device: "NVIDIA H100 80GB HBM3"; "interpreter" of the CPU."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


def default_path(device: torch.device) -> Path:
    """Where tune leaves what it finds on a device, and where every process looks for it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fused_attn" / f"tiles-{re.sub(r'[^a-z0-9]+', '-', gpu_name(device).lower()).strip('-')}.json"


def path(device: torch.device) -> Path | None:
    """The file whose tiles a device uses: FUSED_ATTN_TILES, else tune's own; None where there is none, or it is "none"."""
    if settings.TILES is None:
        found = default_path(device)
        return found if device.type != "cpu" and found.is_file() else None
    return None if settings.TILES == "none" else Path(settings.TILES)


@functools.cache
def tuned(device: torch.device) -> Found:
    """The tiles of a device; those of another kind of card or another Triton are left alone, with a warning."""
    file = path(device)
    if file is None:
        return {}
    if not file.is_file():
        raise ValueError(f"FUSED_ATTN_TILES: expected a file of `fused-attn tune`, or none; got {str(file)!r}")
    try:
        content = read(file)
    except ValueError as error:
        if settings.TILES is not None:
            raise
        warnings.warn(f"fused_attn: {error}", RuntimeWarning, stacklevel=2)  # found by itself: no call may fail of it
        return {}
    here = {"arch": arch_of(device), "triton": triton_name()}
    other = [f"{name} {content.get(name)}, here {value}" for name, value in here.items() if content.get(name) != value]
    if other:
        warnings.warn(f"fused_attn: the tiles in {file} are not used: {'; '.join(other)}", RuntimeWarning, stacklevel=2)
        return {}
    return {(row["kernel"], row["head_dim"]): config_of(row) for row in content["tiles"]}


def instead(config: TileConfig, kernel: str, q: torch.Tensor, v: torch.Tensor) -> TileConfig:
    """What was tuned for a kernel on the device of q, in place of the shipped configuration."""
    found = tuned(q.device)
    if not found or q.dtype not in (torch.float16, torch.bfloat16) or max(q.shape[3], v.shape[3]) > 256:
        return config
    return found.get((kernel, served(kernel, q.shape[3], v.shape[3], arch_of(q.device))), config)


def config_of(row: dict[str, Any]) -> TileConfig:
    """The configuration of an entry."""
    return TileConfig(**{**row["config"], "options": tuple((name, value) for name, value in row["config"].get("options", ()))})


def triton_name() -> str:
    """The Triton that a file's tiles are for, "3.7"."""
    return ".".join(map(str, triton_version()))


def read(file: Path) -> dict[str, Any]:
    """A file of tiles. Raises ValueError for one that is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT and all({"kernel", "head_dim"} <= row.keys() for row in content["tiles"])
        for row in content["tiles"] if known else ():
            config_of(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected tiles as `fused-attn tune` writes them; {error!r}") from error
    if not known:
        raise ValueError(f"{file}: expected tiles of format {FORMAT}; got format {content['format']!r}")
    return dict(content)


def write(file: Path, content: dict[str, Any]) -> None:
    """Replaces a file of tiles in one step: a run that is cut short leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.replace(file)


def row(kernel: str, head_dim: int, config: TileConfig, **figures: Any) -> dict[str, Any]:
    """An entry of a file: the configuration, and what it was measured to give."""
    return {"kernel": kernel, "head_dim": head_dim, "config": dataclasses.asdict(config), **figures}
