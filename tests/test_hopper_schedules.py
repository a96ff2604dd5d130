"""Hopper's schedules that are Triton: the same answers with tiles loaded through descriptors, in one loop or two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.features import FEATURES, Call, Shape
from support.guard import is_poison

import fused_attn
from fused_attn import attention, settings
from fused_attn.call.spec import TileConfig
from fused_attn.plan import problem, proven, schedules
from fused_attn.targets import triton_name

ROOT = Path(__file__).parents[1]
TILES = {"descriptors": TileConfig(64, 32, 1, 1, descriptors=True),
         "specialized": TileConfig(64, 32, 1, 1, descriptors=True, specialize=True)}
ONE_LOOP = {"plain", "causal", "window", "scale", "softcap", "gqa", "lengths", "dims", "dims_192", "key_lengths", "sinks",
            "packed", "seqused", "nested", "lse"}
OTHER_KERNELS = {"additive", "precise"}


def climb(monkeypatch, hopper):
    """Has every forward run on ``hopper``, in the interpreter's tiles; returns how often it did."""
    times = []
    alone = schedules.named(schedules.FORWARD, hopper)._replace(against=lambda _: (), asked=False)
    monkeypatch.setattr(schedules, "FORWARD", (alone,))
    monkeypatch.setattr(problem, "choose_hopper", lambda *_: times.append(1) or TILES[hopper])
    return times


@pytest.mark.few(5)
@pytest.mark.kernels
@pytest.mark.parametrize(("hopper", "name"), [
    (hopper, feature.name) for hopper in TILES for feature in FEATURES
    if feature.name not in OTHER_KERNELS and (hopper == "descriptors" or feature.name in ONE_LOOP)])
def test_every_feature_has_the_same_answer(monkeypatch, hopper, name):
    times = climb(monkeypatch, hopper)
    inputs = Call((name,), Shape(n_queries=70, n_keys=93 if name == "lengths" else 70)).draw(torch.float64)
    got, want = inputs.run("triton"), inputs.run("reference")
    assert times
    for key, expected in want.items():
        assert not is_poison(got[key]).any(), key
        torch.testing.assert_close(got[key], expected, rtol=1e-11, atol=1e-12)


@pytest.fixture
def card(monkeypatch):
    """A machine whose tensors lie on a Hopper."""
    monkeypatch.setattr(problem, "arch_of", lambda device: "sm_90")


def halves(dim=64, length=96, heads=2, dtype=torch.bfloat16):
    return [torch.randn(1, heads, length, dim).to(dtype) for _ in range(3)]


# (schedule, forward is its, backward is its, head dim, arguments of the call)
TAKEN = [
    ("gluon", True, True, 64, {"deterministic": False}),
    ("gluon", True, True, 128, {"deterministic": False, "causal": True, "window": (9, None), "sinks": torch.zeros(2)}),
    ("gluon", True, False, 64, {}),
    ("gluon", True, False, 256, {"deterministic": False}),
    ("gluon", True, False, 64, {"deterministic": False, "softcap": 3.0}),
    ("gluon", False, False, 20, {"deterministic": False}),
    ("gluon", False, False, 64, {"deterministic": False, "scale": -1.0}),
    ("gluon", False, False, 64, {"deterministic": False, "dropout_p": 0.5}),
    ("gluon", False, False, 64, {"deterministic": False, "precise": True}),
    ("gluon", False, False, 64, {"deterministic": False, "mask": torch.ones(96, 96, dtype=torch.bool)}),
    ("gluon", False, False, 64, {"deterministic": False, "alibi_slopes": torch.ones(2)}),
    ("gluon", False, False, 64, {"deterministic": False, "key_lengths": torch.tensor([7])}),
    ("specialized", False, False, 64, {"alibi_slopes": torch.ones(2)}),
    ("descriptors", True, False, 64, {"alibi_slopes": torch.ones(2)}),
    ("descriptors", False, False, 64, {"dropout_p": 0.5}),
]


@pytest.mark.parametrize(("hopper", "forward", "backward", "dim", "arguments"), TAKEN)
def test_explain_names_the_kernels_of_a_pass(card, hopper, forward, backward, dim, arguments):
    with fused_attn.hopper(hopper):
        told = fused_attn.explain(*halves(dim), backend="triton", **arguments)
    assert told.asked == hopper
    assert {which: not reasons for which, reasons in told.against_asked.items()} == {"forward": forward, "backward": backward}
    assert f"forward: {hopper}" in str(told).splitlines() or not forward
    assert forward or f"forward: pointers; {hopper}: " in str(told)


def test_a_schedule_that_gave_wrong_rows_stays_out_until_its_code_has_been_emulated(card, monkeypatch):
    monkeypatch.setattr(proven, "PROVEN_ON", ())
    with fused_attn.hopper("specialized"):
        told = fused_attn.explain(*halves(), causal=True, backend="triton")
        (reason,) = told.against_asked["forward"]
        assert reason == f"what Triton {triton_name()} compiles of it has not been emulated and found right"
        assert f"forward: pointers; specialized: {reason}" in str(told)
        assert attention(*halves(), backend="triton").isfinite().all()
        assert "specialized" not in proven.offered()
        monkeypatch.setattr(proven, "PROVEN_ON", (proven.triton_version(),))
        assert fused_attn.explain(*halves(256), causal=True, softcap=3.0, backend="triton").against_asked["forward"] == ()
        assert proven.offered() == ("gluon", "specialized", "descriptors")


@pytest.mark.parametrize("tensors", [
    [x[..., 1:] for x in halves(65)],  # rows that do not begin at a multiple of 16 bytes
    [x.mT.contiguous().mT for x in halves()],
    [x[:, :1].expand(1, 2, 96, 64) for x in halves()],
    halves(dtype=torch.float32),
    [*halves()[:2], halves(128)[2]],  # tiles of different widths
], ids=["unaligned", "columns", "expanded", "fp32", "values"])
def test_tensors_that_boxes_cannot_hold_stay_with_pointers(card, tensors):
    with fused_attn.hopper("gluon"):
        told = fused_attn.explain(*tensors, backend="triton")
    assert told.against_asked["forward"]


def test_pointers_are_the_default_and_another_card_keeps_them():
    tensors = halves()
    assert fused_attn.explain(*tensors, backend="triton").against_asked == {}
    with fused_attn.hopper("gluon"):
        told = fused_attn.explain(*tensors, backend="triton")
        assert told.against_asked["forward"] == ("the card is no Hopper",)
        assert attention(*tensors, backend="triton").isfinite().all()
    assert settings.hopper_schedule() == "auto"


def test_an_unknown_schedule_is_an_error():
    expected = "kernels: expected one of auto, pointers, descriptors, specialized, gluon; got 'cuda'"
    with pytest.raises(ValueError, match=expected), fused_attn.hopper("cuda"):
        pass


def test_the_environment_chooses_a_schedule():
    command = [sys.executable, "-c", "import fused_attn.settings as s; print(s.hopper_schedule())"]
    for value, expected in (("gluon", "gluon"), ("", "auto"), ("pointers", "pointers")):
        done = subprocess.run(command, env={**os.environ, "FUSED_ATTN_HOPPER": value}, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == expected, done.stderr
    done = subprocess.run(command, env={**os.environ, "FUSED_ATTN_HOPPER": "cuda"}, capture_output=True, text=True, cwd=ROOT)
    assert "FUSED_ATTN_HOPPER: expected one of auto, pointers" in done.stderr


def test_a_call_on_another_schedule_is_not_repeated_from_this_one(monkeypatch):
    """What a plain call leaves behind is for calls on its own schedule."""
    tensors = halves()
    attention(*tensors, backend="triton")
    times = climb(monkeypatch, "descriptors")
    with fused_attn.hopper("descriptors"):
        attention(*tensors, backend="triton")
    assert times


@pytest.mark.parametrize("hopper", list(TILES))
def test_a_kept_call_is_not_made_again_with_tensors_that_boxes_cannot_hold(card, monkeypatch, hopper):
    """Shapes and strides agree; the second address is no multiple of 16 bytes."""
    monkeypatch.setattr(problem, "choose_hopper", lambda *_: TILES[hopper])
    with fused_attn.hopper(hopper):
        for first in (0, 0, 0, 1, 1, 1):  # the third time from a plan
            tensors = [torch.randn(1281).bfloat16()[first : first + 1280].view(1, 2, 40, 16) for _ in range(3)]
            assert tensors[0].data_ptr() % 16 == 2 * first, "else the allocator has changed"
            out = attention(*tensors, backend="triton")
            want = attention(*(x.double() for x in tensors), backend="reference")
            torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)


def test_decoding_is_told_as_what_it_is(card):
    with fused_attn.hopper("gluon"):
        tensors = torch.randn(1, 2, 1, 64).bfloat16(), *halves(length=8192)[1:]
        told = fused_attn.explain(*tensors, backend="triton")
        near = fused_attn.explain(*tensors, window=(100, 0), backend="triton")
    assert told.against_asked["forward"] == ("splits comes first",)
    assert near.against_asked["forward"] == ()


@pytest.mark.parametrize("hopper", ["specialized", "gluon"])
@pytest.mark.parametrize("version", [(3, 5), (3, 99), (4, 0)])
def test_a_compiler_that_nobody_has_tried_keeps_to_pointers(card, monkeypatch, hopper, version):
    monkeypatch.setattr(proven, "triton_version", lambda: version)
    monkeypatch.setattr(proven, "PROVEN_ON", (version,))
    with fused_attn.hopper(hopper):
        told = fused_attn.explain(*halves(), backend="triton")
        assert told.against_asked["forward"] == (f"it has not been compiled on Triton {version[0]}.{version[1]}",)
        assert attention(*halves(), backend="triton").isfinite().all()
    with fused_attn.hopper("descriptors"):
        assert fused_attn.explain(*halves(), backend="triton").against_asked["forward"] == ()


def tried(triton, specialized=True, gluon=True):
    return {"triton": triton, "torch": "2.13.0", "compiled": {"specialized": specialized, "gluon": gluon}}


def test_a_triton_runs_the_young_schedules_if_they_compiled_wherever_they_were_tried():
    rows = [tried("3.10.2"), tried("3.9.0"), tried("3.6.0", gluon=False), tried("3.7.1"), tried("3.7.0", specialized=False),
            tried("3.8.0+git12ab")]
    assert proven.passed_on(rows, "compiled", proven.YOUNG) == ((3, 8), (3, 9), (3, 10))
    assert proven.passed_on([], "compiled", proven.YOUNG) == ()


def test_a_trial_that_a_row_does_not_tell_of_was_not_passed():
    rows = [tried("3.7.1"), {**tried("3.8.0"), "emulated": {"specialized": True, "gluon": False}},
            {**tried("3.9.0"), "emulated": {"specialized": False, "gluon": True}}]
    assert proven.passed_on(rows, "emulated", ("specialized",)) == ((3, 8),)
    assert proven.passed_on(rows, "emulated", proven.YOUNG) == ()
