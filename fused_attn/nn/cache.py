"""What a decoder remembers from token to token: the keys and values of what it has seen, and of what it listens to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fused_attn.functional import attention, attention_varlen

_STEP = 64  # a growing cache starts with this many rows


class KVCache:
    """Keys and values of one self-attention layer, appended to call by call.

    Sequences of a batch may have different lengths: pad them on the right and name the padding, and the next tokens stand
    where it began. With ``capacity`` the memory is taken once and stays where it is, as CUDA graphs need; without, it doubles
    when it is full. For inference: tensors that want gradients are refused. A graph that replays steps moves ``lengths``
    alone: ``length``, and the check against the capacity, see what Python ran.

    Attributes:
        lengths: int32 [B], tokens of each sequence; None before the first ``append``.
        length: an upper bound of them that needs no look at the device.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
            raise ValueError(f"capacity: expected a positive int or None; got {capacity!r}")
        self.capacity = capacity
        self.k: torch.Tensor | None = None  # [B, rows, Hkv, D]: one sequence after the other, as packed sequences lie
        self.v: torch.Tensor | None = None  # [B, rows, Hkv, Dv]
        self.lengths: torch.Tensor | None = None
        # Whether steps go by what the device knows alone, so that a CUDA graph may replay them; decided by the first append.
        self._replays: bool | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets everything; memory of a given capacity stays where it is."""
        if self.capacity is None:
            self.k = self.v = self.lengths = None
        elif self.lengths is not None:
            self.lengths.zero_()
        self.length = 0
        self._even = not self._replays  # whether every sequence has exactly ``length`` tokens, as far as the host knows
        self._counts: torch.Tensor | None = None  # new tokens of each sequence in the last append, None for all of them

    def __repr__(self) -> str:
        rows = 0 if self.k is None else self.k.shape[1]
        return f"KVCache(length={self.length}, rows={rows}, capacity={self.capacity})"

    def positions(self, count: int) -> "torch.Tensor | int":
        """Where the next ``count`` tokens stand: the position of the first, or [B, count]."""
        if self._even:
            return self.length
        assert self.lengths is not None
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def append(self, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Takes k [B, Hkv, N, D] and v [B, Hkv, N, Dv]; of sequence b the first ``counts[b]`` rows, int [B], or all."""
        if k.requires_grad or v.requires_grad:
            raise RuntimeError("KVCache: expected tensors without gradients; generate under torch.no_grad()")
        batch, heads, n, _ = k.shape
        if self.k is not None and (self.k.shape[0], self.k.shape[2], self.k.dtype) != (batch, heads, k.dtype):
            raise ValueError(f"KVCache: expected batch {self.k.shape[0]}, {self.k.shape[2]} heads and {self.k.dtype}; "
                             f"got {batch}, {heads} and {k.dtype}")
        self._reserve(self.length + n, k, v)
        assert self.k is not None
        assert self.v is not None
        assert self.lengths is not None
        if self._replays is None:
            self._replays = self.capacity is not None and k.device.type != "cpu"
        if self._even and not self._replays:
            self.k[:, self.length : self.length + n] = k.transpose(1, 2)
            self.v[:, self.length : self.length + n] = v.transpose(1, 2)
        else:
            rows = torch.arange(batch, device=k.device)[:, None]
            columns = self.lengths[:, None] + torch.arange(n, device=k.device)
            self.k[rows, columns] = k.transpose(1, 2)  # rows past a sequence's own are overwritten by its next ones
            self.v[rows, columns] = v.transpose(1, 2)
        self._even = self._even and counts is None and not self._replays
        self._counts = counts
        self.lengths += n if counts is None else counts.to(torch.int32)
        self.length += n

    def _reserve(self, rows: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.capacity is not None and rows > self.capacity:
            raise ValueError(f"KVCache: expected at most {self.capacity} tokens, its capacity; got {rows}")
        held = 0 if self.k is None else self.k.shape[1]
        if rows <= held:
            return
        size = self.capacity or max(2 * held, -(-rows // _STEP) * _STEP)
        with torch.inference_mode(False):  # the cache may outlive the mode of this call
            if self.lengths is None:
                self.lengths = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
            # Zeros, not whatever memory held: a kernel may read rows that do not count yet, and 0 * NaN is NaN.
            new_k, new_v = (torch.zeros(x.shape[0], size, x.shape[1], x.shape[3], dtype=x.dtype, device=x.device)
                            for x in (k, v))
        if self.k is not None and self.v is not None:
            new_k[:, :held], new_v[:, :held] = self.k, self.v
        self.k, self.v = new_k, new_v

    def attend(self, q: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Causal attention of q [B, H, N, D], the queries of the tokens last appended, to everything in the cache.

        ``arguments`` are those of ``fused_attn.attention``. Queries past their sequence's count give 0.
        """
        if self.k is None or self.v is None or self.lengths is None:
            raise RuntimeError("KVCache: expected keys and values before queries; append() comes first")
        if self._even:
            k, v = (x[:, : self.length].transpose(1, 2) for x in (self.k, self.v))
            out: torch.Tensor = attention(q, k, v, causal=True, **arguments)
            return out
        batch, n = q.shape[0], q.shape[2]
        rows = self.k.shape[1]
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        packed: torch.Tensor = attention_varlen(
            q.transpose(1, 2).flatten(0, 1), self.k.flatten(0, 1), self.v.flatten(0, 1), starts * n, starts * rows, n, rows,
            seqused_q=self._counts, seqused_k=self.lengths, causal=True, **arguments)
        return packed.unflatten(0, (batch, n)).transpose(1, 2)

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position ``length`` on, of every sequence: to take back what was only tried."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}; got {length}")
        if self.lengths is not None:
            self.lengths.clamp_(max=length)
        self.length = length

    def reorder(self, index: torch.Tensor) -> None:
        """Keeps the sequences ``index`` [B'] in this order, some perhaps twice: the step of a beam search."""
        if self.k is not None and self.v is not None and self.lengths is not None:
            self.k, self.v, self.lengths = (_picked(x, index) for x in (self.k, self.v, self.lengths))


def _picked(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` of x, in x's own memory where there are as many."""
    picked = x.index_select(0, index)
    return x.copy_(picked) if picked.shape == x.shape else picked


class MemoryCache:
    """Keys and values of one cross-attention layer: computed from the memory once, by the first call.

    For inference, of one memory: ``clear()`` before the next, which nothing but its shape would tell from the first.
    """

    def __init__(self) -> None:
        self.k: torch.Tensor | None = None  # [B, Hkv, S, D]
        self.v: torch.Tensor | None = None

    def get(self, batch: int, length: int,
            project: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of ``batch`` memories of a length, from ``project`` where there are none yet."""
        if self.k is None or self.v is None:
            k, v = project()
            if k.requires_grad or v.requires_grad:
                raise RuntimeError("MemoryCache: expected tensors without gradients; generate under torch.no_grad()")
            self.k, self.v = k, v
        elif (self.k.shape[0], self.k.shape[2]) != (batch, length):
            raise ValueError(f"MemoryCache: expected the memory of the first call, batch {self.k.shape[0]} and length "
                             f"{self.k.shape[2]}; got {batch} and {length}: clear() it before the next memory")
        return self.k, self.v

    def clear(self) -> None:
        """Forgets the memory, before the next one."""
        self.k = self.v = None

    def reorder(self, index: torch.Tensor) -> None:
        """As in ``KVCache``."""
        if self.k is not None and self.v is not None:
            self.k, self.v = _picked(self.k, index), _picked(self.v, index)


class DecoderCache(NamedTuple):
    """What one layer of an encoder-decoder's decoder remembers."""

    own: KVCache
    memory: MemoryCache

    def reorder(self, index: torch.Tensor) -> None:
        """As in ``KVCache``."""
        self.own.reorder(index)
        self.memory.reorder(index)
