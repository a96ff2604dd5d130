"""Makes the description of a call from its arguments, with every check, by name, before anything runs."""

import itertools
import math
from typing import Any, NamedTuple

import torch

from fused_attn import settings, torch_private, tracing
from fused_attn.call.arguments import Arguments, unexpected
from fused_attn.call.classes import check_causal_bias, check_classes, check_layout, is_causal_bias
from fused_attn.call.extras import Extents, checked_weight, extras
from fused_attn.call.spec import NO_OTHERS, AttentionSpec, Longest, OtherTensors, Window
from fused_attn.call.values import FLOATS, is_finite, number

_EXTRAS = {"bias", "mask", "alibi_slopes", "sinks", "dropout_p", "score_mod", "mask_mod", "mod_args"}
FP32_PRECISIONS = ("ieee", "tf32", "tf32x3")
NARROWEST, WIDEST = 2.0**-126, 2.0**126  # a factor that kernels hold in fp32, with its reciprocal and log2(e)


class Described(NamedTuple):
    """A checked call: q [B, H, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] in one dtype, its spec and its other tensors."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    spec: AttentionSpec
    others: OtherTensors


def describe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, window: Any = None,
             scale: float | None = None, softcap: float | None = None, fp32_precision: str | None = None,
             precise: bool = False, key_lengths: torch.Tensor | None = None, score_weight: torch.Tensor | None = None,
             **more: Any) -> Described:
    """The description of a call of ``attention``; ``more`` are the arguments that go to ``extras``.

    ``score_weight`` [D] or [H, D] makes the score additive, with 1 for its scale where none is given.
    """
    q, k, v = check_tensors(q, k, v)
    for name in ("bias", "mask"):
        if is_causal_bias(more.get(name)):
            check_causal_bias(name, more[name], q.shape[2], k.shape[2])
            causal, more[name] = True, None
    check_classes(key_lengths=key_lengths, score_weight=score_weight, **more)
    scale = 1.0 if scale is None and score_weight is not None else scale
    spec = describe_scores(q.shape[3], causal, window, scale, softcap, fp32_precision, precise)
    others = NO_OTHERS
    if score_weight is not None:
        others = others._replace(score_weight=checked_weight(score_weight, q))
    if key_lengths is not None:
        _check_lengths("key_lengths", key_lengths, q)
        others = others._replace(used_k=key_lengths.contiguous())
    if _adds_of(more):
        extents = Extents(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        spec, others = extras(q, extents, spec, others, **more)
    return Described(q, k, v, spec, others)


def describe_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
                    max_seqlen_q: int, max_seqlen_k: int, seqused_q: torch.Tensor | None, seqused_k: torch.Tensor | None, *,
                    causal: bool = False, window: Any = None, scale: float | None = None, softcap: float | None = None,
                    fp32_precision: str | None = None, precise: bool = False, score_weight: torch.Tensor | None = None,
                    **more: Any) -> Described:
    """The description of ``attention_varlen``'s arguments: packed tensors as [1, H, T, D]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions [tokens, heads, head_dim]; got shape {tuple(x.shape)}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected q's head_dim {q.shape[2]}; got shape {tuple(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: expected k's tokens and heads {tuple(k.shape[:2])}; got shape {tuple(v.shape)}")
    q, k, v = check_tensors(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, torch.Tensor) or cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected an int32 tensor [sequences + 1]; got {getattr(cu, 'dtype', cu)!r}")
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.device != q.device:
            raise ValueError(f"{name}: expected [sequences + 1] on {q.device}; got {tuple(cu.shape)} on {cu.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_k: expected cu_seqlens_q's length {cu_seqlens_q.shape[0]}; got {cu_seqlens_k.shape[0]}")
    max_seqlen_q, max_seqlen_k = _longest("max_seqlen_q", max_seqlen_q), _longest("max_seqlen_k", max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None:
            _check_lengths(name, used, q, batch)
    if q.device.type == "cpu" and not (tracing.traced(cu_seqlens_q) or tracing.traced(cu_seqlens_k)):  # looking costs nothing
        _check_packing("q", cu_seqlens_q, max_seqlen_q, q.shape[2])
        _check_packing("k", cu_seqlens_k, max_seqlen_k, k.shape[2])
    for name in ("bias", "mask"):
        if is_causal_bias(more.get(name)):
            raise ValueError(f"{name}: expected none of torch's causal biases, of one length; causal=True is of each sequence")
    check_classes(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
                  score_weight=score_weight, **more)
    scale = 1.0 if scale is None and score_weight is not None else scale
    spec = describe_scores(q.shape[3], causal, window, scale, softcap, fp32_precision, precise)
    # No sequence is longer than all of them together, so a careless bound costs neither programs nor memory.
    bounds = Longest(_at_most(max_seqlen_q, q.shape[2]), _at_most(max_seqlen_k, k.shape[2]))
    spec = spec._replace(longest=bounds)
    cu_q, cu_k, used_q, used_k = (None if x is None else x.contiguous()
                                  for x in (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k))
    others = OtherTensors(cu_q=cu_q, cu_k=cu_k, used_q=used_q, used_k=used_k,
                          score_weight=None if score_weight is None else checked_weight(score_weight, q))
    if _adds_of(more):
        extents = Extents(batch, q.shape[1], max_seqlen_q, max_seqlen_k)
        spec, others = extras(q, extents, spec, others, **more)
        others = others._replace(operands=tuple(_within(x, extents, *bounds) for x in others.operands))
    return Described(q, k, v, spec, others)


def _at_most(length: int, total: int) -> int:
    return total if torch_private.known(length > total) else length


def _within(x: torch.Tensor, extents: Extents, n_queries: int, n_keys: int) -> torch.Tensor:
    """Cuts an operand of ``extents`` to ``n_queries`` and ``n_keys``, which may be fewer."""
    if torch_private.known(n_queries == extents.n_queries) and torch_private.known(n_keys == extents.n_keys):
        return x
    if x.dim() == 3:  # the value of (i, j) lies at j - i + Nq - 1
        return x[..., extents.n_queries - n_queries :][..., : max(n_queries + n_keys - 1, 0)]
    one_query, one_key = (torch_private.known(size == 1) for size in x.shape[2:])
    return x[:, :, : 1 if one_query else n_queries, : 1 if one_key else n_keys]


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks that the tensors of a call fit together; returns them in the dtype that autocast asks for."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
        if x.is_nested:
            raise ValueError(f"{name}: expected a dense tensor; got a nested one, which attention takes as q, k and v alike")
        check_layout(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [batch, heads, length, head_dim]; got shape {tuple(x.shape)}")
    q, k, v = autocast(q, k, v)
    if q.dtype not in FLOATS:
        raise TypeError(f"q: expected float16, bfloat16, float32 or float64; got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}; got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}; got {x.device}")
    batch, heads, _, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k: expected batch {batch} and head_dim {head_dim} as in q; got shape {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected k's batch, heads and length {tuple(k.shape[:3])}; got shape {tuple(v.shape)}")
    kv_heads = k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}; got {kv_heads}")
    if head_dim == 0 or v.shape[3] == 0:
        raise ValueError(f"q, v: expected head dims of at least 1; got {head_dim} and {v.shape[3]}")
    return q, k, v


def autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Does what autocast does for torch's own attention: floats other than fp64 become the autocast dtype."""
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def describe_scores(head_dim: int, causal: bool, window: Any, scale: float | None, softcap: float | None,
                    fp32_precision: str | None = None, precise: bool = False) -> AttentionSpec:
    """The part of a description that depends on no tensor, except for q's head dim."""
    if torch.compiler.is_compiling() and (isinstance(scale, torch.Tensor) or isinstance(softcap, torch.Tensor)):
        raise TypeError("scale, softcap: expected Python numbers under torch.compile, which does not know a tensor's value")
    causal, precise, scale, softcap = number(causal), number(precise), number(scale), number(softcap)
    for name, value in (("causal", causal), ("precise", precise)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool; got {value!r}")
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window: expected a pair (left, right); got {window!r}")
        left, right = _bound("left", window[0]), _bound("right", window[1])
    if causal:
        right = 0
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    elif not is_finite(scale, "scale", "a finite float"):
        raise ValueError(f"scale: expected a finite float; got {scale!r}")
    if softcap is not None and not (is_finite(softcap, "softcap", "a positive finite float or None") and softcap > 0):
        raise ValueError(f"softcap: expected a positive finite float or None; got {softcap!r}")
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor and not NARROWEST <= abs(factor) <= WIDEST:
            raise ValueError(f"{name}: expected a magnitude from 2**-126 to 2**126, which fp32 holds; got {factor!r}")
    if fp32_precision is not None and fp32_precision not in FP32_PRECISIONS:
        raise ValueError(f"fp32_precision: expected one of {', '.join(FP32_PRECISIONS)} or None; got {fp32_precision!r}")
    return AttentionSpec(float(scale), Window(left, right), True, None if softcap is None else float(softcap),
                         precise=precise, fp32_precision=fp32_precision, hopper=settings.hopper_schedule(),
                         deterministic=settings.DETERMINISTIC or torch.are_deterministic_algorithms_enabled())


def _longest(name: str, length: Any) -> Any:
    length = number(length)
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a non-negative int; got {length!r}")
    if torch.compiler.is_compiling():  # it may come from the device, and have no value yet
        torch_private.check(length >= 0, lambda: f"{name}: expected a non-negative int")
    elif length < 0:
        raise TypeError(f"{name}: expected a non-negative int; got {length!r}")
    return length


def _bound(name: str, value: Any) -> Any:
    value = number(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0):
        hint = "; None, not -1, leaves a side open" if value == -1 else ""
        raise ValueError(f"window: expected {name} to be a non-negative int or None; got {value!r}{hint}")
    return min(value, 2**62) if isinstance(value, int) else value


def _check_lengths(name: str, lengths: Any, q: torch.Tensor, batch: int | None = None) -> None:
    batch = q.shape[0] if batch is None else batch
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected an int32 or int64 tensor [{batch}]; got {getattr(lengths, 'dtype', lengths)!r}")
    if lengths.shape != (batch,) or lengths.device != q.device:
        raise ValueError(f"{name}: expected shape ({batch},) on {q.device}; got {tuple(lengths.shape)} on {lengths.device}")


def _check_packing(side: str, cu: torch.Tensor, longest: int, total: int) -> None:
    starts = cu.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    if starts[0] != 0 or any(n < 0 for n in lengths) or starts[-1] > total:
        raise ValueError(f"cu_seqlens_{side}: expected to rise from 0 to at most {total}, the tokens of {side}; got {starts}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{side}: expected at least {max(lengths)}, the longest sequence; got {longest}")


def _adds_of(more: dict[str, Any]) -> bool:
    """``_adds`` for arguments that may have unexpected names, which it refuses."""
    if more.keys() <= _EXTRAS:
        return _adds(**more)
    raise unexpected(more.keys() - _EXTRAS, Arguments.__annotations__, {"key_lengths": "seqused_k"})


def _adds(*, bias: Any = None, mask: Any = None, alibi_slopes: Any = None, sinks: Any = None, dropout_p: Any = 0.0,
          score_mod: Any = None, mask_mod: Any = None, mod_args: Any = ()) -> bool:
    """Whether these arguments ask for more than plain attention."""
    if type(dropout_p) is not float or dropout_p != 0 or type(mod_args) is not tuple or mod_args:
        return True
    return any(x is not None for x in (bias, mask, alibi_slopes, sinks, score_mod, mask_mod))
