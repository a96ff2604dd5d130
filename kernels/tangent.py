"""The tangent of the forward: how output and LSE move when what they are made of moves along tangents, in one sweep over keys.

    dS = mods'(S) * scale (dQ K^T + Q dK^T) + what the operands of the mods move,  P = exp(S - LSE)
    dLSE = rowsum(P * dS),    dO = (P * dS) V + P dV - dLSE * O

Here d marks a tangent; in the code it is ``_t`` at the end of a name, since ``d`` marks gradients there. A forward has left
O and LSE, so that a tile takes five matrix products, and one less for each of Q, K and V that does not move. A sink moves dLSE
alone. Dropout leaves out the same weights of both P and P * dS.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.backward import weights_of
from fused_attn.kernels.dropout import dropout_keep
from fused_attn.kernels.launch import Call, Launch, accumulator, fit_offsets, kind_of, programs, with_lse
from fused_attn.kernels.product import products, pushed
from fused_attn.kernels.score import push_mods
from fused_attn.kernels.softmax import LOG2E, load_lse, lse_views
from fused_attn.kernels.sweep import over_keys, sweep_keys
from fused_attn.kernels.tiles import (
    key_view,
    load_rows,
    load_tile,
    outer,
    query_rows,
    query_view,
    scaled,
    store_rows,
    store_tile,
    work_of,
    zeros,
)
from fused_attn.kernels.window import Rule, side


class Along(NamedTuple):
    """What moves, as kernels take it; a field is () for what does not."""

    q: Any = ()  # (pointer, strides) of the tangent, as those of k and v
    k: Any = ()
    v: Any = ()
    sinks: Any = ()  # (pointer to the sinks [H], pointer to their tangents)
    weight: Any = ()  # (Additive,) of the tangent
    operands: Any = ()  # for every mod the tangents of its arguments, see ``score.push_mods``
    dout: Any = ()  # (pointer, strides) of the tangent of the output's gradient, for the tangent of a backward


@triton.jit
def tile_along(x, work, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr):
    """The tile of queries of a tangent, or () where there is none."""
    if len(x) == 0:
        return ()
    else:
        return load_tile(query_view(x[0], x[1], work), first, WIDTH, ROWS, TAIL, TILE.wide)


@triton.jit
def view_along(x, work, GROUP: tl.constexpr):
    """The view of keys of a tangent, or () where there is none."""
    if len(x) == 0:
        return ()
    else:
        return key_view(x[0], x[1], work, GROUP)


@triton.jit
def step_along(view, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr):
    """A tile of keys of a tangent, or () where there is none."""
    if len(view) == 0:
        return ()
    else:
        return load_tile(view, first, WIDTH, ROWS, TAIL, TILE.wide)


@triton.jit
def scores_along(a, a_t, b, b_t, place, rule, extras, along, MEMBER: tl.constexpr, ARG: tl.constexpr, KIND: tl.constexpr,
                 TILE: tl.constexpr, KEYS_FIRST: tl.constexpr, TAIL_Q: tl.constexpr, MASKED: tl.constexpr):
    """(scores as ``weights_of`` takes them, their tangent in natural logits, the derivative of the mods as in ``apply_mods``,
    its tangent) of a tile of queries and one of keys, or with KEYS_FIRST of one of keys and one of queries."""
    raw = products(a, b, place.head, extras.additive, KIND)
    raw_t = pushed(a, a_t, b, b_t, place.head, extras.additive, along.weight, KIND) * rule.scale
    if len(extras.mods) > 0:
        return push_mods(raw * rule.scale, raw_t, place, extras.mods, along.operands, MEMBER, ARG, TILE, KEYS_FIRST, TAIL_Q,
                         MASKED)
    else:
        return raw, raw_t, 1.0, 0.0


@triton.jit
def push_step(state, held, views, place, rule, extras, KIND: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """What the BLOCK_N keys of ``place`` contribute: to (P * dS) V + P dV, to rowsum(P * dS), and to what rounding P * dS for
    its product adds to that sum."""
    BLOCK_N: tl.constexpr = TILE.block_n
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    acc, moved, rounding = state
    q, q_t, lse = held[0], held[1], held[2]  # and an Along, whose compile-time parts a name would lose
    k_view, v_view, k_t_view, v_t_view = views
    # [BLOCK_N, D]
    k = load_tile(k_view, place.k_first, KIND.dim, BLOCK_N, MASKED, TILE.wide)
    k_t = step_along(k_t_view, place.k_first, KIND.dim, BLOCK_N, MASKED, TILE)
    # [BLOCK_M, BLOCK_N]
    score, score_t, _, _ = scores_along(q, q_t, k, k_t, place, rule, extras, held[3], -1, 0, KIND, TILE, False, True, MASKED)
    p = weights_of(score, lse, place, rule, extras, TILE, False, MASKED)
    p_t = p * score_t
    if len(extras.mods) > 0:  # where no pair attends, the slope of a mod may be anything
        p_t = tl.where(p == 0.0, 0.0, p_t)
    moved += tl.sum(p_t, 1)
    if len(extras.dropout) > 0:
        stays = dropout_keep(extras.dropout, place, TILE, False)
        p = tl.where(stays, p, 0.0)
        p_t = tl.where(stays, p_t, 0.0)
    # [BLOCK_N, DV]
    v = load_tile(v_view, place.k_first, KIND.dim_v, BLOCK_N, MASKED, TILE.wide)
    rounded = p_t.to(v[0].dtype)
    rounding += tl.sum(rounded.to(ACC) - p_t, 1)
    acc = outer(rounded, v, acc, ACC, PRECISION)
    if len(v_t_view) > 0:
        v_t = load_tile(v_t_view, place.k_first, KIND.dim_v, BLOCK_N, MASKED, TILE.wide)
        acc = outer(p.to(v_t[0].dtype), v_t, acc, ACC, PRECISION)
    return acc, moved, rounding


@triton.jit
def plus(a, b, factor):
    """a + factor * b of two tiles, ``factor`` [ROWS, 1] in the type of a."""
    result = (a[0] + factor * b[0].to(a[0].dtype),)
    if len(a) > 1:
        result = result + (a[1] + factor * b[1].to(a[1].dtype),)
    return result


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def tangent_kernel(q_ptr, k_ptr, v_ptr, out_ptr, residual_ptr, lse_ptr, out_t_ptr, lse_t_ptr, strides,
                   H, Nq, Nk, offset, left, right, scale: tl.float64, extras, along, tiles,
                   KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: the tangents of BLOCK_M rows of out and LSE of one head, over the keys in their window.

    ``strides``: of q, k, v, out, residual (what rounding took from out, or None) and out_t, the tangent of out; lse_t, that of
    the LSE, lies like the LSE. ``along`` is an Along.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    D: tl.constexpr = KIND.dim
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    q_strides, k_strides, v_strides, out_strides, residual_strides, out_t_strides = strides
    work = work_of(tl.program_id(0), Nq, H, Nq, Nk, offset, extras.sequences, BLOCK_M, right is not None)
    first = work.first
    if len(extras.sequences.cu_q) > 0:
        if first >= work.n_queries:
            return
    rule = Rule(side(left), side(right), scale.to(ACC))
    # [BLOCK_M, D], [BLOCK_M, D] or (), [BLOCK_M]
    q = load_tile(query_view(q_ptr, q_strides, work), first, D, BLOCK_M, True, TILE.wide)
    q_t = tile_along(along.q, work, first, D, BLOCK_M, True, TILE)
    lse = load_lse(lse_views(lse_ptr, extras, work, Nq), first, extras, BLOCK_M, True)
    views = (key_view(k_ptr, k_strides, work, KIND.group), key_view(v_ptr, v_strides, work, KIND.group),
             view_along(along.k, work, KIND.group), view_along(along.v, work, KIND.group))
    state = zeros(DV, BLOCK_M, ACC), tl.zeros([BLOCK_M], ACC), tl.zeros([BLOCK_M], ACC)
    sweep = sweep_keys(tiles, work, rule, H, Nq, Nk, TILE)
    acc, moved, rounding = over_keys(push_step, state, (q, q_t, lse, along), views, work, sweep, rule, extras, KIND, TILE)

    if len(along.sinks) > 0:  # a sink is a key without a value
        natural = lse_views(lse_ptr, extras, work, Nq)
        whole = load_rows(natural[0], first, float("-inf"), BLOCK_M, True)
        exponent = tl.load(along.sinks[0] + work.head).to(ACC) - whole
        if len(natural) > 1:
            exponent -= load_rows(natural[1], first, 0.0, BLOCK_M, True)
        # A row of LSE -inf has neither a key nor a sink.
        p = tl.where(whole == float("-inf"), 0.0, tl.exp2(exponent * LOG2E))
        moved += tl.where(p == 0.0, 0.0, p * tl.load(along.sinks[1] + work.head).to(ACC))
    if len(extras.dropout) > 0:
        acc = scaled(acc, extras.dropout.factor)
        rounding *= extras.dropout.factor
    # What rounding does to all weights alike moves the sum along O, as dLSE does, and is taken out with it: a large mean of V
    # would amplify it.
    pull = -(moved + rounding)[:, None]
    out = load_tile(query_view(out_ptr, out_strides, work), first, DV, BLOCK_M, True, TILE.wide)
    out_t = plus(acc, out, pull)
    if residual_ptr is not None:
        rest = load_tile(query_view(residual_ptr, residual_strides, work), first, DV, BLOCK_M, True, TILE.wide)
        out_t = plus(out_t, rest, pull)
    store_tile(query_view(out_t_ptr, out_t_strides, work), first, out_t, DV, BLOCK_M, TILE.wide)
    store_rows(query_rows(lse_t_ptr, extras.sequences, work, Nq), first, moved, BLOCK_M)


def tangent_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None,
                   lse: torch.Tensor, out_t: torch.Tensor, lse_t: torch.Tensor, along: Along, tiles: tuple[Any, ...],
                   call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``out_t`` [B, H, Nq, Dv] and ``lse_t`` [B, H, Nq]; ``lse`` may come with its rest."""
    heads = q.shape[1]
    lse, call = with_lse(call, lse)
    args = (
        q, k, v, out, residual, lse, out_t, lse_t, call.strides(q, k, v, out, out if residual is None else residual, out_t),
        heads, call.n_queries, call.n_keys, call.offset, call.left, call.right, call.scale, call.extras, along, tiles,
        kind_of(heads // k.shape[1], q.shape[3], v.shape[3], accumulator(q.dtype), call.precision),
    )
    moving = [x for x in (residual, *(x[0] for x in along[:3] if x)) if x is not None]
    return Launch(tangent_kernel, programs(call.n_queries, config.block_m, call.batch * heads), args,
                  fit_offsets(config, call, q, k, v, out, out_t, *moving))
