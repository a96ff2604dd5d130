"""Which backend answers a call, and every reason against the others.

triton     the kernels of this package: GPUs from sm_80 and gfx90a on, and CPU tensors under TRITON_INTERPRET=1
torch      torch's own fused kernel, where it computes exactly this call: the default on CPU tensors
reference  the oracle in plain PyTorch: exact everywhere, memory quadratic in the sequence length
"""

import functools
import importlib.util
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fused_attn import reference, settings
from fused_attn.spec import AttentionSpec

MAX_HEAD_DIM = 256
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: the backend that would run a call, and what each other one has against it.

    ``reasons`` maps every backend to its reasons, empty for one that could run the call too.
    """

    backend: str
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        for name, reasons in self.reasons.items():
            if name != self.backend:
                lines.append(f"  {name}: {'; '.join(reasons) or 'could run this call too'}")
        return "\n".join(lines)


@settings.constant_when_traced
def device_reasons(device_type: str, index: int | None) -> tuple[str, ...]:
    """What stands against the kernels on a device, whatever the call."""
    return _device_reasons(device_type, index)


@functools.cache
def _device_reasons(device_type: str, index: int | None) -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return ("Triton is not installed",)
    if device_type == "cpu":
        return () if settings.interpreted() else ("the tensors are on the CPU and TRITON_INTERPRET is not 1",)
    if device_type not in ("cuda", "xpu"):
        return (f"there are no kernels for device type {device_type!r}",)
    if device_type == "cuda" and torch.version.hip is not None:
        from fused_attn.tuning import arch_of, has_tiles

        arch = arch_of(torch.device(device_type, index or 0))
        return () if has_tiles(arch) else (f"the card is {arch}; there are no tiles for it",)
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return (f"the card is sm_{major}{minor}; the kernels need sm_80 or later",)
    return ()


def kernel_device() -> torch.device:
    """Where the kernels can run on this machine: a GPU they support, else the CPU, in the interpreter."""
    if torch.cuda.is_available() and not _device_reasons("cuda", torch.cuda.current_device()):
        return torch.device("cuda")
    return torch.device("cpu")


def against_triton(q: torch.Tensor, v: torch.Tensor) -> tuple[str, ...]:
    """Reasons why the kernels cannot run a call."""
    reasons = device_reasons(q.device.type, q.device.index)
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        reasons += (f"head dims {q.shape[3]} and {v.shape[3]}: the kernels carry up to {MAX_HEAD_DIM}",)
    return reasons


def against_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, return_lse: bool) -> tuple[str, ...]:
    """Reasons why torch's fused kernel does not compute exactly this call."""
    reasons: tuple[str, ...] = ()
    if spec.softcap is not None:
        reasons += ("torch's fused kernel has no softcap",)
    if return_lse:
        reasons += ("torch's fused kernel gives no differentiable LSE",)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        reasons += ("torch's fused kernel takes no empty tensors",)
    return reasons


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, return_lse: bool,
           backend: str | None, strict: bool | None, warn: bool = True) -> str:
    """The backend of a call: the one asked for, else the first that can run it. Raises where neither can."""
    asked = settings.BACKEND if backend is None else backend
    if asked is None:
        preferred = "torch" if q.device.type == "cpu" else "triton"
    elif asked in settings.BACKENDS:
        preferred = asked
    else:
        raise ValueError(f"backend: expected one of {', '.join(settings.BACKENDS)} or None; got {asked!r}")
    if preferred == "reference":
        return preferred
    reasons = against_triton(q, v) if preferred == "triton" else against_torch(q, k, v, spec, return_lse)
    if not reasons:
        return preferred
    if asked is not None:
        source = "backend" if backend is not None else "FUSED_ATTN_BACKEND"
        raise ValueError(f"{source}: {asked!r} cannot run this call: {'; '.join(reasons)}")
    chosen, message = _fall_back(preferred, reasons, q, k, v, spec, return_lse, strict)
    if preferred == "triton" and warn:
        warn_once(f"fused_attn: backend {chosen!r} instead of 'triton': {message}")
    return chosen


def _fall_back(preferred: str, reasons: tuple[str, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               spec: AttentionSpec, return_lse: bool, strict: bool | None) -> tuple[str, str]:
    on_cpu = preferred == "torch"
    others = () if on_cpu else against_torch(q, k, v, spec, return_lse)
    chosen = "torch" if not on_cpu and not others else "reference"
    message = "; ".join(dict.fromkeys((*reasons, *others)))
    quadratic = chosen == "reference" and 0 not in q.shape and 0 not in k.shape
    if quadratic and settings.is_strict(strict):
        raise RuntimeError(f"strict: only the quadratic reference could run this call: {message}")
    return chosen, message


@settings.constant_when_traced
def warn_once(message: str) -> None:
    """One warning for each distinct message of the process; under torch.compile, while tracing."""
    _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fused_attn."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=depth)  # at the caller's line


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, return_lse: bool,
            backend: str | None, strict: bool | None) -> Explanation:
    """The backend that ``choose`` takes, with the reasons of all three."""
    reasons = {
        "triton": against_triton(q, v),
        "torch": against_torch(q, k, v, spec, return_lse),
        "reference": ("memory is quadratic in the sequence length",),
    }
    return Explanation(choose(q, k, v, spec, return_lse, backend, strict, warn=False), reasons)


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """The call by torch's own scaled_dot_product_attention, arranged so that its fused kernel takes it."""
    n_queries, n_keys, dim, dim_v = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    left, right = spec.window
    offset = spec.offset(n_queries, n_keys)
    # A bound that no query reaches is no bound: decoding with one query is not masked at all.
    left = None if left is None or offset + n_queries - 1 - left <= 0 else left
    right = None if right is None or offset + right >= n_keys - 1 else right
    # torch's fused CPU kernel gives NaN for is_causal with a scale that is not positive, and is right with a mask.
    # torch.compile leaves bool() of a comparison of lengths symbolic, and torch takes a plain bool only.
    causal = True if left is None and right == 0 and offset == 0 and spec.scale > 0 else False  # noqa: SIM210
    mask = None if causal or (left is None and right is None) else reference.window_mask(spec, n_queries, n_keys, q.device)
    if dim != dim_v:  # zero columns change neither scores nor the other outputs
        q, k, v = (F.pad(x, (0, max(dim, dim_v) - x.shape[3])) for x in (q, k, v))
    if q.device.type == "cpu":  # with another stride torch would leave its fused kernel for a quadratic one
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=spec.scale,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out if dim <= dim_v else out[..., :dim_v]
