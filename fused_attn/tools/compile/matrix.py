"""``fused-attn compile``: one report a kernel, for one target or for all of them; with ``--profile`` the static profile."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from fused_attn import files
from fused_attn.plan.tiles import Kernel
from fused_attn.settings import HOPPER_SCHEDULES
from fused_attn.targets import COMPILED
from fused_attn.tools import options
from fused_attn.tools.compile import offline, profile, traffic
from fused_attn.tools.compile.traffic import Traffic
from fused_attn.tools.report import print_table, track

# Configurations that a change must not make worse than the rules of Report.problems: fp16 and bf16 at these head dims.
GATED_TARGETS = {"plain": ("sm_80", "sm_90", "sm_100", "gfx942"),
                 "fused": ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"),
                 "decode": ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"),
                 **dict.fromkeys(("softcap", "bias", "alibi", "mask"), ("sm_80", "sm_90"))}
GATED_HEAD_DIMS = (32, 64, 128)
ATTENTION = ("forward", "splits", "combine", "delta", "dq", "dkv", "dk", "dv", "backward", "statistics", "ordered")


class Job(NamedTuple):
    """What one process compiles: a target's kernels for some types and head dims."""

    target: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    causal: bool
    feature: str = "plain"
    hopper: str = "pointers"

    def __str__(self) -> str:
        return (f"{self.target} {' '.join(self.dtypes)} D{self.head_dims} causal={self.causal} {self.feature}"
                + f" {self.hopper}" * (self.hopper != "pointers"))

    def arguments(self) -> list[str]:
        """The arguments of ``fused-attn compile`` for this job."""
        return ["--target", self.target, "--dtype", *self.dtypes, "--feature", self.feature, "--hopper", self.hopper,
                "--head-dim", *map(str, self.head_dims), *["--causal"] * self.causal]


def gated(row: dict[str, Any]) -> bool:
    """Whether a default configuration is held to next to no local memory in its main loops and at most 160 bytes of spill."""
    return (row["target"] in GATED_TARGETS.get(row["feature"], ()) and row["head_dim"] in GATED_HEAD_DIMS
            and row["dtype"] in ("fp16", "bf16") and row["kernel"] in ATTENTION)


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: the full rules where it is gated, else only what would not launch at all."""
    report = offline.Report(**row)
    if gated(row):
        return report.problems()
    return report.problems(max_spill=sys.maxsize, max_local=1.0, max_seconds=math.inf)


def compile_one(arguments: argparse.Namespace) -> int:
    """Compiles for one target, prints the reports and keeps them in ``--out``; the status says whether a kernel did not
    compile, or ``--gate`` found a problem."""
    _check_page(arguments.out, arguments.profile)
    passes = ("forward", "backward") if arguments.which == "all" else (arguments.which,)
    for dtype, head_dim in product(arguments.dtype, arguments.head_dim):
        if reason := offline.refusal(arguments.target, head_dim, dtype, arguments.feature, arguments.hopper):
            raise options.BadInputError(reason)
    work = [(*shape, kernel) for *shape, which in product(arguments.dtype, arguments.head_dim, passes)
            for kernel in offline.kernels(which, arguments.feature, arguments.hopper)]
    reports, rows, failed = [], [], []
    with options.until_interrupted() as interrupted:
        for dtype, head_dim, kernel in work:
            try:
                found = offline.compile_kernel(arguments.target, kernel, head_dim, dtype, arguments.causal,
                                               feature=arguments.feature, hopper=arguments.hopper)
            except Exception as error:  # whatever the compiler or ptxas has against it
                failed.append(f"{kernel} {dtype} D{head_dim}: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")
                continue
            moved = _traffic(arguments, kernel, head_dim, dtype) if arguments.profile else []
            for number, report in enumerate(found):
                reports.append(report)
                each = moved[number] if moved else None
                rows.append(dataclasses.asdict(profile.profile(report, each)) if arguments.profile else report.row())
                if arguments.json:
                    print(json.dumps(rows[-1]), flush=True)
    if rows and not arguments.json:
        _show(rows, arguments)
    if rows and arguments.out is not None:
        _keep(rows, arguments.out, arguments.profile)
    broken = {f"{report.kernel} {report.dtype} D{report.head_dim}": report.problems() for report in reports}
    for line in (*failed, *(f"{name}: {'; '.join(found)}" for name, found in broken.items() if found)):
        print(f"{arguments.target} {line}", file=sys.stderr)
    complete = not interrupted.is_set()
    if complete and not rows and not failed:
        raise options.BadInputError(f"{arguments.target} has no kernel of this pass, feature and schedule at these sizes")
    return options.status(complete, not failed and not (arguments.gate and any(broken.values())))


def _traffic(arguments: argparse.Namespace, kernel: Kernel, head_dim: int, dtype: str) -> list[Traffic]:
    """What a tile of a kernel moves, by its launches; nothing where it is not counted."""
    known = kernel in traffic.KERNELS and arguments.feature in traffic.FEATURES and dtype in ("fp16", "bf16")
    if not known or not arguments.target.startswith("sm_"):
        return []
    return traffic.traffic(arguments.target, kernel, head_dim, dtype, arguments.causal, feature=arguments.feature,
                           hopper=arguments.hopper)


def _show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    window = "causal" if arguments.causal else "full"
    title = f"{arguments.target}, {window}, {arguments.feature}, Triton {rows[0]['triton']}"
    if arguments.profile:
        for name, table in profile.tables(rows).items():
            print_table(table, f"{title}: {name}")
    else:
        shown = ("kernel", "dtype", "head_dim", "config", "registers", "spill_bytes", "local_in_loops", "shared_bytes",
                 "matrix", "loop_instructions", "warnings", "compile_seconds")
        print_table([{**{key: row[key] for key in shown}, "matrix": sum(row["matrix"].values())} for row in rows], title)


def _check_page(out: Path | None, static_profile: bool) -> None:
    """Raises BadInputError where the readable table of a profile cannot be written beside the rows, or would replace a file
    that is no such table."""
    if out is None or not static_profile:
        return
    page = out.with_suffix(".md")
    options.writable(page)
    try:
        foreign = page.exists() and not page.read_bytes().startswith(profile.TITLE.encode())
    except OSError as error:
        raise options.BadInputError(f"--out: {str(page)!r}, for the table beside the rows, is there and cannot be read: "
                                    f"{error.strerror}") from error
    if foreign:
        raise options.BadInputError(f"--out: the table beside the rows is {str(page)!r}, which is there and no profile; "
                                    "expected another name")


def _keep(rows: list[dict[str, Any]], out: Path, static_profile: bool) -> None:
    """Writes the rows, and of a profile a readable table beside them."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    files.write(out, f"[\n{lines}\n]\n")
    if static_profile:
        files.write(out.with_suffix(".md"), profile.markdown(rows))
    print(f"{len(rows)} rows in {out}", file=sys.stderr)


def jobs() -> Iterator[Job]:
    """The jobs of the whole matrix.

    Plain attention: fp16 and bf16 everywhere, fp32 by TF32 on NVIDIA's two. Every feature: in every type on every target at
    head dim 64, causal; in bf16 at 128 as well on sm_80, sm_90 and gfx942. The other schedules of sm_90 with what they take.
    """
    halves, exact, wide = ("bf16", "fp16"), ("fp32", "fp64"), (64, 128, 256)
    for causal, target in product((False, True), COMPILED):
        yield Job(target, halves, (32, *wide), causal)
    for target in COMPILED:
        yield Job(target, exact, (64,), True)
    for target in ("sm_80", "sm_90"):
        yield Job(target, ("tf32", "tf32x3"), (64,), True)
    for feature, target in product(offline.FEATURES[1:], COMPILED):
        if feature in ("decode", "fused"):
            if (feature, target) != ("fused", "gfx1100"):
                yield Job(target, ("bf16",), wide, True, feature)
            continue
        yield Job(target, ("fp16", *exact) if feature == "bias bf16" else halves + exact, (64,), True, feature)
        if target in ("sm_80", "sm_90", "gfx942") and feature != "bias bf16":
            yield Job(target, ("bf16",), (128,), True, feature)
    for target in ("sm_80", "sm_90"):
        yield Job(target, ("bf16",), (192, 576), True)
    for target in ("sm_86", "sm_120"):  # whose shared memory is the smallest of NVIDIA's
        yield Job(target, ("bf16",), (128, 256), True, "bias fp32, mask")
    yield from on_hopper()
    for hopper, feature in product(HOPPER_SCHEDULES[1:], ("softcap", "sinks", "packed")):
        if (hopper, feature) != ("specialized", "packed"):
            yield Job("sm_90", ("bf16",), (64, 128, 256), True, feature, hopper)


def on_hopper() -> Iterator[Job]:
    """Plain attention on the other schedules of sm_90."""
    for hopper, causal in product(HOPPER_SCHEDULES[1:], (False, True)):
        yield Job("sm_90", ("bf16",), (64, 128, 256), causal, "plain", hopper)


def profiled() -> Iterator[Job]:
    """Jobs of the static profile: plain attention, decoding, fused backward and all schedules of sm_90; bf16, four targets."""
    targets, wide = ("sm_80", "sm_90", "sm_100", "gfx942"), (64, 128, 256)
    for target, causal in product(targets, (False, True)):
        yield Job(target, ("bf16",), wide, causal)
    for target in targets:
        yield Job(target, ("bf16",), wide, False, "decode")
    for target, causal in product(targets, (False, True)):
        yield Job(target, ("bf16",), wide, causal, "fused")
    yield from on_hopper()


def run(out: Path | None, static_profile: bool) -> int:
    """Compiles the whole matrix, or all that is profiled, with a process for each job. Writes the rows, and for the profile a
    readable table beside them; fails where a rule is broken. Ctrl-C ends the jobs at work, and what is done by then is kept."""
    _check_page(out, static_profile)
    work = list(profiled() if static_profile else jobs())
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    futures: dict[Future[tuple[list[dict[str, Any]], str]], Job] = {}
    with options.until_interrupted() as interrupted, _workers() as pool:
        for job in work:
            futures[pool.submit(_subprocess, job, static_profile)] = job
        for future in track(as_completed(list(futures)), "compiling", len(work)):
            job, (done, error) = futures.pop(future), future.result()
            rows += done
            if error:
                failures.append(f"{job}: {error}")
    rows += [row for future in futures if not future.cancelled() for row in future.result()[0]]  # of jobs that were interrupted
    rows.sort(key=lambda row: (row["target"], row["dtype"], row["head_dim"], row["feature"], row["hopper"], row["causal"],
                               row["kernel"]))
    for row in () if static_profile else rows:
        if found := problems(row):
            failures.append(f"{row['target']} {row['kernel']} {row['dtype']} D{row['head_dim']} causal={row['causal']} "
                            f"{row['feature']} {row['hopper']}: " + "; ".join(found))
    if rows and out is not None:
        _keep(rows, out, static_profile)
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(failures)} problems")
    return options.status(not interrupted.is_set(), not failures)


_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core. Whatever ends the code within early ends the processes at work, and no other one starts."""
    _stopped.clear()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield pool
        except BaseException:
            _stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                process.kill()
            raise


def _subprocess(job: Job, static_profile: bool) -> tuple[list[dict[str, Any]], str]:
    """Rows of one job, in a process of its own: a compiler that crashes takes only its job along."""
    command = [sys.executable, "-m", "fused_attn", "compile", "--json", *job.arguments(), *["--profile"] * static_profile]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          stdin=subprocess.DEVNULL) as process:
        _running.add(process)
        if _stopped.is_set():  # checked after it was added: whoever stops does these in the opposite order
            process.kill()
        output, errors = process.communicate()
        _running.discard(process)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    return rows, "" if process.returncode == 0 else f"exit status {process.returncode}: {errors[-400:]}"
