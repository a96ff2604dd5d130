"""The inspection kernels on a described call."""

import torch

from fused_attn.describe import Described
from fused_attn.kernels.inspection import launch_column_sums, launch_row_stats, launch_weights
from fused_attn.kernels.launch import Call
from fused_attn.layout import lse_like
from fused_attn.lowering import lower
from fused_attn.spec import TileConfig
from fused_attn.tuning import arch_of, choose, choose_additive


@torch.no_grad()
def run_stats(call: Described) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(received [B, H, Nk], entropy [B, H, Nq], maximum [B, H, Nq])."""
    q, k = call.q, call.k
    lowered, config = _lowered(call)
    lse, entropy, maximum = _row_stats(call, lowered, config)
    received = entropy.new_empty(*q.shape[:2], k.shape[2])
    launch_column_sums(q, k, lse, received, lowered, config=config)
    return received, entropy, maximum


@torch.no_grad()
def run_weights(call: Described) -> torch.Tensor:
    """Weights [B, H, Nq, Nk] in q's dtype."""
    q, k = call.q, call.k
    lowered, config = _lowered(call)
    lse, _, _ = _row_stats(call, lowered, config)
    p = q.new_empty(*q.shape[:3], k.shape[2])
    launch_weights(q, k, lse, p, lowered, config=config)
    return p


def _lowered(call: Described) -> tuple[Call, TileConfig]:
    """The call as kernels take it, and tiles that hold one [BLOCK_M, BLOCK_N] of weights."""
    lowered = lower(call.q, call.k, call.spec, call.companions).call
    if lowered.extras.additive:
        return lowered, choose_additive("operand_grad", call.q.shape[3], arch_of(call.q.device))
    return lowered, choose("operand_grad", call.q.shape[3], 1, call.q.dtype, arch_of(call.q.device), True)


def _row_stats(call: Described, lowered: Call, config: TileConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(lse as ``lse_like`` makes it, entropy [B, H, Nq], maximum [B, H, Nq])."""
    lse = lse_like(call.q, call.spec, packed=False)
    entropy, maximum = (lse.new_empty(call.q.shape[:3]) for _ in range(2))
    launch_row_stats(call.q, call.k, lse, entropy, maximum, call.companions.sinks, lowered, config=config)
    return lse, entropy, maximum
