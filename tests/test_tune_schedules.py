"""fused-attn tune: which schedule makes a pass and how long splits are, each held to fp64 and timed; and calls that use it."""

import functools
import json

import pytest
import torch
from support.launches import recorded

import fused_attn
from fused_attn import settings
from fused_attn.call.spec import TileConfig
from fused_attn.plan import schedules, tuned
from fused_attn.plan.plan import collect, finish
from fused_attn.targets import triton_name
from fused_attn.tools import cli, quickest
from fused_attn.tools.trial import SMALL_ON_A_CPU, Trial

pytestmark = pytest.mark.kernels
CPU = torch.device("cpu")
HERE = {"format": 1, "arch": "interpreter", "gpu": "interpreter", "triton": triton_name(), "tiles": []}


def trial(which, head_dim=16, **more):
    return Trial(which, head_dim, CPU, torch.bfloat16, 64, **more)


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Has calls look into a file of this content."""

    def chosen(**content):
        file = tmp_path / "card.json"
        file.write_text(json.dumps({**HERE, **content}))
        monkeypatch.setattr(settings, "TILES", str(file))
        tuned.forget()
        return file

    yield chosen
    tuned.forget()


def ranked(*names):
    """A timer that finds these the quicker the earlier they stand."""
    return lambda calls: {name: 1.0 + (names.index(name) if name in names else 9) for name in calls}


@pytest.mark.parametrize(("which", "names"), [("forward", ("pointers",)), ("backward", ("fused", "separate"))])
def test_what_may_run_is_timed_and_the_rest_says_why(which, names):
    row = quickest.choose_schedule(trial(which), ranked(*names))
    assert (row["pass"], row["head_dim"], row["schedule"], row["own"]) == (which, 16, names[0], names[0])
    assert tuple(row["ms"]) == names
    assert set(row["refused"]) == set(tuned.SCHEDULES[which]) - set(names)
    assert all("Hopper" in reason for reason in row["refused"].values())


def test_a_quicker_schedule_takes_the_place_of_the_package_s_own_and_noise_does_not():
    backward = trial("backward")
    assert quickest.choose_schedule(backward, ranked("separate", "fused"))["schedule"] == "separate"
    nearly = lambda calls: {name: 0.99 if name == "separate" else 1.0 for name in calls}  # noqa: E731
    assert quickest.choose_schedule(backward, nearly)["schedule"] == "fused"


def test_every_schedule_that_is_timed_gives_the_gradients_of_attention():
    backward = trial("backward")
    large = backward.large
    for schedule in ("fused", "separate"):
        backward_results = backward.results(schedule)
        for causal, found in zip((False, True), backward_results, strict=True):
            leaves = [x.clone().requires_grad_() for x in (large.q, large.k, large.v)]
            out = fused_attn.attention(*leaves, causal=causal, backend="triton")
            for got, want in zip(found.values(), torch.autograd.grad(out, leaves, large.dout), strict=True):
                torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("damage", [1.02, float("nan"), 0.0])
@pytest.mark.parametrize(("which", "name"), [("forward", "out"), ("forward", "lse"), ("backward", "dk")])
def test_what_is_wrong_by_fp64_is_not_timed(monkeypatch, which, name, damage):
    """All candidates damaged alike: comparing them with each other would not show it."""
    one, honest = trial(which), Trial.results

    def results(self, *arguments):
        found = honest(self, *arguments)
        found[1][name].mul_(damage)
        return found

    schedule = {"forward": "pointers", "backward": "separate"}[which]
    assert one.wrong(schedule) is None
    monkeypatch.setattr(Trial, "results", results)
    assert name in one.wrong(schedule)
    row = quickest.choose_schedule(one, lambda calls: pytest.fail(f"timed {list(calls)}"))
    assert row["ms"] == {}
    assert row["schedule"] == row["own"]


def test_what_is_held_to_fp64_ends_within_tiles():
    tiles = [tuned.shipped(kernel, 16, torch.bfloat16, "interpreter") for kernel in tuned.KERNELS]
    assert all(SMALL_ON_A_CPU[0] % config.block_m and SMALL_ON_A_CPU[1] % config.block_n for config in tiles)


def test_tiles_of_the_file_are_those_that_schedules_are_timed_with():
    config = TileConfig(16, 32, 1, 1)
    backward = trial("backward", tiles={"dq": config})
    assert config in {made.config for made in backward.made("separate") if hasattr(made, "config")}


@pytest.mark.parametrize("split", tuned.SPLITS)
def test_splits_are_as_long_as_the_file_says(use, split):
    use(split={"keys": split})
    q, k, v = torch.randn(1, 2, 1, 16).bfloat16(), *torch.randn(2, 1, 2, 2048, 16).bfloat16()
    with recorded() as launches:
        out = fused_attn.attention(q, k, v, backend="triton")
    forward = next(launch for launch in launches if launch.name == "forward_kernel")
    assert forward.programs == 2 * 2048 // split
    exact = fused_attn.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_the_split_is_chosen_by_time_among_those_that_are_right(monkeypatch):
    row = quickest.choose_split(CPU, torch.bfloat16, ranked("512", "256"))
    assert (row["keys"], row["own"], set(row["ms"])) == (512, 256, set(map(str, tuned.SPLITS)))
    monkeypatch.setattr(quickest, "error_ratio", lambda *_: 99.0)
    row = quickest.choose_split(CPU, torch.bfloat16, lambda calls: pytest.fail("timed"))
    assert (row["keys"], row["ms"]) == (256, {})
    assert set(row["refused"].values()) == {"R against fp64 is 99"}


def backward_of(deterministic=False):
    """The schedule of the backward of a call, by ``explain`` and by what is launched."""
    arguments = {"deterministic": deterministic}
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True).bfloat16() for _ in range(3))
    told = fused_attn.explain(q, k, v, backend="triton", **arguments).schedule["backward"]
    out = fused_attn.attention(q, k, v, backend="triton", **arguments)
    with recorded() as launches:
        torch.autograd.grad(out.sum(), (q, k, v))
    ran = "separate" if "dq_kernel" in {launch.name for launch in launches} else "fused"
    return told, ran


def test_calls_run_the_schedule_of_the_file(use):
    assert backward_of() == ("fused", "fused")
    use(schedules=[{"pass": "backward", "head_dim": 16, "schedule": "separate"}])
    assert backward_of() == ("separate", "separate")
    with fused_attn.hopper("pointers"):  # asked for by name, this wins
        assert backward_of() == ("fused", "fused")
    use(schedules=[{"pass": "backward", "head_dim": 32, "schedule": "separate"}])  # of other head dims
    assert backward_of() == ("fused", "fused")
    use(schedules=[{"pass": "backward", "head_dim": 16, "schedule": "gluon"}])  # which this device has not
    assert backward_of() == ("fused", "fused")
    use(schedules=[{"pass": "backward", "head_dim": 16, "schedule": "fused"}])
    assert backward_of(deterministic=True) == ("separate", "separate")


@pytest.mark.parametrize(("content", "said"), [
    ({"schedules": [{"pass": "backward", "head_dim": 16, "schedule": "pointers"}]}, "expected one of 'fused', 'separate'"),
    ({"schedules": [{"pass": "both", "head_dim": 16, "schedule": "fused"}]}, "pass: expected one of 'forward', 'backward'"),
    ({"schedules": [{"pass": "backward", "head_dim": "16", "schedule": "fused"}]}, "head_dim"),
    ({"schedules": [{"pass": "backward", "head_dim": 2**40, "schedule": "fused"}]}, "head_dim"),
    ({"schedules": [{"pass": ["backward"], "head_dim": 16}]}, "expected schedules"), ({"schedules": [7]}, "expected schedules"),
    ({"schedules": None}, "expected schedules"), ({"schedules": 7}, "expected schedules"), ({"schedules": {}}, "schedules"),
    ({"split": {"keys": 0}}, "keys: expected one of 128, 256"), ({"split": {"keys": "256"}}, "keys: expected"),
    ({"split": {"keys": 256.0}}, "keys: expected"), ({"split": 256}, "expected a split"), ({"split": {}}, "expected a split")])
def test_a_file_is_not_trusted(use, content, said):
    use(**content)
    with pytest.raises(ValueError, match=said):
        backward_of()


def test_the_command_decides_keeps_and_does_not_ask_again(tmp_path, capsys):
    file = tmp_path / "card.json"
    asked = ["tune", "--part", "schedules", "splits", "--head-dim", "16", "--length", "64", "--out", str(file)]
    assert cli.main(asked) == 0
    content = json.loads(file.read_text())
    assert [(row["pass"], row["head_dim"]) for row in content["schedules"]] == [("forward", 16), ("backward", 16)]
    assert all(row["ms"] for row in content["schedules"])
    assert content["split"]["keys"] in tuned.SPLITS
    before = file.read_text()
    capsys.readouterr()
    assert cli.main(asked) == 0
    assert capsys.readouterr().out.count("--again searches anew") == 3
    assert file.read_text() == before


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
def test_shared_memory_has_two_kernels_first_on_a_card_of_sm_80(head_dim):
    """Until its own timing says otherwise; elsewhere one kernel comes first where there are tiles for it."""
    q = torch.empty(1, 2, 64, head_dim, dtype=torch.bfloat16, device="meta")
    inputs = functools.partial(quickest.Problem.of, q, q, q, others=quickest.NO_OTHERS)
    spec = quickest.AttentionSpec(0.1, deterministic=False)
    fits = inputs(spec=spec, arch="sm_80").fused_config() is not None
    assert schedules.of_backward(inputs(spec=spec, arch="sm_80")).name == "separate"
    asked = schedules.of_backward(inputs(spec=spec._replace(hopper="fused"), arch="sm_80")).name
    assert asked == ("fused" if fits else "separate")
    expected = "fused" if head_dim <= 64 else "separate"
    assert schedules.of_backward(inputs(spec=spec, arch="sm_90")).name == expected


def test_steps_are_performed_anew_each_time():
    """What is timed must do the work again: results that were overwritten are made once more."""
    backward = trial("backward")
    found, results = collect(next(iter(backward._steps(backward.large, "separate", {}))))
    quickest.performed(found)
    want = results.dq.clone()
    results.dq.zero_()
    quickest.performed(found)
    assert torch.equal(results.dq, want)
    assert torch.equal(finish(next(iter(backward._steps(backward.large, "separate", {})))).dq, want)
