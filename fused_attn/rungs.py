"""Which kernels of the ladder run a call on sm_90 (``settings.hopper``), and what the asked ones have against it."""

from typing import Literal

import torch

from fused_attn import settings
from fused_attn.spec import AttentionSpec, Companions
from fused_attn.tuning import arch_of

_HALVES = (torch.float16, torch.bfloat16)
_WIDEST = 256  # head dim


def rung(which: Literal["forward", "backward"], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
         companions: Companions) -> str:
    """Of ``settings.RUNGS``, the kernels that run a pass of a call: the ones asked for, or pointers where they cannot."""
    asked = settings.rung()
    return "pointers" if asked == "pointers" or against(asked, which, q, k, v, spec, companions) else asked


def against(asked: str, which: Literal["forward", "backward"], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
            spec: AttentionSpec, companions: Companions) -> tuple[str, ...]:
    """Reasons why the kernels ``asked`` cannot run a pass of a call."""
    if arch_of(q.device) != "sm_90":
        return ("the card is no Hopper",)
    if which == "backward":
        return (f"{asked} has no backward",)
    from fused_attn.kernels.hopper.problem import describable, tile_width  # here: Gluon is imported where it is asked for

    reasons: tuple[str, ...] = ()
    if q.dtype not in _HALVES:
        reasons += (f"{q.dtype} is none of the halves",)
    if max(q.shape[3], v.shape[3]) > _WIDEST:
        reasons += (f"head dims {q.shape[3]} and {v.shape[3]}: up to {_WIDEST}",)
    named = {"q": q, "k": k, "v": v}
    # out is allocated with the strides of q and the head dim of v: its rows must be 16 bytes apart as well
    reasons += tuple(f"the strides or the address of {name} are no multiples of 16 bytes, its columns are not side by side, or "
                     "it is expanded" for name, x in named.items() if not describable(x) or x.shape[3] % 8)
    if spec.precise or companions.score_weight is not None:
        reasons += ("precise and additive attention have kernels of their own",)
    if asked == "descriptors":
        return (*reasons, "dropout: Triton serialises its matrix products") if spec.dropout_p else reasons
    if spec.score_mods or spec.mask_mods or spec.dropout_p or not spec.scale > 0:
        reasons += ("it takes softcap and sinks, but no other mods, masks or dropout, and a positive scale",)
    if asked == "specialized" and companions.cu_q is not None:
        reasons += ("Triton does not specialise a kernel that packed sequences leave early",)
    if asked == "gluon" and tile_width(q.shape[3]) != tile_width(v.shape[3]):
        reasons += (f"head dims {q.shape[3]} and {v.shape[3]} have tiles of different widths",)
    return reasons
