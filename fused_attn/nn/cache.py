"""What a decoder remembers from token to token: keys and values of the tokens seen so far, and of the encoder's memory."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fused_attn import torch_private
from fused_attn.api import attention, attention_varlen
from fused_attn.nn.masks import readable
from fused_attn.nn.restorable import Restorable, Snapshot

_STEP = 64  # a growing cache starts with this many rows


class KVCache(Restorable):
    """Keys and values of one self-attention layer, appended to call by call.

    Sequences of a batch may have different lengths: pad them on the right and pass the padding, and the next tokens stand
    where it began. With ``capacity`` the memory is taken once and stays where it is, as CUDA graphs need; without, it doubles
    when it is full. For inference: tensors that want gradients are refused. A CUDA graph that replays steps changes ``lengths``
    alone: ``length``, and the check against the capacity, know only the steps that Python ran.

    A refused call leaves no trace, and a step that fails on its way through a layer, or through a stack of them, takes back
    what it appended (``all_or_nothing``). The first layer that fills a cache owns it until it is empty again.

    Attributes:
        lengths: int32 [B], tokens of each sequence; None before the first ``append``.
        length: an upper bound of them, known without reading from the device.
        even: whether every sequence is known to have exactly that many.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, numbers.Integral) or capacity < 1):
            raise ValueError(f"capacity: expected a positive int or None; got {capacity!r}")
        self.capacity = capacity
        self.k = self.v = None  # [B, rows, Hkv, D] and [.., Dv]: one sequence after the other, as packed sequences lie
        self.lengths: torch.Tensor | None = None
        # Whether steps depend on values on the device alone, so that a CUDA graph may replay them; decided by the first append.
        self._replays: bool | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets everything; memory of a given capacity stays where it is, for as many sequences of the same kind."""
        if self.capacity is None or torch_private.is_fake(self.k):  # what a tracer left is no memory
            self.k = self.v = self.lengths = None
        elif self.lengths is not None:
            self._about_to_write("k", "v", "lengths")
            self.lengths.zero_()
        self.length = 0
        self.even = not self._replays
        self._new = 0  # tokens of the last append, of each sequence
        self._counts: torch.Tensor | None = None  # how many of them count, None for all
        self._owner = None

    def __repr__(self) -> str:
        rows = 0 if self.k is None else self.k.shape[1]
        return f"KVCache(length={self.length}, rows={rows}, capacity={self.capacity})"

    def positions(self, count: int, batch: int | None = None) -> "torch.Tensor | int":
        """Where the next ``count`` tokens, of ``batch`` sequences, stand: the position of the first, or [B, count]."""
        if isinstance(count, bool) or not isinstance(count, (numbers.Integral, torch.SymInt)) or count < 0:
            raise ValueError(f"count: expected a non-negative int; got {count!r}")
        if self.even:
            return self.length
        assert self.lengths is not None
        if batch not in (None, self.lengths.shape[0]):
            raise ValueError(f"cache: expected batch {self.lengths.shape[0]}, as it holds; got {batch}")
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def claim(self, layer: Any) -> None:
        """Called by the layer that is about to append; raises where the cache holds the keys of another layer."""
        self._claim(layer, empty=not self.length)

    def append(self, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Appends k [B, Hkv, N, D] and v [B, Hkv, N, Dv]: the first ``counts[b]`` rows of sequence b, int [B], or all.

        Heads, widths, dtype, device and batch must be those of the first call. Counts outside of 0 to N are refused on a CPU;
        on other devices they are not read, and are clamped to this range.

        Raises:
            RuntimeError: gradients are wanted.
            TypeError, ValueError: an argument does not fit, by name, or the capacity is full. The cache stays as it was.
        """
        counts = self._check(k, v, counts)
        batch, n = k.shape[0], k.shape[2]
        memory_k, memory_v, lengths = self._with_room_for(k, v)
        replays = self._replays
        if replays is None:
            replays = self.capacity is not None and k.device.type != "cpu"
        counted = None if counts is None else counts.clamp(0, n).to(torch.int32)
        # Rows past a sequence's own do not count yet: until ``lengths`` moves, nothing has happened.
        if self.even and not replays:
            memory_k[:, self.length : self.length + n] = k.transpose(1, 2)
            memory_v[:, self.length : self.length + n] = v.transpose(1, 2)
        else:
            rows = torch.arange(batch, device=k.device)[:, None]
            columns = lengths[:, None] + torch.arange(n, device=k.device)
            memory_k[rows, columns] = k.transpose(1, 2)  # past a sequence's count, its next tokens replace what is written
            memory_v[rows, columns] = v.transpose(1, 2)
        if not self.even:
            self._about_to_write("lengths")
        lengths += n if counted is None else counted
        self.k, self.v, self.lengths, self._replays = memory_k, memory_v, lengths, replays
        self.even = self.even and counts is None and not replays
        self._new, self._counts = n, counted
        self.length += n

    def _check(self, k: Any, v: Any, counts: Any) -> torch.Tensor | None:
        """Checks the arguments of ``append``; returns ``counts`` as int64, or None."""
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                raise TypeError(f"{name}: expected a float tensor; got {getattr(x, 'dtype', type(x).__name__)}")
            if x.is_nested or x.dim() != 4:
                raise ValueError(f"{name}: expected 4 dimensions [batch, heads, tokens, width]; got "
                                 f"{'a nested tensor' if x.is_nested else f'shape {tuple(x.shape)}'}")
        if k.requires_grad or v.requires_grad:
            raise RuntimeError("KVCache: expected tensors without gradients; generate under torch.no_grad()")
        batch, heads, n, width_k = k.shape
        width_v, dtype, device = v.shape[3], k.dtype, k.device
        if self.k is not None and self.v is not None:
            batch, _, heads, width_k = self.k.shape
            width_v, dtype, device = self.v.shape[3], self.k.dtype, self.k.device
            if torch_private.is_fake(k) != torch_private.is_fake(self.k):
                raise RuntimeError("KVCache: expected tensors of one kind, with values or a tracer's; what was filled under "
                                   "FakeTensorMode or torch.export knows no values: clear() it, or trace with a new cache")
        for name, x, width in (("k", k, width_k), ("v", v, width_v)):
            if x.shape != (batch, heads, n, width) or x.dtype != dtype or x.device != device:
                raise ValueError(f"{name}: expected shape {(batch, heads, n, width)}, {dtype} on {device}, as "
                                 f"{'k' if self.k is None else 'k and the cache'} have them; got {tuple(x.shape)}, {x.dtype} "
                                 f"on {x.device}")
        if self.capacity is not None and self.length + n > self.capacity:
            raise ValueError(f"KVCache: expected at most {self.capacity} tokens, its capacity; got {self.length + n}")
        if counts is None:
            return None
        return _integers("counts", counts, (batch,), device, n, "the tokens that came")

    def _with_room_for(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(k, v, lengths): the memory as it is, or larger and with the same contents."""
        needed = self.length + k.shape[2]
        held = 0 if self.k is None else self.k.shape[1]
        if self.k is not None and self.v is not None and self.lengths is not None and needed <= held:
            return self.k, self.v, self.lengths
        size = self.capacity or max(2 * held, -(-needed // _STEP) * _STEP)
        lengths = self.lengths
        with torch.inference_mode(False):  # the cache may outlive the mode of this call
            if lengths is None:
                lengths = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
            # Zeros, not whatever memory held: a kernel may read rows that do not count yet, and 0 * NaN is NaN.
            new_k, new_v = (torch.zeros(x.shape[0], size, x.shape[1], x.shape[3], dtype=x.dtype, device=x.device)
                            for x in (k, v))
        if self.k is not None and self.v is not None:
            new_k[:, :held], new_v[:, :held] = self.k, self.v
        return new_k, new_v, lengths

    def attend(self, q: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Causal attention of q [B, H, N, D], the queries of the tokens last appended, to everything in the cache.

        ``arguments`` are those of ``fused_attn.attention``; a bias or mask covers the ``length`` keys or, unless the cache is
        ``even``, all the rows of its memory. Queries past their sequence's count give 0.
        """
        if self.k is None or self.v is None or self.lengths is None:
            raise RuntimeError("KVCache: expected keys and values before queries; append() comes first")
        if q.dim() != 4 or q.shape[0] != self.k.shape[0]:
            raise ValueError(f"q: expected [{self.k.shape[0]}, heads, tokens, {self.k.shape[3]}]; got shape {tuple(q.shape)}")
        if self.even:
            k, v = (x[:, : self.length].transpose(1, 2) for x in (self.k, self.v))
            out: torch.Tensor = attention(q, k, v, causal=True, **arguments)
            return out
        batch, n = q.shape[0], q.shape[2]
        if self._counts is not None and n != self._new:
            raise ValueError(f"q: expected the queries of the {self._new} tokens that were appended last; got {n}")
        rows = self.k.shape[1]
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        packed: torch.Tensor = attention_varlen(
            q.transpose(1, 2).flatten(0, 1), self.k.flatten(0, 1), self.v.flatten(0, 1), starts * n, starts * rows, n, rows,
            seqused_q=self._counts, seqused_k=self.lengths, causal=True, **arguments)
        return packed.unflatten(0, (batch, n)).transpose(1, 2)

    def truncate(self, length: "int | torch.Tensor") -> None:
        """Forgets all tokens from position ``length`` on, to take back what was only tried.

        ``length`` is an int for all sequences, or int [B] with one for each; a sequence that is shorter stays as it is.
        """
        if isinstance(length, torch.Tensor):
            shape = tuple(length.shape) if self.lengths is None else tuple(self.lengths.shape)
            length = _integers("length", length, shape if length.dim() else (), length.device, self.length)
        elif not isinstance(length, numbers.Integral) or isinstance(length, bool):
            raise TypeError(f"length: expected an int, or an integer tensor [batch]; got {length!r}")
        elif not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}; got {length}")
        self._counts = None
        if self.lengths is None:
            return
        self._about_to_write("k", "v", "lengths")
        if isinstance(length, torch.Tensor):
            kept = length.clamp(0, self.length).to(self.lengths.device, torch.int32)
            self.lengths.copy_(torch.minimum(self.lengths, kept))
            if readable(self.lengths) and self.lengths.numel():
                self.length = int(self.lengths.max())
                self.even = not self._replays and int(self.lengths.min()) == self.length
            else:
                self.even = False
            return
        self.lengths.clamp_(max=length)
        self.length = length
        self.even = not self._replays and (self.even or length == 0)

    def reorder(self, index: torch.Tensor) -> None:
        """Keeps the sequences ``index`` [B'] in this order, some perhaps twice: the step of a beam search."""
        self._take(self._picked(index))

    def _picked(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        held = self.k, self.v, self.lengths, self._counts
        return _rows([x for x in held if x is not None], index)

    def _take(self, picked: tuple[torch.Tensor, ...]) -> None:
        if picked:
            self._about_to_write("k", "v", "lengths")
            self.k, self.v, self.lengths = (_kept_in_place(x, y) for x, y in zip((self.k, self.v, self.lengths), picked,
                                                                                strict=False))
            self._counts = None if self._counts is None else picked[3]

    def _close(self, snapshot: Snapshot, restore: bool) -> None:
        super()._close(snapshot, restore)
        if restore and self.even and self.lengths is not None:  # whose lengths are not copied
            self.lengths.fill_(self.length)


def _integers(name: str, x: Any, shape: tuple[int, ...], device: torch.device, most: int, what: str = "") -> torch.Tensor:
    """x, checked, as int64, since its own type may not hold ``most``; on a CPU, where reading is free, from 0 to ``most``."""
    if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor; got {getattr(x, 'dtype', x)!r}")
    if x.shape != shape or x.device != device:
        raise ValueError(f"{name}: expected shape {shape} on {device}; got {tuple(x.shape)} on {x.device}")
    x = x.long()
    if readable(x) and bool(((x < 0) | (x > most)).any()):
        raise ValueError(f"{name}: expected 0 to {most}{', ' * bool(what)}{what}; got {x.tolist()}")
    return x


def _rows(tensors: list[torch.Tensor], index: Any) -> tuple[torch.Tensor, ...]:
    """Rows ``index`` of each tensor, all of them selected before any is put in place."""
    if not tensors:
        return ()
    batch, device = tensors[0].shape[0], tensors[0].device
    if isinstance(index, torch.Tensor) and index.dim() != 1:
        raise ValueError(f"index: expected one dimension; got shape {tuple(index.shape)}")
    index = _integers("index", index, tuple(getattr(index, "shape", ())), device, batch - 1, f"of {batch} sequences")
    with torch.inference_mode(False):  # the cache may outlive the mode of this call
        return tuple(x.index_select(0, index) for x in tensors)


def _kept_in_place(x: torch.Tensor | None, picked: torch.Tensor) -> torch.Tensor:
    """``picked``, in x's own memory where the shapes are equal."""
    return x.copy_(picked) if x is not None and picked.shape == x.shape else picked


class MemoryCache(Restorable):
    """Keys and values of one cross-attention layer: computed from the memory once, by the first call.

    For inference over one memory: call ``clear()`` before the next one, which only its shape would tell from the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.k = self.v = None  # [B, Hkv, S, D] and [.., Dv]

    def claim(self, layer: Any) -> None:
        """As in ``KVCache``."""
        self._claim(layer, empty=self.k is None)

    def get(self, batch: int, length: int, like: torch.Tensor,
            project: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of ``batch`` memories of ``length``, made by ``project`` where there are none yet. They must have
        the dtype and device of the queries, ``like``."""
        if self.k is None or self.v is None:
            wanted = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(wanted):  # the cache may outlive the mode of this call
                k, v = project()
            if k.requires_grad or v.requires_grad:
                raise RuntimeError("MemoryCache: expected tensors without gradients; generate under torch.no_grad()")
            self.k, self.v = k, v
        elif (self.k.shape[0], self.k.shape[2]) != (batch, length):
            raise ValueError(f"MemoryCache: expected the memory of the first call, batch {self.k.shape[0]} and length "
                             f"{self.k.shape[2]}; got {batch} and {length}: clear() it before the next memory")
        elif (self.k.dtype, self.k.device, torch_private.is_fake(self.k)) != (
                like.dtype, like.device, torch_private.is_fake(like)):
            raise ValueError(f"MemoryCache: expected queries in {self.k.dtype} on {self.k.device}, with values or a tracer's "
                             f"as its keys; got {like.dtype} on {like.device}: clear() it where the module has changed")
        return self.k, self.v

    def clear(self) -> None:
        """Forgets the memory, before the next one."""
        self.k = self.v = self._owner = None

    def reorder(self, index: torch.Tensor) -> None:
        """As in ``KVCache``."""
        self._take(self._picked(index))

    def _picked(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _rows([x for x in (self.k, self.v) if x is not None], index)

    def _take(self, picked: tuple[torch.Tensor, ...]) -> None:
        if picked:
            self._about_to_write("k", "v")
            self.k, self.v = (_kept_in_place(x, y) for x, y in zip((self.k, self.v), picked, strict=True))


class DecoderCache(NamedTuple):
    """What one layer of an encoder-decoder's decoder remembers."""

    own: KVCache
    memory: MemoryCache

    def reorder(self, index: torch.Tensor) -> None:
        """As in ``KVCache``."""
        own, memory = self.own._picked(index), self.memory._picked(index)
        self.own._take(own)
        self.memory._take(memory)
