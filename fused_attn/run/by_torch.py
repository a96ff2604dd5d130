"""Calls by torch's own scaled_dot_product_attention, arranged so that its fused kernel takes them."""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from fused_attn import reference, torch_private, tracing
from fused_attn.call import mods
from fused_attn.call.spec import TENSOR, AttentionSpec, Member, OtherTensors, Window
from fused_attn.plan.backends import causal_for_torch, reached


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
                    others: OtherTensors) -> torch.Tensor:
    """The output of a call; ``backends.against_torch`` says which calls it is for.

    Dropout is torch's: a mask of its own from torch's generator, and on the CPU torch's quadratic path.
    """
    if spec.longest is not None:
        return _torch_packed(q, k, v, spec, others)
    n_queries, n_keys, dim, dim_v = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    masked = bool(others.operands) or others.used_k is not None
    causal = not masked and _plain(causal_for_torch(q, k, spec))
    windowed = not causal and reached(q, k, spec) != Window()
    mask = reference.window_mask(spec, n_queries, n_keys, q.device) if windowed else None
    if others.used_k is not None:  # what lies past the end may be NaN, and 0 * NaN is NaN
        counted = torch.arange(n_keys, device=q.device) < others.used_k[:, None]
        k, v = (x.masked_fill(~counted[:, None, :, None], 0) for x in (k, v))
        mask = counted[:, None, None, :] if mask is None else mask & counted[:, None, None, :]
    if masked:
        mask = _joined_mask(mask, q, spec, others)
    if dim != dim_v:  # zero columns change neither scores nor the other outputs
        q, k, v = (F.pad(x, (0, max(dim, dim_v) - x.shape[3])) for x in (q, k, v))
    if q.device.type == "cpu":  # with another stride torch would leave its fused kernel for a quadratic one
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    grouped = _plain(q.shape[1] != k.shape[1])
    if grouped and mask is None and not causal and _plain(n_queries == 1):  # a group's heads are the queries of one head
        one = torch_private.sdpa(q.view(*k.shape[:2], -1, q.shape[3]), k, v, None, spec.dropout_p, False, scale=spec.scale)
        return one.reshape(*q.shape[:3], one.shape[3])[..., :dim_v]
    out = torch_private.sdpa(q, k, v, mask, spec.dropout_p, causal, scale=spec.scale, enable_gqa=grouped)
    return out if dim <= dim_v else out[..., :dim_v]


def _plain(condition: Any) -> bool:
    """A comparison of sizes as a plain bool: bool() of one stays symbolic under torch.compile, and is a tensor in jit.trace."""
    return True if condition else False  # noqa: SIM210


def _joined_mask(mask: torch.Tensor | None, q: torch.Tensor, spec: AttentionSpec,
                 others: OtherTensors) -> torch.Tensor | None:
    """One mask or bias for torch, made of the biases and masks of a call, whose operands are one tensor each, in this order."""
    biases, masks = others.operands[: len(spec.score_mods)], others.operands[len(spec.score_mods) :]
    for member, operand in zip(spec.mask_mods, masks, strict=True):
        operand = operand == 0 if member.code == mods.HIDE.code else operand
        mask = operand if mask is None else mask & operand
    bias = functools.reduce(torch.add, biases) if biases else None
    if bias is None:
        return mask
    # fp16 and bf16 would cost a bias of another type its digits; torch takes fp32 beside them.
    bias = bias.to(q.dtype if bias.dtype == q.dtype or q.dtype in (torch.float32, torch.float64) else torch.float32)
    return bias if mask is None else torch.where(mask, bias, float("-inf"))


def _torch_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
                  others: OtherTensors) -> torch.Tensor:
    """One sequence after the other, or all at once where lengths have no values yet; rows of no sequence give 0."""
    if tracing.traced(others.cu_q):
        return _torch_padded(q, k, v, spec, others)
    one, outs, at = spec._replace(longest=None), [], 0
    spans = zip(reference.spans(others.cu_q, others.used_q, q.shape[2]),
                reference.spans(others.cu_k, others.used_k, k.shape[2]), strict=True)
    for (q0, q1), (k0, k1) in spans:
        parts = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
        outs += [q.new_zeros(1, q.shape[1], q0 - at, v.shape[3]),
                 _of_nothing(*parts) if q0 == q1 or k0 == k1 else torch_attention(*parts, one, OtherTensors())]
        at = q1
    return torch.cat((*outs, q.new_zeros(1, q.shape[1], q.shape[2] - at, v.shape[3])), 2)


def _torch_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
                  others: OtherTensors) -> torch.Tensor:
    longest_q, longest_k = spec.longest or (0, 0)
    queries = reference.Padded.of(q, others.cu_q, others.used_q, longest_q)
    keys, values = (reference.Padded.of(x, others.cu_k, others.used_k, longest_k) for x in (k, v))
    n_queries, n_keys = queries.rows.shape[1], keys.rows.shape[1]
    mask = (torch.arange(n_keys, device=q.device) < keys.lengths[:, None])[:, None, None, :]
    if spec.window != Window():
        mask = mask & reference.window_mask(spec, n_queries, n_keys, q.device, queries.offset(keys, spec))
    masked = spec._replace(longest=None, window=Window(), mask_mods=(Member(mods.MASK.code, (TENSOR,)),))
    out = torch_attention(queries.x, keys.x, values.x, masked, OtherTensors(operands=(mask,)))
    return queries.packed(out, q.shape[2], 0)


def _of_nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention without queries, or without keys: 0 [1, H, Nq, Dv], with gradients of 0 like any other answer."""
    group = q.shape[1] // k.shape[1]
    return q @ k.repeat_interleave(group, 1).mT @ v.repeat_interleave(group, 1)
