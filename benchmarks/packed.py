"""Packed sequences of the lengths that documents have, beside what people do without: padding, nested tensors, document masks.

The lengths are those of real text that every machine has, the language reference that ships with Python (pydoc's topics): words
of each topic, drawn in an order that a seed decides until the tokens are full; the last document is cut. They are as uneven as
documents are: the longest is many times the median.
"""

import random
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F

import fused_attn
from fused_attn.call.spec import Window, attention_flops, kept_pairs
from fused_attn.tools.bench import peers
from fused_attn.tools.bench.cases import DTYPES, Pass
from fused_attn.tools.bench.contest import Entry, Subject, Tensors, gate_by

LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}  # relative error of each result


def lengths(tokens: int, seed: int = 0, scale: float = 1.0) -> list[int]:
    """Lengths of documents, ``tokens`` together: ``scale`` times the words of one topic after another, at least 1."""
    words = [max(1, int(scale * len(text.split()))) for _, text in sorted(topics.items())]
    drawn: list[int] = []
    order = random.Random(seed)
    while sum(drawn) < tokens:
        drawn.append(min(order.choice(words), tokens - sum(drawn)))
    return drawn


def name(documents: list[int], heads: int, kv_heads: int, head_dim: int, dtype: str, causal: bool) -> str:
    mask = "causal" if causal else "full"
    return (f"packed {dtype} d{head_dim} h{heads}/{kv_heads} {mask} {len(documents)} documents of {min(documents)} to "
            f"{max(documents)}, {sum(documents)} tokens")


def subject(documents: list[int], heads: int, kv_heads: int, head_dim: int, dtype: str, causal: bool, device: str,
            backend: str | None = None) -> Subject:
    """Attention within each document, of q [T, H, D], k and v [T, Hkv, D] or the same rows in the peer's own layout.

    What a peer's layout costs to make is not timed: a program that pads, pads once for all layers.
    """
    generator = torch.Generator(device).manual_seed(0)
    total, longest, count = sum(documents), max(documents), len(documents)
    q, k, v, dout = (torch.randn(total, h, head_dim, device=device, generator=generator).to(DTYPES[dtype])
                     for h in (heads, kv_heads, kv_heads, heads))
    cu = torch.tensor([0, *documents], device=device).cumsum(0, dtype=torch.int32)
    document = torch.repeat_interleave(torch.arange(count, device=device), torch.tensor(documents, device=device))
    position = torch.arange(total, device=device) - cu[:-1].long()[document]
    offsets = cu.long()
    grouped = heads != kv_heads

    def attend(leaves: Tensors, backend: str | None) -> torch.Tensor:
        out: torch.Tensor = fused_attn.attention_varlen(leaves["q"], leaves["k"], leaves["v"], cu, cu, longest, longest,
                                                        causal=causal, backend=backend)
        return out

    def ours() -> Entry:
        leaves = {n: x.clone().requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}
        return Entry(partial(attend, leaves, backend), leaves, dout)

    def exactly(kv_head: int) -> Tensors:
        """Results in fp64 of one key head and its group, as many as fit the memory beside the longest document's scores."""
        group = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
        parts = (("q", q[:, group]), ("k", k[:, kv_head : kv_head + 1]), ("v", v[:, kv_head : kv_head + 1]))
        leaves = {n: x.double().requires_grad_() for n, x in parts}
        return Entry(partial(attend, leaves, "reference"), leaves, dout[:, group].double()).results(True)

    def padded(x: torch.Tensor) -> torch.Tensor:
        """[B, H, longest, D], zeros behind each document."""
        rows = x.new_zeros(count, longest, *x.shape[1:])
        rows[document, position] = x
        return rows.transpose(1, 2)

    def unpadded(result: str, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)[document, position]

    def sdpa_padded() -> Entry:
        leaves = {n: padded(x).contiguous().requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}
        # Behind causality no query of a document sees padding; without it, a mask keeps padding out.
        mask = None if causal else (torch.arange(longest, device=device) < cu.diff()[:, None])[:, None, None, :]
        call = partial(F.scaled_dot_product_attention, leaves["q"], leaves["k"], leaves["v"], attn_mask=mask,
                       is_causal=causal, enable_gqa=grouped)
        return Entry(call, leaves, padded(dout), unpadded)

    def nested() -> Entry:
        leaves = {n: x.clone().requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}

        def view(x: torch.Tensor) -> torch.Tensor:
            jagged: torch.Tensor = torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=longest,
                                                                          min_seqlen=min(documents))
            return jagged.transpose(1, 2)

        def call() -> torch.Tensor:
            q, k, v = (view(x) for x in leaves.values())
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            values: torch.Tensor = out.transpose(1, 2).values()
            return values

        return Entry(call, leaves, dout)

    def rows(result: str, x: torch.Tensor) -> torch.Tensor:
        return x[0].transpose(0, 1)

    def flex() -> Entry:
        from torch.nn.attention.flex_attention import create_block_mask

        leaves = {n: x.transpose(0, 1)[None].contiguous().requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}

        def keep(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            own = document[q_idx] == document[kv_idx]
            return own & (q_idx >= kv_idx) if causal else own

        mask = create_block_mask(keep, None, None, total, total, device=device)
        call = partial(peers.compiled_flex(), *leaves.values(), block_mask=mask, enable_gqa=grouped)
        return Entry(call, leaves, dout.transpose(0, 1)[None], rows)

    pairs = sum(kept_pairs(n, n, Window(None, 0 if causal else None), 0) for n in documents)
    forward = attention_flops(1, heads, pairs, head_dim, head_dim, products_qk=1, products_v=1)
    moved = 2 * total * (heads + kv_heads) * head_dim * DTYPES[dtype].itemsize

    def bytes_of(which: Pass) -> int:
        """q, k, v and out; backward, the gradients of all four besides."""
        return moved if which == "forward" else 2 * moved

    others: dict[str, Callable[[], Entry] | str] = {
        "sdpa padded": sdpa_padded, "sdpa nested": "torch's nested tensors have no grouped heads" if grouped else nested,
        "flex": flex if device in peers.FLEX_DEVICES else "has no backward here"}
    by_head = [exactly(kv_head) for kv_head in range(kv_heads)]
    exact = {key: torch.cat([found[key] for found in by_head], 1) for key in by_head[0]}
    return Subject(
        ("forward", "backward"), ours, others, gate_by(exact, lambda result: LIMITS[dtype]),
        lambda which: forward if which == "forward" else int(2.5 * forward), bytes_of,
        {"family": "packed", "dtype": dtype, "head_dim": head_dim, "causal": causal, "n_queries": total, "n_keys": longest,
         "default": backend is None, "documents": count, "padding": round(1 - total / (count * longest), 3)})


def shapes(device: str, smoke: bool = False) -> list[tuple[list[int], int, int, int, str, bool]]:
    """(documents, heads, key heads, head dim, dtype, causal); causal ones first, as language models are trained."""
    if smoke:
        return [(lengths(40, scale=0.02), 2, 1, 16, "bf16", True)]
    if device == "cpu":
        return [(lengths(2048, scale=0.5), 4, 4, 64, "fp32", True)]
    return [(lengths(16384), 16, 16, 128, "bf16", True), (lengths(16384), 32, 8, 128, "bf16", True),
            (lengths(16384), 32, 32, 64, "bf16", False)]


def subjects(device: str, smoke: bool = False) -> dict[str, Callable[[], Subject]]:
    """By name."""
    backend = "triton" if smoke else None
    return {name(*shape): partial(subject, *shape, device, backend) for shape in shapes(device, smoke)}
