"""What the host does for a call before Triton takes over: ``python -m benchmarks.host [--out FILE]``. Needs no GPU.

The kernels' launches are replaced by nothing, so that what is left is checks, descriptions, allocations and autograd. CPU
tensors stand in for a GPU's; allocating is about as quick there. Triton's own launch comes on top.
"""

import argparse
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: backend "triton" then takes CPU tensors

import torch
from triton.compiler import CompiledKernel

import fused_attn
from fused_attn.kernels import launch
from fused_attn.kernels.forward import forward_kernel
from fused_attn.tools.bench.timing import measure as measure_ms

SHAPES = (("one tile", 1, 8, 8, 64, 64), ("decode", 1, 32, 8, 1, 4096))  # name, batch, heads, key heads, queries, keys

CALLS = ("forward, no gradients, made before", "forward, no gradients, first of its kind",
         "forward, no gradients, of a new length", "forward with gradients", "backward")


def nothing(*_: Any, **__: Any) -> None:
    """In place of a launch."""


COMPILED = object.__new__(CompiledKernel)  # in place of every kernel that Triton compiles


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Within it, every launch is ``nothing``. As on a card, a plan keeps its kernels once they are launched; the search for
    those of other calls, which stands in for Triton's own, is a part of the launch."""
    instead: list[tuple[Any, str, Any]] = [
        (type(forward_kernel), "__getitem__", lambda self, grid: lambda *_, **__: COMPILED),
        (CompiledKernel, "__getitem__", lambda self, grid: nothing)]
    if hasattr(launch, "_kept_on"):  # not so in revisions that asked Triton each time
        instead += [(launch, "_kept_on", lambda device: True), (launch, "_variant", nothing)]
    with contextlib.ExitStack() as patches:
        for where, name, function in instead:  # functions, as a mock would cost more than the call
            patches.enter_context(mock.patch.object(where, name, function))
        yield


def _calls(batch: int, heads: int, kv_heads: int, n_queries: int, n_keys: int) -> dict[str, Callable[[], Any]]:
    """Every kind of call on one shape; ``no_launches`` must hold when they are made and when they run."""
    q = torch.randn(batch, heads, n_queries, 64, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, n_keys, 64, dtype=torch.bfloat16) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    for _ in range(3):  # the third call of a kind has all that is kept of it
        trained = fused_attn.attention(*leaves, causal=True, backend="triton")

    def attend(*tensors: torch.Tensor, **arguments: Any) -> torch.Tensor:
        out: torch.Tensor = fused_attn.attention(*tensors, causal=True, backend="triton", **arguments)
        return out

    numbers = itertools.count(1)

    def first() -> None:  # calls of different scales are of different kinds, and one of these was never made
        attend(q, k, v, scale=1.0 + next(numbers) / 2**20)

    def of_a_new_length() -> None:
        n = n_keys - next(numbers) % (n_keys // 2)
        attend(q, k[:, :, :n], v[:, :, :n])

    for _ in range(3):  # the third call of a kind has all that is kept of it
        attend(q, k, v)
    calls = (lambda: attend(q, k, v), first, of_a_new_length, lambda: attend(*leaves),
             lambda: torch.autograd.grad(trained, leaves, dout, retain_graph=True))
    return dict(zip(CALLS, calls, strict=True))


def subjects() -> dict[str, Callable[[], dict[str, Callable[[], Any]]]]:
    """A shape's name -> what makes its calls."""
    return {name: partial(_calls, *shape) for name, *shape in SHAPES}


def rows_of() -> Iterator[dict[str, Any]]:
    """One row a shape and kind of call."""
    with no_launches():
        for name, make in subjects().items():
            for call, ms in measure_ms(make(), "cpu").items():
                yield {"case": name, "call": call, "us": round(1e3 * sorted(ms)[len(ms) // 2], 2)}


def main(arguments: list[str] | None = None) -> int:
    from fused_attn.tools import options  # here, as benchmarks.compare runs the rest on revisions without it

    parser = options.Parser(prog="python -m benchmarks.host", description="host time of a call up to the launch")
    parser.add_argument("--out", type=options.file(), help="write the rows and their conditions to this JSON file")
    return options.run(parser, arguments, measure)


def measure(asked: argparse.Namespace) -> int:
    """Times, prints and writes; Ctrl-C ends the timing and nothing else."""
    from benchmarks.conditions import conditions
    from fused_attn import files
    from fused_attn.tools import options
    from fused_attn.tools.report import print_table

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with options.until_interrupted() as interrupted:
        for row in rows_of():
            rows.append(row)
    complete = not interrupted.is_set()
    print_table(rows, "host time of attention(causal=True) up to the launch, medians")
    if asked.out is not None and (rows or complete):
        result = {"conditions": {**conditions("cpu", None), "gpu": None, "launches": "replaced by nothing"},
                  "complete": complete, "rows": rows}
        files.write(asked.out, json.dumps(result, indent=1) + "\n")
    return options.status(complete, ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
