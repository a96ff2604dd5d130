"""A decoder-only transformer: pre-trained on code, fine-tuned on prose, and asked to write.

Bytes of Python's standard library first, then the language reference that ships with it (pydoc's topics). What pre-training
is worth is measured: the same steps of fine-tuning from random weights end at a higher loss. The model is a stack of
``fused_attn.nn.TransformerEncoderLayer`` made causal, with rotary positions and two key heads for four query heads; it writes
token by token with a cache.

    python examples/gpt.py
"""

import argparse
import sys
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from common import History, device, file, loss_picture, run, stdlib, summarise, train
from torch import nn

from fused_attn import viz
from fused_attn.nn import RotaryEmbedding, TransformerEncoder, TransformerEncoderLayer, stream

CONTEXT = 128


class GPT(nn.Module):
    """Bytes [B, N] to logits [B, N, 256] of the next ones."""

    def __init__(self, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        block = TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False,
            causal=True, num_kv_heads=heads // 2, rope=RotaryEmbedding(width // heads))
        self.blocks = TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for weight in self.blocks.parameters():  # the copies of a layer begin alike: draw them anew
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def new_cache(self):
        return self.blocks.new_cache()

    def forward(self, tokens, cache=None, padding=None):
        x = self.blocks(self.embed(tokens), src_key_padding_mask=padding, cache=cache)
        return F.linear(x, self.embed.weight)  # tied, as in GPT-2


class Text:
    """A text as bytes, its last tenth held out."""

    def __init__(self, text: str) -> None:
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        self.train, self.held = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]

    @staticmethod
    def windows(tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return tokens[starts[:, None] + torch.arange(CONTEXT + 1)].to(device())

    def batch_at(self, step: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        return self.windows(self.train, torch.randint(len(self.train) - CONTEXT, (size,), generator=generator))

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Of 64 windows of the held-out tenth, in nats a byte."""
        starts = torch.linspace(0, len(self.held) - CONTEXT - 1, 64).long()
        return float(loss(model, self.windows(self.held, starts)))


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def fit(name: str, model: nn.Module, text: Text, steps: int, options, lr: float) -> History:
    return train(f"{options.program}-{name}", model, lambda tokens: loss(model, tokens), lambda step: text.batch_at(step, 16),
                 steps, options.out, lr=lr)


def write(model: nn.Module, prompt: str, count: int) -> str:
    """Continues a prompt, byte by byte as they are drawn."""
    written = prompt.encode()
    tokens = torch.tensor([list(written)], device=device())
    print(prompt, end="")
    for drawn in stream(model, tokens, count, temperature=0.7, top_p=0.95):
        byte = bytes([int(drawn)])
        written += byte
        sys.stdout.write(byte.decode("ascii", errors="replace"))
        sys.stdout.flush()
    print()
    return written.decode("utf-8", errors="replace")


def main(options: argparse.Namespace) -> None:
    width, layers, steps, tuning, count = (64, 2, 150, 60, 80) if options.quick else (128, 4, 2000, 500, 400)
    code = Text("".join(text for _, text in stdlib("*.py"))[:4_000_000])
    prose = Text("\n\n".join(topics.values()))
    torch.manual_seed(options.seed)
    model = GPT(width, layers).to(device())
    histories = {"code (pre-training)": fit("pre-train", model, code, steps, options, 2e-3)}
    losses = {"code, pre-trained": code.loss(model), "prose, before fine-tuning": prose.loss(model)}
    histories["prose (fine-tuning)"] = fit("fine-tune", model, prose, tuning, options, 1e-3)
    losses["prose, fine-tuned"] = prose.loss(model)
    torch.manual_seed(options.seed)
    fresh = GPT(width, layers).to(device())
    histories["prose, from random weights"] = fit("from-scratch", fresh, prose, tuning, options, 1e-3)
    losses["prose, from random weights"] = prose.loss(fresh)
    for name, value in losses.items():
        print(f"{name:28} {value:.3f} nats a byte")
    loss_picture(histories, file(options, "loss.png"), "decoder-only: pre-training and fine-tuning")
    torch.manual_seed(options.seed)
    sample = write(model, "The statement ", count)
    prompt = "def load(self, path):\n    with open(path) as"
    with viz.record(model) as recorded, torch.no_grad():
        model(torch.tensor([list(prompt.encode())], device=device()))
    viz.save(viz.layer_maps(recorded, list(prompt)), file(options, "attention.png"))
    summarise({"losses": losses, "sample": sample}, options)


if __name__ == "__main__":
    sys.exit(run(__doc__.splitlines()[0], "gpt", ("pre-train", "fine-tune", "from-scratch"), ("loss", "attention"), main))
