"""Gradients of the kernels, and of blocks: thin autograd Functions over the ops, and what the ops do where autograd reaches
them. What differentiates more than once, or otherwise than backwards, is in ``transforms``."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fused_attn import torch_private
from fused_attn.call.describe import Described
from fused_attn.call.schema import FORWARD, Needs, Saved
from fused_attn.call.spec import NO_OTHERS, AttentionSpec, OtherTensors
from fused_attn.run import ops, plans, transforms
from fused_attn.run.blocked import derivatives

_drawing = threading.RLock()


class Attention(torch.autograd.Function):
    """(out, lse) of fused attention, differentiable in q, k, v, sinks, score weight and operands, through both."""

    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, *tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """``tensors``: q, k, v, then others, flat."""
        q, k, v, *others = tensors
        out, lse, residual = ops.forward(q, k, v, OtherTensors.of(others), spec)
        ctx.save_for_backward(q, k, v, out, residual, lse, *others)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return out, transforms.rounded(lse)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return transforms.gradients(ctx, dout, dlse)


class RepeatedAttention(torch.autograd.Function):
    """``Attention`` for a plain call that was made before, by the plans kept of it and of its backward."""

    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, key: plans.Key, q: torch.Tensor, k: torch.Tensor,
                v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = plans.forward(key, q, k, v, spec)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec, ctx.key = spec, key
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand_as(out)
        _, _, of_q, of_k, of_v = ctx.needs_input_grad
        needs = Needs(of_q, of_k, of_v, False, False, ())
        saved = Saved(dout, dlse, q, k, v, out, None, lse)
        grads = plans.backward(ctx.key, saved, ctx.spec, needs)
        if grads is None:
            made = transforms.differentiated(ctx.spec, needs, saved, *NO_OTHERS.flat())
            grads = [grad if need else None for grad, need in zip(made, needs[:3], strict=False)]
        return None, None, *grads


def repeated(key: plans.Key, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out, lse) by what earlier calls of the kind have left (``plans.key``), or None if there were none."""
    if not key[-1] and (found := plans.repeated(key, q, k, v)) is not None:
        return found
    spec = plans.description(key)
    if spec is None:
        return None
    result: tuple[torch.Tensor, torch.Tensor] = (
        RepeatedAttention.apply(spec, key, q, k, v) if key[-1] else plans.forward(key, q, k, v, spec))
    return result


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
              others: OtherTensors = NO_OTHERS) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the kernels, or by blocks; the autograd graph is built only where a gradient is wanted."""
    if spec.blocked and (torch_private.transforms_active() or torch_private.forward_mode()):
        return derivatives.attention(q, k, v, spec, others)
    sources = (q, k, v, *others.flat())
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources)
    transformed = torch_private.transforms_active() or torch_private.forward_mode()
    exported = torch.compiler.is_exporting()  # a program of ops, which are differentiable themselves where it runs
    if exported or (not wanted and not transformed):
        out, lse, _ = ops.forward(q, k, v, others, spec)
        return out, transforms.rounded(lse)
    if transformed and torch.compiler.is_compiling():  # torch.compile gives the Function a ctx, which it does not take
        raise NotImplementedError("fused_attn: torch.func within torch.compile is not built yet for backend 'triton'; take the "
                                  "transform without torch.compile, or backend='reference'")
    # torch.compile cannot trace a Function that receives one tensor twice; a view is another tensor.
    distinct: list[Any] = []
    for x in sources:
        distinct.append(x.view_as(x) if x is not None and any(x is y for y in distinct) else x)
    function = transforms.Attention if transformed else Attention
    out, lse, *_ = function.apply(spec, *distinct)
    return out, transforms.rounded(lse)


def blocked(call: Described, with_lse: bool, by_seed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by blocks; without ``with_lse`` that is for nobody's eyes. Unless ``by_seed``, dropout draws as torch would,
    where it can."""
    call = call._replace(spec=call.spec._replace(blocked=True, with_lse=with_lse))
    if call.spec.dropout_p == 0:
        return attention(*call)
    if by_seed or torch.compiler.is_compiling():
        return attention(*ops.seeded(call))
    with _drawing:  # from here, where torch's generator stands, to the end of the forward, which leaves it further on
        return attention(*ops.drawn(call))


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


class TransformedRotary(torch.autograd.Function):
    """``Rotary`` as torch.func takes it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
        return ops.rotary(x, cos, sin, interleaved, back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, cos, sin, *turn = inputs
        ctx.save_for_backward(cos, sin)
        ctx.save_for_forward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.turn = turn

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return (None,) * 5 if dout is None else Rotary.backward(ctx, dout)

    @staticmethod
    def jvp(ctx: Any, x_t: torch.Tensor | None, cos_t: Any, sin_t: Any, *_: Any) -> torch.Tensor | None:
        if cos_t is not None or sin_t is not None:
            raise NotImplementedError("fused_attn: rotary positions on the kernels have no tangent by cos and sin; "
                                      "backend='torch' has it")
        (cos, sin), (interleaved, back) = ctx.saved_tensors, ctx.turn
        return None if x_t is None else rotary(x_t, cos, sin, interleaved, back)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool = False) -> torch.Tensor:
    """x [B, H, N, D] turned by the kernel, with cos and sin [B, N, pairs]."""
    transformed = torch_private.transforms_active() or torch_private.forward_mode()
    if ((torch.is_grad_enabled() and x.requires_grad) or transformed) and not torch.compiler.is_exporting():
        return _rotary(x, cos, sin, interleaved, back)
    return ops.rotary(x, cos, sin, interleaved, back)


def _rotary(*arguments: Any) -> torch.Tensor:
    function = TransformedRotary if torch_private.transforms_active() or torch_private.forward_mode() else Rotary
    result: torch.Tensor = function.apply(*arguments)
    return result


class Recomputed(torch.autograd.Function):
    """``run(*tensors)``, with the gradients of ``plain(*tensors)``, the same in plain PyTorch, computed in the backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], *tensors: Any) -> torch.Tensor:
        ctx.plain = plain
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        again, needs = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        with torch.enable_grad():
            # Views, so that one tensor passed twice receives each of its gradients once.
            tensors = [x.view_as(x) if need else x for x, need in zip(ctx.saved_tensors, needs, strict=True)]
            wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
            grads = iter(torch.autograd.grad(ctx.plain(*tensors), wanted, grad, create_graph=again, allow_unused=True))
        return None, None, *(next(grads) if need else None for need in needs)


# --- the ops where autograd reaches them: in exported programs, and called by themselves ---


def _forward_op(*arguments: Any) -> tuple[torch.Tensor, ...]:
    (q, k, v), others, spec = FORWARD.records(arguments)
    out, lse, residual = transforms.Attention.apply(spec, q, k, v, *others.flat())
    return out, lse, ops.some(residual, out)


def _rotary_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    if not x.requires_grad or cos.requires_grad or sin.requires_grad:
        raise RuntimeError("fused_attn::rotary: expected cos and sin without gradients, which they do not receive")
    return _rotary(x, cos, sin, interleaved, back)


def _refuse_gradients(*_: Any) -> Any:
    raise NotImplementedError("fused_attn: the kernels give this no gradients; backend='reference' has them, with memory "
                              "quadratic in the sequence length")


_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "forward": _forward_op, "rotary": _rotary_op, "backward": transforms.refuse_raw, "tangent": transforms.refuse_raw,
    "backward_tangent": transforms.refuse_raw, "statistics": _refuse_gradients, "weights": _refuse_gradients}


def _at_autograd(name: str, below_autograd: Callable[[], Any]) -> Callable[..., Any]:
    """What the op does for autograd: its gradients, or an error where torch would see a constant."""

    def at_autograd(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        tensors += [x for group in args if isinstance(group, (list, tuple)) for x in group if isinstance(x, torch.Tensor)]
        if any(forward_ad.unpack_dual(x, level=0).tangent is not None for x in tensors):
            raise NotImplementedError("fused_attn: forward AD over backend 'triton' is not built for this op, that of an "
                                      "exported program or of weights or statistics; fused_attn.attention has it")
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return _DIFFERENTIABLE[name](*args)
        with below_autograd():
            return getattr(torch.ops.fused_attn, name).default(*args)

    return at_autograd


if torch_private.below_autograd is not None:
    for _name in _DIFFERENTIABLE:
        torch.library.impl(ops.LIBRARY, _name, "Autograd")(_at_autograd(_name, torch_private.below_autograd))
