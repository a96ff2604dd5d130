"""The schedules of the backward: each a generator of the launches that make the ``Gradients`` of a call."""

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch

from fused_attn.call.layout import accumulates, as_rows, like, rows_like
from fused_attn.call.schema import Needs, Saved
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.backward import delta_launch, dkv_launch, dq_launch, with_weight_sums
from fused_attn.kernels.launch import Call, Launch, with_lse
from fused_attn.kernels.operand_grad import operand_gradient
from fused_attn.kernels.tile_list import list_launch
from fused_attn.plan import hopper
from fused_attn.plan.plan import Made, Operation
from fused_attn.plan.problem import Problem
from fused_attn.plan.tiles import separate_first


class Gradients(NamedTuple):
    """The gradients of a call, None for every one that is not wanted."""

    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    dsinks: torch.Tensor | None
    dscore_weight: torch.Tensor | None
    doperands: list[torch.Tensor | None]


Backward: TypeAlias = Generator[Made, None, Gradients]


def gluon(problem: Problem, saved: Saved, needs: Needs) -> Backward:
    """Five products in one kernel that is written warp by warp, for sm_90."""
    dq, dk, dv = empties(problem, needs)
    lse = as_rows(saved.lse, problem.q, problem.packed)
    delta = yield from hopper.gluon_backward(problem, saved, lse, dq, dk, dv)
    dsinks = _sinks_gradient(lse, delta, problem.others.sinks) if needs.dsinks else None
    return Gradients(dq, dk, dv, dsinks, None, [None] * len(problem.others.operands))


def against_fused(problem: Problem, needs: Needs) -> tuple[str, ...]:
    """Reasons not to make dQ, dK and dV in one kernel: where its atomics are not allowed, or registers have no room for it."""
    if problem.spec.deterministic:
        return ("it sums dQ by atomics, and gradients are to be equal to the bit",)
    if problem.call.heavy or problem.call.extras.additive:
        return ("it takes no bias, mask, function, dropout or additive score",)
    if not (needs.dq and needs.dk and needs.dv):
        return ("it makes dQ, dK and dV together, and not all of them are asked for",)
    if reasons := problem.gives_up("fused"):
        return reasons
    asked = problem.asked("backward")
    if asked == "separate":
        return ("two kernels were quicker when they were timed on this card",)
    if asked != "fused" and separate_first(problem.q.shape[3], problem.v.shape[3], problem.arch):
        return (f"by the model two kernels are quicker on {problem.arch} at this head dim (docs/profile.md)",)
    return () if problem.fused_config() else (f"{problem.arch} has no tiles for it at this head dim and type",)


def fused(problem: Problem, saved: Saved, needs: Needs) -> Backward:
    """Five products in one kernel: the programs of dK and dV add their part of dQ by atomics."""
    q, k, v, call = problem.q, problem.k, problem.v, problem.call
    config = problem.fused_config()
    assert config is not None
    dq, dk, dv = empties(problem, needs)
    lse = as_rows(saved.lse, q, problem.packed)
    delta = yield from row_delta(problem, saved, lse)
    total = like(q, q.shape[3], accumulates(q))
    yield Operation(torch.Tensor.zero_, (total,))
    if k.numel():
        yield from dkv_launches(q, k, v, saved.dout, lse, delta, dk, dv, (), call, config, total)
    yield Operation(_scaled, (total, dq, call.scale))
    dsinks = _sinks_gradient(lse, delta, problem.others.sinks) if needs.dsinks else None
    return Gradients(dq, dk, dv, dsinks, None, [None] * len(problem.others.operands))


def separate(problem: Problem, saved: Saved, needs: Needs) -> Backward:
    """Seven products, deterministic to the bit: dQ by queries, dK and dV by keys, then the gradients of operands."""
    q, k, v, call, others = problem.q, problem.k, problem.v, problem.call, problem.others
    dout = saved.dout
    dq, dk, dv = empties(problem, needs)
    lse = as_rows(saved.lse, q, problem.packed)
    delta, _ = with_lse(call, lse)  # a placeholder: where only dV is wanted, delta is not read
    dsinks = dscore_weight = None
    if needs.dq or needs.dk or needs.dsinks or needs.dscore_weight or any(needs.doperands):
        delta = yield from row_delta(problem, saved, lse)
        if needs.dsinks:
            dsinks = _sinks_gradient(lse, delta, others.sinks)
    if (needs.dq or needs.dscore_weight) and q.numel():
        config = problem.config("dq")
        tiles, listing = list_launch(call, q, k, config, keys_first=False)
        yield from listing
        summing, parts = with_weight_sums(call, q, config) if needs.dscore_weight else (call, None)
        target = like(q, q.shape[3]) if dq is None else dq
        yield dq_launch(q, k, v, dout, lse, delta, target, tiles, summing, config=config)
        if parts is not None:
            dscore_weight = parts.sum((0, 2)).to(others.score_weight.dtype)
    elif needs.dscore_weight:
        dscore_weight = torch.zeros_like(others.score_weight, memory_format=torch.contiguous_format)
    if (needs.dk or needs.dv) and k.numel():
        config = problem.config("dkv")
        tiles, listing = list_launch(call, q, k, config, keys_first=True)
        yield from listing
        yield from dkv_launches(q, k, v, dout, lse, delta, dk, dv, tiles, call, config)
    doperands: list[torch.Tensor | None] = []
    for operand, role, need in zip(others.operands, problem.roles, needs.doperands, strict=True):
        if not need or role is None:
            doperands.append(None)
            continue
        grad = yield from operand_gradient(q, k, v, dout, lse, delta, operand, *role, call,
                                           config=problem.config("operand_grad"))
        # Contiguous, as the FakeTensor is: sums by k - q are a part of a longer line.
        doperands.append(grad.clone(memory_format=torch.contiguous_format) if operand.dim() == 3 else grad)
    return Gradients(dq, dk, dv, dsinks, dscore_weight, doperands)


def dkv_launches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor,
                 dk: torch.Tensor | None, dv: torch.Tensor | None, tiles: tuple[Any, ...], call: Call, config: TileConfig,
                 dq: torch.Tensor | None = None) -> Iterator[Launch]:
    """dK and dV by one launch, or by one each where ``config`` says so: the sums of both do not fit the registers."""
    apart = config.separate and dk is not None and dv is not None
    for one, other in ((dk, None), (None, dv)) if apart else ((dk, dv),):
        yield dkv_launch(q, k, v, dout, lse, delta, one, other, tiles, call, config=config, dq=dq)


def _scaled(x: torch.Tensor, out: torch.Tensor, factor: float) -> None:
    torch.mul(x, factor, out=out)


def empties(problem: Problem, needs: Needs) -> tuple[Any, Any, Any]:
    """dq, dk and dv, to be filled; None for one that is not wanted."""
    wanted = (problem.q, needs.dq), (problem.k, needs.dk), (problem.v, needs.dv)
    dq, dk, dv = (like(x, x.shape[3]) if need else None for x, need in wanted)
    if problem.packed or problem.others.used_k is not None:  # no program writes rows that do not count
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
    return dq, dk, dv


def row_delta(problem: Problem, saved: Saved, lse: torch.Tensor) -> Generator[Launch, None, torch.Tensor]:
    """rowsum(dO * O) - dLSE [B, H, Nq]."""
    q, call, config = problem.q, problem.call, problem.config("delta")
    delta = rows_like(q, problem.packed)
    if not saved.out.numel():
        return delta
    dlse = None if saved.dlse is None else as_rows(saved.dlse, q, problem.packed)
    yield delta_launch(saved.out, saved.dout, lse, dlse, delta, call, config=config)
    if saved.residual is not None:
        rest = rows_like(q, problem.packed)
        yield delta_launch(saved.residual, saved.dout, lse, None, rest, call, config=config)
        delta += rest
    return delta


def _sinks_gradient(lse: torch.Tensor, delta: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The gradient of the sinks. A sink is a key whose value is 0, so the derivative of its weight, dP, is 0 as well."""
    lse, rest = (lse, 0.0) if lse.dim() == 3 else lse
    weight = torch.where(lse == float("-inf"), 0.0, torch.exp(sinks.to(lse.dtype)[None, :, None] - lse - rest))
    return -torch.where(weight == 0, 0.0, weight * delta).sum((0, 2)).to(sinks.dtype)
