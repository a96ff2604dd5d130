"""Dropout of attention weights: which ones stay is a function of (seed, batch, head, query, key), and of nothing else.

So the forward, both backward kernels (with other tiles) and the reference draw the same mask, and none stores it.
Philox 4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": 7 pass BigCrush) gives four
words for each counter: one for each of four neighbouring keys.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_attn.kernels.operand import per_key, per_query

ROUNDS = tl.constexpr(7)


class Dropout(NamedTuple):
    """Dropout as kernels take it; without any, () takes its place."""

    seed: Any  # pointer to one int64
    threshold: Any  # compile-time: a weight stays where its 32-bit word is at least this
    factor: Any  # compile-time: 1 / (1 - p), by which the weights that stay are multiplied


@triton.jit
def dropout_keep(dropout, place, TILE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which weights of a tile stay."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    QUADS: tl.constexpr = BLOCK_N // 4
    rows = per_query(place.q_first + tl.arange(0, BLOCK_M), KEYS_FIRST)
    quads = per_key(place.k_first // 4 + tl.arange(0, QUADS), KEYS_FIRST)
    rows = rows + tl.zeros_like(quads)
    quads = tl.zeros_like(rows) + quads
    a, b, c, d = tl.philox(tl.load(dropout.seed), rows, quads, tl.zeros_like(rows) + place.head,
                           tl.zeros_like(rows) + place.batch, ROUNDS)
    # Word w of quad i belongs to key 4 i + w: [..., quads, 2, 2] with w = 2 x + y.
    words = tl.join(tl.join(a, c), tl.join(b, d))
    if KEYS_FIRST:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M])
    else:
        words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    return words >= tl.full([], dropout.threshold, tl.uint32)
