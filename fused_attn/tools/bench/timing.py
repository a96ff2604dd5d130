"""How long calls take, in turns and with their spread, and what memory they need."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fused_attn import torch_private

FLUSH_BYTES = 2**28  # more than the L2 cache of any card
MILLISECONDS_PER_CALLEE = 120.0  # of timed work for each implementation and pass
CLOCKED_MS = 1.0  # the shortest time that the clock of a CPU is asked to measure
MIN_ROUNDS, MAX_ROUNDS = 10, 60
SPIN_CYCLES_PER_MS = 2_000_000

Calls = dict[str, Callable[[], Any]]


def spread(times: list[float]) -> dict[str, Any]:
    """Median and the 20th and 80th percentiles, in ms."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {"ms": statistics.median(ordered), "p20": ordered[round(0.2 * last)], "p80": ordered[round(0.8 * last)]}


def measure(calls: Calls, device: str, rounds: int | None = None) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round and in a different order each round.

    On a GPU, between events on the stream: before each call the L2 cache is overwritten, and the GPU is kept busy for
    longer than the host takes to launch it, so that what is timed is the device alone. On a CPU, by the clock, quick calls
    several times in a row. ``rounds``: how many; by default as many as fit the time that the slowest is given.
    """
    names = list(calls)
    if device == "cpu":
        estimates = [min(wall_ms(call) for _ in range(1 if rounds else 3)) for call in calls.values()]
        repeat = max(1, int(CLOCKED_MS / max(1e-6, *estimates)))
        rounds = rounds or _rounds([repeat * estimate for estimate in estimates])
        walls: dict[str, list[float]] = {name: [] for name in names}
        for i in range(rounds):
            for name in _turn(names, i):
                walls[name].append(wall_ms(calls[name], repeat))
        return walls
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    host_ms = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        host_ms[name] = wall_ms(call)
        torch.cuda.synchronize()

    def events(name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch_private.cuda_sleep(int(SPIN_CYCLES_PER_MS * min(5.0, 2 * host_ms[name])))
        start.record()
        calls[name]()
        end.record()
        return start, end

    def finish(pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) for start, end in measured] for name, measured in pairs.items()}

    estimate = finish({name: [events(name), events(name)] for name in calls})
    rounds = rounds or _rounds([min(times) for times in estimate.values()])
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in _turn(names, i):
            pairs[name].append(events(name))
    return finish(pairs)


def _rounds(estimates: list[float]) -> int:
    """How many rounds there is time for, given the estimated milliseconds of each call."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(MILLISECONDS_PER_CALLEE / max(1e-6, *estimates))))


def _turn(names: list[str], i: int) -> list[str]:
    """The order of round ``i``."""
    return names[i % len(names):] + names[:i % len(names)]


def wall_ms(call: Callable[[], Any], repeat: int = 1) -> float:
    """Milliseconds of a call by the clock, the mean of ``repeat`` in a row."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) * 1e3 / repeat


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """MiB of a GPU's memory that a call takes beyond what was there before it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
