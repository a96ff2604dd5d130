"""How what a call returns lies in memory: for the kernels, and for FakeTensors that stand for their results. Free of Triton."""

import torch

from fused_attn.spec import AttentionSpec, Companions


def accumulates(q: torch.Tensor) -> torch.dtype:
    """Type of sums and of the LSE of a call."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def like(x: torch.Tensor, head_dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Empty [B, H, N, head_dim] whose batch, heads and length lie in memory in the order they have in ``x``."""
    contiguous = x.is_contiguous()
    if contiguous and x.shape[3] == head_dim:
        return torch.empty_like(x, dtype=dtype)
    size, stride = (*x.shape[:3], head_dim), x.stride()[:3]
    if contiguous or 0 in stride:
        return x.new_empty(size, dtype=dtype)
    order = sorted(range(3), key=lambda dim: stride[dim], reverse=True)
    return torch.empty_permuted(size, (*order, 3), dtype=dtype or x.dtype, device=x.device)


def lse_stride(q: torch.Tensor) -> int:
    """Distance of two heads in the LSE of packed sequences: a multiple of 16, so that a new length never compiles."""
    return max(16, -(-q.shape[2] // 16) * 16)


def lse_like(q: torch.Tensor, packed: bool) -> torch.Tensor:
    """Empty LSE [B, H, N], or of packed sequences [1, H, T] that is -inf already."""
    if not packed:
        return q.new_empty(q.shape[:3], dtype=accumulates(q))
    rows = q.new_full((1, q.shape[1], lse_stride(q)), float("-inf"), dtype=accumulates(q))
    return rows[:, :, : q.shape[2]]


def keeps_residual(spec: AttentionSpec, companions: Companions) -> bool:
    """Whether the output is kept in twice its digits: with dropped weights that would not make delta exact.

    Additive scores always ask for it: their dQ sums dS with factors of one sign, 1 - tanh^2, so an error of delta, which is
    one for all keys, adds up there as it does under a large mean of K.
    """
    return (spec.precise or companions.score_weight is not None) and spec.dropout_p == 0
