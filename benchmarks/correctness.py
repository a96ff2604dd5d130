"""Is it right on this card? An fp64 oracle, the gates R and E, the checks only a GPU can make, and determinism.

E = |x - ref| / ((u + slack * max|score|) * |A|), where A is the formula of x with absolute values, u half the dtype's
epsilon and |.| the Frobenius norm: how far an error is from the rounding that no kernel can avoid, on any shape and
magnitude. What the dtype is too small to hold is allowed for. R = |x - ref| / |round(ref) - ref|, for ordinary shapes: 1 is
a perfect kernel.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import Case, case

Row = dict[str, Any]

# dtype: largest E, slack, largest R of out, largest R of a gradient
GATES = {
    torch.float16: (1.25, 2.0**-22, 1.5, 2.0), torch.bfloat16: (1.25, 2.0**-22, 1.5, 2.0),
    torch.float32: (16.0, 2.0**-22, 20.0, 20.0), torch.float64: (64.0, 2.0**-51, math.inf, math.inf),
}
MAX_E_ROW = 4.0  # E of a single row
R_OF_LARGE_QUERIES = 4.0  # of a gradient of halves, at q x 8
MAX_BIAS = 0.05  # |mean| / standard deviation of the errors of halves
BIAS_ELEMENTS = 10_000
TF32_ERROR = 4 * 2.0**-11  # relative to A; tensor cores may truncate to 10 bits rather than round
SCORES_AT_ONCE = 2**25
NAMES = ("out", "lse", "dq", "dk", "dv")


class Skipped(Exception):
    """A check that this machine cannot make."""


class Oracle:
    """out, lse, dq, dk, dv of a call in fp64, from the formulas and without autograd: ``results[name]`` is (ref, A, floor).

    ``floor`` is the sum of |operand| over the pairs that count: a weight below the smallest number of the dtype is lost
    however good the kernel. Works through the queries in chunks, so memory stays linear in the sequence length.
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
    """The relative error that no kernel can avoid: of rounding to ``dtype``, and of the scores in the exponent."""
    return torch.finfo(dtype).eps / 2 + GATES[dtype][1] * oracle.max_score


def judge(case: Case, oracle: Oracle, name: str, got: torch.Tensor, with_r: bool = True) -> Row:
    """One result against the gates. ``with_r``: R too, where unit-normal inputs and an ordinary shape give it a meaning."""
    dtype = got.dtype
    max_e, _, max_r_out, max_r_gradient = GATES[dtype]
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
        # A sum of D products in fp32 errs like sqrt(D); the limits are those of D = 128.
        depth = 1.0 if halves else max(1.0, max(case.head_dim, case.head_dim_v) / 128) ** 0.5
        max_r = depth * (max_r_out if name == "out" else max_r_gradient)
        ok &= row["R"] <= (R_OF_LARGE_QUERIES if halves and case.amplitude == 8 and name != "out" else max_r)
        ok &= not halves or error.numel() < BIAS_ELEMENTS or row["bias"] <= MAX_BIAS
    return {**row, "ok": ok}


def _ordinary(case: Case) -> bool:
    plain = case.window is None and case.softcap is None and case.scale is None and case.layout != "expanded"
    return (plain and case.amplitude in (1, 8) and min(case.n_queries, case.n_keys) >= 256
            and min(case.head_dim, case.head_dim_v) >= 32)


def run(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
        dlse: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv of attention(), and lse where its gradient is given."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if dlse is None:
        out = case.attend(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    out, lse = case.attend(*leaves, return_lse=True)
    return dict(zip(NAMES, (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))), strict=True))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, fresh tensors hold NaN: an element that no kernel writes, or that is read before, shows in the result."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poison(*arguments: Any, **options: Any) -> torch.Tensor:
            fresh = allocate(*arguments, **options)
            return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

        return poison

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def check(case: Case, device: str) -> Row:
    """Forward, LSE and every gradient of a case against the oracle."""
    inputs = case.inputs(device)
    backend = case.backend(*inputs[:3])
    with poisoned_memory():
        results = run(case, *inputs)
    if case.batch * case.heads > 65535:  # the oracle's own batched products stop there on a GPU
        results = {name: x.cpu() for name, x in results.items()}
        oracle = Oracle(case, *(x.cpu() for x in inputs))
    else:
        oracle = Oracle(case, *inputs)
    verdicts = {name: judge(case, oracle, name, got) for name, got in results.items()}
    return {"ok": backend == "triton" and all(v["ok"] for v in verdicts.values()), "backend": backend, "results": verdicts}


def determinism(case: Case, device: str, runs: int) -> Row:
    """Equal to the bit: forward and backward over ``runs`` runs, and the forward of one batch entry alone."""
    inputs = case.inputs(device)
    first = run(case, *inputs)
    differ = []
    for _ in range(runs - 1):
        differ += [name for name, x in run(case, *inputs).items() if name not in differ and not torch.equal(x, first[name])]
    q, k, v = inputs[:3]
    alone = case.attend(q[-1:], k[-1:], v[-1:])
    if not torch.equal(alone, first["out"][-1:]):
        differ.append("out of one batch entry alone")
    return {"ok": not differ, "runs": runs, "differ": differ}


def _equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Row:
    differ = [name for name, x in got.items() if x.dtype != expected[name].dtype or not torch.equal(x, expected[name])]
    return {"ok": not differ, "differ": differ}


def _needs_cuda(device: str) -> None:
    if device == "cpu":
        raise Skipped("needs a GPU")


def side_stream(device: str) -> Row:
    """On a stream that is not the default one: the results of the default stream."""
    _needs_cuda(device)
    subject = case(300, 64, causal=True)
    inputs = subject.inputs(device)
    expected = run(subject, *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on another stream would read its inputs before they are there
        late = [x.clone() for x in inputs]
        got = run(subject, *late)
    torch.cuda.current_stream().wait_stream(stream)
    return _equal(got, expected)


def cuda_graph(device: str) -> Row:
    """Forward and backward captured once and replayed on other inputs: what eager gives for them."""
    _needs_cuda(device)
    subject = case(300, 64, causal=True)
    static = subject.inputs(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(subject, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(subject, *static)
    fresh = subject.inputs(device, seed=1)
    for old, new in zip(static, fresh, strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    return _equal(got, run(subject, *fresh))


def compiled(device: str) -> Row:
    """torch.compile(fullgraph=True) of forward and backward: eager's results, and no graph break."""
    subject = case(300 if device != "cpu" else 40, 64 if device != "cpu" else 16, causal=True, softcap=20.0)
    q, k, v, dout, dlse = subject.inputs(device)
    function = torch.compile(subject.attend, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_lse=True)
    got = dict(zip(NAMES, (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))), strict=True))
    return _equal(got, run(subject, q, k, v, dout, dlse))


def autocast(device: str) -> Row:
    """fp32 inputs under autocast: out as if cast by hand, gradients in fp32."""
    length, dim = (300, 64) if device != "cpu" else (40, 16)
    full, half = case(length, dim, dtype="fp32"), case(length, dim, dtype="bf16")
    q, k, v, dout, _ = full.inputs(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        got = run(full, q, k, v, dout.bfloat16(), None)
    expected = run(half, q.bfloat16(), k.bfloat16(), v.bfloat16(), dout.bfloat16(), None)
    return _equal(got, {name: x if name == "out" else x.float() for name, x in expected.items()})


def tf32(device: str) -> Row:
    """torch's own setting rules fp32: "highest" meets the fp32 gates, "high" is coarser, within TF32's bounds."""
    _needs_cuda(device)
    subject = case(300, 64, dtype="fp32")
    inputs = subject.inputs(device)
    oracle = Oracle(subject, *inputs)
    # Through the old interface: past the new one, FlexAttention's compilation asks the old one in vain.
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        ieee = {name: judge(subject, oracle, name, x) for name, x in run(subject, *inputs).items()}
        torch.set_float32_matmul_precision("high")
        coarse = {name: judge(subject, oracle, name, x)["E"] for name, x in run(subject, *inputs).items()}
    finally:
        torch.set_float32_matmul_precision(before)
    used = coarse["out"] > 20 * ieee["out"]["E"]
    largest = max(coarse.values()) * unit(torch.float32, oracle)
    return {"ok": all(v["ok"] for v in ieee.values()) and used and largest <= TF32_ERROR,
            "E ieee": {name: v["E"] for name, v in ieee.items()}, "E tf32": coarse}


SPECIAL: dict[str, Callable[[str], Row]] = {
    "side stream": side_stream, "CUDA graph": cuda_graph, "torch.compile": compiled, "autocast": autocast, "TF32": tf32,
}
