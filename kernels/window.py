"""The window: key k is kept for query position q when q - left <= k <= q + right; a side without a bound is open.

A query's position is its index plus the alignment offset (Nk - Nq when the last query is to see the last key, 0 when
the first ones are aligned). Full, causal and sliding attention are all windows, and a window gives both the mask and the
range of tiles to visit (`sweep.py`), for queries over keys and, with left and right swapped, for keys over queries.
"""

from typing import Any, NamedTuple

import triton


class Rule(NamedTuple):
    """Which pairs attend and what their scores are scaled by, as kernels carry it: a side of the window is () or (bound,),
    since Triton 3.6 loses a None on its way into a function."""

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
