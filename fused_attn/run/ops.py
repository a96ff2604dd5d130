"""The kernels as torch ops: what torch.compile, FLOP counters, FakeTensors and profilers see.

``fused_attn::forward``, ``backward``, ``statistics`` and ``weights`` are those of ``execution`` behind a schema. Gradients
are the business of ``autograd``. Their arguments are the fields of the records in ``schema``, flat. The ops exist
from ``import fused_attn`` on, for programs that were exported and for FLOP counters; the kernels, and Triton with them, are
imported by the first call that runs one. Where nothing watches, the functions here bypass the ops: thirty arguments through
torch's dispatcher cost more than everything else that the host does for a call.
"""

import functools
import warnings
from typing import Any

import torch
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

from fused_attn import torch_private
from fused_attn.call.describe import Described
from fused_attn.call.layout import (
    Statistics,
    check_rotary,
    keeps_residual,
    like,
    like_statistics,
    like_weights,
    lse_like,
    rows_like,
)
from fused_attn.call.schema import (
    BACKWARD,
    BACKWARD_TANGENT,
    FORWARD,
    INSPECTION,
    TANGENT,
    Directions,
    Forwarded,
    Inputs,
    Moved,
    Needs,
    Pair,
    Saved,
)
from fused_attn.call.spec import AttentionSpec, OtherTensors
from fused_attn.tracing import watched

LIBRARY = torch.library.Library("fused_attn", "DEF")
LIBRARY.define(f"forward({FORWARD.text}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(f"backward({BACKWARD.text}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])")
LIBRARY.define(f"backward_tangent({BACKWARD_TANGENT.text}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])")
LIBRARY.define(f"tangent({TANGENT.text}) -> (Tensor, Tensor)")
LIBRARY.define(f"statistics({INSPECTION.text}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"weights({INSPECTION.text}) -> Tensor")
LIBRARY.define("seed(Tensor like) -> Tensor")
LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool back) -> Tensor")
_OPS = torch.ops.fused_attn


def _runner(spec: AttentionSpec) -> Any:
    """The module that runs a call."""
    if spec.blocked:
        from fused_attn.run.blocked import calls

        return calls
    from fused_attn.run import execution  # imported here and below, so that the ops exist without Triton

    return execution


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, others: OtherTensors,
            spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out, lse as ``layout.lse_like`` makes it, residual or None) of a call."""
    if not watched((q, k, v, *others.flat())):
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] = _runner(spec).forward(q, k, v, spec, others)
        return found
    out, lse, residual = _OPS.forward.default(*FORWARD.flat(Inputs(q, k, v), others, spec))
    return out, lse, residual if residual.numel() else None


def backward(saved: Saved, others: OtherTensors, spec: AttentionSpec, needs: Needs) -> tuple[Any, ...]:
    """(dq, dk, dv, dsinks, dscore_weight, [gradient of each operand])."""
    if not watched((*saved, *others.flat())) and not _batched(saved.dout, saved.dlse):
        made: tuple[Any, ...] = _runner(spec).backward(saved, spec, others, needs)
        return made
    grads: tuple[Any, ...] = _OPS.backward.default(*BACKWARD.flat(saved, others, spec, needs))
    return grads


def tangent(made: Forwarded, along: Directions, others: OtherTensors,
            spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of out and LSE along those of what they were made of."""
    if not watched((*made, *others.flat(), *along.flat())):
        found: tuple[torch.Tensor, torch.Tensor] = _runner(spec).tangent(made, along, spec, others)
        return found
    moved: tuple[torch.Tensor, torch.Tensor] = _OPS.tangent.default(*TANGENT.flat(made, along, others, spec))
    return moved


def backward_tangent(saved: Saved, moved: Moved, along: Directions, others: OtherTensors, spec: AttentionSpec,
                     needs: Needs) -> tuple[Any, ...]:
    """The tangents of what ``backward`` returns."""
    if not watched((*saved, *moved, *along.flat(), *others.flat())):
        made: tuple[Any, ...] = _runner(spec).backward_tangent(saved, moved, along, spec, others, needs)
        return made
    found: tuple[Any, ...] = _OPS.backward_tangent.default(*BACKWARD_TANGENT.flat(saved, moved, along, others, spec, needs))
    return found


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    """x [B, H, N, D] turned, or turned back, with cos and sin [B, N, pairs]."""
    if not watched((x, cos, sin)) and not _batched(x):
        from fused_attn.run import execution

        return execution.rotary(x, cos, sin, interleaved, back)
    turned: torch.Tensor = _OPS.rotary.default(x, cos, sin, interleaved, back)
    return turned


@torch.no_grad()
def statistics(q: torch.Tensor, k: torch.Tensor, others: OtherTensors, spec: AttentionSpec) -> Statistics:
    """Received, entropy, maximum and distance, without gradients."""
    if not watched((q, k, *others.flat())):
        from fused_attn.run import execution

        return execution.statistics(q, k, spec, others)
    found: Statistics = _OPS.statistics.default(*INSPECTION.flat(Pair(q, k), others, spec))
    return found


@torch.no_grad()
def weights(q: torch.Tensor, k: torch.Tensor, others: OtherTensors, spec: AttentionSpec) -> torch.Tensor:
    """The weights [B, H, Nq, Nk] in q's dtype, without gradients."""
    if not watched((q, k, *others.flat())):
        from fused_attn.run import execution

        return execution.weights(q, k, spec, others)
    found: torch.Tensor = _OPS.weights.default(*INSPECTION.flat(Pair(q, k), others, spec))
    return found


def _forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    (q, k, v), others, spec = FORWARD.records(arguments)
    out, lse, residual = _runner(spec).forward(q, k, v, spec, _in_rows(others))
    return out, lse, some(residual, out)


def _in_rows(others: OtherTensors) -> OtherTensors:
    """``others`` in the layout that kernels trust, whatever happened between a call and its op: torch may put zeros for one."""
    rows = {name: x.contiguous() for name in ("cu_q", "cu_k", "used_q", "used_k", "sinks")
            if (x := getattr(others, name)) is not None}
    weight = others.score_weight
    if weight is not None and weight.stride(-1) != 1:
        rows["score_weight"] = weight.contiguous()
    return others._replace(**rows)


def _batched(*gradients: torch.Tensor | None) -> bool:
    """Whether one of these is a batch of gradients made by ``is_grads_batched``: nothing else shows its vmap."""
    return any(x is not None and torch_private.is_batched(x) for x in gradients)


def some(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``x``, or an empty tensor in place of None, since an op's outputs are fixed in number."""
    return like.new_empty(0) if x is None else x


def _forward_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    (q, _, v), others, spec = FORWARD.records(arguments)
    out = like(q, v.shape[3])
    residual = like(q, v.shape[3]) if keeps_residual(spec, others) else out.new_empty(0)
    return out, lse_like(q, spec, others.cu_q is not None), residual


def _backward(*arguments: Any) -> tuple[Any, ...]:
    saved, others, spec, needs = BACKWARD.records(arguments)
    return _each(_runner(spec).backward(saved, spec, _in_rows(others), needs), saved, others)


def _backward_tangent(*arguments: Any) -> tuple[Any, ...]:
    saved, moved, along, others, spec, needs = BACKWARD_TANGENT.records(arguments)
    return _each(_runner(spec).backward_tangent(saved, moved, along, spec, _in_rows(others), needs), saved, others)


def _each(gradients: tuple[Any, ...], saved: Saved, others: OtherTensors) -> tuple[Any, ...]:
    """Gradients as an op returns them."""
    *grads, doperands = gradients
    whose = saved.q, saved.k, saved.v, saved.lse, saved.lse
    return (*(some(grad, x) for grad, x in zip(grads, whose, strict=True)),
            [some(grad, x) for grad, x in zip(doperands, others.operands, strict=True)])


def _backward_fake(*arguments: Any) -> tuple[Any, ...]:
    saved, others, _, needs = BACKWARD.records(arguments)
    return _fakes(saved, others, needs)


def _backward_tangent_fake(*arguments: Any) -> tuple[Any, ...]:
    saved, _, _, others, _, needs = BACKWARD_TANGENT.records(arguments)
    return _fakes(saved, others, needs)


def _fakes(saved: Saved, others: OtherTensors, needs: Needs) -> tuple[Any, ...]:
    q, k, v, lse = saved.q, saved.k, saved.v, saved.lse
    sinks, weight = others.sinks, others.score_weight
    dscore_weight = weight.new_empty(weight.shape) if weight is not None and needs.dscore_weight else lse.new_empty(0)
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None and needs.dsinks else lse.new_empty(0)
    doperands = [x.new_empty(x.shape) if need else x.new_empty(0)
                 for x, need in zip(others.operands, needs.doperands, strict=True)]
    # A gradient that is not wanted is an empty tensor: an op's outputs are fixed in number.
    grads = (like(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((q, needs.dq), (k, needs.dk), (v, needs.dv)))
    return *grads, dsinks, dscore_weight, doperands


def _tangent(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made, along, others, spec = TANGENT.records(arguments)
    moved: tuple[torch.Tensor, torch.Tensor] = _runner(spec).tangent(made, along, spec, _in_rows(others))
    return moved


def _tangent_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made, _, others, _ = TANGENT.records(arguments)
    return like(made.q, made.v.shape[3]), rows_like(made.q, others.cu_q is not None)


def _rotary(*arguments: Any) -> torch.Tensor:
    from fused_attn.run import execution

    return execution.rotary(*arguments)


def draw_seed(like: torch.Tensor) -> torch.Tensor:
    """A seed [1] for dropout, drawn on the device from torch's own generator: it follows torch.manual_seed, and CUDA graphs
    advance it.

    A compiler that recomputes in the backward what it could have saved (``activation_memory_budget`` below 1) must not draw
    again: the mark that its own activation checkpointing leaves tells it to save the seed.
    """
    if torch.compiler.is_compiling() and torch_private.activation_memory_budget() == 0:
        warnings.warn("fused_attn: activation_memory_budget=0 saves nothing but inputs, so the backward draws its dropout mask "
                      "anew and gradients are of another mask than the output; a budget above 0 saves the seed",
                      RuntimeWarning, stacklevel=2)
    meta = traceback.get_current_meta()  # which nodes made within the context inherit
    before = meta.copy()
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        return torch.randint(2**63 - 1, (1,), device=like.device)
    finally:
        meta.clear()
        meta.update(before)


def seeded(call: Described) -> Described:
    """``call`` with a seed if it has dropout, drawn as late as this, so that a call that does not run draws none.

    A call that has a seed keeps it: if it runs twice, for its output and for its weights, it drops the same weights.
    """
    if call.spec.dropout_p == 0 or call.others.seed is not None:
        return call
    # A transform draws by its own rules of randomness.
    draw = draw_seed if torch_private.transforms_active() else _OPS.seed
    return call._replace(others=call.others._replace(seed=draw(call.q)))


def drawn(call: Described) -> Described:
    """``seeded``; for a dense call on the CPU that nothing watches, with the state of torch's generator for a seed, from which
    the blocks draw what torch's own attention would have drawn."""
    q, others = call.q, call.others
    if (call.spec.dropout_p == 0 or others.seed is not None or q.device.type != "cpu" or call.spec.longest is not None
            or watched((*call[:3], *others.flat())) or not _draws_one_by_one()):
        return seeded(call)
    return call._replace(others=others._replace(seed=torch.get_rng_state()))


@functools.cache
def _draws_one_by_one() -> bool:
    """Whether torch's CPU generator draws two numbers as it draws one and another one: where MKL draws, it does not."""
    found = []
    for sizes in ((2,), (1, 1)):
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = [torch.empty(n, device="cpu").bernoulli_(0.5, generator=generator) for n in sizes]
        found.append((torch.cat(drawn).tolist(), generator.get_state().tolist()))
    return found[0] == found[1]


def refuse_batches(*_: Any) -> Any:
    raise NotImplementedError("fused_attn: the raw ops, those of an exported program and of weights and statistics among them, "
                              "have no vmap; fused_attn.attention has it")


def _rotary_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    check_rotary(x, cos, sin)
    return like(x, x.shape[3])


def _statistics(*arguments: Any) -> tuple[torch.Tensor, ...]:
    from fused_attn.run import execution

    (q, k), others, spec = INSPECTION.records(arguments)
    return execution.statistics(q, k, spec, _in_rows(others))


def _statistics_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    (q, k), *_ = INSPECTION.records(arguments)
    return like_statistics(q, k)


def _weights(*arguments: Any) -> torch.Tensor:
    from fused_attn.run import execution

    (q, k), others, spec = INSPECTION.records(arguments)
    return execution.weights(q, k, spec, _in_rows(others))


def _weights_fake(*arguments: Any) -> torch.Tensor:
    (q, k), *_ = INSPECTION.records(arguments)
    return like_weights(q, k)


for _name, _run, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake),
                           ("tangent", _tangent, _tangent_fake),
                           ("backward_tangent", _backward_tangent, _backward_tangent_fake),
                           ("statistics", _statistics, _statistics_fake), ("weights", _weights, _weights_fake),
                           ("rotary", _rotary, _rotary_fake)):
    torch.library.impl(LIBRARY, _name, "CompositeExplicitAutograd")(_run)
    if _name != "rotary":  # which torch calls once for each element of a batch
        for _vmap in ("FuncTorchBatched", "Batched"):  # torch.func's, and the one of is_grads_batched
            torch.library.impl(LIBRARY, _name, _vmap)(refuse_batches)
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=LIBRARY)
torch.library.impl(LIBRARY, "seed", "CompositeImplicitAutograd")(draw_seed)
