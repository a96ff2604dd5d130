"""Lists of tiles: a mask given as a tensor or as a function has no structure that a loop could follow, so a kernel of its own
sorts the tiles of every row into full ones, partial ones and empty ones, on the device. The attention kernels walk that list,
skip what is empty and mask only what is partial.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import Call, Launch, fit_offsets, programs
from fused_attn.kernels.mask import Keep, keep_tile
from fused_attn.kernels.operand import Operand
from fused_attn.kernels.sweep import bounds_of
from fused_attn.kernels.tiles import Place, locate
from fused_attn.kernels.window import Rule, side


@dataclass(frozen=True)
class ListKind:
    """``keys_first``: whether lists hold the query tiles, of ``group`` query heads, that see keys, instead of key tiles."""

    group: int
    keys_first: bool


class TileList(NamedTuple):
    """Tiles to visit: for each row of tiles, full ones from the front of ``entries``, partial ones from its back.

    entries [B', H', rows, columns] and counts [B', H', rows, 2] of int32; B' and H' are 1 where ``by_batch`` or
    ``by_head`` is a compile-time False. Without any mask, () takes its place.
    """

    entries: Any
    counts: Any
    by_batch: Any
    by_head: Any


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def list_kernel(entries_ptr, counts_ptr, H, Nq, Nk, offset, left, right, extras, KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: the list of one row of tiles, of one head of one batch entry.

    ``KIND`` is a ListKind. A row holds the key tiles that BLOCK_M queries see, or with ``keys_first`` the query tiles, head
    after head of the group, that see BLOCK_N keys; ``H`` counts the heads of the list. Tiles that reach past the last key, or
    with ``keys_first`` past the last query, are partial: what they load needs a mask.
    """
    GROUP: tl.constexpr = KIND.group
    KEYS_FIRST: tl.constexpr = KIND.keys_first
    OWN: tl.constexpr = TILE.block_n if KEYS_FIRST else TILE.block_m
    STEP: tl.constexpr = TILE.block_m if KEYS_FIRST else TILE.block_n
    n_rows = tl.cdiv(Nk if KEYS_FIRST else Nq, OWN)
    n_steps = tl.cdiv(Nq if KEYS_FIRST else Nk, STEP)
    pid = tl.program_id(0)
    first = pid % n_rows * OWN
    batch = pid // n_rows // H
    own_head = pid // n_rows % H
    _, n_queries, _, n_keys, offset = locate(extras.sequences, batch, Nq, Nk, offset)
    rule = Rule(side(left), side(right), 1.0)
    entries_ptr += tl.cast(pid, tl.int64) * n_steps * GROUP
    if KEYS_FIRST:
        bounds = bounds_of(first - offset, n_queries, rule.right, rule.left, OWN, STEP)
    else:
        bounds = bounds_of(first + offset, n_keys, rule.left, rule.right, OWN, STEP)
    n_full = tl.full([], 0, tl.int32)
    n_partial = tl.full([], 0, tl.int32)
    lo = bounds.lo // STEP
    n_visited = tl.maximum(tl.cdiv(bounds.hi, STEP) - lo, 0)
    for i in tl.range(0, GROUP * n_visited):
        member = i // tl.maximum(n_visited, 1)
        step = lo + i % tl.maximum(n_visited, 1)
        if KEYS_FIRST:
            place = Place(batch, own_head * GROUP + member, step * STEP, first, offset, n_queries, n_keys)
        else:
            place = Place(batch, own_head, first, step * STEP, offset, n_queries, n_keys)
        rows = place.q_first + tl.arange(0, TILE.block_m)[:, None] < n_queries
        cols = place.k_first + tl.arange(0, TILE.block_n)[None, :] < n_keys
        keep = keep_tile(place, rule, extras.keeps, TILE, False)
        some = tl.max(tl.max((keep & rows & cols).to(tl.int32), 1), 0)
        every = keep & rows if KEYS_FIRST else keep | (rows == 0)
        full = tl.min(tl.min(every.to(tl.int32), 1), 0) * some
        entry = member * n_steps + step
        tl.store(entries_ptr + n_full, entry, mask=full == 1)
        tl.store(entries_ptr + (n_steps * GROUP - 1 - n_partial), entry, mask=(some == 1) & (full == 0))
        n_full += full
        n_partial += some - full
    tl.store(counts_ptr + 2 * tl.cast(pid, tl.int64), n_full)
    tl.store(counts_ptr + 2 * tl.cast(pid, tl.int64) + 1, n_partial)


def _alone(keep: Keep) -> Keep:
    """A mask for a kernel without products, where no layout follows from its loads."""
    return keep._replace(args=tuple(x._replace(narrow=tl.constexpr(False)) if isinstance(x, Operand) else x for x in keep.args))


def list_launch(call: Call, q: torch.Tensor, k: torch.Tensor, config: TileConfig, *,
                keys_first: bool) -> tuple[tuple[Any, ...], tuple[Launch, ...]]:
    """(the tiles that a kernel of this call and configuration visits, the launches that list them): a ``TileList`` and
    (launch,), or () and () where no mask needs a list."""
    if not call.extras.keeps or 0 in (call.batch, q.shape[1], call.n_queries, call.n_keys):
        return (), ()
    heads, kv_heads = q.shape[1], k.shape[1]
    by_batch, by_head = call.masks_by
    group = heads // kv_heads if keys_first else 1
    lists = (call.batch if by_batch else 1), (heads // group if by_head else 1)
    rows = -(-call.n_keys // config.block_n) if keys_first else -(-call.n_queries // config.block_m)
    columns = -(-call.n_queries // config.block_m) if keys_first else -(-call.n_keys // config.block_n)
    entries = torch.empty(*lists, rows, columns * group, dtype=torch.int32, device=q.device)
    counts = torch.empty(*lists, rows, 2, dtype=torch.int32, device=q.device)
    extras = call.extras._replace(keeps=tuple(_alone(keep) for keep in call.extras.keeps))
    args = (entries, counts, lists[1], call.n_queries, call.n_keys, call.offset, call.left, call.right, extras,
            ListKind(group, keys_first))
    listing = Launch(list_kernel, programs(rows, 1, lists[0] * lists[1]), args, fit_offsets(config, call))
    return TileList(entries, counts, tl.constexpr(by_batch), tl.constexpr(by_head)), (listing,)
