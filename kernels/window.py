"""The window: key k is kept for query position q when q - left <= k <= q + right; a side without a bound is open.

A query's position is its index plus the alignment offset (Nk - Nq when the last query is to see the last key, 0 when
the first ones are aligned). Full, causal and sliding attention are all windows, and a window gives both the mask and
the range of tiles to visit, for queries over keys and, with left and right swapped, for keys over queries.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """Which pairs attend and what their scores are scaled by, as kernels carry it: a side of the window is () or (bound,), for
    Triton 3.6 loses a None on its way into a function."""

    left: Any
    right: Any
    scale: Any


@triton.jit
def side(bound):
    """A side of a ``Rule`` from a kernel's argument, which is a number or None."""
    if bound is None:
        return ()
    else:
        return (bound,)


@triton.jit
def keep_mask(q_pos, k_idx, n_keys, left, right):
    """Which (query position, key index) pairs attend; the shapes broadcast."""
    keep = k_idx < n_keys
    if len(right) > 0:
        keep = keep & (k_idx <= q_pos + right[0])
    if len(left) > 0:
        keep = keep & (k_idx >= q_pos - left[0])
    return keep


@triton.jit
def sweep_range(first, length, left, right, SPAN: tl.constexpr, STEP: tl.constexpr):
    """Tiles of STEP to visit for positions first ... first + SPAN - 1 over indices 0 ... length - 1.

    Returns (lo, inner_lo, inner_hi, hi). Tiles in [inner_lo, inner_hi) are kept whole and need no mask; those in
    [lo, inner_lo) and [inner_hi, hi) lie on an edge. lo, inner_lo and inner_hi are multiples of STEP.
    """
    last = first + SPAN - 1
    lo = 0
    inner_lo = 0
    hi = length
    inner_hi = length // STEP * STEP
    if len(right) > 0:
        hi = tl.minimum(length, tl.maximum(0, last + right[0] + 1))
        inner_hi = tl.minimum(length, tl.maximum(0, first + right[0] + 1)) // STEP * STEP
    if len(left) > 0:
        lo = tl.maximum(0, first - left[0]) // STEP * STEP
        inner_lo = tl.cdiv(tl.maximum(0, last - left[0]), STEP) * STEP
        inner_lo = tl.minimum(inner_lo, lo + tl.cdiv(tl.maximum(hi - lo, 0), STEP) * STEP)
        inner_hi = tl.maximum(inner_hi, inner_lo)
    return lo, inner_lo, inner_hi, hi


@triton.jit
def edge_count(bounds, STEP: tl.constexpr):
    """How many edge tiles the bounds of ``sweep_range`` hold."""
    lo, inner_lo, inner_hi, hi = bounds
    return (inner_lo - lo) // STEP + tl.cdiv(tl.maximum(hi - inner_hi, 0), STEP)


@triton.jit
def edge_start(bounds, i, STEP: tl.constexpr):
    """First index of the i-th edge tile: one loop covers both edges, since two would cost registers."""
    lo, inner_lo, inner_hi, _ = bounds
    n_head = (inner_lo - lo) // STEP
    return tl.where(i < n_head, lo + i * STEP, inner_hi + (i - n_head) * STEP)
