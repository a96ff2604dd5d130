"""The functions people call: a call is checked once, described once, and handed to one backend."""

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F

from fused_attn import dispatch, reference, settings
from fused_attn.dispatch import Explanation
from fused_attn.spec import AttentionSpec, Window

# Arguments of the API whose work has not landed, with the value that asks for nothing.
_UNBUILT: dict[str, Any] = {
    "bias": None, "mask": None, "key_lengths": None, "alibi_slopes": None, "sinks": None, "dropout_p": 0.0,
    "score_mod": None, "mask_mod": None, "mod_args": (), "precise": False,
}


def _reject_unbuilt(**arguments: Any) -> None:
    for name, value in arguments.items():
        if name not in _UNBUILT:
            raise TypeError(f"unexpected argument {name!r}")
        nothing = _UNBUILT[name]
        value = () if name == "mod_args" and value == [] else value
        if value is not nothing and (isinstance(value, torch.Tensor) or value is None or value != nothing):
            raise NotImplementedError(f"fused_attn: argument {name!r} is part of the API but not built yet")


def _checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors of a call that fit together, in the dtype that autocast asks for."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [batch, heads, length, head_dim]; got shape {tuple(x.shape)}")
    q, k, v = _autocast(q, k, v)
    if q.dtype not in dispatch.FLOATS:
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


def _check_switches(deterministic: bool | None, strict: bool | None) -> None:
    for name, value in (("deterministic", deterministic), ("strict", strict)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool or None; got {value!r}")


def _bound(name: str, value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0):
        hint = "; None, not -1, leaves a side open" if value == -1 else ""
        raise ValueError(f"window: expected {name} to be a non-negative int or None; got {value!r}{hint}")
    return min(value, 2**62) if isinstance(value, int) else value


def _is_finite(value: Any, name: str, expected: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected {expected}; got {value!r}")
    finite: bool = -math.inf < value < math.inf  # type: ignore[operator]  # math.isfinite breaks graphs whose scale varies
    return finite


def _describe(head_dim: int, causal: bool, window: tuple[int | None, int | None] | None, scale: float | None,
              softcap: float | None) -> AttentionSpec:
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool; got {causal!r}")
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window: expected a pair (left, right); got {window!r}")
        left, right = _bound("left", window[0]), _bound("right", window[1])
    if causal:
        right = 0
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    elif not _is_finite(scale, "scale", "a finite float"):
        raise ValueError(f"scale: expected a finite float; got {scale!r}")
    if softcap is not None and not (_is_finite(softcap, "softcap", "a positive finite float or None") and softcap > 0):
        raise ValueError(f"softcap: expected a positive finite float or None; got {softcap!r}")
    return AttentionSpec(float(scale), Window(left, right), True, None if softcap is None else float(softcap))


def _autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What autocast does to torch's own attention: floats other than fp64 become the autocast dtype."""
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    score_mod: Any = None,
    mask_mod: Any = None,
    mod_args: tuple[Any, ...] = (),
    return_lse: bool = False,
    deterministic: bool | None = None,
    precise: bool = False,
    strict: bool | None = None,
    backend: str | None = None,
) -> Any:
    """Fused softmax(scale * Q K^T) V with its gradients.

    Args:
        q: queries [B, H, Nq, D]; fp16, bf16, fp32 or fp64, any strides.
        k: keys [B, Hkv, Nk, D] with Hkv dividing H: query head h uses key head h // (H // Hkv).
        v: values [B, Hkv, Nk, Dv].
        causal: query i sees keys up to i + Nk - Nq, so that the last query sees every key.
        window: (left, right), inclusive: query i sees keys from i + Nk - Nq - left to i + Nk - Nq + right. None leaves a
            side open; ``causal`` caps right at 0.
        scale: factor of the scores; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(score / softcap), after the scale and before the window.
        return_lse: also return the natural-log log-sum-exp of every row of scores, [B, H, Nq], fp32 (fp64 for fp64
            inputs), differentiable.
        deterministic: gradients equal to the bit from run to run. The kernels always are; None, True and False are the
            same until a faster way that is not has been built.
        strict: raise rather than run the reference, whose memory is quadratic, where no backend was named.
            None follows ``fused_attn.strict()`` and FUSED_ATTN_STRICT.
        backend: "triton", "torch", "reference" or None to choose; ``explain`` tells what would run and why.
        bias, mask, key_lengths, alibi_slopes, sinks, dropout_p, score_mod, mask_mod, mod_args, precise: not built yet.

    Returns:
        out [B, H, Nq, Dv] in q's dtype, or (out, lse). A query that sees no key gives 0, LSE -inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. NotImplementedError: one that is not built yet.
    """
    _reject_unbuilt(bias=bias, mask=mask, key_lengths=key_lengths, alibi_slopes=alibi_slopes, sinks=sinks,
                    dropout_p=dropout_p, score_mod=score_mod, mask_mod=mask_mod, mod_args=mod_args, precise=precise)
    _check_switches(deterministic, strict)
    q, k, v = _checked(q, k, v)
    spec = _describe(q.shape[3], causal, window, scale, softcap)
    chosen = dispatch.choose(q, k, v, spec, return_lse, backend, strict)
    if chosen == "torch":
        return dispatch.torch_attention(q, k, v, spec)
    if chosen == "triton":
        from fused_attn import autograd  # here, so that the package imports without Triton

        out, lse = autograd.attention(q, k, v, spec)
    else:
        out, lse = reference.attention(q, k, v, spec)
    return (out, lse) if return_lse else out


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> Any:
    """``attention`` by the reference: plain PyTorch, exact, any device, any derivative, quadratic memory."""
    return attention(q, k, v, **{**arguments, "backend": "reference"})


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False,
            window: tuple[int | None, int | None] | None = None, scale: float | None = None,
            softcap: float | None = None, return_lse: bool = False, deterministic: bool | None = None,
            strict: bool | None = None, backend: str | None = None, **later: Any) -> Explanation:
    """Which backend ``attention`` would run for these arguments, and every reason against the others."""
    _reject_unbuilt(**later)
    _check_switches(deterministic, strict)
    q, k, v = _checked(q, k, v)
    spec = _describe(q.shape[3], causal, window, scale, softcap)
    return dispatch.explain(q, k, v, spec, return_lse, backend, strict)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention, argument for argument, on the kernels where they can run it.

    Calls they cannot run yet (a mask, dropout, other than four dimensions, broadcast batch or heads) and calls on CPU
    tensors go to torch's own function. ``is_causal`` aligns the first query with the first key, as torch does.
    """
    reasons = _against_fused_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reasons:
        if isinstance(query, torch.Tensor) and query.device.type != "cpu" and settings.BACKEND is None:
            dispatch.warn_once(f"fused_attn: torch's scaled_dot_product_attention instead of the kernels: {'; '.join(reasons)}")
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                              enable_gqa=enable_gqa)
    spec = _describe(query.shape[3], is_causal, None, scale, None)._replace(bottom_right=False)
    query, key, value = _autocast(query, key, value)
    from fused_attn import autograd  # here, so that the package imports without Triton

    return autograd.attention(query, key, value, spec)[0]


def _against_fused_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None,
                        dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> list[str]:
    """Why a call with torch's arguments does not go to the kernels."""
    if settings.BACKEND not in (None, "triton"):
        return [f"FUSED_ATTN_BACKEND is {settings.BACKEND}"]
    tensors = (query, key, value)
    if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors):
        return ["a tensor subclass"]
    if query.device.type == "cpu" and (settings.BACKEND != "triton"):
        return ["the tensors are on the CPU"]
    loose = type(is_causal) is not bool or type(enable_gqa) is not bool or not isinstance(dropout_p, (int, float))
    if loose or (scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale))):
        return ["arguments that torch will refuse"]
    reasons = []
    if attn_mask is not None:
        reasons.append("attn_mask is not built yet")
    if dropout_p:
        reasons.append("dropout is not built yet")
    if any(x.dim() != 4 for x in tensors):
        return [*reasons, "other than four dimensions are not built yet"]
    batch, heads, _, head_dim = query.shape
    fits = key.shape[0] == batch and key.shape[3] == head_dim and value.shape[:3] == key.shape[:3]
    fits = fits and (key.shape[1] == heads or (enable_gqa and key.shape[1] > 0 and heads % key.shape[1] == 0))
    if not fits or any(x.dtype != query.dtype or x.device != query.device for x in tensors):
        return [*reasons, "shapes that broadcast, or that torch will refuse"]
    if query.dtype not in dispatch.FLOATS or 0 in (head_dim, value.shape[3]):
        return [*reasons, f"dtype {query.dtype} with head dims {head_dim} and {value.shape[3]}"]
    return [*reasons, *dispatch.against_triton(query, value)]
