"""``fused-attn tune``: better tiles for the card at hand, by timing, kept in a file that can be shared.

From the shipped configuration the search goes to whichever neighbour is fastest, one number changed at a time, until none is
faster by more than the noise. A neighbour must give the shipped one's results. What is timed is one pass over 16384 queries,
full and causal; a length never matters, and nothing is tuned while a program runs.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from fused_attn import settings
from fused_attn.call.schema import Needs, Saved
from fused_attn.call.spec import NO_OTHERS, AttentionSpec, TileConfig, Window
from fused_attn.kernels.launch import Launch
from fused_attn.kernels.launch import run as run_launch
from fused_attn.plan import schedules, tuned
from fused_attn.plan.plan import Made, collect, finish, perform
from fused_attn.plan.problem import Problem
from fused_attn.plan.tiles import Kernel, served
from fused_attn.plan.tuned import STEPS
from fused_attn.targets import arch_of, triton_name
from fused_attn.tools import options, report
from fused_attn.tools.bench.timing import measure

GAIN = 0.98  # of the time: a smaller gain is noise
MAX_DIFFERENCE = 0.02  # relative, of results in fp16 and bf16 whose sums are taken in another order

Timer = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]  # calls by name -> milliseconds


class Subject:
    """One kernel at one head dim: its inputs, its shipped configuration, and how it is launched with another one."""

    def __init__(self, kernel: Kernel, head_dim: int, device: torch.device, dtype: torch.dtype, length: int = 4096) -> None:
        self.kernel, self.head_dim, self.device = kernel, head_dim, device
        heads, batch = max(1, 2048 // head_dim), max(1, 16384 // length)
        if device.type == "cpu":
            heads, batch = 2, 1
        generator = torch.Generator(device).manual_seed(0)
        self.q, self.k, self.v, self.dout = (
            torch.randn(batch, heads, length, head_dim, device=device, generator=generator).to(dtype) for _ in range(4))
        shipped = tuned.shipped(kernel, head_dim, dtype, arch_of(device))
        assert shipped is not None, f"{arch_of(device)} has no fused backward at head dim {head_dim}"
        self.shipped: TileConfig = shipped
        self.specs = [AttentionSpec(head_dim**-0.5, Window(None, right), deterministic=kernel != "fused")
                      for right in (None, 0)]
        self.saved: list[Saved] = []  # of each spec's forward, for the kernels of the backward
        for spec in self.specs if kernel != "forward" else ():
            out, lse, _ = finish(schedules.named(schedules.FORWARD, "pointers").steps(self._problem(spec)))
            self.saved.append(Saved(self.dout, None, self.q, self.k, self.v, out, None, lse))

    def _problem(self, spec: AttentionSpec, config: TileConfig | None = None) -> Problem:
        """A call whose kernels have the shipped tiles, except for the kernel that is searched, which has ``config``."""
        tiles: dict[str, TileConfig] = {}
        for kernel in tuned.KERNELS:
            shipped = tuned.shipped(kernel, self.head_dim, self.q.dtype, arch_of(self.device))
            tiles |= {} if shipped is None else {kernel: shipped}
        tiles |= {} if config is None else {self.kernel: config}
        return Problem.of(self.q, self.k, self.v, spec, NO_OTHERS, tiles=tiles)

    def _steps(self, config: TileConfig) -> Iterator[Generator[Made, None, Any]]:
        """The steps of the full and of the causal pass in which this configuration is used."""
        for i, spec in enumerate(self.specs):
            problem = self._problem(spec, config)
            if self.kernel == "forward":
                yield schedules.named(schedules.FORWARD, "pointers").steps(problem)
            else:
                dq, dkv = self.kernel != "dkv", self.kernel != "dq"
                name = "fused" if self.kernel == "fused" else "separate"
                needs = Needs(dq, dkv, dkv, False, False, ())
                yield schedules.named(schedules.BACKWARD, name).steps(problem, self.saved[i], needs)

    def results(self, config: TileConfig) -> list[torch.Tensor]:
        """The results of both passes, as this configuration gives them."""
        return [x for steps in self._steps(config) for x in finish(steps) if isinstance(x, torch.Tensor)]

    def launches(self, config: TileConfig) -> list[Launch]:
        """The kernel's own launches in both passes, after all of their steps have been performed once."""
        own = {"forward": "forward_kernel", "dq": "dq_kernel"}.get(self.kernel, "dkv_kernel")
        found = [made for steps in self._steps(config) for made in collect(steps)[0]]
        for made in found:
            perform(made)
        return [made for made in found if isinstance(made, Launch) and made.name == own]

    def fits(self, config: TileConfig) -> bool:
        """Whether a configuration may run at all."""
        return tuned.fits(config, self.kernel, self.head_dim, arch_of(self.device))


def neighbours(config: TileConfig) -> Iterator[TileConfig]:
    """Configurations that differ in one number, by one step up or down."""
    for name, values in STEPS.items():
        own = getattr(config, name)
        at = values.index(own) if own in values else -9
        for other in (at - 1, at + 1):
            if 0 <= other < len(values):
                yield dataclasses.replace(config, **{name: values[other]})


class Search:
    """The walk from the shipped configuration of a subject, or from where an earlier one was cut short, to one that no
    neighbour beats."""

    def __init__(self, subject: Subject, timer: Timer, deadline: float = float("inf"),
                 told: Callable[[TileConfig, str], None] = lambda config, verdict: None,
                 start: TileConfig | None = None) -> None:
        self.subject, self.timer, self.deadline, self.told = subject, timer, deadline, told
        self.tried: set[TileConfig] = {subject.shipped}
        self.interrupted = False
        self.expected = subject.results(subject.shipped)
        self.best = subject.shipped if start is None or self._wrong(start) else start

    def run(self) -> dict[str, Any]:
        """An entry of the file: the best configuration, its time and the shipped one's. Ctrl-C ends the walk where it is."""
        while (better := self._best_neighbour()) is not None:
            self.best = better
        times = self._times(self.subject.shipped, self.best)
        if self.best == self.subject.shipped or times[1] > GAIN * times[0]:
            self.best, times = self.subject.shipped, (times[0], times[0])
        return tuned.row(self.subject.kernel, self.subject.head_dim, self.best, ms=round(times[1], 4),
                         shipped=dataclasses.asdict(self.subject.shipped), shipped_ms=round(times[0], 4),
                         tried=len(self.tried), complete=time.monotonic() < self.deadline)

    def _best_neighbour(self) -> TileConfig | None:
        fastest, ratio = None, GAIN
        with options.until_interrupted() as interrupted:
            for config in neighbours(self.best):
                if config in self.tried or not self.subject.fits(config) or time.monotonic() > self.deadline:
                    continue
                self.tried.add(config)
                verdict = self._wrong(config)
                if verdict is None:
                    best, new = self._times(self.best, config)
                    if new / best < ratio:
                        fastest, ratio = config, new / best
                    verdict = f"{new / best:.3f} of the best's time"
                self.told(config, verdict)
        if interrupted.is_set():
            self.interrupted, self.deadline = True, -float("inf")
        return fastest

    def _times(self, *configs: TileConfig) -> tuple[float, ...]:
        """Milliseconds of each configuration, measured in turns."""
        launches = [self.subject.launches(config) for config in configs]
        times = self.timer({str(i): functools.partial(_run, found) for i, found in enumerate(launches)})
        return tuple(times.values())

    def _wrong(self, config: TileConfig) -> str | None:
        """What is wrong with a configuration, if anything."""
        try:
            results = self.subject.results(config)
            if self.subject.device.type != "cpu":
                torch.cuda.synchronize(self.subject.device)
        except Exception as error:  # too much shared memory, or whatever the compiler has against it
            return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        for got, want in zip(results, self.expected, strict=True):
            difference = float((got.double() - want.double()).norm() / want.double().norm())
            if not difference <= MAX_DIFFERENCE:
                return f"differs from the shipped one's results by {difference:.2g}"
        return None


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        run_launch(launch)


def _timer(device: torch.device) -> Timer:
    def times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        measured = measure(calls, device.type, rounds=12)
        return {name: sorted(values)[len(values) // 2] for name, values in measured.items()}

    return times


def run(arguments: argparse.Namespace) -> int:
    """Searches every kernel and head dim that was asked for; each result is in the file as soon as it is found."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    device = torch.device("cpu") if settings.interpreted() else torch.device("cuda", torch.cuda.current_device())
    file: Path = arguments.out or tuned.default_path(device)
    options.writable(file)
    content, starts = _content(file, device)
    known = {(row["kernel"], row["head_dim"]): row for row in content["tiles"]}
    dtype = torch.float16 if arguments.dtype == "fp16" else torch.bfloat16
    # What is timed is the widest head dim that an entry of the tables serves: what launches there launches for all of them.
    work = list(dict.fromkeys((kernel, served(kernel, head_dim, head_dim, arch_of(device)))
                              for head_dim in arguments.head_dim for kernel in arguments.kernel))
    deadline = time.monotonic() + 60 * arguments.minutes
    rows, console = [], Console()
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TextColumn("{task.fields[last]}"), console=console) as progress, options.until_interrupted() as interrupted:
        task = progress.add_task("tuning", total=len(work), last="")

        def told(config: TileConfig, verdict: str) -> None:
            progress.update(task, last=f"{_words(config)}: {verdict}")

        for kernel, head_dim in work:
            progress.update(task, description=f"{kernel} D{head_dim}")
            before = known.get((kernel, head_dim))
            done = before is not None and before.get("complete") is True and not arguments.again
            why = _against(kernel, head_dim, device, dtype, done)
            if time.monotonic() > deadline:
                why = "no time is left"
            if why is None:
                subject = Subject(kernel, head_dim, device, dtype, arguments.length)
                start = None if arguments.again else starts.get((kernel, head_dim))
                search = Search(subject, _timer(device), deadline, told, start)
                rows.append(search.run())
                known[kernel, head_dim] = rows[-1]
                tuned.write(file, {**content, "tiles": list(known.values())})
                if search.interrupted:
                    raise KeyboardInterrupt
            else:
                console.print(f"{kernel} D{head_dim}: {why}")
            progress.advance(task)
    if rows:
        report.print_table([{"kernel": row["kernel"], "head dim": row["head_dim"], **_shown(row)} for row in rows],
                           f"{content['gpu']}, {arguments.dtype}: tiles in {file}")
    return options.status(complete=not interrupted.is_set(), ok=True)


def _against(kernel: Kernel, head_dim: int, device: torch.device, dtype: torch.dtype, done: bool) -> str | None:
    """Why a kernel is not searched, if it is not."""
    if tuned.shipped(kernel, head_dim, dtype, arch_of(device)) is None:
        return "there is none for this card"
    return "the file has it already; --again searches anew" if done else None


def _content(file: Path, device: torch.device) -> tuple[dict[str, Any], tuned.Found]:
    """(content of the file, its configurations), both empty where there is no file. Raises BadInputError for a file of another
    card or Triton, or anything else that is there, so that it is not overwritten."""
    here = {"format": tuned.FORMAT, "arch": arch_of(device), "gpu": tuned.gpu_name(device), "triton": triton_name()}
    try:
        content = tuned.read(file) if file.exists() else None
        if content is not None:
            if other := [name for name in ("arch", "gpu", "triton") if content.get(name) != here[name]]:
                told = "; ".join(f"{name} {content.get(name)!r:.80}, here {here[name]!r}" for name in other)
                raise ValueError(f"{file} holds tiles of another card or Triton: {told}")
            return content, tuned.tiles(file, content)
    except ValueError as error:
        raise options.BadInputError(f"{error}; delete it, or choose another --out") from error
    return {**here, "conditions": report.conditions(), "tiles": []}, {}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {"tiles": _words(tuned.config_of(row)), "ms": row["ms"], "shipped ms": row["shipped_ms"],
            "gain": f"{row['shipped_ms'] / row['ms']:.3f}", "tried": row["tried"]}


def _words(config: TileConfig) -> str:
    return f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
