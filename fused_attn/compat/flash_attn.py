"""flash-attn's functional names, version 2: ``flash_attn_func``, its packed forms, and those of variable lengths.

Tensors are [batch, tokens, heads, head_dim], packed ones [tokens, heads, head_dim]; causality and windows are aligned so that
the last query sees the last key; a side of -1 of a window is open. Source: Dao 2023, "FlashAttention-2"; its functional
interface.
"""

from typing import Any

import torch

from fused_attn.api import attention, attention_varlen

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func"]


def _arguments(dropout_p: float, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
               alibi_slopes: torch.Tensor | None, deterministic: bool) -> dict[str, Any]:
    """The arguments that all forms share, by their names here."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2 or any(side < -1 for side in window_size):
        raise ValueError(f"window_size: expected (left, right), each -1 or more; got {window_size!r}")
    left, right = (None if side == -1 else side for side in window_size)
    return {"dropout_p": dropout_p, "scale": softmax_scale, "causal": causal, "softcap": softcap or None,
            "window": None if left is right is None else (left, right), "alibi_slopes": alibi_slopes,
            "deterministic": True if deterministic else None}


def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0,
                    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
                    softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
                    return_attn_probs: bool = False) -> Any:
    """Attention of q [B, Nq, H, D] over k [B, Nk, Hkv, D] and v [B, Nk, Hkv, Dv].

    Args:
        dropout_p: probability that a weight becomes 0.
        softmax_scale: 1 / sqrt(D) by default.
        causal: a query sees the keys up to its own position, the last query standing at the last key.
        window_size: (left, right), inclusive; -1 leaves a side open.
        softcap: scores become softcap * tanh(score / softcap); 0 is none.
        alibi_slopes: [H] or [B, H].
        deterministic: gradients equal to the bit from run to run.
        return_attn_probs: return (out, lse, None): the log-sum-exp [B, H, Nq], and in place of weights that the original calls
            unreliable, nothing; ``fused_attn.attention_weights`` has them.

    Returns:
        out [B, Nq, H, Dv] in q's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, by the name that ``fused_attn.attention`` has for it.
    """
    arguments = _arguments(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = (_heads_first(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    if not return_attn_probs:
        out: torch.Tensor = attention(q, k, v, **arguments)
        return out.transpose(1, 2)
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    return out.transpose(1, 2), lse, None


def _heads_first(name: str, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        raise ValueError(f"{name}: expected a tensor [batch, tokens, heads, head_dim]; got {getattr(x, 'shape', x)!r}")
    return x.transpose(1, 2)


def _parts(name: str, packed: torch.Tensor, n: int, dim: int) -> Any:
    if not isinstance(packed, torch.Tensor) or packed.dim() != dim + 3 or packed.shape[dim] != n:
        raise ValueError(f"{name}: expected a tensor with {n} in dimension {dim} of {dim + 3}; "
                         f"got {getattr(packed, 'shape', packed)!r}")
    return packed.unbind(dim)


def flash_attn_qkvpacked_func(qkv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                              causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                              alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
                              return_attn_probs: bool = False) -> Any:
    """``flash_attn_func`` of qkv [B, N, 3, H, D], whose parts are read where they lie."""
    q, k, v = _parts("qkv", qkv, 3, 2)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs)


def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                             causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                             alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
                             return_attn_probs: bool = False) -> Any:
    """``flash_attn_func`` of q [B, Nq, H, D] and kv [B, Nk, 2, Hkv, D]."""
    k, v = _parts("kv", kv, 2, 2)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs)


def flash_attn_varlen_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
                           cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                           softmax_scale: float | None = None, causal: bool = False,
                           window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                           alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
                           return_attn_probs: bool = False, block_table: torch.Tensor | None = None) -> Any:
    """``flash_attn_func`` of sequences one after the other: q [Tq, H, D], k and v [Tk, Hkv, D].

    Sequence s owns the rows from ``cu_seqlens[s]`` up to the next, int32 [S + 1]. Returns out [Tq, H, Dv], or
    (out, lse [H, Tq], None).

    Raises:
        NotImplementedError: with a ``block_table``; there are no paged keys and values.
    """
    if block_table is not None:
        raise NotImplementedError("block_table: paged keys and values are not built")
    arguments = _arguments(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    found = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_lse=return_attn_probs,
                             **arguments)
    return (*found, None) if return_attn_probs else found


def flash_attn_varlen_qkvpacked_func(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, dropout_p: float = 0.0,
                                     softmax_scale: float | None = None, causal: bool = False,
                                     window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                                     alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
                                     return_attn_probs: bool = False) -> Any:
    """``flash_attn_varlen_func`` of qkv [T, 3, H, D]."""
    q, k, v = _parts("qkv", qkv, 3, 1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_varlen_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
                                    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                                    softmax_scale: float | None = None, causal: bool = False,
                                    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                                    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False,
                                    return_attn_probs: bool = False) -> Any:
    """``flash_attn_varlen_func`` of q [Tq, H, D] and kv [Tk, 2, Hkv, D]."""
    k, v = _parts("kv", kv, 2, 1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
