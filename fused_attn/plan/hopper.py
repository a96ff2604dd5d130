"""The schedules for sm_90 alone (``settings.hopper``): their reasons against a call, and Gluon's steps."""

from collections.abc import Generator

import torch

from fused_attn.call.layout import as_rows
from fused_attn.call.schema import Needs, Saved
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import Launch
from fused_attn.plan import proven
from fused_attn.plan.plan import Made, Operation
from fused_attn.plan.problem import Problem

_HALVES = (torch.float16, torch.bfloat16)
_WIDEST = {"forward": 256, "backward": 128}  # head dim


def against(name: str, which: str, problem: Problem) -> tuple[str, ...]:
    """Reasons why the kernels of a schedule that is asked for cannot make a pass, "forward" or "backward", of a call."""
    if problem.arch != "sm_90":
        return ("the card is no Hopper",)
    if reasons := proven.against(name) or problem.gives_up(name):
        return reasons
    reasons = _against_tensors(which, problem)
    q, spec, others = problem.q, problem.spec, problem.others
    if spec.precise or others.score_weight is not None:
        reasons += ("precise and additive attention have kernels of their own",)
    if name == "descriptors":
        return (*reasons, "dropout: Triton serialises its matrix products") if spec.dropout_p else reasons
    if spec.score_mods or spec.mask_mods or spec.dropout_p or not spec.scale > 0:
        reasons += ("it takes no bias, mask, function or dropout, and only a positive scale",)
    if name == "specialized":
        packed = ("Triton does not specialise a kernel that packed sequences leave early",)
        return reasons + packed if problem.packed else reasons
    from fused_attn.kernels.hopper.problem import tile_width  # here and below: Gluon is imported where it is asked for

    dim, dim_v = q.shape[3], problem.v.shape[3]
    if tile_width(dim) != tile_width(dim_v):
        reasons += (f"head dims {dim} and {dim_v} have tiles of different widths",)
    if others.used_k is not None and others.cu_k is None:
        reasons += ("key lengths: boxes of a dense batch end with the tensor, and what lies between may be NaN",)
    return reasons


def _against_tensors(which: str, problem: Problem) -> tuple[str, ...]:
    from fused_attn.kernels.hopper.problem import describable

    reasons: tuple[str, ...] = ()
    if problem.q.dtype not in _HALVES:
        reasons += (f"{problem.q.dtype} is neither fp16 nor bf16",)
    dim, dim_v = problem.q.shape[3], problem.v.shape[3]
    if max(dim, dim_v) > _WIDEST[which]:
        reasons += (f"head dims {dim} and {dim_v}: up to {_WIDEST[which]}",)
    if dim % 8 or dim_v % 8:
        reasons += (f"head dims {dim} and {dim_v}: rows of what is allocated must be multiples of 16 bytes",)
    for name, x in {"q": problem.q, "k": problem.k, "v": problem.v}.items():
        if not describable(x):
            reasons += (f"strides or address of {name} are no multiples of 16 bytes, its columns do not lie side by side, or "
                        "it is expanded or empty",)
    return reasons


def against_gluon_backward(problem: Problem, needs: Needs) -> tuple[str, ...]:
    """Reasons why Gluon's backward cannot make the gradients of a call."""
    reasons = against("gluon", "backward", problem)
    if problem.spec.deterministic:
        reasons += ("it sums dQ by atomics, and gradients are to be equal to the bit",)
    if problem.spec.softcap is not None:
        reasons += ("it has no softcap",)
    if problem.packed:
        reasons += ("it takes no packed sequences",)
    if not (needs.dq and needs.dk and needs.dv):
        reasons += ("it makes dQ, dK and dV together, and not all of them are asked for",)
    return reasons


def gluon_forward(problem: Problem) -> Generator[Launch, None, tuple[torch.Tensor, torch.Tensor, None]]:
    from fused_attn.kernels.hopper.forward import forward_launch

    (q, k, v), (out, lse) = problem[:3], problem.outputs()
    yield forward_launch(q, k, v, out, lse, problem.others.sinks, problem.spec.softcap, problem.call,
                         config=problem.hopper_config("gluon"))
    return out, lse, None


def gluon_backward(problem: Problem, saved: Saved, lse: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor,
                   dv: torch.Tensor) -> Generator[Made, None, torch.Tensor]:
    """Fills dq, dk and dv; returns delta [B, H, Nq]."""
    from fused_attn.kernels.hopper.backward import backward_launch
    from fused_attn.kernels.hopper.problem import describable, tile_width
    from fused_attn.kernels.hopper.workspace import ordered_launch, statistics_launch

    q, k, v, call = problem.q, problem.k, problem.v, problem.call
    dout, dlse = saved.dout, saved.dlse
    if not describable(dout):  # the gradient of a sum is one expanded number
        dout = dout.clone(memory_format=torch.contiguous_format)
    config = problem.gluon_backward_config()
    around = TileConfig(config.block_m, config.block_n, num_warps=4, num_stages=1)
    tiles = -(-call.n_queries // config.block_m)
    rows = call.batch * q.shape[1] * tiles
    stats = lse.new_empty(2, rows, config.block_m)
    sums = lse.new_empty(rows, config.block_m * tile_width(q.shape[3]))
    yield Operation(torch.Tensor.zero_, (sums,))
    dlse = None if dlse is None else as_rows(dlse, q, False)
    yield statistics_launch(saved.out, dout, lse, dlse, stats, call, config=around)
    yield backward_launch(q, k, v, dout, stats, sums, dk, dv, call, config=config)
    yield ordered_launch(sums, dq, call, config=around)
    return stats[1].view(call.batch, q.shape[1], tiles * config.block_m)[:, :, : call.n_queries]
