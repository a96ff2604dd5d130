"""Files that results go to: whole or not at all, no link followed, nobody let in, and told of before the work."""

import os
import re
from pathlib import Path

import pytest

from fused_attn import files

Figure = pytest.importorskip("matplotlib.figure").Figure

from fused_attn import viz  # noqa: E402  # draws with matplotlib
from fused_attn.tools.bench import plots  # noqa: E402

ROW = {"case": "a", "pass": "forward", "n_queries": 8, "n_keys": 8, "head_dim": 8, "dtype": "fp32", "causal": False,
       "ms": 1.0, "p20": 0.9, "p80": 1.1, "tflops": 1.0, "flops": 1e9}


@pytest.mark.parametrize("write", [
    lambda path: files.write(path.with_suffix(".json"), "new"), lambda path: files.write_figure(path, Figure()),
    lambda path: viz.save(Figure(), path), lambda path: viz.save(Figure(), path.with_suffix(".html")),
    lambda path: plots.save([ROW], "title", path)], ids=["text", "figure", "viz", "page", "bench"])
def test_no_writer_of_results_follows_a_link(tmp_path, write):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = [tmp_path / f"result.{ending}" for ending in ("json", "png", "html")]
    for name in names:
        name.symlink_to(victim)
    write(tmp_path / "result.png")
    assert victim.read_text() == "precious"
    assert sum(name.is_symlink() for name in names) == 2


@pytest.mark.parametrize("folder", ["fused_attn", "benchmarks", "examples"])
def test_results_are_written_in_one_place(folder):
    """By the source: what a link, or a run that is cut short, would make of other ways to write is left to ``files``."""
    ways = re.compile(r"write_text|write_bytes|savefig\(|\.open\(\"[wax]|[^.]open\([^)]*\"[wax]b?\"|torch\.save\(")
    known = ("savefig(buffer,", "savefig(picture,", "torch.save(state, content)", "torch.save({\"config\":", "os.devnull",
             "/proc/self/clear_refs", "with path.open(\"a\"", "open(fresh, \"xb\"")
    for file in sorted((Path(__file__).parents[1] / folder).glob("**/*.py")):
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if ways.search(line)]
        assert [line for line in found if not any(text in line for text in known)] == [], file


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_who_may_read_a_file_may_read_what_takes_its_place(tmp_path, mode):
    file = tmp_path / "kept.json"
    file.write_text("old")
    file.chmod(mode)
    files.write(file, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", mode)


def test_a_link_has_no_mode_to_keep(tmp_path):
    private = tmp_path / "private"
    private.write_text("precious")
    private.chmod(0o600)
    (tmp_path / "result.json").symlink_to(private)
    files.write(tmp_path / "result.json", "new")
    assert (tmp_path / "result.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "kept.json"
    files.write(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.json"]


@pytest.mark.parametrize("place", [".", "there/x.json", "/dev/null", "/proc/none/x.json", "n" * 300, "pipe"])
def test_what_cannot_be_written_is_found_before(tmp_path, place):
    (tmp_path / "there").write_text("a file where a folder is asked for")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / place
    assert files.against(path)
    with pytest.raises(OSError):  # noqa: PT011  # whatever the system calls it
        files.write(path, "x")
    assert sorted(os.listdir(tmp_path)) == ["pipe", "there"]


def test_what_can_be_written_leaves_no_trace_when_it_is_asked(tmp_path):
    for place in ("new.json", "a/b/new.json"):
        assert files.against(tmp_path / place) is None
        assert not os.listdir(tmp_path)
    files.write(tmp_path / "a/b/new.json", "ü")
    assert (tmp_path / "a/b/new.json").read_bytes() == "ü".encode()
    assert (tmp_path / "a/b/new.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now
