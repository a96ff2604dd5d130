"""A Triton driver without a card: kernels launched on CPU tensors are compiled for a target, and their text is executed."""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from fused_attn.emulator import machine, tensormap
from fused_attn.emulator.amd import machine as amd
from fused_attn.emulator.amd.text import parse as parse_amd
from fused_attn.emulator.encode import encode
from fused_attn.emulator.ptx import parse
from fused_attn.emulator.schedule import Schedule
from fused_attn.targets import TARGETS

# (name of a kernel, its PTX or AMD assembly) -> the text that runs in its place
Change = Callable[[str, str], str]
Grid = tuple[int, int, int]
_PACKED = {"i1": "B", "u1": "B", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
           "fp64": "d", "f64": "d", "fp32": "f", "f32": "f", "fp16": "e"}


class Driver:
    """What Triton asks of a card's driver. ``results`` keeps what every launch counted."""

    def __init__(self, target: str, shared_limit: int, schedule: Schedule, change: Change | None = None) -> None:
        self.name, self.shared_limit, self.schedule, self.change = target, shared_limit, schedule, change
        self.amd = target.startswith("gfx")
        self.target = GPUTarget("hip", target, TARGETS[target].lanes) if self.amd else GPUTarget(
            "cuda", int(target[3:]), 32)
        self.results: list[tuple[str, Any]] = []
        self.programs: dict[tuple[bytes, Grid], Any] = {}
        self.utils, self.launcher_cls = self, Launcher

    def get_current_device(self) -> str:
        """Triton keeps what it compiled by device: one for every target."""
        return self.name

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": self.shared_limit, "max_num_regs": 65536, "multiprocessor_count": 1,
                "warpSize": self.target.warp_size}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        return None, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def launch(self, name: str, text: str, grid: Grid, metadata: Any, values: list[bytes],
               spans: list[tuple[int, int]]) -> None:
        """Runs a kernel of which Triton made ``text``, with the bytes of its parameters; it may touch ``spans``."""
        text = self.change(name, text) if self.change is not None else text
        key = hashlib.sha256(text.encode()).digest(), grid
        if key not in self.programs:
            self.programs[key] = amd.encode(parse_amd(text)) if self.amd else encode(parse(text), grid, metadata.shared)
        program = self.programs[key]
        kernel = program.kernel
        result: Any
        if self.amd:
            given = _filled(name, values, kernel.arguments, kernel.argument_bytes)
            result = amd.run(program, grid, given, metadata.num_warps, metadata.shared, spans, self.schedule)
        else:
            given = _filled(name, values, kernel.params.values(), kernel.param_bytes)
            result = machine.run(program, grid, given, metadata.shared, spans, self.schedule)
        self.results.append((name, result))


def _filled(name: str, values: list[bytes], places: Iterable[tuple[int, int]], size: int) -> bytes:
    """The block of a kernel's parameters, each at its place."""
    block = bytearray(size)
    for value, (offset, room) in zip(values, places, strict=True):
        if len(value) > room:
            raise TypeError(f"{name}: a parameter of {room} bytes was given {len(value)}")
        block[offset : offset + len(value)] = value
    return bytes(block)


class Launcher:
    """What Triton makes of every compiled kernel, and calls to launch it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata
        self.signature = tuple(source.signature.values())
        self.text = ""

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, launch: Any, enter: Any, leave: Any,
                 *args: Any) -> None:
        from triton.runtime import driver

        card = driver.active
        assert isinstance(card, Driver)
        self.text = self.text or _text_of(self.source, card)
        values, spans, _alive = self._arguments(args, x * y * z)
        card.launch(function, self.text, (x, y, z), self.metadata, values, spans)

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
        for name in ("global_scratch_size", "profile_scratch_size"):
            size = getattr(self.metadata, name, 0)  # which AMD's kernels have no place for
            scratch = torch.empty(size * programs + 1024 if size else 0, dtype=torch.int8)
            start = -(-scratch.data_ptr() // 1024) * 1024
            values.append(struct.pack("<Q", start if size else 0))
            if size:
                alive.append(scratch)
                spans.append((start, start + size * programs))
        return values, spans, alive


def _text_of(source: Any, card: Driver) -> str:
    """The PTX, or AMD's assembly, of what was compiled of ``source``: Triton hands its launchers the binary alone, and keeps
    the rest by device."""
    for kernel in source.fn.device_caches[card.name][0].values():
        if kernel.src is source:
            return str(kernel.asm["amdgcn" if card.amd else "ptx"])
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
