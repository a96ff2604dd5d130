"""Every environment variable the package reads, in one place; its own are read once, at import.

An unknown value is an error, and an unknown name a warning: a misspelt switch never counts as off in silence.

FUSED_ATTN_BACKEND  backend of calls that name none: triton, torch, blocked or reference
FUSED_ATTN_STRICT   1 or 0: raise where the quadratic reference would run unasked
FUSED_ATTN_DETERMINISTIC  1 or 0: gradients equal to the bit, for calls that do not say, like torch.use_deterministic_algorithms
FUSED_ATTN_TILES    a file of `fused-attn tune`, in place of the one it keeps for the card; none: the shipped tiles
FUSED_ATTN_HOPPER   kernels of sm_90: auto, pointers, descriptors, specialized or gluon (``hopper``)
TRITON_INTERPRET    1: Triton's own switch; backend "triton" then runs on CPU tensors
"""

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fused_attn import torch_private

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
BACKENDS = ("triton", "torch", "blocked", "reference")
HOPPER_SCHEDULES = ("pointers", "descriptors", "specialized", "gluon")
HOPPER_CHOICES = ("auto", *HOPPER_SCHEDULES)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value and value not in (*_TRUE, *_FALSE):
        raise ValueError(f"{name}: expected 1, true, yes, on, 0, false, no or off; got {os.environ[name]!r}")
    return value in _TRUE


def _choice(name: str, known: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "").strip().lower() or None
    if value is not None and value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}; got {os.environ[name]!r}")
    return value


BACKEND = _choice("FUSED_ATTN_BACKEND", BACKENDS)
TILES = os.environ.get("FUSED_ATTN_TILES", "").strip() or None
DETERMINISTIC = _flag("FUSED_ATTN_DETERMINISTIC")

# Settings that a ``with`` changes. STRICT and HOPPER are attributes of this module, and ``__getattr__`` gives their values in
# the caller's context: torch.compile cannot trace a context variable, but guards a compiled call on a module's attribute.
_defaults = {"STRICT": _flag("FUSED_ATTN_STRICT"), "HOPPER": _choice("FUSED_ATTN_HOPPER", HOPPER_CHOICES) or "auto"}
_entered: dict[str, ContextVar[tuple[list[Any], ...]]] = {name: ContextVar(name, default=()) for name in _defaults}
# Those of a ``with`` in a function that is being compiled, {trace: {(name, number): value}}, which end at the latest when their
# trace ends.
_traced: MutableMapping[Any, dict[tuple[str, str], Any]] = WeakKeyDictionary()
_numbers = map(str, itertools.count())
_this = sys.modules[__name__]
_emulated: list[str] = []  # targets that are emulated in this process, the innermost last

for _name in os.environ:
    if _name.startswith("FUSED_ATTN_") and _name[11:] not in ("BACKEND", "STRICT", "DETERMINISTIC", "TILES", "HOPPER"):
        warnings.warn(f"fused_attn: {_name} is no environment variable of this version and means nothing", RuntimeWarning,
                      stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in _defaults:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _in_context(name)


def _in_context(name: str) -> Any:
    for entry in reversed(_entered[name].get()):
        if entry:
            return entry[0]
    return _defaults[name]


def _now(name: str) -> Any:
    if torch.compiler.is_dynamo_compiling():
        inside = _inside_trace(name)
        return inside[0] if inside else getattr(_this, name)
    return _in_context(name)


@torch_private.constant_when_traced
def _inside_trace(name: str) -> tuple[Any, ...]:
    entered = _traced.get(torch_private.current_trace(), {})
    return tuple(value for (of, _), value in entered.items() if of == name)[-1:]


@torch_private.constant_when_traced
def _enter_trace(name: str, value: Any) -> str:
    number = next(_numbers)
    _traced.setdefault(torch_private.current_trace(), {})[name, number] = value
    return number


@torch_private.constant_when_traced
def _leave_trace(name: str, number: str) -> None:
    _traced.get(torch_private.current_trace(), {}).pop((name, number), None)


@contextlib.contextmanager
def _within(name: str, value: Any) -> Iterator[None]:
    """Contexts may overlap, in one thread or between tasks, or be left elsewhere than entered: each undoes its own entry."""
    if torch.compiler.is_dynamo_compiling():
        number = _enter_trace(name, value)
        try:
            yield
        finally:
            _leave_trace(name, number)
        return
    entry = [value]
    _entered[name].set((*filter(None, _entered[name].get()), entry))
    try:
        yield
    finally:
        entry.clear()


def interpreted() -> bool:
    """Whether kernels run in Triton's CPU interpreter; Triton asks once, when it decorates them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in (*_TRUE, "y")


def emulated_target() -> str | None:
    """The card that stands for the CPU now (``emulated``), or None."""
    return _emulated[-1] if _emulated else None


@contextlib.contextmanager
def emulating(target: str) -> Iterator[None]:
    """Within this context, kernels see ``target`` where tensors are on the CPU, in the whole process."""
    _emulated.append(target)
    try:
        yield
    finally:
        _emulated.pop()


def is_strict(argument: bool | None) -> bool:
    """Whether a call is strict: its own argument, else the surrounding ``strict()``, else the environment."""
    strictly: bool = _now("STRICT") if argument is None else argument
    return strictly


def strict(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within this context, a call that only the quadratic reference could answer raises; a call's own ``strict=`` wins.

    It does not hold in other threads, but in tasks and ``asyncio.to_thread`` calls that were started within, as long as it
    lasts. Compiled functions follow it. FUSED_ATTN_STRICT holds everywhere.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool; got {enabled!r}")
    return _within("STRICT", enabled)


def hopper_schedule() -> str:
    """Which of ``HOPPER_CHOICES`` is asked for on sm_90."""
    asked: str = _now("HOPPER")
    return asked


def hopper(kernels: str) -> contextlib.AbstractContextManager[None]:
    """Within this context, calls on sm_90 (H100, H200) in fp16 and bf16 run these kernels where they can; others are unchanged.

    Each of these schedules uses more of what only this card has than the one before it. What a schedule does not take runs on
    ``"pointers"``, the same source as on every other card. No GPU has timed the others yet, so they must be asked for, by name
    or by what ``fused-attn tune`` has timed on the card at hand.

    ``"auto"``          the default: what tune found quickest on this card, else ``"pointers"``
    ``"pointers"``      Triton, tiles loaded by pointers
    ``"descriptors"``   Triton, queries, keys and values loaded by the tensor memory accelerator (forward)
    ``"specialized"``   that, and Triton gives loads and products warps of their own (forward)
    ``"gluon"``         written warp by warp: softmax runs under the matrix products

    A call keeps its kernels for the backward. The context holds where ``strict()`` would. FUSED_ATTN_HOPPER holds everywhere,
    also in autograd's own threads, where activation checkpointing repeats calls on a GPU. ``explain`` names the kernels of a
    call. Raises ValueError for another name.
    """
    if kernels not in HOPPER_CHOICES:
        raise ValueError(f"kernels: expected one of {', '.join(HOPPER_CHOICES)}; got {kernels!r}")
    return _within("HOPPER", kernels)
