"""Runs a plain function once, on symbols in place of numbers, and keeps what it does with them as an expression.

Symbols raise where the function asks what no compiled kernel could answer, within the line that asks; torch.fx, which
records first and is looked at later, would not. Tensors that the function reaches, and what it computes of them alone, stay
tensors: a ``TorchFunctionMode`` notes how each came to be, so that a later call computes it anew from its own tensors.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from fused_attn.call.functions.expressions import Expr, constant, expression, kind_of
from fused_attn.call.functions.names import (
    ALIASES,
    ASKS_FOR_VALUE,
    BY_NAME,
    CASTS,
    DTYPES,
    IN_PLACE,
    MAGIC,
    NEW,
    REVERSED,
    TELLS_SHAPE,
    by_function,
)
from fused_attn.call.functions.operations import make
from fused_attn.call.functions.typed import UntraceableError, typed


class Step(NamedTuple):
    """A tensor that a function computes of others alone, each of which a ``Reached`` stands for."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int | None  # of a result of several


class Reached(NamedTuple):
    """A tensor that a function reaches: from 0 on those that it captures or is given, from -1 downwards what steps compute."""

    number: int


class Trace(NamedTuple):
    """What a function does: the expression of its result, and the tensors that it computes beforehand."""

    body: Expr
    steps: tuple[Step, ...]
    by_shape: bool  # whether it depends on the shapes of tensors
    by_more: bool  # and on what else nobody knows of them


class Symbol:
    """Stands for a number: the score, a coordinate, or what is computed of them."""

    __slots__ = ("expr", "tracer")
    __hash__ = object.__hash__
    __array_ufunc__ = None  # NumPy's numbers leave operations to this class
    expr: Expr
    tracer: "_Tracer"

    def __init__(self, expr: Expr, tracer: "_Tracer") -> None:
        self.expr, self.tracer = expr, tracer

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = next(x.tracer for x in _flat((args, kwargs or {})) if isinstance(x, Symbol))
        return tracer.call(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name == "dtype":
            return _DtypeOf(self)
        if name == "device":
            return None  # that of everything else
        if name in ("shape", "ndim"):
            raise UntraceableError(f"a {self.expr.op} is a number here and has no {name!r}")
        if name in NEW:
            return functools.partial(self.tracer.new, name)
        method = BY_NAME.get(name)
        if method is None:
            raise UntraceableError(f"{name!r} is not among the operations that a score or mask function may use: "
                                   f"{', '.join(sorted(BY_NAME))}")
        return functools.partial(self.tracer.apply, method, self)

    def __getitem__(self, index: Any) -> "Symbol":
        return self.tracer.call(torch.Tensor.__getitem__, (self, index), {})

    def __bool__(self) -> bool:
        raise UntraceableError("a branch, `and`, `or`, `not`, a chain of comparisons, min or max asks for the value of a number"
                               " that differs from pair to pair; torch.where, &, |, ~, torch.minimum and torch.maximum do not")

    def _value(self) -> Any:
        raise UntraceableError("the value of a number that differs from pair to pair is asked for, as math.exp, int and range "
                               "do; torch.exp and the like compute with it")

    __int__ = __float__ = __index__ = _value

    def __iter__(self) -> Any:
        raise UntraceableError("a number cannot be iterated over")


class _DtypeOf(NamedTuple):
    symbol: Symbol


def _flat(x: Any) -> list[Any]:
    """Everything in nested tuples, lists, dicts and slices."""
    if isinstance(x, slice):
        return _flat((x.start, x.stop, x.step))
    if isinstance(x, (tuple, list)) and not isinstance(x, _DtypeOf):
        return [y for z in x for y in _flat(z)]
    return _flat(list(x.values())) if isinstance(x, dict) else [x]


for _name, _op in MAGIC.items():
    setattr(Symbol, _name, lambda self, *args, _op=_op: self.tracer.apply(_op, self, *args))


def shape_of(x: torch.Tensor) -> tuple[Any, ...]:
    """What a trace may depend on of a tensor, beside its type and number of dimensions."""
    return (*x.shape, *x.stride(), str(x.device), x.requires_grad)


def _composed(tracer: "_Tracer", op: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Operations that are made of others."""
    if op == "square":
        return x * x
    if op == "reciprocal":
        return 1.0 / x
    if op == "relu":
        return tracer.apply("where", x > 0, x, x * 0)
    if op == "silu":
        return x * tracer.apply("sigmoid", x)
    if op == "gelu" and not args and kwargs.get("approximate", "none") == "none":
        return x * 0.5 * (tracer.apply("erf", x * 0.5**0.5) + 1.0)
    if op == "softplus" and not args and not kwargs:
        return tracer.apply("log1p", tracer.apply("exp", -abs(x))) + tracer.apply("where", x > 0, x, x * 0)
    raise UntraceableError(f"{op} with these arguments is not among the operations that a score or mask function may use")


class _Tracer(TorchFunctionMode):
    """Watches one run of a function; ``leaves`` are the tensors that it captures or is given."""

    def __init__(self, leaves: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.leaves = list(leaves)
        self.steps: list[Step] = []
        self.known: dict[int, Reached] = {id(x): Reached(i) for i, x in reversed(list(enumerate(leaves)))}
        self.made: list[torch.Tensor] = []
        self.by_shape = self.by_more = False  # whether it asked for the shape of a tensor, or for what nobody knows

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _flat((args, kwargs))
        if any(isinstance(x, Symbol) for x in given):
            return self.call(function, args, kwargs)
        if function in ASKS_FOR_VALUE:
            raise UntraceableError("the value of a captured tensor is asked for; it may differ from call to call, and a "
                                   "function is traced once: compute with the tensor, or capture a number")
        name = getattr(function, "__name__", "")
        if (name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
                or kwargs.get("out") is not None):
            raise UntraceableError(f"{name} changes a captured tensor in place")
        result = function(*args, **kwargs)
        several = isinstance(result, (tuple, list)) and any(isinstance(x, torch.Tensor) for x in result)
        if not several and not isinstance(result, torch.Tensor):
            self.by_shape |= function in TELLS_SHAPE
            self.by_more |= function not in TELLS_SHAPE
        if isinstance(result, torch.Tensor) or several:
            args, kwargs = self.noted(args), self.noted(kwargs)
            for item, x in enumerate(result if several else (result,)):
                if id(x) not in self.known:
                    self.known[id(x)] = Reached(-1 - len(self.steps))
                    self.steps.append(Step(function, args, kwargs, item if several else None))
                    self.made.append(x)  # kept, so that no other tensor gets its id
        return result

    def noted(self, x: Any) -> Any:
        """``x`` with a ``Reached`` in place of each tensor."""
        if isinstance(x, torch.Tensor):
            if id(x) not in self.known:
                self.known[id(x)] = Reached(len(self.leaves))
                self.leaves.append(x)
            return self.known[id(x)]
        if isinstance(x, slice):
            return slice(*(self.noted(y) for y in (x.start, x.stop, x.step)))
        if isinstance(x, (tuple, list)):
            return type(x)(self.noted(y) for y in x) if type(x) in (tuple, list) else x
        return {name: self.noted(y) for name, y in x.items()} if isinstance(x, dict) else x

    def expr(self, x: Any) -> Expr:
        """The expression that an argument of an operation stands for."""
        if isinstance(x, Symbol):
            if x.expr.kind == "tensor":
                raise UntraceableError("only a part of the dimensions of a captured tensor is indexed: a score or mask "
                                       "function computes with single elements")
            return x.expr
        if isinstance(x, torch.Tensor):
            if x.dim():
                raise UntraceableError(f"a captured tensor of shape {tuple(x.shape)} is used as if it were a number; index "
                                       "it by b, h, q_idx or kv_idx, as in bias[h, q_idx, kv_idx]")
            return expression("element", (self.tensor(x),), kind=kind_of(x.dtype))
        number = self.number(x)
        if number is not None:
            return constant(number)
        raise UntraceableError(f"computes with {type(x).__name__}, which is neither a number nor a tensor")

    @staticmethod
    def number(x: Any) -> Any:
        """``x`` as a number of Python's own, if it is one."""
        x = x.item() if getattr(x, "ndim", None) == 0 and hasattr(x, "item") else x  # of NumPy's as well
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            return x if isinstance(x, bool) else None
        if isinstance(x, float):
            return float(x)
        if not -(2**63) <= x < 2**63:
            raise UntraceableError(f"{x} does not fit 64 bits")
        return int(x)

    def tensor(self, x: torch.Tensor) -> Expr:
        """The expression of a captured tensor; its value: which one, its dimensions, and the kind of its elements."""
        return expression("tensor", value=(self.noted(x).number, x.dim(), kind_of(x.dtype)), kind="tensor")

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
        """What a function of torch or Python gives, some of whose arguments are symbols."""
        if function is torch.Tensor.__getitem__ or function is operator.getitem:
            return self.element(*args)
        op = by_function().get(function)
        if op is None:
            name = getattr(function, "__qualname__", getattr(function, "__name__", repr(function)))
            raise UntraceableError(f"{name} is not among the operations that a score or mask function may use: "
                                   f"{', '.join(sorted(ALIASES))}")
        return self.apply(op, *args, **kwargs)

    def element(self, x: Any, index: Any) -> Symbol:
        """An element of a captured tensor, or a part of one that is still to be indexed."""
        index = index if isinstance(index, tuple) else (index,)
        if isinstance(x, Symbol) and x.expr.kind != "tensor":
            raise UntraceableError("a number cannot be indexed")
        base, before = (self.tensor(x), ()) if isinstance(x, torch.Tensor) else (x.expr.args[0], x.expr.args[1:])
        for i in index:
            if isinstance(i, (slice, type(None), type(...), list)) or (isinstance(i, torch.Tensor) and i.dim()):
                raise UntraceableError(f"a captured tensor is indexed by {type(i).__name__}; expected a number for each "
                                       "dimension, made of b, h, q_idx, kv_idx and captured tensors")
        indices = (*before, *(self.expr(i) for i in index))
        if any(i.kind != "int" for i in indices):
            raise UntraceableError("a captured tensor is indexed by what is no integer")
        _, dims, kind = base.value
        if len(indices) > dims:
            raise UntraceableError(f"{len(indices)} indices for a captured tensor of {dims} dimensions")
        return Symbol(expression("element", (base, *indices), kind=kind if len(indices) == dims else "tensor"), self)

    def apply(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """The symbol of an operation by its name here, with the arguments of the function that was called."""
        if op in ("square", "reciprocal", "relu", "softplus", "silu", "gelu"):
            return _composed(self, op, *args, **kwargs)
        if op in ("to", "type_as", *CASTS):
            return self.cast(op, *args, **kwargs)
        if op in ("clamp", "clamp_min", "clamp_max"):
            return self.clamp(op, *args, **kwargs)
        if op in ("pos", "detach"):
            if op == "detach":
                raise UntraceableError("detach is not among the operations that a score or mask function may use; detach "
                                       "tensors before they are captured")
            return args[0]
        if op == "div" and (rounding := kwargs.pop("rounding_mode", None)) is not None:
            if rounding not in ("floor", "trunc"):
                raise UntraceableError(f"rounding_mode={rounding!r} is none of torch.div's")
            quotient = self.apply("floordiv" if rounding == "floor" else "div", *args)
            return quotient if rounding == "floor" else self.apply("trunc", quotient)
        if kwargs:
            raise UntraceableError(f"{op} with the argument {next(iter(kwargs))!r} is not among the operations that a score or "
                                   "mask function may use")
        if op[0] == "r" and op[1:] in REVERSED:
            op, args = op[1:], args[::-1]
        arguments = [self.expr(x) for x in args]
        if op.startswith("logical_"):
            arguments = [x if x.kind == "bool" else make("ne", x, constant(0)) for x in arguments]
            op = op.removeprefix("logical_")
        return Symbol(typed(op, arguments), self)

    def cast(self, op: str, x: Symbol, *args: Any, **kwargs: Any) -> Symbol:
        """``x`` in another type."""
        targets = [y for y in (*args, *kwargs.values()) if not isinstance(y, (bool, torch.device, str))]
        target = CASTS.get(op) or (targets[0] if len(targets) == 1 else None)
        if isinstance(target, _DtypeOf):
            target = target.symbol
        if isinstance(target, Symbol):  # that of a score, or of what is computed with it
            target = {"bool": torch.bool, "int": torch.int64}.get(target.expr.kind)
            value, kind = ("score", "float") if target is None else (target, kind_of(target))
        elif isinstance(target, (torch.Tensor, torch.dtype)):
            value = target.dtype if isinstance(target, torch.Tensor) else target
            kind = kind_of(value)
        else:
            raise UntraceableError(f"a cast to {target!r} is not among the operations that a score or mask function may use")
        if value != "score" and value not in DTYPES:
            raise UntraceableError(f"a cast to {value} is not among the operations that a score or mask function may use")
        source = self.expr(x)
        if value == torch.bool:
            return Symbol(source if source.kind == "bool" else make("ne", source, constant(0)), self)
        return Symbol(expression("cast", (source,), value, kind), self)

    def new(self, name: str, *args: Any, **kwargs: Any) -> Symbol:
        """A number, as ``new_ones`` and the like make it of no dimensions."""
        size = () if name == "new_tensor" else args[0] if args else kwargs.get("size", ())
        value: Any = {"new_ones": 1, "new_zeros": 0}.get(name)
        if value is None:
            value = kwargs.get("fill_value", kwargs.get("data", args[-1] if args else None))
        if tuple(size) if isinstance(size, (tuple, list)) else True:
            raise UntraceableError(f"{name} makes a tensor of {size!r}; a score or mask function computes with single numbers")
        dtype = kwargs.get("dtype")
        kind = None if dtype is None else kind_of(dtype)
        number = bool(value) if kind == "bool" else int(value) if kind == "int" else float(value) if kind == "float" else value
        return Symbol(constant(number), self)

    def clamp(self, op: str, x: Any, *bounds: Any, **kwargs: Any) -> Symbol:
        """``x`` within bounds, either of which may be missing."""
        names = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}[op]
        given = {**dict(zip(names, bounds, strict=False)), **kwargs}
        if all(given.get(name) is None for name in ("min", "max")):
            raise UntraceableError(f"{op} without a bound")
        found = self.expr(x)
        for name, inside in (("min", "at_least"), ("max", "at_most")):
            if given.get(name) is not None:
                found = typed(inside, [found, self.expr(given[name])])
        return Symbol(found, self)


def trace(function: Callable[..., Any], symbols: Sequence[Expr], leaves: Sequence[torch.Tensor],
          given: Sequence[Any] = ()) -> tuple[Trace, list[torch.Tensor]]:
    """(what ``function`` does with ``symbols`` and with what is ``given`` beside them; all tensors that it reaches).

    ``leaves`` are those that it is known to reach; if there are more, they come after these.
    """
    tracer = _Tracer(leaves)
    with tracer:
        result = function(*(Symbol(x, tracer) for x in symbols), *given)
    if not isinstance(result, (Symbol, torch.Tensor, bool, int, float)):
        kind = "None" if result is None else type(result).__name__
        raise UntraceableError(f"the function returns {kind}, which is no number")
    body = tracer.expr(result)
    return Trace(body, tuple(tracer.steps), tracer.by_shape, tracer.by_more), tracer.leaves
