"""Tiles: which one a program owns, where its elements live, and how they are read and written.

A *view* is the tuple ``(base, length, row_stride, col_stride)``: one head of one sequence, ``length`` rows long, with
``base`` already moved to that head in 64-bit arithmetic. Kernels take tiles of a view by their first row and never do
address arithmetic themselves, so dense, packed and paged layouts can differ here alone.
"""

import triton
import triton.language as tl


@triton.jit
def program_tile(n_rows, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(first row of this program's tile, index of its head among batch x heads).

    All tiles of a head are neighbours in launch order, so its keys stay in the L2 cache. Everything sits on grid axis x,
    because y and z stop at 65535. ``LAST_FIRST`` starts with the last tile, the longest one under causality.
    """
    n_tiles = tl.cdiv(n_rows, BLOCK)
    pid = tl.program_id(0)
    tile = pid % n_tiles
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return tile * BLOCK, pid // n_tiles


@triton.jit
def head_view(ptr, strides, batch, head, length):
    """View of one head; ``strides`` are those of a [B, H, N, D] tensor, in elements."""
    # 64 bits before the product with a stride: batch * stride alone can pass 2**31.
    base = ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return base, length, strides[2], strides[3]


@triton.jit
def row_view(ptr, index, length):
    """View of one row of a contiguous [B * H, N] tensor (LSE, delta)."""
    return ptr + index.to(tl.int64) * length, length


@triton.jit
def tile_ptrs(view, first_row, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to rows ``first_row ...`` of a view: [ROWS, COLS].

    Offsets inside the tile are 32 bits (64-bit ones cost registers) unless ``WIDE``, which the launcher sets when
    stride x rows does not fit, and a tile configuration may set where it happens to save registers.
    """
    base, _, row_stride, col_stride = view
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    if WIDE:
        row_offset = (first_row + rows).to(tl.int64) * row_stride
        return base + (row_offset[:, None] + cols.to(tl.int64)[None, :] * col_stride)
    else:
        base += tl.cast(first_row, tl.int64) * row_stride
        return base + (rows[:, None] * row_stride + cols[None, :] * col_stride)


@triton.jit
def inside(view, first_row, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a tile exist: [ROWS, COLS] (or [ROWS, 1] where no column is padding)."""
    exists = (first_row + tl.arange(0, ROWS) < view[1])[:, None]
    if WIDTH != COLS:
        exists = exists & (tl.arange(0, COLS) < WIDTH)[None, :]
    return exists


@triton.jit
def load_tile(view, first_row, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TAIL: tl.constexpr,
              WIDE: tl.constexpr):
    """[ROWS, COLS] tile whose columns past ``WIDTH``, and with ``TAIL`` the rows past the end, read as zero."""
    ptrs = tile_ptrs(view, first_row, ROWS, COLS, WIDE)
    if TAIL:
        return tl.load(ptrs, mask=inside(view, first_row, WIDTH, ROWS, COLS), other=0.0)
    elif WIDTH != COLS:
        return tl.load(ptrs, mask=(tl.arange(0, COLS) < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(view, first_row, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Writes the part of ``tile`` [ROWS, COLS] that exists, in the element type of the view."""
    ptrs = tile_ptrs(view, first_row, ROWS, COLS, WIDE)
    tl.store(ptrs, tile.to(view[0].dtype.element_ty), mask=inside(view, first_row, WIDTH, ROWS, COLS))


@triton.jit
def load_rows(view, first_row, other, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """[ROWS] values of a row view; with ``TAIL``, ``other`` past the end."""
    rows = first_row + tl.arange(0, ROWS)
    if TAIL:
        return tl.load(view[0] + rows, mask=rows < view[1], other=other)
    else:
        return tl.load(view[0] + rows)


@triton.jit
def store_rows(view, first_row, values, ROWS: tl.constexpr):
    rows = first_row + tl.arange(0, ROWS)
    tl.store(view[0] + rows, values, mask=rows < view[1])
