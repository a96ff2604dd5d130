"""vmap over the kernels' autograd Functions: the calls of a transform become one call with a larger batch, where they can.

They cannot where entries of a batch are no calls of their own: dropout draws by entry, packed sequences have no batch, and what
a whole call has once (sinks, an additive score's weights, a table) may differ between calls, or want a gradient for each. Then
the calls are made one after the other.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from fused_attn import torch_private
from fused_attn.call.mods import Code
from fused_attn.call.spec import AttentionSpec, OtherTensors

Place = int | None  # the dimension of a tensor that is the batch, or None where it has no batch


class Batch(NamedTuple):
    """Where the batch lies in a Function's arguments, of which the first has it in front, and in its results.

    ``shared``: which arguments may have extent 1 there, for all entries.
    """

    inputs: tuple[Place, ...]
    shared: tuple[bool, ...]
    results: tuple[Place, ...]


def of_others(spec: AttentionSpec, others: OtherTensors, dims: Any) -> tuple[Place, ...] | None:
    """The places of a call's other tensors, flat, given the dimensions that vmap maps; None where calls are made one by one."""
    if others.seed is not None or others.cu_q is not None or any(_counts(member.code) for member in spec.score_mods):
        return None
    if any(member.code.by_batch for member in spec.mask_mods):
        return None
    for x, dim in zip(others.operands, dims.operands, strict=True):
        extents = x.shape if dim is None else x.movedim(dim, 0).shape[1:]
        if len(extents) > 4 and extents[0] > 1:  # looked up by entry of the batch
            return None
    operands = of_operands(others.operands, dims.operands)
    return None, None, None, None, None, 0, 0, *operands


def _counts(code: Code) -> bool:
    """Whether a score function may read which entry of the batch it is at, as any may that was written by hand."""
    return code.by_batch or code.function is not None


def of_operands(operands: Sequence[torch.Tensor], dims: Sequence[Place]) -> tuple[Place, ...]:
    """The places of operands, or of their tangents, which are empty for those that do not move; a table counts as one thing."""
    ranks = (x.dim() - (dim is not None) for x, dim in zip(operands, dims, strict=True))
    return tuple(0 if 3 <= rank <= 4 else None for rank in ranks)


def has_older(tensors: Sequence[Any]) -> bool:
    """Whether some are batches of the older vmap, that of ``is_grads_batched`` and of vectorised jacobians."""
    return any(x is not None and torch_private.is_batched(x) for x in tensors)


def applied(function: Any, fixed: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """``function.apply(*fixed, *tensors)``, by its ``vmap`` where tensors are batches of the older vmap, which knows none."""
    if not has_older(tensors):
        found: tuple[Any, ...] = function.apply(*fixed, *tensors)
        return found
    dims = tuple(0 if x is not None and torch_private.is_batched(x) else None for x in tensors)
    whole = [x if dim is None else torch_private.unbatched(x) for x, dim in zip(tensors, dims, strict=True)]
    size = next(x.shape[0] for x, dim in zip(whole, dims, strict=True) if dim is not None)
    results, places = function.vmap(SimpleNamespace(batch_size=size), (*(None for _ in fixed), *dims), *fixed, *whole)
    return tuple(x if at is None else torch_private.batched(x, at) for x, at in zip(results, places, strict=True))


def vmapped(function: type[torch.autograd.Function], batch: Batch | None, size: int, dims: Sequence[Place],
            fixed: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Place, ...]]:
    """(results, their new dimensions) of ``function.apply(*fixed, *tensors)`` for each of ``size`` calls, as a ``vmap`` returns
    them. ``batch`` is None where calls must be made one by one."""
    if size == 0:  # of one call, none is kept
        one = (x if dim is None else x.new_zeros(x.movedim(dim, 0).shape[1:]) for x, dim in zip(tensors, dims, strict=True))
        none = tuple(None if x is None else x.new_empty(0, *x.shape) for x in function.apply(*fixed, *one))
        return none, tuple(None if x is None else 0 for x in none)
    whole = None if batch is None else _folded(batch, size, dims, tensors)
    if batch is None or whole is None:
        each = [function.apply(*fixed, *(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)))
                for i in range(size)]
        stacked = tuple(None if x[0] is None else torch.stack(x) for x in zip(*each, strict=True))
        return stacked, tuple(None if x is None else 0 for x in stacked)
    found = function.apply(*fixed, *whole)
    apart = tuple(None if x is None else x.unflatten(at, (size, x.shape[at] // size))
                  for x, at in zip(found, batch.results, strict=True))
    return apart, tuple(None if x is None else at for x, at in zip(apart, batch.results, strict=True))


def _folded(batch: Batch, size: int, dims: Sequence[Place], tensors: Sequence[Any]) -> list[Any] | None:
    """The tensors of ``size`` calls as those of one, or None where they cannot be."""
    first, dim = tensors[0], dims[0]
    entries = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
    if not entries:
        return None
    made: list[Any] = []
    for x, dim, at, shared in zip(tensors, dims, batch.inputs, batch.shared, strict=True):
        if x is None or (dim is None and (at is None or (shared and x.shape[at] == 1))):
            made.append(x)
        elif at is None:
            return None
        else:
            x = x.unsqueeze(at) if dim is None else x.movedim(dim, at)
            made.append(x.expand(*x.shape[:at], size, entries, *x.shape[at + 2 :]).flatten(at, at + 1))
    return made
