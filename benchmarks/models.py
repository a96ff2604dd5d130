"""Whole models: a GPT's and a Llama's stack of blocks in training and in generation, of one set of weights.

The package's model is made of its layers; the others are the same modules with the attention taken out and written as people
write it: with torch's SDPA, or with the matrix of scores in memory. Results are held to the plain one in fp64: whoever errs
by more than three times what the plain one errs in the same dtype is not timed.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.layers import matrices, moved, products
from fused_attn import settings
from fused_attn.call.spec import Window, attention_flops, kept_pairs
from fused_attn.nn import KVCache, LearnedPositions, MultiheadAttention, PositionEmbeddings, RotaryEmbedding
from fused_attn.tools.bench.cases import DTYPES
from fused_attn.tools.bench.contest import Entry, Gate, Subject, difference, gate_by

SLACK = 3.0  # times the error of plain attention in the same dtype
FLOOR = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}  # relative errors that are nobody's fault
BASE = 10000.0  # of the rotations


@dataclass(frozen=True)
class Config:
    """A model: ``llama`` has RMSNorm, grouped heads, rotations and SwiGLU, else LayerNorm, learned positions and GELU."""

    llama: bool
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    batch: int
    length: int
    dtype: str

    @property
    def name(self) -> str:
        heads = f"h{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        kind = "Llama" if self.llama else "GPT"
        return f"{kind} {self.dtype} {self.layers}x d{self.width} {heads} B{self.batch} N{self.length}"


@functools.cache
def tables(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles of ``rows`` positions, [rows, dim]."""
    frequencies = BASE ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angles = (torch.arange(rows, device=device, dtype=torch.float64)[:, None] * frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Rotary positions of x [B, H, N, D] from position ``first`` on, as model code writes them."""
    stop = first + x.shape[2]
    rows = 1 << (stop - 1).bit_length()
    both = tables(rows, x.shape[3], x.device, torch.promote_types(x.dtype, torch.float32))
    cos, sin = (table[first:stop] for table in both)
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class PlainCache:
    """Keys and values in tensors of a fixed size: what a peer remembers by."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def truncate(self, length: int) -> None:
        self.length = length

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.k is None or self.v is None:
            self.k, self.v = (x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class PlainAttention(nn.Module):
    """The weights of a ``MultiheadAttention``, and attention by torch alone: ``how`` is "sdpa" or "eager"."""

    def __init__(self, module: MultiheadAttention, how: str) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias, self.out_proj = module.in_proj_weight, module.in_proj_bias, module.out_proj
        self.heads, self.kv_heads, self.dim = module.num_heads, module.num_kv_heads, module.head_dim
        self.turned, self.how = getattr(module, "rope", None) is not None, how

    def forward(self, x: torch.Tensor, cache: PlainCache | None) -> torch.Tensor:
        rows = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        sizes = [self.heads * self.dim, *[self.kv_heads * self.dim] * 2]
        q, k, v = (part.unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in rows.split(sizes, -1))
        if self.turned:
            first = 0 if cache is None else cache.length
            q, k = rotated(q, first), rotated(k, first)
        if cache is not None:
            k, v = cache.append(k, v)
        alone = q.shape[2] == 1
        if self.how == "sdpa" and (alone or q.shape[2] == k.shape[2]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=not alone, enable_gqa=self.heads != self.kv_heads)
        else:
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
            scores = q @ k.mT * self.dim**-0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1 + k.shape[2] - q.shape[2])
            out = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        result: torch.Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), then W3. Source: Shazeer 2020, "GLU Variants Improve Transformer"."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(x).chunk(2, -1)
        result: torch.Tensor = self.down(F.silu(gate) * up)
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, inner, llama = config.width, config.inner, config.llama
        self.norm1, self.norm2 = ((nn.RMSNorm if llama else nn.LayerNorm)(width, eps=1e-5) for _ in range(2))
        rope = RotaryEmbedding(width // config.heads, BASE) if llama else None
        self.attention: nn.Module = MultiheadAttention(width, config.heads, bias=not llama, batch_first=True,
                                                       num_kv_heads=config.kv_heads, causal=True, rope=rope)
        self.mlp = SwiGLU(width, inner) if llama else nn.Sequential(
            nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor, cache: Any, position_embeddings: PositionEmbeddings | None) -> torch.Tensor:
        y = self.norm1(x)
        if isinstance(self.attention, PlainAttention):
            x = x + self.attention(y, cache)
        else:
            x = x + self.attention(y, y, y, need_weights=False, cache=cache, position_embeddings=position_embeddings)[0]
        result: torch.Tensor = x + self.mlp(self.norm2(x))
        return result


class Model(nn.Module):
    """Tokens [B, N] to logits [B, N, V]; the embedding is the last product's weight too."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.positions = None if config.llama else LearnedPositions(2 * config.length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = (nn.RMSNorm if config.llama else nn.LayerNorm)(config.width, eps=1e-5)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.width**-0.5)

    def forward(self, tokens: torch.Tensor, cache: list[Any] | None = None) -> torch.Tensor:
        x = self.embed(tokens)
        if self.positions is not None:
            x = self.positions(x, 0 if cache is None else cache[0].length)
        first, shared = self.blocks[0].attention, None  # rotations that all blocks share
        if isinstance(first, MultiheadAttention):
            shared = first.position_embeddings(x, None if cache is None else cache[0])
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], shared)
        return F.linear(self.norm(x), self.embed.weight)

    def by(self, how: str) -> "Model":
        """A copy of the same weights whose attention is "sdpa", "eager", or "ours"."""
        model = copy.deepcopy(self)
        for block in model.blocks:
            if how != "ours" and isinstance(block, Block):
                assert isinstance(block.attention, MultiheadAttention)
                block.attention = PlainAttention(block.attention, how)
        return model


def _made(config: Config, device: str) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    model = Model(config).to(device, DTYPES[config.dtype])
    generator = torch.Generator(device).manual_seed(0)
    return model, torch.randint(config.vocabulary, (config.batch, config.length), device=device, generator=generator)


def _gate(plain: Callable[[bool], Entry], backward: bool, dtype: str) -> Gate:
    """Held to plain attention in fp64, by what plain attention itself errs in ``dtype``; ``plain(wide)`` makes both."""
    exact = plain(True).results(backward)
    found = plain(False).results(backward)
    limits = {key: FLOOR[dtype] + SLACK * difference(x, exact[key]) for key, x in found.items()}
    return gate_by(exact, limits.__getitem__, peers_too=True)


def _facts(config: Config, family: str) -> dict[str, Any]:
    return {"family": family, "model": "Llama" if config.llama else "GPT", "dtype": config.dtype,
            "default": settings.BACKEND is None, "head_dim": config.width // config.heads, "causal": True,
            "n_keys": config.length}


def training(config: Config, device: str) -> Subject:
    """Forward, backward, and whole steps: logits of every token, gradients of every weight."""
    model, tokens = _made(config, device)
    generator = torch.Generator(device).manual_seed(1)
    dout = torch.randn(*tokens.shape, config.vocabulary, device=device, generator=generator) / config.vocabulary

    def entry(how: str, wide: bool = False) -> Entry:
        own = model.by(how)
        own = own.double() if wide else own
        return Entry(partial(own, tokens), dict(own.named_parameters()), dout.to(own.embed.weight.dtype))

    pairs = kept_pairs(config.length, config.length, Window(None, 0), 0)
    attention = config.layers * attention_flops(config.batch, config.heads, pairs, *[config.width // config.heads] * 2,
                                                products_qk=1, products_v=1)
    rows = model.embed(tokens).detach()
    return Subject(
        ("forward", "backward"), partial(entry, "ours"), {how: partial(entry, how) for how in ("sdpa", "eager")},
        _gate(partial(entry, "eager"), True, config.dtype), partial(products, matrices(model), tokens.numel(), attention),
        partial(moved, model, rows), _facts(config, "training"), tokens=tokens.numel())


def generation(config: Config, device: str, count: int) -> Subject:
    """``count`` tokens, one after another, behind a prompt that the cache holds; which tokens is given, so that all agree."""
    model, tokens = _made(config, device)
    model.eval()
    prompt, forced = tokens[:, : config.length - count], tokens[:, config.length - count :]

    def entry(how: str, wide: bool = False) -> Entry:
        own = model.by(how)
        own = own.double() if wide else own
        caches: list[Any] = [KVCache() if how == "ours" else PlainCache(config.length) for _ in range(config.layers)]
        with torch.no_grad():
            own(prompt, caches)

        def call() -> torch.Tensor:
            with torch.no_grad():
                for cache in caches:
                    cache.truncate(prompt.shape[1])
                return torch.stack([own(forced[:, i : i + 1], caches)[:, 0] for i in range(count)], 1)

        return Entry(call)

    keys = sum(range(prompt.shape[1] + 1, config.length + 1))
    attention = config.layers * attention_flops(config.batch, config.heads, keys, *[config.width // config.heads] * 2,
                                                products_qk=1, products_v=1)
    size = DTYPES[config.dtype].itemsize
    cached = 2 * config.layers * config.batch * config.kv_heads * (config.width // config.heads) * keys
    weights = sum(p.numel() for p in model.parameters() if p is not getattr(model.positions, "weight", None))
    return Subject(
        ("forward",), partial(entry, "ours"), {how: partial(entry, how) for how in ("sdpa", "eager")},
        _gate(partial(entry, "eager"), False, config.dtype),
        partial(products, matrices(model), config.batch * count, attention), lambda which: size * (count * weights + cached),
        _facts(config, "generation") | {"n_queries": 1}, tokens=config.batch * count)


def configs(device: str, smoke: bool) -> tuple[Config, ...]:
    """(GPT, Llama) of sizes that a device makes steps of in tens of milliseconds."""
    if smoke:
        return (Config(False, 1, 32, 2, 2, 64, 32, 1, 20, "fp32"), Config(True, 1, 32, 2, 1, 48, 32, 1, 20, "fp32"))
    if device == "cpu":
        return (Config(False, 2, 256, 4, 4, 1024, 512, 2, 256, "fp32"), Config(True, 2, 256, 4, 2, 704, 512, 2, 256, "fp32"))
    return (Config(False, 2, 1024, 16, 16, 4096, 2048, 8, 2048, "bf16"),
            Config(True, 2, 2048, 16, 4, 5632, 2048, 2, 4096, "bf16"))


def subjects(device: str, smoke: bool = False) -> dict[str, Callable[[], Subject]]:
    """Training and generation of both models, by name."""
    found: dict[str, Callable[[], Subject]] = {}
    for config in configs(device, smoke):
        found[f"training {config.name}"] = partial(training, config, device)
        found[f"generation {config.name}"] = partial(generation, config, device, 3 if smoke else 16)
    return found
