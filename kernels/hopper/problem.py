"""What a Hopper kernel works on: the run-time numbers of a launch, a program's queries and keys, and where their boxes lie."""

from typing import Any, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

NEG_INF = gl.constexpr(float("-inf"))
ROWS = gl.constexpr(64)  # rows of one consumer: the M of one wgmma
# The extent of the row axis of a packed tensor's descriptor. The strides of its two leading axes wrap the 64-bit address
# around to where a sequence begins, so that boxes end with their sequence: TMA has no other way to stop short of the next.
RAGGED_END = gl.constexpr(1 << 30)
_RAGGED_WRAP = 0x7FFF0000
L2_BYTES = 32 << 20  # of the 50 MiB of an H100: what K and V of the heads that are walked together may take


class Problem(NamedTuple):
    """The run-time numbers of a launch, for all partitions of a program; a field that may be missing is () or (value,)."""

    lse: Any  # float32, one value a row
    lse_batch: Any  # its strides
    lse_head: Any
    sinks: Any  # ([H],)
    sequences: Any  # a tiles.Sequences
    n_heads: Any
    group: Any  # query heads to a key head
    section: Any  # (batch, head) pairs walked together, so that their K and V stay in the L2 cache
    n_queries: Any  # of the longest sequence
    n_keys: Any
    offset: Any  # position of query 0 among the keys; packed sequences have their own
    left: Any  # the window: query position q sees keys q - left ... q + right
    right: Any
    scale: Any  # of the scores, positive
    softcap: Any


class Item(NamedTuple):
    """The work of one program: BLOCK_M rows of one head."""

    batch: Any
    head: Any
    row: Any  # the first query
    q_start: Any  # where its sequence begins in packed tensors
    n_queries: Any
    k_start: Any
    n_keys: Any
    offset: Any


@gluon.constexpr_function
def accumulator_layout(columns: int) -> Any:
    """The layout of [64, columns] in the registers of one warpgroup, as wgmma gives it."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def packed_row(cu, total, index):
    """Where a packed sequence begins, or the one before it ends, clamped to the tensor: ``cu`` is not trusted to stay in it."""
    return gl.minimum(gl.maximum(gl.load(cu[0] + index), 0), total[0] - total[1] // 16).to(gl.int32)


@gluon.jit
def span(cu, used, total, batch, length):
    """(first row, number of rows) of one side of a sequence; ``length`` rows where neither ``cu`` nor ``used`` says less."""
    start = gl.to_tensor(0)
    if len(cu) > 0:
        start = packed_row(cu, total, batch)
        length = gl.minimum(gl.maximum(packed_row(cu, total, batch + 1) - start, 0), length)
    if len(used) > 0:
        length = gl.maximum(gl.minimum(gl.load(used[0] + batch).to(gl.int64), length), 0).to(gl.int32)
    return start, length


@gluon.jit
def locate(index, problem, BLOCK_M: gl.constexpr):
    """The item of a program. A section of heads shares the L2 cache; within a section the tiles with most keys come first."""
    q_tiles = gl.cdiv(problem.n_queries, BLOCK_M)
    per_section = problem.section * q_tiles
    first = index // per_section * problem.section
    pairs = gl.minimum(problem.section, gl.num_programs(0) // q_tiles - first)
    within = index % per_section
    tile = within // pairs
    pair = first + within % pairs
    if len(problem.right) > 0:
        tile = q_tiles - 1 - tile
    batch = pair // problem.n_heads
    sequences = problem.sequences
    q_start, n_queries = span(sequences.cu_q, sequences.used_q, sequences.total_q, batch, problem.n_queries)
    k_start, n_keys = span(sequences.cu_k, sequences.used_k, sequences.total_k, batch, problem.n_keys)
    offset = problem.offset
    if len(problem.sequences.cu_q) > 0:
        offset = n_keys - n_queries
    return Item(batch, pair % problem.n_heads, tile * BLOCK_M, q_start, n_queries, k_start, n_keys, offset)


@gluon.jit
def key_tiles(row, n_rows: gl.constexpr, item, problem, BLOCK_N: gl.constexpr):
    """[first, last): the tiles of keys that some of these rows see. Never empty: rows that see no key walk one masked tile."""
    position = row + item.offset
    stop = item.n_keys
    if len(problem.right) > 0:
        stop = gl.minimum(stop, position + problem.right[0] + n_rows)
    last = gl.maximum(gl.cdiv(stop, BLOCK_N), 1)
    first = last * 0
    if len(problem.left) > 0:
        first = gl.minimum(gl.maximum(position - problem.left[0], 0) // BLOCK_N, last - 1)
    return first, last


@gluon.jit
def inner_tiles(row, item, problem, BLOCK_N: gl.constexpr):
    """[first, last): the tiles that all of a consumer's rows see whole; last may be below first."""
    position = row + item.offset
    stop = item.n_keys
    if len(problem.right) > 0:
        stop = gl.minimum(stop, position + problem.right[0] + 1)
    first = position * 0
    if len(problem.left) > 0:
        first = gl.cdiv(gl.maximum(position + ROWS - 1 - problem.left[0], 0), BLOCK_N)
    return first, gl.maximum(stop, 0) // BLOCK_N


@gluon.jit
def visible(row, tile, item, problem, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Which keys of a tile each row sees: [64, BLOCK_N], or [1, BLOCK_N] where rows do not differ."""
    keys = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    position = row + item.offset + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    keep = (keys < item.n_keys)[None, :]
    if len(problem.right) > 0:
        keep = keys[None, :] <= gl.minimum(position + problem.right[0], item.n_keys - 1)[:, None]
    if len(problem.left) > 0:
        keep = keep & (keys[None, :] >= (position - problem.left[0])[:, None])
    return keep


@gluon.jit
def box(problem, batch, head, start, length, row):
    """TMA coordinates of the box that begins at ``row``: past the end of its sequence loads give 0 and stores do nothing."""
    if len(problem.sequences.cu_q) > 0:
        return RAGGED_END, start + length, head, RAGGED_END - length + row, 0
    else:
        return batch, head, row, 0


def tile_width(head_dim: int) -> int:
    """Columns of a tile: TMA pads loads with zeros and cuts stores."""
    return max(64, triton.next_power_of_2(head_dim))


def descriptor(x: torch.Tensor, rows: int, packed: bool) -> TensorDescriptor:
    """The descriptor of x [B, H, N, D], or of packed [1, H, T, D]; its boxes are ``rows`` rows of one head."""
    element = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    shape, block = list(x.shape), [1, 1, rows, tile_width(x.shape[3])]
    strides = [stride if n > 1 else 8 for stride, n in zip(x.stride()[:3], shape, strict=False)] + [1]
    if packed:
        _, heads, _, dim = x.shape
        _, per_head, per_row, _ = strides
        shape = [_RAGGED_WRAP, _RAGGED_WRAP, heads, RAGGED_END.value, dim]
        strides = [(1 << 34) - per_row, per_row, per_head, per_row, 1]
        block = [1, *block]
    return TensorDescriptor(x, shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, element))


def describable(x: torch.Tensor) -> bool:
    """Whether TMA can address a tensor: rows, heads and batch 16 bytes apart or a multiple of it, columns side by side."""
    outer = [stride * x.element_size() for stride, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1]
    aligned = all(0 < stride < 1 << 40 and stride % 16 == 0 for stride in outer) and x.data_ptr() % 16 == 0
    return aligned and x.numel() > 0 and (x.shape[-1] == 1 or x.stride(-1) == 1)
