"""Rotary positions as a function: the kernel on a GPU, the same formula in plain PyTorch elsewhere."""

import torch

from fused_attn import settings
from fused_attn.call.values import FLOATS
from fused_attn.plan import backends
from fused_attn.run import autograd


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False,
                 backend: str | None = None) -> torch.Tensor:
    """Turns pairs of columns of queries or keys by the angle of their position; differentiable in x, to any order.

    Args:
        x: [B, H, N, D]; fp16, bf16, fp32 or fp64, any strides.
        cos, sin: [N, R / 2] or [B, N, R / 2], of the angle of each position and pair; R <= D, the columns from R on pass
            through. They are used in fp32 (fp64 for fp64 inputs), whatever x is, and receive no gradient.
        interleaved: pairs are columns (2i, 2i + 1), as in GPT-J; otherwise (i, i + R / 2), as in GPT-NeoX and Llama.
        backend: "triton", "reference" (plain PyTorch) or None to choose.

    Returns:
        [B, H, N, D] in x's dtype, rounded once.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    _check(x, cos, sin)
    reasons = backends.device_reasons(x.device.type, x.device.index)
    if backend is None and settings.BACKEND is not None:
        backend = "triton" if settings.BACKEND == "triton" else "reference"
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend: expected 'triton', 'reference' or None; got {backend!r}")
    if backend == "triton" and reasons:
        raise ValueError(f"backend: 'triton' cannot run this call: {'; '.join(reasons)}")
    if backend == "triton" or (backend is None and x.device.type != "cpu" and not reasons):
        cos, sin = (t.expand(x.shape[0], *t.shape[-2:]) for t in (cos, sin))
        return autograd.rotary(x, cos, sin, interleaved)
    return _plain(x, cos, sin, interleaved)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(t, torch.Tensor) or t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a float tensor; got {getattr(t, 'dtype', t)!r}")
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [batch, heads, length, head_dim]; got shape {tuple(x.shape)}")
    batch, _, length, head_dim = x.shape
    for name, t in (("cos", cos), ("sin", sin)):
        fits = t.dim() in (2, 3) and t.shape[-2] == length and (t.dim() == 2 or t.shape[0] in (1, batch))
        if not fits or not 0 < 2 * t.shape[-1] <= head_dim or t.shape != cos.shape:
            raise ValueError(f"{name}: expected [{length}, pairs] or [{batch}, {length}, pairs] with at most {head_dim // 2} "
                             f"pairs, cos and sin alike; got shape {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}; got {t.device}")
        if t.requires_grad:
            raise ValueError(f"{name}: expected no gradient, which it does not receive; detach it")


def _plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (t.to(dtype) if t.dim() == 2 else t.to(dtype)[:, None] for t in (cos, sin))
    turned = 2 * cos.shape[-1]
    pairs = x[..., :turned].to(dtype)
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    both = a * cos - b * sin, b * cos + a * sin
    result = (torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)).to(x.dtype)
    return result if turned == x.shape[3] else torch.cat((result, x[..., turned:]), -1)
