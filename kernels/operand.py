"""Operands: tensors that broadcast to [B, H, Nq, Nk] (biases, masks, slopes, arguments of custom functions).

A kernel reads the part that meets its tile of scores. Dimensions that broadcast are known at compile time and never
expanded: a value per head is one scalar, a value per key one row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Operand(NamedTuple):
    """One tensor as kernels take it. A compile-time constant takes its place as (value,).

    ``strides`` is a compile-time 0 in a dimension that broadcasts. ``start`` is the offset of element (0, 0, 0, 0): a value
    that depends on k - q alone is a vector whose query stride is the negative of its key stride.
    """

    ptr: Any
    start: Any
    strides: Any  # batch, head, query, key
    by_query: Any  # compile-time: whether it differs from query to query
    by_key: Any
    boolean: Any  # compile-time: whether its bytes are truth values
    narrow: Any  # compile-time: whether its elements are narrower than those of q


class Table(NamedTuple):
    """A tensor [B', H', Nq', Nk', ...] of which a function looks up entries by indices that it computes."""

    ptr: Any
    sizes: Any
    strides: Any


@triton.jit
def per_query(values, KEYS_FIRST: tl.constexpr):
    """Reshapes values [M] to broadcast against a tile of scores, which is [M, N], or [N, M] with ``KEYS_FIRST``."""
    if KEYS_FIRST:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def per_key(values, KEYS_FIRST: tl.constexpr):
    """Reshapes values [N] to broadcast against a tile of scores."""
    if KEYS_FIRST:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def load_operand(operand, place, ACC: tl.constexpr, TILE: tl.constexpr, KEYS_FIRST: tl.constexpr, TAIL_Q: tl.constexpr,
                 TAIL_K: tl.constexpr):
    """The values at a tile, in a shape that broadcasts against it; floats in ``ACC``, or in at least fp32 if that is None."""
    batch_stride, head_stride, q_stride, k_stride = operand.strides
    base = operand.ptr + operand.start
    base += tl.cast(place.batch, tl.int64) * batch_stride + tl.cast(place.head, tl.int64) * head_stride
    if operand.by_query:
        base += tl.cast(place.q_first, tl.int64) * q_stride
    if operand.by_key:
        base += tl.cast(place.k_first, tl.int64) * k_stride
    rows = per_query(tl.arange(0, TILE.block_m), KEYS_FIRST)
    cols = per_key(tl.arange(0, TILE.block_n), KEYS_FIRST)
    row_exists = rows < place.n_queries - place.q_first
    col_exists = cols < place.n_keys - place.k_first
    if TILE.wide:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
    if operand.by_query and operand.by_key:
        ptrs = base + (rows * q_stride + cols * k_stride)
        if TAIL_Q and TAIL_K:
            value = tl.load(ptrs, mask=row_exists & col_exists, other=0)
        elif TAIL_Q:
            value = tl.load(ptrs, mask=row_exists, other=0)
        elif TAIL_K:
            value = tl.load(ptrs, mask=col_exists, other=0)
        else:
            value = tl.load(ptrs)
    elif operand.by_query:
        value = tl.load(base + rows * q_stride, mask=row_exists, other=0)
    elif operand.by_key:
        value = tl.load(base + cols * k_stride, mask=col_exists, other=0)
    else:
        value = tl.load(base)
    if operand.narrow and (operand.by_query or operand.by_key):
        # Triton chooses the layout of P for its product by the narrowest load that P depends on. With a mask of bytes, every
        # exp2 is then computed twice in fp16 and bf16, and fp64 does not compile. That search for loads stops at a step that
        # is not elementwise, such as this sum over one element.
        value = tl.sum(tl.expand_dims(value, 2), 2)
    if operand.boolean:
        value = value != 0
    elif value.dtype.is_floating():
        if ACC is not None:
            value = value.to(ACC)
        elif value.dtype.primitive_bitwidth < 32:
            value = value.to(tl.float32)
    return value
