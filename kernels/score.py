"""Score mods: pointwise functions of a scaled score, each with its slopes for the backward, applied one after the other.

A mod is ``(score, q_pos, k_idx, head, batch, args) -> score`` on tiles of any orientation: ``q_pos`` (a query's position
among the keys, or its index) and ``k_idx`` broadcast against the score, and ``args`` holds the mod's operands, already loaded,
and its compile-time constants. A slope is ``(score, modded, q_pos, k_idx, head, batch, args) -> d modded / d score``; an
argument's slope has the same parameters and gives d modded / d args[i]. Without any mod, the scale becomes a factor of the
exponent.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_attn.kernels.operand import load_operand, per_key, per_query
from fused_attn.kernels.product import tanh_of, tanh_slope
from fused_attn.kernels.softmax import LN2


class Mod(NamedTuple):
    """A mod as kernels take it: jit functions, an operand or (constant,) for each argument, and the arguments' indices."""

    function: Any
    slope: Any
    arg_slopes: Any = ()
    args: Any = ()
    order: Any = ()  # compile-time 0, 1, ..., since Triton cannot enumerate a tuple
    raw: Any = tl.constexpr(False)  # whether q_pos is to be the query's own index
    # Second derivatives, () where all are 0: (by the score twice, by it and each argument, by each pair of arguments), where a
    # derivative is (jit function with the parameters of a slope,), or () for 0.
    curves: Any = ()
    offsets: Any = ()  # of each Table a function (score, q_pos, k_idx, head, batch, args) -> where its entry lies, by any score


@triton.jit
def one(score, modded, q_pos, k_idx, head, batch, args):
    """The slope of a sum."""
    return 1.0


@triton.jit
def identity(score, q_pos, k_idx, head, batch, args):
    """Keeps the score; needed where the scale cannot join the exponent because it is not positive."""
    return score


@triton.jit
def softcap(score, q_pos, k_idx, head, batch, args):
    """cap * tanh(score / cap), args = (cap, accurate). Source: Bello et al. 2016; Gemma 2 (2024)."""
    CAP: tl.constexpr = args[0]
    ACCURATE: tl.constexpr = args[1]
    return CAP * tanh_of(score * (1.0 / CAP), ACCURATE)


@triton.jit
def softcap_slope(score, modded, q_pos, k_idx, head, batch, args):
    CAP: tl.constexpr = args[0]
    return tanh_slope(score * (1.0 / CAP))


@triton.jit
def softcap_curve(score, modded, q_pos, k_idx, head, batch, args):
    CAP: tl.constexpr = args[0]
    ACCURATE: tl.constexpr = args[1]
    x = score * (1.0 / CAP)
    return tanh_of(x, ACCURATE) * tanh_slope(x) * (-2.0 / CAP)


@triton.jit
def add(score, q_pos, k_idx, head, batch, args):
    """score + bias, args = (bias,)."""
    return score + args[0]


@triton.jit
def alibi(score, q_pos, k_idx, head, batch, args):
    """score - slope * |q - k|, args = (slope,). Source: Press et al. 2022, "Train Short, Test Long"."""
    return score - args[0] * tl.abs(q_pos - k_idx).to(score.dtype)


@triton.jit
def alibi_distance(score, modded, q_pos, k_idx, head, batch, args):
    return -tl.abs(q_pos - k_idx).to(score.dtype)


@triton.jit
def log_distance(score, q_pos, k_idx, r2):
    """log(1 + r2 * |q - k|) in the type of the score."""
    return tl.log2(1.0 + r2 * tl.abs(q_pos - k_idx).to(score.dtype)) * LN2


@triton.jit
def kerple(score, q_pos, k_idx, head, batch, args):
    """score - r1 * log(1 + r2 * |q - k|), args = (r1, r2). Source: Chi et al. 2022, "KERPLE", the logarithmic variant."""
    return score - args[0] * log_distance(score, q_pos, k_idx, args[1])


@triton.jit
def kerple_by_r1(score, modded, q_pos, k_idx, head, batch, args):
    return -log_distance(score, q_pos, k_idx, args[1])


@triton.jit
def kerple_by_r2(score, modded, q_pos, k_idx, head, batch, args):
    distance = tl.abs(q_pos - k_idx).to(score.dtype)
    return -args[0] * distance / (1.0 + args[1] * distance)


@triton.jit
def kerple_by_both(score, modded, q_pos, k_idx, head, batch, args):
    distance = tl.abs(q_pos - k_idx).to(score.dtype)
    return -distance / (1.0 + args[1] * distance)


@triton.jit
def kerple_by_r2_twice(score, modded, q_pos, k_idx, head, batch, args):
    distance = tl.abs(q_pos - k_idx).to(score.dtype)
    part = distance / (1.0 + args[1] * distance)
    return args[0] * part * part


@triton.jit
def soft_tree(score, q_pos, k_idx, head, batch, args):
    """score - penalty where key k is no ancestor of query q, args = (enter of q, enter of k, leave of k, penalty).

    ``enter`` and ``leave`` number the nodes of a tree as a depth-first walk comes to them and leaves their subtree.
    """
    return score - tl.where((args[1] <= args[0]) & (args[0] < args[2]), 0.0, args[3])


@triton.jit
def soft_tree_penalty(score, modded, q_pos, k_idx, head, batch, args):
    return tl.where((args[1] <= args[0]) & (args[0] < args[2]), 0.0, -1.0)


NO_SLOPE = tl.constexpr(1 << 20)  # as MEMBER of apply_mods: no derivative is wanted

# The mods that ship, by the names of fused_attn.call.mods: (function, slope, slopes of the arguments; `one` for integers).
MODS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "bias": (add, one, (one,)),
    "alibi": (alibi, one, (alibi_distance,)),
    "kerple": (kerple, one, (kerple_by_r1, kerple_by_r2)),
    "soft_tree": (soft_tree, one, (one, one, one, soft_tree_penalty)),
}

# Those of them whose second derivatives are not all 0: see ``Mod.curves``.
CURVES: dict[str, Any] = {
    "kerple": ((), ((), ()), (((), (kerple_by_both,)), ((kerple_by_both,), (kerple_by_r2_twice,)))),
}


def before_mods(scale: float, softcap_value: float | None, others: bool, dtype: torch.dtype) -> tuple[Mod, ...]:
    """The mods that the scale and softcap of a call need; ``others``: whether more mods follow. A new softcap compiles once."""
    if softcap_value is not None:
        # What the cheap form loses, about 2**-23 of the cap, shows in fp32 and fp64, and in fp16 and bf16 under a huge cap.
        accurate = dtype in (torch.float32, torch.float64) or softcap_value > 256
        constants = ((tl.constexpr(float(softcap_value)),), (tl.constexpr(accurate),))
        order = (tl.constexpr(0), tl.constexpr(1))
        return (Mod(softcap, softcap_slope, (), constants, order, curves=((softcap_curve,), (), ())),)
    return () if scale > 0 or others else (Mod(identity, one),)


@triton.jit
def apply_mods(score, place, mods, MEMBER: tl.constexpr, ARG: tl.constexpr, TILE: tl.constexpr, KEYS_FIRST: tl.constexpr,
               TAIL_Q: tl.constexpr, TAIL_K: tl.constexpr):
    """(modded score, its derivative by ``score``, or by argument ``ARG`` of mod ``MEMBER`` where that is not -1)."""
    k_idx = per_key(place.k_first + tl.arange(0, TILE.block_n), KEYS_FIRST)
    dmod = 1.0
    for i in tl.static_range(len(mods)):
        q_first = place.q_first if mods[i].raw else place.q_first + place.offset
        q_pos = per_query(q_first + tl.arange(0, TILE.block_m), KEYS_FIRST)
        read = [x[0] if len(x) == 1 else load_operand(x, place, score.dtype, TILE, KEYS_FIRST, TAIL_Q, TAIL_K)
                for x in mods[i].args]
        # Written out at each call: once assigned to a name, or returned, a compile-time constant no longer is one.
        modded = mods[i].function(score, q_pos, k_idx, place.head, place.batch, [
            mods[i].args[j][0] if len(mods[i].args[j]) == 1 else read[j] for j in mods[i].order])
        if i == MEMBER:
            dmod = mods[i].arg_slopes[ARG](score, modded, q_pos, k_idx, place.head, place.batch, [
                mods[i].args[j][0] if len(mods[i].args[j]) == 1 else read[j] for j in mods[i].order])
        elif i > MEMBER:
            dmod = dmod * mods[i].slope(score, modded, q_pos, k_idx, place.head, place.batch, [
                mods[i].args[j][0] if len(mods[i].args[j]) == 1 else read[j] for j in mods[i].order])
        score = modded
    return score, dmod


@triton.jit
def tangent_of(x, offset_of, score, place, TILE: tl.constexpr, KEYS_FIRST: tl.constexpr, TAIL_Q: tl.constexpr,
               TAIL_K: tl.constexpr):
    """The tangent of an argument at a tile: that of an Operand, or of a table, (pointer,), at ``offset_of``."""
    if len(x) == 1:
        return tl.load(x[0] + offset_of).to(score.dtype)
    else:
        return load_operand(x, place, score.dtype, TILE, KEYS_FIRST, TAIL_Q, TAIL_K)


@triton.jit
def derived(FUNCTION: tl.constexpr, score, modded, q_pos, k_idx, place, mods, MEMBER: tl.constexpr, read):
    """What a slope of mod MEMBER gives, or a second derivative; ``read`` holds the values of its arguments."""
    return FUNCTION(score, modded, q_pos, k_idx, place.head, place.batch, [
        mods[MEMBER].args[j][0] if len(mods[MEMBER].args[j]) == 1 else read[j] for j in mods[MEMBER].order])


@triton.jit
def push_mods(score, score_t, place, mods, along, MEMBER: tl.constexpr, ARG: tl.constexpr, TILE: tl.constexpr,
              KEYS_FIRST: tl.constexpr, TAIL_Q: tl.constexpr, TAIL_K: tl.constexpr):
    """``apply_mods`` with tangents: (modded score, its tangent, derivative, tangent of the derivative), the last of which is
    right where mods have all their ``curves``.

    ``along`` has for every mod a tuple of its arguments' tangents: an Operand, (pointer,) to what lies like a Table, or () for
    one that does not move. It is () where none of any mod does.
    """
    k_idx = per_key(place.k_first + tl.arange(0, TILE.block_n), KEYS_FIRST)
    dmod = 1.0
    dmod_t = 0.0
    for i in tl.static_range(len(mods)):
        q_first = place.q_first if mods[i].raw else place.q_first + place.offset
        q_pos = per_query(q_first + tl.arange(0, TILE.block_m), KEYS_FIRST)
        read = [x[0] if len(x) == 1 else load_operand(x, place, score.dtype, TILE, KEYS_FIRST, TAIL_Q, TAIL_K)
                for x in mods[i].args]
        modded = mods[i].function(score, q_pos, k_idx, place.head, place.batch, [
            mods[i].args[j][0] if len(mods[i].args[j]) == 1 else read[j] for j in mods[i].order])
        slope = derived(mods[i].slope, score, modded, q_pos, k_idx, place, mods, i, read)
        modded_t = score_t * slope
        slope_t = 0.0
        if i == MEMBER:  # from here on the derivative by this argument, and not by the score
            dmod = derived(mods[i].arg_slopes[ARG], score, modded, q_pos, k_idx, place, mods, i, read)
            if len(mods[i].curves) > 0 and len(mods[i].curves[1][ARG]) > 0:
                dmod_t += score_t * derived(mods[i].curves[1][ARG][0], score, modded, q_pos, k_idx, place, mods, i, read)
        elif len(mods[i].curves) > 0 and len(mods[i].curves[0]) > 0:
            slope_t += score_t * derived(mods[i].curves[0][0], score, modded, q_pos, k_idx, place, mods, i, read)
        if len(along) > 0:
            for n in tl.static_range(len(along[i])):
                if len(along[i][n]) > 0:
                    at = 0
                    if len(along[i][n]) == 1:
                        at = mods[i].offsets[n](score, q_pos, k_idx, place.head, place.batch, [
                            mods[i].args[j][0] if len(mods[i].args[j]) == 1 else read[j] for j in mods[i].order])
                    arg_t = tangent_of(along[i][n], at, score, place, TILE, KEYS_FIRST, TAIL_Q, TAIL_K)
                    modded_t += arg_t * derived(mods[i].arg_slopes[n], score, modded, q_pos, k_idx, place, mods, i, read)
                    if len(mods[i].curves) > 0:
                        if i == MEMBER:
                            if len(mods[i].curves[2][ARG][n]) > 0:
                                dmod_t += arg_t * derived(mods[i].curves[2][ARG][n][0], score, modded, q_pos, k_idx, place,
                                                          mods, i, read)
                        elif len(mods[i].curves[1][n]) > 0:
                            slope_t += arg_t * derived(mods[i].curves[1][n][0], score, modded, q_pos, k_idx, place, mods,
                                                       i, read)
        if i > MEMBER:
            dmod_t = dmod_t * slope + dmod * slope_t
            dmod = dmod * slope
        score, score_t = modded, modded_t
    return score, score_t, dmod, dmod_t


@triton.jit
def entry_offset(score, place, mods, MEMBER: tl.constexpr, ARG: tl.constexpr, TILE: tl.constexpr):
    """Where the entries lie that pairs of a tile [BLOCK_M, BLOCK_N] look up in argument ``ARG``, a Table, of mod ``MEMBER``.

    They do not depend on ``score``, of which the type alone counts.
    """
    q_first = place.q_first if mods[MEMBER].raw else place.q_first + place.offset
    q_pos = per_query(q_first + tl.arange(0, TILE.block_m), False)
    k_idx = per_key(place.k_first + tl.arange(0, TILE.block_n), False)
    read = [x[0] if len(x) == 1 else load_operand(x, place, None, TILE, False, True, True) for x in mods[MEMBER].args]
    return mods[MEMBER].offsets[ARG](score, q_pos, k_idx, place.head, place.batch, [
        mods[MEMBER].args[j][0] if len(mods[MEMBER].args[j]) == 1 else read[j] for j in mods[MEMBER].order])
