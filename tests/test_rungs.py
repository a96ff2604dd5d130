"""The rungs of Hopper's forward that are Triton: the same answers with tiles loaded through descriptors, in one loop or two."""

import pytest
import torch
from support.features import FEATURES, Call, Shape
from support.guard import is_poison

from fused_attn import execution
from fused_attn.spec import TileConfig

TILES = {"descriptors": TileConfig(64, 32, 1, 1, descriptors=True),
         "specialized": TileConfig(64, 32, 1, 1, descriptors=True, specialize=True)}
ONE_LOOP = {"plain", "causal", "window", "scale", "softcap", "gqa", "lengths", "dims", "dims_192", "key_lengths", "sinks",
            "packed", "seqused", "nested", "lse"}
OTHER_KERNELS = {"additive", "precise"}


def climb(monkeypatch, rung):
    """Has every forward run on ``rung``, in the interpreter's tiles; returns how often it did."""
    times = []
    monkeypatch.setattr(execution.rungs, "rung", lambda *_: rung)
    monkeypatch.setattr(execution, "choose_rung", lambda *_: times.append(1) or TILES[rung])
    return times


@pytest.mark.kernels
@pytest.mark.parametrize(("rung", "name"), [
    (rung, feature.name) for rung in TILES for feature in FEATURES
    if feature.name not in OTHER_KERNELS and (rung == "descriptors" or feature.name in ONE_LOOP)])
def test_every_feature_has_the_same_answer(monkeypatch, rung, name):
    times = climb(monkeypatch, rung)
    inputs = Call((name,), Shape(n_queries=70, n_keys=93 if name == "lengths" else 70)).draw(torch.float64)
    got, want = inputs.run("triton"), inputs.run("reference")
    assert times
    for key, expected in want.items():
        assert not is_poison(got[key]).any(), key
        torch.testing.assert_close(got[key], expected, rtol=1e-11, atol=1e-12)
