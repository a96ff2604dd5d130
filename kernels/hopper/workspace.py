"""The kernels before and after the Gluon backward, in Triton: one writes LSE and delta in tiles, one reorders dQ."""

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import Call, Launch, fit_offsets, programs
from fused_attn.kernels.softmax import lse_to_log2
from fused_attn.kernels.tiles import head_view, inside, load_rows, load_tile, program_tile, row_products, tile_ptrs

ROWS = tl.constexpr(64)  # rows of dQ in a consumer's part


@triton.jit(do_not_specialize=["H", "Nq"])
def statistics_kernel(out_ptr, dout_ptr, lse_ptr, dlse_ptr, stats_ptr, strides, H, Nq, DV: tl.constexpr, TILE: tl.constexpr):
    """LSE in base 2 and delta = rowsum(dO * O) - dLSE of BLOCK_M rows; those past the end or without a key get +inf, 0.

    out, dout [B, H, Nq, Dv]; lse, dlse [B, H, Nq]; stats [2, B * H * tiles, BLOCK_M].
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    out_strides, dout_strides = strides
    pid = tl.program_id(0)
    first, bh = program_tile(pid, Nq, BLOCK_M, False)
    # [BLOCK_M, DV]
    out = load_tile(head_view(out_ptr, out_strides, bh // H, bh % H, 0, Nq), first, DV, BLOCK_M, True, TILE.wide)
    dout = load_tile(head_view(dout_ptr, dout_strides, bh // H, bh % H, 0, Nq), first, DV, BLOCK_M, True, TILE.wide)
    delta = row_products(out, dout, tl.float32)
    row = tl.cast(bh, tl.int64) * Nq
    lse = load_rows((lse_ptr + row, Nq), first, float("-inf"), BLOCK_M, True)
    if dlse_ptr is not None:
        delta -= load_rows((dlse_ptr + row, Nq), first, 0.0, BLOCK_M, True)
    stats_ptr += tl.cast(pid, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(stats_ptr, lse_to_log2(lse))
    tl.store(stats_ptr + tl.cast(tl.num_programs(0), tl.int64) * BLOCK_M, tl.where(lse == float("-inf"), 0.0, delta))


@triton.jit
def store_part(view, row, sums_ptr, scale, FIRST_COL: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr):
    """Stores what one consumer has summed: [64, COLS] of dQ."""
    # The inverse of backward.fragment_order: block of columns, warp, row, pair of columns, half, column.
    x = tl.reshape(tl.load(sums_ptr), [COLS // 8, 4, 8, 4, 2, 2])
    x = tl.reshape(tl.permute(x, [1, 4, 2, 0, 3, 5]), [ROWS, COLS]) * scale
    tl.store(tile_ptrs(view, row, FIRST_COL, ROWS, COLS, TILE.wide), x.to(view[0].dtype.element_ty),
             mask=inside(view, row, FIRST_COL, D, ROWS, COLS))


@triton.jit(do_not_specialize=["H", "Nq"])
def ordered_kernel(sums_ptr, dq_ptr, strides, H, Nq, scale: tl.float64, D: tl.constexpr, TILE: tl.constexpr):
    """dQ [B, H, Nq, D] of BLOCK_M rows, scaled and rounded, from sums [B * H * tiles, BLOCK_M * WIDTH]."""
    BLOCK_M: tl.constexpr = TILE.block_m
    WIDTH: tl.constexpr = max(64, triton.next_power_of_2(D))  # problem.tile_width
    ACROSS: tl.constexpr = BLOCK_M == ROWS  # the consumers' parts lie side by side, not one below the other
    COLS: tl.constexpr = WIDTH // 2 if ACROSS else WIDTH
    pid = tl.program_id(0)
    first, bh = program_tile(pid, Nq, BLOCK_M, False)
    view = head_view(dq_ptr, strides[0], bh // H, bh % H, 0, Nq)
    scale = scale.to(tl.float32)
    sums_ptr += tl.cast(pid, tl.int64) * (BLOCK_M * WIDTH) + tl.arange(0, ROWS * COLS)
    store_part(view, first, sums_ptr, scale, 0, D, COLS, TILE)
    if ACROSS:
        store_part(view, first, sums_ptr + ROWS * COLS, scale, COLS, D, COLS, TILE)
    else:
        store_part(view, first + ROWS, sums_ptr + ROWS * COLS, scale, 0, D, COLS, TILE)


def statistics_launch(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None, stats: torch.Tensor,
                      call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``stats``; shapes as in ``statistics_kernel``, lse and dlse contiguous."""
    args = (out, dout, lse, dlse, stats, (out.stride(), dout.stride()), out.shape[1], call.n_queries, out.shape[3])
    return Launch(statistics_kernel, programs(call.n_queries, config.block_m, call.batch * out.shape[1]), args,
                  fit_offsets(config, call, out, dout))


def ordered_launch(sums: torch.Tensor, dq: torch.Tensor, call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``dq``; shapes as in ``ordered_kernel``."""
    args = (sums, dq, (dq.stride(),), dq.shape[1], call.n_queries, call.scale, dq.shape[3])
    return Launch(ordered_kernel, programs(call.n_queries, config.block_m, call.batch * dq.shape[1]), args,
                  fit_offsets(config, call, dq))
