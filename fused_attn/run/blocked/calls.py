"""Whole calls by blocks: what eager calls, ops and the autograd Functions share."""

from typing import Any

import torch

from fused_attn.call.layout import accumulates, like
from fused_attn.call.schema import Needs, Saved
from fused_attn.call.spec import AttentionSpec, OtherTensors
from fused_attn.run.blocked import dense, packed
from fused_attn.run.blocked.blocks import Dense
from fused_attn.run.blocked.tile import Gradients
from fused_attn.tracing import without_autocast


@torch.no_grad()
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
            others: OtherTensors) -> tuple[torch.Tensor, torch.Tensor, None]:
    """(out [B, H, Nq, Dv], lse [B, H, Nq], None) of a call."""
    out, lse = like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulates(q))
    with without_autocast(q.device):
        if spec.longest is not None:
            packed.forward(q, k, v, spec, others, out, lse)
        else:
            dense.forward(Dense.of(q, k, v, spec, others), out, lse)
    return out, lse, None


@torch.no_grad()
def backward(saved: Saved, spec: AttentionSpec, others: OtherTensors, needs: Needs) -> tuple[Any, ...]:
    """(dq, dk, dv, dsinks, dscore_weight, [of each operand]), None for every gradient that nobody asked for."""
    q, k, v = saved.q, saved.k, saved.v
    dtype = accumulates(q)

    def zeros(x: Any, need: bool) -> Any:
        return torch.zeros(x.shape, dtype=dtype, device=x.device) if need else None

    dq, dk, dv = (like(x, x.shape[3]) if need else None for x, need in ((q, needs.dq), (k, needs.dk), (v, needs.dv)))
    grads = Gradients(dq, dk, dv, zeros(others.sinks, needs.dsinks), zeros(others.score_weight, needs.dscore_weight),
                      tuple(zeros(x, need) for x, need in zip(others.operands, needs.doperands, strict=True)))
    with without_autocast(q.device):
        if spec.longest is not None:
            packed.backward(q, k, v, spec, others, saved.dout, saved.dlse, saved.out, saved.lse, needs, grads)
        else:
            dense.backward(Dense.of(q, k, v, spec, others), saved.dout, saved.dlse, saved.out, saved.lse, needs, grads)
    sinks, weight = (None if x is None else x.to(of.dtype)
                     for x, of in ((grads.sinks, others.sinks), (grads.weight, others.score_weight)))
    operands = [None if x is None else x.to(of.dtype) for x, of in zip(grads.operands, others.operands, strict=True)]
    return dq, dk, dv, sinks, weight, operands
