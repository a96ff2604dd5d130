"""One call on the kernels: allocates what it returns, chooses tiles, launches. What ops and eager calls share."""

import functools
from typing import Any

import torch

from fused_attn import rungs, tuned
from fused_attn.kernels.backward import launch_delta, launch_dkv, launch_dq, with_weight_sums
from fused_attn.kernels.combine import launch_combine
from fused_attn.kernels.forward import Split, launch_forward
from fused_attn.kernels.launch import Call, with_lse
from fused_attn.kernels.mask import list_tiles
from fused_attn.kernels.operand_grad import launch_operand_grad
from fused_attn.kernels.rotary import launch_rotary
from fused_attn.layout import accumulates, check_rotary, keeps_residual, like, lse_like, lse_stride, rows_like
from fused_attn.lowering import lower
from fused_attn.schema import Needs, Saved
from fused_attn.spec import AttentionSpec, Companions, TileConfig
from fused_attn.targets import arch_of
from fused_attn.tuning import (
    FEW_QUERIES,
    Kernel,
    choose,
    choose_additive,
    choose_combine,
    choose_fused,
    choose_gluon_backward,
    choose_rotary,
    choose_rung,
    choose_shares,
    fit_operands,
    n_shares,
    unseen_keys,
)


def _as_rows(x: torch.Tensor, q: torch.Tensor, packed: bool) -> torch.Tensor:
    """``x`` as ``rows_like`` lays it out: gradients, and saved tensors that a hook moved, may have other strides."""
    fits = x.stride()[-2:] == (lse_stride(q), 1) if packed else x.is_contiguous()
    return x if fits else rows_like(q, packed, *x.shape[:-3]).copy_(x)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
            companions: Companions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out, lse as ``lse_like`` makes it, and what rounding took from out where the call keeps it)."""
    call = lower(q, k, spec, companions).call
    packed = companions.cu_q is not None
    precise = keeps_residual(spec, companions)
    if call.n_queries <= FEW_QUERIES and not precise and companions.score_weight is None:
        near_k, near_v, near = _without_unseen(k, v, spec, companions, call)
        count = n_shares(q.shape[2], near_k.shape[2], near.n_queries, near.n_keys, q.shape[1] // k.shape[1])
        if count > 1:
            return *_forward_in_shares(q, near_k, near_v, spec, companions, near, count), None
    out, lse = like(q, v.shape[3], accumulates(q) if precise else None), lse_like(q, spec, packed)
    if packed:  # rows of no sequence are no program's
        out.zero_()
    rung = rungs.rung("forward", q, k, v, spec, companions)
    if rung == "gluon":
        from fused_attn.kernels.hopper import forward as gluon_forward  # here: Gluon is imported where it is asked for

        gluon_forward.launch_forward(q, k, v, out, lse, companions.sinks, spec.softcap, call,
                                     config=choose_rung(rung, q.shape[3], v.shape[3]))
        return out, lse, None
    config = _config("forward", q, v, call) if rung == "pointers" else _rung_config(rung, q, v, call)
    tiles = list_tiles(call, q, k, config, keys_first=False)
    launch_forward(q, k, v, out, lse, companions.sinks, tiles, call, config=config, precise=precise)
    if not precise:
        return out, lse, None
    rounded = like(q, out.shape[3]).copy_(out)
    return rounded, lse, like(q, out.shape[3]).copy_(out.sub_(rounded))


def _forward_in_shares(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, companions: Companions,
                       call: Call, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), the keys in ``count`` shares, each with a result of its own, and these joined."""
    packed = companions.cu_q is not None
    lse = lse_like(q, spec, packed)
    shares = lse.new_empty((count, *q.shape[:3], v.shape[3]))
    # [count, B, H, rows] or [2, count, B, H, rows]. Rows of no sequence are no program's: their LSE says that nothing is there.
    shape = (*lse.shape[:-3], count, *lse.shape[-3:-1], lse.stride(-2) if packed else lse.shape[-1])
    shares_lse = lse.new_full(shape, float("-inf")) if packed else lse.new_empty(shape)
    rows, outs, split = q, shares.flatten(0, 1), Split(shares.stride(0), shares_lse.stride(-4))
    if _groups_into_rows(q, k, spec, companions, call):
        # [B, Hkv, group, D]: the query heads of a key head as the rows of one tile, so that keys are read once.
        rows, outs = (x[:, :, 0].unflatten(1, (k.shape[1], -1)) for x in (q, outs))
        call = call._replace(n_queries=rows.shape[2], left=None, right=None)
    config = _shares_config(q, v, call)
    tiles = list_tiles(call, rows, k, config, keys_first=False)
    launch_forward(rows, k, v, outs, shares_lse.flatten(-4, -3), None, tiles, call, config=config, split=split,
                   n_shares=count)
    out = like(q, v.shape[3])
    launch_combine(shares, shares_lse, out, lse, companions.sinks, config=choose_combine(v.shape[3]))
    return out, lse


def _groups_into_rows(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, companions: Companions, call: Call) -> bool:
    """Whether the query heads of a group may be rows of one tile: they have one query each, nothing tells heads apart, and
    the window keeps every key."""
    plain = not (spec.score_mods or spec.mask_mods or spec.dropout_p) and companions.cu_q is None
    every = ((call.left is None or call.left >= call.offset)
             and (call.right is None or call.offset + call.right >= call.n_keys - 1))
    return plain and every and q.shape[2] == 1 and q.shape[1] > k.shape[1]


def _shares_config(q: torch.Tensor, v: torch.Tensor, call: Call) -> TileConfig:
    config = choose_shares(call.n_queries, q.shape[3], v.shape[3], q.dtype, arch_of(q.device))
    return fit_operands(config, call.loaded_bytes, q.dtype) if call.loaded_bytes else config


def _without_unseen(k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, companions: Companions,
                    call: Call) -> tuple[torch.Tensor, torch.Tensor, Call]:
    """k and v from the first key on that the window of some query reaches, where positions are all that tells keys apart."""
    first = unseen_keys(spec, companions, call.n_queries, call.n_keys)
    if first == 0:
        return k, v, call
    call = call._replace(offset=call.offset - first, n_keys=call.n_keys - first)
    return k[:, :, first:], v[:, :, first:], call


def _config(kernel: Kernel, q: torch.Tensor, v: torch.Tensor, call: Call) -> TileConfig:
    if call.extras.additive:
        return choose_additive(kernel, q.shape[3], arch_of(q.device))
    config = choose(kernel, q.shape[3], v.shape[3], q.dtype, arch_of(q.device), call.heavy)
    if not call.heavy:
        config = tuned.instead(config, kernel, q, v)
    return fit_operands(config, call.loaded_bytes, q.dtype) if call.loaded_bytes else config


def _rung_config(rung: str, q: torch.Tensor, v: torch.Tensor, call: Call) -> TileConfig:
    config = choose_rung(rung, q.shape[3], v.shape[3], call.heavy)
    return fit_operands(config, call.loaded_bytes, q.dtype) if call.loaded_bytes else config


def backward(saved: Saved, spec: AttentionSpec, companions: Companions, needs: Needs) -> tuple[Any, ...]:
    """(dq, dk, dv, dsinks, dscore_weight, [of each operand]), None for every gradient that nobody asked for."""
    dout, dlse, q, k, v, out, residual, lse = saved
    dq, dk, dv = (like(x, x.shape[3]) if need else None for x, need in ((q, needs.dq), (k, needs.dk), (v, needs.dv)))
    packed = companions.cu_q is not None
    if packed or companions.used_k is not None:  # rows that do not count are no program's
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
    call, roles = lower(q, k, spec, companions)
    lse = _as_rows(lse, q, packed)

    if (dq is not None and dk is not None and dv is not None
            and rungs.rung("backward", q, k, v, spec, companions) == "gluon"):
        delta = _gluon_backward(saved, lse, dq, dk, dv, call)
        dsinks = _sinks_gradient(lse, delta, companions.sinks) if needs.dsinks else None
        return dq, dk, dv, dsinks, None, [None] * len(companions.operands)
    config = functools.partial(_config, q=q, v=v, call=call)
    delta, _ = with_lse(call, lse)  # where only dV is wanted delta is not read
    dsinks = dscore_weight = None
    if needs.dq or needs.dk or needs.dsinks or needs.dscore_weight or any(needs.doperands):
        delta = _delta(dout, dlse, q, out, residual, lse, call, config("delta"))
        if needs.dsinks:
            dsinks = _sinks_gradient(lse, delta, companions.sinks)
    fused = _fused_config(q, v, spec, call, needs)
    if fused is not None:
        total = like(q, q.shape[3], accumulates(q)).zero_()
        launch_dkv(q, k, v, dout, lse, delta, dk, dv, (), call, dq=total, config=fused)
        dq = torch.mul(total, call.scale, out=dq)
        return dq, dk, dv, dsinks, None, [None] * len(companions.operands)
    if needs.dq or needs.dscore_weight:
        tiles = list_tiles(call, q, k, config("dq"), keys_first=False)
        summing, parts = with_weight_sums(call, q, config("dq")) if needs.dscore_weight else (call, None)
        launch_dq(q, k, v, dout, lse, delta, like(q, q.shape[3]) if dq is None else dq, tiles, summing, config=config("dq"))
        if parts is not None:
            dscore_weight = parts.sum((0, 2)).to(companions.score_weight.dtype)
    if needs.dk or needs.dv:
        tiles = list_tiles(call, q, k, config("dkv"), keys_first=True)
        launch_dkv(q, k, v, dout, lse, delta, dk, dv, tiles, call, config=config("dkv"))
    doperands: list[torch.Tensor | None] = []
    for operand, role, need in zip(companions.operands, roles, needs.doperands, strict=True):
        if not need or role is None:
            doperands.append(None)
            continue
        grad = launch_operand_grad(q, k, v, dout, lse, delta, operand, *role, call, config=config("operand_grad"))
        # As the FakeTensor has it: sums by k - q are a part of a longer line.
        doperands.append(grad.clone(memory_format=torch.contiguous_format) if operand.dim() == 3 else grad)
    return dq, dk, dv, dsinks, dscore_weight, doperands


def _fused_config(q: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, call: Call, needs: Needs) -> TileConfig | None:
    """The tiles that make all gradients in one kernel, where its atomics are allowed and registers have room for it."""
    if spec.deterministic or call.extras.mods or call.extras.keeps or call.extras.dropout or call.extras.additive:
        return None
    config = choose_fused(q.shape[3], v.shape[3], q.dtype, arch_of(q.device)) if needs.dq and needs.dk and needs.dv else None
    return None if config is None else tuned.instead(config, "fused", q, v)


def _delta(dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None,
           lse: torch.Tensor, call: Call, config: TileConfig) -> torch.Tensor:
    packed = bool(call.extras.sequences.cu_q)
    delta = rows_like(q, packed)
    launch_delta(out, dout, lse, None if dlse is None else _as_rows(dlse, q, packed), delta, call, config=config)
    if residual is not None:
        rest = rows_like(q, packed)
        launch_delta(residual, dout, lse, None, rest, call, config=config)
        delta += rest
    return delta


def _sinks_gradient(lse: torch.Tensor, delta: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Of a key of value 0: its dP is 0."""
    lse, rest = (lse, 0.0) if lse.dim() == 3 else lse
    weight = torch.where(lse == float("-inf"), 0.0, torch.exp(sinks.to(lse.dtype)[None, :, None] - lse - rest))
    return -torch.where(weight == 0, 0.0, weight * delta).sum((0, 2)).to(sinks.dtype)


def _gluon_backward(saved: Saved, lse: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
                    call: Call) -> torch.Tensor:
    """Fills dq, dk and dv by Hopper's Gluon kernel; returns delta [B, H, Nq]."""
    from fused_attn.kernels.hopper import backward as gluon  # here: Gluon is imported where it is asked for
    from fused_attn.kernels.hopper import workspace
    from fused_attn.kernels.hopper.problem import describable, tile_width

    dout, dlse, q, k, v, out, *_ = saved
    if not describable(dout):  # a sum's gradient is one expanded number
        dout = dout.clone(memory_format=torch.contiguous_format)
    config = choose_gluon_backward(q.shape[3], v.shape[3])
    around = TileConfig(config.block_m, config.block_n, num_warps=4, num_stages=1)
    tiles = -(-call.n_queries // config.block_m)
    rows = call.batch * q.shape[1] * tiles
    stats = lse.new_empty(2, rows, config.block_m)
    sums = lse.new_zeros(rows, config.block_m * tile_width(q.shape[3]))
    workspace.launch_statistics(out, dout, lse, None if dlse is None else _as_rows(dlse, q, False), stats, call, config=around)
    gluon.launch_backward(q, k, v, dout, stats, sums, dk, dv, call, config=config)
    workspace.launch_ordered(sums, dq, call, config=around)
    return stats[1].view(call.batch, q.shape[1], tiles * config.block_m)[:, :, : call.n_queries]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    """x [B, H, N, D] turned, or turned back."""
    check_rotary(x, cos, sin)
    out = like(x, x.shape[3])
    launch_rotary(x, cos, sin, out, interleaved, back, config=choose_rotary(x.shape[3]))
    return out
