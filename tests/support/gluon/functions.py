"""From a jit function to a Python function that runs on numpy tiles.

The body is the kernel's own, but for three things that the language does and Python does not: numbers that are assigned
(without `: gl.constexpr`) or returned become run-time scalars, lists are tuples, and range counts in run-time integers.
The names that a body uses are looked up by what they hold: an object of Triton has its stand-in whatever it is called.
"""

import ast
import inspect
import textwrap
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import ConstexprFunction

from support.gluon import hopper as asynchronous
from support.gluon import shared
from support.gluon.language import GL, run_time_range
from support.gluon.values import each, runtime

RUNTIME = "_run_time_value"

HOPPER: dict[Any, dict[str, Any]] = {
    hopper: {
        "fence_async_shared": shared.fence_async_shared,
        "warpgroup_mma": asynchronous.warpgroup_mma,
        "warpgroup_mma_wait": asynchronous.warpgroup_mma_wait,
    },
    hopper.mbarrier: {
        "MBarrierLayout": shared.MBarrierLayout, "allocate_mbarrier": shared.allocate_mbarrier,
        "init": asynchronous.init, "invalidate": asynchronous.invalidate, "expect": asynchronous.expect,
        "arrive": asynchronous.arrive, "wait": asynchronous.wait,
    },
    hopper.tma: {
        "async_load": asynchronous.async_load, "async_copy_global_to_shared": asynchronous.async_load,
        "async_store": asynchronous.async_store, "async_copy_shared_to_global": asynchronous.async_store,
        "async_atomic_add": asynchronous.async_atomic_add, "store_wait": asynchronous.store_wait,
    },
}


def _stand_ins() -> dict[int, Any]:
    """What stands in for an object of Triton, by the object's identity. Names differ between releases of Triton."""
    found = {}
    for module, names in {tl: GL, gl: GL, **HOPPER}.items():
        for name, stand_in in names.items():
            if hasattr(module, name):
                found[id(getattr(module, name))] = stand_in
    return found | {id(range): run_time_range, id(min): GL["minimum"], id(max): GL["maximum"]}


STAND_INS = _stand_ins()


class Names:
    """A module as a kernel sees it."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = translated(getattr(self._module, name), f"{self._module.__name__}.{name}")
        setattr(self, name, value)
        return value


def _unknown(name: str) -> Callable[..., Any]:
    def unknown(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the interpreter knows no {name}")

    return unknown


def is_jit_function(value: Any) -> bool:
    """Whatever Triton's decorators made: a compiled or an interpreted function."""
    return inspect.isfunction(getattr(value, "fn", None)) and not isinstance(value, ConstexprFunction)


def translated(value: Any, name: str) -> Any:
    """What a kernel sees of a Python object."""
    if id(value) in STAND_INS:
        return STAND_INS[id(value)]
    if isinstance(value, tl.constexpr):
        return translated(value.value, name)
    if isinstance(value, ConstexprFunction):
        return _compile_time(value)
    if isinstance(value, types.ModuleType):
        return Names(value)
    function = value.fn if is_jit_function(value) else value
    if inspect.isfunction(function) and str(function.__module__).startswith("triton."):
        return _unknown(name)
    if is_jit_function(value):
        return interpreted(value)
    if isinstance(value, tuple):
        return each(lambda item: translated(item, name), value)
    return value


def _compile_time(function: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function.fn(*args, **kwargs)
        return result.value if isinstance(result, tl.constexpr) else result

    return call


class _Body(ast.NodeTransformer):
    """Makes run-time values of what is assigned and returned."""

    def _scalar(self, value: ast.expr) -> ast.expr:
        call = ast.Call(ast.Name(RUNTIME, ast.Load()), [value], [])
        return ast.fix_missing_locations(ast.copy_location(call, value))

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        self.generic_visit(node)
        node.value = self._scalar(node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.Assign:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            raise NotImplementedError("an augmented assignment to anything but a name")
        before = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = ast.copy_location(ast.BinOp(before, node.op, node.value), node)
        return ast.copy_location(ast.Assign([node.target], self._scalar(value)), node)

    def visit_Return(self, node: ast.Return) -> ast.Return:
        self.generic_visit(node)
        if node.value is not None:
            node.value = self._scalar(node.value)
        return node

    def visit_List(self, node: ast.List) -> ast.expr:
        self.generic_visit(node)
        return ast.copy_location(ast.Tuple(node.elts, node.ctx), node)


def _code(function: types.FunctionType) -> types.CodeType:
    """The changed body, at the lines of the file that it comes from."""
    tree = ast.parse(textwrap.dedent("".join(inspect.getsourcelines(function)[0])))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    # Python keeps the default values; annotations would be evaluated again.
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    definition.body = [_Body().visit(statement) for statement in definition.body]
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    module = compile(tree, function.__code__.co_filename, "exec")
    return next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


_interpreted: "weakref.WeakKeyDictionary[types.FunctionType, types.FunctionType]" = weakref.WeakKeyDictionary()


def interpreted(jit_function: Any) -> types.FunctionType:
    """The Python function of a jit function, made once."""
    function = jit_function.fn
    if function in _interpreted:
        return _interpreted[function]
    code = _code(function)
    scope: dict[str, Any] = {RUNTIME: runtime, "__name__": function.__module__}
    result = types.FunctionType(code, scope, function.__name__, translated(function.__defaults__, "a default value"))
    if function.__kwdefaults__:
        result.__kwdefaults__ = {name: translated(value, name) for name, value in function.__kwdefaults__.items()}
    _interpreted[function] = result  # before its names are looked up: it may call itself
    outside = inspect.getclosurevars(function)
    known = {**outside.builtins, **function.__globals__, **outside.nonlocals}
    for name in {*_names(code), "range"}:
        if name in known:
            scope[name] = translated(known[name], name)
    scope.setdefault("range", run_time_range)
    return result
