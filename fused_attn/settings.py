"""Every environment variable the package reads, in one place; its own are read once, at import.

FUSED_ATTN_BACKEND  backend of calls that name none: triton, torch or reference
FUSED_ATTN_STRICT   1: raise where the quadratic reference would run unasked
FUSED_ATTN_DETERMINISTIC  1: gradients equal to the bit, of calls that do not say (as torch.use_deterministic_algorithms asks)
FUSED_ATTN_TILES    a file of `fused-attn tune`, in place of the one it keeps for the card; none: the shipped tiles
FUSED_ATTN_HOPPER   kernels of sm_90: pointers, descriptors, specialized or gluon (``hopper``)
TRITON_INTERPRET    1: Triton's own switch; backend "triton" then runs on CPU tensors
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])
_TRUE = ("1", "true", "yes", "on")
BACKENDS = ("triton", "torch", "reference")
RUNGS = ("pointers", "descriptors", "specialized", "gluon")

BACKEND = os.environ.get("FUSED_ATTN_BACKEND") or None
if BACKEND is not None and BACKEND not in BACKENDS:
    raise ValueError(f"FUSED_ATTN_BACKEND: expected one of {', '.join(BACKENDS)}; got {BACKEND!r}")

_rung = os.environ.get("FUSED_ATTN_HOPPER") or "pointers"
if _rung not in RUNGS:
    raise ValueError(f"FUSED_ATTN_HOPPER: expected one of {', '.join(RUNGS)}; got {_rung!r}")

TILES = os.environ.get("FUSED_ATTN_TILES") or None
DETERMINISTIC = os.environ.get("FUSED_ATTN_DETERMINISTIC", "").lower() in _TRUE


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


def rung() -> str:
    """Which of ``RUNGS`` answers on sm_90."""
    return _rung


@contextlib.contextmanager
def hopper(kernels: str) -> Iterator[None]:
    """Within it, calls on sm_90 (H100, H200) in halves run these kernels wherever they can; other calls are not touched.

    A ladder, each rung with more of the card's own means; what a rung does not take runs on ``"pointers"``, the default and
    the same source as on every other card. No GPU has timed the others yet, so they must be asked for.

    ``"pointers"``      Triton, tiles loaded by pointers
    ``"descriptors"``   Triton, queries, keys and values loaded by the tensor memory accelerator (forward)
    ``"specialized"``   that, and Triton gives loads and products warps of their own (forward)
    ``"gluon"``         written warp by warp: softmax runs under the matrix products

    A call keeps its kernels for the backward. It holds for the whole process, threads included; ``explain`` names the kernels
    of a call. Raises ValueError for another name.
    """
    global _rung
    if kernels not in RUNGS:
        raise ValueError(f"kernels: expected one of {', '.join(RUNGS)}; got {kernels!r}")
    before, _rung = _rung, kernels
    try:
        yield
    finally:
        _rung = before
