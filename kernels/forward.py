"""Forward: out = softmax(mods(scale * Q K^T) where masks keep it) V, and the log-sum-exp of every row.

Source: Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2".
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import Kind, TileConfig
from fused_attn.kernels.dropout import dropout_keep
from fused_attn.kernels.launch import Call, Launch, accumulator, fit_offsets, programs, with_lse
from fused_attn.kernels.mask import keep_tile
from fused_attn.kernels.product import products
from fused_attn.kernels.score import NO_SLOPE, apply_mods
from fused_attn.kernels.softmax import LN2, LOG2E, lse_views, softmax_finish, softmax_sink, softmax_step
from fused_attn.kernels.sweep import edge_tile, inner_range, inner_tile, n_edges, sweep_keys
from fused_attn.kernels.tiles import (
    boxed,
    key_view,
    load_tile,
    outer,
    query_view,
    scaled,
    store_rows,
    store_tile,
    tile_of_keys,
    work_of,
    zeros,
)
from fused_attn.kernels.window import Rule, side


@dataclass(frozen=True)
class ForwardKind(Kind):
    """``precise``: whether the output is corrected for the rounding of the weights."""

    precise: bool = False


forward_kind = functools.cache(ForwardKind)


class Splits(NamedTuple):
    """The keys of every query in splits: each is a program with an out and an LSE of its own, which ``combine`` joins."""

    out_step: int  # elements from the out of one split to that of the next
    lse_step: int


@triton.jit
def even(first, stop, STEP: tl.constexpr, split, count):
    """The bounds of one of ``count`` even splits of the range first, first + STEP, ... below stop."""
    steps = tl.maximum(tl.cdiv(stop - first, STEP), 0)
    return first + split * steps // count * STEP, first + (split + 1) * steps // count * STEP


@triton.jit
def attend(state, q, k_view, v_view, place, rule, extras, KIND: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Attends to the BLOCK_N keys of ``place``: one step of the sweep. ``MASKED`` where some may not count."""
    BLOCK_N: tl.constexpr = TILE.block_n
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    acc, row_max, row_sum, key_sum, rounded_sum = state
    # [BLOCK_N, D]
    k = load_tile(k_view, place.k_first, KIND.dim, BLOCK_N, MASKED, TILE.wide)
    # [BLOCK_M, BLOCK_N]
    scores = products(q, k, place.head, extras.additive, KIND)
    NATURAL: tl.constexpr = len(extras.mods) > 0
    if NATURAL:
        scores, _ = apply_mods(scores * rule.scale, place, extras.mods, NO_SLOPE, 0, TILE, False, True, MASKED)
    if MASKED:
        scores = tl.where(keep_tile(place, rule, extras.keeps, TILE, False), scores, float("-inf"))
    # A mod may give -inf as well: a bias often does.
    p, shrink, row_max, row_sum = softmax_step(scores, row_max, row_sum, rule.scale * LOG2E, MASKED or NATURAL, NATURAL)
    if len(extras.dropout) > 0:
        p = tl.where(dropout_keep(extras.dropout, place, TILE, False), p, 0.0)
    # [BLOCK_N, DV]
    v = load_tile(v_view, place.k_first, KIND.dim_v, BLOCK_N, MASKED, TILE.wide)
    acc = outer(p.to(v[0].dtype), v, scaled(acc, shrink[:, None]), ACC, PRECISION)
    if KIND.precise:
        key_sum = key_sum * shrink + tl.sum(p, 1)
        rounded_sum = rounded_sum * shrink + tl.sum(p.to(v[0].dtype).to(ACC), 1)
    return acc, row_max, row_sum, key_sum, rounded_sum


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right", "n_splits"])
def forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, strides,
                   H, Nq, Nk, offset, left, right, scale: tl.float64, extras, tiles, splits, n_splits,
                   KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: BLOCK_M queries of one head against all keys in their window, or against one split of them.

    q [B, H, Nq, D], k [B, H / group, Nk, D], v [B, H / group, Nk, Dv], out [B, H, Nq, Dv], lse [B, H, Nq], sinks [H] or
    None; ``strides`` are those of q, k, v and out. ``left`` and ``right`` are window bounds or None, ``offset`` the
    position of query 0 among the keys, ``extras`` an Extras, ``tiles`` a TileList or (), ``splits`` a Splits or (), ``KIND`` a
    ForwardKind, ``TILE`` a TileConfig. With a Splits, out and lse are those of the first of ``n_splits`` splits.
    Of packed sequences, q is [H, T, D] and so on, and Nq and Nk are the longest lengths.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    D: tl.constexpr = KIND.dim
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    q_strides, k_strides, v_strides, out_strides = strides
    pid = tl.program_id(0)
    split = 0
    lse_skip = 0
    if len(splits) > 0:
        split = pid % n_splits
        pid = pid // n_splits
        out_ptr += tl.cast(split, tl.int64) * splits.out_step
        lse_skip = tl.cast(split, tl.int64) * splits.lse_step
    work = work_of(pid, Nq, H, Nq, Nk, offset, extras.sequences, BLOCK_M, right is not None)
    if len(extras.sequences.cu_q) > 0:
        if work.first >= work.n_queries:
            return
    rule = Rule(side(left), side(right), scale.to(ACC))
    q_view = query_view(q_ptr, q_strides, work)
    k_view = key_view(k_ptr, k_strides, work, KIND.group)
    v_view = key_view(v_ptr, v_strides, work, KIND.group)
    if TILE.descriptors:
        q_view = boxed(q_view, D, BLOCK_M)
        k_view = boxed(k_view, D, BLOCK_N)
        v_view = boxed(v_view, DV, BLOCK_N)
    # Where the compiler splits a tile between two consumers, it shifts the row at which queries are loaded, and with it all
    # other uses of that value: masks, LSE and output. So the load has a value of its own for the row (n_splits is 1).
    load_first = work.first
    if TILE.specialize:
        load_first = work.first + (n_splits - 1)
    # [BLOCK_M, D]
    q = load_tile(q_view, load_first, D, BLOCK_M, True, TILE.wide)
    row_max, row_sum = tl.full([BLOCK_M], float("-inf"), ACC), tl.zeros([BLOCK_M], ACC)
    sums = tl.zeros([BLOCK_M], ACC) if KIND.precise else 0
    state = zeros(DV, BLOCK_M, ACC), row_max, row_sum, sums, sums

    sweep = sweep_keys(tiles, work, rule, H, Nq, Nk, TILE)
    STEP: tl.constexpr = 1 if len(tiles) > 0 else BLOCK_N
    inner_first, inner_stop = inner_range(sweep)
    edges_first, edges_stop = 0, n_edges(sweep, BLOCK_N)
    if len(splits) > 0:
        inner_first, inner_stop = even(inner_first, inner_stop, STEP, split, n_splits)
        edges_first, edges_stop = even(0, edges_stop, 1, split, n_splits)
    if TILE.specialize:
        # One loop in which every tile is masked, since the compiler specialises no other.
        for k_first in tl.range(sweep.bounds[0].lo, sweep.bounds[0].hi, BLOCK_N, warp_specialize=True):
            place = tile_of_keys(work, k_first)
            state = attend(state, q, k_view, v_view, place, rule, extras, KIND, TILE, True)
    else:
        for i in tl.range(inner_first, inner_stop, STEP, disable_licm=TILE.disable_licm):
            place = tile_of_keys(work, inner_tile(sweep, i, BLOCK_N))
            state = attend(state, q, k_view, v_view, place, rule, extras, KIND, TILE, False)
        for i in tl.range(edges_first, edges_stop, num_stages=TILE.edge_stages, disable_licm=TILE.disable_licm):
            place = tile_of_keys(work, edge_tile(sweep, i, BLOCK_N))
            state = attend(state, q, k_view, v_view, place, rule, extras, KIND, TILE, True)

    row_max, row_sum, shrink = state[1] if len(extras.mods) > 0 else state[1] * LN2, state[2], 1.0
    if sinks_ptr is not None:
        row_max, row_sum, shrink = softmax_sink(row_max, row_sum, sinks_ptr, work.head)
    factor, lse, rest = softmax_finish(row_max, row_sum)
    factor *= shrink
    if len(extras.dropout) > 0:
        factor *= extras.dropout.factor
    if KIND.precise:
        # Weights are rounded before they meet V. Dividing by the sum of the rounded ones removes the part of that error that
        # is common to all values, which a large mean of V would amplify.
        factor *= tl.where(state[4] == 0.0, 1.0, state[3] / tl.where(state[4] == 0.0, 1.0, state[4]))
    store_tile(query_view(out_ptr, out_strides, work), work.first, scaled(state[0], factor[:, None]), DV, BLOCK_M, TILE.wide)
    views = lse_views(lse_ptr, extras, work, Nq, lse_skip)
    store_rows(views[0], work.first, lse, BLOCK_M)
    if len(views) > 1:
        store_rows(views[1], work.first, rest, BLOCK_M)


def forward_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                   sinks: torch.Tensor | None, tiles: tuple[Any, ...], call: Call, *, config: TileConfig,
                   precise: bool = False, splits: tuple[Any, ...] = (), n_splits: int = 1) -> Launch:
    """The launch that fills ``out`` and ``lse``; shapes as in ``forward_kernel``, lse [2, B, H, Nq] to come with its rest
    (``with_lse``). ``tiles`` is what ``list_launch`` returned, ``splits`` a Splits or ()."""
    heads = q.shape[1]
    lse, call = with_lse(call, lse)
    args = (
        q, k, v, out, lse, sinks, call.strides(q, k, v, out),
        heads, call.n_queries, call.n_keys, call.offset, call.left, call.right, call.scale, call.extras, tiles, splits,
        n_splits, forward_kind(heads // k.shape[1], q.shape[3], v.shape[3], accumulator(q.dtype), call.precision, precise),
    )
    return Launch(forward_kernel, programs(call.n_queries, config.block_m, call.batch * heads) * n_splits, args,
                  fit_offsets(config, call, q, k, v, out))
