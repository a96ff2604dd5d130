"""What is measured beside plain attention: packed documents, features with what others do for them, rotations, caches."""

import statistics
from pydoc_data.topics import topics

import pytest
import torch

import fused_attn
from benchmarks import alternatives, features, packed, steps
from fused_attn.tools.bench import contest, peers
from fused_attn.tools.bench.contest import Contest

SHAPE = features.Shape(2, 4, 2, 24, 16, 16, "fp32")


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention as it is without compilation, its refusal of gradients on a CPU put aside."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(alternatives, "compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(peers, "compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(peers, "FLEX_DEVICES", ("cpu",))


def test_lengths_are_those_of_documents():
    drawn = packed.lengths(16384)
    assert sum(drawn) == 16384
    assert drawn == packed.lengths(16384)
    assert drawn != packed.lengths(16384, seed=1)
    assert set(drawn[:-1]) <= {len(text.split()) for text in topics.values()}
    assert max(drawn) > 10 * statistics.median(drawn), "as uneven as documents are"
    assert sum(packed.lengths(40, scale=0.02)) == 40


@pytest.mark.parametrize("causal", [True, False])
def test_packed_peers_agree(causal):
    documents = [7, 1, 19, 4]
    for row in Contest(packed.subject(documents, 4, 4, 16, "fp32", causal, "cpu"), "cpu", 2).rows():
        assert row["ok"], row
        assert row["best_peer"] in ("sdpa padded", "sdpa nested")
        assert "ms" in row["peers"]["sdpa padded"], row["peers"]
        nested = row["peers"]["sdpa nested"]  # causal ones have no kernel on a CPU
        assert "ms" in nested or (causal and "No viable backend" in nested["error"]), nested
        kept = sum(n * (n + 1) // 2 if causal else n * n for n in documents)
        assert row["flops"] == kept * 4 * 4 * 16 * (1 if row["pass"] == "forward" else 2.5)
        assert row["bytes"] == 4 * (4 if row["pass"] == "forward" else 8) * 31 * 4 * 16
        assert row["padding"] == round(1 - 31 / 76, 3)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_flex_agrees(causal, flex):
    subject = packed.subject([7, 1, 19, 5], 4, 2, 16, "fp32", causal, "cpu")
    assert subject.gate("flex", subject.peers["flex"]().results(True))[1] is None
    assert "grouped heads" in subject.peers["sdpa nested"]


@pytest.mark.kernels
@pytest.mark.parametrize("name", alternatives.ALTERNATIVES)
def test_alternatives_compute_the_feature(name, flex):
    """torch's tensors and functions, forward and backward, against the reference in fp64."""
    feature = next(feature for feature in features.FEATURES if feature.name == name)
    call = features.Call(feature, SHAPE, "cpu")
    exact = call.results(True, "reference")
    tensors = call.tensors | {"n": torch.tensor(SHAPE.length)}
    made = {"flex": alternatives.flex, **({"sdpa": alternatives.sdpa} if "sdpa" in alternatives.peers(name, "cpu") else {})}
    for peer, make in made.items():
        leaves = call.leaves(False)
        out = make(alternatives.ALTERNATIVES[name], tensors, feature.causal, "cpu", True)(leaves)
        results = {"out": out, **dict(zip((f"d{leaf}" for leaf in leaves),
                                          torch.autograd.grad(out, list(leaves.values()), call.dout), strict=True))}
        for key, x in results.items():
            error = contest.difference(x, exact[key])
            assert error < 1e-5, f"{peer} {key}"


def test_every_feature_that_torch_can_has_a_peer():
    assert set(alternatives.ALTERNATIVES) <= {feature.name for feature in features.FEATURES}
    assert alternatives.peers("sinks", "cuda") == {}
    assert set(alternatives.peers("alibi", "cuda")) == {"sdpa", "flex"}
    assert set(alternatives.peers("softcap", "cuda")) == {"flex"}
    assert set(alternatives.peers("alibi", "cpu")) == {"sdpa"}


@pytest.mark.kernels
def test_a_wrong_feature_is_refused(monkeypatch):
    feature = next(feature for feature in features.FEATURES if feature.name == "bias")
    wrong = alternatives.Alternative(lambda t: t["bias"] * 1.2)
    monkeypatch.setitem(alternatives.ALTERNATIVES, "bias", wrong)
    for row in Contest(features.subject(feature, SHAPE, "cpu"), "cpu", 1).rows():
        assert row["ok"], row
        assert "differs" in row["peers"]["sdpa"]["error"]
        assert row["times_plain"] > 0
    monkeypatch.setattr(features, "check", lambda *rest: {"differ": [], "results": {"dbias": {"relative": 0.1}}})
    for row in Contest(features.subject(feature, SHAPE, "cpu"), "cpu", 1).rows():
        assert "dbias" in row["error"]
        assert row["ok"] is False


@pytest.mark.kernels
@pytest.mark.parametrize("name", steps.subjects("cpu", smoke=True))
def test_rotations_and_caches(name):
    subject = steps.subjects("cpu", smoke=True)[name]()
    for row in Contest(subject, "cpu", 2).rows():
        assert row["ok"], row
        assert row["default"] is False
        assert all("ms" in facts for facts in row["peers"].values()), row["peers"]
        assert row["ratio_to_best_peer"] > 0


@pytest.mark.kernels
@pytest.mark.parametrize("name", steps.subjects("cpu", smoke=True))
def test_wrong_steps_are_refused(name, monkeypatch):
    honest = fused_attn.nn.KVCache.attend
    monkeypatch.setattr(fused_attn.nn.KVCache, "attend", lambda self, q, **more: honest(self, q.flip(1), **more))
    turn = fused_attn.nn.RotaryEmbedding.forward
    monkeypatch.setattr(fused_attn.nn.RotaryEmbedding, "forward", lambda self, q, k, at=None: (*turn(self, q, k, 1)[:1], k))
    for row in Contest(steps.subjects("cpu", smoke=True)[name](), "cpu", 1).rows():
        assert row["ok"] is False
        assert "differs" in row["error"]
