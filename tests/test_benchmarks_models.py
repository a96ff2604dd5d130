"""Whole models in the benchmarks: one set of weights, three kinds of attention, wrong ones refused, FLOPs as torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from fused_attn.tools.bench.contest import Contest

GPT, LLAMA = models.configs("cpu", smoke=True)
BOTH = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])


@BOTH
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_and_generation_agree(config, dtype):
    config = replace(config, dtype=dtype)
    for subject in (models.training(config, "cpu"), models.generation(config, "cpu", 3)):
        for row in Contest(subject, "cpu", 2).rows():
            assert row["ok"], row
            assert row["peers"].keys() == {"sdpa", "eager"}
            for facts in (row, *row["peers"].values()):
                assert facts["ms"] > 0
                assert facts["tokens_per_s"] > 0
                assert ("step_ms" in facts) is (row["pass"] == "backward")


@BOTH
def test_rotations_and_grouping_are_those_of_the_layers(config):
    """What a wrong angle, a wrong group or a forgotten position would change."""
    model, tokens = models._made(config, "cpu")
    ours, plain = (model.by(how).double()(tokens) for how in ("ours", "eager"))
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@BOTH
def test_generation_is_the_whole_forward(config):
    model, tokens = models._made(config, "cpu")
    whole = model.by("eager")(tokens)[:, -3:]
    for make in models.generation(config, "cpu", 3).peers.values():
        torch.testing.assert_close(make().call(), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spoil", ["peer", "ours"])
def test_a_wrong_model_is_refused(monkeypatch, spoil):
    honest = models.Model.by

    def by(self, how):
        model = honest(self, how)
        if how == ("sdpa" if spoil == "peer" else "ours"):
            torch.nn.init.normal_(model.blocks[0].norm1.weight, 1.0, 1e-3)
        return model

    monkeypatch.setattr(models.Model, "by", by)
    for row in Contest(models.training(GPT, "cpu"), "cpu", 2).rows():
        if spoil == "peer":
            assert "differs" in row["peers"]["sdpa"]["error"]
            assert row["best_peer"] == "eager"
        else:
            assert row["ok"] is False
            assert "ms" not in row


@BOTH
def test_flops_are_torchs_count(config):
    subject = models.training(config, "cpu")
    entry = subject.peers["eager"]()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        entry.call()
    full = 2 * 2 * config.layers * config.batch * config.length**2 * config.width  # what is masked away is computed too
    kept = full * (config.length + 1) // (2 * config.length)
    assert subject.flops("forward") == counter.get_total_flops() - full + kept


def test_bytes_of_generation_by_hand():
    subject = models.generation(LLAMA, "cpu", 2)
    weights = sum(x.numel() for x in models._made(LLAMA, "cpu")[0].parameters())
    keys = (LLAMA.length - 1) + LLAMA.length
    assert subject.bytes("forward") == 4 * (2 * weights + 2 * keys * LLAMA.width // LLAMA.heads)
