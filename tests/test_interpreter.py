"""The repairs of Triton's interpreter: with them it computes what a GPU computes, and without them it does not."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_attn import interpreter

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).resolve().parent.parent

if not triton.knobs.runtime.interpret:
    pytest.skip("these kernels run in Triton's interpreter", allow_module_level=True)
interpreter.repair()


@triton.jit
def cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def pointwise(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(out_ptr + 0 * BLOCK + i, x + y)
    tl.store(out_ptr + 1 * BLOCK + i, x - y)
    tl.store(out_ptr + 2 * BLOCK + i, x * y)
    tl.store(out_ptr + 3 * BLOCK + i, x / y)
    tl.store(out_ptr + 4 * BLOCK + i, tl.maximum(x, y))
    tl.store(out_ptr + 5 * BLOCK + i, tl.minimum(x, y))
    tl.store(out_ptr + 6 * BLOCK + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 7 * BLOCK + i, -x)
    tl.store(out_ptr + 8 * BLOCK + i, tl.abs(x))
    tl.store(out_ptr + 9 * BLOCK + i, tl.exp(x.to(tl.float32)).to(tl.bfloat16))
    tl.store(out_ptr + 10 * BLOCK + i, tl.clamp(x, -0.5, 0.5))


@triton.jit
def constants(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < BLOCK // 2, other=1.5)
    tl.store(out_ptr + i, tl.where(i % 2 == 0, x * 2.0, tl.full([BLOCK], 0.75, tl.bfloat16)))


@triton.jit
def fused_multiply_add(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.fma(x, x, x))


@triton.jit
def sign(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, (tl.load(x_ptr + i) > 0.0).to(tl.bfloat16))


@triton.jit
def reductions(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + 0, tl.sum(x, 0))
    tl.store(out_ptr + 1, tl.max(x, 0))
    tl.store(out_ptr + 2, tl.min(x, 0))
    tl.store(out_ptr + 3, tl.argmax(x, 0).to(tl.bfloat16))


@triton.jit
def running_sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))


@triton.jit
def matmul(x_ptr, y_ptr, start_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    i = i[:, None] * BLOCK + i[None, :]
    acc = tl.load(start_ptr + i)
    tl.store(out_ptr + i, tl.dot(tl.load(x_ptr + i), tl.trans(tl.load(y_ptr + i)), acc, out_dtype=acc.dtype))


@triton.jit(do_not_specialize=["n"])
def run_time_bounds(out_ptr, n, STEP: tl.constexpr):
    total = 0
    for i in range(n):
        total += i
    for i in tl.range(n // STEP * STEP, n * 2, STEP):
        total += i
    for i in tl.range(0, tl.cdiv(n, STEP), num_stages=1):
        total += i
    tl.store(out_ptr, total)


@triton.jit
def floats(out_ptr, declared: tl.float64, undeclared, pair, CONSTANT: tl.constexpr):
    tl.store(out_ptr, declared.to(tl.float64))
    tl.store(out_ptr + 1, undeclared.to(tl.float64))
    tl.store(out_ptr + 2, pair[1].to(tl.float64))
    tl.store(out_ptr + 3, tl.full([], CONSTANT, tl.float64))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


def fp32_at_every_bf16(low_bits: int) -> torch.Tensor:
    """Every pattern of the upper 16 bits of an fp32, NaN excepted, with the same lower ones."""
    patterns = (np.arange(2**16, dtype=np.uint32) << 16) | np.uint32(low_bits)
    values = torch.from_numpy(patterns.view(np.float32))
    return values.masked_fill(values.isnan(), 1.0)


def test_repaired_twice_is_repaired_once():
    import triton.runtime.interpreter as interp

    def state():
        builder = [value for name, value in inspect.getmembers(interp.InterpreterBuilder) if not name.startswith("__")]
        return builder, interp._patch_lang_tensor, interp._implicit_cvt

    before = state()
    interpreter.repair()
    assert state() == before


@pytest.mark.parametrize("low_bits", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_cast_to_bf16_rounds_to_nearest_even(low_bits):
    x = fp32_at_every_bf16(low_bits)  # 0x8000 is halfway between two neighbours
    out = torch.zeros(2**16, dtype=torch.bfloat16)
    cast[(4,)](x, out, 2**14)
    assert torch.equal(bits(out), bits(x.bfloat16()))


def test_nan_stays_nan_in_bf16():
    patterns = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F810000, 0x7F808000, 0x7FFF8000])
    out = torch.zeros(8, dtype=torch.bfloat16)
    cast[(1,)](patterns.to(torch.int32).view(torch.float32), out, 8)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32], ids=str)
def test_casts_between_bf16_and(dtype):
    x = (torch.randn(64) * 100).bfloat16()
    out, back = torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=torch.bfloat16)
    cast[(1,)](x, out, 64)
    assert torch.equal(out, x.to(dtype))
    cast[(1,)](out, back, 64)
    assert torch.equal(back, out.bfloat16())


def test_bf16_pointwise():
    x, y = torch.randn(2, 64).bfloat16()
    expected = torch.stack([x + y, x - y, x * y, x / y, torch.maximum(x, y), torch.minimum(x, y), torch.where(x < y, x, y),
                            -x, x.abs(), x.exp(), x.clamp(-0.5, 0.5)])
    out = torch.zeros_like(expected)
    pointwise[(1,)](x, y, out, 64)
    for i, (row, wanted) in enumerate(zip(out, expected, strict=True)):
        # exp is NumPy's here and torch's there: they may round apart, by one step
        torch.testing.assert_close(row, wanted, rtol=2**-7 if i == 9 else 0, atol=0, msg=lambda m, i=i: f"row {i}: {m}")


def test_bf16_constants():
    x = torch.randn(64).bfloat16()
    out = torch.zeros_like(x)
    constants[(1,)](x, out, 64)
    i = torch.arange(64)
    expected = torch.where(i % 2 == 0, torch.where(i < 32, x * 2, 3.0), 0.75)
    assert torch.equal(out, expected.bfloat16())


def test_bf16_fma_rounds_once():
    x = torch.randn(64).bfloat16()
    out = torch.zeros_like(x)
    fused_multiply_add[(1,)](x, out, 64)
    assert torch.equal(out, (x.double() * x.double() + x.double()).bfloat16())


def test_bf16_comparison_gives_a_bool():
    x = torch.randn(64).bfloat16()
    out = torch.zeros_like(x)
    sign[(1,)](x, out, 64)
    assert torch.equal(out, (x > 0).bfloat16())


def test_bf16_reductions():
    x = -torch.rand(64).bfloat16() - 1  # all negative: their bit patterns order the other way round
    out = torch.zeros(4, dtype=torch.bfloat16)
    reductions[(1,)](x, out, 64)
    expected = torch.stack([x.float().sum(), x.max(), x.min(), x.argmax()]).bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
    torch.testing.assert_close(out[1:], expected[1:], rtol=0, atol=0)


def test_bf16_running_sum():
    x = torch.ones(64).bfloat16()
    out = torch.zeros_like(x)
    running_sum[(1,)](x, out, 64)
    assert torch.equal(out, torch.arange(1, 65).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dot(dtype):
    x, y = torch.randn(2, 32, 32).to(dtype)
    start = torch.randn(32, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = torch.zeros_like(start)
    matmul[(1,)](x, y, start, out, 32)
    exact = x.double() @ y.double().T + start.double()
    eps = torch.finfo(start.dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=32 * eps * float(exact.abs().max()))


@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_loops_with_run_time_bounds(n):
    out = torch.zeros(1, dtype=torch.int32)
    run_time_bounds[(1,)](out, n, 4)
    expected = sum(range(n)) + sum(range(n // 4 * 4, 2 * n, 4)) + sum(range(-(-n // 4)))
    assert out.item() == expected


def test_python_floats_have_the_precision_that_a_gpu_gives_them():
    out = torch.zeros(4, dtype=torch.float64)
    floats[(1,)](out, 0.1, 0.1, (1.0, 0.1), 0.1)
    declared, undeclared, in_tuple, constant = out.tolist()
    assert declared == constant == 0.1
    assert undeclared == in_tuple == float(np.float32(0.1)), "without a type, a Python float is fp32 on a GPU"


UNREPAIRED = """
import torch
from test_interpreter import *

x, y = torch.randn(2, 32, 32).bfloat16()
out, start = torch.zeros(32, 32), torch.zeros(32, 32)
matmul[(1,)](x, y, start, out, 32)
print("dot", float((out - x.float() @ y.float().T).abs().max()) < 1e-3)

x = fp32_at_every_bf16(0x8001)
out = torch.zeros(2**16, dtype=torch.bfloat16)
cast[(4,)](x, out, 2**14)
print("cast", torch.equal(bits(out), bits(x.bfloat16())))

x, y = torch.randn(2, 64).bfloat16()
out = torch.zeros(11, 64, dtype=torch.bfloat16)
pointwise[(1,)](x, y, out, 64)
print("add", torch.equal(out[0], x + y))

out = torch.zeros(4, dtype=torch.float64)
try:
    floats[(1,)](out, 0.1, 0.1, (1.0, 0.1), 0.1)
    print("floats", True)
except Exception:
    print("floats", False)
"""


def test_the_repair_is_still_needed():
    program = "from fused_attn import interpreter\ninterpreter.repair = lambda: None\n" + UNREPAIRED
    paths = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    done = subprocess.run([sys.executable, "-c", paths + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    right = dict(line.split() for line in done.stdout.splitlines())
    assert set(right) == {"dot", "cast", "add", "floats"}
    fixed = [name for name, answer in right.items() if answer == "True"]
    assert not fixed, (
        f"Triton {triton.__version__} computes {', '.join(fixed)} correctly by itself: "
        "take that repair out of fused_attn/interpreter.py, once the oldest supported Triton is as new as this one"
    )


AT_ONCE = """
from concurrent.futures import ThreadPoolExecutor

import torch, triton, triton.language as tl, fused_attn

torch.set_num_threads(1)

@triton.jit
def failing(x_ptr):
    tl.load(x_ptr.nonsense)

def launches(kernel):
    try:
        kernel[(1,)](torch.zeros(1))
    except Exception as error:
        return type(error).__name__

def call(i):
    generator = torch.Generator().manual_seed(i)
    dtype = (torch.float32, torch.bfloat16)[i % 2]
    q, k, v = (torch.randn(1, 1, 20 + i, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    found = []
    for backend in ("triton", "reference"):
        out = fused_attn.attention(q, k, v, causal=i % 3 == 0, softcap=[None, 5.0][i % 2], backend=backend)
        found.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for ours, reference in zip(*found):
        torch.testing.assert_close(ours, reference, rtol=3e-2, atol=3e-2)

call(0)
before = [dict(vars(place)) for place in (tl, tl.tensor, tl.math)]
with ThreadPoolExecutor(4) as pool:
    done = [pool.submit(call, i) for i in range(6)]
    failed = [pool.submit(launches, kernel) for kernel in [failing] * 4]
for future in done:
    future.result()
print({future.result() for future in failed} - {"InterpreterError"})
call(1)
assert [dict(vars(place)) for place in (tl, tl.tensor, tl.math)] == before, "triton.language was left changed"
"""


def test_threads_at_once_and_kernels_that_fail_leave_it_whole(tmp_path):
    """In a process of its own: what breaks, breaks for good."""
    (tmp_path / "at_once.py").write_text(AT_ONCE)
    done = subprocess.run([sys.executable, str(tmp_path / "at_once.py")], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"})
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stdout + done.stderr[-2000:]


OTHERS = [f"kernels.{name}" for name in ("backward", "combine", "tile_list", "operand_grad", "inspection", "rotary",
                                         "hopper.workspace")]


@pytest.mark.parametrize("module", ["kernels.forward", *(pytest.param(name, marks=pytest.mark.slow)
                                                         for name in (*OTHERS, "tools.tune", "tools.check", "run.execution"))])
def test_whoever_imports_a_kernel_has_the_interpreter_repaired(module):
    """In a process that imports nothing else."""
    program = (f"import fused_attn.{module}; from triton.runtime.interpreter import InterpreterBuilder as builder; "
               "print(getattr(builder, '_fused_attn_repaired', False))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"})
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]


WITHOUT_LANGUAGE = """
import torch, triton, fused_attn

@triton.jit
def scaled_by(score, q_pos, k_idx, head, batch, args):
    return score * args[0]

@triton.jit
def near(q_pos, k_idx, head, batch, args):
    return q_pos - k_idx < 3

scaled = fused_attn.ScoreMod("scaled", scaled_by, reference=lambda score, q_pos, k_idx, head, batch, args: score * args[0])
nearby = fused_attn.MaskMod("nearby", near, reference=lambda q_pos, k_idx, head, batch, args: q_pos - k_idx < 3)
q, factor = torch.randn(1, 2, 20, 16), torch.rand(2, 1, 1)
found = [fused_attn.attention(q, q, q, causal=True, score_mod=scaled(factor), mask_mod=nearby(), backend=backend)
         for backend in ("triton", "reference")]
torch.testing.assert_close(*found)
"""


def test_functions_of_a_user_need_not_see_the_language(tmp_path):
    """What they do not name they need not import, as under the compiler."""
    (tmp_path / "mods.py").write_text(WITHOUT_LANGUAGE)
    done = subprocess.run([sys.executable, str(tmp_path / "mods.py")], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
