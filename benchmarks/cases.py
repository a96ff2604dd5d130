"""Every case of every stage of a GPU run in one registry."""

import itertools
from dataclasses import replace

import torch

from fused_attn.plan import proven
from fused_attn.tools.bench.cases import DTYPES, Case, case, grid


def interpreted(cases: list[Case]) -> list[Case]:
    """Cases of a smoke run: on CPU tensors, where the kernels are no default, they are asked for."""
    return [replace(subject, backend="triton") for subject in cases]


def on_hopper() -> bool:
    """Whether the current card has schedules to climb (``fused_attn.hopper``)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def timing_cases(smoke: bool = False) -> list[Case]:
    """The most informative first: a run that is cut short has measured what matters."""
    if smoke:
        return interpreted([
            case(48, 16, batch=1, causal=True), case(40, 16, batch=1, softcap=20.0, family="softcap"),
            case(1, 16, batch=1, heads=4, kv_heads=2, n_keys=70, passes=("forward",), family="decode")])
    first = [grid(n, d, causal) for n in (4096, 16384) for d in (128, 64) for causal in (True, False)]
    exact = [replace(c, family="deterministic", deterministic=True, passes=("backward",)) for c in first]
    wide = [grid(n, 256, causal) for n in (4096, 16384) for causal in (True, False)]
    climbed = [replace(c, family=f"hopper {hopper}", hopper=hopper,
                       passes=("forward", "backward") if hopper == "gluon" and c.head_dim <= 128 else ("forward",))
               for c in first + wide for hopper in proven.offered()] if on_hopper() else []
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
    return first + exact + features + wide + climbed + rest


def correctness_cases(smoke: bool = False) -> list[Case]:
    """Head dims and dtypes crossed, then at D = 64 everything that changes what a kernel does."""
    if smoke:
        return interpreted([
            case(70, 16, batch=1, dtype="fp32"), case(70, 20, batch=1, dtype="bf16", causal=True),
            case(40, 16, batch=1, dtype="fp64", causal=True, n_keys=70, softcap=2.0),
            case(70, 16, batch=1, dtype="fp16", causal=True, n_keys=40, layout="bnhd"),
            case(33, 16, heads=4, kv_heads=2, dtype="fp16", window=(5, 3), layout="columns"),
            case(17, 16, dv=32, dtype="fp32", layout="expanded"), case(20, 16, dtype="fp32", layout="odd offset"),
            case(20, 16, dtype="fp16", layout="packed qkv"), case(129, 16, batch=1, heads=1, dtype="fp16", layout="huge rows"),
            case(20, 16, batch=1, heads=3, dtype="fp16", layout="huge heads"),
            case(0, 16, dtype="fp32", n_keys=5), case(5, 16, dtype="fp32", n_keys=0),
        ])
    dims = (16, 32, 40, 64, 80, 96, 128, 192, 256)
    cases = [case(400, d, dtype=dtype, causal=causal) for dtype, d, causal in itertools.product(DTYPES, dims, (True, False))]
    cases += [case(400, d, causal=causal) for d in (8, 33, 56, 72, 88, 104, 112, 120, 136, 160) for causal in (True, False)]
    cases += [replace(variant, dtype=dtype) for dtype in DTYPES for variant in _variants()]
    cases += [
        case(3, 32, batch=4400, heads=16, causal=True),  # batch x heads past 65535
        case(8192, 128, batch=1, heads=1, causal=True),
        case(300, 64, dtype="fp16", window=(0, 0)),
        case(129, 64, batch=1, heads=1, dtype="fp16", causal=True, layout="huge rows"),
        case(129, 64, batch=1, heads=3, dtype="fp16", causal=True, layout="huge heads"),
    ]
    return cases + _hopper_cases() if on_hopper() else cases


def _hopper_cases() -> list[Case]:
    """What the schedules of a Hopper's ladder take, last of all: no card has run them yet, and one that hangs costs time."""
    plain = [case(400, d, causal=causal) for d in (64, 128, 256, 80, 40, 8) for causal in (True, False)]
    others = [
        case(400, 64, window=(100, 30)), case(400, 128, causal=True, window=(64, None)),
        case(400, 64, dtype="fp16", softcap=20.0, causal=True),
        case(300, 128, heads=8, kv_heads=2, causal=True), case(300, 64, heads=4, kv_heads=1),
        *(case(n, 64, n_keys=n_keys, causal=True) for n, n_keys in ((129, 400), (400, 129), (300, 1))),
        case(300, 64, dtype="fp16", layout="bnhd", causal=True), case(300, 64, layout="packed qkv", causal=True),
        case(8192, 128, batch=1, heads=2, causal=True),
    ]
    return [replace(subject, hopper=hopper) for hopper in proven.offered() for subject in plain + others]


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
        *(case(400, d, deterministic=True, causal=causal) for d in (32, 64, 128) for causal in (True, False)),
        case(300, 64, heads=8, kv_heads=2, deterministic=True, window=(100, 30)),
        # below the least number of keys that decoding splits, and one kernel of dQ, dK and dV with groups at odd lengths
        *(case(n, d, batch=4, heads=32, kv_heads=8, n_keys=n_keys, causal=True)
          for n, d, n_keys in ((1, 128, 1000), (1, 64, 257), (16, 128, 700), (1, 128, 33))),
        *(case(n, d, heads=8, kv_heads=2, n_keys=n_keys, causal=causal, deterministic=False)
          for d in (64, 128) for n, n_keys in ((333, 470), (129, 129), (1, 77)) for causal in (True, False)),
        case(0, 64, n_keys=5), case(5, 64, n_keys=0), case(0, 64),
        case(300, 64, dv=128, causal=True), case(300, 128, dv=64), case(300, 40, dv=96, causal=True), case(300, 192, dv=128),
        *(case(300, 64, layout=layout, causal=True) for layout in ("bnhd", "packed qkv", "columns", "odd offset", "expanded")),
    ]


def determinism_cases(smoke: bool = False) -> list[Case]:
    if smoke:
        return interpreted([case(40, 16, causal=True, dtype="fp16")])
    return [replace(subject, deterministic=True) for subject in (
        case(1000, 128, batch=3, heads=4, causal=True), case(2048, 64, heads=8, kv_heads=2),
        case(777, 256, causal=True, softcap=30.0), case(513, 64, dtype="fp32"), case(300, 64, n_keys=2000, window=(200, 0)),
        case(1, 128, batch=4, heads=8, kv_heads=2, n_keys=5000), case(200, 64, dtype="fp64", causal=True))]
