"""Gradients of operands: dS, times the argument's slope, summed over what the operand broadcasts along.

One program owns a tile of one operand's gradient and walks everything that is summed into it: no tensor of the size of
the scores exists unless the operand itself has that size, and there are no atomics, so the sum is the same from run to run.
A table of which entries are looked up by what a function computes is the exception: its gradient is summed by atomics.
Where the operand is too small to occupy a GPU, the walk is cut into parts whose sums are added at the end.
"""

import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import Kind, TileConfig
from fused_attn.kernels.backward import score_gradient, weights
from fused_attn.kernels.backward_tangent import Pair, load_statistics, rows_of, second_step
from fused_attn.kernels.dropout import dropout_keep
from fused_attn.kernels.launch import Call, Launch, accumulator, fit_offsets, with_lse
from fused_attn.kernels.product import products
from fused_attn.kernels.score import entry_offset
from fused_attn.kernels.softmax import load_lse, lse_views
from fused_attn.kernels.tangent import step_along, tile_along, view_along
from fused_attn.kernels.tiles import (
    Work,
    inner,
    key_view,
    load_rows,
    load_tile,
    locate,
    query_rows,
    query_view,
    tile_of_keys,
)
from fused_attn.kernels.window import Rule, side

# Programs that keep a large GPU busy: operands with fewer tiles are summed in parts.
ENOUGH_PROGRAMS = 512


@dataclass(frozen=True)
class OperandKind(Kind):
    """The gradient of argument ``arg`` of mod ``member``; ``own`` tells for each of (batch, head, query, key, diagonal)
    whether the operand differs along it. ``scattered``: the operand is a table, and ``own`` cuts the work alone."""

    member: int = 0
    arg: int = 0
    own: tuple[bool, ...] = ()
    scattered: bool = False


operand_kind = functools.cache(OperandKind)


@triton.jit
def split_index(index, Own: tl.constexpr, extent, own, walked):
    """Takes one dimension off an index: (index within the dimension, what remains of the own and of the walked index)."""
    if Own:
        return own % extent, own // extent, walked
    else:
        return tl.cast(walked % extent, tl.int32), own, walked // extent


@triton.jit
def ds_tangent(q, k, v, dout, work, place, rule, extras, second, Nq, KIND: tl.constexpr, TILE: tl.constexpr):
    """dS' of a tile, times the argument's slope."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    k_t, v_t = view_along(second[1].k, work, KIND.group), view_along(second[1].v, work, KIND.group)
    pairs = (Pair(q, tile_along(second[1].q, work, place.q_first, KIND.dim, BLOCK_M, True, TILE)),
             Pair(k, step_along(k_t, place.k_first, KIND.dim, BLOCK_N, True, TILE)),
             Pair(dout, tile_along(second[1].dout, work, place.q_first, KIND.dim_v, BLOCK_M, True, TILE)),
             Pair(v, step_along(v_t, place.k_first, KIND.dim_v, BLOCK_N, True, TILE)))
    known = load_statistics(rows_of(second[0], extras, work, Nq), place.q_first, extras, BLOCK_M, True)
    _, _, _, ds_t = second_step(pairs[0], pairs[1], pairs[2], pairs[3], known, place, rule, extras, second[1], KIND.member,
                                KIND.arg, KIND, TILE, False, True, True)
    return ds_t


@triton.jit(do_not_specialize=["B", "H", "Nq", "Nk", "offset", "left", "right", "n_parts"])
def operand_grad_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, grad_ptr, strides,
                        B, H, Nq, Nk, offset, left, right, scale: tl.float64, extras, n_parts, second,
                        KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: one tile of the gradient of an operand, or of one part of its sum; ``KIND`` is an OperandKind.

    The program walks the dimensions along which the operand does not differ. grad is [parts, B', H', Nq', Nk'], with extent 1
    in those. For an operand that differs along diagonals it is [parts, differences, H', B', BLOCK, BLOCK]: for each
    difference of first key and first query the sum of all tiles that have it, which ``diagonal_sums`` finishes. ``second`` is
    (), or for the tangent of the gradient (pointers of a Rows, Along).
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    D: tl.constexpr = KIND.dim
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    OWN: tl.constexpr = KIND.own
    q_strides, k_strides, v_strides, dout_strides = strides
    rule = Rule(side(left), side(right), scale.to(ACC))
    m_tiles = tl.cdiv(Nq, BLOCK_M)
    n_tiles = tl.cdiv(Nk, BLOCK_N)
    walk = tl.full([], 1, tl.int64)  # all heads together may have more than 2**31 tiles
    if not OWN[0]:
        walk *= B
    if not OWN[1]:
        walk *= H
    if not OWN[2]:
        walk *= m_tiles
    if not OWN[3] and not OWN[4]:
        walk *= n_tiles
    own = tl.program_id(0) // n_parts
    part = tl.program_id(0) % n_parts
    per_part = tl.cdiv(walk, n_parts)
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for step in tl.range(part * per_part, tl.minimum(walk, (part + 1) * per_part), num_stages=1):
        batch, own_left, walked = split_index(own, OWN[0], B, own, step)
        head, own_left, walked = split_index(own, OWN[1], H, own_left, walked)
        if OWN[4]:
            diagonal = own_left
            m_tile = tl.cast(walked, tl.int32)
            n_tile = m_tile + diagonal - (m_tiles - 1)
        else:
            m_tile, own_left, walked = split_index(own, OWN[2], m_tiles, own_left, walked)
            n_tile, own_left, walked = split_index(own, OWN[3], n_tiles, own_left, walked)
        q_start, n_queries, k_start, n_keys, shift = locate(extras.sequences, batch, Nq, Nk, offset)
        work = Work(m_tile * BLOCK_M, batch * H + head, batch, head, q_start, n_queries, k_start, n_keys, shift)
        place = tile_of_keys(work, n_tile * BLOCK_N)
        alive = (place.q_first < n_queries) & (place.k_first < n_keys) & (n_tile >= 0)
        if right is not None:
            alive = alive & (place.k_first <= place.q_first + BLOCK_M - 1 + shift + right)
        if left is not None:
            alive = alive & (place.k_first + BLOCK_N - 1 >= place.q_first + shift - left)
        if alive:
            q = load_tile(query_view(q_ptr, q_strides, work), place.q_first, D, BLOCK_M, True, TILE.wide)
            k = load_tile(key_view(k_ptr, k_strides, work, KIND.group), place.k_first, D, BLOCK_N, True, TILE.wide)
            dout = load_tile(query_view(dout_ptr, dout_strides, work), place.q_first, DV, BLOCK_M, True, TILE.wide)
            v = load_tile(key_view(v_ptr, v_strides, work, KIND.group), place.k_first, DV, BLOCK_N, True, TILE.wide)
            if len(second) > 0:
                ds = ds_tangent(q, k, v, dout, work, place, rule, extras, second, Nq, KIND, TILE)
            else:
                # [BLOCK_M, BLOCK_N]
                raw = products(q, k, head, extras.additive, KIND)
                lse = load_lse(lse_views(lse_ptr, extras, work, Nq), place.q_first, extras, BLOCK_M, True)
                p, dmod = weights(raw, lse, place, rule, extras, KIND.member, KIND.arg, TILE, False, True, True)
                dp = inner(dout, v, ACC, PRECISION)
                if len(extras.dropout) > 0:
                    dp = tl.where(dropout_keep(extras.dropout, place, TILE, False), dp * extras.dropout.factor, 0.0)
                delta = load_rows(query_rows(delta_ptr, extras.sequences, work, Nq), place.q_first, 0.0, BLOCK_M, True)
                ds = score_gradient(p, dp, delta[:, None], dmod, extras, True)
            if KIND.scattered:
                at = tl.broadcast_to(entry_offset(ds, place, extras.mods, KIND.member, KIND.arg, TILE), [BLOCK_M, BLOCK_N])
                tl.atomic_add(grad_ptr + at, ds, mask=ds != 0.0, sem="relaxed")
            else:
                acc += ds

    if KIND.scattered:
        return
    if OWN[4]:
        at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(grad_ptr + tl.cast(part * (tl.num_programs(0) // n_parts) + own, tl.int64) * (BLOCK_M * BLOCK_N) + at, acc)
    else:
        batch, own_left, _ = split_index(own, OWN[0], B, own, own)
        head, own_left, _ = split_index(own, OWN[1], H, own_left, own)
        m_tile, own_left, _ = split_index(own, OWN[2], m_tiles, own_left, own)
        n_tile, own_left, _ = split_index(own, OWN[3], n_tiles, own_left, own)
        rows = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        width = Nk if OWN[3] else 1
        height = Nq if OWN[2] else 1
        heads = H if OWN[1] else 1
        batches = B if OWN[0] else 1
        plane = (tl.cast(part, tl.int64) * batches + (batch if OWN[0] else 0)) * heads + (head if OWN[1] else 0)
        grad_ptr += plane * height * width
        dtype: tl.constexpr = grad_ptr.dtype.element_ty
        if OWN[2] and OWN[3]:
            ptrs = grad_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :]
            tl.store(ptrs, acc.to(dtype), mask=(rows < Nq)[:, None] & (cols < Nk)[None, :])
        elif OWN[2]:
            tl.store(grad_ptr + rows, tl.sum(acc, 1).to(dtype), mask=rows < Nq)
        elif OWN[3]:
            tl.store(grad_ptr + cols, tl.sum(acc, 0).to(dtype), mask=cols < Nk)
        else:
            tl.store(grad_ptr, tl.sum(tl.sum(acc, 1), 0).to(dtype))


def diagonal_sums(tiles: torch.Tensor, n_queries: int, n_keys: int) -> torch.Tensor:
    """Sums by k - q, [B', H', Nq + Nk - 1], from the tiles [differences, H', B', BLOCK, BLOCK] that the kernel leaves."""
    block = tiles.shape[-1]
    # With its rows reversed and row r moved r columns to the right, a tile's diagonals are columns.
    skewed = torch.nn.functional.pad(tiles.flip(-2), (0, block)).flatten(-2)[..., : block * (2 * block - 1)]
    columns = skewed.unflatten(-1, (block, 2 * block - 1)).sum(-2)
    # The diagonals of tiles with neighbouring differences overlap.
    line = columns.new_zeros(tiles.shape[0] + 1, *tiles.shape[1:3], block)
    line[:-1] += columns[..., :block]
    line[1:, ..., : block - 1] += columns[..., block:]
    first = -(-n_queries // block) * block - n_queries
    return line.permute(2, 1, 0, 3).flatten(2)[..., first : first + n_queries + n_keys - 1]


def operand_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor,
                     delta: torch.Tensor, operand: torch.Tensor, member: int, arg: int, call: Call, *, config: TileConfig,
                     second: tuple[Any, ...] = ()) -> Generator[Launch, None, torch.Tensor]:
    """The gradient of argument ``arg`` of mod ``member``, in the shape and type of ``operand``: yields the launch that fills it
    in parts, and returns their sum.

    ``operand`` is [B', H', Nq', Nk'], each the full extent or 1, or [B', H', Nq + Nk - 1] for values by k - q; with more
    dimensions it is a table, of which the mod looks up entries. ``second``: (Rows, Along), for the tangent of the gradient.
    """
    scattered, relative = operand.dim() > 4, operand.dim() == 3
    heads = q.shape[1]
    extents = (call.batch, heads, call.n_queries, call.n_keys)
    if 0 in extents or operand.numel() == 0:
        return torch.zeros_like(operand)
    tiles = -(-call.n_queries // config.block_m), -(-call.n_keys // config.block_n)
    own = tuple(size > 1 for size in operand.shape[:2]) + ((False, False) if relative else tuple(
        size > 1 for size in operand.shape[2:4]))
    own = (True, True, True, False) if scattered else own
    steps = (call.batch, heads, *tiles)
    n_own = walk = 1
    for mine, count in zip(own, steps, strict=True):
        n_own, walk = (n_own * count, walk) if mine else (n_own, walk * count)
    differences = sum(tiles) - 1
    if relative:
        n_own, walk = n_own * differences, walk // tiles[1]
    parts = min(walk, max(1, ENOUGH_PROGRAMS // n_own))
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    if scattered:  # in the layout of the operand, which its offsets are made for
        span = 1 + sum((size - 1) * stride for size, stride in zip(operand.shape, operand.stride(), strict=True))
        grad = torch.zeros(span, dtype=sums, device=q.device).as_strided(operand.shape, operand.stride())
    elif relative:
        shape = (parts, differences, *reversed(operand.shape[:2]), config.block_m, config.block_n)
        grad = torch.empty(shape, dtype=sums, device=q.device)
    else:
        grad = torch.empty((parts, *operand.shape), dtype=operand.dtype if parts == 1 else sums, device=q.device)
    lse, call = with_lse(call, lse)
    second = (second[0]._replace(lse=lse), second[1]) if second else ()
    args = (
        q, k, v, dout, lse, delta, grad, call.strides(q, k, v, dout), call.batch, heads, call.n_queries, call.n_keys,
        call.offset, call.left, call.right, call.scale, call.extras, parts, second,
        operand_kind(heads // k.shape[1], q.shape[3], v.shape[3], accumulator(q.dtype), call.precision, member, arg,
                     (*own, relative), scattered),
    )
    yield Launch(operand_grad_kernel, n_own * parts, args, fit_offsets(config, call, q, k, v, dout))
    if scattered:
        return grad.to(operand.dtype, memory_format=torch.contiguous_format, copy=True)
    whole = grad[0] if parts == 1 else grad.sum(0)
    if relative:
        whole = diagonal_sums(whole, call.n_queries, call.n_keys)
    return whole.to(operand.dtype)
