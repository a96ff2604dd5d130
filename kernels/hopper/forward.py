"""Forward for Hopper (sm_90) in Gluon: what ``kernels.forward`` computes, for fp16 and bf16, with softcap and sinks but no mod.

One warp, the producer, streams tiles of K and V through shared memory by TMA; two or three warpgroups, the consumers, own 64
queries each. A consumer issues Q K^T of its next tile, then P V of its last one, and computes the softmax of the next tile
while P V runs on the tensor cores. Tiles go from the last key to the first, so that the masked ones come first.

Source: Shah et al. 2024, "FlashAttention-3".
"""

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

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.hopper.problem import (
    L2_BYTES,
    NEG_INF,
    ROWS,
    Problem,
    accumulator_layout,
    box,
    descriptor,
    inner_tiles,
    key_tiles,
    locate,
    tile_width,
    visible,
)
from fused_attn.kernels.hopper.ring import allocate_ring, await_tile, fill, release, tile_at, tma_load, tma_store
from fused_attn.kernels.launch import Call, Launch, programs
from fused_attn.kernels.softmax import LN2, LOG2E


@gluon.jit
def discard(k, v, begin, end):
    """Hands back tiles that other consumers' rows see and this one's do not."""
    for step in range(begin, end):
        await_tile(k, step)
        release(k, step)
        await_tile(v, step)
        release(v, step)


@gluon.jit
def producer(q, k, v, q_desc, k_desc, v_desc, problem, TILE: gl.constexpr):
    """Loads the queries of every consumer, and every tile of keys and values that one of them sees; K runs one tile ahead."""
    BLOCK_N: gl.constexpr = TILE.block_n
    item = locate(gl.program_id(0), problem, TILE.block_m)
    if item.row < item.n_queries:
        first, last = key_tiles(item.row, TILE.block_m, item, problem, BLOCK_N)
        kv_head = item.head // problem.group
        for i in gl.static_range(TILE.block_m // ROWS):
            mbarrier.expect(q.full.index(i), q_desc.block_type.nbytes)
            tma_load(q_desc, box(problem, item.batch, item.head, item.q_start, item.n_queries, item.row + i * ROWS),
                     q.full.index(i), q.tiles.index(i))
        fill(k, 0, k_desc, box(problem, item.batch, kv_head, item.k_start, item.n_keys, (last - 1) * BLOCK_N))
        for step in range(0, last - 1 - first):
            row = (last - 1 - step) * BLOCK_N
            fill(k, step + 1, k_desc, box(problem, item.batch, kv_head, item.k_start, item.n_keys, row - BLOCK_N))
            fill(v, step, v_desc, box(problem, item.batch, kv_head, item.k_start, item.n_keys, row))
        fill(v, last - 1 - first, v_desc, box(problem, item.batch, kv_head, item.k_start, item.n_keys, first * BLOCK_N))


@gluon.jit
def reciprocal(x):
    """1 / x to one ulp in one instruction; the language's `/` spends eight on the range."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softmax_step(s, row_max, row_sum, row, tile, item, problem, BLOCK_N: gl.constexpr, MASKED: gl.constexpr):
    """Takes raw scores [64, BLOCK_N] into the running softmax: scale, softcap, mask, softmax, in this order.

    Returns the unnormalised weights, the factor [64] by which everything accumulated before must shrink, and the new maximum
    (in base 2) and sum.
    """
    LAYOUT: gl.constexpr = s.type.layout
    to_log2 = problem.scale * LOG2E
    if len(problem.softcap) > 0:
        # cap * tanh(x / cap) with tanh y = 1 - 2 / (exp(2 y) + 1), right at both infinities; the cap joins what follows.
        cap = problem.softcap[0]
        s = 1.0 - 2.0 * reciprocal(gl.exp2(s * (2.0 * to_log2 / cap)) + 1.0)
        to_log2 = cap * LOG2E
    if MASKED:
        s = gl.where(visible(row, tile, item, problem, LAYOUT, BLOCK_N), s, NEG_INF)
    new_max = gl.maximum(row_max, gl.max(s, 1) * to_log2)
    pivot = new_max
    if MASKED:
        # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN: such rows subtract 0.
        pivot = gl.where(new_max == NEG_INF, 0.0, new_max)
    p = gl.exp2(s * to_log2 - pivot[:, None])
    shrink = gl.exp2(row_max - pivot)
    return p, shrink, new_max, row_sum * shrink + gl.sum(p, 1)


@gluon.jit
def issue_scores(q_tile, k, step):
    BLOCK_N: gl.constexpr = k.tiles.shape[-2]
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, accumulator_layout(BLOCK_N))
    return warpgroup_mma(q_tile, tile_at(k, step).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def issue_output(p, v, step, acc):
    p = gl.convert_layout(p.to(v.tiles.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(p, tile_at(v, step), acc, is_async=True)


@gluon.jit
def by_row(values, acc):
    """Reshapes [64] to [64, 1], in a layout that broadcasts against ``acc``."""
    return gl.convert_layout(values, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def walk(begin, end, count, base, state, q_tile, k, v, row, last, item, problem, BLOCK_N: gl.constexpr, MASKED: gl.constexpr):
    """Attends to tiles last - 1 - begin ... last - end, whose steps start at ``base``.

    The state holds the weights of the tile before; on return, those of tile last - end.
    """
    p, row_max, row_sum, acc = state
    for i in range(begin, end):
        step = base + i
        s = issue_scores(q_tile, k, step)
        await_tile(v, step - 1)
        acc = issue_output(p, v, step - 1, acc)
        s = warpgroup_mma_wait(1, deps=(s,))
        release(k, step)
        p, shrink, row_max, row_sum = softmax_step(s, row_max, row_sum, row, last - 1 - i, item, problem, BLOCK_N, MASKED)
        # This wait stands here on purpose: without it ptxas lifts the wait for P V, which follows, above the exponentials.
        await_tile(k, step + 1, pred=i + 1 < count)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(v, step - 1)
        acc = acc * by_row(shrink, acc)
    return p, row_max, row_sum, acc


@gluon.jit
def attend(q_tile, k, v, base, row, last, count, item, problem, BLOCK_N: gl.constexpr):
    """64 queries over tiles last - 1 ... last - count: masked ones at the right edge, whole ones, masked ones at the left."""
    inner_first, inner_last = inner_tiles(row, item, problem, BLOCK_N)
    right_edge = 1  # the first tile is always masked: it may hold the end of the sequence
    left_edge = count
    if len(problem.right) > 0:
        right_edge = gl.minimum(gl.maximum(last - inner_last, 1), count)
    if len(problem.left) > 0:
        left_edge = gl.minimum(gl.maximum(last - inner_first, right_edge), count)

    D: gl.constexpr = v.tiles.shape[-1]
    of_row: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_N))
    row_max = gl.full([ROWS], NEG_INF, gl.float32, of_row)
    row_sum = gl.full([ROWS], 0.0, gl.float32, of_row)
    acc = gl.zeros([ROWS, D], gl.float32, accumulator_layout(D))
    await_tile(k, base)
    s = warpgroup_mma_wait(0, deps=(issue_scores(q_tile, k, base),))
    release(k, base)
    p, _, row_max, row_sum = softmax_step(s, row_max, row_sum, row, last - 1, item, problem, BLOCK_N, True)
    await_tile(k, base + 1, pred=count > 1)
    state = p, row_max, row_sum, acc
    if len(problem.right) > 0:
        state = walk(1, right_edge, count, base, state, q_tile, k, v, row, last, item, problem, BLOCK_N, True)
    state = walk(right_edge, left_edge, count, base, state, q_tile, k, v, row, last, item, problem, BLOCK_N, False)
    if len(problem.left) > 0:
        state = walk(left_edge, count, count, base, state, q_tile, k, v, row, last, item, problem, BLOCK_N, True)
    p, row_max, row_sum, acc = state
    await_tile(v, base + count - 1)
    acc = warpgroup_mma_wait(0, deps=(issue_output(p, v, base + count - 1, acc),))
    release(v, base + count - 1)
    return acc, row_max, row_sum


@gluon.jit
def finish(acc, row_max, row_sum, which: gl.constexpr, q, out_desc, row, item, problem):
    """Normalises; stores LSE, and out by way of the consumer's queries in shared memory. A row without a key gets 0, -inf."""
    rows = row + gl.arange(0, ROWS, layout=row_max.type.layout)
    lse = problem.lse + gl.to_tensor(item.batch).to(gl.int64) * problem.lse_batch
    lse += gl.to_tensor(item.head).to(gl.int64) * problem.lse_head + item.q_start
    row_max *= LN2
    shrink = 1.0
    if len(problem.sinks) > 0:  # as ``softmax.softmax_sink``
        sink = gl.load(problem.sinks[0] + item.head).to(gl.float32)
        top = gl.maximum(row_max, sink)
        top = gl.where(top == NEG_INF, 0.0, top)
        shrink = gl.exp2((row_max - top) * LOG2E)
        row_sum = row_sum * shrink + gl.exp2((sink - top) * LOG2E)
        row_max = top
    gl.store(lse + rows, row_max + gl.log2(row_sum) * LN2, mask=rows < item.n_queries)
    inverse = gl.where(row_sum == 0.0, 0.0, shrink / row_sum)
    tile_at(q, which).store((acc * by_row(inverse, acc)).to(q.tiles.dtype))
    fence_async_shared()
    tma_store(out_desc, box(problem, item.batch, item.head, item.q_start, item.n_queries, row), q.tiles.index(which))
    tma.store_wait(0)


@gluon.jit
def consumer(which: gl.constexpr, q, k, v, out_desc, problem, TILE: gl.constexpr):
    """The attention of 64 of the program's queries, from their scores to their output."""
    BLOCK_N: gl.constexpr = TILE.block_n
    item = locate(gl.program_id(0), problem, TILE.block_m)
    if item.row < item.n_queries:
        row = item.row + which * ROWS
        program_first, program_last = key_tiles(item.row, TILE.block_m, item, problem, BLOCK_N)
        first, last = key_tiles(row, ROWS, item, problem, BLOCK_N)
        base = program_last - last
        count = last - first
        mbarrier.wait(q.full.index(which), 0)
        if len(problem.right) > 0:
            discard(k, v, 0, base)
        acc, row_max, row_sum = attend(tile_at(q, which), k, v, base, row, last, count, item, problem, BLOCK_N)
        if len(problem.left) > 0:
            discard(k, v, base + count, program_last - program_first)
        finish(acc, row_max, row_sum, which, q, out_desc, row, item, problem)


@gluon.jit(do_not_specialize=["lse_batch", "lse_head", "H", "group", "section", "Nq", "Nk", "offset", "left", "right"])
def forward_kernel(lse_ptr, q_desc, k_desc, v_desc, out_desc, sinks, sequences, lse_batch, lse_head, H, group, section,
                   Nq, Nk, offset, left, right, scale: gl.float32, softcap, TILE: gl.constexpr):
    """One program: BLOCK_M queries of one head against all keys in their window, 64 for each consumer.

    The descriptors hold boxes of q [B, H, Nq, D], k [B, H / group, Nk, D], v [B, H / group, Nk, Dv], out [B, H, Nq, Dv]; lse is
    [B, H, Nq]. Packed sequences have [1, H, T, D] and so on. ``problem.Problem`` describes the other arguments; ``left`` and
    ``right`` may be None.
    """
    CONSUMERS: gl.constexpr = TILE.block_m // ROWS
    # Registers a thread: what the kernel is launched with, redistributed from the producer's warps to the consumers'.
    CONSUMER: gl.constexpr = 240 if CONSUMERS == 2 else 160
    PRODUCER: gl.constexpr = 24 if CONSUMERS == 2 else 32
    bound_left = ()
    bound_right = ()
    if left is not None:
        bound_left = (left,)
    if right is not None:
        bound_right = (right,)
    problem = Problem(lse_ptr, lse_batch, lse_head, sinks, sequences, H, group, section, Nq, Nk, offset, bound_left,
                      bound_right, scale, softcap)
    q = allocate_ring(q_desc, CONSUMERS, 1)
    k = allocate_ring(k_desc, TILE.num_stages, CONSUMERS)
    v = allocate_ring(v_desc, TILE.num_stages, CONSUMERS)
    if CONSUMERS == 2:
        gl.warp_specialize([(consumer, (gl.constexpr(0), q, k, v, out_desc, problem, TILE)),
                            (consumer, (gl.constexpr(1), q, k, v, out_desc, problem, TILE)),
                            (producer, (q, k, v, q_desc, k_desc, v_desc, problem, TILE))], [4, 1], [CONSUMER, PRODUCER])
    else:
        gl.warp_specialize([(consumer, (gl.constexpr(0), q, k, v, out_desc, problem, TILE)),
                            (consumer, (gl.constexpr(1), q, k, v, out_desc, problem, TILE)),
                            (consumer, (gl.constexpr(2), q, k, v, out_desc, problem, TILE)),
                            (producer, (q, k, v, q_desc, k_desc, v_desc, problem, TILE))],
                           [4, 4, 1], [CONSUMER, CONSUMER, PRODUCER])


def forward_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                   sinks: torch.Tensor | None, softcap: float | None, call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``out`` and ``lse``.

    Shapes are as in ``forward_kernel``; TMA must be able to address all tensors (``problem.describable``).
    """
    packed = bool(call.extras.sequences.cu_q)
    heads = q.shape[1]
    group = heads // k.shape[1]
    kept = max(1, L2_BYTES // (4 * call.n_keys * tile_width(k.shape[3])))  # key heads whose K and V (16-bit) stay in L2
    boxes = [descriptor(x, rows, packed) for x, rows in ((q, 64), (k, config.block_n), (v, config.block_n), (out, 64))]
    args = (
        lse, *boxes, () if sinks is None else (sinks,), call.extras.sequences, 0 if packed else lse.stride(0), lse.stride(1),
        heads, group, min(kept * group, call.batch * heads), call.n_queries, call.n_keys, call.offset, call.left, call.right,
        call.scale, () if softcap is None else (softcap,),
    )
    return Launch(forward_kernel, programs(call.n_queries, config.block_m, call.batch * heads), args, config)
