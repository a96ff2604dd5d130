"""Which backend answers a call, and every reason against the others.

triton     the kernels of this package: GPUs from sm_80 and gfx90a on, and CPU tensors under TRITON_INTERPRET=1
torch      torch's own fused kernel, where it computes exactly this call: the default on CPU tensors
reference  the oracle in plain PyTorch: exact everywhere, memory quadratic in the sequence length
"""

import functools
import importlib.util
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from fused_attn import mods, reference, settings, targets, torch_private, tracing, tuning
from fused_attn.describe import Described
from fused_attn.spec import RELATIVE, TENSOR, AttentionSpec, Companions, Member, Window

MAX_HEAD_DIM = 576  # of keys and queries; the tables of tuning.py end there


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: the backend that would run a call, and what each other one has against it.

    ``reasons`` maps every backend to its reasons, empty for one that could run the call too. Within ``fused_attn.hopper`` the
    ``rung`` is the one asked for and ``against_rung`` maps "forward" and "backward" to what it has against them; a pass with
    reasons runs on pointers. Of the kernels, ``schedule`` names those of each pass.
    """

    backend: str
    reasons: dict[str, tuple[str, ...]]
    rung: str = "pointers"
    against_rung: dict[str, tuple[str, ...]] = field(default_factory=dict)
    schedule: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        for name, reasons in self.reasons.items():
            if name != self.backend:
                lines.append(f"  {name}: {'; '.join(reasons) or 'could run this call too'}")
        for which, name in self.schedule.items():
            reasons = self.against_rung.get(which, ())
            lines.append(f"{which}: {name}" + (f"; {self.rung}: {'; '.join(reasons)}" if reasons else ""))
        return "\n".join(lines)


@torch_private.constant_when_traced
def device_reasons(device_type: str, index: int | None) -> tuple[str, ...]:
    """What stands against the kernels on a device, whatever the call."""
    if device_type == "cpu" and settings.emulated_target() is not None:
        return ()
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
        arch = targets.arch_of(torch.device(device_type, index or 0))
        return () if arch in targets.TARGETS else (f"the card is {arch}; there are no tiles for it",)
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


def against_triton(call: Described) -> tuple[str, ...]:
    """Reasons why the kernels cannot run a call."""
    q, v = call.q, call.v
    reasons = device_reasons(q.device.type, q.device.index)
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        reasons += (f"head dims {q.shape[3]} and {v.shape[3]}: the kernels carry up to {MAX_HEAD_DIM}",)
    compiled = q.is_cuda or settings.emulated_target() is not None
    if compiled and not reasons and (reason := tuning.against(q.shape[3], v.shape[3], q.dtype, targets.arch_of(q.device))):
        reasons += (reason,)
    if call.companions.score_weight is not None and q.shape[3] > tuning.MAX_ADDITIVE:
        reasons += (f"head dim {q.shape[3]}: the kernels carry additive scores up to {tuning.MAX_ADDITIVE}",)
    for member in call.spec.score_mods + call.spec.mask_mods:
        if not member.code.has_kernel:
            reasons += (f"{member.code.name} has no jit function",)
    return reasons + _missing_slopes(call) if call.spec.score_mods and torch.is_grad_enabled() else reasons


def _missing_slopes(call: Described) -> tuple[str, ...]:
    """Slopes that the gradients of a call need and its mods lack."""
    reasons: tuple[str, ...] = ()
    operands = iter(call.companions.operands)
    # whether a gradient passes through the mods to come
    through = any(x is not None and x.requires_grad for x in (call.q, call.k, call.companions.score_weight))
    for member in call.spec.score_mods:
        mod = member.code
        slopes = mod.arg_slopes + (None,) * len(member.args)
        if mod.function is not None and through and mod.slope is None:
            reasons += (f"{mod.name} has no slope, which gradients need",)
        for i, kind in enumerate(member.args):
            if kind in (TENSOR, RELATIVE) and next(operands).requires_grad:
                through = True
                if mod.function is not None and slopes[i] is None:
                    reasons += (f"{mod.name} has no slope for argument {i}, which its gradient needs",)
    return reasons


def against_torch(call: Described, return_lse: bool) -> tuple[str, ...]:
    """Reasons why torch's fused kernel does not compute exactly this call."""
    q, spec, companions = call.q, call.spec, call.companions
    reasons: tuple[str, ...] = ()
    if spec.softcap is not None:
        reasons += ("torch's fused kernel has no softcap",)
    if return_lse:
        reasons += ("torch's fused kernel gives no differentiable LSE",)
    if companions.score_weight is not None:
        reasons += ("torch's fused kernel has no additive score",)
    if companions.sinks is not None:
        reasons += ("torch's fused kernel has no sinks",)
    if spec.precise and any(x.requires_grad for x in (q, call.k, call.v)):
        reasons += ("torch's fused kernel has no precise backward",)
    for member in spec.score_mods:
        if member.code != mods.BIAS.code:
            reasons += (f"torch's fused kernel has no score mod {member.code.name}",)
    operands = iter(companions.operands)
    for member in spec.score_mods:
        tensors = [next(operands) for kind in member.args if kind in (TENSOR, RELATIVE)]
        if member.code == mods.BIAS.code and (RELATIVE in member.args or tensors[0].requires_grad):
            reasons += ("torch's fused kernel gives no bias gradient and takes no relative bias",)
    if any(member.code not in (mods.MASK.code, mods.HIDE.code) for member in spec.mask_mods):
        reasons += ("torch's fused kernel has no mask functions",)
    if spec.longest is not None and (q.device.type != "cpu" or companions.operands or spec.dropout_p > 0):
        reasons += ("torch's fused kernel takes no packed sequences with masks or dropout, and on a GPU none at all",)
    if spec.dropout_p > 0 and torch.compiler.is_compiling() and torch_private.activation_memory_budget() < 1:
        reasons += ("below an activation_memory_budget of 1, torch draws another dropout mask in the backward",)
    if 0 in q.shape or 0 in call.k.shape or 0 in call.v.shape:
        reasons += ("torch's fused kernel takes no empty tensors",)
    return reasons


def choose(call: Described, return_lse: bool, backend: str | None, strict: bool | None, warn: bool = True) -> str:
    """The backend of a call: the one asked for, else the first that can run it. Raises where neither can."""
    asked = settings.BACKEND if backend is None else backend
    if asked is None:
        preferred = "torch" if call.q.device.type == "cpu" else "triton"
    elif asked in settings.BACKENDS:
        preferred = asked
    else:
        raise ValueError(f"backend: expected one of {', '.join(settings.BACKENDS)} or None; got {asked!r}")
    if preferred == "reference":
        return preferred
    reasons = against_triton(call) if preferred == "triton" else against_torch(call, return_lse)
    if not reasons:
        if preferred == "torch" and asked is None and call.spec.dropout_p > 0 and settings.is_strict(strict):
            raise RuntimeError("strict: on the CPU, torch's attention with dropout is quadratic in memory")
        return preferred
    if asked is not None:
        source = "backend" if backend is not None else "FUSED_ATTN_BACKEND"
        raise ValueError(f"{source}: {asked!r} cannot run this call: {'; '.join(reasons)}")
    chosen, message = _fall_back(preferred, reasons, call, return_lse, strict)
    if preferred == "triton" and warn:
        warn_once(f"fused_attn: backend {chosen!r} instead of 'triton': {message}")
    return chosen


def _fall_back(preferred: str, reasons: tuple[str, ...], call: Described, return_lse: bool,
               strict: bool | None) -> tuple[str, str]:
    on_cpu = preferred == "torch"
    others = () if on_cpu else against_torch(call, return_lse)
    chosen = "torch" if not on_cpu and not others else "reference"
    message = "; ".join(dict.fromkeys((*reasons, *others)))
    quadratic = chosen == "reference" and 0 not in call.q.shape and 0 not in call.k.shape
    if quadratic and settings.is_strict(strict):
        raise RuntimeError(f"strict: only the quadratic reference could run this call: {message}")
    return chosen, message


@torch_private.constant_when_traced
def warn_once(message: str) -> None:
    """One warning for each distinct message of the process; under torch.compile, while tracing."""
    _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fused_attn."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=depth)  # at the caller's line


def explain(call: Described, return_lse: bool, backend: str | None, strict: bool | None) -> Explanation:
    """The backend that ``choose`` takes, with the reasons of all three."""
    reasons = {
        "triton": against_triton(call),
        "torch": against_torch(call, return_lse),
        "reference": ("memory is quadratic in the sequence length",),
    }
    chosen = choose(call, return_lse, backend, strict, warn=False)
    against_rung: dict[str, tuple[str, ...]] = {}
    schedule: dict[str, str] = {}
    if chosen == "triton":
        from fused_attn.plan import schedules  # here, so that a machine without Triton gets an answer as well
        from fused_attn.plan.problem import Problem

        problem = Problem.of(*call)
        schedule = {"forward": schedules.of_forward(problem).name, "backward": schedules.of_backward(problem).name}
        if call.spec.rung != "pointers":
            every = schedules.EVERY_GRADIENT
            against_rung = {"forward": schedules.against(schedules.FORWARD, call.spec.rung, problem),
                            "backward": schedules.against(schedules.BACKWARD, call.spec.rung, problem, every)}
    return Explanation(chosen, reasons, call.spec.rung, against_rung, schedule)


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
                    companions: Companions) -> torch.Tensor:
    """The call by torch's own scaled_dot_product_attention, arranged so that its fused kernel takes it.

    Dropout is torch's: a mask of its own from torch's generator, and on the CPU torch's quadratic path.
    """
    if spec.longest is not None:
        return _torch_packed(q, k, v, spec, companions)
    n_queries, n_keys, dim, dim_v = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    left, right = spec.window
    offset = spec.offset(n_queries, n_keys)
    # A bound that no query reaches is no bound: decoding with one query is not masked at all.
    surely = torch_private.surely  # a graph of lengths that vary keeps its mask, and is of every length
    left = None if left is None or surely(offset + n_queries - 1 - left <= 0) else left
    right = None if right is None or surely(offset + right >= n_keys - 1) else right
    masked = bool(companions.operands) or companions.used_k is not None
    # torch's fused CPU kernel gives NaN for is_causal with a scale that is not positive, and is right with a mask.
    causal = left is None and right == 0 and surely(offset == 0) and _plain(spec.scale > 0) and not masked
    windowed = not causal and (left is not None or right is not None)
    mask = reference.window_mask(spec, n_queries, n_keys, q.device) if windowed else None
    if companions.used_k is not None:  # what lies past the end may be NaN, and 0 * NaN is
        counted = torch.arange(n_keys, device=q.device) < companions.used_k[:, None]
        k, v = (x.masked_fill(~counted[:, None, :, None], 0) for x in (k, v))
        mask = counted[:, None, None, :] if mask is None else mask & counted[:, None, None, :]
    if masked:
        mask = _joined_mask(mask, q, spec, companions)
    if dim != dim_v:  # zero columns change neither scores nor the other outputs
        q, k, v = (F.pad(x, (0, max(dim, dim_v) - x.shape[3])) for x in (q, k, v))
    if q.device.type == "cpu":  # with another stride torch would leave its fused kernel for a quadratic one
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    grouped = _plain(q.shape[1] != k.shape[1])
    out = torch_private.sdpa(q, k, v, mask, spec.dropout_p, causal, scale=spec.scale, enable_gqa=grouped)
    return out if dim <= dim_v else out[..., :dim_v]


def _plain(condition: Any) -> bool:
    """A comparison of sizes as torch takes it: torch.compile leaves bool() of one symbolic, and jit.trace makes it a tensor."""
    return True if condition else False  # noqa: SIM210


def _joined_mask(mask: torch.Tensor | None, q: torch.Tensor, spec: AttentionSpec,
                 companions: Companions) -> torch.Tensor | None:
    """One mask or bias for torch, of the masks and the biases of a call: one tensor each, in this order."""
    biases, masks = companions.operands[: len(spec.score_mods)], companions.operands[len(spec.score_mods) :]
    for member, operand in zip(spec.mask_mods, masks, strict=True):
        operand = operand == 0 if member.code == mods.HIDE.code else operand
        mask = operand if mask is None else mask & operand
    bias = functools.reduce(torch.add, biases) if biases else None
    if bias is None:
        return mask
    # fp16 and bf16 would cost a bias of another type its digits; torch takes fp32 beside them.
    bias = bias.to(q.dtype if bias.dtype == q.dtype or q.dtype in (torch.float32, torch.float64) else torch.float32)
    return bias if mask is None else torch.where(mask, bias, float("-inf"))


def _torch_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
                  companions: Companions) -> torch.Tensor:
    """One sequence after the other, or all at once where lengths have no values yet; rows that belong to none give 0."""
    if tracing.traced(companions.cu_q):
        return _torch_padded(q, k, v, spec, companions)
    one, outs, at = spec._replace(longest=None), [], 0
    spans = zip(reference.spans(companions.cu_q, companions.used_q, q.shape[2]),
                reference.spans(companions.cu_k, companions.used_k, k.shape[2]), strict=True)
    for (q0, q1), (k0, k1) in spans:
        parts = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
        outs += [q.new_zeros(1, q.shape[1], q0 - at, v.shape[3]),
                 _of_nothing(*parts) if q0 == q1 or k0 == k1 else torch_attention(*parts, one, Companions())]
        at = q1
    return torch.cat((*outs, q.new_zeros(1, q.shape[1], q.shape[2] - at, v.shape[3])), 2)


def _torch_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
                  companions: Companions) -> torch.Tensor:
    longest_q, longest_k = spec.longest or (0, 0)
    queries = reference.Padded.of(q, companions.cu_q, companions.used_q, longest_q)
    keys, values = (reference.Padded.of(x, companions.cu_k, companions.used_k, longest_k) for x in (k, v))
    n_queries, n_keys = queries.rows.shape[1], keys.rows.shape[1]
    mask = (torch.arange(n_keys, device=q.device) < keys.lengths[:, None])[:, None, None, :]
    if spec.window != Window():
        mask = mask & reference.window_mask(spec, n_queries, n_keys, q.device, queries.offset(keys, spec))
    masked = spec._replace(longest=None, window=Window(), mask_mods=(Member(mods.MASK.code, (TENSOR,)),))
    out = torch_attention(queries.x, keys.x, values.x, masked, Companions(operands=(mask,)))
    return queries.packed(out, q.shape[2], 0)


def _of_nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention without queries, or without keys: 0 [1, H, Nq, Dv], with gradients of 0 like any other answer."""
    group = q.shape[1] // k.shape[1]
    return q @ k.repeat_interleave(group, 1).mT @ v.repeat_interleave(group, 1)
