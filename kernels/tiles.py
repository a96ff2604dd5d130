"""Tiles: which one a program owns, where its elements live, and how they are read, multiplied and written.

A *view* is the tuple ``(base, length, row_stride, col_stride)``: one head of one sequence, ``length`` rows long, with
``base`` already moved to that head in 64-bit arithmetic. Kernels take tiles of a view by their first row and never do
address arithmetic themselves, so dense and packed layouts differ here alone.

A *tile* is a tuple of one or two blocks of columns, each a power of two wide: a head dim of 192 is carried as 128 + 64
rather than padded to 256, and one of 576 as 512 + 64.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequences(NamedTuple):
    """Where the sequences of a batch lie, as kernels take it: every field is () or (pointer,), the last two () or two numbers.

    ``cu_q`` and ``cu_k`` [B + 1] hold the first rows of packed sequences, ``used_q`` and ``used_k`` [B] how many rows
    count, ``total_q`` and ``total_k`` the rows of the packed tensors as ``layout.packed_rows`` writes them; the first number of
    ``total_q`` is also the distance of two heads in a packed LSE. In a plain dense batch all fields are ().
    """

    cu_q: Any = ()
    cu_k: Any = ()
    used_q: Any = ()
    used_k: Any = ()
    total_q: Any = ()
    total_k: Any = ()


class Place(NamedTuple):
    """Where a tile of scores lies. All fields are scalars; ``offset`` is the position of query 0 among the keys."""

    batch: Any
    head: Any
    q_first: Any
    k_first: Any
    offset: Any
    n_queries: Any
    n_keys: Any


@triton.jit
def program_tile(pid, n_rows, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(first row of the tile of program ``pid``, index of its head among batch x heads).

    All tiles of a head are neighbours in launch order, so its keys stay in the L2 cache. Everything sits on grid axis x,
    because y and z stop at 65535. ``LAST_FIRST`` starts with the last tile, the longest one under causality.
    """
    n_tiles = tl.cdiv(n_rows, BLOCK)
    tile = pid % n_tiles
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return tile * BLOCK, pid // n_tiles


@triton.jit
def packed_row(cu, total, index):
    """Where a packed sequence begins, or the one before it ends, clamped to the tensor: ``cu`` is not trusted to stay in it."""
    return tl.minimum(tl.maximum(tl.load(cu[0] + index), 0), total[0] - total[1] // 16).to(tl.int32)


@triton.jit
def span(cu, used, total, batch, length):
    """(first row, number of rows) of one side of a sequence; ``length`` rows where neither ``cu`` nor ``used`` says less."""
    start = tl.full([], 0, tl.int32)
    if len(cu) > 0:
        start = packed_row(cu, total, batch)
        # At most ``length``: no list or bias is longer.
        length = tl.minimum(tl.maximum(packed_row(cu, total, batch + 1) - start, 0), length)
    if len(used) > 0:
        length = tl.maximum(tl.minimum(tl.load(used[0] + batch).to(tl.int64), length), 0).to(tl.int32)
    return start, length


@triton.jit
def locate(sequences, batch, Nq, Nk, offset):
    """(first query, queries, first key, keys, offset) of a sequence; packed ones align their last query and last key."""
    q_start, n_queries = span(sequences.cu_q, sequences.used_q, sequences.total_q, batch, Nq)
    k_start, n_keys = span(sequences.cu_k, sequences.used_k, sequences.total_k, batch, Nk)
    if len(sequences.cu_q) > 0:
        offset = n_keys - n_queries
    return q_start, n_queries, k_start, n_keys, offset


class Work(NamedTuple):
    """What a program works on: the tile of queries or keys from ``first`` on, of one head (``bh`` among batch x heads) of
    one sequence."""

    first: Any
    bh: Any
    batch: Any
    head: Any
    q_start: Any
    n_queries: Any
    k_start: Any
    n_keys: Any
    offset: Any  # position of query 0 among the keys


@triton.jit
def work_of(pid, n_rows, H, Nq, Nk, offset, sequences, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The work of program ``pid`` in a grid that covers ``n_rows`` rows of each of ``H`` heads in tiles of BLOCK."""
    first, bh = program_tile(pid, n_rows, BLOCK, LAST_FIRST)
    batch = bh // H
    q_start, n_queries, k_start, n_keys, offset = locate(sequences, batch, Nq, Nk, offset)
    return Work(first, bh, batch, bh % H, q_start, n_queries, k_start, n_keys, offset)


@triton.jit
def of_head(work, head, H):
    """The same work for another head, one of ``H``."""
    return Work(work.first, work.batch * H + head, work.batch, head, work.q_start, work.n_queries, work.k_start, work.n_keys,
                work.offset)


@triton.jit
def tile_of_keys(work, k_first):
    """The Place of a program's queries and the keys from ``k_first`` on."""
    return Place(work.batch, work.head, work.first, k_first, work.offset, work.n_queries, work.n_keys)


@triton.jit
def query_view(ptr, strides, work):
    """View of the queries of a program's head, or of a tensor laid out like them."""
    return head_view(ptr, strides, work.batch, work.head, work.q_start, work.n_queries)


@triton.jit
def key_view(ptr, strides, work, GROUP: tl.constexpr):
    """View of the keys that the queries of a program's head see; with GROUP 1, of the keys of that head itself."""
    return head_view(ptr, strides, work.batch, work.head // GROUP, work.k_start, work.n_keys)


@triton.jit
def query_rows(ptr, sequences, work, Nq):
    """View of LSE or delta of the queries of a program's head."""
    return row_view(ptr, sequences, work.bh, work.head, Nq, work.q_start, work.n_queries)


@triton.jit
def head_view(ptr, strides, batch, head, start, length):
    """View of one head from row ``start`` on; ``strides`` are those of a [B, H, N, D] tensor, in elements.

    After them may come a number that divides all of them but the last.
    """
    batch_stride, head_stride, row_stride = strides[0], strides[1], strides[2]
    if len(strides) > 4:  # written so that the compiler sees it, and loads whole rows of it at a time
        batch_stride = batch_stride // strides[4] * strides[4]
        head_stride = head_stride // strides[4] * strides[4]
        row_stride = row_stride // strides[4] * strides[4]
    # 64 bits before the product with a stride: batch * stride alone can pass 2**31.
    base = ptr + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
    return base + tl.cast(start, tl.int64) * row_stride, length, row_stride, strides[3]


@triton.jit
def row_view(ptr, sequences, bh, head, Nq, start, length):
    """View of row ``bh`` of LSE or delta: contiguous [B * H, Nq], or [H, T] where sequences are packed."""
    if len(sequences.total_q) > 0:
        return ptr + (tl.cast(head, tl.int64) * sequences.total_q[0] + start), length
    else:
        return ptr + tl.cast(bh, tl.int64) * Nq, length


@triton.constexpr_function
def head_columns(width: int) -> int:
    """Columns of a tile's first block: the largest power of two within ``width``, or one that holds all of it.

    A tile has two blocks only where these are fewer columns than one block. Each has at least 16, as matrix instructions need.
    """
    whole = max(16, triton.next_power_of_2(width))
    half = whole // 2
    return half if half >= 16 and half < width and max(16, triton.next_power_of_2(width - half)) < half else whole


@triton.constexpr_function
def rest_columns(width: int) -> int:
    """Columns of a tile's second block, or 0."""
    rest = width - head_columns(width)
    return max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@triton.jit
def boxed(view, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """A view whose tiles of ROWS rows are loaded through tensor descriptors: (descriptor,), or one for each block."""
    base, length, row_stride, _ = view
    HEAD: tl.constexpr = head_columns(WIDTH)
    REST: tl.constexpr = rest_columns(WIDTH)
    width: tl.constexpr = HEAD if REST else WIDTH
    boxes = (tl.make_tensor_descriptor(base, [length, width], [row_stride, 1], [ROWS, HEAD]),)
    if REST:
        boxes = boxes + (tl.make_tensor_descriptor(base + HEAD, [length, WIDTH - HEAD], [row_stride, 1], [ROWS, REST]),)
    return boxes


@triton.jit
def tile_ptrs(view, first_row, FIRST_COL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to rows ``first_row ...`` and columns ``FIRST_COL ...`` of a view: [ROWS, COLS].

    Offsets inside the tile are 32 bits (64-bit ones cost registers) unless ``WIDE``, which the launcher sets when
    stride x rows does not fit, and a tile configuration may set where it happens to save registers.
    """
    base, _, row_stride, col_stride = view
    rows = tl.arange(0, ROWS)
    cols = FIRST_COL + tl.arange(0, COLS)
    if WIDE:
        row_offset = (first_row + rows).to(tl.int64) * row_stride
        return base + (row_offset[:, None] + cols.to(tl.int64)[None, :] * col_stride)
    else:
        base += tl.cast(first_row, tl.int64) * row_stride
        return base + (rows[:, None] * row_stride + cols[None, :] * col_stride)


@triton.jit
def inside(view, first_row, FIRST_COL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a block exist: [ROWS, COLS] (or [ROWS, 1] where no column is padding)."""
    exists = (first_row + tl.arange(0, ROWS) < view[1])[:, None]
    if WIDTH < FIRST_COL + COLS:
        exists = exists & (FIRST_COL + tl.arange(0, COLS) < WIDTH)[None, :]
    return exists


@triton.jit
def load_block(view, first_row, FIRST_COL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               TAIL: tl.constexpr, WIDE: tl.constexpr):
    ptrs = tile_ptrs(view, first_row, FIRST_COL, ROWS, COLS, WIDE)
    if TAIL:
        return tl.load(ptrs, mask=inside(view, first_row, FIRST_COL, WIDTH, ROWS, COLS), other=0.0)
    elif WIDTH < FIRST_COL + COLS:
        return tl.load(ptrs, mask=(FIRST_COL + tl.arange(0, COLS) < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_tile(view, first_row, WIDTH: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr):
    """Loads a tile of ROWS rows; columns past ``WIDTH``, and with ``TAIL`` rows past the end, read as zero."""
    HEAD: tl.constexpr = head_columns(WIDTH)
    REST: tl.constexpr = rest_columns(WIDTH)
    if len(view) <= 2:  # boxed: everything outside reads as zero
        tile = (view[0].load([first_row, 0]),)
        if REST:
            tile = tile + (view[1].load([first_row, 0]),)
    else:
        tile = (load_block(view, first_row, 0, WIDTH, ROWS, HEAD, TAIL, WIDE),)
        if REST:
            tile = tile + (load_block(view, first_row, HEAD, WIDTH, ROWS, REST, TAIL, WIDE),)
    return tile


@triton.jit
def store_tile(view, first_row, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Writes the part of ``tile`` that exists, in the element type of the view."""
    HEAD: tl.constexpr = head_columns(WIDTH)
    REST: tl.constexpr = rest_columns(WIDTH)
    dtype: tl.constexpr = view[0].dtype.element_ty
    tl.store(tile_ptrs(view, first_row, 0, ROWS, HEAD, WIDE), tile[0].to(dtype),
             mask=inside(view, first_row, 0, WIDTH, ROWS, HEAD))
    if REST:
        tl.store(tile_ptrs(view, first_row, HEAD, ROWS, REST, WIDE), tile[1].to(dtype),
                 mask=inside(view, first_row, HEAD, WIDTH, ROWS, REST))


@triton.jit
def add_tile(view, first_row, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Adds ``tile`` to rows that other programs add to as well, in whatever order they come."""
    WIDE: tl.constexpr = TILE.wide
    if TILE.single_atomics:  # a factor of 1 hides that columns lie side by side, for which Triton gives a lane four of them
        view = (view[0], view[1], view[2], view[3] * tl.minimum(view[1], 1))
    HEAD: tl.constexpr = head_columns(WIDTH)
    REST: tl.constexpr = rest_columns(WIDTH)
    tl.atomic_add(tile_ptrs(view, first_row, 0, ROWS, HEAD, WIDE), tile[0],
                  mask=inside(view, first_row, 0, WIDTH, ROWS, HEAD), sem="relaxed")
    if REST:
        tl.atomic_add(tile_ptrs(view, first_row, HEAD, ROWS, REST, WIDE), tile[1],
                      mask=inside(view, first_row, HEAD, WIDTH, ROWS, REST), sem="relaxed")


@triton.jit
def zeros(WIDTH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """A tile of zeros, to add to."""
    HEAD: tl.constexpr = head_columns(WIDTH)
    REST: tl.constexpr = rest_columns(WIDTH)
    tile = (tl.zeros([ROWS, HEAD], ACC),)
    if REST:
        tile = tile + (tl.zeros([ROWS, REST], ACC),)
    return tile


@triton.jit
def scaled(tile, factor):
    """``tile * factor``, the factor a scalar or [ROWS, 1]."""
    result = (tile[0] * factor,)
    if len(tile) > 1:
        result = result + (tile[1] * factor,)
    return result


@triton.jit
def row_products(a, b, ACC: tl.constexpr):
    """The inner products of the rows of two tiles: [rows]."""
    sums = tl.sum(a[0].to(ACC) * b[0].to(ACC), 1)
    if len(a) > 1:
        sums += tl.sum(a[1].to(ACC) * b[1].to(ACC), 1)
    return sums


@triton.jit
def inner(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr, acc=None):
    """a b^T of two tiles, added to ``acc`` where that is given: [rows of a, rows of b]."""
    product = tl.dot(a[0], tl.trans(b[0]), acc, input_precision=PRECISION, out_dtype=ACC)
    if len(a) > 1:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION, out_dtype=ACC)
    return product


@triton.jit
def inner_tangent(a, a_t, b, b_t, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The tangent of a b^T [ROWS, COLS], given those of the two tiles; () for a tile that does not move."""
    if len(a_t) > 0 and len(b_t) > 0:
        return inner(a, b_t, ACC, PRECISION, inner(a_t, b, ACC, PRECISION))
    elif len(a_t) > 0:
        return inner(a_t, b, ACC, PRECISION)
    elif len(b_t) > 0:
        return inner(a, b_t, ACC, PRECISION)
    else:
        return tl.zeros([ROWS, COLS], ACC)


@triton.jit
def outer(p, b, acc, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p b, with p [M, rows of b] in the element type of b."""
    result = (tl.dot(p, b[0], acc[0], input_precision=PRECISION, out_dtype=ACC),)
    if len(b) > 1:
        result = result + (tl.dot(p, b[1], acc[1], input_precision=PRECISION, out_dtype=ACC),)
    return result


@triton.jit
def outer_transposed(p, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """p^T b, with p [rows of b, M] in the element type of b."""
    result = (tl.dot(tl.trans(p), b[0], input_precision=PRECISION, out_dtype=ACC),)
    if len(b) > 1:
        result = result + (tl.dot(tl.trans(p), b[1], input_precision=PRECISION, out_dtype=ACC),)
    return result


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
