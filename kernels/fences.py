"""Proxy fences that Triton leaves out, put into the PTX that it makes, before that is assembled.

From sm_90 on, tensor cores (wgmma, tcgen05) and bulk copies access shared memory through the asynchronous proxy. A
``fence.proxy.async`` orders writes by ordinary means, including cp.async, before these accesses. The writing threads execute it
once their writes are done, before the barrier after which the other threads go on. Triton 3.6 emits none between the cp.async
that loads a tile and the wgmma that reads it, and up to 3.8 others are missing. The emulator found which ones
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
# Matches where a thread's own writes to shared memory are done: cp.async has landed, or a descriptor was written there and
# copied out. It does not match where such a fence already follows.
_LANDED = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:cp\.async\.wait_(?:group|all)|tensormap\.cp_fenceproxy)\b[^;\n]*;"
                     rf"(?!\s*{re.escape(_FENCE)})", re.MULTILINE)
_PROXY = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|cp\.async\.bulk\.tensor)\b")

_fencing: contextvars.ContextVar[bool] = contextvars.ContextVar("fused_attn_fencing", default=False)


@functools.cache
def lacking(arch: str, descriptors: bool) -> bool:
    """Whether what Triton compiles for a target lacks fences, with tensor descriptors or without."""
    if arch == "sm_90":
        return triton_version() < ((3, 8) if descriptors else (3, 7))
    # Of the other targets, only those with tcgen05 multiply through this proxy.
    return arch in ("sm_100", "sm_103", "sm_110") and triton_version() < (3, 9)


@functools.cache
def fenced(config: TileConfig) -> TileConfig:
    """``config``, marked as that of a kernel with fences; by this mark Triton tells it from the kernel without."""
    return dataclasses.replace(config, fenced=True)


def with_fences(ptx: str) -> str:
    """PTX with a fence after everything that has landed in shared memory, if the other proxy is to read any of it."""
    return _LANDED.sub(lambda found: f"{found.group()}\n\t{_FENCE}", ptx) if _PROXY.search(ptx) else ptx


class _Hook:
    """A hook into Triton's stages of compilation: calls the earlier hook, and fences what is compiled within ``putting_in``."""

    def __init__(self, before: Callable[..., Any] | None) -> None:
        self.before = before

    def __call__(self, *compilation: Any) -> Any:
        """Takes (backend, stages by name, options, language, capability). Without arguments, as Triton calls it from 3.7 on,
        returns (key, hash) of the change: this hook adds nothing, since fenced kernels already differ in configuration."""
        told = ("", "") if self.before is None else self.before(*compilation)
        if compilation and _fencing.get():
            stages = compilation[1]
            make = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_fences(make(source, metadata))
        return told


@contextlib.contextmanager
def putting_in() -> Iterator[None]:
    """Fences what this thread compiles within the context. The hook stays installed: Triton checks twice whether there is one
    before it calls it, and another thread may be between the two checks."""
    runtime = triton.knobs.runtime
    if not isinstance(runtime.add_stages_inspection_hook, _Hook):
        runtime.add_stages_inspection_hook = _Hook(runtime.add_stages_inspection_hook)
    token = _fencing.set(True)
    try:
        yield
    finally:
        _fencing.reset(token)
