"""A Triton driver without a card: kernels launched on CPU tensors are compiled for a target, and their PTX is executed."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from fused_attn.emulator import machine, tensormap
from fused_attn.emulator.encode import Program, encode
from fused_attn.emulator.ptx import parse
from fused_attn.emulator.schedule import Schedule

# (name of a kernel, its PTX) -> PTX that runs in its place
Change = Callable[[str, str], str]
_PACKED = {"i1": "B", "u1": "B", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
           "fp64": "d", "f64": "d", "fp32": "f", "f32": "f", "fp16": "e"}


class Driver:
    """What Triton asks of a card's driver. ``results`` keeps what every launch counted."""

    def __init__(self, target: str, shared_limit: int, schedule: Schedule, change: Change | None = None) -> None:
        self.name, self.shared_limit, self.schedule, self.change = target, shared_limit, schedule, change
        self.target = GPUTarget("cuda", int(target[3:]), 32)
        self.results: list[tuple[str, machine.Result]] = []
        self.programs: dict[tuple[bytes, tuple[int, int, int]], Program] = {}
        self.utils, self.launcher_cls = self, Launcher

    def get_current_device(self) -> str:
        """Triton keeps what it compiled by device: one for every target."""
        return self.name

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": self.shared_limit, "max_num_regs": 65536, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        return None, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def program(self, name: str, text: str, grid: tuple[int, int, int], shared_bytes: int) -> Program:
        """A kernel's PTX, encoded once for a grid."""
        text = self.change(name, text) if self.change is not None else text
        key = hashlib.sha256(text.encode()).digest(), grid
        if key not in self.programs:
            self.programs[key] = encode(parse(text), grid, shared_bytes)
        return self.programs[key]


class Launcher:
    """What Triton makes of every compiled kernel, and calls to launch it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata
        self.signature = tuple(source.signature.values())
        self.ptx = ""

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, launch: Any, enter: Any, leave: Any,
                 *args: Any) -> None:
        from triton.runtime import driver

        card = driver.active
        assert isinstance(card, Driver)
        self.ptx = self.ptx or _ptx_of(self.source, card.name)
        program = card.program(function, self.ptx, (x, y, z), self.metadata.shared)
        values, spans, _alive = self._arguments(args, x * y * z)
        block = bytearray(program.kernel.param_bytes)
        for value, (offset, size) in zip(values, program.kernel.params.values(), strict=True):
            if len(value) > size:
                raise TypeError(f"{function}: a parameter of {size} bytes was given {len(value)}")
            block[offset : offset + len(value)] = value
        result = machine.run(program, (x, y, z), bytes(block), self.metadata.shared, spans, card.schedule)
        card.results.append((function, result))

    def _arguments(self, args: Any, programs: int) -> tuple[list[bytes], list[tuple[int, int]], list[torch.Tensor]]:
        """Bytes in the order of the parameters, the spans of tensors among them, and what must live as long as the launch."""
        values: list[bytes] = []
        spans, alive = [], []
        metas = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
        for kind, value in _flattened(self.signature, args):
            if kind.startswith("tensordesc"):
                spans.append(_span(value.base))
                values += [tensormap.encode(value, next(metas)), *(struct.pack("<i", n) for n in value.shape),
                           *(struct.pack("<q", n) for n in value.strides)]
            elif kind[0] == "*":
                if value is not None and value.numel():
                    spans.append(_span(value))
                values.append(struct.pack("<Q", 0 if value is None else value.data_ptr()))
            else:
                values.append(struct.pack("<" + _PACKED[kind], value))
        for size in (self.metadata.global_scratch_size, self.metadata.profile_scratch_size):
            scratch = torch.empty(size * programs + 1024 if size else 0, dtype=torch.int8)
            start = -(-scratch.data_ptr() // 1024) * 1024
            values.append(struct.pack("<Q", start if size else 0))
            if size:
                alive.append(scratch)
                spans.append((start, start + size * programs))
        return values, spans, alive


def _ptx_of(source: Any, device: str) -> str:
    """The PTX of what was compiled of ``source``: Triton hands its launchers the binary alone, and keeps the rest by device."""
    for kernel in source.fn.device_caches[device][0].values():
        if kernel.src is source:
            return str(kernel.asm["ptx"])
    raise RuntimeError("this Triton keeps its compiled kernels where the emulator does not find them")


def _flattened(signature: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Types and values of what a kernel takes at run time: tuples opened, constants left out."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flattened(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
