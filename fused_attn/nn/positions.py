"""Where a token stands: sinusoids, learned vectors, rotations, slopes and buckets.

Nothing here is kept from call to call: angles and slopes are computed in the graph that uses them, on its device, for the
positions of that call. So they are right where a module is traced, exported or run on FakeTensors, for any length, and whatever
dtype the module was cast to. A stack computes them once for all of its layers (``PositionEmbeddings``), so they cost next to
nothing.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fused_attn.call.mods import RelativeBias, check_buckets, t5_bias
from fused_attn.nn.masks import readable
from fused_attn.rotary import apply_rotary

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos, sin: [N, pairs] or [B, N, pairs]


class PositionEmbeddings:
    """The rotations and slopes of one forward pass, for all layers of a stack that have the same ones.

    ``MultiheadAttention.position_embeddings`` makes them. They are no tuple, since wrappers that cast the inputs of a layer,
    such as FSDP's mixed precision, would round the tensors in one.

    Attributes:
        rotation: (cos, sin), as ``RotaryEmbedding.angles`` gives them, or None.
        slopes: fp32 [H] of ALiBi, or None.
        kind: ``MultiheadAttention.position_kind`` of the modules that they are for.
    """

    def __init__(self, rotation: Rotation | None, slopes: torch.Tensor | None, kind: tuple[Any, ...]) -> None:
        self.rotation, self.slopes, self.kind = rotation, slopes, kind


def _checked(positions: Any, x: torch.Tensor) -> torch.Tensor | int:
    """``positions`` of the N rows of x [..., N, d]: int64 [N] or [B, N], or the position of the first, 0 by default."""
    if positions is None:
        return 0
    length = x.shape[-2]
    if isinstance(positions, torch.Tensor):
        whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
        if whole and (positions.dim() == 0 or (positions.dim() == 1 and positions.shape[0] == length)):
            return positions.long()
        if whole and positions.dim() == 2 and x.dim() > 2 and positions.shape[1] == length and positions.shape[0] in (
                1, x.shape[0]):
            return positions.long()
        came = f"{positions.dtype} of shape {tuple(positions.shape)}"
    elif isinstance(positions, (numbers.Integral, torch.SymInt)) and not isinstance(positions, bool):
        if isinstance(positions, numbers.Integral) and abs(int(positions)) >= 2**53:  # more than fp64 angles tell apart
            raise ValueError(f"positions: expected an int below 2**53; got {positions}")
        return positions  # type: ignore[return-value]
    else:
        came = repr(positions)
    batches = f" or [{x.shape[0]}, {length}]" if x.dim() > 2 else ""
    raise (ValueError if isinstance(positions, torch.Tensor) else TypeError)(
        f"positions: expected an int, or integers [{length}]{batches}; got {came}")


def _plus(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """x [B, ..., N, d] or [N, d] plus vectors [N, d] or [B, N, d]."""
    if vectors.dim() == 3 and x.dim() > 3:
        vectors = vectors.unflatten(0, (-1, *(1,) * (x.dim() - 3)))
    return x + vectors.to(x.dtype)


def _check_width(x: torch.Tensor, width: int) -> None:
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[-1] != width:
        raise ValueError(f"x: expected [..., length, {width}]; got {tuple(getattr(x, 'shape', ())) or x!r}")


def _in_fp64(device: torch.device) -> torch.device:
    """The device on which fp64 is computed for ``device``: the same one, unless it has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device


def _geometric(base: float, dim: int, device: torch.device) -> torch.Tensor:
    """Frequencies base^(-2i / dim), fp64 [dim / 2]."""
    return base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / -dim)


def _angles(positions: torch.Tensor | int, length: int, frequencies: torch.Tensor, like: torch.Tensor) -> Rotation:
    """(cos, sin) of position times frequency, each [N, pairs] or [B, N, pairs], in fp32, or fp64 for fp64 ``like``.

    The angle is fp64: in fp32 position 100000 would be off by 0.004.
    """
    if isinstance(positions, torch.Tensor) and positions.dim():
        at = positions.to(frequencies.device, torch.float64)
    else:
        at = torch.arange(length, dtype=torch.float64, device=frequencies.device) + positions
    angles = at[..., None] * frequencies
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angles.cos().to(like.device, dtype), angles.sin().to(like.device, dtype)


class SinusoidalPositions(nn.Module):
    """Adds the paper's sinusoids: sin(p / 10000^(2i / d)) in column 2i, the cosine in column 2i + 1.

    It has no parameters and no longest length. Source: Vaswani et al. 2017, "Attention Is All You Need", 3.5.

    Args:
        embed_dim: d, even.
        dropout: of the sum, in training.
    """

    def __init__(self, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_dim = _even("embed_dim", embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> torch.Tensor:
        """x [B, N, d] with its positions added: ``positions`` are [N] or [B, N], or the int to count from, 0 by default."""
        _check_width(x, self.embed_dim)
        frequencies = _geometric(10000.0, self.embed_dim, _in_fp64(x.device))
        cos, sin = _angles(_checked(positions, x), x.shape[-2], frequencies, x)
        result: torch.Tensor = self.dropout(_plus(x, torch.stack((sin, cos), -1).flatten(-2)))
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
        """x [B, N, d] with its positions added, as in ``SinusoidalPositions``; they must lie from 0 to below ``max_length``."""
        _check_width(x, self.weight.shape[1])
        positions = _checked(positions, x)
        given = isinstance(positions, torch.Tensor)
        if not given and positions < 0:
            raise ValueError(f"positions: expected 0 or more; got {positions}")
        if not given and x.shape[-2] + positions > self.max_length:
            raise ValueError(f"x: expected positions below {self.max_length}; "
                             f"got a length that ends at {x.shape[-2] + positions}")
        if not isinstance(positions, torch.Tensor) or not positions.dim():
            positions = torch.arange(x.shape[-2], device=x.device) + positions
        if given and readable(positions) and bool(((positions < 0) | (positions >= self.max_length)).any()):
            raise ValueError(f"positions: expected 0 to {self.max_length - 1}; got {positions.min()} to {positions.max()}")
        if given:  # negative ones, which would count from the end, become an error on every device, compiled or not
            positions = torch.where(positions < 0, self.max_length, positions)
        return _plus(x, self.weight[positions])

    def extra_repr(self) -> str:
        return f"{self.max_length}, {self.weight.shape[1]}"


def _even(name: str, size: Any) -> int:
    if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 2 or size % 2:
        raise ValueError(f"{name}: expected a positive even int; got {size!r}")
    return int(size)


class RotaryEmbedding(nn.Module):
    """Rotary positions of queries and keys, by the fused kernel on a GPU.

    Args:
        dim: how many columns turn, even; those of a head beyond it pass through (partial rotary).
        base: the slowest of the frequencies base^(-2i / dim) is about 1 / base.
        interleaved: pairs are neighbouring columns (GPT-J) instead of columns of the two halves (GPT-NeoX, Llama).
        frequencies: [dim / 2], radians a position, instead of those of ``base``: for scaled contexts.

    Source: Su et al. 2021, "RoFormer".
    """

    _given: torch.Tensor | None

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False,
                 frequencies: torch.Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = _even("dim", dim), base, interleaved
        if not isinstance(base, numbers.Real) or not 0 < base < math.inf:
            raise ValueError(f"base: expected a positive finite number; got {base!r}")
        if frequencies is not None and (not isinstance(frequencies, torch.Tensor) or frequencies.is_meta):
            raise TypeError(f"frequencies: expected a tensor with values, or None; got {frequencies!r}")
        if frequencies is not None and (frequencies.is_complex() or frequencies.shape != (dim // 2,)):
            raise ValueError(f"frequencies: expected real numbers of shape ({dim // 2},); got {frequencies.dtype} of shape "
                             f"{tuple(frequencies.shape)}")
        self.frequencies: tuple[float, ...] | None = None if frequencies is None else tuple(frequencies.tolist())
        if not all(math.isfinite(x) for x in self.frequencies or ()):
            raise ValueError(f"frequencies: expected finite numbers; got {self.frequencies}")
        self._keep(torch.device("cpu"))

    def _keep(self, device: torch.device) -> None:
        """Keeps given frequencies in a buffer on the module's device, which CUDA graphs may record, and in no checkpoint."""
        given = None if self.frequencies is None else torch.tensor(self.frequencies, dtype=torch.float64, device=device)
        self.register_buffer("_given", given, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RotaryEmbedding":
        """Moves the frequencies with the module, and restores what ``bfloat16()`` rounds and ``to_empty()`` loses."""
        super()._apply(fn, recurse)
        if self._given is not None:
            self._keep(self._given.device)
        return self

    @property
    def kind(self) -> tuple[Any, ...]:
        """What embeddings with the same angles have in common."""
        return self.dim, self.base, self.frequencies

    def angles(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> Rotation:
        """(cos, sin) of the N rows of x [..., N, D], as ``apply_rotary`` takes them; ``positions`` as in ``forward``.

        They may be computed once and given to every layer. They are fp32 whatever x is, except fp64 where x is fp64.
        """
        device = _in_fp64(x.device)
        frequencies = _geometric(self.base, self.dim, device) if self._given is None else self._given.to(device)
        return _angles(_checked(positions, x), x.shape[-2], frequencies, x)

    def forward(self, q: torch.Tensor, k: torch.Tensor,
                positions: torch.Tensor | int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, H, N, D] and k [B, Hkv, N, D], turned; ``positions`` are [N] or [B, N], or the int to count from (0)."""
        cos, sin = self.angles(q, positions)
        return (apply_rotary(q, cos, sin, interleaved=self.interleaved),
                apply_rotary(k, cos, sin, interleaved=self.interleaved))

    def turn(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> torch.Tensor:
        """x, one of q and k, turned; for calls in which their positions differ."""
        return apply_rotary(x, *self.angles(x, positions), interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}{', interleaved=True' if self.interleaved else ''}"


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """ALiBi's slopes, fp32 [heads]: a geometric sequence from 2^(-8 / heads).

    Where ``heads`` is no power of two, it is the sequence of the power below, then every other slope of the power above.
    Source: Press et al. 2021, "Train Short, Test Long".
    """
    if not isinstance(heads, numbers.Integral) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"heads: expected at least 1; got {heads!r}")
    device = torch.device(device)
    whole = 1 << int(heads).bit_length() - 1

    def steps(stop: int, step: int, by: float) -> torch.Tensor:
        return torch.arange(1, stop, step, dtype=torch.float64, device=_in_fp64(device)) * by

    exponents = steps(whole + 1, 1, -8 / whole)
    if heads > whole:
        exponents = torch.cat((exponents, steps(2 * (heads - whole), 2, -4 / whole)))
    return exponents.exp2().to(device, torch.float32)


class T5RelativeBias(nn.Module):
    """T5's bias by bucketed distance: ``attention(q, k, v, bias=T5RelativeBias(...)(Nq, Nk), scale=1)``.

    The parameter is ``weight`` [buckets, H], as in a T5 checkpoint's ``relative_attention_bias``. Neither the bias nor its
    gradient is ever held as Nq x Nk. Source: Raffel et al. 2020.

    Args:
        heads: H.
        num_buckets, max_distance: as in T5's configuration (``relative_attention_num_buckets``, ``..._max_distance``).
        bidirectional: half of the buckets are for keys after the query; False in decoders.
    """

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_buckets(num_buckets, bidirectional, max_distance, "num_buckets")
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
