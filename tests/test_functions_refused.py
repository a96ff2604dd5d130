"""Plain score and mask functions that cannot be compiled: each is refused by name, with the line that is to be another one."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton

from fused_attn import attention

pytestmark = pytest.mark.kernels

GAIN, SHORT, META = torch.ones(2, dtype=torch.float64), torch.ones(3), torch.ones(2, device="meta")


def qkv():
    return [torch.randn(2, 2, 20, 16, dtype=torch.float64) for _ in range(3)]


@triton.jit
def jitted(score, b, h, q_idx, kv_idx):
    return score


def changed_by(change):
    """A function that changes a tensor of its own in place."""
    own = torch.ones(2)
    return lambda s, b, h, q, k: (change(own), s * own[h])[1]


LINE = r".* \(.*test_functions_refused.py:\d+: .*\)$"  # where in the user's code, and what stands there
REFUSED = {
    "if": (lambda s, b, h, q, k: s if q > k else 2 * s, "score_mod: a branch, .*torch.where" + LINE),
    "and": (lambda s, b, h, q, k: torch.where((q > k) and (k > 3), s, 0), "score_mod: a branch, `and`" + LINE),
    "or": (lambda s, b, h, q, k: torch.where((q > k) or (k > 3), s, 0), "score_mod: a branch, `and`, `or`" + LINE),
    "not": (lambda s, b, h, q, k: torch.where(not (q > k), s, 0), "score_mod: .*`not`" + LINE),
    "chain": (lambda s, b, h, q, k: torch.where(0 < q < k, s, 0), "score_mod: .*chain of comparisons" + LINE),
    "max": (lambda s, *_: max(s, 0), "score_mod: .*min or max" + LINE),
    "min": (lambda s, *_: min(0, s), "score_mod: .*min or max" + LINE),
    "in": (lambda s, b, h, q, k: s * (q in (1, 2)), "score_mod: a branch" + LINE),
    "unindexed": (lambda s, *_: s + GAIN, r"score_mod: a captured tensor of shape \(2,\) is used as .* number" + LINE),
    "returned unindexed": (lambda *_: GAIN, r"score_mod: a captured tensor of shape \(2,\) .* \(in <lambda>\)"),
    "partly indexed": (lambda s, b, h, *_: s + torch.ones(2, 2)[h], "score_mod: only a part of the dimensions" + LINE),
    "slice": (lambda s, b, h, *_: s + torch.ones(2, 2)[:, h], "score_mod: a captured tensor is indexed by slice" + LINE),
    "too many indices": (lambda s, b, h, q, k: s + GAIN[h, q], "score_mod: 2 indices for a captured tensor of 1" + LINE),
    "no integer": (lambda s, *_: s + GAIN[s], "score_mod: .* what is no integer" + LINE),
    "unknown": (lambda s, *_: torch.lgamma(s), "score_mod: .*lgamma is not among the operations" + LINE),
    "unknown method": (lambda s, *_: s.lgamma(), "score_mod: 'lgamma' is not among the operations" + LINE),
    "shape": (lambda s, *_: s * s.shape[0], "score_mod: a score is a number here and has no 'shape'" + LINE),
    "len": (lambda s, *_: s * len(s), "score_mod: "), "divmod": (lambda s, b, h, q, k: s + divmod(q, 2)[0], "score_mod: "),
    "round": (lambda s, *_: round(s), "score_mod: "), "where of one": (lambda s, b, h, q, k: torch.where(q > k), "score_mod: "),
    "add of one": (lambda s, *_: torch.add(s), "score_mod: "), "matmul": (lambda s, *_: s @ GAIN, "score_mod: "),
    "minus a truth value": (lambda s, b, h, q, k: s - (q > k), "score_mod: "),
    "huge": (lambda s, b, h, q, k: s + q * 10**30, "score_mod: "),
    "negative power": (lambda s, b, h, q, k: s + (q + 1) ** -1, "score_mod: "),
    "integer / 0": (lambda s, b, h, q, k: s + q // 0, "score_mod: "),
    "condition": (lambda s, *_: torch.where(s, s, 0), "score_mod: torch.where expects a condition" + LINE),
    "rounding_mode": (lambda s, *_: torch.div(s, 2, rounding_mode="up"), "score_mod: "),
    "item": (lambda s, *_: s.item(), "score_mod: 'item' is not among" + LINE),
    "item of a tensor": (lambda s, *_: s * GAIN[0].item(), "score_mod: the value of a captured tensor is asked for" + LINE),
    "float": (lambda s, *_: s * float(GAIN[0]), "score_mod: the value of a captured tensor is asked for" + LINE),
    "math": (lambda s, *_: math.exp(s), "score_mod: the value of a number that differs .*math.exp" + LINE),
    "add_": (changed_by(lambda t: t.add_(1)), "score_mod: add_ changes a captured tensor in place" + LINE),
    "setitem": (changed_by(lambda t: t.__setitem__(0, 5.0)), "score_mod: __setitem__ changes a captured tensor" + LINE),
    "out=": (changed_by(lambda t: torch.add(t, 1, out=t)), "score_mod: "),
    "inplace=": (changed_by(lambda t: F.relu(t, inplace=True)), "score_mod: "),
    ".data": (changed_by(lambda t: setattr(t, "data", t * 2)), "score_mod: "),
    "in place": (lambda s, *_: s.add_(1), "score_mod: 'add_' is not among" + LINE),
    "None": (lambda *_: None, "score_mod: the function returns None"),
    "text": (lambda *_: "1", "score_mod: the function returns str, which is no number"),
    "complex": (lambda s, *_: s * 1j, "score_mod: computes with complex, which is neither a number nor a tensor" + LINE),
    "too few": (lambda s, b, h, q: s,
                r"score_mod: expected a function of \(score, b, h, q_idx, kv_idx\); got .*\(s, b, h, q\)"),
    "too many": (lambda s, b, h, q, k, x: s,
                 r"score_mod: expected a function of \(score, .*\); got one of \(s, b, h, q, k, x\)"),
    "jitted": (jitted, "score_mod: expected a fused_attn.ScoreMod"),
    "class": (dict, "score_mod: expected a fused_attn.ScoreMod"),
    "complex tensor": (lambda s, b, h, *_: s * torch.ones(2).cfloat()[h], "score_mod: .*expected a float tensor"),
    "short": (lambda s, b, h, q, k: s + SHORT[k], r"score_mod: a captured tensor of shape \(3,\) is indexed by kv_idx, .* 19"),
    "device": (lambda s, b, h, *_: s * META[h], "score_mod: expected captured tensors on q's device cpu; got one on meta"),
    "empty": (lambda s, b, h, *_: s * SHORT[:0][h % 2], "score_mod: .* has no elements"),
}
REFUSED_MASKS = {
    "integers": (lambda b, h, q, k: q - k, "mask_mod: a mask function returns truth values"),
    "numbers": (lambda b, h, q, k: q / 2, "mask_mod: a mask function returns truth values"),
    "None": (lambda *_: None, "mask_mod: the function returns None"), "True": (True, "mask_mod: expected a fused_attn.MaskMod"),
    "if": (lambda b, h, q, k: bool(q > k), "mask_mod: a branch" + LINE),
    "chain": (lambda b, h, q, k: 0 <= q - k < 5, "mask_mod: .*chain of comparisons" + LINE),
    "too many": (lambda s, b, h, q, k: q > k, r"mask_mod: expected a function of \(b, h, q_idx, kv_idx\)"),
    "short": (lambda b, h, q, k: SHORT[q] > 0, "mask_mod: a captured tensor .* q_idx"),
    "jitted": (jitted, "mask_mod: expected a fused_attn.MaskMod"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_score_functions(name):
    """By name, with the line of the user's that is to be another one; by every backend."""
    function, message = REFUSED[name]
    for backend in ("triton", "reference"):
        with pytest.raises((TypeError, ValueError, IndexError), match=message):
            attention(*qkv(), score_mod=function, backend=backend)


@pytest.mark.parametrize("name", REFUSED_MASKS)
def test_refused_mask_functions(name):
    function, message = REFUSED_MASKS[name]
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        attention(*qkv(), mask_mod=function)


def test_what_a_function_raises_itself_comes_out():
    with pytest.raises(KeyError, match="x"):
        attention(*qkv(), score_mod=lambda *_: {}["x"])
