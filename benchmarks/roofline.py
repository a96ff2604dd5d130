"""What this card can do at most, measured in the same run: how fast it copies, and how fast it multiplies matrices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fused_attn.tools.bench.cases import DTYPES
from fused_attn.tools.bench.timing import measure, spread

Row = dict[str, Any]

COPY_BYTES = 2**30  # many times any cache
MATRICES = ((8192, 8192, 8192), (16384, 8192, 4096), (4096, 4096, 4096))  # of which the best counts
SMALL = 64


def copy(device: str, rounds: int | None = None, size: int = COPY_BYTES) -> Row:
    """Reading and writing: twice the bytes of a tensor."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    row = spread(measure({"copy": lambda: target.copy_(source)}, device, rounds)["copy"])
    return {"pass": "forward", "family": "roofline", "default": True, **row, "tflops": 0.0, "flops": 0, "bytes": 2 * size,
            "gbytes_per_s": float(f"{2 * size / row['ms'] / 1e6:.4g}"), "peers": {}}


def matmul(dtype: str, device: str, rounds: int | None = None,
           shapes: tuple[tuple[int, int, int], ...] = MATRICES) -> Row:
    """torch's product of unit-normal matrices [M, K] [K, N], of the shape at which it is fastest."""
    found: list[Row] = []
    for m, n, k in shapes:
        a, b = torch.randn(m, k, device=device).to(DTYPES[dtype]), torch.randn(k, n, device=device).to(DTYPES[dtype])
        row = spread(measure({"matmul": partial(torch.mm, a, b)}, device, rounds)["matmul"])
        flops, moved = 2 * m * n * k, (m * k + k * n + m * n) * a.element_size()
        found.append({**row, "tflops": float(f"{flops / row['ms'] / 1e9:.4g}"), "flops": flops, "bytes": moved,
                      "shape": [m, n, k], "gbytes_per_s": float(f"{moved / row['ms'] / 1e6:.4g}")})
    best = max(found, key=lambda row: row["tflops"])
    return {"pass": "forward", "family": "roofline", "dtype": dtype, "default": True, **best, "peers": {}}


def jobs(device: str, smoke: bool) -> dict[str, Callable[[], Row]]:
    """By name; tiny in a smoke run."""
    if smoke:
        return {"copy": partial(copy, device, 2, SMALL), "matmul bf16": partial(matmul, "bf16", device, 2, ((SMALL,) * 3,))}
    products = {f"matmul {dtype}": partial(matmul, dtype, device) for dtype in ("bf16", "fp16", "fp32")}
    return {"copy": partial(copy, device), **products}
