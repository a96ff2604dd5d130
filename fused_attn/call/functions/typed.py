"""Operations as torch's types have them: what is an integer, what a truth value, and what there is none of."""

import torch

from fused_attn.call.functions.expressions import Expr, constant, expression, kind_of, widest
from fused_attn.call.functions.operations import OPERATIONS, make


class UntraceableError(TypeError):
    """A plain function does what cannot be told in advance."""


def typed(op: str, args: list[Expr]) -> Expr:
    """The expression of an operation as torch's types have it."""
    if op not in OPERATIONS:
        raise UntraceableError(f"{op} is not among the operations that a score or mask function may use")
    expected = OPERATIONS[op].torch.count("{")
    if len(args) != expected:
        raise UntraceableError(f"{op} of {len(args)} arguments; expected {expected}")
    kind = widest(*(args[1:] if op == "where" else args))
    if op == "where" and args[0].kind != "bool":
        raise UntraceableError("torch.where expects a condition of truth values")
    if op in ("sub", "neg") and any(x.kind == "bool" for x in args):
        raise UntraceableError("torch has no difference of truth values")
    if kind == "bool" and op in ("add", "mul"):  # of truth values, which torch keeps as such
        op = {"add": "or", "mul": "and"}[op]
    elif op in _ARITHMETIC and any(x.kind == "bool" for x in args):
        wider = torch.float32 if op == "div" else torch.int32
        args = [expression("cast", (x,), wider, kind_of(wider)) if x.kind == "bool" else x for x in args]
        kind = widest(*args)
    elif op == "invert" and kind == "bool":
        op = "not"
    elif op in ("and", "or", "xor", "lshift", "rshift") and kind == "float":
        raise UntraceableError(f"{op} expects integers or truth values")
    elif op in ("floor", "ceil", "round", "trunc") and kind != "float":
        return args[0]
    elif OPERATIONS[op].kind == "float" and len(args) == 1 and kind != "float":
        args = [expression("cast", args, torch.float32, "float")]
    if op in ("floordiv", "mod") and kind == "int" and args[1].op == "constant" and args[1].value == 0:
        raise UntraceableError("an integer is divided by 0")
    if op == "pow":
        return _power(args[0], args[1], kind)
    return make(op, *args)


_ARITHMETIC = ("add", "mul", "div", "floordiv", "mod", "pow", "maximum", "minimum", "at_least", "at_most")


def _power(x: Expr, y: Expr, kind: str) -> Expr:
    """x ** y."""
    if kind == "int" and y.op == "constant" and y.value < 0:
        raise UntraceableError("torch has no negative powers of integers")
    if y.op == "constant" and (found := _known_power(x, y.value)) is not None:
        return found
    if kind == "float":  # as torch computes it
        x, y = (z if z.kind == "float" else constant(float(z.value)) if z.op == "constant" else
                expression("cast", (z,), torch.float32, "float") for z in (x, y))
    return make("pow", x, y)


def _known_power(x: Expr, exponent: float) -> Expr | None:
    """x to a power that is made of fewer operations, as torch has it as well."""
    if exponent in (2, 3, 4):
        square = make("mul", x, x)
        return square if exponent == 2 else make("mul", square, x if exponent == 3 else square)
    if x.kind != "float":
        return None
    known = {1: lambda: x, 0.5: lambda: make("sqrt", x), -0.5: lambda: make("rsqrt", x),
             -1: lambda: make("div", constant(1.0), x)}
    return known[exponent]() if exponent in known else None
