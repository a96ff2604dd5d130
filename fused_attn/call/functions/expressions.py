"""Expressions: what a plain function computes of one score, as a graph in which equal parts are one object."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch

Kind: TypeAlias = str  # "bool", "int" or "float"; or "tensor" of a captured one, of which a part may have been taken
_ORDER = ("bool", "int", "float")


class Expr:
    """One operation on expressions; equal ones are the same object, so that they compare and hash by identity.

    ``value`` is what the operation has beside ``args``: a constant's number, a cast's type, which tensor or argument it is.
    """

    __slots__ = ("__weakref__", "args", "kind", "op", "value")
    op: str
    args: tuple["Expr", ...]
    value: Any
    kind: Kind

    def __repr__(self) -> str:
        return "; ".join(linear(self))


_ALL: "weakref.WeakValueDictionary[Any, Expr]" = weakref.WeakValueDictionary()
_LOCK = threading.Lock()  # two threads must not make one expression twice


def expression(op: str, args: Iterable[Expr] = (), value: Any = None, kind: Kind = "float") -> Expr:
    """The expression of an operation."""
    args = tuple(args)
    key = op, args, kind, type(value), repr(value) if isinstance(value, float) else value  # as -0.0 == 0.0, and NaN is nothing
    with _LOCK:
        found = _ALL.get(key)
        if found is None:
            found = _ALL[key] = Expr()
            found.op, found.args, found.value, found.kind = op, args, value, kind
    return found


def constant(number: bool | int | float) -> Expr:
    """A number."""
    kind = "bool" if isinstance(number, bool) else "int" if isinstance(number, int) else "float"
    return expression("constant", value=number, kind=kind)


SCORE = expression("score")
BATCH, HEAD, QUERY, KEY = COORDINATES = tuple(expression(name, kind="int") for name in ("b", "h", "q_idx", "kv_idx"))
ZERO, ONE = constant(0.0), constant(1.0)


def widest(*args: Expr) -> Kind:
    """The kind that arithmetic of these has."""
    return max((x.kind for x in args), key=_ORDER.index)


def kind_of(dtype: torch.dtype) -> Kind:
    """The kind of a tensor's elements."""
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every expression that ``roots`` consist of, once, arguments first."""
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(x, False) for x in reversed(node.args) if x not in seen]


def linear(root: Expr) -> Iterator[str]:
    """Every part of an expression once, by number: as long as the expression, however often it uses its parts."""
    numbers: dict[Expr, int] = {}
    for node in walk(root):
        inside = [*([repr(node.value)] if node.value is not None else []), *(f"%{numbers[x]}" for x in node.args)]
        numbers[node] = len(numbers)
        yield f"%{numbers[node]} = {node.kind} {node.op}({', '.join(inside)})"


def rebuilt(root: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """``root`` with every part for which ``change`` gives another one replaced, the largest ones first."""
    made: dict[Expr, Expr] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node not in made and (other := change(node)) is not None:
            made[node] = other
        if node in made:
            stack.pop()
        elif missing := [x for x in node.args if x not in made]:
            stack += reversed(missing)
        else:
            made[node] = expression(node.op, (made[x] for x in node.args), node.value, node.kind)
    return made[root]
