"""One call to be measured: what is attended, how it lies in memory, and what it costs in FLOPs and bytes."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

import fused_attn
from fused_attn.call.spec import Window, attention_flops, kept_pairs

Pass = Literal["forward", "backward"]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
ROW_STRIDE = 2**24  # of layout "huge rows": 129 rows pass 2**31 elements
HEAD_STRIDE = 2**30  # of layout "huge heads": three heads do


def _packed(x: torch.Tensor) -> torch.Tensor:
    """One third of a [B, N, 3, H, D] projection."""
    batch, heads, length, dim = x.shape
    projection = x.new_empty(batch, length, 3, heads, dim)
    projection[:, :, 1] = x.transpose(1, 2)
    return projection[:, :, 1].transpose(1, 2)


def _strided(x: torch.Tensor, head_stride: int, row_stride: int) -> torch.Tensor:
    """The first batch entry of ``x`` in a buffer of its own with these strides: gigabytes, of which few pages are touched."""
    _, heads, length, dim = x.shape
    buffer = x.new_empty((heads - 1) * head_stride + (length - 1) * row_stride + dim)
    view = buffer.as_strided((1, heads, length, dim), (buffer.numel(), head_stride, row_stride, 1))
    return view.copy_(x[:1])


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bhnd": lambda x: x,
    "bnhd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed qkv": _packed,
    "columns": lambda x: x.mT.contiguous().mT,
    "odd offset": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "expanded": lambda x: x[:, :1, :, :1].expand_as(x),
    "huge rows": lambda x: _strided(x, 16, ROW_STRIDE),
    "huge heads": lambda x: _strided(x, HEAD_STRIDE, x.shape[3]),
}


@dataclass(frozen=True)
class Case:
    """One call of attention(). ``family`` groups cases in tables and plots; ``amplitude`` multiplies unit-normal queries.

    ``backend`` is named in the call; it is not part of the name, as conditions tell what answers. ``hopper``: the kernels asked
    for on a Hopper (``fused_attn.hopper``), which are not where it is "auto".
    """

    batch: int
    heads: int
    kv_heads: int
    n_queries: int
    n_keys: int
    head_dim: int
    head_dim_v: int
    dtype: str = "bf16"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    amplitude: float = 1.0
    layout: str = "bhnd"
    passes: tuple[Pass, ...] = ("forward", "backward")
    family: str = "grid"
    deterministic: bool | None = None
    backend: str | None = None
    hopper: str = "auto"

    @property
    def name(self) -> str:
        """Says everything about the case: rows of a result file are recognised by it."""
        dims = f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        heads = f"h{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        lengths = f"n{self.n_queries}" + (f"x{self.n_keys}" if self.n_keys != self.n_queries else "")
        parts = [self.dtype, dims, f"b{self.batch}", heads, lengths, "causal" if self.causal else "full"]
        parts += [f"window({self.window[0]},{self.window[1]})"] if self.window else []
        parts += [f"softcap{self.softcap:g}"] if self.softcap else []
        parts += [f"scale{self.scale:g}"] if self.scale is not None else []
        parts += [f"qx{self.amplitude:g}"] if self.amplitude != 1 else []
        parts += [] if self.deterministic is None else ["deterministic"] if self.deterministic else ["by atomics"]
        parts += [f"on {self.hopper}"] if self.hopper != "auto" else []
        return " ".join(parts + ([self.layout] if self.layout != "bhnd" else []))

    @property
    def bounds(self) -> Window:
        left, right = self.window or (None, None)
        return Window(left, 0 if self.causal else right)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of attention()."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale,
                "deterministic": self.deterministic}

    def flops(self, which: Pass) -> int:
        """Matrix FLOPs by the convention of the papers: kept pairs only, two products forward and five backward."""
        pairs = kept_pairs(self.n_queries, self.n_keys, self.bounds, self.n_keys - self.n_queries)
        qk, pv = (1, 1) if which == "forward" else (3, 2)
        return attention_flops(self.batch, self.heads, pairs, self.head_dim, self.head_dim_v, products_qk=qk, products_v=pv)

    def bytes(self, which: Pass) -> int:
        """The least that a pass can move, without the LSE: the forward q, k, v and out once, which bounds decoding; the
        backward these, dout and the three gradients."""
        queries = self.batch * self.heads * self.n_queries
        keys = self.batch * self.kv_heads * self.n_keys
        forward = (queries + keys) * (self.head_dim + self.head_dim_v)
        backward = forward + queries * (self.head_dim_v + self.head_dim) + keys * (self.head_dim + self.head_dim_v)
        return (forward if which == "forward" else backward) * DTYPES[self.dtype].itemsize

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """q, k, v and the gradients of out and lse: unit-normal, in this layout."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(heads: int, length: int, dim: int, factor: float = 1.0) -> torch.Tensor:
            dtype = torch.float64 if self.dtype == "fp64" else torch.float32
            x = torch.randn(self.batch, heads, length, dim, device=device, dtype=dtype, generator=generator)
            return LAYOUTS[self.layout]((x * factor).to(DTYPES[self.dtype]))

        q = draw(self.heads, self.n_queries, self.head_dim, self.amplitude)
        k = draw(self.kv_heads, self.n_keys, self.head_dim)
        v = draw(self.kv_heads, self.n_keys, self.head_dim_v)
        dout = draw(self.heads, self.n_queries, self.head_dim_v)
        lse_dtype = torch.float64 if self.dtype == "fp64" else torch.float32
        dlse = torch.randn(self.batch, self.heads, self.n_queries, device=device, dtype=lse_dtype, generator=generator)
        return q, k, v, dout, dlse

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: Any) -> Any:
        """The call as a user makes it."""
        with self._asked():
            return fused_attn.attention(q, k, v, **self.arguments, backend=self.backend, **extra)

    def _asked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.hopper == "auto" else fused_attn.hopper(self.hopper)

    def answered_by(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
        """The backend that answers ``attend``."""
        return fused_attn.explain(q, k, v, **self.arguments, backend=self.backend).backend

    def not_as_asked(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, tuple[str, ...]]:
        """Passes that do not run on the schedule asked for though it has kernels for them, with the reasons."""
        if self.hopper == "auto":
            return {}
        with fused_attn.hopper(self.hopper):
            told = fused_attn.explain(q, k, v, **self.arguments, backend=self.backend)
        has_backward = self.hopper == "gluon" and self.head_dim <= 128 and self.softcap is None
        return {which: reasons for which, reasons in told.against_asked.items()
                if reasons and (which == "forward" or has_backward)}

    def compiles_as(self) -> tuple[Any, ...]:
        """What a kernel is specialised on: cases that agree share their binaries. Lengths count only by 16-divisibility."""
        left, right = self.bounds
        rows = ((self.n_queries * self.head_dim) % 16, (self.n_keys * self.head_dim) % 16, (self.n_keys * self.head_dim_v) % 16)
        mod = (self.softcap, self.scale is not None and self.scale <= 0)
        return (self.dtype, self.head_dim, self.head_dim_v, self.heads // self.kv_heads, left is None, right is None, mod,
                self.layout, rows, self.deterministic, self.n_queries if self._shared or self.n_queries == 1 else 0,
                self.hopper)

    @property
    def _shared(self) -> bool:
        """Whether the forward takes the keys in splits, which has other binaries."""
        from fused_attn.plan.tiles import n_splits  # here, so that a machine without Triton can measure

        return n_splits(self.n_queries, self.n_keys, self.n_queries, self.n_keys, self.heads // self.kv_heads) > 1

    def shrunk(self) -> "Case":
        """The smallest case that compiles the same binaries."""
        from fused_attn.plan.tiles import MANY_KEYS

        group = self.heads // self.kv_heads
        keys = MANY_KEYS + (self.bounds.left or 0) if self._shared else 32
        n_queries = self.n_queries if self._shared else min(self.n_queries, 32 + self.n_queries % 16)
        return replace(self, batch=1, heads=group, kv_heads=1, n_queries=n_queries,
                       n_keys=min(self.n_keys, -(-keys // 16) * 16 + self.n_keys % 16))


def case(n: int, d: int, *, batch: int = 2, heads: int = 2, kv_heads: int | None = None, n_keys: int | None = None,
         dv: int | None = None, **rest: Any) -> Case:
    """A Case from what differs from the ordinary one."""
    return Case(batch, heads, heads if kv_heads is None else kv_heads, n, n if n_keys is None else n_keys, d,
                d if dv is None else dv, **rest)


def grid(n: int, d: int, causal: bool, *, kv_group: int = 1, **rest: Any) -> Case:
    """A member of the papers' grid: H * D = 2048 and B * N = 16384."""
    heads = 2048 // d
    return case(n, d, batch=16384 // n, heads=heads, kv_heads=heads // kv_group, causal=causal, **rest)
