"""Caches of a decoder that can be put back: a step that fails leaves them as they were."""

import copy
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Snapshot(NamedTuple):
    """The former state of a cache: its attributes, and copies of those tensors that have been written to since."""

    state: dict[str, Any]
    copies: dict[str, torch.Tensor]


class Restorable:
    """Keys and values of one layer, which can be put back to what they were."""

    k: torch.Tensor | None
    v: torch.Tensor | None

    def __init__(self) -> None:
        self._owner: Any = None  # a weak reference to the layer whose keys these are
        self._open: list[Snapshot] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None, "_open": []}  # a copy may go with a copy of the model

    def __copy__(self) -> Any:
        return copy.deepcopy(self)  # two caches that shared memory would overwrite each other's rows

    def _claim(self, layer: Any, empty: bool) -> None:
        if not empty and self._owner is not None and self._owner() is not layer:
            raise ValueError("cache: expected one that is empty or that this layer filled; got another layer's: each layer "
                             "takes a cache of its own")
        self._owner = weakref.ref(layer)

    def _snapshot(self) -> Snapshot:
        self._open.append(Snapshot({name: value for name, value in self.__dict__.items() if name != "_open"}, {}))
        return self._open[-1]

    def _about_to_write(self, *names: str) -> None:
        """Called before rows that count change in tensors, given by name: the open snapshots keep copies of them."""
        copies: dict[str, torch.Tensor] = {}
        for state, kept in self._open:
            for name in names:
                x = getattr(self, name)
                if x is not None and x is state[name] and name not in kept:
                    if name not in copies:
                        copies[name] = (x if x.dim() == 1 else x[:, : state.get("length")]).clone()
                    kept[name] = copies[name]

    def _close(self, snapshot: Snapshot, restore: bool) -> None:
        self._open[:] = [one for one in self._open if one is not snapshot]
        if restore:
            self.__dict__.update(snapshot.state)
            for name, rows in snapshot.copies.items():
                (getattr(self, name) if rows.dim() == 1 else getattr(self, name)[:, : rows.shape[1]]).copy_(rows)


def caches_in(cache: Any) -> Iterator[Restorable]:
    """The caches in a list, a tuple, or lists of them; anything else that a model may use as a cache is passed over."""
    if isinstance(cache, Restorable):
        yield cache
    elif isinstance(cache, (list, tuple)):
        for one in cache:
            yield from caches_in(one)


class all_or_nothing:  # read as a statement
    """Within this context, caches are filled as a whole or not at all: an exception leaves them as they were, for another try.

        with nn.all_or_nothing(caches):
            logits = model(tokens, caches)

    The layers and containers here, ``generate`` and ``stream`` use it around their own steps; a model that stacks layers by
    itself needs it, since a layer that succeeded does not learn of the next one's failure. ``cache`` is one cache, or a list of
    them. What ``append`` did is undone without a copy of keys; ``truncate``, ``reorder`` and ``clear`` within it copy what they
    forget.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._saved: list[list[tuple[Restorable, Snapshot]]] = []  # one entry for each time that it was entered and not left

    def __enter__(self) -> None:
        self._saved.append([(one, one._snapshot()) for one in caches_in(self._cache)])

    def __exit__(self, kind: Any, *_: Any) -> None:
        for one, snapshot in self._saved.pop():
            one._close(snapshot, restore=kind is not None)
