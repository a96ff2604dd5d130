"""Backward: delta, then dQ by queries and dK, dV by keys: seven products, deterministic to the bit. The fused one takes five.

    P = exp(S - LSE), dV = P^T dO, dP = dO V^T, dS = P * (dP - delta) * mods'(S), dQ = scale dS K, dK = scale dS^T Q

with delta = rowsum(dO * O) - dLSE, since LSE's own gradient adds P * dLSE to dS; dropout scales P in dV, and dP, by the
same 0 or 1 / (1 - p). Source: Dao 2023, "FlashAttention-2". No sum is taken by atomics: a program owns its rows of dQ, or
of dK and dV for every query head of its group. In the fused kernel, the programs of dK and dV add their part of dQ by atomics,
whose order, and with it the last bits of dQ, differs from run to run.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_attn.call.spec import Kind, TileConfig
from fused_attn.kernels.dropout import dropout_keep
from fused_attn.kernels.launch import Call, Launch, accumulator, fit_offsets, kind_of, programs, with_lse
from fused_attn.kernels.mask import keep_tile
from fused_attn.kernels.operand import per_query
from fused_attn.kernels.product import Additive, products, pulled, weight_finish, weight_start, weight_step
from fused_attn.kernels.score import apply_mods
from fused_attn.kernels.softmax import LOG2E, load_lse, lse_views
from fused_attn.kernels.sweep import over_keys, over_queries, sweep_keys, sweep_queries
from fused_attn.kernels.tiles import (
    add_tile,
    inner,
    key_view,
    load_rows,
    load_tile,
    of_head,
    outer,
    outer_transposed,
    query_rows,
    query_view,
    row_products,
    scaled,
    store_rows,
    store_tile,
    work_of,
    zeros,
)
from fused_attn.kernels.window import Rule, side


@dataclass(frozen=True)
class KeysKind(Kind):
    """Which of dK and dV a kernel makes, and whether it adds up dQ as well."""

    need_dk: bool = True
    need_dv: bool = True
    fused: bool = False


keys_kind = functools.cache(KeysKind)


@triton.jit(do_not_specialize=["H", "Nq"])
def delta_kernel(out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, strides, H, Nq, sequences,
                 KIND: tl.constexpr, TILE: tl.constexpr):
    """delta [B, H, Nq] = rowsum(dO * O) - dLSE, for BLOCK_M rows of one head; ``dlse_ptr`` may be None."""
    BLOCK_M: tl.constexpr = TILE.block_m
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    out_strides, dout_strides = strides
    work = work_of(tl.program_id(0), Nq, H, Nq, 0, 0, sequences, BLOCK_M, False)
    first = work.first
    if len(sequences.cu_q) > 0:
        if first >= work.n_queries:
            return
    # [BLOCK_M, DV]
    out = load_tile(query_view(out_ptr, out_strides, work), first, DV, BLOCK_M, True, TILE.wide)
    dout = load_tile(query_view(dout_ptr, dout_strides, work), first, DV, BLOCK_M, True, TILE.wide)
    delta = row_products(out, dout, ACC)
    if dlse_ptr is not None:
        # The LSE of a row with no key is constant, whatever gradient comes (logaddexp(-inf, -inf) sends NaN).
        lse = load_rows(query_rows(lse_ptr, sequences, work, Nq), first, 0.0, BLOCK_M, True)
        dlse = load_rows(query_rows(dlse_ptr, sequences, work, Nq), first, 0.0, BLOCK_M, True)
        delta -= tl.where(lse == float("-inf"), 0.0, dlse)
    store_rows(query_rows(delta_ptr, sequences, work, Nq), first, delta, BLOCK_M)


@triton.jit
def weights_of(score, lse, place, rule, extras, TILE: tl.constexpr, KEYS_FIRST: tl.constexpr, MASKED: tl.constexpr):
    """P of a tile from its scores, which are raw where there are no mods, and natural logits where there are.

    ``lse`` is what ``load_lse`` returned for the tile's queries.
    """
    of_query = per_query(lse[0], KEYS_FIRST)
    if len(extras.mods) == 0:
        p = tl.exp2(score * (rule.scale * LOG2E) - of_query)
    else:
        exponent = (score - of_query) * LOG2E
        if len(lse) > 1:
            exponent -= per_query(lse[1], KEYS_FIRST)
        p = tl.exp2(exponent)
    if MASKED:
        # Where a key does not count, exp2 may have overflowed: select, never multiply by 0.
        p = tl.where(keep_tile(place, rule, extras.keeps, TILE, KEYS_FIRST), p, 0.0)
    if len(extras.mods) > 0 and (MASKED or len(extras.additive) > 0):
        # A user's function may give anything for the zeros past the last query, and sums over queries include them.
        p = tl.where(of_query == float("inf"), 0.0, p)
    return p


@triton.jit
def weights(raw, lse, place, rule, extras, MEMBER: tl.constexpr, ARG: tl.constexpr, TILE: tl.constexpr,
            KEYS_FIRST: tl.constexpr, TAIL_Q: tl.constexpr, MASKED: tl.constexpr):
    """(P of a tile from its raw scores, the derivative of the mods as in ``apply_mods``), in either orientation."""
    score, dmod = raw, 1.0
    if len(extras.mods) > 0:
        score, dmod = apply_mods(raw * rule.scale, place, extras.mods, MEMBER, ARG, TILE, KEYS_FIRST, TAIL_Q, MASKED)
    return weights_of(score, lse, place, rule, extras, TILE, KEYS_FIRST, MASKED), dmod


@triton.jit
def score_gradient(p, dp, delta, dmod, extras, MASKED: tl.constexpr):
    """dS = P * (dP - delta) * dmod, without the factor scale, which sums over it receive once at the end."""
    ds = p * (dp - delta) * dmod
    if MASKED and len(extras.mods) > 0:  # where no pair attends, the slope of a mod may be anything
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def dq_step(state, held, views, place, rule, extras, KIND: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the BLOCK_N keys of ``place`` contribute to dQ, and to the gradient of an additive score's weights."""
    BLOCK_N: tl.constexpr = TILE.block_n
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    dq, dw = state
    q, dout, lse, delta = held
    k_view, v_view = views
    # [BLOCK_N, D], [BLOCK_N, DV]
    k = load_tile(k_view, place.k_first, KIND.dim, BLOCK_N, MASKED, TILE.wide)
    v = load_tile(v_view, place.k_first, KIND.dim_v, BLOCK_N, MASKED, TILE.wide)
    # [BLOCK_M, BLOCK_N]
    raw = products(q, k, place.head, extras.additive, KIND)
    p, dmod = weights(raw, lse, place, rule, extras, -1, 0, TILE, False, True, MASKED)
    dp = inner(dout, v, ACC, PRECISION)
    if len(extras.dropout) > 0:
        dp = tl.where(dropout_keep(extras.dropout, place, TILE, False), dp * extras.dropout.factor, 0.0)
    ds = score_gradient(p, dp, delta[:, None], dmod, extras, MASKED)
    return pulled(ds, q, k, dq, place.head, extras.additive, KIND), weight_step(dw, ds, q, k, extras.additive, ACC)


@triton.jit(do_not_specialize=["H", "Nq", "Nk", "offset", "left", "right"])
def dq_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, strides,
              H, Nq, Nk, offset, left, right, scale: tl.float64, extras, tiles, KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: dQ of BLOCK_M queries of one head, over the keys in their window. ``strides``: of q, k, v, dout, dq."""
    BLOCK_M: tl.constexpr = TILE.block_m
    D: tl.constexpr = KIND.dim
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    q_strides, k_strides, v_strides, dout_strides, dq_strides = strides
    work = work_of(tl.program_id(0), Nq, H, Nq, Nk, offset, extras.sequences, BLOCK_M, right is not None)
    first = work.first
    if len(extras.sequences.cu_q) > 0:
        if first >= work.n_queries:
            return
    rule = Rule(side(left), side(right), scale.to(ACC))
    # [BLOCK_M, D], [BLOCK_M, DV], [BLOCK_M], [BLOCK_M]
    q = load_tile(query_view(q_ptr, q_strides, work), first, D, BLOCK_M, True, TILE.wide)
    dout = load_tile(query_view(dout_ptr, dout_strides, work), first, DV, BLOCK_M, True, TILE.wide)
    lse = load_lse(lse_views(lse_ptr, extras, work, Nq), first, extras, BLOCK_M, True)
    delta = load_rows(query_rows(delta_ptr, extras.sequences, work, Nq), first, 0.0, BLOCK_M, True)
    k_view = key_view(k_ptr, k_strides, work, KIND.group)
    v_view = key_view(v_ptr, v_strides, work, KIND.group)
    state = zeros(D, BLOCK_M, ACC), weight_start(extras.additive, D, ACC)
    sweep = sweep_keys(tiles, work, rule, H, Nq, Nk, TILE)
    dq, dw = over_keys(dq_step, state, (q, dout, lse, delta), (k_view, v_view), work, sweep, rule, extras, KIND, TILE)
    store_tile(query_view(dq_ptr, dq_strides, work), first, scaled(dq, rule.scale), D, BLOCK_M, TILE.wide)
    weight_finish(dw, rule.scale, extras.additive, D)


class QueryViews(NamedTuple):
    """What a program of keys reads of one query head, and where it adds to dQ."""

    q: Any
    dout: Any
    lse: Any
    delta: Any
    dq: Any


class QuerySources(NamedTuple):
    """Where a program of keys finds its QueryViews: ``pointers`` to q, dout, lse, delta and dq, the ``strides`` of
    ``dkv_kernel``, its work, the number of query heads, and Nq."""

    pointers: Any
    strides: Any
    work: Any
    H: Any
    Nq: Any


@triton.jit
def query_views(sources, head, extras, FUSED: tl.constexpr):
    """The QueryViews of one query head."""
    pointers, strides, work, H, Nq = sources
    own = of_head(work, head, H)
    return QueryViews(query_view(pointers[0], strides[0], own), query_view(pointers[1], strides[3], own),
                      lse_views(pointers[2], extras, own, Nq), query_rows(pointers[3], extras.sequences, own, Nq),
                      query_view(pointers[4], strides[6], own) if FUSED else 0)


@triton.jit
def dkv_step(state, held, sources, place, rule, extras, KIND: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Adds what the BLOCK_M queries of ``place`` contribute to dK and dV; if fused, also what the keys contribute to their dQ.

    Tiles are transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands straight from registers.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    ACC: tl.constexpr = KIND.acc
    PRECISION: tl.constexpr = KIND.precision
    dk, dv = state
    k, v = held
    views = query_views(sources, place.head, extras, KIND.fused)
    # [BLOCK_M, D], [BLOCK_M, DV]
    q = load_tile(views.q, place.q_first, KIND.dim, BLOCK_M, MASKED, TILE.wide)
    lse = load_lse(views.lse, place.q_first, extras, BLOCK_M, MASKED)
    dout = load_tile(views.dout, place.q_first, KIND.dim_v, BLOCK_M, MASKED, TILE.wide)
    raw = products(k, q, place.head, extras.additive, KIND)
    p, dmod = weights(raw, lse, place, rule, extras, -1, 0, TILE, True, MASKED, MASKED)
    if len(extras.dropout) > 0:
        stays = dropout_keep(extras.dropout, place, TILE, True)
    if KIND.need_dv:
        dropped = p
        if len(extras.dropout) > 0:
            dropped = tl.where(stays, p, 0.0)
        dv = outer(dropped.to(dout[0].dtype), dout, dv, ACC, PRECISION)
    if KIND.need_dk:
        delta = load_rows(views.delta, place.q_first, 0.0, BLOCK_M, MASKED)
        dp = inner(v, dout, ACC, PRECISION)
        if len(extras.dropout) > 0:
            dp = tl.where(stays, dp * extras.dropout.factor, 0.0)
        ds = score_gradient(p, dp, delta[None, :], dmod, extras, MASKED)
        dk = pulled(ds, k, q, dk, place.head, extras.additive, KIND)
        if KIND.fused:
            part = outer_transposed(ds.to(k[0].dtype), k, ACC, PRECISION)
            add_tile(views.dq, place.q_first, part, KIND.dim, BLOCK_M, TILE)
    return dk, dv


@triton.jit(do_not_specialize=["Hkv", "Nq", "Nk", "offset", "left", "right"])
def dkv_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dq_ptr, strides,
               Hkv, Nq, Nk, offset, left, right, scale: tl.float64, extras, tiles, KIND: tl.constexpr, TILE: tl.constexpr):
    """One program: dK and dV of BLOCK_N keys of one key head, over the queries of its whole group in their window.

    ``strides`` are those of q, k, v, dout, dk, dv and dq. ``KIND``, a KeysKind, tells which of dk and dv are wanted, and
    whether dq [B, H, Nq, D], zeros in the accumulator's type, is to receive dQ without its factor ``scale``. What is not wanted
    is None.
    """
    BLOCK_N: tl.constexpr = TILE.block_n
    D: tl.constexpr = KIND.dim
    DV: tl.constexpr = KIND.dim_v
    ACC: tl.constexpr = KIND.acc
    _, k_strides, v_strides, _, dk_strides, dv_strides, _ = strides
    work = work_of(tl.program_id(0), Nk, Hkv, Nq, Nk, offset, extras.sequences, BLOCK_N, False)
    first = work.first
    if len(extras.sequences.cu_k) + len(extras.sequences.used_k) > 0:
        if first >= work.n_keys:
            return
    rule = Rule(side(left), side(right), scale.to(ACC))
    # [BLOCK_N, D], [BLOCK_N, DV]
    k = load_tile(key_view(k_ptr, k_strides, work, 1), first, D, BLOCK_N, True, TILE.wide)
    v = load_tile(key_view(v_ptr, v_strides, work, 1), first, DV, BLOCK_N, True, TILE.wide)
    # A sum that is not wanted is a plain 0, which takes no registers.
    dk = zeros(D, BLOCK_N, ACC) if KIND.need_dk else 0
    dv = zeros(DV, BLOCK_N, ACC) if KIND.need_dv else 0

    # Keys past the end only make rows of dK and dV that are never stored. But dQ sums over keys, and there a weight that should
    # be 0 is exp(0 - LSE), infinite for an LSE below -88; and a mod may read an operand there.
    swept = sweep_queries(tiles, work, rule, Hkv, Nq, Nk, KIND.fused or len(extras.mods) > 0, KIND.group, TILE)
    pointers = q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr if KIND.fused else 0
    sources = QuerySources(pointers, strides, work, Hkv * KIND.group, Nq)
    dk, dv = over_queries(dkv_step, (dk, dv), (k, v), sources, work, swept, rule, extras, Nq, KIND, TILE)

    if KIND.need_dk:
        store_tile(key_view(dk_ptr, dk_strides, work, 1), first, scaled(dk, rule.scale), D, BLOCK_N, TILE.wide)
    if KIND.need_dv:
        if len(extras.dropout) > 0:
            dv = scaled(dv, extras.dropout.factor)
        store_tile(key_view(dv_ptr, dv_strides, work, 1), first, dv, DV, BLOCK_N, TILE.wide)


def delta_launch(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None,
                 delta: torch.Tensor, call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``delta`` [B, H, Nq]; ``dlse`` must be laid out like it and ``lse``.

    ``lse`` may come with its rest.
    """
    heads = out.shape[1]
    lse, _ = with_lse(call, lse)
    args = (out, dout, lse, dlse, delta, call.strides(out, dout), heads, call.n_queries, call.extras.sequences,
            kind_of(1, 0, out.shape[3], accumulator(out.dtype)))
    return Launch(delta_kernel, programs(call.n_queries, config.block_m, call.batch * heads), args,
                  fit_offsets(config, call, out, dout))


def dq_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor,
              delta: torch.Tensor, dq: torch.Tensor, tiles: tuple[Any, ...], call: Call, *, config: TileConfig) -> Launch:
    """The launch that fills ``dq`` [B, H, Nq, D]; ``lse`` is [B, H, Nq], or with its rest [2, B, H, Nq]."""
    heads = q.shape[1]
    lse, call = with_lse(call, lse)
    args = (
        q, k, v, dout, lse, delta, dq, call.strides(q, k, v, dout, dq),
        heads, call.n_queries, call.n_keys, call.offset, call.left, call.right, call.scale, call.extras, tiles,
        kind_of(heads // k.shape[1], q.shape[3], v.shape[3], accumulator(q.dtype), call.precision),
    )
    return Launch(dq_kernel, programs(call.n_queries, config.block_m, call.batch * heads), args,
                  fit_offsets(config, call, q, k, v, dout, dq))


def with_weight_sums(call: Call, q: torch.Tensor, config: TileConfig) -> tuple[Call, torch.Tensor]:
    """(``call``, parts [B, H, tiles, D]); dQ of this call leaves the gradient of an additive score's weights in the parts.

    Programs past the end of their sequence write nothing, so the parts begin as 0.
    """
    heads, head_dim = q.shape[1], q.shape[3]
    tiles = programs(call.n_queries, config.block_m, 1)
    parts = torch.zeros(call.batch, heads, tiles, head_dim, device=q.device,
                        dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    weight, stride, *_ = call.extras.additive
    return call._replace(extras=call.extras._replace(additive=Additive(weight, stride, (parts,)))), parts


def dkv_launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor,
               delta: torch.Tensor, dk: torch.Tensor | None, dv: torch.Tensor | None, tiles: tuple[Any, ...], call: Call,
               *, config: TileConfig, dq: torch.Tensor | None = None) -> Launch:
    """The launch that fills ``dk`` [B, Hkv, Nk, D] and ``dv`` [B, Hkv, Nk, Dv], summed over each group; either may be None.

    ``lse`` is as in ``dq_launch``. ``dq`` [B, H, Nq, D] of the accumulator's type, if given, gains dQ without its ``scale``.
    """
    kv_heads = k.shape[1]
    wanted = [grad for grad in (dk, dv) if grad is not None]
    lse, call = with_lse(call, lse)
    args = (
        q, k, v, dout, lse, delta, dk, dv, dq,
        call.strides(q, k, v, dout, k if dk is None else dk, v if dv is None else dv, q if dq is None else dq),
        kv_heads, call.n_queries, call.n_keys, call.offset, call.left, call.right, call.scale, call.extras, tiles,
        keys_kind(q.shape[1] // kv_heads, q.shape[3], v.shape[3], accumulator(q.dtype), call.precision,
                  dk is not None, dv is not None, dq is not None),
    )
    config = fit_offsets(config, call, q, k, v, dout, *wanted, q if dq is None else dq)
    return Launch(dkv_kernel, programs(call.n_keys, config.block_n, call.batch * kv_heads), args, config)
