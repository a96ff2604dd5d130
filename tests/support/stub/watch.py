"""What reaches the driver, held against what a kernel was called with and against what the compiler made of it."""

import contextlib
import functools
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.jit import JITFunction

from fused_attn.kernels import launch
from support import stub

STREAM = 7
BYTES = {"u8": 1, "b8": 1, "u16": 2, "b16": 2, "u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8, "f64": 8}  # of types of PTX
PACKED = {"i1": "<B", "i8": "<b", "i16": "<h", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}


class Card(CudaDriver):
    """Triton's own driver of NVIDIA cards, to which torch's part, device, capability and stream, is told."""

    def __init__(self) -> None:
        stub.library()
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.capability = 0

    def become(self, target: str) -> None:
        self.capability = int(target.removeprefix("sm_"))
        stub.library().stub_card(self.capability)

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by device: one for every capability."""
        return self.capability

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(device, 10)

    def get_current_stream(self, device: int) -> int:
        return STREAM


# --- what is expected ---


def opened(kinds: Any, values: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str, Any]]:
    """(path, type, value) of every argument, tuples opened."""
    for i, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        if isinstance(kind, tuple):
            yield from opened(kind, value, (*path, i))
        else:
            yield (*path, i), kind, value


def tensor_map(descriptor: Any, meta: dict[str, Any]) -> bytes:
    """As the stub encodes what a descriptor says and the compiler chose."""
    rank, size = len(descriptor.shape), meta["elem_size"]
    kinds = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
    strides = [stride * size for stride in reversed(descriptor.strides[:-1])]
    sides = reversed(descriptor.shape), strides, reversed(descriptor.block_shape)
    dims, strides, box = ([*side, *[0] * (n - len(side))] for side, n in zip(map(list, sides), (5, 4, 5), strict=True))
    return stub.MAP.pack(descriptor.base.data_ptr(), kinds[descriptor.base.dtype], rank, meta["swizzle"], 0, 2,
                         descriptor.padding == "nan", *dims, *strides, *box).ljust(128, b"\0")


def expected(kernel: Any, arguments: tuple[Any, ...], scratch: list[torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    """(type, bytes) of every parameter that a launch should pass; constants are compiled in, and checked against that."""
    metas = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    for path, kind, value in opened(kernel.src.signature.values(), arguments):
        if kind == "constexpr":
            compiled, given = (x.value if isinstance(x, tl.constexpr) else x for x in (kernel.src.constants[path], value))
            assert compiled == given, f"argument {path}: {given!r} where {compiled!r} is compiled in"
        elif kind.startswith("tensordesc"):
            yield "map", tensor_map(value, next(metas))
            yield from (("i32", struct.pack("<i", n)) for n in value.shape)
            yield from (("i64", struct.pack("<q", n)) for n in value.strides)
        elif kind[0] == "*":
            yield kind, struct.pack("<Q", value.data_ptr())
        else:
            yield kind, struct.pack(PACKED[kind], value)
    for size in (kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size):
        yield "scratch", struct.pack("<Q", scratch.pop(0).data_ptr() if size else 0)


@functools.cache
def declared(ptx: str, first: int) -> tuple[list[tuple[int, int]], int]:
    """(offset, size) of every parameter of a kernel's PTX, and its number of threads.

    ``first``: address of the first parameter in the constant bank, where ptxas aligns them.
    """
    entry = re.search(r"\.entry\s+[\w$]+\(([^)]*)\)[^{]*?\.reqntid (\d+)", ptx)
    assert entry is not None
    places, offset = [], 0
    for line in filter(None, (line.strip() for line in entry[1].split(","))):
        found = re.fullmatch(r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr .*)?[\w$]+(?:\[(\d+)\])?", line)
        assert found is not None, line
        size = BYTES[found[2]] * int(found[3] or 1)
        step = int(found[1] or size)
        offset = -(-(first + offset) // step) * step - first
        places.append((offset, size))
        offset += size
    return places, int(entry[2])


# --- what came ---


@dataclass
class Watch:
    """``launches`` that were made, as the driver saw them, how many of them ``again``, and the ``problems`` with them."""

    launches: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    again: int = 0
    scratch: list[torch.Tensor] = field(default_factory=list)  # handed out for the launch under way

    def allocate(self, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        memory = torch.empty(size + alignment, dtype=torch.int8)
        self.scratch.append(memory[-memory.data_ptr() % alignment :][:size])
        return self.scratch[-1]

    def check(self, function: Any, kernel: Any, arguments: tuple[Any, ...], grid: tuple[int, ...],
              expect: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
        """Compares the launch that the driver recorded since the last one with what it should have been."""
        text = stub.library().stub_record().decode()
        stub.library().stub_clear()
        programs, held = (*grid, 1, 1)[:3], list(self.scratch)
        found = [json.loads(line) for line in text.splitlines()]
        if len(found) != (0 not in programs):
            self.problems.append(f"{kernel.name}: {len(found)} launches of {programs} programs")
        if not found:
            return
        row = found[-1]
        wanted = expect(list(expected(kernel, arguments, self.scratch)))
        places, threads = declared(kernel.asm["ptx"], row["first"])
        self._same(kernel, "name", row["name"], kernel.name)
        self._same(kernel, "grid", tuple(row["grid"]), programs)
        self._same(kernel, "block", row["block"], [32 * kernel.metadata.num_warps, 1, 1])
        self._same(kernel, "threads of the PTX", threads, 32 * kernel.metadata.num_warps)
        self._same(kernel, "shared memory", row["shared"], kernel.metadata.shared)
        self._same(kernel, "stream", row["stream"], STREAM)
        self._same(kernel, "places of parameters in cubin and PTX", [tuple(p[:2]) for p in row["parameters"]], places)
        self._same(kernel, "number of parameters", len(row["parameters"]), len(wanted))
        for i, ((_, size, given), (kind, value)) in enumerate(zip(row["parameters"], wanted, strict=False)):
            self._same(kernel, f"parameter {i}, {kind}, of {size} bytes", given, value.hex())
        self.launches.append({
            "kernel": kernel.name, "module": function.fn.__module__, "variant": kernel.hash, "parameters": len(wanted),
            "kinds": sorted({kind for kind, _ in wanted}), "scratch": sum(x.numel() for x in held),
            **{name: row[name] for name in ("grid", "registers", "frame", "shared")}})

    def _same(self, kernel: Any, what: str, got: Any, want: Any) -> None:
        if got != want:
            self.problems.append(f"{kernel.name}: {what}: {got} came, {want} was expected")


# What a test plants: the arguments that Triton gets in place of a kernel's own, or parameters that are expected.
FAULTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "": (lambda arguments: arguments, lambda wanted: wanted),
    "order": (lambda arguments: (arguments[1], arguments[0], *arguments[2:]), lambda wanted: wanted),
    "dropped": (lambda arguments: arguments, lambda wanted: [*wanted[:-3], *wanted[-2:]]),
    "constant": (lambda arguments: (*arguments[:-1], replace(arguments[-1], wide=not arguments[-1].wide)),
                 lambda wanted: wanted),
}


@contextlib.contextmanager
def watched(fault: str = "") -> Iterator[Watch]:
    """Checks every launch that Triton makes within it."""
    watch, run = Watch(), JITFunction.run
    passed, expect = FAULTS[fault]

    def checked(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        watch.scratch.clear()
        kernel = run(self, *passed(arguments), grid=grid, warmup=warmup, **options)
        if warmup:
            return kernel
        watch.check(self, kernel, arguments, grid, expect)
        return kernel

    def again(one: launch.Launch, kernel: Any) -> Any:
        watch.scratch.clear()
        watch.again += 1
        launch_again(one, kernel)
        arguments = *passed((*one.arguments, one.config))[:-1], kernel.src.constants[len(one.arguments),]
        watch.check(one.kernel, kernel, arguments, (one.programs,), expect)
        return kernel

    launch_again = launch._launch_again
    stub.library().stub_clear()
    with mock.patch.object(JITFunction, "run", checked), mock.patch.object(launch, "_launch_again", again), \
            mock.patch.object(launch, "_scratch", watch.allocate), mock.patch.object(launch, "_kept_on", return_value=True):
        yield watch
