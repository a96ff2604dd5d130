"""Proxy fences that Triton leaves out, put into the PTX that it makes, before that is assembled.

From sm_90 on, tensor cores (wgmma, tcgen05) and bulk copies reach shared memory through the asynchronous proxy. What was
written there by ordinary means, cp.async among them, is ordered before what they do by a ``fence.proxy.async``, which the
writing threads make once their writes are done, before the barrier behind which the others go on. Triton 3.6 makes none between
the cp.async that loads a tile and the wgmma that reads it, and up to 3.8 others are missing. The emulator found which
(docs/emulator.md).
"""

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import triton

from fused_attn.call.spec import TileConfig
from fused_attn.targets import triton_version

_FENCE = "fence.proxy.async.shared::cta;"
# Where a thread's own writes to shared memory are done: cp.async has landed, a descriptor was written and copied out of it.
# Not where such a fence stands behind it already.
_LANDED = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:cp\.async\.wait_(?:group|all)|tensormap\.cp_fenceproxy)\b[^;\n]*;"
                     rf"(?!\s*{re.escape(_FENCE)})", re.MULTILINE)
_PROXY = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|cp\.async\.bulk\.tensor)\b")

_fencing: contextvars.ContextVar[bool] = contextvars.ContextVar("fused_attn_fencing", default=False)


@functools.cache
def lacking(arch: str, descriptors: bool) -> bool:
    """Whether what Triton compiles for a target, through tensor descriptors or without, lacks fences."""
    if arch == "sm_90":
        return triton_version() < ((3, 8) if descriptors else (3, 7))
    # Of the others, those with tcgen05 alone multiply through this proxy.
    return arch in ("sm_100", "sm_103", "sm_110") and triton_version() < (3, 9)


@functools.cache
def fenced(config: TileConfig) -> TileConfig:
    """``config`` of a kernel with fences, which Triton keeps apart from one without by it."""
    return dataclasses.replace(config, fenced=True)


def with_fences(ptx: str) -> str:
    """PTX with a fence behind everything that has landed in shared memory, where something is to read it by the other proxy."""
    return _LANDED.sub(lambda found: f"{found.group()}\n\t{_FENCE}", ptx) if _PROXY.search(ptx) else ptx


class _Hook:
    """Triton's hook for stages of compilation: calls what was hooked before, and fences what ``putting_in`` compiles."""

    def __init__(self, before: Callable[..., Any] | None) -> None:
        self.before = before

    def __call__(self, *compilation: Any) -> Any:
        """(key, hash) of what is changed if called without arguments, which Triton does from 3.7 on: kernels that are fenced
        differ by their configurations already. Else takes (backend, stages by name, options, language, capability)."""
        told = ("", "") if self.before is None else self.before(*compilation)
        if compilation and _fencing.get():
            stages = compilation[1]
            make = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_fences(make(source, metadata))
        return told


@contextlib.contextmanager
def putting_in() -> Iterator[None]:
    """Fences what this thread compiles within. The hook stays: Triton asks twice whether there is one before it calls it, and
    another thread may be between."""
    runtime = triton.knobs.runtime
    if not isinstance(runtime.add_stages_inspection_hook, _Hook):
        runtime.add_stages_inspection_hook = _Hook(runtime.add_stages_inspection_hook)
    token = _fencing.set(True)
    try:
        yield
    finally:
        _fencing.reset(token)
