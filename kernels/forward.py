"""Forward: out = softmax(mod(scale * Q K^T) within the window) V, and the log-sum-exp of every row.

Source: Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2".
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fused_attn.kernels.launch import Launcher, accumulator, fit_offsets, padded, programs, run
from fused_attn.kernels.softmax import LOG2E, softmax_finish, softmax_step
from fused_attn.kernels.tiles import head_view, load_tile, program_tile, row_view, store_rows, store_tile
from fused_attn.kernels.window import edge_count, edge_start, keep_mask, sweep_range
from fused_attn.spec import TileConfig


@triton.jit
def attend(state, q, k_view, v_view, start, q_pos, head, batch, left, right, scale, mod_args,
           SCORE_MOD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
           TILE: tl.constexpr, MASKED: tl.constexpr):
    """Attends to the keys start ... start + BLOCK_N - 1: one step of the sweep. ``MASKED`` where some may not count."""
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = padded(D)
    BLOCK_DV: tl.constexpr = padded(DV)
    acc, row_max, row_sum = state
    k_idx = start + tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D]
    k = load_tile(k_view, start, D, BLOCK_N, BLOCK_D, MASKED, TILE.wide)
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)
    if SCORE_MOD is None:
        to_log2 = scale * LOG2E
    else:
        to_log2 = tl.full([], LOG2E, acc.dtype)  # typed, or fp64 would meet an fp32 constant
        scores = SCORE_MOD(scores * scale, q_pos[:, None], k_idx[None, :], head, batch, mod_args)
    if MASKED:
        scores = tl.where(keep_mask(q_pos[:, None], k_idx[None, :], k_view[1], left, right), scores, float("-inf"))
    p, shrink, row_max, row_sum = softmax_step(scores, row_max, row_sum, to_log2, MASKED)
    # [BLOCK_N, BLOCK_DV]
    v = load_tile(v_view, start, DV, BLOCK_N, BLOCK_DV, MASKED, TILE.wide)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, strides,
                   H, Nq, Nk, offset, left, right, scale: tl.float64,
                   mod_args: tl.constexpr, SCORE_MOD: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                   DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr):
    """One program: BLOCK_M queries of one head against all keys in their window.

    q [B, H, Nq, D], k [B, H / GROUP, Nk, D], v [B, H / GROUP, Nk, Dv], out [B, H, Nq, Dv], lse [B, H, Nq];
    ``strides`` are those of q, k, v and out. ``left`` and ``right`` are window bounds or None, ``offset`` the position of
    query 0 among the keys, ``ACC`` the type of the softmax state, ``TILE`` a TileConfig.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = padded(D)
    BLOCK_DV: tl.constexpr = padded(DV)
    q_strides, k_strides, v_strides, out_strides = strides
    first, bh = program_tile(Nq, BLOCK_M, right is not None)
    batch = bh // H
    head = bh % H
    scale = scale.to(ACC)
    q_pos = first + offset + tl.arange(0, BLOCK_M)
    # [BLOCK_M, BLOCK_D]
    q = load_tile(head_view(q_ptr, q_strides, batch, head, Nq), first, D, BLOCK_M, BLOCK_D, True, TILE.wide)
    k_view = head_view(k_ptr, k_strides, batch, head // GROUP, Nk)
    v_view = head_view(v_ptr, v_strides, batch, head // GROUP, Nk)
    state = (
        tl.zeros([BLOCK_M, BLOCK_DV], ACC),
        tl.full([BLOCK_M], float("-inf"), ACC),
        tl.zeros([BLOCK_M], ACC),
    )

    bounds = sweep_range(first + offset, Nk, left, right, BLOCK_M, BLOCK_N)
    for start in tl.range(bounds[1], bounds[2], BLOCK_N, disable_licm=TILE.disable_licm):
        state = attend(state, q, k_view, v_view, start, q_pos, head, batch, left, right, scale, mod_args,
                       SCORE_MOD, D, DV, PRECISION, TILE, False)
    for i in tl.range(0, edge_count(bounds, BLOCK_N), num_stages=TILE.edge_stages, disable_licm=TILE.disable_licm):
        start = edge_start(bounds, i, BLOCK_N)
        state = attend(state, q, k_view, v_view, start, q_pos, head, batch, left, right, scale, mod_args,
                       SCORE_MOD, D, DV, PRECISION, TILE, True)

    out, lse = softmax_finish(state[0], state[1], state[2])
    out_view = head_view(out_ptr, out_strides, batch, head, Nq)
    store_tile(out_view, first, out, DV, BLOCK_M, BLOCK_DV, TILE.wide)
    store_rows(row_view(lse_ptr, bh, Nq), first, lse, BLOCK_M)


def launch_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *,
                   scale: float, left: int | None, right: int | None, offset: int, score_mod: Any,
                   mod_args: tuple[Any, ...], precision: str, config: TileConfig, launch: Launcher = run) -> None:
    """Fills ``out`` and ``lse``; shapes as in ``forward_kernel``. ``score_mod`` is a jit function or None."""
    batch, heads, n_queries, head_dim = q.shape
    if out.numel() == 0:
        return
    args = (
        q, k, v, out, lse, (q.stride(), k.stride(), v.stride(), out.stride()),
        heads, n_queries, k.shape[2], offset, left, right, scale,
        mod_args, score_mod, heads // k.shape[1], head_dim, v.shape[3], accumulator(q.dtype), precision,
    )
    launch(forward_kernel, programs(n_queries, config.block_m, batch * heads), args, fit_offsets(config, q, k, v, out))
