"""The benchmark command, without a GPU: resumption, time limits, failures, the whole run on tiny shapes, tables, pictures."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import correctness, features, gpu, models, packed, plots, report, steps, work
from benchmarks.cases import correctness_cases, timing_cases
from benchmarks.supervise import AGAIN, Note
from fused_attn import settings
from fused_attn.tools.bench import peers

ROOT = Path(__file__).resolve().parent.parent
FILES = {"rows.jsonl", "summary.json", "summary.md", "correctness.json"}
PICTURES = ("forward", "backward", "ratio", "features")
CONDITIONS = {"gpu": "SYNTHETIC", "interpreter": False, "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3",
              "commit": "0" * 40, "dirty": False, "source": "00000000", "time": "2026-01-01T00:00:00Z"}


def a_run(path: Path, seconds: float = 100.0) -> gpu.Run:
    rows = gpu.Rows(path / "rows.jsonl", {"conditions": "here", "commit": "c"})
    return gpu.Run("cpu", True, time.monotonic() + seconds + work.REPORT_SECONDS, CONDITIONS, rows, 100 * seconds,
                   Note(path / "under-way.json"))


def test_rows_are_resumed(tmp_path):
    ran = []

    def job(name, passes):
        def rows():
            for which in passes:
                ran.append((name, which))
                yield {"pass": which, "ok": True}
                assert name != "dies", "planted"

        return gpu.Job(name, rows, passes)

    jobs = [job("one", ("forward", "backward")), job("dies", ("forward", "backward"))]
    a_run(tmp_path).work("timing", jobs)
    assert ran == [("one", "forward"), ("one", "backward"), ("dies", "forward")]
    with (tmp_path / "rows.jsonl").open("a") as file:  # a row of another card, and one torn by a kill
        file.write(json.dumps({"stage": "timing", "case": "two", "conditions": "elsewhere"}) + '\n{"stage": "tim')
    again = a_run(tmp_path)
    again.work("timing", [*jobs, job("two", ("forward",))])
    assert ran[3:] == [("two", "forward")]
    assert [row["ok"] for row in again.rows.of("timing")] == [True, True, True, False, True]
    assert "AssertionError: planted" in again.rows.rows[3]["error"]
    assert len(gpu.Rows(tmp_path / "rows.jsonl", {"conditions": "here"}).rows) == 5


def test_half_a_case_is_measured_again(tmp_path):
    run = a_run(tmp_path)
    run.add("timing", "x", {"pass": "forward", "ms": 1.0, "tflops": 1.0})
    run.work("timing", [gpu.Job("x", lambda: [{"pass": which, "seen": True} for which in ("forward", "backward")],
                                ("forward", "backward"))])
    assert [row.get("seen") for row in run.rows.of("timing")] == [True, True]


def test_what_the_time_does_not_allow_is_truncated(tmp_path):
    run = a_run(tmp_path, seconds=-1.0)
    run.work("correctness", [gpu.Job("late", lambda: pytest.fail("ran"))] * 3)
    assert run.stages["correctness"]["truncated"] == 3
    assert "**truncated**: 3 cases" in report.summary(CONDITIONS, run.stages, [], [], "")


def test_memory_and_missing_hardware_are_no_failures(tmp_path):
    def full():
        raise torch.OutOfMemoryError("planted")

    run = a_run(tmp_path)
    run.work("correctness", [gpu.Job("full", full), gpu.Job("TF32", lambda: [correctness.tf32("cpu")])])
    assert [row["ok"] for row in run.rows.of("correctness")] == [None, None]
    assert gpu.finish(run, tmp_path) == 0


@pytest.mark.parametrize("stage", ["correctness", "determinism", "timing"])
def test_a_failure_is_the_exit_status(tmp_path, stage, capsys):
    run = a_run(tmp_path)
    run.add(stage, "fp32 planted", {"ok": False, "pass": "forward", "error": "gate: planted", "E": float("nan")})
    assert gpu.finish(run, tmp_path) == 1
    assert "planted" in capsys.readouterr().out
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))


def test_a_lost_context_is_seen_after_the_case_that_lost_it(tmp_path, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    run = a_run(tmp_path)
    run.device = "cuda"
    with pytest.raises(gpu.PoisonedError):
        run.work("timing", [gpu.Job("guilty", lambda: 1 / 0), gpu.Job("next", lambda: pytest.fail("ran"))])
    assert [row["case"] for row in run.rows.of("timing")] == ["guilty"]
    assert run.stages["timing"]["truncated"] == 2


def test_a_lost_context_asks_for_a_new_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(settings, "BACKEND", None)  # which a smoke run changes, for its process

    def poisoned(run):
        raise gpu.PoisonedError("illegal memory access")

    monkeypatch.setitem(gpu.STAGES, "determinism", poisoned)
    assert gpu.main(["--smoke", "--stage", "determinism", "--out", str(tmp_path), "--minutes", "3"]) == AGAIN
    assert json.loads((tmp_path / "rows.jsonl").read_text())["stage"] == "restart"


def test_a_case_that_hung_failed_and_is_gone_past(tmp_path, monkeypatch):
    """The command itself does no work: a worker does, whose arguments are its own."""
    commands = []

    def supervise(command, note, deadline, patience, hung):
        commands.append(command(2.5))
        hung({"stage": "correctness", "case": "bf16 planted", "conditions": "here", "commit": "c"})
        return 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "supervise", supervise)
    assert gpu.main(["--out", str(tmp_path), "--stage", "correctness", "--minutes", "9"]) == 1
    (command,) = commands
    assert command[1:] == ["-m", "benchmarks.gpu", "--out", str(tmp_path), "--stage", "correctness", "--minutes", "9",
                           "--worker", "--minutes", "2.50"]
    run = a_run(tmp_path)
    run.work("correctness", [gpu.Job("bf16 planted", lambda: pytest.fail("tried again"))])
    assert gpu.finish(run, tmp_path) == 1
    assert "hung" in json.loads((tmp_path / "summary.json").read_text())["rows"][0]["error"]


def test_what_no_card_has_run_comes_last(monkeypatch):
    from benchmarks import cases

    monkeypatch.setattr(cases, "on_hopper", lambda: True)
    for found in (correctness_cases(), timing_cases()):
        asked = [subject.hopper != "auto" for subject in found]
        first = asked.index(True)
        assert first > len(asked) // 4
        assert all(asked[first : first + sum(asked)])


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "never")]) == 2
    assert "--smoke" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_compile_tasks_cover_every_stage_once():
    tasks = gpu.compile_tasks("cuda", smoke=False)
    assert tasks[0][0] == "flex"
    ours = [(task[1].compiles_as(), task[2]) for task in tasks if task[0] == "ours"]
    assert len(set(ours)) == len(ours)
    assert {(s.compiles_as(), False) for s in timing_cases()} <= set(ours)
    assert {(s.compiles_as(), True) for s in correctness_cases() if s.n_queries and s.n_keys} <= set(ours)


@pytest.mark.kernels
@pytest.mark.parametrize("name", [name for name in gpu.small_subjects("cpu", True) if "d16" in name])
def test_small_subjects_compile(name):
    """The worker's part of the compile stage; a real run compiles each for the card, layers and models too."""
    assert gpu._compile(("layers", name, False, "cpu"))[2] is None


def test_small_subjects_are_those_of_the_stages():
    shapes = steps.shapes("cuda")
    for shape in [*shapes[0], *shapes[1]]:
        assert shape.shrunk().compiles_as() == shape.compiles_as()
    names = list(gpu.small_subjects("cuda", False))
    assert sum(name.startswith("packed") for name in names) == len(packed.shapes("cuda"))
    assert {name for name in names if name.startswith("training")} == {
        name for name in models.subjects("cuda") if name.startswith("training")}


@pytest.mark.kernels
@pytest.mark.slow
def test_whole_command_on_tiny_shapes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(tmp_path), "--commit", "abc"]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = {f"{name}.png" for name in PICTURES if importlib.util.find_spec("matplotlib")}
    assert {file.name for file in tmp_path.iterdir()} == FILES | drawn
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["interpreter"] and row["commit"] == "abc" and row["conditions"] for row in rows)
    checked = {row["case"]: row["ok"] for row in rows if row["stage"] == "features"}
    names = [*(f"bf16 {f.name}" for f in features.FEATURES), "bf16 packed sequences"]
    others = checked.keys() - {*names}  # the heavy ones at another head dim, which makes other kernels
    assert checked == dict.fromkeys([*names, *others], True)
    assert others
    assert others <= {"bf16 packed sequences by atomics", *(f"{name} d24" for name in names)}
    costs = [row for row in rows if row["stage"] == "timing" and row["family"] == "features"]
    assert {(row["feature"], row["pass"]) for row in costs} == {
        (f.name, which) for f in features.FEATURES[:3] for which in ("forward", "backward")}
    assert all({"ms", "tflops", "plain_ms", "times_plain"} <= row.keys() for row in costs)
    more = {stage: [row for row in rows if row["stage"] == stage] for stage in ("roofline", "layers", "models", "cold")}
    assert {row["case"] for row in more["roofline"]} == {"copy", "matmul bf16"}
    assert {row["family"] for row in more["layers"]} == {"packed", "rotary", "cached decoding", "layers"}
    assert {row["family"] for row in more["models"]} == {"training", "generation"}
    for row in [*more["layers"], *more["models"], *more["cold"]]:
        assert row["ok"], row
        assert row["default"] is False
        assert row["pass"] in ("forward", "backward")
        assert {"ms", "tflops", "peers", "ratio_to_best_peer", "flops"} <= row.keys()
    assert all({"cold_ms", "disk_ms"} <= row.keys() & row["peers"]["sdpa"].keys() for row in more["cold"])
    timed = [row for row in rows if row["stage"] == "timing" and row["family"] not in ("overhead", "features")]
    assert [(row["case"], row["pass"]) for row in timed] == [(s.name, which) for s in timing_cases(True) for which in s.passes]
    for row in timed:
        assert {"ms", "p20", "p80", "tflops", "flops", "peers", "ratio_to_best_peer", "first_call_s", "E"} <= row.keys()
        assert row["backend"] == "triton"
        assert row["default"] is False
        assert "No viable backend" in row["peers"]["sdpa cudnn"].get("error", "No viable backend")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["conditions"]["commit"] == "abc"
    assert set(summary["stages"]) == set(gpu.STAGES)
    assert summary["rows"] == rows
    assert "interpreter" in (tmp_path / "summary.md").read_text()
    names = {row["case"] for row in rows if row["stage"] == "correctness"}
    assert names == {s.name for s in correctness_cases(True)} | set(correctness.SPECIAL)

    again = subprocess.run([*command, "--stage", "timing", "--stage", "correctness", "--stage", "models",
                            "--stage", "layers", "--stage", "cold", "--stage", "roofline"], cwd=ROOT, env=variables,
                           capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows


# Tables and pictures


def synthetic() -> list[dict]:
    """Rows as a GPU would leave them; every number is made up."""
    factors = {"ours": 1.02, "sdpa cudnn": 0.97, "sdpa flash": 0.6, "sdpa efficient": 0.4, "flex": 0.7, "eager": 0.05}
    rows = []
    for subject in timing_cases():
        takes = {peer.name for peer in peers.found("cuda") if peer.against(subject) is None}
        for which in subject.passes:
            speed = {64: 450, 128: 620, 256: 560}[subject.head_dim] * subject.n_keys / (subject.n_keys + 700)
            lead = (0.8 if subject.n_keys < 1000 else 1) * (1.05 - subject.head_dim / 2000) * (0.97 + 0.05 * subject.causal)
            speed *= (0.75 if subject.causal else 1) * (0.8 if which == "backward" else 1)
            speed *= (0.05 if subject.dtype == "fp32" else 1) * (0.01 if subject.n_queries == 1 else 1)
            timed = {}
            for name in factors.keys() & {*takes, "ours"}:
                tflops = speed * factors[name] * (lead if name == "ours" else 1)
                ms = subject.flops(which) / tflops / 1e9
                timed[name] = {"ms": ms, "p20": 0.98 * ms, "p80": 1.03 * ms, "tflops": tflops, "gbytes_per_s": 1.0}
            if which == "backward" and subject.head_dim == 256 and "sdpa cudnn" in timed:
                timed["sdpa cudnn"] = {"error": "RuntimeError: planted"}
            ours = timed.pop("ours")
            best = min((name for name in timed if "ms" in timed[name]), key=lambda name: timed[name]["ms"])
            rows.append({
                "stage": "timing", "case": subject.name, "pass": which, "family": subject.family, "dtype": subject.dtype,
                "head_dim": subject.head_dim, "causal": subject.causal, "n_queries": subject.n_queries,
                "n_keys": subject.n_keys, "flops": subject.flops(which), "ok": True, **ours, "peers": timed,
                "best_peer": best, "ratio_to_best_peer": timed[best]["ms"] / ours["ms"],
            })
    return rows


def more_synthetic() -> list[dict]:
    """Rows of the other stages, made up too."""
    roofs = [{"stage": "roofline", "case": "copy", "pass": "forward", "family": "roofline", "ms": 0.7, "tflops": 0.0,
              "gbytes_per_s": 3000.0, "peers": {}},
             {"stage": "roofline", "case": "matmul bf16", "pass": "forward", "family": "roofline", "dtype": "bf16", "ms": 1.5,
              "tflops": 700.0, "gbytes_per_s": 100.0, "peers": {}}]
    rest = [{"stage": stage, "case": f"{family} case", "pass": which, "family": family, "dtype": "bf16", "ms": 1.0, "p20": 0.9,
             "p80": 1.1, "tflops": 300.0, "gbytes_per_s": 1000.0, "flops": 3e11, "bytes": 1e9, "tokens_per_s": 1e5,
             "best_peer": "sdpa", "ratio_to_best_peer": ratio, "peers": {"sdpa": {"ms": ratio, "tflops": 300.0 / ratio}}}
            for stage, family, ratio in (("layers", "packed", 2.5), ("layers", "rotary", 0.9), ("models", "training", 1.1))
            for which in ("forward", "backward")]
    return roofs + rest


def test_roofs_are_what_was_measured():
    roofs = more_synthetic()[:2]
    assert plots.roofline_of(roofs) == (3e12, 7e14)
    assert plots.roofline_of(roofs[:1]) is None
    assert plots.roofline_of([]) is None


def test_roofline_draws_every_case_of_halves(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for subject in timing_cases():  # a point's place is that of the arithmetic: no case lies left of decoding's 1 or so
        assert 0.5 < subject.flops("forward") / subject.bytes("forward") < 1e4
    rows = [{**row, "bytes": 1e9} for row in synthetic()]
    figure = pyplot.figure()
    plots._roofline(figure, rows, more_synthetic()[:2])
    halves = [row for row in rows if row["dtype"] in ("bf16", "fp16")]
    drawn = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == "ours" or
             (line.get_marker() == "o" and len(line.get_xdata()) == 1)]
    assert len(drawn) == len(halves)
    hollow = [line for line in drawn if line.get_markerfacecolor() == "white"]
    assert len(hollow) == sum(row["ratio_to_best_peer"] < 1 for row in halves)
    x, y = figure.axes[0].get_lines()[0].get_data()
    assert y[1] == y[2] == 700.0
    assert x[1] == pytest.approx(7e14 / 3e12), "the ridge"
    pyplot.close(figure)


def test_other_stages_are_in_pictures_and_tables(tmp_path):
    pytest.importorskip("matplotlib")
    rows = synthetic() + more_synthetic()
    assert plots.draw(rows, CONDITIONS, tmp_path) == "Pictures: forward.png, backward.png, ratio.png, features.png"
    assert plots.draw(more_synthetic(), CONDITIONS, tmp_path) == "Pictures: features.png"
    text = report.summary(CONDITIONS, {}, [], rows, "")
    assert "| copy | forward | 0.700 | 3000 GB/s |" in text
    assert "rotary case forward: 0.90 of sdpa" in text


def test_pictures_of_every_kind(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.draw(synthetic(), CONDITIONS, tmp_path) == "Pictures: forward.png, backward.png, ratio.png, features.png"
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_pictures_of_whatever_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.draw([], CONDITIONS, tmp_path) == "No pictures: nothing was timed."
    lonely = {**synthetic()[0], "peers": {}}
    del lonely["ratio_to_best_peer"]
    assert plots.draw([lonely], CONDITIONS, tmp_path) == "Pictures: forward.png"


def test_without_matplotlib_and_rich_there_is_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "matplotlib is not installed" in plots.draw(synthetic(), CONDITIONS, tmp_path)
    report.show("| plain |")
    assert capsys.readouterr().out == "| plain |\n"


def test_losing_cases_are_in_the_tables():
    text = report.summary(CONDITIONS, {}, [], synthetic(), "")
    rows = synthetic()
    losing = [row for row in rows if row["ratio_to_best_peer"] < 1]
    assert f"## Losing: {len(losing)} of {len(rows)} measured" in text
    assert all(f"- {row['case']} {row['pass']}: " in text for row in losing)
    assert " L)" in text
    assert "sdpa cudnn, 12 cases" in text
