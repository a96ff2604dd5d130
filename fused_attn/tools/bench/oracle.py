"""What is right: an fp64 oracle of a case, from the formulas, and the gates E and R that results are held to.

E = |x - ref| / ((u + slack * max|score|) * |A|), where A is the formula of x with absolute values, u half the dtype's
epsilon and |.| the Frobenius norm: how far an error is from the rounding that no kernel can avoid, on any shape and
magnitude. What the dtype is too small to hold is allowed for. R = |x - ref| / |round(ref) - ref|, for ordinary shapes: 1 is
a perfect kernel.
"""

import math
from typing import Any

import torch

from fused_attn.tools.bench.cases import Case

Row = dict[str, Any]

# dtype: largest E, slack
GATES = {
    torch.float16: (1.25, 2.0**-22), torch.bfloat16: (1.25, 2.0**-22), torch.float32: (16.0, 2.0**-22),
    torch.float64: (64.0, 2.0**-51),
}
MAX_E_ROW = 4.0  # E of a single row
R_OF_LARGE_QUERIES = 4.0  # R of a gradient in fp16 and bf16, where queries are 8 times as large
MAX_BIAS = 0.05  # |mean| / standard deviation of the errors of fp16 and bf16
BIAS_ELEMENTS = 10_000
SCORES_AT_ONCE = 2**25


def max_r(dtype: torch.dtype, dim: int) -> tuple[float, float]:
    """The largest R of out and of a gradient; ``dim``: the larger of the head dims of keys and values.

    An inner product of D terms in fp32 errs like sqrt(D), in the scores and in dO V^T; what does not depend on D (weights, sums
    over keys, whose compiled form is a chain of fused multiply-adds) joins it as independent errors do, by squares. fp16
    and bf16 multiply exactly and add in fp32: what is seen there is the rounding of P, dS and the output, whatever D is.
    """
    if dtype == torch.float32:
        return (math.hypot(22, 1.5 * dim**0.5),) * 2
    return (1.5, 2.0) if dtype in (torch.float16, torch.bfloat16) else (math.inf, math.inf)


def error_ratio(x: torch.Tensor, exact: torch.Tensor) -> float:
    """R of ``x`` against the fp64 result ``exact``."""
    rounding = (exact.to(x.dtype).double() - exact).norm()
    return float((x.double() - exact).norm() / rounding)


class Oracle:
    """out, lse, dq, dk, dv of a call in fp64, from the formulas and without autograd: ``results[name]`` is (ref, A, floor).

    ``floor`` is the sum of |operand| over the pairs that count: a weight below the smallest number of the dtype is lost
    however good the kernel. It works through the queries in chunks, so memory stays linear in the sequence length.
    """

    def __init__(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
                 dlse: torch.Tensor | None = None) -> None:
        kv_heads, n_keys, n_queries = k.shape[1], k.shape[2], q.shape[2]
        shape, n_heads = (kv_heads, q.shape[1] // kv_heads), q.shape[0] * q.shape[1]
        dlse = q.new_zeros(q.shape[:3]) if dlse is None else dlse
        q, dout, dlse = (x.detach().double().unflatten(1, shape) for x in (q, dout, dlse))  # [B, Hkv, group, Nq, .]
        k, v = (x.detach().double().unsqueeze(2) for x in (k, v))  # [B, Hkv, 1, Nk, .]
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        self.max_score = 0.0
        parts: dict[str, list[torch.Tensor]] = {"out": [], "lse": [], "dq": []}
        totals = {"dk": k.new_zeros(3, *k.squeeze(2).shape), "dv": v.new_zeros(3, *v.squeeze(2).shape)}
        step = max(1, SCORES_AT_ONCE // max(1, n_heads * n_keys))
        for start in range(0, max(1, n_queries), step):
            q_c, dout_c, dlse_c = (x[:, :, :, start:start + step] for x in (q, dout, dlse))
            rows = torch.arange(start, start + q_c.shape[3], device=q.device)
            p, lse, slope, keep = self._weights(case, q_c @ k.mT * scale, rows + (n_keys - n_queries))
            out = p @ v
            delta = (dout_c * out).sum(-1) - dlse_c
            ds = scale * p * (dout_c @ v.mT - delta[..., None]) * slope
            delta_size = (dout_c * out).abs().sum(-1) + dlse_c.abs()
            ds_size = abs(scale) * p * (dout_c.abs() @ v.abs().mT + delta_size[..., None]) * slope
            ds_keep = abs(scale) * keep
            parts["out"].append(torch.stack((out, p @ v.abs(), (keep @ v.abs()).expand_as(out))))
            parts["lse"].append(torch.stack((lse, 1 + lse.abs(), torch.zeros_like(lse))))
            parts["dq"].append(torch.stack((ds @ k, ds_size @ k.abs(), (ds_keep @ k.abs()).expand_as(q_c))))
            totals["dk"] += torch.stack((ds.mT @ q_c, ds_size.mT @ q_c.abs(), ds_keep.mT @ q_c.abs())).sum(3)
            totals["dv"] += torch.stack((p.mT @ dout_c, p.mT @ dout_c.abs(), keep.mT @ dout_c.abs())).sum(3)
        self.results = {name: torch.cat(chunks, dim=4).flatten(2, 3) for name, chunks in parts.items()} | totals

    def _weights(self, case: Case, scores: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """P, LSE, the slope of the score mod, and which pairs count (1 or 0), for queries at these positions."""
        slope = scores.new_ones(())
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
            slope = 1 - (scores / case.softcap) ** 2
        distance = torch.arange(scores.shape[-1], device=scores.device) - position[:, None]
        left, right = case.bounds
        drop = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            drop |= distance < -left
        if right is not None:
            drop |= distance > right
        if scores.numel():
            self.max_score = max(self.max_score, scores.masked_fill(drop, 0.0).abs().max().item())
        scores = scores.masked_fill(drop, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        return p, lse, slope, (~drop).to(scores.dtype)


def unit(dtype: torch.dtype, oracle: Oracle) -> float:
    """The relative error that no kernel can avoid: from rounding to ``dtype``, and from the scores in the exponent."""
    return torch.finfo(dtype).eps / 2 + GATES[dtype][1] * oracle.max_score


def judge(case: Case, oracle: Oracle, name: str, got: torch.Tensor, with_r: bool = True) -> Row:
    """One result against the gates. ``with_r``: R too, where unit-normal inputs and an ordinary shape give it a meaning."""
    dtype = got.dtype
    max_e, _ = GATES[dtype]
    if got.numel() == 0:
        return {"ok": True}
    ref, size, floor = oracle.results[name].unsqueeze(-1) if name == "lse" else oracle.results[name]
    got = got.detach().double().reshape(ref.shape)
    error = torch.where(got == ref, 0.0, got - ref)  # also equal infinities: the LSE of a row without keys
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    allowed = size.masked_fill(size.isinf(), 0.0) * unit(dtype, oracle) + (1 + floor) * smallest / 2
    rows = torch.where(error.norm(dim=-1) == 0, 0.0, error.norm(dim=-1) / allowed.norm(dim=-1))
    row: Row = {"E": (error.norm() / allowed.norm()).item() if error.any() else 0.0, "E_row": rows.max().item()}
    ok = row["E"] <= max_e and row["E_row"] <= MAX_E_ROW  # False for NaN
    if with_r and name != "lse" and dtype != torch.float64 and _ordinary(case):
        halves = dtype != torch.float32
        row["R"] = (error.norm() / (ref.to(dtype).double() - ref).norm()).item()
        row["bias"] = (error.mean().abs() / error.std()).item()
        limit = max_r(dtype, max(case.head_dim, case.head_dim_v))[name != "out"]
        ok &= row["R"] <= (R_OF_LARGE_QUERIES if halves and case.amplitude == 8 and name != "out" else limit)
        ok &= not halves or error.numel() < BIAS_ELEMENTS or row["bias"] <= MAX_BIAS
    return {**row, "ok": ok}


def _ordinary(case: Case) -> bool:
    plain = case.window is None and case.softcap is None and case.scale is None and case.layout != "expanded"
    return (plain and case.amplitude in (1, 8) and min(case.n_queries, case.n_keys) >= 256
            and min(case.head_dim, case.head_dim_v) >= 32)
