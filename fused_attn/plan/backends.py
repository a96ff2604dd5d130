"""Which backend answers a call, and every reason against the others.

triton     the kernels of this package: GPUs from sm_80 and gfx90a on, and CPU tensors under TRITON_INTERPRET=1
torch      torch's own fused kernel, where it computes exactly this call
blocked    block by block in plain PyTorch: every call, on any device, memory linear in the sequence length
reference  the oracle in plain PyTorch: exact everywhere, memory quadratic; where it is asked for, and where nothing else is
           built: torch.func within torch.compile, and functions that capture tensors which want derivatives
"""

import functools
import importlib.util
import sys
import warnings
from dataclasses import dataclass, field

import torch

from fused_attn import settings, targets, torch_private
from fused_attn.call import mods
from fused_attn.call.describe import Described
from fused_attn.call.spec import RELATIVE, TENSOR, AttentionSpec, Window
from fused_attn.plan import tiles

MAX_HEAD_DIM = 576  # of keys and queries; the tables of tiles.py end there


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: the backend that would run a call, and what each other one has against it.

    ``reasons`` maps every backend to its reasons, empty for one that could run the call too; ``slower`` tells why blocks are
    preferred to torch's kernel nevertheless; ``hints`` name what is likely a mistake. Within
    ``fused_attn.hopper``, ``asked`` is the schedule asked for and ``against_asked`` maps "forward" and "backward" to what it
    has against them; a pass with reasons does not run on it. ``schedule`` names the one that runs each pass. ``safer``
    maps kernels whose tiles did not fit the card to those that they have instead, and schedules that were given up to "".
    """

    backend: str
    reasons: dict[str, tuple[str, ...]]
    asked: str = "auto"
    against_asked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    schedule: dict[str, str] = field(default_factory=dict)
    safer: dict[str, str] = field(default_factory=dict)
    slower: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        for name, reasons in self.reasons.items():
            if name != self.backend:
                against = reasons or (self.slower if name == "torch" and self.backend == "blocked" else ())
                lines.append(f"  {name}: {'; '.join(against) or 'could run this call too'}")
        for which, name in self.schedule.items():
            reasons = self.against_asked.get(which, ())
            lines.append(f"{which}: {name}" + (f"; {self.asked}: {'; '.join(reasons)}" if reasons else ""))
        for name, config in self.safer.items():
            what = f"tiles {config}, as those of the tables do" if config else "its kernel does"
            lines.append(f"{name}: {what} not fit this card")
        lines += [f"hint: {hint}" for hint in self.hints]
        return "\n".join(lines)


@torch_private.constant_when_traced
def device_reasons(device_type: str, index: int | None) -> tuple[str, ...]:
    """Reasons why the kernels cannot run on a device, whatever the call."""
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
    if compiled and not reasons and (reason := tiles.against(q.shape[3], v.shape[3], q.dtype, targets.arch_of(q.device))):
        reasons += (reason,)
    if call.others.score_weight is not None and q.shape[3] > tiles.MAX_ADDITIVE:
        reasons += (f"head dim {q.shape[3]}: the kernels carry additive scores up to {tiles.MAX_ADDITIVE}",)
    for member in call.spec.score_mods + call.spec.mask_mods:
        if not member.code.has_kernel:
            reasons += (f"{member.code.name} has no jit function",)
    return reasons + _missing_slopes(call) if call.spec.score_mods and torch.is_grad_enabled() else reasons


def _missing_slopes(call: Described) -> tuple[str, ...]:
    """Slopes that the gradients of a call need and its mods lack."""
    reasons: tuple[str, ...] = ()
    operands = iter(call.others.operands)
    # whether a gradient passes through the mods to come
    through = any(x is not None and x.requires_grad for x in (call.q, call.k, call.others.score_weight))
    for member in call.spec.score_mods:
        mod = member.code
        slopes, own = mod.arg_slopes + (None,) * len(member.args), mod.function is not None or mod.source is not None
        if own and through and mod.slope is None:
            reasons += (f"{mod.name} has no slope, which gradients need",)
        for i, kind in enumerate(member.args):
            if kind in (TENSOR, RELATIVE) and (operand := next(operands)).requires_grad:
                through = True
                if own and slopes[i] is None:
                    reasons += (f"{mod.name} has no slope for argument {i}, which its gradient needs",)
                elif operand.dim() > 4 and call.spec.deterministic:
                    reasons += (f"the gradient of what {mod.name} looks up is summed by atomics, and gradients are to be equal "
                                "to the bit",)
    return reasons


def against_torch(call: Described, return_lse: bool) -> tuple[str, ...]:
    """Reasons why torch's fused kernel does not compute exactly this call."""
    q, spec, others = call.q, call.spec, call.others
    reasons: tuple[str, ...] = ()
    if spec.softcap is not None:
        reasons += ("torch's fused kernel has no softcap",)
    if return_lse:
        reasons += ("torch's fused kernel gives no differentiable LSE",)
    if others.score_weight is not None:
        reasons += ("torch's fused kernel has no additive score",)
    if others.sinks is not None:
        reasons += ("torch's fused kernel has no sinks",)
    if spec.precise and any(x.requires_grad for x in (q, call.k, call.v)):
        reasons += ("torch's fused kernel has no precise backward",)
    for member in spec.score_mods:
        if member.code != mods.BIAS.code:
            reasons += (f"torch's fused kernel has no score mod {member.code.name}",)
    operands = iter(others.operands)
    for member in spec.score_mods:
        tensors = [next(operands) for kind in member.args if kind in (TENSOR, RELATIVE)]
        if member.code == mods.BIAS.code and (RELATIVE in member.args or tensors[0].requires_grad):
            reasons += ("torch's fused kernel gives no bias gradient and takes no relative bias",)
    if any(member.code not in (mods.MASK.code, mods.HIDE.code) for member in spec.mask_mods):
        reasons += ("torch's fused kernel has no mask functions",)
    if spec.longest is not None and (q.device.type != "cpu" or others.operands or spec.dropout_p > 0):
        reasons += ("torch's fused kernel takes no packed sequences with masks or dropout, and on a GPU none at all",)
    if spec.dropout_p > 0 and torch.compiler.is_compiling() and torch_private.activation_memory_budget() < 1:
        reasons += ("below an activation_memory_budget of 1, torch draws another dropout mask in the backward",)
    if 0 in q.shape or 0 in call.k.shape or 0 in call.v.shape:
        reasons += ("torch's fused kernel takes no empty tensors",)
    return reasons


def against_torch_first(call: Described) -> tuple[str, ...]:
    """Reasons why blocks are quicker than torch's kernel, or take less memory, where it could run a call too.

    Measured on CPUs, and by what torch's kernels are known to do elsewhere.
    """
    (q, k), spec, others = call[:2], call.spec, call.others
    reasons: tuple[str, ...] = ()
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in call[:3])
    if torch_private.forward_mode() or torch_private.transforms_active():
        reasons += ("torch's fused kernel has no forward AD and no second derivatives",)
    if spec.dropout_p > 0 and q.device.type == "cpu":
        reasons += ("torch's attention with dropout is quadratic in memory",)
    if spec.longest is not None:
        reasons += ("torch's kernel takes packed sequences one by one",)
    if q.dtype == torch.float16 and wanted and q.device.type == "cpu":
        reasons += ("torch's backward in fp16 is slow",)
    if spec.score_mods and wanted:
        reasons += ("torch's backward loses rows whose keys all have a large negative bias",)
    windowed = spec.longest is None and not (causal_for_torch(q, k, spec) or reached(q, k, spec) == Window())
    masked = others.used_k is not None or spec.mask_mods or windowed
    if masked and not torch_private.surely(q.shape[2] * k.shape[2] < _WORTH_SKIPPING):
        reasons += ("torch's kernel multiplies what a mask empties, and a window costs it an Nq x Nk mask",)
    return reasons


_WORTH_SKIPPING = 2**16  # pairs of a head; below, the one call of torch's kernel costs less than finding what to leave out


def reached(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> Window:
    """The window of a dense call without the bounds that no query reaches: decoding with one query is not masked at all.

    In a graph whose lengths vary a bound stays, and holds for every length.
    """
    (left, right), n_queries, n_keys = spec.window, q.shape[2], k.shape[2]
    offset, surely = spec.offset(n_queries, n_keys), torch_private.surely
    return Window(None if left is None or surely(offset + n_queries - 1 - left <= 0) else left,
                  None if right is None or surely(offset + right >= n_keys - 1) else right)


def causal_for_torch(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> bool:
    """Whether torch's causality, which aligns the first query with the first key, is the window of a dense call. Its fused CPU
    kernel gives NaN for it with a scale that is not positive, and is right with a mask."""
    offset = spec.offset(q.shape[2], k.shape[2])
    return reached(q, k, spec) == Window(None, 0) and torch_private.surely(offset == 0) and bool(spec.scale > 0)


def against_reference(call: Described) -> tuple[str, ...]:
    """Reasons why a call cannot run in plain PyTorch."""
    return tuple(f"{member.code.name} has no plain PyTorch reference"
                 for member in call.spec.score_mods + call.spec.mask_mods if member.reference is None)


def against_blocked(call: Described) -> tuple[str, ...]:
    """Reasons why a call cannot run by blocks."""
    members, missing = call.spec.score_mods + call.spec.mask_mods, against_reference(call)
    if not (torch.is_grad_enabled() or torch_private.transforms_active() or torch_private.forward_mode()):
        return missing
    learned = [member.code.name for member in members if member.reference is not None and member.reference.learned]
    return missing + tuple(f"the reference of {name} captures a tensor that wants derivatives, which it gets as an argument"
                           for name in learned)


def choose(call: Described, return_lse: bool, backend: str | None, strict: bool | None, warn: bool = True) -> str:
    """The backend of a call: the one asked for, else the first that can run it.

    Raises ValueError where the one asked for cannot run it, and RuntimeError where ``strict`` refuses quadratic memory.
    """
    asked = settings.BACKEND if backend is None else backend
    if asked is not None and asked not in settings.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(settings.BACKENDS)} or None; got {asked!r}")
    if asked is not None:
        if reasons := _against(asked, call, return_lse):
            source = "backend" if backend is not None else "FUSED_ATTN_BACKEND"
            raise ValueError(f"{source}: {asked!r} cannot run this call: {'; '.join(reasons)}")
        return asked
    if torch_private.transforms_active() and torch.compiler.is_compiling() and (reasons := against_torch(call, return_lse)):
        if settings.is_strict(strict):
            raise RuntimeError(f"strict: within torch.compile, torch.func reaches the quadratic reference alone: "
                               f"{'; '.join(reasons)}")
        return "reference"
    on_kernels = () if call.q.device.type == "cpu" else _against("triton", call, return_lse)
    if call.q.device.type != "cpu" and not on_kernels:
        return "triton"
    chosen = "blocked" if against_torch(call, return_lse) or against_torch_first(call) else "torch"
    reasons = against_blocked(call) if chosen == "blocked" else ()
    if reasons:
        if settings.is_strict(strict):
            raise RuntimeError(f"strict: only the quadratic reference could run this call: {'; '.join(reasons)}")
        chosen = "reference"
    if on_kernels and warn:
        warn_once(f"fused_attn: backend {chosen!r} instead of 'triton': {'; '.join(on_kernels)}")
    return chosen


def _against(backend: str, call: Described, return_lse: bool) -> tuple[str, ...]:
    """Reasons why a backend cannot run a call."""
    if backend == "triton":
        return against_triton(call)
    if backend == "torch":
        return against_torch(call, return_lse)
    return against_blocked(call) if backend == "blocked" else against_reference(call)


@torch_private.constant_when_traced
def warn_once(message: str) -> None:
    """Warns once in a process for each distinct message; under torch.compile, while tracing."""
    _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fused_attn."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=depth)  # at the caller's line


def explain(call: Described, return_lse: bool, backend: str | None, strict: bool | None) -> Explanation:
    """The backend that ``choose`` takes, with the reasons against each."""
    reasons = {
        "triton": against_triton(call),
        "torch": against_torch(call, return_lse),
        "blocked": against_blocked(call),
        "reference": (*against_reference(call), "memory is quadratic in the sequence length"),
    }
    chosen = choose(call, return_lse, backend, strict, warn=False)
    against_asked: dict[str, tuple[str, ...]] = {}
    schedule: dict[str, str] = {}
    safer: dict[str, str] = {}
    if chosen == "triton":
        from fused_attn.plan import schedules  # here, so that a machine without Triton gets an answer as well
        from fused_attn.plan.problem import Problem

        problem = Problem.of(*call)
        schedule = {"forward": schedules.of_forward(problem).name, "backward": schedules.of_backward(problem).name}
        if call.spec.hopper not in ("auto", "pointers"):
            every = schedules.EVERY_GRADIENT
            against_asked = {"forward": schedules.against(schedules.FORWARD, call.spec.hopper, problem),
                             "backward": schedules.against(schedules.BACKWARD, call.spec.hopper, problem, every)}
        safer = {name: "" if config is None else config.words for name, config in problem.tiles.items()}
    return Explanation(chosen, reasons, call.spec.hopper, against_asked, schedule, safer, against_torch_first(call),
                       hints(call))


_FEW, _MANY = 64, 128  # no model has more heads than _MANY over sequences of fewer than _FEW tokens


def hints(call: Described) -> tuple[str, ...]:
    """What is likely a mistake of a call that runs nevertheless."""
    (_, heads, n_queries, _), n_keys = call.q.shape, call.k.shape[2]
    if call.spec.longest is None and heads > _MANY and max(n_queries, n_keys) < _FEW:
        return (f"q has {heads} heads of {n_queries} queries: tensors are [batch, heads, tokens, head_dim], and "
                f"[batch, tokens, heads, head_dim] wants transpose(1, 2), as fused_attn.compat.flash_attn does it",)
    return ()
