"""Every environment variable the package reads, in one place; its own are read once, at import.

FUSED_ATTN_BACKEND  backend of calls that name none: triton, torch or reference
FUSED_ATTN_STRICT   1: raise where the quadratic reference would run unasked
TRITON_INTERPRET    1: Triton's own switch; backend "triton" then runs on CPU tensors
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])
_TRUE = ("1", "true", "yes", "on")
BACKENDS = ("triton", "torch", "reference")

BACKEND = os.environ.get("FUSED_ATTN_BACKEND") or None
if BACKEND is not None and BACKEND not in BACKENDS:
    raise ValueError(f"FUSED_ATTN_BACKEND: expected one of {', '.join(BACKENDS)}; got {BACKEND!r}")


def interpreted() -> bool:
    """Whether kernels run in Triton's CPU interpreter; Triton asks once, when it decorates them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in (*_TRUE, "y")


def constant_when_traced(function: _F) -> _F:
    """Has torch.compile call ``function`` while tracing and keep the result, as ``torch.compiler.assume_constant_result``
    does; that one imports torch._dynamo and, through it, Triton: over a second that ``import fused_attn`` need not take."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_strict = os.environ.get("FUSED_ATTN_STRICT", "").lower() in _TRUE


def is_strict(argument: bool | None) -> bool:
    """Whether a call is strict: its own argument, else the surrounding ``strict()``, else the environment."""
    return _strict if argument is None else argument


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Within it, a call that only the quadratic reference could answer raises instead; ``strict=`` of a call wins.

    It holds for the whole process, threads included: a plain global is what torch.compile guards compiled calls on.
    """
    global _strict
    before, _strict = _strict, enabled
    try:
        yield
    finally:
        _strict = before
