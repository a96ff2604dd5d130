"""The loops over the blocks of a dense batch: one after the other, into results that exist from the beginning."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fused_attn.call.schema import Needs
from fused_attn.run.blocked import by_kernel, dropout
from fused_attn.run.blocked.blocks import Block, Dense, Hidden, roles, see
from fused_attn.run.blocked.tile import Gradients, Tile, attend, gradients

# Measured on one and two cores with 1 MiB of second-level cache each, which as many scores a thread fill.
SCORES = 2**18
ROWS = 64  # fewer make products slow; more hold more keys at the edges of a window that half of them do not see
KERNEL_ROWS = 256  # of torch's kernel, which cuts them once more
ROLES = ("queries", "keys", "keys", "heads", "heads")  # of q, k, v, sinks and the weight of an additive score


class Sizes(NamedTuple):
    """How a batch is cut: batch entries, key heads, query heads among these and queries of a block at most."""

    entries: int
    kv_heads: int
    heads: int
    rows: int

    @classmethod
    def of(cls, batch: Dense, kernel: bool) -> "Sizes":
        """For blocks by torch's kernel, which shares them among its threads itself, or by plain operations."""
        (entries, n_heads, n_queries, dim), (n_kv_heads, n_keys), group = batch.q.shape, batch.k.shape[1:3], batch.group
        if 0 in (entries, n_heads, n_queries):
            return cls(1, 1, 1, 1)
        left, right = batch.spec.window
        width = n_keys if left is None or right is None else min(n_keys, left + right + 1)
        ragged = batch.others.used_k is not None and not batch.padded  # an entry alone has a length, and needs no mask
        if kernel:
            rows = max(32, min(KERNEL_ROWS, width // 4 // 32 * 32))
            entries = 1 if ragged or group > 1 else entries
            if by_kernel.takes_whole(batch):
                rows = n_queries
            elif batch.spec.score_mods:
                rows = min(rows, 128)  # since there is a mask for every head
            return cls(entries, n_kv_heads, n_heads, max(1, min(rows, n_queries)))
        rows = max(1, min(n_queries, max(1, ROWS // group)))
        if dropout.drawn_by_torch(batch):
            return cls(1, 1, 1, rows)
        scores = SCORES * (torch.get_num_threads() if batch.q.device.type == "cpu" else 64)
        if batch.others.score_weight is not None:
            scores //= dim  # of which a sum for each of the columns is held
        kv_heads = max(1, scores // max(1, group * rows * min(width + rows, n_keys)))
        if kv_heads > entries * n_kv_heads and width == n_keys:
            rows = min(n_queries, rows * (kv_heads // (entries * n_kv_heads)))
        entries = 1 if ragged else max(1, min(entries, kv_heads // n_kv_heads))
        return cls(entries, min(kv_heads, n_kv_heads), min(kv_heads, n_kv_heads) * group, rows)


def parts(start: int, stop: int, step: int) -> Iterator[slice]:
    """The ranges of ``step`` that one falls into."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def chunks(batch: Dense, sizes: Sizes) -> Iterator[tuple[slice, slice, list[slice]]]:
    """(batch entries, key heads, [query heads of theirs, part by part])."""
    for entries in parts(0, batch.q.shape[0], sizes.entries):
        for kv in parts(0, batch.k.shape[1], sizes.kv_heads):
            yield entries, kv, list(parts(kv.start * batch.group, kv.stop * batch.group, sizes.heads))


def _wide(batch: Dense, kernel: bool) -> Dense:
    """A part of a batch with keys and values in the dtype of the arithmetic: converted once, and not for every block."""
    return batch if kernel else batch._replace(k=batch.k.to(batch.dtype), v=batch.v.to(batch.dtype))


def _seen(batch: Dense, rows: slice, kernel: bool, known: dict[Any, Hidden]) -> tuple[Block, Hidden]:
    """The block of some queries; the whole batch where torch's kernel has its own mask for it."""
    if kernel and by_kernel.has_causal(batch):
        return Block(rows, slice(0, batch.k.shape[2]), batch.q.shape[2]), ()
    return see(batch, rows, known)


def forward(batch: Dense, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Writes out [B, H, Nq, Dv] and lse [B, H, Nq] of a batch, in whatever dtypes they have."""
    kernel = by_kernel.takes_forward(batch)
    sizes, stays = Sizes.of(batch, kernel), dropout.of(batch)
    known: dict[Any, Hidden] = {}
    masks: by_kernel.Masks = {}
    for entries, _, each in chunks(batch, sizes):
        for heads in each:
            part = _wide(batch.part(entries, heads), kernel)
            for rows in parts(0, part.q.shape[2], sizes.rows):
                block, hidden = _seen(part, rows, kernel, known)
                if kernel and block.n_keys:
                    found = by_kernel.forward(part, block, hidden, masks)
                else:
                    found = attend(Tile.of(part, block, hidden, stays))
                out[entries, heads, rows], lse[entries, heads, rows] = found
    if isinstance(stays, dropout.ByTorch):
        stays.leave()


def backward(batch: Dense, dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, needs: Needs,
             grads: Gradients) -> None:
    """Adds the gradients of a batch to ``grads``, whose dq, dk and dv may hold anything before."""
    kernel = by_kernel.takes_backward(batch, dlse, lse, needs) and needs.dq + needs.dk + needs.dv > 1
    sizes, stays = Sizes.of(batch, kernel), dropout.of(batch)
    if kernel and batch.q.dtype != batch.dtype:  # sums in fp32 for a quarter of the heads at a time
        kv_heads = -(-sizes.kv_heads // 4)
        sizes = sizes._replace(kv_heads=kv_heads, heads=kv_heads * batch.group)
    known: dict[Any, Hidden] = {}
    masks: by_kernel.Masks = {}
    for entries, kv, each in chunks(batch, sizes):
        sums = [None if x is None else x[entries, kv].zero_() if x.dtype == batch.dtype
                else torch.zeros(x[entries, kv].shape, dtype=batch.dtype, device=x.device) for x in (grads.k, grads.v)]
        for heads in each:
            part = _wide(batch.part(entries, heads), kernel)
            mine = _part(batch, grads, entries, heads)._replace(k=sums[0], v=sums[1])
            douts, outs, lses = (x[entries, heads] for x in (dout, out, lse))
            dlses = None if dlse is None else dlse[entries, heads]
            for rows in parts(0, part.q.shape[2], sizes.rows):
                block, hidden = _seen(part, rows, kernel, known)
                if kernel and block.n_keys:
                    dq, dk, dv = by_kernel.backward(part, block, hidden, masks, douts[:, :, rows], outs[:, :, rows],
                                                    lses[:, :, rows])
                    found = Gradients(dq, dk, dv, None, None, ())
                    if needs.dsinks:
                        found = found._replace(sinks=_of_sinks(part, douts[:, :, rows], outs[:, :, rows], lses[:, :, rows]))
                else:
                    more = None if dlses is None else dlses[:, :, rows]
                    found = gradients(Tile.of(part, block, hidden, stays), douts[:, :, rows], more, needs)
                _add(part, block, mine, found)
        for whole, total in zip((grads.k, grads.v), sums, strict=True):
            if whole is not None and total is not None and total.dtype != whole.dtype:
                whole[entries, kv] = total


def _part(batch: Dense, grads: Gradients, entries: slice, heads: slice) -> Gradients:
    """What belongs to some batch entries and heads of the gradients, as views."""
    *single, operands = grads
    q, k, v, sinks, weight = (batch.cut(role, x, entries, heads) for role, x in zip(ROLES, single, strict=True))
    return Gradients(q, k, v, sinks, weight, tuple(batch.cut("operand", x, entries, heads) for x in operands))


def _add(batch: Dense, block: Block, whole: Gradients, found: Gradients) -> None:
    """Adds what a block gives; the rows of dq are those of no other block."""
    if whole.q is not None:
        whole.q[:, :, block.rows] = found.q
    each = zip((*ROLES[1:], *roles(batch.spec.score_mods)), (*whole[1:5], *whole.operands), (*found[1:5], *found.operands),
               strict=False)
    for role, into, part in each:
        if into is not None:
            block.add(role, into, part)


def _of_sinks(batch: Dense, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Any:
    """- sum of p_sink delta, [h]."""
    delta = (dout * out).sum(-1)
    return -(torch.exp(batch.others.sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0) * delta).sum((0, 2))
