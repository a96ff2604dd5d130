"""A tensor descriptor of the host in 128 bytes, encoded our own way (Map in machine/copies.h); a card's is opaque."""

import struct
from typing import Any

_SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle to bytes


def encode(descriptor: Any, meta: dict[str, Any]) -> bytes:
    """Of Triton's TensorDescriptor, with what the compiler says of it. Raises ValueError where the driver would refuse it."""
    size, rank, swizzle = meta["elem_size"], len(descriptor.shape), _SPANS[meta["swizzle"]]
    dims = [*reversed(descriptor.shape), *[1] * (5 - rank)]
    box = [*reversed(meta["block_size"]), *[1] * (5 - rank)]
    strides = [*(stride * size for stride in reversed(descriptor.strides[:-1])), *[0] * (5 - rank)]
    base = descriptor.base.data_ptr()
    if base % 16 or any(stride % 16 for stride in strides):
        raise ValueError(f"a descriptor's address and strides in bytes are multiples of 16; got {base:#x} and {strides}")
    if not all(0 < side <= 256 for side in box) or box[0] * size % 16:
        raise ValueError("a box has at most 256 elements a side, and rows of a multiple of 16 bytes; "
                         f"got {box} of {size} bytes")
    if swizzle and box[0] * size > swizzle:
        raise ValueError(f"a row of a box is no wider than its swizzle of {swizzle} bytes; got {box[0] * size}")
    return struct.pack("<QIIII5I5I4Q", base, rank, size, swizzle, 0, *dims, *box, *strides[:4]).ljust(128, b"\0")
