"""Shared memory, and the barriers in it."""

import math
from typing import Any

import numpy as np
import triton.language as tl

from support.gluon.schedule import Fault, current
from support.gluon.values import Tile, converted, dimensions, poison


class Shared:
    """A view of an allocation. ``marks`` say which partition's ordinary store of an element has met no fence yet."""

    __slots__ = ("dtype", "layout", "marks", "values")

    def __init__(self, values: np.ndarray, marks: np.ndarray, dtype: tl.dtype, layout: Any) -> None:
        self.values, self.marks, self.dtype, self.layout = values, marks, dtype, layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def rank(self) -> int:
        return self.values.ndim

    @property
    def numel(self) -> int:
        return self.values.size

    def _view(self, values: np.ndarray, marks: np.ndarray) -> "Shared":
        return Shared(values, marks, self.dtype, self.layout)

    def index(self, index: Any) -> "Shared":
        i = int(index)
        if not 0 <= i < self.values.shape[0]:
            raise Fault(f"index {i} of shared memory {list(self.shape)}")
        return self._view(self.values[i], self.marks[i])

    def slice(self, start: Any, length: Any, dim: int = 0) -> "Shared":
        first, last = int(start), int(start) + int(length)
        if not 0 <= first < last <= self.values.shape[dim]:
            raise Fault(f"slice {first} : {last} of dimension {dim} of shared memory {list(self.shape)}")
        part = (slice(None),) * dim + (slice(first, last),)
        return self._view(self.values[part], self.marks[part])

    def permute(self, order: Any) -> "Shared":
        return self._view(self.values.transpose(order), self.marks.transpose(order))

    def reshape(self, shape: Any) -> "Shared":
        values, marks = (array.reshape(dimensions((shape,))) for array in (self.values, self.marks))
        if not np.shares_memory(values, self.values):
            raise Fault(f"shared memory {list(self.shape)} cannot be seen as {list(shape)} in place")
        return self._view(values, marks)

    def load(self, layout: Any = None) -> Tile:
        current().point()
        return Tile(self.values.copy(), self.dtype)

    def store(self, value: Tile) -> None:
        if value.shape != self.shape:
            raise Fault(f"a tile {list(value.shape)} stored to shared memory {list(self.shape)}")
        new = converted(value.values, value.dtype, self.dtype)
        schedule = current()
        schedule.point()
        self.values[...] = new
        self.marks[...] = schedule.numbers[schedule.running.name]
        schedule.unfenced.append((schedule.running, self.marks))

    def check_fenced(self, who: str) -> None:
        if current().unfenced and self.marks.any():
            raise Fault(f"{who} of shared memory that an ordinary store wrote, with no fence_async_shared between")


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
    memory = Shared(poison(shape, element_ty), np.zeros(shape, np.int8), element_ty, layout)
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
