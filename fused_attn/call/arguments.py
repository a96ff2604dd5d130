"""The arguments of a call by name, for type checkers, and what people who know them by other names may mean."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fused_attn.call.mods import Bound, RelativeBias

if TYPE_CHECKING:
    from typing_extensions import TypedDict
else:
    from typing import TypedDict

Function: TypeAlias = Callable[..., Any] | Bound
Functions: TypeAlias = Function | Sequence[Function] | None  # a plain function, a ScoreMod or MaskMod, or several of these


class Arguments(TypedDict, total=False):
    """What ``attention`` and ``attention_varlen`` take alike, by keyword; ``attention`` tells what each means."""

    causal: bool
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    bias: torch.Tensor | RelativeBias | None
    mask: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    score_weight: torch.Tensor | None
    dropout_p: float
    score_mod: Functions
    mask_mod: Functions
    mod_args: tuple[Any, ...]
    deterministic: bool | None
    precise: bool
    fp32_precision: str | None
    strict: bool | None
    backend: str | None


class DenseArguments(Arguments, total=False):
    """Those that ``attention`` takes beside."""

    key_lengths: torch.Tensor | None


# Names of torch, flash-attn, xformers, FlexAttention and others.
_ELSEWHERE = {
    "softmax_scale": "scale", "sm_scale": "scale", "scaling": "scale", "is_causal": "causal", "window_size": "window",
    "sliding_window": "window", "local_window": "window", "attn_mask": "mask, or bias where it is added to the scores",
    "attention_mask": "mask, or bias where it is added to the scores", "attn_bias": "bias", "block_mask": "mask_mod",
    "dropout": "dropout_p", "p": "dropout_p", "logits_soft_cap": "softcap", "logit_cap": "softcap", "soft_cap": "softcap",
    "key_padding_mask": "key_lengths, or mask", "padding_mask": "key_lengths, or mask", "seqlens_k": "key_lengths",
    "seqused_k": "key_lengths", "cache_seqlens": "key_lengths", "s_aux": "sinks", "learnable_sink": "sinks", "sink": "sinks",
    "return_softmax_lse": "return_lse", "return_attn_probs": "return_lse", "need_weights": "fused_attn.attention_weights",
    "output_attentions": "fused_attn.attention_weights", "enable_gqa": "nothing: fewer heads of k and v are taken as they are",
    "cu_seqlens_q": "fused_attn.attention_varlen", "cu_seqlens_k": "fused_attn.attention_varlen",
    "position_bias": "bias", "alibi": "alibi_slopes", "head_mask": "mask",
}


def unexpected(names: Iterable[str], known: Iterable[str], renamed: dict[str, str] | None = None) -> TypeError:
    """The error for arguments that a function does not know, with the name that is meant if that can be told."""
    name = min(names)
    meant = {**_ELSEWHERE, **(renamed or {})}.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
    return TypeError(f"unexpected argument {name!r}" + (f"; did you mean {meant}?" if meant else ""))
