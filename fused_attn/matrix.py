"""``fused-attn compile``: one report a kernel, for one target or for all of them; with ``--profile`` the static profile."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from fused_attn import offline, profile
from fused_attn.report import print_table
from fused_attn.settings import RUNGS

# Configurations that a change must not make worse than the rules of Report.problems: halves at these head dims.
GATED_TARGETS = {"plain": ("sm_80", "sm_90", "sm_100", "gfx942"),
                 "fused": ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"),
                 "decode": ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"),
                 **dict.fromkeys(("softcap", "bias", "alibi", "mask"), ("sm_80", "sm_90"))}
GATED_HEAD_DIMS = (32, 64, 128)
ATTENTION = ("forward", "shares", "combine", "delta", "dq", "dkv", "dk", "dv", "backward", "statistics", "ordered")


class Job(NamedTuple):
    """What one process compiles: a target's kernels for some head dims."""

    target: str
    dtype: str
    head_dims: tuple[int, ...]
    causal: bool
    feature: str = "plain"
    rung: str = "pointers"

    def __str__(self) -> str:
        return (f"{self.target} {self.dtype} D{self.head_dims} causal={self.causal} {self.feature}"
                + f" {self.rung}" * (self.rung != "pointers"))

    def arguments(self) -> list[str]:
        """Of ``fused-attn compile``."""
        return ["--target", self.target, "--dtype", self.dtype, "--feature", self.feature, "--rung", self.rung,
                "--head-dim", *map(str, self.head_dims), *["--causal"] * self.causal]


def gated(row: dict[str, Any]) -> bool:
    """Whether a default configuration is held to no local memory in a main loop and at most 64 bytes of spill."""
    return (row["target"] in GATED_TARGETS.get(row["feature"], ()) and row["head_dim"] in GATED_HEAD_DIMS
            and row["dtype"] in ("fp16", "bf16") and row["kernel"] in ATTENTION)


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: the full rules where it is gated, else only what would not launch at all."""
    report = offline.Report(**row)
    return report.problems() if gated(row) else report.problems(max_spill=sys.maxsize, local_in_loops=True)


def compile_one(arguments: argparse.Namespace) -> int:
    """Compiles for one target and prints the reports; the status says whether ``--gate`` found a problem."""
    passes = ("forward", "backward") if arguments.which == "all" else (arguments.which,)
    reports, rows = [], []
    for dtype, head_dim, which in product(arguments.dtype, arguments.head_dim, passes):
        for kernel in offline.kernels(which, arguments.feature, arguments.rung):
            for report in offline.compile_kernel(arguments.target, kernel, head_dim, dtype, arguments.causal,
                                                 feature=arguments.feature, rung=arguments.rung):
                reports.append(report)
                rows.append(dataclasses.asdict(profile.profile(report)) if arguments.profile else report.row())
                if arguments.json:
                    print(json.dumps(rows[-1]), flush=True)
    if not rows:
        print(f"{arguments.target}: no configuration of {arguments.feature} for these head dims and types", file=sys.stderr)
    elif not arguments.json:
        window = "causal" if arguments.causal else "full"
        title = f"{arguments.target}, {window}, {arguments.feature}, Triton {rows[0]['triton']}"
        if arguments.profile:
            for name, table in profile.tables(rows).items():
                print_table(table, f"{title}: {name}")
        else:
            shown = ("kernel", "dtype", "head_dim", "config", "registers", "spill_bytes", "local_in_loops", "shared_bytes",
                     "matrix", "loop_instructions", "warnings", "compile_seconds")
            print_table([{**{key: row[key] for key in shown}, "matrix": sum(row["matrix"].values())} for row in rows], title)
    broken = {f"{report.kernel} {report.dtype} D{report.head_dim}": report.problems() for report in reports}
    for name, found in broken.items():
        if found:
            print(f"{arguments.target} {name}: {'; '.join(found)}", file=sys.stderr)
    return 1 if arguments.gate and any(broken.values()) else 0


def jobs() -> Iterator[Job]:
    """Of the whole matrix.

    Plain attention: halves everywhere, fp32 and fp64 on three targets, fp32 by TF32 on NVIDIA's two.
    Every feature: bf16, causal, sm_80, sm_90, gfx942; decoding on every target. The other rungs of sm_90 with what they take.
    """
    for causal, dtype, target in product((False, True), ("bf16", "fp16"), offline.TARGETS):
        yield Job(target, dtype, (32, 64, 128, 256), causal, "plain")
    for dtype, target in product(("fp32", "fp64"), ("sm_80", "sm_90", "gfx942")):
        yield Job(target, dtype, (64,), True, "plain")
    for dtype, target in product(("tf32", "tf32x3"), ("sm_80", "sm_90")):
        yield Job(target, dtype, (64,), True, "plain")
    for feature, target in product(offline.FEATURES[1:], ("sm_80", "sm_90", "gfx942")):
        if feature not in ("decode", "fused"):
            yield Job(target, "bf16", (64, 128), True, feature)
    for target in offline.TARGETS:
        yield Job(target, "bf16", (64, 128, 256), True, "decode")
    for target in offline.TARGETS[:-1]:  # all but RDNA
        yield Job(target, "bf16", (64, 128, 256), True, "fused")
    for target in ("sm_80", "sm_90"):
        yield Job(target, "bf16", (192, 576), True, "plain")
    for target in ("sm_86", "sm_120"):  # whose shared memory is the smallest of NVIDIA's
        yield Job(target, "bf16", (64, 128, 256), True, "bias fp32, mask")
    yield from rungs()
    for rung, feature in product(RUNGS[1:], ("softcap", "sinks", "packed")):
        if (rung, feature) != ("specialized", "packed"):
            yield Job("sm_90", "bf16", (64, 128, 256), True, feature, rung)


def rungs() -> Iterator[Job]:
    """Plain attention on the other rungs of sm_90."""
    for rung, causal in product(RUNGS[1:], (False, True)):
        yield Job("sm_90", "bf16", (64, 128, 256), causal, "plain", rung)


def profiled() -> Iterator[Job]:
    """Of the static profile: plain attention, decoding, the fused backward and the rungs of sm_90 in bf16 on four targets."""
    targets, wide = ("sm_80", "sm_90", "sm_100", "gfx942"), (64, 128, 256)
    for target, causal in product(targets, (False, True)):
        yield Job(target, "bf16", wide, causal, "plain")
    for target in targets:
        yield Job(target, "bf16", wide, False, "decode")
    for target, causal in product(targets, (False, True)):
        yield Job(target, "bf16", wide, causal, "fused")
    yield from rungs()


def run(out: Path | None, static_profile: bool) -> int:
    """Compiles the whole matrix, or all that is profiled, a process a job, writes the rows, and of the profile a readable
    table beside them; fails where a rule is broken."""
    from rich.progress import Progress

    work = list(profiled() if static_profile else jobs())
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress() as progress:
        task = progress.add_task("compiling", total=len(work))
        futures = {pool.submit(_subprocess, job, static_profile): job for job in work}
        for future in as_completed(futures):
            done, error = future.result()
            rows += done
            if error:
                failures.append(f"{futures[future]}: {error}")
            progress.advance(task)
    rows.sort(key=lambda row: (row["target"], row["dtype"], row["head_dim"], row["feature"], row["rung"], row["causal"],
                               row["kernel"]))
    for row in () if static_profile else rows:
        if found := problems(row):
            failures.append(f"{row['target']} {row['kernel']} {row['dtype']} D{row['head_dim']} causal={row['causal']} "
                            f"{row['feature']} {row['rung']}: " + "; ".join(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        out.write_text(f"[\n{lines}\n]\n")
        if static_profile:
            out.with_suffix(".md").write_text(profile.markdown(rows))
        print(f"{len(rows)} rows in {out}")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(failures)} problems")
    return 1 if failures else 0


def _subprocess(job: Job, static_profile: bool) -> tuple[list[dict[str, Any]], str]:
    """Rows of one job, in a process of its own: a compiler that crashes takes only its job along."""
    command = [sys.executable, "-m", "fused_attn", "compile", "--json", *job.arguments(), *["--profile"] * static_profile]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return rows, "" if result.returncode == 0 else f"exit status {result.returncode}: {result.stderr[-400:]}"
