"""Is it right on this card? Every case against the oracle, the checks only a GPU can make, and determinism."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

import fused_attn
from fused_attn.tools.bench.cases import Case, case
from fused_attn.tools.bench.oracle import Oracle, Row, judge, unit

TF32_ERROR = 4 * 2.0**-11  # relative to A; tensor cores may truncate to 10 bits rather than round
NAMES = ("out", "lse", "dq", "dk", "dv")
exact = partial(case, deterministic=True)  # what must be equal to the bit


class Skipped(Exception):
    """A check that this machine cannot make."""


def asked(device: str) -> str | None:
    """What a call names as its backend: on CPU tensors, where the kernels are no default, they are asked for."""
    return "triton" if device == "cpu" else None


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
    backend, missed = case.answered_by(*inputs[:3]), case.not_as_asked(*inputs[:3])
    with poisoned_memory():
        results = run(case, *inputs)
    if case.batch * case.heads > 65535:  # the oracle's own batched products stop there on a GPU
        results = {name: x.cpu() for name, x in results.items()}
        oracle = Oracle(case, *(x.cpu() for x in inputs))
    else:
        oracle = Oracle(case, *inputs)
    verdicts = {name: judge(case, oracle, name, got) for name, got in results.items()}
    ok = backend == "triton" and not missed and all(v["ok"] for v in verdicts.values())
    return {"ok": ok, "backend": backend, "results": verdicts, **({"missed": missed} if missed else {})}


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
    subject = exact(300, 64, causal=True)
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


def cuda_graph(device: str, subject: Case | None = None) -> Row:
    """Forward and backward captured once and replayed on other inputs: what eager gives for them."""
    _needs_cuda(device)
    subject = subject or exact(300, 64, causal=True)
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


def very_negative_lse(device: str) -> Row:
    """Scores near -128 D^0.5 / 8, keys that end within a tile: padding that is summed over must not be exp(0 - LSE)."""
    length, n_keys, dim = (256, 77, 64) if device != "cpu" else (40, 27, 16)
    verdicts: dict[str, Row] = {}
    for dtype, deterministic in (("fp16", True), ("fp16", False), ("bf16", True), ("bf16", False)):
        subject = case(length, dim, batch=1, dtype=dtype, n_keys=n_keys, deterministic=deterministic, backend=asked(device))
        q, k, v, dout, dlse = subject.inputs(device)
        q[..., 0], k[..., 0] = 11.3, -11.3 * (4 if dtype == "bf16" else 1)
        oracle = Oracle(subject, q, k, v, dout, dlse)
        for name, got in run(subject, q, k, v, dout, dlse).items():
            verdicts[f"{dtype} {'' if deterministic else 'by atomics '}{name}"] = judge(subject, oracle, name, got)
    return {"ok": all(v["ok"] for v in verdicts.values()), "results": verdicts}


def beyond_32_bits(device: str) -> Row:
    """q, k, v and their gradients of more than 2**31 elements each: the last head is what it is alone, to the bit."""
    _needs_cuda(device)
    heads, length, dim = 130, 2**17, 128
    if torch.cuda.mem_get_info()[0] < 11 * 2 * heads * length * dim:
        raise Skipped("needs more memory")
    q, k, v, dout = (torch.randn(1, heads, length, dim, device=device, dtype=torch.bfloat16) for _ in range(4))
    assert q.numel() > 2**31

    def results(*tensors: torch.Tensor) -> list[torch.Tensor]:
        *leaves, gradient = (x.detach().requires_grad_() for x in tensors)
        out = fused_attn.attention(*leaves, window=(100, 0), deterministic=True)
        return [x[:, -1:].clone() for x in (out, *torch.autograd.grad(out, leaves, gradient.detach()))]

    whole, alone = results(q, k, v, dout), results(*(x[:, -1:].clone() for x in (q, k, v, dout)))
    return _equal(*(dict(zip(("out", "dq", "dk", "dv"), x, strict=True)) for x in (whole, alone)))


def compiled(device: str) -> Row:
    """torch.compile(fullgraph=True) of forward and backward: eager's results, and no graph break."""
    length, dim = (300, 64) if device != "cpu" else (40, 16)
    subject = exact(length, dim, causal=True, softcap=20.0, backend=asked(device))
    q, k, v, dout, dlse = subject.inputs(device)
    function = torch.compile(subject.attend, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_lse=True)
    got = dict(zip(NAMES, (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))), strict=True))
    return _equal(got, run(subject, q, k, v, dout, dlse))


def autocast(device: str) -> Row:
    """fp32 inputs under autocast: out as if cast by hand, gradients in fp32."""
    length, dim = (300, 64) if device != "cpu" else (40, 16)
    full, half = (case(length, dim, dtype=dtype, backend=asked(device)) for dtype in ("fp32", "bf16"))
    q, k, v, dout, _ = full.inputs(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        got = run(full, q, k, v, dout.bfloat16(), None)
    expected = run(half, q.bfloat16(), k.bfloat16(), v.bfloat16(), dout.bfloat16(), None)
    return _equal(got, {name: x if name == "out" else x.float() for name, x in expected.items()})


def tf32(device: str) -> Row:
    """torch's own setting rules fp32: "highest" meets the fp32 gates, "high" is coarser, within TF32's bounds."""
    _needs_cuda(device)
    subject = exact(300, 64, dtype="fp32")
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


def with_hopper(hopper: str, check: Callable[[str], Row]) -> Callable[[str], Row]:
    """A check whose calls ask for kernels of a Hopper."""

    def climbed(device: str) -> Row:
        with fused_attn.hopper(hopper):
            return check(device)

    return climbed


SPECIAL: dict[str, Callable[[str], Row]] = {
    "very negative LSE": very_negative_lse, "side stream": side_stream, "CUDA graph": cuda_graph,
    "CUDA graph of decoding": partial(cuda_graph, subject=exact(1, 128, heads=8, kv_heads=2, n_keys=3000)),
    "beyond 2**31 elements": beyond_32_bits, "torch.compile": compiled, "autocast": autocast, "TF32": tf32,
}
