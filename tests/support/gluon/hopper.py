"""The asynchronous operations: TMA copies, mbarriers, and the products of warpgroups."""

from typing import Any

import numpy as np
import triton.language as tl

from support.gluon.memory import Descriptor
from support.gluon.schedule import Event, Fault, current
from support.gluon.shared import FILLING, Barrier, Barriers, Shared
from support.gluon.values import HALVES, Tile, Values, poison

# --- barriers ---


def _single(barrier: Any) -> Barrier:
    if isinstance(barrier, Barriers):
        raise Fault("an array of barriers where one of them is meant: index it")
    return barrier


def init(mbarrier: Any, count: Any) -> None:
    barrier = _single(mbarrier)
    barrier.count = barrier.missing = int(count)


def invalidate(mbarrier: Any) -> None:
    _single(mbarrier).initialised().count = 0


def _arrive(barrier: Barrier, count: int) -> None:
    phase = barrier.phase
    barrier.arrive(count)
    if barrier.phase != phase:
        current().urge(barrier)


def expect(mbarrier: Any, bytes_per_cta: Any, pred: Any = True) -> None:
    """Adds to the bytes of the phase, and arrives."""
    if pred:
        current().point()
        barrier = _single(mbarrier).initialised()
        barrier.bytes += int(bytes_per_cta)
        _arrive(barrier, 1)


def arrive(mbarrier: Any, *, count: Any = 1, pred: Any = True) -> None:
    if pred:
        current().point()
        _arrive(_single(mbarrier).initialised(), int(count))


def wait(mbarrier: Any, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    """Until the phase of this parity has ended."""
    if not pred:
        return
    barrier, parity = _single(mbarrier).initialised(), int(phase)
    if parity not in (0, 1):
        raise Fault(f"{barrier.name} awaited with parity {parity}, which is neither 0 nor 1")
    schedule = current()
    schedule.running.barrier = barrier
    schedule.point(lambda: barrier.phase & 1 != parity, lambda: f"{barrier.name}, parity {parity} ({barrier.state()})")
    schedule.running.barrier = None


# --- TMA ---


def _matching(descriptor: Descriptor, shared: Shared) -> None:
    """Dimensions of one element may be left out of shared memory."""
    sizes = [[n for n in shape if n > 1] for shape in (descriptor.block_shape, shared.shape)]
    if sizes[0] != sizes[1]:
        raise Fault(f"TMA of a block {list(descriptor.block_shape)} and shared memory {list(shared.shape)}")
    if descriptor.dtype != shared.dtype:
        raise Fault(f"TMA between {descriptor.dtype} and shared memory of {shared.dtype}")


def async_load(tensor_desc: Descriptor, coord: Any, barrier: Any, result: Shared, pred: Any = True,
               multicast: bool = False, cache_policy: Any = None) -> None:
    """Fills ``result`` with poison now and with the block at a later time."""
    if not pred:
        return
    if multicast:
        raise NotImplementedError("TMA multicast")
    schedule = current()
    schedule.point()
    _matching(tensor_desc, result)
    result.check_fenced("a TMA load")
    result.check_free(f"a TMA load of {schedule.running.name} fills")
    barrier, box = _single(barrier).initialised(), tensor_desc.box(coord)
    result.values[...] = poison((), tensor_desc.dtype)
    result.marks[...] = FILLING
    schedule.filling += 1

    def landed() -> None:
        result.values[...] = tensor_desc.read(box).reshape(result.shape)
        result.marks[...] = 0
        schedule.filling -= 1
        barrier.land(tensor_desc.block_type.nbytes)

    schedule.issue("TMA load", landed)


def _async_write(what: str, descriptor: Descriptor, coord: Any, source: Shared, add: bool) -> None:
    schedule = current()
    schedule.point()
    _matching(descriptor, source)
    source.check_fenced(what)
    box, block = descriptor.box(coord), np.empty(0)
    reader = f"{what} of {schedule.running.name} reads"

    def read() -> None:
        nonlocal block
        source.check_filled(reader)
        block = source.values.copy()

    reads = schedule.issue("TMA store's read", read)
    writes = schedule.issue("TMA store's write", lambda: descriptor.write(box, block, add), after=reads)
    source.readers += 1
    schedule.running.stores.append((reads, writes, source.readers))


def async_store(tensor_desc: Descriptor, coord: Any, src: Shared, cache_policy: Any = None) -> None:
    """Reads ``src`` at a later time, and writes global memory at a time after that."""
    _async_write("a TMA store", tensor_desc, coord, src, add=False)


def async_atomic_add(tensor_desc: Descriptor, coord: Any, src: Shared) -> None:
    _async_write("a TMA reduction", tensor_desc, coord, src, add=True)


def store_wait(pendings: Any, read_only: Any = True) -> None:
    """Until no more than ``pendings`` stores of this partition still read shared memory, or still write global memory."""
    schedule = current()
    schedule.point()
    stores = schedule.running.stores
    while len(stores) > int(pendings):
        reads, writes, readers = stores.popleft()
        schedule.complete(reads if read_only else writes)
        readers -= 1


# --- products of a warpgroup ---


class Accumulator(Tile):
    """The result of an asynchronous product, in registers that may not be read before it went through its wait."""

    __slots__ = ("_shape", "event", "result")

    def __init__(self, shape: tuple[int, ...], dtype: tl.dtype) -> None:
        self._shape, self.dtype = shape, dtype
        self.event: Event | None = None
        self.result: Values = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def values(self) -> Values:
        raise Fault(f"register result {list(self._shape)} of an async wgmma read before its warpgroup_mma_wait")


def _check(a: Any, b: Shared, acc: Tile) -> None:
    """What can be said of the operands of a product when it is issued."""
    if not isinstance(b, Shared):
        raise Fault("the second operand of wgmma is not in shared memory")
    if a.dtype != b.dtype or b.dtype not in HALVES:
        raise Fault(f"wgmma of {a.dtype} and {b.dtype}: halves of one dtype are meant")
    if a.shape[1] != b.shape[0] or acc.shape != (a.shape[0], b.shape[1]) or a.shape[0] % 64:
        raise Fault(f"wgmma of {list(a.shape)} and {list(b.shape)} into {list(acc.shape)}")
    if acc.dtype != tl.float32:
        raise Fault(f"wgmma accumulates in {acc.dtype}")
    b.check_fenced("wgmma")
    if isinstance(a, Shared):
        a.check_fenced("wgmma")
    elif isinstance(a, Accumulator):
        a.values  # noqa: B018  an error


def warpgroup_mma(a: Any, b: Shared, acc: Tile, *, use_acc: Any = True, precision: Any = None,
                  max_num_imprecise_acc: Any = None, is_async: Any = False) -> Tile:
    """a b + acc, in the order of issue; shared memory is read at any time before the wait for it."""
    schedule = current()
    schedule.point()
    products = schedule.running.products
    _check(a, b, acc)
    reader = f"a wgmma of {schedule.running.name} reads"
    result = Accumulator(acc.shape, acc.dtype)
    added = bool(use_acc)

    def multiply() -> None:
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.check_filled(reader)
        result.result = np.matmul(a.values, b.values)
        if added:
            result.result += acc.result if isinstance(acc, Accumulator) else acc.values

    result.event = schedule.issue("wgmma", multiply, after=products[-1][0] if products else None)
    readers = [operand.readers for operand in (a, b) if isinstance(operand, Shared)]
    for count in readers:
        count += 1
    products.append((result.event, readers))
    return result if is_async else warpgroup_mma_wait(0, (result,))


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    """Retires all but the last ``num_outstanding`` products of this partition; ``deps`` as tiles that can be read."""
    if deps is None:
        raise Fault("warpgroup_mma_wait without deps")
    schedule = current()
    schedule.point()
    products = schedule.running.products
    while len(products) > int(num_outstanding):
        event, readers = products.popleft()
        schedule.complete(event)
        for count in readers:
            count -= 1
    in_flight = [event for event, _ in products]
    done = tuple(Tile(dep.result, dep.dtype) if isinstance(dep, Accumulator) and dep.event not in in_flight else dep
                 for dep in deps)
    return done[0] if len(done) == 1 else done
