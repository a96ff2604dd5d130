"""What every test stands on: the interpreter, one thread, a seed of its own, and no uninitialised memory that looks fine."""

import mmap
import os
import zlib

# Before anything imports Triton or NumPy. Triton reads its switch when a kernel is decorated: GPU tests set it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The two kernels of the deterministic backward are what tests look at that do not say otherwise.
os.environ.setdefault("FUSED_ATTN_DETERMINISTIC", "1")
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import pytest
import torch
from support import guard
from support.selection import keep_few

MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it


def pytest_configure():
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before pytest looks which are slow
def pytest_collection_modifyitems(items):
    keep_few(items)


@pytest.fixture(autouse=True)
def seed(request):
    """Every test draws the same numbers whichever ran before it, on whichever worker."""
    torch.manual_seed(zlib.crc32(f"{request.node.path.name}::{request.node.name}".encode()))


@pytest.fixture(autouse=True)
def poison():
    """What torch.empty and its kin return is NaN, so that an element that no kernel writes shows in the result."""
    with guard.poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def forgotten():
    """No test repeats the launches of another, whose tiles it may have chosen."""
    from fused_attn.run import plans

    plans.forget()


@pytest.fixture
def address_space():
    """place(tensor, strides): a copy of ``tensor`` with any strides, in address space of which only its elements cost."""
    maps = []

    def place(tensor, strides):
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
        try:
            area = mmap.mmap(-1, span * tensor.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except OSError as error:
            pytest.skip(f"no address space for {span} elements: {error}")
        area.madvise(mmap.MADV_NOHUGEPAGE)
        maps.append(area)
        return torch.frombuffer(area, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)

    return place
