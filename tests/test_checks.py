"""``check_mod`` passes what fits, and names what does not: the function, its slope, the slope of an argument."""

import pytest
import torch
import triton
import triton.language as tl
from support.mods import COMB, NEAR, near, near_slope, near_weight

import fused_attn
from fused_attn import MaskMod, ScoreMod, check_mod
from fused_attn.call import mods

pytestmark = pytest.mark.kernels

WEIGHT = torch.rand(2, 1, 56)
REFERENCE = NEAR.reference


@triton.jit
def wrong(score, q_pos, k_idx, head, batch, args):
    return args[1] * score + args[0] / (2.0 + tl.abs(q_pos - k_idx).to(score.dtype))


@triton.jit
def wrong_slope(score, modded, q_pos, k_idx, head, batch, args):
    return score * 0 + args[1] * 1.001


@triton.jit
def wrong_weight(score, modded, q_pos, k_idx, head, batch, args):
    return 1.0 / (1.0 + tl.abs(q_pos - k_idx + 1).to(score.dtype))


@triton.jit
def never_last(q_pos, k_idx, head, batch, args):
    return k_idx < args[0]


def test_what_fits_passes():
    check_mod(NEAR, WEIGHT, 0.75)
    check_mod(NEAR(WEIGHT, 0.75))
    check_mod(COMB, torch.ones(56, dtype=torch.int32), 3)
    check_mod(fused_attn.kerple(torch.rand(2), torch.rand(2)))
    check_mod(mods.BIAS(torch.randn(2, 40, 56)))
    check_mod(ScoreMod("forward_only", near, None, (near_weight,), REFERENCE)(WEIGHT, 0.5))


@pytest.mark.parametrize(("mod", "message"), [
    (ScoreMod("near", wrong, near_slope, (near_weight, None), REFERENCE), "near: its function does not fit its reference"),
    (ScoreMod("near", near, wrong_slope, (near_weight, None), REFERENCE), "near: its slope does not fit"),
    (ScoreMod("near", near, 1.0, (near_weight, None), REFERENCE), "near: its slope does not fit"),
    (ScoreMod("near", near, near_slope, (wrong_weight, None), REFERENCE), "near: its slope of argument 0 does not fit"),
], ids=["function", "slope", "one for a slope", "slope of an argument"])
def test_what_does_not_fit_is_named(mod, message):
    with pytest.raises(ValueError, match=message):
        check_mod(mod, WEIGHT, 0.75)


def test_a_mask_that_is_not_its_reference():
    check_mod(MaskMod("all_but", never_last, lambda q, k, h, b, args: k < args[0]), 50)
    with pytest.raises(ValueError, match="all_but: its function does not fit"):
        check_mod(MaskMod("all_but", never_last, lambda q, k, h, b, args: k <= args[0]), 50)


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match="near: expected a jit function and a plain PyTorch reference"):
        check_mod(ScoreMod("near", near, near_slope), WEIGHT, 0.75)
    with pytest.raises(ValueError, match="near: expected a jit function and a plain PyTorch reference"):
        check_mod(ScoreMod("near", reference=REFERENCE), WEIGHT, 0.75)
    with pytest.raises(TypeError, match="mod: expected a ScoreMod or MaskMod"):
        check_mod(lambda score, b, h, q_idx, kv_idx: score)
