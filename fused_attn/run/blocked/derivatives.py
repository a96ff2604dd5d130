"""Every derivative of attention by blocks, to any order, in memory linear in the length.

Rows of the output depend on one block each. So attention is a map over blocks: a function of what belongs to a block of every
tensor, whose results are put together. The gradients of such a map are a map again, of the function's own gradients, in which
what was cut is added up and what was put together is cut; and so are its tangents. Autograd sees one block at a time, made anew
for every derivative, and never the whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from fused_attn.call.schema import Needs
from fused_attn.call.spec import AttentionSpec, OtherTensors
from fused_attn.run.blocked import dropout
from fused_attn.run.blocked.blocks import Dense, roles, see
from fused_attn.run.blocked.dense import ROLES, Sizes, chunks, parts
from fused_attn.run.blocked.packed import batches
from fused_attn.run.blocked.tile import Tile, attend, gradients
from fused_attn.tracing import without_autocast

Tensors: TypeAlias = tuple[torch.Tensor, ...]


class Map(NamedTuple):
    """A function of a tile and of its parts of some tensors, the first of which are those of the call.

    ``inputs`` and ``outputs`` tell how tensors are cut and results put together, as in ``Block.of``; ``shapes`` gives the
    shapes of the whole results for whole inputs.
    """

    function: Callable[..., Tensors]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Callable[[Tensors], tuple[torch.Size, ...]]


class Context(NamedTuple):
    """What a map is not differentiated by: this, and as tensors those of ``_CONTEXT`` and the masks' operands."""

    spec: AttentionSpec
    has: tuple[bool, ...]  # sinks, weight: whether they follow q, k, v
    padded: bool


_CONTEXT = ("seed", "used_q", "used_k", "numbers")


def _rebuilt(context: Context, inputs: Tensors, more: tuple[Any, ...]) -> Dense:
    """The batch of a map's tensors."""
    q, k, v, *rest = inputs
    sinks, weight = (rest.pop(0) if there else None for there in context.has)
    seed, used_q, used_k, numbers, *masks = more
    n_operands = len(roles(context.spec.score_mods))
    others = OtherTensors(sinks=sinks, score_weight=weight, seed=seed, used_q=used_q, used_k=used_k,
                          operands=(*rest[:n_operands], *masks))
    batch = Dense.of(q, k, v, context.spec, others)
    offset = batch.offset
    if context.padded and context.spec.bottom_right and used_q is not None:
        offset = (used_k - used_q)[:, None, None, None]
    return batch._replace(numbers=numbers, padded=context.padded, offset=offset)


def _filled(tile: Tile, given: Tensors) -> Tile:
    """A tile of other tensors."""
    q, k, v, *rest = given
    sinks, weight = (rest.pop(0) if x is not None else None for x in (tile.sinks, tile.weight))
    return tile._replace(q=q, k=k, v=v, sinks=sinks, weight=weight, operands=tuple(rest))


def _attend(tile: Tile, *given: torch.Tensor) -> Tensors:
    return attend(_filled(tile, given))


def _leaf(x: torch.Tensor) -> torch.Tensor:
    """A view of x that autograd derives by: part of the graph in which x is made, if there is one."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _of_map(base: Map, which: tuple[int, ...], function: Callable[..., Tensors], more: tuple[str, ...],
            outputs: tuple[str, ...], shapes: Callable[[Tensors], tuple[torch.Size, ...]]) -> Map:
    """A derivative of a map, by the inputs ``which``, that takes ``more`` after its inputs."""
    n = len(base.inputs)

    def derived(tile: Tile, *given: torch.Tensor) -> Tensors:
        again = torch.is_grad_enabled()  # whether this is derived from again
        inputs, rest = list(given[:n]), given[n:]
        if function is _transposed and base.function is _attend and not again:
            return _own_gradients(tile, inputs, rest, which)
        with torch.enable_grad():
            for i in which:
                inputs[i] = _leaf(inputs[i])
            return function(base.function(tile, *inputs), [inputs[i] for i in which], rest, again)

    return Map(derived, (*base.inputs, *more), outputs, lambda given: shapes(given[:n]))


def gradient_map(base: Map, which: tuple[int, ...]) -> Map:
    """The gradients of a map by some inputs, as a map: it takes the gradients of the results after its inputs."""
    return _of_map(base, which, _transposed, base.outputs, tuple(base.inputs[i] for i in which),
                   lambda inputs: tuple(inputs[i].shape for i in which))


def tangent_map(base: Map, which: tuple[int, ...]) -> Map:
    """The tangents of a map along some inputs, as a map: it takes their tangents after its inputs."""
    return _of_map(base, which, _pushed, tuple(base.inputs[i] for i in which), base.outputs, base.shapes)


def _transposed(results: Tensors, leaves: list[torch.Tensor], grads: Tensors, again: bool) -> Tensors:
    pairs = [(x, grad) for x, grad in zip(results, grads, strict=True) if x.requires_grad]
    if not pairs:
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad([x for x, _ in pairs], leaves, [grad for _, grad in pairs], create_graph=again,
                               allow_unused=True, materialize_grads=True)


def _pushed(results: Tensors, leaves: list[torch.Tensor], tangents: Tensors, again: bool) -> Tensors:
    """J t is the gradient of (J^T u) . t by u: by reverse mode alone, since forward mode does not nest in itself everywhere."""
    grads = [torch.zeros_like(x).requires_grad_() for x in results]
    pulled = _transposed(results, leaves, tuple(grads), True)
    pairs = [(x, tangent) for x, tangent in zip(pulled, tangents, strict=True) if x.requires_grad]
    if not pairs:
        return tuple(map(torch.zeros_like, results))
    return torch.autograd.grad([x for x, _ in pairs], grads, [tangent for _, tangent in pairs], create_graph=again,
                               allow_unused=True, materialize_grads=True)


def _own_gradients(tile: Tile, inputs: list[torch.Tensor], grads: Tensors, which: tuple[int, ...]) -> Tensors:
    """The first derivative, by the formulas of ``tile.gradients``."""
    tile = _filled(tile, tuple(inputs))
    named = [0, 1, 2, *([3] if tile.sinks is not None else []), *([4] if tile.weight is not None else [])]
    wanted = [i in which for i in range(len(inputs))]
    of = {name: wanted[i] for i, name in enumerate(named)}
    dq, dk, dv, dsinks, dweight = (of.get(name, False) for name in range(5))
    needs = Needs(dq, dk, dv, dsinks, dweight, tuple(wanted[len(named):]))
    found = gradients(tile, grads[0], grads[1], needs)
    each = [*(found[name] for name in named), *found.operands]
    return tuple(each[i] for i in which)


class Mapped(torch.autograd.Function):
    """A map over the blocks of a batch: (map, context, *inputs, *tensors of the context) -> its results."""

    @staticmethod
    def forward(of: Map, context: Context, *tensors: Any) -> Tensors:
        with without_autocast(tensors[0].device):
            return Mapped._put_together(of, context, *tensors)

    @staticmethod
    def _put_together(of: Map, context: Context, *tensors: Any) -> Tensors:
        inputs, more = tensors[: len(of.inputs)], tensors[len(of.inputs):]
        results = tuple(inputs[0].new_zeros(shape) for shape in of.shapes(inputs))
        whole = _rebuilt(context, inputs, more)
        sizes, stays = Sizes.of(whole, kernel=False), dropout.of(whole)
        for entries, _, each in chunks(whole, sizes):
            for heads in each:
                part = whole.part(entries, heads)
                mine = [whole.cut(role, x, entries, heads) for role, x in zip(of.inputs, inputs, strict=True)]
                theirs = [whole.cut(role, x, entries, heads) for role, x in zip(of.outputs, results, strict=True)]
                for rows in parts(0, part.q.shape[2], sizes.rows):
                    block, hidden = see(part, rows)
                    tile = Tile.of(part, block, hidden, stays)
                    found = of.function(tile, *(block.of(role, x) for role, x in zip(of.inputs, mine, strict=True)))
                    for role, into, x in zip(of.outputs, theirs, found, strict=True):
                        block.add(role, into, x)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.of, ctx.context, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        n, tensors = len(ctx.of.inputs), ctx.saved_tensors
        which = tuple(i for i, need in enumerate(ctx.needs_input_grad[2 : 2 + n]) if need)
        found = iter(Mapped.apply(gradient_map(ctx.of, which), ctx.context, *tensors[:n], *grads, *tensors[n:]))
        return None, None, *(next(found) if i in which else None for i in range(len(tensors)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        n, tensors = len(ctx.of.inputs), ctx.saved_tensors
        which = tuple(i for i, tangent in enumerate(tangents[2 : 2 + n]) if tangent is not None)
        found: Tensors = Mapped.apply(tangent_map(ctx.of, which), ctx.context, *tensors[:n], *(tangents[2 + i] for i in which),
                                      *tensors[n:])
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], of: Map, context: Context, *tensors: Any) -> tuple[Tensors, Any]:
        """Over the batch where only queries and keys have the new dimension, else one after the other."""
        dims = in_dims[2:]
        folded = _folded(info.batch_size, dims, of, tensors)
        if folded is not None:
            entries = tensors[0].shape[0] if dims[0] is None else tensors[0].movedim(dims[0], 0).shape[1]
            found = Mapped.apply(of, context, *folded)
            return tuple(x.unflatten(0, (info.batch_size, entries)) for x in found), (0,) * len(found)
        each = [Mapped.apply(of, context, *(x if dim is None else x.select(dim, i)
                                            for x, dim in zip(tensors, dims, strict=True))) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(of.outputs)


def _folded(n: int, dims: tuple[Any, ...], of: Map, tensors: tuple[Any, ...]) -> list[Any] | None:
    """The tensors of n calls as those of one with n times the batch, or None where that cannot be."""
    if not {*of.outputs} <= {"queries", "keys"} or 0 in (n, tensors[0].shape[0]):
        return None
    made: list[Any] = []
    for i, (x, dim) in enumerate(zip(tensors, dims, strict=True)):
        role = of.inputs[i] if i < len(of.inputs) else (*_CONTEXT, *["operand"] * len(tensors))[i - len(of.inputs)]
        if x is None or (dim is None and (role in ("heads", "seed") or (role in ("operand", "relative") and x.shape[0] == 1))):
            made.append(x)
        elif role in ("heads", "seed", "operand", "relative"):
            return None
        else:
            x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
            made.append(x.expand(n, *x.shape[1:]).flatten(0, 1))
    return made


def _of_attention(n_inputs: tuple[str, ...]) -> Map:
    return Map(_attend, n_inputs, ("queries", "queries"),
               lambda inputs: (torch.Size((*inputs[0].shape[:3], inputs[2].shape[3])), inputs[0].shape[:3]))


def _of_batch(batch: Dense) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a dense batch, both in the dtype of the arithmetic."""
    others, spec = batch.others, batch.spec
    of_mods = roles(spec.score_mods)
    given = (batch.q, batch.k, batch.v, *(x for x in (others.sinks, others.score_weight) if x is not None),
             *others.operands[: len(of_mods)])
    given = tuple(x.to(batch.dtype) if x.is_floating_point() else x for x in given)
    has = others.sinks is not None, others.score_weight is not None
    of = _of_attention((*ROLES[: 3 + sum(has)], *of_mods))
    more = others.seed, others.used_q, others.used_k, batch.numbers
    found: tuple[torch.Tensor, torch.Tensor] = Mapped.apply(of, Context(spec, has, batch.padded), *given, *more,
                                                            *others.operands[len(of_mods):])
    return found


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
              others: OtherTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call, of which every derivative exists."""
    if spec.longest is None:
        out, lse = _of_batch(Dense.of(q, k, v, spec, others))
        return out.to(q.dtype), lse
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for batch, _, queries, _ in batches(q, k, v, spec, others):
        outs, lses = _of_batch(batch)
        if isinstance(queries, slice):
            rows = torch.arange(queries.start, queries.stop, device=q.device)
        else:
            inside = queries >= 0
            rows, (outs, lses) = queries[inside], (x.transpose(0, 1)[None, :, inside] for x in (outs, lses))
        out, lse = out.index_copy(2, rows, outs.to(out.dtype)), lse.index_copy(2, rows, lses)
    return out, lse


def second(spec: AttentionSpec, others: OtherTensors, inputs: Tensors, needs: Needs, grads: tuple[Any, Any],
           cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients of a backward, for q, k, v, others and the gradients it was given, by which a second derivative goes on.

    ``grads``: dout and dlse, which may be None; ``cotangents``: of dq, dk, dv, dsinks, dscore_weight and of each operand's.
    """
    again = torch.is_grad_enabled()
    sources = [*inputs, *others.flat()]
    with torch.enable_grad():
        moving = [_leaf(x) if x is not None and x.is_floating_point() else x for x in sources]
        given = [None if x is None else _leaf(x) for x in grads]
        q, k, v, *rest = moving
        moved = OtherTensors.of(rest)
        results = attention(q, k, v, spec, moved)
        ends = [(x, grad) for x, grad in zip(results, given, strict=True) if grad is not None]
        of = q, k, v, moved.sinks, moved.score_weight, *moved.operands  # in the order of a backward's results
        chosen = [(x, u) for x, need, u in zip(of, (*needs[:5], *needs.doperands), cotangents, strict=True)
                  if need and u is not None]
        first = torch.autograd.grad([x for x, _ in ends], [x for x, _ in chosen], [grad for _, grad in ends], create_graph=True,
                                    allow_unused=True, materialize_grads=True) if chosen else ()
        pairs = [(x, u) for x, (_, u) in zip(first, chosen, strict=True) if x.requires_grad]
        leaves = [x for x in (*moving, *given) if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad([x for x, _ in pairs], leaves, [u for _, u in pairs], create_graph=again,
                                         allow_unused=True) if pairs else [None] * len(leaves))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in (*moving, *given))
