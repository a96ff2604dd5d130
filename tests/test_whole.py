"""What `make test-all` keeps of each file: nothing of one that is not through, every failure, and for which code it speaks."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from support.selection import keep_few, spread

from tests import whole
from tests.whole import Record


@pytest.fixture
def out(monkeypatch, tmp_path):
    monkeypatch.setattr(whole, "OUT", tmp_path / "test-all.json")
    monkeypatch.setattr(whole, "revision", lambda: "2")
    monkeypatch.setattr(whole, "versions", lambda: "torch 2")
    return whole.OUT


def ran(record, name, outcome="passed", teardown="passed"):
    """The reports of one test, as pytest makes them."""
    whens = [("setup", "passed"), ("call", outcome)] if outcome != "skipped" else [("setup", "skipped")]
    for when, result in (*whens, ("teardown", teardown)):
        record.pytest_runtest_logreport(SimpleNamespace(nodeid=name, when=when, outcome=result, duration=0.5))


def test_files_are_kept_when_they_are_through(out):
    old = {"commit": "1", "versions": "torch 1", "passed": 3, "skipped": 0, "failed": [], "seconds": 1.0}
    record = Record({"test_old.py": old}, "2")
    for worker in range(2):  # which have the same tests
        record.pytest_xdist_node_collection_finished(worker, ["test_a.py::one", "test_a.py::two[x::y]", "test_b.py::one",
                                                              "test_b.py::two", "test_c.py::one"])
    ran(record, "test_a.py::one")
    assert not out.exists()
    ran(record, "test_b.py::one")
    ran(record, "test_a.py::two[x::y]", "skipped")
    assert json.loads(out.read_text())["files"].keys() == {"test_old.py", "test_a.py"}
    ran(record, "test_b.py::two", "failed")
    ran(record, "test_c.py::one", teardown="failed")
    rows = json.loads(out.read_text())["files"]
    assert rows["test_a.py"] == {"commit": "2", "versions": "torch 2", "passed": 1, "skipped": 1, "failed": [], "seconds": 2.5}
    assert rows["test_b.py"]["failed"] == ["two"]
    assert rows["test_c.py"]["failed"] == ["one"]
    assert rows["test_old.py"]["passed"] == 3


def test_a_file_has_passed_on_the_code_that_it_ran_on(monkeypatch):
    row = {"commit": "abc", "versions": whole.versions(), "passed": 1, "skipped": 0, "failed": [], "seconds": 1.0}
    monkeypatch.setattr(whole, "unchanged", lambda commit: commit == "abc")
    monkeypatch.setattr(whole, "revision", lambda: "abc")
    assert whole.passed(row)
    for other in ({"commit": "abd"}, {"commit": "abc-dirty"}, {"failed": ["one"]}, {"versions": "torch 1"}):
        assert not whole.passed({**row, **other})
    monkeypatch.setattr(whole, "revision", lambda: "abc-dirty")
    assert not whole.passed(row)


def test_code_that_changes_meanwhile_is_told_of(out, monkeypatch):
    record = Record({}, "1")
    record.pytest_xdist_node_collection_finished(0, ["test_a.py::one"])
    ran(record, "test_a.py::one")
    assert json.loads(out.read_text())["files"]["test_a.py"]["commit"] == "1-dirty"


def test_the_code_is_that_of_a_commit_or_not(tmp_path, monkeypatch):
    """Other files, and the record of versions, change nothing; a file that git does not know does."""
    def git(*command):
        done = subprocess.run(("git", "-c", "user.name=a", "-c", "user.email=a@b", *command), cwd=tmp_path, capture_output=True,
                              text=True, check=True)
        return done.stdout.strip()

    monkeypatch.setattr(whole, "git", git)
    git("init", "-q")
    for name in ("tests/test_a.py", "fused_attn/versions.json", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("add", "-A")
    git("commit", "-qm", "first")
    first = whole.revision()
    for name in ("fused_attn/versions.json", "README.md"):
        (tmp_path / name).write_text("2")
    assert whole.revision() == first
    assert whole.unchanged(first)
    (tmp_path / "tests/test_b.py").write_text("1")
    assert whole.revision() == f"{first}-dirty"
    git("add", "-A")
    git("commit", "-qm", "second")
    assert not whole.unchanged(first)
    assert whole.unchanged(whole.revision())


def test_a_file_that_is_none_ends_the_command(out, capsys):
    assert whole.main(["tests/test_whole.py", "tests/nonsense.py"]) == 2
    assert capsys.readouterr().err == "tests.whole: expected files of tests/; got nonsense.py\n"
    assert not out.exists()


# --- which parameter sets the fast part runs ---


@pytest.mark.parametrize(("n", "count", "kept"), [
    (1, 5, {0}), (2, 5, {0, 4}), (3, 5, {0, 2, 4}), (4, 33, {0, 11, 21, 32}), (5, 5, {0, 1, 2, 3, 4}), (9, 2, {0, 1})])
def test_parameter_sets_are_evenly_spread(n, count, kept):
    assert spread(n, count) == kept


class Item:
    """A collected test, as far as the selection looks at it."""

    def __init__(self, nodeid, **marks):
        self.nodeid, self.marks = nodeid, {name: SimpleNamespace(args=args) for name, args in marks.items()}

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.marks[mark.name] = mark.mark


def test_a_few_parameter_sets_stay_fast():
    """Of those of one test that are not slow by themselves; tests without the mark are left alone."""
    items = [Item("a.py::test_x[0]", few=(2,), slow=()), *(Item(f"a.py::test_x[{i}]", few=(2,)) for i in (1, 2, 3)),
             Item("a.py::test_y[0]"), Item("b.py::test_x[0]", few=(1,)), Item("b.py::test_x[1]", few=(1,))]
    keep_few(items)
    assert [item.nodeid for item in items if "slow" not in item.marks] == [
        "a.py::test_x[1]", "a.py::test_x[3]", "a.py::test_y[0]", "b.py::test_x[0]"]
