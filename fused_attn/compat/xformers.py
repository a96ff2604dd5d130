"""xformers' ``memory_efficient_attention`` and the biases that it knows by class.

Tensors are [batch, tokens, heads, head_dim], or [batch, tokens, head_dim] of one head, or [batch, tokens, groups, heads,
head_dim]. Source: the documentation of xformers.ops.fmha and of its attn_bias.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from fused_attn.api import attention, attention_varlen
from fused_attn.plan.backends import warn_once

__all__ = [
    "AttentionBias", "BlockDiagonalCausalFromBottomRightMask", "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalMask", "BlockDiagonalPaddedKeysMask", "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask", "LowerTriangularFromBottomRightMask", "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias", "memory_efficient_attention", "memory_efficient_attention_forward_requires_grad",
]


@dataclasses.dataclass(frozen=True)
class Band:
    """Keys from ``left`` before a query up to ``right`` after it, None for an open side; the first query stands at the first
    key, or with ``last`` the last query at the last key."""

    left: int | None = None
    right: int | None = None
    last: bool = False

    def arguments(self, equal: bool) -> dict[str, Any]:
        """Those of ``attention``; ``equal``: sequences have as many queries as keys, and so both alignments are one."""
        if self.left is self.right is None:
            return {}
        if self.last or equal:
            return {"window": (self.left, self.right)}
        left, right = self.left, self.right

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            keep = True if right is None else kv_idx <= q_idx + right
            return keep if left is None else (kv_idx >= q_idx - left) & keep

        return {"mask_mod": mask}

    def keep(self, n_queries: int, n_keys: int) -> torch.Tensor:
        """Which pairs attend, [n_queries, n_keys]."""
        distance = torch.arange(n_keys) - torch.arange(n_queries)[:, None] - (n_keys - n_queries if self.last else 0)
        keep = torch.ones_like(distance, dtype=torch.bool) if self.left is None else distance >= -self.left
        return keep if self.right is None else keep & (distance <= self.right)


class AttentionBias:
    """What is added to the scores, known by its class: here, minus infinity outside of a band."""

    band: Band = Band()

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> torch.Tensor:
        """The bias as a tensor of ``shape`` [..., queries, keys], for a look at it."""
        keep = self._keep(*shape[-2:])
        return torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, -torch.inf).to(device).expand(*shape)

    def _keep(self, n_queries: int, n_keys: int) -> torch.Tensor:
        return self.band.keep(n_queries, n_keys)

    def to(self, device: Any) -> "AttentionBias":
        """Itself: there is nothing on a device."""
        return self


class LowerTriangularMask(AttentionBias):
    """Causal, the first query at the first key."""

    band = Band(right=0)

    def add_bias(self, bias: torch.Tensor) -> "LowerTriangularMaskWithTensorBias":
        """The same, with a tensor added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, with a tensor added to the scores."""

    def __init__(self, bias: torch.Tensor) -> None:
        self._bias = bias

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> torch.Tensor:
        return super().materialize(shape, dtype, device) + self._bias.to(device)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, the last query at the last key."""

    band = Band(right=0, last=True)

    def make_local_attention(self, window_size: int) -> "LowerTriangularFromBottomRightLocalAttentionMask":
        """The same, over the last ``window_size`` keys."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


def _checked_window(window_size: int) -> int:
    if not isinstance(window_size, int) or window_size <= 0:
        raise ValueError(f"window_size: expected an int above 0; got {window_size!r}")
    return window_size


class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal over the last ``window_size`` keys, a query's own among them; the last query stands at the last key."""

    def __init__(self, _window_size: int) -> None:
        self._window_size = _checked_window(_window_size)
        self.band = Band(_window_size - 1, 0, last=True)


class LocalAttentionFromBottomRightMask(AttentionBias):
    """``window_left`` keys before a query's position and ``window_right`` after it; the last query stands at the last key."""

    def __init__(self, window_left: int, window_right: int) -> None:
        for name, side in (("window_left", window_left), ("window_right", window_right)):
            if not isinstance(side, int) or side < 0:
                raise ValueError(f"{name}: expected an int of 0 or more; got {side!r}")
        self.window_left, self.window_right = window_left, window_right
        self.band = Band(window_left, window_right, last=True)


@dataclasses.dataclass
class _Lengths:
    """Sequences one after the other: where each starts, and how many of its rows count."""

    starts: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int], padding: int | None = None) -> "_Lengths":
        """Of ``lengths``, each in ``padding`` rows if there is any."""
        lengths = [int(n) for n in lengths]
        if any(n < 0 for n in lengths) or (padding is not None and max(lengths, default=0) > padding):
            raise ValueError(f"seqlens: expected lengths from 0 to {padding if padding is not None else 'any'}; got {lengths}")
        return cls([0, *itertools.accumulate(lengths if padding is None else [padding] * len(lengths))], lengths)

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(starts [S + 1], lengths [S])."""
        starts, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in (self.starts, self.lengths))
        return starts, lengths


class BlockDiagonalMask(AttentionBias):
    """Sequences of several lengths in one batch entry, [1, tokens, ...]: each attends to itself."""

    of_block: ClassVar[Band] = Band()

    def __init__(self, queries: _Lengths, keys: _Lengths, batch_sizes: Sequence[int] | None = None,
                 band: Band | None = None) -> None:
        self.queries, self.keys, self._batch_sizes = queries, keys, batch_sizes
        self.band = self.of_block if band is None else band

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, **_: Any) -> Any:
        """Of the lengths of queries, and those of keys where they are others."""
        if kv_seqlen is not None and len(kv_seqlen) != len(q_seqlen):
            raise ValueError(f"kv_seqlen: expected {len(q_seqlen)} lengths as in q_seqlen; got {len(kv_seqlen)}")
        queries = _Lengths.of(q_seqlen)
        return cls(queries, queries if kv_seqlen is None else _Lengths.of(kv_seqlen))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """(the mask of tensors [B, M_i, ...], the tensors one after the other, [1, sum of B * M_i, ...])."""
        made = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        made._batch_sizes = [x.shape[0] for x in tensors]
        return made, torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of ``from_tensor_list``, of queries or of what is as long as they are."""
        starts, sizes = self.queries.starts, self._batch_sizes or [1] * len(self.queries.lengths)
        if tensor.shape[:2] != (1, starts[-1]):
            raise ValueError(f"tensor: expected [1, {starts[-1]}, ...]; got {tuple(tensor.shape)}")
        ends = [0, *itertools.accumulate(sizes)]
        return [tensor[:, starts[i] : starts[j]].reshape(j - i, -1, *tensor.shape[2:]) for i, j in itertools.pairwise(ends)]

    split_queries = split

    def _as(self, kind: type["BlockDiagonalMask"], band: Band) -> Any:
        return kind(self.queries, self.keys, self._batch_sizes, band)

    def make_causal(self) -> "BlockDiagonalCausalMask":
        """Each block causal, its first query at its first key."""
        return self._as(BlockDiagonalCausalMask, Band(right=0))

    def make_causal_from_bottomright(self) -> "BlockDiagonalCausalFromBottomRightMask":
        """Each block causal, its last query at its last key."""
        return self._as(BlockDiagonalCausalFromBottomRightMask, Band(right=0, last=True))

    def make_local_attention(self, window_size: int) -> "BlockDiagonalCausalLocalAttentionMask":
        """Each block causal over the last ``window_size`` keys, its first query at its first key."""
        band = Band(_checked_window(window_size) - 1, 0)
        return self._as(BlockDiagonalCausalLocalAttentionMask, band)

    def make_local_attention_from_bottomright(self, window_size: int) -> "BlockDiagonalCausalLocalAttentionFromBottomRightMask":
        """Each block causal over the last ``window_size`` keys, its last query at its last key."""
        band = Band(_checked_window(window_size) - 1, 0, last=True)
        return self._as(BlockDiagonalCausalLocalAttentionFromBottomRightMask, band)

    def _keep(self, n_queries: int, n_keys: int) -> torch.Tensor:
        keep = torch.zeros(n_queries, n_keys, dtype=torch.bool)
        for i, (of_q, of_k) in enumerate(zip(self.queries.lengths, self.keys.lengths, strict=True)):
            q0, k0 = self.queries.starts[i], self.keys.starts[i]
            keep[q0 : q0 + of_q, k0 : k0 + of_k] = self.band.keep(of_q, of_k)
        return keep

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> Any:
        """Attention of q [1, Tq, H, D], k and v: (out [1, Tq, H, Dv], lse [1, H, Tq])."""
        for name, x, lengths in (("query", q, self.queries), ("key", k, self.keys), ("value", v, self.keys)):
            if x.shape[:2] != (1, lengths.starts[-1]):
                raise ValueError(f"{name}: expected [1, {lengths.starts[-1]}, ...], the tokens of attn_bias; "
                                 f"got {tuple(x.shape)}")
        (cu_q, _), (cu_k, used_k) = self.queries.tensors(q.device), self.keys.tensors(q.device)
        padded = [stop - start for start, stop in itertools.pairwise(self.keys.starts)] != self.keys.lengths
        out, lse = attention_varlen(q[0], k[0], v[0], cu_q, cu_k, max(self.queries.lengths, default=0),
                                    max((b - a for a, b in itertools.pairwise(self.keys.starts)), default=0),
                                    seqused_k=used_k if padded else None, return_lse=True,
                                    **self.band.arguments(self.queries.lengths == self.keys.lengths), **arguments)
        return out[None], lse[None]


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each block causal, its first query at its first key."""

    of_block = Band(right=0)


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each block causal, its last query at its last key."""

    of_block = Band(right=0, last=True)


class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Each block causal over its last keys; made by ``make_local_attention``."""


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Each block causal over its last keys, the last query at the last key; made by
    ``make_local_attention_from_bottomright``."""


class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    """Keys and values in ``kv_padding`` rows a sequence, of which the first ``kv_seqlen`` count, as a cache has them."""

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_padding: Any = None, kv_seqlen: Any = None, **_: Any) -> Any:  # type: ignore[override]  # as the original has it
        if not isinstance(kv_padding, int) or kv_seqlen is None or len(kv_seqlen) != len(q_seqlen):
            raise ValueError(f"kv_padding, kv_seqlen: expected an int and {len(q_seqlen)} lengths; "
                             f"got {kv_padding!r} and {kv_seqlen!r}")
        return cls(_Lengths.of(q_seqlen), _Lengths.of(kv_seqlen, kv_padding))


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, causal, the last query at the last key that counts."""

    of_block = Band(right=0, last=True)


def memory_efficient_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                               attn_bias: torch.Tensor | AttentionBias | None = None, p: float = 0.0,
                               scale: float | None = None, *, op: Any = None,
                               output_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Attention of query [B, M, H, K] over key [B, N, H, K] and value [B, N, H, Kv]; [B, M, K] has one head.

    With five dimensions, [B, M, G, H, K], heads H of a group G share their key and value, which are expanded along H.

    Args:
        attn_bias: added to the scores: a tensor [B, H, M, N] ([B, M, N] of one head), which has a gradient, or a class.
        p: dropout's probability.
        scale: 1 / sqrt(K) by default.
        op: ignored, with one warning: which kernel runs follows from the call.
        output_dtype: of the result; query's by default.

    Returns:
        [B, M, H, Kv], with as many dimensions as query.
    """
    out, _ = memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias, p, scale, op=op,
                                                              output_dtype=output_dtype)
    return out


def memory_efficient_attention_forward_requires_grad(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0, scale: float | None = None, *, op: Any = None, output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what ``memory_efficient_attention`` gives, the log-sum-exp [B, H, M], with five dimensions [B, G * H, M]); both have
    gradients."""
    if op is not None:
        warn_once("fused_attn.compat.xformers: op is ignored; which kernel runs follows from the call")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor) or x.dim() != query.dim() or x.dim() not in (3, 4, 5):
            raise ValueError(f"{name}: expected a tensor of 3, 4 or 5 dimensions, as query has them; "
                             f"got {getattr(x, 'shape', x)!r}")
    dims, heads = query.dim(), query.shape[2:-1]
    shared = dims == 5 and key.stride(3) == 0 and value.stride(3) == 0  # the heads of a group have one key and value in memory
    query, (key, value) = _four(query), (x[:, :, :, 0] if shared else _four(x) for x in (key, value))
    arguments: dict[str, Any] = {"dropout_p": p, "scale": scale}
    if isinstance(attn_bias, BlockDiagonalMask):
        out, lse = attn_bias.attend(query, key, value, **arguments)
    else:
        if isinstance(attn_bias, LowerTriangularMaskWithTensorBias):
            arguments["bias"] = attn_bias._bias
        if isinstance(attn_bias, AttentionBias):
            arguments |= attn_bias.band.arguments(query.shape[1] == key.shape[1])
        elif attn_bias is not None:
            arguments["bias"] = attn_bias
        bias = arguments.get("bias")
        if dims == 3 and bias is not None and bias.dim() == 3:
            arguments["bias"] = bias[:, None]
        if dims == 5 and bias is not None and bias.dim() == 5:
            arguments["bias"] = bias.flatten(1, 2)
        out, lse = attention(*(x.transpose(1, 2) for x in (query, key, value)), return_lse=True, **arguments)
        out = out.transpose(1, 2)
    out = out if output_dtype is None else out.to(output_dtype)
    return out.reshape(*out.shape[:2], *heads, out.shape[-1]), lse


def _four(x: torch.Tensor) -> torch.Tensor:
    """x as [B, M, heads, K]."""
    return x[:, :, None] if x.dim() == 3 else x.flatten(2, 3) if x.dim() == 5 else x
