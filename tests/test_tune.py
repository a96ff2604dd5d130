"""fused-attn tune: the search finds the best of what it may try, keeps what it finds, and calls use it."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.launches import recorded

import fused_attn
from fused_attn import settings
from fused_attn.call.spec import TileConfig
from fused_attn.plan import tuned
from fused_attn.plan.tiles import choose, choose_fused
from fused_attn.targets import triton_name
from fused_attn.tools import cli, tune

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[1]
HERE = {"format": 1, "arch": "interpreter", "gpu": "interpreter", "triton": triton_name()}


def subject(kernel="forward", head_dim=16, length=64):
    return tune.Subject(kernel, head_dim, torch.device("cpu"), torch.bfloat16, length)


def landscape(best: TileConfig):
    """A timer for which a configuration is the slower the more steps of the search lie between it and ``best``."""

    def distance(config):
        return sum(abs(values.index(getattr(config, name)) - values.index(getattr(best, name)))
                   for name, values in tune.STEPS.items())

    def timer(calls):
        return {name: 1 + distance(call.args[0]) for name, call in calls.items()}

    return timer


@pytest.fixture
def unlimited(monkeypatch):
    """Every tile may be tried, and none is run: the search alone is looked at."""
    monkeypatch.setattr(tune.Subject, "fits", lambda self, config: True)
    monkeypatch.setattr(tune.Subject, "results", lambda self, config: [torch.ones(1)])
    monkeypatch.setattr(tune.Subject, "wrong", lambda self, config: None)
    monkeypatch.setattr(tune.Subject, "launches", lambda self, config: config)


@pytest.mark.parametrize("best", [TileConfig(128, 128, 8, 3), TileConfig(16, 16, 4, 1, edge_stages=1),
                                  TileConfig(64, 32, 4, 5, disable_licm=True)])
def test_the_search_finds_what_is_fastest(unlimited, monkeypatch, best):
    one = subject()
    one.shipped = TileConfig(64, 32, 4, 2)
    search = tune.Search(one, landscape(best))
    row = search.run()
    assert tuned.config_of(row) == best
    assert row["ms"] == 1
    assert row["shipped_ms"] > 1
    assert row["complete"]
    assert row["shipped"] == dataclasses.asdict(one.shipped)


def test_a_gain_within_the_noise_is_none(unlimited):
    one = subject()
    one.shipped = TileConfig(64, 32, 4, 2)
    timer = lambda calls: {name: 1.0 if call.args[0] == one.shipped else 0.99 for name, call in calls.items()}  # noqa: E731
    row = tune.Search(one, timer).run()
    assert tuned.config_of(row) == one.shipped
    assert row["ms"] == row["shipped_ms"]


def test_time_ends_the_search(unlimited):
    one = subject()
    one.shipped = TileConfig(64, 32, 4, 2)
    row = tune.Search(one, landscape(TileConfig(128, 128, 8, 3)), deadline=0.0).run()
    assert not row["complete"]
    assert tuned.config_of(row) == one.shipped


def test_what_fails_or_is_wrong_is_not_taken(unlimited, monkeypatch):
    """The fastest two are one that raises and one whose results differ."""
    one = subject()
    one.shipped = TileConfig(64, 32, 4, 2)

    def results(self, config):
        if config.block_m == 128:
            raise RuntimeError("out of resource: shared memory")
        return [torch.full((1,), float("nan"))] if config.block_m == 32 else [torch.ones(1)]

    monkeypatch.setattr(tune.Subject, "results", results)
    said = {}
    search = tune.Search(one, lambda calls: {name: 1.0 if call.args[0] == one.shipped else 0.5 for name, call in calls.items()},
                         told=lambda config, verdict: said.setdefault(config, verdict))
    row = search.run()
    assert row["config"]["block_m"] not in (32, 128)
    assert said[TileConfig(128, 32, 4, 2)] == "RuntimeError: out of resource: shared memory"
    assert said[TileConfig(32, 32, 4, 2)] == "differs from the shipped one's results by nan"


@pytest.mark.parametrize("kernel", cli.TUNED)
def test_every_kernel_gives_the_results_of_attention(kernel):
    """What is timed is what calls run: outputs and gradients, full and causal."""
    one = subject(kernel)
    config = dataclasses.replace(one.shipped, block_n=32)
    results = one.results(config)
    own, large = one.launches(config), one.trial.large
    assert [launch.config for launch in own] == [config] * 2, "one launch for the full pass and one for the causal one"
    leaves = [x.clone().requires_grad_() for x in (large.q, large.k, large.v)]
    want = []
    for causal in (False, True):
        out, lse = fused_attn.attention(*leaves, causal=causal, return_lse=True, backend="triton")
        dq, dk, dv = torch.autograd.grad(out, leaves, large.dout)
        want += {"forward": [out, lse], "dq": [dq], "dkv": [dk, dv], "fused": [dq, dk, dv]}[kernel]
    for got, expected in zip(results, want, strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_tiles_that_cannot_fit_are_not_tried():
    one = subject(head_dim=128)
    assert one.fits(TileConfig(64, 32, 4, 1))
    assert not one.fits(TileConfig(256, 256, 4, 1))  # sums beyond the registers
    assert not one.fits(TileConfig(64, 64, 4, 5))  # shared memory
    assert not one.fits(TileConfig(16, 16, 8, 1))  # warps without work


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kernel", cli.TUNED)
def test_shipped_tiles_may_be_tried(monkeypatch, arch, kernel):
    """The search starts from them and changes one number at a time."""
    one = subject(kernel)
    monkeypatch.setattr(tune, "arch_of", lambda device: arch)
    for head_dim in (32, 64, 128, 256):
        one.head_dim = head_dim
        config = (choose_fused(head_dim, head_dim, torch.bfloat16, arch) if kernel == "fused"
                  else choose(kernel, head_dim, head_dim, torch.bfloat16, arch))
        assert config is None or one.fits(config), config


def test_an_entry_is_timed_at_the_widest_head_dim_that_it_serves(monkeypatch, tmp_path):
    """Tiles of 96 columns are smaller than those of 128, which take the same entry."""
    timed = []

    class Timed(Exception):
        pass

    def subject(kernel, head_dim, *_):
        timed.append((kernel, head_dim))
        raise Timed

    monkeypatch.setattr(tune, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(tune, "Subject", subject)
    with pytest.raises(Timed):
        cli.main(["tune", "--kernel", "forward", "--head-dim", "96", "128", "--out", str(tmp_path / "tiles.json")])
    assert timed == [("forward", 128)]


def test_a_run_without_time_keeps_what_the_file_has(tmp_path, monkeypatch, capsys):
    file = saved(tmp_path, tuned.row("dq", 16, TileConfig(32, 32, 1, 1), ms=1.0, shipped_ms=2.0, tried=9, complete=True))
    before = file.read_text()
    assert cli.main(["tune", "--kernel", "dq", "--head-dim", "16", "--again", "--minutes=0", "--out", str(file)]) == 0
    assert "no time is left" in capsys.readouterr().out
    assert file.read_text() == before


def test_a_search_that_was_cut_short_goes_on(unlimited):
    one = subject()
    one.shipped = TileConfig(64, 32, 4, 2)
    search = tune.Search(one, landscape(TileConfig(128, 128, 8, 3)), start=TileConfig(128, 128, 4, 3))
    row = search.run()
    assert tuned.config_of(row) == TileConfig(128, 128, 8, 3)
    assert row["tried"] < 20


def test_a_file_found_by_itself_breaks_no_call(monkeypatch, tmp_path, use):
    """Of another format, or with fields of another version: said once, and the shipped tiles are used."""
    file = tmp_path / "own.json"
    for text in ('{"format": 2, "tiles": []}', json.dumps({**HERE, "tiles": [tuned.row("dq", 16, TileConfig(16, 16, 1, 1))
                                                                              | {"config": {"block_q": 1}}]})):
        file.write_text(text)
        monkeypatch.setattr(settings, "TILES", None)
        monkeypatch.setattr(tuned, "path", lambda device: file)
        tuned.forget()
        with pytest.warns(RuntimeWarning, match="expected tiles"):
            assert launched()


def saved(tmp_path, *rows, **content):
    file = tmp_path / "tiles.json"
    tuned.write(file, {**HERE, "tiles": list(rows), **content})
    return file


@pytest.fixture
def use(monkeypatch):
    """Has calls look for tiles in a file."""

    def chosen(file):
        monkeypatch.setattr(settings, "TILES", str(file))
        tuned.forget()

    yield chosen
    tuned.forget()


def launched(**arguments):
    """The configurations of the kernels that a forward and a backward launch, by kernel."""
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True).bfloat16() for _ in range(3))
    with recorded() as launches:
        out = fused_attn.attention(q, k, v, backend="triton", **arguments)
        torch.autograd.grad(out.sum(), (q, k, v))
    return {launch.name: launch.config for launch in launches}


def test_calls_use_what_was_found(tmp_path, use):
    tiles = {"forward": TileConfig(32, 16, 1, 1), "dq": TileConfig(16, 64, 1, 1), "dkv": TileConfig(16, 32, 1, 1)}
    use(saved(tmp_path, *(tuned.row(kernel, 16, config) for kernel, config in tiles.items())))
    found = launched()
    assert {name: found[f"{name}_kernel"] for name in tiles} == tiles
    use(saved(tmp_path, tuned.row("fused", 16, TileConfig(16, 32, 1, 1))))
    assert launched(deterministic=False)["dkv_kernel"] == TileConfig(16, 32, 1, 1)
    # other head dims, other types, and scores that take more registers keep the shipped tiles
    use(saved(tmp_path, tuned.row("forward", 32, TileConfig(16, 16, 1, 1))))
    assert launched()["forward_kernel"] != TileConfig(16, 16, 1, 1)
    use(saved(tmp_path, tuned.row("forward", 16, TileConfig(16, 16, 1, 1))))
    assert launched(alibi_slopes=torch.ones(2))["forward_kernel"] != TileConfig(16, 16, 1, 1)


@pytest.mark.parametrize("other", [{"arch": "sm_90"}, {"triton": "1.0"}])
def test_tiles_of_another_card_or_compiler_are_left_alone(tmp_path, use, other):
    use(saved(tmp_path, tuned.row("forward", 16, TileConfig(16, 16, 1, 1)), **other))
    with pytest.warns(RuntimeWarning, match=f"are not used: {next(iter(other))} {next(iter(other.values()))}, here"):
        assert launched()["forward_kernel"] != TileConfig(16, 16, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launched()  # said once


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "tiles": []}', '{"format": 1, "tiles": [{"kernel": "dq"}]}'])
def test_a_file_that_holds_no_tiles_is_an_error(tmp_path, use, text):
    file = tmp_path / "tiles.json"
    file.write_text(text)
    use(file)
    with pytest.raises(ValueError, match=r"tiles\.json: expected tiles"):
        launched()
    use(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"FUSED_ATTN_TILES: expected a file of `fused-attn tune`, or none; got .*none\.json"):
        launched()


def test_none_means_shipped(use):
    use("none")
    assert tuned.path(torch.device("cpu")) is None
    assert launched()


def test_what_is_kept_is_found_again(monkeypatch, tmp_path):
    """A card's and Triton's own file, by their names; the environment's goes before it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(settings, "TILES", None)
    card = torch.device("cuda", 0)
    file = tuned.default_path(card)
    assert file == tmp_path / "fused_attn" / f"tiles-nvidia-h100-80gb-hbm3-triton-{triton_name()}.json"
    assert tuned.path(card) is None
    with monkeypatch.context() as patch:  # one who changes Triton tunes anew, and loses nothing
        patch.setattr(tuned, "triton_name", lambda: "99.0.0")
        assert tuned.default_path(card) not in (file, tuned.path(card))
    tuned.write(file, {**HERE, "tiles": []})
    assert tuned.path(card) == file
    monkeypatch.setattr(settings, "TILES", str(tmp_path / "mine.json"))
    assert tuned.path(card) == tmp_path / "mine.json"


def test_the_command_searches_writes_and_goes_on(tmp_path, monkeypatch, capsys, use):
    """In the interpreter, with its real kernels and few candidates; a second run finds everything there."""
    monkeypatch.setattr(tune, "STEPS", {"block_m": (32, 64), "block_n": (32,)})
    monkeypatch.setattr(tune.Subject, "fits", lambda self, config: True)
    monkeypatch.setattr(tuned, "choose", lambda kernel, *_: TileConfig(64, 32, 1, 1))
    file = tmp_path / "tiles.json"
    asked = ["tune", "--part", "tiles", "--kernel", "forward", "dq", "--head-dim", "16", "--length", "64",
             "--out", str(file)]
    assert cli.main(asked) == 0
    rows = json.loads(file.read_text())["tiles"]
    assert [(row["kernel"], row["head_dim"], row["tried"], row["complete"]) for row in rows] == [
        ("forward", 16, 2, True), ("dq", 16, 2, True)]
    for row in rows:
        assert row["shipped_ms"] >= row["ms"] > 0
        assert tuned.config_of(row) in (TileConfig(64, 32, 1, 1), TileConfig(32, 32, 1, 1))
    assert "gain" in capsys.readouterr().out
    before = file.read_text()
    assert cli.main(asked) == 0
    assert "has it already" in capsys.readouterr().out.replace("\n", " ")
    assert file.read_text() == before
    use(file)
    assert launched()["forward_kernel"] == tuned.config_of(rows[0])


@pytest.mark.parametrize("name", ["arch", "gpu", "triton"])
def test_a_file_of_another_card_or_triton_is_not_written_over(tmp_path, capsys, name):
    file = saved(tmp_path, **{name: "another"})
    before = file.read_bytes()
    assert cli.main(["tune", "--out", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"fused-attn tune: {file} holds tiles of another card or Triton: {name} 'another', here {HERE[name]!r}; delete it, or "
        "choose another --out\n")
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["my notes", "[]", '{"format": 1, "tiles": [{"kernel": "dq"}]}'])
def test_a_file_of_something_else_is_not_written_over(tmp_path, capsys, text):
    file = tmp_path / "notes.json"
    file.write_text(text)
    assert cli.main(["tune", "--out", str(file)]) == 2
    assert f"{file}: expected tiles" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize("after", [3, 12])
def test_an_interrupted_search_is_kept(unlimited, tmp_path, monkeypatch, capsys, after):
    """Ctrl-C in the first or second round of the first kernel: what it had found is in the file, and the next run goes on."""
    file, best, times = tmp_path / "tiles.json", TileConfig(128, 128, 8, 3), []
    honest = landscape(best)

    def timer(calls):
        times.append(1)
        if len(times) == after:  # the shipped tiles have nine neighbours
            raise KeyboardInterrupt
        return honest(calls)

    monkeypatch.setattr(tune, "_timer", lambda device: timer)
    monkeypatch.setattr(tuned, "shipped", lambda *_: TileConfig(64, 32, 4, 2))
    asked = ["tune", "--part", "tiles", "--kernel", "forward", "dq", "--head-dim", "16", "--length", "64",
             "--out", str(file)]
    assert cli.main(asked) == 130
    (row,) = json.loads(file.read_text())["tiles"]
    assert (row["kernel"], row["complete"]) == ("forward", False)
    assert tuned.config_of(row) != TileConfig(64, 32, 4, 2)
    assert row["shipped_ms"] > row["ms"]
    assert "interrupted" in capsys.readouterr().err
    assert cli.main(asked) == 0
    rows = json.loads(file.read_text())["tiles"]
    assert {row["kernel"]: tuned.config_of(row) for row in rows} == {"forward": best, "dq": best}


@pytest.mark.parametrize("minutes", ["nan", "inf", "-inf", "-1", "soon", ""])
def test_minutes_end(minutes, capsys):
    assert cli.main(["tune", f"--minutes={minutes}"]) == 2
    assert "argument --minutes: expected a finite number of at least 0" in capsys.readouterr().err


def test_without_a_card_the_command_says_so():
    done = subprocess.run([sys.executable, "-m", "fused_attn", "tune"], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stderr.strip()) == (2, "fused-attn tune: there is no GPU here that the kernels run on")


@pytest.mark.parametrize("kernel", ["delta", "operand_grad", "list", "combine", "rotary"])
def test_kernels_that_nobody_tunes_keep_their_tiles(kernel, monkeypatch):
    """On a card with a file of tiles; the tables have no entries of theirs."""
    monkeypatch.setattr(tuned, "tuned", lambda device: {("forward", 64): TileConfig(16, 16, 4, 1)})
    monkeypatch.setattr(tuned, "arch_of", lambda device: "sm_80")
    q, own = torch.randn(1, 1, 5, 64).bfloat16(), TileConfig(64, 64, 4, 1)
    assert tuned.instead(own, kernel, q, q, q.device) == own
