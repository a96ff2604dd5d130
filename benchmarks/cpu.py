"""What a call and a layer cost on the CPU beside torch's own: ``python -m benchmarks.cpu [--out FILE]``.

There the package answers with torch's fused kernel, so the difference is dispatch. Both are timed in turns in one process
and the medians compared: machines are noisy, ratios in one run much less so.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fused_attn.nn
from benchmarks.conditions import conditions
from fused_attn.report import print_table

# (name, batch, heads, length, head dim, calls a round)
SHAPES = (("tiny", 1, 1, 1, 8, 500), ("layer", 8, 8, 128, 64, 20), ("long", 1, 8, 2048, 64, 1))
ROUNDS = 41


def median_us(functions: dict[str, Callable[[], Any]], calls: int) -> dict[str, float]:
    """Median microseconds a call, the functions taking turns."""
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            rounds[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(times) for name, times in rounds.items()}


def measure() -> list[dict[str, Any]]:
    """One row a shape and pass."""
    rows = []
    for name, batch, heads, length, dim, calls in SHAPES:
        for backward in (False, True):
            q, k, v = (torch.randn(batch, heads, length, dim, requires_grad=backward) for _ in range(3))
            dout = torch.randn(batch, heads, length, dim)

            def ours() -> Any:
                out = fused_attn.attention(q, k, v, causal=True)  # noqa: B023
                return torch.autograd.grad(out, (q, k, v), dout) if backward else out  # noqa: B023

            def torchs() -> Any:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: B023
                return torch.autograd.grad(out, (q, k, v), dout) if backward else out  # noqa: B023

            torch.testing.assert_close(ours(), torchs())
            times = median_us({"ours": ours, "torch": torchs}, calls)
            rows.append({
                "case": name, "pass": "forward+backward" if backward else "forward",
                "shape": f"B{batch} H{heads} N{length} D{dim}",
                "ours_us": round(times["ours"], 2), "torch_us": round(times["torch"], 2),
                "added_us": round(times["ours"] - times["torch"], 2), "ratio": round(times["ours"] / times["torch"], 3),
            })
    return rows


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {  # name: class in torch.nn and in fused_attn.nn, its arguments
    "MultiheadAttention": ("MultiheadAttention", {"embed_dim": 512, "num_heads": 8}),
    "encoder layer": ("TransformerEncoderLayer", {"d_model": 512, "nhead": 8, "dropout": 0.0}),
    "encoder layer, dropout 0.1": ("TransformerEncoderLayer", {"d_model": 512, "nhead": 8}),
    "decoder layer": ("TransformerDecoderLayer", {"d_model": 512, "nhead": 8, "dropout": 0.0}),
}


def measure_layers() -> list[dict[str, Any]]:
    """One row a layer and mode, B 8, N 128: training forward and backward, and evaluation, where torch takes its C++ path."""
    rows = []
    for name, (cls, arguments) in LAYERS.items():
        for mode in ("training, forward+backward", "evaluation"):
            modules, x = {}, torch.randn(8, 128, 512)
            inputs = {"MultiheadAttention": (x, x, x, None, False), "TransformerDecoderLayer": (x, x)}.get(cls, (x,))
            for side, package in (("ours", fused_attn.nn), ("torch", torch.nn)):
                torch.manual_seed(0)
                modules[side] = getattr(package, cls)(**arguments, batch_first=True).train(mode != "evaluation")

            def run(module: torch.nn.Module) -> torch.Tensor:
                with torch.set_grad_enabled(module.training):
                    out = module(*inputs)  # noqa: B023
                    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
                    if module.training:
                        result.backward(x)  # noqa: B023
                        module.zero_grad()
                return result

            if "dropout 0.1" not in name:
                torch.testing.assert_close(run(modules["ours"]), run(modules["torch"]), rtol=1e-4, atol=1e-4)
            times = median_us({side: functools.partial(run, module) for side, module in modules.items()}, 1)
            rows.append({"case": name, "pass": mode, "shape": "B8 N128 d512", "ours_us": round(times["ours"], 1),
                         "torch_us": round(times["torch"], 1), "added_us": round(times["ours"] - times["torch"], 1),
                         "ratio": round(times["ours"] / times["torch"], 3)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="calls and layers on the CPU beside torch's own")
    parser.add_argument("--out", type=Path, help="write the rows and their conditions to this JSON file")
    arguments = parser.parse_args()
    rows = [*measure(), *measure_layers()]
    print_table(rows, f"attention(causal=True) and layers beside torch's own, {torch.get_num_threads()} threads, medians")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"conditions": {**conditions("cpu", None), "gpu": None, "interpreter": False,
                                 "threads": torch.get_num_threads()}, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
