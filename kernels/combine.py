"""Joins the results of splits of the keys: out = sum_s w_s out_s with w_s = exp(lse_s - lse), lse = log sum_s exp(lse_s).

Few queries over many keys, as in decoding, make too few programs to fill a GPU, so the keys are cut into splits
(``forward.Splits``), whose results are joined here. Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import Launch, accumulator, kind_of
from fused_attn.kernels.softmax import LOG2E, softmax_finish


@triton.jit
def load_splits(ptr, which, step, n_splits, other):
    """One number of each of the splits ``which``, ``step`` elements apart; ``other`` past the last split."""
    return tl.load(ptr + which.to(tl.int64) * step, mask=which < n_splits, other=other)


@triton.jit
def split_weights(lse, pivot, rests, row, which, step, n_splits):
    """exp(LSE - pivot) of the splits ``which``; the rests of their LSE begin at element ``row``."""
    exponent = (lse - pivot) * LOG2E
    if len(rests) > 0:
        exponent += load_splits(rests[0] + row, which, step, n_splits, 0.0) * LOG2E
    return tl.exp2(exponent)


@triton.jit(do_not_specialize=["H", "Nq", "n_splits"])
def combine_kernel(splits_ptr, splits_lse_ptr, out_ptr, lse_ptr, sinks_ptr, rests, steps, strides, H, Nq, n_splits,
                   KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: one row [DV] of out [B, H, Nq, Dv], and its LSE. It reads BLOCK_M splits at a time, of at most BLOCK_N.

    splits [S, B, H, Nq, Dv] and splits_lse [S, B, H, rows]; ``strides`` are those of out, sinks [H] or None. ``steps`` are the
    distances in elements (between splits in splits, between splits in splits_lse, between heads in splits_lse, between heads in
    lse). A split without a key has LSE -inf, and its row of splits is never read. ``rests`` are pointers (to the rest of
    splits_lse, to that of lse), or ().
    """
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    step, lse_step, row_step, out_row_step = steps
    pid = tl.program_id(0)
    row = pid % Nq
    bh = pid // Nq
    head = bh % H
    # [BLOCK_N]
    every = tl.arange(0, TILE.block_n)
    lse_row = tl.cast(bh, tl.int64) * row_step + row
    every_lse = load_splits(splits_lse_ptr + lse_row, every, lse_step, n_splits, float("-inf"))
    largest = tl.max(every_lse, 0)
    sink = tl.full([], float("-inf"), ACC)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(ACC)
        largest = tl.maximum(largest, sink)
    pivot = tl.where(largest == float("-inf"), 0.0, largest)  # no key at all: -inf - -inf would be NaN
    total = tl.sum(split_weights(every_lse, pivot, rests, lse_row, every, lse_step, n_splits), 0)
    total += tl.exp2((sink - pivot) * LOG2E)
    factor, lse, rest = softmax_finish(pivot, total)

    COLUMNS: tl.constexpr = triton.next_power_of_2(DV)
    columns = tl.arange(0, COLUMNS)
    out = tl.zeros([COLUMNS], ACC)
    split_ptrs = splits_ptr + (tl.cast(bh, tl.int64) * Nq + row) * DV
    for first in tl.range(0, n_splits, TILE.block_m):
        # [BLOCK_M], [BLOCK_M, COLUMNS]
        some = first + tl.arange(0, TILE.block_m)
        some_lse = load_splits(splits_lse_ptr + lse_row, some, lse_step, n_splits, float("-inf"))
        there = (some_lse != float("-inf"))[:, None] & (columns < DV)[None, :]
        split = tl.load(split_ptrs + (some.to(tl.int64) * step)[:, None] + columns[None, :], mask=there, other=0.0)
        weight = split_weights(some_lse, pivot, rests, lse_row, some, lse_step, n_splits) * factor
        out += tl.sum(split * weight[:, None], 0)

    batch = bh // H
    out_ptrs = out_ptr + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    out_ptrs += tl.cast(row, tl.int64) * strides[2] + columns.to(tl.int64) * strides[3]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=columns < DV)
    own = tl.cast(bh, tl.int64) * out_row_step + row
    tl.store(lse_ptr + own, lse)
    if len(rests) > 0:
        tl.store(rests[1] + own, rest)


def combine_launch(splits: torch.Tensor, splits_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                   sinks: torch.Tensor | None, *, config: TileConfig) -> Launch:
    """The launch that fills ``out`` [B, H, Nq, Dv] and ``lse`` [B, H, Nq].

    It reads ``splits`` [S, B, H, Nq, Dv] and their LSE [S, B, H, Nq]. Both LSE may come with their rests, [2, ...]
    (``launch.with_lse``).
    """
    batch, heads, n_queries, dim_v = out.shape
    rests: tuple[torch.Tensor, ...] = ()
    if lse.dim() == 4:
        (splits_lse, splits_rest), (lse, rest) = splits_lse, lse
        rests = splits_rest, rest
    steps = splits.stride(0), splits_lse.stride(0), splits_lse.stride(2), lse.stride(1)
    args = (splits, splits_lse, out, lse, sinks, rests, steps, out.stride(), heads, n_queries, splits.shape[0],
            kind_of(1, 0, dim_v, accumulator(out.dtype)))
    return Launch(combine_kernel, batch * heads * n_queries, args, config)
