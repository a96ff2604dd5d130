"""The inspection kernels on a described call."""

import torch

from fused_attn import ops  # noqa: F401  # repairs Triton's interpreter where that is what runs
from fused_attn.describe import Described
from fused_attn.kernels.inspection import launch_column_sums, launch_row_stats, launch_weights
from fused_attn.lowering import lower
from fused_attn.spec import TileConfig
from fused_attn.tuning import arch_of, choose


@torch.no_grad()
def run_stats(call: Described) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(received [B, H, Nk], entropy [B, H, Nq], maximum [B, H, Nq])."""
    _, received, entropy, maximum = _stats(call, columns=True)
    return received, entropy, maximum


@torch.no_grad()
def run_weights(call: Described) -> torch.Tensor:
    """Weights [B, H, Nq, Nk] in q's dtype."""
    lse, *_ = _stats(call, columns=False)
    q, k = call.q, call.k
    lowered = lower(q, k, call.spec, call.companions).call
    p = q.new_empty(*q.shape[:3], k.shape[2])
    launch_weights(q, k, lse, p, lowered, config=_config(call))
    return p


def _config(call: Described) -> TileConfig:
    return choose("operand_grad", call.q.shape[3], 1, call.q.dtype, arch_of(call.q.device), True)


def _stats(call: Described, columns: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = call.q, call.k
    lowered = lower(q, k, call.spec, call.companions).call
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse, entropy, maximum = (q.new_empty(q.shape[:3], dtype=sums) for _ in range(3))
    launch_row_stats(q, k, lse, entropy, maximum, call.companions.sinks, lowered, config=_config(call))
    received = q.new_empty(*q.shape[:2], k.shape[2], dtype=sums)
    if columns:
        launch_column_sums(q, k, lse, received, lowered, config=_config(call))
    return lse, received, entropy, maximum
