"""The oracle: softmax(mods(scale * Q K^T)) V in plain PyTorch, simple enough to be believed at a glance.

It holds the whole matrix of scores, works on any device, is differentiable to any order, and is exact to fp64 when given
fp64; fp16 and bf16 are computed in fp32 and rounded once, at the end.
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fused_attn import saturation, tracing
from fused_attn.call.spec import NO_OTHERS, RELATIVE, TENSOR, AttentionSpec, Member, OtherTensors
from fused_attn.torch_private import known


def distances(spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
    """Int64 [Nq, Nk]: how far the position of a query and a key are apart."""
    position = torch.arange(n_queries, device=device)[:, None] + spec.offset(n_queries, n_keys)
    return (position - torch.arange(n_keys, device=device)).abs()


def window_mask(spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device,
                offset: torch.Tensor | None = None) -> torch.Tensor:
    """Bool [Nq, Nk]: True where the window keeps the key; [S, 1, Nq, Nk] with the ``offset`` [S, 1, 1, 1] of each sequence."""
    position = torch.arange(n_queries, device=device)[:, None] + (spec.offset(n_queries, n_keys) if offset is None else offset)
    key = torch.arange(n_keys, device=device)[None, :]
    keep = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if spec.window.left is not None:
        keep = keep & (key >= position - spec.window.left)
    if spec.window.right is not None:
        keep = keep & (key <= position + spec.window.right)
    return keep


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
              others: OtherTensors = NO_OTHERS) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its natural-log LSE, whatever autocast would make of the matrix products.

    q [B, H, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], packed [1, H, T, D] and so on. Returns out [B, H, Nq, Dv] in q's
    dtype and lse [B, H, Nq] in fp32 (fp64 for fp64). A row with no key gives 0 and -inf, or its sink.
    """
    packed = _padded if spec.longest is not None and tracing.traced(others.cu_q) else _packed
    run = exact if spec.longest is None else packed
    with tracing.without_autocast(q.device):
        return run(q, k, v, spec, others)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors = NO_OTHERS,
          first_batch: int = 0, offset: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention`` of a dense batch, whose entries are numbered from ``first_batch`` on; ``offset`` as in ``window_mask``."""
    p, lse = weights(q, k, spec, others, first_batch, offset)
    values = v.to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if others.used_k is not None:  # what lies past the end may be NaN, and 0 * NaN is NaN
        values = values.masked_fill(~_counted(others.used_k, v.shape[2])[:, None, :, None], 0)
    return (p @ values).to(q.dtype), lse


def weights(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, others: OtherTensors = NO_OTHERS,
            first_batch: int = 0, offset: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [B, H, Nq, Nk] in fp32 or fp64, after dropout; lse [B, H, Nq], before it) of a dense batch."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    keep = window_mask(spec, q.shape[2], k.shape[2], q.device, offset)
    keep = keep if offset is not None else keep[None, None]
    if others.used_q is not None:
        keep = keep & _counted(others.used_q, q.shape[2])[:, None, :, None]
    if others.used_k is not None:
        counted = _counted(others.used_k, k.shape[2])[:, None, None, :]
        keys, keep = keys.masked_fill(~counted.mT, 0), keep & counted

    scores = _products(q.to(dtype), keys, others.score_weight) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * saturation.tanh(scores / spec.softcap)
    operands = iter(others.operands)
    for member in spec.score_mods:
        where = _coordinates(spec, scores, first_batch, 0 if member.code.raw else offset)
        scores = _reference(member)(scores, *where, _arguments(member, operands, scores))
    for member in spec.mask_mods:
        where = _coordinates(spec, scores, first_batch, 0 if member.code.raw else offset)
        keep = keep & _reference(member)(*where, _arguments(member, operands, scores, raw=True))
    scores = scores.masked_fill(~keep, float("-inf"))

    # A sink is one more logit, of a key without a value.
    sinks = scores.new_full((1, 1, 1, 1), float("-inf"))
    if others.sinks is not None:
        sinks = others.sinks.to(dtype)[None, :, None, None]
    # The pivot of a row with no key is finite, since -inf - -inf would be NaN; with Nk = 0 there is no maximum at all.
    no_keys = known(k.shape[2] == 0)
    pivots = scores.new_full((*q.shape[:3], 1), float("-inf")) if no_keys else scores.detach()
    row_max = torch.maximum(pivots.amax(dim=-1, keepdim=True), sinks.detach()).clamp(min=torch.finfo(dtype).min)
    unnormalised = torch.exp(scores - row_max)
    row_sum = unnormalised.sum(dim=-1, keepdim=True) + torch.exp(sinks - row_max)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1)
    lse = (row_max + torch.log(row_sum)).masked_fill(empty, float("-inf"))
    p = unnormalised / row_sum
    if spec.dropout_p > 0:
        stays = dropout_mask(others.seed, spec.dropout_p, p.shape, first_batch)
        p = p * stays / (1 - spec.dropout_p) if spec.dropout_p < 1 else p * 0
    return p, lse.squeeze(-1)


def _products(q: torch.Tensor, k: torch.Tensor, score_weight: torch.Tensor | None) -> torch.Tensor:
    """Raw scores [B, H, Nq, Nk]: q . k, or sum_d w_d tanh(q_d + k_d)."""
    if score_weight is None:
        return q @ k.mT
    return saturation.additive_scores(q, k, score_weight.to(q.dtype))


def _counted(lengths: torch.Tensor, n: int) -> torch.Tensor:
    """Bool [B, n]: True for the first ``lengths`` of n."""
    return torch.arange(n, device=lengths.device)[None, :] < lengths[:, None]


def _coordinates(spec: AttentionSpec, scores: torch.Tensor, first_batch: int,
                 offset: torch.Tensor | int | None) -> tuple[torch.Tensor, ...]:
    """(q_pos, k_idx, head, batch) that broadcast against scores [B, H, Nq, Nk]; ``offset`` is the position of query 0."""
    batch, heads, n_queries, n_keys = (torch.arange(n, device=scores.device) for n in scores.shape)
    position = n_queries[:, None] + (spec.offset(scores.shape[2], scores.shape[3]) if offset is None else offset)
    return position, n_keys[None, :], heads[:, None, None], batch[:, None, None, None] + first_batch


def _reference(member: Member) -> Any:
    if member.reference is None:
        raise ValueError(f"{member.code.name}: the reference backend needs the mod's plain PyTorch reference, reference=")
    return member.reference


def _arguments(member: Member, operands: Any, scores: torch.Tensor, raw: bool = False) -> tuple[Any, ...]:
    """The arguments of a member as its reference takes them, floats in the dtype of the scores, or ``raw`` in fp32 at least."""
    n_queries, n_keys = scores.shape[2:]
    arguments = []
    for kind in member.args:
        if kind not in (TENSOR, RELATIVE):
            arguments.append(float(kind) if "." in kind or "e" in kind else int(kind))
            continue
        operand = next(operands)
        if kind == RELATIVE:  # values[..., j - i + Nq - 1]
            index = torch.arange(n_keys)[None, :] - torch.arange(n_queries)[:, None] + n_queries - 1
            operand = operand[..., index.to(operand.device)]
        if operand.is_floating_point():  # masks compare the given values, mods compute in the scores' dtype
            operand = operand.to(torch.promote_types(operand.dtype, torch.float32) if raw else scores.dtype)
        arguments.append(operand)
    return tuple(arguments)


def dropout_mask(seed: torch.Tensor, p: float, shape: torch.Size, first_batch: int = 0) -> torch.Tensor:
    """Bool [B, H, Nq, Nk]: which weights stay; the mask that the kernels draw (kernels/dropout.py)."""
    batch, heads, n_queries, n_keys = (torch.arange(n, device=seed.device) for n in shape)
    numbers = batch[:, None, None, None] + first_batch
    words = philox(seed, n_queries[:, None], n_keys[None, ::4] // 4, heads[:, None, None], numbers)
    return words[..., : shape[3]] >= min(round(p * 2**32), 2**32 - 1)


def philox(seed: torch.Tensor, *counter: torch.Tensor) -> torch.Tensor:
    """The four 32-bit words of each counter, side by side in the last dimension, by Philox 4x32-7; four tensors that broadcast
    make the counters."""
    low = 2**32 - 1

    def product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """High and low word of a 32-bit product; 64 signed bits do not hold it whole."""
        return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16, a * b & low

    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(7):
        (high0, low0), (high2, low2) = product(0xD2511F53, c0), product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack((c0, c1, c2, c3), -1).flatten(-2)


def _of_sequence(operand: torch.Tensor, batch: int, longest_q: int, n_queries: int, n_keys: int) -> torch.Tensor:
    """The part of an operand for one packed sequence: its top left corner, or the differences j - i that the sequence has."""
    operand = operand[batch : batch + 1] if operand.shape[0] > 1 else operand
    if operand.dim() == 3:
        return operand[..., longest_q - n_queries :]
    return operand[:, :, : n_queries if operand.shape[2] > 1 else 1, : n_keys if operand.shape[3] > 1 else 1]


def spans(cu: torch.Tensor, used: torch.Tensor | None, total: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of every packed sequence, none outside the ``total`` rows; waits for the device."""
    starts = cu.clamp(0, total).tolist()
    lengths = [max(stop - start, 0) for start, stop in itertools.pairwise(starts)]
    limits = lengths if used is None else used.tolist()
    return [(start, start + max(0, min(n, limit))) for start, n, limit in zip(starts, lengths, limits, strict=False)]


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors,
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence after the other; rows of no sequence give 0 and -inf."""

    longest_q, _ = spec.longest or (0, 0)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, lses, at = [], [], 0
    both = zip(spans(others.cu_q, others.used_q, q.shape[2]), spans(others.cu_k, others.used_k, k.shape[2]),
               strict=True)
    for batch, ((q0, q1), (k0, k1)) in enumerate(both):
        operands = tuple(_of_sequence(x, batch, longest_q, q1 - q0, k1 - k0) for x in others.operands)
        one = others._replace(cu_q=None, cu_k=None, used_q=None, used_k=None, operands=operands)
        out, lse = exact(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], spec, one, batch)
        outs += [q.new_zeros(1, q.shape[1], q0 - at, v.shape[3]), out]
        lses += [q.new_full((1, q.shape[1], q0 - at), float("-inf"), dtype=accumulate), lse]
        at = q1
    outs.append(q.new_zeros(1, q.shape[1], q.shape[2] - at, v.shape[3]))
    lses.append(q.new_full((1, q.shape[1], q.shape[2] - at), float("-inf"), dtype=accumulate))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def width(longest: int, x: torch.Tensor) -> int:
    """How many rows a sequence of x [1, H, T, D] has at most: all, where the longest length is still on the device."""
    return longest if known(longest <= x.shape[2]) else x.shape[2]


def _in_width(operand: torch.Tensor, longest_q: int, longest_k: int, n_queries: int, n_keys: int) -> torch.Tensor:
    """An operand for the longest sequences as one for n_queries and n_keys; what it repeats at its ends belongs to no pair."""

    def spread(x: torch.Tensor, dim: int, size: int, start: int) -> torch.Tensor:
        index = torch.arange(size, device=x.device) + start
        return x.index_select(dim, index.clamp(0, x.shape[dim] - 1))

    if known(longest_q == n_queries) and known(longest_k == n_keys):
        return operand
    if operand.dim() == 3:  # by j - i + Nq - 1
        return spread(operand, 2, n_queries + n_keys - 1, longest_q - n_queries)
    for dim, size in ((2, n_queries), (3, n_keys)):
        operand = operand if known(operand.shape[dim] == 1) else spread(operand, dim, size, 0)
    return operand


class Padded(NamedTuple):
    """Packed sequences side by side, each filled up with zeros: this can be traced while lengths have no values yet."""

    x: torch.Tensor  # [S, H, L, D]
    rows: torch.Tensor  # [S, L]: where they came from; the row after the last where they are filled up
    lengths: torch.Tensor  # [S]

    @classmethod
    def of(cls, x: torch.Tensor, cu: torch.Tensor, used: torch.Tensor | None, longest: int) -> "Padded":
        """Pads x [1, H, T, D]."""
        longest = width(longest, x)
        cu = cu.clamp(0, x.shape[2])
        lengths = cu.diff().clamp(0, longest)
        lengths = lengths if used is None else torch.minimum(lengths, used).clamp(min=0)
        index = torch.arange(longest, device=x.device)
        rows = torch.where(index < lengths[:, None], cu[:-1, None] + index, x.shape[2])
        return cls(F.pad(x[0], (0, 0, 0, 1))[:, rows].transpose(0, 1), rows, lengths)

    def offset(self, keys: "Padded", spec: AttentionSpec) -> torch.Tensor | None:
        """Position of query 0 of each sequence among its keys, [S, 1, 1, 1], where that depends on its lengths."""
        return (keys.lengths - self.lengths)[:, None, None, None] if spec.bottom_right else None

    def packed(self, y: torch.Tensor, n_rows: int, fill: float) -> torch.Tensor:
        """y [S, H, L, ...] as [1, H, T, ...], with ``fill`` in rows of no sequence."""
        empty = y.new_full((y.shape[1], n_rows + 1, *y.shape[3:]), fill)
        return empty.index_copy(1, self.rows.flatten(), y.transpose(0, 1).flatten(1, 2))[None, :, :-1]


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors,
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """``_packed`` for all sequences at once, without reading their lengths."""
    longest_q, longest_k = spec.longest or (0, 0)
    queries = Padded.of(q, others.cu_q, others.used_q, longest_q)
    keys, values = (Padded.of(x, others.cu_k, others.used_k, longest_k) for x in (k, v))
    operands = tuple(_in_width(x, longest_q, longest_k, width(longest_q, q), width(longest_k, k)) for x in others.operands)
    dense = others._replace(cu_q=None, cu_k=None, used_q=queries.lengths, used_k=keys.lengths, operands=operands)
    out, lse = exact(queries.x, keys.x, values.x, spec, dense, offset=queries.offset(keys, spec))
    return queries.packed(out, q.shape[2], 0), queries.packed(lse, q.shape[2], float("-inf"))
