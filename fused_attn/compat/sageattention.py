"""SageAttention's name for a swap of torch's attention: ``sageattn``. Here it is exact, and has gradients."""

from typing import Any

import torch

from fused_attn.api import attention
from fused_attn.call.arguments import unexpected
from fused_attn.plan.backends import warn_once

__all__ = ["sageattn"]

_ROUNDING = ("qk_quant_gran", "pv_accum_dtype", "pv_threshold", "smooth_k", "smooth_v", "qk_quant_dtype")
_KNOWN = ("tensor_layout", "is_causal", "sm_scale", "return_lse")


def sageattn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
             sm_scale: float | None = None, return_lse: bool = False, **quantisation: Any) -> Any:
    """Attention of q, k and v, [B, H, N, D] in the layout "HND", [B, N, H, D] in "NHD".

    ``is_causal`` is aligned so that the last query sees the last key. ``quantisation``: arguments that tell how the original
    rounds keys and values, such as ``qk_quant_gran``; they are ignored, with one warning. Returns out in q's layout and dtype,
    or (out, lse [B, H, Nq]) with ``return_lse``. Source: Zhang et al. 2024, "SageAttention", whose results are approximate.
    """
    if tensor_layout not in ("HND", "NHD"):
        raise ValueError(f'tensor_layout: expected "HND" or "NHD"; got {tensor_layout!r}')
    if unknown := quantisation.keys() - _ROUNDING:
        raise unexpected(unknown, _KNOWN, {"scale": "sm_scale", "attn_mask": "fused_attn.attention, which has masks"})
    if quantisation:
        warn_once(f"fused_attn.compat.sageattention: {sorted(quantisation)} are ignored; nothing is quantised here")
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(q, k, v, causal=is_causal, scale=sm_scale, return_lse=True) if return_lse else (
        attention(q, k, v, causal=is_causal, scale=sm_scale), None)
    out = out.transpose(1, 2) if tensor_layout == "NHD" else out
    return (out, lse) if return_lse else out
