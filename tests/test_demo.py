"""The demo: its model, its data, its criteria, and a whole run of a few steps."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_attn
from fused_attn.tools import demo, options
from fused_attn.tools.demo import data, train
from fused_attn.tools.demo.model import GPT, GPTConfig

CPU = torch.device("cpu")
TINY = GPTConfig(context=16, layers=2, heads=2, width=32)
# An untrained model is far above the unigram entropy: a margin of -5 nats lets it pass, one of 5 fails any model.
RECIPE = train.Recipe(steps=6, evaluations=2, margin=-5.0, sample_bytes=20, batch=4, warmup=2, validation_windows=8,
                      max_bytes=60_000, model=TINY)
FILES = {"summary.json", "loss.png", "attention.png", "sample.txt", "checkpoint.pt"}


def everything(q, k, v, causal):
    """Attention that also looks at the future."""
    return fused_attn.attention(q, k, v, causal=False)


def kernels(q, k, v, causal):
    return fused_attn.attention(q, k, v, causal=causal, backend="triton")


def model_of(attend):
    """A tiny model, the same whatever its attention, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = GPT(TINY, attend)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    return model


def loss_and_gradients(attend):
    model = model_of(attend)
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@torch.no_grad()
def leak(attend):
    """How much a changed last token changes the logits of the earlier ones, and its own."""
    model, tokens = model_of(attend), torch.arange(100, 116)[None]
    changed = tokens.clone()
    changed[0, -1] = 0
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    return difference[:-1].max(), difference[-1]


def test_no_logit_sees_a_later_token():
    earlier, own = leak(fused_attn.attention)
    assert earlier < 1e-6
    assert own > 1e-2
    assert leak(everything)[0] > 1e-3  # this test does see a leak


@pytest.mark.parametrize("attend", [fused_attn.attention, pytest.param(kernels, marks=pytest.mark.kernels)])
def test_fused_and_reference_give_the_same_logits_and_gradients(attend):
    for actual, expected in zip(loss_and_gradients(attend), loss_and_gradients(fused_attn.reference_attention), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_attention_weights_are_those_of_the_model():
    model, tokens = model_of(fused_attn.attention), torch.arange(16)[None]
    weights = model.attention_weights(tokens)
    assert weights.shape == (2, 1, 2, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 2, 16))
    x = model.embed(tokens)
    for block, of_layer in zip(model.blocks, weights, strict=True):
        q, k, v = block.attention.project(block.norm1(x))
        torch.testing.assert_close(of_layer @ v, fused_attn.attention(q, k, v, causal=True), rtol=1e-4, atol=1e-5)
        x = block(x)


def test_split_cuts_once():
    text = bytes(range(256)) * 10
    head, tail = data.split(text)
    assert len(tail) == 256
    assert bytes(head.tolist()) + bytes(tail.tolist()) == text


def test_load_reads_in_order_of_name_up_to_the_limit_and_skips_what_it_cannot_read(tmp_path):
    for letter in "gdbfaec":  # no file system is likely to list these in order of name by itself
        (tmp_path / f"{letter}.py").write_bytes(letter.encode() * 9_000)
    (tmp_path / "aa.py").mkdir()
    (tmp_path / "a.txt").write_bytes(b"x" * 50_000)
    corpus = data.load(60_000, tmp_path)
    text = bytes(torch.cat((corpus.train, corpus.validation)).tolist())
    assert text == b"".join(letter * 9_000 for letter in (b"a", b"b", b"c", b"d", b"e", b"f")) + b"g" * 6_000
    assert corpus.files == 7


def test_too_little_text_is_an_error(tmp_path):
    (tmp_path / "a.py").write_bytes(b"pass\n")
    with pytest.raises(data.DemoError, match="hold 5"):
        data.load(60_000, tmp_path)


def test_data_and_its_order_depend_on_the_seed_alone():
    first, second = data.load(60_000), data.load(60_000)
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)
    streams = [data.batches(first.train, 4, 16, seed) for seed in (0, 0, 1)]
    for _ in range(3):
        same, again, other = (next(stream)[0] for stream in streams)
        assert torch.equal(same, again)
        assert not torch.equal(same, other)


def test_batches_reach_both_ends_of_the_text_and_targets_follow_inputs():
    tokens = torch.arange(20, dtype=torch.uint8)
    inputs, targets = next(data.batches(tokens, 200, 16, 0))
    assert torch.equal(targets, inputs + 1)
    assert (int(inputs.min()), int(targets.max())) == (0, 19)


def test_unigram_entropy():
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert data.unigram_entropy(torch.tensor(list(b"aaab"), dtype=torch.uint8)) == pytest.approx(expected)


def training(seed, attend=fused_attn.attention):
    seen = []
    torch.rand(seed + 1)  # what ran before does not matter
    _, history = train.train(data.load(60_000), RECIPE, seed, attend, CPU, lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(history.losses, 1))
    assert [step for step, _ in history.validation] == [3, 6]
    return history


def test_training_depends_on_the_seed_alone_and_lowers_the_loss():
    first, again, other = training(0), training(0), training(1)
    assert (first.losses, first.validation) == (again.losses, again.validation)
    assert first.losses != other.losses
    assert first.validation[-1][1] < first.losses[0] - 0.1


def test_comparison_fails_for_early_and_for_final_differences():
    history = train.History([3.0] * 60, [(60, 2.0)])
    early = replace(history, losses=[3.0] * 49 + [3.001] + [3.0] * 10)
    late = replace(history, losses=[3.0] * 50 + [3.001] * 10)
    assert train.compare(history, late)["passed"]
    assert not train.compare(history, early)["passed"]
    assert not train.compare(history, replace(history, validation=[(60, 2.03)]))["passed"]
    assert not train.compare(history, replace(history, validation=[(60, math.nan)]))["passed"]


def checked():
    return {"backend": "triton", "device": "cpu", "kernel_launches": 3, "rows": [{"case": "full", "ok": True}], "passed": True}


@pytest.fixture
def tiny(monkeypatch):
    """Has --quick take a few steps on a CPU, with another margin where one is given."""
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def use(**changes):
        monkeypatch.setattr(demo, "QUICK", replace(RECIPE, **changes))

    use()
    return use


def test_a_whole_run(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert demo.run(out, quick=True, seed=0, check=checked) == 0
    assert {path.name for path in out.iterdir()} == FILES
    printed = capsys.readouterr().out
    assert "overwrite" not in printed
    assert all(name in printed for name in FILES)

    summary = json.loads((out / "summary.json").read_text())
    assert summary["passed"]
    assert summary["conditions"]["torch"] == torch.__version__
    backends = {name: step["backend"] for name, step in summary["steps"].items()}
    assert backends == {"check": "triton", "train_fused": "torch", "train_reference": "reference", "generate": "torch",
                        "attention_map": "plain softmax", "step_on_kernels": "triton, interpreted"}
    assert summary["steps"]["step_on_kernels"]["gradient_difference"] < 1e-4
    assert all(step["seconds"] >= 0 for step in summary["steps"].values())
    for name in summary["pictures"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text(encoding="utf-8").startswith("def ")

    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    loss = train.evaluate(model, data.load(60_000).validation, RECIPE.validation_windows, CPU)
    assert loss == pytest.approx(summary["losses_nats"]["validation_fused"], abs=1e-5)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_second_run_says_what_it_overwrites_and_leaves_the_rest(tiny, tmp_path, capsys):
    (tmp_path / "loss.png").write_bytes(b"old")
    (tmp_path / "mine.txt").write_bytes(b"kept")
    assert demo.run(tmp_path, quick=True, seed=0, check=checked) == 0
    assert "will overwrite loss.png\n" in capsys.readouterr().out
    assert (tmp_path / "loss.png").read_bytes() != b"old"
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"mine.txt"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(tiny, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(options.BadInputError, match=f"{name}' cannot be written: it is a folder"):
        demo.run(tmp_path, quick=True, seed=0, check=lambda: pytest.fail("work was begun"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_write_that_does_not_finish_keeps_the_old_file(tiny, tmp_path, monkeypatch):
    (tmp_path / "attention.png").write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, quick=True, seed=0, check=checked)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("attention.png", b"old")]


def test_an_interrupted_run_keeps_the_model(tiny, tmp_path, monkeypatch):
    """Ctrl-C in the second training, which only compares."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_attn, "reference_attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, quick=True, seed=0, check=checked)
    assert {path.name for path in tmp_path.iterdir()} == {"attention.png", "sample.txt", "checkpoint.pt"}
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]


def test_a_failing_check_ends_the_run_and_keeps_earlier_results(tiny, tmp_path, capsys):
    (tmp_path / "summary.json").write_bytes(b"old")
    assert demo.run(tmp_path, quick=True, seed=0, check=lambda: {**checked(), "passed": False}) == 1
    assert "the check of backend triton above did not pass" in capsys.readouterr().out
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("summary.json", b"old")]


def failures(out):
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["passed"]
    return summary["failures"]


def test_a_model_that_learns_too_little_fails(tiny, tmp_path):
    tiny(margin=5.0)
    assert demo.run(tmp_path, quick=True, seed=0, check=checked) == 1
    (failure,) = failures(tmp_path)
    assert "unigram entropy" in failure


def test_an_attention_that_differs_from_the_reference_fails(tiny, tmp_path, monkeypatch):
    exact = fused_attn.attention
    monkeypatch.setattr(fused_attn, "attention", lambda q, k, v, causal, **named: exact(q, k, v, causal=False, **named))
    tiny(steps=20, learning_rate=1e-2)
    assert demo.run(tmp_path, quick=True, seed=0, check=checked) == 1
    on_kernels, failure = failures(tmp_path)
    assert "on the kernels" in on_kernels
    assert "differ" in failure


def test_a_loss_that_is_not_finite_fails(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fused_attn, "attention", lambda q, k, v, causal: q * math.nan)
    assert demo.run(tmp_path, quick=True, seed=0, check=checked) == 1
    assert "the loss of step 1 is nan" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_a_missing_extra_is_named(missing, monkeypatch, tmp_path, capsys):
    for name in ("pipeline", "plots"):
        monkeypatch.delattr(demo, name, raising=False)
        monkeypatch.delitem(sys.modules, f"fused_attn.tools.demo.{name}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    assert demo.run(tmp_path, quick=True, seed=0, check=checked) == 2
    assert "pip install 'fused-attn[examples]'" in capsys.readouterr().err
