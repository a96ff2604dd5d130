"""The interpreter for Gluon kernels sees what it is meant to see: bugs planted in small kernels, and the language's rules."""

import functools
import importlib
import math
import sys
from typing import NamedTuple

import pytest
import torch
from support.gluon import Deadlock, Fault, launch, mutated
from support.gluon.hopper import async_atomic_add
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused_attn.spec import TileConfig

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_add = getattr(tma, "async_atomic_add", None) or async_atomic_add  # new in Triton 3.9

CONFIG = TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
ROWS = gl.constexpr(64)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def descriptor(tensor, block, shape=None, strides=None):
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(shape or tensor.shape), list(strides or tensor.stride()), block, layout)


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


# --- TMA ---


@gluon.jit
def copy_tile(x_desc, y_desc, x_at, y_at, ADD: gl.constexpr, config: gl.constexpr):
    tile = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    mbarrier.expect(loaded, x_desc.block_type.nbytes)
    tma_load(x_desc, x_at, loaded, tile)
    mbarrier.wait(loaded, 0)
    if ADD:
        tma_add(y_desc, y_at, tile)
    else:
        tma_store(y_desc, y_at, tile)
    tma.store_wait(0)


def test_tma_fills_with_zeros_and_drops_what_is_out_of_bounds():
    big = torch.full((24, 24), math.nan)
    x, y = torch.randn(20, 16), big[:20, :16]
    launch(copy_tile, 1, (descriptor(x, [16, 16]), descriptor(y, [16, 16]), (-3, 4), (10, 8), False), CONFIG)
    expected = torch.zeros(16, 16)
    expected[3:, :12] = x[:13, 4:]
    assert torch.equal(y[10:, 8:], expected[:10, :8])
    assert torch.isnan(big[:10]).all()
    assert torch.isnan(big[10:, :8]).all()
    assert torch.isnan(big[20:]).all()
    assert torch.isnan(big[:, 16:]).all()


def test_a_box_that_leaves_its_storage_is_a_fault():
    x = torch.randn(32, 16)
    tall = descriptor(x[:16], [16, 16], shape=(48, 16))
    with pytest.raises(Fault, match="leaves the storage"):
        launch(copy_tile, 1, (tall, descriptor(x, [16, 16]), (20, 0), (0, 0), False), CONFIG)
    with pytest.raises(Fault, match="2 coordinates for a tensor descriptor of 3"):
        launch(copy_tile, 1, (descriptor(x[None], [1, 16, 16]), descriptor(x, [16, 16]), (0, 0), (0, 0), False), CONFIG)


def test_a_ragged_descriptor_ends_where_its_sequence_ends():
    """Two leading axes whose strides wrap around in 64 bits: rows from ``start`` on, cut off after ``length``."""
    x, y = torch.randn(50, 16).half(), torch.zeros(16, 16).half()
    end, far, start, length, row = 1 << 30, 0x7FFF0000, 10, 21, 16
    ragged = descriptor(x, [1, 1, 16, 16], shape=(far, far, end, 16), strides=((1 << 34) - 16, 16, 16, 1))
    out = descriptor(y, [1, 1, 16, 16], shape=(1, 1, 16, 16), strides=(256, 256, 16, 1))
    launch(copy_tile, 1, (ragged, out, (end, start + length, end - length + row, 0), (0, 0, 0, 0), False), CONFIG)
    assert torch.equal(y[:5], x[26:31])
    assert not y[5:].any()


def test_tma_adds_into_global_memory():
    x, y = torch.randn(16, 16), torch.randn(20, 16)
    expected = y.clone()
    expected[10:] += x[:10]
    launch(copy_tile, 1, (descriptor(x, [16, 16]), descriptor(y, [16, 16]), (0, 0), (10, 0), True), CONFIG)
    assert torch.equal(y, expected)


# --- pointers, programs and atomics ---


@gluon.jit
def scale_rows(x, out, total, rows, stride, factor, config: gl.constexpr):
    """A persistent loop over tiles of 16 rows of 8."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))[None, :]
    for tile in range(gl.program_id(0), gl.cdiv(rows, 16), gl.num_programs(0)):
        row = tile * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))[:, None]
        value = gl.load(x + row * stride + column, mask=row < rows, other=0.0).to(gl.float32) * factor
        gl.store(out + row * 8 + column, value, mask=row < rows)
        gl.atomic_add(total, gl.sum(value, axis=None))
        gl.atomic_add(total + 1 + column + 0 * row, value)


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_programs_share_the_tiles_and_add_atomically(programs):
    x = torch.randint(-4, 5, (100, 24)).bfloat16()[:, 3:11]
    out, total = torch.full((100, 8), math.nan), torch.zeros(9)
    launch(scale_rows, programs, (x, out, total, 100, x.stride(0), 0.5), CONFIG, seed=programs)
    assert torch.equal(out, x.float() / 2)
    assert total[0] == out.sum()
    assert torch.equal(total[1:], out.sum(0))


def test_a_pointer_that_leaves_its_storage_is_a_fault():
    x = torch.zeros(50, 8)
    with pytest.raises(Fault, match=r"leaves the storage of fp32 \[40, 8\]: element 511 of 400"):
        launch(scale_rows, 1, (x[:40], torch.zeros(100, 8), torch.zeros(9), 64, 8, 0.5), CONFIG)
    with pytest.raises(OverflowError):
        launch(scale_rows, 1, (x, torch.zeros(100, 8), torch.zeros(9), 50, 2**30, 0.5), CONFIG)


# --- numbers ---


@gluon.jit
def arithmetic(out, a, b, one, WIDE: gl.constexpr, config: gl.constexpr):
    gl.store(out, a // b)
    gl.store(out + 1, a % b)
    tile = a + gl.arange(0, 4, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + 2 + gl.arange(0, 4), tile // b)
    gl.store(out + 6 + gl.arange(0, 4), tile % b)
    step = 2**30
    step += one
    if WIDE:
        step = step.to(gl.int64)
    gl.store(out + 10, step * 2 * one)
    gl.store(out + 11, gl.where((a < 0) & ~(b < 0), max(a, b), min(a, b)))
    gl.store(out + 12, (2.5 * b).to(gl.int32))


def test_integers_truncate_and_have_32_bits():
    out = torch.zeros(13, dtype=torch.int64)
    launch(arithmetic, 1, (out, -7, 3, 1, True), CONFIG)
    assert out[:2].tolist() == [-2, -1]
    assert out[2:6].tolist() == [-2, -2, -1, -1]
    assert out[6:10].tolist() == [-1, 0, -2, -1]
    assert out[10:].tolist() == [2**31 + 2, 3, 7]
    with pytest.raises(OverflowError, match="2147483650 does not fit 32 bits"):
        launch(arithmetic, 1, (out, -7, 3, 1, False), CONFIG)


@gluon.jit
def converts(out, number, config: gl.constexpr):
    gl.store(out, number.to(gl.int64))


def test_an_argument_of_1_is_known_when_a_kernel_is_compiled():
    out = torch.zeros(1, dtype=torch.int64)
    launch(converts, 1, (out, 2), CONFIG)
    assert out.item() == 2
    with pytest.raises(AttributeError, match="to"):
        launch(converts, 1, (out, 1), CONFIG)


@gluon.jit
def round_to(x, out, config: gl.constexpr):
    at = gl.arange(0, 16, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + at, gl.load(x + at).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_round_as_torch_does(dtype):
    tie = 1 + 2.0**-8  # between two bf16; 1 + 2**-11 between two fp16
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, tie, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11,
                      65519.0, 65520.0, 3.4e38, 1e-40, 2.0**-25, -2.0**-24 * 1.5, 1 / 3])
    out = torch.zeros(16, dtype=dtype)
    launch(round_to, 1, (x, out), CONFIG)
    assert torch.equal(out.view(torch.int16)[~x.isnan()], x.to(dtype).view(torch.int16)[~x.isnan()])
    assert out[x.isnan()].isnan().all()


@gluon.jit
def functions(x, out, pair, WHICH: gl.constexpr, config: gl.constexpr):
    at = gl.arange(0, 16, layout=gl.BlockedLayout([1], [32], [4], [0]))
    value = gl.load(x + at)
    if WHICH == "approximate":
        value = gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1)
    elif WHICH == "pair":
        value = pair[0](value, pair[1])
    elif WHICH == "unknown":
        value = gl.erf(value)
    elif WHICH == "mixed":
        value = value + value.to(gl.float64)
    elif WHICH == "uninitialised":
        value = gl.load(x + at, mask=at < 8)
    gl.store(out + at, value)


@gluon.jit
def plus(value, addend):
    return gl.fdiv(gl.maximum(value + addend, 0.0), 2.0)


def test_functions_of_the_language():
    x, out = torch.randn(16), torch.zeros(16)
    run = functools.partial(launch, functions, 1, config=CONFIG)
    run(args=(x, out, (), "approximate"))
    torch.testing.assert_close(out, x.exp2())
    run(args=(x, out, (plus, 0.25), "pair"))
    torch.testing.assert_close(out, (x + 0.25).relu() / 2)
    run(args=(x, out, (), "uninitialised"))
    assert torch.equal(out.isnan(), torch.arange(16) >= 8)
    with pytest.raises(NotImplementedError, match="erf"):
        run(args=(x, out, (), "unknown"))
    with pytest.raises(TypeError, match="fp32 meets fp64"):
        run(args=(x, out, (), "mixed"))


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
