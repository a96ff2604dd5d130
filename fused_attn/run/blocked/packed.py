"""Packed sequences as dense batches: long ones alone, short ones of about one length side by side."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch

from fused_attn.call.schema import Needs
from fused_attn.call.spec import AttentionSpec, OtherTensors
from fused_attn.reference import spans
from fused_attn.run.blocked import dense
from fused_attn.run.blocked.blocks import Dense, roles
from fused_attn.run.blocked.tile import Gradients

LONG = 2**17  # scores of a sequence that is no quicker beside others
TOKENS = 2**13  # of sequences side by side, which are copies
Rows: TypeAlias = slice | torch.Tensor  # of packed tensors: those of one sequence, or [S, L] of several, -1 where one has ended


class Packed(NamedTuple):
    """Some sequences of a call and the rows that they own."""

    batch: Dense
    sequences: slice | torch.Tensor
    queries: Rows
    keys: Rows


def _length_class(n: int, longest: int) -> int:
    """The length that a sequence is filled up to: at most a quarter more, and no longer than the longest."""
    step = max(8, 2 ** (n.bit_length() - 3))
    return min(longest, -(-n // step) * step)


def _take(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[S, H, L, ...] of packed x [1, H, T, ...]: zeros where a sequence has ended."""
    if isinstance(rows, slice):
        return x[:, :, rows]
    taken = x[0].index_select(1, rows.clamp(min=0).flatten()).unflatten(1, tuple(rows.shape)).transpose(0, 1)
    over = rows < 0
    return taken.masked_fill(over.view(rows.shape[0], 1, rows.shape[1], *[1] * (x.dim() - 3)), 0) if over.any() else taken


def _put(x: torch.Tensor, rows: Rows, part: torch.Tensor) -> None:
    """The inverse of ``_take``."""
    if isinstance(rows, slice):
        x[:, :, rows] = part
        return
    inside = rows >= 0
    x[0][:, rows[inside]] = part.transpose(0, 1)[:, inside].to(x.dtype)


def _cut(x: torch.Tensor, sequences: slice | torch.Tensor, role: str, spec: AttentionSpec, n_queries: int, n_keys: int,
         ) -> torch.Tensor:
    """An operand of the longest sequences for some of them: its top left corner, or its differences from theirs on."""
    x = x[sequences] if x.shape[0] > 1 else x
    if role == "relative":
        assert spec.longest is not None
        return x[..., spec.longest.queries - n_queries:][..., : max(0, n_queries + n_keys - 1)]
    return x[:, :, : n_queries if x.shape[2] > 1 else 1, : n_keys if x.shape[3] > 1 else 1]


def _rows(owned: list[tuple[int, int]], length: int, device: torch.device) -> torch.Tensor:
    """[S, L]: the rows of sequences (first, stop)."""
    first, stop = torch.tensor(owned, device=device)[:, :, None].unbind(1)
    rows = first + torch.arange(length, device=device)
    return torch.where(rows < stop, rows, -1)


def batches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors) -> Iterator[Packed]:
    """The sequences of a call that have queries, as dense batches."""
    assert spec.longest is not None
    owned = list(zip(spans(others.cu_q, others.used_q, q.shape[2]), spans(others.cu_k, others.used_k, k.shape[2]), strict=True))
    together: dict[tuple[int, int], list[int]] = defaultdict(list)
    for sequence, ((q0, q1), (k0, k1)) in enumerate(owned):
        n_queries, n_keys = q1 - q0, k1 - k0
        if not n_queries:
            continue
        if n_queries * n_keys >= LONG:
            together[-1, sequence].append(sequence)
        else:
            together[_length_class(n_queries, spec.longest.queries), _length_class(n_keys, spec.longest.keys)].append(sequence)
    for (n_queries, n_keys), members in together.items():
        step = max(1, TOKENS // max(1, n_queries + n_keys))
        for i in range(0, len(members), step):
            yield _batch(q, k, v, spec, others, members[i : i + step], owned, n_queries, n_keys)


def _batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors, members: list[int],
           owned: list[tuple[tuple[int, int], tuple[int, int]]], n_queries: int, n_keys: int) -> Packed:
    """Some sequences of a call as one batch, filled up to n_queries and n_keys; a single one as it lies in memory."""
    of_queries, of_keys = ([owned[i][side] for i in members] for side in (0, 1))
    sequences: slice | torch.Tensor
    queries: Rows
    keys: Rows
    offset: Any
    used_q = used_k = None
    if len(members) == 1:
        sequences, queries, keys = slice(members[0], members[0] + 1), slice(*of_queries[0]), slice(*of_keys[0])
        n_queries, n_keys = queries.stop - queries.start, keys.stop - keys.start
        offset = spec.offset(n_queries, n_keys)
    else:
        sequences = torch.tensor(members, device=q.device)
        queries, keys = _rows(of_queries, n_queries, q.device), _rows(of_keys, n_keys, q.device)
        offset = spec.offset(n_queries, n_keys)
        if bool((queries < 0).any()) or bool((keys < 0).any()):
            used_q, used_k = ((rows >= 0).sum(1) for rows in (queries, keys))
            offset = (used_k - used_q)[:, None, None, None] if spec.bottom_right else 0
    of_mods = (*roles(spec.score_mods), *roles(spec.mask_mods))
    operands = tuple(_cut(x, sequences, role, spec, n_queries, n_keys)
                     for role, x in zip(of_mods, others.operands, strict=True))
    rest = others._replace(cu_q=None, cu_k=None, used_q=used_q, used_k=used_k, operands=operands)
    q, k, v = (_take(x, rows) for x, rows in ((q, queries), (k, keys), (v, keys)))
    batch = Dense.of(q, k, v, spec._replace(longest=None), rest)
    numbers = torch.tensor(members, device=q.device)
    return Packed(batch._replace(offset=offset, numbers=numbers, padded=True), sequences, queries, keys)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors, out: torch.Tensor,
            lse: torch.Tensor) -> None:
    """Writes out [1, H, T, Dv] and lse [1, H, T]; rows of no sequence give 0 and -inf."""
    out.zero_()
    lse.fill_(-torch.inf)
    for batch, _, queries, _ in batches(q, k, v, spec, others):
        if isinstance(queries, slice):
            dense.forward(batch, out[:, :, queries], lse[:, :, queries])
            continue
        outs, lses = batch.q.new_empty(*batch.q.shape[:3], v.shape[3]), lse.new_empty(batch.q.shape[:3])
        dense.forward(batch, outs, lses)
        _put(out, queries, outs)
        _put(lse, queries, lses)


def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors, dout: torch.Tensor,
             dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, needs: Needs, grads: Gradients) -> None:
    """Adds the gradients to ``grads``, whose dq, dk and dv may hold anything before."""
    for x in grads[:3]:
        if x is not None:
            x.zero_()
    of_mods = roles(spec.score_mods)
    for batch, sequences, queries, keys in batches(q, k, v, spec, others):
        douts, outs, lses = (_take(x, queries) for x in (dout, out, lse))
        dlses = None if dlse is None else _take(dlse, queries)
        if isinstance(queries, slice):
            made_of: list[Any] = [None if x is None else x[:, :, rows]
                                  for x, rows in ((grads.q, queries), (grads.k, keys), (grads.v, keys))]
        else:
            made_of = [None if x is None else torch.empty_like(of) for x, of in zip(grads[:3], batch[:3], strict=True)]
        dq, dk, dv = made_of
        sizes = batch.q.shape[2], batch.k.shape[2]
        whole: list[Any] = [None if x is None else _cut(x, slice(None), role, spec, *sizes)
                 for role, x in zip(of_mods, grads.operands, strict=False)]  # views, of all sequences
        alone = [x is not None and x.shape[0] > 1 for x in whole]
        parts = tuple(None if x is None else x[sequences].zero_() if one and isinstance(sequences, torch.Tensor)
                      else x[sequences] if one else x for x, one in zip(whole, alone, strict=True))
        dense.backward(batch, douts, dlses, outs, lses, needs, Gradients(dq, dk, dv, grads.sinks, grads.weight, parts))
        if not isinstance(queries, slice):
            for total, rows, made in ((grads.q, queries, dq), (grads.k, keys, dk), (grads.v, keys, dv)):
                if total is not None:
                    _put(total, rows, made)
        for into, part, one in zip(whole, parts, alone, strict=True):
            if one and isinstance(sequences, torch.Tensor):
                into[sequences] += part
