"""Masks and score functions that people ask for, each a few lines of plain Python, run and drawn.

    python examples/gallery.py                 # examples-output/gallery.png and gallery.md
    python examples/gallery.py --out docs      # as docs/gallery.md has them

Every function is called through ``fused_attn.attention``, and what it does there is held to what it does by itself.
"""

import argparse
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

import fused_attn
from fused_attn import files
from fused_attn.tools import options

N = 48  # tokens, of which a picture shows each pair
HEADS = 2
DOCUMENTS = torch.tensor([0] * 12 + [1] * 20 + [2] * 16)  # of each token
WITHIN = torch.cat([torch.arange(n) for n in (12, 20, 16)])  # its position there
PREFIX = torch.tensor([14])  # tokens that all see, of each batch entry
LENGTHS = torch.tensor([37])  # tokens that are no padding
SLOPES = torch.tensor([2.0**-4, 2.0**-6])  # ALiBi's, of each head
TABLE = torch.linspace(2, -2, 16).repeat(HEADS, 1)  # of buckets of distance
ROWS, COLUMNS = torch.randn(2, HEADS, N, 8, generator=torch.Generator().manual_seed(0))  # of every token, by the other's place
TEMPERATURE = torch.tensor(0.5)
TOKENS = torch.randint(0, 6, (N,), generator=torch.Generator().manual_seed(1))
PAIRS = torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
CLUSTER = torch.tensor([3, 1, 0, 2]).repeat_interleave(12)


class Entry(NamedTuple):
    """A function of the gallery."""

    title: str
    function: Callable[..., Any]
    source: str  # where it comes from


GALLERY: list[Entry] = []


def shown(title: str, source: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts a function into the gallery."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        GALLERY.append(Entry(title, function, source))
        return function

    return put


@shown("Causal", "Vaswani et al. 2017: becomes a window, as `causal=True` is")
def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


@shown("Sliding window", "Beltagy et al. 2020, Jiang et al. 2023 (Mistral): becomes a window")
def sliding_window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 12)


@shown("Attention sinks and a window", "Xiao et al. 2023, StreamingLLM")
def streaming(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((kv_idx < 4) | (q_idx - kv_idx < 10))


@shown("Prefix", "Raffel et al. 2020, T5's prefix language model")
def prefix(b, h, q_idx, kv_idx):
    return (kv_idx < PREFIX[b]) | (q_idx >= kv_idx)


@shown("Documents side by side", "packing of several documents into one sequence")
def documents(b, h, q_idx, kv_idx):
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


@shown("Causal within documents", "positions that begin anew in every document")
def causal_documents(b, h, q_idx, kv_idx):
    return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) & (WITHIN[q_idx] >= WITHIN[kv_idx])


@shown("Lengths", "padding at the end of each batch entry")
def lengths(b, h, q_idx, kv_idx):
    return (q_idx < LENGTHS[b]) & (kv_idx < LENGTHS[b])


@shown("Dilated window", "Beltagy et al. 2020, Longformer")
def dilated(b, h, q_idx, kv_idx):
    return ((q_idx - kv_idx).abs() <= 16) & ((q_idx - kv_idx) % 4 == 0)


@shown("Strided", "Child et al. 2019, Sparse Transformers")
def strided(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((q_idx - kv_idx < 8) | (kv_idx % 8 == 7))


@shown("Global tokens and a band", "Zaheer et al. 2020, Big Bird")
def global_and_local(b, h, q_idx, kv_idx):
    return (q_idx < 3) | (kv_idx < 3) | ((q_idx - kv_idx).abs() <= 4)


@shown("Neighbourhood of an image", "Hassani et al. 2023: 5 x 5 pixels around each of 6 x 8")
def neighbourhood(b, h, q_idx, kv_idx):
    rows, columns = q_idx // 8 - kv_idx // 8, q_idx % 8 - kv_idx % 8
    return (rows.abs() <= 2) & (columns.abs() <= 2)


@shown("Windows of an image", "Liu et al. 2021, Swin: 3 x 4 pixels a window")
def windows(b, h, q_idx, kv_idx):
    return (q_idx // 8 // 3 == kv_idx // 8 // 3) & (q_idx % 8 // 4 == kv_idx % 8 // 4)


@shown("Blocks, causal among them", "block diffusion, frames of a video")
def block_causal(b, h, q_idx, kv_idx):
    return q_idx // 8 >= kv_idx // 8


@shown("One pattern a head", "global and local heads in one layer")
def by_head(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((h == 0) | (q_idx - kv_idx < 8))


@shown("Clusters", "Kitaev et al. 2020, Reformer; Roy et al. 2021")
def clusters(b, h, q_idx, kv_idx):
    return CLUSTER[q_idx] == CLUSTER[kv_idx]


@shown("Two modalities", "text that is causal, an image within it that is not")
def mixed(b, h, q_idx, kv_idx):
    image = (q_idx >= 10) & (q_idx < 26) & (kv_idx >= 10) & (kv_idx < 26)
    return image | (q_idx >= kv_idx)


@shown("ALiBi", "Press et al. 2022: slopes are learned, if they ask for a gradient")
def alibi(score, b, h, q_idx, kv_idx):
    return score + SLOPES[h] * (kv_idx - q_idx)


@shown("Softcap", "Bello et al. 2016, Gemma 2")
def softcap(score, b, h, q_idx, kv_idx):
    return 2.0 * torch.tanh(score / 2.0)


@shown("Buckets of distance", "T5's relative bias: read once a distance, never for all pairs")
def buckets(score, b, h, q_idx, kv_idx):
    distance = (q_idx - kv_idx).abs()
    return score + TABLE[h, torch.where(distance < 8, distance, 8 + torch.log2(distance / 8 + 1).long()).clamp(max=15)]


@shown("Bias by rows and columns", "Li et al. 2022, decomposed positions of images (SAM)")
def by_rows_and_columns(score, b, h, q_idx, kv_idx):
    return score + ROWS[h, q_idx, kv_idx // 8] + COLUMNS[h, q_idx, kv_idx % 8]


@shown("Softer documents", "a bias between documents in place of a mask")
def soft_documents(score, b, h, q_idx, kv_idx):
    return torch.where(DOCUMENTS[q_idx] == DOCUMENTS[kv_idx], score, score - 2.0)


@shown("A learned bias of pairs of tokens", "looked up by what both tokens are")
def pairs(score, b, h, q_idx, kv_idx):
    return score + PAIRS[TOKENS[q_idx], TOKENS[kv_idx]]


@shown("Temperature", "a tensor of no dimensions: other values compile nothing")
def temperature(score, b, h, q_idx, kv_idx):
    return score / TEMPERATURE


@shown("Recency, logarithmic", "Chi et al. 2022, KERPLE")
def recency(score, b, h, q_idx, kv_idx):
    return score - torch.log1p((q_idx - kv_idx).abs() * 0.5)


def masks(entry: Entry) -> bool:
    """Whether a function tells which pairs attend, and changes no score."""
    return len(inspect.signature(entry.function).parameters) == 4


def by_itself(entry: Entry, scores: torch.Tensor) -> torch.Tensor:
    """What a function makes of every pair, [B, H, N, N]."""
    function = entry.function
    if masks(entry):
        function = lambda score, *where: entry.function(*where)  # noqa: E731
    for level in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=(0, *level))
    return function(scores, *(torch.arange(n) for n in scores.shape))


def run(entry: Entry) -> torch.Tensor:
    """Runs a function in attention, holds it to itself, and returns what is drawn of it, [H, N, N]."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, HEADS, N, 16, dtype=torch.float64, generator=generator) for _ in range(3))
    scores = q @ k.mT / 4
    alone = by_itself(entry, scores)
    changed = scores.masked_fill(~alone, -torch.inf) if masks(entry) else alone
    want = torch.softmax(changed.to(torch.float64), -1).nan_to_num(0) @ v
    got = fused_attn.attention(q, k, v, **{"mask_mod" if masks(entry) else "score_mod": entry.function})
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    if masks(entry):
        return alone[0].float()
    drawn = by_itself(entry, torch.ones_like(scores))[0].float()
    if drawn.amin() == drawn.amax():  # which looks at the score alone: drawn of scores that rise from left to right
        drawn = by_itself(entry, torch.linspace(-6, 6, N).expand(scores.shape))[0].float()
    return drawn


def draw(columns: int = 6) -> Figure:
    """A picture of all of them: blue attends; of score functions, the brighter the more is left of a score of 1, or of scores
    that rise from left to right where a function looks at nothing else."""
    rows = -(-len(GALLERY) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.3 * rows), layout="constrained")
    for i, entry in enumerate(GALLERY):
        values, axes = run(entry), figure.add_subplot(rows, columns, i + 1)
        axes.imshow(values[-1] if entry.function is by_head else values[0], cmap="Blues" if masks(entry) else "viridis")
        axes.set_title(entry.title, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def text() -> str:
    """The gallery as a page."""
    lines = [
        "# Gallery", "",
        "Masks and score functions in plain Python, as `mask_mod=` and `score_mod=` of `fused_attn.attention`, and",
        "`fused_attn.compat.flex`, take them. `python examples/gallery.py --out docs` runs them, holds each to itself,",
        "evaluated pair by pair, and writes this page. How they work: [functions.md](functions.md).", "",
        "![Every function of this page: which pairs attend, or what is left of scores](gallery.png)", ""]
    for entry in GALLERY:
        source = textwrap.dedent(inspect.getsource(entry.function)).partition("\n")[2]
        lines += [f"**{entry.title}.** {entry.source}.", "", "```text", source.rstrip(), "```", ""]
    return "\n".join(lines)


def main() -> int:
    """Runs, draws and writes everything."""
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=options.folder, default=Path("examples-output"),
                        help="folder for gallery.png and gallery.md")

    def command(asked: argparse.Namespace) -> int:
        picture, page = asked.out / "gallery.png", asked.out / "gallery.md"
        options.writable(picture, page)
        asked.out.mkdir(parents=True, exist_ok=True)
        files.write_figure(picture, draw(), 110)
        files.write(page, text())
        print(f"{len(GALLERY)} functions, each as it is by itself: {picture}, {page}")
        return 0

    return options.run(parser, None, command)


if __name__ == "__main__":
    sys.exit(main())
