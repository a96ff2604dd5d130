"""Hugging Face transformers: ``attn_implementation="fused_attn"`` for every family that goes through its interface.

    from fused_attn.integrations import transformers as fused
    fused.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fused_attn")

Grouped heads are not repeated; sliding windows, softcaps, sinks and T5's position bias run in the kernels, with their
gradients; plain causal and padded batches need no mask of N x N. docs/integrations.md names the families that were compared
with the eager implementation, and those that do not go through the interface.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask, sliding_window_overlay

from fused_attn import attention, attention_varlen
from fused_attn.inspection import attention_and_weights
from fused_attn.mods import BIAS

NAME = "fused_attn"


def register(name: str = NAME) -> None:
    """Makes ``attn_implementation=name`` known to transformers, for ``from_pretrained``, ``from_config`` and
    ``model.set_attn_implementation``. Both the attention and its mask: without the second, transformers would pass no mask
    at all, silently."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
                   mask_function: Callable[..., Any] = causal_mask_function, attention_mask: torch.Tensor | None = None,
                   local_size: int | None = None, **more: Any) -> torch.Tensor | None:
    """What ``attention_forward`` needs beside the causality and window it knows: nothing, padding, or everything.

    None where all keys count; bool [B, Nk], True for keys that do, where some are padding; bool [B, 1, Nq, Nk] for
    every other pattern, and for static caches, of which only a part counts.
    """
    simple = mask_function in (causal_mask_function, bidirectional_mask_function) or _is_sliding(mask_function, local_size)
    at_end = isinstance(q_offset, int) and (mask_function is bidirectional_mask_function
                                            or q_offset + q_length == kv_offset + kv_length)
    if not (simple and at_end):
        more["allow_is_causal_skip"] = more["allow_is_bidirectional_skip"] = False
        mask: torch.Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, **more)
        return mask
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[1]
    padding = torch.nn.functional.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
    # One look for the whole model, as transformers' own masks take, saves every layer the mask.
    return None if not torch.compiler.is_compiling() and bool(padding.all()) else padding


def _is_sliding(mask_function: Callable[..., Any], local_size: int | None) -> bool:
    """Whether this is sliding_window_causal_mask_function(local_size), and nothing more: transformers builds it of closures."""
    cells = getattr(mask_function, "__closure__", None)
    parts = cells[0].cell_contents if cells and len(cells) == 1 else None
    if local_size is None or not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return False
    overlay = parts[0]
    return (getattr(overlay, "__code__", None) is sliding_window_overlay(1).__code__
            and overlay.__closure__[0].cell_contents == local_size)


def attention_forward(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                      is_causal: bool | None = None, sliding_window: int | None = None, softcap: float | None = None,
                      s_aux: torch.Tensor | None = None, position_bias: torch.Tensor | None = None, cache: Any = None,
                      **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One attention of a model, as transformers calls it.

    query [B, H, Nq, D], key and value [B, Hkv, Nk, D] and Dv; masks as ``attention_mask`` above gives them, or an additive
    float one. Returns ([B, Nq, H, Dv], weights [B, H, Nq, Nk] if ``output_attentions``, else None).
    """
    if cache is not None:  # the paged one of continuous batching
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=more)
    if query.shape[0] != key.shape[0]:  # learned queries, one set for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    arguments: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout,
                                 "bias": position_bias}
    whole = attention_mask is not None and attention_mask.dim() == 4  # says everything, causality and window included
    if not whole and causal:
        arguments["window"] = (None if sliding_window is None else sliding_window - 1, 0)
    if more.get("cu_seq_lens_q") is not None and query.shape[0] == 1:
        window = (None if sliding_window is None else sliding_window - 1, 0) if causal else None
        return _packed(query, key, value, {**arguments, "window": window}, more), None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        arguments["mask"] = attention_mask if whole else attention_mask[:, None, None, :]
    elif attention_mask is not None:
        arguments["bias" if position_bias is None else "score_mod"] = (
            attention_mask if position_bias is None else BIAS(attention_mask))
    if more.get("output_attentions"):
        out, weights = attention_and_weights(query, key, value, **arguments)
        return out.transpose(1, 2).contiguous(), weights
    return attention(query, key, value, **arguments).transpose(1, 2).contiguous(), None


def _packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any],
            more: dict[str, Any]) -> torch.Tensor:
    """Sequences one after the other in a batch of one, whose ends the caller gave (``DataCollatorWithFlattening``)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attention_varlen(q, k, v, more["cu_seq_lens_q"], more["cu_seq_lens_k"], int(more["max_length_q"]),
                           int(more["max_length_k"]), **arguments)
    result: torch.Tensor = out[None]
    return result
