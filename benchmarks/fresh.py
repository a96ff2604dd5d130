"""What only a fresh process can tell: how long imports and first calls take, what memory peaks at, what compiling costs."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_attn.report import track

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
IMPORT_ROUNDS = 7
LONG = (4096, 16384)  # B 1, H 4, D 64, fp32: the scores of the second one alone take 4 GiB
QUADRATIC = 4096  # longest sequence that the reference is asked for
TARGETS = ("sm_80", "sm_90")

IMPORT = """
import sys, time
start = time.perf_counter()
for name in sys.argv[1].split(","):
    __import__(name)
print((time.perf_counter() - start) * 1e3)
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
from fused_attn import offline

for which in ("forward", "backward"):
    for kernel in offline.kernels(which, "plain"):
        for report in offline.compile_kernel(sys.argv[1], kernel, int(sys.argv[2]), "bf16", True):
            print(json.dumps({"pass": which, "kernel": report.kernel, "seconds": report.compile_seconds,
                              "registers": report.registers, "spill_bytes": report.spill_bytes}), flush=True)
"""


def output(code: str, *arguments: object, **variables: str) -> str:
    """What a fresh Python prints that runs ``code`` in this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True,
                          check=False, timeout=580)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def imports(rounds: int = IMPORT_ROUNDS) -> list[Row]:
    """One row: ``import torch, fused_attn`` beside ``import torch`` alone, in turns, what is on disk being in memory."""
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


def memory(lengths: Sequence[int] = LONG) -> list[Row]:
    """One row a length and pass: MiB that causal attention takes at its peak beyond q, k, v and dout."""
    rows: list[Row] = []
    for n in track(list(lengths), "memory"):
        for which in ("forward", "backward"):
            sides = ["ours", "sdpa", *(["reference"] if n <= QUADRATIC else [])]
            peaks = {side: round(float(output(MEMORY, which, side, n)) / 1024, 1) for side in sides}
            row: Row = {"case": f"fp32 d64 b1 h4 n{n} causal", "pass": which, "family": "memory", "default": True,
                        "peak_mib": peaks.pop("ours"), "peers": {side: {"peak_mib": peak} for side, peak in peaks.items()}}
            rows.append(row)
    return rows


def compile_times(targets: Sequence[str] = TARGETS, head_dims: Sequence[int] = (64, 128)) -> list[Row]:
    """One row a default kernel of causal bf16 attention: seconds of Triton and ptxas, with an empty cache."""
    rows = []
    for target, head_dim in track([(target, head_dim) for target in targets for head_dim in head_dims], "compiling"):
        with tempfile.TemporaryDirectory() as cache:
            text = output(COMPILE, target, head_dim, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0")
        for found in map(json.loads, text.splitlines()):
            seconds = found.pop("seconds")
            rows.append({"case": f"{target} bf16 d{head_dim} causal {found['kernel']}", "family": "compile", "default": True,
                         **found, "compile_s": seconds, "peers": {}})
    return rows
