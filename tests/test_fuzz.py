"""The fuzzer: it passes what is right, finds what is planted, makes it small, and prints what makes it again."""

import json
import shlex
import subprocess
import sys
from collections import Counter

import hypothesis
import pytest
import torch
from support import fuzzing
from support.features import Shape
from support.fuzzing import ADDED, BACKENDS, DTYPES, LAYOUTS, Trial, trials

import fused_attn
from tests import fuzz

pytestmark = pytest.mark.kernels


def passes(seed, count):
    seen = Counter()
    failure = fuzzing.search(seed, count, lambda trial: seen.update([trial.backend]), shrink=False)
    if failure:
        raise AssertionError(fuzz.command(failure[0])) from failure[1]
    return seen


def test_drawn_calls_are_right():
    assert passes(seed=2, count=6)["triton"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_drawn_calls_are_right(seed):
    assert passes(seed, count=60)["triton"]


def test_every_backend_is_drawn():
    seen = Counter()
    fuzzing.search(1, 300, lambda trial: seen.update([trial.backend]), shrink=False, run=lambda trial: None)
    assert seen.keys() == set(BACKENDS)


@pytest.fixture
def planted(monkeypatch):
    """An error of a thousandth in the kernels' output, of causal calls with more than 17 keys."""
    attention = fused_attn.attention

    def wrong(q, k, v, *, causal=False, backend=None, **arguments):
        results = attention(q, k, v, causal=causal, backend=backend, **arguments)
        if not (causal and backend == "triton" and k.shape[2] > 17):
            return results
        return (results[0] * 1.001, *results[1:]) if isinstance(results, tuple) else results * 1.001

    monkeypatch.setattr(fused_attn, "attention", wrong)
    return lambda: monkeypatch.setattr(fused_attn, "attention", attention)


def small(draw):
    """Plain calls on the kernels: what this file draws where it is about finding, not about what is found."""
    return Trial(shape=Shape(1, 1, 1, draw(0, 20), draw(0, 20), 2, 2), backend="triton",
                 arguments={"causal": True} if draw(0, 1) else {}, return_lse=bool(draw(0, 1)))


@pytest.fixture
def few(monkeypatch):
    integers = hypothesis.strategies.integers
    monkeypatch.setattr(fuzzing, "trials", hypothesis.strategies.composite(
        lambda draw: small(lambda low, high: draw(integers(low, high)))))


@pytest.mark.usefixtures("few")
def test_a_planted_fault_is_found_and_made_small(planted, capsys, monkeypatch):
    assert fuzz.main(["--seed", "1", "--count", "200"]) == 1
    printed = capsys.readouterr().err
    line = printed.strip().splitlines()[-1]
    program, flag, code = shlex.split(line)
    assert (program, flag) == (sys.executable, "-c")
    assert "Trial(shape=Shape(batch=1, heads=1, kv_heads=1, n_queries=1, n_keys=18, " in code
    assert "arguments={'causal': True}" in code
    assert "AssertionError: out: E = " in printed
    with pytest.raises(AssertionError, match="out: E = "):
        exec(code, {})
    planted()
    exec(code, {})  # without the fault it passes


def test_the_printed_line_runs_in_a_shell_of_the_checkout():
    trial = Trial(("bias_keys", "sinks"), Shape(1, 2, 1, 5, 9, 3, 4), {"window": (3, None), "dropout_p": 0.25}, "bf16",
                  "triton", operands="fp32", layouts=("odd offset", "contiguous", "expanded", "length before heads"), shift=4.0)
    done = subprocess.run(fuzz.command(trial), shell=True, cwd=fuzz.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@hypothesis.given(trials())
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
def test_a_trial_is_its_own_source(trial):
    assert eval(repr(trial), {"Trial": Trial, "Shape": Shape}) == trial


def test_what_is_drawn_covers_every_axis():
    seen, shapes = Counter(), []

    @hypothesis.given(trials())
    @hypothesis.settings(max_examples=800, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    def every(trial):
        seen.update([*trial.features, *trial.layouts, *trial.arguments, trial.shape.layout, f"operands {trial.operands}"])
        seen.update([f"{trial.backend} {trial.dtype}", f"compiled {trial.compiled}", f"lse {trial.return_lse}"])
        seen.update(["ordinary"] if trial.ordinary else [])
        seen.update(["large"] if trial.times > 1 else ["negative"] if trial.shift else ["biased"] if trial.bias > 1 else [])
        shapes.append(trial.shape)

    every()
    axes = {*(feature.name for feature in ADDED), *LAYOUTS, *(f"{b} {d}" for b in BACKENDS for d in DTYPES), "lse",
            "causal", "window", "scale", "softcap", "precise", "deterministic", "dropout_p", "dense", "packed", "nested",
            "compiled True", "lse True", "lse False", "ordinary", "large", "negative", "biased"}
    assert axes - seen.keys() == set()
    assert {0, 1} < {shape.n_queries for shape in shapes}
    assert {0, 1} < {shape.n_keys for shape in shapes}
    assert {1, 2, 3} <= {shape.heads // shape.kv_heads for shape in shapes}
    assert sum(shape.dim % 2 for shape in shapes) > 50


@pytest.mark.few(2)
@pytest.mark.parametrize("trial", [
    Trial(shape=Shape(1, 1, 1, 1, 18, 1, 1), arguments={"precise": True, "scale": 0.0}, dtype="bf16", backend="triton"),
    Trial(arguments={"causal": True}, shape=Shape(n_queries=260, n_keys=256, dim=32, dim_v=32), dtype="bf16", backend="triton"),
    Trial(("alibi",), Shape(1, 2, 1, 33, 65, 17, 16), {"window": (9, 0)}, "fp32", "triton", compiled=True),
    Trial(("nested", "sinks"), Shape(3, 4, 2, 40, 33, 16, 8, "nested"), {}, "fp16", "reference"),
    Trial(("nested", "relative"), Shape(3, 2, 1, 5, 5, 3, 4, "nested"), {}, "fp32", "triton", compiled=True, return_lse=False),
    Trial((), Shape(1, 2, 2, 30, 40, 16, 16), {"causal": True}, "bf16", "chosen", return_lse=False, shift=30.0),
], ids=["equal weights", "ordinary", "compiled", "nested", "nested compiled", "torch"])
def test_a_call_of_every_kind(trial):
    fuzzing.check(trial)


@pytest.mark.usefixtures("few")
def test_the_record_counts_what_passed_since_the_last_failure(planted, monkeypatch, tmp_path):
    record, page = tmp_path / "fuzz.json", tmp_path / "numerics.md"
    monkeypatch.setattr(fuzz, "RECORD", record)
    monkeypatch.setattr(fuzz, "PAGE", page)
    page.write_text(f"before\n{fuzz.START}{fuzz.END}after\n", encoding="utf-8")
    planted()
    for total in (3, 6):
        assert fuzz.main(["--seed", "1", "--count", "3", "--record"]) == 0
        told = json.loads(record.read_text(encoding="utf-8"))
        assert told["since the last failure"]["calls"] == told["since the last failure"]["backend triton"] == total
        assert told["last failure"] is None
        assert (told["last run"]["seed"], told["last run"]["torch"]) == (1, torch.__version__)
        assert page.read_text(encoding="utf-8") == f"before\n{fuzz.START}{fuzz.sentence(told)}{fuzz.END}after\n"
        assert f"{total} calls" in fuzz.sentence(told)
    monkeypatch.setattr(fuzzing, "check", lambda trial: 1 / 0)
    assert fuzz.main(["--seed", "1", "--count", "3", "--record"]) == 1
    told = json.loads(record.read_text(encoding="utf-8"))
    assert told["since the last failure"] == {}
    assert told["last failure"].startswith("Trial(")


def test_the_page_says_what_the_record_holds():
    told = json.loads(fuzz.RECORD.read_text(encoding="utf-8"))
    page = fuzz.PAGE.read_text(encoding="utf-8")
    assert page == fuzz.with_sentence(page, told), "python -m tests.fuzz --record"


@pytest.mark.parametrize("arguments", [("--count", "0"), ("--minutes", "nan"), ("--minutes", "-1"), ("--count", "many"),
                                       ("--count", "9" * 20), ("--seed", "-1")])
def test_bad_arguments_are_one_line(arguments, capsys):
    assert fuzz.main([*arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m tests.fuzz: argument {arguments[0]}: expected ")


def test_a_gradient_that_its_type_cannot_hold_is_no_error():
    """Of 1e-10 fp16 makes 0: an operand in fp16 beside tensors in bf16, as it was drawn once."""
    shape = Shape(batch=1, heads=1, kv_heads=1, n_queries=1, n_keys=1, dim=1, dim_v=1, layout="dense")
    fuzzing.check(Trial(features=("sinks",), shape=shape, dtype="bf16", backend="triton", operands="fp16", return_lse=False,
                        shift=4.0))
