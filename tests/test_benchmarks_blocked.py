"""Features on a CPU beside what people use there: every case is checked, timed, told and drawn."""

import json
from dataclasses import replace

import pytest

import fused_attn
from benchmarks import blocked
from benchmarks.blocked import SHAPE


@pytest.fixture
def small(monkeypatch):
    """Shapes that take no time, and no compiler."""
    monkeypatch.setattr(blocked, "SHAPE", replace(SHAPE, heads=2, kv_heads=2, length=24, head_dim=8, head_dim_v=8))
    monkeypatch.setattr(blocked, "CASES", {name: (feature, {key: min(n, 24) for key, n in differs.items() if key != "batch"})
                                           for name, (feature, differs) in blocked.CASES.items()})
    monkeypatch.setattr(blocked, "rows", lambda *asked: honest(*asked[:4], blocked.SHAPE))
    honest = ROWS
    monkeypatch.setattr("benchmarks.alternatives.compiled_flex", flex)


ROWS = blocked.rows


def flex():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def test_every_case_is_right_and_told(small, tmp_path, capsys):
    out, plot = tmp_path / "blocked.json", tmp_path / "blocked.png"
    assert blocked.main(["--dtype", "fp32", "--threads", "1", "--rounds", "1", "--out", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text())
    assert found["complete"] is True
    assert {(row["case"], row["pass"]) for row in found["rows"]} == {
        (name, which) for name in blocked.CASES for which in ("inference", "forward", "backward")}
    for row in found["rows"]:
        assert row["ms"] > 0, row
        assert "ms" in row["peers"]["matrix of scores"]
        wrong = {name: peer["error"] for name, peer in row["peers"].items() if "error" in peer}
        assert not wrong, (row["case"], wrong)
    assert "window 256 of 4096" in capsys.readouterr().out
    assert plot.stat().st_size > 10_000
    table = blocked.table(found["rows"])
    assert table.count("\n") == len(found["rows"]) + 2


def test_a_wrong_answer_is_the_exit_status(small, monkeypatch, capsys):
    honest = fused_attn.attention
    monkeypatch.setattr(fused_attn, "attention", lambda *rest, **options: (
        honest(*rest, **options) + (options["backend"] is None)))
    assert blocked.main(["--dtype", "fp32", "--threads", "1", "--rounds", "1", "--case", "softcap"]) == 1
