"""Gradients: thin autograd Functions over the ops, and the only file with a ``ctx``."""

from collections.abc import Callable
from typing import Any

import torch

from fused_attn import ops, replay, torch_private
from fused_attn.execution import Needs
from fused_attn.kernels import launch
from fused_attn.lowering import pack
from fused_attn.spec import NO_COMPANIONS, AttentionSpec, Companions

# The arguments of Attention: q, k, v, the single companions, the fields of the packed spec, then the operands.
_SINGLE = ops.N_COMPANIONS - 1
_OPERANDS = 3 + _SINGLE + ops.N_SPEC
_NEEDED = 5  # q, k, v, sinks, score weight: the first arguments, and those that may want gradients beside operands
_TENSORS = 8  # of the backward: dout, dlse, q, k, v, out, residual, lse


class Attention(torch.autograd.Function):
    """(out, lse) of fused attention, differentiable once in q, k, v, sinks, score weight and operands, through both."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (q, k, v), single = arguments[:3], arguments[3 : 3 + _SINGLE]
        spec, operands = arguments[3 + _SINGLE : _OPERANDS], arguments[_OPERANDS:]
        out, lse, residual = ops.forward(q, k, v, Companions._make((*single, operands)), spec)
        ctx.save_for_backward(q, k, v, out, residual, lse, *single, *operands)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return out, _rounded(lse)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, residual, lse, *companions = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand_as(out)
        needs = ctx.needs_input_grad
        # With create_graph=True the gradients must not pass for constants: a second derivative raises.
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = AttentionBackward.apply if differentiable else run_backward
        dq, dk, dv, dsinks, dscore_weight, *doperands = backward(
            dout, dlse, q, k, v, out, residual, lse, *companions, *ctx.spec, *needs[:_NEEDED], *needs[_OPERANDS:])
        grads = (dq, dk, dv, dsinks, dscore_weight, *(None for _ in range(_OPERANDS - _NEEDED)), *doperands)
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _rounded(lse: torch.Tensor) -> torch.Tensor:
    """[B, H, Nq] of an LSE that may come with its rest (``execution.lse_like``)."""
    return lse if lse.dim() == 3 else lse[0]


def run_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """The backward op with its lists of operands taken apart, as a Function's arguments and outputs must be."""
    n_operands = (len(arguments) - _TENSORS - _SINGLE - ops.N_SPEC - _NEEDED) // 2
    spec_at = _TENSORS + _SINGLE + n_operands
    single = arguments[_TENSORS : _TENSORS + _SINGLE]
    companions = Companions._make((*single, arguments[_TENSORS + _SINGLE : spec_at]))
    needs_at = spec_at + ops.N_SPEC
    needs = Needs._make((*arguments[needs_at : needs_at + _NEEDED], arguments[needs_at + _NEEDED :]))
    *grads, doperands = ops.backward(arguments[:_TENSORS], companions, arguments[spec_at:needs_at], needs)
    return *grads, *doperands


class AttentionBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is a clear error."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        return run_backward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "fused_attn: second derivatives of backend 'triton' are not built yet; "
            "backend='reference' has them, with memory quadratic in the sequence length"
        )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
              companions: Companions = NO_COMPANIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the kernels; the autograd graph is built only where a gradient is wanted."""
    packed = pack(spec)
    *single, operands = companions
    sources = (q, k, v, companions.sinks, companions.score_weight, *operands)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources)
    # Forward AD and torch.func get torch's own clear errors from the Function, before the op's guard would raise.
    transformed = torch_private.forward_mode() or torch_private.transforms_active()
    if not wanted and not transformed:
        out, lse, _ = ops.forward(q, k, v, companions, packed)
        return out, _rounded(lse)
    # torch.compile cannot trace a Function that receives one tensor twice; a view is another tensor.
    tensors: list[Any] = []
    for x in (q, k, v, *single):
        tensors.append(x.view_as(x) if x is not None and any(x is y for y in tensors) else x)
    distinct: list[Any] = []
    for x in operands:
        distinct.append(x.view_as(x) if any(x is y for y in (*tensors, *distinct)) else x)
    out, lse = Attention.apply(*tensors, *packed, *distinct)
    return out, lse


def attention_to_repeat(key: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                        spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention``, whose launches the next call of this kind may repeat."""
    if (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))) or replay.watched((q, k, v)):
        return attention(q, k, v, spec)
    with launch.recorded() as launches:
        out, lse = attention(q, k, v, spec)
    replay.keep(key, q, k, v, out, lse, launches, launch.run)
    return out, lse


class Rotary(torch.autograd.Function):
    """The rotary op, whose gradient is the rotation back: differentiable in x to any order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn = interleaved, back
        return ops.rotary(x, cos, sin, interleaved, back)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cos, sin), (interleaved, back) = ctx.saved_tensors, ctx.turn
        return rotary(dout, cos, sin, interleaved, not back), None, None, None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool = False) -> torch.Tensor:
    """x [B, H, N, D] turned by the kernel, with cos and sin [B, N, pairs]."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: torch.Tensor = Rotary.apply(x, cos, sin, interleaved, back)
        return result
    return ops.rotary(x, cos, sin, interleaved, back)


class Recomputed(torch.autograd.Function):
    """``run(*tensors)``, with the gradients of ``twin(*tensors)``: the same in plain PyTorch, computed in the backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., torch.Tensor], twin: Callable[..., torch.Tensor], *tensors: Any) -> torch.Tensor:
        ctx.twin = twin
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        again, needs = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        with torch.enable_grad():
            # Views, so that one tensor passed twice receives each of its gradients once.
            tensors = [x.view_as(x) if need else x for x, need in zip(ctx.saved_tensors, needs, strict=True)]
            wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
            grads = iter(torch.autograd.grad(ctx.twin(*tensors), wanted, grad, create_graph=again, allow_unused=True))
        return None, None, *(next(grads) if need else None for need in needs)
