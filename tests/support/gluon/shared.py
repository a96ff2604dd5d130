"""Shared memory, and the barriers in it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from support.gluon.schedule import Fault, current
from support.gluon.values import Tile, converted, dimensions, poison

FILLING = -1  # mark of an element that a TMA load in flight will write


class Shared:
    """A view of an allocation.

    ``marks`` say, of each element, which partition's ordinary store has met no fence yet, or that a load fills it.
    ``readers`` count the asynchronous operations that may read it: done or not, until they were waited for, nobody can know.
    """

    __slots__ = ("dtype", "layout", "marks", "readers", "values")

    def __init__(self, values: np.ndarray, marks: np.ndarray, readers: np.ndarray, dtype: tl.dtype, layout: Any) -> None:
        self.values, self.marks, self.readers, self.dtype, self.layout = values, marks, readers, dtype, layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def rank(self) -> int:
        return self.values.ndim

    @property
    def numel(self) -> int:
        return self.values.size

    # --- views ---

    def _view(self, part: Callable[[np.ndarray], np.ndarray]) -> "Shared":
        return Shared(part(self.values), part(self.marks), part(self.readers), self.dtype, self.layout)

    def index(self, index: Any) -> "Shared":
        i = int(index)
        if not 0 <= i < self.values.shape[0]:
            raise Fault(f"index {i} of shared memory {list(self.shape)}")
        return self._view(lambda array: array[i])

    def slice(self, start: Any, length: Any, dim: int = 0) -> "Shared":
        first, last = int(start), int(start) + int(length)
        if not 0 <= first < last <= self.values.shape[dim]:
            raise Fault(f"slice {first} : {last} of dimension {dim} of shared memory {list(self.shape)}")
        part = (slice(None),) * dim + (slice(first, last),)
        return self._view(lambda array: array[part])

    def permute(self, order: Any) -> "Shared":
        return self._view(lambda array: array.transpose(order))

    def reshape(self, shape: Any) -> "Shared":
        seen = self._view(lambda array: array.reshape(dimensions((shape,))))
        if not np.shares_memory(seen.values, self.values):
            raise Fault(f"shared memory {list(self.shape)} cannot be seen as {list(shape)} in place")
        return seen

    # --- ordinary loads and stores ---

    def load(self, layout: Any = None) -> Tile:
        schedule = current()
        schedule.point()
        self.check_filled(f"{schedule.running.name} loads from")
        return Tile(self.values.copy(), self.dtype)

    def store(self, value: Tile) -> None:
        if value.shape != self.shape:
            raise Fault(f"a tile {list(value.shape)} stored to shared memory {list(self.shape)}")
        new = converted(value.values, value.dtype, self.dtype)
        schedule = current()
        schedule.point()
        self.check_free(f"{schedule.running.name} stores to")
        self.values[...] = new
        self.marks[...] = schedule.numbers[schedule.running.name]
        schedule.unfenced.append((schedule.running, self.marks))

    # --- what must not meet ---

    def check_fenced(self, who: str) -> None:
        """Before an asynchronous operation."""
        if current().unfenced and (self.marks > 0).any():
            raise Fault(f"{who} meets shared memory that an ordinary store wrote, with no fence_async_shared between")

    def check_filled(self, who: str) -> None:
        """At the time of a read, which for an asynchronous operation is not that of its issue."""
        if current().filling and (self.marks == FILLING).any():
            raise Fault(f"{who} shared memory that a TMA load is filling")

    def check_free(self, who: str) -> None:
        """Before a write."""
        self.check_filled(who)
        if self.readers.any():
            raise Fault(f"{who} shared memory that an asynchronous operation may still read")


def fence_async_shared(cluster: bool = False) -> None:
    """Shows the ordinary stores of this partition to asynchronous operations."""
    schedule = current()
    schedule.point()
    own = schedule.numbers[schedule.running.name]
    for partition, marks in schedule.unfenced:
        if partition is schedule.running:
            marks[marks == own] = 0
    schedule.unfenced = [entry for entry in schedule.unfenced if entry[0] is not schedule.running]


class Barrier:
    """An mbarrier: a phase ends when its arrivals and its bytes are complete."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = self.missing = self.bytes = self.phase = 0

    def index(self, index: Any) -> "Barrier":
        if int(index):
            raise Fault(f"index {int(index)} of {self.name}, a single barrier")
        return self

    def initialised(self) -> "Barrier":
        if not self.count:
            raise Fault(f"{self.name} is used without mbarrier.init")
        return self

    def arrive(self, count: int) -> None:
        if count > self.missing:
            raise Fault(f"{self.name}: more arrivals than its count of {self.count}")
        self.missing -= count
        self.end_phase()

    def land(self, count: int) -> None:
        self.bytes -= count
        self.end_phase()

    def end_phase(self) -> None:
        if not self.missing and not self.bytes:
            self.phase += 1
            self.missing = self.count

    def state(self) -> str:
        return f"phase {self.phase}, {self.missing} of {self.count} arrivals and {self.bytes} bytes missing"


class Barriers:
    """An array of barriers."""

    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.barriers), 1

    def index(self, index: Any) -> Barrier:
        i = int(index)
        if not 0 <= i < len(self.barriers):
            raise Fault(f"index {i} of {len(self.barriers)} barriers")
        return self.barriers[i]


class MBarrierLayout:
    """Marks an allocation as one of barriers."""

    def __init__(self, cga_layout: Any = None) -> None:
        pass


def allocate_shared_memory(element_ty: tl.dtype, shape: Any, layout: Any, value: Tile | None = None) -> Any:
    shape = dimensions((shape,))
    if isinstance(layout, MBarrierLayout):
        return allocate_mbarrier(math.prod(shape) if len(shape) > 1 else None)
    memory = Shared(poison(shape, element_ty), np.zeros(shape, np.int8), np.zeros(shape, np.int8), element_ty, layout)
    if value is not None:
        memory.store(value)
    return memory


def allocate_mbarrier(batch: int | None = None, two_ctas: bool = False) -> Barrier | Barriers:
    schedule = current()
    name = f"barrier {schedule.barriers}"
    schedule.barriers += 1
    if batch is None:
        return Barrier(name)
    return Barriers([Barrier(f"{name}[{i}]") for i in range(batch)])
