"""Real text that every machine has: the source of Python's own standard library, as bytes."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

VALIDATION_PART = 0.1
MIN_BYTES = 50_000


class DemoError(Exception):
    """What ends a demo with one message and no traceback."""


@dataclass(frozen=True)
class Corpus:
    """A text as byte tokens (uint8), split once: the head for training, the tail for validation."""

    train: torch.Tensor
    validation: torch.Tensor
    files: int


def split(text: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """The first nine tenths and the last tenth of a text."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    start = len(tokens) - int(len(tokens) * VALIDATION_PART)
    return tokens[:start], tokens[start:]


def load(max_bytes: int, folder: Path | None = None) -> Corpus:
    """The first ``max_bytes`` of the top-level modules of ``folder`` (default: the standard library), in order of name.

    Raises DemoError where there is too little readable source: some embedded Pythons ship only compiled modules.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    texts: list[bytes] = []
    room = max_bytes
    for path in sorted(folder.glob("*.py")):
        if not room:
            break
        try:
            texts.append(path.read_bytes()[:room])
        except OSError:
            continue
        room -= len(texts[-1])
    text = b"".join(texts)
    if len(text) < MIN_BYTES:
        raise DemoError(f"training needs {MIN_BYTES} bytes of text; the readable *.py files in {folder} hold {len(text)}")
    return Corpus(*split(text), files=len(texts))


def unigram_entropy(tokens: torch.Tensor) -> float:
    """-sum p log p in nats over the frequencies of ``tokens``: the least loss on them of a model that ignores the context."""
    p = torch.bincount(tokens).double() / len(tokens)
    return float(torch.special.entr(p).sum())


def windows(tokens: torch.Tensor, starts: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, context], the targets one token further on, of the windows at ``starts`` [B]."""
    chunk = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return chunk[:, :-1], chunk[:, 1:]


def batches(tokens: torch.Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields random windows forever, in an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield windows(tokens, torch.randint(len(tokens) - context, (batch,), generator=generator), context)
