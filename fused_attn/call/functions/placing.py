"""Takes out of an expression what can be computed before a kernel runs, as the operands that the kernel then reads.

A part that reads tensors and depends on batch and head, and beside them on the query alone, the key alone or their difference,
is an operand of O(N) elements, whatever it computes: its gradient goes on by PyTorch's autograd to the tensors that it is made
of. Elsewhere, a read from a tensor stays a read within the kernel.
"""

from typing import NamedTuple

from fused_attn.call.functions.expressions import BATCH, COORDINATES, HEAD, KEY, QUERY, SCORE, Expr, expression, rebuilt, walk


class Affine(NamedTuple):
    """query * q_idx + key * kv_idx + constant."""

    query: int
    key: int
    constant: int

    @property
    def difference(self) -> bool:
        """Whether it depends on kv_idx - q_idx alone."""
        return self.key != 0 and self.query == -self.key


def affine(node: Expr) -> Affine | None:
    """The affine form of an integer expression, if it has one."""
    if node is QUERY:
        return Affine(1, 0, 0)
    if node is KEY:
        return Affine(0, 1, 0)
    if node.op == "constant":
        return Affine(0, 0, node.value) if node.kind == "int" else None
    if node.kind != "int" or node.op not in ("add", "sub", "mul", "neg"):
        return None
    parts = [affine(x) for x in node.args]
    a, b = parts[0], parts[-1]
    if a is None or b is None:
        return None
    if node.op == "neg":
        return Affine(*(-x for x in a))
    if node.op == "mul":
        factor, other = (a, b) if not (a.query or a.key) else (b, a)
        return None if factor.query or factor.key else Affine(*(factor.constant * x for x in other))
    sign = 1 if node.op == "add" else -1
    return Affine(*(x + sign * y for x, y in zip(a, b, strict=True)))


class Argument(NamedTuple):
    """An operand of a function.

    ``form`` "pairs": ``expr`` has a value for each pair, or for each query, key, head or batch entry; "difference": for each
    kv_idx - q_idx; "table": it is the tensor itself, whose dimension ``lead[i]`` is batch, head, query, key for i = 0, 1, 2, 3
    (None: it has none), and ``inner`` are its other dimensions, which the function indexes.
    """

    form: str
    expr: Expr
    lead: tuple[int | None, ...] = ()
    inner: tuple[int, ...] = ()


class Placed(NamedTuple):
    """A function of the score, coordinates and arguments, ``argument`` and ``entry`` expressions in place of tensors."""

    body: Expr
    arguments: tuple[Argument, ...]

    @property
    def uses(self) -> frozenset[Expr]:
        """The score and the coordinates that the function itself depends on, not by its operands."""
        return frozenset(x for x in walk(self.body) if x is SCORE or x in COORDINATES)


class _Needs(NamedTuple):
    """What a part of an expression depends on, and what the reads from tensors within it depend on; None: it has none."""

    of_value: frozenset[str]
    of_reads: frozenset[str] | None


def _needs(root: Expr) -> dict[Expr, _Needs]:
    """The needs of every part of an expression."""
    needs: dict[Expr, _Needs] = {}
    for node in walk(root):
        form, own = affine(node), frozenset[str]()
        if form is not None and form.difference:
            own = frozenset(("difference",))
        elif node is SCORE or node in COORDINATES:
            own = frozenset((node.op,))
        else:
            own = own.union(*(needs[x].of_value for x in node.args), ("score",) if node.value == "score" else ())
        reads = [needs[x].of_reads for x in node.args]
        reads += [own] if node.op == "element" else []
        known = [x for x in reads if x is not None]
        needs[node] = _Needs(own, frozenset().union(*known) if known else None)
    return needs


def plain(indices: tuple[Expr, ...]) -> bool:
    """Whether each index is a coordinate, none of them twice, or a number: what they tell is a view of the tensor."""
    named = [x for x in indices if x in COORDINATES]
    return len(set(named)) == len(named) and all(x in COORDINATES or x.op == "constant" for x in indices)


def place(body: Expr) -> Placed:
    """Takes the operands out of a traced function."""
    needs = _needs(body)
    found: dict[Expr, Argument] = {}
    numbers: dict[Expr, int] = {}

    def take(node: Expr) -> Expr | None:
        of_value, of_reads = needs[node]
        if of_reads is None or node.kind == "tensor" or "score" in of_value:
            return None
        if node.op == "element" and plain(node.args[1:]):
            found[node] = Argument("pairs", node)
            return expression("argument", value=numbers.setdefault(node, len(numbers)), kind=node.kind)
        where = of_value - {BATCH.op, HEAD.op}
        # Arithmetic that turns a value per head into one per query or difference is the kernel's own: it costs no memory there.
        if len(where) > 1 or where != of_reads - {BATCH.op, HEAD.op}:
            return None
        form = "difference" if "difference" in where else "pairs"
        found[node] = Argument(form, node)
        return expression("argument", value=numbers.setdefault(node, len(numbers)), kind=node.kind)

    def look(node: Expr) -> Expr | None:
        if node.op != "element":
            return None
        tensor, *indices = node.args
        lead = tuple(indices.index(x) if x in indices else None for x in COORDINATES)
        inner = tuple(i for i in range(len(indices)) if i not in lead)
        found[node] = Argument("table", tensor, lead, inner)
        number = numbers.setdefault(node, len(numbers))
        dims = tuple(i for i, of in enumerate(lead) if of is not None) + tuple(4 + i for i in range(len(inner)))
        changed = [rebuilt(x, look) for x in (*(indices[i] for i in lead if i is not None), *(indices[i] for i in inner))]
        return expression("entry", changed, (number, dims), node.kind)

    body = rebuilt(rebuilt(body, take), look)
    return Placed(body, tuple(found[node] for node in numbers))


class Bounds(NamedTuple):
    """kv_idx - q_idx from ``least`` to ``most``, None where a side is open."""

    least: int | None = None
    most: int | None = None

    def within(self, other: "Bounds") -> "Bounds":
        """Both."""
        least = [x for x in (self.least, other.least) if x is not None]
        most = [x for x in (self.most, other.most) if x is not None]
        return Bounds(max(least, default=None), min(most, default=None))


def window(body: Expr) -> tuple[Bounds, Expr | None]:
    """The band around the diagonal that a mask asks for, and what it asks for beside, if anything."""
    bounds, rest = Bounds(), None
    stack = [body]
    while stack:
        node = stack.pop()
        if node.op == "and" and node.kind == "bool":
            stack += reversed(node.args)
        elif (band := _band(node)) is not None:
            bounds = bounds.within(band)
        elif not (node.op == "constant" and node.value is True):
            rest = node if rest is None else expression("and", (rest, node), kind="bool")
    return bounds, rest


def _band(node: Expr) -> Bounds | None:
    """The bounds that a comparison sets on kv_idx - q_idx, if that is all it does."""
    if node.op not in ("lt", "le", "gt", "ge"):
        return _around(node)
    a, b = (affine(x) for x in node.args)
    if a is None or b is None:
        return _around(node)
    key, query, rest = a.key - b.key, a.query - b.query, a.constant - b.constant
    if abs(key) != 1 or query != -key:
        return None
    # key * (kv_idx - q_idx) + rest, compared with 0
    if node.op in ("gt", "ge"):
        key, rest = -key, -rest
    most = -rest - (node.op in ("lt", "gt"))
    return Bounds(None, most) if key > 0 else Bounds(-most, None)


def _around(node: Expr) -> Bounds | None:
    """The bounds that |kv_idx - q_idx| <= n and the like set."""
    if node.op in ("gt", "ge"):
        node = expression({"gt": "lt", "ge": "le"}[node.op], node.args[::-1], kind="bool")
    if node.op not in ("lt", "le") or node.args[0].op != "abs" or node.args[1].op != "constant" or node.args[1].kind != "int":
        return None
    form = affine(node.args[0].args[0])
    if form is None or not form.difference or abs(form.key) != 1:
        return None
    reach, middle = node.args[1].value - (node.op == "lt"), -form.constant * form.key
    return Bounds(middle - reach, middle + reach)


def softcap(body: Expr) -> tuple[float | None, Expr]:
    """(cap, what is left of a score function once cap * tanh(score / cap) is the score), or (None, ``body``).

    Attention has a softcap of its own, before all functions of the score.
    """
    for capped in walk(body):
        if (cap := _cap(capped)) is not None:
            break
    else:
        return None, body

    def without(x: Expr) -> Expr | None:
        return SCORE if x is capped else CAPPED if x is SCORE else None

    rest = rebuilt(body, without)
    return (None, body) if CAPPED in set(walk(rest)) else (cap, rest)


CAPPED = expression("score before the softcap")  # what nothing but the softcap may look at


def _cap(node: Expr) -> float | None:
    """The cap of an expression that is a softcap of the score."""
    if node.op != "mul":
        return None
    number, tanh = node.args if node.args[0].op == "constant" else node.args[::-1]
    if number.op != "constant" or tanh.op != "tanh" or not number.value > 0:
        return None
    inner = tanh.args[0]
    divided = inner.op == "div" and inner.args[0] is SCORE and inner.args[1].op == "constant"
    fits = divided and inner.args[1].value == number.value and 2.0**-126 <= number.value <= 2.0**126
    return float(number.value) if fits else None
