"""The implementations to be compared with: one list, found at run time, each with its reasons against a case."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_attn import torch_private
from fused_attn.tools.bench.cases import Case

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FLEX_DEVICES = ("cuda", "xpu")  # where FlexAttention has a backward
FLEX_LENGTHS = (4096, 16384)
MAX_EAGER_SCORES = 2**31


@dataclass(frozen=True)
class Peer:
    """``prepare`` makes the call of a case on a device; ``against`` says why this peer does not take the case, or None."""

    name: str
    prepare: Callable[[Case, str], Attend]
    against: Callable[[Case], str | None]


def _sdpa_default(case: Case, device: str) -> Attend:
    return functools.partial(torch_private.sdpa, is_causal=case.causal, scale=case.scale,
                             enable_gqa=case.heads != case.kv_heads)


def _sdpa(backend: SDPBackend) -> Callable[[Case, str], Attend]:
    def prepare(case: Case, device: str) -> Attend:
        plain = _sdpa_default(case, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return plain(q, k, v)

        return attend

    return prepare


def _against_sdpa(case: Case) -> str | None:
    if case.softcap is not None:
        return "no softcap"
    if case.window is not None:
        return "no window without a mask in memory"
    if case.causal and case.n_queries != case.n_keys:
        return "aligns causality with the first key"
    return None


SDPA_DEFAULT = Peer("sdpa", _sdpa_default, _against_sdpa)  # what torch itself would choose


def compiled_flex() -> Callable[..., Any]:
    """torch's flex_attention, compiled anew."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # past eight shapes of one function it would run uncompiled
    torch_private.keep_buffers_of_graphs()
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


def _flex(case: Case, device: str) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    left, right = case.bounds
    offset = case.n_keys - case.n_queries
    softcap = case.softcap or 0.0

    def keep(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        position = q_idx + offset
        if left is None:
            return kv_idx <= position + right
        if right is None:
            return kv_idx >= position - left
        return (kv_idx >= position - left) & (kv_idx <= position + right)

    def capped(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return softcap * torch.tanh(score / softcap)

    mask = None
    if (left, right) != (None, None):
        mask = create_block_mask(keep, None, None, case.n_queries, case.n_keys, device=device)
    compiled = compiled_flex()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compiled(q, k, v, score_mod=None if case.softcap is None else capped, block_mask=mask,
                                     scale=case.scale, enable_gqa=case.heads != case.kv_heads)
        return out

    return attend


def _against_flex(case: Case) -> str | None:
    if case.family == "grid" and case.n_keys not in FLEX_LENGTHS:
        return f"compiles anew for every length; timed at {' and '.join(map(str, FLEX_LENGTHS))}"
    if case.deterministic is not None or case.hopper != "auto":
        return "timed beside the default kernels"
    return None


FLEX = Peer("flex", _flex, _against_flex)


def _eager(case: Case, device: str) -> Attend:
    """What people write by hand: the matrix of scores in memory, in the dtype of the inputs."""
    left, right = case.bounds
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    distance = torch.arange(case.n_keys, device=device) - torch.arange(case.n_queries, device=device)[:, None]
    distance = distance - (case.n_keys - case.n_queries)
    drop = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        drop |= distance < -left
    if right is not None:
        drop |= distance > right

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = case.heads // case.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.mT * scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        return torch.softmax(scores.masked_fill(drop, float("-inf")), dim=-1) @ v

    return attend


def _against_eager(case: Case) -> str | None:
    if _against_sdpa(case) is None:
        return "timed only where SDPA cannot run"
    if case.batch * case.heads * case.n_queries * case.n_keys > MAX_EAGER_SCORES:
        return "its matrix of scores is too large"
    return None


def _flash_attn(module: str) -> Callable[[Case, str], Attend]:
    def prepare(case: Case, device: str) -> Attend:
        function = importlib.import_module(module).flash_attn_func
        left, right = case.bounds
        options: dict[str, Any] = {} if case.softcap is None else {"softcap": case.softcap}

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=case.scale, causal=case.causal,
                           window_size=(-1 if left is None else left, -1 if right is None else right), **options)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return attend

    return prepare


def _against_flash_attn(case: Case) -> str | None:
    return None if case.dtype in ("bf16", "fp16") else "fp16 and bf16 only"


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a binary built for another torch fails with whatever its loader raises
        return False
    return True


def found(device: str) -> list[Peer]:
    """Every peer of this machine."""
    peers = [
        Peer("sdpa cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), _against_sdpa),
        Peer("sdpa flash", _sdpa(SDPBackend.FLASH_ATTENTION), _against_sdpa),
        Peer("sdpa efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), _against_sdpa),
    ]
    if device in FLEX_DEVICES and _importable("torch.nn.attention.flex_attention"):
        peers.append(FLEX)
    peers.append(Peer("eager", _eager, _against_eager))
    if device != "cpu":
        packages = (("flash_attn 2", "flash_attn"), ("flash_attn 3", "flash_attn_interface"))
        peers += [Peer(name, _flash_attn(module), _against_flash_attn) for name, module in packages if _importable(module)]
    return peers


def named(name: str) -> Peer:
    """One of torch's own two peers by its name, whatever the machine."""
    return {"sdpa": SDPA_DEFAULT, "flex": FLEX}[name]
