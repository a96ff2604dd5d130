"""The language of Gluon kernels as their interpreter speaks it: TMA, pointers, atomics, and numbers as on the device."""

import functools
import math

import pytest
import torch
from support.gluon import Fault, launch
from support.gluon.descriptors import descriptor
from support.gluon.hopper import async_atomic_add
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from fused_attn.call.spec import TileConfig

pytestmark = pytest.mark.kernels

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_add = getattr(tma, "async_atomic_add", None) or async_atomic_add  # new in Triton 3.9

CONFIG = TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)


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


# --- products ---


@gluon.jit
def gram(x_desc, out, CASE: gl.constexpr, config: gl.constexpr):
    """X^T X of the lower 64 of 128 rows, from shared memory or registers, with the columns' sums by a combining function."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    tiles = gl.allocate_shared_memory(x_desc.dtype, [2, 64, 64], x_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if CASE != "no init":
        mbarrier.init(loaded, count=1)
    mbarrier.expect(loaded, x_desc.block_type.nbytes)
    tma_load(x_desc, [0, 0], loaded, tiles.reshape([128, 64]))
    mbarrier.wait(loaded, 0)
    mbarrier.wait(loaded, 1, pred=CASE == "no init")
    half = tiles.reshape([128, 64]).slice(64, 64)
    total = gl.zeros([64, 64], gl.float32, layout)
    if CASE == "shared":
        total = warpgroup_mma(half.permute((1, 0)), tiles.index(1), total)
    else:
        rows = gl.permute(half.load(layout), (1, 0))
        if CASE == "not rounded":
            rows = rows.to(gl.float32) * 0.5
        total = warpgroup_mma(gl.convert_layout(rows, gl.DotOperandLayout(0, layout, 2)), half, total, is_async=True)
        total = warpgroup_mma_wait(0, deps=(total,))
    if CASE == "index":
        total += tiles.index(config.num_stages).load(layout)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(out + (row * 64 + column), total)
    gl.store(out + 4096 + gl.arange(0, 64), gl.reduce(total, 0, larger))
    mbarrier.invalidate(loaded)


@gluon.jit
def larger(a, b):
    return gl.maximum(a, b)


@pytest.mark.parametrize("case", ["shared", "registers"])
def test_products_from_shared_memory_and_from_registers(case):
    x, out = torch.randint(-3, 4, (128, 64)).half(), torch.zeros(65, 64)
    for seed in range(5):
        launch(gram, 1, (descriptor(x, [128, 64]), out, case), CONFIG, seed=seed)
        assert torch.equal(out[:64], x[64:].float().T @ x[64:].float())
        assert torch.equal(out[64], out[:64].amax(0))


@pytest.mark.parametrize(("case", "message"), [
    ("not rounded", "wgmma of fp32 and fp16: halves of one dtype are meant"),
    ("no init", "barrier 0 is used without mbarrier.init"),
    ("index", r"index 2 of shared memory \[2, 64, 64\]"),
])
def test_what_products_and_barriers_refuse(case, message):
    with pytest.raises(Fault, match=message):
        launch(gram, 1, (descriptor(torch.zeros(128, 64).half(), [128, 64]), torch.zeros(65, 64), case), CONFIG)


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
