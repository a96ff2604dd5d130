"""Every environment variable the package reads, in one place. They are read once, at import.

FUSED_ATTN_BACKEND        backend of calls that name none: triton, torch or reference
FUSED_ATTN_STRICT         1: raise where the quadratic reference would run unasked
FUSED_ATTN_DETERMINISTIC  1: deterministic=True for calls that do not say (after torch's own switch)
TRITON_INTERPRET          1: Triton's own switch; backend "triton" then runs on CPU tensors
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

_TRUE = ("1", "true", "yes", "on")
BACKENDS = ("triton", "torch", "reference")

BACKEND = os.environ.get("FUSED_ATTN_BACKEND") or None
if BACKEND is not None and BACKEND not in BACKENDS:
    raise ValueError(f"FUSED_ATTN_BACKEND: expected one of {', '.join(BACKENDS)}; got {BACKEND!r}")

DETERMINISTIC = os.environ.get("FUSED_ATTN_DETERMINISTIC", "").lower() in _TRUE

_strict: ContextVar[bool] = ContextVar("fused_attn_strict", default=os.environ.get("FUSED_ATTN_STRICT", "").lower() in _TRUE)


def is_strict(argument: bool | None) -> bool:
    """Whether a call is strict: its own argument, else the surrounding ``strict()``, else the environment."""
    return _strict.get() if argument is None else argument


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Within it, a call that only the quadratic reference could answer raises instead; ``strict=`` of a call wins."""
    token = _strict.set(enabled)
    try:
        yield
    finally:
        _strict.reset(token)
