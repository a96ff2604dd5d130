"""Plain score and mask functions: their values and gradients, against torch.vmap of the functions themselves."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import fused_attn
from fused_attn import attention, attention_varlen

pytestmark = pytest.mark.kernels

B, H, NQ, NK, D = 2, 2, 33, 37, 16
BACKENDS = "reference", "blocked", "triton"


def drawn(*shape, seed=1, grad=True):
    """Numbers from 0 to 1, the same at each import."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def labels(n, most=5):
    return torch.randint(0, most, (n,), generator=torch.Generator().manual_seed(n))


def qkv(n_queries=NQ, n_keys=NK, heads=H, kv_heads=H, dtype=torch.float64):
    return [torch.randn(B, h, n, D, dtype=dtype) for h, n in ((heads, n_queries), (kv_heads, n_keys), (kv_heads, n_keys))]


def pairs(function, extents, score=None, given=(), first=0):
    """``function`` of every b, h, q_idx, kv_idx, and of every score, by nested vmaps; batch entries count from ``first``."""
    scores = () if score is None else (score,)
    for level in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=(0,) * len(scores) + level + (None,) * len(given))
    indices = [torch.arange(n) + first * (i == 0) for i, n in enumerate(extents)]
    with TransformGetItemToIndex():
        return function(*scores, *indices, *given)


def truth(q, k, v, score_mod=None, mask_mod=None, mod_args=(), keep=None, bias=None, softcap=None, first=0):
    """Attention with what the functions give."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    extents = scores.shape
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    for function in score_mod if isinstance(score_mod, list) else [score_mod] * (score_mod is not None):
        scores = pairs(function, extents, scores, mod_args, first).to(scores.dtype)
    scores = scores + (0.0 if bias is None else bias)
    keep = torch.ones(extents, dtype=torch.bool) if keep is None else keep.expand(extents)
    for function in mask_mod if isinstance(mask_mod, list) else [mask_mod] * (mask_mod is not None):
        keep = keep & pairs(function, extents, None, mod_args, first)
    p = torch.softmax(scores.masked_fill(~keep, float("-inf")), -1)
    return torch.where((~keep).all(-1, keepdim=True), 0.0, p) @ v


def gradients(out, leaves):
    """Those of a loss that weighs every element by another number."""
    dout = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def check(*others, tensors=None, tolerance=1e-10, want=truth, told=None, deterministic=None, **arguments):
    """Compares out and all gradients of each backend with the truth; ``told``: what the truth is told in other words."""
    leaves = [x.requires_grad_() for x in tensors or qkv()]
    exact = want(*(x.double() for x in leaves), **(told or arguments))
    exact = [exact, *gradients(exact, [*leaves, *others])]
    for backend in BACKENDS:
        out = attention(*leaves, backend=backend, deterministic=deterministic, **arguments)
        for i, (x, y) in enumerate(zip([out, *gradients(out, [*leaves, *others])], exact, strict=True)):
            torch.testing.assert_close(x, y.to(x.dtype), rtol=tolerance, atol=tolerance,
                                       msg=lambda text, i=i, backend=backend: f"{backend}, result {i}: {text}")


# --- operations ---

ZERO, ONE, TWO = (torch.full((NK,), x, dtype=torch.float64, requires_grad=True) for x in (0.0, 1.0, 1.0))
NEGATIVE = (-0.5 - drawn(NK, grad=False)).requires_grad_()
BY_KEY, BY_QUERY, BY_HEAD, LONG = drawn(NK), drawn(NQ), drawn(H), drawn(99)

OF_SCORES = {
    "arithmetic": lambda s, b, h, q, k: 2 * s - (1 - s) / (s.abs() + 1.5) + 3 / (s * s + 1) - (-s) + (+s) * b - h,
    "named": lambda s, b, h, q, k: torch.add(s, 1).sub(h).mul(2.0).div(3) + torch.true_divide(s, 7) + torch.rsub(s, 1) * 0.1,
    "square": lambda s, b, h, q, k: s.square() - s**2 + s**3 * 0.1 + torch.pow(s, 4) * 0.01 + pow(s, 1),
    "reciprocal": lambda s, b, h, q, k: (s.abs() + 1).reciprocal() + (s.abs() + 1) ** -1.5 + (s.abs() + 0.1) ** 0.3,
    "whole powers of either sign": lambda s, b, h, q, k: s ** (q % 3) * 0.1 + (s - 9) ** (k % 4) * 0.001,
    "exponential": lambda s, b, h, q, k: s.exp() * 0.1 + s.exp2() * 0.1 + torch.expm1(s) * 0.1,
    "logarithm": lambda s, b, h, q, k: (s.abs() + 1).log() + torch.log2(s.abs() + 0.5) + s.abs().log1p(),
    "tiny": lambda s, b, h, q, k: (s * 1e-12).log1p() * 1e12 + torch.expm1(s * 1e-12) * 1e12,
    "roots": lambda s, b, h, q, k: (s.abs() + 1e-3).sqrt() + torch.rsqrt(s.abs() + 1),
    "periodic": lambda s, b, h, q, k: s.sin() + torch.cos(s),
    "saturating": lambda s, b, h, q, k: 2.0 * (s / 2.0).tanh() + s.sigmoid() + torch.special.expit(-s) + s.erf(),
    "activations": lambda s, b, h, q, k: F.softplus(s) + F.silu(s) - F.gelu(s) + F.relu(s - 0.3),
    "rounded": lambda s, b, h, q, k: s * 2 + s.round() * 0.1 + s.floor() * 0.2 + s.ceil() * 0.3 + s.trunc() * 0.4 + s.fix(),
    "halves": lambda s, b, h, q, k: s + (q / 2).round() * 0.1 + (k / 2 - 5).round() * 0.2,
    "absolute": lambda s, b, h, q, k: s.abs() * 0.1 + abs(s - 1),
    "sign": lambda s, b, h, q, k: s + s.sign() * 0.1 + torch.sgn(s - 1) / 3,
    "sign in a function": lambda s, b, h, q, k: 2 * s + s.sign().exp() + s.sign() ** 2,
    "clamp": lambda s, b, h, q, k: s.clamp(-0.3, 0.1) + s.clip(max=0.7) + torch.clamp(s, min=0.2) + s.clamp_min(0.1),
    "clamp integers": lambda s, b, h, q, k: s + (q - k).clamp(-2.5, 2.5) * 0.3 + (q - k).clamp(-3, 4) * 0.1,
    "where": lambda s, b, h, q, k: torch.where(q >= k, s, 0.1) + torch.where(k > 3, 0.5, 2) * s,
    "where by score": lambda s, b, h, q, k: s + torch.where(s > 0, 1.0, 2.0),
    "compared scores": lambda s, b, h, q, k: s + (s > 0) * 0.5,
    "where integers": lambda s, b, h, q, k: s + torch.where(q >= k, 1, 0) * 0.5,
    "minus infinity": lambda s, b, h, q, k: torch.where(q + 4 >= k, s, -float("inf")),
    "infinite branch": lambda s, b, h, q, k: s + torch.where(k > 0, k.to(s.dtype).log(), 0.5) - (k > 40) * 1.0,
    "isinf": lambda s, b, h, q, k: torch.where(((s / 0.0).isinf()) & ~torch.isnan(s), s, s * 2),
    "modulo": lambda s, b, h, q, k: s % 0.7 + (s % -0.7) * 0.5 + torch.remainder(s, 0.3),
    "floor division": lambda s, b, h, q, k: 2 * s + torch.div(s, 0.7, rounding_mode="floor") * 0.1,
    "added floor division": lambda s, b, h, q, k: s + torch.div(s, 0.7, rounding_mode="floor") * 0.1,
    "division towards 0": lambda s, b, h, q, k: 2 * s + torch.div(s, -0.7, rounding_mode="trunc") * 0.1,
    "truth values": lambda s, b, h, q, k: s * (q >= k) + ((q >= k) + (k > 3)) * 0.2 + (q >= k) * 5 + ((q > k) ^ (k > 9)) * 0.5,
    "half of a truth value": lambda s, b, h, q, k: s + (q >= k) / 2,
    "logical": lambda s, b, h, q, k: torch.where(torch.logical_or(q > k, k % 3) & torch.logical_not(q == 5), s, s - 1),
    "a base": lambda s, b, h, q, k: 2.0**s + torch.pow(2.0, -8.0 * (h + 1) / 2) * (k - q),
}
OF_INTEGERS = {
    "floor division": lambda s, b, h, q, k: s + (q - k) // 3 * 0.1 + (q - k) // -3 * 0.2 + 7 // (q + 1) * 0.1,
    "modulo": lambda s, b, h, q, k: s + (q - k) % 3 * 0.01 + (q - k) % -3 * 0.3 + 7 % (q + 1) * 0.1,
    "towards 0": lambda s, b, h, q, k: s + torch.div(q - k, 3, rounding_mode="trunc") * 0.1,
    "floor": lambda s, b, h, q, k: s + torch.div(q - k, 3, rounding_mode="floor") * 0.1,
    "quotient": lambda s, b, h, q, k: s + ((q + 1) / (k + 2)).to(s.dtype),
    "bits": lambda s, b, h, q, k: s + (~q) * 0.01 + (q ^ k) * 0.01 + (q & k) * 0.02 + (q | 3) * 0.1 + ((q - k) >> 1) * 0.1,
    "sign": lambda s, b, h, q, k: s + (k - q).sign() * 0.3 + (k - q).abs() * 0.1 + -q * 0.1,
    "power": lambda s, b, h, q, k: s + (q**2 % 7) * 0.1 + (k**8 % 7) * 0.1,
    "root": lambda s, b, h, q, k: s + ((q**0.5).round() + (k + 1) ** -1.0).round() * 0.3,
    "power by an index": lambda s, b, h, q, k: s + (2 ** (k % 5)) * 0.1 + q ** (k % 3) * 0.001,
    "product of sums": lambda s, b, h, q, k: s + (q + 1) * (k + 1) * 1e-3 + (q - 3) * (5 - k) * 1e-3,
    "wide product": lambda s, b, h, q, k: s + (q * 70000 * k) % 7 * 0.1,
    "wide product by numbers": lambda s, b, h, q, k: s + (k * 500 * 500 * 500 * 500) % 7 * 0.1,
    "hash": lambda s, b, h, q, k: s + (((q * 31 + k) * 31 + k) * 31 + q) * 31 * 31 * 31 * 31 % 7 * 0.1,
    "wide sum": lambda s, b, h, q, k: s + ((k + 2147483647) % 7) * 0.1,
    "wide number": lambda s, b, h, q, k: s + ((k + 2**31) % 7) * 0.1,
    "wide shift": lambda s, b, h, q, k: s + (k << 40) % 7 * 0.1,
    "shift of a number": lambda s, b, h, q, k: s + (1 << (k % 6)) * 0.1 + (64 >> (q % 6)) * 0.01,
    "casts": lambda s, b, h, q, k: s + q.to(s.dtype) / 3 + k.to(torch.float64) / 7 + q.float().type_as(s) * 0.1 + k.bool(),
    "casts of scores": lambda s, b, h, q, k: 2 * s + (s * 3).to(torch.int32) * 0.1 + (s * 3).long() % 2 + s.int(),
    "added casts of scores": lambda s, b, h, q, k: s + (s * 3).long() % 2,
}


@pytest.mark.parametrize("name", OF_SCORES)
def test_operations_on_scores(name):
    check(score_mod=OF_SCORES[name])


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_operations_on_indices(name):
    check(score_mod=OF_INTEGERS[name])


OF_TENSORS = {
    "ties of maximum": (lambda s, b, h, q, k: s * torch.maximum(ONE[k], TWO[q]) + torch.minimum(ONE[k], TWO[k]) * k, ONE, TWO),
    "ties of clamp": (lambda s, b, h, q, k: s * ONE[k].clamp(1.0, 2.0) * TWO[k].clamp(0.0, 1.0), ONE, TWO),
    "ties of clamp between tensors": (lambda s, b, h, q, k: s + torch.clamp(ONE[k], TWO[k], 2 * TWO[k]) * k, ONE, TWO),
    "ties of clamp between pairs": (lambda s, b, h, q, k: s + torch.clamp(ONE[k], min=TWO[q]) * k, ONE, TWO),
    "abs at 0": (lambda s, b, h, q, k: s + ZERO[k].abs() + ZERO[q].abs() * k + F.relu(ZERO[k]), ZERO),
    "powers of 0": (lambda s, b, h, q, k: s + ZERO[k] ** 2 + ZERO[q] ** 1 * k + ZERO[k] ** 0 + ZERO[q] ** 0 * k, ZERO),
    "0 to a power": (lambda s, b, h, q, k: s + torch.pow(ZERO[k], ONE[q]) + 0.0 ** ONE[k], ZERO, ONE),
    "negative bases": (lambda s, b, h, q, k: s + NEGATIVE[k] ** 3 + (NEGATIVE[q] * s) ** 2 + NEGATIVE[k] ** -1.0, NEGATIVE),
    "modulo": (lambda s, b, h, q, k: s + (BY_KEY[k] * 5) % (BY_QUERY[q] + 0.1) + (NEGATIVE[k] * 5) % (BY_QUERY[q] + 0.1)
               + (BY_KEY[k] * 5) % (-BY_QUERY[q] - 0.1), BY_KEY, BY_QUERY, NEGATIVE),
    "NaN not chosen": (lambda s, b, h, q, k: s + torch.where(q >= 0, BY_KEY[k], NEGATIVE_ALONE[k].log() * q), BY_KEY),
    "a table of the score": (lambda s, b, h, q, k: 2 * s + STAIRS[(s * 3).long().clamp(0, 5)],),
    "an added table of the score": (lambda s, b, h, q, k: s + STAIRS[(s * 3).long().clamp(0, 5)],),
}
NEGATIVE_ALONE, STAIRS = NEGATIVE.detach(), drawn(6, grad=False)


@pytest.mark.parametrize("name", OF_TENSORS)
def test_operations_at_awkward_points(name):
    function, *others = OF_TENSORS[name]
    check(*others, score_mod=function)


@pytest.mark.parametrize("backend", BACKENDS)
def test_division_by_zero(backend):
    """a // 0 of floats is infinite, as PyTorch has it."""
    q, k, v = qkv()
    out = attention(q, k, v, backend=backend, score_mod=lambda s, b, h, q, k: torch.where(k > 3, s, (s // 0.0).clamp(-3, 3)))
    torch.testing.assert_close(out, truth(q, k, v, lambda s, b, h, q, k: torch.where(k > 3, s, 3 * s.sign())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_floor_division_has_no_slope(backend):
    """// of scores can be differentiated: its slope is 0, whichever backend runs it."""
    tensors = [x.requires_grad_() for x in qkv()]
    out = attention(*tensors, backend=backend, score_mod=lambda s, b, h, q, k: 2 * s + (s // 0.7) * 0.1)
    want = truth(*tensors, lambda s, b, h, q, k: 2 * s + torch.div(s, 0.7, rounding_mode="floor") * 0.1)
    for x, y in zip(gradients(out, tensors), gradients(want, tensors), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str)
def test_types(dtype, tolerance):
    """Scores and captured tensors of fewer digits; integers keep all of theirs."""
    gain, table = (x.detach().to(dtype).requires_grad_() for x in (BY_HEAD, drawn(H, 9)))
    ids = 2**24 + labels(NK)

    def function(s, b, h, q, k, gain=gain, table=table):
        return (s * gain[h]).tanh() + table[h, (q - k).clamp(-4, 4) + 4] + s**2 + (ids[q] - ids[k]).abs() * 0.1

    check(gain, table, tensors=qkv(dtype=dtype), tolerance=tolerance, score_mod=function,
          told={"score_mod": functools.partial(function, gain=gain.double(), table=table.double())},
          want=lambda q, k, v, score_mod: truth(q, k, v, lambda *at: score_mod(*at)))


# --- captured tensors ---

TABLE, DIFFERENCES, BH, BQ = drawn(5, 5), drawn(NQ + NK), drawn(B, H), drawn(B, NQ)
HQK, KQ, SLOPES, BHT, COARSE, CONSTANT = (
    drawn(H, NQ, NK), drawn(NK, NQ), drawn(H, 9), drawn(B, H, 9), drawn(H, NQ, NK // 4 + 1), drawn(3, H, 2))
SCALAR, STRIDED, WIDE, ONE_VALUE = drawn(1).sum().detach().requires_grad_(), drawn(NK, 2), drawn(5, 10), drawn(1)
EXPANDED = drawn(1, 5)
Q_ID, K_ID, FLAGS, INTEGERS = labels(NQ), labels(NK), labels(NK) > 2, labels(NQ, 19) - 9
CAPTURED = {
    "h": (lambda s, b, h, q, k: s * BY_HEAD[h], BY_HEAD),
    "ALiBi": (lambda s, b, h, q, k: s - BY_HEAD[h] * (q - k).abs(), BY_HEAD),
    "exponent": (lambda s, b, h, q, k: (s * s + 1.0) ** BY_HEAD[h], BY_HEAD),
    "exp outside": (lambda s, b, h, q, k: s - BY_HEAD.exp()[h] * (q - k), BY_HEAD),
    "exp inside": (lambda s, b, h, q, k: s - BY_HEAD[h].exp() * (q - k), BY_HEAD),
    "b, h": (lambda s, b, h, q, k: s * BH[b, h], BH),
    "q_idx and kv_idx": (lambda s, b, h, q, k: s * BY_QUERY[q] + BY_KEY[k], BY_QUERY, BY_KEY),
    "b, q_idx": (lambda s, b, h, q, k: s * BQ[b, q], BQ),
    "h, q_idx, kv_idx": (lambda s, b, h, q, k: s + HQK[h, q, k], HQK),
    "transposed": (lambda s, b, h, q, k: s + KQ[k, q], KQ),
    "differences": (lambda s, b, h, q, k: s + DIFFERENCES[k - q + NQ], DIFFERENCES),
    "negative": (lambda s, b, h, q, k: s + DIFFERENCES[k - q] + DIFFERENCES[(k - q) // 2], DIFFERENCES),
    "clamped differences": (lambda s, b, h, q, k: s * SLOPES[h, (q - k).clamp(-4, 4) + 4], SLOPES),
    "of every head": (lambda s, b, h, q, k: s + BHT[b, h, (q - k).clamp(-4, 4) + 4], BHT),
    "nested": (lambda s, b, h, q, k: s * TABLE[Q_ID[q], K_ID[k]] + TABLE[K_ID[k] - 5, Q_ID[q]] ** 2, TABLE),
    "decomposed": (lambda s, b, h, q, k: s + COARSE[h, q, k // 4], COARSE),
    "constants": (lambda s, b, h, q, k: s + CONSTANT[1, h, -1] + CONSTANT[-3, h, 0] * q, CONSTANT),
    "no dimensions": (lambda s, b, h, q, k: s * SCALAR.exp() + SCALAR * q, SCALAR),
    "truth values": (lambda s, b, h, q, k: torch.where(FLAGS[k], s, INTEGERS[q] * 0.1) + FLAGS[k] * 0.3 + (~FLAGS[k]) * s,),
    "integers": (lambda s, b, h, q, k: s * FLAGS[k] + INTEGERS[q] + (INTEGERS[q] // 2) % 3 * 0.1 + (FLAGS[k] + 3) * 0.1,),
    "longer": (lambda s, b, h, q, k: s * LONG[k] + LONG[q], LONG),
    "expanded": (lambda s, b, h, q, k: s * ONE_VALUE.expand(NK)[k] + EXPANDED.expand(5, 5)[Q_ID[q], K_ID[k]],
                 ONE_VALUE, EXPANDED),
    "strided": (lambda s, b, h, q, k: s * STRIDED[k, 1] + STRIDED.T[0, k] + STRIDED[:, 0][k], STRIDED),
    "strided table": (lambda s, b, h, q, k: s + WIDE.T[Q_ID[q] * 2, K_ID[k]] + WIDE[:, ::2][K_ID[k], Q_ID[q]], WIDE),
    "products": (lambda s, b, h, q, k: s + BY_QUERY[q] * BY_KEY[k] * HQK[h, q, k] * BY_HEAD[h], BY_QUERY, BY_KEY, HQK, BY_HEAD),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_tensors(name):
    function, *others = CAPTURED[name]
    check(*others, score_mod=function, deterministic=False)


def test_indexed_one_by_one():
    check(BH, CONSTANT, score_mod=lambda s, b, h, q, k: s * BH[b][h] + CONSTANT[0][h][1] + CONSTANT[:, 0, 1][k % 3],
          told={"score_mod": lambda s, b, h, q, k: s * BH[b, h] + CONSTANT[0, h, 1] + CONSTANT[k % 3, 0, 1]})


@pytest.mark.parametrize("given", [(), (BY_HEAD, 0.5)], ids=["closure", "mod_args"])
def test_arguments_beside_the_coordinates(given):
    def both(s, b, h, q, k, gain=BY_HEAD, factor=0.5):
        return s * gain[h] * factor

    check(BY_HEAD, score_mod=both, mod_args=given)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 20), (50, 20), (70, 70)])
def test_extents(n_queries, n_keys):
    table, rows = drawn(H, 80), drawn(80)
    check(table, rows, tensors=qkv(n_queries, n_keys),
          score_mod=lambda s, b, h, q, k: s * table[h, k] + rows[(q - k).abs()] + q * 0.01)


def test_fewer_heads_of_keys():
    """A function's head is that of the queries."""
    gain, table = drawn(4), drawn(4, 5, 3)
    check(gain, table, tensors=qkv(heads=4), score_mod=lambda s, b, h, q, k: s * gain[h] + table[h, q % 5, k % 3],
          deterministic=False, mask_mod=lambda b, h, q, k: (q + h) % 3 != k % 3)


# --- masks ---

MASKS = {
    "causal": lambda b, h, q, k: q >= k, "strict": lambda b, h, q, k: k < q, "anti": lambda b, h, q, k: q <= k,
    "window": lambda b, h, q, k: (q - k).abs() <= 6, "window from the right": lambda b, h, q, k: (k - q + 2).abs() < 6,
    "wide": lambda b, h, q, k: (q - k).abs() <= 10**12, "nobody": lambda b, h, q, k: (q - k).abs() <= -1,
    "offset": lambda b, h, q, k: (q + 4 >= k) & (q - 3 < k), "far": lambda b, h, q, k: (k - q >= 5) & (k - q <= 9),
    "empty rows": lambda b, h, q, k: k - q >= 20, "nothing at all": lambda b, h, q, k: k - q >= 200,
    "left alone": lambda b, h, q, k: q - 20 >= k, "doubled": lambda b, h, q, k: 2 * q - 2 * k >= 3,
    "either": lambda b, h, q, k: (q >= k) | (k < 5), "batch": lambda b, h, q, k: b > 0,
    "heads": lambda b, h, q, k: (h > 0) & (q >= k), "keys": lambda b, h, q, k: k > 3,
    "product": lambda b, h, q, k: (q + 1) * (k + 2) % 3 != 0,
    "documents": lambda b, h, q, k: K_ID[q] == K_ID[k], "floats": lambda b, h, q, k: (BY_KEY[k] >= BY_QUERY[q]) & (q >= k),
    "differences": lambda b, h, q, k: FLAGS[(q - k).abs()],
    "table": lambda b, h, q, k: (q == k) | (TABLE[Q_ID[q], K_ID[k]] > 0.5),
    "wide identities": lambda b, h, q, k: (2**40 + K_ID)[q] == (2**40 + K_ID)[k],
}


@pytest.mark.parametrize("shape", [(NQ, NK), pytest.param((50, 20), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, shape):
    if shape != (NQ, NK) and name in ("documents", "floats", "differences", "table", "wide identities"):
        pytest.skip("captures tensors of the other extents")
    check(tensors=qkv(*shape), mask_mod=MASKS[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_functions(backend):
    q, k, v = qkv()
    for keeps in (True, False):
        want = truth(q, k, v, keep=torch.tensor(keeps))
        torch.testing.assert_close(attention(q, k, v, backend=backend, mask_mod=lambda *_, keeps=keeps: keeps), want)
    for number in (0.5, 1, torch.tensor(2.0)):
        got = attention(q, k, v, backend=backend, score_mod=lambda *_, number=number: number)
        torch.testing.assert_close(got, truth(q * 0, k, v))


# --- together with what else a call has ---

J, POSITION = torch.arange(NK), torch.arange(NQ)[:, None] + NK - NQ  # of keys, and of queries among them
LENGTHS = torch.tensor([20, 37])
EXIST = LENGTHS[:, None, None, None] > J
BIAS = drawn(H, NQ, NK)
RANDOM = drawn(H, NQ, NK, grad=False) > 0.3
TOGETHER = {
    "causal": ({"causal": True}, {"keep": J <= POSITION}),
    "window": ({"window": (10, 3)}, {"keep": (POSITION - J <= 10) & (J - POSITION <= 3)}),
    "bias": ({"bias": BIAS}, {"bias": BIAS}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "mask": ({"mask": RANDOM}, {"keep": RANDOM}),
    "key_lengths": ({"key_lengths": LENGTHS}, {"keep": EXIST}),
    "key_lengths+causal": ({"key_lengths": LENGTHS, "causal": True}, {"keep": EXIST & (J <= POSITION)}),
}


@pytest.mark.few(14)
@pytest.mark.parametrize("mask", [None, "window", "causal", "either"])
@pytest.mark.parametrize("name", TOGETHER)
def test_together(name, mask):
    more, told = TOGETHER[name]

    def function(s, b, h, q, k):
        return s * BY_HEAD[h] + SLOPES[h, (q - k).clamp(-4, 4) + 4] * BQ[b, q]

    functions = {"score_mod": function} if mask in (None, "either") else {}
    functions |= {} if mask is None else {"mask_mod": MASKS[mask]}
    others = [BIAS] * (name == "bias") + [BY_HEAD, SLOPES, BQ] * ("score_mod" in functions)
    check(*others, **functions, **more, told={**functions, **told})


def test_several_functions():
    """Score functions one after the other, and masks of which all must hold, with mods among them."""
    scores = [lambda s, b, h, q, k: s * BY_HEAD[h], lambda s, b, h, q, k: s.tanh() * 2, lambda s, b, h, q, k: s + BY_KEY[k]]
    masks = [lambda b, h, q, k: q >= k - 9, lambda b, h, q, k: (q - k).abs() < 12, lambda b, h, q, k: k % 5 > 0]
    check(BY_HEAD, BY_KEY, score_mod=scores, mask_mod=masks)
    document = torch.arange(70) // 8
    check(BY_HEAD, tensors=qkv(70, 70), score_mod=tuple(scores[:2]), mask_mod=(masks[1], fused_attn.document_mask(document)),
          told={"score_mod": scores[:2], "mask_mod": [masks[1], lambda b, h, q, k: document[q] == document[k]]})


# --- packed sequences ---

PACKED = {
    "by sequence": ({"score_mod": lambda s, b, h, q, k: s * P_B[b] * BY_HEAD[h] + P_BQ[b, q]}, "P_B P_BQ"),
    "differences": ({"score_mod": lambda s, b, h, q, k: s + LONG[k - q] * LONG[k - q + 30]}, "LONG"),
    "table": ({"score_mod": lambda s, b, h, q, k: s + TABLE[q % 5, k % 5]}, "TABLE"),
    "causal mask": ({"mask_mod": lambda b, h, q, k: q >= k}, ""),
    "window": ({"mask_mod": lambda b, h, q, k: (q - k).abs() < 4}, ""),
    "all": ({"score_mod": lambda s, b, h, q, k: s + SLOPES[h, (q - k).clamp(-4, 4) + 4] * P_BQ[b, q],
             "mask_mod": lambda b, h, q, k: (q + b) % 3 != k % 3, "causal": True}, "SLOPES P_BQ"),
}
P_B, P_BQ = drawn(3), drawn(3, 24)


@pytest.mark.few(7)
@pytest.mark.parametrize("used", [None, (7, 8, 15)], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name, used):
    """Indices are those within a sequence, b is its number."""
    arguments, others = PACKED[name]
    others = [globals()[x] for x in others.split()]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 9, 9, 33), (0, 12, 20, 37)))
    leaves = [torch.randn(n, H, D, dtype=torch.float64, requires_grad=True) for n in (NQ, NK, NK)]
    told, parts = {x: y for x, y in arguments.items() if x != "causal"}, []
    for i in (0, 2):
        stop = cu_k[i + 1] if used is None else cu_k[i] + used[i]
        own = [x[a:b].transpose(0, 1)[None] for x, a, b in zip(leaves, (cu_q[i], cu_k[i], cu_k[i]),
                                                              (cu_q[i + 1], stop, stop), strict=True)]
        n, m = own[0].shape[2], own[1].shape[2]
        keep = torch.arange(m) <= torch.arange(n)[:, None] + (m - n if "causal" in arguments else m)
        parts.append(truth(*own, **told, keep=keep, first=i)[0].transpose(0, 1))
    want = [torch.cat(parts), *gradients(torch.cat(parts), [*leaves, *others])]
    for backend in BACKENDS:
        out = attention_varlen(*leaves, cu_q, cu_k, 24, 17, backend=backend, deterministic=False,
                               seqused_k=used and torch.tensor(used), **arguments)
        for x, y in zip([out, *gradients(out, [*leaves, *others])], want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda text, backend=backend: f"{backend}: {text}")
