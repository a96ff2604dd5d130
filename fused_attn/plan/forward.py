"""The schedules of the forward: each a generator of the launches that make (out, LSE, residual of out or None)."""

from collections.abc import Generator
from typing import TypeAlias

import torch

from fused_attn.call.layout import accumulates, like, lse_like
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.combine import combine_launch
from fused_attn.kernels.forward import Splits, forward_launch
from fused_attn.kernels.launch import Call, Launch
from fused_attn.kernels.tile_list import list_launch
from fused_attn.plan.problem import Problem
from fused_attn.plan.tiles import FEW_QUERIES, n_splits, unseen_keys

_MANY_QUERIES = (f"more than {FEW_QUERIES} queries fill a card by themselves",)
Forward: TypeAlias = Generator[Launch, None, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def pointers(problem: Problem) -> Forward:
    """Triton's kernel, with tiles that are loaded by pointers."""
    return _one_kernel(problem, problem.config("forward"))


def descriptors(problem: Problem) -> Forward:
    """The same source, with tiles that sm_90's tensor memory accelerator loads."""
    return _one_kernel(problem, problem.hopper_config("descriptors"))


def specialized(problem: Problem) -> Forward:
    """Like ``descriptors``, with warps of their own for the loads, as Triton divides them."""
    return _one_kernel(problem, problem.hopper_config("specialized"))


def _one_kernel(problem: Problem, config: TileConfig) -> Forward:
    q, k, v, call = problem.q, problem.k, problem.v, problem.call
    precise = problem.residual
    out, lse = problem.outputs(accumulates(q) if precise else None)
    if out.numel():
        tiles, listing = list_launch(call, q, k, config, keys_first=False)
        yield from listing
        yield forward_launch(q, k, v, out, lse, problem.others.sinks, tiles, call, config=config, precise=precise)
    if not precise:
        return out, lse, None
    rounded = like(q, out.shape[3]).copy_(out)
    return rounded, lse, like(q, out.shape[3]).copy_(out.sub_(rounded))


def against_splits(problem: Problem) -> tuple[str, ...]:
    """Reasons not to divide the keys of a call among several programs."""
    if problem.call.n_queries > FEW_QUERIES:
        return _MANY_QUERIES
    if problem.residual or problem.others.score_weight is not None:
        return ("precise and additive attention do not join parts",)
    return () if _n_splits(problem) > 1 else ("too few keys",)


def _unseen(problem: Problem) -> int:
    if problem.spec.window.left is None:
        return 0
    return unseen_keys(problem.spec, problem.others, problem.call.n_queries, problem.call.n_keys)


def _n_splits(problem: Problem) -> int:
    (q, k), call, unseen = problem[:2], problem.call, _unseen(problem)
    return n_splits(q.shape[2], k.shape[2] - unseen, call.n_queries, call.n_keys - unseen, q.shape[1] // k.shape[1],
                    problem.split)


def splits(problem: Problem) -> Forward:
    """For few queries over many keys, as in decoding: keys are cut into splits, whose results are joined afterwards."""
    q, k, v, spec, others = problem[:5]
    count, unseen, call = _n_splits(problem), _unseen(problem), problem.call
    if unseen:  # start at the first key that the window of some query reaches
        k, v = k[:, :, unseen:], v[:, :, unseen:]
        call = call._replace(offset=call.offset - unseen, n_keys=call.n_keys - unseen)
    lse = lse_like(q, spec, problem.packed)
    parts = lse.new_empty((count, *q.shape[:3], v.shape[3]))
    # [count, B, H, rows] or [2, count, B, H, rows]. No program writes rows of no sequence: their LSE begins as -inf.
    shape = (*lse.shape[:-3], count, *lse.shape[-3:-1], lse.stride(-2) if problem.packed else lse.shape[-1])
    parts_lse = lse.new_full(shape, float("-inf")) if problem.packed else lse.new_empty(shape)
    rows, outs, splits = q, parts.flatten(0, 1), Splits(parts.stride(0), parts_lse.stride(-4))
    if _groups_into_rows(problem, call):
        rows, outs = _grouped(q, k), _grouped(outs, k)
        call = call._replace(n_queries=rows.shape[2], left=None, right=None)
    config = problem._replace(call=call).config("splits")
    tiles, listing = list_launch(call, rows, k, config, keys_first=False)
    yield from listing
    yield forward_launch(rows, k, v, outs, parts_lse.flatten(-4, -3), None, tiles, call, config=config, splits=splits,
                         n_splits=count)
    out = like(q, v.shape[3])
    yield combine_launch(parts, parts_lse, out, lse, others.sinks, config=problem.config("combine"))
    return out, lse, None


def against_decode(problem: Problem) -> tuple[str, ...]:
    """Reasons not to give the one query of each head a tile of few rows."""
    if problem.q.shape[2] != 1 or problem.packed:
        return ("it is of one query a head, in a dense batch",)
    if problem.residual or problem.others.score_weight is not None:
        return ("precise and additive attention have tiles of their own",)
    return ()


def decode(problem: Problem) -> Forward:
    """For one query over few keys: a group's heads are the rows of one tile where nothing tells them apart, so that keys are
    read once for all of them."""
    q, k, v, call, sinks = problem.q, problem.k, problem.v, problem.call, problem.others.sinks
    out, lse = problem.outputs()
    rows, outs = q, out
    if sinks is None and _groups_into_rows(problem, call):
        rows, outs = _grouped(q, k), _grouped(out, k)
        call = call._replace(n_queries=rows.shape[2], left=None, right=None)
    if out.numel():
        config = problem._replace(call=call).config("splits")
        tiles, listing = list_launch(call, rows, k, config, keys_first=False)
        yield from listing
        yield forward_launch(rows, k, v, outs, lse, sinks, tiles, call, config=config)
    return out, lse, None


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, H, 1, D] as [B, Hkv, group, D]: a key head's query heads as the rows of one tile, so that keys are read once."""
    batch, heads, _, dim = x.shape
    return x.select(2, 0).view(batch, k.shape[1], heads // k.shape[1], dim)


def _groups_into_rows(problem: Problem, call: Call) -> bool:
    """Whether the query heads of a group may be rows of one tile: they have one query each, nothing tells heads apart, and
    the window keeps every key."""
    spec, q, k = problem.spec, problem.q, problem.k
    plain = not (spec.score_mods or spec.mask_mods or spec.dropout_p) and not problem.packed
    every = ((call.left is None or call.left >= call.offset)
             and (call.right is None or call.offset + call.right >= call.n_keys - 1))
    return plain and every and q.shape[2] == 1 and q.shape[1] > k.shape[1]
