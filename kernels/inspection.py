"""Inspection of attention: its weights, or statistics of them that never hold them all.

Row statistics take one sweep over the keys, column sums one over the queries; neither holds more than a tile.
"""

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.backward import weights
from fused_attn.kernels.dropout import dropout_keep
from fused_attn.kernels.launch import Call, Launch, accumulator, fit_offsets, kind_of, programs, with_lse
from fused_attn.kernels.mask import keep_tile
from fused_attn.kernels.operand import per_key, per_query
from fused_attn.kernels.product import products
from fused_attn.kernels.score import NO_SLOPE, apply_mods
from fused_attn.kernels.softmax import LN2, LOG2E, load_lse, lse_views, softmax_finish, softmax_sink
from fused_attn.kernels.sweep import bounds_of
from fused_attn.kernels.tiles import (
    Place,
    key_view,
    load_tile,
    query_rows,
    query_view,
    store_rows,
    tile_of_keys,
    work_of,
)
from fused_attn.kernels.window import Rule, side


@triton.jit
def distances(place, ACC: tl.constexpr, TILE: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: how far a query's position and a key are apart."""
    q_pos = per_query(place.q_first + place.offset + tl.arange(0, TILE.block_m), False)
    k_idx = per_key(place.k_first + tl.arange(0, TILE.block_n), False)
    return tl.abs(q_pos - k_idx).to(ACC)


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def row_stats_kernel(q_ptr, k_ptr, lse_ptr, entropy_ptr, maximum_ptr, distance_ptr, sinks_ptr, strides,
                     H, Nq, Nk, offset, left, right, scale: tl.float64, extras,
                     KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: LSE, entropy -sum(p ln p) over the keys, largest weight, and mean attended distance sum(p |q - k|), each
    [B, H, Nq], of BLOCK_M queries; ``distance_ptr`` may be None.

    Beside the maximum m and the sum l of exp(s - m) it carries t, the sum of exp(s - m) (s - m), for the entropy ln l - t / l,
    and the sum of exp(s - m) |q - k|. Source of the distance: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words".
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    D: tl.constexpr = KIND.dim
    ACC: tl.constexpr = KIND.acc
    q_strides, k_strides = strides
    work = work_of(tl.program_id(0), Nq, H, Nq, Nk, offset, extras.sequences, BLOCK_M, right is not None)
    first = work.first
    rule = Rule(side(left), side(right), scale.to(ACC))
    q = load_tile(query_view(q_ptr, q_strides, work), first, D, BLOCK_M, True, TILE.wide)
    k_view = key_view(k_ptr, k_strides, work, KIND.group)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
    row_dot = tl.zeros([BLOCK_M], ACC)
    row_distance = tl.zeros([BLOCK_M], ACC)
    bounds = bounds_of(first + work.offset, work.n_keys, rule.left, rule.right, BLOCK_M, BLOCK_N)
    for start in tl.range(bounds.lo, bounds.hi, BLOCK_N, num_stages=1):
        place = tile_of_keys(work, start)
        k = load_tile(k_view, start, D, BLOCK_N, True, TILE.wide)
        # [BLOCK_M, BLOCK_N]
        raw = products(q, k, work.head, extras.additive, KIND)
        scores, _ = apply_mods(raw * rule.scale, place, extras.mods, NO_SLOPE, 0, TILE, False, True, True)
        keep = keep_tile(place, rule, extras.keeps, TILE, False)
        scores = tl.where(keep, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        shift = tl.where(row_max == float("-inf"), 0.0, row_max - pivot)
        below = scores - pivot[:, None]
        p = tl.exp2(below * LOG2E)
        shrink = tl.exp2((row_max - pivot) * LOG2E)
        row_dot = shrink * (row_dot + shift * row_sum) + tl.sum(tl.where(p == 0.0, 0.0, p * below), 1)
        if distance_ptr is not None:
            row_distance = row_distance * shrink + tl.sum(p * distances(place, ACC, TILE), 1)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max

    empty = row_sum == 0.0
    # All sums were taken relative to row_max, the largest score of a key; relative to base they shrink by ``height``.
    base, total, height = row_max, row_sum, 1.0
    if sinks_ptr is not None:
        base, total, height = softmax_sink(row_max, row_sum, sinks_ptr, work.head)
    factor, lse, rest = softmax_finish(base, total)
    largest = tl.where(empty, 0.0, height * factor)
    above = (base - row_max) - tl.log2(factor) * LN2  # LSE - row_max
    entropy = tl.where(largest == 0.0, 0.0, largest * (row_sum * above - row_dot))  # else inf, or NaN in an empty row
    sequences = extras.sequences
    views = lse_views(lse_ptr, extras, work, Nq)
    store_rows(views[0], first, lse, BLOCK_M)
    if len(views) > 1:
        store_rows(views[1], first, rest, BLOCK_M)
    store_rows(query_rows(entropy_ptr, sequences, work, Nq), first, entropy, BLOCK_M)
    store_rows(query_rows(maximum_ptr, sequences, work, Nq), first, largest, BLOCK_M)
    if distance_ptr is not None:
        store_rows(query_rows(distance_ptr, sequences, work, Nq), first, largest * row_distance, BLOCK_M)


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def column_sums_kernel(q_ptr, k_ptr, lse_ptr, received_ptr, strides,
                       H, Nq, Nk, offset, left, right, scale: tl.float64, extras,
                       KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: the sum of weights that BLOCK_N keys receive from all queries of one head; received [B, H, Nk]."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    D: tl.constexpr = KIND.dim
    ACC: tl.constexpr = KIND.acc
    q_strides, k_strides = strides
    work = work_of(tl.program_id(0), Nk, H, Nq, Nk, offset, extras.sequences, BLOCK_N, False)
    first = work.first
    rule = Rule(side(left), side(right), scale.to(ACC))
    k = load_tile(key_view(k_ptr, k_strides, work, KIND.group), first, D, BLOCK_N, True, TILE.wide)
    q_view = query_view(q_ptr, q_strides, work)
    views = lse_views(lse_ptr, extras, work, Nq)
    received = tl.zeros([BLOCK_N], ACC)
    bounds = bounds_of(first - work.offset, work.n_queries, rule.right, rule.left, BLOCK_N, BLOCK_M)
    for start in tl.range(bounds.lo, bounds.hi, BLOCK_M, num_stages=1):
        place = Place(work.batch, work.head, start, first, work.offset, work.n_queries, work.n_keys)
        q = load_tile(q_view, start, D, BLOCK_M, True, TILE.wide)
        lse = load_lse(views, start, extras, BLOCK_M, True)
        # [BLOCK_N, BLOCK_M]
        raw = products(k, q, work.head, extras.additive, KIND)
        p, _ = weights(raw, lse, place, rule, extras, NO_SLOPE, 0, TILE, True, True, True)
        received += tl.sum(p, 1)
    store_rows((received_ptr + tl.cast(work.bh, tl.int64) * Nk, Nk), first, received, BLOCK_N)


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def weights_kernel(q_ptr, k_ptr, lse_ptr, p_ptr, strides,
                   H, Nq, Nk, offset, left, right, scale: tl.float64, extras,
                   KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: the weights of BLOCK_M queries of one head to all keys; p [B, H, Nq, Nk], contiguous."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    D: tl.constexpr = KIND.dim
    ACC: tl.constexpr = KIND.acc
    q_strides, k_strides = strides
    work = work_of(tl.program_id(0), Nq, H, Nq, Nk, offset, extras.sequences, BLOCK_M, False)
    first = work.first
    rule = Rule(side(left), side(right), scale.to(ACC))
    q = load_tile(query_view(q_ptr, q_strides, work), first, D, BLOCK_M, True, TILE.wide)
    k_view = key_view(k_ptr, k_strides, work, KIND.group)
    lse = load_lse(lse_views(lse_ptr, extras, work, Nq), first, extras, BLOCK_M, True)
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    p_ptr += (tl.cast(work.bh, tl.int64) * Nq + first) * Nk
    for start in tl.range(0, Nk, BLOCK_N, num_stages=1):
        place = tile_of_keys(work, start)
        k = load_tile(k_view, start, D, BLOCK_N, True, TILE.wide)
        raw = products(q, k, work.head, extras.additive, KIND)
        p, _ = weights(raw, lse, place, rule, extras, NO_SLOPE, 0, TILE, False, True, True)
        if len(extras.dropout) > 0:
            p = tl.where(dropout_keep(extras.dropout, place, TILE, False), p * extras.dropout.factor, 0.0)
        ptrs = p_ptr + rows.to(tl.int64) * Nk + (start + cols)
        tl.store(ptrs, p.to(p_ptr.dtype.element_ty), mask=(first + rows < Nq) & (start + cols < Nk))


def _arguments(q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[object, ...]:
    heads = q.shape[1]
    return (call.strides(q, k), heads, call.n_queries, call.n_keys, call.offset, call.left, call.right, call.scale,
            call.extras, kind_of(heads // k.shape[1], q.shape[3], 0, accumulator(q.dtype), call.precision))


def row_stats_launch(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, entropy: torch.Tensor, maximum: torch.Tensor,
                     distance: torch.Tensor | None, sinks: torch.Tensor | None, call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``lse``, ``entropy``, ``maximum`` and, unless it is None, ``distance`` [B, H, Nq]; ``lse`` is
    [2, B, H, Nq] to come with its rest."""
    lse, call = with_lse(call, lse)
    args = (q, k, lse, entropy, maximum, distance, sinks, *_arguments(q, k, call))
    return Launch(row_stats_kernel, programs(call.n_queries, config.block_m, call.batch * q.shape[1]), args,
                  fit_offsets(config, call, q, k))


def column_sums_launch(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, received: torch.Tensor, call: Call, *,
                       config: TileConfig) -> Launch:
    """The launch that fills ``received`` [B, H, Nk]."""
    lse, call = with_lse(call, lse)
    args = (q, k, lse, received, *_arguments(q, k, call))
    return Launch(column_sums_kernel, programs(call.n_keys, config.block_n, call.batch * q.shape[1]), args,
                  fit_offsets(config, call, q, k))


def weights_launch(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, p: torch.Tensor, call: Call, *,
                   config: TileConfig) -> Launch:
    """The launch that fills ``p`` [B, H, Nq, Nk]."""
    lse, call = with_lse(call, lse)
    args = (q, k, lse, p, *_arguments(q, k, call))
    return Launch(weights_kernel, programs(call.n_queries, config.block_m, call.batch * q.shape[1]), args,
                  fit_offsets(config, call, q, k))
