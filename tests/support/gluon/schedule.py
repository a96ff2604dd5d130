"""The scheduler: partitions are threads of which one runs at a time, and asynchronous work is done whenever it pleases.

At every synchronising operation a random number generator decides who goes on and what completes. Uniform choices miss most
races, so each schedule leans: partitions keep a priority for long, and each kind of asynchronous work is done at any rate
between at once and not before nothing else can happen.
"""

import linecache
import random
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

HERE = str(Path(__file__).parent)


class Fault(RuntimeError):
    """What a kernel must not do on the device."""


class Deadlock(Fault):
    """Nobody can go on, and nothing is in flight."""


class _Stopped(BaseException):
    """Ends a partition after another one has failed."""


class Event:
    """Asynchronous work: what it does, and the work that comes before it."""

    __slots__ = ("action", "after", "done", "kind")

    def __init__(self, kind: str, action: Callable[[], None], after: "Event | None" = None) -> None:
        self.kind, self.action, self.after, self.done = kind, action, after, False


class Partition:
    """One thread of the program, and the asynchronous work that it has issued and not yet waited for."""

    def __init__(self, name: str, priority: float) -> None:
        self.name, self.priority = name, priority
        self.gate = threading.Lock()
        self.gate.acquire()
        self.thread: threading.Thread | None = None
        self.condition: Callable[[], bool] | None = None  # of going on; None: at once
        self.awaits: Callable[[], str] = str
        self.barrier: Any = None  # that it waits on
        # What was issued and not yet waited for, with the counts of readers of the shared memory that it reads.
        self.products: deque[tuple[Event, list[np.ndarray]]] = deque()
        self.stores: deque[tuple[Event, Event, np.ndarray]] = deque()  # (reads shared memory, writes global memory, ...)
        self.result: Any = None

    def place(self) -> str:
        """Where in the kernel it stands."""
        frame: FrameType | None = None
        if self.thread is not None and self.thread.ident is not None:
            frame = sys._current_frames().get(self.thread.ident)
        while frame is not None and frame.f_code.co_filename.startswith(HERE):
            frame = frame.f_back
        if frame is None:
            return "?"
        file, line = frame.f_code.co_filename, frame.f_lineno
        return f"{Path(file).name}:{line} in {frame.f_code.co_name}: {linecache.getline(file, line).strip()}"


class Schedule:
    """One program under one random schedule."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.eagerness: dict[str, float] = {}
        self.restlessness = self.random.choice((0.0, 0.02, 0.2))  # how often a partition's priority is drawn anew
        self.haste = self.random.choice((0.0, 0.7, 1.0))  # how often one goes on as soon as its barrier lets it
        self.events: list[Event] = []
        self.failure: BaseException | None = None
        self.running = Partition("the program", self.random.random())
        self.running.thread = threading.current_thread()
        self.partitions = [self.running]
        self.unfenced: list[tuple[Partition, np.ndarray]] = []  # ordinary stores to shared memory, and their marks
        self.filling = 0  # TMA loads in flight
        self.numbers = {self.running.name: 1}  # of partitions, by which they mark what they store
        self.barriers = 0  # how many were allocated

    # --- asynchronous work ---

    def issue(self, kind: str, action: Callable[[], None], after: Event | None = None) -> Event:
        event = Event(kind, action, after)
        if kind not in self.eagerness:
            self.eagerness[kind] = self.random.choice((0.0, 0.0, self.random.random() ** 3, 1.0))
        self.events.append(event)
        return event

    def complete(self, event: Event) -> None:
        """Does the work now, and all that comes before it."""
        if event.done:
            return
        if event.after is not None:
            self.complete(event.after)
        self.events.remove(event)
        event.done = True
        event.action()

    def drain(self) -> None:
        while self.events:
            self.complete(self.random.choice(self.events))

    # --- who runs ---

    def point(self, condition: Callable[[], bool] | None = None, awaits: Callable[[], str] = str) -> None:
        """A synchronising operation of the running partition, which goes on once ``condition`` holds."""
        here = self.running
        here.condition, here.awaits = condition, awaits
        chosen = self._chosen()
        if chosen is not here:
            self._hand_over(chosen)
            here.gate.acquire()
            if self.failure is not None:
                raise _Stopped
        here.condition = None

    def _hand_over(self, chosen: Partition) -> None:
        self.running = chosen
        chosen.gate.release()

    def _chosen(self) -> Partition:
        """Does some asynchronous work and chooses who goes on."""
        while True:
            ready = [p for p in self.partitions if p.condition is None or p.condition()]
            if self.events:
                event = self._event(bool(ready))
                if event is not None:
                    self.complete(event)
                    continue
            if not ready:
                raise Deadlock(self._who_waits())
            if len(ready) == 1:
                return ready[0]
            for partition in ready:
                if self.random.random() < self.restlessness:
                    partition.priority = self.random.random()
            return max(ready, key=lambda partition: partition.priority)

    def _who_waits(self) -> str:
        waiting = [p for p in self.partitions if p.barrier is not None] or self.partitions
        return "; ".join(f"{p.name} waits on {p.awaits()} at {p.place()}" for p in waiting)

    def urge(self, barrier: Any) -> None:
        """Those who waited on the barrier may go on before anyone else: what was released too early is taken then."""
        for partition in self.partitions:
            if partition.barrier is barrier and self.random.random() < self.haste:
                partition.priority = 1 + self.random.random()

    def _event(self, someone_ready: bool) -> Event | None:
        possible = [event for event in self.events if event.after is None or event.after.done]
        if someone_ready:
            event = possible[int(self.random.random() * len(possible))]
            return event if self.random.random() < self.eagerness[event.kind] else None
        # What is starved stays so until there is nothing else to do.
        return max(possible, key=lambda event: (self.eagerness[event.kind], self.random.random()))

    # --- partitions ---

    def specialize(self, parts: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Any:
        """Runs the functions beside each other, to their ends; what the first one returns."""
        if len(self.partitions) > 1:
            raise Fault("warp_specialize within warp_specialize")
        caller = self.running
        workers = []
        for i, (function, args) in enumerate(parts):
            worker = Partition(f"partition {i} ({function.__name__})", self.random.random())
            self.numbers[worker.name] = len(self.numbers) + 1
            worker.thread = threading.Thread(target=self._work, args=(worker, function, args), name=worker.name, daemon=True)
            workers.append(worker)
        self.partitions += workers
        for worker in workers:
            worker.thread.start()  # type: ignore[union-attr]
        try:
            self.point(lambda: self.partitions == [caller], lambda: "the ends of its partitions")
        except _Stopped:
            pass
        except BaseException as error:
            self._fail(error)
        for worker in workers:
            worker.thread.join()  # type: ignore[union-attr]
        if self.failure is not None:
            raise self.failure
        return workers[0].result

    def _work(self, worker: Partition, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        worker.gate.acquire()
        if self.failure is not None:
            return
        try:
            with np.errstate(all="ignore"):
                worker.result = function(*args)
            self.end(worker)
            self.partitions.remove(worker)
            self._hand_over(self._chosen())
        except _Stopped:
            pass
        except BaseException as error:
            if isinstance(error, (Fault, OverflowError)) and "partition " not in str(error):
                error.args = (f"{worker.name}: {error}",)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for partition in self.partitions:
            if partition.gate.locked():
                partition.gate.release()

    def end(self, partition: Partition) -> None:
        """What a partition must have waited for when it ends."""
        if partition.products:
            raise Fault(f"{partition.name} ends with {len(partition.products)} wgmma in flight")
        if partition.stores:
            raise Fault(f"{partition.name} ends with {len(partition.stores)} TMA stores that may still read shared memory")

    def finish(self) -> None:
        """The end of the program."""
        self.end(self.running)
        if self.filling:
            raise Fault("the program ends with a TMA load in flight")
        self.drain()


_current: Schedule | None = None


def current() -> Schedule:
    if _current is None:
        raise RuntimeError("outside a launch")
    return _current


def use(schedule: Schedule | None) -> None:
    """Makes ``schedule`` the one that the operations of the kernel turn to."""
    global _current
    _current = schedule
