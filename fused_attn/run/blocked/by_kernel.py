"""Blocks by torch's own fused CPU kernel, where it computes exactly what the block is.

Which those are was tried on one machine: in fp32 and bf16 the kernel takes as long as plain products and a softmax on one
thread, and shares the work among several better; in fp16 it is slower, its backward several times, and fp64 is for those who
want every digit. Of bf16 its LSE has five digits, enough for its own backward and not for those who ask for it.
"""

from typing import Any, TypeAlias

import torch

from fused_attn import torch_private
from fused_attn.call import mods
from fused_attn.call.schema import Needs
from fused_attn.call.spec import Member
from fused_attn.run.blocked.blocks import Block, Dense, Hidden, roles, shape_of_window
from fused_attn.run.blocked.tile import added, cut, summands

_LARGE = 2.0**10  # an LSE up to it is rounded by less than 2**-14, as are the scores themselves
Masks: TypeAlias = dict[Any, torch.Tensor]
_DTYPES = (torch.float32, torch.bfloat16)


def takes_forward(batch: Dense) -> bool:
    """Whether the kernel computes the blocks of a call."""
    q, spec, others = batch.q, batch.spec, batch.others
    return (q.device.type == "cpu" and torch_private.flash_cpu is not None and q.dtype in _DTYPES
            and (q.dtype == torch.float32 or not spec.with_lse) and q.shape[3] == batch.v.shape[3]
            and spec.softcap is None and spec.dropout_p == 0 and others.score_weight is None
            and (others.sinks is None or q.dtype == torch.float32) and summands(spec.score_mods) and not _hides_nan(batch))


def _hides_nan(batch: Dense) -> bool:
    """Whether a window, a mask or a length may hide a key that is NaN: the kernel adds -inf to its scores, which leaves NaN."""
    hides = batch.spec.mask_mods or batch.others.used_k is not None or batch.spec.window != (None, None)
    return bool(hides) and bool(batch.k.sum().isnan()) and bool(batch.k.isnan().any())


def takes_backward(batch: Dense, dlse: torch.Tensor | None, lse: torch.Tensor, needs: Needs) -> bool:
    """Whether it computes their gradients, of weights exp(score - LSE), which asks for an LSE of ordinary size. It has none of
    the score mods' operands, nor through the LSE."""
    return (takes_forward(batch) and torch_private.flash_cpu_backward is not None and dlse is None
            and not any(needs.doperands) and not batch.spec.precise
            and not bool((lse.masked_fill(lse == -torch.inf, 0).abs() > _LARGE).any()))


def takes_whole(batch: Dense) -> bool:
    """Whether all queries are one block: nothing is left out, and no mask has to be made."""
    spec = batch.spec
    given = not spec.score_mods or _is_bias(spec.score_mods)
    return has_causal(batch) or (given and not spec.mask_mods and spec.window == (None, None))


def _is_bias(members: tuple[Member, ...]) -> bool:
    """Whether some score mods are a bias that lies in memory, and nothing else."""
    return len(members) == 1 and members[0].code == mods.BIAS.code and roles(members) == ("operand",)


def has_causal(batch: Dense) -> bool:
    """Whether the kernel's own causal mask, which is upper-left, is all that hides anything; it wants a positive scale."""
    spec = batch.spec
    aligned = type(batch.offset) is int and batch.offset == 0 and batch.q.shape[2] <= batch.k.shape[2]
    return (spec.window == (None, 0) and aligned
            and not spec.mask_mods and not spec.score_mods and batch.others.used_k is None and spec.scale > 0)


def forward(batch: Dense, block: Block, hidden: Hidden, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [b, h, m, D] in q's dtype, lse [b, h, m]) of a block that has keys."""
    assert torch_private.flash_cpu is not None
    causal = has_causal(batch)
    whole_mask = None if causal else _added(batch, block, hidden, masks)
    q, k, v, mask = _heads_alike(batch, block, whole_mask)
    out, lse = torch_private.flash_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=batch.spec.scale)
    out, lse = _apart(out, batch), _apart(lse, batch)
    if whole_mask is not None:
        lse = lse.masked_fill(whole_mask.amax(-1) == -torch.inf, -torch.inf)
    if batch.others.sinks is not None:
        whole = torch.logaddexp(lse, batch.others.sinks.to(lse.dtype)[:, None])
        out = out * torch.where(whole == -torch.inf, 0.0, torch.exp(lse - whole))[..., None]
        lse = whole
    return out, lse


def backward(batch: Dense, block: Block, hidden: Hidden, masks: Masks, dout: torch.Tensor, out: torch.Tensor,
             lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [b, h, m, D], dk, dv [b, hk, n, D]) of a block, given its rows of dO, of the output and of the LSE."""
    assert torch_private.flash_cpu_backward is not None
    causal = has_causal(batch)
    q, k, v, mask = _heads_alike(batch, block, None if causal else _added(batch, block, hidden, masks))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # whose weights exp(score - lse) are 0
    dout, out, lse = (_grouped(x, batch) for x in (dout, out, lse))
    dq, dk, dv = torch_private.flash_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask,
                                                  scale=batch.spec.scale)
    if batch.group == 1:
        return dq, dk, dv
    dk, dv = (x.sum(1, dtype=torch.float32)[None] for x in (dk, dv))
    return _apart(dq, batch), dk, dv


def _added(batch: Dense, block: Block, hidden: Hidden, masks: Masks) -> torch.Tensor | None:
    """What is added to the scores of a block, [b', h', m', n] in fp32, or None; -inf where a pair does not attend.

    ``masks`` keeps that of blocks of one shape.
    """
    if not batch.spec.score_mods and not hidden:
        return None
    shape = None if batch.spec.score_mods else shape_of_window(batch, block)
    if shape is None:
        return _made(batch, block, hidden)
    if shape not in masks:
        masks.clear()
        masks[shape] = _made(batch, block, hidden)
    return masks[shape]


def _made(batch: Dense, block: Block, hidden: Hidden) -> torch.Tensor:
    total = added(batch, block, cut(batch, block), torch.float32) if batch.spec.score_mods else None
    if total is None:
        total = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device=batch.q.device)
    shape = torch.broadcast_shapes((1, 1, 1, block.n_keys), total.shape, *((*mask.shape[:-1], 1) for _, mask in hidden))
    if not hidden:
        return total.expand(shape)
    if total.shape != shape or _is_bias(batch.spec.score_mods):  # not a tile of its own
        total = total.expand(shape).clone()
    for columns, mask in hidden:
        total[..., columns].masked_fill_(mask, -torch.inf)
    return total


def _heads_alike(batch: Dense, block: Block, mask: torch.Tensor | None,
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, k, v and mask as the kernel takes them, which knows no groups: each group of the one batch entry is one of a call."""
    q, k, v = (block.of(role, x) for role, x in (("queries", batch.q), ("keys", batch.k), ("keys", batch.v)))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if batch.group == 1:
        return q, k, v, mask
    if mask is not None:
        mask = mask[0][:, None] if mask.shape[1] == 1 else mask[0].unflatten(0, (-1, batch.group))
    q, k, v = _grouped(q, batch), k[0][:, None], v[0][:, None]
    if q.shape[1] == 1:  # the heads of a group are the queries of one head
        return q, k, v, None if mask is None else mask.transpose(1, 2).expand(-1, -1, batch.group, -1)
    return q, k.expand(-1, batch.group, -1, -1), v.expand(-1, batch.group, -1, -1), mask


def _grouped(x: torch.Tensor, batch: Dense) -> torch.Tensor:
    """x [1, h, m, ...] with each group as an entry, [h / group, group, m, ...]; of one query, [h / group, 1, group, ...]."""
    if batch.group == 1:
        return x
    one = x.shape[2] == 1
    x = x[0].unflatten(0, (-1, batch.group))
    return x.transpose(1, 2) if one else x


def _apart(x: torch.Tensor, batch: Dense) -> torch.Tensor:
    """The inverse of ``_grouped``."""
    if batch.group == 1:
        return x
    return (x.transpose(1, 2) if x.shape[1] == 1 else x).flatten(0, 1)[None]
