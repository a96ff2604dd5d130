"""Traced functions beside those that are written by hand: python -m benchmarks.functions

ALiBi, softcap, a bias and the masks of documents and of a prefix, once as they ship and once in plain Python, as a user writes
them. Both are compiled for cards that need not be here, and what their machine code says is put side by side: registers, bytes
of spill, shared memory and instructions of the main loops, forward and backward. Nothing of that is timed.

    python -m benchmarks.functions --host      # what tracing costs the host, and calls of a function that is known

This is timed, on whatever the machine is: how long one trace takes, a call's description with a plain function and with
ALiBi's slopes in its place, and both as a ratio.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_attn import files
from fused_attn.tools import options

RESULTS = Path(__file__).parent / "results"
OUT, HOST_OUT = RESULTS / "static" / "functions.json", RESULTS / "cpu" / "functions.json"
HEADS, LENGTH = 8, 4096
TARGETS, DIMS = ("sm_80", "sm_90"), (64, 128)
FIGURES = ("registers", "spill_bytes", "shared_bytes", "instructions", "loop_instructions")
KERNELS = ("forward", "dq", "dkv")


def ways() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """For each feature the arguments of ``attention`` by what ships, and by a plain function."""
    from fused_attn.call import mods

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    slopes, bias = meta(HEADS, dtype=torch.float32), meta(HEADS, LENGTH, LENGTH)
    ids, lengths = meta(LENGTH, dtype=torch.int32), meta(1, dtype=torch.int32)
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "alibi": ({"alibi_slopes": slopes},
                  {"score_mod": lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx).abs()}),
        "softcap": ({"softcap": 30.0}, {"score_mod": lambda score, b, h, q_idx, kv_idx: 30.0 * torch.tanh(score / 30.0)}),
        "bias": ({"bias": bias}, {"score_mod": lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx, kv_idx]}),
        "document": ({"mask_mod": mods.document_mask(ids)},
                     {"mask_mod": lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]}),
        "prefix": ({"mask_mod": mods.prefix_lm_mask(lengths.expand(2))},
                   {"mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx < lengths[0]) | (kv_idx <= q_idx)}),
        "causal": ({"causal": True}, {"mask_mod": lambda b, h, q_idx, kv_idx: q_idx >= kv_idx}),
    }
    return found


def figures(target: str, kernel: str, head_dim: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the machine code of one kernel says, in bf16."""
    from fused_attn.call import describe
    from fused_attn.tools.compile import offline

    made: Callable[..., Any] = lambda q, k, v: describe.describe(q, k, v, **arguments)  # noqa: E731
    reports = offline.compile_kernel(target, kernel, head_dim, "bf16", False, group=1, described=made)  # type: ignore[arg-type]
    return {name: [getattr(report, name) for report in reports] for name in FIGURES}


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that is compared."""
    from rich.progress import track

    jobs = list(itertools.product(asked.target or TARGETS, asked.head_dim or DIMS, KERNELS, ways()))
    found = []
    for target, head_dim, kernel, feature in track(jobs, "compiling", disable=not sys.stderr.isatty()):
        by_hand, traced = (figures(target, kernel, head_dim, arguments) for arguments in ways()[feature])
        found.append({"target": target, "head_dim": head_dim, "kernel": kernel, "feature": feature, "by_hand": by_hand,
                      "traced": traced})
    return found


def host(rounds: int = 7, calls: int = 2000) -> dict[str, float]:
    """Microseconds of the host, each the least of some rounds: of a trace, of a call described with a known function, and with
    slopes in its place, and how many times the latter the former is."""
    from fused_attn.call import describe
    from fused_attn.call.functions import functions

    q = torch.randn(1, HEADS, 128, 64)
    slopes = torch.rand(HEADS)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - slopes[h] * (q_idx - kv_idx).abs()

    def traced() -> None:
        functions._TRACED.clear()
        functions.bound("score_mod", score_mod, (), (1, HEADS, 128, 128), q, False)

    ways: dict[str, Callable[[], Any]] = {
        "trace": traced, "known function": lambda: describe.describe(q, q, q, score_mod=score_mod),
        "slopes": lambda: describe.describe(q, q, q, alibi_slopes=slopes),
        "bound": lambda: functions.bound("score_mod", score_mod, (), (1, HEADS, 128, 128), q, False)}
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):  # in turns, so that other work on the machine meets all alike
        for name, run in ways.items():
            n = calls // 20 if name == "trace" else calls
            start = time.perf_counter()
            for _ in range(n):
                run()
            found[name] = min(found[name], (time.perf_counter() - start) / n * 1e6)
    return {name: round(x, 1) for name, x in found.items()} | {"ratio": round(found["known function"] / found["slopes"], 2)}


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    def both(name: str) -> str:
        hand, traced = (sum(sum(x) if isinstance(x, list) else x for x in row[which][name]) for which in ("by_hand", "traced"))
        return f"{hand} and {traced} {name.replace('_', ' ')}"

    return (f"{row['target']} D {row['head_dim']} {row['kernel']}, {row['feature']}: "
            f"{', '.join(map(both, ('registers', 'spill_bytes', 'loop_instructions')))}")


def main(arguments: list[str] | None = None) -> int:
    """Compiles, prints and keeps what is asked for."""
    parser = options.Parser(prog="python -m benchmarks.functions", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="of these alone")
    parser.add_argument("--head-dim", type=int, choices=DIMS, action="append", help="of these alone")
    parser.add_argument("--host", action="store_true", help="time the host instead of compiling")
    parser.add_argument("--out", type=Path, help=f"a JSON file; {OUT.relative_to(RESULTS)} or {HOST_OUT.relative_to(RESULTS)} "
                        "in benchmarks/results by default")

    def command(asked: argparse.Namespace) -> int:
        import json

        from fused_attn.tools.report import conditions

        out = asked.out or (HOST_OUT if asked.host else OUT)
        options.writable(out)
        if asked.host:
            told: dict[str, Any] = {"microseconds": host()}
            print(told)
        else:
            options.need("triton", "triton")
            told = {"rows": rows(asked)}
            print("\n".join(map(line, told["rows"])))
        files.write(out, json.dumps({"conditions": conditions(), **told}, indent=1) + "\n")
        return 0

    return options.run(parser, arguments, command)


if __name__ == "__main__":
    sys.exit(main())
