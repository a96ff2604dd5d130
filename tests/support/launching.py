"""Calls whose launches go Triton's own way, specialised, compiled and passed on by its C launcher, to a stub of the driver.

    python -m tests.support.launching "Launching(('causal',), 'sm_90', hopper='gluon')" ...    # from the checkout

They are made in a process of their own, whose CUDA driver is tests/support/stub: what arrives there is held against the
arguments that the kernels were given. Nothing runs: results are whatever memory held.
"""

import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import pytest
import torch

from support.emulation import DTYPES, Worker
from support.features import Call, Inputs, Shape

MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it


def _placed(x: torch.Tensor, *strides: int) -> torch.Tensor:
    """A tensor like ``x`` with these strides, in address space of which nothing costs: no kernel will touch it."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    area = mmap.mmap(-1, span * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(area, dtype=x.dtype).as_strided(x.shape, strides)


# How q, k and v [B, H, N, D] lie in memory.
LAYOUTS = {
    "bhnd": lambda x: x,
    "bnhd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "qkv": lambda x: torch.stack((x, x, x), 3).permute(3, 0, 2, 1, 4).contiguous().permute(0, 1, 3, 2, 4)[1],
    "columns": lambda x: x.mT.contiguous().mT,
    "shifted": lambda x: torch.nn.functional.pad(x, (1, 1))[..., 1:-1],  # aligned to no more than an element
    "cache": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 100))[:, :, : x.shape[2]],
    "capacity": lambda x: torch.nn.functional.pad(x, (0, 0, 0, max(0, 8192 - x.shape[2])))[:, :, : x.shape[2]],
    "far batch": lambda x: _placed(x, 2**31 + 64, x.shape[2] * x.shape[3], x.shape[3], 1),
    "far heads": lambda x: _placed(x, 2**34, 2**32, x.shape[3], 1),
    "far rows": lambda x: _placed(x, 2**32, 2**31, 2**23, 1),
}


@dataclass(frozen=True)
class Launching:
    """One call: features, target, schedule of sm_90, dtype, shape, layout of q, k and v; what it asks for; a planted fault.

    ``asks``: gradients, output (alone), weights, stats or rotary. ``repeats``: how often it is made, each time with other
    tensors, the last but one of which begin where nothing is aligned. ``grows``: how many keys more each has.
    """

    features: tuple[str, ...] = ()
    target: str = "sm_80"
    hopper: str = "pointers"
    dtype: str = "bf16"
    shape: Shape = dataclasses.field(default_factory=Shape)
    layout: str = "bhnd"
    asks: str = "gradients"
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    repeats: int = 1
    grows: int = 0
    tiles: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # planted: fields of TileConfig by kernel
    fault: str = ""  # of stub/watch.py's FAULTS; or "specialised": a forward that is compiled for every length

    def __str__(self) -> str:
        more = [str(getattr(self, name)) for name in ("layout", "asks", "arguments", "repeats", "grows", "tiles", "fault")
                if getattr(self, name) != getattr(Launching(), name)]
        shape = "" if self.shape == Shape() else f"{self.shape.n_queries}x{self.shape.n_keys} D{self.shape.dim}"
        return " ".join(filter(None, (self.target, self.hopper, self.dtype, "+".join(self.features) or "plain", shape, *more)))

    def _make(self, inputs: Inputs) -> None:
        import fused_attn

        tensors = {name: inputs.leaves[name] for name in "qkv"}
        if self.asks == "gradients":
            inputs.run("triton")
        elif self.asks == "output":
            with torch.no_grad():
                inputs.attention(inputs.leaves, "triton", return_lse=False)
        elif self.asks == "rotary":
            x = tensors["q"].requires_grad_()
            angles = torch.ones(x.shape[2], x.shape[3] // 2)
            turned = fused_attn.apply_rotary(x, angles.cos(), angles.sin(), backend="triton")
            torch.autograd.grad(turned, x, torch.ones_like(turned))
        else:
            ask = {"weights": fused_attn.attention_weights, "stats": fused_attn.attention_stats}[self.asks]
            with torch.no_grad():
                ask(*tensors.values(), backend="triton", **inputs.arguments(inputs.leaves))

    def told(self) -> dict[str, Any]:
        """What arrived at the driver, as JSON has it: with ``verdict``, which is "ok" or says what differs."""
        import triton

        import fused_attn
        from fused_attn import settings
        from fused_attn.call.spec import TileConfig
        from fused_attn.kernels import forward, launch
        from fused_attn.plan import problem, safer
        from fused_attn.run import plans
        from support.stub.watch import watched

        card().become(self.target)
        plans.forget()
        launch.forget()
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            stack.enter_context(settings.emulating(self.target))
            stack.enter_context(fused_attn.hopper(self.hopper))
            if self.fault == "specialised":
                stack.enter_context(mock.patch.object(forward, "forward_kernel", triton.jit(forward.forward_kernel.fn)))
            watch = stack.enter_context(watched("" if self.fault == "specialised" else self.fault))
            warned = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            if self.tiles:
                planted, choose = {name: TileConfig(*fields) for name, fields in self.tiles.items()}, problem.choose
                stack.enter_context(mock.patch.object(
                    problem, "choose", lambda kernel, *more: planted.get(kernel) or choose(kernel, *more)))
                stack.enter_context(mock.patch.object(launch, "_is_card", return_value=True))
                stack.callback(safer.forget)
            try:
                for turn in range(self.repeats):
                    self._make(self._drawn(turn))
                verdict = "; ".join(watch.problems[:3]) or "ok"
            except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
                verdict = f"{type(error).__name__}: {str(error)[:600]}"
        return {"verdict": verdict, "launches": watch.launches, "again": watch.again,
                "warned": [str(x.message) for x in warned], "seconds": round(time.perf_counter() - start, 2)}

    def _drawn(self, turn: int) -> Inputs:
        shape = dataclasses.replace(self.shape, n_keys=self.shape.n_keys + turn * self.grows)
        inputs = Call(self.features, shape).draw(DTYPES[self.dtype])
        inputs.leaves |= {name: LAYOUTS[self.layout](inputs.leaves[name]) for name in "qkv"}
        inputs.extra = dict(self.arguments)
        if self.dtype.startswith("tf32"):
            inputs.extra["fp32_precision"] = self.dtype
        if turn == self.repeats - 2:
            for name in "qkv":
                x = inputs.leaves[name]
                inputs.leaves[name] = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        return inputs


@dataclass(frozen=True)
class TensorMap:
    """Arguments of cuTensorMapEncodeTiled: boxes of 64 x 64 of [4, 128, 64] in bf16, unless told."""

    target: str = "sm_90"
    kind: int = 9  # CUtensorMapDataType
    rank: int = 3
    address: int = 1 << 20
    dims: tuple[int, ...] = (64, 128, 4, 1, 1)
    strides: tuple[int, ...] = (128, 128 * 128, 0, 0)
    box: tuple[int, ...] = (64, 64, 1, 1, 1)
    steps: tuple[int, ...] = (1, 1, 1, 1, 1)
    interleave: int = 0
    swizzle: int = 3
    promotion: int = 2
    fill: int = 0
    shift: int = 0  # of the map's own address, from a multiple of 64

    def told(self) -> dict[str, Any]:
        """``verdict``: "ok" or why the driver refuses; and the bytes that it wrote."""
        from support import stub

        card().become(self.target)
        memory = ctypes.create_string_buffer(320)
        start = -ctypes.addressof(memory) % 64
        code = stub.library().cuTensorMapEncodeTiled(
            ctypes.byref(memory, start + self.shift), self.kind, self.rank, ctypes.c_void_p(self.address),
            (ctypes.c_uint64 * 5)(*self.dims), (ctypes.c_uint64 * 4)(*self.strides), (ctypes.c_uint32 * 5)(*self.box),
            (ctypes.c_uint32 * 5)(*self.steps), self.interleave, self.swizzle, self.promotion, self.fill)
        return {"verdict": stub.refusal(code), "map": stub.MAP.unpack_from(memory, start) if code == 0 else None}


@dataclass(frozen=True)
class Configuration:
    """A launch of a plain forward for sm_80, made straight of the driver, with this grid, block and shared memory."""

    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 128
    shared: int = 0
    loaded_on: str = "sm_80"
    launched_on: str = "sm_80"
    asked: int = 0  # bytes of dynamic shared memory that the kernel is to be allowed, if any

    def told(self) -> dict[str, Any]:
        from fused_attn.kernels.forward import forward_kernel
        from support import stub

        driver = stub.library()
        made = Launching(shape=Shape(dim=64, dim_v=64), asks="output").told()
        assert made["verdict"] == "ok", made
        kernel = next(kernel for kernel in forward_kernel.device_caches[80][0].values()
                      if kernel.hash == made["launches"][0]["variant"])
        card().become(self.loaded_on)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        code = driver.cuModuleLoadData(ctypes.byref(module), kernel.asm["cubin"])
        code = code or driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode())
        if code == 0 and self.asked:
            code = driver.cuFuncSetAttribute(function, 8, self.asked)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        card().become(self.launched_on)
        config = stub.Config(*self.grid, self.threads, 1, 1, self.shared)
        memory = ctypes.create_string_buffer(256)
        parameters = (ctypes.c_void_p * 512)(*[ctypes.addressof(memory)] * 512)
        code = code or driver.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None)
        return {"verdict": stub.refusal(code)}


def process() -> Iterator[Worker]:
    """A process that makes calls as this module's command does, for a fixture; skips where nothing compiles the stub."""
    from fused_attn.emulator import build

    try:
        build.compiler()
    except RuntimeError as error:
        pytest.skip(f"the stub of the driver is compiled as the emulator is: {error}")
    worker = Worker("tests.support.launching")
    yield worker
    worker.close()


_cards: list[Any] = []


def card() -> Any:
    """The card of this process, which Triton takes for its own."""
    if not _cards:
        from triton.runtime import driver

        from support.stub.watch import Card

        _cards.append(Card())
        driver.set_active(_cards[0])
    return _cards[0]


def main() -> None:
    """Does what the command line says, else the lines that come in; one line of JSON for each."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has no part in this
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr  # of whatever else prints
    names = {kind.__name__: kind for kind in (Launching, TensorMap, Configuration, Shape)}
    for line in sys.argv[1:] or sys.stdin:
        print(json.dumps(eval(line, names).told()), file=answers, flush=True)


if __name__ == "__main__":
    main()
