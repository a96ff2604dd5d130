"""An encoder-only transformer: learns code by filling gaps, then tells which package a fragment comes from.

As BERT (Devlin et al. 2018): every seventh byte or so is hidden and the model, which sees both sides, names them. Then a
classifier on the mean of its states learns, from few fragments, which package of the standard library they belong to; the
same classifier on random weights shows what pre-training gave. Fragments of the test come from files it never saw.

    python examples/masked.py
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from common import History, device, file, loss_picture, run, stdlib, summarise, train
from torch import nn

from fused_attn import viz
from fused_attn.nn import RotaryEmbedding, TransformerEncoder, TransformerEncoderLayer

MASK, WORDS, LENGTH = 256, 257, 128
PACKAGES = ("asyncio", "email", "unittest", "xml", "multiprocessing", "ctypes", "http", "importlib")


class Encoder(nn.Module):
    """Bytes [B, N] to states [B, N, width]; ``name_hidden`` to logits of what was hidden, ``classify`` to those of packages."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        block = TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True,
                                        rope=RotaryEmbedding(width // 4))
        self.blocks = TransformerEncoder(block, layers, nn.LayerNorm(width))
        for weight in self.blocks.parameters():  # the copies of a layer begin alike: draw them anew
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embed(tokens))

    def name_hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self(tokens), self.embed.weight)

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self(tokens).mean(1))


def fragments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fragments [n, N] to learn, their packages [n], and those to test): every fourth file is only tested."""
    parts: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    labels: dict[bool, list[int]] = {True: [], False: []}
    for label, package in enumerate(PACKAGES):
        for i, (_, text) in enumerate(stdlib(f"{package}/**/*.py")):
            tokens = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8).long()
            pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
            parts[i % 4 != 3].append(pieces)
            labels[i % 4 != 3] += [label] * len(pieces)
    return (torch.cat(parts[True]), torch.tensor(labels[True]), torch.cat(parts[False]), torch.tensor(labels[False]))


def main(options: argparse.Namespace) -> None:
    width, layers, steps, tuning, size = (64, 2, 400, 60, 16) if options.quick else (128, 4, 3000, 300, 32)
    learn, labels, test, truth = fragments()
    if options.quick:
        test, truth = test[::8], truth[::8]
    everything = torch.frombuffer(bytearray("".join(text for _, text in stdlib("*.py"))[:4_000_000].encode()),
                                  dtype=torch.uint8).long()

    def masked_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(bytes with gaps, what was there, or -100 where nothing was hidden)."""
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(everything) - LENGTH, (size,), generator=generator)
        tokens = everything[starts[:, None] + torch.arange(LENGTH)]
        hidden = torch.rand(tokens.shape, generator=generator) < 0.15
        return tokens.masked_fill(hidden, MASK).to(device()), tokens.masked_fill(~hidden, -100).to(device())

    def labelled_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        package = torch.randint(len(PACKAGES), (size,), generator=generator)  # every package as often
        rows = torch.stack([(labels == p).nonzero().flatten()[torch.randint(int((labels == p).sum()), (), generator=generator)]
                            for p in package])
        return learn[rows].to(device()), labels[rows].to(device())

    def tune(name: str, model: Encoder) -> History:
        return train(f"masked-{name}", model, lambda batch: F.cross_entropy(model.classify(batch[0]), batch[1]), labelled_at,
                     tuning, options.out, lr=5e-4)

    @torch.no_grad()
    def accuracy(model: Encoder) -> float:
        """Mean over packages of the part of their fragments that is recognised: guessing gives 1 / 8."""
        found = torch.cat([model.classify(rows.to(device())).argmax(-1).cpu() for rows in test.split(256)])
        return float(torch.stack([(found[truth == p] == p).double().mean() for p in range(len(PACKAGES))]).mean())

    torch.manual_seed(options.seed)
    model = Encoder(width, layers).to(device())
    histories = {"filling gaps": train("masked-gaps", model, lambda batch: F.cross_entropy(
        model.name_hidden(batch[0]).flatten(0, 1), batch[1].flatten()), masked_at, steps, options.out, lr=2e-3)}
    inputs, hidden = masked_at(10**6)
    with torch.no_grad():
        named = model.name_hidden(inputs).argmax(-1)
    right = float((named == hidden)[hidden >= 0].double().mean())
    histories["packages, pre-trained"] = tune("packages", model)
    torch.manual_seed(options.seed)
    fresh = Encoder(width, layers).to(device())
    histories["packages, from random weights"] = tune("from-scratch", fresh)
    frequencies = torch.bincount(everything).double() / len(everything)
    results = {
        "gap loss": sum(histories["filling gaps"].losses[-50:]) / 50,
        "gap loss without context": float(torch.special.entr(frequencies).sum()),
        "hidden bytes named": right, "packages, pre-trained": accuracy(model),
        "packages, from random weights": accuracy(fresh), "packages, guessing": 1 / len(PACKAGES),
    }
    for name, value in results.items():
        print(f"{name:32} {value:.3f}")
    loss_picture(histories, file(options, "loss.png"), "encoder-only: filling gaps, then telling packages")
    piece = test[len(test) // 2, :48]
    with viz.record(model) as recorded, torch.no_grad():
        model(piece[None].to(device()))
    text = [chr(byte) if byte < 128 else "?" for byte in piece.tolist()]
    viz.save(viz.layer_maps(recorded, text), file(options, "attention.png"))
    flow = viz.rollout(list(recorded.values()))[0]
    viz.save(viz.attention_map(flow, text, text, "attention rollout"), file(options, "rollout.png"))
    summarise(results, options)


if __name__ == "__main__":
    sys.exit(run(__doc__.splitlines()[0], "masked", ("gaps", "packages", "from-scratch"), ("loss", "attention", "rollout"),
                 main))
