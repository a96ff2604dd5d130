"""Launching: the one place where a kernel meets its device, its options and its tile configuration."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

from fused_attn.spec import TileConfig

# (kernel, number of programs, arguments before TILE, configuration) -> None. `run` launches; offline compilation and
# the overhead benchmark bring their own.
Launcher: TypeAlias = Callable[[Any, int, tuple[Any, ...], TileConfig], None]

# A tile has at most 256 rows and 256 columns: below this stride its 32-bit offsets cannot overflow.
WIDEST_STRIDE = 2**31 // 512


_counters: list[Counter[str]] = []


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the launches made within it, by kernel name."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]  # remove() would compare counts


def run(kernel: Any, programs: int, args: tuple[Any, ...], config: TileConfig) -> None:
    """Launches on the device of the first argument, a tensor, and on that device's current stream."""
    device = args[0].device
    here = device.type == "cpu" or device.index == torch.accelerator.current_device_index()
    for counter in _counters:
        counter[kernel.fn.__name__] += 1
    with contextlib.nullcontext() if here else torch.accelerator.device_index(device.index):
        kernel[(programs,)](*args, config, num_warps=config.num_warps, num_stages=config.num_stages, **dict(config.options))


def fit_offsets(config: TileConfig, *tensors: torch.Tensor) -> TileConfig:
    """``config``, with 64-bit offsets inside a tile where some tensor's strides ask for them."""
    if config.wide or all(t.stride(2) < WIDEST_STRIDE and t.stride(3) < WIDEST_STRIDE for t in tensors):
        return config
    return dataclasses.replace(config, wide=True)


def programs(length: int, block: int, heads: int) -> int:
    """Grid size for ``heads`` sequences of ``length``, a tile of ``block`` each."""
    return -(-length // block) * heads


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Type of the softmax state and of every sum, for inputs of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.constexpr_function
def padded(head_dim: int) -> int:
    """Columns of the tile that carries ``head_dim``: a power of two, and at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(head_dim))
