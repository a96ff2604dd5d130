"""Scores of any size: masks made of large finite numbers, and rows that have nothing else, as good as in plain PyTorch.

Checked as the interpreter computes and as a compiler may (``support.contraction``), against the reference in fp32: where a
bias of -1e9 has taken all digits of a score, the oracle in fp64 still sees them, and plain fp32 PyTorch does not.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from support.contraction import contracted

import fused_attn
from fused_attn import attention, settings
from fused_attn.kernels.launch import counted

pytestmark = pytest.mark.kernels

LARGEST = torch.finfo(torch.float32).max
ARITHMETIC = {"as it is": contextlib.nullcontext, "contracted": contracted}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 5e-6}


def gradients(leaves, dout, backend, *, packed=False, **arguments):
    """out, lse and the gradients of all leaves: q, k, v, and arguments by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    named = {name: x for name, x in leaves.items() if name not in "qkv"}
    tensors = [leaves[name] for name in "qkv"]
    if packed:
        n_queries, n_keys = (x.shape[2] for x in tensors[:2])
        cu_q, cu_k = torch.tensor([[0, n_queries // 2, n_queries], [0, 9, n_keys]], dtype=torch.int32)
        rows = [x[0].transpose(0, 1) for x in tensors]
        longest = [int(cu.diff().max()) for cu in (cu_q, cu_k)]
        out, lse = fused_attn.attention_varlen(*rows, cu_q, cu_k, *longest, return_lse=True, backend=backend,
                                               **named, **arguments)
        out, lse = out.transpose(0, 1)[None], lse[None]
    else:
        out, lse = attention(*tensors, return_lse=True, backend=backend, **named, **arguments)
    found = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, found, strict=True))}


def check(leaves, dout, dtype, **arguments):
    got = gradients(leaves, dout, "triton", **arguments)
    want = gradients({name: x.float() for name, x in leaves.items()}, dout.float(), "reference", **arguments)
    for name, expected in want.items():
        error = (got[name].float() - expected).norm()
        # What is all but 0 in exact arithmetic, such as the gradient of a bias that all keys share, is judged by its terms.
        scale = max(expected.norm().item(), 1e-3 * dout.float().norm().item())
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error / scale:.1e}"


def draw(dtype, n_queries=20, n_keys=35, heads=2, kv_heads=2, dim=16):
    q, k, v = (torch.randn(1, h, n, dim).to(dtype) for h, n in ((heads, n_queries), (kv_heads, n_keys), (kv_heads, n_keys)))
    return {"q": q, "k": k, "v": v}, torch.randn(1, heads, n_queries, dim).to(dtype)


def rows_of(value, n_queries, n_keys, *rows):
    bias = torch.zeros(1, 1, n_queries, n_keys)
    bias[:, :, list(rows)] = value
    return bias


@pytest.mark.parametrize("arithmetic", [pytest.param("as it is", marks=pytest.mark.slow), "contracted"])
@pytest.mark.parametrize("value", [-1e6, -1e7, -1e9, -1e10, -3e38, -LARGEST, 1e9, 3e38], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow),
                                   pytest.param(torch.float32, marks=pytest.mark.slow)],
                         ids=lambda t: str(t).removeprefix("torch."))
def test_rows_whose_keys_all_carry_one_large_number(dtype, value, arithmetic):
    leaves, dout = draw(dtype)
    with ARITHMETIC[arithmetic]():
        check({**leaves, "bias": rows_of(value, 20, 35, 3, 4, 19)}, dout, dtype)


@pytest.mark.few(6)
@pytest.mark.parametrize("arithmetic", [pytest.param("as it is", marks=pytest.mark.slow), "contracted"])
@pytest.mark.parametrize(("shape", "arguments"), [
    ({"heads": 4, "kv_heads": 2}, {"causal": True}),
    ({"n_queries": 1, "n_keys": 1100}, {}),  # in splits of the keys
    ({"n_queries": 1, "n_keys": 1100}, {"sinks": torch.tensor([-1e9, 2.0])}),
    ({}, {"sinks": torch.tensor([-1e9, 2.0])}),
    ({}, {"packed": True}), ({}, {"window": (9, 3)}), ({}, {"softcap": 5.0}), ({}, {"precise": True}), ({}, {"scale": -0.5}),
], ids=["grouped", "splits", "splits and sinks", "sinks", "packed", "window", "softcap", "precise", "negative scale"])
def test_they_are_right_in_every_kernel(shape, arguments, arithmetic):
    leaves, dout = draw(torch.bfloat16, **shape)
    n_queries, n_keys = leaves["q"].shape[2], leaves["k"].shape[2]
    packed = arguments.get("packed", False)
    if packed:
        n_queries, n_keys = n_queries // 2, n_keys - 9
    if "sinks" in arguments:
        leaves["sinks"] = arguments["sinks"]
        arguments = {}
    with ARITHMETIC[arithmetic]():
        check({**leaves, "bias": rows_of(-1e9, n_queries, n_keys, 0, n_queries // 2)}, dout, torch.bfloat16, **arguments)


def test_shares_are_what_the_long_row_ran_in():
    leaves, _ = draw(torch.bfloat16, 1, 1100)
    with counted() as launches:
        attention(*leaves.values(), bias=rows_of(-1e9, 1, 1100, 0), backend="triton")
    assert launches["combine_kernel"] == 1


@pytest.mark.parametrize("value", [-1e9, -LARGEST], ids=str)
def test_relative_biases_and_slopes_of_such_size(value):
    leaves, dout = draw(torch.bfloat16)
    values = torch.full((2, 54), value)
    with contracted():
        got = gradients(leaves, dout, "triton", bias=fused_attn.RelativeBias(values))
        want = gradients({name: x.float() for name, x in leaves.items()}, dout.float(), "reference",
                         bias=fused_attn.RelativeBias(values))
        check({**leaves, "alibi_slopes": torch.tensor([3e7, 1e8])}, dout, torch.bfloat16)
    for name, expected in want.items():
        torch.testing.assert_close(got[name].float(), expected, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_weights_and_statistics_of_such_rows(arithmetic):
    leaves, _ = draw(torch.float32)
    arguments = {"bias": rows_of(-1e9, 20, 35, 3), "sinks": torch.tensor([-1e9, float("-inf")])}
    with ARITHMETIC[arithmetic]():
        p = fused_attn.attention_weights(leaves["q"], leaves["k"], backend="triton", **arguments)
        stats = fused_attn.attention_stats(leaves["q"], leaves["k"], backend="triton", **arguments)
    torch.testing.assert_close(p, fused_attn.attention_weights(leaves["q"], leaves["k"], backend="reference", **arguments))
    for found, want in zip(stats, fused_attn.attention_stats(leaves["q"], leaves["k"], backend="reference", **arguments),
                           strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -2.4e38, -1e9, float("-inf")], ids=str)
@pytest.mark.parametrize("rows", ["some", "all"])
def test_torchs_function_gives_torchs_answer_for_masks_of_numbers(monkeypatch, low, rows):
    """Masks as other code makes them: the smallest number there is where a pair must not attend."""
    monkeypatch.setattr(settings, "BACKEND", "triton")
    q, k, v = (torch.randn(2, 2, n, 16) for n in (9, 21, 21))
    mask = torch.zeros(2, 1, 9, 21).masked_fill(torch.rand(2, 1, 9, 21) < 0.5, low)
    if rows == "all":
        mask[:, :, 4] = low
    with contracted():
        ours = fused_attn.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("ratio", [0.0, 1e-3, 0.5, 3.0, 10.0, -10.0, 30.0, -30.0], ids=str)
def test_the_slope_of_a_softcap_keeps_its_digits(ratio, dtype):
    """One query, two keys: dS is known, so what comes back is the slope, 1 / cosh^2 of a score ``ratio`` caps away from 0."""
    q = torch.full((1, 1, 1, 1), 1.0, dtype=dtype, requires_grad=True)
    k = torch.tensor([[[[2.0 * ratio], [0.0]]]], dtype=dtype, requires_grad=True)
    v = torch.tensor([[[[1.0], [0.0]]]], dtype=dtype)
    out = attention(q, k, v, scale=1.0, softcap=2.0, backend="triton")
    (dk,) = torch.autograd.grad(out.sum(), k)
    p = torch.sigmoid(2 * torch.tanh(torch.tensor(ratio, dtype=torch.float64)))
    slope = 1 / torch.cosh(torch.tensor(ratio, dtype=torch.float64)) ** 2
    assert abs(dk[0, 0, 0, 0].double() / (p * (1 - p) * slope) - 1) < (2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("sum_of_both", [0.0, 0.3, 5.0, -8.0, 12.0], ids=str)
def test_the_slope_of_an_additive_score_keeps_its_digits(sum_of_both):
    q = torch.full((1, 1, 1, 1), sum_of_both, requires_grad=True)
    k = torch.tensor([[[[0.0], [-sum_of_both]]]])
    v = torch.tensor([[[[1.0], [0.0]]]])
    out = fused_attn.additive_attention(q, k, v, torch.ones(1), backend="triton")
    (dq,) = torch.autograd.grad(out.sum(), q)
    x = torch.tensor(sum_of_both, dtype=torch.float64)
    p = torch.sigmoid(torch.tanh(x))
    want = p * (1 - p) * (1 / torch.cosh(x) ** 2 - 1)  # the second key's slope is that of 0
    assert abs(dq.item() - want) < 2e-6 * max(1.0, abs(want.item()))
    alone = torch.tensor([[[[0.0], [-60.0 - sum_of_both]]]])  # whose second key is flat: the first one's slope shows
    (dq,) = torch.autograd.grad(fused_attn.additive_attention(q, alone, v, torch.ones(1), backend="triton").sum(), q)
    p = torch.sigmoid(torch.tanh(x) + 1)
    assert abs(dq.item() / (p * (1 - p) / torch.cosh(x) ** 2).item() - 1) < 2e-5


@pytest.mark.parametrize(("argument", "value"), [
    ("scale", 1e-46), ("scale", -1e-39), ("scale", 1e39), ("scale", -1e300), ("softcap", 1e39), ("softcap", 1e-39),
    ("softcap", 1e-46), ("softcap", 2.0**127),
])
@pytest.mark.parametrize("backend", ["triton", "reference", None])
def test_factors_that_fp32_cannot_hold_are_refused(argument, value, backend):
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=rf"{argument}: expected .*2\*\*-126 to 2\*\*126.*got {value!r}".replace("+", r"\+")):
        attention(q, q, q, backend=backend, **{argument: value})


@pytest.mark.parametrize("arguments", [
    {"scale": 2.0**-126}, {"scale": 2.0**-100, "causal": True}, {"scale": -(2.0**-126), "window": (3, 3)},
    {"softcap": 2.0**126}, {"softcap": 2.0**-126, "causal": True}, {"softcap": 1e30, "key_lengths": torch.tensor([5])},
], ids=str)
def test_the_narrowest_and_widest_factors_are_exact(arguments):
    leaves, dout = draw(torch.float32, 12, 12)
    with contracted():
        got = gradients(leaves, dout, "triton", **arguments)
    want = gradients(leaves, dout, "reference", **arguments)
    for name in ("out", "lse", "v"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)
    assert all(x.isfinite().all() for x in got.values())


# --- what is not there must not be summed: mods of one's own that give anything for the zeros past an end ---


@triton.jit
def root(score, q_pos, k_idx, head, batch, args):
    return tl.sqrt(score - 1.0)  # NaN for the score 0 that padding has


@triton.jit
def root_slope(score, modded, q_pos, k_idx, head, batch, args):
    return 0.5 / modded


ROOT = fused_attn.ScoreMod("root", root, root_slope, (), reference=lambda s, q, k, h, b, args: (s - 1).sqrt())


@pytest.mark.parametrize("additive", [False, True], ids=["inner", "additive"])
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"mask": True}], ids=str)
def test_a_mod_that_padding_makes_nan_leaves_no_trace(additive, arguments):
    leaves = {"q": torch.rand(1, 2, 37, 16) + 1, "k": torch.rand(1, 2, 43, 16) + 1, "v": torch.randn(1, 2, 43, 16)}
    if additive:
        leaves["score_weight"] = torch.rand(2, 16) + 1
    if "mask" in arguments:
        arguments = {"mask": torch.rand(37, 43) < 0.7}
    dout = torch.randn(1, 2, 37, 16)
    got = gradients(leaves, dout, "triton", score_mod=ROOT(), scale=1.0, **arguments)
    want = gradients(leaves, dout, "reference", score_mod=ROOT(), scale=1.0, **arguments)
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-4, msg=name)


SINKS = {torch.float32: (1e30, 2.3e38, 3e38, LARGEST, -LARGEST), torch.float64: (1e300, 1.7e308, -1.7e308)}


@pytest.mark.few(7)
@pytest.mark.parametrize(("dtype", "value"), [(dtype, value) for dtype, values in SINKS.items() for value in values], ids=str)
@pytest.mark.parametrize("shape", [{}, {"n_queries": 1, "n_keys": 1100}, {"causal": True, "precise": True}, {"bias": True}],
                         ids=["plain", "splits", "precise", "bias"])
def test_sinks_of_any_size(dtype, value, shape):
    """One that takes everything, or nothing, beside one of a common size."""
    sizes = {name: size for name, size in shape.items() if name.startswith("n_")}
    leaves, dout = draw(dtype, **sizes)
    arguments = {name: x for name, x in shape.items() if name in ("causal", "precise")}
    if "bias" in shape:
        leaves["bias"] = torch.randn(20, 35, dtype=dtype)
    leaves["sinks"] = torch.tensor([value, 1.5], dtype=dtype)
    got, want = (gradients(leaves, dout, backend, **arguments) for backend in ("triton", "reference"))
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    stats = (fused_attn.attention_stats(leaves["q"], leaves["k"], sinks=leaves["sinks"], backend=backend)
             for backend in ("triton", "reference"))
    for found, expected in zip(*stats, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
