"""Hugging Face transformers: ``attn_implementation="fused_attn"`` for every family that goes through its interface.

    from fused_attn.integrations import transformers as fused
    fused.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fused_attn")

Grouped heads are not repeated; sliding windows, softcaps, sinks and T5's position bias run in the kernels, with their
gradients; plain causal, sliding and padded batches need no mask of N x N. docs/integrations.md names the families that were
compared with the eager implementation, and those that do not go through the interface.

The mask says what attends, and its shape says how: None, keys that count [B, Nk], the same with a window as long as its last,
expanded extent [B, Nk, w], or everything [B, 1, Nq or 1, Nk]. A layer's own word on causality is believed only beside the
first three, and only in families whose layers transformers' own SDPA believes too.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    prepare_padding_mask,
    remap_positions_for_packed_sequence,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from fused_attn.functional import attention, attention_varlen
from fused_attn.inspection import attention_and_weights
from fused_attn.mods import BIAS

NAME = "fused_attn"
_AND = and_masks().__code__
_SLIDING = sliding_window_overlay(1).__code__
_PACKED = packed_sequence_mask_function(torch.empty(0)).__code__
_REMAPPED = remap_positions_for_packed_sequence(causal_mask_function, torch.empty(0)).__code__


def register(name: str = NAME) -> None:
    """Makes ``attn_implementation=name`` known to transformers, for ``from_pretrained``, ``from_config`` and
    ``model.set_attn_implementation``. Both the attention and its mask: without the second, transformers would pass no mask
    at all, silently."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


_FAMILIES: dict[type, tuple[bool, bool]] = {}


def _family(config: type) -> tuple[bool, bool]:
    """Whether a family's attention goes through the interface, and whether its layers know if they are causal."""
    if config not in _FAMILIES:
        _FAMILIES[config] = _look(config)
    return _FAMILIES[config]


def _look(config: type) -> tuple[bool, bool]:
    module = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    found = () if module is None else tuple(vars(module).values())
    models = [x for x in found if isinstance(x, type) and issubclass(x, PreTrainedModel) and x is not PreTrainedModel]
    if not models:
        return True, True
    known = any(x._supports_sdpa or x._supports_flash_attn or x._supports_flex_attn for x in models)
    return any(x._can_set_attn_implementation() for x in models), known


def attention_mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
                   mask_function: Callable[..., Any] = causal_mask_function, attention_mask: torch.Tensor | None = None,
                   local_size: int | None = None, allow_is_causal_skip: bool = True,
                   allow_is_bidirectional_skip: bool = False, **more: Any) -> torch.Tensor | None:
    """What ``attention_forward`` needs to know of who attends to whom, in as little memory as that takes.

    None where the layer's causality says everything; bool [B, Nk], True for keys that count, where some are padding; the same
    expanded to [B, Nk, window] under a sliding window that reaches somewhere; bool [B, 1, 1, Nk] for padding in both
    directions; bool [B, 1, Nq, Nk] for every other pattern, for static caches, of which only a part counts, and for models
    that ask for a mask to look at.
    """
    through, known = (True, True) if more.get("config") is None else _family(more["config"].__class__)
    if not through:
        raise ValueError(f"attn_implementation: {type(more['config']).__name__} computes attention in code of its own, past "
                         "transformers' interface; fused_attn cannot run there")
    if mask_function is bidirectional_mask_function:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            padding = padding[:, kv_offset : kv_offset + kv_length]
            if not allow_is_bidirectional_skip or is_tracing(padding) or not bool(padding.all()):
                rows = q_length if not allow_is_bidirectional_skip else 1
                return padding[:, None, None, :].expand(-1, 1, rows, -1)
        if known and allow_is_bidirectional_skip:
            return None
        device = more.get("device", "cpu") if padding is None else padding.device
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(batch_size, 1, q_length, kv_length)
    if attention_mask is not None and attention_mask.dim() == 3:  # made ahead, in generation, and now come back
        return attention_mask
    window = _window(mask_function, local_size)
    at_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if window is None or not at_end or not allow_is_causal_skip or not known:
        mask: torch.Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **more)
        packed = _packed_window(mask_function, local_size)
        if packed is not None and mask is not None and not torch.compiler.is_compiling():
            mask.fused_attn_packed = packed  # type: ignore[attr-defined]  # its sequences may be given by their ends as well
        return mask
    keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, kv_offset : kv_offset + kv_length]
        # One look for the whole model, as transformers' own masks take, saves every layer the mask.
        if not is_tracing(keys) and bool(keys.all()):
            keys = None
    if not window or window >= kv_length:  # every key is within reach
        return keys
    if keys is None:
        keys = torch.ones(1, 1, dtype=torch.bool, device=more.get("device", "cpu")).expand(batch_size, kv_length)
    return keys[:, :, None].expand(-1, -1, window)


def _parts(mask_function: Callable[..., Any]) -> tuple[Any, ...]:
    """The functions that ``and_masks`` joined; transformers builds its patterns of closures."""
    if getattr(mask_function, "__code__", None) is not _AND:
        return ()
    try:
        found = mask_function.__closure__[0].cell_contents  # type: ignore[index]
    except (AttributeError, TypeError, ValueError):  # torch.compile keeps the cells of functions made while tracing to itself
        return ()
    return found if isinstance(found, tuple) else ()


def _window(mask_function: Callable[..., Any], local_size: int | None) -> int | None:
    """0 for plain causality, the width of a plain sliding window, None for any other pattern."""
    if mask_function is causal_mask_function:
        return 0
    parts = _parts(mask_function) if local_size is not None else ()
    if len(parts) != 2 or parts[1] is not causal_mask_function or getattr(parts[0], "__code__", None) is not _SLIDING:
        return None
    return local_size if parts[0].__closure__[0].cell_contents == local_size else None


def _packed_window(mask_function: Callable[..., Any], local_size: int | None) -> int | None:
    """``_window`` of what holds inside each sequence of a packed batch, None where it is not packed."""
    parts = _parts(mask_function)
    if [getattr(part, "__code__", None) for part in parts] != [_PACKED, _REMAPPED]:
        return None
    inner = dict(zip(_REMAPPED.co_freevars, parts[1].__closure__, strict=True))["mask_function"].cell_contents
    return _window(inner, local_size)


def attention_forward(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                      is_causal: bool | None = None, sliding_window: int | None = None, softcap: float | None = None,
                      s_aux: torch.Tensor | None = None, position_bias: torch.Tensor | None = None,
                      **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One attention of a model, as transformers calls it.

    query [B, H, Nq, D], key and value [B, Hkv, Nk, D] and Dv; masks as ``attention_mask`` above gives them, or an additive
    float one. Returns ([B, Nq, H, Dv], weights [B, H, Nq, Nk] if ``output_attentions``, else None).
    """
    if query.shape[0] != key.shape[0]:  # learned queries, one set for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    arguments: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout,
                                 "bias": position_bias}
    packed = 0 if attention_mask is None else getattr(attention_mask, "fused_attn_packed", None)
    if attention_mask is not None and attention_mask.dim() == 3:
        packed = attention_mask.shape[2]
    by_ends = more.get("cu_seq_lens_q") is not None and query.shape[0] == 1 and not more.get("output_attentions")
    if by_ends and packed is not None:
        return _by_ends(query, key, value, {**arguments, "window": (packed - 1 if packed else None, 0)}, more), None
    if more.get("indices") is not None:  # the keys that a model chose for each query, [B, Nq, chosen]
        chosen = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        chosen = chosen.scatter(-1, more["indices"][:, None].long(), True)
        attention_mask = chosen if attention_mask is None else attention_mask & chosen
    if attention_mask is None or attention_mask.dim() < 4:
        arguments["window"] = _reach(module, is_causal, sliding_window, attention_mask)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        keys = attention_mask[:, :, 0] if attention_mask.dim() == 3 else attention_mask
        if attention_mask.dim() == 4:
            arguments["mask"] = attention_mask
        elif keys.stride() != (0, 0):
            arguments["mask"] = keys[:, None, None, :]
    elif attention_mask is not None:
        arguments["bias" if position_bias is None else "score_mod"] = (
            attention_mask if position_bias is None else BIAS(attention_mask))
    if more.get("output_attentions"):
        out, weights = attention_and_weights(query, key, value, **arguments)
        return out.transpose(1, 2).contiguous(), weights
    return attention(query, key, value, **arguments).transpose(1, 2).contiguous(), None


def _reach(module: torch.nn.Module, is_causal: bool | None, sliding_window: int | None,
           attention_mask: torch.Tensor | None) -> tuple[int | None, int] | None:
    """The window of a layer whose mask leaves causality to it."""
    if attention_mask is not None and attention_mask.dim() == 3:
        return attention_mask.shape[2] - 1, 0
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise ValueError(f"{type(module).__name__}: expected is_causal of the layer or the call, as no mask says it")
    if not causal:
        return None
    return None if sliding_window is None else sliding_window - 1, 0


def _by_ends(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any],
             more: dict[str, Any]) -> torch.Tensor:
    """Sequences one after the other in a batch of one, whose ends the caller gave (``DataCollatorWithFlattening``)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = [int(more[f"max_length_{side}"]) if more.get(f"max_length_{side}") is not None
               else int(more[f"cu_seq_lens_{side}"].diff().max()) for side in "qk"]
    out = attention_varlen(q, k, v, more["cu_seq_lens_q"], more["cu_seq_lens_k"], *longest, **arguments)
    result: torch.Tensor = out[None]
    return result
