"""What a function is: a text that says it, and the values that it captures."""

import contextlib
import inspect
import types
import uuid
from types import NoneType
from typing import Any

import torch


def captured(function: Any) -> list[Any]:
    """What a function captures from around it: the values of its closure, and the globals that it names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            cells.append(cell.cell_contents)
    names = {name for part in _codes(code) for name in part.co_names}
    return [*cells, *(function.__globals__[name] for name in sorted(names & function.__globals__.keys()))]


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """A function's code and that of the functions within it."""
    return [code, *(inner for x in code.co_consts if isinstance(x, types.CodeType) for inner in _codes(x))]


def content(x: Any, within: list[Any]) -> str:
    """A text that identifies ``x``, a function or something that one captures: equal texts mean equal behaviour."""
    if isinstance(x, (bool, int, float, str, torch.dtype, NoneType)):
        return repr(x)
    if inspect.ismodule(x):
        return x.__name__
    if isinstance(x, (tuple, list, dict)):
        return f"[{','.join(content(y, within) for y in (x.items() if isinstance(x, dict) else x))}]"
    key = getattr(x, "cache_key", None)  # of a compiled function: its source, what that calls and the values it captures
    if key is not None:
        return str(key)
    plain = getattr(x, "fn", x)  # of an interpreted function
    if type(x).__name__ == "constexpr":  # not by its class: a mod may be made without Triton
        return content(x.value, within)
    if inspect.isclass(x) and "<locals>" in x.__qualname__:
        return uuid.uuid4().hex
    if inspect.isclass(x) or inspect.isbuiltin(x) or getattr(plain, "__module__", "").startswith("triton."):
        return f"{plain.__module__}.{plain.__qualname__}" if hasattr(plain, "__qualname__") else repr(x)
    if not inspect.isfunction(plain):
        return uuid.uuid4().hex  # unknown, so unlike anything else
    if plain in within:  # it calls itself
        return plain.__qualname__
    captured = inspect.getclosurevars(plain)
    values = {**captured.globals, **captured.nonlocals, "": (plain.__defaults__, plain.__kwdefaults__)}
    try:
        source = inspect.getsource(plain)
    except OSError:
        source = uuid.uuid4().hex
    # The source of a lambda is all of its line, which may hold others.
    codes = [repr((part.co_code, part.co_names, [x for x in part.co_consts if not isinstance(x, types.CodeType)]))
             for part in _codes(plain.__code__)]
    return "|".join((source, *codes, *(f"{name}={content(value, [*within, plain])}" for name, value in values.items())))
