"""From a plain function to a mod bound to its operands: traced once for all functions of one code and like captures."""

import hashlib
import inspect
import threading
import traceback
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fused_attn import torch_private
from fused_attn.call import mods
from fused_attn.call.functions import running, texts
from fused_attn.call.functions.captures import beyond_its_cells, captured
from fused_attn.call.functions.expressions import BATCH, COORDINATES, HEAD, SCORE, Expr, walk
from fused_attn.call.functions.placing import Argument, Bounds, Placed, place, softcap, window
from fused_attn.call.functions.trace import Reached, Step, shape_of, trace
from fused_attn.call.functions.typed import UntraceableError
from fused_attn.call.mods import Bound, MaskMod, RelativeBias, ScoreMod

_PACKAGE = str(Path(__file__).parent)
_KEPT = 512  # traced functions, those asked for last


class Prepared(NamedTuple):
    """A traced function as calls take it: its mod, and what makes the operands of its own tensors."""

    mod: ScoreMod | MaskMod
    operands: Callable[..., list[torch.Tensor]]
    arguments: tuple[Argument, ...]
    by_accuracy: bool


class Traced(NamedTuple):
    """A plain function: as a whole, and as ``bounds`` and the ``rest`` of a mask that they do not tell, or as a ``softcap`` and
    what comes after it."""

    key: str
    steps: tuple[Step, ...]
    whole: Prepared
    bounds: Bounds
    softcap: float | None
    rest: Prepared | None


class Found(NamedTuple):
    """What a function comes to in a call: a mod bound to its operands, bounds on kv_idx - q_idx, and a softcap."""

    bound: Bound | None
    bounds: Bounds
    softcap: float | None = None


BY_SHAPE = "by shape"  # in place of a trace: there is one for each shape of the captured tensors
_TRACED: "OrderedDict[Hashable, Traced | str]" = OrderedDict()
_LOCK = threading.Lock()
_IN_GRAPHS = types.SimpleNamespace()  # what graphs are made of: torch.compile reads attributes anew, a dict once


def bound(name: str, function: Callable[..., Any], given: tuple[Any, ...], extents: Sequence[int], q: torch.Tensor,
          split: bool) -> Found:
    """A plain function in a call of ``extents`` (B, H, Nq, Nk); ``name`` is ``score_mod`` or ``mask_mod``, ``given`` follow the
    coordinates as arguments. ``split``: a mask's bounds, or the softcap that a score function begins with, are told apart."""
    traced, tensors = (_within_a_graph if torch.compiler.is_compiling() else _traced)(name, function, given)
    for x in tensors:
        if x.device != q.device and x.dim():
            raise ValueError(f"{name}: expected captured tensors on q's device {q.device}; got one on {x.device}")
    prepared, bounds, cap = (traced.rest, traced.bounds, traced.softcap) if split else (traced.whole, Bounds(), None)
    if prepared is None:
        return Found(None, bounds, cap)
    computed: list[torch.Tensor] = []  # by the steps
    for step in traced.steps:
        result = step.function(*_real(step.args, tensors, computed), **_real(step.kwargs, tensors, computed))
        computed.append(result if step.item is None else result[step.item])
    # Steps are numbered downwards from -1, and that is how Python counts from a list's end.
    try:
        operands = prepared.operands([*tensors, *reversed(computed)], tuple(extents), q.device)
    except IndexError as error:
        raise IndexError(f"{name}: {error}") from None
    operands = [x.to(q.device) if x.device != q.device else x for x in operands]
    args: list[Any] = [RelativeBias(x) if argument.form == "difference" else x
                       for x, argument in zip(operands, prepared.arguments, strict=True)]
    if prepared.by_accuracy:
        args.append(int(q.dtype in (torch.float32, torch.float64)))
    return Found(Bound(prepared.mod, tuple(args)), bounds, cap)


def _real(x: Any, tensors: Sequence[torch.Tensor], computed: Sequence[torch.Tensor]) -> Any:
    """``x`` with the tensors that each ``Reached`` stands for."""
    if isinstance(x, Reached):
        return tensors[x.number] if x.number >= 0 else computed[-1 - x.number]
    if isinstance(x, slice):
        return slice(*(_real(y, tensors, computed) for y in (x.start, x.stop, x.step)))
    if type(x) in (tuple, list):
        return type(x)(_real(y, tensors, computed) for y in x)
    return {name: _real(y, tensors, computed) for name, y in x.items()} if isinstance(x, dict) else x


def _traced(name: str, function: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Traced, list[torch.Tensor]]:
    """(the trace of a function, the tensors that it reaches)."""
    reached = captured(function, given)
    key: Hashable = None if reached.key is None else (name, reached.key)
    with _LOCK:
        found = _TRACED.get(key)
        if found is BY_SHAPE:
            key = (key, tuple(map(shape_of, reached.tensors)))
            found = _TRACED.get(key)
        if isinstance(found, Traced):
            _TRACED.move_to_end(key)
            return found, reached.tensors
    symbols = COORDINATES if name == "mask_mod" else (SCORE, *COORDINATES)
    _check_signature(name, function, symbols, len(given))
    try:
        made, tensors = trace(function, symbols, reached.tensors, given)
        traced = _prepared(name, function, made.body, made.steps)
    except UntraceableError as error:
        raise TypeError(f"{name}: {error}{_place(function, error)}") from None
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:  # what Python or torch cannot do with symbols
        raise TypeError(f"{name}: {type(error).__name__}: {error}{_place(function, error)}") from error
    if key is not None and not made.by_more and len(tensors) == len(reached.tensors):
        with _LOCK:
            if made.by_shape and found is None:
                _TRACED[key] = BY_SHAPE
                key = (key, tuple(map(shape_of, tensors)))
            _TRACED[key] = traced
            while len(_TRACED) > _KEPT:
                _TRACED.popitem(last=False)
    return traced, tensors


def _within_a_graph(name: str, function: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Traced, list[torch.Tensor]]:
    """``_traced`` while torch.compile traces, which sees the tensors of the function's own closure and those given."""
    try:
        closure = function.__closure__ or ()  # which a function that is made within the graph does not have there
    except AttributeError:
        _refuse(name)
    if any(not isinstance(x, torch.Tensor) for x in given):
        _refuse(name)
    cells = [cell.cell_contents for cell in closure]
    key, numbers = _constant(name, function, tuple((x.dtype, x.dim()) for x in given))
    for x, number in zip(cells, numbers, strict=True):
        if number is not None and x != number:  # a guard of the graph, which is made anew for another number
            raise RuntimeError(f"{name}: the function captures {x}, and was traced with {number}")
    return getattr(_IN_GRAPHS, key), [x for x in (*given, *cells) if isinstance(x, torch.Tensor)]


@torch_private.constant_when_traced
def _refuse(name: str, reason: str = "this one is made within the graph, or takes numbers by mod_args=") -> NoReturn:
    raise TypeError(f"{name}: within torch.compile, a function is made outside of the graph, and takes tensors by mod_args=, "
                    f"or tensors and numbers as variables of the function around it; {reason}")


@torch_private.constant_when_traced
def _constant(name: str, function: Callable[..., Any], kinds: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """(the key of the trace of a function, the number that each of its cells holds, or None).

    ``kinds`` are (dtype, dimensions) of the tensors that are given to it.
    """
    if (reason := beyond_its_cells(function)) is not None:
        _refuse(name, reason)
    given = tuple(torch.empty((1,) * dims, dtype=dtype) for dtype, dims in kinds)
    traced, _ = _traced(name, function, given)
    kept = vars(_IN_GRAPHS)
    kept.setdefault(traced.key, traced)
    if len(kept) > 8 * _KEPT:
        del kept[next(iter(kept))]  # its graph is made anew, if it is still there
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return traced.key, tuple(x if isinstance(x, (bool, int, float)) else None for x in cells)


def _check_signature(name: str, function: Callable[..., Any], symbols: Sequence[Expr], more: int) -> None:
    """Checks that a function takes the coordinates, and then as many arguments as are given to it."""
    expected = f"({', '.join(x.op for x in symbols)}{', ...' * bool(more)})"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*symbols, *[None] * more)
    except TypeError:
        raise TypeError(f"{name}: expected a function of {expected}; got one of {signature}") from None


def _place(function: Callable[..., Any], error: BaseException) -> str:
    """Where in the user's code an error came up."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_PACKAGE)]
    frames = [frame for frame in frames if "torch" not in Path(frame.filename).parts] or frames
    if not frames:
        return f" (in {getattr(function, '__qualname__', function)!s})"
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})"


def _prepared(name: str, function: Callable[..., Any], body: Expr, steps: tuple[Step, ...]) -> Traced:
    masks = name == "mask_mod"
    word = getattr(function, "__name__", type(function).__name__)
    word = word if word.isidentifier() else "function"
    key = f"of_{hashlib.sha256(f'{name} {word} {body!r} {steps}'.encode()).hexdigest()}"
    if not masks:
        cap, rest = softcap(body)
        whole = _mod(word, place(body), False)
        after = whole if cap is None else None if rest is SCORE else _mod(word, place(rest), False)
        return Traced(key, steps, whole, Bounds(), cap, after)
    if body.kind != "bool":
        raise UntraceableError("a mask function returns truth values, True where a pair attends; this one returns "
                               f"{'an integer' if body.kind == 'int' else 'a number'}")
    bounds, beside = window(body)
    whole = _mod(word, place(body), True)
    after = None if beside is None else whole if beside is body else _mod(word, place(beside), True)
    return Traced(key, steps, whole, bounds, None, after)


def _mod(word: str, placed: Placed, masks: bool) -> Prepared:
    """The mod of a placed function."""
    kernel, plain = texts.kernel(placed, masks), texts.reference(placed, masks)
    digest = hashlib.sha256(f"{kernel.source}|{plain}".encode()).hexdigest()[:16]
    looked_up = {x.value[0]: x for x in walk(placed.body) if x.op == "entry"}
    where = placed.uses | {x for entry in looked_up.values() for x in entry.args}
    slopes = tuple(f"slope_{i}" if has else None for i, has in enumerate(kernel.has_slope))
    code = mods.Code(f"{word}_{digest}", word, by_batch=BATCH in where, by_head=masks and HEAD in where,
                     source=kernel.source, raw=True, slope="slope", arg_slopes=slopes, adds=not masks and texts.adds(placed))
    mod = mods.of_code(MaskMod if masks else ScoreMod, code, running.loaded(plain, "reference"))
    return Prepared(mod, running.loaded(texts.operands(placed.arguments), "operands"), placed.arguments,
                    texts.by_accuracy(placed))


def is_plain(function: Any) -> bool:
    """Whether something is a plain function, or an object that is called like one."""
    compiled = type(function).__module__.startswith("triton.")  # by triton.jit
    return callable(function) and not compiled and not isinstance(function, (ScoreMod, MaskMod, Bound, type))


def evaluated_mask(function: Callable[..., Any], extents: Sequence[int],
                   device: torch.device) -> Callable[[slice], torch.Tensor]:
    """A function from a range of queries to which of their pairs a mask function keeps, [B, H, queries, Nk]."""
    batch, heads, _, n_keys = extents
    like = torch.empty(0, device=device)
    bound_to = bound("mask_mod", function, (), extents, like, False).bound
    assert bound_to is not None
    plain, given = bound_to.mod.plain, bound_to.args
    assert plain is not None

    def keep(rows: slice) -> torch.Tensor:
        args = [_of_rows(x, rows, extents) for x in given]
        q_idx = torch.arange(rows.start, rows.stop, device=device)[:, None]
        where = q_idx, torch.arange(n_keys, device=device), torch.arange(heads, device=device)[:, None, None]
        kept: torch.Tensor = plain(*where, torch.arange(batch, device=device)[:, None, None, None], args)
        return kept.expand(batch, heads, rows.stop - rows.start, n_keys)

    return keep


def _of_rows(x: Any, rows: slice, extents: Sequence[int]) -> Any:
    """The part of an argument that belongs to some queries."""
    if isinstance(x, RelativeBias):
        (n_queries, n_keys), device = extents[2:], x.values.device
        queries = torch.arange(rows.start, rows.stop, device=device)[:, None]
        return x.values[..., torch.arange(n_keys, device=device) - queries + n_queries - 1]
    return x[:, :, rows] if isinstance(x, torch.Tensor) and x.shape[2] > 1 else x
