"""Gradients: thin autograd Functions over the ops, and the only file with a ``ctx``."""

from typing import Any

import torch
from torch.autograd import forward_ad

from fused_attn import ops
from fused_attn.spec import AttentionSpec


class Attention(torch.autograd.Function):
    """(out, lse) of fused attention, differentiable once in q, k and v through both."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *spec: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = ops.forward(q, k, v, *spec)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand_as(out)
        needs = ctx.needs_input_grad[:3]
        # With create_graph=True the gradients must not pass for constants: a second derivative raises.
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = AttentionBackward.apply if differentiable else ops.backward
        grads = backward(dout, dlse, q, k, v, out, lse, *ctx.spec, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None for _ in ctx.spec)


class AttentionBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is a clear error."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return ops.backward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "fused_attn: second derivatives of backend 'triton' are not built yet; "
            "backend='reference' has them, with memory quadratic in the sequence length"
        )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the kernels; the autograd graph is built only where a gradient is wanted."""
    packed = ops.pack(spec)
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # Forward AD and torch.func get torch's own clear errors from the Function, before the op's guard would raise.
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if not wanted and not transformed:
        return ops.forward(q, k, v, *packed)
    # torch.compile cannot trace a Function that receives one tensor twice; a view is another tensor.
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is k else v
    return Attention.apply(q, k, v, *packed)
