"""How the results of a call lie in memory, for the kernels and for FakeTensors that stand for results. Free of Triton."""

from typing import TypeAlias

import torch

from fused_attn.call.spec import AttentionSpec, OtherTensors

# received [B, H, Nk], entropy, maximum and distance [B, H, Nq]
Statistics: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def accumulates(q: torch.Tensor) -> torch.dtype:
    """Type of sums and of the LSE of a call."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def like(x: torch.Tensor, head_dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty [B, H, N, head_dim] whose batch, heads and length lie in memory in the same order as those of ``x``."""
    contiguous = x.is_contiguous()
    if contiguous and x.shape[3] == head_dim:
        return torch.empty_like(x, dtype=dtype)
    size, stride = (*x.shape[:3], head_dim), x.stride()[:3]
    if contiguous or 0 in stride:
        return x.new_empty(size, dtype=dtype)
    order = sorted(range(3), key=lambda dim: stride[dim], reverse=True)
    return torch.empty_permuted(size, (*order, 3), dtype=dtype or x.dtype, device=x.device)


def packed_rows(n: int) -> tuple[int, int]:
    """A number of rows as (n rounded up to a multiple of 16, 16 times what that added).

    Triton compiles a kernel anew when an integer in a tuple becomes a multiple of 16, or 1. These two always are multiples of
    16 and never are 1, so that a new length does not compile.
    """
    up = max(16, -(-n // 16) * 16)
    return up, 16 * (up - n)


def lse_stride(q: torch.Tensor) -> int:
    """Distance of two heads in the LSE of packed sequences."""
    return packed_rows(q.shape[2])[0]


def rows_like(q: torch.Tensor, packed: bool, *leading: int) -> torch.Tensor:
    """An empty [*leading, B, H, N], one number a query; for packed sequences [*leading, 1, H, T], filled with -inf."""
    if not packed:
        return q.new_empty((*leading, *q.shape[:3]), dtype=accumulates(q))
    rows = q.new_full((*leading, 1, q.shape[1], lse_stride(q)), float("-inf"), dtype=accumulates(q))
    return rows[..., : q.shape[2]]


def as_rows(x: torch.Tensor, q: torch.Tensor, packed: bool) -> torch.Tensor:
    """``x`` in the layout of ``rows_like``: gradients, and saved tensors that a hook moved, may have other strides."""
    fits = x.stride()[-2:] == (lse_stride(q), 1) if packed else x.is_contiguous()
    return x if fits else rows_like(q, packed, *x.shape[:-3]).copy_(x)


def lse_like(q: torch.Tensor, spec: AttentionSpec, packed: bool) -> torch.Tensor:
    """The empty LSE of a call, as ``rows_like`` or, where a mod may give scores of any size, two of these: LSE and its rest."""
    if spec.blocked:
        return q.new_empty(q.shape[:3], dtype=accumulates(q))
    return rows_like(q, packed, 2) if spec.score_mods else rows_like(q, packed)


def like_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Empty [B, H, Nq, Nk] in q's dtype."""
    return q.new_empty(*q.shape[:3], k.shape[2])


def like_statistics(q: torch.Tensor, k: torch.Tensor) -> Statistics:
    """Empty received, entropy, maximum and distance."""
    received = q.new_empty(*q.shape[:2], k.shape[2], dtype=accumulates(q))
    return received, received.new_empty(q.shape[:3]), received.new_empty(q.shape[:3]), received.new_empty(q.shape[:3])


def keeps_residual(spec: AttentionSpec, others: OtherTensors) -> bool:
    """Whether the output is kept in twice its digits. With dropout it is not, as that would not make delta exact.

    Additive scores always need it: their dQ sums dS with factors of one sign, 1 - tanh^2, so an error of delta, which is
    the same for all keys, adds up there as it does under a large mean of K.
    """
    return (spec.precise or others.score_weight is not None) and spec.dropout_p == 0 and not spec.blocked


def check_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Checks what the kernel trusts: the tables have a row for every row of x, and no more pairs than x has columns for."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floats [batch, heads, length, head_dim]; got {x.dtype} of shape {tuple(x.shape)}")
    batch, _, length, head_dim = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        fits = (table.dim() == 3 and table.shape[0] == batch and table.shape[1] == length
                and table.shape[2] == cos.shape[2] and 0 < 2 * table.shape[2] <= head_dim)
        if not fits or not table.is_floating_point() or table.device != x.device:
            raise ValueError(f"{name}: expected floats [{batch}, {length}, pairs] on {x.device} with at most {head_dim // 2} "
                             f"pairs, cos and sin alike; got {table.dtype} of shape {tuple(table.shape)} on {table.device}")
