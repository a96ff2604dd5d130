"""What a plain function captures: the tensors, and a key that tells whether two functions do the same with theirs.

Looked at are closures, defaults, and the globals and attributes that the code names, of containers, functions, methods,
modules, classes and plain objects alike. What else may hide a value (an array, an iterator, a property, a class with operators
of its own, ``getattr`` by a computed name) gives no key, and the function is traced at each call. A function that captures
other numbers is another one; other tensors of the same types are other operands of one.
"""

import enum
import functools
import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType, types.EllipsisType, torch.dtype, torch.device)
_FOREIGN = ("torch", "numpy", "math", "builtins", "operator", "typing", "triton")  # whose functions do as they always do
_BY_OTHER_MEANS = frozenset(("getattr", "hasattr", "vars", "globals", "locals", "eval", "exec", "super", "__dict__",
                             "__getattribute__", "import_module", "__import__", "attrgetter", "itemgetter", "methodcaller"))
_OWN_WAYS = ("__getattr__", "__getattribute__", "__getitem__", "__iter__", "__call__", "__len__", "__float__", "__index__",
             "__int__", "__bool__", "__add__", "__radd__", "__mul__", "__rmul__", "__eq__", "__contains__",
             "__torch_function__")
_DEEPEST, _MOST = 12, 5000  # of things within things, and of things altogether


class Captured(NamedTuple):
    """The tensors that a function reaches, and what else of it matters; ``key`` is None where that cannot be told."""

    key: Hashable
    tensors: list[torch.Tensor]


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """What the code of a function, and of those within it, names."""
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return frozenset(code.co_names).union(*(_names(x) for x in inner))


@functools.lru_cache(4096)
def _named(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """(what a code names, whether that is all that it reads)."""
    names = _names(code)
    return names, not names & _BY_OTHER_MEANS


class _UnknownError(Exception):
    """Something is captured that nobody can compare."""


def _foreign(x: Any) -> bool:
    """Whether something does what it always does, wherever it is; a closure made elsewhere holds what it was given."""
    return (getattr(x, "__module__", None) or "").partition(".")[0] in _FOREIGN and not getattr(x, "__closure__", None)


class _Walk:
    """One look at everything that is captured; ``named`` is what any of the code is known to name."""

    def __init__(self, named: frozenset[str]) -> None:
        self.named, self.found = named, named
        self.key: list[Hashable] = []
        self.tensors: list[torch.Tensor] = []
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # what is looked at stays alive, so that no other thing gets its id
        self.by_name = False

    def value(self, x: Any, depth: int = 0) -> None:
        """Notes a captured value."""
        kind = type(x)
        if kind in _PLAIN:
            self.key.append((kind, repr(x) if kind in (float, complex) else x))
            return
        if id(x) in self.seen:
            self.key.append(("again", self.seen[id(x)]))
            return
        if depth > _DEEPEST or len(self.kept) > _MOST:
            raise _UnknownError
        self.seen[id(x)] = len(self.seen)
        self.kept.append(x)
        if isinstance(x, torch.Tensor):
            if getattr(x, "__dict__", None):
                raise _UnknownError  # it carries what else the function may read
            self.key.append((kind, x.dtype, x.dim()))
            self.tensors.append(x)
        elif kind is types.FunctionType:
            self.function(x, depth + 1)
        elif kind in (tuple, list, dict):
            self.key.append((kind, len(x)))
            for y in (x if kind is not dict else [z for item in x.items() for z in item]):
                self.value(y, depth + 1)
        elif kind is types.MethodType:
            self.value(x.__func__, depth + 1)
            self.value(x.__self__, depth + 1)
        elif kind is functools.partial:
            self.value((x.func, x.args, x.keywords), depth + 1)
        elif isinstance(x, (enum.Enum, types.MethodDescriptorType)) or (isinstance(x, type) and _foreign(x)):
            self.key.append(x)
        elif isinstance(x, types.BuiltinFunctionType):
            if not isinstance(x.__self__, (types.ModuleType, types.NoneType)):
                raise _UnknownError  # a method of something
            self.key.append(x)
        elif kind.__module__ == "numpy" and getattr(x, "ndim", None) == 0 and hasattr(x, "item"):
            self.key.append((kind, repr(x.item())))
        elif _foreign(kind) and not isinstance(x, (torch.nn.Module, types.ModuleType, type)):
            raise _UnknownError
        elif isinstance(x, types.ModuleType):
            self.key.append(x.__name__)
            if x.__name__.partition(".")[0] not in _FOREIGN:
                self.attributes(x, vars(x), depth)
        elif isinstance(x, type):
            self.key.append(x)
            self.attributes(x, {name: y for of in reversed(x.__mro__[:-1]) for name, y in vars(of).items()}, depth)
        else:
            self.object(x, depth)

    def function(self, x: types.FunctionType, depth: int) -> None:
        """Notes a function, and what it captures in its turn."""
        if _foreign(x):
            self.key.append(x)
            return
        code = x.__code__
        names, readable = _named(code)
        if not readable or (x.__dict__ and x.__dict__.keys() - {"__wrapped__"}):
            raise _UnknownError
        if not names <= self.found:
            self.found |= names
        self.key.append(code)
        for cell in x.__closure__ or ():
            try:
                self.value(cell.cell_contents, depth)
            except ValueError:  # not filled yet
                self.key.append("empty")
        reached = x.__globals__
        for name in names:
            if name in reached:
                self.key.append(name)
                self.value(reached[name], depth)
        if x.__defaults__ or x.__kwdefaults__:
            self.value((x.__defaults__, x.__kwdefaults__), depth)

    def attributes(self, x: Any, known: dict[str, Any], depth: int) -> None:
        """Notes those attributes of a module, class or object that the code names."""
        self.by_name = True
        for name in sorted(self.named & known.keys()):
            found = known[name]
            if isinstance(found, (staticmethod, classmethod)):
                found = found.__func__
            elif hasattr(type(found), "__get__") and not isinstance(x, types.ModuleType) and not isinstance(
                    found, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
                raise _UnknownError  # a property, or what stands for one
            self.key.append(name)
            self.value(found, depth + 1)

    def object(self, x: Any, depth: int) -> None:
        """Notes a plain object, or a layer."""
        layer = isinstance(x, torch.nn.Module)
        own = [of for of in type(x).__mro__ if of is not object and not (layer and of is torch.nn.Module)]
        if layer and any(_foreign(of) for of in own):
            raise _UnknownError  # its forward reads what nobody sees here
        if any(way in vars(of) for of in own for way in _OWN_WAYS) or any("__slots__" in vars(of) for of in own):
            raise _UnknownError
        self.key.append(("object", type(x)))
        known = {name: y for of in reversed(own) for name, y in vars(of).items()} | vars(x)
        if layer and (x._forward_hooks or x._forward_pre_hooks):
            raise _UnknownError
        if layer:
            known |= {**x._parameters, **x._buffers, **x._modules}
            self.named |= {"forward"}
        self.attributes(x, known, depth)


def beyond_its_cells(function: Any, seen: tuple[Any, ...] = ()) -> str | None:
    """What a function captures that is neither a tensor, a number nor a text of its own closure, if anything."""
    if not isinstance(function, types.FunctionType):
        return f"it is a {type(function).__name__}"
    if function in seen:
        return None
    if function.__defaults__ or function.__kwdefaults__ or function.__dict__:
        return "it has default arguments, or attributes"
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        x = cell.cell_contents
        if not isinstance(x, (torch.Tensor, *_PLAIN)):
            if isinstance(x, types.FunctionType) and not x.__closure__ and beyond_its_cells(x, (*seen, function)) is None:
                continue
            return f"it captures {name}, a {type(x).__name__}"
    names = _names(function.__code__)
    for name in sorted(names & function.__globals__.keys()):
        x = function.__globals__[name]
        if isinstance(x, types.FunctionType) and not _foreign(x):
            if x.__closure__ or beyond_its_cells(x, (*seen, function)) is not None:
                return f"it calls the global {name}, which captures something itself"
        elif not (_foreign(x) or (isinstance(x, (types.BuiltinFunctionType, types.ModuleType)) and _foreign_module(x))):
            return f"it reads the global {name}"
    return "it reads what nobody sees" if names & _BY_OTHER_MEANS else None


def _foreign_module(x: Any) -> bool:
    return (x.__name__ if isinstance(x, types.ModuleType) else x.__module__ or "builtins").partition(".")[0] in _FOREIGN


def captured(function: Callable[..., Any], given: tuple[Any, ...] = ()) -> Captured:
    """What ``function`` captures, and what is ``given`` to it beside its coordinates."""
    named: frozenset[str] = frozenset()
    while True:
        walk = _Walk(named)
        try:
            if given:
                walk.value(given)
            walk.value(function)
            key = tuple(walk.key)
            hash(key)
        except Exception:  # of the user's own attributes too, which may do anything
            return Captured(None, walk.tensors)
        if not walk.by_name or walk.found == named:
            return Captured(key, walk.tensors)
        named = walk.found  # more code, and with it more names, was found
