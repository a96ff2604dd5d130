"""The steps of the forward's tangent: how out and LSE move with what they are made of."""

from collections.abc import Generator

import torch

from fused_attn.call.layout import as_rows, like, rows_like
from fused_attn.call.schema import Directions, Forwarded
from fused_attn.call.spec import RELATIVE, TENSOR
from fused_attn.kernels.launch import Call, Launch
from fused_attn.kernels.tangent import tangent_launch
from fused_attn.kernels.tile_list import list_launch
from fused_attn.plan.lower import lower_along
from fused_attn.plan.problem import Problem


def steps(problem: Problem, made: Forwarded, along: Directions) -> Generator[Launch, None, tuple[torch.Tensor, torch.Tensor]]:
    """The launches that make (out_t [B, H, Nq, Dv], lse_t [B, H, Nq]), and returns these.

    Raises:
        NotImplementedError: a mod has no slope for what moves.
    """
    q, k, v, call = problem.q, problem.k, problem.v, widened(problem.call, along)
    check_slopes(problem, along)
    out_t, lse_t = like(q, v.shape[3]), rows_like(q, problem.packed)
    if problem.packed:  # no program writes the rows that belong to no sequence
        out_t.zero_()
        lse_t.zero_()
    if q.numel() and v.shape[3]:
        config = problem.config("tangent")
        lse = as_rows(made.lse, q, problem.packed)
        moving = lower_along(call, problem.spec, in_rows(along), problem.others.sinks, q.element_size())
        tiles, listing = list_launch(call, q, k, config, keys_first=False)
        yield from listing
        yield tangent_launch(q, k, v, made.out, made.residual, lse, out_t, lse_t, moving, tiles, call, config=config)
    return out_t, lse_t


def in_rows(along: Directions) -> Directions:
    """``along`` in the layout that kernels trust."""
    sinks, weight = along.sinks_t, along.score_weight_t
    return along._replace(sinks_t=None if sinks is None else sinks.contiguous(),
                          score_weight_t=weight if weight is None or weight.stride(-1) == 1 else weight.contiguous(),
                          operands_t=tuple(x.contiguous() if x.dim() > 4 else x for x in along.operands_t))


def widened(call: Call, along: Directions) -> Call:
    """``call`` with the strides of the operands' tangents among those that offsets inside a tile must hold."""
    return call._replace(widest=max((call.widest, *(max(x.stride()[2:]) for x in along.operands_t if 3 <= x.dim() <= 4))))


def check_slopes(problem: Problem, along: Directions, second: bool = False) -> None:
    """Refuses mods that lack a derivative: the first by what moves, and with ``second`` the second.

    Raises:
        NotImplementedError: by the name of the mod.
    """
    moves = along.q_t is not None or along.k_t is not None or along.score_weight_t is not None
    operands = iter(along.operands_t)
    if second and problem.others.score_weight is not None:
        raise NotImplementedError("score_weight: second derivatives of an additive score are not built yet for backend "
                                  "'triton'; backend='blocked' has them")
    for member in problem.spec.score_mods:
        mod, own = member.code, member.code.function is not None or member.code.source is not None
        slopes = mod.arg_slopes + (None,) * len(member.args)
        if own and moves and mod.slope is None:
            raise NotImplementedError(f"{mod.name}: expected a mod with a slope, which forward AD needs; got none")
        if second and mod.function is not None and mod.slope != 1.0:
            raise NotImplementedError(f"{mod.name}: a mod written by hand has no second derivatives unless its slope is 1.0; "
                                      "as a plain function it has them")
        for i, kind in enumerate(member.args):
            if kind in (TENSOR, RELATIVE) and next(operands).numel():
                moves = True
                if own and slopes[i] is None:
                    raise NotImplementedError(f"{mod.name}: expected a slope for argument {i}, along which forward AD goes; "
                                              "got none")
