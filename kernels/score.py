"""Score mods: pointwise functions of a scaled score, each with its slope for the backward.

A mod is ``(score, q_pos, k_idx, head, batch, args) -> score`` and its slope ``(score, modded, q_pos, k_idx, head,
batch, args) -> d modded / d score``, on tiles of any orientation (``q_pos`` and ``k_idx`` broadcast against them).
``None`` stands for no mod at all: the scale then joins the exponent and no separate multiplication is left.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fused_attn.kernels.softmax import LOG2E


@triton.jit
def identity(score, q_pos, k_idx, head, batch, args):
    """Keeps the score, with slope None for 1; needed where the scale cannot join the exponent because it is not positive."""
    return score


@triton.jit
def softcap(score, q_pos, k_idx, head, batch, args):
    """cap * tanh(score / cap), args = (cap, accurate). Source: Bello et al. 2016; Gemma 2 (2024)."""
    CAP: tl.constexpr = args[0]
    ACCURATE: tl.constexpr = args[1]
    # 1 - 2 / (1 + e^2x) saturates to +-1 without overflowing to NaN, at logits of 1e4 and beyond.
    x = score * (1.0 / CAP)
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if ACCURATE:
        # Near 0 the difference loses digits that fp32 and fp64 users keep: Taylor there, error below 2**-53 |x|.
        y = x * x
        poly = -1382.0 / 155925.0 + y * (21844.0 / 6081075.0)
        poly = 62.0 / 2835.0 + y * poly
        poly = -17.0 / 315.0 + y * poly
        poly = 2.0 / 15.0 + y * poly
        poly = -1.0 / 3.0 + y * poly
        tanh = tl.where(y < 0.01, x + x * y * poly, tanh)
    return CAP * tanh


@triton.jit
def softcap_slope(score, modded, q_pos, k_idx, head, batch, args):
    CAP: tl.constexpr = args[0]
    tanh = modded * (1.0 / CAP)
    return 1.0 - tanh * tanh


def select(scale: float, softcap_value: float | None, dtype: torch.dtype) -> tuple[Any, Any, tuple[Any, ...]]:
    """(mod, slope, args) of a call; all compile-time, so a new softcap value compiles once, a new scale never."""
    if softcap_value is not None:
        # What the cheap form loses, about 2**-23 of the cap, shows in fp32 and fp64, and in halves under a huge cap.
        accurate = dtype in (torch.float32, torch.float64) or softcap_value > 256
        return softcap, softcap_slope, (float(softcap_value), accurate)
    return (None if scale > 0 else identity), None, ()
