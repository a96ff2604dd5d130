"""The oracle: softmax(mod(scale * Q K^T)) V in plain PyTorch, meant to be believed at a glance.

It holds the whole matrix of scores, works on any device, is differentiable to any order, and is exact to fp64 when given
fp64; fp16 and bf16 are computed in fp32 and rounded once, at the end.
"""

import torch

from fused_attn.spec import AttentionSpec


def window_mask(spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
    """Bool [Nq, Nk]: True where the window keeps the key."""
    position = torch.arange(n_queries, device=device)[:, None] + spec.offset(n_queries, n_keys)
    key = torch.arange(n_keys, device=device)[None, :]
    keep = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if spec.window.left is not None:
        keep &= key >= position - spec.window.left
    if spec.window.right is not None:
        keep &= key <= position + spec.window.right
    return keep


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """``exact`` whatever autocast would make of its matrix products."""
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return exact(q, k, v, spec)
    return exact(q, k, v, spec)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its natural-log LSE, for q [B, H, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv].

    Returns out [B, H, Nq, Dv] in q's dtype and lse [B, H, Nq] in fp32 (fp64 for fp64). A row with no key gives 0 and -inf.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, dim=1)
    values = v.to(dtype).repeat_interleave(group, dim=1)

    scores = q.to(dtype) @ keys.mT * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~window_mask(spec, q.shape[2], k.shape[2], q.device), float("-inf"))

    # The pivot of a row with no key is finite, since -inf - -inf would be NaN; with Nk = 0 there is no maximum at all.
    pivots = scores.detach() if k.shape[2] else scores.new_zeros(*q.shape[:3], 1)
    row_max = pivots.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = torch.exp(scores - row_max)
    row_sum = weights.sum(dim=-1, keepdim=True)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1)
    out = (weights / row_sum) @ values
    lse = (row_max + torch.log(row_sum)).masked_fill(empty, float("-inf"))
    return out.to(q.dtype), lse.squeeze(-1)
