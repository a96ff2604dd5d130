"""Global memory: pointers and tensor descriptors into the storages of the tensors that a kernel is given."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl

from support.gluon.schedule import Fault
from support.gluon.values import DTYPES, NUMPY, TORCH, Int, Tile, Values, bytes_of, converted, dimensions, poison, simplified

WORD = 1 << 64


class Memory:
    """The storage of a tensor, as elements of its dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = DTYPES[tensor.dtype]
        self.itemsize = tensor.element_size()
        self.origin = tensor.storage_offset()
        self.name = f"{self.dtype} {list(tensor.shape)}"
        flat = torch.zeros(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
        self.size = flat.numel()
        # NumPy has no bfloat16: its elements are the upper halves of float32.
        self.bits = self.dtype is tl.bfloat16
        self.elements = flat.view(torch.int16).numpy().view(np.uint16) if self.bits else flat.numpy()

    def read(self, where: Any) -> Values:
        found = self.elements[where]
        if self.bits:
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found if found.dtype == NUMPY[self.dtype] else found.astype(NUMPY[self.dtype])

    def write(self, where: Any, values: Values) -> None:
        if self.bits:
            array = np.ascontiguousarray(values, np.float32)
            values = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(array.shape)
        self.elements[where] = values

    def add(self, where: Any, values: Values) -> None:
        """Atomic additions; several may meet in one element."""
        if self.dtype not in (tl.float32, tl.float64, tl.int32, tl.int64):
            raise NotImplementedError(f"atomic additions in {self.dtype}")
        np.add.at(self.elements, where, values)


class Pointer:
    """Pointers into one storage: one, or a tile of them."""

    __slots__ = ("memory", "where")
    __array_ufunc__ = None

    def __init__(self, memory: Memory, where: Values) -> None:
        self.memory, self.where = memory, where  # in elements of the storage, 64 bits wide

    @property
    def dtype(self) -> tl.pointer_type:
        return tl.pointer_type(self.memory.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.where)

    def __add__(self, offset: Any) -> "Pointer":
        if isinstance(offset, Tile):
            if not offset.dtype.is_int():
                raise TypeError(f"a pointer moved by {offset.dtype}")
            return Pointer(self.memory, self.where + offset.values.astype(np.int64))
        return Pointer(self.memory, self.where + np.int64(int(offset)))

    __radd__ = __add__

    def __sub__(self, offset: Any) -> "Pointer":
        return self + -offset

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.where[index])

    def active(self, mask: Any) -> tuple[Values, Values]:
        """(elements, which lanes are active), checked against the storage."""
        where = np.asarray(self.where)
        lanes = np.ones((), bool) if mask is None else np.asarray(mask.values if isinstance(mask, Tile) else bool(mask))
        where, lanes = np.broadcast_arrays(where, lanes)
        touched = where[lanes]
        if touched.size and not (touched.min() >= 0 and touched.max() < self.memory.size):
            worst = int(touched.min()) if touched.min() < 0 else int(touched.max())
            raise Fault(f"a pointer leaves the storage of {self.memory.name}: element {worst} of {self.memory.size}")
        return where, lanes


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Tile | Int:
    """Lanes without their mask hold ``other``, or else what nobody has written."""
    where, lanes = pointer.active(mask)
    dtype = pointer.memory.dtype
    if mask is None:
        return simplified(pointer.memory.read(where), dtype)
    found = poison(where.shape, dtype)
    if other is not None:
        source = other.dtype if isinstance(other, (Tile, Int)) else tl.float32
        values = other.values if isinstance(other, Tile) else int(other) if isinstance(other, Int) else other
        found[...] = converted(values, source, dtype)
    found[lanes] = pointer.memory.read(where[lanes])
    return simplified(found, dtype)


def _value_for(pointer: Pointer, value: Any, shape: tuple[int, ...]) -> Values:
    tile = Tile.of(value, pointer.memory.dtype)
    return np.broadcast_to(converted(tile.values, tile.dtype, pointer.memory.dtype), shape)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    where, lanes = pointer.active(mask)
    pointer.memory.write(where[lanes], _value_for(pointer, value, where.shape)[lanes])


def atomic_add(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> Tile | Int | None:
    """What was there before is known of a single pointer only: the lanes of a tile may meet in one element."""
    where, lanes = pointer.active(mask)
    before = simplified(pointer.memory.read(where), pointer.memory.dtype) if not where.shape and lanes else None
    pointer.memory.add(where[lanes], _value_for(pointer, value, where.shape)[lanes])
    return before


@dataclass(frozen=True)
class BlockType:
    """What a kernel asks of the block of a descriptor."""

    element_ty: tl.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return bytes_of(self.shape, self.element_ty)


class Descriptor:
    """A tensor descriptor: boxes of a tensor of up to five dimensions, at 64-bit byte addresses that wrap.

    So a ragged one works as on the chip: an element is in bounds by its coordinates, and must then lie in the storage.
    """

    def __init__(self, descriptor: Any) -> None:
        self.memory = Memory(descriptor.base)
        self.dtype, self.layout = self.memory.dtype, descriptor.layout
        self.extents, self.steps = [int(n) for n in descriptor.shape], [int(n) for n in descriptor.strides]
        self.block_shape = dimensions((tuple(descriptor.block_shape),))
        self.block_type = BlockType(self.dtype, self.block_shape)
        self.nbytes_per_cta = self.block_type.nbytes
        size = self.memory.itemsize
        for rule, holds in {
            "ranks of shape, strides and block differ": len(self.extents) == len(self.steps) == len(self.block_shape) <= 5,
            "the last stride is not 1": self.steps[-1] == 1,
            "an extent is not in 1 .. 2**32": all(0 < n <= 1 << 32 for n in self.extents),
            "a side of the block is above 256": all(0 < n <= 256 for n in self.block_shape),
            "the base is not a multiple of 16 bytes": descriptor.base.data_ptr() % 16 == 0,
            "a stride is no multiple of 16 bytes below 2**40":
                all(n * size % 16 == 0 and 0 <= n * size < 1 << 40 for n in self.steps[:-1]),
            "rows of the block are no multiple of 16 bytes": self.block_shape[-1] * size % 16 == 0,
        }.items():
            if not holds:
                raise Fault(f"a tensor descriptor of {self.memory.name}: {rule}")

    @property
    def shape(self) -> tuple[Int, ...]:
        return tuple(Int(n, 64 if n >= 1 << 31 else 32) for n in self.extents)

    @property
    def strides(self) -> tuple[Int, ...]:
        return tuple(Int(n, 64) for n in self.steps)

    def box(self, coordinates: Any) -> tuple[Values, slice, Values]:
        """Of the box at these coordinates: (rows in bounds, columns in bounds, elements of the storage [rows, columns])."""
        if any(getattr(c, "dtype", tl.int32) != tl.int32 for c in coordinates):
            raise TypeError(f"coordinates of a box are int32; got {[str(getattr(c, 'dtype', 'int')) for c in coordinates]}")
        at = [Int(int(c)).value for c in coordinates]
        if len(at) != len(self.extents):
            raise Fault(f"{len(at)} coordinates for a tensor descriptor of {len(self.extents)} dimensions")
        size = self.memory.itemsize
        inside = np.ones(1, bool)
        address = np.array([self.memory.origin * size], np.uint64)
        for first, extent, step, length in zip(at[:-1], self.extents, self.steps, self.block_shape, strict=False):
            index = np.arange(first, first + length, dtype=np.int64)
            inside = (inside[:, None] & ((index >= 0) & (index < extent))).reshape(-1)
            moved = index.astype(np.uint64) * np.uint64(step * size)
            address = (address[:, None] + moved).reshape(-1)
        start, stop = max(0, -at[-1]), min(self.block_shape[-1], self.extents[-1] - at[-1])
        columns = slice(start, max(start, stop))
        first = np.uint64((at[-1] + start) * size % WORD)
        rows = (address[inside] + first) // np.uint64(size)
        count = columns.stop - columns.start
        if rows.size and count and int(rows.max()) + count > self.memory.size:
            raise Fault(f"TMA leaves the storage of {self.memory.name} at {at}: "
                        f"element {int(rows.max()) + count - 1} of {self.memory.size}")
        return inside, columns, rows.astype(np.int64)[:, None] + np.arange(count)

    def read(self, box: tuple[Values, slice, Values]) -> np.ndarray:
        """The block, with zeros out of bounds."""
        inside, columns, where = box
        block: np.ndarray = np.zeros((len(inside), self.block_shape[-1]), NUMPY[self.dtype])
        block[inside, columns] = self.memory.read(where)
        return block.reshape(self.block_shape)

    def write(self, box: tuple[Values, slice, Values], block: np.ndarray, add: bool = False) -> None:
        """Stores, or adds, what is in bounds."""
        inside, columns, where = box
        values = block.reshape(len(inside), -1)[inside, columns]
        if add:
            self.memory.add(where, values)
        else:
            self.memory.write(where, values)


def has_memory(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.dtype in TORCH.values()
