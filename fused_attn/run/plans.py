"""Plans that are kept: a plain call leaves its plan behind, for the next call of its kind, and its backward another one.

Generation makes one call thousands of times, and training makes one for every layer and step. What is checked, described and
chosen depends on shapes, types and plain arguments alone, so that the second call of a kind need not check and describe again.
Lengths are no part of a kind: where they are new, as from one token to the next, schedule and tiles are chosen anew; where they
were seen before, as from one layer to the next, the steps themselves are kept, as a plan.
"""

from typing import Any, TypeAlias

import torch

from fused_attn import settings, torch_private
from fused_attn.call.schema import Needs, Saved
from fused_attn.call.spec import NO_OTHERS, AttentionSpec
from fused_attn.plan import tuned
from fused_attn.tracing import watched

Key: TypeAlias = tuple[Any, ...]
_HALVES = (torch.float16, torch.bfloat16)  # how fp32 is multiplied is a setting that may change between calls
_MOST = 4096  # plans, and kinds of calls, that are kept; past them all are forgotten
_plans: dict[Any, Any] = {}  # by key; None for what came once, as a plan costs a few calls; False for what has no plan
_specs: dict[Any, AttentionSpec] = {}  # by kind
_NOTHING = object()


def key(q: Any, k: Any, v: Any, causal: Any, window: Any, scale: Any, softcap: Any, backend: Any,
        deterministic: bool | None) -> Key | None:
    """What calls with the same plan have in common; its last entry tells whether gradients are wanted. None for a call that
    neither leaves a plan nor takes one."""
    if q is None or k is None or v is None or watched((q, k, v)) or q.is_nested or k.is_nested or v.is_nested:
        return None
    if q.dtype not in _HALVES or not q.dim() == k.dim() == v.dim() == 4:
        return None
    # 1, 1.0 and True are equal, and not all of them are taken.
    if not (type(causal) is bool and (scale is None or type(scale) is float) and (softcap is None or type(softcap) is float)):
        return None
    if window is not None and (type(window) is not tuple or not all(side is None or type(side) is int for side in window)):
        return None
    device = q.device
    kind = device.type
    if kind not in ("cpu", "cuda", "xpu") or torch.is_autocast_enabled(kind):
        return None
    hopper = settings.hopper_schedule()
    aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0 or _anywhere(hopper, device)
    wanted = (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()
    if deterministic is None:
        deterministic = settings.DETERMINISTIC or torch.are_deterministic_algorithms_enabled()
    return (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, k.dtype, v.dtype, device, k.device,
            v.device, causal, window, scale, softcap, backend, settings.BACKEND, settings.emulated_target(), hopper, aligned,
            deterministic, wanted)


def _anywhere(hopper: str, device: torch.device) -> bool:
    """Whether tensors may begin anywhere for the kernels of a call, which is not so for those of sm_90 alone."""
    if hopper != "auto":
        return hopper == "pointers"
    return settings.TILES is None if device.type == "cpu" else not tuned.schedules(device)


def _kind(key: Key) -> tuple[Any, ...]:
    """A key without lengths and strides."""
    q, _, k, _, v, _, *others = key
    return (*q[:2], q[3], *k[:2], k[3], *v[:2], v[3], k[2] == v[2], *others)


def description(key: Key) -> AttentionSpec | None:
    """The description that an earlier call of the same kind has left, or None."""
    try:
        return _specs.get(_kind(key))
    except TypeError:  # an argument that cannot be hashed: the checks will report it
        return None


def repeated(key: Key, *tensors: torch.Tensor) -> Any:
    """What a plan of earlier calls gives, or None if they left none, or where a kernel turns out not to fit: then the call is
    made anew, with safer tiles."""
    try:
        plan = _plans.get(key)
    except TypeError:  # an argument that cannot be hashed: the checks will report it
        return None
    if not plan:
        return None
    try:
        return plan(*tensors)
    except RuntimeError as error:
        from fused_attn.kernels.launch import UnfitTilesError

        if not isinstance(error, UnfitTilesError):
            raise
        _plans.pop(key, None)
        return None


def forward(key: Key, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
            spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call that is described already, by its plan where there is one."""
    found: tuple[torch.Tensor, torch.Tensor] | None = repeated(key, q, k, v)
    if found is not None:
        return found
    from fused_attn.run import execution  # here and below, so that the package imports without Triton

    if _comes_again(key):
        _plans[key] = execution.plan_forward(q, k, v, spec) or False
    out, lse, _ = execution.forward(q, k, v, spec, NO_OTHERS)
    return out, lse


def backward(key: Key, saved: Saved, spec: AttentionSpec, needs: Needs) -> list[torch.Tensor | None] | None:
    """[dq, dk, dv] by the plan of earlier backwards, or None if there is none. ``key`` is that of the forward."""
    if watched(saved) or torch.is_grad_enabled() or any(x is not None and torch_private.is_batched(x) for x in saved[:2]):
        return None
    # A hook may have moved what autograd saved, and gradients may have any layout.
    whole: Key = key, needs, *[x if x is None else (x.stride(), x.dtype) for x in saved]
    if any(x is not None and x.data_ptr() % 16 for x in saved) and not _anywhere(spec.hopper, saved.q.device):
        return None  # steps over tensors without storage would not see it
    if _plans.get(whole) is None and _comes_again(whole):
        from fused_attn.run import execution

        _plans[whole] = execution.plan_backward(saved, spec, needs) or False
    found = repeated(whole, *[x for x in saved if x is not None])
    if found is None:
        return None
    grads = iter(found)
    return [next(grads) if need else None for need in needs[:3]]


def _comes_again(key: Any) -> bool:
    """Whether a plan is worth making: the key came before and has no plan yet. The first time, the key is noted."""
    found = _plans.get(key, _NOTHING)
    if found is not _NOTHING:
        return found is None
    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[key] = None
    return False


def keep(key: Key, spec: AttentionSpec) -> None:
    """Remembers the description of a call that the kernels answer."""
    if len(_specs) >= _MOST or len(_plans) >= _MOST:
        forget()
    _specs[_kind(key)] = spec
    _plans.setdefault(key, None)


def forget() -> None:
    """Forgets every call."""
    _plans.clear()
    _specs.clear()
