"""How accurate is accurate: the fp64 oracle, and the two measures the kernels are held to.

R compares with the best that the output's dtype can do and needs ordinary shapes (N >= 256, D >= 32, unit-normal inputs);
E compares with what rounding P, dS and the output once each may cost, and holds for every shape and magnitude.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

import fused_attn

EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
E_LIMIT = {torch.float16: 1.25, torch.bfloat16: 1.25, torch.float32: 16.0, torch.float64: 64.0}
E_ROW_LIMIT = 4.0
R_LIMIT = {torch.float16: (1.5, 2.0), torch.bfloat16: (1.5, 2.0), torch.float32: (20.0, 20.0)}
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass
class Case:
    """One call: shapes, arguments and how its inputs are drawn."""

    heads: int = 2
    kv_heads: int = 2
    n_queries: int = 64
    n_keys: int = 64
    dim: int = 32
    dim_v: int | None = None
    batch: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    q_scale: float = 1.0
    v_mean: float = 0.0

    def __str__(self) -> str:
        words = [f"B{self.batch}H{self.heads}/{self.kv_heads}", f"N{self.n_queries}x{self.n_keys}", f"D{self.dim}"]
        words += [f"Dv{self.dim_v}"] if self.dim_v else []
        words += [f"{key}={value}".replace(" ", "") for key, value in self.arguments.items()]
        words += [f"q*{self.q_scale:g}"] if self.q_scale != 1 else []
        return "-".join(words)

    def draw(self, dtype: torch.dtype, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """q, k, v (leaves), dO and dLSE."""
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int, length: int, *dim: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, length, *dim, generator=generator, dtype=torch.float64)

        dim_v = self.dim_v or self.dim
        q = (normal(self.heads, self.n_queries, self.dim) * self.q_scale).to(dtype)
        k = normal(self.kv_heads, self.n_keys, self.dim).to(dtype)
        v = (normal(self.kv_heads, self.n_keys, dim_v) + self.v_mean).to(dtype)
        dout = normal(self.heads, self.n_queries, dim_v).to(dtype)
        dlse = normal(self.heads, self.n_queries).to(torch.float64 if dtype == torch.float64 else torch.float32)
        return [q, k, v], dout, dlse


def run(inputs: list[torch.Tensor], dout: torch.Tensor, dlse: torch.Tensor | None, arguments: dict[str, Any],
        ) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv of one call."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = fused_attn.attention(*leaves, return_lse=True, **arguments)
    outputs, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    gradients = torch.autograd.grad(outputs, leaves, grads)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *gradients), strict=True))


def exact(inputs: list[torch.Tensor], dout: torch.Tensor, dlse: torch.Tensor | None, arguments: dict[str, Any],
          ) -> dict[str, torch.Tensor]:
    """The same in fp64 by the reference."""
    wide = [x.double() for x in inputs]
    return run(wide, dout.double(), None if dlse is None else dlse.double(), {**arguments, "backend": "reference"})


def error_ratio(x: torch.Tensor, ref: torch.Tensor) -> float:
    """R: |x - ref| over the error of rounding ref once."""
    return float((x.double() - ref).norm() / (ref.to(x.dtype).double() - ref).norm())


def amplitudes(inputs: list[torch.Tensor], dout: torch.Tensor, dlse: torch.Tensor | None, arguments: dict[str, Any],
               ) -> tuple[dict[str, torch.Tensor], float]:
    """The formulas of attention and its gradients with absolute values in place of the terms, and the largest score."""
    q, k, v = (x.double() for x in inputs)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = arguments.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores, slope = q @ k.mT * scale, torch.ones(())
    largest = float(scores.abs().max()) if scores.numel() else 0.0
    if (cap := arguments.get("softcap")) is not None:
        tanh = torch.tanh(scores / cap)
        scores, slope = cap * tanh, 1 - tanh**2
    n_queries, n_keys = scores.shape[-2:]
    position = torch.arange(n_queries)[:, None] + n_keys - n_queries
    key = torch.arange(n_keys)[None, :]
    left, right = arguments.get("window") or (None, None)
    right = 0 if arguments.get("causal") else right
    keep = torch.ones(n_queries, n_keys, dtype=torch.bool)
    keep &= (key >= position - left) if left is not None else True
    keep &= (key <= position + right) if right is not None else True
    scores = scores.masked_fill(~keep, -math.inf)
    p = torch.softmax(scores, -1).nan_to_num(0.0) if n_keys else scores
    # Below the smallest normal number of the dtype rounding is absolute: there a weight errs as if it were that large.
    p = torch.where(keep, p.clamp(min=torch.finfo(inputs[0].dtype).smallest_normal), 0.0)
    out, grad = p @ v, dout.double()
    reach = grad.abs() @ v.abs().mT + (grad * out).abs().sum(-1, keepdim=True)
    if dlse is not None:
        reach = reach + dlse.double().abs().unsqueeze(-1)
    w = abs(scale) * slope * p * reach

    def per_kv_head(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    return {
        "out": p @ v.abs(), "dv": per_kv_head(p.mT @ grad.abs()),
        "dq": w @ k.abs(), "dk": per_kv_head(w.mT @ q.double().abs()),
    }, largest


def bounded_error(x: torch.Tensor, ref: torch.Tensor, amplitude: torch.Tensor, largest_score: float) -> tuple[float, float]:
    """E over the whole tensor, and its largest value over single rows."""
    second = 2.0**-51 if x.dtype == torch.float64 else 2.0**-22
    unit = EPS[x.dtype] + second * largest_score
    error = x.double() - ref
    tiny = 1e-300
    rows = error.norm(dim=-1) / (unit * amplitude.norm(dim=-1) + tiny)
    rows = torch.where(error.norm(dim=-1) == 0, torch.zeros_like(rows), rows)
    whole = 0.0 if not error.any() else float(error.norm() / (unit * amplitude.norm() + tiny))
    return whole, float(rows.max()) if rows.numel() else 0.0
