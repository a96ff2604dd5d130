"""The smallest kernels of which Triton's code lacks a proxy fence, for who reports it or looks whether it has been mended.

    python -m tests.support.upstream sm_90      # on Triton 3.6
    python -m tests.support.upstream sm_100

Each multiplies matrices over tiles of K; nothing of the project is in them but the emulator, which says what is missing.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl

import fused_attn
from fused_attn.emulator import EmulatorFault


@triton.jit
def pointers(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c [M, N] = a [M, K] b [K, N]: cp.async brings the tiles, tensor cores read them."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    c = tl.zeros((M, N), tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + (first + depth)[None, :])
        b = tl.load(b_ptr + (first + depth)[:, None] * N + columns[None, :])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], c)


@triton.jit
def chained(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = (a a^T) b, with a [M, N] whose rows are both: on sm_100 the first product stays in tensor memory for the second."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    a = tl.load(a_ptr + rows[:, None] * N + columns[None, :])
    c = tl.zeros((M, N), tl.float32)
    for first in range(0, K, BLOCK_K):
        other = tl.load(a_ptr + (first + depth)[:, None] * N + columns[None, :])
        b = tl.load(b_ptr + (first + depth)[:, None] * N + columns[None, :])
        c = tl.dot(tl.dot(a, other.T).to(b.dtype), b, c)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], c)


@triton.jit
def specialized(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c [M, N] = a [M, K] b [K, N] by warps of their own for loads, through descriptors made in shared memory."""
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [M, BLOCK_K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BLOCK_K, N])
    c = tl.zeros((M, N), tl.float32)
    for first in tl.range(0, K, BLOCK_K, warp_specialize=True):
        c = tl.dot(a_desc.load([0, first]), b_desc.load([first, 0]), c)
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], c)


KERNELS = {"pointers": pointers, "chained": chained, "specialized": specialized}
M, N, K = 128, 64, 256


def told(name, target):
    """What the emulator says of a kernel's code for a target; "ok" where it is right."""
    a = torch.randn(*((K, N) if name == "chained" else (M, K))).half()
    b, c = torch.randn(K, N).half(), torch.empty(M, N)
    try:
        with fused_attn.emulated(target):
            KERNELS[name][(1,)](a, b, c, K, M, N, 64, num_warps=4, num_stages=2)
    except EmulatorFault as fault:
        return str(fault)
    left = a.float()
    exact = (left[:M] @ left.T).half().float() @ b.float() if name == "chained" else left @ b.float()
    return "ok" if torch.allclose(c, exact, rtol=1e-2, atol=1e-1) else "wrong"


if __name__ == "__main__":
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    for each in KERNELS:
        print(each, sys.argv[1], triton.__version__, told(each, sys.argv[1]))
