"""tanh and the additive score in plain PyTorch, with slopes that keep their digits where tanh is near 1.

Autograd's slope of tanh is 1 - tanh^2, which has no digits left in fp32 for |x| from 9 on; 4 e / (1 + e)^2 with e = exp(-2 |x|)
has them all.
"""

from typing import Any

import torch

from fused_attn import torch_private


def tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh made of plain operations, from which autograd derives that slope."""
    if not (torch.is_grad_enabled() or torch_private.forward_mode()):
        return x.tanh()
    size = x.abs()
    e = torch.exp(-2 * size)
    return torch.where(size < 1, x.tanh(), x.sign() * (1 - e) / (1 + e))


def tanh_slope(x: torch.Tensor) -> torch.Tensor:
    """1 - tanh^2, by the form that keeps its digits."""
    e = torch.exp(-2 * x.abs())
    return 4 * e / (1 + e) ** 2


def additive_scores(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sum_d w_d tanh(q_d + k_d), [B, H, Nq, Nk], of q [B, H, Nq, D], k [B, H, Nk, D] and weight [H, D].

    Outside compilers, tracers and transforms, which want plain operations, it keeps nothing of [B, H, Nq, Nk, D] for the
    backward, which recomputes the sums.
    """
    if (torch.compiler.is_compiling() or torch_private.is_tracing() or torch_private.transforms_active()
            or torch_private.forward_mode()):
        return (tanh(_sums(q, k)) * weight[:, None, None, :]).sum(-1)
    scores: torch.Tensor = _AdditiveScores.apply(q, k, weight)
    return scores


def _sums(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q[:, :, :, None, :] + k[:, :, None, :, :]


class _AdditiveScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, weight)
        return (_sums(q, k).tanh_() * weight[:, None, None, :]).sum(-1)

    @staticmethod
    def backward(ctx: Any, dscores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Consists of operations that autograd differentiates again where it is asked to."""
        q, k, weight = ctx.saved_tensors
        of_q, of_k, of_weight = ctx.needs_input_grad
        sums = _sums(q, k)
        dweight = torch.einsum("bhij,bhijd->hd", dscores, tanh(sums)) if of_weight else None
        if not (of_q or of_k):
            return None, None, dweight
        slopes = tanh_slope(sums)
        dq = weight[:, None] * torch.einsum("bhij,bhijd->bhid", dscores, slopes) if of_q else None
        dk = weight[:, None] * torch.einsum("bhij,bhijd->bhjd", dscores, slopes) if of_k else None
        return dq, dk, dweight
