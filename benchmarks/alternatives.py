"""What a program without this package does for a feature: SDPA with a mask in memory, FlexAttention with a function of its own.

A bias, ALiBi or T5's buckets become a tensor [B or 1, H, N, N] for SDPA, made in each call with its graph, as a model has to
in each step; what hides keys becomes a mask of bools, made once. FlexAttention gets a score_mod, and a block mask made once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fused_attn
from fused_attn.tools.bench.peers import FLEX_DEVICES, compiled_flex

Tensors = dict[str, torch.Tensor]
Score = Callable[[Any, Any, Any, Any, Any], Any]  # (score, b, h, q_idx, kv_idx) -> score
Keep = Callable[[Any, Any, Any, Any], Any]  # (b, h, q_idx, kv_idx) -> bool
Attend = Callable[[Tensors], torch.Tensor]


@dataclass(frozen=True)
class Alternative:
    """``added`` and ``kept`` make SDPA's tensors, ``score`` and ``keep`` FlexAttention's functions; all of a call's tensors."""

    added: Callable[[Tensors], torch.Tensor] | None = None
    kept: Callable[[Tensors], torch.Tensor] | None = None
    score: Callable[[Tensors], Score] | None = None
    keep: Callable[[Tensors], Keep] | None = None


def _distance(t: Tensors, like: torch.Tensor) -> torch.Tensor:
    """k - q, [N, N]."""
    at = torch.arange(int(t["n"]), device=like.device)
    return at - at[:, None]


def _spread(t: Tensors, values: torch.Tensor) -> torch.Tensor:
    """[1, H, N, N] of values [H, 2 N - 1] by k - q."""
    return values[None, :, _distance(t, values) + int(t["n"]) - 1]


def _t5(t: Tensors) -> torch.Tensor:
    """T5's values by k - q, [H, 2 N - 1]."""
    values: torch.Tensor = fused_attn.t5_bias(t["table"], int(t["n"]), int(t["n"])).values
    return values.reshape(-1, values.shape[-1])


def _alibi(t: Tensors) -> torch.Tensor:
    return -t["slopes"][None, :, None, None] * _distance(t, t["slopes"]).abs()


def _relative(t: Tensors, values: torch.Tensor) -> Score:
    middle = int(t["n"]) - 1
    return lambda s, b, h, q, k: s + values[h, k - q + middle]


def _window(left: int) -> Alternative:
    return Alternative(kept=lambda t: (_distance(t, t["n"]) >= -left)[None, None],
                       keep=lambda t: lambda b, h, q, k: q - k <= left)


ALTERNATIVES = {
    "plain": Alternative(), "window 256": _window(256), "window 1024": _window(1024),
    "softcap": Alternative(score=lambda t: lambda s, b, h, q, k: 30.0 * torch.tanh(s / 30.0)),
    "bias": Alternative(lambda t: t["bias"], score=lambda t: lambda s, b, h, q, k: s + t["bias"][0, h, q, k]),
    "bias per key": Alternative(lambda t: t["bias"], score=lambda t: lambda s, b, h, q, k: s + t["bias"][b, 0, 0, k]),
    "relative bias": Alternative(lambda t: _spread(t, t["values"]), score=lambda t: _relative(t, t["values"])),
    "t5 bias": Alternative(lambda t: _spread(t, _t5(t)), score=lambda t: _relative(t, _t5(t))),
    "alibi": Alternative(_alibi, score=lambda t: lambda s, b, h, q, k: s - t["slopes"][h] * (q - k).abs()),
    "mask": Alternative(kept=lambda t: t["mask"], keep=lambda t: lambda b, h, q, k: t["mask"][b, 0, q, k]),
    "key lengths": Alternative(kept=lambda t: (torch.arange(int(t["n"]), device=t["lengths"].device)
                                               < t["lengths"][:, None])[:, None, None, :],
                               keep=lambda t: lambda b, h, q, k: k < t["lengths"][b]),
    "document mask": Alternative(kept=lambda t: (t["ids"][:, :, None] == t["ids"][:, None, :])[:, None],
                                 keep=lambda t: lambda b, h, q, k: t["ids"][b, q] == t["ids"][b, k]),
    "prefix LM": Alternative(kept=lambda t: (_distance(t, t["lengths"]) <= 0)
                             | (torch.arange(int(t["n"]), device=t["lengths"].device) < t["lengths"][:, None, None])[:, None],
                             keep=lambda t: lambda b, h, q, k: (k <= q) | (k < t["lengths"][b])),
}


def sdpa(alternative: Alternative, tensors: Tensors, causal: bool, device: str, grouped: bool) -> Attend:
    """torch's SDPA with whatever mask the feature and causality make together."""
    kept = None if alternative.kept is None else alternative.kept(tensors)
    future = _distance(tensors, tensors["n"]).to(device) > 0 if causal else None
    if kept is not None and future is not None:
        kept = kept & ~future

    def attend(leaves: Tensors) -> torch.Tensor:
        mask = kept
        if alternative.added is not None:
            mask = alternative.added({**tensors, **leaves}).to(leaves["q"].dtype)
            mask = mask if future is None else mask.masked_fill(future, float("-inf"))
        return F.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], mask, is_causal=causal and mask is None,
                                              enable_gqa=grouped)

    return attend


def flex(alternative: Alternative, tensors: Tensors, causal: bool, device: str, grouped: bool) -> Attend:
    """FlexAttention, compiled for this feature."""
    from torch.nn.attention.flex_attention import create_block_mask

    own = None if alternative.keep is None else alternative.keep(tensors)

    def keep(b: Any, h: Any, q: Any, k: Any) -> Any:
        if own is None:
            return q >= k
        return own(b, h, q, k) & (q >= k) if causal else own(b, h, q, k)

    n, mask = int(tensors["n"]), None
    if causal or own is not None:
        first = next(iter(tensors.values()))
        batch = first.shape[0] if own is not None and first.dim() else None  # a window is the same for all
        mask = create_block_mask(keep, batch, None, n, n, device=device)
    compiled = compiled_flex()

    def attend(leaves: Tensors) -> torch.Tensor:
        score = None if alternative.score is None else alternative.score({**tensors, **leaves})
        out: torch.Tensor = compiled(leaves["q"], leaves["k"], leaves["v"], score_mod=score, block_mask=mask,
                                     enable_gqa=grouped)
        return out

    return attend


def peers(feature: str, device: str) -> dict[str, Callable[..., Attend]]:
    """name -> what makes the peer's call for a feature, of (tensors, causal, device, grouped)."""
    alternative, found = ALTERNATIVES.get(feature), dict[str, Callable[..., Attend]]()
    if alternative is None:
        return found
    if alternative.score is None or alternative.added is not None:
        found["sdpa"] = partial(sdpa, alternative)
    if device in FLEX_DEVICES:
        found["flex"] = partial(flex, alternative)
    return found
