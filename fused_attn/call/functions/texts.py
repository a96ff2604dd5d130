"""Writes expressions down: as PyTorch, for operands and for the backends in plain PyTorch, and as Triton, for the kernels."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fused_attn.call.functions.expressions import BATCH, COORDINATES, HEAD, KEY, ONE, QUERY, SCORE, ZERO, Expr, walk
from fused_attn.call.functions.operations import COMPARED, OPERATIONS, derivative
from fused_attn.call.functions.placing import Argument, Placed, affine, plain

_COORDINATES = {BATCH: "batch", HEAD: "head", QUERY: "q_idx", KEY: "k_idx", SCORE: "score"}
_LONGEST = 2**24  # no sequence is longer, as far as the width of integers is concerned
_GROWING = ("add", "sub", "mul", "pow", "lshift")
_BOUNDS = {"at_least": "min", "maximum": "min", "at_most": "max", "minimum": "max"}


class _Text(NamedTuple):
    text: str
    atom: bool = True

    @property
    def enclosed(self) -> str:
        """For use within an operation."""
        return self.text if self.atom else f"({self.text})"


class _Writer:
    """Writes expressions of one function; ``leaf`` gives the text of what it knows by itself."""

    def __init__(self, triton: bool, leaf: Callable[["_Writer", Expr], str | None], letter: str = "t",
                 accurate: str = "True") -> None:
        self.triton, self.leaf, self.letter, self.accurate = triton, leaf, letter, accurate
        self.scored = False  # whether there is a score, of whose type numbers may be
        self.magnitudes: dict[Expr, int] = {}
        self.lines: list[str] = []
        self.known: dict[Expr, _Text] = {}

    def write(self, *roots: Expr) -> list[str]:
        """The text of each; what is used more than once gets a line and a name of its own."""
        uses = Counter(x for node in walk(*roots) for x in node.args)
        uses.update(roots)
        for node in walk(*roots):
            if node in self.known or node.kind == "tensor":
                continue
            own = self.leaf(self, node)
            text = _Text(own) if own is not None else self.number(node) if node.op == "constant" else self.operation(node)
            if uses[node] > 1 and node.op not in ("constant", "argument") and not text.text.isidentifier():
                name = f"{self.letter}{len(self.lines)}"
                self.lines.append(f"    {name} = {text.text}")
                text = _Text(name)
            self.known[node] = text
        return [self.known[x].text for x in roots]

    def of(self, node: Expr) -> str:
        """The text of something written before, for use within an operation."""
        return self.known[node].enclosed

    def number(self, node: Expr) -> _Text:
        value = node.value
        if isinstance(value, float) and not math.isfinite(value):
            return _Text(f'float("{value}")')
        return _Text(repr(value), value >= 0)

    def operation(self, node: Expr) -> _Text:
        args = [self.known[x] for x in node.args]
        if node.op == "cast":
            return self.cast(node, args[0])
        if self.triton:
            return self.in_triton(node, args)
        numbers = [x.op == "constant" for x in node.args]
        if node.op in _BOUNDS and any(numbers):  # which torch takes in one of its two places alone
            number, other = args[::-1] if numbers[1] else args
            return _Text(f"torch.clamp({other.text}, {_BOUNDS[node.op]}={number.text})")
        return _filled(OPERATIONS[node.op].torch, args)

    def in_triton(self, node: Expr, args: list[_Text]) -> _Text:
        operation = OPERATIONS[node.op]
        template = operation.triton.replace("ACCURATE", self.accurate)
        if node.kind != "float" and operation.triton_int is not None:
            template = operation.triton_int
        if node.kind == "int" and node.op in ("floordiv", "mod") and all(_not_negative(x) for x in node.args):
            template = "{0} // {1}" if node.op == "floordiv" else "{0} % {1}"
        if node.kind == "int" and node.op in _GROWING and self.magnitude(node) >= 2**31:
            wide = next(i for i, x in enumerate(node.args) if x.op != "constant" or i == len(args) - 1)
            args = [_Text(f"tl.cast({x.text}, tl.int64)") if i == wide else x for i, x in enumerate(args)]
        if node.op == "div" and not self.of_score(node):  # of indices, which floor and comparisons want to the last digit
            template = "quotient({0}, {1})"
            args = [_Text(f"tl.full([], {float(x.value)!r}, tl.float32)")
                    if x.op == "constant" and math.isfinite(x.value) else text
                    for x, text in zip(node.args, args, strict=True)]
        elif node.op == "div" and node.args[1].op == "constant" and node.args[0].kind == "float":
            number = node.args[1].value
            if number and 2.0**-100 < abs(number) < 2.0**100:
                template, args = "{0} * {1}", [args[0], _Text(repr(1.0 / number), number > 0)]
        # A number alone, or compared, would be one of fp32.
        if node.op != "div" and ((node.kind == "float" and not _infix(template)) or node.op in COMPARED):
            args = [_Text(self.typed(x, node)) if x.op == "constant" else text for x, text in zip(node.args, args, strict=True)]
        return _filled(template, args)

    def typed(self, number: Expr, node: Expr) -> str:
        """A number in the type of what it meets within ``node``: of the score, or in masks of an operand."""
        text = self.number(number).text
        if number.kind != "float":
            return text
        if self.of_score(node):
            return f"tl.full([], {text}, score.dtype)"
        floats = [x for x in walk(node) if x.kind == "float" and x.op in ("argument", "entry")]
        if self.scored or not floats:
            return text
        of = f"args[{floats[0].value}]" if floats[0].op == "argument" else f"args[{floats[0].value[0]}].ptr.dtype.element_ty"
        return f"as_wide({text}, {of if floats[0].op == 'entry' else f'{of}.dtype'})"

    def of_score(self, node: Expr) -> bool:
        """Whether a part of an expression has the score's type: the score, or an operand of floats."""
        return self.scored and any(x is SCORE or x.value == "score" or (x.kind == "float" and x.op in ("argument", "entry"))
                                   for x in walk(node))

    def magnitude(self, node: Expr) -> int:
        """At least the greatest absolute value of an integer."""
        found = self.magnitudes.get(node)
        if found is None:
            found = self.magnitudes[node] = _magnitude(node, [self.magnitude(x) for x in node.args if x.kind != "tensor"])
        return found

    def cast(self, node: Expr, x: _Text) -> _Text:
        if node.value == "score":
            return _Text(f"tl.cast({x.text}, score.dtype)" if self.triton else f"torch.as_tensor({x.text}).to(score.dtype)")
        name = str(node.value).removeprefix("torch.")
        text = f"tl.cast({x.text}, tl.{name})" if self.triton else f"torch.as_tensor({x.text}).to(torch.{name})"
        if name in ("float16", "bfloat16"):  # rounded, and computed with in fp32
            text = f"tl.cast({text}, tl.float32)" if self.triton else f"{text}.float()"
        return _Text(text)


def _infix(template: str) -> bool:
    return template.startswith(("{0} ", "-", "~", "({0} "))


def _filled(template: str, args: list[_Text]) -> _Text:
    inside = [x.enclosed if _infix(template) else x.text for x in args]
    return _Text(template.format(*inside), not _infix(template) or template.startswith("("))


def _magnitude(node: Expr, of_args: list[int]) -> int:
    """At least the greatest absolute value of an integer, given those of its arguments."""
    most = 2**63
    if node in COORDINATES:
        return _LONGEST
    if node.op == "constant":
        return int(abs(node.value))
    if node.op in ("add", "sub"):
        return min(most, sum(of_args))
    if node.op == "mul":
        return min(most, of_args[0] * of_args[1])
    if node.op == "pow":
        return min(most, of_args[0] ** min(of_args[1], 64))
    if node.op == "lshift":
        return min(most, of_args[0] << min(of_args[1], 64))
    if node.op == "mod":
        return of_args[1] if node.args[1].op == "constant" else of_args[0]
    if node.op in ("floordiv", "rshift"):
        return of_args[0]
    return max(of_args, default=2**31 - 1)  # of a choice, or of an operand, which has a type of its own


def _not_negative(node: Expr) -> bool:
    """Whether an integer is surely 0 or more."""
    if node in COORDINATES:
        return True
    if node.op == "constant":
        return bool(node.value >= 0)
    if node.op == "mod":
        return node.args[1].op == "constant" and node.args[1].value > 0
    if node.op in ("at_least", "maximum"):
        return any(_not_negative(x) for x in node.args)
    return node.op in ("abs", "add", "mul", "floordiv", "minimum") and (
        node.op == "abs" or all(_not_negative(x) for x in node.args))


# --- PyTorch ---


def _of_coordinates(node: Expr) -> str | None:
    return _COORDINATES.get(node)


def _reference_leaf(writer: _Writer, node: Expr) -> str | None:
    if node.op == "argument":
        return f"args[{node.value}]"
    if node.op == "entry":
        number, dims = node.value
        inner = "".join(f"{writer.of(x)}, " for x, dim in zip(node.args, dims, strict=True) if dim >= 4)
        return f"entry(args[{number}], ({inner}))"
    return _of_coordinates(node)


def reference(placed: Placed, masks: bool) -> str:
    """The function in plain PyTorch, with the parameters of a ``ScoreMod``'s reference, or of a ``MaskMod``'s."""
    writer = _Writer(False, _reference_leaf)
    body, = writer.write(placed.body)
    if masks:
        result = f"torch.as_tensor({body})" if placed.body.op == "constant" else body
    elif SCORE in placed.uses:
        result = f"({body}).to(score.dtype)"
    else:
        result = f"torch.zeros_like(score) + ({body})"
    parameters = f"{'' if masks else 'score, '}q_idx, k_idx, head, batch, args"
    return "\n".join((f"def reference({parameters}):", *writer.lines, f"    return {result}", ""))


def operands(arguments: Sequence[Argument]) -> str:
    """``operands(tensors, extents, device)``: the operands of a function, made of the tensors that it captures and computes."""
    writers = {form: _Writer(False, _operand_leaf(form), form[0]) for form in ("pairs", "difference")}
    made = []
    for form, expr, lead, inner in arguments:
        if form == "table":
            made.append(f"table(tensors[{expr.value[0]}], {lead}, {inner}, extents)")
            continue
        text, = writers[form].write(expr)
        made.append(f"relative({text})" if form == "difference" else text)
    lines = [*(line for writer in writers.values() for line in writer.lines), f"    return [{', '.join(made)}]", ""]
    used = set(re.findall(r"\w+", " ".join(lines)))
    shapes = "[:, None, None, None]", "[:, None, None]", "[:, None]", ""
    needed = [f"    {_COORDINATES[x]} = torch.arange(extents[{i}], device=device){shape}"
              for i, (x, shape) in enumerate(zip(COORDINATES, shapes, strict=True)) if _COORDINATES[x] in used]
    needed += ["    difference = differences(extents, device)"] if "difference" in used else []
    return "\n".join(("def operands(tensors, extents, device):", *needed, *lines))


def _operand_leaf(form: str) -> Callable[[_Writer, Expr], str | None]:
    def leaf(writer: _Writer, node: Expr) -> str | None:
        if node.op == "element":
            tensor, *indices = node.args
            if form == "pairs" and plain(tuple(indices)):
                spec = ", ".join(str(COORDINATES.index(x)) if x in COORDINATES else f"({x.value},)" for x in indices)
                return f"part(tensors[{tensor.value[0]}], [{spec}], extents)"
            return f"look_up(tensors[{tensor.value[0]}], ({''.join(f'{writer.known[x].text}, ' for x in indices)}))"
        if form == "difference" and (line := affine(node)) is not None and line.difference:
            return f"({line.key} * difference + {line.constant})" if line.key != 1 or line.constant else "difference"
        return _of_coordinates(node)

    return leaf


# --- Triton ---


def _triton_leaf(masks: bool) -> Callable[[_Writer, Expr], str | None]:
    def leaf(writer: _Writer, node: Expr) -> str | None:
        if node.op == "argument":
            return f"args[{node.value}]"
        if node.op == "entry":
            loaded = f"tl.load(args[{node.value[0]}].ptr + ({_offset(writer, node)}))"
            if node.kind == "bool":
                return f"({loaded} != 0)"
            if node.kind != "float":
                return loaded
            return f"widened({loaded})" if masks else f"tl.cast({loaded}, score.dtype)"
        return _of_coordinates(node)

    return leaf


def _offset(writer: _Writer, node: Expr) -> str:
    number, dims = node.value
    table = f"args[{number}]"
    return " + ".join(f"within({writer.known[x].text}, {table}.sizes[{dim}]) * {table}.strides[{dim}]"
                      for x, dim in zip(node.args, dims, strict=True))


class Kernel(NamedTuple):
    """The Triton text of a function, and for each of its arguments whether the text has a slope by it."""

    source: str
    has_slope: tuple[bool, ...]


def kernel(placed: Placed, masks: bool) -> Kernel:
    """The text of ``function``; of a score function also of ``slope``, and of ``slope_i`` for each argument i of floats, with
    ``offset_i``, the place in it that belongs to a pair, where it is a table. One that is looked up by the score has neither.
    Second derivatives that are not 0 are ``curve``, by the score, ``curve_i`` and, for i <= j, ``curve_i_j``.
    """
    leaf, accurate = _triton_leaf(masks), f"args[{len(placed.arguments)}]"

    def text(name: str, parameters: str, expr: Expr, result: str) -> str:
        writer = _Writer(True, leaf, accurate=accurate)
        writer.scored = not masks
        body, = writer.write(expr)
        if expr.op == "constant" and expr not in (ZERO, ONE) and not masks:
            body = f"tl.full([], {body}, score.dtype)"
        return "\n".join(("@triton.jit", f"def {name}({parameters}):", *writer.lines, f"    return {result.format(body)}", ""))

    where = "q_idx, k_idx, head, batch, args"
    if masks:
        return Kernel(text("function", where, placed.body, "{}"), (False,) * len(placed.arguments))
    entries = {x.value[0]: x for x in walk(placed.body) if x.op == "entry"}
    leaves = {x.value: x for x in walk(placed.body) if x.op == "argument"} | entries
    parts = [text("function", f"score, {where}", placed.body, "as_score({}, score)"),
             text("slope", f"score, modded, {where}", derivative(placed.body, SCORE), "{}")]
    has_slope = []
    for i in range(len(placed.arguments)):
        index = set(walk(*entries[i].args)) if i in entries else ()
        has_slope.append(leaves[i].kind == "float" and SCORE not in index)
        if not has_slope[i]:
            continue
        parts.append(text(f"slope_{i}", f"score, modded, {where}", derivative(placed.body, leaves[i]), "{}"))
        if i in entries:
            writer = _Writer(True, leaf, accurate=accurate)
            writer.write(*entries[i].args)
            parts.append("\n".join(("@triton.jit", f"def offset_{i}(score, {where}):", *writer.lines,
                                    f"    return {_offset(writer, entries[i])}", "")))
    by = {"": SCORE, **{f"_{i}": leaves[i] for i, has in enumerate(has_slope) if has}}
    slopes = {name: derivative(placed.body, x) for name, x in by.items()}
    for first, second in itertools.combinations_with_replacement(by, 2):
        curve = derivative(slopes[first], by[second])
        if curve is not ZERO:
            parts.append(text(f"curve{first}{second}", f"score, modded, {where}", curve, "{}"))
    return Kernel("\n\n".join(parts), tuple(has_slope))


def by_accuracy(placed: Placed) -> bool:
    """Whether the kernels' text takes one more argument: whether the last digits of fp32 matter."""
    return any(x.op == "tanh" for x in walk(placed.body))


def adds(placed: Placed) -> bool:
    """Whether a score function adds something to the score, whatever that is."""
    node = placed.body
    while node is not SCORE:
        if node.op not in ("add", "sub"):
            return False
        first, second = node.args
        if SCORE in set(walk(second)):
            first, second = (second, first) if node.op == "add" else (second, second)
        if SCORE in set(walk(second)):
            return False
        node = first
    return True
