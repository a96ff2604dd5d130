"""The kernels as torch ops: what torch.compile, FLOP counters, FakeTensors and profilers see.

``fused_attn::forward`` and ``fused_attn::backward`` allocate their outputs and launch. They carry no autograd: gradients
are the business of ``fused_attn.autograd``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fused_attn import settings
from fused_attn.kernels.backward import launch_delta, launch_dkv, launch_dq
from fused_attn.kernels.forward import launch_forward
from fused_attn.kernels.score import select
from fused_attn.spec import AttentionSpec, Window, attention_flops, kept_pairs
from fused_attn.tuning import arch_of, choose, has_tf32

if settings.interpreted():
    from fused_attn import interpreter

    interpreter.repair()

_SPEC = "float scale, SymInt? left, SymInt? right, bool bottom_right, float? softcap"
_LIBRARY = torch.library.Library("fused_attn", "DEF")
_LIBRARY.define(f"forward(Tensor q, Tensor k, Tensor v, {_SPEC}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SPEC}, bool need_dq, bool need_dk, bool need_dv) -> (Tensor, Tensor, Tensor)"
)


def pack(spec: AttentionSpec) -> tuple[Any, ...]:
    """A spec as the trailing arguments of the ops."""
    return spec.scale, spec.window.left, spec.window.right, spec.bottom_right, spec.softcap


def _like(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Empty [B, H, N, head_dim] whose batch, heads and length lie in memory in the order they have in ``x``."""
    size = (*x.shape[:3], head_dim)
    stride = x.stride()[:3]
    if x.is_contiguous() or 0 in stride:
        return x.new_empty(size)
    order = sorted(range(3), key=lambda dim: stride[dim], reverse=True)
    return torch.empty_permuted(size, (*order, 3), dtype=x.dtype, device=x.device)


def _lse_like(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _precision(q: torch.Tensor) -> str:
    """How fp32 products are computed: IEEE unless torch's own setting for matmuls on GPUs says TF32."""
    if q.dtype != torch.float32 or not q.is_cuda or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if has_tf32(arch_of(q.device)) else "ieee"


def _kernel_arguments(q: torch.Tensor, k: torch.Tensor, scale: float, left: int | None, right: int | None,
                      bottom_right: bool) -> dict[str, Any]:
    n_queries, n_keys = q.shape[2], k.shape[2]
    reach = n_queries + n_keys  # no bound beyond this changes anything, and with it 32 bits are enough
    return {
        "scale": scale,
        "left": None if left is None else min(left, reach),
        "right": None if right is None else min(right, reach),
        "offset": n_keys - n_queries if bottom_right else 0,
        "precision": _precision(q),
    }


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, left: int | None, right: int | None,
             bottom_right: bool, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _like(q, v.shape[3]), _lse_like(q)
    score_mod, _, mod_args = select(scale, softcap, q.dtype)
    config = choose("forward", q.shape[3], v.shape[3], q.dtype, arch_of(q.device))
    arguments = _kernel_arguments(q, k, scale, left, right, bottom_right)
    launch_forward(q, k, v, out, lse, score_mod=score_mod, mod_args=mod_args, config=config, **arguments)
    return out, lse


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *spec: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q, v.shape[3]), _lse_like(q)


def _backward(dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              out: torch.Tensor, lse: torch.Tensor, scale: float, left: int | None, right: int | None,
              bottom_right: bool, softcap: float | None, need_dq: bool, need_dk: bool, need_dv: bool,
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _backward_fake(dout, dlse, q, k, v, out, lse, scale, left, right, bottom_right, softcap,
                                need_dq, need_dk, need_dv)
    arch, sizes = arch_of(q.device), (q.shape[3], v.shape[3], q.dtype)
    score_mod, score_slope, mod_args = select(scale, softcap, q.dtype)
    mods = {"score_mod": score_mod, "score_slope": score_slope, "mod_args": mod_args}
    arguments = _kernel_arguments(q, k, scale, left, right, bottom_right)

    delta = lse  # where only dV is wanted delta is not read
    if need_dq or need_dk:
        delta = torch.empty_like(lse)
        dlse = None if dlse is None else dlse.contiguous()
        launch_delta(out, dout, lse, dlse, delta, config=choose("delta", *sizes, arch))
    if need_dq:
        launch_dq(q, k, v, dout, lse, delta, dq, config=choose("dq", *sizes, arch), **mods, **arguments)
    launch_dkv(q, k, v, dout, lse, delta, dk if need_dk else None, dv if need_dv else None,
               config=choose("dkv", *sizes, arch), **mods, **arguments)
    return dq, dk, dv


def _backward_fake(dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # A gradient that nobody asked for is an empty tensor: an op's outputs are fixed in number.
    needs = rest[-3:]
    dq, dk, dv = (_like(x, x.shape[3]) if need else x.new_empty(0) for x, need in zip((q, k, v), needs, strict=True))
    return dq, dk, dv


def _guard(name: str) -> Callable[..., Any]:
    """What the op does where autograd reaches it past ``fused_attn.autograd``: raise, where torch would see a constant."""

    def guard(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if wanted or any(torch._VF._unpack_dual(x, level=0).tangent is not None for x in tensors):
            raise RuntimeError(f"fused_attn::{name} carries no gradient of its own: call fused_attn.attention; torch.func and "
                               "forward AD over backend 'triton' are not built yet, backend='reference' has them")
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fused_attn, name).default(*args)

    return guard


torch.library.impl(_LIBRARY, "forward", "CompositeExplicitAutograd")(_forward)
torch.library.impl(_LIBRARY, "forward", "Autograd")(_guard("forward"))
torch.library.impl(_LIBRARY, "backward", "Autograd")(_guard("backward"))
torch.library.impl(_LIBRARY, "backward", "CompositeExplicitAutograd")(_backward)
torch.library.register_fake("fused_attn::forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("fused_attn::backward", _backward_fake, lib=_LIBRARY)
forward = torch.ops.fused_attn.forward.default
backward = torch.ops.fused_attn.backward.default


def _pairs(q_shape: Any, k_shape: Any, spec: tuple[Any, ...]) -> int:
    packed = AttentionSpec(spec[0], Window(spec[1], spec[2]), spec[3])
    return kept_pairs(q_shape[2], k_shape[2], packed.window, packed.offset(q_shape[2], k_shape[2]))


@register_flop_formula(torch.ops.fused_attn.forward)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *spec: Any, **_: Any) -> int:
    return attention_flops(q_shape[0], q_shape[1], _pairs(q_shape, k_shape, spec), q_shape[3], v_shape[3],
                           products_qk=1, products_v=1)


@register_flop_formula(torch.ops.fused_attn.backward)
def _backward_flops(dout_shape: Any, dlse_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, o_shape: Any,
                    lse_shape: Any, *spec_and_needs: Any, **_: Any) -> int:
    need_dq, need_dk, need_dv = spec_and_needs[-3:]
    products_qk = 1 + need_dq + need_dk
    products_v = int(need_dq or need_dk) + need_dv
    return attention_flops(q_shape[0], q_shape[1], _pairs(q_shape, k_shape, spec_and_needs), q_shape[3], v_shape[3],
                           products_qk=products_qk, products_v=products_v)
