"""Two steps around attention that every decoder makes: rotary positions before it, and a cache of keys and values behind it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fused_attn
from benchmarks.cases import interpreted
from benchmarks.models import PlainCache, rotated
from fused_attn.nn import KVCache, RotaryEmbedding
from fused_attn.tools.bench.cases import Case, case
from fused_attn.tools.bench.contest import Entry, Subject, gate_by

LIMITS = {"bf16": 1.5e-2, "fp16": 3e-3, "fp32": 1e-5}  # relative error of each result; the rotated queries are rounded too


def _facts(shape: Case, family: str) -> dict[str, Any]:
    return {"family": family, "dtype": shape.dtype, "head_dim": shape.head_dim, "causal": True,
            "n_queries": shape.n_queries, "n_keys": shape.n_keys, "default": shape.backend is None}


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Causal attention of rotated queries and keys, by torch."""
    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def rotary(shape: Case, device: str) -> Subject:
    """Rotations of q and k, then causal attention: out and the gradients of q, k, v as they were before they turned."""
    q, k, v, dout, _ = shape.inputs(device)
    rope = RotaryEmbedding(shape.head_dim)

    def entry(attend: Callable[..., torch.Tensor], wide: bool = False) -> Entry:
        leaves = {n: (x.double() if wide else x.clone()).requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}
        return Entry(lambda: attend(*leaves.values()), leaves, dout.double() if wide else dout)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = rope(q, k)
        out: torch.Tensor = shape.attend(q, k, v)
        return out

    def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fused_attn.reference_attention(rotated(q), rotated(k), v, causal=True)

    peers: dict[str, Callable[[], Entry] | str] = {"sdpa": lambda: entry(partial(_plain, turn=rotated))}
    if device != "cpu":
        peers["sdpa, rotations compiled"] = lambda: entry(partial(_plain, turn=torch.compile(rotated)))
    exact = entry(exactly, wide=True).results(True)
    return Subject(shape.passes, partial(entry, ours), peers, gate_by(exact, lambda result: LIMITS[shape.dtype]), shape.flops,
                   shape.bytes, _facts(shape, "rotary"))


def decoding(shape: Case, device: str) -> Subject:
    """One token more for a cache that holds all but one of its keys: append, then attend. The next call takes it back."""
    q, k, v, *_ = shape.inputs(device)
    before, n = shape.n_keys - shape.n_queries, shape.n_keys

    def filled(cache: Any) -> Any:
        cache.append(k[:, :, :before], v[:, :, :before])
        return cache

    def ours() -> Entry:
        cache = filled(KVCache())

        def call() -> torch.Tensor:
            cache.truncate(before)
            cache.append(k[:, :, before:], v[:, :, before:])
            out: torch.Tensor = cache.attend(q, backend=shape.backend)
            return out

        return Entry(call)

    def plain(eager: bool) -> Entry:
        cache = filled(PlainCache(n))
        group = shape.heads // shape.kv_heads

        def call() -> torch.Tensor:
            cache.truncate(before)
            keys, values = cache.append(k[:, :, before:], v[:, :, before:])
            if not eager:
                return F.scaled_dot_product_attention(q, keys, values, enable_gqa=group > 1)
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
            return (q @ keys.mT * shape.head_dim**-0.5).softmax(-1) @ values

        return Entry(call)

    exact = {"out": fused_attn.reference_attention(q.double(), k.double(), v.double(), causal=True)}
    return Subject(("forward",), ours, {"sdpa": partial(plain, False), "eager": partial(plain, True)},
                   gate_by(exact, lambda result: LIMITS[shape.dtype]), shape.flops, shape.bytes,
                   _facts(shape, "cached decoding"), tokens=shape.batch)


def shapes(device: str, smoke: bool = False) -> tuple[list[Case], list[Case]]:
    """(with rotations, with a cache)."""
    once: dict[str, Any] = {"causal": True, "passes": ("forward",)}
    if smoke:
        return (interpreted([case(24, 16, batch=1, causal=True, dtype="fp32")]),
                interpreted([case(1, 16, batch=2, heads=4, kv_heads=2, n_keys=30, dtype="fp32", **once)]))
    if device == "cpu":
        return ([case(512, 64, batch=1, heads=8, causal=True, dtype="fp32")],
                [case(1, 64, batch=4, heads=8, kv_heads=2, n_keys=2048, dtype="fp32", **once)])
    return ([case(4096, d, batch=2, heads=2048 // d, kv_heads=kv_heads, causal=True)
             for d, kv_heads in ((128, 16), (128, 4), (64, 32))],
            [case(1, 128, batch=batch, heads=32, kv_heads=8, n_keys=n, **once)
             for batch, n in ((1, 4096), (16, 8192), (1, 131072), (64, 2048))])


def subjects(device: str, smoke: bool = False) -> dict[str, Callable[[], Subject]]:
    """By name."""
    turned, decoded = shapes(device, smoke)
    return {**{f"rotary {shape.name}": partial(rotary, shape, device) for shape in turned},
            **{f"cached decoding {shape.name}": partial(decoding, shape, device) for shape in decoded}}
