"""Launches: what a kernel is given, and its programs one after another."""

import functools
import inspect
import random
import types
from typing import Any

import numpy as np
import triton.language as tl

from support.gluon.functions import interpreted, is_jit_function, translated
from support.gluon.language import Grid
from support.gluon.memory import Descriptor, Memory, Pointer, has_memory
from support.gluon.schedule import Schedule, use
from support.gluon.values import each, runtime


def argument(value: Any) -> Any:
    """An argument of a launch as its kernel sees it."""
    if isinstance(value, tl.constexpr):
        return translated(value, "an argument")
    if has_memory(value):
        memory = Memory(value)
        return Pointer(memory, np.int64(memory.origin))
    if all(hasattr(value, name) for name in ("base", "block_shape", "layout")):
        return Descriptor(value)
    if is_jit_function(value):
        return interpreted(value)
    if isinstance(value, tuple):
        return each(argument, value)
    if type(value) is int and value == 1:
        return value  # Triton compiles a kernel for an argument of 1, which then has nothing of a tensor
    if value is None or isinstance(value, (bool, int, float, tl.dtype)):
        return runtime(value)
    raise TypeError(f"a kernel cannot take {value!r}")


@functools.cache
def _constexprs(function: types.FunctionType) -> tuple[bool, ...]:
    """Which parameters a kernel knows when it is compiled."""
    annotations = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
    return tuple(a is tl.constexpr or (isinstance(a, str) and a.endswith("constexpr")) for a in annotations)


def arguments(kernel: Any, args: tuple[Any, ...]) -> list[Any]:
    known = _constexprs(kernel.fn)[:-1]
    if len(args) != len(known):
        raise TypeError(f"{kernel.fn.__name__} takes {len(known)} arguments and a configuration, not {len(args)}")
    return [translated(value, "an argument") if constant else argument(value)
            for value, constant in zip(args, known, strict=True)]


def launch(kernel: Any, programs: int, args: tuple[Any, ...], config: Any, *, seed: int = 0) -> None:
    """Runs ``kernel(*args, config)`` for a grid of ``programs``, each program under a random schedule of its own.

    The programs run one after another, in an order that the seed draws: they may not wait for each other.
    """
    function: types.FunctionType = interpreted(kernel)
    given = [*arguments(kernel, args), config]
    order = list(range(programs))
    random.Random(f"order {seed}").shuffle(order)
    Grid.programs = programs
    try:
        with np.errstate(all="ignore"):
            for program in order:
                Grid.program = program
                schedule = Schedule(f"{kernel.fn.__name__} {seed} {program}")
                use(schedule)
                function(*given)
                schedule.finish()
    finally:
        use(None)


