"""What watches or changes a call beside its caller: compilers, tracers, modes, transforms, profilers, autocast."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch

from fused_attn import torch_private

PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


def watched(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether a call must be a torch op: for a compiler, tracer, mode, transform, forward AD, profiler, tensor subclass or meta
    device, or a tensor whose values are not those that it stores, such as ``x.conj().imag``."""
    if (torch.compiler.is_compiling() or torch_private.dispatch_modes() or torch_private.transforms_active()
            or torch_private.forward_mode() or torch_private.profiler_enabled() or torch_private.is_tracing()):
        return True
    for x in tensors:  # a loop takes half the time of any()
        if x is not None and (type(x) not in PLAIN_CLASSES or x.is_meta or x.is_neg() or torch_private.is_zero(x)):
            return True
    return False


def traced(x: torch.Tensor) -> bool:
    """Whether the values of a tensor cannot be read, or must not be, since the next run of what is traced has others."""
    return torch.compiler.is_compiling() or torch_private.is_tracing() or type(x) not in PLAIN_CLASSES or x.is_meta


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast leaves matrix products alone, on devices that have it."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
