"""The raw score of a query and a key: an inner product, or an additive score.

    q . k,    or    sum_d w_d tanh(q_d + k_d)

Both are symmetric in their two tiles, so either may come first. The gradient of the additive score with respect to q_d is
w_d (1 - tanh^2(q_d + k_d)), and with respect to w_d it is the tanh itself. A tile of tanh values is three-dimensional,
[rows, rows, columns], and lives in registers alone: tiles are small, and there is no tensor of Nq x Nk x D. Source:
Bahdanau, Cho & Bengio 2014, "Neural Machine Translation by Jointly Learning to Align and Translate".
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_attn.kernels.softmax import LOG2E
from fused_attn.kernels.tiles import head_columns, inner, inner_tangent, outer, rest_columns


class Additive(NamedTuple):
    """The additive score as kernels take it."""

    weight: Any  # w [H, D] in memory, its heads ``stride`` apart
    stride: Any  # a compile-time 0 where all heads share one
    sums: Any = ()  # (pointer,): where each program of dQ leaves its part of the gradient of w, [programs, D]


@triton.jit
def decay(x):
    """(e, 1 / (1 + e)) with e = exp(-2 |x|), which stays within (0, 1] and cannot overflow: tanh |x| = (1 - e) / (1 + e)."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    return e, 1.0 / (1.0 + e)


@triton.jit
def tanh_of(x, ACCURATE: tl.constexpr):
    """tanh x. ``ACCURATE`` keeps the last digits near 0, which the plain form loses."""
    e, inverse = decay(x)
    tanh = (1.0 - e) * inverse
    if ACCURATE:
        # Near 0 the difference loses digits that matter in fp32 and fp64. A Taylor series, with an error below 2**-53 |x|,
        # replaces it there.
        y = x * x
        poly = -1382.0 / 155925.0 + y * (21844.0 / 6081075.0)
        poly = 62.0 / 2835.0 + y * poly
        poly = -17.0 / 315.0 + y * poly
        poly = 2.0 / 15.0 + y * poly
        poly = -1.0 / 3.0 + y * poly
        tanh = tl.where(y < 0.01, tl.abs(x) * (1.0 + y * poly), tanh)
    return tl.where(x < 0.0, -tanh, tanh)


@triton.jit
def tanh_slope(x):
    """1 - tanh^2, computed as 4 e / (1 + e)^2, since the difference has no digits left where tanh is near 1."""
    e, inverse = decay(x)
    return 4.0 * e * inverse * inverse


@triton.jit
def weight_block(additive, head, FIRST_COL: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """The weights [COLS] of a head from column ``FIRST_COL`` on, with 0 past D."""
    cols = FIRST_COL + tl.arange(0, COLS)
    return tl.load(additive.weight + tl.cast(head, tl.int64) * additive.stride + cols, mask=cols < D, other=0.0).to(ACC)


@triton.jit
def sums_block(a, b, ACC: tl.constexpr):
    """Every row of a plus every row of b, for two blocks of columns: [rows of a, rows of b, columns]."""
    return a.to(ACC)[:, None, :] + b.to(ACC)[None, :, :]


@triton.jit
def tanh_block(a, b, ACC: tl.constexpr):
    """tanh of ``sums_block``."""
    ACCURATE: tl.constexpr = a.dtype.primitive_bitwidth >= 32
    return tanh_of(sums_block(a, b, ACC), ACCURATE)


@triton.jit
def products(a, b, head, additive, KIND: tl.constexpr):
    """The raw scores of two tiles: [rows of a, rows of b]."""
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision  # a name of its own: Triton 3.6 passes on a string only as a constexpr
    if len(additive) == 0:
        return inner(a, b, ACC, PRECISION)
    else:
        D: tl.constexpr = KIND.dim
        HEAD: tl.constexpr = head_columns(D)
        score = tl.sum(tanh_block(a[0], b[0], ACC) * weight_block(additive, head, 0, HEAD, D, ACC)[None, None, :], 2)
        if len(a) > 1:
            weight = weight_block(additive, head, HEAD, rest_columns(D), D, ACC)
            score += tl.sum(tanh_block(a[1], b[1], ACC) * weight[None, None, :], 2)
        return score


@triton.jit
def pushed_block(a, a_t, b, b_t, additive, weight_t, head, raw, BLOCK: tl.constexpr, FIRST_COL: tl.constexpr,
                 KIND: tl.constexpr):
    """``raw`` plus what a block of columns contributes to the tangent of the additive scores of two tiles."""
    ACC: tl.constexpr = KIND.acc
    D: tl.constexpr = KIND.dim
    COLS: tl.constexpr = a[BLOCK].shape[1]
    if len(a_t) + len(b_t) > 0:
        slope = tanh_slope(sums_block(a[BLOCK], b[BLOCK], ACC))
        slope *= weight_block(additive, head, FIRST_COL, COLS, D, ACC)[None, None, :]
        if len(a_t) > 0:
            raw += tl.sum(slope * a_t[BLOCK].to(ACC)[:, None, :], 2)
        if len(b_t) > 0:
            raw += tl.sum(slope * b_t[BLOCK].to(ACC)[None, :, :], 2)
    if len(weight_t) > 0:
        along = weight_block(weight_t[0], head, FIRST_COL, COLS, D, ACC)
        raw += tl.sum(tanh_block(a[BLOCK], b[BLOCK], ACC) * along[None, None, :], 2)
    return raw


@triton.jit
def pushed(a, a_t, b, b_t, head, additive, weight_t, KIND: tl.constexpr):
    """The tangent of ``products(a, b)``: [rows of a, rows of b]. ``a_t`` and ``b_t`` are the tangents of the tiles, or (), and
    ``weight_t`` is (Additive,) of the tangent of the additive score's weights, or ()."""
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    ROWS: tl.constexpr = a[0].shape[0]
    COLS: tl.constexpr = b[0].shape[0]
    if len(additive) == 0:
        return inner_tangent(a, a_t, b, b_t, ROWS, COLS, ACC, PRECISION)
    else:
        raw = pushed_block(a, a_t, b, b_t, additive, weight_t, head, tl.zeros([ROWS, COLS], ACC), 0, 0, KIND)
        if len(a) > 1:
            raw = pushed_block(a, a_t, b, b_t, additive, weight_t, head, raw, 1, head_columns(KIND.dim), KIND)
        return raw


@triton.jit
def pulled_block(ds, a, b, weight, acc, ACC: tl.constexpr):
    return acc + tl.sum(ds[:, :, None] * tanh_slope(sums_block(a, b, ACC)), 1) * weight[None, :]


@triton.jit
def pulled(ds, a, b, acc, head, additive, KIND: tl.constexpr):
    """``acc`` plus what dS [rows of a, rows of b] contributes to the gradient of a."""
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    if len(additive) == 0:
        return outer(ds.to(b[0].dtype), b, acc, ACC, PRECISION)
    else:
        D: tl.constexpr = KIND.dim
        HEAD: tl.constexpr = head_columns(D)
        result = (pulled_block(ds, a[0], b[0], weight_block(additive, head, 0, HEAD, D, ACC), acc[0], ACC),)
        if len(a) > 1:
            weight = weight_block(additive, head, HEAD, rest_columns(D), D, ACC)
            result = result + (pulled_block(ds, a[1], b[1], weight, acc[1], ACC),)
        return result


@triton.jit
def weight_start(additive, D: tl.constexpr, ACC: tl.constexpr):
    """The running sum of the gradient of w, a tuple of blocks [1, columns]; (0,) where that gradient is not wanted."""
    if len(additive) == 0 or len(additive.sums) == 0:
        return (0,)
    else:
        sums = (tl.zeros([1, head_columns(D)], ACC),)
        if rest_columns(D):
            sums = sums + (tl.zeros([1, rest_columns(D)], ACC),)
        return sums


@triton.jit
def weight_step(dw, ds, a, b, additive, ACC: tl.constexpr):
    """``dw`` plus what a tile of dS contributes to it."""
    if len(additive) == 0 or len(additive.sums) == 0:
        return dw
    else:
        result = (dw[0] + tl.sum(tl.sum(ds[:, :, None] * tanh_block(a[0], b[0], ACC), 1), 0)[None, :],)
        if len(a) > 1:
            result = result + (dw[1] + tl.sum(tl.sum(ds[:, :, None] * tanh_block(a[1], b[1], ACC), 1), 0)[None, :],)
        return result


@triton.jit
def weight_finish(dw, scale, additive, D: tl.constexpr):
    """Stores this program's part of the gradient of w."""
    if len(additive) > 0 and len(additive.sums) > 0:
        HEAD: tl.constexpr = head_columns(D)
        base = additive.sums[0] + tl.cast(tl.program_id(0), tl.int64) * D
        cols = tl.arange(0, HEAD)[None, :]
        tl.store(base + cols, dw[0] * scale, mask=cols < D)
        if len(dw) > 1:
            rest = HEAD + tl.arange(0, rest_columns(D))[None, :]
            tl.store(base + rest, dw[1] * scale, mask=rest < D)
