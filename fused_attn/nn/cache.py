"""What a decoder remembers from token to token: the keys and values of what it has seen, and of what it listens to."""

import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fused_attn.functional import attention, attention_varlen
from fused_attn.nn.masks import readable

_STEP = 64  # a growing cache starts with this many rows


class KVCache:
    """Keys and values of one self-attention layer, appended to call by call.

    Sequences of a batch may have different lengths: pad them on the right and name the padding, and the next tokens stand
    where it began. With ``capacity`` the memory is taken once and stays where it is, as CUDA graphs need; without, it doubles
    when it is full. For inference: tensors that want gradients are refused. A graph that replays steps moves ``lengths``
    alone: ``length``, and the check against the capacity, see what Python ran.

    What is refused leaves no trace, and a step that fails on its way through a layer, or through a stack of them, takes back
    what it appended (``all_or_nothing``). The first layer that fills a cache owns it until it is empty again.

    Attributes:
        lengths: int32 [B], tokens of each sequence; None before the first ``append``.
        length: an upper bound of them that needs no look at the device.
        even: whether every sequence is known to have exactly that many.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, numbers.Integral) or capacity < 1):
            raise ValueError(f"capacity: expected a positive int or None; got {capacity!r}")
        self.capacity = capacity
        self.k: torch.Tensor | None = None  # [B, rows, Hkv, D]: one sequence after the other, as packed sequences lie
        self.v: torch.Tensor | None = None  # [B, rows, Hkv, Dv]
        self.lengths: torch.Tensor | None = None
        # Whether steps go by what the device knows alone, so that a CUDA graph may replay them; decided by the first append.
        self._replays: bool | None = None
        self._held = False  # by an ``all_or_nothing``
        self.clear()

    def clear(self) -> None:
        """Forgets everything; memory of a given capacity stays where it is, for as many sequences of the same kind."""
        if self.capacity is None:
            self.k = self.v = self.lengths = None
        elif self.lengths is not None:
            self.lengths.zero_()
        self.length = 0
        self.even = not self._replays
        self._counts: torch.Tensor | None = None  # new tokens of each sequence in the last append, None for all of them
        self._owner: int | None = None  # the layer whose keys these are, by its id

    def __repr__(self) -> str:
        rows = 0 if self.k is None else self.k.shape[1]
        return f"KVCache(length={self.length}, rows={rows}, capacity={self.capacity})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}  # a copy may go on beside a copy of the model

    def positions(self, count: int, batch: int | None = None) -> "torch.Tensor | int":
        """Where the next ``count`` tokens, of ``batch`` sequences, stand: the position of the first, or [B, count]."""
        if self.even:
            return self.length
        assert self.lengths is not None
        if batch not in (None, self.lengths.shape[0]):
            raise ValueError(f"cache: expected batch {self.lengths.shape[0]}, as it holds; got {batch}")
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def claim(self, layer: Any) -> None:
        """Of the layer that is about to append: raises where the cache holds the keys of another one."""
        self._owner = _owned(self._owner if self.length else None, layer)

    def append(self, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Takes k [B, Hkv, N, D] and v [B, Hkv, N, Dv]; of sequence b the first ``counts[b]`` rows, int [B], or all.

        Heads, widths, dtype, device and batch are those of the first call. Counts beyond 0 to N are refused on a CPU; on
        other devices nobody looks at them, and they count as the nearest of these.

        Raises:
            RuntimeError: gradients are wanted.
            TypeError, ValueError: an argument that does not fit, by name; or a capacity that is full. Nothing has changed.
        """
        self._check(k, v, counts)
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
            memory_k[rows, columns] = k.transpose(1, 2)  # what is written past a sequence's count its next tokens replace
            memory_v[rows, columns] = v.transpose(1, 2)
        lengths += n if counted is None else counted
        self.k, self.v, self.lengths, self._replays = memory_k, memory_v, lengths, replays
        self.even = self.even and counts is None and not replays
        self._counts = counted
        self.length += n

    def _check(self, k: Any, v: Any, counts: Any) -> None:
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
        for name, x, width in (("k", k, width_k), ("v", v, width_v)):
            if x.shape != (batch, heads, n, width) or x.dtype != dtype or x.device != device:
                raise ValueError(f"{name}: expected shape {(batch, heads, n, width)}, {dtype} on {device}, as "
                                 f"{'k' if self.k is None else 'k and the cache'} have them; got {tuple(x.shape)}, {x.dtype} "
                                 f"on {x.device}")
        if self.capacity is not None and self.length + n > self.capacity:
            raise ValueError(f"KVCache: expected at most {self.capacity} tokens, its capacity; got {self.length + n}")
        if counts is not None:
            _check_integers("counts", counts, (batch,), device)
            if readable(counts) and bool(((counts < 0) | (counts > n)).any()):
                raise ValueError(f"counts: expected 0 to {n}, the tokens that came; got {counts.tolist()}")

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

        ``arguments`` are those of ``fused_attn.attention``. Queries past their sequence's count give 0.
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
        rows = self.k.shape[1]
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        packed: torch.Tensor = attention_varlen(
            q.transpose(1, 2).flatten(0, 1), self.k.flatten(0, 1), self.v.flatten(0, 1), starts * n, starts * rows, n, rows,
            seqused_q=self._counts, seqused_k=self.lengths, causal=True, **arguments)
        return packed.unflatten(0, (batch, n)).transpose(1, 2)

    def truncate(self, length: "int | torch.Tensor") -> None:
        """Forgets all tokens from position ``length`` on, to take back what was only tried.

        ``length`` is one for every sequence, or int [B], of each its own; a sequence that is shorter stays as it is.
        """
        if isinstance(length, torch.Tensor):
            shape = tuple(length.shape) if self.lengths is None else tuple(self.lengths.shape)
            _check_integers("length", length, shape if length.dim() else (), length.device)
            outside = readable(length) and bool(((length < 0) | (length > self.length)).any())
        elif isinstance(length, numbers.Integral) and not isinstance(length, bool):
            outside = not 0 <= length <= self.length
        else:
            raise TypeError(f"length: expected an int, or an integer tensor [batch]; got {length!r}")
        if outside:
            raise ValueError(f"length: expected 0 to {self.length}; "
                             f"got {length.tolist() if isinstance(length, torch.Tensor) else length}")
        self._counts = None
        if self.lengths is None:
            return
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
            self.k, self.v, self.lengths, *counts = (
                _kept_in_place(x, y) for x, y in zip((self.k, self.v, self.lengths, self._counts), picked, strict=False))
            self._counts = counts[0] if counts else None

    def _snapshot(self) -> Any:
        lengths = None if self.lengths is None or self.even else self.lengths.clone()
        return lengths, dict(self.__dict__)

    def _restore(self, snapshot: Any) -> None:
        lengths, state = snapshot
        self.__dict__.update(state)
        if lengths is not None and self.lengths is not None:
            self.lengths.copy_(lengths)
        elif self.lengths is not None:
            self.lengths.fill_(self.length)


def _owned(owner: int | None, layer: Any) -> int:
    """The id of ``layer``, which may use what ``owner`` fills if that is nobody else."""
    if owner not in (None, id(layer)):
        raise ValueError("cache: expected one that is empty or that this layer filled; got another layer's: each layer takes "
                         "a cache of its own")
    return id(layer)


def _check_integers(name: str, x: Any, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor; got {getattr(x, 'dtype', x)!r}")
    if x.shape != shape or x.device != device:
        raise ValueError(f"{name}: expected shape {shape} on {device}; got {tuple(x.shape)} on {x.device}")


def _rows(tensors: list[torch.Tensor], index: Any) -> tuple[torch.Tensor, ...]:
    """Rows ``index`` of each: all of them before any is put in its place."""
    if not tensors:
        return ()
    batch, device = tensors[0].shape[0], tensors[0].device
    if isinstance(index, torch.Tensor) and index.dim() != 1:
        raise ValueError(f"index: expected one dimension; got shape {tuple(index.shape)}")
    _check_integers("index", index, tuple(getattr(index, "shape", ())), device)
    if readable(index) and bool(((index < 0) | (index >= batch)).any()):
        raise ValueError(f"index: expected 0 to {batch - 1}, of {batch} sequences; got {index.tolist()}")
    return tuple(x.index_select(0, index.long()) for x in tensors)


def _kept_in_place(x: torch.Tensor | None, picked: torch.Tensor) -> torch.Tensor:
    """``picked``, in x's own memory where it has room for as many."""
    return x.copy_(picked) if x is not None and picked.shape == x.shape else picked


class MemoryCache:
    """Keys and values of one cross-attention layer: computed from the memory once, by the first call.

    For inference, of one memory: ``clear()`` before the next, which nothing but its shape would tell from the first.
    """

    def __init__(self) -> None:
        self.k: torch.Tensor | None = None  # [B, Hkv, S, D]
        self.v: torch.Tensor | None = None
        self._owner: int | None = None
        self._held = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}  # as in ``KVCache``

    def claim(self, layer: Any) -> None:
        """As in ``KVCache``."""
        self._owner = _owned(None if self.k is None else self._owner, layer)

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
        self.k = self.v = self._owner = None

    def reorder(self, index: torch.Tensor) -> None:
        """As in ``KVCache``."""
        self._take(self._picked(index))

    def _picked(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _rows([x for x in (self.k, self.v) if x is not None], index)

    def _take(self, picked: tuple[torch.Tensor, ...]) -> None:
        if picked:
            self.k, self.v = (_kept_in_place(x, y) for x, y in zip((self.k, self.v), picked, strict=True))

    def _snapshot(self) -> Any:
        return dict(self.__dict__)

    def _restore(self, snapshot: Any) -> None:
        self.__dict__.update(snapshot)


class DecoderCache(NamedTuple):
    """What one layer of an encoder-decoder's decoder remembers."""

    own: KVCache
    memory: MemoryCache

    def reorder(self, index: torch.Tensor) -> None:
        """As in ``KVCache``."""
        own, memory = self.own._picked(index), self.memory._picked(index)
        self.own._take(own)
        self.memory._take(memory)


def caches_in(cache: Any) -> Iterator[KVCache | MemoryCache]:
    """The caches in a list, a tuple, or lists of them; what else a model remembers by is passed over."""
    if isinstance(cache, (KVCache, MemoryCache)):
        yield cache
    elif isinstance(cache, (list, tuple)):
        for one in cache:
            yield from caches_in(one)


class all_or_nothing:  # read as a statement
    """Within it caches are filled as a whole or not at all: what raises leaves them as they were, for another try.

        with nn.all_or_nothing(caches):
            logits = model(tokens, caches)

    The layers and containers here, ``generate`` and ``stream`` have it about their own steps; a model that stacks layers by
    itself needs it, since a layer that succeeded does not hear of the next one's failure. ``cache`` is one, or a list of
    them. ``reorder`` within it is not taken back.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __enter__(self) -> None:
        # Within another one this has nothing to do: what fails here fails there.
        self._saved = [(one, one._snapshot()) for one in caches_in(self._cache) if not one._held]
        for one, _ in self._saved:
            one._held = True

    def __exit__(self, kind: Any, *_: Any) -> None:
        for one, snapshot in self._saved:
            one._held = False
            if kind is not None:
                one._restore(snapshot)  # in which nobody held it
