"""The kernels as torch ops: what torch.compile, FLOP counters, FakeTensors and profilers see.

``fused_attn::forward`` and ``fused_attn::backward`` are ``execution`` behind a schema. They carry no autograd: gradients
are the business of ``fused_attn.autograd``. Their arguments are the fields of ``Companions`` and ``AttentionSpec``, flat.
Where nobody looks, ``forward``, ``backward`` and ``rotary`` go past the ops: thirty arguments through torch's dispatcher cost
more than everything else that the host does for a call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fused_attn import execution, torch_private
from fused_attn.execution import Needs, keeps_residual, like, lse_like
from fused_attn.lowering import unpack
from fused_attn.replay import watched
from fused_attn.spec import AttentionSpec, Companions, attention_flops, kept_pairs

_COMPANIONS = ("Tensor? sinks, Tensor? score_weight, Tensor? seed, Tensor? cu_q, Tensor? cu_k, Tensor? used_q, "
               "Tensor? used_k, Tensor[] operands")
_SPEC = ("float scale, SymInt? left, SymInt? right, bool bottom_right, float? softcap, str score_mods, str mask_mods, "
         "float dropout_p, bool precise, str? fp32_precision, SymInt? longest_q, SymInt? longest_k, bool deterministic, "
         "str rung")
_LIBRARY = torch.library.Library("fused_attn", "DEF")
_LIBRARY.define(f"forward(Tensor q, Tensor k, Tensor v, {_COMPANIONS}, {_SPEC}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor? residual, Tensor lse, "
    f"{_COMPANIONS}, {_SPEC}, bool need_dq, bool need_dk, bool need_dv, bool need_dsinks, "
    "bool need_dscore_weight, bool[] need_operands) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])"
)
_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool back) -> Tensor")
_OPS = torch.ops.fused_attn
N_COMPANIONS, N_SPEC = len(Companions._fields), 14
_TENSORS = 8  # of the backward: dout, dlse, q, k, v, out, residual, lse


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, companions: Companions,
            packed: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out, lse as ``execution.lse_like`` makes it, residual or None) of a call, its spec as ``lowering.pack`` gives it."""
    if not watched((q, k, v, *companions[:-1], *companions.operands)):
        return execution.forward(q, k, v, _unpacked(packed), companions)
    out, lse, residual = _OPS.forward.default(q, k, v, *companions, *packed)
    return out, lse, residual if residual.numel() else None


def backward(tensors: tuple[Any, ...], companions: Companions, packed: tuple[Any, ...], needs: Needs) -> tuple[Any, ...]:
    """(dq, dk, dv, dsinks, dscore_weight, [of each operand]); ``tensors``: dout, dlse, q, k, v, out, residual, lse."""
    if not watched((*tensors, *companions[:-1], *companions.operands)):
        return execution.backward(tensors, _unpacked(packed), companions, needs)
    grads: tuple[Any, ...] = _OPS.backward.default(*tensors, *companions, *packed, *needs)
    return grads


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    """x [B, H, N, D] turned, or turned back, with cos and sin [B, N, pairs]."""
    if not watched((x, cos, sin)):
        return execution.rotary(x, cos, sin, interleaved, back)
    turned: torch.Tensor = _OPS.rotary.default(x, cos, sin, interleaved, back)
    return turned


_unpacked = functools.lru_cache(unpack)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    companions, spec = Companions(*arguments[:N_COMPANIONS]), unpack(arguments[N_COMPANIONS:])
    out, lse, residual = execution.forward(q, k, v, spec, companions)
    return out, lse, _some(residual, out)


def _some(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """An op's outputs are fixed in number: an empty tensor stands for none."""
    return like.new_empty(0) if x is None else x


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    companions, spec = Companions(*arguments[:N_COMPANIONS]), unpack(arguments[N_COMPANIONS:])
    out = like(q, v.shape[3])
    residual = like(q, v.shape[3]) if keeps_residual(spec, companions) else out.new_empty(0)
    return out, lse_like(q, spec, companions.cu_q is not None), residual


def _backward(*arguments: Any) -> tuple[Any, ...]:
    tensors, rest = arguments[:_TENSORS], arguments[_TENSORS:]
    companions, spec, needs = _take_apart(rest)
    *grads, doperands = execution.backward(tensors, spec, companions, needs)
    q, k, v, lse = tensors[2], tensors[3], tensors[4], tensors[7]
    whose = q, k, v, lse, lse
    return (*(_some(grad, x) for grad, x in zip(grads, whose, strict=True)),
            [_some(grad, x) for grad, x in zip(doperands, companions.operands, strict=True)])


def _take_apart(arguments: tuple[Any, ...]) -> tuple[Companions, AttentionSpec, Needs]:
    end = N_COMPANIONS + N_SPEC
    dq, dk, dv, dsinks, dscore_weight, operands = arguments[end:]
    needs = Needs(dq, dk, dv, dsinks, dscore_weight, tuple(operands))
    return Companions(*arguments[:N_COMPANIONS]), unpack(arguments[N_COMPANIONS:end]), needs


def _backward_fake(dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   out: torch.Tensor, residual: torch.Tensor | None, lse: torch.Tensor, *arguments: Any) -> tuple[Any, ...]:
    companions, _, needs = _take_apart(arguments)
    sinks, weight = companions.sinks, companions.score_weight
    dscore_weight = weight.new_empty(weight.shape) if weight is not None and needs.dscore_weight else lse.new_empty(0)
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None and needs.dsinks else lse.new_empty(0)
    doperands = [x.new_empty(x.shape) if need else x.new_empty(0)
                 for x, need in zip(companions.operands, needs.operands, strict=True)]
    # A gradient that nobody asked for is an empty tensor: an op's outputs are fixed in number.
    grads = (like(x, x.shape[3]) if need else x.new_empty(0) for x, need in zip((q, k, v), needs[:3], strict=True))
    return *grads, dsinks, dscore_weight, doperands


def _guard(name: str, below_autograd: Callable[[], Any]) -> Callable[..., Any]:
    """What the op does where autograd reaches it past ``fused_attn.autograd``: raise, where torch would see a constant."""

    def guard(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        tensors += [x for group in args if isinstance(group, (list, tuple)) for x in group if isinstance(x, torch.Tensor)]
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if wanted or any(forward_ad.unpack_dual(x, level=0).tangent is not None for x in tensors):
            instead = "apply_rotary" if name == "rotary" else "attention"
            raise RuntimeError(f"fused_attn::{name} carries no gradient of its own: call fused_attn.{instead}; torch.func and "
                               "forward AD over backend 'triton' are not built yet, backend='reference' has them")
        with below_autograd():
            return getattr(torch.ops.fused_attn, name).default(*args)

    return guard


def _rotary_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    return like(x, x.shape[3])


for _name, _run, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake),
                           ("rotary", execution.rotary, _rotary_fake)):
    torch.library.impl(_LIBRARY, _name, "CompositeExplicitAutograd")(_run)
    if torch_private.below_autograd is not None:
        torch.library.impl(_LIBRARY, _name, "Autograd")(_guard(_name, torch_private.below_autograd))
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_LIBRARY)


def _pairs(q_shape: Any, k_shape: Any, cu_q: Any, spec: AttentionSpec) -> tuple[int, int]:
    """(batch, pairs a head); packed sequences count as if all were the longest, masks as if they kept everything."""
    n_queries, n_keys = spec.longest or (q_shape[2], k_shape[2])
    batch = q_shape[0] if cu_q is None else cu_q[0] - 1
    return batch, kept_pairs(n_queries, n_keys, spec.window, spec.offset(n_queries, n_keys))


@register_flop_formula(torch.ops.fused_attn.forward)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *arguments: Any, **_: Any) -> int:
    spec = unpack(arguments[N_COMPANIONS : N_COMPANIONS + N_SPEC])
    batch, pairs = _pairs(q_shape, k_shape, arguments[2], spec)
    return attention_flops(batch, q_shape[1], pairs, q_shape[3], v_shape[3], products_qk=1, products_v=1)


@register_flop_formula(torch.ops.fused_attn.backward)
def _backward_flops(dout_shape: Any, dlse_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, o_shape: Any,
                    residual_shape: Any, lse_shape: Any, *arguments: Any, **others: Any) -> int:
    _, spec, needs = _take_apart(arguments)
    batch, pairs = _pairs(q_shape, k_shape, arguments[2], spec)
    products_qk = 1 + needs.dq + needs.dk
    products_v = int(needs.dq or needs.dk) + needs.dv
    return attention_flops(batch, q_shape[1], pairs, q_shape[3], v_shape[3], products_qk=products_qk, products_v=products_v)
