"""What ``fused-attn tune`` decides beside tiles: the schedule of each pass, and how many keys a split of decoding has.

Candidates are held to fp64 on the card, then timed in turns; one that is right and quicker than the package's own choice by
more than the noise takes its place there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

import fused_attn
from fused_attn.call.spec import NO_OTHERS, AttentionSpec
from fused_attn.plan import schedules, tuned
from fused_attn.plan.plan import Made, collect, finish, perform
from fused_attn.plan.problem import Problem
from fused_attn.plan.tiles import SPLIT, separate_first
from fused_attn.plan.tuned import Pass
from fused_attn.targets import arch_of
from fused_attn.tools.bench.oracle import error_ratio, max_r
from fused_attn.tools.trial import Trial, told

GAIN = 0.98  # of the time: a smaller gain is noise
Timer = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]  # calls by name -> milliseconds


def performed(found: list[Made]) -> None:
    """Performs launches and operations again."""
    for made in found:
        perform(made)


def quickest(own: str, ms: dict[str, float]) -> str:
    """The candidate of the least time, or ``own`` where nothing beats it by more than the noise."""
    best = min(ms, key=lambda name: ms[name])
    return best if own not in ms or ms[best] < GAIN * ms[own] else own


def choose_schedule(trial: Trial, timer: Timer) -> dict[str, Any]:
    """A row of the file: the quickest schedule of the trial's pass, every candidate's time, and why others were not timed."""
    refused: dict[str, str] = {}
    right: dict[str, list[Made]] = {}
    for name in tuned.SCHEDULES[trial.which]:
        verdict = "; ".join(trial.against(name)) or trial.wrong(name)
        if verdict is None:
            right[name] = trial.made(name)
        else:
            refused[name] = verdict
    ms = timer({name: functools.partial(performed, made) for name, made in right.items()}) if right else {}
    own = own_schedule(trial, refused)
    return {"pass": trial.which, "head_dim": trial.head_dim, "schedule": quickest(own, ms) if ms else own, "own": own,
            "ms": {name: round(value, 4) for name, value in ms.items()}, "refused": refused}


def own_schedule(trial: Trial, refused: dict[str, str]) -> str:
    """The schedule that the package takes where no file says otherwise."""
    if trial.which == "forward":
        return "pointers"
    fused = "fused" not in refused and not separate_first(trial.head_dim, trial.head_dim, arch_of(trial.device))
    return "fused" if fused else "separate"


def choose_split(device: torch.device, dtype: torch.dtype, timer: Timer) -> dict[str, Any]:
    """The entry of the file that says how many keys a split of decoding has at least: one query, 32 heads for 8 of keys."""
    heads, keys = ((4, 2), 1024) if device.type == "cpu" else ((32, 8), 16384)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 128, device=device, generator=generator).to(dtype)
               for h, n in ((heads[0], 1), (heads[1], keys), (heads[1], keys)))
    exact = fused_attn.attention(q.double(), k.double(), v.double(), backend="reference")
    spec = AttentionSpec(128**-0.5, hopper="pointers")
    refused: dict[str, str] = {}
    right: dict[str, list[Made]] = {}
    for split in tuned.SPLITS:
        problem = Problem.of(q, k, v, spec, NO_OTHERS)._replace(split=split)
        steps = schedules.named(schedules.FORWARD, "splits").steps
        try:
            out = finish(steps(problem))[0]
            verdict = None if (ratio := error_ratio(out, exact)) <= max_r(dtype, 128)[0] else f"R against fp64 is {ratio:.3g}"
        except Exception as error:
            verdict = told(error)
        if verdict is None:
            right[str(split)] = collect(steps(problem))[0]
            performed(right[str(split)])
        else:
            refused[str(split)] = verdict
    ms = timer({name: functools.partial(performed, made) for name, made in right.items()}) if right else {}
    return {"keys": int(quickest(str(SPLIT), ms)) if ms else SPLIT, "own": SPLIT,
            "ms": {name: round(value, 4) for name, value in ms.items()}, "refused": refused}


def passes(head_dims: list[int], arch: str) -> list[tuple[Pass, int]]:
    """Each pass at the widest head dim of those that are made alike, once."""
    return list(dict.fromkeys((which, tuned.served_as(which, head_dim, head_dim, arch))
                              for head_dim in head_dims for which in tuned.SCHEDULES))
