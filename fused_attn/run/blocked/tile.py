"""The arithmetic of one block: its rows of the output, and its part of every gradient.

Source: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", appendix B.4.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fused_attn import saturation, torch_private
from fused_attn.call import mods
from fused_attn.call.schema import Needs
from fused_attn.call.spec import Member
from fused_attn.run.blocked.blocks import Block, Dense, Hidden, arguments, coordinates, reference, roles, whole
from fused_attn.run.blocked.dropout import Stays

_LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """A block with its parts of the tensors of a call, in the dtype of the arithmetic where they are multiplied."""

    q: torch.Tensor  # [b, h, m, D]
    k: torch.Tensor  # [b, hk, n, D]
    v: torch.Tensor  # [b, hk, n, Dv]
    sinks: Any  # [h] or None
    weight: Any  # of an additive score, [h, D], or None
    operands: tuple[torch.Tensor, ...]  # of the score mods, as given
    hidden: Hidden  # which pairs do not attend
    stays: torch.Tensor | None  # which weights dropout leaves, [b, h, m, n]
    batch: Dense
    block: Block

    @classmethod
    def of(cls, batch: Dense, block: Block, hidden: Hidden, stays: Stays | None) -> "Tile":
        """The tile of a block; k, v are those of ``batch``, which may be in the dtype of the arithmetic already."""
        operands = cut(batch, block)
        sinks, weight = (None if x is None else x.to(batch.dtype) for x in (batch.others.sinks, batch.others.score_weight))
        each = (("queries", batch.q), ("keys", batch.k), ("keys", batch.v))
        q, k, v = (block.of(role, x).to(batch.dtype) for role, x in each)
        return cls(q, k, v, sinks, weight, operands, hidden, None if stays is None else stays(batch, block), batch, block)


def cut(batch: Dense, block: Block) -> tuple[torch.Tensor, ...]:
    """The parts of the score mods' operands that belong to a block."""
    each = zip(roles(batch.spec.score_mods), batch.others.operands, strict=False)
    return tuple(block.of(role, x) for role, x in each)


def _folded(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """x [b, h, m, D] with the queries of a group of heads as one, [b * hk, h / hk * m, D]."""
    entries, n_kv_heads = tile.k.shape[:2]
    return x.reshape(entries * n_kv_heads, x.shape[1] // n_kv_heads * x.shape[2], x.shape[3])


def _flat(x: torch.Tensor) -> torch.Tensor:
    """x [b, hk, n, D] as a batch of matrices."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _raw(tile: Tile) -> torch.Tensor:
    """Scores q . k, or sum_d w_d tanh(q_d + k_d), [b, h, m, n], scaled; under a softcap, twice their part of the cap."""
    spec, limit = tile.batch.spec, torch.finfo(tile.q.dtype).max
    scale = spec.scale if spec.softcap is None else max(-limit, min(2 * spec.scale / spec.softcap, limit))
    if tile.weight is not None:
        keys = tile.k.repeat_interleave(tile.q.shape[1] // tile.k.shape[1], 1)
        return saturation.additive_scores(tile.q, keys, tile.weight) * scale
    q, k = _folded(tile.q, tile), _flat(tile.k)
    return torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale).view(*tile.q.shape[:3], tile.k.shape[2])


def _capped(raw: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(x) of 2 x, by e / (e + 2) with e = exp(2 x) - 1: it keeps the digits of a small x, and is quicker."""
    if cap is None:
        return raw
    if torch.is_grad_enabled():
        return cap * saturation.tanh(raw / 2)
    e = torch.clamp(raw, max=80).expm1_()  # from where on the quotient is 1
    return e.div_(e + 2).mul_(cap)


def summands(members: tuple[Member, ...]) -> bool:
    """Whether all of some score mods add something to the score, whatever it is."""
    return all(member.code.adds for member in members)


def added(batch: Dense, block: Block, operands: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """What score mods that add something add to the scores of a block, [b', h', m', n'], of their operands cut to it."""
    given = iter(operands)
    total = torch.zeros(1, 1, 1, 1, dtype=dtype, device=batch.q.device)
    for i, member in enumerate(batch.spec.score_mods):
        found = arguments(member, given, block, dtype)
        if i == 0 and member.code == mods.BIAS.code:
            total = found[0]
        else:
            total = reference(member)(total, *coordinates(batch, block, member.code.raw), found)
    return total


def _modded(scores: torch.Tensor, operands: tuple[torch.Tensor, ...], tile: Tile) -> torch.Tensor:
    """Scores after the score mods of a call."""
    given = iter(operands)
    for member in tile.batch.spec.score_mods:
        where = coordinates(tile.batch, tile.block, member.code.raw)
        found = reference(member)(scores, *where, arguments(member, given, tile.block, scores.dtype))
        scores = found.to(scores.dtype).expand(scores.shape)
    return scores


def _scores(tile: Tile) -> tuple[torch.Tensor, bool]:
    """(scores after softcap and score mods, whether nobody else has them)."""
    spec, derived = tile.batch.spec, torch.is_grad_enabled()
    scores = _capped(_raw(tile), spec.softcap)
    if not spec.score_mods:
        return scores, not derived
    if not derived and summands(spec.score_mods):
        return scores.add_(added(tile.batch, tile.block, tile.operands, scores.dtype)), True
    return _modded(scores, tile.operands, tile), False


class _Softmax(NamedTuple):
    """Weights are unnormalised / row_sum, and unnormalised = exp(score - pivot)."""

    unnormalised: torch.Tensor  # [b, h, m, n]
    pivot: torch.Tensor  # [b, h, m, 1]
    row_sum: torch.Tensor  # [b, h, m, 1], sinks included; 1 in a row without a key


def _masked(scores: torch.Tensor, tile: Tile, own: bool) -> torch.Tensor:
    """Scores with -inf where a pair does not attend."""
    if not tile.hidden:
        return scores
    if not own:
        return scores.masked_fill(whole(tile.hidden, scores.shape[-1]), -torch.inf)
    for columns, mask in tile.hidden:
        if 2 * mask.shape[-1] < scores.shape[-1]:
            scores[..., columns].masked_fill_(mask, -torch.inf)
        else:  # which torch vectorises; a score that is NaN stays NaN, and _softmax looks again
            torch.minimum(scores[..., columns], torch.where(mask, -torch.inf, torch.inf).to(scores.dtype),
                          out=scores[..., columns])
    return scores


def _softmax(scores: torch.Tensor, tile: Tile, own: bool) -> tuple[_Softmax, torch.Tensor]:
    """The softmax of scores, and which rows are empty [b, h, m, 1]. ``own``: nobody else has ``scores``, or derives from them.

    The pivot of a row without a key is finite, since -inf - -inf would be NaN.
    """
    scores = _masked(scores, tile, own)
    rows = (*scores.shape[:3], 1)
    pivot = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full(rows, -torch.inf)
    if own and tile.hidden and bool(pivot.isnan().any()):
        scores.masked_fill_(whole(tile.hidden, scores.shape[-1]), -torch.inf)
        pivot = scores.amax(-1, keepdim=True)
    sinks = None if tile.sinks is None else tile.sinks[:, None, None]
    if sinks is not None:
        pivot = torch.maximum(pivot, sinks.detach())
    pivot = pivot.clamp(min=torch.finfo(scores.dtype).min)
    unnormalised = _exp_(scores.sub_(pivot)) if own else torch.exp(scores - pivot)
    row_sum = unnormalised.sum(-1, keepdim=True)
    if sinks is not None:
        row_sum = row_sum + torch.exp(sinks - pivot)
    empty = row_sum == 0
    return _Softmax(unnormalised, pivot, row_sum.masked_fill(empty, 1)), empty


def _exp_(x: torch.Tensor) -> torch.Tensor:
    """exp(x) in place of x, by exp2, which torch vectorises."""
    return x.mul_(_LOG2_E).exp2_()


def attend(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [b, h, m, Dv], lse [b, h, m]) of a block, in the dtype of the arithmetic; of plain operations, so that autograd
    derives from it."""
    scores, own = _scores(tile)
    (weights, pivot, row_sum), empty = _softmax(scores, tile, own)
    if tile.stays is not None:
        weights = weights * tile.stays
    summed = torch.bmm(_folded(weights, tile), _flat(tile.v)).view(*tile.q.shape[:3], tile.v.shape[3])
    kept = 1 - tile.batch.spec.dropout_p
    lse = (pivot + row_sum.log()).masked_fill(empty, -torch.inf).squeeze(-1)
    return summed / (row_sum if kept in (0, 1) else row_sum * kept), lse


class Gradients(NamedTuple):
    """What a block adds to each gradient, None where nobody asked; in the dtype of the arithmetic, or the operand's own."""

    q: Any
    k: Any
    v: Any
    sinks: Any
    weight: Any
    operands: tuple[Any, ...]


def gradients(tile: Tile, dout: torch.Tensor, dlse: torch.Tensor | None, needs: Needs) -> Gradients:
    """What a block adds to the gradients, given those of its rows of the output [b, h, m, Dv] and of the LSE [b, h, m].

    With delta = sum_j P_j dP_j: dV = P^T dO, dP = dO V^T, dS = P (dP - delta + dLSE). P and delta are made anew of a whole row,
    so neither the rounding of the LSE nor that of the output is in them.
    """
    spec = tile.batch.spec
    raw, backward_of_raw = _differentiable_raw(tile, needs)
    scores, backward_of_mods = _differentiable_mods(_capped(raw, spec.softcap), tile, needs)
    own = (tile.weight is None or spec.softcap is not None) and summands(spec.score_mods)
    (weights, pivot, row_sum), empty = _softmax(scores, tile, own)
    dout = dout.to(tile.q.dtype) / row_sum  # 1 / sum goes with the few columns of dO, in place of those of P
    if spec.dropout_p not in (0, 1):
        dout = dout / (1 - spec.dropout_p)
    folded = _folded(dout, tile)
    dv = None
    if needs.dv:
        stayed = weights if tile.stays is None else weights * tile.stays
        dv = torch.bmm(_folded(stayed, tile).mT, folded).view(tile.v.shape)
    if not (needs.dq or needs.dk or needs.dsinks or needs.dscore_weight or any(needs.doperands)):
        return Gradients(None, None, dv, None, None, (None,) * len(tile.operands))
    dscores = torch.bmm(folded, _flat(tile.v).mT).view(weights.shape)
    if tile.stays is not None:
        dscores *= tile.stays
    dscores *= weights
    pull = dscores.sum(-1, keepdim=True)
    if dlse is not None:
        pull -= dlse.to(pull.dtype)[..., None].masked_fill(empty, 0)  # which is -inf there, whatever anything is
    dsinks = None
    if needs.dsinks:
        dsinks = -(torch.exp(tile.sinks[:, None, None] - pivot) / row_sum * pull).sum((0, 2, 3))
    dscores.addcmul_(weights, pull / row_sum, value=-1)
    dscores, doperands = backward_of_mods(dscores)
    if spec.softcap is not None:
        # tanh' = 4 y (1 - y) with y = sigmoid(-2 |x|), which keeps its digits where tanh is near 1.
        dscores = torch.ops.aten.sigmoid_backward(dscores, torch.sigmoid(raw.abs().neg_())).mul_(4)
    dq, dk, dweight = backward_of_raw(dscores)
    return Gradients(dq, dk, dv, dsinks, dweight, doperands)


def _differentiable_raw(tile: Tile, needs: Needs) -> tuple[torch.Tensor, Callable[..., tuple[Any, Any, Any]]]:
    """``_raw`` scores, and a function from the gradient of scaled scores to those of q, k and an additive score's weight."""
    if tile.weight is not None:
        wanted = needs.dq, needs.dk, needs.dscore_weight
        with torch_private.recording():
            leaves = [x.detach().requires_grad_(need) for x, need in zip((tile.q, tile.k, tile.weight), wanted, strict=True)]
            raw = _raw(tile._replace(q=leaves[0], k=leaves[1], weight=leaves[2]))
        per_score = 1.0 if tile.batch.spec.softcap is None else tile.batch.spec.softcap / 2
        return raw.detach(), lambda draw: _gradients_of(raw, leaves, wanted, draw * per_score)

    def backward_of_products(draw: torch.Tensor) -> tuple[Any, Any, Any]:
        draw = _folded(draw, tile)
        q, k = _folded(tile.q, tile), _flat(tile.k)
        none, scale = q.new_empty(1, 1, 1), tile.batch.spec.scale
        dq = torch.baddbmm(none, draw, k, beta=0, alpha=scale).view(tile.q.shape) if needs.dq else None
        dk = torch.baddbmm(none, draw.mT, q, beta=0, alpha=scale).view(tile.k.shape) if needs.dk else None
        return dq, dk, None

    return _raw(tile), backward_of_products


def _differentiable_mods(capped: torch.Tensor, tile: Tile, needs: Needs,
                         ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, tuple[Any, ...]]]]:
    """Scores after the score mods, and a function from their gradient to those of the scores before, and of the operands."""
    members, wanted = tile.batch.spec.score_mods, needs.doperands[: len(tile.operands)]
    if not members:
        return capped, lambda dscores: (dscores, ())
    with torch_private.recording():
        given = (x.to(capped.dtype) if x.is_floating_point() else x for x in tile.operands)  # in which gradients add up
        operands = tuple(x.detach().requires_grad_(need) for x, need in zip(given, wanted, strict=True))
        if summands(members):
            more = added(tile.batch, tile.block, operands, capped.dtype)
        else:
            leaf = capped.detach().requires_grad_()
            scores = _modded(leaf.clone(), operands, tile)  # since a mod may work in place

    def backward_of_summands(dscores: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
        if not any(wanted):
            return dscores, (None,) * len(operands)
        return dscores, _gradients_of(more, operands, wanted, dscores.sum_to_size(more.shape))

    def backward_of_functions(dscores: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
        before, *of_operands = _gradients_of(scores, (leaf, *operands), (True, *wanted), dscores)
        return before, tuple(of_operands)

    if summands(members):
        return capped + more.detach(), backward_of_summands
    return scores.detach(), backward_of_functions


def _gradients_of(result: torch.Tensor, leaves: Sequence[torch.Tensor], wanted: tuple[bool, ...], grad: torch.Tensor) -> Any:
    """The gradient of each leaf that is wanted, None of the others."""
    if not result.requires_grad:  # a mod may have made them of nothing that was given
        return tuple(torch.zeros_like(x) if want else None for x, want in zip(leaves, wanted, strict=True))
    found = iter(torch.autograd.grad(result, list(itertools.compress(leaves, wanted)), grad.expand(result.shape),
                                     allow_unused=True, materialize_grads=True))
    return tuple(next(found) if want else None for want in wanted)
