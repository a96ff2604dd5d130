"""Plans that are kept: a plain call without gradients leaves its plan behind, for the next call of its kind.

Generation makes one call thousands of times. What is checked, described and chosen depends on shapes, types and plain arguments
alone, so that the second call of a kind need not check and describe again. Lengths are no part of a kind: where they are new,
as from one token to the next, schedule and tiles are chosen anew; where they were seen before, as from one layer to the next,
the launches themselves are kept, as a plan.
"""

from typing import Any

import torch

from fused_attn import settings
from fused_attn.call.spec import NO_OTHERS, AttentionSpec
from fused_attn.tracing import PLAIN_CLASSES, watched

_HALVES = (torch.float16, torch.bfloat16)  # how fp32 is multiplied is a setting that may change between calls
_MOST = 4096  # plans, and kinds of calls, that are kept; past them all are forgotten
_plans: dict[Any, Any] = {}  # by key; None for what came once, for a plan costs as much as a few calls
_specs: dict[Any, AttentionSpec] = {}  # by kind


def key(q: Any, k: Any, v: Any, causal: Any, window: Any, scale: Any, softcap: Any, backend: Any) -> tuple[Any, ...] | None:
    """What calls with one plan have in common, or None for a call that neither leaves a plan nor takes one."""
    if not (type(q) in PLAIN_CLASSES and type(k) in PLAIN_CLASSES and type(v) in PLAIN_CLASSES) or q.dtype not in _HALVES:
        return None
    if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
        return None
    # 1, 1.0 and True are equal, and not all of them are taken.
    if not (type(causal) is bool and (scale is None or type(scale) is float) and (softcap is None or type(softcap) is float)):
        return None
    if window is not None and (type(window) is not tuple or not all(side is None or type(side) is int for side in window)):
        return None
    if watched((q, k, v)) or q.is_nested or k.is_nested or v.is_nested or not q.dim() == k.dim() == v.dim() == 4:
        return None
    if q.device.type not in ("cpu", "cuda", "xpu") or torch.is_autocast_enabled(q.device.type):
        return None
    hopper = settings.hopper_schedule()
    # Kernels of the other schedules ask where a tensor begins.
    aligned = hopper == "pointers" or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0
    return (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, k.dtype, v.dtype, q.device, k.device,
            v.device, causal, window, scale, softcap, backend, settings.BACKEND, settings.emulated_target(), hopper, aligned)


def _kind(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key without lengths and strides."""
    q, _, k, _, v, _, *others = key
    return (*q[:2], q[3], *k[:2], k[3], *v[:2], v[3], k[2] == v[2], *others)


def attend(key: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out, lse) by what earlier calls have left, or None if they left nothing."""
    try:
        plan = _plans.get(key)
    except TypeError:  # an argument that cannot be hashed: let the checks speak of it
        return None
    if plan is not None:
        return plan(q, k, v)
    spec = _specs.get(_kind(key))
    if spec is None:
        return None
    from fused_attn.run import execution  # here, so that the package imports without Triton

    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[key] = execution.plan_forward(q, k, v, spec) if key in _plans else None
    out, lse, _ = execution.forward(q, k, v, spec, NO_OTHERS)
    return out, lse


def keep(key: tuple[Any, ...], spec: AttentionSpec) -> None:
    """Remembers the description of a call that the kernels answer."""
    if len(_specs) >= _MOST or len(_plans) >= _MOST:
        forget()
    _specs[_kind(key)] = spec
    _plans.setdefault(key, None)


def forget() -> None:
    """Forgets every call."""
    _plans.clear()
    _specs.clear()
