"""``fused-attn bench`` on a CPU: real times of small shapes, checked first, in a table, in JSON and in a picture."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn.tools import cli, report
from fused_attn.tools.bench import command, peers
from fused_attn.tools.bench.cases import Case, case

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("bench", "--device", "cpu", "--length", "24", "--head-dim", "16", "--heads", "4", "--rounds", "2")
PROMISED = {"case", "pass", "ms", "p20", "p80", "tflops", "peers", "ratio_to_best_peer", "default", "commit", "conditions",
            "flops", "bytes", "E", "backend"}


def rows_of(capsys, *arguments: str, status: int = 0) -> list[dict]:
    assert cli.main([*SMALL, "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)["rows"]


def test_rows_hold_what_is_promised(capsys):
    rows = rows_of(capsys, "--kv-heads", "2", "--causal", "--length", "24", "40")
    assert [(row["case"], row["pass"]) for row in rows] == [
        (f"fp32 d16 b1 h4/2 n{n} causal", which) for n in (24, 40) for which in ("forward", "backward")]
    for row in rows:
        assert row.keys() >= PROMISED
        assert row["default"] is True
        assert row["backend"] == "torch", "what a call on the CPU gets without options"
        assert row["ratio_to_best_peer"] == pytest.approx(row["peers"]["sdpa"]["ms"] / row["ms"], abs=1e-3)
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9, rel=1e-3)


def test_every_option_reaches_the_call(capsys):
    row, = rows_of(capsys, "--window", "5", "-1", "--softcap", "3", "--keys", "30", "--dtype", "bf16", "--batch", "3", "--pass",
                   "forward", "--backend", "reference")
    assert row["case"] == "bf16 d16 b3 h4 n24x30 full window(5,None) softcap3"
    assert row["backend"] == "reference"
    assert row["default"] is False
    assert row["peers"]["sdpa"] == {"not run": "no softcap"}
    assert row["best_peer"] == "eager"


@pytest.mark.parametrize("preset", ["papers", "decode"])
def test_presets(preset, monkeypatch, capsys):
    seen: list[Case] = []
    monkeypatch.setattr(command.contest, "time_case", lambda subject, *rest: seen.append(subject) or [])
    assert rows_of(capsys, "--preset", preset) == []
    if preset == "papers":
        assert len(seen) == 36
        assert all(s.heads * s.head_dim == 2048 and s.batch * s.n_queries == 16384 for s in seen)
    else:
        assert all(s.n_queries == 1 and s.passes == ("forward",) for s in seen)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--kv-heads", "3"), "divides"),
    (("--batch", "-1"), "from 1 to"),
    (("--preset", "decode", "--pass", "backward"), "forward alone"),
    (("--softcap", "-2"), "softcap"),
])
def test_bad_shapes_are_one_line(arguments, message, capsys):
    assert cli.main([*SMALL, *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("fused-attn bench: ")
    assert not shown.out


def test_a_wrong_answer_is_not_timed(monkeypatch, capsys):
    honest = fused_attn.attention
    monkeypatch.setattr(fused_attn, "attention", lambda *rest, **options: honest(*rest, **options) * 1.01)
    for row in rows_of(capsys, status=1):
        assert "gate" in row["error"]
        assert "ms" not in row


def test_a_wrong_peer_is_not_timed(monkeypatch, capsys):
    wrong = peers.Peer("wrong", lambda subject, device: lambda q, k, v: (q @ k.mT).softmax(-1) @ v, lambda subject: None)
    monkeypatch.setattr(peers, "found", lambda device: [wrong])
    for row in rows_of(capsys):
        assert "differs" in row["peers"]["wrong"]["error"]
        assert row["best_peer"] == "sdpa"


def test_what_does_not_fit_is_a_row(monkeypatch, capsys):
    def full(*rest):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(command.contest, "subject_of", full)
    row, = rows_of(capsys)
    assert row["pass"] == "forward and backward"
    assert "memory" in row["error"]
    assert cli.main([*SMALL]) == 0
    assert "does not fit" in " ".join(capsys.readouterr().out.split())


def test_whole_command(tmp_path):
    """In a process of its own, without the interpreter that the tests ask for."""
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "a" / "rows.json", tmp_path / "b" / "bars.png"
    done = subprocess.run([sys.executable, "-m", "fused_attn", *SMALL, "--out", str(out), "--plot", str(plot)], cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "say nothing about a" in " ".join(done.stdout.split())
    assert "fp32 d16 b1 h4 n24 full" in done.stdout
    assert "timing" in done.stderr
    found = json.loads(out.read_text())
    assert found["conditions"]["device"] == "cpu"
    assert len(found["rows"]) == 2
    assert plot.stat().st_size > 10_000


def test_tables_and_progress_without_rich(monkeypatch, capsys):
    honest = builtins.__import__

    def without_rich(name, *rest):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return honest(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert list(report.track([1, 2], "counting")) == [1, 2]
    report.print_table([{"a_b": 1, "c": "long"}, {"a_b": 22, "c": "x"}], "title")
    shown = capsys.readouterr()
    assert shown.out == "title\na b  c   \n1    long\n22   x   \n"
    assert "counting: 2 of 2" in shown.err


@pytest.mark.parametrize("subject", [case(5, 8, dv=4, batch=2, heads=6, kv_heads=3, n_keys=9, dtype="fp16"), case(16, 32)],
                         ids=lambda s: s.name)
def test_bytes_are_those_of_the_tensors(subject):
    q, k, v, dout, _ = subject.inputs("cpu")
    size = sum(x.numel() * x.element_size() for x in (q, k, v, dout))  # out is as large as dout
    assert subject.bytes("forward") == size
    gradients = sum(x.numel() * x.element_size() for x in (q, k, v))
    assert subject.bytes("backward") == size + gradients + dout.numel() * dout.element_size()
