"""Calls as ops take them: the records of a call, field by field, become one flat list of arguments, and back.

The schema, the arguments and what is read from them follow from the fields of the records, in their order: a new field needs no
line here unless its type is new as well.
"""

import types
import typing
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch

from fused_attn.call import mods
from fused_attn.call.spec import AttentionSpec, MaybeTensor, Member, OtherTensors


class Inputs(NamedTuple):
    """What a forward is given beside others and spec."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Pair(NamedTuple):
    """What the inspection of weights is given beside others and spec."""

    q: torch.Tensor
    k: torch.Tensor


class Saved(NamedTuple):
    """What a backward is given beside others, spec and needs; ``dlse`` and ``residual`` may be None."""

    dout: torch.Tensor
    dlse: MaybeTensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    residual: MaybeTensor
    lse: torch.Tensor


class Forwarded(NamedTuple):
    """What a tangent of the forward is given beside directions, others and spec: the forward's tensors and what it made."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    residual: MaybeTensor
    lse: torch.Tensor


class Directions(NamedTuple):
    """The tangents of a call's tensors: None for one that does not move, and an empty tensor for such an operand."""

    q_t: MaybeTensor
    k_t: MaybeTensor
    v_t: MaybeTensor
    sinks_t: MaybeTensor
    score_weight_t: MaybeTensor
    operands_t: tuple[torch.Tensor, ...]

    def flat(self) -> tuple[Any, ...]:
        """The single tensors, then those of the operands: the form in which an autograd Function takes them."""
        *single, operands = self
        return (*single, *operands)

    @classmethod
    def of(cls, flat: Iterable[Any]) -> "Directions":
        """The inverse of ``flat``."""
        q_t, k_t, v_t, sinks_t, weight_t, *operands = flat
        return cls(q_t, k_t, v_t, sinks_t, weight_t, tuple(operands))


class Moved(NamedTuple):
    """What a tangent of the backward is given beside saved, directions, others and spec: the tangents of out and LSE, and those
    of their gradients, None where these do not move."""

    out_t: torch.Tensor
    lse_t: torch.Tensor
    dout_t: MaybeTensor
    dlse_t: MaybeTensor


class Needs(NamedTuple):
    """Which gradients a backward is asked for."""

    dq: bool
    dk: bool
    dv: bool
    dsinks: bool
    dscore_weight: bool
    doperands: tuple[bool, ...]


_TYPES = {
    torch.Tensor: "Tensor", MaybeTensor: "Tensor?", tuple[torch.Tensor, ...]: "Tensor[]",
    bool: "bool", tuple[bool, ...]: "bool[]", int | None: "SymInt?", float: "float", float | None: "float?",
    str: "str", str | None: "str?",
}


class _Field(NamedTuple):
    """One field of a record: its arguments in the schema, and functions from its value to them and back."""

    arguments: tuple[str, ...]
    flat: Callable[[Any], tuple[Any, ...]]
    whole: Callable[..., Any]


def _fields(record: type, prefix: str = "", optional: bool = False) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(record)
    return tuple(_field(f"{prefix}{name}", hint | None if optional else hint) for name, hint in hints.items())


def _field(name: str, hint: Any) -> _Field:
    if hint in _TYPES:
        return _Field((f"{_TYPES[hint]} {name}",), lambda x: (x,), tuple if _TYPES[hint].endswith("[]") else lambda x: x)
    if hint == tuple[Member, ...]:
        return _Field((f"str {name}",), lambda members: (_text(members),), _members)
    optional = isinstance(hint, types.UnionType)  # a record within the record, or None
    record = next(x for x in typing.get_args(hint) if x is not types.NoneType) if optional else hint
    fields = _fields(record, f"{name}_", optional)
    nothing = (None,) * len(fields)
    return _Field(tuple(argument for field in fields for argument in field.arguments),
                  lambda x: nothing if x is None else tuple(x),
                  lambda *values: None if optional and values == nothing else record(*values))


def _text(members: tuple[Member, ...]) -> str:
    keys = (f"{x.code.key}~{x.reference.key if x.reference else ''}" for x in members)
    return ";".join(f"{key}:{','.join(x.args)}" for key, x in zip(keys, members, strict=True)) if members else ""


def _members(text: str) -> tuple[Member, ...]:
    members = []
    for part in text.split(";") if text else ():
        keys, _, args = part.partition(":")
        code, _, plain = keys.partition("~")
        found, reference = mods.named(code, plain)
        members.append(Member(found, tuple(args.split(",")) if args else (), reference))
    return tuple(members)


class Signature:
    """The arguments of an op: the fields of its records, one record after the other."""

    def __init__(self, *records: type) -> None:
        # Names must differ, and those of Needs are the names of the gradients themselves.
        self._records = tuple((record, _fields(record, "need_" if record is Needs else "")) for record in records)
        self.text = ", ".join(argument for _, fields in self._records for field in fields for argument in field.arguments)

    def flat(self, *records: Any) -> tuple[Any, ...]:
        """The arguments of an op, made from its records."""
        return tuple([argument for values, (_, fields) in zip(records, self._records, strict=True)
                      for value, field in zip(values, fields, strict=True) for argument in field.flat(value)])

    def records(self, arguments: Iterable[Any]) -> Iterator[Any]:
        """The records of an op, made from its arguments."""
        rest = iter(arguments)
        for record, fields in self._records:
            yield record(*[field.whole(*islice(rest, len(field.arguments))) for field in fields])


FORWARD = Signature(Inputs, OtherTensors, AttentionSpec)
INSPECTION = Signature(Pair, OtherTensors, AttentionSpec)
BACKWARD = Signature(Saved, OtherTensors, AttentionSpec, Needs)
TANGENT = Signature(Forwarded, Directions, OtherTensors, AttentionSpec)
BACKWARD_TANGENT = Signature(Saved, Moved, Directions, OtherTensors, AttentionSpec, Needs)
