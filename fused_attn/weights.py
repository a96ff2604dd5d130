"""The inspection kernels on one call: allocates what they return, chooses tiles, launches. As ``execution`` for attention."""

import torch

from fused_attn.kernels.inspection import launch_column_sums, launch_row_stats, launch_weights
from fused_attn.kernels.launch import Call
from fused_attn.layout import like_statistics, like_weights, lse_like
from fused_attn.lowering import lower
from fused_attn.spec import AttentionSpec, Companions, TileConfig
from fused_attn.targets import arch_of
from fused_attn.tuning import choose, choose_additive


def statistics(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec,
               companions: Companions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(received [B, H, Nk], entropy [B, H, Nq], maximum [B, H, Nq])."""
    call, config = _lowered(q, k, spec, companions)
    received, entropy, maximum = like_statistics(q, k)
    lse = lse_like(q, spec, packed=False)
    launch_row_stats(q, k, lse, entropy, maximum, companions.sinks, call, config=config)
    launch_column_sums(q, k, lse, received, call, config=config)
    return received, entropy, maximum


def weights(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, companions: Companions) -> torch.Tensor:
    """[B, H, Nq, Nk] in q's dtype."""
    call, config = _lowered(q, k, spec, companions)
    _, entropy, maximum = like_statistics(q, k)
    lse, p = lse_like(q, spec, packed=False), like_weights(q, k)
    launch_row_stats(q, k, lse, entropy, maximum, companions.sinks, call, config=config)
    launch_weights(q, k, lse, p, call, config=config)
    return p


def _lowered(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, companions: Companions) -> tuple[Call, TileConfig]:
    """The call as kernels take it, and tiles that hold one [BLOCK_M, BLOCK_N] of weights."""
    call = lower(q, k, spec, companions).call
    if call.extras.additive:
        return call, choose_additive("operand_grad", q.shape[3], arch_of(q.device))
    return call, choose("operand_grad", q.shape[3], 1, q.dtype, arch_of(q.device), True)
