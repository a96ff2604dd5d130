"""Backward: delta, then dQ by queries and dK, dV by keys: seven matrix products, deterministic to the bit.

    P = exp(S - LSE), dV = P^T dO, dP = dO V^T, dS = P * (dP - delta) * mod'(S), dQ = scale dS K, dK = scale dS^T Q

with delta = rowsum(dO * O) - dLSE, since LSE's own gradient adds P * dLSE to dS. Source: Dao 2023, "FlashAttention-2".
No sum is taken by atomics: a program owns its rows of dQ, or of dK and dV for every query head of its group.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fused_attn.kernels.launch import Launcher, accumulator, fit_offsets, padded, programs, run
from fused_attn.kernels.softmax import LOG2E, lse_to_log2
from fused_attn.kernels.tiles import head_view, load_rows, load_tile, program_tile, row_view, store_rows, store_tile
from fused_attn.kernels.window import edge_count, edge_start, keep_mask, sweep_range
from fused_attn.spec import TileConfig


@triton.jit(do_not_specialize=["H", "Nq"])
def delta_kernel(out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, out_strides, dout_strides, H, Nq,
                 DV: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr):
    """delta [B, H, Nq] = rowsum(dO * O) - dLSE, for BLOCK_M rows of one head; ``dlse_ptr`` may be None."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_DV: tl.constexpr = padded(DV)
    first, bh = program_tile(Nq, BLOCK_M, False)
    batch = bh // H
    head = bh % H
    # [BLOCK_M, BLOCK_DV]
    out = load_tile(head_view(out_ptr, out_strides, batch, head, Nq), first, DV, BLOCK_M, BLOCK_DV, True, TILE.wide)
    dout = load_tile(head_view(dout_ptr, dout_strides, batch, head, Nq), first, DV, BLOCK_M, BLOCK_DV, True, TILE.wide)
    delta = tl.sum(out.to(ACC) * dout.to(ACC), 1)
    if dlse_ptr is not None:
        # The LSE of a row with no key is constant, whatever gradient comes (logaddexp(-inf, -inf) sends NaN).
        empty = load_rows(row_view(lse_ptr, bh, Nq), first, 0.0, BLOCK_M, True) == float("-inf")
        delta -= tl.where(empty, 0.0, load_rows(row_view(dlse_ptr, bh, Nq), first, 0.0, BLOCK_M, True))
    store_rows(row_view(delta_ptr, bh, Nq), first, delta, BLOCK_M)


@triton.jit
def weights(products, lse2, q_pos, k_idx, n_keys, head, batch, left, right, scale, mod_args,
            SCORE_MOD: tl.constexpr, SCORE_SLOPE: tl.constexpr, MASKED: tl.constexpr):
    """P of a tile from its raw products q.k, and P times the slope of the score mod, in either orientation.

    ``lse2`` is in base 2; it, ``q_pos`` and ``k_idx`` broadcast against ``products``.
    """
    if SCORE_MOD is None:
        p = tl.exp2(products * (scale * LOG2E) - lse2)
    else:
        raw = products * scale
        score = SCORE_MOD(raw, q_pos, k_idx, head, batch, mod_args)
        p = tl.exp2(score * LOG2E - lse2)
    if MASKED:
        # Where a key does not count, exp2 may have overflowed: select, never multiply by 0.
        p = tl.where(keep_mask(q_pos, k_idx, n_keys, left, right), p, 0.0)
    if SCORE_SLOPE is None:
        return p, p
    else:
        return p, p * SCORE_SLOPE(raw, score, q_pos, k_idx, head, batch, mod_args)


@triton.jit
def dq_step(dq, q, dout, lse2, delta, k_view, v_view, start, q_pos, head, batch, left, right, scale, mod_args,
            SCORE_MOD: tl.constexpr, SCORE_SLOPE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
            PRECISION: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the keys start ... start + BLOCK_N - 1 give to dQ."""
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = padded(D)
    BLOCK_DV: tl.constexpr = padded(DV)
    k_idx = start + tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    k = load_tile(k_view, start, D, BLOCK_N, BLOCK_D, MASKED, TILE.wide)
    v = load_tile(v_view, start, DV, BLOCK_N, BLOCK_DV, MASKED, TILE.wide)
    # [BLOCK_M, BLOCK_N]
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype)
    _, sloped = weights(products, lse2[:, None], q_pos[:, None], k_idx[None, :], k_view[1], head, batch, left, right,
                       scale, mod_args, SCORE_MOD, SCORE_SLOPE, MASKED)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)
    ds = sloped * (dp - delta[:, None])  # without the factor scale, which dQ receives once at the end
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def dq_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, strides,
              H, Nq, Nk, offset, left, right, scale: tl.float64,
              mod_args: tl.constexpr, SCORE_MOD: tl.constexpr, SCORE_SLOPE: tl.constexpr, GROUP: tl.constexpr,
              D: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr):
    """One program: dQ of BLOCK_M queries of one head, over the keys in their window. ``strides``: of q, k, v, dout, dq."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = padded(D)
    BLOCK_DV: tl.constexpr = padded(DV)
    q_strides, k_strides, v_strides, dout_strides, dq_strides = strides
    first, bh = program_tile(Nq, BLOCK_M, right is not None)
    batch = bh // H
    head = bh % H
    scale = scale.to(ACC)
    q_pos = first + offset + tl.arange(0, BLOCK_M)
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    q = load_tile(head_view(q_ptr, q_strides, batch, head, Nq), first, D, BLOCK_M, BLOCK_D, True, TILE.wide)
    dout = load_tile(head_view(dout_ptr, dout_strides, batch, head, Nq), first, DV, BLOCK_M, BLOCK_DV, True, TILE.wide)
    lse2 = lse_to_log2(load_rows(row_view(lse_ptr, bh, Nq), first, float("-inf"), BLOCK_M, True))
    delta = load_rows(row_view(delta_ptr, bh, Nq), first, 0.0, BLOCK_M, True)
    k_view = head_view(k_ptr, k_strides, batch, head // GROUP, Nk)
    v_view = head_view(v_ptr, v_strides, batch, head // GROUP, Nk)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    bounds = sweep_range(first + offset, Nk, left, right, BLOCK_M, BLOCK_N)
    for start in tl.range(bounds[1], bounds[2], BLOCK_N, disable_licm=TILE.disable_licm):
        dq = dq_step(dq, q, dout, lse2, delta, k_view, v_view, start, q_pos, head, batch, left, right, scale, mod_args,
                     SCORE_MOD, SCORE_SLOPE, D, DV, PRECISION, TILE, False)
    for i in tl.range(0, edge_count(bounds, BLOCK_N), num_stages=TILE.edge_stages, disable_licm=TILE.disable_licm):
        start = edge_start(bounds, i, BLOCK_N)
        dq = dq_step(dq, q, dout, lse2, delta, k_view, v_view, start, q_pos, head, batch, left, right, scale, mod_args,
                     SCORE_MOD, SCORE_SLOPE, D, DV, PRECISION, TILE, True)

    dq_view = head_view(dq_ptr, dq_strides, batch, head, Nq)
    store_tile(dq_view, first, dq * scale, D, BLOCK_M, BLOCK_D, TILE.wide)


@triton.jit
def dkv_step(dk, dv, k, v, q_view, dout_view, lse_view, delta_view, start, offset, k_idx, n_keys, head, batch,
             left, right, scale, mod_args,
             SCORE_MOD: tl.constexpr, SCORE_SLOPE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, NEED_DK: tl.constexpr,
             NEED_DV: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the queries start ... start + BLOCK_M - 1 of one head give to dK and dV.

    Tiles are transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands straight from registers.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_D: tl.constexpr = padded(D)
    BLOCK_DV: tl.constexpr = padded(DV)
    q_pos = start + offset + tl.arange(0, BLOCK_M)
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    q = load_tile(q_view, start, D, BLOCK_M, BLOCK_D, MASKED, TILE.wide)
    # Queries past the end have LSE -inf, so their weights are 0, like those of a row with no key.
    lse2 = lse_to_log2(load_rows(lse_view, start, float("-inf"), BLOCK_M, MASKED))
    dout = load_tile(dout_view, start, DV, BLOCK_M, BLOCK_DV, MASKED, TILE.wide)
    products = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)
    p, sloped = weights(products, lse2[None, :], q_pos[None, :], k_idx[:, None], n_keys, head, batch, left, right,
                       scale, mod_args, SCORE_MOD, SCORE_SLOPE, MASKED)
    if NEED_DV:
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=ACC)
    if NEED_DK:
        delta = load_rows(delta_view, start, 0.0, BLOCK_M, MASKED)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)
        ds = sloped * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def folded(n_tiles, i, kv_head, GROUP: tl.constexpr):
    """(query head, tile of it) of step ``i`` of a sweep over ``n_tiles`` tiles of each of the group's query heads.

    One loop over the whole group: an outer loop over its heads would cost hundreds of bytes of spills.
    """
    if GROUP == 1:
        return kv_head, i
    else:
        n_tiles = tl.maximum(n_tiles, 1)  # a deep pipeline divides before it knows whether the loop runs at all
        return kv_head * GROUP + i // n_tiles, i % n_tiles


@triton.jit(do_not_specialize=["Hkv", "Nq", "Nk", "offset", "left", "right"])
def dkv_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, strides,
               Hkv, Nq, Nk, offset, left, right, scale: tl.float64,
               mod_args: tl.constexpr, SCORE_MOD: tl.constexpr, SCORE_SLOPE: tl.constexpr, GROUP: tl.constexpr,
               D: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
               NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, TILE: tl.constexpr):
    """One program: dK and dV of BLOCK_N keys of one key head, over the queries of its whole group in their window.

    ``strides`` are those of q, k, v, dout, dk and dv; without ``NEED_DK`` or ``NEED_DV`` that output is not touched.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = padded(D)
    BLOCK_DV: tl.constexpr = padded(DV)
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides = strides
    first, bh = program_tile(Nk, BLOCK_N, False)
    batch = bh // Hkv
    kv_head = bh % Hkv
    scale = scale.to(ACC)
    k_idx = first + tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    k = load_tile(head_view(k_ptr, k_strides, batch, kv_head, Nk), first, D, BLOCK_N, BLOCK_D, True, TILE.wide)
    v = load_tile(head_view(v_ptr, v_strides, batch, kv_head, Nk), first, DV, BLOCK_N, BLOCK_DV, True, TILE.wide)
    # A sum that nobody asked for is a plain 0, which takes no registers.
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC) if NEED_DK else 0
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC) if NEED_DV else 0

    # Key k sees the queries whose position lies in [k - right, k + left]: the same window with its sides swapped.
    # Keys past the end make rows of their own, which are never stored, so inner tiles need no mask for them.
    bounds = sweep_range(first - offset, Nq, right, left, BLOCK_N, BLOCK_M)
    n_inner = (bounds[2] - bounds[1]) // BLOCK_M
    for i in tl.range(0, GROUP * n_inner, disable_licm=TILE.disable_licm):
        head, tile = folded(n_inner, i, kv_head, GROUP)
        rows = batch * (Hkv * GROUP) + head
        dk, dv = dkv_step(dk, dv, k, v, head_view(q_ptr, q_strides, batch, head, Nq),
                          head_view(dout_ptr, dout_strides, batch, head, Nq),
                          row_view(lse_ptr, rows, Nq), row_view(delta_ptr, rows, Nq),
                          bounds[1] + tile * BLOCK_M, offset, k_idx, Nk, head, batch, left, right, scale, mod_args,
                          SCORE_MOD, SCORE_SLOPE, D, DV, ACC, PRECISION, TILE, NEED_DK, NEED_DV, False)
    n_edge = edge_count(bounds, BLOCK_M)
    for i in tl.range(0, GROUP * n_edge, num_stages=TILE.edge_stages, disable_licm=TILE.disable_licm):
        head, tile = folded(n_edge, i, kv_head, GROUP)
        rows = batch * (Hkv * GROUP) + head
        dk, dv = dkv_step(dk, dv, k, v, head_view(q_ptr, q_strides, batch, head, Nq),
                          head_view(dout_ptr, dout_strides, batch, head, Nq),
                          row_view(lse_ptr, rows, Nq), row_view(delta_ptr, rows, Nq),
                          edge_start(bounds, tile, BLOCK_M), offset, k_idx, Nk, head, batch, left, right, scale,
                          mod_args, SCORE_MOD, SCORE_SLOPE, D, DV, ACC, PRECISION, TILE, NEED_DK, NEED_DV, True)

    if NEED_DK:
        dk_view = head_view(dk_ptr, dk_strides, batch, kv_head, Nk)
        store_tile(dk_view, first, dk * scale, D, BLOCK_N, BLOCK_D, TILE.wide)
    if NEED_DV:
        dv_view = head_view(dv_ptr, dv_strides, batch, kv_head, Nk)
        store_tile(dv_view, first, dv, DV, BLOCK_N, BLOCK_DV, TILE.wide)


def launch_delta(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None,
                 delta: torch.Tensor, *, config: TileConfig, launch: Launcher = run) -> None:
    """Fills ``delta`` [B, H, Nq]; ``dlse`` [B, H, Nq] must be contiguous."""
    batch, heads, n_queries, head_dim_v = out.shape
    if delta.numel() == 0:
        return
    args = (out, dout, lse, dlse, delta, out.stride(), dout.stride(), heads, n_queries, head_dim_v, accumulator(out.dtype))
    launch(delta_kernel, programs(n_queries, config.block_m, batch * heads), args, fit_offsets(config, out, dout))


def launch_dq(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor,
              delta: torch.Tensor, dq: torch.Tensor, *, scale: float, left: int | None, right: int | None, offset: int,
              score_mod: Any, score_slope: Any, mod_args: tuple[Any, ...], precision: str, config: TileConfig,
              launch: Launcher = run) -> None:
    """Fills ``dq`` [B, H, Nq, D]."""
    batch, heads, n_queries, head_dim = q.shape
    if dq.numel() == 0:
        return
    args = (
        q, k, v, dout, lse, delta, dq, (q.stride(), k.stride(), v.stride(), dout.stride(), dq.stride()),
        heads, n_queries, k.shape[2], offset, left, right, scale, mod_args, score_mod, score_slope,
        heads // k.shape[1], head_dim, v.shape[3], accumulator(q.dtype), precision,
    )
    launch(dq_kernel, programs(n_queries, config.block_m, batch * heads), args, fit_offsets(config, q, k, v, dout, dq))


def launch_dkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor,
               delta: torch.Tensor, dk: torch.Tensor | None, dv: torch.Tensor | None, *, scale: float, left: int | None,
               right: int | None, offset: int, score_mod: Any, score_slope: Any, mod_args: tuple[Any, ...],
               precision: str, config: TileConfig, launch: Launcher = run) -> None:
    """Fills ``dk`` [B, Hkv, Nk, D] and ``dv`` [B, Hkv, Nk, Dv], summed over each group; None for one nobody asked for."""
    batch, kv_heads, n_keys, head_dim = k.shape
    wanted = [grad for grad in (dk, dv) if grad is not None]
    if k.numel() == 0 or not wanted:
        return
    if config.split and len(wanted) == 2:
        call = {"scale": scale, "left": left, "right": right, "offset": offset, "score_mod": score_mod,
                "score_slope": score_slope, "mod_args": mod_args, "precision": precision, "config": config, "launch": launch}
        launch_dkv(q, k, v, dout, lse, delta, dk, None, **call)
        launch_dkv(q, k, v, dout, lse, delta, None, dv, **call)
        return
    strides = tuple(t.stride() for t in (q, k, v, dout, k if dk is None else dk, v if dv is None else dv))
    args = (
        q, k, v, dout, lse, delta, dk, dv, strides,
        kv_heads, q.shape[2], n_keys, offset, left, right, scale, mod_args, score_mod, score_slope,
        q.shape[1] // kv_heads, head_dim, v.shape[3], accumulator(q.dtype), precision, dk is not None, dv is not None,
    )
    config = fit_offsets(config, q, k, v, dout, *wanted)
    launch(dkv_kernel, programs(n_keys, config.block_n, batch * kv_heads), args, config)
