"""Rotary positions: pairs of columns turned by an angle that grows with the position.

    (a, b) -> (a cos t - b sin t, b cos t + a sin t)

for the pairs (i, i + R / 2), or (2i, 2i + 1) interleaved, of the first R columns; the others pass through. A rotation's
gradient is the rotation back. Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import Launch, accumulator

HEADS = tl.constexpr(4)  # heads of one program, which share its cosines and sines


@dataclass(frozen=True)
class Turn:
    """How ``pairs`` pairs of the ``dim`` columns are turned, in arithmetic of type ``acc``; ``back`` turns the other way."""

    dim: int
    pairs: int
    acc: Any
    interleaved: bool
    back: bool


@triton.jit
def rows_and_columns(ptr, rows, cols, row_stride, col_stride, WIDE: tl.constexpr):
    """Pointers [ROWS, COLS] to ``rows`` and ``cols`` of one head."""
    if WIDE:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
    return ptr + (rows[:, None] * row_stride + cols[None, :] * col_stride)


@triton.jit(do_not_specialize=["H", "N"])
def rotary_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, strides, H, N, TURN: tl.constexpr, TILE: tl.constexpr):
    """One program: BLOCK_M rows of HEADS heads. x and out [B, H, N, D], cos and sin [B, N, pairs].

    ``strides`` are those of all four, ``TURN`` is a Turn.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    D: tl.constexpr = TURN.dim
    PAIRS: tl.constexpr = TURN.pairs
    ACC: tl.constexpr = TURN.acc
    COLS: tl.constexpr = triton.next_power_of_2(PAIRS)
    x_strides, cos_strides, sin_strides, out_strides = strides
    n_tiles = tl.cdiv(N, BLOCK_M)
    n_groups = tl.cdiv(H, HEADS)
    pid = tl.program_id(0)
    first = pid % n_tiles * BLOCK_M
    first_head = pid // n_tiles % n_groups * HEADS
    batch = tl.cast(pid // n_tiles // n_groups, tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    pairs = tl.arange(0, COLS)
    # [BLOCK_M, COLS]
    exists = (rows < N)[:, None] & (pairs < PAIRS)[None, :]
    cos = tl.load(rows_and_columns(cos_ptr + batch * cos_strides[0], rows, pairs, cos_strides[1], cos_strides[2], TILE.wide),
                  mask=exists, other=0.0).to(ACC)
    sin = tl.load(rows_and_columns(sin_ptr + batch * sin_strides[0], rows, pairs, sin_strides[1], sin_strides[2], TILE.wide),
                  mask=exists, other=0.0).to(ACC)
    if TURN.back:
        sin = -sin
    a_cols = 2 * pairs if TURN.interleaved else pairs
    b_cols = a_cols + 1 if TURN.interleaved else a_cols + PAIRS
    for head in range(first_head, tl.minimum(first_head + HEADS, H)):
        x_head = x_ptr + batch * x_strides[0] + tl.cast(head, tl.int64) * x_strides[1]
        out_head = out_ptr + batch * out_strides[0] + tl.cast(head, tl.int64) * out_strides[1]
        a = tl.load(rows_and_columns(x_head, rows, a_cols, x_strides[2], x_strides[3], TILE.wide), mask=exists, other=0.0)
        b = tl.load(rows_and_columns(x_head, rows, b_cols, x_strides[2], x_strides[3], TILE.wide), mask=exists, other=0.0)
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        turned_a = (a.to(ACC) * cos - b.to(ACC) * sin).to(dtype)
        turned_b = (b.to(ACC) * cos + a.to(ACC) * sin).to(dtype)
        tl.store(rows_and_columns(out_head, rows, a_cols, out_strides[2], out_strides[3], TILE.wide), turned_a, mask=exists)
        tl.store(rows_and_columns(out_head, rows, b_cols, out_strides[2], out_strides[3], TILE.wide), turned_b, mask=exists)
        if 2 * PAIRS < D:
            rest = 2 * PAIRS + tl.arange(0, triton.next_power_of_2(D - 2 * PAIRS))
            passes = (rows < N)[:, None] & (rest < D)[None, :]
            x = tl.load(rows_and_columns(x_head, rows, rest, x_strides[2], x_strides[3], TILE.wide), mask=passes, other=0.0)
            tl.store(rows_and_columns(out_head, rows, rest, out_strides[2], out_strides[3], TILE.wide), x, mask=passes)


def rotary_launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, interleaved: bool, back: bool, *,
                  config: TileConfig) -> Launch:
    """The launch that fills ``out``; shapes as in ``rotary_kernel``, with cos and sin possibly expanded along the batch."""
    batch, heads, length, head_dim = x.shape
    tensors = (x, cos, sin, out)
    # Offsets inside a head take 32 bits where its elements lie close enough together.
    if any((t.shape[-2] - 1) * t.stride(-2) + (t.shape[-1] - 1) * t.stride(-1) >= 2**31 for t in tensors):
        config = dataclasses.replace(config, wide=True)
    args = (*tensors, tuple(t.stride() for t in tensors), heads, length,
            Turn(head_dim, cos.shape[-1], accumulator(x.dtype), interleaved, back))
    return Launch(rotary_kernel, -(-length // config.block_m) * -(-heads // HEADS.value) * batch, args, config)
