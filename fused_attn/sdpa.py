"""torch's scaled_dot_product_attention, argument for argument: on the kernels, by blocks, or by torch itself."""

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F

from fused_attn import settings, torch_private, tracing
from fused_attn.call import describe
from fused_attn.call.classes import is_causal_bias
from fused_attn.call.describe import Described
from fused_attn.call.values import FLOATS, number
from fused_attn.plan import backends
from fused_attn.run import autograd, ops


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

    Everything that torch accepts runs on them: any rank, broadcast batch and heads, masks and their gradients, dropout, grouped
    heads. Calls on CPU tensors go to torch's own function, or by blocks where that would be quadratic in memory (dropout, whose
    mask is torch's, and gradients of a mask); and so do those that torch will refuse, for its own errors.
    ``is_causal`` aligns the first query with the first key, as torch does.
    """
    call, reasons = describe_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if call is None:
        if isinstance(query, torch.Tensor) and query.device.type != "cpu" and settings.BACKEND is None:
            backends.warn_once(f"fused_attn: torch's scaled_dot_product_attention instead of the kernels: {'; '.join(reasons)}")
        return sdpa_by_torch(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _in_shape(autograd.attention(*ops.seeded(call))[0], query, key, value)


def sdpa_by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
                  is_causal: bool = False, **named: Any) -> torch.Tensor:
    """Calls torch's own function, also where ``torch.nn.functional`` holds another one, such as this module's; on a CPU, what
    that would do in quadratic memory goes by blocks."""
    blocked = _sdpa_by_blocks(query, key, value, attn_mask, dropout_p, is_causal, **named)
    if blocked is not None:
        return blocked
    if not is_causal and F.scaled_dot_product_attention is not torch_private.sdpa and is_causal_bias(attn_mask):
        # A causal bias knows the function only in its usual place; another function would take its empty storage for a mask.
        n_queries, n_keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
        if n_queries == n_keys or attn_mask.variant.name == "UPPER_LEFT":
            attn_mask, is_causal = None, True
        else:
            attn_mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_queries)
    if torch.compiler.is_compiling() and dropout_p > 0 and torch_private.activation_memory_budget() < 1:
        backends.warn_once("fused_attn: below an activation_memory_budget of 1, torch's scaled_dot_product_attention draws "
                           "another dropout mask in the backward than in the forward")
    return torch_private.sdpa(query, key, value, attn_mask, dropout_p, is_causal, **named)


def _sdpa_by_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any, dropout_p: float,
                    is_causal: bool, scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor | None:
    """A call that torch's own function would answer with a matrix of scores on a CPU, or None."""
    if not (isinstance(query, torch.Tensor) and query.device.type == "cpu"):
        return None
    learned = isinstance(attn_mask, torch.Tensor) and attn_mask.requires_grad and torch.is_grad_enabled()
    if not learned and not (type(dropout_p) is float and 0 < dropout_p < 1):
        return None
    arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    if tracing.watched(x for x in arguments if isinstance(x, torch.Tensor)) or _against_fused_sdpa(*arguments, kernels=False):
        return None
    call = _sdpa_call(*arguments)
    if call is None or _shares_weights(query, key, value):
        return None
    return _in_shape(autograd.blocked(call, with_lse=False, by_seed=False)[0], query, key, value)


def _shares_weights(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether several values have the same weights, of which torch drops one set for all."""
    try:
        weights = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        return torch.broadcast_shapes(weights, value.shape[:-2]) != weights
    except RuntimeError:
        return False  # grouped heads


def _in_shape(out: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """out [B, H, Nq, Dv] as torch gives it for inputs of any rank."""
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    heads = (out.shape[1],) if max(x.dim() for x in tensors) > 2 else ()
    return out if len(lead) == 1 and heads else out.reshape(*lead, *heads, *out.shape[2:])


def describe_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
                  dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
                  ) -> tuple[Described | None, list[str]]:
    """(a call with torch's arguments as the kernels run it, or None; the reasons why they do not)."""
    dropout_p, scale = number(dropout_p), number(scale)
    bias: Any = attn_mask if not is_causal and is_causal_bias(attn_mask) else None
    if bias is not None:
        attn_mask, is_causal = None, True
    reasons = _against_fused_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not reasons and bias is not None and (bias.seq_len_q, bias.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        reasons = ["a causal bias of other lengths"]
    if reasons:
        return None, reasons
    call = _sdpa_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if call is None:
        return None, ["arguments that torch will refuse"]
    if bias is not None:
        call = call._replace(spec=call.spec._replace(bottom_right=bias.variant.name == "LOWER_RIGHT"))
    reasons = list(backends.against_triton(call))
    return (None, reasons) if reasons else (call, [])


def _against_fused_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None,
                        dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
                        kernels: bool = True) -> list[str]:
    """Why a call with torch's arguments does not go to the kernels, or unless ``kernels`` to blocks, whatever its shapes."""
    if kernels and settings.BACKEND not in (None, "triton"):
        return [f"FUSED_ATTN_BACKEND is {settings.BACKEND}"]
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if any(type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_nested for x in tensors):
        return ["a tensor subclass or a nested tensor"]
    if torch_private.transforms_active():
        return ["a transform of torch.func"]
    if kernels and query.device.type == "cpu" and settings.BACKEND != "triton":
        return ["the tensors are on the CPU"]
    loose = type(is_causal) is not bool or type(enable_gqa) is not bool or not isinstance(dropout_p, (int, float))
    if loose or (scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale))):
        return ["arguments that torch will refuse"]
    if not 0 <= dropout_p <= 1 or (attn_mask is not None and is_causal) or any(x.dim() < 2 for x in (query, key, value)):
        return ["arguments that torch will refuse"]
    if attn_mask is not None and attn_mask.dim() < 2:
        return ["a mask of fewer than two dimensions"]
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return ["arguments that torch will refuse"]
    if any(x.dtype != query.dtype or x.device != query.device for x in (key, value)):
        return ["arguments that torch will refuse"]
    if scale and not describe.NARROWEST <= abs(scale) <= describe.WIDEST:
        return [f"a scale of {scale}, which fp32 does not hold"]
    if enable_gqa and any(x.dim() < 3 for x in (query, key, value)):
        return ["arguments that torch will refuse"]
    if isinstance(scale, bool) or isinstance(dropout_p, bool):
        return ["a bool that stands for a number"]
    if any(x.dim() > 2 and x.shape[-3] == 0 for x in (query, key, value)):
        return ["there are no heads"]
    if query.dtype not in FLOATS or 0 in (query.shape[-1], value.shape[-1]):
        return [f"dtype {query.dtype} with head dims {query.shape[-1]} and {value.shape[-1]}"]
    return []


def _sdpa_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None,
               dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> Described | None:
    """torch's arguments as a described call, or None for shapes that torch will refuse.

    All leading dimensions but the last, the heads, are the batch. Batch entries broadcast as views, key heads as groups.
    """
    try:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        return None
    q, k, v = (x.unsqueeze(0) if x.dim() == 2 else x for x in (query, key, value))
    whole = math.prod(batch)
    q, k, v = (x.expand(*batch, *x.shape[-3:]).reshape(whole, *x.shape[-3:]) if x.shape[:-3] != batch or len(batch) != 1 else x
               for x in (q, k, v))
    heads, k_heads, v_heads = q.shape[1], k.shape[1], v.shape[1]
    most = max(heads, k_heads, v_heads)
    if enable_gqa and (0 in (k_heads, v_heads) or heads % k_heads or heads % v_heads):
        return None
    if not enable_gqa and any(n not in (1, most) for n in (heads, k_heads, v_heads)):
        return None
    q = q.expand(-1, most, -1, -1)
    shared = k_heads  # a key head serves a group of query heads; keys and values need as many: the least common multiple
    while shared % v_heads:
        shared += k_heads
    k, v = (x if x.shape[1] == shared else x.repeat_interleave(shared // x.shape[1], 1) for x in (k, v))
    if k.shape[2] != v.shape[2] or q.shape[3] != k.shape[3]:
        return None
    mask: dict[str, Any] = {}
    if attn_mask is not None:
        pairs = (*batch, *((most,) if max(query.dim(), key.dim(), value.dim()) > 2 else ()), q.shape[2], k.shape[2])
        if attn_mask.dim() > len(pairs) or any(n not in (1, full) for n, full in zip(
                reversed(attn_mask.shape), reversed(pairs), strict=False)):
            return None
        if attn_mask.dim() > 4 or (len(batch) > 1 and attn_mask.dim() > 3):
            leading = (1,) * (len(batch) + 3 - attn_mask.dim()) + attn_mask.shape[:-3]
            attn_mask = attn_mask.reshape(*leading, *attn_mask.shape[-3:]).expand(*batch, *attn_mask.shape[-3:])
            attn_mask = attn_mask.reshape(whole, *attn_mask.shape[-3:])
        mask = {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}
    call = describe.describe(q, k, v, causal=is_causal, scale=scale, dropout_p=float(dropout_p), **mask)
    return call._replace(spec=call.spec._replace(bottom_right=False))
