"""How accurate is accurate: the fp64 oracle, and the two measures the kernels are held to.

R compares with the best that the output's dtype can do and needs ordinary shapes (N >= 256, D >= 32, unit-normal inputs);
E compares with what rounding P, dS and the output once each may cost, and holds for every shape and magnitude.
"""

import math
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import fused_attn
from fused_attn import reference
from fused_attn.call import describe
from fused_attn.call.describe import Described
from fused_attn.tools.bench.oracle import max_r as max_r  # the limits of R

EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
E_LIMIT = {torch.float16: 1.25, torch.bfloat16: 1.25, torch.float32: 16.0, torch.float64: 64.0}
E_ROW_LIMIT = 4.0
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
    call = describe.describe(*(x.double() for x in inputs), **arguments)
    return amplitudes_of(call, dout, dlse, inputs[0].dtype, {})


def amplitudes_of(call: Described, dout: torch.Tensor, dlse: torch.Tensor | None, dtype: torch.dtype,
                  leaves: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """The same of any described call in fp64, run in ``dtype``, and for the ``leaves`` that its operands were made from.

    dout [B, H, Nq, Dv] and dlse [B, H, Nq]; of packed sequences [1, H, T, Dv] and [1, H, T].
    """
    if call.spec.longest is None:
        return _amplitudes(call, dout, dlse, dtype, leaves, 0)
    whole = {"out": torch.zeros(*call.q.shape[:3], call.v.shape[3], dtype=torch.float64)}
    whole |= {f"d{name}": torch.zeros_like(x) for name, x in (*zip("qkv", call[:3], strict=True), *leaves.items())}
    largest, others = 0.0, call.others
    spans = (reference.spans(others.cu_q, others.used_q, call.q.shape[2]),
             reference.spans(others.cu_k, others.used_k, call.k.shape[2]))
    for batch, ((q0, q1), (k0, k1)) in enumerate(zip(*spans, strict=True)):
        operands = tuple(reference._of_sequence(x, batch, call.spec.longest[0], q1 - q0, k1 - k0) for x in others.operands)
        one = Described(call.q[:, :, q0:q1], call.k[:, :, k0:k1], call.v[:, :, k0:k1], call.spec,
                        others._replace(cu_q=None, cu_k=None, used_q=None, used_k=None, operands=operands))
        part, score = _amplitudes(one, dout[:, :, q0:q1], None if dlse is None else dlse[:, :, q0:q1], dtype, leaves, batch)
        for name, rows in (("out", slice(q0, q1)), ("dq", slice(q0, q1)), ("dk", slice(k0, k1)), ("dv", slice(k0, k1))):
            whole[name][:, :, rows] = part[name]
        for name in leaves:
            whole[f"d{name}"] += part[f"d{name}"]
        largest = max(largest, score)
    return whole, largest


def _amplitudes(call: Described, dout: torch.Tensor, dlse: torch.Tensor | None, dtype: torch.dtype,
                leaves: dict[str, torch.Tensor], first_batch: int) -> tuple[dict[str, torch.Tensor], float]:
    q, k, v, spec, others = call
    group, n_keys = q.shape[1] // k.shape[1], k.shape[2]
    # 0, added to the raw scores: its gradient is the slope of the score mods, scale and all.
    products = torch.zeros(*q.shape[:3], n_keys, dtype=torch.float64, requires_grad=True)
    with mock.patch.object(reference, "_products", _plus(products)):
        p, lse = reference.weights(q.detach(), k.detach(), spec._replace(dropout_p=0.0), others, first_batch)
        dropped = reference.weights(q.detach(), k.detach(), spec, others, first_batch)[0].detach()
    keep = p > 1e-250  # the derivative of a logarithm below that leaves the range of fp64
    scores = torch.where(keep, torch.where(keep, p, 1.0).log() + lse.unsqueeze(-1), 0.0)
    stays = torch.where(keep, dropped / p.detach(), 0.0)  # 0, or 1 / (1 - dropout_p)
    # Below the smallest normal number of the dtype rounding is absolute: there a weight errs as if it were that large.
    p = torch.where(keep, p.detach().clamp(min=torch.finfo(dtype).smallest_normal), 0.0)
    if others.used_k is not None:
        v = v.masked_fill((torch.arange(n_keys) >= others.used_k[:, None])[:, None, :, None], 0)
    k, v = (x.detach().repeat_interleave(group, 1) for x in (k, v))
    out, grad = (p * stays) @ v, dout.double()
    row = (grad * out).abs().sum(-1, keepdim=True)
    # Delta is made of the rounded output, of weights rounded one by one: P_j dP_j each, independent errors add by squares.
    of_weights = ((p * stays * (grad @ v.mT)) ** 2).sum(-1, keepdim=True).sqrt()
    if dlse is not None:
        row = row + dlse.double().abs().unsqueeze(-1)
    w = p * (stays * (grad.abs() @ v.abs().mT) + row + of_weights)
    operands = {name: x for name, x in leaves.items() if name not in ("sinks", "score_weight")}
    slopes = torch.autograd.grad((w * scores).sum(), (products, *operands.values()), retain_graph=True,
                                 allow_unused=True, materialize_grads=True)
    dmod = slopes[0].abs()
    dmod = torch.where(dmod == 0, dmod, dmod.clamp(min=torch.finfo(dtype).smallest_normal))  # as dS is rounded
    # Slopes of one sign: the sum of their products with W is the sum of the absolute values.
    result = {f"d{name}": slope.abs() for name, slope in zip(operands, slopes[1:], strict=True)}
    if "sinks" in leaves:
        weight = (others.sinks.detach()[None, :, None] - lse.detach()).exp().masked_fill(lse == -math.inf, 0)
        result["dsinks"] = (weight * row.squeeze(-1)).sum((0, 2)) + (weight * of_weights.squeeze(-1)).norm(dim=(0, 2))

    def per_kv_head(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    raw = (reference._products(q, k, others.score_weight) * spec.scale).detach()[keep]
    if others.score_weight is None:
        by_q, by_k = dmod @ k.abs(), dmod.mT @ q.detach().abs()
    else:
        sums = q[:, :, :, None].detach() + k[:, :, None]
        tanh, e = sums.tanh(), torch.exp(-2 * sums.abs())
        slope = dmod.unsqueeze(-1) * (4 * e / (1 + e) ** 2) * others.score_weight.detach().abs()[:, None, None]
        by_q, by_k = slope.sum(3), slope.sum(2)
        result["dscore_weight"] = (dmod.unsqueeze(-1) * tanh.abs()).sum((0, 2, 3))
    largest = max((float(x.detach().abs().max()) for x in (raw, scores[keep]) if x.numel()), default=0.0)
    return result | {
        "out": (p * stays) @ v.abs(), "dv": per_kv_head((p * stays).mT @ grad.abs()),
        "dq": by_q, "dk": per_kv_head(by_k),
    }, largest


def _plus(products: torch.Tensor) -> Any:
    """The reference's raw scores with ``products`` added to them."""
    raw = reference._products
    return lambda q, k, score_weight: raw(q, k, score_weight) + products


def bounded_error(x: torch.Tensor, ref: torch.Tensor, amplitude: torch.Tensor, largest_score: float) -> tuple[float, float]:
    """E over the whole tensor, and its largest value over single rows."""
    second = 2.0**-51 if x.dtype == torch.float64 else 2.0**-22
    unit = EPS[x.dtype] + second * largest_score
    error = x.double() - ref
    # Below the smallest normal number rounding is absolute: of the sums, and of what is stored. What must be 0 is held to 0.
    tiny = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).smallest_normal
    amplitude = torch.maximum(amplitude, ref.abs())  # of weights below 1e-250 the amplitudes leave out
    amplitude = torch.where(amplitude == 0, 0.0, amplitude.clamp(min=torch.finfo(x.dtype).smallest_normal))
    rows = error.norm(dim=-1) / (unit * amplitude.norm(dim=-1) + tiny)
    rows = torch.where(error.norm(dim=-1) == 0, torch.zeros_like(rows), rows)
    whole = 0.0 if not error.any() else float(error.norm() / (unit * amplitude.norm() + tiny))
    return whole, float(rows.max()) if rows.numel() else 0.0
