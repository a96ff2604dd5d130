"""A whole GPT: pre-norm, learned positions, GELU MLP, tied embeddings. Its attention is the one argument that varies."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

import fused_attn

Attend = Callable[..., torch.Tensor]  # attend(q, k, v, causal=True), all [B, H, N, D]


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT; ``width`` is split evenly among the heads."""

    vocab_size: int = 256
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128


class SelfAttention(nn.Module):
    """Causal multi-head self-attention, x [B, N, width] to [B, N, width]."""

    def __init__(self, config: GPTConfig, attend: Attend) -> None:
        super().__init__()
        self.heads = config.heads
        self.attend = attend
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, each [B, H, N, D]: views of one matrix, which the kernels read as they lie."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.attend(*self.project(x), causal=True)  # [B, H, N, D]
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, attend: Attend) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config, attend)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens [B, N], N <= context, to the logits [B, N, vocab_size] of each next token."""

    def __init__(self, config: GPTConfig, attend: Attend = fused_attn.attention) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # as in GPT-2: what a block adds to the residual stream starts smaller in deeper models
                adds = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5 if adds else 0.02)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads, [B, N, width]."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token_embedding.weight)

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, count: int, temperature: float, generator: torch.Generator) -> torch.Tensor:
        """``tokens`` [1, N] continued by ``count`` sampled ones; every step reads the last ``context`` tokens anew."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.context :])[:, -1].cpu() / temperature
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, token.to(tokens.device)), dim=1)
        return tokens

    @torch.no_grad()
    def attention_weights(self, tokens: torch.Tensor) -> torch.Tensor:
        """The attention of every layer by a plain causal softmax, [layers, B, H, N, N]: what a fused kernel never stores."""
        x, weights = self.embed(tokens), []
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        for block in cast(Iterable[Block], self.blocks):
            q, k, _ = block.attention.project(block.norm1(x))
            scores = q @ k.mT / q.shape[-1] ** 0.5
            weights.append(scores.masked_fill(future, float("-inf")).softmax(-1))
            x = block(x)
        return torch.stack(weights)
