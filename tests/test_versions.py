"""The record of versions that were tried: what the command writes, and what is read from it."""

import json
import sys
from pathlib import Path

import pytest

from fused_attn.plan import proven
from tests import versions

REPORT = """<testsuites><testsuite tests="4"><testcase classname="test_a" name="one"/>
<testcase classname="test_a" name="two[x]"><failure message="no"/></testcase>
<testcase classname="test_b" name="three"><skipped/></testcase>
<testcase classname="test_b" name="four"><error message="no"/></testcase></testsuite></testsuites>"""


@pytest.fixture
def processes(monkeypatch, tmp_path):
    """Processes that are started, in place of starting them: a compilation of `fails` fails, tests leave REPORT."""
    started, fails = [], []

    def run(command, **options):
        started.append(command)
        assert command[0] == sys.executable
        for argument in command:
            if argument.startswith("--junitxml="):
                Path(argument.partition("=")[2]).write_text(REPORT)
        return type("Done", (), {"returncode": int(any(hopper in command for hopper in fails))})

    monkeypatch.setattr(versions.subprocess, "run", run)
    monkeypatch.setattr(versions, "VERSIONS", tmp_path / "versions.json")
    versions.VERSIONS.write_text("[]")
    monkeypatch.setattr(versions, "git", lambda *_: "abc")
    return started, fails


def rows():
    return json.loads(versions.VERSIONS.read_text(encoding="utf-8"))


def test_the_command_keeps_one_row_for_each_pair_of_versions(processes, monkeypatch):
    started, fails = processes
    own = {"torch": "2.14.1", "triton": "3.8.0", "numpy": "2.4.6", "transformers": None}
    monkeypatch.setattr(versions, "_version", own.__getitem__)
    assert versions.main(["tests/test_ops.py"]) == 1  # tests failed
    (row,) = rows()
    assert own.items() <= row.items()
    assert row["compiled"] == row["emulated"] == {"specialized": True, "gluon": True}
    assert row["tests"] == {"arguments": ["tests/test_ops.py"], "passed": 1, "skipped": 1,
                            "failed": ["test_a::two[x]", "test_b::four"]}
    assert [command[-1] for command in started if "pytest" in command] == ["tests/test_ops.py"]
    assert {command[command.index("--hopper") + 1] for command in started if "--hopper" in command} == set(proven.YOUNG)
    assert {command[-2:] for command in started if "tests.emulated" in command} == {("sm_90", name) for name in proven.YOUNG}
    fails.append("gluon")
    versions.main([])
    (row,) = rows()
    assert row["compiled"] == row["emulated"] == {"specialized": True, "gluon": False}
    assert row["tests"]["arguments"] == list(versions.TESTS)
    own["triton"] = "3.7.1"
    versions.main([])
    assert [row["triton"] for row in rows()] == ["3.7.1", "3.8.0"]


def test_tests_run_what_has_just_compiled(processes, monkeypatch):
    monkeypatch.setattr(versions, "tested", lambda arguments: {"failed": [], "seen": rows()[0]["compiled"]})
    versions.main([])
    assert rows()[0]["tests"]["seen"] == {"specialized": True, "gluon": True}


def test_the_command_passes_where_all_compiled_and_passed(processes, monkeypatch):
    monkeypatch.setattr(versions, "tested", lambda arguments: {"failed": []})
    assert versions.main([]) == 0
    monkeypatch.setattr(versions, "emulated", lambda hopper: hopper != "gluon")
    assert versions.main([]) == 1
    monkeypatch.setattr(versions, "emulated", lambda hopper: True)
    assert versions.main([]) == 0
    processes[1].append("specialized")
    assert versions.main([]) == 1


def test_what_may_run_the_young_schedules_is_read_from_the_record():
    kept = json.loads(proven.VERSIONS.read_text(encoding="utf-8"))
    assert proven.passed_on(kept, "compiled", proven.YOUNG) == proven.COMPILED_ON
    assert proven.passed_on(kept, "emulated", ("specialized",)) == proven.PROVEN_ON
    assert {"3.6", "3.7", "3.8", "3.9"} <= {row["triton"].rpartition(".")[0] for row in kept}
    assert all({"torch", "numpy", "transformers", "python", "commit", "compiled", "tests"} <= row.keys() for row in kept)
