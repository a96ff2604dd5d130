"""The operations that plain functions may use: how PyTorch and Triton write each, and its derivative.

Conventions are torch's: floor division and modulo of negative numbers, subgradients at ties, NaN and infinities kept.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from fused_attn.call.functions.expressions import ONE, ZERO, Expr, Kind, constant, expression, walk, widest


class Operation(NamedTuple):
    """``torch`` and ``triton``: its text, {0}, {1} ... for the arguments; ``triton_int`` where that of integers is another one.

    ``kind``: of the result, None for that of arithmetic. ``derivative(node, *d)`` gives that of a node whose arguments have the
    derivatives ``d``; None: it is 0 everywhere.
    """

    torch: str
    triton: str
    kind: Kind | None = None
    derivative: Callable[..., Expr] | None = None
    triton_int: str | None = None


def make(op: str, *args: Expr, value: Any = None) -> Expr:
    """The expression of an operation of ``OPERATIONS``."""
    kind = OPERATIONS[op].kind
    if kind is None:
        kind = widest(*(args[1:] if op == "where" else args))
        if kind == "bool" and op in ("neg", "abs", "floordiv", "mod", "pow"):
            kind = "int"
    if op in _FOLDED and args[0].op == "constant" and args[0].value > 0:
        return constant(_FOLDED[op](args[0].value))
    return expression(op, args, value, kind)


_FOLDED = {"log": math.log, "sqrt": math.sqrt}  # of numbers, where a kernel would have fewer digits


def plus(a: Expr, b: Expr) -> Expr:
    """a + b of derivatives, where 0 is nothing at all."""
    if a.op == b.op == "constant":
        return constant(float(a.value + b.value)) if a.value + b.value else ZERO
    return b if a is ZERO else a if b is ZERO else make("add", a, b)


def minus(a: Expr, b: Expr) -> Expr:
    """a - b of derivatives."""
    return a if b is ZERO else negative(b) if a is ZERO else make("sub", a, b)


def negative(a: Expr) -> Expr:
    """-a of a derivative."""
    if a.op == "constant":
        return constant(-float(a.value)) if a is not ZERO else ZERO
    return a.args[0] if a.op == "neg" else make("neg", a)


def times(a: Expr, b: Expr) -> Expr:
    """a * b, ``a`` a derivative and ``b`` a factor."""
    if a is ZERO or b is ZERO:
        return ZERO
    (of_a, a), (of_b, b) = _factors(a), _factors(b)
    number = of_a * of_b
    product = b if a is ONE else a if b is ONE else make("mul", b, a)
    if number == 1:
        return product
    return constant(number) if product is ONE else make("mul", constant(number), product)


def _factors(x: Expr) -> tuple[float, Expr]:
    """(c, y) with x = c * y, c a number."""
    if x.op == "constant":
        return float(x.value), ONE
    if x.op == "mul" and x.args[0].op == "constant":
        return float(x.args[0].value), x.args[1]
    return 1.0, x


def chosen(condition: Expr, a: Expr, b: Expr) -> Expr:
    """a where the condition holds, else b: what is not chosen may be infinite or NaN."""
    return a if a is b else make("where", condition, a, b)


def _quotient(node: Expr, da: Expr, db: Expr) -> Expr:
    b = node.args[1]
    if db is not ZERO:
        return make("div", minus(da, times(db, node)), b)
    if b.op == "constant" and b.value:
        return times(da, constant(1.0 / b.value))
    return ZERO if da is ZERO else make("div", da, b)


def _power(node: Expr, da: Expr, db: Expr) -> Expr:
    a, b = node.args
    if b.op == "constant":
        by_a = ZERO if b.value == 0 else times(da, times(make("pow", a, constant(b.value - 1)), constant(float(b.value))))
    else:
        slope = make("mul", b, make("pow", a, make("sub", b, constant(1))))
        by_a = ZERO if da is ZERO else chosen(make("eq", b, constant(0)), ZERO, times(da, slope))
    if db is ZERO:
        return by_a
    by_b = make("mul", node, make("log", a))
    none = make("and", make("eq", a, constant(0)), make("ge", b, constant(0)))
    return plus(by_a, chosen(none, ZERO, times(db, by_b)))


def _greater(op: str) -> Callable[..., Expr]:
    def derivative(node: Expr, da: Expr, db: Expr) -> Expr:
        if da is db is ZERO:
            return ZERO
        a, b = node.args
        half = times(plus(da, db), constant(0.5))  # each has one half where both are equal
        return chosen(make("eq", a, b), half, chosen(make(op, a, b), da, db))

    return derivative


def _clamped(inside: str) -> Callable[..., Expr]:
    def derivative(node: Expr, da: Expr, db: Expr) -> Expr:
        return ZERO if da is db is ZERO else chosen(make(inside, *node.args), da, db)

    return derivative


def _modulo(node: Expr, da: Expr, db: Expr) -> Expr:
    return minus(da, times(db, make("floordiv", *node.args)))


def _unary(slope: Callable[[Expr, Expr], Expr]) -> Callable[..., Expr]:
    """The derivative of a function of one argument, whose slope is ``slope(node, argument)``."""
    return lambda node, d: times(d, slope(node, node.args[0])) if d is not ZERO else ZERO


def _over(factor: Expr | float, x: Expr) -> Expr:
    return make("div", factor if isinstance(factor, Expr) else constant(factor), x)


def _one_plus(x: Expr) -> Expr:
    return make("add", constant(1.0), x)


_LN2 = math.log(2)
_ERF = 2 / math.sqrt(math.pi)
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPERATIONS: dict[str, Operation] = {
    "add": Operation("{0} + {1}", "{0} + {1}", None, lambda node, da, db: plus(da, db)),
    "sub": Operation("{0} - {1}", "{0} - {1}", None, lambda node, da, db: minus(da, db)),
    "mul": Operation("{0} * {1}", "{0} * {1}", None,
                     lambda node, da, db: plus(times(da, node.args[1]), times(db, node.args[0]))),
    "div": Operation("{0} / {1}", "{0} / {1}", "float", _quotient),
    "floordiv": Operation("floor_quotient({0}, {1})", "floor_quotient({0}, {1})", triton_int="whole_quotient({0}, {1})"),
    "mod": Operation("{0} % {1}", "modulo({0}, {1})", None, _modulo, triton_int="whole_modulo({0}, {1})"),
    "pow": Operation("{0} ** {1}", "power({0}, {1})", None, _power, triton_int="whole_power({0}, {1})"),
    "maximum": Operation("torch.maximum({0}, {1})", "tl.maximum({0}, {1}, tl.PropagateNan.ALL)", None, _greater("gt"),
                         triton_int="tl.maximum({0}, {1})"),
    "minimum": Operation("torch.minimum({0}, {1})", "tl.minimum({0}, {1}, tl.PropagateNan.ALL)", None, _greater("lt"),
                         triton_int="tl.minimum({0}, {1})"),
    "at_least": Operation("torch.clamp({0}, min={1})", "tl.maximum({0}, {1}, tl.PropagateNan.ALL)", None, _clamped("ge"),
                          triton_int="tl.maximum({0}, {1})"),
    "at_most": Operation("torch.clamp({0}, max={1})", "tl.minimum({0}, {1}, tl.PropagateNan.ALL)", None, _clamped("le"),
                         triton_int="tl.minimum({0}, {1})"),
    "where": Operation("torch.where({0}, {1}, {2})", "tl.where({0}, {1}, {2})", None,
                       lambda node, _, da, db: chosen(node.args[0], da, db)),
    "and": Operation("{0} & {1}", "{0} & {1}"),
    "or": Operation("{0} | {1}", "{0} | {1}"),
    "xor": Operation("{0} ^ {1}", "{0} ^ {1}"),
    "lshift": Operation("{0} << {1}", "{0} << {1}", "int"),
    "rshift": Operation("{0} >> {1}", "{0} >> {1}", "int"),
    "not": Operation("torch.logical_not({0})", "({0} == 0)", "bool"),
    "invert": Operation("~{0}", "~{0}", "int"),
    "neg": Operation("-{0}", "-{0}", None, lambda node, d: negative(d)),
    "abs": Operation("torch.abs({0})", "tl.abs({0})", None, _unary(lambda node, x: make("sign", x))),
    "sign": Operation("torch.sign({0})", "sign({0})"),
    "floor": Operation("torch.floor({0})", "tl.floor({0})"),
    "ceil": Operation("torch.ceil({0})", "tl.ceil({0})"),
    "round": Operation("torch.round({0})", "to_even({0})"),
    "trunc": Operation("torch.trunc({0})", "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))"),
    "exp": Operation("torch.exp({0})", "tl.exp({0})", "float", _unary(lambda node, x: node)),
    "exp2": Operation("torch.exp2({0})", "tl.exp2({0})", "float", _unary(lambda node, x: times(node, constant(_LN2)))),
    "expm1": Operation("torch.expm1({0})", "expm1({0})", "float", _unary(lambda node, x: _one_plus(node))),
    "log": Operation("torch.log({0})", "tl.log({0})", "float", _unary(lambda node, x: _over(1.0, x))),
    "log2": Operation("torch.log2({0})", "tl.log2({0})", "float", _unary(lambda node, x: _over(1 / _LN2, x))),
    "log1p": Operation("torch.log1p({0})", "log1p({0})", "float", _unary(lambda node, x: _over(1.0, _one_plus(x)))),
    "sqrt": Operation("torch.sqrt({0})", "tl.sqrt({0})", "float", _unary(lambda node, x: _over(0.5, node))),
    "rsqrt": Operation("torch.rsqrt({0})", "tl.rsqrt({0})", "float",
                       _unary(lambda node, x: times(_over(node, x), constant(-0.5)))),
    "sin": Operation("torch.sin({0})", "tl.sin({0})", "float", _unary(lambda node, x: make("cos", x))),
    "cos": Operation("torch.cos({0})", "tl.cos({0})", "float", _unary(lambda node, x: negative(make("sin", x)))),
    # Its slope by 1 - tanh^2 would have no digits left where tanh is near 1.
    "tanh": Operation("saturation.tanh({0})", "tanh_of({0}, ACCURATE)", "float", _unary(lambda node, x: make("tanh_slope", x))),
    "tanh_slope": Operation("saturation.tanh_slope({0})", "tanh_slope({0})", "float",
                            _unary(lambda node, x: times(times(make("tanh", x), node), constant(-2.0)))),
    "sigmoid": Operation("torch.sigmoid({0})", "tl.sigmoid({0})", "float",
                         _unary(lambda node, x: times(make("sigmoid", make("neg", x)), node))),
    "erf": Operation("torch.erf({0})", "tl.erf({0})", "float",
                     _unary(lambda node, x: times(make("exp", make("neg", make("mul", x, x))), constant(_ERF)))),
    "isnan": Operation("torch.isnan({0})", "({0} != {0})", "bool"),
    "isinf": Operation("torch.isinf({0})", "(tl.abs({0}) == float('inf'))", "bool"),
    **{name: Operation(f"{{0}} {sign} {{1}}", f"{{0}} {sign} {{1}}", "bool") for name, sign in COMPARED.items()},
}


def derivative(root: Expr, by: Expr) -> Expr:
    """d root / d by."""
    found: dict[Expr, Expr] = {}
    for node in walk(root):
        if node is by:
            found[node] = ONE
        elif node.kind != "float" or all(found[x] is ZERO for x in node.args):
            found[node] = ZERO
        elif node.op == "cast":
            found[node] = found[node.args[0]]
        else:
            rule = OPERATIONS[node.op].derivative if node.op in OPERATIONS else None
            found[node] = ZERO if rule is None else rule(node, *(found[x] for x in node.args))
    return found[root]
