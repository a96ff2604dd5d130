"""Turns a call as it is described (`spec`) into a call as kernels take it: operands, mods, masks, sequences, dropout."""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fused_attn.call.layout import packed_rows
from fused_attn.call.schema import Directions
from fused_attn.call.spec import RELATIVE, TENSOR, AttentionSpec, Longest, Member, OtherTensors
from fused_attn.kernels.dropout import Dropout
from fused_attn.kernels.functions import loaded
from fused_attn.kernels.launch import PLAIN, Call, Extras
from fused_attn.kernels.mask import KEEPS, Keep
from fused_attn.kernels.operand import Operand, Table
from fused_attn.kernels.product import Additive
from fused_attn.kernels.score import CURVES, MODS, Mod, before_mods, one
from fused_attn.kernels.tangent import Along
from fused_attn.kernels.tiles import Sequences
from fused_attn.targets import target_of


class Lowered(NamedTuple):
    """A call as kernels take it, and for each operand the (mod, argument) it is, or None if it belongs to a mask."""

    call: Call
    roles: tuple[tuple[int, int] | None, ...]


def precision(dtype: torch.dtype, asked: str | None, arch: str) -> str:
    """How fp32 products are computed: as asked, else IEEE unless torch's own setting for matmuls on GPUs says TF32."""
    if dtype != torch.float32:
        return "ieee"
    target = target_of(arch)
    if asked == "tf32x3":
        return asked if target.tf32x3 else "ieee"
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" if asked is None else asked == "tf32"
    return "tf32" if tf32 and target.tf32 else "ieee"


def lower(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, others: OtherTensors, arch: str) -> Lowered:
    """Lowers ``spec`` and ``others`` of q [B, H, Nq, D] and k [B, Hkv, Nk, D], or packed [1, H, T, D], for the kernels."""
    batch = q.shape[0] if others.cu_q is None else others.cu_q.shape[0] - 1
    n_queries, n_keys = spec.longest or Longest(q.shape[2], k.shape[2])
    # The spec without its mods, which would live as long as the cache.
    plain = spec._replace(score_mods=(), mask_mods=())
    call = _call(plain, bool(spec.score_mods), batch, n_queries, n_keys, q.dtype, precision(q.dtype, spec.fp32_precision, arch))
    additive = () if others.score_weight is None else _additive(others.score_weight)
    dense = others.cu_q is None and others.used_k is None
    if dense and not spec.score_mods and not spec.mask_mods and spec.dropout_p == 0:
        return Lowered(call._replace(extras=call.extras._replace(additive=additive)) if additive else call, ())

    score_mods = call.extras.mods
    operands, element_size = list(others.operands), q.element_size()
    roles: list[tuple[int, int] | None] = []
    for member in spec.score_mods:
        mod = member.code
        function, slope, arg_slopes, offsets = _functions(member)
        slope = one if slope is None or slope == 1.0 else slope
        arg_slopes, offsets = (tuple(one if x is None else x for x in some) for some in (arg_slopes, offsets))
        curves = _curves(member)
        roles += [(len(score_mods), i) for i, kind in enumerate(member.args) if kind in (TENSOR, RELATIVE)]
        arguments = _arguments(member, operands, n_queries, element_size)
        score_mods += (Mod(function, slope, arg_slopes, arguments, _order(member), tl.constexpr(mod.raw), curves,
                           offsets),)
    packed = others.cu_q is not None
    by_batch = packed or others.used_k is not None
    by_head = False
    keeps: tuple[Keep, ...] = ()
    for member in spec.mask_mods:
        mod = member.code
        tensors = operands[: sum(kind in (TENSOR, RELATIVE) for kind in member.args)]
        by_batch = by_batch or mod.by_batch or any(x.shape[0] > 1 for x in tensors)
        by_head = by_head or mod.by_head or any(x.shape[1] > 1 for x in tensors)
        roles += [None] * len(tensors)
        function = loaded(mod.source)["function"] if mod.source else KEEPS[mod.name] if mod.function is None else mod.function
        arguments = _arguments(member, operands, n_queries, element_size)
        keeps += (Keep(function, arguments, _order(member), tl.constexpr(mod.raw)),)
    extras = Extras(score_mods, keeps, _sequences(others, q, k), _dropout(spec, others), additive)
    tiled = [x for x in others.operands if x.dim() <= 4]
    loaded_bytes = sum(x.element_size() for x in tiled if x.dim() == 3 or (x.stride(2) and x.stride(3)))
    widest = max((max(x.stride()[2:]) for x in tiled), default=0)
    return Lowered(call._replace(extras=extras, masks_by=(by_batch, by_head), widest=widest,
                                 loaded_bytes=loaded_bytes), tuple(roles))


def lower_along(call: Call, spec: AttentionSpec, along: Directions, sinks: torch.Tensor | None, element_size: int,
                dout_t: torch.Tensor | None = None) -> Along:
    """The tangents of a lowered call as kernels take them; ``element_size`` is that of q."""
    q, k, v, dout = (() if x is None else (x, *call.strides(x)) for x in (*along[:3], dout_t))
    weight = () if along.score_weight_t is None else (_additive(along.score_weight_t),)
    operands, moving = iter(along.operands_t), any(x.numel() for x in along.operands_t)
    own = [((),) * len(mod.args) for mod in call.extras.mods[: len(call.extras.mods) - len(spec.score_mods)]]
    of_mods = [tuple(_moving(next(operands), call.n_queries, element_size) if kind in (TENSOR, RELATIVE) else ()
                     for kind in member.args) for member in spec.score_mods]
    return Along(q, k, v, () if along.sinks_t is None else (sinks, along.sinks_t), weight, (*own, *of_mods) if moving else (),
                 dout)


def _moving(x: torch.Tensor, n_queries: int, element_size: int) -> Any:
    """The tangent of an operand as ``push_mods`` takes it."""
    return () if not x.numel() else (x,) if x.dim() > 4 else _operand(x, n_queries, element_size)


@functools.lru_cache(1024)
def _call(spec: AttentionSpec, modded: bool, batch: int, n_queries: int, n_keys: int, dtype: torch.dtype,
          precision: str) -> Call:
    """The part of a call that depends on no tensor."""
    reach = n_queries + n_keys  # no bound beyond this changes anything, and with it 32 bits are enough
    left, right = (None if bound is None else max(-reach, min(bound, reach)) for bound in spec.window)
    score_mods = before_mods(spec.scale, spec.softcap, modded, dtype)
    return Call(spec.scale, left, right, spec.offset(n_queries, n_keys), precision, batch, n_queries, n_keys,
                Extras(score_mods) if score_mods else PLAIN)


def _functions(member: Member) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    """(function, slope, slopes of the arguments, their offsets where they are tables) of a score mod."""
    mod = member.code
    if mod.source:
        found = loaded(mod.source)
        slopes, offsets = (tuple(found.get(f"{what}_{i}") for i in range(len(member.args))) for what in ("slope", "offset"))
        return found["function"], found["slope"], slopes, offsets
    return (*(MODS[mod.name] if mod.function is None else (mod.function, mod.slope, mod.arg_slopes)), ())


def _curves(member: Member) -> tuple[Any, ...]:
    """The second derivatives of a score mod, as in ``score.Mod``."""
    mod = member.code
    if not mod.source:
        return CURVES.get(mod.name, ()) if mod.function is None else ()
    found, n = loaded(mod.source), range(len(member.args))

    def by(*of: int) -> tuple[Any, ...]:
        name = "_".join(("curve", *map(str, sorted(of))))
        return (found[name],) if name in found else ()

    curves = by(), tuple(by(i) for i in n), tuple(tuple(by(i, j) for j in n) for i in n)
    return curves if any(name.startswith("curve") for name in found) else ()


def _arguments(member: Member, operands: list[torch.Tensor], n_queries: int, element_size: int) -> tuple[Any, ...]:
    """The arguments of a member, taking its tensors off the front of ``operands``; ``element_size`` is that of q."""
    arguments: list[Any] = []
    for kind in member.args:
        if kind in (TENSOR, RELATIVE):
            arguments.append(_operand(operands.pop(0), n_queries, element_size))
        else:
            arguments.append((tl.constexpr(float(kind) if "." in kind or "e" in kind else int(kind)),))
    return tuple(arguments)


def _order(member: Member) -> tuple[Any, ...]:
    return tuple(tl.constexpr(i) for i in range(len(member.args)))


def _operand(x: torch.Tensor, n_queries: int, element_size: int) -> Any:
    boolean = tl.constexpr(x.dtype == torch.bool)
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dim() > 4:
        return (Table(x, tuple(x.shape), tuple(x.stride())),)
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    start = 0
    if x.dim() == 3:  # the value of (i, j) lies at j - i + Nq - 1
        step = x.stride(2)
        start, strides = (n_queries - 1) * step, [*strides[:2], -step, step]
    constant = tuple(tl.constexpr(0) if stride == 0 else stride for stride in strides)
    return Operand(x, tl.constexpr(0) if start == 0 else start, constant,
                   tl.constexpr(strides[2] != 0), tl.constexpr(strides[3] != 0), boolean,
                   tl.constexpr(x.element_size() < element_size))


def _additive(weight: torch.Tensor) -> Additive:
    return Additive(weight, tl.constexpr(0) if weight.stride(0) == 0 else weight.stride(0))


def _sequences(others: OtherTensors, q: torch.Tensor, k: torch.Tensor) -> Sequences:
    given = others.cu_q, others.cu_k, others.used_q, others.used_k
    cu_q, cu_k, used_q, used_k = (() if x is None else (x,) for x in given)
    if others.cu_q is None:
        return Sequences(cu_q, cu_k, used_q, used_k)
    return Sequences(cu_q, cu_k, used_q, used_k, packed_rows(q.shape[2]), packed_rows(k.shape[2]))


def _dropout(spec: AttentionSpec, others: OtherTensors) -> tuple[Any, ...]:
    if spec.dropout_p == 0:
        return ()
    threshold = min(round(spec.dropout_p * 2**32), 2**32 - 1)
    factor = 1 / (1 - spec.dropout_p) if spec.dropout_p < 1 else 0.0
    return Dropout(others.seed, tl.constexpr(threshold), tl.constexpr(factor))
