"""Times ours beside every peer, on the same inputs and in turns. Nothing wrong is timed: each case is checked first."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fused_attn.tools.bench.cases import Case, Inputs, Pass, case
from fused_attn.tools.bench.oracle import Oracle, Row, judge
from fused_attn.tools.bench.peers import SDPA_DEFAULT, Attend, Peer
from fused_attn.tools.bench.timing import Calls, measure, peak_mib, spread, wall_ms

MAX_PEER_ERROR = 0.03  # relative: beyond it a peer computes something else
OURS, YARDSTICK = "ours", "plain"

Tensors = dict[str, torch.Tensor]
Gate = Callable[[str, Tensors], tuple[Row, str | None]]  # (implementation, results) -> (facts, what is wrong with them)


@dataclass
class Entry:
    """One implementation, ready to be called.

    ``call`` returns out, and builds the graph of ``leaves``, which get gradients from ``dout``. ``common`` brings a result,
    "out" or the gradient "d" + name of a leaf, into the layout that all implementations share.
    """

    call: Callable[[], torch.Tensor]
    leaves: Tensors = field(default_factory=dict)
    dout: torch.Tensor | None = None
    common: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, x: x

    def gradients(self, out: torch.Tensor, keep: bool = True) -> tuple[torch.Tensor, ...]:
        """The gradients of every leaf; ``keep`` retains the graph for another time."""
        return torch.autograd.grad(out, list(self.leaves.values()), self.dout, retain_graph=keep)

    def step(self) -> None:
        """Forward and backward as in training."""
        self.gradients(self.call(), keep=False)

    def results(self, backward: bool) -> Tensors:
        """out and the gradients, in the layout that all implementations share."""
        out = self.call()
        found = {"out": out.detach()}
        if backward:
            found |= zip((f"d{leaf}" for leaf in self.leaves), self.gradients(out, keep=False), strict=True)
        return {name: self.common(name, x) for name, x in found.items()}


@dataclass
class Subject:
    """What several implementations compute. ``peers`` maps a name to what prepares the peer, or to the reason why not.

    ``flops`` and ``bytes`` are those of a pass: of matrix products, and the least that must be moved. ``facts`` are in every
    row. ``tokens`` is how many a pass goes through, where that is a measure; whole training steps are then timed as well.
    ``yardstick`` computes something else, whose time is given for comparison; it is not checked.
    """

    passes: tuple[Pass, ...]
    ours: Callable[[], Entry]
    peers: dict[str, Callable[[], Entry] | str]
    gate: Gate
    flops: Callable[[Pass], int]
    bytes: Callable[[Pass], int]
    facts: Row
    tokens: int | None = None
    yardstick: Callable[[], Entry] | None = None


class Contest:
    """One subject, ours and every peer that takes it: first calls, checks, then the times of each pass."""

    def __init__(self, subject: Subject, device: str, rounds: int | None = None) -> None:
        self.subject, self.device, self.rounds = subject, device, rounds
        self.entries: dict[str, Entry] = {}
        self.outs: Tensors = {}
        self.facts: dict[str, Row] = {}
        self._enter(OURS, subject.ours)
        for name, prepare in subject.peers.items():
            if isinstance(prepare, str):
                self.facts[name] = {"not run": prepare}
            else:
                self._enter(name, prepare)
        if subject.yardstick is not None:
            self._enter(YARDSTICK, subject.yardstick)

    def _enter(self, name: str, prepare: Callable[[], Entry]) -> None:
        """Prepares, calls once and checks; what fails is a fact about this implementation, with the reason."""
        facts: Row = {}
        self.facts[name] = facts
        try:
            start = time.perf_counter()
            entry = prepare()
            out = entry.call()
            results = {"out": out}
            if "backward" in self.subject.passes:
                results |= zip((f"d{leaf}" for leaf in entry.leaves), entry.gradients(out), strict=True)
            if self.device != "cpu":
                torch.cuda.synchronize()
            facts["first_call_s"] = round(time.perf_counter() - start, 3)
            results = {key: entry.common(key, x.detach()) for key, x in results.items()}
            found, wrong = ({}, None) if name == YARDSTICK else self.subject.gate(name, results)
            facts |= found
            if wrong:
                facts["error"] = f"gate: {wrong}"
            else:
                self.entries[name], self.outs[name] = entry, out
        except Exception as error:
            facts["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"

    def calls(self, which: Pass) -> Calls:
        """What is timed of each implementation that passed its checks."""
        if which == "forward":
            return {name: entry.call for name, entry in self.entries.items()}
        return {name: partial(entry.gradients, self.outs[name]) for name, entry in self.entries.items()}

    def row(self, which: Pass) -> Row:
        """The times of one pass, ours first and each peer's beside it."""
        subject, ours = self.subject, dict(self.facts[OURS])
        flops, moved = subject.flops(which), subject.bytes(which)
        row: Row = {"pass": which, **subject.facts, "flops": flops, "bytes": moved}
        peers = {name: dict(facts) for name, facts in self.facts.items() if name not in (OURS, YARDSTICK)}
        if OURS not in self.entries:
            return {**row, **ours, "ok": None if ours["error"].startswith("OutOfMemoryError") else False, "peers": peers}
        calls = self.calls(which)
        times = measure(calls, self.device, self.rounds)
        timed = {name: spread(ms) for name, ms in times.items()}
        peaks = {name: peak_mib(call, self.device) for name, call in calls.items()}
        del calls  # it holds graphs
        for result in timed.values():
            result["tflops"] = float(f"{flops / result['ms'] / 1e9:.4g}")
            result["gbytes_per_s"] = float(f"{moved / result['ms'] / 1e6:.4g}")
            if subject.tokens is not None:
                result["tokens_per_s"] = float(f"{1e3 * subject.tokens / result['ms']:.5g}")
        if subject.tokens is not None and which == "backward":
            self._steps(timed)
        if YARDSTICK in timed:
            row |= {"plain_ms": timed[YARDSTICK]["ms"], "times_plain": round(timed[OURS]["ms"] / timed.pop(YARDSTICK)["ms"], 3)}
        best = min((name for name in timed if name != OURS), key=lambda name: timed[name]["ms"], default=None)
        row |= {**ours, **timed.pop(OURS), "ok": True, "peak_mib": peaks[OURS], "best_peer": best,
                "rounds": len(times[OURS]), "peers": {name: facts | timed.get(name, {}) for name, facts in peers.items()}}
        if best is not None:
            row["ratio_to_best_peer"] = round(timed[best]["ms"] / row["ms"], 4)
            row["best_peer_peak_mib"] = peaks[best]
        return row

    def _steps(self, timed: dict[str, Row]) -> None:
        """Adds to the rows of a backward what a whole step takes: ms, tokens a second, and MiB at its peak."""
        assert self.subject.tokens is not None
        self.outs.clear()  # and with them the graphs of the passes
        steps: Calls = {name: entry.step for name, entry in self.entries.items()}
        for name, times in measure(steps, self.device, self.rounds).items():
            ms = spread(times)["ms"]
            timed[name] |= {"step_ms": ms, "tokens_per_s": float(f"{1e3 * self.subject.tokens / ms:.5g}"),
                            "step_peak_mib": peak_mib(steps[name], self.device)}

    def rows(self) -> Iterator[Row]:
        """One row a pass, each as soon as it is measured."""
        for which in self.subject.passes:
            yield self.row(which)


def difference(x: torch.Tensor, ref: torch.Tensor) -> float:
    """|x - ref| / |ref|, where 0 / 0 is 0."""
    error, size = (x.double() - ref.double()).norm().item(), ref.double().norm().item()
    return error / size if size else error


def gate_by(exact: Tensors, limits: Callable[[str], float], peers_too: bool = False) -> Gate:
    """A gate on the relative error to ``exact``: ours must lie within ``limits(result)``, peers within ``MAX_PEER_ERROR``, or
    with ``peers_too`` within the same limits."""

    def gate(name: str, results: Tensors) -> tuple[Row, str | None]:
        errors = {key: difference(x, exact[key]) for key, x in results.items()}
        wrong = [f"{key} differs from the reference by {error:.2g}" for key, error in errors.items()
                 if not error <= (limits(key) if name == OURS or peers_too else MAX_PEER_ERROR)]
        facts = {"relative": {"out": errors["out"], "worst": max(errors.values())}}
        return facts, "; ".join(wrong[:3]) or None

    return gate


def subject_of(case: Case, device: str, peers: list[Peer]) -> Subject:
    """A case of plain attention, held to gate E on the last key head of the last batch entry."""
    q, k, v, dout = (x.detach() for x in case.inputs(device)[:4])
    leaves = {"q": q, "k": k, "v": v}
    if "backward" in case.passes:
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    group = case.heads // case.kv_heads

    def last_head(x: torch.Tensor) -> torch.Tensor:
        """The last key head of the last batch entry, or its group of query heads."""
        return x[-1:, -(x.shape[1] // case.kv_heads):]

    part = replace(case, batch=1, heads=group, kv_heads=1)
    oracle = Oracle(part, *(last_head(x) for x in (q, k, v, dout)))

    def gate(name: str, results: Tensors) -> tuple[Row, str | None]:
        verdicts = {key: judge(part, oracle, key, last_head(x), with_r=False) for key, x in results.items()}
        facts = {"E": {key: round(verdict["E"], 4) for key, verdict in verdicts.items()}}
        if name == OURS:
            failed = [key for key, verdict in verdicts.items() if not verdict["ok"]]
            return facts, f"{', '.join(failed)} beyond gate E" if failed else None
        for key, x in results.items():
            error = difference(last_head(x), oracle.results[key][0])
            if not error <= MAX_PEER_ERROR:
                return facts, f"{key} differs from the reference by {error:.2g}"
        return facts, None

    def enter(prepare: Callable[[], Attend]) -> Entry:
        return Entry(partial(prepare(), q, k, v), leaves, dout)

    against = {peer.name: peer.against(case) for peer in peers}
    return Subject(
        case.passes, partial(enter, lambda: case.attend),
        {peer.name: against[peer.name] or partial(enter, partial(peer.prepare, case, device)) for peer in peers},
        gate, case.flops, case.bytes,
        {"family": case.family, "dtype": case.dtype, "head_dim": case.head_dim, "causal": case.causal,
         "n_queries": case.n_queries, "n_keys": case.n_keys, "backend": case.answered_by(q, k, v),
         "default": case.backend is None and case.deterministic is None and case.hopper == "auto"})


def time_case(case: Case, device: str, peers: list[Peer], rounds: int | None = None) -> Iterator[Row]:
    """The rows of a case of plain attention."""
    yield from Contest(subject_of(case, device, peers), device, rounds).rows()


def overhead(device: str, calls: int) -> Row:
    """Microseconds of host time a call, without gradients, on shapes whose device time is next to nothing."""
    on_gpu = device != "cpu"
    subject = case(16, 64 if on_gpu else 16, batch=1, heads=1, dtype="fp16" if on_gpu else "fp32",
                   backend=None if on_gpu else "triton")
    inputs: Inputs = subject.inputs(device)
    row: Row = {"pass": "forward", "family": "overhead", "calls": calls}
    for name, attend in ((OURS, subject.attend), (SDPA_DEFAULT.name, SDPA_DEFAULT.prepare(subject, device))):
        rounds = []
        for _ in range(6):  # the first one warms up
            with torch.no_grad():
                rounds.append(wall_ms(partial(attend, *inputs[:3]), calls) * 1e3)
            if on_gpu:
                torch.cuda.synchronize()
        row[f"{name}_us"] = round(statistics.median(rounds[1:]), 2)
    return row
