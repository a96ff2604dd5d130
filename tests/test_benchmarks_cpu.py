"""What is measured on a machine without a GPU: the host's part of a call, calls, layers, fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_attn
from benchmarks import cpu, fresh, host, layers, packed, steps

ROOT = Path(__file__).parents[1]


def test_the_host_time_of_calls(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fused_attn.tools.bench.timing.MAX_ROUNDS", 1)
    monkeypatch.setattr("fused_attn.tools.bench.timing.MIN_ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["host", "--out", str(tmp_path / "host.json")])
    assert host.main() == 0
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"one tile", "decode"}
    assert all(0 < row["us"] < 20_000 for row in rows), "launches are replaced"
    q = torch.ones(1, 1, 4, 16)
    assert fused_attn.attention(q, q, q, backend="triton").eq(1).all()


def test_calls_and_layers_on_the_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, "SHAPES", cpu.SHAPES[:1])
    monkeypatch.setattr(cpu, "LAYER", layers.Sizes(2, 5, 16, 4, 24, "fp32"))
    out = tmp_path / "there" / "cpu.json"
    assert cpu.main(["--stage", "calls", "--stage", "layers", "--rounds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {row["stage"] for row in found["rows"]} == {"calls", "layers"}
    for row in found["rows"]:
        assert {"case", "pass", "ms", "tflops", "peers", "ratio_to_best_peer", "default", "commit", "conditions",
                "added_us"} <= row.keys()
        assert row["default"] is True
        assert row["conditions"] == found["conditions"]["key"]
    assert found["conditions"]["gpu"] is None
    assert "tiny" in capsys.readouterr().out


def test_steps_and_packed_on_the_cpu(monkeypatch, capsys):
    """By the backend that answers there, not by the kernels."""
    small = cpu.case(12, 8, batch=1, causal=True, dtype="fp32")
    decoded = cpu.case(1, 8, batch=1, heads=2, n_keys=9, causal=True, dtype="fp32", passes=("forward",))
    monkeypatch.setattr(steps, "shapes", lambda device, smoke=False: ([small], [decoded]))
    monkeypatch.setattr(packed, "shapes", lambda device, smoke=False: [([3, 9, 1], 2, 2, 8, "fp32", True)])
    rows = cpu._stages(2)["steps"]()
    assert [row["family"] for row in rows] == ["packed", "packed", "rotary", "rotary", "cached decoding"]
    assert all(row["ok"] and row["default"] and row["ratio_to_best_peer"] > 0 for row in rows), rows


@pytest.mark.slow
def test_cold_calls_are_those_of_fresh_processes():
    subject = cpu.case(16, 8, batch=1, heads=1, dtype="fp32", causal=True)
    forward, backward = fresh.cold(subject, "cpu")
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    for row in (forward, backward):
        assert row["ok"]
        assert row["peers"]["flex"] == {"not run": "has no backward here"}
        for facts in (row, row["peers"]["sdpa"]):
            assert min(facts["ms"], facts["cold_ms"], facts["disk_ms"]) > 0


def test_cold_calls_out_of_time_leave_no_row():
    assert fresh.cold(cpu.case(16, 8, batch=1, heads=1, dtype="fp32"), "cpu", until=0.0) == []


def test_a_layer_that_is_wrong_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "SHAPES", cpu.SHAPES[:1])
    honest = fused_attn.attention
    monkeypatch.setattr(fused_attn, "attention", lambda *rest, **options: honest(*rest, **options) + 1)
    assert cpu.main(["--stage", "calls", "--rounds", "1"]) == 1
    assert "gate" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_imports_are_timed_in_fresh_processes():
    row, = fresh.imports(1)
    assert row["ms"] > 0
    assert row["peers"]["torch"]["ms"] > 0
    assert row["added_ms"] == pytest.approx(row["ms"] - row["peers"]["torch"]["ms"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_call():
    rows = list(fresh.memory([2048]))
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    scores = 4 * 2048**2 * 4 / 2**20
    for row in rows:
        assert row["peers"]["reference"]["peak_mib"] > scores
        assert row["peak_mib"] < scores
        assert row["peers"]["sdpa"]["peak_mib"] < scores


@pytest.mark.slow
@pytest.mark.kernels
def test_compile_times_are_of_every_kernel():
    pytest.importorskip("triton")
    rows = list(fresh.compile_times(["sm_80"], [16]))
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert {row["kernel"] for row in rows} >= {"forward", "dq"}
    assert all(row["compile_s"] > 0 for row in rows)


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="planted"):
        fresh.output("raise ValueError('planted')")


def test_the_host_is_timed_by_pytest_benchmark_too():
    """Every kind of call runs there; here once, untimed."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "benchmarks/test_host.py"], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout
    assert f"{len(host.subjects()) * len(host.CALLS)} passed" in done.stdout
