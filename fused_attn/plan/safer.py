"""What is taken where tiles do not fit a card after all: safer ones, found step by step when a kernel is first launched there.

The tables are static findings, of some Tritons and of the cards that someone compiled for. A kernel that needs more than the
card has with its tiles, or spills far beyond what any table admits, gets the next tiles of a ladder that ends with the smallest
ones: once for a kind of call, with a warning, and from then on, so that results do not change between calls. Where even those
spill, the tiles that spill least are kept. A schedule that has tiles of its own, beside the default, is given up instead.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch

from fused_attn.call.spec import AttentionSpec, OtherTensors, TileConfig
from fused_attn.kernels.forward import Splits
from fused_attn.kernels.launch import UnfitTilesError, accept

Call: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec, OtherTensors, str]
Tiles: TypeAlias = Mapping[str, TileConfig | None]  # by kernel or schedule; None for a schedule that is given up
SHIPPED: Tiles = MappingProxyType({})  # no tiles but those of the tables
SMALLEST = 16  # rows or columns
_found: dict[Any, Tiles] = {}  # by kind of call; never changed, as other threads may hold them
_walked: dict[Any, list["_Tried"]] = {}  # what did not fit so far, by kind of call and kernel


class _Tried(NamedTuple):
    """Tiles that did not fit; ``compiled`` where they run all the same, spilling."""

    config: TileConfig
    said: str
    spilled: int
    compiled: Any


def tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors, arch: str) -> Tiles:
    """What stands in for the tables' tiles in a call."""
    return _found.get(_kind(q, k, v, spec, others, arch), SHIPPED) if _found else SHIPPED


def _kind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors, arch: str) -> Any:
    """What the registers and the shared memory of a call's kernels depend on."""
    operands = tuple((x.dtype, x.dim(), tuple(n == 1 for n in x.shape)) for x in others.operands)
    members = tuple((member.code, member.args) for member in (*spec.score_mods, *spec.mask_mods))
    return (arch, q.dtype, q.shape[3], v.shape[3], q.shape[1] == k.shape[1], spec.softcap is None, members, spec.dropout_p > 0,
            spec.precise, spec.fp32_precision, spec.longest is None, others.score_weight is None, operands, spec.hopper)


def safer(config: TileConfig, kernel: str) -> TileConfig | None:
    """The next step of a kernel's ladder, or None after the smallest tiles.

    The pipeline goes first, then dK and dV get a launch each, then the longer side is halved each time. Tiles of gradients of
    operands stay square, for their sums along diagonals.
    """
    if config.num_stages > 1:
        return dataclasses.replace(config, num_stages=1, edge_stages=None)
    if kernel == "dkv" and not config.separate:
        return dataclasses.replace(config, separate=True)
    if max(config.block_m, config.block_n) <= SMALLEST:
        return None
    if kernel == "operand_grad":
        side = max(SMALLEST, min(config.block_m, config.block_n) // 2)
        halved = dataclasses.replace(config, block_m=side, block_n=side)
    else:
        longer = "block_m" if config.block_m > config.block_n else "block_n"
        halved = dataclasses.replace(config, **{longer: getattr(config, longer) // 2})
    warps = config.num_warps if halved.block_m * halved.block_n > 32 * 32 else min(config.num_warps, 4)
    return dataclasses.replace(halved, num_warps=warps)


def step_down(call: Call, unfit: UnfitTilesError) -> None:
    """Takes the next step for what did not fit, or raises an error. ``call``: what ``tiles`` takes."""
    kind = _kind(*call)
    kernel = unfit.schedule or _kernel(unfit)
    if kernel is None:
        raise unfit
    now, following = _found.get(kind, SHIPPED), None
    then = "another schedule is taken instead"
    if unfit.schedule is None:
        config = _own(unfit.config)
        walked = _walked.setdefault((kind, kernel), [])
        if unfit.compiled is not None and any(each.compiled is unfit.compiled for each in walked):
            accept(unfit.compiled)  # it was passed by before, and the way down ended at its tiles
            return
        walked.append(_Tried(config, str(unfit), unfit.spilled, unfit.compiled))
        following = safer(config, kernel)
        if following is not None and following != now.get(kernel):
            then = f"{following.words} is taken instead"
        else:  # the end of the ladder
            following = _end(kind, kernel, walked, unfit)
            then = f"{following.words}, which spills least, is kept"
    _found[kind] = {**now, kernel: following}
    warnings.warn(f"fused_attn: {unfit}; {then}, for all calls of the kind in this process", RuntimeWarning, stacklevel=2)


def _end(kind: Any, kernel: str, walked: list[_Tried], unfit: UnfitTilesError) -> TileConfig:
    """Of the tiles that were tried, those that run and spill least; raises where none run, and keeps none of them."""
    running = [each for each in walked if each.compiled is not None]
    if not running:
        _found[kind] = {name: config for name, config in _found.get(kind, SHIPPED).items() if name != kernel}
        unfit.args = (f"{unfit}; at first: {walked[0].said}",)
        del _walked[kind, kernel]
        raise unfit
    least = min(running, key=lambda each: each.spilled)
    for each in running:
        if each.config == least.config:  # variants by alignment
            accept(each.compiled)
    return least.config


def _own(config: TileConfig) -> TileConfig:
    """A configuration without what launching adds."""
    return dataclasses.replace(config, wide=False, fenced=False)


def _kernel(unfit: UnfitTilesError) -> str | None:
    """The name under which the tables have a kernel's tiles, or None for one that has those of another."""
    if Splits in unfit.argument_types:
        return "splits"
    name = unfit.name.removesuffix("_kernel")
    if name in ("forward", "combine", "delta", "dq", "dkv"):
        return name
    return "operand_grad" if name in ("operand_grad", "row_stats", "column_sums", "weights") else None


def forget() -> None:
    """Takes the tables' tiles again."""
    _found.clear()
    _walked.clear()
