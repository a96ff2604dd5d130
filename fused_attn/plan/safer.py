"""What is taken where tiles do not fit a card after all: safer ones, found step by step when a kernel is first compiled there.

The tables are static findings, of some Tritons and of the cards that someone compiled for. A kernel that does not compile with
its tiles, needs more than the card has, or spills far beyond what any table admits, gets the next tiles of a ladder that ends
with the smallest ones: once for a kind of call, with a warning, and from then on, so that results do not change between calls.
A schedule that has tiles of its own, beside the default, is given up instead.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from fused_attn.call.spec import AttentionSpec, OtherTensors, TileConfig
from fused_attn.kernels.forward import Splits
from fused_attn.kernels.launch import Launch, UnfitTilesError

Call: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec, OtherTensors, str]
Tiles: TypeAlias = Mapping[str, TileConfig | None]  # by kernel or schedule; None for a schedule that is given up
SHIPPED: Tiles = MappingProxyType({})  # no tiles but those of the tables
SMALLEST = 16  # rows or columns
_found: dict[Any, dict[str, TileConfig | None]] = {}  # by kind of call


def tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors, arch: str) -> Tiles:
    """What stands in for the tables' tiles in a call."""
    return _found.get(_kind(q, k, v, spec, others, arch), SHIPPED) if _found else SHIPPED


def _kind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors, arch: str) -> Any:
    """What the registers and the shared memory of a call's kernels depend on."""
    operands = tuple((x.dtype, x.dim(), tuple(n == 1 for n in x.shape)) for x in others.operands)
    members = tuple((member.code, member.args) for member in (*spec.score_mods, *spec.mask_mods))
    return (arch, q.dtype, q.shape[3], v.shape[3], q.shape[1] == k.shape[1], spec.softcap is None, members, spec.dropout_p > 0,
            spec.precise, spec.fp32_precision, spec.longest is None, others.score_weight is None, operands, spec.hopper)


def safer(config: TileConfig, two_sums: bool = False) -> TileConfig | None:
    """The next step of the ladder, or None after the smallest tiles.

    The pipeline goes first, then ``two_sums``, dK and dV, get a launch each, then the longer side is halved each time.
    """
    if config.num_stages > 1:
        return dataclasses.replace(config, num_stages=1, edge_stages=None)
    if two_sums and not config.separate:
        return dataclasses.replace(config, separate=True)
    if max(config.block_m, config.block_n) <= SMALLEST:
        return None
    longer = "block_m" if config.block_m > config.block_n else "block_n"
    halved = dataclasses.replace(config, **{longer: getattr(config, longer) // 2})
    warps = config.num_warps if halved.block_m * halved.block_n > 32 * 32 else min(config.num_warps, 4)
    return dataclasses.replace(halved, num_warps=warps)


def step_down(call: Call, unfit: UnfitTilesError) -> None:
    """Takes the next step for what did not fit; raises it again if there is none. ``call``: what ``tiles`` takes."""
    taken = _found.setdefault(_kind(*call), {})
    if unfit.schedule is not None:
        taken[unfit.schedule] = None
        _warn(unfit, "another schedule is taken instead")
        return
    kernel = _kernel(unfit.launch)
    config = dataclasses.replace(unfit.config, wide=False, fenced=False)  # without what launching adds
    following = safer(config, kernel == "dkv")
    if following is None:
        raise unfit
    taken[kernel] = following
    _warn(unfit, f"{following.words} is taken instead")


def _kernel(launch: Launch) -> str:
    """The name under which the tables have a kernel's tiles; what looks at weights has those of gradients of operands."""
    if any(isinstance(x, Splits) for x in launch.arguments):
        return "splits"
    name = launch.name.removesuffix("_kernel")
    return name if name in ("forward", "combine", "delta", "dq", "dkv") else "operand_grad"


def _warn(unfit: UnfitTilesError, then: str) -> None:
    warnings.warn(f"fused_attn: {unfit}; {then}, for all calls of the kind in this process", RuntimeWarning, stacklevel=2)


def forget() -> None:
    """Takes the tables' tiles again."""
    _found.clear()
