"""The kernels' autograd Functions as torch.func, forward AD and double backward take them, to second order.

Four maps are all there is: the forward, its tangent, the backward, and the backward's tangent. Each is linear in what the one
before it is differentiated by, so that their derivatives are one another:

    the forward      its tangent: the forward's tangent              its gradient: the backward
    its tangent      its gradient by the directions: the backward    by the inputs: the backward's tangent
    the backward     its gradient by dout and dlse: the tangent      by the inputs, and its tangent: the backward's tangent

What a backward or a tangent is given of the forward's results is no variable of its own: derivatives by q, k and v pass through
them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fused_attn import torch_private
from fused_attn.call.schema import Directions, Forwarded, Moved, Needs, Saved
from fused_attn.call.spec import AttentionSpec, OtherTensors
from fused_attn.run import batching, ops
from fused_attn.run.blocked import derivatives

_SINGLE = len(OtherTensors._fields) - 1  # of a call's other tensors, those that are no operands
_SAVED, _MADE, _MOVED, _DIRECTIONS = (len(record._fields) for record in (Saved, Forwarded, Moved, Directions))


def rounded(lse: torch.Tensor) -> torch.Tensor:
    """The LSE [B, H, Nq] without the rest that it may come with (``layout.lse_like``)."""
    return lse if lse.dim() == 3 else lse[0]


class Attention(torch.autograd.Function):
    """(out, the whole LSE, residual): (spec, q, k, v, others, flat). The Function of ``autograd`` costs the host a quarter."""

    @staticmethod
    def forward(spec: AttentionSpec, *tensors: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *others = tensors
        return ops.forward(q, k, v, OtherTensors.of(others), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        spec, q, k, v, *others = inputs
        out, lse, residual = output
        if residual is not None:
            ctx.mark_non_differentiable(residual)
        ctx.spec = spec
        _keep(ctx, (q, k, v, out, residual, lse, *others))

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
        return gradients(ctx, dout, None if dlse is None else rounded(dlse))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
        made, others = ctx.saved_tensors[:_MADE], ctx.saved_tensors[_MADE:]
        along = _directions(tangents[:3], OtherTensors.of(tangents[3:]), others)
        out_t, lse_t = batching.applied(Tangent, (ctx.spec,), (*made, *along.flat(), *others))
        lse = made[5]
        return out_t, lse_t if lse.dim() == 3 else torch.stack((lse_t, torch.zeros_like(lse_t))), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, *tensors: Any) -> Any:
        dims, batch = in_dims[1:], None
        if (others := batching.of_others(spec, OtherTensors.of(tensors[3:]), OtherTensors.of(dims[3:]))) is not None:
            batch = batching.Batch((0, 0, 0, *others), _shared(3, others), (0, _of_lse(spec), 0))
        return batching.vmapped(Attention, batch, info.batch_size, dims, (spec,), tensors)


class Tangent(torch.autograd.Function):
    """The tangents of (out, LSE [B, H, Nq]): (spec, those of ``Forwarded``, those of ``Directions``, others, flat)."""

    @staticmethod
    def forward(spec: AttentionSpec, *tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made, along, others = _parts(tensors, _MADE)
        return ops.tangent(Forwarded(*made), Directions.of(along), OtherTensors.of(others), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.spec, *tensors = inputs
        _keep(ctx, (*output, *tensors))

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        out_t, lse_t, *tensors = ctx.saved_tensors
        made, along, others = _parts(tuple(tensors), _MADE)
        of_made, of_along, of_others = _parts(ctx.needs_input_grad[1:], _MADE)
        dout = out_t.new_zeros(()).expand_as(out_t) if dout is None else dout
        saved = Saved(dout, dlse, *made)
        dalong: Sequence[Any] = (None,) * len(along)
        if any(of_along):
            of_q, of_k, of_v, *more = of_along
            needs = Needs(of_q, of_k, of_v, more[0], more[1], tuple(more[2:]))
            found = differentiated(ctx.spec, needs, saved, *others)
            dalong = [x if need else None for x, need in zip(found, of_along, strict=True)]
        needs = _needs(of_made[:3], OtherTensors.of(of_others))
        found = _backward_tangent(ctx.spec, needs, saved, Moved(out_t, lse_t, None, None), along, others)
        dq, dk, dv, dothers = _by_inputs(found, needs, len(others))
        return None, dq, dk, dv, None, None, None, *dalong, *dothers

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("fused_attn: forward mode AD within forward mode AD is not built for backend 'triton'; take "
                                  "one of the two derivatives backwards, as jacfwd(jacrev(f)) does, or backend='blocked'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, *tensors: Any) -> Any:
        dims = in_dims[1:]
        inputs, shared = _of_directions(spec, tensors, dims, _MADE)
        first = (0, 0, 0, 0, 0, _of_lse(spec))
        batch = None if inputs is None else batching.Batch((*first, *inputs), ((False,) * _MADE + shared), (0, 0))
        return batching.vmapped(Tangent, batch, info.batch_size, dims, (spec,), tensors)


class Backward(torch.autograd.Function):
    """The backward as a node of its own: (spec, needs, those of ``Saved``, others, flat) -> the gradients, of operands each."""

    @staticmethod
    def forward(*args: Any) -> tuple[Any, ...]:
        return run_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.spec, ctx.needs, *tensors = inputs
        _keep(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        saved, others = Saved(*ctx.saved_tensors[:_SAVED]), ctx.saved_tensors[_SAVED:]
        none: Any = None  # the derivatives by out and LSE are in those by what they are made of
        if ctx.spec.blocked:
            *of_sources, of_dout, of_dlse = derivatives.second(ctx.spec, OtherTensors.of(others), saved[2:5], ctx.needs,
                                                               saved[:2], cotangents)
            of_q, of_k, of_v, *of_others = of_sources
            return None, None, *Saved(of_dout, of_dlse, of_q, of_k, of_v, none, None, none), *of_others
        asked = (*ctx.needs[:5], *ctx.needs.doperands)
        given: list[Any] = [x if need else None for x, need in zip(cotangents, asked, strict=True)]
        if all(x is None for x in given):
            return (None,) * (2 + len(ctx.saved_tensors))
        along = _directions(given[:3], OtherTensors(given[3], given[4], operands=tuple(given[5:])), others)
        out_t, lse_t = batching.applied(Tangent, (ctx.spec,), (*saved[2:], *along.flat(), *others))
        of = ctx.needs_input_grad[2:]
        needs = _needs(of[2:5], OtherTensors.of(of[_SAVED:]))
        found = _backward_tangent(ctx.spec, needs, saved, Moved(out_t, lse_t, None, None), along.flat(), others)
        dq, dk, dv, dothers = _by_inputs(found, needs, len(others))
        dlse = lse_t if saved.dlse is not None and of[1] else None
        return None, None, *Saved(out_t if of[0] else none, dlse, dq, dk, dv, none, None, none), *dothers

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
        saved, others = Saved(*ctx.saved_tensors[:_SAVED]), ctx.saved_tensors[_SAVED:]
        if ctx.spec.blocked:
            _refuse_tangents()
        dout_t, dlse_t, q_t, k_t, v_t, out_t, _, lse_t = tangents[:_SAVED]
        along = _directions((q_t, k_t, v_t), OtherTensors.of(tangents[_SAVED:]), others)
        if out_t is None or lse_t is None:
            out_t, lse_t = batching.applied(Tangent, (ctx.spec,), (*saved[2:], *along.flat(), *others))
        moved = Moved(out_t, rounded(lse_t), dout_t, dlse_t)
        return _wanted(_backward_tangent(ctx.spec, ctx.needs, saved, moved, along.flat(), others), ctx.needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, needs: Needs, *tensors: Any) -> Any:
        dims, batch = in_dims[2:], None
        others, dims_others = OtherTensors.of(tensors[_SAVED:]), OtherTensors.of(dims[_SAVED:])
        more = batching.of_others(spec, others, dims_others)
        if more is not None and not spec.blocked and _apart(needs, others, dims_others, tensors[0], dims[0]):
            inputs = (*_places_of_saved(spec), *more)
            batch = batching.Batch(inputs, _shared(_SAVED, more, needs), _places_of_gradients(needs))
        return batching.vmapped(Backward, batch, info.batch_size, dims, (spec, needs), tensors)


class BackwardTangent(torch.autograd.Function):
    """The tangents of what ``Backward`` gives: (spec, needs, those of ``Saved``, ``Moved``, ``Directions``, others, flat)."""

    @staticmethod
    def forward(spec: AttentionSpec, needs: Needs, *tensors: Any) -> tuple[torch.Tensor | None, ...]:
        first, along, others = _parts(tensors, _SAVED + _MOVED)
        saved, moved = Saved(*first[:_SAVED]), Moved(*first[_SAVED:])
        *grads, doperands = ops.backward_tangent(saved, moved, Directions.of(along), OtherTensors.of(others), spec, needs)
        return _wanted((*grads, *doperands), needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is kept: it has no derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _refuse_third()

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _refuse_third()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, needs: Needs, *tensors: Any) -> Any:
        dims, n, batch = in_dims[2:], _SAVED + _MOVED, None
        others, dims_others = (OtherTensors.of(_parts(x, n)[2]) for x in (tensors, dims))
        inputs, shared = _of_directions(spec, tensors, dims, n, needs)
        if inputs is not None and _apart(needs, others, dims_others, tensors[0], dims[0]):
            batch = batching.Batch((*_places_of_saved(spec), 0, 0, 0, 0, *inputs), (False,) * n + shared,
                                   _places_of_gradients(needs))
        return batching.vmapped(BackwardTangent, batch, info.batch_size, dims, (spec, needs), tensors)


def _backward_tangent(spec: AttentionSpec, needs: Needs, saved: Saved, moved: Moved, along: Sequence[Any],
                      others: Sequence[Any]) -> tuple[Any, ...]:
    return batching.applied(BackwardTangent, (spec, needs), (*saved, *moved, *along, *others))


def gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The backward of a forward's Function: a gradient, or None, for each of its arguments."""
    q, k, v, out, residual, lse, *others = ctx.saved_tensors
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    _, of_q, of_k, of_v, *of_others = ctx.needs_input_grad
    needs = _needs((of_q, of_k, of_v), OtherTensors.of(of_others))
    found = differentiated(ctx.spec, needs, Saved(dout, dlse, q, k, v, out, residual, lse), *others)
    dq, dk, dv, dothers = _by_inputs(found, needs, len(others))
    return None, dq, dk, dv, *dothers


def differentiated(spec: AttentionSpec, needs: Needs, saved: Saved, *others: Any) -> tuple[Any, ...]:
    """``run_backward``, as a node of its own wherever somebody may differentiate it."""
    watched = torch.is_grad_enabled() or torch_private.transforms_active() or torch_private.forward_mode()
    if not torch.compiler.is_compiling() and (watched or batching.has_older(saved[:2])):
        return batching.applied(Backward, (spec, needs), (*saved, *others))
    return run_backward(spec, needs, *saved, *others)


def run_backward(spec: AttentionSpec, needs: Needs, *tensors: Any) -> tuple[Any, ...]:
    """The backward with its gradients of operands one by one, as a Function's outputs must be; ``tensors``: what is saved,
    then others, flat."""
    *grads, doperands = ops.backward(Saved(*tensors[:_SAVED]), OtherTensors.of(tensors[_SAVED:]), spec, needs)
    return _wanted((*grads, *doperands), needs)


def _wanted(found: Sequence[Any], needs: Needs) -> tuple[Any, ...]:
    """Gradients, None for each that is not wanted: an op has an empty tensor there, which torch takes for a constant."""
    return tuple(x if need else None for x, need in zip(found, (*needs[:5], *needs.doperands), strict=True))


def refuse_raw(*_: Any) -> Any:
    """What the raw ops of derivatives do where autograd reaches them."""
    raise NotImplementedError("fused_attn: this op has no derivative of its own; fused_attn.attention has first and second "
                              "derivatives")


def _refuse_third() -> Any:
    raise NotImplementedError("fused_attn: third derivatives are not built for backend 'triton'; backend='blocked' has them. "
                              "Where this asks for a second one: leave the level of forward AD before the backward, and take "
                              "torch.autograd.functional.vhp in place of hvp")


def _refuse_tangents() -> Any:
    raise NotImplementedError("fused_attn: backend 'blocked' was recorded outside of forward mode AD, and has no tangents of "
                              "its backward; enter forward mode before the call")


def _keep(ctx: Any, tensors: Sequence[Any]) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def _needs(of_qkv: Sequence[bool], of: Any) -> Needs:
    """Which gradients are wanted, by what of q, k, v and of others wants one."""
    q, k, v = of_qkv
    return Needs(q, k, v, of.sinks, of.score_weight, tuple(of.operands))


def _by_inputs(found: Sequence[Any], needs: Needs, n_others: int) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """(dq, dk, dv, those of others, flat) of gradients, None for each that is not wanted."""
    dq, dk, dv, dsinks, dweight, *doperands = _wanted(found, needs)
    others: Any = OtherTensors(dsinks, dweight, operands=tuple(doperands)).flat()
    assert len(others) == n_others
    return dq, dk, dv, others


def _directions(of_qkv: Sequence[Any], of: OtherTensors, others: Sequence[Any]) -> Directions:
    """Tangents, with an empty tensor in place of None for an operand."""
    operands = tuple(x.new_empty(0) if x_t is None else x_t for x, x_t in zip(others[_SINGLE:], of.operands, strict=True))
    q_t, k_t, v_t = of_qkv
    return Directions(q_t, k_t, v_t, of.sinks, of.score_weight, operands)


def _parts(flat: Sequence[Any], n: int) -> tuple[Any, Any, Any]:
    """(the first ``n``, those of directions, others) of the flat arguments of a Function that takes directions."""
    n_operands = (len(flat) - n - (_DIRECTIONS - 1) - _SINGLE) // 2
    end = n + _DIRECTIONS - 1 + n_operands
    return flat[:n], flat[n:end], flat[end:]


# --- where the batch lies, for vmap ---


def _of_lse(spec: AttentionSpec) -> int:
    return 1 if spec.score_mods else 0


def _places_of_saved(spec: AttentionSpec) -> tuple[int, ...]:
    return 0, 0, 0, 0, 0, 0, 0, _of_lse(spec)


def _places_of_gradients(needs: Needs) -> tuple[int | None, ...]:
    return 0, 0, 0, None, None, *(0 for _ in needs.doperands)


def _shared(n: int, others: Sequence[Any], needs: Needs | None = None) -> tuple[bool, ...]:
    """Which of ``n`` arguments and of others may have one entry for a whole batch: operands that want no gradient."""
    operands = (True,) * (len(others) - _SINGLE) if needs is None else tuple(not need for need in needs.doperands)
    return (False,) * (n + _SINGLE) + operands


def _of_directions(spec: AttentionSpec, flat: Sequence[Any], dims: Sequence[Any], n: int,
                   needs: Needs | None = None) -> tuple[Any, Any]:
    """(places, whether they may be shared) of directions and others that come after ``n`` arguments; (None, None) where calls
    are made one by one."""
    (_, along, others), (_, dims_along, dims_others) = _parts(flat, n), _parts(dims, n)
    more = batching.of_others(spec, OtherTensors.of(others), OtherTensors.of(dims_others))
    if more is None:
        return None, None
    operands = batching.of_operands(along[5:], dims_along[5:])
    return (0, 0, 0, None, None, *operands, *more), ((False,) * 5 + (True,) * len(operands) + _shared(0, more, needs))


def _apart(needs: Needs, others: OtherTensors, dims: Any, first: torch.Tensor, dim: int | None) -> bool:
    """Whether gradients of a larger batch tell its calls apart: they do not where they are sums over it."""
    entries = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
    for x, at, need in zip(others.operands, dims.operands, needs.doperands, strict=True):
        extents = x.shape if at is None else x.movedim(at, 0).shape[1:]
        if need and (len(extents) > 4 or extents[0] != entries):
            return False
    return not (needs.dsinks or needs.dscore_weight)
