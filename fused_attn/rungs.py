"""Which kernels of the ladder run a call on sm_90 (``settings.hopper``), and what the asked ones have against it."""

from typing import Literal

import torch

from fused_attn.spec import AttentionSpec, Companions
from fused_attn.tuning import arch_of

Pass = Literal["forward", "backward"]
_HALVES = (torch.float16, torch.bfloat16)
_WIDEST = {"forward": 256, "backward": 128}  # head dim


def rung(which: Pass, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, companions: Companions,
         dout: torch.Tensor | None = None) -> str:
    """Of ``settings.RUNGS``, the kernels that run a pass of a call: the ones asked for, or pointers where they cannot."""
    return spec.rung if spec.rung != "pointers" and not against(which, q, k, v, spec, companions, dout) else "pointers"


def against(which: Pass, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
            companions: Companions, dout: torch.Tensor | None = None) -> tuple[str, ...]:
    """Reasons why the kernels that a call asks for cannot run a pass of it."""
    asked = spec.rung
    if arch_of(q.device) != "sm_90":
        return ("the card is no Hopper",)
    if which == "backward" and asked != "gluon":
        return (f"{asked} has no backward",)
    from fused_attn.kernels.hopper.problem import describable, tile_width  # here: Gluon is imported where it is asked for

    reasons: tuple[str, ...] = ()
    if q.dtype not in _HALVES:
        reasons += (f"{q.dtype} is none of the halves",)
    dim, dim_v = q.shape[3], v.shape[3]
    if max(dim, dim_v) > _WIDEST[which]:
        reasons += (f"head dims {dim} and {dim_v}: up to {_WIDEST[which]}",)
    # What is allocated has the lengths of q, k and v: rows of 16 bytes there give such rows here.
    for name, x in {"q": q, "k": k, "v": v, "the gradient of out": dout}.items():
        if x is not None and (not describable(x) or x.shape[3] % 8):
            reasons += (f"strides or address of {name} are no multiples of 16 bytes, or its columns do not lie side by side",)
    if spec.precise or companions.score_weight is not None:
        reasons += ("precise and additive attention have kernels of their own",)
    if asked == "descriptors":
        return (*reasons, "dropout: Triton serialises its matrix products") if spec.dropout_p else reasons
    if spec.score_mods or spec.mask_mods or spec.dropout_p or not spec.scale > 0:
        reasons += ("it takes no bias, mask, function or dropout, and only a positive scale",)
    if asked == "specialized" and companions.cu_q is not None:
        reasons += ("Triton does not specialise a kernel that packed sequences leave early",)
    if asked == "gluon" and tile_width(dim) != tile_width(dim_v):
        reasons += (f"head dims {dim} and {dim_v} have tiles of different widths",)
    if asked == "gluon" and companions.used_k is not None and companions.cu_k is None:
        reasons += ("key lengths: boxes of a dense batch end with the tensor, and what lies between may be NaN",)
    return reasons + _against_gluon_backward(spec, companions) if which == "backward" else reasons


def _against_gluon_backward(spec: AttentionSpec, companions: Companions) -> tuple[str, ...]:
    reasons: tuple[str, ...] = ()
    if spec.deterministic:
        reasons += ("it sums dQ by atomics, and gradients are to be equal to the bit",)
    if spec.softcap is not None:
        reasons += ("it has no softcap",)
    if companions.cu_q is not None:
        reasons += ("it takes no packed sequences",)
    return reasons
