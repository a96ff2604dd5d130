"""How fast is it, beside every peer, on the same inputs and in turns. Nothing wrong is timed: each case is checked first."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case, Inputs, Pass, case
from benchmarks.correctness import Oracle, Row, judge
from benchmarks.peers import SDPA_DEFAULT, Attend, Peer

FLUSH_BYTES = 2**28  # more than the L2 cache of any card
MILLISECONDS_PER_CALLEE = 120.0  # of timed work for each implementation and pass
MIN_ROUNDS, MAX_ROUNDS = 10, 60
SPIN_CYCLES_PER_MS = 2_000_000
MAX_PEER_ERROR = 0.03  # relative: beyond it a peer computes something else
OURS = "ours"

Calls = dict[str, Callable[[], Any]]


def spread(times: list[float]) -> Row:
    """Median and the 20th and 80th percentiles, in ms."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {"ms": statistics.median(ordered), "p20": ordered[round(0.2 * last)], "p80": ordered[round(0.8 * last)]}


def measure(calls: Calls, device: str, rounds: int | None = None) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round and in a different order each round.

    On a GPU, between events on the stream: before each call the L2 cache is overwritten, and the GPU is kept busy for
    longer than the host takes to launch it, so that what is timed is the device alone.
    """
    if device == "cpu":
        return {name: [_wall(call) for _ in range(rounds or 2)] for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    host_ms = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host_ms[name] = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()

    def events(name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(int(SPIN_CYCLES_PER_MS * min(5.0, 2 * host_ms[name])))
        start.record()
        calls[name]()
        end.record()
        return start, end

    def finish(pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) for start, end in measured] for name, measured in pairs.items()}

    estimate = finish({name: [events(name), events(name)] for name in calls})
    slowest = max(min(times) for times in estimate.values())
    rounds = rounds or max(MIN_ROUNDS, min(MAX_ROUNDS, int(MILLISECONDS_PER_CALLEE / slowest)))
    names = list(calls)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            pairs[name].append(events(name))
    return finish(pairs)


def _wall(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """Memory a call takes beyond what was there before it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


class Contest:
    """One case, ours and every peer that takes it: first calls, checks against the oracle, then the times of each pass."""

    def __init__(self, case: Case, device: str, peers: list[Peer]) -> None:
        self.case, self.device = case, device
        self.q, self.k, self.v, self.dout = (x.detach() for x in case.inputs(device)[:4])
        if "backward" in case.passes:
            self.q, self.k, self.v = (x.requires_grad_() for x in (self.q, self.k, self.v))
        self.oracle_case, self.oracle = self._oracle()
        self.attends: dict[str, Attend] = {}
        self.outs: dict[str, torch.Tensor] = {}
        self.facts: dict[str, Row] = {}
        self.backend = case.backend(self.q, self.k, self.v)
        self._enter(OURS, lambda: case.attend)
        for peer in peers:
            reason = peer.against(case)
            if reason is None:
                self._enter(peer.name, partial(peer.prepare, case, device))
            else:
                self.facts[peer.name] = {"not run": reason}

    def _last_head(self, x: torch.Tensor) -> torch.Tensor:
        """The last key head of the last batch entry, or its group of query heads."""
        return x[-1:, -(x.shape[1] // self.case.kv_heads):]

    def _oracle(self) -> tuple[Case, Oracle]:
        part = replace(self.case, batch=1, heads=self.case.heads // self.case.kv_heads, kv_heads=1)
        return part, Oracle(part, *(self._last_head(x) for x in (self.q, self.k, self.v, self.dout)))

    def _enter(self, name: str, prepare: Callable[[], Attend]) -> None:
        """Prepares, calls once and checks; what fails is a fact about this implementation, with the reason."""
        facts: Row = {}
        self.facts[name] = facts
        try:
            start = time.perf_counter()
            attend = prepare()
            out = attend(self.q, self.k, self.v)
            results = {"out": out}
            if "backward" in self.case.passes:
                gradients = torch.autograd.grad(out, (self.q, self.k, self.v), self.dout, retain_graph=True)
                results |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
            self._synchronize()
            facts["first_call_s"] = round(time.perf_counter() - start, 3)
            wrong = self._gate(name, results, facts)
            if wrong:
                facts["error"] = wrong
            else:
                self.attends[name], self.outs[name] = attend, out
        except Exception as error:
            facts["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"

    def _gate(self, name: str, results: dict[str, torch.Tensor], facts: Row) -> str | None:
        """What is wrong with some results: ours must pass gate E, a peer must compute the same function."""
        verdicts = {key: judge(self.oracle_case, self.oracle, key, self._last_head(x), with_r=False)
                    for key, x in results.items()}
        facts["E"] = {key: round(verdict["E"], 4) for key, verdict in verdicts.items()}
        if name == OURS:
            failed = [key for key, verdict in verdicts.items() if not verdict["ok"]]
            return f"gate: {', '.join(failed)} beyond gate E" if failed else None
        for key, x in results.items():
            ref = self.oracle.results[key][0]
            difference = ((self._last_head(x).double() - ref).norm() / ref.norm()).item()
            if not difference <= MAX_PEER_ERROR:
                return f"gate: {key} differs from the reference by {difference:.2g}"
        return None

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _calls(self, which: Pass) -> Calls:
        q, k, v, dout = self.q, self.k, self.v, self.dout
        if which == "forward":
            return {name: partial(attend, q, k, v) for name, attend in self.attends.items()}
        backward = partial(torch.autograd.grad, inputs=(q, k, v), grad_outputs=dout, retain_graph=True)
        return {name: partial(backward, out) for name, out in self.outs.items()}

    def row(self, which: Pass) -> Row:
        """The times of one pass, ours first and each peer's beside it."""
        case, ours = self.case, dict(self.facts[OURS])
        row: Row = {"pass": which, "family": case.family, "dtype": case.dtype, "head_dim": case.head_dim, "causal": case.causal,
                    "n_queries": case.n_queries, "n_keys": case.n_keys, "flops": case.flops(which), "backend": self.backend,
                    "default": self.device != "cpu" and case.deterministic is not False}
        peers = {name: dict(facts) for name, facts in self.facts.items() if name != OURS}
        if OURS not in self.attends:
            return {**row, **ours, "ok": None if ours["error"].startswith("OutOfMemoryError") else False, "peers": peers}
        calls = self._calls(which)
        times = measure(calls, self.device)
        timed = {name: spread(ms) for name, ms in times.items()}
        for result in timed.values():
            result["tflops"] = float(f"{case.flops(which) / result['ms'] / 1e9:.4g}")
            if which == "forward":
                result["gbytes_per_s"] = float(f"{case.bytes_forward / result['ms'] / 1e6:.4g}")
        best = min((name for name in timed if name != OURS), key=lambda name: timed[name]["ms"], default=None)
        row |= {**ours, **timed.pop(OURS), "ok": True, "peak_mib": peak_mib(calls[OURS], self.device), "best_peer": best,
                "rounds": len(times[OURS]), "peers": {name: facts | timed.get(name, {}) for name, facts in peers.items()}}
        if best is not None:
            row["ratio_to_best_peer"] = round(timed[best]["ms"] / row["ms"], 4)
            row["best_peer_peak_mib"] = peak_mib(calls[best], self.device)
        return row


def time_case(case: Case, device: str, peers: list[Peer]) -> Iterator[Row]:
    """The rows of a case, one a pass, each as soon as it is measured."""
    contest = Contest(case, device, peers)
    for which in case.passes:
        yield contest.row(which)


def _repeat(attend: Attend, inputs: Inputs, times: int) -> None:
    with torch.no_grad():
        for _ in range(times):
            attend(*inputs[:3])


def overhead(device: str, calls: int) -> Row:
    """Microseconds of host time a call, without gradients, on shapes whose device time is next to nothing."""
    subject = case(16, 64, batch=1, heads=1, dtype="fp16") if device != "cpu" else case(16, 16, batch=1, heads=1, dtype="fp32")
    inputs: Inputs = subject.inputs(device)
    row: Row = {"pass": "forward", "family": "overhead", "calls": calls}
    for name, attend in ((OURS, subject.attend), (SDPA_DEFAULT.name, SDPA_DEFAULT.prepare(subject, device))):
        rounds = []
        for _ in range(6):  # the first one warms up
            rounds.append(_wall(partial(_repeat, attend, inputs, calls)) / calls * 1e3)
            if device != "cpu":
                torch.cuda.synchronize()
        row[f"{name}_us"] = round(statistics.median(rounds[1:]), 2)
    return row
