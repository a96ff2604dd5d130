"""The online softmax, in base 2: exp(x) = exp2(x * log2(e)).

A score is in one of two units. In plain attention it is raw: scale and log2(e) form one factor, and one fused multiply-add
scales the score and subtracts the maximum. Where a mod acts (``NATURAL``), scores are natural logits, and a bias may have made
all those of a row as large as -1e9. Here the maximum is subtracted first, which is exact, and only the difference is scaled:
scaling a maximum of that size first would round it by more than exp2 can bear. The same holds in the backward, where the LSE
comes in two parts.

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".
"""

import triton
import triton.language as tl

from fused_attn.kernels.tiles import load_rows, query_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(scores, row_max, row_sum, to_log2, MASKED: tl.constexpr, NATURAL: tl.constexpr):
    """Takes one tile of scores [M, N] into the running maximum and sum [M].

    ``scores * to_log2`` and ``row_max`` are logits in base 2; with ``NATURAL``, ``scores`` and ``row_max`` are natural logits.
    Returns the unnormalised weights [M, N], the factor [M] by which everything accumulated before must shrink, and the new
    maximum and sum. ``to_log2`` must be positive.
    """
    tile_max = tl.max(scores, 1)
    new_max = tl.maximum(row_max, tile_max if NATURAL else tile_max * to_log2)
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN: such rows subtract 0.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    if NATURAL:
        weights = tl.exp2((scores - pivot[:, None]) * LOG2E)
        shrink = tl.exp2((row_max - pivot) * LOG2E)
    else:
        weights = tl.exp2(scores * to_log2 - pivot[:, None])
        shrink = tl.exp2(row_max - pivot)
    return weights, shrink, new_max, row_sum * shrink + tl.sum(weights, 1)


@triton.jit
def softmax_sink(row_max, row_sum, sinks_ptr, head):
    """Returns the natural maximum and sum [ROWS] with the head's sink in them, and the factor [ROWS] by which everything
    accumulated before must shrink.

    A sink is a logit that takes weight and has no value. It comes last, and in natural units, since it may have any size that
    its type holds; a sink of -inf is no sink. Source:
    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"; gpt-oss (2025).
    """
    sink = tl.load(sinks_ptr + head).to(row_max.dtype)
    top = tl.maximum(row_max, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2((row_max - top) * LOG2E)
    return top, row_sum * shrink + tl.exp2((sink - top) * LOG2E), shrink


@triton.jit
def softmax_finish(row_max, row_sum):
    """Returns (factor that normalises the accumulated sum, LSE, its rest), each [M], given a natural maximum; a row with no key
    has LSE -inf."""
    empty = row_sum == 0.0  # not `> 0`, which would hide a NaN
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = row_max + tl.log2(row_sum) * LN2
    rest = (row_max - lse) + tl.log2(row_sum) * LN2
    return 1.0 / row_sum, tl.where(empty, float("-inf"), lse), tl.where(empty, 0.0, rest)


@triton.jit
def lse_views(lse_ptr, extras, work, Nq, skip=0):
    """Views of the LSE of a program's queries and, where a call keeps it, of its rest, both moved on by ``skip`` elements."""
    views = (query_rows(lse_ptr + skip, extras.sequences, work, Nq),)
    if len(extras.lse_rest) > 0:
        views = views + (query_rows(extras.lse_rest[0] + skip, extras.sequences, work, Nq),)
    return views


@triton.jit
def load_lse(views, first_row, extras, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """The LSE of ROWS rows in the units of their scores: (in base 2,), or with mods (natural,) or (natural, rest in base 2).

    A row with no key, like one past the end, has +inf, so that its weights are 0 and not NaN.
    """
    lse = load_rows(views[0], first_row, float("-inf"), ROWS, TAIL)
    scaled = lse * LOG2E if len(extras.mods) == 0 else lse
    result = (tl.where(lse == float("-inf"), float("inf"), scaled),)
    if len(views) > 1:
        result = result + (load_rows(views[1], first_row, 0.0, ROWS, TAIL) * LOG2E,)
    return result


@triton.jit
def lse_to_log2(lse):
    """LSE in base 2 for ``exp2(logit - lse)``, +inf for a row with no key."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
