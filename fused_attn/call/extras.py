"""What a call adds to plain attention: functions of scores, biases, masks, sinks and dropout, checked and made operands."""

import numbers
import operator
from typing import Any, NamedTuple

import torch

from fused_attn import torch_private
from fused_attn.call import mods
from fused_attn.call.functions import functions
from fused_attn.call.functions.placing import Bounds
from fused_attn.call.mods import Bound, MaskMod, RelativeBias, ScoreMod
from fused_attn.call.spec import RELATIVE, TENSOR, AttentionSpec, Member, OtherTensors, Window
from fused_attn.call.values import FLOATS, is_finite, number


class Extents(NamedTuple):
    """The sizes that operands broadcast to: sequences, query heads, and queries and keys of the longest sequence."""

    batch: int
    heads: int
    n_queries: int
    n_keys: int


def extras(q: torch.Tensor, extents: Extents, spec: AttentionSpec, others: OtherTensors, *,
           bias: torch.Tensor | RelativeBias | None = None, mask: torch.Tensor | None = None,
           alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None, dropout_p: float = 0.0,
           score_mod: Any = None, mask_mod: Any = None, mod_args: tuple[Any, ...] = ()) -> tuple[AttentionSpec, OtherTensors]:
    """``spec`` and ``others`` with what a call adds to plain attention."""
    if not isinstance(mod_args, (tuple, list)):
        raise TypeError(f"mod_args: expected a tuple; got {type(mod_args).__name__}")
    if mod_args and all(mod is None or isinstance(mod, Bound) for mod in (*_each(score_mod), *_each(mask_mod))):
        raise ValueError(f"mod_args: expected none without a score_mod or mask_mod to bind them to; got {len(mod_args)}")
    score_bounds, _, cap = _bounds("score_mod", score_mod, tuple(mod_args), ScoreMod, extents, q, spec.softcap is None)
    if bias is not None:
        if not isinstance(bias, (torch.Tensor, RelativeBias)):
            raise TypeError(f"bias: expected a float tensor or a fused_attn.RelativeBias; got {bias!r}")
        score_bounds.append(mods.BIAS(bias))
    if alibi_slopes is not None:
        score_bounds.append(mods.ALIBI(_slopes(alibi_slopes, extents, q)))
    mask_bounds, band, _ = _bounds("mask_mod", mask_mod, tuple(mod_args), MaskMod, extents, q, spec.longest is None)
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError("mask: expected a bool tensor, True where a query attends (a float one is a bias); "
                            f"got {getattr(mask, 'dtype', mask)!r}")
        mask_bounds.append(mods.MASK(mask))
    operands: list[torch.Tensor] = []
    score_mods = tuple(_member(bound, extents, q, operands) for bound in score_bounds)
    mask_mods = tuple(_member(bound, extents, q, operands) for bound in mask_bounds)
    if sinks is not None:
        if not isinstance(sinks, torch.Tensor) or sinks.dtype not in FLOATS:
            raise TypeError(f"sinks: expected a float tensor [{extents.heads}]; got {getattr(sinks, 'dtype', sinks)!r}")
        if sinks.shape != (extents.heads,) or sinks.device != q.device:
            raise ValueError(f"sinks: expected shape ({extents.heads},) on {q.device}; "
                             f"got {tuple(sinks.shape)} on {sinks.device}")
    dropout_p = number(dropout_p)
    if not is_finite(dropout_p, "dropout_p", "a float from 0 to 1") or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a float from 0 to 1; got {dropout_p!r}")
    spec = spec._replace(score_mods=score_mods, mask_mods=mask_mods, dropout_p=float(dropout_p),
                         window=_narrowed(spec, band, extents), softcap=spec.softcap if cap is None else cap)
    sinks = None if sinks is None else sinks.contiguous()
    return spec, others._replace(sinks=sinks, operands=tuple(operands))


def _each(mods_given: Any) -> tuple[Any, ...]:
    """The mods of an argument, which may be one, several in their order, or None."""
    if mods_given is None:
        return ()
    return tuple(mods_given) if type(mods_given) in (tuple, list) else (mods_given,)


class _Given(NamedTuple):
    """The functions of one argument, bound to their operands, and what of them attention has by itself: a band around the
    diagonal that masks keep, and a softcap that comes before all else."""

    bound: list[Bound]
    band: Bounds
    softcap: float | None


def _bounds(name: str, given: Any, args: tuple[Any, ...], kind: type, extents: Extents, q: torch.Tensor,
            split: bool) -> _Given:
    """The functions of an argument; ``split``: what attention has by itself may be told apart, of scores in the first one."""
    found, band, cap = [], Bounds(), None
    for i, mod in enumerate(_each(given)):
        if functions.is_plain(mod):
            bound, own, own_cap = functions.bound(name, mod, args, extents, q, split and (kind is MaskMod or i == 0))
            band, cap = band.within(own), own_cap or cap
        else:
            bound = mods.checked(name, mod, args, kind)
        found += [] if bound is None else [bound]
    return _Given(found, band, cap)


def _narrowed(spec: AttentionSpec, band: Bounds, extents: Extents) -> Window:
    """The window of a call whose masks keep kv_idx - q_idx within a band."""
    offset = spec.offset(extents.n_queries, extents.n_keys)
    left, right = spec.window
    if band.least is not None:
        left = offset - band.least if left is None else min(left, offset - band.least)
    if band.most is not None:
        right = band.most - offset if right is None else min(right, band.most - offset)
    return Window(left, right)


def checked_weight(weight: Any, q: torch.Tensor) -> torch.Tensor:
    """The weight of an additive score, checked, as [H, D]."""
    heads, head_dim = q.shape[1], q.shape[3]
    if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS:
        raise TypeError(f"score_weight: expected a float tensor [{head_dim}] or [{heads}, {head_dim}]; "
                        f"got {getattr(weight, 'dtype', weight)!r}")
    if not (weight.shape == (head_dim,) or weight.shape == (heads, head_dim)) or weight.device != q.device:
        raise ValueError(f"score_weight: expected shape ({head_dim},) or ({heads}, {head_dim}) on {q.device}; "
                         f"got {tuple(weight.shape)} on {weight.device}")
    return weight.contiguous().expand(heads, head_dim)


def _slopes(slopes: Any, extents: Extents, q: torch.Tensor) -> torch.Tensor:
    if not isinstance(slopes, torch.Tensor) or slopes.dtype not in FLOATS:
        raise TypeError(f"alibi_slopes: expected a float tensor [H] or [B, H]; got {getattr(slopes, 'dtype', slopes)!r}")
    if not (slopes.shape == (extents.heads,) or slopes.shape == (extents.batch, extents.heads)) or slopes.device != q.device:
        raise ValueError(f"alibi_slopes: expected shape ({extents.heads},) or ({extents.batch}, {extents.heads}) "
                         f"on {q.device}; got {tuple(slopes.shape)} on {slopes.device}")
    return (slopes if slopes.dim() == 2 else slopes[None])[:, :, None, None]


def _member(bound: Bound, extents: Extents, q: torch.Tensor, operands: list[torch.Tensor]) -> Member:
    """A bound mod as a Member of the call; its tensors are appended to ``operands``."""
    kinds = []
    for i, arg in enumerate(bound.args):
        which = "score_mod" if isinstance(bound.mod, ScoreMod) else "mask_mod"
        own = bound.mod in (mods.BIAS, mods.MASK, mods.HIDE)
        name = bound.mod.name if own else f"{which}: argument {i} of {bound.mod.name}"
        if isinstance(arg, RelativeBias):
            values = _relative(name, arg.values, extents, q, bound.mod.code.raw)
            operands.append(values.detach() if isinstance(bound.mod, MaskMod) else values)
            kinds.append(RELATIVE)
        elif isinstance(arg, torch.Tensor):
            operand = _operand(name, arg, extents, q, bound.mod.code.raw)
            operands.append(operand.detach() if isinstance(bound.mod, MaskMod) else operand)  # a mask has no slope
            kinds.append(TENSOR)
        else:
            # Where a compiler has an int vary, operator.index has it take the value that it has.
            kinds.append(repr(operator.index(arg)) if isinstance(arg, numbers.Integral) else repr(float(arg)))
    return Member(bound.mod.code, tuple(kinds), bound.mod.plain)


def _broadcasts(size: int, full: int) -> bool:
    return torch_private.known(size == 1) or torch_private.equal(
        size, full, "an operand: expected a shape that broadcasts to the longest sequences")


def _operand(name: str, x: torch.Tensor, extents: Extents, q: torch.Tensor, raw: bool = False) -> torch.Tensor:
    """``x``, checked, as [B', H', Nq', Nk'] with each extent full or 1; ``raw``: of a plain function, which has tables too."""
    if x.is_complex() or (name == "bias" and x.dtype not in FLOATS) or (x.is_floating_point() and x.dtype not in FLOATS):
        raise TypeError(f"{name}: expected a float tensor{' (a bool one is a mask)' if name == 'bias' else ''}; got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}; got {x.device}")
    looked_up = raw and x.dim() > 4  # a table, whose further dimensions the function indexes
    fits = (x.dim() <= 4 or looked_up) and all(_broadcasts(size, full) for size, full in zip(
        reversed(x.shape[:4]), reversed(extents), strict=False))
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(extents)}; got {tuple(x.shape)}")
    return x if x.dim() >= 4 else x[(None,) * (4 - x.dim())]


def _relative(name: str, values: Any, extents: Extents, q: torch.Tensor, any_type: bool = False) -> torch.Tensor:
    """The values of a relative bias, checked, as [B', H', Nq + Nk - 1]; ``any_type``: not only floats."""
    if not isinstance(values, torch.Tensor) or not (any_type or values.dtype in FLOATS):
        raise TypeError(f"{name}: expected RelativeBias of a float tensor; got {getattr(values, 'dtype', values)!r}")
    differences = max(extents.n_queries + extents.n_keys - 1, 0)
    leading = values.shape[:-1]
    # Where a compiler does not know the lengths, n and max(n, 0) are two different sizes.
    fits = values.dim() in (2, 3) and (
        torch_private.known(values.shape[-1] == extents.n_queries + extents.n_keys - 1)
        or torch_private.equal(values.shape[-1], differences, f"{name}: expected values for every k - q it has")) and all(
        _broadcasts(size, full) for size, full in zip(reversed(leading), (extents.heads, extents.batch), strict=False))
    if not fits or values.device != q.device:
        raise ValueError(f"{name}: expected RelativeBias values [{extents.heads}, {differences}], one for each k - q, or "
                         f"[{extents.batch}, ...], on {q.device}; got {tuple(values.shape)} on {values.device}")
    return values if values.dim() == 3 else values[None]
