"""The vocabulary in which a call is described once and carried everywhere: frozen, hashable, and free of Triton."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch


class Window(NamedTuple):
    """Key k is kept for query position q when ``q - left <= k <= q + right``; None leaves that side open."""

    left: int | None = None
    right: int | None = None


class Member(NamedTuple):
    """A score mod or mask mod of a call: its ``mods.Code``, what its arguments are, in order, and its ``mods.Plain``, or None.

    An argument is ``TENSOR`` or ``RELATIVE`` (the next of the call's operands) or the text of a number. Whatever holds a
    member keeps its functions alive.
    """

    code: Any
    args: tuple[str, ...]
    reference: Any = None


TENSOR, RELATIVE = "tensor", "relative"


class Longest(NamedTuple):
    """Queries and keys of the longest packed sequences."""

    queries: int
    keys: int


class AttentionSpec(NamedTuple):
    """Everything about a call that is not a tensor.

    ``bottom_right`` aligns the last query with the last key (query i stands at position i + Nk - Nq); otherwise the first
    ones are aligned. ``softcap`` is the cap of ``cap * tanh(score / cap)``, or None. ``score_mods`` act in their order, after
    the softcap; a pair attends where every one of ``mask_mods`` keeps it. ``fp32_precision`` None follows torch. ``longest``
    is None for a dense batch. Unless ``deterministic``, dQ may be summed in any order. ``hopper`` names the kernels asked for
    on sm_90 (``fused_attn.hopper``), for both passes. ``blocked``: by blocks in plain PyTorch, and not by the kernels; then
    ``with_lse`` tells whether anyone sees the LSE. The ops take these fields as arguments (``schema``).
    """

    scale: float
    window: Window = Window()
    bottom_right: bool = True
    softcap: float | None = None
    score_mods: tuple[Member, ...] = ()
    mask_mods: tuple[Member, ...] = ()
    dropout_p: float = 0.0
    precise: bool = False
    fp32_precision: str | None = None
    longest: Longest | None = None
    deterministic: bool = True
    hopper: str = "auto"
    blocked: bool = False
    with_lse: bool = True

    def offset(self, n_queries: int, n_keys: int) -> int:
        """Position of query 0 among the keys."""
        return n_keys - n_queries if self.bottom_right else 0


MaybeTensor: TypeAlias = Any  # a tensor or None; code that reads one knows which


class OtherTensors(NamedTuple):
    """The tensors of a call beside q, k and v, None where it has none.

    sinks [H]; score_weight [H, D], of an additive score, its heads perhaps expanded; seed [1] int64, of dropout, or the bytes
    of a state of torch's CPU generator (run/blocked/dropout.py); cu_q and cu_k [B + 1] int32, where packed sequences start;
    used_q and used_k [B], how many of their rows count (used_k alone: key lengths of a dense batch); operands: the tensors of
    the mods, in order, each [B', H', Nq', Nk'] with full or single extents, or [B', H', Nq + Nk - 1] for values by k - q.
    """

    sinks: MaybeTensor = None
    score_weight: MaybeTensor = None
    seed: MaybeTensor = None
    cu_q: MaybeTensor = None
    cu_k: MaybeTensor = None
    used_q: MaybeTensor = None
    used_k: MaybeTensor = None
    operands: tuple[torch.Tensor, ...] = ()

    def flat(self) -> tuple[Any, ...]:
        """The single tensors, then the operands: the form in which an autograd Function takes them."""
        *single, operands = self
        return (*single, *operands)

    @classmethod
    def of(cls, flat: Iterable[Any]) -> "OtherTensors":
        """The inverse of ``flat``, also for what stands for each tensor, such as its gradient."""
        rest = iter(flat)
        return cls(*[tuple(rest) if field == "operands" else next(rest) for field in cls._fields])


NO_OTHERS = OtherTensors()


@dataclass(frozen=True)
class TileConfig:
    """How a kernel is cut into tiles and compiled for one target."""

    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int  # depth of the software pipeline
    wide: bool = False  # 64-bit offsets inside a tile
    edge_stages: int | None = None  # pipeline depth of the masked loop, where another one saves registers
    disable_licm: bool = False  # keeps loop-invariant values from being held in registers
    separate: bool = False  # dK and dV by a launch each, where the sums of both do not fit the registers
    descriptors: bool = False  # queries, keys and values through tensor descriptors, which are TMA on sm_90
    specialize: bool = False  # and Triton gives loads and products warps of their own
    single_atomics: bool = False  # a float a lane, side by side, where the target has no atomics of several
    fenced: bool = False  # proxy fences that Triton leaves out are put in; launching sets it
    options: tuple[tuple[str, int], ...] = ()  # further compiler options of the target

    @property
    def words(self) -> str:
        """In one line: ``128x64 w8 s2 edge1 wide nolicm``. Not ``__str__``, by which Triton tells kernels apart."""
        words = [f"{self.block_m}x{self.block_n}", f"w{self.num_warps}", f"s{self.num_stages}"]
        if self.edge_stages is not None:
            words.append(f"edge{self.edge_stages}")
        words += ["wide"] * self.wide + ["nolicm"] * self.disable_licm + ["separate"] * self.separate
        words += ["descriptors"] * self.descriptors + ["specialized"] * self.specialize
        words += ["single"] * self.single_atomics
        return " ".join([*words, *(f"{name}={value}" for name, value in self.options)])


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for beside its tiles, one compile-time argument; kernels that need to know more add fields."""

    group: int  # query heads to a key head
    dim: int  # of queries and keys
    dim_v: int
    acc: Any  # Triton's type of the softmax state and of every sum
    precision: str = "ieee"  # of fp32 products


def kept_pairs(n_queries: int, n_keys: int, window: Window, offset: int) -> int:
    """How many (query, key) pairs a window keeps: what FLOPs are counted by."""
    left, right = window
    stop = n_keys * n_queries if right is None else _clamped_sum(offset + right + 1, n_queries, n_keys)
    start = 0 if left is None else _clamped_sum(offset - left, n_queries, n_keys)
    return stop - start


def _clamped_sum(first: int, count: int, cap: int) -> int:
    """Sum of min(max(x, 0), cap) over the ``count`` integers from ``first`` on."""

    def up_to(x: int) -> int:
        below = max(0, min(x, cap))
        return below * (below + 1) // 2 + cap * max(0, x - cap)

    return up_to(first + count - 1) - up_to(first - 1)


def attention_flops(batch: int, heads: int, pairs: int, head_dim: int, head_dim_v: int, *,
                    products_qk: int, products_v: int) -> int:
    """FLOPs of matrix products over ``pairs`` kept pairs a head: ``products_qk`` of depth D, ``products_v`` of depth Dv.

    Forward: 1 and 1. Backward, counted as five products whatever a kernel recomputes: 3 (S, dQ, dK) and 2 (dP, dV).
    """
    return 2 * batch * heads * pairs * (products_qk * head_dim + products_v * head_dim_v)
