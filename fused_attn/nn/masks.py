"""torch's masks, in which True means masked, as arguments of ``attention``."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fused_attn.call.mods import BIAS, HIDE
from fused_attn.tracing import watched


def readable(x: torch.Tensor) -> bool:
    """Whether reading a tensor's values costs nothing and nothing records it: on a CPU, without a tracer or a mode."""
    return x.device.type == "cpu" and not watched((x,))


def check_new_padding(padding: torch.Tensor, shape: Sequence[int]) -> None:
    """Checks the padding [B, N] of new tokens beside a cache; on a CPU, where reading is free, also that it is on the right."""
    if padding.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected bool beside a cache; got {padding.dtype}")
    if padding.shape != tuple(shape):
        raise ValueError(f"key_padding_mask: expected {tuple(shape)}, of the new tokens alone; got {tuple(padding.shape)}")
    if readable(padding) and bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        raise ValueError("key_padding_mask: expected padding on the right of the new tokens; got tokens after padding")


def causal_bias(attn_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
                batch_first: bool) -> tuple[bool, torch.Tensor | None]:
    """(whether the mask is torch's own causal bias, which has no elements, the mask if it is another)."""
    module = sys.modules.get("torch.nn.attention.bias")  # not imported by torch itself; without it there is no such mask
    if module is None or not isinstance(attn_mask, module.CausalBias):
        return False, attn_mask
    if attn_mask.variant != module.CausalVariant.UPPER_LEFT and attn_mask.seq_len_q != attn_mask.seq_len_kv:
        raise ValueError("attn_mask: expected causal_upper_left, or causal_lower_right of as many queries as keys")
    at = 1 if batch_first and query.dim() == 3 else 0
    lengths = query.shape[at], key.shape[at]
    if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != lengths:
        raise ValueError(f"attn_mask: expected a causal bias of {lengths} queries and keys; "
                         f"got {(attn_mask.seq_len_q, attn_mask.seq_len_kv)}")
    return True, None


def mask_arguments(attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor, n_keys: int,
                   appended: int) -> dict[str, Any]:
    """torch's masks, where True means masked, as arguments of ``attention``; each in its own shape, none expanded."""
    batch, heads, n_queries, _ = q.shape
    for name, given in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if given is not None and given.dtype != torch.bool and not given.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        warnings.warn("Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                      stacklevel=4)
    arguments: dict[str, Any] = {}
    if attn_mask is not None:
        dims = attn_mask.dim()
        expected = (n_queries, n_keys) if dims == 2 else (batch * heads, n_queries, n_keys)
        if attn_mask.shape != expected:
            raise RuntimeError(f"The shape of the {dims}D attn_mask is {attn_mask.shape}, but should be {expected}.")
        attn_mask = F.pad(attn_mask, (0, appended)) if appended else attn_mask
        attn_mask = attn_mask if dims == 2 else attn_mask.unflatten(0, (batch, heads))
        # The caller's own tensor is passed on: every layer reads that one, and none keeps a copy for its backward.
        arguments.update({"mask_mod": HIDE(attn_mask)} if attn_mask.dtype == torch.bool else {"bias": attn_mask})
    if key_padding_mask is not None:
        for i, size in enumerate((batch, n_keys)):
            if key_padding_mask.shape[i] != size:
                raise AssertionError(f"Expected key_padded_mask.shape[{i}] to be {size}, but got {key_padding_mask.shape[i]}")
        padding = F.pad(key_padding_mask, (0, appended)) if appended else key_padding_mask
        padding = padding[:, None, None, :]
        if padding.dtype == torch.bool:
            arguments["mask"] = ~padding
        else:
            arguments.update({"bias": padding} if "bias" not in arguments else {"score_mod": BIAS(padding)})
    return arguments
