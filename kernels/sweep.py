"""Sweeps: the tiles that a program visits, first those that need no mask, then those that do.

A window and lengths give a range, whose inner tiles are kept whole. Masks that are tensors or functions give a list
(`tile_list.py`), where tiles are full or partial. The loops over both are the same.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_attn.kernels.tiles import Place, tile_of_keys


class Bounds(NamedTuple):
    """A range of indices: tiles in [inner_lo, inner_hi) are kept whole and need no mask; those in [lo, inner_lo) and
    [inner_hi, hi) lie on an edge. lo, inner_lo and inner_hi are multiples of the tile."""

    lo: Any
    inner_lo: Any
    inner_hi: Any
    hi: Any


class Row(NamedTuple):
    """A row of a TileList: full tiles from the front of ``entries``, partial ones from the place ``last`` backwards."""

    entries: Any
    n_full: Any
    n_partial: Any
    last: Any


class Sweep(NamedTuple):
    """``bounds`` is (Bounds,) and ``row`` is (), or ``bounds`` is () and ``row`` is (Row,)."""

    bounds: Any
    row: Any


@triton.jit
def bounds_of(first, length, left, right, SPAN: tl.constexpr, STEP: tl.constexpr):
    """The Bounds of the tiles of STEP to visit for positions first ... first + SPAN - 1 over indices 0 ... length - 1.

    ``left`` and ``right`` are sides of a Rule.
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
    return Bounds(lo, inner_lo, inner_hi, hi)


@triton.jit
def edge_count(bounds, STEP: tl.constexpr):
    """How many tiles of a range lie on its edges."""
    before = (bounds.inner_lo - bounds.lo) // STEP
    return before + tl.cdiv(tl.maximum(bounds.hi - bounds.inner_hi, 0), STEP)


@triton.jit
def edge_start(bounds, i, STEP: tl.constexpr):
    """First index of the i-th edge tile: one loop covers both edges, since two would cost registers."""
    before = (bounds.inner_lo - bounds.lo) // STEP
    return tl.where(i < before, bounds.lo + i * STEP, bounds.inner_hi + (i - before) * STEP)


@triton.jit
def listed(tiles, batch, head, H, row, n_rows, n_columns):
    """The sweep of one row of a TileList."""
    index = 0
    if tiles.by_batch:
        index = batch
    if tiles.by_head:
        index = index * H + head
    index = tl.cast(index, tl.int64) * n_rows + row
    entries = tiles.entries + index * n_columns
    return Sweep((), (Row(entries, tl.load(tiles.counts + 2 * index), tl.load(tiles.counts + 2 * index + 1), n_columns - 1),))


@triton.jit
def inner_range(sweep):
    """(first, stop) of the loop over tiles that need no mask."""
    if len(sweep.row) > 0:
        return tl.full([], 0, tl.int32), sweep.row[0].n_full
    else:
        return sweep.bounds[0].inner_lo, sweep.bounds[0].inner_hi


@triton.jit
def n_edges(sweep, STEP: tl.constexpr):
    """How many tiles need the mask."""
    if len(sweep.row) > 0:
        return sweep.row[0].n_partial
    else:
        return edge_count(sweep.bounds[0], STEP)


@triton.jit
def full_entry(sweep, i):
    """The i-th full tile of a list."""
    return tl.load(sweep.row[0].entries + i)


@triton.jit
def partial_entry(sweep, i):
    """The i-th partial tile of a list."""
    return tl.load(sweep.row[0].entries + sweep.row[0].last - i)


@triton.jit
def inner_tile(sweep, i, STEP: tl.constexpr):
    """Start of a tile that needs no mask, from the loop variable of ``inner_range``."""
    if len(sweep.row) > 0:
        return full_entry(sweep, i) * STEP
    else:
        return i


@triton.jit
def edge_tile(sweep, i, STEP: tl.constexpr):
    """Start of the i-th tile that needs the mask."""
    if len(sweep.row) > 0:
        return partial_entry(sweep, i) * STEP
    else:
        return edge_start(sweep.bounds[0], i, STEP)


@triton.jit
def sweep_keys(tiles, work, rule, H, Nq, Nk, TILE: tl.constexpr):
    """The sweep of the BLOCK_M queries of a program over keys."""
    if len(tiles) > 0:
        row = work.first // TILE.block_m
        return listed(tiles, work.batch, work.head, H, row, tl.cdiv(Nq, TILE.block_m), tl.cdiv(Nk, TILE.block_n))
    else:
        bounds = bounds_of(work.first + work.offset, work.n_keys, rule.left, rule.right, TILE.block_m, TILE.block_n)
        return Sweep((bounds,), ())


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


@triton.jit
def inner_queries(sweep, i, kv_head, n_steps, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query head, first query) of the i-th tile that needs no mask; a list holds the group's heads one after the other."""
    if len(sweep.row) > 0:
        head, tile = folded(n_steps, full_entry(sweep, i), kv_head, GROUP)
        return head, tile * BLOCK_M
    else:
        bounds = sweep.bounds[0]
        head, tile = folded((bounds.inner_hi - bounds.inner_lo) // BLOCK_M, i, kv_head, GROUP)
        return head, bounds.inner_lo + tile * BLOCK_M


@triton.jit
def edge_queries(sweep, i, kv_head, n_steps, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query head, first query) of the i-th tile that needs the mask."""
    if len(sweep.row) > 0:
        head, tile = folded(n_steps, partial_entry(sweep, i), kv_head, GROUP)
        return head, tile * BLOCK_M
    else:
        head, tile = folded(edge_count(sweep.bounds[0], BLOCK_M), i, kv_head, GROUP)
        return head, edge_start(sweep.bounds[0], tile, BLOCK_M)


@triton.jit
def over_keys(STEP: tl.constexpr, state, held, views, work, sweep, rule, extras, KIND: tl.constexpr, TILE: tl.constexpr):
    """``state`` after ``STEP`` has taken every tile of keys of a program, first those that need no mask, then those that do.

    ``STEP`` is a jit function (state, held, views, place, rule, extras, KIND, TILE, MASKED) -> state; ``held`` is what it reads
    of the program's queries, and ``views`` what it loads tiles of keys from.
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    STRIDE: tl.constexpr = 1 if len(sweep.row) > 0 else BLOCK_N
    first, stop = inner_range(sweep)
    for i in tl.range(first, stop, STRIDE, disable_licm=TILE.disable_licm):
        state = STEP(state, held, views, tile_of_keys(work, inner_tile(sweep, i, BLOCK_N)), rule, extras, KIND, TILE, False)
    for i in tl.range(0, n_edges(sweep, BLOCK_N), num_stages=TILE.edge_stages, disable_licm=TILE.disable_licm):
        state = STEP(state, held, views, tile_of_keys(work, edge_tile(sweep, i, BLOCK_N)), rule, extras, KIND, TILE, True)
    return state


@triton.jit
def sweep_queries(tiles, work, rule, Hkv, Nq, Nk, WHOLE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """(the sweep of the BLOCK_N keys of a program over the queries of their group, how many tiles need no mask, how many do).

    Key k sees the queries whose position lies in [k - right, k + left]: the same window with its sides swapped. WHOLE: every
    tile with keys past the end is masked.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    if len(tiles) > 0:
        row, n_columns = work.first // BLOCK_N, tl.cdiv(Nq, BLOCK_M) * GROUP
        sweep = listed(tiles, work.batch, work.head, Hkv, row, tl.cdiv(Nk, BLOCK_N), n_columns)
        return sweep, sweep.row[0].n_full, sweep.row[0].n_partial
    else:
        bounds = bounds_of(work.first - work.offset, work.n_queries, rule.right, rule.left, BLOCK_N, BLOCK_M)
        if WHOLE:
            inner_hi = tl.where(work.first + BLOCK_N > work.n_keys, bounds.inner_lo, bounds.inner_hi)
            bounds = Bounds(bounds.lo, bounds.inner_lo, inner_hi, bounds.hi)
        n_inner = (bounds.inner_hi - bounds.inner_lo) // BLOCK_M * GROUP
        return Sweep((bounds,), ()), n_inner, edge_count(bounds, BLOCK_M) * GROUP


@triton.jit
def over_queries(STEP: tl.constexpr, state, held, sources, work, swept, rule, extras, Nq, KIND: tl.constexpr,
                 TILE: tl.constexpr):
    """``state`` after ``STEP`` has taken every tile of queries of every head of a program's group; ``swept`` is what
    ``sweep_queries`` returned. STEP is as in ``over_keys``; ``held`` is what it reads of the program's keys, and ``sources``
    where it finds the queries of a head."""
    BLOCK_M: tl.constexpr = TILE.block_m
    GROUP: tl.constexpr = KIND.group
    sweep, n_inner, n_edge = swept
    n_steps = tl.cdiv(Nq, BLOCK_M)
    for i in tl.range(0, n_inner, disable_licm=TILE.disable_licm):
        head, q_first = inner_queries(sweep, i, work.head, n_steps, GROUP, BLOCK_M)
        place = Place(work.batch, head, q_first, work.first, work.offset, work.n_queries, work.n_keys)
        state = STEP(state, held, sources, place, rule, extras, KIND, TILE, False)
    for i in tl.range(0, n_edge, num_stages=TILE.edge_stages, disable_licm=TILE.disable_licm):
        head, q_first = edge_queries(sweep, i, work.head, n_steps, GROUP, BLOCK_M)
        place = Place(work.batch, head, q_first, work.first, work.offset, work.n_queries, work.n_keys)
        state = STEP(state, held, sources, place, rule, extras, KIND, TILE, True)
    return state
