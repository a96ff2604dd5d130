"""The programs in examples/, shortened: they run as a user runs them, learn what they say, and take up where they stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cpu
from fused_attn import settings
from fused_attn.plan import backends

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # where a program finds its neighbours

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def run(name: str, out: Path, *more: str) -> tuple[dict, str]:
    """(summary.json, what was printed) of a shortened run."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--out", str(out), *more]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=out.parent, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads((out / f"{name}-summary.json").read_text()), result.stdout


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.slow
def test_gpt_learns_and_pre_training_helps(tmp_path):
    summary, printed = run("gpt", tmp_path / "out")
    losses = summary["losses"]
    assert losses["code, pre-trained"] < 2.8  # bytes alone: about 3.1
    assert losses["prose, fine-tuned"] < losses["prose, before fine-tuning"] < losses["prose, from random weights"]
    assert summary["sample"].startswith("The statement ")
    assert len(summary["sample"]) > 80
    assert summary["sample"] in printed  # written as it was drawn
    assert all(is_png(tmp_path / "out" / f"gpt-{name}.png") for name in ("loss", "attention"))


def test_a_run_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    """Stopped at step 7 of 20 and run again: the weights are those of a run in one piece."""
    common = pytest.importorskip("common")
    monkeypatch.setattr(common, "SAVE_EVERY", 5)

    def training(out, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))

        def batch_at(step):
            if step == stop:
                raise KeyboardInterrupt
            return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

        history = common.train("model", model, lambda x: model(x).square().mean(), batch_at, 20, out)
        return model.state_dict(), history.losses

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "a", stop=7)
    resumed, losses = training(tmp_path / "a")
    whole, expected = training(tmp_path / "b")
    assert losses == expected
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_checkpoint_of_another_training_is_neither_taken_up_nor_lost(tmp_path):
    common = pytest.importorskip("common")

    def losses(width, steps, seed=0):
        torch.manual_seed(seed)
        model = torch.nn.Linear(width, 1)
        return common.train("model", model, lambda x: model(x).square().mean(), lambda step: torch.ones(2, width), steps,
                            tmp_path).losses

    assert len(losses(3, 4)) == 4
    before = (tmp_path / "model.pt").read_bytes()
    for width, steps, seed, told in ((5, 4, 0, "parameters 4, here 6"), (3, 2, 0, "steps 4, here 2"),
                                     (3, 4, 1, "seed 0, here 1")):
        with pytest.raises(common.options.BadInputError, match=rf"of another training \({told}\); .*--out.*--fresh"):
            losses(width, steps, seed)
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.fixture
def tiny(monkeypatch):
    """runs(folder, *more): the exit status of a program, "tiny", with two trainings of a moment."""
    common = pytest.importorskip("common")

    def main(asked):
        torch.manual_seed(asked.seed)
        for name in ("first", "second"):
            model = torch.nn.Linear(3, 1)
            common.train(f"tiny-{name}", model, lambda x, model=model: model(x).square().mean(), lambda step: torch.ones(2, 3),
                         3, asked.out)
        common.summarise({}, asked)

    def runs(folder, *more):
        monkeypatch.setattr(sys, "argv", ["tiny.py", "--out", str(folder), *more])
        return common.run("A program.", "tiny", ("first", "second"), ("loss",), main)

    return runs


def test_fresh_forgets_the_programs_own_checkpoints_alone(tiny, tmp_path, capsys):
    assert tiny(tmp_path) == 0
    others = ("model.pt", "tiny.pt", "tiny-third.pt", "first.pt", "gpt-first.pt", "tiny-first.tmp", "tiny-first.new",
              "notes.txt")
    for name in others:
        (tmp_path / name).write_text("precious")
    (tmp_path / "link.pt").symlink_to("model.pt")
    assert tiny(tmp_path, "--fresh") == 0
    assert "were done before" not in capsys.readouterr().out
    assert all((tmp_path / name).read_text() == "precious" for name in (*others, "link.pt"))
    assert tiny(tmp_path) == 0
    assert capsys.readouterr().out.count("3 of 3 steps were done before") == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        *others, "link.pt", "tiny-first.pt", "tiny-second.pt", "tiny-summary.json"}


def test_programs_share_a_folder_and_no_file():
    """By their source: every file is named after its program, and is one that is checked before the work."""
    seen = set()
    for name in ("gpt", "masked", "translate"):
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert "options.out /" not in text
        files = {f"{name}-{written}" for written in re.findall(r'file\(options, "([^"]+)"\)', text)}
        assert files
        assert not files & seen
        seen |= files
        pictures = re.search(r"\((\"[^()]*\")\),\s*main\)\)", text.rpartition("__main__")[2])
        assert files == {f"{name}-{picture}.png" for picture in re.findall(r'"(\w+)"', pictures[1])}
    gpt, masked = ((ROOT / "examples" / f"{name}.py").read_text() for name in ("gpt", "masked"))
    assert set(re.findall(r'fit\("([\w-]+)"', gpt)) == {"pre-train", "fine-tune", "from-scratch"}
    assert {"masked-gaps", *(f"masked-{name}" for name in re.findall(r'tune\("([\w-]+)"', masked))} == {
        "masked-gaps", "masked-packages", "masked-from-scratch"}
    assert '("pre-train", "fine-tune", "from-scratch")' in gpt
    assert '("gaps", "packages", "from-scratch")' in masked


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "garbled", "keys", "weights", "object"])
def test_a_damaged_checkpoint_is_one_line_with_the_way_out(tiny, tmp_path, capsys, damage):
    assert tiny(tmp_path) == 0
    file = tmp_path / "tiny-first.pt"
    whole, saved = file.read_bytes(), torch.load(file)
    if damage in ("empty", "cut", "text", "garbled"):
        half = len(whole) // 2
        file.write_bytes({"empty": b"", "cut": whole[:half], "text": b"notes", "garbled": whole[:half] + bytes(half)}[damage])
    else:
        torch.save({"keys": {"run": saved["run"]}, "weights": {**saved, "model": {}}, "object": [1]}[damage], file)
    capsys.readouterr()
    assert tiny(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tiny.py: {file} is damaged or no checkpoint of tiny-first (")
    assert line.endswith("delete it, or train from the beginning with --fresh")
    assert tiny(tmp_path, "--fresh") == 0


@pytest.mark.parametrize("name", ["tiny-first.pt", "tiny-second.pt", "tiny-loss.png", "tiny-summary.json"])
@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(tiny, tmp_path, capsys, name, more):
    assert tiny(tmp_path) == 0
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert tiny(tmp_path, *more) == 2
    assert capsys.readouterr().err == f"tiny.py: {str(tmp_path / name)!r} cannot be written: it is a folder\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_backend_that_cannot_run_here_is_told_before_the_work(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", "triton")
    monkeypatch.setattr(backends, "device_reasons", lambda *_: ("there is no card",))
    assert tiny(tmp_path / "new") == 2
    assert capsys.readouterr().err == "tiny.py: FUSED_ATTN_BACKEND: 'triton' cannot run this call: there is no card\n"
    assert cpu.main(["--rounds", "1"]) == 2
    assert "'triton' cannot run this call: there is no card\n" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_seconds_of_the_committed_summary_are_those_of_its_models():
    summary = json.loads((ROOT / "docs" / "images" / "translate-summary.json").read_text())
    assert summary["training_seconds"] == pytest.approx(sum(model["seconds"] for model in summary["models"].values()))


@pytest.mark.parametrize("more", [("--seed", "x"), ("--seed", "-1"), ("--seed", "1" * 30), ("--out", "/dev/null/x"),
                                  ("--nonsense",)])
def test_bad_input_is_one_line(tiny, tmp_path, capsys, more):
    assert tiny(tmp_path / "new", *more) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_stack_order_of_expressions():
    translate = pytest.importorskip("translate")
    import ast

    cases = {"a + b * c": "a b c * +", "f(x.y, -1)[0]": "f x y . 1 neg call2 0 []", "not a or b in (c, 'd')":
             "a not b c STR tuple2 in or", "x if y else z": None, "f(*args)": None, "a < b < c": None}
    for text, expected in cases.items():
        tree = ast.parse(text, mode="eval").body
        if expected is None:
            with pytest.raises((ValueError, KeyError)):
                list(translate.postfix(tree))
        else:
            assert " ".join(translate.postfix(tree)) == expected
    assert translate.infix("f(x, 'a b')[0]") == ["f", "(", "x", ",", "STR", ")", "[", "0", "]"]


@pytest.mark.parametrize("name", ["transformer", "LSTM, additive alignment", "LSTM, dot-product scores", "LSTM"])
def test_translators_decode_as_they_were_taught(name):
    """Greedy decoding, token by token with a cache, against teacher forcing on what it wrote; padding changes nothing."""
    translate = pytest.importorskip("translate")
    from fused_attn.nn import generate

    model = translate.MODELS[name](30, 16).double().eval()
    source, lengths = torch.randint(3, 30, (3, 9)), torch.tensor([9, 4, 6])
    begin = torch.full((3, 1), translate.BEGIN)
    with torch.no_grad():
        drawn = generate(model, begin, 7, cache=model.begin(source, lengths), temperature=0)
        taught = model.teach(source, lengths, torch.cat((begin, drawn[:, :-1]), 1))
        assert torch.equal(taught.argmax(-1), drawn)
        alone = model.teach(source[1:2, :4], lengths[1:2], torch.cat((begin, drawn[:, :-1]), 1)[1:2])
        torch.testing.assert_close(alone, taught[1:2], rtol=1e-9, atol=1e-9)
        if name != "LSTM":
            maps = model.maps(source, lengths, torch.cat((begin, drawn[:, :-1]), 1))
            torch.testing.assert_close(maps.sum(-1), torch.ones(3, 7, dtype=torch.float64))
            assert not maps[1, :, 4:].any()


@pytest.mark.slow
def test_translation_tells_its_story(tmp_path):
    summary, _ = run("translate", tmp_path / "out")
    assert set(summary["models"]) == {"LSTM", "LSTM, additive alignment", "LSTM, dot-product scores", "transformer"}
    losses = {name: found["last_loss"] for name, found in summary["models"].items()}
    assert summary["training_seconds"] == sum(found["seconds"] for found in summary["models"].values())
    assert losses["transformer"] < losses["LSTM"]
    assert max(losses.values()) < 3.5
    assert all(is_png(tmp_path / "out" / f"translate-{name}.png") for name in ("comparison", "alignment", "loss"))


@pytest.mark.slow
def test_masked_encoder_learns(tmp_path):
    summary, _ = run("masked", tmp_path / "out")
    assert summary["gap loss"] < summary["gap loss without context"] - 0.1
    assert all(is_png(tmp_path / "out" / f"masked-{name}.png") for name in ("loss", "attention", "rollout"))
