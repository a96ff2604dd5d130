"""What a program of AMD's has: registers of its waves, the memory that they share (LDS), and the tensors of the launch."""

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fused_attn.emulator.schedule import EmulatorFault

# Scalar registers with names of their own, by their place in ``Wave.s``.
VCC, M0, EXEC, NULL = 106, 124, 126, 128
GARBAGE = 0x7FC0DEAD  # what registers and LDS hold before anything is written: NaN, and far outside of any tensor
Array = np.ndarray[Any, Any]


def to_bits(mask: Array) -> int:
    """A mask [lanes] as a scalar register holds it."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def to_mask(bits: int, lanes: int) -> Array:
    """[lanes] of bool."""
    octets = np.frombuffer((bits & (1 << lanes) - 1).to_bytes(lanes // 8, "little"), np.uint8)
    return np.unpackbits(octets, bitorder="little").astype(bool)


class Pending(NamedTuple):
    """A memory operation that was not waited for: the registers that it fills; what of LDS it touches, (bytes, written)."""

    registers: frozenset[int]
    scalar: bool = False
    shared: tuple[Array, bool] | None = None


class Wave:
    """The registers of one wave. ``v`` [512, lanes]: vector registers, from 256 on the accumulators."""

    def __init__(self, number: int, lanes: int, scratch: int) -> None:
        self.number, self.lanes = number, lanes
        self.v = np.full((512, lanes), GARBAGE, np.uint32)
        self.s = [*[GARBAGE] * NULL, 0, 0]
        self.scc = False
        self.scratch = np.full((lanes, scratch), 0xFF, np.uint8)
        self.mask = np.ones(lanes, bool)  # of the lanes that are active, EXEC
        self.all = True
        self.write_scalar(EXEC, (1 << lanes) - 1, 2)
        self.pc = 0
        self.queues: dict[str, deque[Pending]] = {"vm": deque(), "lgkm": deque(), "vs": deque()}
        self.awaited: frozenset[int] = frozenset()  # registers that memory operations are yet to fill

    def scalar(self, first: int, count: int) -> int:
        """The number in ``count`` registers from ``first`` on."""
        return self.s[first] if count == 1 else sum(self.s[first + i] << 32 * i for i in range(count))

    def write_scalar(self, first: int, value: int, count: int) -> None:
        if first == NULL:
            return
        for i in range(count):
            self.s[first + i] = value >> 32 * i & 0xFFFFFFFF
        if first + count > EXEC:
            self.mask = to_mask(self.s[EXEC] | self.s[EXEC + 1] << 32, self.lanes)
            self.all = bool(self.mask.all())

    def write(self, register: int, bits: Array) -> None:
        """Into the active lanes of a vector register."""
        if self.all:
            self.v[register] = bits
        else:
            np.copyto(self.v[register], bits, where=self.mask)

    def awaited_from_others(self, queue: str) -> frozenset[int]:
        """Registers that operations of the other queues are yet to fill."""
        others = [waiting for name, waiting in self.queues.items() if name != queue]
        return frozenset().union(*(each.registers for waiting in others for each in waiting))

    def issue(self, queue: str, pending: Pending) -> None:
        self.queues[queue].append(pending)
        self.awaited |= pending.registers

    def wait(self, queue: str, most: int) -> None:
        """Until at most so many operations of a queue are under way. Scalar loads come in any order: they want 0."""
        waiting = self.queues[queue]
        if most and any(each.scalar for each in waiting):
            return
        while len(waiting) > most:
            waiting.popleft()
        self.awaited = frozenset().union(*(each.registers for queue in self.queues.values() for each in queue))


class Shared:
    """LDS of one program, with who touched each byte since the last barrier: its races."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.bytes.view(np.uint32)[:] = GARBAGE
        self.writer = np.full(size, -1, np.int32)
        self.written = np.full(size, -1, np.int32)  # at which barrier, as what the other waves may not touch
        self.readers = np.zeros(size, np.int64)  # waves, a bit each
        self.read_at = np.full(size, -1, np.int32)
        self.barrier = 0

    def at(self, addresses: Array, width: int) -> Array:
        """Byte places [lanes, width]. Raises EmulatorFault outside."""
        if addresses.size and (int(addresses.max()) + width > self.bytes.size or int(addresses.min()) < 0):
            raise EmulatorFault(f"LDS byte {int(addresses.max())} of {self.bytes.size}")
        return addresses[:, None] + np.arange(width)

    def _race(self, places: Array, what: str, bad: Array) -> None:
        if bad.any():
            byte = places[bad].flat[0]
            raise EmulatorFault(f"race: {what} of LDS byte {byte}, which wave {self.writer[byte]} wrote last, with no barrier "
                                "between that both came to with nothing under way")

    def read(self, places: Array, wave: int) -> Array:
        self._race(places, "read", (self.writer[places] != wave) & (self.written[places] == self.barrier))
        fresh = self.read_at[places] != self.barrier
        self.readers[places] = np.where(fresh, 0, self.readers[places]) | 1 << wave
        self.read_at[places] = self.barrier
        return self.bytes[places]

    def write(self, places: Array, values: Array, wave: int) -> None:
        """To store what is there already is no race: Triton stores from all the waves that hold a tensor."""
        changed = self.bytes[places] != values
        others = (self.written[places] == self.barrier) & (self.writer[places] != wave)
        read = (self.read_at[places] == self.barrier) & (self.readers[places] & ~(1 << wave) != 0)
        self._race(places, "write", changed & (others | read))
        self.bytes[places] = values
        self.writer[places] = wave
        self.written[places] = self.barrier

    def pass_barrier(self, waves: list[Wave]) -> None:
        """All waves have come: what they did is done, but for what they did not wait for."""
        self.barrier += 1
        for wave in waves:
            for pending in wave.queues["lgkm"]:
                if pending.shared is None:
                    continue
                places, written = pending.shared
                if written:
                    self.writer[places], self.written[places] = wave.number, self.barrier
                else:
                    now = self.read_at[places] == self.barrier
                    self.readers[places] = np.where(now, self.readers[places], 0) | 1 << wave.number
                    self.read_at[places] = self.barrier


class Memory:
    """The tensors of a launch, with which program touched each byte: races between programs."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for start, stop in sorted({span for span in spans if span[1] > span[0]}):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(stop, merged[-1][1])
            else:
                merged.append([start, stop])
        self.starts = np.array([start for start, _ in merged], np.int64)
        self.stops = np.array([stop for _, stop in merged], np.int64)
        self.places = np.concatenate(([0], np.cumsum(self.stops - self.starts)))
        buffers = [(ctypes.c_uint8 * (stop - start)).from_address(start) for start, stop in merged]
        self.views: list[Array] = [np.ctypeslib.as_array(buffer) for buffer in buffers]
        self.writer = np.full(self.places[-1], -1, np.int32)
        self.atomic = np.zeros(self.places[-1], bool)
        self.reader = np.full(self.places[-1], -1, np.int32)  # a program, or -2: several
        self.program = 0
        self.exchanges = False  # whether programs look at a number and then exchange it for another, if it is still there

    def _span(self, addresses: Array, width: int, what: str) -> tuple[int, Array]:
        """The tensor that the lanes touch, and [lanes, width] byte places in it."""
        span = max(0, int(np.searchsorted(self.starts, addresses[0], "right")) - 1)
        outside = (addresses < self.starts[span]) | (addresses + width > self.stops[span])
        if outside.any():
            raise EmulatorFault(f"out of bounds: {what} of {width} bytes at {int(addresses[outside][0]):#x}, which is in no "
                                "tensor of the launch, or not in that of the other lanes")
        if int(np.bitwise_or.reduce(addresses)) & (min(width, 4) - 1):
            raise EmulatorFault(f"misaligned: {what} of {width} bytes at {int(addresses[0]):#x}")
        return span, (addresses - self.starts[span])[:, None] + np.arange(width)

    def read(self, addresses: Array, width: int) -> Array:
        """Bytes [lanes, width]."""
        span, places = self._span(addresses, width, "read")
        of_all = places + self.places[span]
        written = self.writer[of_all]
        if ((written >= 0) & (written != self.program) & ~(self.atomic[of_all] & self.exchanges)).any():
            raise EmulatorFault("race: this program reads what another one writes")
        before = self.reader[of_all]
        now = np.where((before == -1) | (before == self.program), self.program, -2)
        self.reader[of_all] = np.where(self.atomic[of_all], before, now)
        return self.views[span][places]

    def write(self, addresses: Array, values: Array, atomic: bool = False) -> None:
        """Bytes [lanes, width]; of lanes with one address the last stays."""
        span, places = self._span(addresses, values.shape[1], "write")
        of_all = places + self.places[span]
        written, read = self.writer[of_all], self.reader[of_all]
        others = (written >= 0) & (written != self.program) & ~(self.atomic[of_all] & atomic)
        others |= (read != -1) & (read != self.program) & ~np.asarray(atomic and self.exchanges)
        if (others & (self.views[span][places] != values)).any():
            raise EmulatorFault("race: this program writes what another one touches")
        self.writer[of_all] = self.program
        self.atomic[of_all] = atomic
        self.views[span][places] = values

    def change(self, addresses: Array, dtype: Any, change: Callable[[Array, Array], Array]) -> Array:
        """Puts ``change`` (lanes, numbers) in the place of numbers [lanes] of a type; what was there. Lanes with one address
        come one after another."""
        span, places = self._span(addresses, dtype.itemsize, "atomic")
        before = np.zeros(len(addresses), dtype)
        left = np.arange(len(addresses))
        while left.size:
            now = left[np.unique(addresses[left], return_index=True)[1]]
            before[now] = self.views[span][places[now]].view(dtype)[:, 0]
            after = np.ascontiguousarray(change(now, before[now]), dtype)
            self.write(addresses[now], after[:, None].view(np.uint8), atomic=True)
            left = np.setdiff1d(left, now, assume_unique=True)
        return before
