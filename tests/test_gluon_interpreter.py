"""The interpreter for Gluon kernels sees the races that it is meant to see: bugs planted in small kernels and in modules."""

import functools
import importlib
import math
import sys
from typing import NamedTuple

import pytest
import torch
from support.gluon import Deadlock, Fault, launch, mutated
from support.gluon.descriptors import descriptor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fused_attn.call.spec import TileConfig

pytestmark = pytest.mark.kernels

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

CONFIG = TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
ROWS = gl.constexpr(64)


def caught(run, schedules):
    """Of how many schedules ``run(seed)`` is false or fails, and what the failures say."""
    count, said = 0, set()
    for seed in range(schedules):
        try:
            count += not run(seed)
        except (Fault, OverflowError) as error:
            count += 1
            said.add(str(error))
    return count, said


# --- a ring of tiles between a producer and a consumer: Y = X W, 64 rows at a time ---


class Ring(NamedTuple):
    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def produce(ring, loaded, x_desc, w_desc, weight, count, BUG: gl.constexpr, config):
    mbarrier.expect(loaded, w_desc.block_type.nbytes)
    tma_load(w_desc, [0, 0], loaded, weight)
    first = gl.program_id(0) * count
    for i in range(count):
        slot = i % config.num_stages
        parity = i // config.num_stages & 1
        if BUG == "wrong parity":
            mbarrier.wait(ring.empty.index(slot), parity)
        elif BUG != "no empty wait":
            mbarrier.wait(ring.empty.index(slot), parity ^ 1)
        if BUG == "wrong byte count":
            mbarrier.expect(ring.full.index(slot), x_desc.block_type.nbytes // 2)
        else:
            mbarrier.expect(ring.full.index(slot), x_desc.block_type.nbytes)
        tma_load(x_desc, [(first + i) * ROWS, 0], ring.full.index(slot), ring.tiles.index(slot))


@gluon.jit
def consume(ring, loaded, y_desc, weight, staged, count, BUG: gl.constexpr, config):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    product = gl.zeros([ROWS, 64], gl.float32, layout)
    mbarrier.wait(loaded, 0)
    for i in range(count):
        slot = i % config.num_stages
        if BUG != "no full wait":
            mbarrier.wait(ring.full.index(slot), i // config.num_stages & 1)
        product = warpgroup_mma(ring.tiles.index(slot), weight, product, use_acc=False, is_async=True)
        if BUG == "released before its product is done":
            mbarrier.arrive(ring.empty.index(slot), count=1)
        if BUG != "read before its wait":
            product = warpgroup_mma_wait(0, deps=(product,))
        if BUG != "released before its product is done":
            mbarrier.arrive(ring.empty.index(slot), count=1)
        if BUG != "overwritten while a TMA store reads it":
            tma.store_wait(0)
        staged.store(product.to(y_desc.dtype))
        if BUG != "no fence":
            fence_async_shared()
        tma_store(y_desc, [(gl.program_id(0) * count + i) * ROWS, 0], staged)
    if BUG != "a TMA store in flight at the end":
        tma.store_wait(0)
    if BUG == "a wgmma in flight at the end":
        warpgroup_mma(ring.tiles.index(0), weight, product, is_async=True)


@gluon.jit
def ring_kernel(x_desc, w_desc, y_desc, count, BUG: gl.constexpr, config: gl.constexpr):
    tiles = gl.allocate_shared_memory(x_desc.dtype, [config.num_stages] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [config.num_stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [config.num_stages, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weight = gl.allocate_shared_memory(w_desc.dtype, [64, 64], w_desc.layout)
    staged = gl.allocate_shared_memory(y_desc.dtype, [ROWS, 64], y_desc.layout)
    for i in gl.static_range(config.num_stages):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(loaded, count=1)
    ring = Ring(tiles, full, empty)
    gl.warp_specialize([(consume, (ring, loaded, y_desc, weight, staged, count, BUG, config)),
                        (produce, (ring, loaded, x_desc, w_desc, weight, count, BUG, config))], [1], [24])


def ring(seed, bug="", programs=2, tiles=4):
    """Whether one schedule gives X W to the last bit: the sums of small integers are exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (programs * tiles * 64, 64), generator=generator).to(torch.bfloat16)
    w = torch.randint(-3, 4, (64, 64), generator=generator).to(torch.bfloat16)
    y = torch.full_like(x, math.nan)
    launch(ring_kernel, programs, (descriptor(x, [64, 64]), descriptor(w, [64, 64]), descriptor(y, [64, 64]), tiles, bug),
           CONFIG, seed=seed)
    return torch.equal(y.float(), (x.float() @ w.float()).bfloat16().float())


def test_a_correct_ring_is_correct_under_every_schedule():
    assert all(ring(seed) for seed in range(60))


def test_a_seed_is_a_schedule():
    def outcome(seed):
        try:
            return ring(seed, "no full wait")
        except Fault as error:
            return str(error)

    assert [outcome(seed) for seed in range(12)] == [outcome(seed) for seed in range(12)]
    assert len({outcome(seed) for seed in range(12)}) > 1


FILLED = "a wgmma of partition 0 (consume) reads shared memory that a TMA load is filling"
FREED = "a TMA load of partition 1 (produce) fills shared memory that an asynchronous operation may still read"
# What is planted, whether every schedule shows it, and what some of them say.
BUGS = {
    "no full wait": (False, FILLED),
    "no empty wait": (False, "partition 0 (consume) waits on barrier 0[0], parity 0 (phase 2"),
    "wrong parity": (True, "partition 1 (produce) waits on barrier 1[0], parity 0 (phase 0, 1 of 1 arrivals"),
    "wrong byte count": (True, "0 of 1 arrivals and -4096 bytes missing"),
    "released before its product is done": (False, FREED),
    "read before its wait": (True, "register result [64, 64] of an async wgmma read before its warpgroup_mma_wait"),
    "no fence": (True, "with no fence_async_shared between"),
    "overwritten while a TMA store reads it":
        (True, "partition 0 (consume) stores to shared memory that an asynchronous operation may still read"),
    "a TMA store in flight at the end": (True, "ends with 1 TMA stores that may still read shared memory"),
    "a wgmma in flight at the end": (True, "partition 0 (consume) ends with 1 wgmma in flight"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught_within_30_schedules(bug):
    always, message = BUGS[bug]
    count, said = caught(functools.partial(ring, bug=bug), 30)
    assert count == 30 if always else count >= 10
    assert any(message in one for one in said), said


def test_a_deadlock_says_who_waits_on_what_and_where():
    with pytest.raises(Deadlock, match=r"partition 1 .* at test_gluon_interpreter\.py:\d+ in produce: mbarrier\.wait"):
        ring(0, "wrong parity")


# --- the data that a wait is for ---


@gluon.jit
def handed_over(x_desc, out, EARLY: gl.constexpr, config: gl.constexpr):
    """Two loads into one tile: what is read of the first must be read before the second is let in."""
    tile = gl.allocate_shared_memory(x_desc.dtype, [64, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(full.index(1), count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize([(reader, (tile, full, empty, out, EARLY)), (writer, (tile, full, empty, x_desc))], [1], [24])


@gluon.jit
def reader(tile, full, empty, out, EARLY: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mbarrier.wait(full.index(0), 0)
    if EARLY:
        mbarrier.arrive(empty)
    first = tile.load(layout)
    if not EARLY:
        mbarrier.arrive(empty)
    mbarrier.wait(full.index(1), 0)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    gl.store(out + (rows[:, None] * 64 + columns[None, :]), first)


@gluon.jit
def writer(tile, full, empty, x_desc):
    mbarrier.expect(full.index(0), x_desc.block_type.nbytes)
    tma_load(x_desc, [0, 0], full.index(0), tile)
    mbarrier.wait(empty, 0)
    mbarrier.expect(full.index(1), x_desc.block_type.nbytes)
    tma_load(x_desc, [64, 0], full.index(1), tile)


@pytest.mark.parametrize("early", [False, True])
def test_a_tile_may_be_overwritten_once_it_is_released(early):
    x = torch.randn(128, 64)
    found = []

    def run(seed):
        out = torch.zeros(64, 64)
        launch(handed_over, 1, (descriptor(x, [64, 64]), out, early), CONFIG, seed=seed)
        found.append("old" if torch.equal(out, x[:64]) else "new" if torch.equal(out, x[64:]) else "neither")
        return found[-1] == "old"

    count, said = caught(run, 40)
    assert set(found) == ({"old", "new"} if early else {"old"})
    assert count > found.count("new") if early else count == 0
    assert said == ({"partition 0 (reader) loads from shared memory that a TMA load is filling"} if early else set())


# --- copies of modules with bugs in them ---

RINGS = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@gluon.jit
def place(i):
    return i * 2
"""
KERNEL = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from planted_package.rings import place

@gluon.jit
def kernel(out, config):
    gl.store(out + place(gl.program_id(0)), 1.0)

def launch_kernel(out, launch):
    launch(kernel, 2, (out,), None)
"""


def test_a_planted_bug_reaches_the_modules_that_import_it(tmp_path, monkeypatch):
    folder = tmp_path / "planted_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "rings.py").write_text(RINGS)
    (folder / "kernel.py").write_text(KERNEL)
    (folder / "other.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    original = importlib.import_module("planted_package.kernel")
    importlib.import_module("planted_package.other")
    before = dict(sys.modules)

    def stored(module):
        out = torch.zeros(4)
        module.launch_kernel(out, functools.partial(launch, seed=1))
        return out.tolist()

    with mutated({"planted_package.rings": [("i * 2", "i * 3")]}) as modules:
        assert sys.modules == before
        assert set(modules) == {"planted_package.rings", "planted_package.kernel"}
        assert stored(modules["planted_package.kernel"]) == [1, 0, 0, 1]
        assert stored(original) == [1, 0, 1, 0]
    assert sys.modules["planted_package"].kernel is original
    with pytest.raises(ValueError, match="has no 'i \\* 4'"), mutated({"planted_package.rings": [("i * 4", "i")]}):
        pass
