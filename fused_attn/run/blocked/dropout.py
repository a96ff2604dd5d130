"""Which weights dropout leaves, block by block: by the kernels' random numbers, or drawn from torch's generator as torch would.

``others.seed`` tells which: a number [1] is a seed of the kernels' (kernels/dropout.py); bytes are a state of torch's CPU
generator, from which torch.nn.functional.dropout would draw one number a weight [B, H, Nq, Nk], one after the other.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch

from fused_attn.reference import philox
from fused_attn.run.blocked.blocks import Block, Dense, coordinates

# From a block to what of its weights stays, [b, h, m, n]; torch's must be asked for every block, in the order of the weights.
Stays: TypeAlias = Callable[[Dense, Block], torch.Tensor]


def drawn_by_torch(batch: Dense) -> bool:
    """Whether a call draws as torch would."""
    seed = batch.others.seed
    return seed is not None and seed.dtype == torch.uint8


def of(batch: Dense) -> Stays | None:
    """What tells which weights of a batch stay, or None where all of them do."""
    p = batch.spec.dropout_p
    if p == 0:
        return None
    if p == 1:
        return lambda batch, block: batch.q.new_zeros((), dtype=torch.bool)
    return ByTorch(batch) if drawn_by_torch(batch) else _by_seed


def _by_seed(batch: Dense, block: Block) -> torch.Tensor:
    """As the kernels draw: the words of a counter are for four neighbouring keys."""
    rows = torch.arange(block.rows.start, block.rows.stop, device=batch.q.device)[:, None]
    _, keys, heads, numbers = coordinates(batch, block)
    first = block.first // 4
    quads = torch.arange(first, -(-block.stop // 4), device=keys.device)[None, :]
    words = philox(batch.others.seed, rows, quads, heads, numbers)
    threshold = min(round(batch.spec.dropout_p * 2**32), 2**32 - 1)
    return words[..., keys[0] - 4 * first] >= threshold


class ByTorch:
    """As torch draws, from the state that the call began with; what the window hides is drawn as well."""

    def __init__(self, batch: Dense) -> None:
        self._generator = torch.Generator("cpu").set_state(batch.others.seed)
        self._n_keys, self._keeps = batch.k.shape[2], 1 - batch.spec.dropout_p

    def __call__(self, batch: Dense, block: Block) -> torch.Tensor:
        m = block.rows.stop - block.rows.start
        drawn = torch.empty(m, self._n_keys, dtype=torch.uint8, device="cpu").bernoulli_(self._keeps, generator=self._generator)
        return drawn.bool()[:, block.keys][None, None]

    def leave(self) -> None:
        """Leaves torch's generator where it would stand had torch drawn."""
        torch.set_rng_state(self._generator.get_state())
