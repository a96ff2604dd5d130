"""Attention weights on request, and statistics of them that never hold them all; the fused path keeps neither."""

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from fused_attn import reference, settings, torch_private
from fused_attn.call.describe import Described, describe
from fused_attn.plan import backends
from fused_attn.run import autograd, ops
from fused_attn.tracing import without_autocast


class AttentionStats(NamedTuple):
    """Aggregates of attention weights, before dropout, in fp32 (fp64 for fp64 inputs).

    received [B, H, Nk]: what each key receives, summed over queries. entropy [B, H, Nq]: -sum(p ln p) over the keys, in
    nats. maximum [B, H, Nq]: the largest weight of each query. distance [B, H, Nq]: the mean attended distance of each query,
    sum(p |position - key|) over the keys, to which a sink adds nothing. A query without keys has 0 in the last three.
    """

    received: torch.Tensor
    entropy: torch.Tensor
    maximum: torch.Tensor
    distance: torch.Tensor


def _described(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, arguments: dict[str, Any]) -> Described:
    """The description of a call, with or without values: the weights do not depend on them."""
    return ops.seeded(describe(q, k, k[..., :1] if v is None else v, **arguments))


def _runs_kernels(call: Described, backend: str | None, strict: bool | None, quadratic: bool) -> bool:
    preset = "reference" if settings.BACKEND in ("torch", "blocked") else settings.BACKEND  # which have no weights to show
    asked = preset if backend is None else backend
    if asked not in (None, "triton", "reference"):
        raise ValueError(f"backend: expected 'triton', 'reference' or None; got {asked!r}")
    reasons = backends.against_triton(call)
    if torch_private.transforms_active():
        reasons += ("these kernels know no transforms of torch.func",)
    if asked == "triton" and reasons:
        raise ValueError(f"backend: 'triton' cannot run this call: {'; '.join(reasons)}")
    if asked is None and reasons and quadratic and settings.is_strict(strict):
        raise RuntimeError(f"strict: only the quadratic reference could run this call: {'; '.join(reasons)}")
    return asked != "reference" and not reasons


def attention_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, *, backend: str | None = None,
                      **arguments: Any) -> torch.Tensor:
    """The weights [B, H, Nq, Nk] that ``attention`` would multiply with V, in q's dtype.

    ``v`` may be None. ``arguments`` are those of ``attention`` that shape the scores; with ``dropout_p``, a mask is drawn
    for this call. They are differentiable: gradients are computed in plain PyTorch, from weights recomputed in the backward,
    so that nothing of their size is kept in between.
    """
    call = _described(q, k, v, arguments)
    return _weights(call, _runs_kernels(call, backend, None, quadratic=False))


def attention_and_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                          **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, weights) of one call, with one dropout mask; ``arguments`` are those of ``attention`` that shape the scores.

    Where the kernels are not the default, both come from the one matrix of weights that the caller asked for anyway.
    """
    call = _described(q, k, v, arguments)
    if (settings.BACKEND == "triton" or call.q.device.type != "cpu") and _runs_kernels(call, None, None, quadratic=False):
        return autograd.attention(*call)[0], _weights(call, True)
    weights = _reference_weights(call)
    values = call.v if call.v.shape[1] == call.q.shape[1] else call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
    lengths = call.others.used_k
    if lengths is not None:  # what lies past the end may be NaN, and 0 * NaN is NaN
        past = torch.arange(values.shape[2], device=values.device) >= lengths[:, None]
        values = values.masked_fill(past[:, None, :, None], 0)
    return weights @ values, weights


def _weights(call: Described, kernels: bool) -> torch.Tensor:
    """Weights of a call that has its seed, by the kernels or by the reference."""
    others = call.others
    tensors = call.q, call.k, others.sinks, others.score_weight, *others.operands

    def plain(q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None, score_weight: torch.Tensor | None,
              *operands: torch.Tensor) -> torch.Tensor:
        same = others._replace(sinks=sinks, score_weight=score_weight, operands=operands)
        return _reference_weights(call._replace(q=q, k=k, others=same))

    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if torch_private.transforms_active():  # checkpointing does not know them
        return plain(*tensors)
    if not kernels or torch.compiler.is_compiling():  # the compiler traces plain PyTorch and makes a kernel of it
        result: torch.Tensor = checkpoint(plain, *tensors, use_reentrant=False) if wanted else plain(*tensors)
        return result

    def run(*_: Any) -> torch.Tensor:
        return ops.weights(call.q, call.k, others, call.spec)

    if not wanted:
        return run()
    result = autograd.Recomputed.apply(run, plain, *tensors)
    return result


def _reference_weights(call: Described) -> torch.Tensor:
    with without_autocast(call.q.device):
        return reference.weights(call.q, call.k, call.spec, call.others)[0].to(call.q.dtype)


def attention_stats(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, *, backend: str | None = None,
                    strict: bool | None = None, **arguments: Any) -> AttentionStats:
    """Received weight per key; entropy, largest weight and mean attended distance per query, in O(N) memory.

    It multiplies Q and K twice, as much as one forward multiplies: once along rows, for what is per query and the LSE, once
    along columns, which need the LSE of every row. (One sweep would add one of the two with atomics, in no fixed order.)

    The mean of ``distance`` over queries is the "mean attention distance" of Dosovitskiy et al. 2020, "An Image is Worth 16x16
    Words".

    ``v`` may be None. ``arguments`` are those of ``attention`` that shape the scores, except for dropout. The kernels give no
    gradients; ``backend="reference"`` does, with memory quadratic in the length.
    """
    if arguments.get("dropout_p"):
        raise ValueError(f"dropout_p: expected 0, statistics are of the weights before dropout; got {arguments['dropout_p']!r}")
    call = _described(q, k, v, arguments)
    if _runs_kernels(call, backend, strict, quadratic=True):
        return AttentionStats(*ops.statistics(call.q, call.k, call.others, call.spec))
    with without_autocast(call.q.device):
        p, _ = reference.weights(call.q, call.k, call.spec, call.others)
    maximum = p.amax(-1) if p.shape[-1] else p.sum(-1)
    distance = (p * reference.distances(call.spec, p.shape[2], p.shape[3], p.device)).sum(-1)
    return AttentionStats(p.sum(-2), torch.special.entr(p).sum(-1), maximum, distance)
