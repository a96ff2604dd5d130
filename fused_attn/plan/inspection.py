"""The steps of what is made beside attention itself: its weights, statistics of them, and rotary positions."""

from collections.abc import Generator

import torch

from fused_attn.call.layout import Statistics, check_rotary, like, like_statistics, like_weights, lse_like
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.inspection import column_sums_launch, row_stats_launch, weights_launch
from fused_attn.kernels.launch import Launch
from fused_attn.kernels.rotary import rotary_launch
from fused_attn.plan.problem import Problem
from fused_attn.plan.tiles import choose_rotary


def statistics(problem: Problem) -> Generator[Launch, None, Statistics]:
    """Makes the received weight, entropy, maximum and distance."""
    q, k, config = problem.q, problem.k, problem.config("operand_grad")  # whose tiles hold one [BLOCK_M, BLOCK_N] of weights
    received, entropy, maximum, distance = like_statistics(q, k)
    lse = lse_like(q, problem.spec, packed=False)
    yield row_stats_launch(q, k, lse, entropy, maximum, distance, problem.others.sinks, problem.call, config=config)
    yield column_sums_launch(q, k, lse, received, problem.call, config=config)
    return received, entropy, maximum, distance


def weights(problem: Problem) -> Generator[Launch, None, torch.Tensor]:
    """Makes the weights [B, H, Nq, Nk] in q's dtype."""
    q, k, config = problem.q, problem.k, problem.config("operand_grad")
    _, entropy, maximum, _ = like_statistics(q, k)
    lse, p = lse_like(q, problem.spec, packed=False), like_weights(q, k)
    yield row_stats_launch(q, k, lse, entropy, maximum, None, problem.others.sinks, problem.call, config=config)
    yield weights_launch(q, k, lse, p, problem.call, config=config)
    return p


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool,
           config: TileConfig | None = None) -> Generator[Launch, None, torch.Tensor]:
    """Makes x [B, H, N, D] turned by its rotary positions, or turned back."""
    check_rotary(x, cos, sin)
    out = like(x, x.shape[3])
    config = choose_rotary(x.shape[3]) if config is None else config
    yield rotary_launch(x, cos, sin, out, interleaved, back, config=config)
    return out
