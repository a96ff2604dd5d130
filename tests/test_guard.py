"""The memory guard sees every fault planted here, and nothing in kernels that are correct."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from support.guard import POISON, POISONED_TYPES, TABLE_LIMIT, element_addresses, memory_guard
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_attn import interpreter

pytestmark = pytest.mark.kernels

if not triton.knobs.runtime.interpret:
    pytest.skip("the guard watches Triton's interpreter", allow_module_level=True)
interpreter.repair()

BLOCK = 16


@triton.jit
def copy_rows(x_ptr, out_ptr, x_stride, out_stride, n, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """One row a program; n columns exist, the first WIDTH are copied."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < WIDTH, other=0.0)
    tl.store(out_ptr + row * out_stride + cols, x, mask=cols < n)


@triton.jit
def sum_without_atomics(x_ptr, out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + cols)
    tl.store(out_ptr + cols, tl.load(out_ptr + cols) + x)


@triton.jit
def sum_with_atomics(x_ptr, out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + cols, tl.load(x_ptr + tl.program_id(0) * BLOCK + cols))


@triton.jit
def atomic_then_read(out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + cols, tl.full([BLOCK], 1.0, tl.float32))
    tl.atomic_max(out_ptr + BLOCK + cols, tl.load(out_ptr + cols))


@triton.jit
def store_meets_atomic(out_ptr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Program FIRST stores, the other one of two adds."""
    cols = tl.arange(0, BLOCK)
    if tl.program_id(0) == FIRST:
        tl.store(out_ptr + cols, tl.zeros([BLOCK], tl.float32))
    else:
        tl.atomic_add(out_ptr + cols, tl.full([BLOCK], 1.0, tl.float32))


@triton.jit
def lock(out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    free = tl.zeros([BLOCK], tl.int32)
    tl.store(out_ptr + n + tl.program_id(0), tl.sum(tl.atomic_cas(out_ptr + cols, free, free + 1), 0))


@triton.jit
def histogram(out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK) // 2, tl.full([BLOCK], 1.0, tl.float32))


@triton.jit
def read_all_store_own(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 2 * BLOCK))
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + own, tl.sum(x, 0) + tl.zeros([BLOCK], tl.float32))


@triton.jit
def between_elements(x_ptr, out_ptr, BLOCK: tl.constexpr):
    half_way = (x_ptr.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.float32))
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(half_way + cols))


@triton.jit
def copy_by_descriptor(x_desc, out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, x_desc.load([0]))


@triton.jit
def everyone_stores(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def shift_in_place(x_ptr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Programs in rising order each read their neighbour's part, which it overwrites before (-1) or after (1) that."""
    own = (tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + own, tl.load(x_ptr + own + STEP * BLOCK))


@triton.jit
def store_twice_to_one(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK) // 2, tl.zeros([BLOCK], tl.float32))


@triton.jit
def undefined_lanes(x_ptr, out_ptr, n, n_out, BLOCK: tl.constexpr, SUM: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < n)
    if SUM:
        tl.store(out_ptr, tl.sum(x.to(tl.float32) * 2.0, 0))
    else:
        tl.store(out_ptr + cols, x, mask=cols < n_out)


@triton.jit
def load_through(tensors, scale, BLOCK: tl.constexpr):
    x_ptr, (y_ptr, out_ptr) = tensors
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, (tl.load(x_ptr + cols) + tl.load(y_ptr + cols)) * scale)


@triton.jit
def gather(index_ptr, x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + cols, mask=cols < n)
    tl.store(out_ptr + cols, tl.load(x_ptr + index))


@triton.jit
def int32_offsets(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + cols, tl.load(x_ptr + row * stride + cols))


@triton.jit
def helper_store(ptr, BLOCK: tl.constexpr):
    tl.store(ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def calls_helper(out_ptr, BLOCK: tl.constexpr):
    helper_store(out_ptr + 1, BLOCK)


def caught(launch, *expected):
    """Runs ``launch`` under the guard, which must raise, and must say all of ``expected``."""
    with pytest.raises(AssertionError) as raised, memory_guard():
        launch()
    message = str(raised.value)
    for text in expected:
        assert text in message, f"{text!r} is not in: {message}"
    return message


def zeros(*sizes):
    return [torch.zeros(size) for size in sizes]


def padded(rows: int, width: int, gap: int) -> torch.Tensor:
    """[rows, width] view of rows with ``gap`` further elements between them."""
    return torch.zeros(rows, width + gap)[:, :width]


# --- planted faults ---


def race(second, first, count):
    return f"race: {second} after another program's {first}: {count} elements"


# What is wrong: a launch, and what the guard must say about it.
FAULTS = {
    "load before the start": (
        lambda: copy_rows[(2,)](torch.zeros(32)[16:], torch.zeros(32), -16, 16, 16, BLOCK, 16),
        "out-of-bounds load: 16 elements", "program (1, 0, 0)"),
    "load from a gap between rows": (
        lambda: copy_rows[(3,)](padded(3, 12, 4), torch.zeros(3, 16), 16, 16, 16, BLOCK, 13),
        "out-of-bounds load: 3 elements", "x_ptr (3, 12)"),
    "store into a gap between rows": (
        lambda: copy_rows[(3,)](torch.zeros(3, 16), padded(3, 12, 4), 16, 16, 13, BLOCK, 16),
        "out-of-bounds store: 3 elements", "out_ptr (3, 12)"),
    "load beyond the elements of an expanded view": (
        lambda: copy_rows[(3,)](torch.zeros(2, 16)[:1].expand(3, 16), torch.zeros(3, 16), 16, 16, 16, BLOCK, 16),
        "out-of-bounds load: 32 elements"),
    "load from a tensor without elements": (
        lambda: copy_rows[(1,)](*zeros(0, 16), 0, 0, 16, BLOCK, 1), "out-of-bounds load: 1 elements"),
    "load between elements": (lambda: between_elements[(1,)](*zeros(32, 16), BLOCK), "out-of-bounds load: 16 elements"),
    "load through a descriptor of more than there is": (
        lambda: copy_by_descriptor[(1,)](TensorDescriptor(torch.zeros(15), [16], [1], [BLOCK]), torch.zeros(16), BLOCK),
        "out-of-bounds load: 1 elements", "x_desc (15,)"),
    "load by an undefined index": (
        lambda: gather[(1,)](torch.zeros(16, dtype=torch.int32), *zeros(16, 16), 12, BLOCK), "out-of-bounds load: 4 elements"),
    "load through a tuple": (
        lambda: load_through[(1,)]((torch.zeros(16), tuple(zeros(15, 16))), 0.5, BLOCK),
        "out-of-bounds load: 1 elements", "tensors[1][0] (15,)"),
    "store in a helper": (
        lambda: calls_helper[(1,)](torch.zeros(16), BLOCK),
        "out-of-bounds store: 1 elements", "in helper_store: tl.store", "in calls_helper"),
    "atomic past the end": (lambda: sum_with_atomics[(2,)](*zeros(32, 15), BLOCK), "out-of-bounds atomic: 2 elements"),
    "atomic on uninitialised memory": (
        lambda: sum_with_atomics[(2,)](torch.ones(32), torch.empty(16), BLOCK), "atomic on uninitialised memory"),
    "compare and swap on uninitialised memory": (
        lambda: lock[(1,)](torch.empty(17, dtype=torch.int32), 16, BLOCK), "atomic on uninitialised memory: 16 elements"),
    "sum without atomics": (
        lambda: sum_without_atomics[(3,)](*zeros(48, 16), BLOCK),
        race("read", "write", 32), race("write", "write", 32), race("write", "read", 32), "program (1, 0, 0)"),
    "stores of all programs": (
        lambda: everyone_stores[(2, 2, 2)](torch.zeros(16), BLOCK), race("write", "write", 112), "program (0, 0, 1)"),
    "store after another's load": (lambda: shift_in_place[(3,)](torch.zeros(80), BLOCK, 1), race("write", "read", 32)),
    "store after all loads": (lambda: read_all_store_own[(2,)](torch.zeros(32), BLOCK), race("write", "read", 16)),
    "load after another's store": (lambda: shift_in_place[(3,)](torch.zeros(80), BLOCK, -1), race("read", "write", 32)),
    "load among atomics": (lambda: atomic_then_read[(2,)](torch.zeros(32), BLOCK), race("read", "write", 16)),
    "store before an atomic": (lambda: store_meets_atomic[(2,)](torch.zeros(16), 0, BLOCK), race("write", "write", 16)),
    "store after an atomic": (lambda: store_meets_atomic[(2,)](torch.zeros(16), 1, BLOCK), race("write", "write", 16)),
    "two lanes to one address": (
        lambda: store_twice_to_one[(1,)](torch.zeros(16), BLOCK), "duplicate addresses in one store: 8 elements"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault):
    caught(*FAULTS[fault])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8], ids=str)
def test_load_past_the_end(dtype):
    x, out = torch.zeros(15).to(dtype), torch.zeros(16).to(dtype)
    message = caught(lambda: copy_rows[(1,)](x, out, 0, 0, 16, BLOCK, 16),
                     "kernel copy_rows", "out-of-bounds load: 1 elements", "program (0, 0, 0)", "x_ptr (15,)",
                     "test_guard.py:", "tl.load(x_ptr + row * x_stride + cols, mask=cols < WIDTH, other=0.0)")
    assert "store" not in message, "one fault, one entry"


def test_store_past_the_end_does_not_happen():
    buffer = torch.zeros(3, 16)
    caught(lambda: copy_rows[(3,)](torch.ones(3, 16), buffer[:2], 16, 16, 16, BLOCK, 16),
           "out-of-bounds store: 16 elements", "program (2, 0, 0)", "out_ptr (2, 16)")
    assert buffer[:2].eq(1).all()
    assert buffer[2].eq(0).all()
    locks = torch.zeros(16, dtype=torch.int32)
    caught(lambda: lock[(1,)](locks[:15], 0, BLOCK), "out-of-bounds atomic: 1 elements")
    assert locks.eq(0).all()


@pytest.mark.parametrize("dtype", POISONED_TYPES, ids=str)
@pytest.mark.parametrize("allocator", ["empty", "empty_like", "empty_strided", "empty_permuted", "new_empty",
                                       "new_empty_strided"])
def test_uninitialised_read(allocator, dtype):
    out = torch.zeros(16, dtype=dtype)
    call = {"empty": (16,), "empty_like": (out,), "new_empty": (16,), "empty_permuted": ((16,), (0,))}
    with memory_guard():
        owner, options = (out, {}) if allocator.startswith("new") else (torch, {"dtype": dtype})
        x = getattr(owner, allocator)(*call.get(allocator, ((16,), (1,))), **options)
        x[:12] = 0
        copy_rows[(1,)](x, out, 0, 0, 16, BLOCK, 12)
    caught(lambda: copy_rows[(1,)](x, out, 0, 0, 16, BLOCK, 16), "load of uninitialised memory: 4 elements", "x_ptr (16,)")


@pytest.mark.parametrize("dtype", POISONED_TYPES, ids=str)
def test_store_of_a_lane_left_undefined(dtype):
    x, out = torch.zeros(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    caught(lambda: undefined_lanes[(1,)](x, out, 12, 16, BLOCK, False), "store of an undefined value: 4 elements", "out_ptr")


def test_sum_over_lanes_left_undefined_is_nan():
    x, out = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    undefined_lanes[(1,)](x, out, 12, 16, BLOCK, True)
    assert out.item() == 0, "the interpreter no longer fills such lanes with 0: the guard need not undo it"
    with memory_guard():
        undefined_lanes[(1,)](x, out, 12, 16, BLOCK, True)
    assert out.isnan().all()


def test_fault_is_reported_when_the_kernel_fails_too():
    @triton.jit
    def fails_later(x_ptr):
        tl.load(x_ptr + 1)
        tl.load(x_ptr, no_such_argument=1)

    with pytest.raises(AssertionError, match="out-of-bounds load") as raised, memory_guard():
        fails_later[(1,)](torch.zeros(1))
    assert raised.value.__cause__ is not None
    with pytest.raises(Exception, match="no_such_argument") as raised, memory_guard():
        fails_later[(1,)](torch.zeros(2))
    assert not isinstance(raised.value, AssertionError)


def test_overflowing_offsets_in_address_space_that_nobody_filled(address_space):
    x = address_space(torch.zeros(3, 16), (2**30, 1))
    out = torch.ones(3, 16)
    with memory_guard():
        copy_rows[(3,)](x, out, 2**30, 16, 16, BLOCK, 16)
    assert out.eq(0).all()
    caught(lambda: int32_offsets[(3,)](x, out, 2**30, BLOCK), "out-of-bounds load: 16 elements", "program (2, 0, 0)")


# --- correct kernels ---


@pytest.mark.parametrize("gap", [4, TABLE_LIMIT], ids=["table", "sorted"])
def test_rows_with_gaps_pass(gap):
    x, out = padded(3, 12, gap), padded(3, 12, gap)
    x.fill_(1)
    with memory_guard() as guard:
        copy_rows[(3,)](x, out, x.stride(0), out.stride(0), 12, BLOCK, 12)
    assert out.eq(1).all()
    assert (guard.kernels, guard.loads, guard.stores) == (["copy_rows"], 36, 36)
    caught(lambda: copy_rows[(3,)](x, out, x.stride(0), out.stride(0), 13, BLOCK, 13),
           "out-of-bounds load: 3 elements", "out-of-bounds store: 3 elements")
    caught(lambda: copy_rows[(3,)](x, out, x.stride(0), 0, 12, BLOCK, 12), "race: write after another program's write: 24")


def test_atomics_may_meet():
    out, counts, locks = torch.zeros(16), torch.zeros(8), torch.zeros(19, dtype=torch.int32)
    with memory_guard():
        sum_with_atomics[(3,)](torch.ones(48), out, BLOCK)
        histogram[(3,)](counts, BLOCK)
        lock[(3,)](locks, 16, BLOCK)
    assert out.eq(3).all()
    assert counts.eq(6).all()
    assert locks.tolist() == [1] * 16 + [0, 16, 16]


def test_launches_do_not_race_with_each_other():
    x, out = torch.ones(16), torch.zeros(16)
    with memory_guard() as guard:
        with pytest.raises(AssertionError):
            everyone_stores[(2,)](torch.zeros(16), BLOCK)  # and what it did wrong is its own
        for _ in range(3):
            sum_without_atomics[(1,)](x, out, BLOCK)
    assert out.eq(3).all()
    assert guard.kernels == ["everyone_stores", *["sum_without_atomics"] * 3]


def test_undefined_lanes_that_are_masked_again_pass():
    out = torch.zeros(16)
    with memory_guard():
        undefined_lanes[(1,)](torch.ones(12), out, 12, 12, BLOCK, False)
    assert out.tolist() == [1.0] * 12 + [0.0] * 4


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, torch.float32), (torch.nan, torch.bfloat16),
                                              (POISON[2], torch.int16)], ids=str)
def test_what_is_not_poison(value, dtype):
    """Ordinary NaN, and bits of poison in a type that is never poisoned."""
    x, out = torch.full((16,), value, dtype=dtype), torch.zeros(16, dtype=dtype)
    with memory_guard():
        copy_rows[(1,)](x, out, 0, 0, 16, BLOCK, 16)
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))


def test_two_element_types_on_one_storage_and_descriptors():
    x = torch.zeros(16)
    with memory_guard():
        copy_by_descriptor[(1,)](TensorDescriptor(x, [16], [1], [BLOCK]), torch.zeros(16), BLOCK)
        load_through[(1,)]((x.view(torch.int16)[:16], (x, torch.zeros(16))), 1.0, BLOCK)
    caught(lambda: load_through[(1,)]((x.view(torch.int16)[:31], (x[:15], torch.zeros(16))), 1.0, BLOCK),
           "out-of-bounds load: 1 elements")


def test_the_interpreter_is_restored():
    import triton.runtime.interpreter as interp

    def state():
        return (interp._interpreter, interp.GridExecutor.__call__, interp.GridExecutor._init_args_hst,
                interp.InterpreterBuilder.create_masked_load)

    before = state()
    with pytest.raises(AssertionError), memory_guard():
        everyone_stores[(2,)](torch.zeros(16), BLOCK)
    assert state() == before
    everyone_stores[(2,)](torch.zeros(16), BLOCK)


def test_element_addresses():
    x = torch.zeros(4, 6)[1:3, ::2].expand(5, 2, 3)
    first = x.data_ptr()
    assert sorted(element_addresses(x).tolist()) == [first + 4 * i for i in (0, 2, 4, 6, 8, 10)]
