"""Score mods and mask mods: functions of a score and of where it stands, on the kernels and in plain PyTorch alike.

A mod is pointwise. It sees the score, the query's position among the keys (its index plus Nk - Nq, so that a mod written
for training is right in decoding too), the key's index, head and batch, and its arguments: tensors that broadcast to
[B, H, Nq, Nk], of which it sees the values that belong to the score, and numbers, which are compile-time constants. There are
no pointers in it, so the same few lines run on a tile of a kernel and on whole tensors of the reference.
"""

import dataclasses
import functools
import hashlib
import math
import numbers
import uuid
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from fused_attn import torch_private
from fused_attn.call.identity import captured, content

Reference: TypeAlias = Callable[[Any, Any, Any, Any, Any, tuple[Any, ...]], torch.Tensor]


class RelativeBias(NamedTuple):
    """An additive bias that depends on k - q alone: ``attention(..., bias=RelativeBias(values))``.

    ``values`` is [H', Nq + Nk - 1] or [B', H', Nq + Nk - 1], each B' and H' full or 1; the bias of query i and key j is
    ``values[..., j - i + Nq - 1]``, with Nq and Nk of the longest sequences where they are packed. Neither the bias nor
    its gradient is ever held as Nq x Nk.
    """

    values: torch.Tensor


class Bound(NamedTuple):
    """A mod together with its arguments."""

    mod: "ScoreMod | MaskMod"
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Code:
    """What kernels know of a mod. Op schemas take no functions, so a mod travels through them as its ``key``.

    The key identifies the functions: other code, or other captured values, give another key, in this process and in the next.
    Mods with one key share one Code, whatever their references.
    """

    key: str
    name: str = dataclasses.field(compare=False)
    function: Any = dataclasses.field(default=None, compare=False)
    slope: Any = dataclasses.field(default=None, compare=False)
    arg_slopes: tuple[Any, ...] = dataclasses.field(default=(), compare=False)
    by_batch: bool = dataclasses.field(default=False, compare=False)
    by_head: bool = dataclasses.field(default=False, compare=False)
    source: str | None = dataclasses.field(default=None, compare=False)  # the Triton text of a traced function
    raw: bool = dataclasses.field(default=False, compare=False)  # whether it takes a query's index, and not its position
    adds: bool = dataclasses.field(default=False, compare=False)  # whether it adds something to the score, whatever that is

    @property
    def has_kernel(self) -> bool:
        """Whether kernels can run it: by its own function, or as one of those that ship, whose key is their name."""
        return self.function is not None or self.source is not None or self.key == self.name

    def __deepcopy__(self, memo: Any) -> "Code":
        return self


@dataclasses.dataclass(frozen=True)
class Plain:
    """The plain PyTorch reference of a mod. Through op schemas it travels as its ``key``, like a ``Code``."""

    key: str
    function: Callable[..., torch.Tensor] = dataclasses.field(compare=False)
    learned: bool = dataclasses.field(default=False, compare=False)  # captures a tensor that wants derivatives

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return self.function(*arguments)

    def __deepcopy__(self, memo: Any) -> "Plain":
        return self


_ALIVE: "weakref.WeakValueDictionary[str, Code]" = weakref.WeakValueDictionary()
_PLAIN: "weakref.WeakValueDictionary[str, Plain]" = weakref.WeakValueDictionary()


def _code(name: str, function: Any, slope: Any, arg_slopes: tuple[Any, ...], by_batch: bool, by_head: bool) -> Code:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected a word of letters, digits and underscores; got {name!r}")
    # A mod that has only a reference never leaves the process, and nothing but the mod itself identifies it.
    texts = [uuid.uuid4().hex] if function is None else [content(x, []) for x in (function, slope, *arg_slopes)]
    digest = hashlib.sha256("|".join((*texts, str(by_batch), str(by_head))).encode()).hexdigest()
    code = Code(f"{name}_{digest[:16]}", name, function, slope, tuple(arg_slopes), by_batch, by_head)
    return _ALIVE.setdefault(code.key, code)


def _plain(reference: Callable[..., torch.Tensor] | None, alone: bool) -> Plain | None:
    """``alone``: the mod has nothing else, and so its Code identifies it."""
    if reference is None:
        return None
    text = uuid.uuid4().hex if alone else content(reference, [])
    learned = any(isinstance(x, torch.Tensor) and (x.requires_grad or torch_private.is_transformed(x))
                  for x in captured(reference))
    plain = Plain(hashlib.sha256(text.encode()).hexdigest()[:16], reference, learned)
    return _PLAIN.setdefault(plain.key, plain)


@functools.lru_cache(1024)
def named(key: str, plain: str) -> tuple[Code, Plain | None]:
    """The code of a key, and the plain reference of another one, if any. A graph knows a mod by its keys alone, so those asked
    for most recently are kept alive."""
    code, reference = _ALIVE.get(key), _PLAIN.get(plain)
    if code is None or (plain and reference is None):
        raise LookupError(f"{key}: no ScoreMod or MaskMod of this code is alive; a program that was exported, or a graph that "
                          "outlived its mod, needs it made again, of the same functions, and kept")
    return code, reference


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreMod:
    """A function of the score, applied after scale and softcap and before bias and mask.

    Args:
        name: a word to know it by in messages.
        function: a ``@triton.jit`` function (score, q_pos, k_idx, head, batch, args) -> score.
        slope: jit function (score, modded, q_pos, k_idx, head, batch, args) -> d modded / d score, finite wherever the
            score is; the number 1.0 for a sum; None if gradients of q and k are never wanted. A function that returns a
            bare number returns it in fp32: with fp64 calls in mind write ``score * 0 + number``.
        arg_slopes: for each argument None or a jit function with ``slope``'s parameters -> d modded / d argument.
        reference: the plain PyTorch reference of ``function``, same parameters, for the backends in plain PyTorch.

    Calling it with arguments binds them: ``attention(..., score_mod=mod(slopes))``.
    """

    name: str
    function: Any = None
    slope: Any = None
    arg_slopes: tuple[Any, ...] = ()
    reference: Reference | None = None
    code: Code = dataclasses.field(init=False, repr=False)
    plain: Plain | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        code = _code(self.name, self.function, self.slope, self.arg_slopes, False, False)
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "plain", _plain(self.reference, self.function is None))

    def __call__(self, *args: Any) -> Bound:
        return Bound(self, args)


@dataclasses.dataclass(frozen=True, eq=False)
class MaskMod:
    """A function that tells which pairs attend.

    Args:
        name: a word to know it by in messages.
        function: a ``@triton.jit`` function (q_pos, k_idx, head, batch, args) -> bool.
        reference: its plain PyTorch reference, for the backends in plain PyTorch.
        by_batch, by_head: whether it differs from batch entry to batch entry, or from head to head, other than through
            its arguments; where it does not, one list of tiles serves all.

    Calling it with arguments binds them.
    """

    name: str
    function: Any = None
    reference: Callable[..., torch.Tensor] | None = None
    by_batch: bool = False
    by_head: bool = False
    code: Code = dataclasses.field(init=False, repr=False)
    plain: Plain | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        code = _code(self.name, self.function, None, (), self.by_batch, self.by_head)
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "plain", _plain(self.reference, self.function is None))

    def __call__(self, *args: Any) -> Bound:
        return Bound(self, args)


def of_code(kind: type, code: Code, reference: Callable[..., torch.Tensor]) -> "ScoreMod | MaskMod":
    """The mod of a function that was traced, and is known by its text."""
    mod: ScoreMod | MaskMod = kind(code.name, reference=reference)
    object.__setattr__(mod, "code", _ALIVE.setdefault(code.key, code))
    object.__setattr__(mod, "plain", _PLAIN.setdefault(code.key, Plain(code.key, reference)))
    return mod


def checked(name: str, mod: Any, args: tuple[Any, ...], kind: type) -> Bound | None:
    """The ``score_mod`` or ``mask_mod`` of a call, checked and bound to its arguments, or None."""
    if mod is None:
        return None
    bound = mod if isinstance(mod, Bound) else Bound(mod, tuple(args))
    if not isinstance(bound.mod, kind):
        raise TypeError(f"{name}: expected a fused_attn.{kind.__name__}, or one bound to its arguments; got {mod!r}")
    for i, arg in enumerate(bound.args):
        if isinstance(arg, torch.Tensor):
            continue
        if isinstance(arg, bool) or not isinstance(arg, numbers.Real):
            raise TypeError(f"{name}: expected argument {i} to be a tensor or a number; got {arg!r}")
        if not -math.inf < arg < math.inf:  # type: ignore[operator]  # math.isfinite breaks graphs in which a number varies
            raise ValueError(f"{name}: expected argument {i} to be finite; got {arg!r}")
    return bound


# The mods that ship. Their kernels are in kernels/score.py and kernels/mask.py, their references are here.


def _is_ancestor(args: tuple[Any, ...]) -> torch.Tensor:
    inside: torch.Tensor = (args[1] <= args[0]) & (args[0] < args[2])
    return inside


def _distance(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (q - k).abs().to(dtype)  # converted before anything broadcasts


BIAS = ScoreMod("bias", reference=lambda s, q, k, h, b, args: s + args[0])
ALIBI = ScoreMod("alibi", reference=lambda s, q, k, h, b, args: s - args[0] * _distance(q, k, s.dtype))
KERPLE = ScoreMod("kerple", reference=lambda s, q, k, h, b, args: (
    s - args[0] * torch.log1p(args[1] * _distance(q, k, s.dtype))))
SOFT_TREE = ScoreMod("soft_tree", reference=lambda s, q, k, h, b, args: s - (~_is_ancestor(args)).to(s.dtype) * args[3])
MASK = MaskMod("mask", reference=lambda q, k, h, b, args: args[0] != 0)
HIDE = MaskMod("hide", reference=lambda q, k, h, b, args: args[0] == 0)  # a mask that is True where a pair must not attend
DOCUMENT = MaskMod("document", reference=lambda q, k, h, b, args: args[0] == args[1])
PREFIX_LM = MaskMod("prefix_lm", reference=lambda q, k, h, b, args: (k < args[0]) | (k <= q))
DILATED_WINDOW = MaskMod("dilated_window", reference=lambda q, k, h, b, args: (
    ((q - k) % args[0] == 0) & ((q - k).abs() <= args[1])))
TREE = MaskMod("tree", reference=lambda q, k, h, b, args: _is_ancestor(args))

# The kernels know them by name.
for _mod in (BIAS, ALIBI, KERPLE, SOFT_TREE, MASK, HIDE, DOCUMENT, PREFIX_LM, DILATED_WINDOW, TREE):
    _code_of = Code(_mod.name, _mod.name, adds=isinstance(_mod, ScoreMod))
    object.__setattr__(_mod, "code", _ALIVE.setdefault(_mod.name, _code_of))
    object.__setattr__(_mod, "plain", _PLAIN.setdefault(_mod.name, Plain(_mod.name, _mod.reference)))  # type: ignore[arg-type]


def _per_token(name: str, x: Any) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.dim() not in (1, 2) or x.is_floating_point():
        raise TypeError(f"{name}: expected an integer tensor [N] or [B, N]; got {getattr(x, 'shape', x)!r}")
    return x if x.dim() == 2 else x[None]


def _per_head(name: str, x: Any) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a float tensor [H] or [B, H]; got {getattr(x, 'dtype', x)!r}")
    if x.dim() not in (1, 2):
        raise ValueError(f"{name}: expected shape [H] or [B, H]; got {tuple(x.shape)}")
    return x[..., None, None]


def kerple(r1: torch.Tensor, r2: torch.Tensor) -> Bound:
    """Scores lose r1 * log(1 + r2 * |q - k|), q and k the positions: ``attention(..., score_mod=kerple(r1, r2))``.

    ``r1`` and ``r2`` hold a positive number for each head, floats [H] or [B, H], and have gradients; that they are positive
    is the caller's to see to, as by a softplus. Source: Chi et al. 2022, "KERPLE: Kernelized Relative Positional Embedding
    for Length Extrapolation", its logarithmic variant.
    """
    return KERPLE(_per_head("r1", r1), _per_head("r2", r2))


def document_mask(of_keys: torch.Tensor, of_queries: torch.Tensor | None = None) -> Bound:
    """Tokens attend within their own document: ``attention(..., mask_mod=document_mask(ids), causal=True)``.

    ``of_keys`` and ``of_queries`` (the same by default) hold document numbers, integers [N] or [B, N].
    """
    keys = _per_token("of_keys", of_keys)
    queries = keys if of_queries is None else _per_token("of_queries", of_queries)
    return DOCUMENT(queries[:, None, :, None], keys[:, None, None, :])


def prefix_lm_mask(lengths: torch.Tensor) -> Bound:
    """The first ``lengths`` [B] keys are seen by all, the rest causally. Source: Raffel et al. 2020, "T5"."""
    if not isinstance(lengths, torch.Tensor) or lengths.dim() != 1 or lengths.is_floating_point():
        raise TypeError(f"lengths: expected an integer tensor [B]; got {getattr(lengths, 'shape', lengths)!r}")
    return PREFIX_LM(lengths[:, None, None, None])


def dilated_window_mask(radius: int, dilation: int) -> Bound:
    """Queries attend to every ``dilation``-th key on both sides of them, ``radius`` of them on each, and to their own.

    ``radius`` is an int of 0 or more, ``dilation`` of 1 or more; a new value of either compiles once. Of the two sides one is
    left with ``attention(..., mask_mod=dilated_window_mask(4, 3), causal=True)``. Source: Beltagy et al. 2020, "Longformer".
    """
    for name, number, least in (("radius", radius, 0), ("dilation", dilation, 1)):
        if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < least:
            raise ValueError(f"{name}: expected an int of {least} or more; got {number!r}")
    farthest = 2**31 - 1  # of any distance that there is, and so a bound on what fits a kernel's integers
    return DILATED_WINDOW(min(int(dilation), farthest), min(int(radius) * int(dilation), farthest))


def tree_intervals(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(enter, leave) of each node of a tree or forest: node k is an ancestor of q, or q, when enter[k] <= enter[q] < leave[k].

    ``parents`` [N] on the CPU holds each node's parent, an earlier node, or -1 for a root.
    """
    if not isinstance(parents, torch.Tensor) or parents.dim() != 1 or parents.is_floating_point():
        raise TypeError(f"parents: expected an integer tensor [N]; got {getattr(parents, 'shape', parents)!r}")
    above = parents.tolist()
    sizes = [1] * len(above)
    for node in reversed(range(len(above))):
        if above[node] >= node or above[node] < -1:
            raise ValueError(f"parents: expected an earlier node, or -1, as the parent of node {node}; got {above[node]}")
        if above[node] >= 0:
            sizes[above[node]] += sizes[node]
    enter, free = [0] * len(above), [0] * (len(above) + 1)  # the next free number within each node, and among the roots
    for node, parent in enumerate(above):
        enter[node] = free[parent]
        free[parent] += sizes[node]
        free[node] = enter[node] + 1
    first = torch.tensor(enter, dtype=torch.int32)
    return first, first + torch.tensor(sizes, dtype=torch.int32)


def tree_mask(enter: torch.Tensor, leave: torch.Tensor) -> Bound:
    """Tokens attend to their ancestors in a tree, such as the candidates of speculative decoding.

    ``enter`` and ``leave`` are what ``tree_intervals`` gives, [N] or [B, N].
    """
    enter, leave = _per_token("enter", enter), _per_token("leave", leave)
    return TREE(enter[:, None, :, None], enter[:, None, None, :], leave[:, None, None, :])


def soft_tree_mask(enter: torch.Tensor, leave: torch.Tensor, penalty: torch.Tensor) -> Bound:
    """A tree mask that can be learned: scores of keys that are no ancestors lose ``penalty``, which broadcasts to
    [B, H, Nq, Nk] and has a gradient: ``attention(..., score_mod=soft_tree_mask(enter, leave, penalty))``."""
    enter, leave = _per_token("enter", enter), _per_token("leave", leave)
    return SOFT_TREE(enter[:, None, :, None], enter[:, None, None, :], leave[:, None, None, :], penalty)


def check_buckets(buckets: int, bidirectional: bool, max_distance: int, name: str = "table") -> None:
    """Checks the buckets of T5's bias: single distances need at least one, and ``max_distance`` must lie beyond them."""
    exact = buckets // (4 if bidirectional else 2)
    if exact < 1:
        raise ValueError(f"{name}: expected at least {4 if bidirectional else 2} buckets"
                         f"{' of two directions' if bidirectional else ''}; got {buckets}")
    if isinstance(max_distance, bool) or not isinstance(max_distance, numbers.Integral) or max_distance <= exact:
        raise ValueError(f"max_distance: expected an int above {exact}, the buckets of single distances; got {max_distance!r}")


def t5_bias(table: torch.Tensor, n_queries: int, n_keys: int, *, bidirectional: bool = True,
            max_distance: int = 128) -> RelativeBias:
    """T5's relative position bias from its ``table`` [buckets, H], to which gradients flow.

    Half of the buckets (all of them unless ``bidirectional``, which keeps a half for keys after the query) stand for
    single distances, the rest for ranges that grow logarithmically up to ``max_distance``. The last query stands at the
    last key; of packed sequences, this holds for the longest and for all with the same Nk - Nq. Source: Raffel et al. 2020,
    "Exploring the Limits of Transfer Learning".
    """
    if not isinstance(table, torch.Tensor) or table.dim() != 2:
        raise TypeError(f"table: expected a tensor [buckets, H]; got {getattr(table, 'shape', table)!r}")
    check_buckets(table.shape[0], bidirectional, max_distance)
    # values[..., j - i + Nq - 1] belongs to query i at position i + Nk - Nq.
    distance = torch.arange(max(n_queries + n_keys - 1, 0), device=table.device) - (n_keys - 1)
    buckets, bucket = table.shape[0], torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        bucket = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    ranged = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = bucket + torch.where(distance < exact, distance, ranged)
    return RelativeBias(table[bucket].T.contiguous()[None])
