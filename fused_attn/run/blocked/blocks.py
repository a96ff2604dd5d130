"""Blocks of a dense batch: some queries, and the keys that any of them sees."""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch

from fused_attn.call.spec import RELATIVE, TENSOR, AttentionSpec, Member, OtherTensors

Keys: TypeAlias = slice | torch.Tensor  # a range of keys, or their indices in rising order
# Which pairs do not attend: for some of a block's columns, a mask that broadcasts to [b, h, m, columns]; the others all attend.
Hidden: TypeAlias = tuple[tuple[slice, torch.Tensor], ...]
_SPARSE = 0.75  # a mask that leaves fewer than this part of a range's keys has them gathered


class Dense(NamedTuple):
    """A dense batch, or some of its entries and heads: of a call, or of packed sequences side by side.

    ``offset`` is the position of query 0 among the keys, a number or [B, 1, 1, 1]; ``numbers`` [B] and ``heads`` [H] are batch
    entries and heads as dropout, score mods and masks count them. Sequences of ``others.used_q`` and ``used_k`` tokens are
    filled up with zeros where ``padded``; else what follows ``used_k`` may be anything.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    spec: AttentionSpec
    others: OtherTensors
    offset: Any
    numbers: torch.Tensor
    heads: torch.Tensor
    padded: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors) -> "Dense":
        """The batch of a call that is not packed."""
        numbers, heads = (torch.arange(n, device=q.device) for n in q.shape[:2])
        return cls(q, k, v, spec, others, spec.offset(q.shape[2], k.shape[2]), numbers, heads)

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic and of the LSE."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def cut(self, role: str, x: Any, entries: slice, heads: slice) -> Any:
        """What belongs to some batch entries and query heads of a tensor, or None of None."""
        if x is None:
            return None
        if role == "keys":
            heads = slice(heads.start // self.group, -(-heads.stop // self.group))
        if role == "heads":
            return x[heads]
        if role == "entries":
            return x[entries]
        return x[tuple(index if size > 1 else slice(None) for index, size in zip((entries, heads), x.shape, strict=False))]

    def part(self, entries: slice, heads: slice) -> "Dense":
        """Some batch entries and query heads, which lie within one group or are whole groups."""
        others = self.others
        operands = tuple(self.cut("operand", x, entries, heads) for x in others.operands)
        used_q, used_k = (self.cut("entries", x, entries, heads) for x in (others.used_q, others.used_k))
        sinks, weight = (self.cut("heads", x, entries, heads) for x in (others.sinks, others.score_weight))
        return self._replace(
            q=self.cut("queries", self.q, entries, heads), k=self.cut("keys", self.k, entries, heads),
            v=self.cut("keys", self.v, entries, heads), numbers=self.numbers[entries], heads=self.heads[heads],
            offset=self.offset[entries] if isinstance(self.offset, torch.Tensor) else self.offset,
            others=others._replace(operands=operands, used_q=used_q, used_k=used_k, sinks=sinks, score_weight=weight))


class Block(NamedTuple):
    """A part of the scores [B, H, Nq, Nk] of a dense batch."""

    rows: slice
    keys: Keys
    n_queries: int  # of the batch

    @property
    def first(self) -> int:
        """The first key."""
        return self.keys.start if isinstance(self.keys, slice) else int(self.keys[0])

    @property
    def stop(self) -> int:
        """The key after the last."""
        return self.keys.stop if isinstance(self.keys, slice) else int(self.keys[-1]) + 1

    @property
    def n_keys(self) -> int:
        """How many there are."""
        return self.keys.stop - self.keys.start if isinstance(self.keys, slice) else len(self.keys)

    def of(self, role: str, x: torch.Tensor) -> torch.Tensor:
        """What belongs to the block of a tensor: of ``queries`` [B, H, Nq, ...], of ``keys`` [B, Hkv, Nk, D], of ``heads``
        [H, ...], of an ``operand`` [B', H', Nq', Nk'], of ``relative`` values [B', H', Nq + Nk - 1]."""
        if role == "heads":
            return x
        if role == "relative":  # from the least difference k - q to the greatest
            return x[..., self._differences()]
        if role == "queries":
            return x[:, :, self.rows]
        if role == "operand":
            x = x[:, :, self.rows] if x.shape[2] > 1 else x
            if x.shape[3] == 1:
                return x
        dim = 2 if role == "keys" else 3
        if isinstance(self.keys, slice):
            return x[(slice(None),) * dim + (self.keys,)]
        return x.index_select(dim, self.keys)

    def add(self, role: str, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Adds a part to what belongs to the block of ``whole``."""
        gathered = role == "keys" or (role == "operand" and whole.shape[3] > 1)
        if isinstance(self.keys, slice) or not gathered:
            self.of(role, whole).add_(part)
        elif role == "keys":
            whole.index_add_(2, self.keys, part.to(whole.dtype))
        else:
            (whole[:, :, self.rows] if whole.shape[2] > 1 else whole).index_add_(3, self.keys, part.to(whole.dtype))

    def _differences(self) -> slice:
        return slice(self.first - self.rows.stop + self.n_queries, self.stop - 1 - self.rows.start + self.n_queries)

    def by_pairs(self, x: torch.Tensor) -> torch.Tensor:
        """[b', h', m, n] of the block's relative values."""
        if isinstance(self.keys, slice):
            return x.unfold(-1, self.n_keys, 1).flip(-2)
        rows = torch.arange(self.rows.stop - self.rows.start - 1, -1, -1, device=x.device)
        return x[..., rows[:, None] + (self.keys - self.first)]


def roles(members: tuple[Member, ...]) -> tuple[str, ...]:
    """How the operands of some members are cut into blocks."""
    return tuple("operand" if kind == TENSOR else "relative"
                 for member in members for kind in member.args if kind in (TENSOR, RELATIVE))


def arguments(member: Member, operands: Iterator[torch.Tensor], block: Block, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """The arguments of a member for a block, of operands cut to it: floats in ``dtype``, or in fp32 at least."""
    found: list[Any] = []
    for kind in member.args:
        if kind not in (TENSOR, RELATIVE):
            found.append(float(kind) if "." in kind or "e" in kind else int(kind))
            continue
        x = next(operands)
        x = block.by_pairs(x) if kind == RELATIVE else x
        if x.is_floating_point():
            x = x.to(dtype or torch.promote_types(x.dtype, torch.float32))
        found.append(x)
    return tuple(found)


def reference(member: Member) -> Any:
    """The plain PyTorch function of a member."""
    if member.reference is None:
        raise ValueError(f"{member.code.name}: the blocked backend needs the mod's plain PyTorch reference, reference=")
    return member.reference


def coordinates(batch: Dense, block: Block, raw: bool = False) -> tuple[torch.Tensor, ...]:
    """(q_pos, k_idx, head, batch) of a block, as mods take them, that broadcast to [b, h, m, n]; ``raw``: a query's index."""
    device = batch.q.device
    rows = torch.arange(block.rows.start, block.rows.stop, device=device)[:, None]
    if batch.padded and batch.others.used_q is not None:  # positions of no query may lie outside of what mods look up
        rows = torch.minimum(rows, batch.others.used_q[:, None, None, None] - 1)
    keys = torch.arange(block.first, block.stop, device=device) if isinstance(block.keys, slice) else block.keys
    return (rows if raw else rows + batch.offset), keys[None, :], batch.heads[:, None, None], batch.numbers[:, None, None, None]


def shape_of_window(batch: Dense, block: Block) -> tuple[int, int, int] | None:
    """What blocks have in common in which a window hides the same pairs, or None where more than a window tells."""
    if batch.spec.mask_mods or batch.others.used_k is not None:
        return None
    return block.rows.stop - block.rows.start, block.n_keys, block.first - block.rows.start


def see(batch: Dense, rows: slice, known: dict[Any, Hidden] | None = None) -> tuple[Block, Hidden]:
    """The block of some queries, and which of its pairs do not attend; ``known`` keeps that of blocks of one shape.

    Keys that no pair of the block attends to are no part of it, as far as that saves any.
    """
    block = Block(rows, _within_reach(batch, rows), batch.q.shape[2])
    if not block.n_keys:
        return block, ()
    if not batch.spec.mask_mods:
        shape = None if known is None else shape_of_window(batch, block)
        if known is None or shape is None:
            return block, tuple(_edges(batch, block))
        if shape not in known:
            known.clear()  # the next blocks have the shape of this one, or none comes twice
            known[shape] = tuple(_edges(batch, block))
        return block, known[shape]
    keep = _kept(batch, block)
    indices = keep.flatten(0, -2).any(0).nonzero()[:, 0]
    if not len(indices):
        return block._replace(keys=slice(block.first, block.first)), ()
    low, high = int(indices[0]), int(indices[-1]) + 1
    if len(indices) < _SPARSE * (high - low):
        block, keep = block._replace(keys=indices + block.first), keep.index_select(-1, indices)
    else:
        block, keep = block._replace(keys=slice(block.first + low, block.first + high)), keep[..., low:high]
    return block, () if bool(keep.all()) else ((slice(0, block.n_keys), ~keep),)


def _offsets(batch: Dense) -> tuple[int, int]:
    """The least and the greatest position of query 0."""
    if not isinstance(batch.offset, torch.Tensor):
        return batch.offset, batch.offset
    least, most = batch.offset.aminmax()
    return int(least), int(most)


def _within_reach(batch: Dense, rows: slice) -> slice:
    """The range of keys that window and lengths leave to some queries."""
    left, right = batch.spec.window
    least, most = _offsets(batch)
    first = 0 if left is None else max(0, rows.start + least - left)
    stop = batch.k.shape[2] if right is None else min(batch.k.shape[2], rows.stop + most + right)
    if batch.others.used_k is not None:
        stop = min(stop, int(batch.others.used_k.max()))
    return slice(first, max(first, stop)) if first < batch.k.shape[2] else slice(0, 0)


def _edges(batch: Dense, block: Block) -> Iterator[tuple[slice, torch.Tensor]]:
    """What window and lengths hide in a block: columns at its edges."""
    (left, right), used, rows = batch.spec.window, batch.others.used_k, block.rows
    least, most = _offsets(batch)
    position = torch.arange(rows.start, rows.stop, device=batch.q.device)[:, None] + batch.offset
    key = torch.arange(block.first, block.stop, device=batch.q.device)[None, :]
    if left is not None and (stop := min(block.stop, rows.stop - 1 + most - left)) > block.first:
        columns = slice(0, stop - block.first)
        yield columns, _four(key[:, columns] < position - left)
    if right is not None and (start := max(block.first, rows.start + least + right + 1)) < block.stop:
        columns = slice(start - block.first, block.n_keys)
        yield columns, _four(key[:, columns] > position + right)
    if used is not None and (start := max(block.first, int(used.min()))) < block.stop:
        columns = slice(start - block.first, block.n_keys)
        yield columns, key[:, columns] >= used[:, None, None, None]


def _four(x: torch.Tensor) -> torch.Tensor:
    return x[(None,) * (4 - x.dim())]


def _kept(batch: Dense, block: Block) -> torch.Tensor:
    """Which pairs of a block attend [b', h', m', n], by everything that tells."""
    others = batch.others
    keep = torch.ones(1, 1, 1, block.n_keys, dtype=torch.bool, device=batch.q.device)
    given = iter(others.operands[len(roles(batch.spec.score_mods)):])
    for member in batch.spec.mask_mods:
        mine = iter([block.of(role, next(given)) for role in roles((member,))])
        where = coordinates(batch, block, member.code.raw)
        keep = keep & reference(member)(*where, arguments(member, mine, block, None))
    edges = list(_edges(batch, block))
    if edges:  # which may hide more in other batch entries, heads and rows than the masks do
        shape = torch.broadcast_shapes(keep.shape, *((*hidden.shape[:-1], 1) for _, hidden in edges))
        keep = keep.expand(shape).clone()
        for columns, hidden in edges:
            keep[..., columns] &= ~hidden
    return keep


def whole(hidden: Hidden, n_keys: int) -> torch.Tensor:
    """Which pairs do not attend, as one mask [b', h', m', n] of all columns."""
    shape = torch.broadcast_shapes(*((*mask.shape[:-1], 1) for _, mask in hidden))
    result = torch.zeros(*shape[:-1], n_keys, dtype=torch.bool, device=hidden[0][1].device)
    for columns, mask in hidden:
        result[..., columns] |= mask
    return result
