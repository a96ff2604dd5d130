"""Where a token stands: sinusoids, learned vectors, rotations, slopes and buckets."""

import math

import torch
from torch import nn

from fused_attn.mods import RelativeBias, t5_bias
from fused_attn.rotary import apply_rotary


def _placed(positions: torch.Tensor | int | None, length: int, device: torch.device) -> torch.Tensor:
    """int [N] or [B, N]: ``positions`` as they are, or counted from one (0 by default)."""
    if isinstance(positions, torch.Tensor):
        return positions
    first = positions or 0
    return torch.arange(first, first + length, device=device)


class SinusoidalPositions(nn.Module):
    """Adds the paper's sinusoids: sin(p / 10000^(2i / d)) in column 2i, the cosine in column 2i + 1.

    No parameters, no longest length: the table grows. Source: Vaswani et al. 2017, "Attention Is All You Need", 3.5.

    Args:
        embed_dim: d, even.
        dropout: of the sum, in training.
    """

    def __init__(self, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(f"embed_dim: expected a positive even int; got {embed_dim!r}")
        self.embed_dim = embed_dim
        self.dropout = nn.Dropout(dropout)
        steps = torch.arange(0, embed_dim, 2, dtype=torch.float64, device="cpu")
        self._angles = _Angles(10000.0 ** (-steps / embed_dim))

    def forward(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> torch.Tensor:
        """x [B, N, d] with its positions added: those of ``positions`` [N] or [B, N], or counted from that int on (0)."""
        cos, sin = self._angles(positions, x.shape[-2], x.device, x.dtype)
        result: torch.Tensor = self.dropout(x + torch.stack((sin, cos), -1).flatten(-2).to(x.dtype))
        return result

    def extra_repr(self) -> str:
        return f"{self.embed_dim}"


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position, as GPT-2 and BERT do.

    Args:
        max_length: how many positions there are.
        embed_dim: d.
    """

    def __init__(self, max_length: int, embed_dim: int, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the vectors from N(0, 0.02^2), as GPT-2."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> torch.Tensor:
        """x [B, N, d] with its positions added, as in ``SinusoidalPositions``."""
        last = x.shape[-2] + positions if isinstance(positions, int) else x.shape[-2]
        if not isinstance(positions, torch.Tensor) and last > self.max_length:
            raise ValueError(f"x: expected positions below {self.max_length}; got a length that ends at {last}")
        result: torch.Tensor = x + self.weight[_placed(positions, x.shape[-2], x.device)]
        return result

    def extra_repr(self) -> str:
        return f"{self.max_length}, {self.weight.shape[1]}"


class _Angles:
    """Cosine and sine of position times frequency, [positions, pairs], computed in fp64 and kept for each device.

    No buffer of a module, since ``module.bfloat16()`` would round it, and position 1000 would stand elsewhere.
    """

    def __init__(self, frequencies: torch.Tensor) -> None:
        self.frequencies = frequencies
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._moved: dict[torch.device, torch.Tensor] = {}

    def __call__(self, positions: torch.Tensor | int | None, length: int, device: torch.device,
                 like: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [N, pairs] or [B, N, pairs], in fp32, or fp64 beside fp64."""
        dtype = torch.float64 if like == torch.float64 else torch.float32
        if isinstance(positions, torch.Tensor):  # no look at how large they are
            angles = positions.to(torch.float64)[..., None] * self._on(device)
            return angles.cos().to(dtype), angles.sin().to(dtype)
        first = positions or 0
        stop = first + length
        table = self._tables.get((device, dtype))
        if table is None or table[0].shape[0] < stop:
            rows = max(stop, 2 * (0 if table is None else table[0].shape[0]), 256)
            with torch.inference_mode(False):  # a table outlives the call that made it
                angles = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] * self.frequencies
                table = (angles.cos().to(device, dtype), angles.sin().to(device, dtype))
            self._tables[device, dtype] = table
        return table[0][first:stop], table[1][first:stop]

    def _on(self, device: torch.device) -> torch.Tensor:
        """The frequencies on a device, moved there once: a CUDA graph may be recording."""
        if device not in self._moved:
            with torch.inference_mode(False):
                self._moved[device] = self.frequencies.to(device)
        return self._moved[device]

    def __deepcopy__(self, memo: object) -> "_Angles":
        return self  # copies of a layer share their tables

    def __getstate__(self) -> dict[str, object]:
        return {"frequencies": self.frequencies, "_tables": {}, "_moved": {}}


class RotaryEmbedding(nn.Module):
    """Rotary positions of queries and keys, by the fused kernel on a GPU.

    Args:
        dim: how many columns turn, even; those of a head beyond it pass through (partial rotary).
        base: the slowest of the frequencies base^(-2i / dim) is about 1 / base.
        interleaved: pairs are neighbouring columns (GPT-J) instead of halves (GPT-NeoX, Llama).
        frequencies: [dim / 2], radians a position, instead of those of ``base``: for scaled contexts.

    Source: Su et al. 2021, "RoFormer".
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False,
                 frequencies: torch.Tensor | None = None) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: expected a positive even int; got {dim!r}")
        if frequencies is None:
            frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        if frequencies.shape != (dim // 2,):
            raise ValueError(f"frequencies: expected shape ({dim // 2},); got {tuple(frequencies.shape)}")
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self._angles = _Angles(frequencies.detach().to("cpu", torch.float64))

    def forward(self, q: torch.Tensor, k: torch.Tensor,
                positions: torch.Tensor | int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, H, N, D] and k [B, Hkv, N, D], turned; ``positions`` [N] or [B, N], or counted from that int on (0)."""
        cos, sin = self._angles(positions, q.shape[2], q.device, q.dtype)
        return (apply_rotary(q, cos, sin, interleaved=self.interleaved),
                apply_rotary(k, cos, sin, interleaved=self.interleaved))

    def turn(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> torch.Tensor:
        """One of the two, where they stand elsewhere."""
        cos, sin = self._angles(positions, x.shape[2], x.device, x.dtype)
        return apply_rotary(x, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}{', interleaved=True' if self.interleaved else ''}"


def alibi_slopes(heads: int) -> torch.Tensor:
    """fp32 [heads]: a geometric sequence from 2^(-8 / heads); between powers of two, every other of the next one's.

    Source: Press et al. 2021, "Train Short, Test Long".
    """
    if heads < 1:
        raise ValueError(f"heads: expected at least 1; got {heads!r}")
    whole = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


class Slopes:
    """``alibi_slopes`` of a number of heads, kept for each device."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._tables: dict[torch.device, torch.Tensor] = {}

    def __call__(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            with torch.inference_mode(False):  # they outlive the call that made them
                self._tables[device] = alibi_slopes(self.heads).to(device)
        return self._tables[device]

    def __deepcopy__(self, memo: object) -> "Slopes":
        return self

    def __getstate__(self) -> dict[str, object]:
        return {"heads": self.heads, "_tables": {}}


class T5RelativeBias(nn.Module):
    """T5's bias by bucketed distance: ``attention(q, k, v, bias=T5RelativeBias(...)(Nq, Nk), scale=1)``.

    The parameter is ``weight`` [buckets, H], as in a T5 checkpoint's ``relative_attention_bias``. Neither the bias nor its
    gradient is ever held as Nq x Nk. Source: Raffel et al. 2020.

    Args:
        heads: H.
        num_buckets, max_distance: as in T5's configuration (``relative_attention_num_buckets``, ``..._max_distance``).
        bidirectional: half of the buckets for keys after the query; False in decoders.
    """

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table from N(0, 0.02^2)."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, n_queries: int, n_keys: int) -> RelativeBias:
        """The bias of ``n_queries`` queries, the last of which stands at the last of ``n_keys`` keys."""
        return t5_bias(self.weight, n_queries, n_keys, bidirectional=self.bidirectional, max_distance=self.max_distance)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_buckets={self.weight.shape[0]}, bidirectional={self.bidirectional}"
