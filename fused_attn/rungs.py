"""Which kernels of the ladder run a call on sm_90 (``settings.hopper``), and what the asked ones have against it."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from fused_attn.settings import RUNGS
from fused_attn.spec import AttentionSpec, Companions
from fused_attn.targets import arch_of, triton_version
from fused_attn.tuning import FEW_QUERIES, n_shares, unseen_keys

Pass = Literal["forward", "backward"]
_HALVES = (torch.float16, torch.bfloat16)
# Young parts of Triton: a version that cannot compile them would fail in the middle of a program, so one on which nobody has
# compiled them does not run them. Descriptors are part of the language.
YOUNG = ("specialized", "gluon")
VERSIONS = Path(__file__).with_name("versions.json")  # what was tried on which versions; `python -m tests.versions` writes it


def passed_on(rows: list[dict[str, Any]], trial: str, rungs: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Major and minor of the Tritons on which rungs passed a trial, "compiled" or "emulated", whatever torch lay over them."""
    found: dict[tuple[int, int], bool] = {}
    for row in rows:
        major, minor, *_ = row["triton"].split(".")
        version = int(major), int(minor)
        found[version] = found.get(version, True) and all(row.get(trial, {}).get(rung, False) for rung in rungs)
    return tuple(sorted(version for version, passed in found.items() if passed))


_ROWS = json.loads(VERSIONS.read_text(encoding="utf-8"))
COMPILED_ON = passed_on(_ROWS, "compiled", YOUNG)
# The Tritons whose compiled "specialized" kernels were emulated and found right. Before its repair, each of them gave wrong
# rows, which no interpreter of the source could show.
PROVEN_ON = passed_on(_ROWS, "emulated", ("specialized",))
_WIDEST = {"forward": 256, "backward": 128}  # head dim


def offered() -> tuple[str, ...]:
    """The rungs above pointers that this Triton may run, from the top."""
    return tuple(name for name in RUNGS[:0:-1] if name != "specialized" or triton_version() in PROVEN_ON)


def rung(which: Pass, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, companions: Companions) -> str:
    """Of ``settings.RUNGS``, the kernels that run a pass of a call: the ones asked for, or pointers where they cannot."""
    return spec.rung if spec.rung != "pointers" and not against(which, q, k, v, spec, companions) else "pointers"


def against(which: Pass, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
            companions: Companions) -> tuple[str, ...]:
    """Reasons why the kernels that a call asks for cannot run a pass of it."""
    asked = spec.rung
    if arch_of(q.device) != "sm_90":
        return ("the card is no Hopper",)
    if which == "backward" and asked != "gluon":
        return (f"{asked} has no backward",)
    here = ".".join(map(str, triton_version()))
    if asked not in offered():
        return (f"what Triton {here} compiles of it has not been emulated and found right",)
    if asked != "descriptors" and triton_version() not in COMPILED_ON:
        return (f"it has not been compiled on Triton {here}",)
    from fused_attn.kernels.hopper.problem import describable, tile_width  # here: Gluon is imported where it is asked for

    reasons: tuple[str, ...] = ()
    if q.dtype not in _HALVES:
        reasons += (f"{q.dtype} is none of the halves",)
    dim, dim_v = q.shape[3], v.shape[3]
    if max(dim, dim_v) > _WIDEST[which]:
        reasons += (f"head dims {dim} and {dim_v}: up to {_WIDEST[which]}",)
    if dim % 8 or dim_v % 8:
        reasons += (f"head dims {dim} and {dim_v}: rows of what is allocated must be multiples of 16 bytes",)
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not describable(x):
            reasons += (f"strides or address of {name} are no multiples of 16 bytes, its columns do not lie side by side, or "
                        "it is expanded or empty",)
    if which == "forward" and _in_shares(q, k, spec, companions):
        reasons += ("few queries over many keys take shares of the keys",)
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


def _in_shares(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, companions: Companions) -> bool:
    n_queries, n_keys = spec.longest or (q.shape[2], k.shape[2])
    if n_queries > FEW_QUERIES or spec.precise or companions.score_weight is not None:
        return False
    unseen = unseen_keys(spec, companions, n_queries, n_keys)
    return n_shares(q.shape[2], k.shape[2] - unseen, n_queries, n_keys - unseen, q.shape[1] // k.shape[1]) > 1


def _against_gluon_backward(spec: AttentionSpec, companions: Companions) -> tuple[str, ...]:
    reasons: tuple[str, ...] = ()
    if spec.deterministic:
        reasons += ("it sums dQ by atomics, and gradients are to be equal to the bit",)
    if spec.softcap is not None:
        reasons += ("it has no softcap",)
    if companions.cu_q is not None:
        reasons += ("it takes no packed sequences",)
    return reasons
