"""The whole proof on a card, in stages and within a time budget: python -m benchmarks.gpu --minutes 9 --out gpu-output

compile      fills Triton's and Inductor's caches on disk, on every core at once
correctness  gates R and E on every case, and the checks that only a GPU can make
features     everything beside plain attention: against fp64, and equal to the bit again
determinism  equal to the bit, run after run
roofline     how fast this card copies, and multiplies matrices
layers       packed documents, rotary positions, cached decoding, layers: each against the reference, then timed
models       a GPT and a Llama in training and generation: the same
timing       ours beside every peer present, the most informative cases first
cold         first calls in fresh processes, with empty and with filled caches

A process does the work and another one watches it: a case that hangs is ended after PATIENCE seconds, counted as failed, and
gone past. Schedules that no card has run come last in their stages.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import correctness, features, fresh, layers, models, packed, plots, report, roofline, steps
from benchmarks.cases import correctness_cases, determinism_cases, on_hopper, timing_cases
from benchmarks.conditions import clocks, conditions
from benchmarks.supervise import AGAIN, Note, supervise
from benchmarks.work import Job, PoisonedError, Row, Rows, Run, append
from fused_attn import files, settings
from fused_attn.plan import proven
from fused_attn.tools import options
from fused_attn.tools.bench import contest, peers
from fused_attn.tools.bench.cases import Case
from fused_attn.tools.bench.contest import Contest, Subject

MAX_WORKERS = 16
WORKER_GIB = 3.0  # memory of the card that a worker may need
STALL_SECONDS = 60.0  # a worker that died never answers
PATIENCE = 120.0  # seconds without a sign of life; compiling, checking or timing one case takes less


def sizes(smoke: bool) -> layers.Sizes:
    """Of the layers."""
    return layers.Sizes(1, 8, 32, 2, 32, "fp32") if smoke else layers.Sizes(8, 2048, 1024, 16, 4096, "bf16")


def small_subjects(device: str, smoke: bool) -> dict[str, Callable[[], Subject]]:
    """What the stages of layers and models run, in sizes that compile the same binaries."""
    turned, decoded = steps.shapes(device, smoke)
    asked, documents = correctness.asked(device), [16, 32, 16]
    return {
        **{packed.name(documents, h, h_kv, d, dtype, causal):
           partial(packed.subject, documents, h, h_kv, d, dtype, causal, device, asked)
           for _, h, h_kv, d, dtype, causal in packed.shapes(device, smoke)},
        **{f"rotary {shape.name}": partial(steps.rotary, shape.shrunk(), device) for shape in turned},
        **{f"cached decoding {shape.name}": partial(steps.decoding, shape.shrunk(), device) for shape in decoded},
        **layers.layers(replace(sizes(smoke), batch=1, length=64), device),
        **{f"training {one.name}": partial(models.training, replace(one, batch=1, length=64, layers=1, vocabulary=64), device)
           for one in models.configs(device, smoke)},
    }


# What, of which size or by which name, with a gradient of LSE, on which device
Task = tuple[str, Case | features.Shape | str, bool, str]


def _compile(task: Task) -> tuple[str, float, str | None]:
    """One task of a worker process: (what it compiled, seconds, error)."""
    what, case, with_dlse, device = task
    start, error = time.monotonic(), None
    torch.set_num_threads(1)
    try:
        if isinstance(case, str):
            subject = small_subjects(device, device == "cpu")[case]()
            subject.ours().results("backward" in subject.passes)
        elif isinstance(case, features.Shape):
            features.compile_only(what, case, device)
        elif what == "ours":
            inputs = case.shrunk().inputs(device)
            correctness.run(case.shrunk(), *inputs[:4], inputs[4] if with_dlse else None)
        else:
            peer = next(peer for peer in peers.found(device) if peer.name == what)
            q, k, v, dout, _ = case.inputs(device)
            leaves = [x.requires_grad_("backward" in case.passes) for x in (q, k, v)]
            out = peer.prepare(case, device)(*leaves)
            if out.requires_grad:
                torch.autograd.grad(out, leaves, dout)
    except Exception as raised:
        error = f"{type(raised).__name__}: {str(raised)[:300]}"
    name = case if isinstance(case, str) else case.dtype if isinstance(case, features.Shape) else case.name
    return f"{what}: {name}", round(time.monotonic() - start, 2), error


def compile_tasks(device: str, smoke: bool) -> list[Task]:
    """One task for each set of binaries, the slowest ones first: FlexAttention's, then what is timed."""
    timed, checked = timing_cases(smoke), [*determinism_cases(smoke), *correctness_cases(smoke)]
    flex = [peer for peer in peers.found(device) if peer.name == "flex"]
    tasks: list[Task] = [(peer.name, case, False, device) for peer in flex for case in timed if peer.against(case) is None]
    ours = {(case.compiles_as(), with_dlse): ("ours", case, with_dlse, device)
            for cases, with_dlse in ((checked, True), (timed, False)) for case in cases if case.n_queries and case.n_keys}
    checked_shape, timed_shape = features.shapes(smoke)
    shapes = [timed_shape, *(replace(checked_shape, dtype=dtype) for dtype in ("bf16", "fp16", "fp32"))]
    tasks += reversed(ours.values())
    tasks += [("layers", name, False, device) for name in small_subjects(device, smoke)]
    tasks += [(feature.name, shape, False, device) for shape in shapes for feature in features.FEATURES]
    return tasks[:2] if smoke else tasks


def compile_stage(run: Run) -> None:
    tasks = compile_tasks(run.device, run.smoke)
    workers = 1 if run.smoke else min(MAX_WORKERS, os.cpu_count() or 1, int(run.conditions["memory_gib"] / WORKER_GIB))
    until = run.until("compile")

    def rows() -> Iterable[Row]:
        done: list[tuple[str, float, str | None]] = []
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # of each worker
        with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends workers still at work
            results = pool.imap_unordered(_compile, tasks)
            with contextlib.suppress(StopIteration, multiprocessing.TimeoutError):
                while True:
                    done.append(results.next(min(STALL_SECONDS, max(0.0, until - time.monotonic()))))
                    run.note.alive()
        del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
        yield {"tasks": len(tasks), "done": len(done), "workers": workers, "cpu_seconds": round(sum(d[1] for d in done), 1),
               "slowest": sorted(done, key=lambda d: -d[1])[:8], "errors": [d for d in done if d[2]]}

    run.work("compile", [Job("caches on disk", rows)])


def _one(check: Callable[..., Row], *arguments: Any) -> Iterable[Row]:
    yield check(*arguments)


def _timed(make: Callable[[], Subject], run: Run) -> Callable[[], Iterable[Row]]:
    """The rows of a subject: checked, then timed. Each says how many there will be, which is known when the subject is made."""

    def rows() -> Iterable[Row]:
        one = Contest(make(), run.device, 2 if run.smoke else None)
        for row in one.rows():
            yield {**row, "passes": list(one.subject.passes)}

    return rows


def correctness_stage(run: Run) -> None:
    jobs = [Job(name, partial(_one, check, run.device)) for name, check in correctness.SPECIAL.items()]
    jobs += [Job(case.name, partial(_one, correctness.check, case, run.device)) for case in correctness_cases(run.smoke)]
    if on_hopper():
        jobs += [Job(f"{name} on {hopper}", partial(_one, correctness.with_hopper(hopper, check), run.device))
                 for hopper in proven.offered() for name, check in _on_every_schedule(run.smoke).items()]
    run.work("correctness", jobs)


def _on_every_schedule(smoke: bool) -> dict[str, Callable[[str], Row]]:
    """What no single call shows of a schedule: streams, graphs, compilers, and layouts that cases do not have."""
    shape, _ = features.shapes(smoke)
    sinks = next(feature for feature in features.FEATURES if feature.name == "sinks")
    return {name: correctness.SPECIAL[name] for name in ("side stream", "CUDA graph", "torch.compile")} | {
        "packed sequences": partial(features.check_packed, replace(shape, dtype="bf16")),
        "sinks": partial(features.check, sinks, replace(shape, dtype="bf16"))}


def features_stage(run: Run) -> None:
    shape, _ = features.shapes(run.smoke)
    dtypes = ("bf16",) if run.smoke else ("bf16", "fp16", "fp32")
    jobs = [Job(f"{dtype} {feature.name}", partial(_one, features.check, feature, replace(shape, dtype=dtype), run.device))
            for dtype in dtypes for feature in features.FEATURES]
    jobs += [Job("bf16 packed sequences" + " by atomics" * (not exactly),
                 partial(_one, features.check_packed, shape, run.device, exactly)) for exactly in (True, False)]
    for dim in (24,) if run.smoke else features.ODD_HEAD_DIMS:
        odd = replace(shape, head_dim=dim, head_dim_v=dim, length=33 if run.smoke else 333)
        jobs += [Job(f"bf16 {feature.name} d{dim}", partial(_one, features.check, feature, odd, run.device))
                 for feature in features.FEATURES if feature.name in features.HEAVY]
    run.work("features", jobs)


def determinism_stage(run: Run) -> None:
    runs = 2 if run.smoke else 20
    run.work("determinism", [Job(case.name, partial(_one, correctness.determinism, case, run.device, runs))
                             for case in determinism_cases(run.smoke)])


def roofline_stage(run: Run) -> None:
    run.work("roofline", [Job(name, partial(_one, job), ("forward",))
                          for name, job in roofline.jobs(run.device, run.smoke).items()])


def _subjects(run: Run, stage: str, named: dict[str, Callable[[], Subject]]) -> None:
    """Checks and times subjects, one after another."""
    run.work(stage, [Job(name, _timed(make, run), ("forward",)) for name, make in named.items()])


def layers_stage(run: Run) -> None:
    of_layers = layers.layers(sizes(run.smoke), run.device)
    if run.smoke:
        of_layers = dict(list(of_layers.items())[:2])
    _subjects(run, "layers", {**packed.subjects(run.device, run.smoke), **steps.subjects(run.device, run.smoke), **of_layers})


def models_stage(run: Run) -> None:
    _subjects(run, "models", models.subjects(run.device, run.smoke))


def cold_stage(run: Run) -> None:
    until = run.until("cold")
    if run.device != "cpu":
        torch.cuda.empty_cache()  # the memory is for other processes now
    run.work("cold", [Job(f"cold {case.name}", partial(fresh.cold, case, run.device, until), case.passes)
                      for case in fresh.cold_cases(run.device, run.smoke)])


def timing_stage(run: Run) -> None:
    present = peers.found(run.device)
    jobs = [Job("host overhead", partial(_one, contest.overhead, run.device, 2 if run.smoke else 200), ("forward",))]
    jobs += [Job(case.name, partial(contest.time_case, case, run.device, present, 2 if run.smoke else None), case.passes)
             for case in timing_cases(run.smoke)]
    _, shape = features.shapes(run.smoke)
    first = 1 + (len(jobs) - 1) // 3  # after the most informative of the plain cases
    jobs[first:first] = [Job(f"feature {feature.name}", _timed(partial(features.subject, feature, shape, run.device), run),
                             ("forward", "backward")) for feature in features.FEATURES[: 3 if run.smoke else None]]
    run.work("timing", jobs)
    if run.device != "cpu":
        run.conditions["clocks_after"] = clocks()


STAGES: dict[str, Callable[[Run], None]] = {
    "compile": compile_stage, "correctness": correctness_stage, "features": features_stage, "determinism": determinism_stage,
    "roofline": roofline_stage, "layers": layers_stage, "models": models_stage, "timing": timing_stage, "cold": cold_stage,
}
TIMED = ("timing", "layers", "models", "cold", "roofline")


def finish(run: Run, out: Path) -> int:
    """Writes what the run found, prints it, and returns the exit status."""
    checked, timed = run.rows.of("correctness", "features", "determinism"), run.rows.of(*TIMED)
    failed = sum(row.get("ok") is False for row in checked + timed)
    found = {"conditions": run.conditions, "stages": run.stages, "failed": failed}
    for name, rows in (("summary", run.rows.of(*STAGES, "restart")), ("correctness", checked)):
        files.write(out / f"{name}.json", json.dumps({**found, "rows": rows}, indent=1) + "\n")
    text = report.summary(run.conditions, run.stages, checked, timed, plots.draw(timed, run.conditions, out))
    files.write(out / "summary.md", text)
    report.show(text)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = options.Parser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=options.real(0, open_below=True), default=9.0,
                        help="time budget of the whole command (9)")
    parser.add_argument("--out", type=options.folder, default=Path("gpu-output"),
                        help="directory of the results; rows there are kept")
    parser.add_argument("--stage", choices=STAGES, action="append", help="run this stage alone; may be given again")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU in Triton's interpreter; proves no speed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # the process that is watched
    parser.add_argument("--commit", help="commit of the checkout, where git is not at hand")
    return options.run(parser, arguments, partial(measure, arguments))


def measure(arguments: list[str] | None, asked: argparse.Namespace) -> int:
    """The whole run, by a worker; a smoke run has none. ``arguments`` are those of the command."""
    if not asked.smoke and not torch.cuda.is_available():
        raise options.BadInputError("torch finds no GPU here; --smoke runs tiny shapes on the CPU")
    options.writable(*(asked.out / name for name in ("rows.jsonl", "summary.json", "correctness.json", "summary.md")),
                     *plots.pictures(asked.out))
    asked.out.mkdir(parents=True, exist_ok=True)
    note = Note(asked.out / "under-way.json")
    if asked.worker:
        return _work(asked, note)
    if asked.smoke:
        status = _work(asked, note)
        note.path.unlink(missing_ok=True)
        return status
    given = sys.argv[1:] if arguments is None else arguments

    def hung(step: Row) -> None:
        row = {**step, "ok": False, "error": f"hung: no sign of life in {PATIENCE:g} s"}
        append(asked.out / "rows.jsonl", row)
        print(report.line(row), flush=True)

    worker = [sys.executable, "-m", "benchmarks.gpu", *given, "--worker"]
    status = supervise(lambda minutes: [*worker, "--minutes", f"{minutes:.2f}"], note, time.monotonic() + 60 * asked.minutes,
                       PATIENCE, hung)
    note.path.unlink(missing_ok=True)
    return status


def _work(asked: argparse.Namespace, note: Note) -> int:
    """What a worker does."""
    deadline = time.monotonic() + 60 * asked.minutes
    if asked.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
        settings.BACKEND = "triton"  # of layers and models too, whose calls name none
    device = "cpu" if asked.smoke else "cuda"
    found = conditions(device, asked.commit)
    print(json.dumps(found), flush=True)
    common = {"conditions": found["key"], "commit": found["commit"]} | ({"interpreter": True} if asked.smoke else {})
    run = Run(device, asked.smoke, deadline, found, Rows(asked.out / "rows.jsonl", common), 60 * asked.minutes, note)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run cut short still writes its report
    try:
        for stage in asked.stage or STAGES:
            STAGES[stage](run)
    except PoisonedError as error:
        run.add("restart", f"restart {len(run.rows.of('restart')) + 1}", {"error": str(error)})
        return AGAIN
    except (SystemExit, KeyboardInterrupt):
        finish(run, asked.out)
        raise
    note.alive()
    return finish(run, asked.out)


if __name__ == "__main__":
    sys.exit(main())
