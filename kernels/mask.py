"""Masks: which pairs of a tile attend, by the window, by lengths, and by masks given as tensors or as functions."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_attn.kernels.operand import load_operand, per_key, per_query
from fused_attn.kernels.window import keep_mask


class Keep(NamedTuple):
    """A mask as kernels take it: a jit function (q_pos, k_idx, head, batch, args) -> bool, and its arguments as in a Mod."""

    function: Any
    args: Any = ()
    order: Any = ()
    raw: Any = tl.constexpr(False)


@triton.jit
def stored(q_pos, k_idx, head, batch, args):
    """A mask held as a tensor, True where a pair attends; args = (mask,)."""
    return args[0]


@triton.jit
def hidden(q_pos, k_idx, head, batch, args):
    """A mask held as a tensor, True where a pair does not attend; args = (mask,)."""
    return args[0] == 0


@triton.jit
def document(q_pos, k_idx, head, batch, args):
    """True where both tokens belong to one document; args = (document of q, document of k)."""
    return args[0] == args[1]


@triton.jit
def prefix_lm(q_pos, k_idx, head, batch, args):
    """A prefix that every query sees, and causal attention after it; args = (length of the prefix,)."""
    return (k_idx < args[0]) | (k_idx <= q_pos)


@triton.jit
def dilated_window(q_pos, k_idx, head, batch, args):
    """|q - k| is a multiple of the dilation, of the reach at most; args = (dilation, reach). Source: Beltagy et al. 2020."""
    DILATION: tl.constexpr = args[0]
    REACH: tl.constexpr = args[1]
    distance = tl.abs(q_pos - k_idx)
    return (distance % DILATION == 0) & (distance <= REACH)


@triton.jit
def tree(q_pos, k_idx, head, batch, args):
    """True where key k is an ancestor of query q, or q; args = (enter of q, enter of k, leave of k), see ``soft_tree``."""
    return (args[1] <= args[0]) & (args[0] < args[2])


# The masks that ship, by the names of fused_attn.call.mods.
KEEPS: dict[str, Any] = {"mask": stored, "hide": hidden, "document": document, "prefix_lm": prefix_lm,
                         "dilated_window": dilated_window, "tree": tree}


@triton.jit
def keep_tile(place, rule, keeps, TILE: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which pairs of a tile attend: inside the window, before the last key, and kept by every mask."""
    q_pos = per_query(place.q_first + place.offset + tl.arange(0, TILE.block_m), KEYS_FIRST)
    k_idx = per_key(place.k_first + tl.arange(0, TILE.block_n), KEYS_FIRST)
    keep = keep_mask(q_pos, k_idx, place.n_keys, rule.left, rule.right)
    for i in tl.static_range(len(keeps)):
        q_idx = per_query(place.q_first + tl.arange(0, TILE.block_m), KEYS_FIRST) if keeps[i].raw else q_pos
        read = [x[0] if len(x) == 1 else load_operand(x, place, None, TILE, KEYS_FIRST, True, True)
                for x in keeps[i].args]
        keep = keep & keeps[i].function(q_idx, k_idx, place.head, place.batch, [
            keeps[i].args[j][0] if len(keeps[i].args[j]) == 1 else read[j] for j in keeps[i].order])
    return keep
