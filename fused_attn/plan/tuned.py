"""Tiles that ``fused-attn tune`` found on a card: the file that keeps them, and which of them a launch takes.

The file is JSON and can be given to others who have the same card: {"format": 1, "arch", "gpu", "triton", "torch",
"fused_attn", "tiles": [{"kernel", "head_dim", "config": {fields of TileConfig}, "ms", "shipped_ms", ...}], "schedules":
[{"pass", "head_dim", "schedule", "ms": {schedule: milliseconds}, ...}], "split": {"keys", ...}}. It is not trusted: an entry
must be a configuration, or a schedule, that the search itself would try on this card, so that a file may make a kernel slow,
but never makes it wrong, and never tells the compiler anything that the shipped tables do not.
"""

import dataclasses
import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fused_attn import files, settings
from fused_attn.call.spec import TileConfig
from fused_attn.plan.tiles import Kernel, choose, choose_fused, served
from fused_attn.targets import arch_of, target_of, triton_name

FORMAT = 1
KERNELS: tuple[Kernel, ...] = ("forward", "dq", "dkv", "fused")
WIDEST = 256  # head dim
# What the search changes, and the values it tries; whatever else a configuration says stays as it is shipped.
STEPS: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128, 256), "block_n": (16, 32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4, 5),
    "edge_stages": (None, 1), "disable_licm": (False, True),
}
Found = dict[tuple[str, int], TileConfig]  # (kernel, widest head dim it serves) -> configuration
Pass = Literal["forward", "backward"]
# The schedules that may be timed, and the kernel whose entries of the tables say which head dims are served alike.
SCHEDULES: dict[Pass, tuple[str, ...]] = {"forward": ("pointers", "descriptors", "specialized", "gluon"),
                                          "backward": ("fused", "separate", "gluon")}
_SERVED_AS: dict[Pass, Kernel] = {"forward": "forward", "backward": "dkv"}
Chosen = dict[tuple[str, int], str]  # (pass, widest head dim it serves) -> schedule
SPLITS = (128, 256, 512, 1024)  # least numbers of keys in a split that are timed


class Record(NamedTuple):
    """What a file of a card says."""

    tiles: Found
    schedules: Chosen
    split: int | None = None


def gpu_name(device: torch.device) -> str:
    """The name of a device, such as "NVIDIA H100 80GB HBM3"; "interpreter" for the CPU."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


def default_path(device: torch.device) -> Path:
    """Where tune leaves what it finds on a device with this Triton, and where every process looks for it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    card = re.sub(r"[^a-z0-9]+", "-", gpu_name(device).lower()).strip("-")
    return cache / "fused_attn" / f"tiles-{card}-triton-{triton_name()}.json"


def path(device: torch.device) -> Path | None:
    """The file whose tiles a device uses: FUSED_ATTN_TILES, else tune's own; None where there is none, or it is "none"."""
    if settings.TILES is None:
        found = default_path(device)
        return found if device.type != "cpu" and found.is_file() else None
    return None if settings.TILES == "none" else Path(settings.TILES)


def tuned(device: torch.device) -> Found:
    """The tiles of a device; those of another kind of card or another Triton are left alone, with a warning."""
    return _record(device).tiles


def schedules(device: torch.device) -> Chosen:
    """The schedules of a device that were timed to be the quickest."""
    return {} if device.type == "meta" else _record(device).schedules


def schedule(which: Pass, q: torch.Tensor, v: torch.Tensor, device: torch.device) -> str | None:
    """The schedule that was timed to be the quickest for a pass on a device, or None."""
    found = schedules(device)
    if not found or q.dtype not in (torch.float16, torch.bfloat16) or max(q.shape[3], v.shape[3]) > WIDEST:
        return None
    return found.get((which, served_as(which, q.shape[3], v.shape[3], arch_of(device))))


def split(device: torch.device) -> int | None:
    """How many keys a split of decoding has at least on a device, if it was timed."""
    return None if device.type == "meta" else _record(device).split


def served_as(which: Pass, head_dim: int, head_dim_v: int, arch: str) -> int:
    """The widest head dim of those whose pass is made alike."""
    return served(_SERVED_AS[which], head_dim, head_dim_v, arch)


@functools.cache
def _record(device: torch.device) -> Record:
    file = path(device)
    if file is None:
        return Record({}, {})
    if not file.is_file():
        raise ValueError(f"FUSED_ATTN_TILES: expected a file of `fused-attn tune`, or none; got {str(file)!r}")
    try:
        content = read(file)
        here = {"arch": arch_of(device), "triton": triton_name()}
        other = [f"{name} {content.get(name)}, here {value}" for name, value in here.items() if content.get(name) != value]
        if not other:
            return Record(tiles(file, content), chosen(file, content), _split(file, content))
    except ValueError as error:
        if settings.TILES is not None:
            raise
        warnings.warn(f"fused_attn: {error}", RuntimeWarning, stacklevel=2)  # not asked for: no call may fail because of it
        return Record({}, {})
    warnings.warn(f"fused_attn: the tiles in {file} are not used: {'; '.join(other)}", RuntimeWarning, stacklevel=2)
    return Record({}, {})


def forget() -> None:
    """Reads the files anew at the next call."""
    _record.cache_clear()


def instead(config: TileConfig, kernel: str, q: torch.Tensor, v: torch.Tensor, device: torch.device) -> TileConfig:
    """The configuration that was tuned for a kernel on a device, else the shipped ``config``. On meta nothing is tuned."""
    if kernel not in KERNELS or device.type == "meta":
        return config
    found = tuned(device)
    if not found or q.dtype not in (torch.float16, torch.bfloat16) or max(q.shape[3], v.shape[3]) > WIDEST:
        return config
    return found.get((kernel, served(kernel, q.shape[3], v.shape[3], arch_of(device))), config)


def shipped(kernel: Kernel, head_dim: int, dtype: torch.dtype, arch: str) -> TileConfig | None:
    """Where the search for a kernel starts, or None where a card has no such kernel."""
    if kernel == "fused":
        return choose_fused(head_dim, head_dim, dtype, arch)
    return choose(kernel, head_dim, head_dim, dtype, arch)


def fits(config: TileConfig, kernel: Kernel, head_dim: int, arch: str) -> bool:
    """Whether a configuration may run at all: by shared memory, and by registers for the sums that every thread holds."""
    rows, walked = (config.block_m, config.block_n) if kernel in ("forward", "dq") else (config.block_n, config.block_m)
    n_sums = 1 if kernel in ("forward", "dq") or config.separate else 2
    sums = rows * (n_sums * head_dim + walked)
    shared = 2 * head_dim * (rows + config.num_stages * walked)
    registers = 512 * 64 if target_of(arch).lanes == 64 else 255 * 32  # of a warp
    return (sums <= registers * config.num_warps and shared <= target_of(arch).shared
            and rows * walked >= 4 * 32 * config.num_warps)


def config_of(row: dict[str, Any]) -> TileConfig:
    """The configuration of an entry that the search made."""
    return TileConfig(**{**row["config"], "options": tuple((name, value) for name, value in row["config"].get("options", ()))})


def checked(row: dict[str, Any], arch: str) -> TileConfig:
    """The configuration of an entry of a file. Raises ValueError for one that the search would not try on this card."""
    kernel, head_dim, given = row["kernel"], row["head_dim"], row["config"]
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}; got {kernel!r:.80}")
    if type(head_dim) is not int or not 1 <= head_dim <= WIDEST or served(kernel, head_dim, head_dim, arch) != head_dim:
        raise ValueError(f"head_dim: expected the widest that an entry of {arch} serves, up to {WIDEST}; got {head_dim!r:.80}")
    start = shipped(kernel, head_dim, torch.bfloat16, arch)
    if start is None:
        raise ValueError(f"kernel: {arch} has no {kernel} at head dim {head_dim}")
    own = {field.name: getattr(start, field.name) for field in dataclasses.fields(TileConfig)}
    if not isinstance(given, dict) or not given.keys() <= own.keys():
        raise ValueError(f"config: expected {', '.join(own)}; got {given!r:.80}")
    config = dataclasses.replace(start, **{name: _one_of(name, value, (own[name], *STEPS.get(name, ())))
                                           for name, value in given.items()})
    if config != start and not fits(config, kernel, head_dim, arch):
        raise ValueError(f"config: tiles of {config.block_m}x{config.block_n} do not fit {arch} at head dim {head_dim}")
    return config


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    """The one of ``known`` that JSON writes like ``value``: nothing from the file itself is used, only what it names."""
    for own in known:
        if json.dumps(own) == json.dumps(value):  # 1, 1.0, true and "1" are four things
            return own
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, dict.fromkeys(known)))}; got {value!r:.80}")


def tiles(file: Path, content: dict[str, Any]) -> Found:
    """The configurations of a file that was read. Raises ValueError where one is none that the search would try."""
    found = {}
    for i, row in enumerate(content["tiles"]):
        try:
            found[row["kernel"], row["head_dim"]] = checked(row, content["arch"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: expected tiles as `fused-attn tune` writes them; entry {i}: {error}") from None
    return found


def chosen(file: Path, content: dict[str, Any]) -> Chosen:
    """The schedules of a file that was read. Raises ValueError for one that tune would not time on this card."""
    found: Chosen = {}
    rows = content.get("schedules", [])
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected schedules as `fused-attn tune` writes them; got {rows!r:.80}")
    for i, row in enumerate(rows):
        try:
            which = _one_of("pass", row["pass"], tuple(SCHEDULES))
            name = _one_of("schedule", row["schedule"], SCHEDULES[which])
            head_dim = row["head_dim"]
            if type(head_dim) is not int or not 1 <= head_dim <= WIDEST \
                    or served_as(which, head_dim, head_dim, content["arch"]) != head_dim:
                raise ValueError(f"head_dim: expected the widest that an entry serves; got {head_dim!r:.80}")
            found[which, head_dim] = name
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            told = f"{file}: expected schedules as `fused-attn tune` writes them"
            raise ValueError(f"{told}; entry {i}: {error!r:.200}") from None
    return found


def _split(file: Path, content: dict[str, Any]) -> int | None:
    if "split" not in content:
        return None
    try:
        keys: int = _one_of("keys", content["split"]["keys"], SPLITS)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a split as `fused-attn tune` writes it; got {error!r:.200}") from None
    return keys


def read(file: Path) -> dict[str, Any]:
    """Reads a file of tiles, of any card; ``tiles`` checks its entries. Raises ValueError for any other file."""
    expected = f"{file}: expected tiles as `fused-attn tune` writes them"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        form, arch, rows = content["format"], content["arch"], content["tiles"]
        whole = isinstance(rows, list) and all({"kernel", "head_dim", "config"} <= row.keys() for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{expected}; {error!r:.200}") from error
    if type(form) is not int or form != FORMAT:  # true and 1.0 are equal to 1
        raise ValueError(f"{file}: expected tiles of format {FORMAT}; got format {form!r:.80}")
    if not whole:
        raise ValueError(f"{expected}; an entry lacks its kernel, head_dim or config")
    if not isinstance(arch, str):
        raise ValueError(f"{expected}; arch: expected a string; got {arch!r:.80}")
    return dict(content)


def write(file: Path, content: dict[str, Any]) -> None:
    """Replaces a file of tiles in one step: a run that is cut short leaves the old one or the new one."""
    files.write(file, json.dumps(content, indent=1) + "\n")


def row(kernel: str, head_dim: int, config: TileConfig, **figures: Any) -> dict[str, Any]:
    """An entry of a file: the configuration, and what it was measured to give."""
    return {"kernel": kernel, "head_dim": head_dim, "config": dataclasses.asdict(config), **figures}
