"""The tangent of the backward, and with it every second derivative: dQ by queries, dK and dV by keys, as in the backward.

    P' = P * (S' - LSE')                   dP' = dO' V^T + dO V'^T
    dS' = P' * (dP - delta) + P * (dP' - delta')
    dQ' = scale (dS' K + dS K'),  dK' = scale (dS'^T Q + dS^T Q'),  dV' = P'^T dO + P^T dO'

Here ' marks a tangent, ``_t`` in the code. Where mods act, dS becomes dS * dmod, and dS' gains dS times the tangent of dmod,
which takes the second derivatives of the mods. LSE' and O' are those of the forward's tangent, and
delta' = rowsum(dO' * O + dO * O') - dLSE'. What does not move costs no product: with tangents of Q, K and V, and none of dO,
the kernel of dQ takes seven, and that of dK and dV eight.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import TileConfig
from fused_attn.kernels.backward import keys_kind, weights_of
from fused_attn.kernels.dropout import dropout_keep
from fused_attn.kernels.launch import Call, Launch, accumulator, fit_offsets, kind_of, programs, with_lse
from fused_attn.kernels.operand import per_query
from fused_attn.kernels.softmax import load_lse, lse_views
from fused_attn.kernels.sweep import over_keys, over_queries, sweep_keys, sweep_queries
from fused_attn.kernels.tangent import Along, scores_along, step_along, tile_along, view_along
from fused_attn.kernels.tiles import (
    inner,
    inner_tangent,
    key_view,
    load_rows,
    load_tile,
    of_head,
    outer,
    query_rows,
    query_view,
    scaled,
    store_tile,
    work_of,
    zeros,
)
from fused_attn.kernels.window import Rule, side


class Rows(NamedTuple):
    """What is known of each query, as pointers, or as values of a tile: LSE, its tangent, delta and its tangent."""

    lse: Any
    lse_t: Any
    delta: Any
    delta_t: Any


@triton.jit
def rows_of(pointers, extras, work, Nq):
    """Views of the ``Rows`` of a program's head."""
    return Rows(lse_views(pointers.lse, extras, work, Nq), query_rows(pointers.lse_t, extras.sequences, work, Nq),
                query_rows(pointers.delta, extras.sequences, work, Nq),
                query_rows(pointers.delta_t, extras.sequences, work, Nq))


@triton.jit
def load_statistics(views, first, extras, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """The values of ``Rows`` of ROWS queries; an LSE past the end makes weights 0."""
    return Rows(load_lse(views.lse, first, extras, ROWS, TAIL), load_rows(views.lse_t, first, 0.0, ROWS, TAIL),
                load_rows(views.delta, first, 0.0, ROWS, TAIL), load_rows(views.delta_t, first, 0.0, ROWS, TAIL))


class Pair(NamedTuple):
    """A tile and its tangent, which is () where it does not move."""

    value: Any
    tangent: Any


@triton.jit
def second_step(a, b, c, d, rows, place, rule, extras, along, MEMBER: tl.constexpr, ARG: tl.constexpr, KIND: tl.constexpr,
                TILE: tl.constexpr, KEYS_FIRST: tl.constexpr, TAIL_Q: tl.constexpr, MASKED: tl.constexpr):
    """(P, P', dS, dS') of a tile, dropout in all of them but its factor in dS alone; without the factor ``scale``.

    ``a`` and ``b`` are the Pairs of Q and K, ``c`` and ``d`` those of dO and V; with KEYS_FIRST, of K and Q, and of V and dO.
    """
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    ROWS: tl.constexpr = TILE.block_n if KEYS_FIRST else TILE.block_m
    COLS: tl.constexpr = TILE.block_m if KEYS_FIRST else TILE.block_n
    score, score_t, dmod, dmod_t = scores_along(a.value, a.tangent, b.value, b.tangent, place, rule, extras, along, MEMBER, ARG,
                                                KIND, TILE, KEYS_FIRST, TAIL_Q, MASKED)
    p = weights_of(score, rows.lse, place, rule, extras, TILE, KEYS_FIRST, MASKED)
    p_t = p * (score_t - per_query(rows.lse_t, KEYS_FIRST))
    dp = inner(c.value, d.value, ACC, PRECISION)
    dp_t = inner_tangent(c.value, c.tangent, d.value, d.tangent, ROWS, COLS, ACC, PRECISION)
    if len(extras.dropout) > 0:
        stays = dropout_keep(extras.dropout, place, TILE, KEYS_FIRST)
        dp = tl.where(stays, dp * extras.dropout.factor, 0.0)
        dp_t = tl.where(stays, dp_t * extras.dropout.factor, 0.0)
    pull = dp - per_query(rows.delta, KEYS_FIRST)
    ds = p * pull
    ds_t = p_t * pull + p * (dp_t - per_query(rows.delta_t, KEYS_FIRST))
    if len(extras.mods) > 0:
        ds_t = ds_t * dmod + ds * dmod_t
        ds = ds * dmod
        # Where no pair attends, a mod may give anything.
        p_t = tl.where(p == 0.0, 0.0, p_t)
        ds = tl.where(p == 0.0, 0.0, ds)
        ds_t = tl.where(p == 0.0, 0.0, ds_t)
    if len(extras.dropout) > 0:
        p = tl.where(stays, p, 0.0)
        p_t = tl.where(stays, p_t, 0.0)
    return p, p_t, ds, ds_t


@triton.jit
def dq_tangent_step(state, held, views, place, rule, extras, KIND: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the BLOCK_N keys of ``place`` contribute to dQ'."""
    BLOCK_N: tl.constexpr = TILE.block_n
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    q, dout, rows = held[0], held[1], held[2]  # and an Along, whose compile-time parts a name would lose
    k_view, v_view, k_t_view, v_t_view = views
    k = Pair(load_tile(k_view, place.k_first, KIND.dim, BLOCK_N, MASKED, TILE.wide),
             step_along(k_t_view, place.k_first, KIND.dim, BLOCK_N, MASKED, TILE))
    v = Pair(load_tile(v_view, place.k_first, KIND.dim_v, BLOCK_N, MASKED, TILE.wide),
             step_along(v_t_view, place.k_first, KIND.dim_v, BLOCK_N, MASKED, TILE))
    _, _, ds, ds_t = second_step(q, k, dout, v, rows, place, rule, extras, held[3], -1, 0, KIND, TILE, False, True, MASKED)
    state = outer(ds_t.to(k.value[0].dtype), k.value, state, ACC, PRECISION)
    if len(k.tangent) > 0:
        state = outer(ds.to(k.value[0].dtype), k.tangent, state, ACC, PRECISION)
    return state


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def dq_tangent_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, dq_t_ptr, rows, strides,
                      H, Nq, Nk, offset, left, right, scale: tl.float64, extras, along, tiles,
                      KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: dQ' of BLOCK_M queries of one head. ``strides``: of q, k, v, dout, dq_t; ``rows``: pointers of a Rows."""
    BLOCK_M: tl.constexpr = TILE.block_m
    D: tl.constexpr = KIND.dim
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    q_strides, k_strides, v_strides, dout_strides, dq_t_strides = strides
    work = work_of(tl.program_id(0), Nq, H, Nq, Nk, offset, extras.sequences, BLOCK_M, right is not None)
    first = work.first
    if len(extras.sequences.cu_q) > 0:
        if first >= work.n_queries:
            return
    rule = Rule(side(left), side(right), scale.to(ACC))
    q = Pair(load_tile(query_view(q_ptr, q_strides, work), first, D, BLOCK_M, True, TILE.wide),
             tile_along(along.q, work, first, D, BLOCK_M, True, TILE))
    dout = Pair(load_tile(query_view(dout_ptr, dout_strides, work), first, DV, BLOCK_M, True, TILE.wide),
                tile_along(along.dout, work, first, DV, BLOCK_M, True, TILE))
    known = load_statistics(rows_of(rows, extras, work, Nq), first, extras, BLOCK_M, True)
    views = (key_view(k_ptr, k_strides, work, KIND.group), key_view(v_ptr, v_strides, work, KIND.group),
             view_along(along.k, work, KIND.group), view_along(along.v, work, KIND.group))
    sweep = sweep_keys(tiles, work, rule, H, Nq, Nk, TILE)
    dq_t = over_keys(dq_tangent_step, zeros(D, BLOCK_M, ACC), (q, dout, known, along), views, work, sweep, rule, extras, KIND,
                     TILE)
    store_tile(query_view(dq_t_ptr, dq_t_strides, work), first, scaled(dq_t, rule.scale), D, BLOCK_M, TILE.wide)


class Sources(NamedTuple):
    """Where a program of keys finds its queries: pointers, strides, its work, the number of query heads, and Nq."""

    q: Any
    dout: Any
    rows: Any
    strides: Any
    work: Any
    H: Any
    Nq: Any


@triton.jit
def dkv_tangent_step(state, held, sources, place, rule, extras, KIND: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the BLOCK_M queries of ``place`` contribute to dK' and dV', with tiles transposed as in ``dkv_step``."""
    BLOCK_M: tl.constexpr = TILE.block_m
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    dk_t, dv_t = state
    k, v = held[0], held[1]  # and an Along, as in ``dq_tangent_step``
    own = of_head(sources.work, place.head, sources.H)
    first = place.q_first
    q = Pair(load_tile(query_view(sources.q, sources.strides[0], own), first, KIND.dim, BLOCK_M, MASKED, TILE.wide),
             tile_along(held[2].q, own, first, KIND.dim, BLOCK_M, MASKED, TILE))
    dout = Pair(load_tile(query_view(sources.dout, sources.strides[3], own), first, KIND.dim_v, BLOCK_M, MASKED, TILE.wide),
                tile_along(held[2].dout, own, first, KIND.dim_v, BLOCK_M, MASKED, TILE))
    rows = load_statistics(rows_of(sources.rows, extras, own, sources.Nq), first, extras, BLOCK_M, MASKED)
    p, p_t, ds, ds_t = second_step(k, q, v, dout, rows, place, rule, extras, held[2], -1, 0, KIND, TILE, True, MASKED,
                                  MASKED)
    if KIND.need_dv:
        dv_t = outer(p_t.to(dout.value[0].dtype), dout.value, dv_t, ACC, PRECISION)
        if len(dout.tangent) > 0:
            dv_t = outer(p.to(dout.value[0].dtype), dout.tangent, dv_t, ACC, PRECISION)
    if KIND.need_dk:
        dk_t = outer(ds_t.to(q.value[0].dtype), q.value, dk_t, ACC, PRECISION)
        if len(q.tangent) > 0:
            dk_t = outer(ds.to(q.value[0].dtype), q.tangent, dk_t, ACC, PRECISION)
    return dk_t, dv_t


@triton.jit(do_not_specialize=["Hkv", "Nq", "Nk", "offset", "left", "right"])
def dkv_tangent_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, dk_t_ptr, dv_t_ptr, rows, strides,
                       Hkv, Nq, Nk, offset, left, right, scale: tl.float64, extras, along, tiles,
                       KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: dK' and dV' of BLOCK_N keys of one key head, over the queries of its whole group in their window.

    ``strides``: of q, k, v, dout, dk_t and dv_t. ``KIND``, a KeysKind, tells which are wanted; what is not wanted is None.
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    D: tl.constexpr = KIND.dim
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    _, k_strides, v_strides, _, dk_t_strides, dv_t_strides = strides
    work = work_of(tl.program_id(0), Nk, Hkv, Nq, Nk, offset, extras.sequences, BLOCK_N, False)
    first = work.first
    if len(extras.sequences.cu_k) + len(extras.sequences.used_k) > 0:
        if first >= work.n_keys:
            return
    rule = Rule(side(left), side(right), scale.to(ACC))
    k_t_view, v_t_view = view_along(along.k, work, 1), view_along(along.v, work, 1)
    k = Pair(load_tile(key_view(k_ptr, k_strides, work, 1), first, D, BLOCK_N, True, TILE.wide),
             step_along(k_t_view, first, D, BLOCK_N, True, TILE))
    v = Pair(load_tile(key_view(v_ptr, v_strides, work, 1), first, DV, BLOCK_N, True, TILE.wide),
             step_along(v_t_view, first, DV, BLOCK_N, True, TILE))
    dk_t = zeros(D, BLOCK_N, ACC) if KIND.need_dk else 0
    dv_t = zeros(DV, BLOCK_N, ACC) if KIND.need_dv else 0

    swept = sweep_queries(tiles, work, rule, Hkv, Nq, Nk, len(extras.mods) > 0, KIND.group, TILE)
    sources = Sources(q_ptr, dout_ptr, rows, strides, work, Hkv * KIND.group, Nq)
    dk_t, dv_t = over_queries(dkv_tangent_step, (dk_t, dv_t), (k, v, along), sources, work, swept, rule, extras, Nq, KIND,
                              TILE)

    if KIND.need_dk:
        store_tile(key_view(dk_t_ptr, dk_t_strides, work, 1), first, scaled(dk_t, rule.scale), D, BLOCK_N, TILE.wide)
    if KIND.need_dv:
        if len(extras.dropout) > 0:
            dv_t = scaled(dv_t, extras.dropout.factor)
        store_tile(key_view(dv_t_ptr, dv_t_strides, work, 1), first, dv_t, DV, BLOCK_N, TILE.wide)


def _moving(along: Along) -> list[torch.Tensor]:
    return [x[0] for x in (along.q, along.k, along.v, along.dout) if x]


def dq_tangent_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, rows: Rows, dq_t: torch.Tensor,
                      along: Along, tiles: tuple[Any, ...], call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``dq_t`` [B, H, Nq, D]; the LSE of ``rows`` may come with its rest."""
    heads = q.shape[1]
    lse, call = with_lse(call, rows.lse)
    args = (
        q, k, v, dout, dq_t, rows._replace(lse=lse), call.strides(q, k, v, dout, dq_t),
        heads, call.n_queries, call.n_keys, call.offset, call.left, call.right, call.scale, call.extras, along, tiles,
        kind_of(heads // k.shape[1], q.shape[3], v.shape[3], accumulator(q.dtype), call.precision),
    )
    return Launch(dq_tangent_kernel, programs(call.n_queries, config.block_m, call.batch * heads), args,
                  fit_offsets(config, call, q, k, v, dout, dq_t, *_moving(along)))


def dkv_tangent_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, rows: Rows,
                       dk_t: torch.Tensor | None, dv_t: torch.Tensor | None, along: Along, tiles: tuple[Any, ...], call: Call,
                       *, config: TileConfig) -> Launch:
    """The launch that fills ``dk_t`` [B, Hkv, Nk, D] and ``dv_t`` [B, Hkv, Nk, Dv], either of which may be None."""
    kv_heads = k.shape[1]
    lse, call = with_lse(call, rows.lse)
    args = (
        q, k, v, dout, dk_t, dv_t, rows._replace(lse=lse),
        call.strides(q, k, v, dout, k if dk_t is None else dk_t, v if dv_t is None else dv_t),
        kv_heads, call.n_queries, call.n_keys, call.offset, call.left, call.right, call.scale, call.extras, along, tiles,
        keys_kind(q.shape[1] // kv_heads, q.shape[3], v.shape[3], accumulator(q.dtype), call.precision,
                  dk_t is not None, dv_t is not None, False),
    )
    wanted = [x for x in (dk_t, dv_t) if x is not None]
    return Launch(dkv_tangent_kernel, programs(call.n_keys, config.block_n, call.batch * kv_heads), args,
                  fit_offsets(config, call, q, k, v, dout, *wanted, *_moving(along)))
