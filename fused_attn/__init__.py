"""Fused attention in Triton, forward and backward, proven against a plain PyTorch reference."""

from fused_attn import startup  # noqa: F401  # before what it prepares

# isort: split
from fused_attn import flops  # noqa: F401  # the ops, and what they cost, are there from here on
from fused_attn.api import (
    additive_attention,
    attention,
    attention_varlen,
    explain,
    reference_attention,
)
from fused_attn.call.mods import (
    MaskMod,
    RelativeBias,
    ScoreMod,
    dilated_window_mask,
    document_mask,
    kerple,
    prefix_lm_mask,
    soft_tree_mask,
    t5_bias,
    tree_intervals,
    tree_mask,
)
from fused_attn.checks import check_mod
from fused_attn.emulator import emulated
from fused_attn.inspection import AttentionStats, attention_stats, attention_weights
from fused_attn.integrations.patch import PatchReport, patch_sdpa
from fused_attn.integrations.replacement import Replacement, replace_attention
from fused_attn.plan.backends import Explanation
from fused_attn.rotary import apply_rotary
from fused_attn.sdpa import scaled_dot_product_attention
from fused_attn.settings import hopper, strict

__version__ = "0.1.0"

__all__ = [
    "AttentionStats",
    "Explanation",
    "MaskMod",
    "PatchReport",
    "RelativeBias",
    "Replacement",
    "ScoreMod",
    "additive_attention",
    "apply_rotary",
    "attention",
    "attention_stats",
    "attention_varlen",
    "attention_weights",
    "check_mod",
    "dilated_window_mask",
    "document_mask",
    "emulated",
    "explain",
    "hopper",
    "kerple",
    "patch_sdpa",
    "prefix_lm_mask",
    "reference_attention",
    "replace_attention",
    "scaled_dot_product_attention",
    "soft_tree_mask",
    "strict",
    "t5_bias",
    "tree_intervals",
    "tree_mask",
]
