"""Memory checks for kernels that run in Triton's interpreter, exact to the element.

    with memory_guard() as guard:
        kernel[grid](...)

raises AssertionError at the end of the first launch in which a program

- loads or stores outside the elements that the strides of the passed tensors reach (gaps between rows are outside),
- touches an element that another program wrote, or writes one that another program read (two atomics may meet),
- stores to one address twice in one store,
- loads what torch.empty left uninitialised, or stores a copy of it or of a lane that a load without ``other`` left out.

Such values are NaN of one bit pattern, so what is computed from them shows in the results even where it is not recognised.
Which pointer an access came from is not known: tensors of one storage are checked as one.
"""

import contextlib
import functools
import linecache
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

# Bits by element size: a quiet NaN that no arithmetic makes, in fp16 and bf16 alike, and an unlikely int32 and int64.
POISON = {2: 0x7FED, 4: 0x7FDEADED, 8: 0x7FFDEADDEADDEADD}
POISONED_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
# Larger tensors hold address space rather than data, and filling them would make it real.
POISON_LIMIT = 2**30
# Up to this span, in elements, who touched what is looked up in a table; beyond it, in a sorted list of addresses.
TABLE_LIMIT = 2**22

NOBODY, SEVERAL = -1, -2
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# --- poison ---

_poisoning = 0


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    if (not _poisoning or type(tensor) is not torch.Tensor or tensor.device.type == "meta"
            or tensor.dtype not in POISONED_TYPES or torch._C._functorch.is_functorch_wrapped_tensor(tensor)):
        return tensor
    storage, size = tensor.untyped_storage(), tensor.element_size()
    if 0 < storage.nbytes() <= POISON_LIMIT:
        bits = torch.zeros(0, dtype=_SIGNED[size], device=tensor.device).set_(storage)
        bits.fill_(POISON[size])
    return tensor


def _filled(empty: Any) -> Any:
    @functools.wraps(empty)
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _fill(empty(*args, **kwargs))

    return allocate


# Wrapped once, here, and for good: torch.compile remembers functions by identity, and others may keep a reference.
for _owner, _names in ((torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
                       (torch.Tensor, ("new_empty", "new_empty_strided"))):
    for _name in _names:
        setattr(_owner, _name, _filled(getattr(_owner, _name)))


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, torch.empty, Tensor.new_empty and the rest of their family return poison.

    torch's own switch, fill_uninitialized_memory, needs deterministic algorithms, which the package's results follow.
    """
    global _poisoning
    _poisoning += 1
    try:
        yield
    finally:
        _poisoning -= 1


def is_poison(values: Any) -> np.ndarray:
    """Where a tensor or array holds poison, bit for bit."""
    if isinstance(values, torch.Tensor):
        if values.element_size() not in _SIGNED:
            return np.zeros(values.shape, bool)
        values = values.detach().contiguous().view(_SIGNED[values.element_size()]).numpy()
    size = values.dtype.itemsize
    if size not in _BITS or values.dtype == np.bool_:
        return np.zeros(values.shape, bool)
    return np.ascontiguousarray(values).view(_BITS[size]).reshape(values.shape) == POISON[size]


# --- which elements there are, and who touched them ---


def element_addresses(tensor: torch.Tensor) -> np.ndarray:
    """Addresses of the elements of a tensor; those of a dimension with stride 0 once."""
    if tensor.numel() == 0:
        return np.zeros(0, np.int64)
    offsets = np.array([tensor.storage_offset()])
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            offsets = np.add.outer(offsets, np.arange(length) * stride).ravel()
    return tensor.untyped_storage().data_ptr() + offsets * tensor.element_size()


class Region:
    """The elements of one storage that a launch may touch; ``slots`` numbers them for the arrays beside it."""

    def __init__(self, tensors: list[torch.Tensor], names: list[str]) -> None:
        self.names = ", ".join(dict.fromkeys(names))
        self.unit = min(tensor.element_size() for tensor in tensors)  # wider elements are several units
        parts = [element_addresses(t)[:, None] + np.arange(0, t.element_size(), self.unit) for t in tensors]
        addresses = np.concatenate([part.ravel() for part in parts])
        self.poisonable = all(tensor.dtype in POISONED_TYPES for tensor in tensors)
        self.first, self.last = (int(addresses.min()), int(addresses.max())) if addresses.size else (0, -1)
        self.count = (self.last - self.first) // self.unit + 1
        self.sorted = None
        if self.count <= TABLE_LIMIT:
            self.reachable = np.zeros(self.count, bool)
            self.reachable[(addresses - self.first) // self.unit] = True
        else:
            self.sorted = np.unique(addresses)
            self.count = len(self.sorted)
        self.writer = np.full(self.count, NOBODY, np.int32)
        self.reader = np.full(self.count, NOBODY, np.int32)
        self.atomic = np.zeros(self.count, bool)

    def slots(self, addresses: np.ndarray) -> np.ndarray:
        """Slot of every address, -1 for one that no tensor reaches."""
        if self.sorted is not None:
            slot = np.minimum(np.searchsorted(self.sorted, addresses), self.count - 1)
            return np.where(self.sorted[slot] == addresses, slot, -1)
        slot, rest = np.divmod(addresses - self.first, self.unit)
        within = (slot >= 0) & (slot < self.count) & (rest == 0)
        return np.where(within & self.reachable[np.where(within, slot, 0)], slot, -1)

    def distance(self, address: int) -> int:
        return max(self.first - address, address - self.last, 0)


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(argument, (tuple, list)):
        for i, item in enumerate(argument):
            yield from _tensors(f"{name}[{i}]", item)
    elif hasattr(argument, "block_shape"):  # a tensor descriptor
        yield from _tensors(name, argument.base)
    elif hasattr(argument, "data_ptr"):
        yield name, argument if isinstance(argument, torch.Tensor) else argument.base  # a reinterpreted tensor has one


class Guard:
    """What the guard saw: ``kernels`` by name, ``loads`` and ``stores`` in elements."""

    def __init__(self, interpreter: Any) -> None:
        self.kernels: list[str] = []
        self.loads = self.stores = 0
        self._interpreter = interpreter
        self._memory = interpreter._interpreter  # the compiled functions that every access ends in
        self._package = os.path.dirname(os.path.dirname(os.path.abspath(interpreter.__file__))) + os.sep
        self._launcher = interpreter.GridExecutor.__call__
        self._regions: list[Region] = []
        self._faults: dict[tuple[str, str], list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    # --- a launch ---

    def launch(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        self.kernels.append(executor.fn.__name__)
        self._faults = {}
        failure = None
        try:
            self._launcher(executor, *args, **kwargs)
        except Exception as error:
            failure = error
        if self._faults:
            raise AssertionError(self._report()) from failure
        if failure is not None:
            raise failure

    def watch(self, names: list[str], args: list[Any], kwargs: dict[str, Any]) -> None:
        """Takes the tensors of a launch for the memory that it may touch."""
        storages: dict[int, tuple[list[torch.Tensor], list[str]]] = {}
        for name, argument in [*zip(names, args, strict=False), *kwargs.items()]:
            for label, tensor in _tensors(name, argument):
                tensors, labels = storages.setdefault(tensor.untyped_storage().data_ptr(), ([], []))
                tensors.append(tensor)
                labels.append(f"{label} {tuple(tensor.shape)} with strides {tensor.stride()}")
        self._regions = [Region(*found) for found in storages.values()]

    # --- what the interpreter calls instead of its own ---

    def load(self, ptrs: np.ndarray, mask: Any, other: Any, dtype: Any) -> np.ndarray:
        allowed = self._check("load", ptrs, mask, np.dtype(dtype).itemsize)
        values = self._memory.load(ptrs, allowed, other, dtype)
        self._look_for_poison("load of uninitialised memory", values, ptrs, allowed)
        return values

    def store(self, ptrs: np.ndarray, values: np.ndarray, mask: Any) -> Any:
        allowed = self._check("store", ptrs, mask, values.dtype.itemsize)
        self._look_for_poison("store of an undefined value", values, ptrs, allowed)
        return self._memory.store(ptrs, values, allowed)

    def atomic_rmw(self, operation: Any, ptrs: np.ndarray, values: np.ndarray, mask: Any, semantic: Any) -> np.ndarray:
        allowed = self._check("atomic", ptrs, mask, values.dtype.itemsize)
        old = self._memory.atomic_rmw(operation, ptrs, values, allowed, semantic)
        self._look_for_poison("atomic on uninitialised memory", old, ptrs, allowed)
        return old

    def atomic_cas(self, ptrs: np.ndarray, expected: np.ndarray, values: np.ndarray, semantic: Any) -> np.ndarray:
        allowed = self._check("atomic", ptrs, np.ones(ptrs.shape, bool), values.dtype.itemsize)
        if not allowed.all():  # it takes no mask
            return np.zeros_like(expected)
        old = self._memory.atomic_cas(ptrs, expected, values, semantic)
        self._look_for_poison("atomic on uninitialised memory", old, ptrs, allowed)
        return old

    # --- the checks ---

    def _check(self, kind: str, ptrs: np.ndarray, mask: Any, size: int) -> np.ndarray:
        """The mask without the lanes that must not reach memory; everything else that is wrong is noted."""
        active = np.broadcast_to(np.asarray(mask, dtype=bool), ptrs.shape)
        addresses = ptrs[active].astype(np.int64)
        program = self._program()
        inside = np.zeros(len(addresses), bool)
        lowest, highest = (addresses.min(), addresses.max()) if len(addresses) else (0, -1)
        for region in self._regions:
            if region.last < lowest or region.first > highest + size - 1:
                continue
            # [lanes, units of an element]
            slots = region.slots(addresses[:, None] + np.arange(0, size, region.unit))
            whole = (slots >= 0).all(1)
            if whole.any():
                inside |= whole
                self._note(kind, region, slots[whole], addresses[whole], program)
            if inside.all():
                break
        if kind == "load":
            self.loads += len(addresses)
        else:
            self.stores += len(addresses)
        if inside.all():
            return active.copy()
        outside = addresses[~inside]
        nearest = min(self._regions, key=lambda region: region.distance(int(outside[0])), default=None)
        self._fault(f"out-of-bounds {kind}", outside, "" if nearest is None else f"; nearest is {nearest.names}")
        allowed = np.zeros(ptrs.shape, bool)
        allowed[active] = inside
        return allowed

    def _note(self, kind: str, region: Region, slots: np.ndarray, addresses: np.ndarray, program: int) -> None:
        """Enters an access into the region's record, and compares it with what is there."""
        writer, reader = region.writer[slots], region.reader[slots]
        written = (writer != NOBODY) & (writer != program)
        if kind == "load":
            self._race("read after another program's write", written, addresses)
            region.reader[slots] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
            return
        if kind == "store" and len(np.unique(slots[:, 0])) < len(slots):
            order = np.sort(addresses)
            self._fault("duplicate addresses in one store", order[1:][order[1:] == order[:-1]])
        atomic = kind == "atomic"
        self._race("write after another program's write", written & ~(region.atomic[slots] & atomic), addresses)
        self._race("write after another program's read", (reader != NOBODY) & (reader != program), addresses)
        region.writer[slots] = np.where((writer == NOBODY) | (writer == program), program, SEVERAL)
        region.atomic[slots] = atomic

    def _race(self, what: str, conflict: np.ndarray, addresses: np.ndarray) -> None:
        if conflict.any():
            self._fault(f"race: {what}", addresses[conflict.any(1)])

    def _look_for_poison(self, what: str, values: np.ndarray, ptrs: np.ndarray, allowed: np.ndarray) -> None:
        found = is_poison(np.broadcast_to(values, ptrs.shape)) & allowed
        if found.any():
            addresses = ptrs[found].astype(np.int64)
            home = next((r for r in self._regions if r.first <= addresses[0] <= r.last), None)
            if home is not None and home.poisonable:
                self._fault(what, addresses, f"; it is {home.names}")

    # --- the report ---

    def _program(self) -> int:
        x, y, z = self._interpreter.interpreter_builder.grid_idx
        size_x, size_y, _ = self._interpreter.interpreter_builder.grid_dim
        return x + size_x * (y + size_y * z)

    def _fault(self, what: str, addresses: np.ndarray, more: str = "") -> None:
        program = self._interpreter.interpreter_builder.grid_idx
        entry = self._faults.setdefault((what, self._where()), [0, program, int(addresses[0]), more])
        entry[0] += len(addresses)

    def _where(self) -> str:
        """The lines of the kernel that led here, innermost first."""
        frame, lines = sys._getframe(1), []
        while frame is not None and frame.f_code is not self._launcher.__code__:
            code = frame.f_code
            if not code.co_filename.startswith(self._package) and code.co_filename != __file__:
                text = f": {linecache.getline(code.co_filename, frame.f_lineno).strip()}" if not lines else ""
                lines.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}{text}")
            frame = frame.f_back
        return "\n    from ".join(lines)

    def _report(self) -> str:
        lines = [f"kernel {self.kernels[-1]}:"]
        for (what, where), (count, program, address, more) in self._faults.items():
            lines.append(f"  {what}: {count} elements, first in program {program} at {address:#x}{more}\n    at {where}")
        return "\n".join(lines)


@contextlib.contextmanager
def memory_guard() -> Iterator[Guard]:
    """Checks every launch within it; see the top of this file. Needs TRITON_INTERPRET=1."""
    import triton.runtime.interpreter as interpreter

    import fused_attn.kernels.launch  # noqa: F401  # its repair of the interpreter goes beneath the guard, not away with it

    guard = Guard(interpreter)
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, copy_arguments, masked_load = executor.__call__, executor._init_args_hst, builder.create_masked_load

    def watched_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = copy_arguments(self, args, kwargs)
        guard.watch(self.arg_names, args, kwargs)
        return args, kwargs

    def undefined_without_other(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        # The interpreter gives 0 where a GPU gives whatever the register held.
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        if other is None and dtype.itemsize in POISON and not np.asarray(mask.data).all():
            bits = np.full(ptrs.data.shape, POISON[dtype.itemsize], _BITS[dtype.itemsize])
            other = interpreter.TensorHandle(bits.view(dtype), ptrs.get_element_ty())
        return masked_load(self, ptrs, mask, other, *rest, **options)

    interpreter._interpreter = guard
    executor.__call__ = lambda self, *args, **kwargs: guard.launch(self, *args, **kwargs)
    executor._init_args_hst, builder.create_masked_load = watched_arguments, undefined_without_other
    try:
        with poisoned_empty():
            yield guard
    finally:
        interpreter._interpreter = guard._memory
        executor.__call__, executor._init_args_hst, builder.create_masked_load = launch, copy_arguments, masked_load
