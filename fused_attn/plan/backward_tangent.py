"""The steps of the backward's tangent: how gradients move with what they are made of."""

from collections.abc import Generator

import torch

from fused_attn.call.layout import as_rows, rows_like
from fused_attn.call.schema import Directions, Moved, Needs, Saved
from fused_attn.kernels.backward import delta_launch
from fused_attn.kernels.backward_tangent import Rows, dkv_tangent_launch, dq_tangent_launch
from fused_attn.kernels.launch import Launch
from fused_attn.kernels.operand_grad import operand_gradient
from fused_attn.kernels.tile_list import list_launch
from fused_attn.plan import backward
from fused_attn.plan.backward import Gradients
from fused_attn.plan.lower import lower_along
from fused_attn.plan.plan import Made
from fused_attn.plan.problem import Problem
from fused_attn.plan.tangent import check_slopes, in_rows, widened


def steps(problem: Problem, saved: Saved, moved: Moved, along: Directions, needs: Needs) -> Generator[Made, None, Gradients]:
    """The launches that make the tangents of the ``Gradients`` of a call, and returns these.

    Raises:
        NotImplementedError: a mod has no second derivatives, or the score is additive.
    """
    q, k, v, others, packed = problem.q, problem.k, problem.v, problem.others, problem.packed
    call = widened(problem.call, along)
    check_slopes(problem, along, second=True)
    dq, dk, dv = backward.empties(problem, needs)
    lse, lse_t = as_rows(saved.lse, q, packed), as_rows(moved.lse_t, q, packed)
    delta = yield from backward.row_delta(problem, saved, lse)
    delta_t = yield from _delta_tangent(problem, saved, moved, lse)
    rows = Rows(lse, lse_t, delta, delta_t)
    moving = lower_along(call, problem.spec, in_rows(along), others.sinks, q.element_size(), moved.dout_t)
    if needs.dq and q.numel():
        config = problem.config("dq_tangent")
        tiles, listing = list_launch(call, q, k, config, keys_first=False)
        yield from listing
        yield dq_tangent_launch(q, k, v, saved.dout, rows, dq, moving, tiles, call, config=config)
    if (needs.dk or needs.dv) and k.numel():
        config = problem.config("dkv_tangent")
        tiles, listing = list_launch(call, q, k, config, keys_first=True)
        yield from listing
        apart = config.separate and needs.dk and needs.dv
        for one, other in ((dk, None), (None, dv)) if apart else ((dk, dv),):
            yield dkv_tangent_launch(q, k, v, saved.dout, rows, one, other, moving, tiles, call, config=config)
    doperands: list[torch.Tensor | None] = []
    for operand, role, need in zip(others.operands, problem.roles, needs.doperands, strict=True):
        if need and role is not None:
            grad = yield from operand_gradient(q, k, v, saved.dout, lse, delta, operand, *role, call,
                                               config=problem.config("operand_grad"), second=(rows, moving))
            doperands.append(grad.clone(memory_format=torch.contiguous_format) if operand.dim() == 3 else grad)
        else:
            doperands.append(None)
    dsinks = _sinks_tangent(rows, others.sinks, along.sinks_t) if needs.dsinks else None
    return Gradients(dq, dk, dv, dsinks, None, doperands)


def _delta_tangent(problem: Problem, saved: Saved, moved: Moved, lse: torch.Tensor) -> Generator[Launch, None, torch.Tensor]:
    """rowsum(dO' * O + dO * O') - dLSE' [B, H, Nq]."""
    q, call, config = problem.q, problem.call, problem.config("delta")
    delta_t = rows_like(q, problem.packed)
    if not saved.out.numel():
        return delta_t.zero_()
    dlse_t = None if moved.dlse_t is None else as_rows(moved.dlse_t, q, problem.packed)
    yield delta_launch(moved.out_t, saved.dout, lse, dlse_t, delta_t, call, config=config)
    if moved.dout_t is not None:
        for out in (saved.out, saved.residual):
            if out is not None:
                part = rows_like(q, problem.packed)
                yield delta_launch(out, moved.dout_t, lse, None, part, call, config=config)
                delta_t += part
    return delta_t


def _sinks_tangent(rows: Rows, sinks: torch.Tensor, sinks_t: torch.Tensor | None) -> torch.Tensor:
    """The tangent of the sinks' gradient, -sum p delta, with p' = p (sink' - LSE')."""
    lse, rest = (rows.lse, 0.0) if rows.lse.dim() == 3 else rows.lse
    p = torch.where(lse == float("-inf"), 0.0, torch.exp(sinks.to(lse.dtype)[None, :, None] - lse - rest))
    move = -rows.lse_t if sinks_t is None else sinks_t.to(lse.dtype)[None, :, None] - rows.lse_t
    return -torch.where(p == 0, 0.0, p * (move * rows.delta + rows.delta_t)).sum((0, 2)).to(sinks.dtype)
