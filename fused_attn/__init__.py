"""Fused attention in Triton, forward and backward, proven against a plain PyTorch reference."""

from fused_attn.dispatch import Explanation
from fused_attn.functional import attention, explain, reference_attention, scaled_dot_product_attention
from fused_attn.settings import strict

__version__ = "0.1.0"

__all__ = ["Explanation", "attention", "explain", "reference_attention", "scaled_dot_product_attention", "strict"]
