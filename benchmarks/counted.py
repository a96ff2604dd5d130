"""Counted beside Triton's tutorial kernel, without a card: python -m benchmarks.counted --tutorial 06-fused-attention.py

The file of Triton's fused-attention tutorial is the user's own copy, of the Triton that is installed. Its kernels and ours run
in the emulator at the same shapes, fp16, and what each does for 64 x 64 scores is counted: the second difference of squares of
2, 3 and 4 blocks, as in ``fused_attn.tools.compile.traffic``. From the counts follow cycles of the pipes of a multiprocessor;
the busiest of each kernel, added up over the kernels of a pass, are the *modelled* cycles. Nothing is timed; latencies,
occupancy and local memory are left out, and instructions are PTX's without moves, of which ptxas makes its own. Of the
tutorial's configurations the one with the fewest modelled cycles counts, among those that spill no more than ours may.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fused_attn import files
from fused_attn.tools import options

Row = dict[str, Any]
EDGE, HEADS, BLOCKS = 128, 2, (2, 3, 4)
MOST_SPILL = 160  # bytes a thread, as of our own defaults
PIPES = ("tensor", "shared", "exp2", "issue")
FORWARD, BACKWARD = re.compile("fwd|forward"), re.compile("bwd|dq|dkv|delta|statistics|ordered|backward|preprocess")


class Chosen:
    """A kernel of which Triton's autotuner would time ``configs``: it is launched with the one that was chosen."""

    config: Any = None

    def __init__(self, fn: Any, configs: list[Any], prune: Callable[..., list[Any]] | None) -> None:
        self.fn, self.configs, self.prune = fn, configs, prune

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            config = self.config
            given = {**dict(zip(self.fn.arg_names, arguments, strict=False)), **named, **config.kwargs}
            if config.pre_hook is not None:
                config.pre_hook(given)
            shape = grid(given) if callable(grid) else grid
            return self.fn[shape](*arguments, **named, **config.kwargs, num_warps=config.num_warps,
                                  num_stages=config.num_stages)

        return launch


def tutorial(path: Path, target: str) -> tuple[Any, Chosen]:
    """(the tutorial's module, its forward kernel) for a target that is being emulated."""
    import triton

    found: list[Chosen] = []

    def autotune(configs: list[Any], key: Any, prune_configs_by: Any = None, **_: Any) -> Callable[[Any], Chosen]:
        def decorate(fn: Any) -> Chosen:
            found.append(Chosen(fn, configs, (prune_configs_by or {}).get("early_config_prune")))
            return found[-1]

        return decorate

    spec = importlib.util.spec_from_file_location(f"tutorial_{target}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(triton, "autotune", autotune):
        spec.loader.exec_module(module)
    (forward,) = (kernel for kernel in found if FORWARD.search(kernel.fn.fn.__name__))
    return module, forward


def inputs(length: int, dim: int) -> list[torch.Tensor]:
    """q, k, v, dout in fp16."""
    return [torch.randn(1, HEADS, length, dim, dtype=torch.float16).requires_grad_(i < 3) for i in range(4)]


def counted(results: list[tuple[str, Any]]) -> dict[str, Counter[str]]:
    """What launches did, by kernel."""
    from fused_attn.emulator.counts import kind
    from fused_attn.tools.compile.traffic import total_of

    found: dict[str, Counter[str]] = {}
    for name, result in results:
        total = found.setdefault(name, Counter())
        moved = total_of(result)
        total.update({"macs": moved["multiply_adds"], "shared": moved["wavefronts"], "sectors": moved["sectors"],
                      "atomics": moved["atomic_sectors"]})
        for instruction, count in zip(result.program.kernel.instructions, result.counts, strict=True):
            runs = int(count["runs"])
            total["exp2"] += runs * (kind(instruction.op) == "exp2 and the like")
            total["issue"] += runs * (not instruction.op.startswith(("mov.", "ld.param")))
    return found


def modelled(target: str, causal: bool, totals: list[dict[str, Counter[str]]]) -> Row:
    """Cycles of each pipe for 64 x 64 scores, and of the busiest, over the kernels of a pass."""
    from fused_attn.targets import TARGETS

    machine = TARGETS[target].machine
    assert machine is not None
    assert machine.rates is not None
    rates = machine.rates
    squares = HEADS * (1 if causal else 2) * EDGE**2 / 64**2
    row: Row = dict.fromkeys((*PIPES, "modelled", "sectors", "atomics"), 0.0)
    for name in totals[0]:
        two, three, four = (total[name] for total in totals)
        per = {key: (four[key] - 2 * three[key] + two[key]) / squares
               for key in ("macs", "shared", "exp2", "issue", "sectors", "atomics")}
        cycles = {"tensor": per["macs"] / (4 * rates.tensor), "shared": per["shared"], "exp2": rates.exp2 * per["exp2"] / 4,
                  "issue": per["issue"] / 4}
        for pipe, value in cycles.items():
            row[pipe] += value
        row["modelled"] += max(cycles.values())
        row["sectors"] += per["sectors"]
        row["atomics"] += per["atomics"]
    return {name: round(value) for name, value in row.items()}


@contextlib.contextmanager
def spills() -> Iterator[list[int]]:
    """Bytes that each kernel compiled within writes to local memory."""
    import triton

    found: list[int] = []
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        yield found
    found += [int(n) for n in re.findall(r"(\d+) bytes spill stores", log.getvalue())]


def measured(target: str, causal: bool, which: str, call: Callable[[int], Any], results: list[Any]) -> Row:
    """The row of one implementation: ``call(length)`` makes a forward, or a forward and its backward."""
    totals = []
    with spills() as spilled:
        for blocks in BLOCKS:
            results.clear()
            call(blocks * EDGE)
            of_pass = BACKWARD if which == "backward" else FORWARD
            totals.append(counted([(name, result) for name, result in results if of_pass.search(name)]))
    return {**modelled(target, causal, totals), "spill bytes": max(spilled, default=0)}


def _forward_and_backward(attend: Callable[..., torch.Tensor], dim: int, which: str) -> Callable[[int], None]:
    def call(length: int) -> None:
        *leaves, dout = inputs(length, dim)
        if which == "forward":
            with torch.no_grad():
                attend(*leaves)
        else:
            torch.autograd.grad(attend(*leaves), leaves, dout)

    return call


def theirs(path: Path, target: str, dim: int, causal: bool, which: str, results: list[Any]) -> Iterator[Row]:
    """Rows of the tutorial's configurations of a pass."""
    from triton.runtime.errors import OutOfResources

    module, forward = tutorial(path, target)
    takes_specialize = "warp_specialize" in module._attention.forward.__code__.co_varnames

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module.attention(q, k, v, causal, dim**-0.5, *[False] * takes_specialize)
        return out

    named = {"N_CTX": BLOCKS[0] * EDGE, "STAGE": 3 if causal else 1}
    configs = forward.configs if forward.prune is None else forward.prune(forward.configs, {}, **named)
    configs = [config for config in configs if config.kwargs["BLOCK_N"] <= dim]
    for config in configs if which == "forward" else configs[:1]:
        forward.config = config
        tiles = f"{config.kwargs['BLOCK_M']}x{config.kwargs['BLOCK_N']} w{config.num_warps} s{config.num_stages}"
        try:
            row = measured(target, causal, which, _forward_and_backward(attend, dim, which), results)
        except OutOfResources:  # as its autotuner skips it
            continue
        yield {"who": "tutorial", "config": tiles if which == "forward" else "its own", **row}


def ours(target: str, dim: int, causal: bool, which: str, results: list[Any]) -> Iterator[Row]:
    """Rows of our schedules of a pass."""
    import fused_attn

    for schedule in ("auto", "gluon") if target == "sm_90" else ("auto",):
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return fused_attn.attention(q, k, v, causal=causal, backend="triton", deterministic=False)

        with fused_attn.hopper(schedule):
            row = measured(target, causal, which, _forward_and_backward(attend, dim, which), results)
        yield {"who": "ours" if schedule == "auto" else f"ours, {schedule}", "config": "shipped", **row}


def best(rows: list[Row]) -> Row:
    """The row of the fewest modelled cycles, then of all pipes together, of those that hardly spill, or of all if none does."""
    lean = [row for row in rows if row["spill bytes"] <= MOST_SPILL]
    return min(lean or rows, key=lambda row: (row["modelled"], sum(row[pipe] for pipe in PIPES)))


def cells(asked: argparse.Namespace) -> Iterator[Row]:
    """Rows of every target, head dim, window and pass: ours, and the tutorial's best."""
    from fused_attn.emulator import LATE, Schedule, emulated

    fast = Schedule(LATE, turn=0, resident=1, races=False)
    for target in asked.target:
        capability = divmod(int(target[3:]), 10)
        with emulated(target, fast) as results, mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
            for dim in asked.head_dim:
                for causal in (False, True):
                    for which in ("forward", "backward"):
                        cell = {"target": target, "head_dim": dim, "causal": causal, "pass": which}
                        for row in ours(target, dim, causal, which, results):
                            yield {**cell, **row}
                        if asked.tutorial is not None:
                            yield {**cell, **best(list(theirs(asked.tutorial, target, dim, causal, which, results)))}


def main(arguments: list[str] | None = None) -> int:
    parser = options.Parser(prog="python -m benchmarks.counted", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tutorial", type=Path, help="the user's copy of Triton's 06-fused-attention.py")
    parser.add_argument("--target", nargs="+", choices=("sm_80", "sm_90"), default=["sm_80", "sm_90"])
    parser.add_argument("--head-dim", nargs="+", type=int, choices=(64, 128), default=[64, 128])
    parser.add_argument("--out", type=options.file(), help="write the rows to this JSON file, and a picture beside it")
    return options.run(parser, arguments, measure)


def measure(asked: argparse.Namespace) -> int:
    """Counts, prints, writes and draws; Ctrl-C ends the counting and nothing else."""
    from fused_attn.tools.report import conditions, print_table, track

    if asked.tutorial is not None and not asked.tutorial.is_file():
        raise options.BadInputError(f"--tutorial: expected a file; got {str(asked.tutorial)!r}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with options.until_interrupted() as interrupted:
        for row in track(cells(asked), "counting", None):
            rows.append(row)
    print_table(rows, "counted for 64 x 64 scores, fp16; modelled cycles are no times")
    complete = not interrupted.is_set()
    if asked.out is not None and rows:
        files.write(asked.out, json.dumps({"conditions": conditions(), "complete": complete, "rows": rows}, indent=1) + "\n")
        draw(rows, asked.out.with_suffix(".png"))
    return options.status(complete, ok=True)


def draw(rows: list[Row], path: Path) -> None:
    """Modelled cycles of every cell, a panel a target."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fused_attn.tools.bench.plots import STYLE

    colours = {"ours": "#D55E00", "ours, gluon": "#E69F00", "tutorial": "#0072B2"}
    targets = list(dict.fromkeys(row["target"] for row in rows))
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8 * len(targets)), layout="constrained")
        for target, axes in zip(targets, figure.subplots(len(targets), squeeze=False)[:, 0], strict=True):
            members = [row for row in rows if row["target"] == target]
            groups = list(dict.fromkeys((row["head_dim"], row["causal"], row["pass"]) for row in members))
            for place, (who, colour) in enumerate(colours.items()):
                found = {(row["head_dim"], row["causal"], row["pass"]): row["modelled"] for row in members if row["who"] == who}
                axes.bar([groups.index(group) + (place - 1) * 0.27 for group in found], list(found.values()), 0.25,
                         color=colour, label=who if found else None)
            axes.set_xticks(range(len(groups)), [f"{which}\n{dim}, {'causal' if causal else 'full'}"
                                                 for dim, causal, which in groups], fontsize=7)
            axes.set_ylabel("modelled cycles")
            axes.set_title(f"{target}, 64 x 64 scores, fp16: counted in the emulator, not timed", fontsize=9)
            axes.legend(fontsize=7)
        files.write_figure(path, figure)


if __name__ == "__main__":
    sys.exit(main())
