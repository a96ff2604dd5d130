"""Running the steps of a call: what ops and eager calls share."""

from collections.abc import Callable, Generator
from typing import Any

import torch

from fused_attn.call.layout import Statistics
from fused_attn.call.schema import Directions, Forwarded, Moved, Needs, Saved
from fused_attn.call.spec import NO_OTHERS, AttentionSpec, OtherTensors
from fused_attn.kernels.launch import UnfitTilesError
from fused_attn.plan import backward_tangent as of_backward
from fused_attn.plan import inspection, schedules
from fused_attn.plan import tangent as of_forward
from fused_attn.plan.plan import Made, Plan, finish, plan, unstored
from fused_attn.plan.problem import Problem


def _finish(call: tuple[Any, ...], steps: Callable[[Problem], Generator[Made, None, Any]]) -> Any:
    """What the steps of a call return, made with safer tiles where those of the tables do not fit the card."""
    while True:
        problem = Problem.of(*call)
        try:
            return finish(steps(problem))
        except UnfitTilesError as unfit:
            problem.step_down(unfit)


def plan_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> Plan | None:
    """The plan of a plain call without gradients: (q, k, v) -> (out, lse)."""
    schedule = schedules.of_forward(Problem.of(q, k, v, spec, NO_OTHERS))  # a schedule may ask where real tensors begin
    given = unstored(q), unstored(k), unstored(v)
    return plan(schedule.steps(Problem.of(*given, spec, NO_OTHERS, device=q.device)), given)


def plan_backward(saved: Saved, spec: AttentionSpec, needs: Needs) -> Plan | None:
    """The plan of a plain call's backward: (the tensors that ``saved`` has) -> (those of dq, dk and dv that are wanted)."""
    tensors: list[Any] = [None if x is None else unstored(x) for x in saved]
    places = Saved(*tensors)
    problem = Problem.of(places.q, places.k, places.v, spec, NO_OTHERS, device=saved.q.device)
    real = Problem.of(saved.q, saved.k, saved.v, spec, NO_OTHERS)  # a schedule may ask where real tensors begin

    def steps() -> Generator[Made, None, Any]:
        grads = yield from schedules.of_backward(real, needs).steps(problem, places, needs)
        return grads[:3]

    return plan(steps(), tuple([x for x in places if x is not None]))


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
            others: OtherTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out, lse as ``lse_like`` makes it, and what rounding took from out where the call keeps it)."""
    return _finish((q, k, v, spec, others), lambda problem: schedules.of_forward(problem).steps(problem))


def backward(saved: Saved, spec: AttentionSpec, others: OtherTensors, needs: Needs) -> tuple[Any, ...]:
    """(dq, dk, dv, dsinks, dscore_weight, [of each operand]), None for every gradient that nobody asked for."""
    call = saved.q, saved.k, saved.v, spec, others
    return _finish(call, lambda problem: schedules.of_backward(problem, needs).steps(problem, saved, needs))


def tangent(made: Forwarded, along: Directions, spec: AttentionSpec,
            others: OtherTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of out [B, H, Nq, Dv] and LSE [B, H, Nq]."""
    call = made.q, made.k, made.v, spec, _with_rows_of_tables(others)
    return _finish(call, lambda problem: of_forward.steps(problem, made, along))


def backward_tangent(saved: Saved, moved: Moved, along: Directions, spec: AttentionSpec, others: OtherTensors,
                     needs: Needs) -> tuple[Any, ...]:
    """The tangents of what ``backward`` returns."""
    call = saved.q, saved.k, saved.v, spec, _with_rows_of_tables(others)
    return _finish(call, lambda problem: of_backward.steps(problem, saved, moved, along, needs))


def _with_rows_of_tables(others: OtherTensors) -> OtherTensors:
    """``others`` with tables that are contiguous, as their tangents are."""
    return others._replace(operands=tuple(x.contiguous() if x.dim() > 4 else x for x in others.operands))


def statistics(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, others: OtherTensors) -> Statistics:
    """(received [B, H, Nk], entropy, maximum and distance [B, H, Nq])."""
    return _finish((q, k, k[..., :1], spec, others), inspection.statistics)


def weights(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, others: OtherTensors) -> torch.Tensor:
    """[B, H, Nq, Nk] in q's dtype."""
    return _finish((q, k, k[..., :1], spec, others), inspection.weights)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    """x [B, H, N, D] turned, or turned back."""
    return finish(inspection.rotary(x, cos, sin, interleaved, back))
