"""Every case of every stage in one registry: what is attended, how it lies in memory, and what it costs in FLOPs."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

import fused_attn
from fused_attn.spec import Window, attention_flops, kept_pairs
from fused_attn.tuning import MANY_KEYS, n_shares

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


def _asked(q: torch.Tensor) -> dict[str, Any]:
    return {"backend": "triton"} if q.device.type == "cpu" else {}


@dataclass(frozen=True)
class Case:
    """One call of attention(). ``family`` groups cases in tables and plots; ``amplitude`` multiplies unit-normal queries."""

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
        parts += ["fused backward"] if self.deterministic is False else []
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

    @property
    def bytes_forward(self) -> int:
        """The least a forward can move: q, k, v and out once. What bounds decoding."""
        queries = self.batch * self.heads * self.n_queries * (self.head_dim + self.head_dim_v)
        keys = self.batch * self.kv_heads * self.n_keys * (self.head_dim + self.head_dim_v)
        return (queries + keys) * DTYPES[self.dtype].itemsize

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
        """The call as a user makes it; on CPU tensors, where the kernels are no default, they are asked for."""
        return fused_attn.attention(q, k, v, **self.arguments, **_asked(q), **extra)

    def backend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
        """The backend that answers ``attend``."""
        return fused_attn.explain(q, k, v, **self.arguments, **_asked(q)).backend

    def compiles_as(self) -> tuple[Any, ...]:
        """What a kernel is specialised on: cases that agree share their binaries. Lengths count only by 16-divisibility."""
        left, right = self.bounds
        rows = ((self.n_queries * self.head_dim) % 16, (self.n_keys * self.head_dim) % 16, (self.n_keys * self.head_dim_v) % 16)
        mod = (self.softcap, self.scale is not None and self.scale <= 0)
        return (self.dtype, self.head_dim, self.head_dim_v, self.heads // self.kv_heads, left is None, right is None, mod,
                self.layout, rows, self.deterministic, self._shared and self.n_queries)

    @property
    def _shared(self) -> bool:
        """Whether the forward takes the keys in shares: other binaries."""
        return n_shares(self.n_queries, self.n_keys, self.n_queries, self.n_keys, self.heads // self.kv_heads) > 1

    def shrunk(self) -> "Case":
        """The smallest case that compiles the same binaries."""
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


def timing_cases(smoke: bool = False) -> list[Case]:
    """The most informative first: a run that is cut short has measured what matters."""
    if smoke:
        return [case(48, 16, batch=1, causal=True), case(40, 16, batch=1, softcap=20.0, family="softcap"),
                case(1, 16, batch=1, heads=4, kv_heads=2, n_keys=70, passes=("forward",), family="decode")]
    first = [grid(n, d, causal) for n in (4096, 16384) for d in (128, 64) for causal in (True, False)]
    fused = [replace(c, family="fused backward", deterministic=False, passes=("backward",)) for c in first]
    wide = [grid(n, 256, causal) for n in (4096, 16384) for causal in (True, False)]
    features = [
        grid(4096, 128, True, window=(1024, None), family="window"),
        grid(16384, 128, True, window=(1024, None), family="window"),
        case(4096, 128, batch=4, heads=32, kv_heads=8, causal=True, family="gqa"),
        case(16384, 128, batch=1, heads=32, kv_heads=8, causal=True, family="gqa"),
        grid(4096, 256, True, softcap=50.0, family="softcap"),
        grid(8192, 256, True, softcap=50.0, family="softcap"),
        grid(2048, 64, True, dtype="fp32", family="fp32"),
        grid(2048, 128, False, dtype="fp32", family="fp32"),
        case(1, 128, batch=16, heads=32, kv_heads=8, n_keys=8192, passes=("forward",), family="decode"),
        case(1, 128, batch=1, heads=32, kv_heads=8, n_keys=131072, passes=("forward",), family="decode"),
        grid(4096, 128, True, dtype="fp16", family="fp16"),
        grid(4096, 64, False, dtype="fp16", family="fp16"),
    ]
    rest = [grid(n, d, causal) for n in (1024, 8192, 2048, 512) for d in (128, 64, 256) for causal in (True, False)]
    return first + fused + features + wide + rest


def correctness_cases(smoke: bool = False) -> list[Case]:
    """Head dims and dtypes crossed, then at D = 64 everything that changes what a kernel does."""
    if smoke:
        return [
            case(70, 16, batch=1, dtype="fp32"), case(70, 20, batch=1, dtype="bf16", causal=True),
            case(40, 16, batch=1, dtype="fp64", causal=True, n_keys=70, softcap=2.0),
            case(70, 16, batch=1, dtype="fp16", causal=True, n_keys=40, layout="bnhd"),
            case(33, 16, heads=4, kv_heads=2, dtype="fp16", window=(5, 3), layout="columns"),
            case(17, 16, dv=32, dtype="fp32", layout="expanded"), case(20, 16, dtype="fp32", layout="odd offset"),
            case(20, 16, dtype="fp16", layout="packed qkv"), case(129, 16, batch=1, heads=1, dtype="fp16", layout="huge rows"),
            case(20, 16, batch=1, heads=3, dtype="fp16", layout="huge heads"),
            case(0, 16, dtype="fp32", n_keys=5), case(5, 16, dtype="fp32", n_keys=0),
        ]
    dims = (16, 32, 40, 64, 80, 96, 128, 192, 256)
    cases = [case(400, d, dtype=dtype, causal=causal) for dtype, d, causal in itertools.product(DTYPES, dims, (True, False))]
    cases += [replace(variant, dtype=dtype) for dtype in DTYPES for variant in _variants()]
    cases += [
        case(3, 32, batch=4400, heads=16, causal=True),  # batch x heads past 65535
        case(8192, 128, batch=1, heads=1, causal=True),
        case(300, 64, dtype="fp16", window=(0, 0)),
        case(129, 64, batch=1, heads=1, dtype="fp16", causal=True, layout="huge rows"),
        case(129, 64, batch=1, heads=3, dtype="fp16", causal=True, layout="huge heads"),
    ]
    return cases


def _variants() -> list[Case]:
    base = case(400, 64)
    return [
        *(replace(base, window=window) for window in ((100, 30), (100, None), (None, 30))),
        replace(base, causal=True, window=(64, None)),
        replace(base, softcap=2.0), replace(base, softcap=30.0, amplitude=8.0, causal=True),
        replace(base, amplitude=8.0), replace(base, amplitude=300.0, causal=True), replace(base, scale=-0.3, causal=True),
        case(300, 64, heads=8, kv_heads=2), case(300, 128, heads=4, kv_heads=1, causal=True),
        *(case(n, 64, n_keys=n_keys, causal=causal)
          for n, n_keys in ((129, 400), (400, 129), (1, 300), (300, 1)) for causal in (True, False)),
        *(case(n, 64, causal=n % 2 == 1) for n in (1, 2, 16, 31, 64, 65, 127, 128, 129, 257)),
        case(1, 64, heads=8, kv_heads=2, n_keys=3000, causal=True), case(1, 128, heads=4, kv_heads=4, n_keys=2048),
        case(1, 64, heads=8, kv_heads=1, n_keys=5000, window=(2000, 0)),
        case(5, 64, heads=4, kv_heads=2, n_keys=2100, softcap=20.0), case(64, 64, n_keys=1500, causal=True),
        case(1, 192, dv=128, heads=16, kv_heads=1, n_keys=3000),
        *(case(400, d, deterministic=False, causal=causal) for d in (32, 64, 128) for causal in (True, False)),
        case(300, 64, heads=8, kv_heads=2, deterministic=False, window=(100, 30)),
        case(0, 64, n_keys=5), case(5, 64, n_keys=0), case(0, 64),
        case(300, 64, dv=128, causal=True), case(300, 128, dv=64), case(300, 40, dv=96, causal=True), case(300, 192, dv=128),
        *(case(300, 64, layout=layout, causal=True) for layout in ("bnhd", "packed qkv", "columns", "odd offset", "expanded")),
    ]


def determinism_cases(smoke: bool = False) -> list[Case]:
    if smoke:
        return [case(40, 16, causal=True, dtype="fp16")]
    return [case(1000, 128, batch=3, heads=4, causal=True), case(2048, 64, heads=8, kv_heads=2),
            case(777, 256, causal=True, softcap=30.0), case(513, 64, dtype="fp32"), case(300, 64, n_keys=2000, window=(200, 0)),
            case(1, 128, batch=4, heads=8, kv_heads=2, n_keys=5000), case(200, 64, dtype="fp64", causal=True)]
