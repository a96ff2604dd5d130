"""What only a fresh process can tell: how long imports and first calls take, what memory peaks at, what compiling costs."""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fused_attn.tools.bench import peers
from fused_attn.tools.bench.cases import Case, case
from fused_attn.tools.report import track

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
IMPORT_ROUNDS = 7
LONG = (4096, 16384)  # B 1, H 4, D 64, fp32: the scores of the second one alone take 4 GiB
QUADRATIC = 4096  # longest sequence that the reference is asked for
TARGETS = ("sm_80", "sm_90")

IMPORT = """
import sys, time
start = time.process_time()
for name in sys.argv[1].split(","):
    __import__(name)
print((time.process_time() - start) * 1e3)
"""

# Peak of the resident size in KiB beyond what was resident before the call: VmHWM, set back by writing 5 to clear_refs.
MEMORY = """
import sys
import torch
import torch.nn.functional as F
import fused_attn

which, how, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
q, k, v = (torch.randn(1, 4, n, 64, requires_grad=which == "backward") for _ in range(3))
dout = torch.randn(1, 4, n, 64)

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def run(q, k, v, dout):
    if how == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = fused_attn.attention(q, k, v, causal=True, backend="reference" if how == "reference" else None)
    if which == "backward":
        torch.autograd.grad(out, (q, k, v), dout)

run(*(x[:, :, :8] for x in (q, k, v, dout)))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run(q, k, v, dout)
print(status("VmHWM") - before)
"""

COMPILE = """
import json, sys
from fused_attn.tools.compile import offline

for which in ("forward", "backward"):
    for kernel in offline.kernels(which, "plain"):
        for report in offline.compile_kernel(sys.argv[1], kernel, int(sys.argv[2]), "bf16", True):
            print(json.dumps({"pass": which, "kernel": report.kernel, "seconds": report.compile_seconds,
                              "registers": report.registers, "spill_bytes": report.spill_bytes}), flush=True)
"""


# The first call of an implementation in this process, then what a call costs; CUDA itself is awake before the clock starts.
COLD = """
import functools, json, sys, time
import torch
from fused_attn.tools.bench.cases import Case
from fused_attn.tools.bench import peers

name, device, fields = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
case = Case(**{**fields, "passes": tuple(fields["passes"])})
q, k, v, dout, _ = case.inputs(device)
trained = "backward" in case.passes
q, k, v = (x.requires_grad_(trained) for x in (q, k, v))
(q @ k.mT[:, :1]).sum().item()
wait = torch.cuda.synchronize if device != "cpu" else lambda: None

def clock(call):
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return (time.perf_counter() - start) * 1e3, result

def prepared():
    attend = case.attend if name == "ours" else peers.named(name).prepare(case, device)
    return functools.partial(attend, q, k, v)

prepare_ms, call = clock(prepared)
ms, out = clock(call)
found = {"forward": {"first": prepare_ms + ms, "warm": sorted(clock(call)[0] for _ in range(7))[3]}}
if trained:
    backward = functools.partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
    found["backward"] = {"first": clock(backward)[0], "warm": sorted(clock(backward)[0] for _ in range(7))[3]}
print(json.dumps(found))
"""


def output(code: str, *arguments: object, seconds: float = 580.0, **variables: str) -> str:
    """What a fresh Python prints that runs ``code`` in this checkout, for so many seconds at most."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True,
                          check=False, timeout=max(1.0, seconds))
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def imports(rounds: int = IMPORT_ROUNDS) -> list[Row]:
    """One row: ``import torch, fused_attn`` beside ``import torch`` alone, in turns, what is on disk being in memory.

    CPU time, which other programs hardly disturb; a fresh process is too slow a thing for many rounds.
    """
    sides = {"ours": "torch,fused_attn", "torch": "torch"}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for i in track(range(rounds + 1), "imports"):
        for side in list(sides)[:: 1 if i % 2 else -1]:
            times[side].append(float(output(IMPORT, sides[side])))
    medians = {side: statistics.median(found[1:]) for side, found in times.items()}
    added = statistics.median(ours - torch for ours, torch in zip(times["ours"][1:], times["torch"][1:], strict=True))
    return [{"case": "import", "pass": "forward", "family": "imports", "ms": medians["ours"], "tflops": 0.0, "default": True,
             "added_ms": added, "peers": {"torch": {"ms": medians["torch"], "tflops": 0.0}}, "best_peer": "torch",
             "ratio_to_best_peer": round(medians["torch"] / medians["ours"], 4)}]


def memory(lengths: Sequence[int] = LONG) -> Iterator[Row]:
    """One row a length and pass: MiB that causal attention takes at its peak beyond q, k, v and dout."""
    for n in track(list(lengths), "memory"):
        for which in ("forward", "backward"):
            sides = ["ours", "sdpa", *(["reference"] if n <= QUADRATIC else [])]
            peaks = {side: round(float(output(MEMORY, which, side, n)) / 1024, 1) for side in sides}
            yield {"case": f"fp32 d64 b1 h4 n{n} causal", "pass": which, "family": "memory", "default": True,
                   "peak_mib": peaks.pop("ours"), "peers": {side: {"peak_mib": peak} for side, peak in peaks.items()}}


def compile_times(targets: Sequence[str] = TARGETS, head_dims: Sequence[int] = (64, 128)) -> Iterator[Row]:
    """One row a default kernel of causal bf16 attention: seconds of Triton and ptxas, with an empty cache."""
    for target, head_dim in track([(target, head_dim) for target in targets for head_dim in head_dims], "compiling"):
        with tempfile.TemporaryDirectory() as cache:
            text = output(COMPILE, target, head_dim, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0")
        for found in map(json.loads, text.splitlines()):
            seconds = found.pop("seconds")
            yield {"case": f"{target} bf16 d{head_dim} causal {found['kernel']}", "family": "compile", "default": True,
                   **found, "compile_s": seconds, "peers": {}}


def cold(case: Case, device: str, until: float = math.inf) -> list[Row]:
    """One row a pass: the first call in a process with empty caches on disk, that of the next process, and warm calls.

    In ms by the clock, for ours, torch's SDPA and FlexAttention: what compiling costs, and what of it the disk saves. Imports
    are not in it. No rows where it is not through at ``until`` on the monotonic clock.
    """
    found: dict[str, Row] = {}
    for name in ("ours", "sdpa", "flex"):
        reason = None if name == "ours" else peers.named(name).against(case)
        if name == "flex" and device not in peers.FLEX_DEVICES and "backward" in case.passes:
            reason = "has no backward here"
        if reason:
            found[name] = {"not run": reason}
            continue
        with tempfile.TemporaryDirectory() as cache:
            places = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
            try:
                runs = [json.loads(output(COLD, name, device, json.dumps(dataclasses.asdict(case)),
                                          seconds=min(580.0, until - time.monotonic()), **places).splitlines()[-1])
                        for _ in range(2)]
            except subprocess.TimeoutExpired:
                return []
            except RuntimeError as error:
                found[name] = {"error": str(error)[-300:]}
                continue
        found[name] = {which: {"ms": runs[1][which]["warm"], "cold_ms": runs[0][which]["first"],
                               "disk_ms": runs[1][which]["first"],
                               "tflops": float(f"{case.flops(which) / runs[1][which]['warm'] / 1e9:.4g}")}
                       for which in case.passes}
    rows: list[Row] = []
    for which in case.passes:
        of = {name: facts.get(which, facts) for name, facts in found.items()}
        ours = of.pop("ours")
        row: Row = {"pass": which, "family": "cold", "default": case.backend is None,
                    "flops": case.flops(which), "ok": "error" not in ours, **ours, "peers": of}
        timed = {name: facts["ms"] for name, facts in of.items() if "ms" in facts}
        if timed and "ms" in ours:
            best = min(timed, key=lambda name: timed[name])
            row |= {"best_peer": best, "ratio_to_best_peer": round(timed[best] / ours["ms"], 4)}
        rows.append(row)
    return rows


def cold_cases(device: str, smoke: bool = False) -> list[Case]:
    """What is called for the first time: forward and backward; and on a CPU a forward alone, which FlexAttention takes."""
    once: dict[str, Any] = {"causal": True, "family": "cold"}
    if smoke:
        return [case(24, 16, batch=1, dtype="fp32", passes=("forward",), backend="triton", **once)]
    if device == "cpu":
        shape = case(512, 64, batch=1, heads=8, dtype="fp32", **once)
        return [shape, dataclasses.replace(shape, passes=("forward",))]
    return [case(4096, d, batch=4, heads=2048 // d, **once) for d in (128, 64)]
