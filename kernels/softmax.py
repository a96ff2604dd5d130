"""The online softmax, in base 2: exp(x) = exp2(x * log2(e)), and the factor joins the multiplication by the scale.

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_start(sinks_ptr, head, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Maximum and sum [ROWS] before the first key: nothing, or the head's sink, a logit that takes weight and gives none.

    Source of sinks: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"; gpt-oss (2025).
    """
    if sinks_ptr is None:
        return tl.full([ROWS], float("-inf"), ACC), tl.zeros([ROWS], ACC)
    else:
        sink = tl.load(sinks_ptr + head).to(ACC) * LOG2E
        # A sink of -inf is no sink.
        return tl.zeros([ROWS], ACC) + sink, tl.zeros([ROWS], ACC) + tl.where(sink == float("-inf"), 0.0, 1.0).to(ACC)


@triton.jit
def softmax_step(scores, row_max, row_sum, to_log2, MASKED: tl.constexpr):
    """Takes one tile of scores [M, N] into the running maximum and sum [M].

    ``scores * to_log2`` are logits in base 2, and so is ``row_max``. Returns the unnormalised weights [M, N], the factor
    [M] by which everything accumulated before must shrink, and the new maximum and sum. ``to_log2`` must be positive.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * to_log2)
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN: such rows subtract 0.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    weights = tl.exp2(scores * to_log2 - pivot[:, None])
    shrink = tl.exp2(row_max - pivot)
    return weights, shrink, new_max, row_sum * shrink + tl.sum(weights, 1)


@triton.jit
def softmax_finish(row_max, row_sum):
    """(factor [M] that normalises the accumulated sum, natural-log LSE [M]); a row with no key gives LSE -inf."""
    empty = row_sum == 0.0  # not `> 0`, which would hide a NaN
    row_sum = tl.where(empty, 1.0, row_sum)
    return 1.0 / row_sum, tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN2)


@triton.jit
def lse_to_log2(lse):
    """LSE in base 2 for ``exp2(logit - lse)``; a row with no key becomes +inf, so that its weights are 0 and not NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
