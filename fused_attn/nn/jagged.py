"""Nested tensors, as self- and cross-attention take them: packed sequences with the offsets of each."""

from typing import Any

import torch

from fused_attn import torch_private
from fused_attn.api import attention_varlen
from fused_attn.nn.positions import PositionEmbeddings


def _as_jagged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Strided nested tensors as jagged ones; arguments that are one tensor remain one."""
    q = torch.nested.nested_tensor(list(query.unbind()), layout=torch.jagged)
    k = q if key is query else torch.nested.nested_tensor(list(key.unbind()), layout=torch.jagged)
    v = k if value is key else torch.nested.nested_tensor(list(value.unbind()), layout=torch.jagged)
    return q, k, v


def _check(**tensors: torch.Tensor) -> None:
    """Checks that each is a contiguous jagged nested tensor, by name."""
    for name, x in tensors.items():
        if not x.is_nested or x.layout != torch.jagged or x.dim() != 3 or not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous jagged nested tensor [batch, j, features], as one of the "
                             f"three is nested; got {'nested ' if x.is_nested else ''}{x.layout} of {x.dim()} dimensions")


def _common_offsets(query: Any, key: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The offsets of the queries, and those of the keys, which the values must share."""
    offsets_q, offsets_k, offsets_v = (x.offsets() for x in (query, key, value))
    if len(offsets_k) != len(offsets_q):
        raise ValueError(f"key: expected query's batch {len(offsets_q) - 1}; got {len(offsets_k) - 1}")
    if offsets_v is not offsets_k and not (offsets_v.shape == offsets_k.shape and bool((offsets_v == offsets_k).all())):
        raise ValueError(f"value: expected key's lengths, of offsets {offsets_k.tolist()}; got {offsets_v.tolist()}")
    return offsets_q, offsets_k


def jagged_positions(x: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
    """int [T]: each token's position in its own sequence or, given the offsets of ``keys``, among its keys, where the last
    token stands at the last key."""
    shift = -offsets[:-1] if keys is None else keys.diff() - offsets.diff() - offsets[:-1]
    return torch.arange(x.shape[0], device=x.device) + torch.repeat_interleave(shift, offsets.diff(), output_size=x.shape[0])


def attend_jagged(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  key_padding_mask: torch.Tensor | None, need_weights: bool, attn_mask: torch.Tensor | None, is_causal: bool,
                  cache: Any, position_embeddings: PositionEmbeddings | None) -> torch.Tensor:
    """The forward of a ``MultiheadAttention`` for nested tensors [B, j, E]: packed sequences, without padding anywhere."""
    if query.is_nested and query.layout == torch.strided:  # as torch's own encoder makes of padding
        q, k, v = _as_jagged(query, key, value)
        out = attend_jagged(module, q, k, v, key_padding_mask, need_weights, attn_mask, is_causal, cache, None)
        strided: torch.Tensor = torch.nested.as_nested_tensor(list(out.unbind()), layout=torch.strided)
        return strided
    _check(query=query, key=key, value=value)
    given = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "cache": cache, "bias_k": module.bias_k,
             "need_weights=True": need_weights or None, "add_zero_attn=True": module.add_zero_attn or None}
    if found := [name for name, x in given.items() if x is not None]:
        raise ValueError(f"{found[0]}: not taken with nested tensors, which have no padding")
    tokens: Any = query.values()
    key_tokens: Any = tokens if key is query else key.values()
    value_tokens: Any = key_tokens if value is key else value.values()
    q, k, v = module._project(tokens, key_tokens, value_tokens)
    q, k, v = (x.unflatten(-1, (-1, module.head_dim)) for x in (q, k, v))
    offsets_q, offsets_k = _common_offsets(query, key, value)
    rope = getattr(module, "rope", None)
    q, k = (x.transpose(0, 1)[None] for x in (q, k))  # [1, H, T, D]
    if rope is not None and query is not key:
        q, k = (rope.turn(x, jagged_positions(x[0, 0], *offsets))
                for x, offsets in ((q, (offsets_q, offsets_k)), (k, (offsets_k,))))
        position_embeddings = PositionEmbeddings(None, module.alibi_slopes(q.device), module.position_kind)
    else:
        position_embeddings = (module.position_embeddings(query) if position_embeddings is None
                               else module._own(position_embeddings))
        q, k = module._turned(q, k, position_embeddings)
    q, k = (x[0].transpose(0, 1) for x in (q, k))
    out = attention_varlen(
        q, k, v, offsets_q.to(torch.int32), offsets_k.to(torch.int32), torch_private.longest(query),
        torch_private.longest(key), causal=module.options.causal or is_causal,
        dropout_p=module.dropout if module.training else 0.0, **module._variant(position_embeddings))
    nested: torch.Tensor = torch.nested.nested_tensor_from_jagged(module.out_proj(out.flatten(1)), offsets_q)
    return nested
