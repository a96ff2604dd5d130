"""Calls made before, made again: a plain call without gradients leaves its launches behind, for the next of its kind.

Generation makes one call thousands of times. What is checked, described and chosen depends on shapes, strides, types and
plain arguments alone, so the second call of a kind takes its launches from the first, with other tensors.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from fused_attn import settings, torch_private

_CLASSES = (torch.Tensor, torch.nn.Parameter)
_HALVES = (torch.float16, torch.bfloat16)  # how fp32 is multiplied is a setting that may change between calls
_MOST = 4096  # kinds of calls kept; past them all are forgotten
_made: dict[Any, "Replay"] = {}


def watched(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether a call must be a torch op: for a compiler, tracer, mode, transform, forward AD, profiler, tensor subclass or meta
    device, or a tensor whose values are not those that it stores, such as ``x.conj().imag``."""
    if (torch.compiler.is_compiling() or torch_private.dispatch_modes() or torch_private.transforms_active()
            or torch_private.forward_mode() or torch_private.profiler_enabled() or torch_private.is_tracing()):
        return True
    return any(x is not None and (type(x) not in _CLASSES or x.is_meta or x.is_neg() or torch_private.is_zero(x))
               for x in tensors)


def traced(x: torch.Tensor) -> bool:
    """Whether the values of a tensor cannot be looked at, or must not: the next run of what is traced has others."""
    return torch.compiler.is_compiling() or torch_private.is_tracing() or type(x) not in _CLASSES or x.is_meta


class Replay(NamedTuple):
    """The launches of one kind of call, and what it allocates: out, lse and buffers, each (shape, strides, type)."""

    launches: tuple[tuple[Any, tuple[int, ...], tuple[Any, ...]], ...]  # with slots of tensors, then other arguments
    made: tuple[tuple[Any, Any, torch.dtype], ...]
    run: Callable[..., None]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse)"""
        device = q.device
        tensors = [q, k, v, *[torch.empty_strided(*place, dtype=dtype, device=device) for *place, dtype in self.made]]
        for launch, slots, others in self.launches:
            self.run(launch._replace(arguments=(*[tensors[i] for i in slots], *others)))
        return tensors[3], tensors[4]


def kind(q: Any, k: Any, v: Any, causal: Any, window: Any, *others: Any) -> tuple[Any, ...] | None:
    """What calls of one kind have in common, or None for a call that is not to be repeated so; ``others``: plain arguments."""
    if torch.compiler.is_compiling() or not (type(q) in _CLASSES and type(k) in _CLASSES and type(v) in _CLASSES):
        return None
    if q.dtype not in _HALVES or q.is_nested or k.is_nested or v.is_nested or not isinstance(causal, bool):
        return None
    if not (window is None or isinstance(window, tuple)):
        return None
    return (q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype,
            v.device, causal, window, *others, settings.BACKEND, settings.rung(), settings.emulated_target())


def find(key: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Replay | None:
    """The launches of an earlier call of this kind, if this one may be answered by them."""
    try:
        found = _made.get(key)
    except TypeError:  # an argument that cannot be hashed: let the checks speak of it
        return None
    if (found is None or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
            or torch.is_autocast_enabled(q.device.type) or watched((q, k, v))):
        return None
    return found


def keep(key: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
         launches: list[Any], run: Callable[..., None]) -> None:
    """Remembers the launches (``kernels.launch.Launch``) of a call that was just made, if nothing but its tensors would
    differ in another one."""
    tensors = [q, k, v, out, lse]
    slots = {x.data_ptr(): i for i, x in enumerate(tensors)}
    if len(slots) < len(tensors) or not launches:  # one tensor in two places, or empty ones; launched by other means
        return
    storages = {x.untyped_storage().data_ptr() for x in tensors}
    steps = []
    for launch in launches:
        arguments = launch.arguments
        given = [x for x in arguments if isinstance(x, torch.Tensor)]
        if any(x is not y for x, y in zip(given, arguments, strict=False)):  # tensors must come first
            return
        # A tensor descriptor is that of one tensor, or asks of every other one that it be aligned as this one is.
        if launch.config.descriptors or any(hasattr(x, "block_shape") for x in arguments):
            return
        for x in given:
            if x.data_ptr() not in slots:
                if x.untyped_storage().data_ptr() in storages:  # a part of a tensor, which part may change
                    return
                slots[x.data_ptr()] = len(tensors)
                tensors.append(x)
        steps.append((launch, tuple(slots[x.data_ptr()] for x in given), arguments[len(given) :]))
    if len(_made) >= _MOST:
        _made.clear()
    _made[key] = Replay(tuple(steps), tuple((x.shape, x.stride(), x.dtype) for x in tensors[3:]), run)


def forget() -> None:
    """Forgets every call."""
    _made.clear()
