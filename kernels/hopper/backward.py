"""Backward for Hopper (sm_90) in Gluon: dK, dV and, by atomics, dQ, in fp16 and bf16 up to head dim 128, without mods.

    S^T = K Q^T    P^T = exp2(S^T * scale * log2(e) - LSE)    dV += P^T dO
    dP^T = V dO^T  dS^T = P^T * (dP^T - delta)                dK += dS^T Q    dQ += dS K

A program owns 128 keys of one key head and visits the tiles of queries that see them, for every query head of the group. Two
warpgroups, the consumers, hold 64 keys each, and one warp, the producer, feeds them by TMA. P^T and dS^T enter their products
from registers; dQ alone needs the dS of both consumers, so dS goes through shared memory as well. dQ is summed in the order in
which threads hold it. ``workspace`` holds the kernels before and after: one writes LSE and delta in tiles, one reorders dQ.

Source: Shah et al. 2024, "FlashAttention-3".
"""

from typing import Any, NamedTuple

import torch
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

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.hopper.problem import NEG_INF, ROWS, accumulator_layout, descriptor
from fused_attn.kernels.hopper.ring import (
    allocate_barriers,
    await_step,
    await_step_before,
    barrier_at,
    tma_load,
    tma_store,
)
from fused_attn.kernels.launch import Call, Launch, programs
from fused_attn.kernels.softmax import LOG2E

CONSUMERS = gl.constexpr(2)


class Work(NamedTuple):
    """The run-time numbers of a launch, for all partitions of a program; a bound that is missing is ()."""

    kv_heads: Any
    group: Any  # query heads to a key head
    n_queries: Any
    n_keys: Any
    offset: Any  # position of query 0 among the keys
    left: Any  # the window: query position q sees keys q - left ... q + right
    right: Any
    scale: Any


class Shared(NamedTuple):
    """Shared memory of a program. Step s of its walk over tiles of queries uses slot ``s % stages``."""

    k: Any  # [128, D]
    v: Any
    q: Any  # [stages, BLOCK_M, D]
    dout: Any
    stats: Any  # [2 * stages, 1, 1, BLOCK_M], LSE and delta of a slot
    ds: Any  # [stages, 128, BLOCK_M]
    kv_loaded: Any  # barriers: K and V have landed
    loaded: Any  # [stages, 1]: the queries of a slot have landed
    stored: Any  # both consumers have stored dS
    free: Any  # both are done with the slot


@gluon.jit
def query_tiles(first_key, work, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(first, inner_first, inner_stop, stop): the tiles of queries that see any of the program's keys are first ... stop - 1,
    and those that see all of them inner_first ... inner_stop - 1."""
    stop = gl.cdiv(work.n_queries, BLOCK_M)
    inner_stop = stop
    first = stop * 0
    inner_first = first
    if len(work.left) > 0:
        reach = first_key - work.offset + work.left[0]  # the last query that sees the first key
        stop = gl.minimum(gl.cdiv(gl.maximum(reach + BLOCK_N, 0), BLOCK_M), stop)
        inner_stop = gl.minimum(gl.maximum(reach + 1, 0) // BLOCK_M, stop)
    if len(work.right) > 0:
        start = first_key - work.offset - work.right[0]  # the first query that sees the first key
        first = gl.minimum(gl.maximum(start, 0) // BLOCK_M, stop)
        inner_first = gl.cdiv(gl.maximum(start + BLOCK_N - 1, 0), BLOCK_M)
    if first_key + BLOCK_N > work.n_keys:  # keys past the end: every tile is masked
        inner_first = stop
    return first, inner_first, inner_stop, stop


@gluon.jit
def place(work, BLOCK_N: gl.constexpr):
    """(batch, key head, first key) of the program. The tiles of a head are neighbours, and the longest sweeps come first."""
    tiles = gl.cdiv(work.n_keys, BLOCK_N)
    pair = gl.program_id(0) // tiles
    return pair // work.kv_heads, pair % work.kv_heads, gl.program_id(0) % tiles * BLOCK_N


@gluon.jit
def producer(shared, q_desc, k_desc, v_desc, dout_desc, stats_desc, work, TILE: gl.constexpr):
    """Loads the program's keys and values, then every tile of queries that it visits."""
    BLOCK_M: gl.constexpr = TILE.block_m
    batch, kv_head, first_key = place(work, TILE.block_n)
    first, _, _, stop = query_tiles(first_key, work, BLOCK_M, TILE.block_n)
    mbarrier.expect(shared.kv_loaded, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [batch, kv_head, first_key, 0], shared.kv_loaded, shared.k)
    tma_load(v_desc, [batch, kv_head, first_key, 0], shared.kv_loaded, shared.v)
    step = 0
    for g in range(work.group):
        head = kv_head * work.group + g
        row_of_tiles = (batch * work.kv_heads * work.group + head) * gl.cdiv(work.n_queries, BLOCK_M)
        for i in range(first, stop):
            slot = step % TILE.num_stages
            await_step_before(shared.free, step)
            loaded = barrier_at(shared.loaded, step)
            mbarrier.expect(loaded, 2 * q_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes)
            tma_load(q_desc, [batch, head, i * BLOCK_M, 0], loaded, shared.q.index(slot))
            tma_load(stats_desc, [0, row_of_tiles + i, 0], loaded, shared.stats.index(2 * slot))
            tma_load(dout_desc, [batch, head, i * BLOCK_M, 0], loaded, shared.dout.index(slot))
            tma_load(stats_desc, [1, row_of_tiles + i, 0], loaded, shared.stats.index(2 * slot + 1))
            step += 1


@gluon.jit
def statistic(shared, index, half: gl.constexpr, BLOCK_M: gl.constexpr):
    """64 values of LSE or delta, as [1, 64] to broadcast against the scores."""
    rows = shared.stats.index(index).reshape([BLOCK_M]).slice(half * ROWS, ROWS)
    return rows.load(gl.SliceLayout(0, accumulator_layout(ROWS)))[None, :]


@gluon.jit
def weights(s, lse, keys, first_query, masked, work):
    """P^T [64 keys, 64 queries]. Queries without a key and queries past the end have LSE +inf, so their weights are 0."""
    if masked:
        queries = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(0, accumulator_layout(ROWS)))
        distance = keys[:, None] - (queries + work.offset)[None, :]
        s = gl.where(keys[:, None] < work.n_keys, s, NEG_INF)
        if len(work.right) > 0:
            s = gl.where(distance <= work.right[0], s, NEG_INF)
        if len(work.left) > 0:
            s = gl.where(distance >= -work.left[0], s, NEG_INF)
    return gl.exp2(s * (work.scale * LOG2E) - lse)


@gluon.jit
def fragment_order(x, COLS: gl.constexpr):
    """Reorders a product [64, COLS] into a vector of which each thread holds four values side by side, and a warp 512 bytes."""
    # warp, half, row, block of columns, pair of columns, column
    x = gl.reshape(x, [4, 2, 8, COLS // 8, 4, 2])
    x = gl.reshape(gl.permute(x, [3, 0, 2, 4, 1, 5]), [ROWS * COLS])
    return gl.convert_layout(x, gl.BlockedLayout([4], [32], [4], [0]), assert_trivial=True)


@gluon.jit
def issue(a, b, acc):
    """Starts acc + a b, with ``a`` from registers."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(b.shape[-1]), 2)
    return warpgroup_mma(gl.convert_layout(a, OPERAND), b, acc, is_async=True)


@gluon.jit
def consumer(which: gl.constexpr, shared, dq_ptr, dk_desc, dv_desc, work, TILE: gl.constexpr):
    """dK and dV of 64 keys, and half of what the program adds to dQ."""
    BLOCK_M: gl.constexpr = TILE.block_m
    D: gl.constexpr = shared.k.shape[-1]
    TWO: gl.constexpr = BLOCK_M == 2 * ROWS  # two blocks of 64 queries a step, or one
    COLS: gl.constexpr = D if TWO else D // 2  # of this consumer's part of dQ, 64 of 128 rows or half of the columns
    dtype: gl.constexpr = shared.q.dtype
    no_scores = gl.zeros([ROWS, ROWS], gl.float32, accumulator_layout(ROWS))
    no_dq = gl.zeros([ROWS, COLS], gl.float32, accumulator_layout(COLS))
    own_part = which * (ROWS * COLS) + gl.arange(0, ROWS * COLS, layout=gl.BlockedLayout([4], [32], [4], [0]))

    batch, kv_head, first_key = place(work, TILE.block_n)
    first, inner_first, inner_stop, stop = query_tiles(first_key, work, BLOCK_M, TILE.block_n)
    keys = first_key + which * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator_layout(ROWS)))
    # [64, D]
    k = shared.k.slice(which * ROWS, ROWS)
    v = shared.v.slice(which * ROWS, ROWS)
    dk = gl.zeros([ROWS, D], gl.float32, accumulator_layout(D))
    dv = gl.zeros([ROWS, D], gl.float32, accumulator_layout(D))
    tiles = gl.cdiv(work.n_queries, BLOCK_M)
    i = first
    tile = (batch * work.kv_heads + kv_head) * work.group * tiles + first  # its place in the workspace of dQ
    n_steps = work.group * (stop - first)
    mbarrier.wait(shared.kv_loaded, 0)
    for step in range(n_steps):
        slot = step % TILE.num_stages
        masked = (i < inner_first) | (i >= inner_stop)
        # [64, D], [128, BLOCK_M]
        q0 = shared.q.index(slot).slice(0, ROWS)
        dout0 = shared.dout.index(slot).slice(0, ROWS)
        ds = shared.ds.index(slot)
        own_ds = ds.slice(which * ROWS, ROWS)

        # The tensor cores always have the next product queued while exp2 and dS are computed.
        await_step(shared.loaded, step)
        s0 = warpgroup_mma(k, q0.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        dp0 = warpgroup_mma(v, dout0.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        if TWO:
            q1 = shared.q.index(slot).slice(ROWS, ROWS)
            dout1 = shared.dout.index(slot).slice(ROWS, ROWS)
            s1 = warpgroup_mma(k, q1.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s0 = warpgroup_mma_wait(2 if TWO else 1, deps=(s0,))
        p0 = weights(s0, statistic(shared, 2 * slot, 0, BLOCK_M), keys, i * BLOCK_M, masked, work)
        dv = issue(p0.to(dtype), dout0, dv)
        dp0 = warpgroup_mma_wait(2 if TWO else 1, deps=(dp0,))
        ds0 = (p0 * (dp0 - statistic(shared, 2 * slot + 1, 0, BLOCK_M))).to(dtype)
        own_ds.slice(0, ROWS, dim=1).store(ds0)
        if TWO:
            dp1 = warpgroup_mma(v, dout1.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            s1 = warpgroup_mma_wait(2, deps=(s1,))
            p1 = weights(s1, statistic(shared, 2 * slot, 1, BLOCK_M), keys, i * BLOCK_M + ROWS, masked, work)
            dv = issue(p1.to(dtype), dout1, dv)
            dp1 = warpgroup_mma_wait(1, deps=(dp1,))
            ds1 = (p1 * (dp1 - statistic(shared, 2 * slot + 1, 1, BLOCK_M))).to(dtype)
            own_ds.slice(ROWS, ROWS, dim=1).store(ds1)

        # dQ needs the dS of both consumers; dK runs while dQ is added to global memory.
        fence_async_shared()
        mbarrier.arrive(barrier_at(shared.stored, step), count=1)
        await_step(shared.stored, step)
        if TWO:
            own_rows = ds.slice(which * ROWS, ROWS, dim=1).permute((1, 0))
            dq = warpgroup_mma(own_rows, shared.k, no_dq, use_acc=False, is_async=True)
        else:
            own_columns = shared.k.slice(which * COLS, COLS, dim=1)
            dq = warpgroup_mma(ds.permute((1, 0)), own_columns, no_dq, use_acc=False, is_async=True)
        dk = issue(ds0, q0, dk)
        if TWO:
            dk = issue(ds1, q1, dk)
        dv, dq = warpgroup_mma_wait(2 if TWO else 1, deps=(dv, dq))
        gl.atomic_add(dq_ptr + tile.to(gl.int64) * (BLOCK_M * D) + own_part, fragment_order(dq, COLS), sem="relaxed")
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(barrier_at(shared.free, step), count=1)

        i += 1
        tile += 1
        if i == stop:  # on to the next query head of the group
            i = first
            tile += tiles - stop + first

    # K and V make room for dK and dV once both consumers have read them for the last time.
    await_step(shared.free, gl.maximum(n_steps - 1, 0), pred=n_steps > 0)
    k.store((dk * work.scale).to(dtype))
    v.store(dv.to(dtype))
    fence_async_shared()
    tma_store(dk_desc, [batch, kv_head, first_key + which * ROWS, 0], k)
    tma_store(dv_desc, [batch, kv_head, first_key + which * ROWS, 0], v)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["kv_heads", "group", "Nq", "Nk", "offset", "left", "right"])
def backward_kernel(dq_ptr, q_desc, k_desc, v_desc, dout_desc, stats_desc, dk_desc, dv_desc, kv_heads, group, Nq, Nk,
                    offset, left, right, scale: gl.float32, TILE: gl.constexpr):
    """One program: dK and dV of 128 keys of one key head, 64 for each consumer, and its part of dQ.

    The descriptors hold boxes of q, dout [B, H, Nq, D], of k, v, dk, dv [B, H / group, Nk, D] and of stats
    [2, B * H * tiles, BLOCK_M], LSE in base 2 and delta. dq [B * H * tiles, BLOCK_M * D], fp32 zeros, receives dQ without its
    factor ``scale``, in ``fragment_order``.
    """
    STAGES: gl.constexpr = TILE.num_stages
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_N: gl.constexpr = TILE.block_n
    D: gl.constexpr = q_desc.block_type.shape[-1]
    dtype: gl.constexpr = q_desc.dtype
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    scores: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    bound_left = ()
    bound_right = ()
    if left is not None:
        bound_left = (left,)
    if right is not None:
        bound_right = (right,)
    work = Work(kv_heads, group, Nq, Nk, offset, bound_left, bound_right, scale)
    shared = Shared(
        gl.allocate_shared_memory(dtype, [BLOCK_N, D], rows),
        gl.allocate_shared_memory(dtype, [BLOCK_N, D], rows),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], rows),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], rows),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 1, BLOCK_M], stats_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_M], scores),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        allocate_barriers(STAGES, 1),
        allocate_barriers(STAGES, CONSUMERS),
        allocate_barriers(STAGES, CONSUMERS),
    )
    mbarrier.init(shared.kv_loaded, count=1)
    gl.warp_specialize([(consumer, (gl.constexpr(0), shared, dq_ptr, dk_desc, dv_desc, work, TILE)),
                        (consumer, (gl.constexpr(1), shared, dq_ptr, dk_desc, dv_desc, work, TILE)),
                        (producer, (shared, q_desc, k_desc, v_desc, dout_desc, stats_desc, work, TILE))], [4, 1], [240, 24])


def backward_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, stats: torch.Tensor,
                    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``dk`` and ``dv`` and adds to ``dq``; shapes as in ``backward_kernel``."""
    kv_heads = k.shape[1]
    block_m, block_n = config.block_m, config.block_n
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    boxes = [descriptor(x, rows, False) for x, rows in ((q, block_m), (k, block_n), (v, block_n), (dout, block_m))]
    boxes.append(TensorDescriptor(stats, list(stats.shape), list(stats.stride()), [1, 1, block_m], layout))
    boxes += [descriptor(x, ROWS.value, False) for x in (dk, dv)]
    args = (dq, *boxes, kv_heads, q.shape[1] // kv_heads, call.n_queries, call.n_keys, call.offset, call.left, call.right,
            call.scale)
    return Launch(backward_kernel, programs(call.n_keys, block_n, call.batch * kv_heads), args, config)
