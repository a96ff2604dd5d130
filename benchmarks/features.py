"""Everything beside plain attention on this card: right against fp64, the same to the bit again, and what it costs.

A feature is one call with tensors of its own. Its results and every gradient are held to the reference in fp64 on the same
inputs: q, k, v and out by the error ratio R, other gradients by their relative error. Its time stands beside the plain call
on the same shapes, and beside torch's SDPA and FlexAttention where they can (alternatives.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import fused_attn
from benchmarks import alternatives
from benchmarks.correctness import asked
from fused_attn.call.spec import Window, attention_flops, kept_pairs
from fused_attn.tools.bench.cases import DTYPES, Pass
from fused_attn.tools.bench.contest import OURS, Entry, Subject, gate_by
from fused_attn.tools.bench.oracle import max_r

Row = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Backend = Callable[[str], str | None]  # of a device: what calls are asked to run on

# dtype: largest R of out, of dq, dk and dv, both at head dim 64, and largest relative error of any other gradient
LIMITS = {"fp16": (1.5, 2.5, 4e-3), "bf16": (1.5, 2.5, 2e-2), "fp32": (20.0, 40.0, 1e-4)}
# Features that take registers beside each tile of scores, and head dims with tiles of their own or of odd widths.
HEAVY = ("bias", "mask", "document mask", "dropout", "everything")
ODD_HEAD_DIMS = (40, 72, 96, 112, 128, 160, 192, 256)
GATE_TIMES = 2.0  # times the last of these, before a timing: the strict limits are those of the stage before


@dataclass(frozen=True)
class Shape:
    """Sizes and type of a call."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    head_dim_v: int
    dtype: str = "bf16"


@dataclass(frozen=True)
class Feature:
    """``tensors`` draws what the call takes beside q, k, v; ``arguments`` makes attention()'s keywords of them.

    ``learned`` names the tensors that have gradients. What others do instead is in alternatives.py.
    """

    name: str
    tensors: Callable[[Shape, Callable[..., torch.Tensor]], Tensors] = lambda shape, draw: {}
    arguments: Callable[[Tensors], dict[str, Any]] = lambda tensors: {}
    learned: tuple[str, ...] = ()
    causal: bool = True
    shape: dict[str, int] = field(default_factory=dict)  # what of the shape differs from the others'


def _document(shape: Shape, draw: Callable[..., torch.Tensor]) -> Tensors:
    cuts = draw(shape.batch, shape.length).gt(2.2)  # a new document every 70 tokens or so
    return {"ids": cuts.int().cumsum(1, dtype=torch.int32)}


FEATURES = (
    Feature("plain"),
    Feature("window 256", arguments=lambda t: {"window": (256, None)}),
    Feature("window 1024", arguments=lambda t: {"window": (1024, None)}),
    Feature("softcap", arguments=lambda t: {"softcap": 30.0}),
    Feature("bias", lambda s, draw: {"bias": draw(1, s.heads, s.length, s.length)}, lambda t: {"bias": t["bias"]}, ("bias",),
            causal=False),
    Feature("bias per key", lambda s, draw: {"bias": draw(s.batch, 1, 1, s.length)}, lambda t: {"bias": t["bias"]}, ("bias",)),
    Feature("relative bias", lambda s, draw: {"values": draw(s.heads, 2 * s.length - 1)},
            lambda t: {"bias": fused_attn.RelativeBias(t["values"])}, ("values",)),
    Feature("t5 bias", lambda s, draw: {"table": draw(32, s.heads)},
            lambda t: {"bias": fused_attn.t5_bias(t["table"], int(t["n"]), int(t["n"]))}, ("table",), causal=False),
    Feature("alibi", lambda s, draw: {"slopes": draw(s.heads).abs() * 0.1}, lambda t: {"alibi_slopes": t["slopes"]},
            ("slopes",)),
    Feature("additive score", lambda s, draw: {"weight": draw(s.head_dim)}, lambda t: {"score_weight": t["weight"]},
            ("weight",)),
    Feature("sinks", lambda s, draw: {"sinks": draw(s.heads)}, lambda t: {"sinks": t["sinks"]}, ("sinks",)),
    Feature("mask", lambda s, draw: {"mask": draw(s.batch, 1, s.length, s.length) > -1}, lambda t: {"mask": t["mask"]},
            causal=False),
    Feature("key lengths", lambda s, draw: {"lengths": (draw(s.batch).sigmoid() * s.length).int()},
            lambda t: {"key_lengths": t["lengths"]}),
    Feature("document mask", _document, lambda t: {"mask_mod": fused_attn.document_mask(t["ids"])}),
    Feature("prefix LM", lambda s, draw: {"lengths": (draw(s.batch).sigmoid() * s.length).int()},
            lambda t: {"mask_mod": fused_attn.prefix_lm_mask(t["lengths"])}, causal=False),
    Feature("dropout", arguments=lambda t: {"dropout_p": 0.1}),
    Feature("precise", arguments=lambda t: {"precise": True}),
    Feature("latent 192/128", shape={"head_dim": 192, "head_dim_v": 128}),
    Feature("latent 576/512", shape={"head_dim": 576, "head_dim_v": 512, "kv_heads": 1}),
    Feature("everything", lambda s, draw: {"bias": draw(1, s.heads, s.length, s.length), "sinks": draw(s.heads),
                                           "mask": draw(s.batch, 1, s.length, s.length) > -1, "slopes": draw(s.heads).abs()},
            lambda t: {"bias": t["bias"], "sinks": t["sinks"], "mask": t["mask"], "alibi_slopes": t["slopes"],
                       "softcap": 20.0, "dropout_p": 0.1, "window": (200, None)}, ("bias", "sinks", "slopes")),
)


class Call:
    """One feature at one shape: its tensors, and the call by the kernels or by the reference."""

    def __init__(self, feature: Feature, shape: Shape, device: str) -> None:
        self.feature, self.device = feature, device
        self.shape = shape = Shape(**{**shape.__dict__, **feature.shape})
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, generator=generator)

        dtype = DTYPES[shape.dtype]
        self.q, self.k, self.v, self.dout = (
            draw(shape.batch, heads, shape.length, dim).to(dtype)
            for heads, dim in ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim),
                               (shape.kv_heads, shape.head_dim_v), (shape.heads, shape.head_dim_v)))
        tensors = feature.tensors(shape, draw)
        self.tensors = {name: x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x for name, x in tensors.items()}

    def leaves(self, wide: bool) -> Tensors:
        """q, k, v and what is learned, as leaves; in fp64 if ``wide``."""
        found = {"q": self.q, "k": self.k, "v": self.v, **{name: self.tensors[name] for name in self.feature.learned}}
        return {name: (x.double() if wide else x.detach().clone()).requires_grad_() for name, x in found.items()}

    def attend(self, leaves: Tensors, backend: str | None, exactly: bool | None = None) -> torch.Tensor:
        """out; ``exactly``: its gradients must be equal to the bit when they are taken again."""
        tensors = {**self.tensors, **leaves, "n": torch.tensor(self.shape.length)}
        arguments = {"causal": self.feature.causal, **self.feature.arguments(tensors)}
        torch.manual_seed(1)  # of dropout: kernels and reference draw one mask
        out: torch.Tensor = fused_attn.attention(leaves["q"], leaves["k"], leaves["v"], backend=backend, deterministic=exactly,
                                                 **arguments)
        return out

    def results(self, wide: bool, backend: str | None) -> Tensors:
        """out and the gradient of every leaf."""
        leaves = self.leaves(wide)
        out = self.attend(leaves, backend, exactly=True)
        grads = torch.autograd.grad(out, list(leaves.values()), self.dout.to(out.dtype))
        return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(feature: Feature, shape: Shape, device: str, backend: Backend = asked) -> Row:
    """Results and gradients against fp64, and again: equal to the bit."""
    call = Call(feature, shape, device)
    got, again = call.results(False, backend(device)), call.results(False, backend(device))
    exact = call.results(True, "reference")
    limit_out, limit_grad, limit_other = LIMITS[shape.dtype]
    wider = max_r(DTYPES[shape.dtype], max(shape.head_dim, shape.head_dim_v))[0] / max_r(DTYPES[shape.dtype], 64)[0]
    verdicts: dict[str, Row] = {}
    for name, x in got.items():
        ref, error = exact[name], x.double() - exact[name]
        row: Row = {"relative": (error.norm() / ref.norm()).item()}
        row["ok"] = row["relative"] <= limit_other
        if name in ("out", "dq", "dk", "dv") and shape.length >= 256:  # R has no meaning on small shapes
            row["R"] = (error.norm() / (ref.to(x.dtype).double() - ref).norm()).item()
            row["ok"] = row["R"] <= wider * (limit_out if name == "out" else limit_grad)
        verdicts[name] = row
    differ = [name for name in got if not torch.equal(got[name], again[name])]
    return {"ok": not differ and all(v["ok"] for v in verdicts.values()), "differ": differ, "results": verdicts}


def check_packed(shape: Shape, device: str, exactly: bool = True) -> Row:
    """Packed sequences of many lengths, none among them: each equal to the bit to the same sequence alone, or unless
    ``exactly``, where dQ is summed by atomics, as near as the type allows."""
    lengths = [0, shape.length // 2 + 1, shape.length, 1, shape.length // 3, 0]
    cu = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    total, tail, dtype = sum(lengths), 5, DTYPES[shape.dtype]
    q, k, v, dout = (torch.randn(total + tail, heads, dim, device=device).to(dtype)
                     for heads, dim in ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim),
                                        (shape.kv_heads, shape.head_dim_v), (shape.heads, shape.head_dim_v)))
    for x in (q, k, v):
        x[total:] = float("nan")
    for x in (q, k, v):
        x.requires_grad_()
    out = fused_attn.attention_varlen(q, k, v, cu, cu, shape.length, shape.length, causal=True, backend=asked(device),
                                      deterministic=exactly)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    differ: list[str] = []
    at = 0
    for n in lengths:
        if n:
            own = tuple(x.detach()[at : at + n].transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
            alone = fused_attn.attention(own[0], own[1], own[2], causal=True, backend=asked(device), deterministic=exactly)
            alone_grads = torch.autograd.grad(alone, own, dout[at : at + n].transpose(0, 1)[None])
            pairs = zip((out, *grads), (alone, *alone_grads), ("out", "dq", "dk", "dv"), strict=True)
            differ += [f"{name} at length {n}" for x, y, name in pairs
                       if not _same(x[at : at + n], y[0].transpose(0, 1), 0.0 if exactly else LIMITS[shape.dtype][2])]
        at += n
    tails = [name for x, name in zip((out, *grads), ("out", "dq", "dk", "dv"), strict=True) if x[total:].any()]
    return {"ok": not differ and not tails, "differ": differ, "tails": tails}


def _same(x: torch.Tensor, y: torch.Tensor, limit: float) -> bool:
    x, y = x.detach().double(), y.detach().double()
    return torch.equal(x, y) if not limit else float((x - y).norm()) <= limit * max(1.0, float(y.norm()))


def shapes(smoke: bool) -> tuple[Shape, Shape]:
    """(of the checks, of the timings)."""
    if smoke:
        return Shape(2, 2, 1, 40, 16, 16), Shape(1, 2, 2, 40, 16, 16)
    return Shape(2, 4, 2, 500, 64, 64), Shape(2, 16, 16, 4096, 128, 128)


def compile_only(name: str, shape: Shape, device: str) -> None:
    """Fills the caches with what a feature runs, on a shape of its kind."""
    feature = next(feature for feature in FEATURES if feature.name == name)
    Call(feature, replace(shape, length=32 + shape.length % 16), device).results(False, asked(device))


def _flops(call: Call, which: Pass) -> int:
    shape = call.shape
    pairs = kept_pairs(shape.length, shape.length, Window(None, 0 if call.feature.causal else None), 0)
    qk, pv = (1, 1) if which == "forward" else (3, 2)
    return attention_flops(shape.batch, shape.heads, pairs, shape.head_dim, shape.head_dim_v, products_qk=qk, products_v=pv)


def subject(feature: Feature, shape: Shape, device: str, backend: Backend = asked) -> Subject:
    """Forward and backward of a feature beside what others do for it, and the plain call on the same shapes.

    Ours is held to fp64 on two heads of one batch entry, which has its reference fit the memory; the peers to ours.
    """
    call = Call(feature, shape, device)
    plain = Call(Feature("plain", causal=feature.causal, shape=feature.shape), shape, device)
    proven: Tensors = {}

    def ours(one: Call) -> Entry:
        leaves = one.leaves(False)
        return Entry(partial(one.attend, leaves, backend(device)), leaves, one.dout)

    def gate(name: str, results: Tensors) -> tuple[Row, str | None]:
        if name == OURS:
            group = shape.heads // shape.kv_heads
            verdict = check(feature, replace(shape, batch=1, heads=2 * group, kv_heads=2), device, backend)
            proven.update(results)
            limit = GATE_TIMES * LIMITS[shape.dtype][2]
            wrong = ", ".join([key for key, found in verdict["results"].items() if not found["relative"] <= limit])
            return {"differ": verdict["differ"]}, f"beyond {limit:.2g} of the reference: {wrong}" if wrong else None
        return gate_by(proven, lambda result: 0.0)(name, results)

    def peer(make: Callable[..., Callable[[Tensors], torch.Tensor]]) -> Entry:
        leaves = call.leaves(False)
        attend = make(call.tensors | {"n": torch.tensor(call.shape.length)}, feature.causal, device,
                      call.shape.heads != call.shape.kv_heads)
        return Entry(partial(attend, leaves), leaves, call.dout)

    size = DTYPES[shape.dtype].itemsize
    touched = [call.q, call.k, call.v, call.dout, *(call.tensors[name] for name in feature.learned)]
    moved = size * sum(x.numel() for x in touched)
    names: dict[str, Callable[[], Entry] | str] = {
        name: partial(peer, make) for name, make in alternatives.peers(feature.name, device).items()}
    return Subject(
        ("forward", "backward"), partial(ours, call), names, gate, partial(_flops, call),
        lambda which: moved if which == "forward" else 2 * moved,
        {"family": "features", "feature": feature.name, "dtype": shape.dtype, "head_dim": call.shape.head_dim,
         "causal": feature.causal, "n_queries": shape.length, "n_keys": shape.length, "default": backend(device) is None},
        yardstick=partial(ours, plain))
