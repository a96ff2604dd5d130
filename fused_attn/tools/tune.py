"""``fused-attn tune``: what is quickest on the card at hand, by timing, kept in a file that can be shared.

Tiles first: from the shipped configuration the search goes to whichever neighbour is fastest, one number changed at a time,
until none is faster by more than the noise. Then, with these tiles, the schedules of either pass and the splits of decoding
(``quickest.py``). Whatever is tried is held to fp64 on this card first, and tiles must give the shipped ones' results. What is
timed is one pass over 16384 queries, full and causal; a length never matters, and nothing is tuned while a program runs.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fused_attn import settings
from fused_attn.call.schema import Needs
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import Launch
from fused_attn.kernels.launch import run as run_launch
from fused_attn.plan import schedules, tuned
from fused_attn.plan.tiles import Kernel, served
from fused_attn.plan.tuned import STEPS, Pass
from fused_attn.targets import arch_of, triton_name
from fused_attn.tools import options, report
from fused_attn.tools.bench.timing import measure
from fused_attn.tools.quickest import GAIN, Timer, choose_schedule, choose_split, passes
from fused_attn.tools.trial import Trial, told

MAX_DIFFERENCE = 0.02  # relative, of results in fp16 and bf16 whose sums are taken in another order

# kernel of the tables -> (pass, schedule, gradients that are made, name of what is launched)
OF_KERNEL: dict[str, tuple[Pass, str, Needs, str]] = {
    "forward": ("forward", "pointers", schedules.EVERY_GRADIENT, "forward_kernel"),
    "dq": ("backward", "separate", Needs(True, False, False, False, False, ()), "dq_kernel"),
    "dkv": ("backward", "separate", Needs(False, True, True, False, False, ()), "dkv_kernel"),
    "fused": ("backward", "fused", schedules.EVERY_GRADIENT, "dkv_kernel"),
}


class Subject:
    """One kernel at one head dim: its inputs, its shipped configuration, and how it is launched with another one."""

    def __init__(self, kernel: Kernel, head_dim: int, device: torch.device, dtype: torch.dtype, length: int = 4096) -> None:
        self.kernel, self.head_dim, self.device = kernel, head_dim, device
        shipped = tuned.shipped(kernel, head_dim, dtype, arch_of(device))
        assert shipped is not None, f"{arch_of(device)} has no fused backward at head dim {head_dim}"
        self.shipped: TileConfig = shipped
        which, self.schedule, needs, self.name = OF_KERNEL[kernel]
        self.trial = Trial(which, head_dim, device, dtype, length, tiles=shipped_tiles(head_dim, dtype, device), needs=needs)

    def results(self, config: TileConfig) -> list[torch.Tensor]:
        """The results of both passes that are timed, as this configuration gives them."""
        return [x for found in self.trial.results(self.schedule, {self.kernel: config}) for x in found.values()]

    def wrong(self, config: TileConfig) -> str | None:
        """What is wrong with a configuration, held to fp64 on smaller passes, if anything."""
        return self.trial.wrong(self.schedule, {self.kernel: config})

    def launches(self, config: TileConfig) -> list[Launch]:
        """The kernel's own launches in both passes, after all of their steps have been performed once."""
        found = self.trial.made(self.schedule, {self.kernel: config})
        return [made for made in found if isinstance(made, Launch) and made.name == self.name]

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


def shipped_tiles(head_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, TileConfig]:
    """The tables' configurations of all kernels that are tuned, by kernel."""
    tiles = {kernel: tuned.shipped(kernel, head_dim, dtype, arch_of(device)) for kernel in tuned.KERNELS}
    return {kernel: config for kernel, config in tiles.items() if config is not None}


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
        if (verdict := self.subject.wrong(config)) is not None:
            return verdict
        try:
            results = self.subject.results(config)
            if self.subject.device.type != "cpu":
                torch.cuda.synchronize(self.subject.device)
        except Exception as error:
            return told(error)
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
    """Decides everything that was asked for; each result is in the file as soon as it is found."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    device = torch.device("cpu") if settings.interpreted() else torch.device("cuda", torch.cuda.current_device())
    file: Path = arguments.out or tuned.default_path(device)
    options.writable(file)
    content, starts = _content(file, device)
    console = Console()
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TextColumn("{task.fields[last]}"), console=console) as progress, options.until_interrupted() as interrupted:
        task = progress.add_task("tuning", last="")
        tuning = Tuning(arguments, device, file, content, starts, lambda last: progress.update(task, last=last))
        work = tuning.work()
        progress.update(task, total=len(work))
        for name, decide in work:
            progress.update(task, description=name)
            why = "no time is left" if time.monotonic() > tuning.deadline else decide()
            if why is not None:
                console.print(f"{name}: {why}")
            progress.advance(task)
    for title, rows in tuning.found.items():
        report.print_table(rows, f"{content['gpu']}, {arguments.dtype}: {title} in {file}")
    return options.status(complete=not interrupted.is_set(), ok=True)


class Tuning:
    """What one command decides. Each step keeps what it found in the file, or returns why it does nothing."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, file: Path, content: dict[str, Any],
                 starts: tuned.Found, show: Callable[[str], None]) -> None:
        self.asked, self.device, self.file, self.content, self.starts = arguments, device, file, content, starts
        self.show, self.arch, self.timer = show, arch_of(device), _timer(device)
        self.dtype = torch.float16 if arguments.dtype == "fp16" else torch.bfloat16
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.found: dict[str, list[dict[str, Any]]] = {}

    def work(self) -> list[tuple[str, Callable[[], str | None]]]:
        """(name, step). What is timed is the widest head dim that an entry of the tables serves, for all of them."""
        steps: list[tuple[str, Callable[[], str | None]]] = []
        if "tiles" in self.asked.part:
            kernels = dict.fromkeys((kernel, served(kernel, head_dim, head_dim, self.arch))
                                    for head_dim in self.asked.head_dim for kernel in self.asked.kernel)
            steps += [(f"{kernel} D{head_dim}", functools.partial(self.tiles, kernel, head_dim))
                      for kernel, head_dim in kernels]
        if "schedules" in self.asked.part:
            steps += [(f"{which} D{head_dim}", functools.partial(self.schedule, which, head_dim))
                      for which, head_dim in passes(self.asked.head_dim, self.arch)]
        return [*steps, ("splits", self.split)] if "splits" in self.asked.part else steps

    def tiles(self, kernel: Kernel, head_dim: int) -> str | None:
        """The tiles of a kernel."""
        if tuned.shipped(kernel, head_dim, self.dtype, self.arch) is None:
            return "there is none for this card"
        rows = {(row["kernel"], row["head_dim"]): row for row in self.content["tiles"]}
        before = rows.get((kernel, head_dim))
        if before is not None and before.get("complete") is True and not self.asked.again:
            return _KNOWN
        subject = Subject(kernel, head_dim, self.device, self.dtype, self.asked.length)
        start = None if self.asked.again else self.starts.get((kernel, head_dim))
        search = Search(subject, self.timer, self.deadline, lambda config, verdict: self.show(f"{_words(config)}: {verdict}"),
                        start)
        row = rows[kernel, head_dim] = search.run()
        self._keep("tiles", list(rows.values()), {"kernel": kernel, "head dim": head_dim, **_shown(row)})
        if search.interrupted:
            raise KeyboardInterrupt
        return None

    def schedule(self, which: Pass, head_dim: int) -> str | None:
        """The schedule of a pass, with the tiles that the file has."""
        rows = {(row["pass"], row["head_dim"]): row for row in self.content.get("schedules", ())}
        if (which, head_dim) in rows and not self.asked.again:
            return _KNOWN
        of_file = tuned.tiles(self.file, self.content)
        tiles: dict[str, TileConfig] = {
            kernel: config for kernel in tuned.KERNELS
            if (config := of_file.get((kernel, served(kernel, head_dim, head_dim, self.arch)))) is not None}
        trial = Trial(which, head_dim, self.device, self.dtype, self.asked.length, tiles=tiles)
        row = rows[which, head_dim] = choose_schedule(trial, self.timer)
        shown = {"pass": which, "head dim": head_dim, "schedule": row["schedule"], "own": row["own"],
                 "ms": _listed(row["ms"]), "not timed": _listed(row["refused"])}
        self._keep("schedules", list(rows.values()), shown)
        return None

    def split(self) -> str | None:
        """How many keys a split of decoding has."""
        if "split" in self.content and not self.asked.again:
            return _KNOWN
        row = choose_split(self.device, self.dtype, self.timer)
        self._keep("split", row, {"keys": row["keys"], "own": row["own"], "ms": _listed(row["ms"])})
        return None

    def _keep(self, name: str, value: Any, shown: dict[str, Any]) -> None:
        self.content[name] = value
        tuned.write(self.file, self.content)
        self.found.setdefault(name, []).append(shown)


_KNOWN = "the file has it already; --again searches anew"


def _listed(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items()) or "-"


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
