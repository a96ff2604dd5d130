"""Where the operands of a kernel stand: a slot is 32 lanes of 4 bytes; registers of 64 bits take two, and slot 0 is none."""

import dataclasses
import re

import numpy as np

from fused_attn.emulator.ptx import BYTES, Kernel, address
from fused_attn.emulator.schedule import UnknownInstructionError

SHARED_BASE = 1024  # so that shared address 0 is nowhere; a multiple of what swizzles look at
WIDE_ADDRESS = 1  # a flag of instructions, as in machine/state.h


@dataclasses.dataclass
class Code:
    """One instruction: what the machine does, the slots that it writes and reads, and what else it must know."""

    op: str
    writes: list[int] = dataclasses.field(default_factory=list)
    reads: list[int] = dataclasses.field(default_factory=list)
    size: int = 0
    count: int = 0
    space: int = 0
    mode: int = 0
    flags: int = 0
    offset: int = 0
    target: int = -1
    targets: tuple[int, ...] = ()


class Slots:
    """Registers, constants and symbols of one kernel on a grid; ``dynamic``: bytes of shared memory that a launch asks for."""

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], dynamic: int) -> None:
        self.kernel = kernel
        self.slots: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.n_slots = 1
        self.tid, self.lane, self.program = self._new(1), self._new(1), self._new(3)
        self.slots |= {"%tid.x": self.tid, "%laneid": self.lane,
                       **{f"%ctaid.{axis}": self.program + k for k, axis in enumerate("xyz")}}
        self.values = {"%ntid.x": kernel.threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0, "%cluster_ctarank": 0,
                       "%cluster_nctarank": 1, "%clusterid.x": 0, "true": 1, "false": 0,
                       **{f"%nctaid.{axis}": n for axis, n in zip("xyz", grid, strict=True)}}
        room = np.zeros(max(kernel.param_bytes, 64) + 128, np.uint8)
        self.params = room[-room.ctypes.data % 64 :][: max(kernel.param_bytes, 64)]
        self.shared_extra = 0
        for name, (space, count) in kernel.symbols.items():
            if space == "shared":
                at = 0 if count == 0 else -(-(dynamic + self.shared_extra) // 128) * 128
                self.values[name] = SHARED_BASE + at
                self.shared_extra = max(self.shared_extra, at + count - dynamic if count else 0)

    # --- operands ---

    def _new(self, count: int) -> int:
        self.n_slots += count
        return self.n_slots - count

    def is_register(self, text: str) -> bool:
        return text in self.slots or self.kernel.type_of(text) is not None

    def wide(self, text: str) -> bool:
        """Whether it is a register of 64 bits."""
        kind = self.kernel.type_of(text)
        return kind is not None and BYTES[kind] == 8

    def slot(self, text: str, size: int = 4) -> int:
        """Of a register, or of a constant of ``size`` bytes."""
        if text == "_":
            return 0
        if text not in self.slots:
            if self.kernel.type_of(text) is None:
                return self.constant(self.value(text), size)
            self.slots[text] = self._new(2 if self.wide(text) else 1)
        return self.slots[text]

    def value(self, text: str) -> int:
        """Of what stands where a register might: a number, a symbol, a parameter's offset."""
        if text[:2] in ("0f", "0d"):
            return int(text[2:], 16)
        if text in self.values:
            return self.values[text]
        if text in self.kernel.params:
            return self.kernel.params[text][0]
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            raise UnknownInstructionError(f"{text} is no value that the emulator knows")
        return int(text.rstrip("U"), 0)

    def constant(self, value: int, size: int) -> int:
        key = value & (2 ** (8 * size) - 1), 8 if size == 8 else 4
        if key not in self.constants:
            self.constants[key] = self._new(key[1] // 4)
        return self.constants[key]

    def each(self, texts: tuple[str, ...], size: int = 4) -> list[int]:
        return [self.slot(text, size) for text in texts]

    def pointed(self, operand: str) -> tuple[int, int, int]:
        """Slot, offset and flag of an address."""
        base, offset = address(operand)
        return self.slot(base), offset, WIDE_ADDRESS if self.wide(base) else 0
