"""The kernels as torch ops: what torch.compile, FLOP counters, FakeTensors and profilers see.

``fused_attn::forward`` and ``fused_attn::backward`` allocate their outputs and launch. They carry no autograd: gradients
are the business of ``fused_attn.autograd``. Their arguments are the fields of ``Companions`` and ``AttentionSpec``, flat.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from fused_attn import settings
from fused_attn.kernels.backward import launch_delta, launch_dkv, launch_dq, with_weight_sums
from fused_attn.kernels.forward import launch_forward
from fused_attn.kernels.launch import Call
from fused_attn.kernels.mask import list_tiles
from fused_attn.kernels.operand_grad import launch_operand_grad
from fused_attn.kernels.rotary import launch_rotary
from fused_attn.lowering import lower, lse_stride, unpack
from fused_attn.spec import AttentionSpec, Companions, TileConfig, attention_flops, kept_pairs
from fused_attn.tuning import Kernel, arch_of, choose, choose_additive, choose_rotary, fit_operands

if settings.interpreted():
    from fused_attn import interpreter

    interpreter.repair()

_COMPANIONS = ("Tensor? sinks, Tensor? score_weight, Tensor? seed, Tensor? cu_q, Tensor? cu_k, Tensor? used_q, "
               "Tensor? used_k, Tensor[] operands")
_SPEC = ("float scale, SymInt? left, SymInt? right, bool bottom_right, float? softcap, str score_mods, str mask_mods, "
         "float dropout_p, bool precise, str? fp32_precision, SymInt? longest_q, SymInt? longest_k")
_LIBRARY = torch.library.Library("fused_attn", "DEF")
_LIBRARY.define(f"forward(Tensor q, Tensor k, Tensor v, {_COMPANIONS}, {_SPEC}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor? residual, Tensor lse, "
    f"{_COMPANIONS}, {_SPEC}, bool need_dq, bool need_dk, bool need_dv, bool need_dsinks, "
    "bool need_dscore_weight, bool[] need_operands) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])"
)
_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool back) -> Tensor")
N_COMPANIONS, N_SPEC = len(Companions._fields), 12


class Needs(NamedTuple):
    """Which gradients a backward is asked for."""

    dq: bool
    dk: bool
    dv: bool
    dsinks: bool
    dscore_weight: bool
    operands: tuple[bool, ...]


def _accumulates(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _like(x: torch.Tensor, head_dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Empty [B, H, N, head_dim] whose batch, heads and length lie in memory in the order they have in ``x``."""
    size = (*x.shape[:3], head_dim)
    stride = x.stride()[:3]
    if x.is_contiguous() or 0 in stride:
        return x.new_empty(size, dtype=dtype)
    order = sorted(range(3), key=lambda dim: stride[dim], reverse=True)
    return torch.empty_permuted(size, (*order, 3), dtype=dtype or x.dtype, device=x.device)


def _lse_like(q: torch.Tensor, packed: bool) -> torch.Tensor:
    if not packed:
        return q.new_empty(q.shape[:3], dtype=_accumulates(q))
    rows = q.new_full((1, q.shape[1], lse_stride(q)), float("-inf"), dtype=_accumulates(q))
    return rows[:, :, : q.shape[2]]


def _as_lse(x: torch.Tensor, q: torch.Tensor, packed: bool) -> torch.Tensor:
    """``x`` as ``_lse_like`` lays it out: gradients, and saved tensors that a hook moved, may have other strides."""
    fits = x.stride()[1:] == (lse_stride(q), 1) if packed else x.is_contiguous()
    return x if fits else _lse_like(q, packed).copy_(x)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    companions, spec = Companions(*arguments[:N_COMPANIONS]), unpack(arguments[N_COMPANIONS:])
    call = lower(q, k, spec, companions).call
    packed = companions.cu_q is not None
    precise = _keeps_residual(spec, companions)
    out, lse = _like(q, v.shape[3], _accumulates(q) if precise else None), _lse_like(q, packed)
    if packed:  # rows of no sequence are no program's
        out.zero_()
    config = _config("forward", q, v, call)
    tiles = list_tiles(call, q, k, config, keys_first=False)
    launch_forward(q, k, v, out, lse, companions.sinks, tiles, call, config=config, precise=precise)
    if not precise:
        return out, lse, out.new_empty(0)
    rounded = _like(q, out.shape[3]).copy_(out)
    return rounded, lse, _like(q, out.shape[3]).copy_(out.sub_(rounded))


def _config(kernel: Kernel, q: torch.Tensor, v: torch.Tensor, call: Call) -> TileConfig:
    if call.extras.additive:
        return choose_additive(kernel, q.shape[3], arch_of(q.device))
    config = choose(kernel, q.shape[3], v.shape[3], q.dtype, arch_of(q.device), call.heavy)
    return fit_operands(config, call.loaded_bytes, q.dtype) if call.loaded_bytes else config


def _keeps_residual(spec: AttentionSpec, companions: Companions) -> bool:
    """Whether the output is kept in twice its digits: with dropped weights that would not make delta exact.

    Additive scores always ask for it: their dQ sums dS with factors of one sign, 1 - tanh^2, so an error of delta, which is
    one for all keys, adds up there as it does under a large mean of K.
    """
    return (spec.precise or companions.score_weight is not None) and spec.dropout_p == 0


def _sink_weight(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    return torch.where(lse == float("-inf"), 0.0, torch.exp(sinks.to(lse.dtype)[None, :, None] - lse))


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    companions, spec = Companions(*arguments[:N_COMPANIONS]), unpack(arguments[N_COMPANIONS:])
    out = _like(q, v.shape[3])
    residual = _like(q, v.shape[3]) if _keeps_residual(spec, companions) else out.new_empty(0)
    return out, _lse_like(q, companions.cu_q is not None), residual


def _backward(dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              out: torch.Tensor, residual: torch.Tensor | None, lse: torch.Tensor, *arguments: Any) -> tuple[Any, ...]:
    companions, spec, needs = _take_apart(arguments)
    dq, dk, dv = _gradients(q, k, v, needs)
    if companions.cu_q is not None or companions.used_k is not None:  # rows that do not count are no program's
        for grad in (dq, dk, dv):
            grad.zero_()
    call, roles = lower(q, k, spec, companions)
    packed = companions.cu_q is not None
    lse = _as_lse(lse, q, packed)

    config = functools.partial(_config, q=q, v=v, call=call)
    delta = lse  # where only dV is wanted delta is not read
    dsinks = lse.new_empty(0)
    if needs.dq or needs.dk or needs.dsinks or needs.dscore_weight or any(needs.operands):
        delta = _lse_like(q, packed)
        dlse = None if dlse is None else _as_lse(dlse, q, packed)
        launch_delta(out, dout, lse, dlse, delta, call, config=config("delta"))
        if residual is not None:
            rest = _lse_like(q, packed)
            launch_delta(residual, dout, lse, None, rest, call, config=config("delta"))
            delta += rest
        if needs.dsinks:  # a sink is a key of value 0: its dP is 0
            weight = _sink_weight(lse, companions.sinks)
            dsinks = -torch.where(weight == 0, 0.0, weight * delta).sum((0, 2)).to(companions.sinks.dtype)
    dscore_weight = lse.new_empty(0)
    if needs.dq or needs.dscore_weight:
        tiles = list_tiles(call, q, k, config("dq"), keys_first=False)
        if needs.dscore_weight:
            dq = dq if needs.dq else _like(q, q.shape[3])
            call, parts = with_weight_sums(call, q, config("dq"))
        launch_dq(q, k, v, dout, lse, delta, dq, tiles, call, config=config("dq"))
        if needs.dscore_weight:
            weight = companions.score_weight
            dscore_weight = parts.sum((0, 2)).to(weight.dtype)
            dq = dq if needs.dq else q.new_empty(0)
    if needs.dk or needs.dv:
        tiles = list_tiles(call, q, k, config("dkv"), keys_first=True)
        launch_dkv(q, k, v, dout, lse, delta, dk if needs.dk else None, dv if needs.dv else None, tiles, call,
                   config=config("dkv"))
    doperands = []
    for operand, role, need in zip(companions.operands, roles, needs.operands, strict=True):
        if not need or role is None:
            doperands.append(operand.new_empty(0))
            continue
        grad = launch_operand_grad(q, k, v, dout, lse, delta, operand, *role, call, config=config("operand_grad"))
        # As the FakeTensor has it: sums by k - q are a part of a longer line.
        doperands.append(grad.clone(memory_format=torch.contiguous_format) if operand.dim() == 3 else grad)
    return dq, dk, dv, dsinks, dscore_weight, doperands


def _take_apart(arguments: tuple[Any, ...]) -> tuple[Companions, AttentionSpec, Needs]:
    end = N_COMPANIONS + N_SPEC
    dq, dk, dv, dsinks, dscore_weight, operands = arguments[end:]
    needs = Needs(dq, dk, dv, dsinks, dscore_weight, tuple(operands))
    return Companions(*arguments[:N_COMPANIONS]), unpack(arguments[N_COMPANIONS:end]), needs


def _gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, needs: Needs) -> tuple[torch.Tensor, ...]:
    # A gradient that nobody asked for is an empty tensor: an op's outputs are fixed in number.
    return tuple(_like(x, x.shape[3]) if need else x.new_empty(0) for x, need in zip((q, k, v), needs[:3], strict=True))


def _backward_fake(dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   out: torch.Tensor, residual: torch.Tensor | None, lse: torch.Tensor, *arguments: Any) -> tuple[Any, ...]:
    companions, _, needs = _take_apart(arguments)
    sinks, weight = companions.sinks, companions.score_weight
    dscore_weight = weight.new_empty(weight.shape) if weight is not None and needs.dscore_weight else lse.new_empty(0)
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None and needs.dsinks else lse.new_empty(0)
    doperands = [x.new_empty(x.shape) if need else x.new_empty(0)
                 for x, need in zip(companions.operands, needs.operands, strict=True)]
    return *_gradients(q, k, v, needs), dsinks, dscore_weight, doperands


def _guard(name: str) -> Callable[..., Any]:
    """What the op does where autograd reaches it past ``fused_attn.autograd``: raise, where torch would see a constant."""

    def guard(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        tensors += [x for group in args if isinstance(group, (list, tuple)) for x in group if isinstance(x, torch.Tensor)]
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if wanted or any(torch._VF._unpack_dual(x, level=0).tangent is not None for x in tensors):
            instead = "apply_rotary" if name == "rotary" else "attention"
            raise RuntimeError(f"fused_attn::{name} carries no gradient of its own: call fused_attn.{instead}; torch.func and "
                               "forward AD over backend 'triton' are not built yet, backend='reference' has them")
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fused_attn, name).default(*args)

    return guard


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    out = _like(x, x.shape[3])
    launch_rotary(x, cos, sin, out, interleaved, back, config=choose_rotary(x.shape[3]))
    return out


def _rotary_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    return _like(x, x.shape[3])


for _name, _run, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake),
                           ("rotary", _rotary, _rotary_fake)):
    torch.library.impl(_LIBRARY, _name, "CompositeExplicitAutograd")(_run)
    torch.library.impl(_LIBRARY, _name, "Autograd")(_guard(_name))
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_LIBRARY)
forward = torch.ops.fused_attn.forward.default
backward = torch.ops.fused_attn.backward.default
rotary = torch.ops.fused_attn.rotary.default


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
