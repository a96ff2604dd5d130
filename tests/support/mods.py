"""Functions of one's own: a score mod and mask mods, with tensors and numbers as arguments."""

import torch
import triton
import triton.language as tl

import fused_attn


@triton.jit
def near(score, q_pos, k_idx, head, batch, args):
    return args[1] * score + args[0] / (1.0 + tl.abs(q_pos - k_idx).to(score.dtype))


@triton.jit
def near_slope(score, modded, q_pos, k_idx, head, batch, args):
    return score * 0 + args[1]


@triton.jit
def near_weight(score, modded, q_pos, k_idx, head, batch, args):
    return 1.0 / (1.0 + tl.abs(q_pos - k_idx).to(score.dtype))


@triton.jit
def comb(q_pos, k_idx, head, batch, args):
    # Positions of queries are negative where there are more of them than keys, and C's % is not Python's there.
    return (args[0] != 0) & ((q_pos + k_idx + head + 1024) % args[1] != 0)


@triton.jit
def larger(q_pos, k_idx, head, batch, args):
    return args[0] > args[1]


def bent(score, b, h, q_idx, kv_idx, weight, table):
    """A plain score function that looks at everything: the score, a weight a head, a table by distance, a key's own number."""
    return score + 0.5 * torch.tanh(score * weight[h]) + table[h, (kv_idx - q_idx).clamp(-7, 7) + 7] - (kv_idx % 5) * 0.1


def ribbed(b, h, q_idx, kv_idx, *_):
    """A plain mask function: bounds, which become a window, and what is none."""
    return (kv_idx - q_idx <= 40) & (kv_idx - q_idx > -60) & ((q_idx + 2 * kv_idx + h) % 5 != 0)


NEAR = fused_attn.ScoreMod("near", near, near_slope, (near_weight, None),
                           reference=lambda s, q, k, h, b, args: args[1] * s + args[0] / (1 + (q - k).abs()))
COMB = fused_attn.MaskMod("comb", comb, by_head=True,
                          reference=lambda q, k, h, b, args: (args[0] != 0) & ((q + k + h + 1024) % args[1] != 0))
