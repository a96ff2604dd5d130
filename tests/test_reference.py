"""The oracle against arithmetic that can be done by hand, and against a triple loop over Python floats."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_attn import attention, reference_attention

INF = math.inf


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def column(*values, requires_grad=False):
    """[1, 1, N, 1] in fp64: sequences of numbers, so that every product is one multiplication."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1, 1).requires_grad_(requires_grad)


def normal(*shape, dtype=torch.float64, requires_grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)


def brute_force(q, k, v, *, causal=False, window=None, scale=None, softcap=None):
    """(out, lse) as nested lists, from the definition alone."""
    n_queries, n_keys, dim, dim_v = len(q[0][0]), len(k[0][0]), len(q[0][0][0]), len(v[0][0][0])
    left, right = window if window is not None else (None, None)
    group = len(q[0]) // len(k[0])
    scale = dim ** -0.5 if scale is None else scale
    out, lse = [], []
    for b in range(len(q)):
        for h in range(len(q[0])):
            for i in range(n_queries):
                position = i + n_keys - n_queries
                scores, rows = [], []
                for j in range(n_keys):
                    if (causal and j > position) or (left is not None and j < position - left):
                        continue
                    if right is not None and j > position + right:
                        continue
                    score = scale * math.fsum(x * y for x, y in zip(q[b][h][i], k[b][h // group][j], strict=True))
                    scores.append(score if softcap is None else softcap * math.tanh(score / softcap))
                    rows.append(v[b][h // group][j])
                highest = max(scores, default=0.0)
                weights = [math.exp(score - highest) for score in scores]
                total = math.fsum(weights)
                out.append([math.fsum(w * row[c] for w, row in zip(weights, rows, strict=True)) / (total or 1.0)
                            for c in range(dim_v)])
                lse.append(highest + math.log(total) if total else -INF)
    return out, lse


# Queries 0 (ln 3) and 1 (0), keys 1 and 0, values 4 and 8, scale 1. Scores: query 0 (ln 3, 0), query 1 (0, 0).
# e^score: (3, 1) and (1, 1). Weights: (3/4, 1/4) and (1/2, 1/2). out: 4*3/4 + 8/4 = 5 and 6. LSE: ln 4 and ln 2.
def two_by_two(requires_grad=False):
    return column(math.log(3), 0.0, requires_grad=requires_grad), *(
        column(*values, requires_grad=requires_grad) for values in ((1.0, 0.0), (4.0, 8.0)))


def test_two_by_two_by_hand():
    out, lse = reference_attention(*two_by_two(), scale=1.0, return_lse=True)
    close(out, column(5.0, 6.0))
    close(lse, torch.tensor([[[math.log(4), math.log(2)]]], dtype=torch.float64))


def test_two_by_two_causal_by_hand():
    # Query 0 sees key 0 alone: weight 1, out 4, LSE its score ln 3. Query 1 sees both.
    out, lse = reference_attention(*two_by_two(), scale=1.0, causal=True, return_lse=True)
    close(out, column(4.0, 6.0))
    close(lse, torch.tensor([[[math.log(3), math.log(2)]]], dtype=torch.float64))


def test_two_by_two_softcap_by_hand():
    # Cap 2: scores 2 tanh(ln 3 / 2) and 0. tanh(ln 3 / 2) = (3 - 1) / (3 + 1) = 1/2, so the score is 1: weight e / (1 + e).
    out = reference_attention(*two_by_two(), scale=1.0, softcap=2.0)
    weight = math.e / (1 + math.e)
    close(out, column(4 * weight + 8 * (1 - weight), 6.0))


def test_two_by_two_gradients_by_hand():
    # dO = 1 for both queries. dV = column sums of the weights: 3/4 + 1/2 and 1/4 + 1/2.
    # dS = P (v - out): query 0: 3/4 (4 - 5), 1/4 (8 - 5) = -3/4, 3/4; query 1: 1/2 (4 - 6), 1/2 (8 - 6) = -1, 1.
    # dQ = dS K with keys (1, 0): -3/4, -1. dK = dS^T Q with queries (ln 3, 0): -3/4 ln 3, 3/4 ln 3.
    q, k, v = two_by_two(requires_grad=True)
    dq, dk, dv = torch.autograd.grad(reference_attention(q, k, v, scale=1.0).sum(), (q, k, v))
    close(dv, column(1.25, 0.75))
    close(dq, column(-0.75, -1.0))
    close(dk, column(-0.75 * math.log(3), 0.75 * math.log(3)))


def test_two_by_two_lse_gradients_by_hand():
    # d LSE / d score is the weight. dQ = P K = 3/4, 1/2. dK = P^T Q = 3/4 ln 3, 1/4 ln 3. V plays no part.
    q, k, v = two_by_two(requires_grad=True)
    _, lse = reference_attention(q, k, v, scale=1.0, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), materialize_grads=True)
    close(dq, column(0.75, 0.5))
    close(dk, column(0.75 * math.log(3), 0.25 * math.log(3)))
    close(dv, column(0.0, 0.0))


@pytest.mark.parametrize(("arguments", "before", "after"), [
    ({}, 6, 6), ({"causal": True}, 6, 0), ({"window": (1, 2)}, 1, 2), ({"softcap": 3.0}, 6, 6)], ids=str)
def test_equal_scores_give_the_mean_of_the_values_seen(arguments, before, after):
    q, k, v = torch.zeros(1, 1, 6, 2, dtype=torch.float64), normal(1, 1, 6, 2), normal(1, 1, 6, 3)
    out, lse = reference_attention(q, k, v, return_lse=True, **arguments)
    for i in range(6):
        seen = v[0, 0, max(0, i - before):i + after + 1]
        close(out[0, 0, i], seen.mean(0))
        close(lse[0, 0, i], torch.tensor(math.log(len(seen)), dtype=v.dtype))


@pytest.mark.parametrize("magnitude", [1e3, 1e150])
def test_one_dominant_score_picks_its_value(magnitude):
    # Each query is orthogonal to every key but its own: weights go to 1 and exactly 0.
    keys = torch.eye(4, dtype=torch.float64).reshape(1, 1, 4, 4)
    v = normal(1, 1, 4, 3)
    order = [2, 0, 3, 1]
    out, lse = reference_attention(keys[:, :, order] * magnitude, keys, v, scale=1.0, return_lse=True)
    close(out, v[:, :, order])
    close(lse, torch.full((1, 1, 4), magnitude, dtype=torch.float64))


@pytest.mark.parametrize(("n_queries", "n_keys"), [(4, 4), (2, 5), (1, 5), (5, 2)])
def test_causal_aligns_the_last_query_with_the_last_key(n_queries, n_keys):
    # Values are unit vectors, so that the output is the row of weights itself.
    q, k, v = normal(1, 1, n_queries, 3), normal(1, 1, n_keys, 3), torch.eye(n_keys, dtype=torch.float64)[None, None]
    weights = reference_attention(q, k, v, causal=True)[0, 0]
    full = reference_attention(q, k, v)[0, 0]
    for i in range(n_queries):
        seen = max(0, i + n_keys - n_queries + 1)
        assert (weights[i, :seen] > 0).all()
        assert (weights[i, seen:] == 0).all()
        if seen:
            close(weights[i, :seen], full[i, :seen] / full[i, :seen].sum())
    close(weights[-1], full[-1])  # the last query sees every key


@pytest.mark.parametrize("window", [(0, 0), (2, 1), (1, None), (None, 1), (0, 100), (100, 0), (None, None)], ids=str)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(5, 5), (3, 6), (6, 3)])
def test_window_keeps_both_of_its_bounds(window, n_queries, n_keys):
    left, right = (100 if bound is None else bound for bound in window)
    weights = reference_attention(normal(1, 1, n_queries, 2), normal(1, 1, n_keys, 2),
                                  torch.eye(n_keys, dtype=torch.float64)[None, None], window=window)[0, 0]
    expected = [[i + n_keys - n_queries - left <= j <= i + n_keys - n_queries + right for j in range(n_keys)]
                for i in range(n_queries)]
    assert (weights > 0).tolist() == expected


def test_causal_caps_the_right_bound():
    q, k, v = (normal(1, 2, 5, 3) for _ in range(3))
    close(reference_attention(q, k, v, causal=True, window=(2, 4)), reference_attention(q, k, v, window=(2, 0)))


def test_query_heads_share_key_heads_in_blocks():
    v = torch.arange(2.0).reshape(1, 2, 1, 1).expand(1, 2, 3, 1)  # the value of every key is the number of its head
    out = reference_attention(torch.randn(1, 6, 2, 4), torch.randn(1, 2, 3, 4), v)
    close(out[0, :, 0, 0], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 1e-6)


bounds = st.one_of(st.none(), st.integers(0, 6))


@settings(max_examples=80, deadline=None)
@given(batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 3), n_queries=st.integers(1, 6),
       n_keys=st.integers(0, 6), dim=st.integers(1, 3), dim_v=st.integers(1, 3), causal=st.booleans(),
       window=st.one_of(st.none(), st.tuples(bounds, bounds)), scale=st.sampled_from([None, 0.3, 0.0, -1.5]),
       softcap=st.sampled_from([None, 0.5, 4.0]), seed=st.integers(0, 2**32))
def test_against_a_triple_loop(batch, kv_heads, group, n_queries, n_keys, dim, dim_v, seed, **arguments):
    torch.manual_seed(seed)
    q = normal(batch, kv_heads * group, n_queries, dim) * 2
    k, v = normal(batch, kv_heads, n_keys, dim) * 2, normal(batch, kv_heads, n_keys, dim_v)
    out, lse = reference_attention(q, k, v, return_lse=True, **arguments)
    if not n_keys:
        assert (out == 0).all()
        assert (lse == -INF).all()
        return
    expected_out, expected_lse = brute_force(q.tolist(), k.tolist(), v.tolist(), **arguments)
    close(out.reshape(-1, dim_v), torch.tensor(expected_out, dtype=torch.float64))
    close(lse.reshape(-1), torch.tensor(expected_lse, dtype=torch.float64))


EMPTY_ROWS = {
    "causal, more queries than keys": ({"causal": True}, 5, 2, [True, True, True, False, False]),
    "window, more queries than keys": ({"window": (1, 0)}, 4, 2, [True, True, False, False]),
    "no keys at all": ({}, 3, 0, [True, True, True]),
    "no keys, causal": ({"causal": True}, 3, 0, [True, True, True]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EMPTY_ROWS)
def test_row_with_no_key(case, dtype):
    arguments, n_queries, n_keys, expected = EMPTY_ROWS[case]
    q = normal(1, 2, n_queries, 3, dtype=dtype, requires_grad=True)
    k, v = (normal(1, 1, n_keys, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    out, lse = reference_attention(q, k, v, return_lse=True, **arguments)
    empty = torch.tensor(expected)
    assert (out[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -INF).all()
    assert lse[:, :, ~empty].isfinite().all()
    # Gradients flow back into empty rows alone: nothing may come of them, through out or through LSE.
    dout, dlse = torch.zeros_like(out), torch.zeros_like(lse)
    dout[:, :, empty], dlse[:, :, empty] = 1.0, 1.0
    for grad in torch.autograd.grad((out, lse), (q, k, v), (dout, dlse)):
        assert (grad == 0).all()  # false for NaN


@pytest.mark.parametrize("case", ["causal, more queries than keys", "window, more queries than keys"])
def test_gradients_beside_empty_rows_are_finite(case):
    arguments, n_queries, n_keys, expected = EMPTY_ROWS[case]
    q = normal(1, 2, n_queries, 3, requires_grad=True)
    k, v = (normal(1, 1, n_keys, 3, requires_grad=True) for _ in range(2))
    dq, dk, dv = torch.autograd.grad(reference_attention(q, k, v, **arguments).square().sum(), (q, k, v))
    assert (dq[:, :, torch.tensor(expected)] == 0).all()
    for grad in (dq, dk, dv):
        assert grad.isfinite().all()
        assert (grad != 0).any()


def test_no_keys_at_all_leaves_inputs_in_the_graph():
    q = normal(1, 2, 3, 4, requires_grad=True)
    k, v = (normal(1, 2, 0, 4, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(reference_attention(q, k, v).sum(), (q, k, v))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_no_keys_ignores_infinite_queries():
    q = torch.full((1, 1, 2, 3), INF)
    assert (reference_attention(q, torch.empty(1, 1, 0, 3), torch.empty(1, 1, 0, 2)) == 0).all()


def test_no_queries():
    q = normal(1, 2, 0, 3, requires_grad=True)
    k, v = normal(1, 2, 4, 3, requires_grad=True), normal(1, 2, 4, 5, requires_grad=True)
    out, lse = reference_attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (1, 2, 0, 5)
    assert lse.shape == (1, 2, 0)
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


CALLS = [{}, {"causal": True}, {"window": (1, 1)}, {"softcap": 1.5, "scale": 0.7}, {"scale": -0.8, "causal": True}]


@pytest.mark.parametrize("arguments", [*CALLS, {"score_weight": torch.tensor([[0.7, -1.5], [2.0, 0.4]]).double()}], ids=str)
def test_first_and_second_derivatives(arguments):
    q = normal(1, 2, 2, 2, requires_grad=True)
    k, v = normal(1, 1, 3, 2, requires_grad=True), normal(1, 1, 3, 1, requires_grad=True)

    def call(q, k, v):
        return reference_attention(q, k, v, return_lse=True, **arguments)

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))


def test_derivatives_beside_an_empty_row():
    q = normal(1, 1, 3, 2, requires_grad=True)
    k, v = (normal(1, 1, 2, 2, requires_grad=True) for _ in range(2))

    def call(q, k, v):  # the LSE of the empty row is -inf, which no finite difference can follow
        out, lse = reference_attention(q, k, v, causal=True, return_lse=True)
        return out, lse[:, :, 1:]

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))


def test_gradient_penalty():
    def penalty(attend):  # of the squared norm of dQ
        (dq,) = torch.autograd.grad(attend(q, k, v).sin().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), (q, k, v))

    q, k, v = (normal(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    by_torch = penalty(lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v)
    for grad, expected in zip(penalty(reference_attention), by_torch, strict=True):
        close(grad, expected)


@pytest.mark.parametrize("wrt", [0, 1, 2])
def test_forward_mode(wrt):
    inputs = [normal(1, 2, 3, 4) for _ in range(3)]

    def call(x):
        return reference_attention(*inputs[:wrt], x, *inputs[wrt + 1:], causal=True)

    x, tangent = inputs[wrt], normal(1, 2, 3, 4)
    _, expected = torch.autograd.functional.jvp(call, x, tangent)  # by a double backward
    close(torch.func.jvp(call, (x,), (tangent,))[1], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", CALLS, ids=str)
def test_halves_are_computed_in_fp32_and_rounded_once(arguments, dtype):
    halves = [(normal(1, heads, 9, 8) * 3).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    singles = [x.detach().float().requires_grad_() for x in halves]
    out, lse = reference_attention(*halves, return_lse=True, **arguments)
    exact_out, exact_lse = reference_attention(*singles, return_lse=True, **arguments)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, exact_out.to(dtype))
    assert torch.equal(lse, exact_lse)
    dout = normal(*out.shape).to(dtype)
    grads = torch.autograd.grad((out, lse), halves, (dout, torch.ones_like(lse)))
    exact = torch.autograd.grad((exact_out, exact_lse), singles, (dout.float(), torch.ones_like(lse)))
    for grad, wide in zip(grads, exact, strict=True):
        assert grad.dtype == dtype
        assert torch.equal(grad, wide.to(dtype))


def test_scores_beyond_the_range_of_fp16():
    q = torch.full((1, 1, 1, 64), 200.0, dtype=torch.float16)
    k = torch.cat([q, -q], dim=2)  # q.k = +-2.56e6, while fp16 ends at 65504
    v = torch.tensor([3.0, 5.0], dtype=torch.float16).reshape(1, 1, 2, 1)
    assert reference_attention(q, k, v, scale=1.0).item() == 3.0


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"scale": 0.3}, {"window": (2, 1)}], ids=str)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(7, 7), (4, 9)])
def test_agrees_with_torch(arguments, n_queries, n_keys):
    q = normal(2, 4, n_queries, 8, requires_grad=True)
    k, v = normal(2, 2, n_keys, 8, requires_grad=True), normal(2, 2, n_keys, 5, requires_grad=True)
    i, j = torch.meshgrid(torch.arange(n_queries) + n_keys - n_queries, torch.arange(n_keys), indexing="ij")
    left, right = arguments.get("window", (n_keys, 0 if arguments.get("causal") else n_keys))
    mask = (j >= i - left) & (j <= i + right)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=arguments.get("scale"), enable_gqa=True)
    out = reference_attention(q, k, v, **arguments)
    close(out, expected)
    dout = normal(*out.shape)
    for grad, wanted in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout),
                            strict=True):
        close(grad, wanted)


def test_same_arguments_as_attention():
    q = torch.randn(1, 1, 2, 3)
    with pytest.raises(ValueError, match="softcap"):
        reference_attention(q, q, q, softcap=-1.0)
    with pytest.raises(ValueError, match="dropout_p"):
        reference_attention(q, q, q, dropout_p=1.5)
    named = {*inspect.signature(attention).parameters} - {"q", "k", "v", "backend", "unexpected"}
    defaults = {name: inspect.signature(attention).parameters[name].default for name in named}
    close(reference_attention(q, q, q, **defaults), reference_attention(q, q, q), 0)
    close(reference_attention(q, q, q, backend="triton"), reference_attention(q, q, q), 1e-6)


@pytest.mark.few(5)
@pytest.mark.parametrize("watcher", ["nobody", "functorch", "forward mode", "compiler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("product", ["softcap", "additive"])
def test_slopes_of_saturated_scores_keep_their_digits(product, dtype, watcher):
    """Of two keys of one score dS is p (dP - delta) (1 - tanh^2), of whose slope fp32 has no digits left at 9."""
    more = {"score_weight": torch.ones(1, dtype=dtype)} if product == "additive" else {"softcap": 1.0, "scale": 1.0}

    def total(k, q, v):
        return reference_attention(q, k, v, **more).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")

    def gradient(k, q, v):
        if watcher == "functorch":
            return torch.func.grad(total)(k, q, v)
        if watcher == "forward mode":
            tangents = torch.eye(2, dtype=dtype).view(2, *k.shape)
            return torch.stack([torch.func.jvp(lambda k: total(k, q, v), (k,), (tangent,))[1] for tangent in tangents])
        k.requires_grad_()
        return torch.autograd.grad((compiled if watcher == "compiler" else total)(k, q, v), k)[0]

    for size in (0.0, 0.3, 0.99, 1.01, 3.0, -3.0, 9.0, 12.0, -30.0):
        q, key = torch.full((1, 1, 1, 1), size, dtype=dtype), float(product == "softcap")
        v = torch.tensor([1.0, -1.0], dtype=dtype).view(1, 1, 2, 1)
        grad = gradient(torch.full((1, 1, 2, 1), key, dtype=dtype), q, v)
        slope = (size if product == "softcap" else 1.0) / math.cosh(size) ** 2
        expected = 0.5 * slope * torch.tensor([1.0, -1.0], dtype=torch.float64)
        torch.testing.assert_close(grad.flatten().double(), expected, rtol=3e-15 if dtype == torch.float64 else 3e-6, atol=0)


def test_additive_scores_keep_none_of_their_sums():
    """[B, H, Nq, Nk, D] exists while it is reduced, and no longer."""
    leaves = [torch.randn(1, 2, 9, 8, requires_grad=True), torch.randn(1, 2, 11, 8, requires_grad=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        reference_attention(*leaves, leaves[1], score_weight=torch.randn(2, 8, requires_grad=True))
    assert kept
    assert max(kept) < 2 * 9 * 11 * 8
