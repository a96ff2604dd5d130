"""Forward mode and vmap over the kernels: tangents of out and LSE, and transforms of transforms, are those of the reference.

Sizes cross the edges of the interpreter's tiles, 64 queries and 32 keys, wherever what is tested depends on tiles.
"""

import pytest
import torch
from support.features import BY_NAME, FEATURES, Call, Shape, covering
from support.guard import memory_guard
from support.mods import COMB, NEAR
from support.oracle import EPS
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vmap

import fused_attn
from fused_attn import attention, attention_varlen

pytestmark = pytest.mark.kernels
ACROSS = Shape(2, 2, 1, 70, 41, 9, 11)
SMALL = Shape(2, 2, 2, 7, 9, 8, 6)
# PyTorch has no forward AD and no vmap of nested tensors; every call here returns its LSE.
MOVING = [feature for feature in FEATURES if feature.name not in ("nested", "lse")]


def normal(*size):
    return torch.randn(size, dtype=torch.float64)


def qkv(n_queries=70, n_keys=41, heads=2, kv_heads=1, dim=9, dim_v=11, batch=2):
    return normal(batch, heads, n_queries, dim), normal(batch, kv_heads, n_keys, dim), normal(batch, kv_heads, n_keys, dim_v)


def like(tree):
    """Random tangents of tensors."""
    return torch.utils._pytree.tree_map(torch.randn_like, tree)


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def assert_same(of):
    """``of(backend)`` is the same by the kernels as by the reference; returns what the kernels give."""
    got = of("triton")
    assert_close(got, of("reference"))
    return got


def drawn(names, base, dtype=torch.float64, seed=0):
    """The inputs of a call with features; trees have as many queries as keys."""
    if any("lengths" in BY_NAME[name].without for name in names):
        base = Shape(base.batch, base.heads, base.kv_heads, base.n_keys, base.n_keys, base.dim, base.dim_v)
    return Call(tuple(names), base).draw(dtype, seed)


def function(inputs, backend):
    """(out, lse) as a function of the leaves of ``inputs``."""
    def run(leaves):
        torch.manual_seed(1)  # dropout draws one seed a call
        return inputs.attention({**inputs.leaves, **leaves}, backend)
    return run


def loss(out, lse):
    return out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()


def plain(backend, **arguments):
    return lambda q, k, v: attention(q, k, v, return_lse=True, backend=backend, **arguments)


CALLS = [(feature.name,) for feature in MOVING]
CALLS += covering(4, tuple(feature for feature in MOVING if feature.name not in ("plain", "dims_576")))


@pytest.mark.few(3)
@pytest.mark.parametrize("names", CALLS, ids="+".join)
def test_the_tangent_of_features_alone_and_together(names):
    inputs = drawn(names, ACROSS)
    tangents = like(inputs.leaves)
    _, moved = assert_same(lambda backend: jvp(function(inputs, backend), (inputs.leaves,), (tangents,)))
    assert all(x.count_nonzero() > 0 for x in moved), "the tangent is 0: the test sees nothing"


ALONE = [(name, leaf) for name in ("plain", "softcap", "additive", "packed") for leaf in "qkv"]
ALONE += [(feature.name, leaf) for feature in MOVING if feature.gradients
          for leaf in drawn([feature.name], SMALL).leaves.keys() - set("qkv")]


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "leaf"), sorted(ALONE))
def test_the_tangent_of_one_tensor_alone(name, leaf):
    inputs = drawn([name], ACROSS)
    x, x_t = inputs.leaves[leaf], torch.randn_like(inputs.leaves[leaf])
    _, (out_t, lse_t) = assert_same(lambda backend: jvp(lambda x: function(inputs, backend)({leaf: x}), (x,), (x_t,)))
    assert lse_t.count_nonzero() == 0 if leaf == "v" else lse_t.count_nonzero() > 0
    assert out_t.count_nonzero() > 0


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", [feature.name for feature in MOVING if feature.name != "dims_576"])
def test_the_tangent_has_the_digits_of_its_type(name, dtype):
    """Also looks at every access to memory."""
    inputs = drawn([name], ACROSS, dtype)
    tangents = like(inputs.leaves)
    with memory_guard():
        _, moved = jvp(function(inputs, "triton"), (inputs.leaves,), (tangents,))
    exact, wide = inputs.to(torch.float64), {key: x.double() for key, x in tangents.items()}
    _, want = jvp(function(exact, "reference"), (exact.leaves,), (wide,))
    for x, expected, type_ in zip(moved, want, (dtype, torch.float32), strict=True):
        assert x.dtype == type_
        error, limit = (x.double() - expected).norm() / expected.norm(), {torch.float32: 32}.get(type_, 3) * EPS[type_]
        assert error <= limit, f"off by {float(error):.1e}, limit {limit:.1e}"


@pytest.mark.few(1)
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_operands_of_another_type_and_a_large_mean_of_values(dtype, precise):
    q, k, v = (x.to(dtype) for x in qkv())
    leaves = q, v + 30, normal(70, 41).float(), normal(2).float(), normal(2, 2).float().abs()
    tangents = like(leaves)

    def of(backend):
        return lambda q, v, bias, sinks, slopes: plain(backend, bias=bias, sinks=sinks, alibi_slopes=slopes, precise=precise)(
            q, k.to(q.dtype), v)

    _, (out_t, _) = jvp(of("triton"), leaves, tangents)
    _, (want, _) = jvp(of("reference"), *(tuple(x.double() for x in xs) for xs in (leaves, tangents)))
    assert (out_t.double() - want).norm() <= (3 if precise else 30) * EPS[dtype] * want.norm()


BROADCASTS = {"pairs": (70, 41), "keys": (1, 41), "queries": (2, 70, 1), "heads": (2, 1, 1), "batch": (2, 1, 1, 41),
              "everything": (2, 2, 70, 41), "one": (1, 1, 1, 1), "a number": ()}


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", BROADCASTS.values(), ids=BROADCASTS)
def test_a_bias_moves_alone_however_it_broadcasts(shape):
    tensors, bias = qkv(), normal(*shape)
    for bias_t in (torch.randn_like(bias), normal().expand(shape)):
        assert_same(lambda backend, bias_t=bias_t: jvp(
            lambda x: plain(backend, bias=x, softcap=3.0)(*tensors), (bias,), (bias_t,)))


def by_tables(weights, table):
    """A score function that reads one tensor by batch and head, and another by what it computes of the pair."""
    return lambda score, b, h, i, j: score * table[h, (3 * i + j * j) % 7].cos() + weights[b, h] * (score * 0.3).sin()


@pytest.mark.few(1)
@pytest.mark.parametrize("moving", [("q", "weights", "table"), ("table",), ("weights",)], ids=str)
def test_the_tangent_of_what_functions_capture(moving):
    q, k, v = qkv()
    leaves = {"q": q, "weights": normal(2, 2), "table": normal(2, 7)}
    moved = {name: leaves[name] for name in moving}
    tangents = {name: torch.randn_like(x.mT).mT for name, x in moved.items()}

    def of(backend):
        def run(some):
            q, weights, table = {**leaves, **some}.values()
            return plain(backend, score_mod=[by_tables(weights, table), NEAR(weights[:, :, None, None], 0.75)])(q, k, v)
        return jvp(run, (moved,), (tangents,))

    assert_same(of)


WITHOUT_KEY = {
    "mask": {"mask": torch.arange(70)[:, None] != 7}, "lengths": {"key_lengths": torch.tensor([0, 35])},
    "bias": {"bias": torch.zeros(70, 41).double().masked_fill(torch.arange(70)[:, None] == 7, -torch.inf)},
    "causal": {"causal": True, "softcap": 3.0}, "document": {"mask_mod": lambda b, h, i, j: (i != 7) & ((i + j) % 3 != 0)},
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", WITHOUT_KEY)
def test_rows_without_a_key_do_not_move(name):
    tensors = qkv()
    (_, lse), moved = assert_same(lambda backend: jvp(plain(backend, **WITHOUT_KEY[name]), tensors, tensors))
    rows = lse == -torch.inf
    assert rows.any()
    assert all((x[rows] == 0).all() for x in moved)


@pytest.mark.few(1)
@pytest.mark.parametrize("sink", [-torch.inf, -700.0, 4.0])
def test_a_row_without_a_key_moves_with_its_sink(sink):
    leaves = *qkv(batch=1), torch.full((2,), sink, dtype=torch.float64)
    tangents = like(leaves)
    assert_same(lambda backend: jvp(lambda *x: plain(backend, sinks=x[3], **WITHOUT_KEY["mask"])(*x[:3]), leaves, tangents))


@pytest.mark.few(1)
@pytest.mark.parametrize("level", [-1e5, 1e5])
def test_the_tangent_under_an_extreme_lse(level):
    tensors, bias = qkv(batch=1), torch.full((1, 41), level, dtype=torch.float64)
    _, moved = assert_same(lambda backend: jvp(plain(backend, bias=bias, softcap=3.0, causal=True), tensors, tensors))
    assert all(x.count_nonzero() > 0 for x in moved)


def test_what_lies_beyond_the_keys_or_is_masked_does_not_move_a_row():
    q, k, v = qkv()
    lengths, mask = torch.tensor([33, 0]), torch.rand(70, 41) < 0.7
    beyond = (torch.arange(41) >= lengths[:, None])[:, None, :, None]
    tangents = like((q, k, v, normal(70, 41)))
    hidden = tangents[0], *(x.masked_fill(beyond, torch.nan) for x in tangents[1:3]), tangents[3].masked_fill(~mask, torch.inf)

    def run(q, k, v, bias):
        return plain("triton", bias=bias, mask=mask, key_lengths=lengths)(q, k, v)

    leaves = q, k, v, torch.zeros(70, 41, dtype=torch.float64)
    assert_close(jvp(run, leaves, hidden), jvp(run, leaves, tangents))


@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (2, 1, 1)])
def test_tangents_of_sizes_without_elements(sizes):
    batch, n_queries, n_keys = sizes
    tensors = qkv(n_queries, n_keys, dim=1, dim_v=3, batch=batch)
    for more in ({}, {"causal": True, "sinks": normal(2), "softcap": 2.0}):
        assert_same(lambda backend, more=more: jvp(plain(backend, **more), tensors, tensors))


def dual(backend, tensors, tangents, **arguments):
    """The tangents of (out, lse), by dual numbers; a tangent of None makes none."""
    with forward_ad.dual_level():
        made = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
        return [forward_ad.unpack_dual(x).tangent for x in plain(backend, **arguments)(*made)]


@pytest.mark.few(1)
@pytest.mark.parametrize("lie", ["expanded", "transposed", "reversed", "columns"])
def test_tangents_lie_anywhere_in_memory(lie):
    tensors = qkv()
    tangents = {
        "expanded": lambda x: x[:1, :, :, :1].expand(x.shape), "transposed": lambda x: x.mT.contiguous().mT,
        "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "columns": lambda x: torch.cat((x, x), 3)[..., ::2],
    }[lie]
    along = [tangents(x) for x in like(tensors)]
    assert_same(lambda backend: dual(backend, tensors, along, causal=True))
    assert_same(lambda backend: dual(backend, [tangents(x) for x in tensors], [None, along[1], None]))


def test_dual_numbers_beside_gradients():
    """Inputs that want gradients give the same tangents, and values of within the level give gradients after it."""
    (q, k, v), q_t = qkv(), normal(2, 2, 70, 9)

    def of(backend):
        leaf = q.clone().requires_grad_()
        with forward_ad.dual_level():
            out, moved = forward_ad.unpack_dual(attention(forward_ad.make_dual(leaf, q_t), k, v, backend=backend))
        return out.detach(), moved.detach(), *torch.autograd.grad(out.sin().sum(), leaf)

    out, moved, _ = assert_same(of)
    assert_close([out, moved], [x[0] for x in jvp(plain("triton"), (q, k, v), (q_t, 0 * k, 0 * v))])


def test_jacobians_both_ways():
    tensors = qkv(2, 3, 1, 1, 3, 2, 1)
    for jacobian in (jacfwd, jacrev):
        assert_same(lambda backend, jacobian=jacobian: jacobian(plain(backend, causal=True, softcap=2.0), (0, 1, 2))(*tensors))
    assert_same(lambda backend: linearize(plain(backend), *tensors)[1](*(x.sin() for x in tensors)))


BATCHED = [(feature.name, which) for feature in MOVING if feature.name not in ("dims_192", "dims_576")
           for which in ("all", "qkv", *(("operands",) if feature.gradients else ()))]


def batch_of(inputs, which):
    """Leaves and tangents of three calls, and their in_dims: not all are batched, and a tangent where its leaf is not."""
    names = {"all": inputs.leaves.keys(), "qkv": set("qkv"), "operands": inputs.leaves.keys() - set("qkv")}[which]
    dims = {name: 0 if name in names else None for name in inputs.leaves}
    leaves = {name: torch.stack((x, 0.7 * x + 0.1, 1.2 * x)) if name in names else x for name, x in inputs.leaves.items()}
    dims_t = {name: 0 if dim is None or which == "all" else None for name, dim in dims.items()}
    tangents = {name: normal(3, *x.shape) if dims_t[name] == 0 else torch.randn_like(x) for name, x in inputs.leaves.items()}
    return leaves, dims, tangents, dims_t


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "which"), BATCHED)
def test_vmap_with_jvp_and_grad_of_every_feature(name, which):
    inputs = drawn([name], SMALL)
    leaves, dims, tangents, dims_t = batch_of(inputs, which)
    outer = like(leaves)

    def of(backend):
        run = function(inputs, backend)
        many = vmap(run, (dims,), randomness="different")
        return (vmap(lambda x, t: jvp(run, (x,), (t,)), (dims, dims_t), randomness="different")(leaves, tangents),
                vmap(grad(lambda x: loss(*run(x))), (dims,), randomness="different")(leaves),
                jvp(many, (leaves,), (outer,)), grad(lambda x: loss(*many(x)))(leaves) if which == "qkv" else ())

    assert_same(of)


@pytest.mark.few(1)
@pytest.mark.parametrize("dims", [(0, None, None), (0, 0, 0), (None, 0, 0), (1, -1, None), (None, None, -2), (-1, 2, 1)],
                         ids=str)
def test_vmap_takes_any_dimension(dims):
    tensors = [x if dim is None else torch.stack((x, x.cos(), x.sin())).movedim(0, dim).contiguous()
               for x, dim in zip(qkv(batch=1), dims, strict=True)]
    assert_same(lambda backend: vmap(plain(backend), dims, out_dims=(1, 0))(*tensors))
    assert_same(lambda backend: vmap(grad(lambda *x: loss(*plain(backend)(*x)), (0, 1, 2)), dims)(*tensors))


def test_vmap_within_vmap_and_of_empty_calls():
    q, k, v = (torch.stack((x, x.sin())) for x in qkv(5, 6))

    def inner(backend):
        return vmap(plain(backend, causal=True), (0, None, None))

    assert_same(lambda backend: vmap(inner(backend), (None, 0, 0))(q, k, v))
    assert_same(lambda backend: vmap(grad(lambda q: loss(*inner(backend)(q, k[0], v[0]))))(torch.stack((q, q.cos()))))
    assert_same(lambda backend: vmap(plain(backend))(q[:, :0], k[:, :0], v[:, :0]))


def test_vmap_of_no_calls():
    tensors = [x[None][:0] for x in qkv(5, 6)]
    assert_same(lambda backend: vmap(plain(backend, causal=True))(*tensors))


OPERANDS = {  # beside those of the features
    "bias of heads": ((2, 1, 9), lambda x: {"bias": x}), "a number as bias": ((), lambda x: {"bias": x, "softcap": 2.0}),
    "bias of one": ((1, 1, 1, 1), lambda x: {"bias": x}), "bias of queries": ((7, 1), lambda x: {"bias": x}),
    "slopes of heads": ((2,), lambda x: {"alibi_slopes": x}), "one weight": ((9,), lambda x: {"score_weight": x}),
    "key lengths": ((2,), lambda x: {"key_lengths": (x * 4 + 4).long()}), "mask": ((7, 9), lambda x: {"mask": x > -1}),
    "mask mod": ((1, 1, 1, 9), lambda x: {"mask_mod": COMB((x > -1).int(), 3)}),
    "document": ((9,), lambda x: {"mask_mod": fused_attn.document_mask((x > 0).long(), (x[2:] > 0).long())}),
    "mods": ((2, 9), lambda x: {"score_mod": [by_tables(x[:, :2], x[:, 2:]), NEAR(x[:, None], 0.5)]}),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", OPERANDS)
def test_vmap_of_calls_with_operands_of_their_own(name):
    (q, k, v), (shape, arguments) = qkv(7, 9), OPERANDS[name]
    x, many = normal(3, *shape), torch.stack((q, q.cos(), 2 * q))
    for given, dims in (((x, many), (0, 0)), ((x, q), (0, None)), ((x[1], many), (None, 0))):
        assert_same(lambda backend, given=given, dims=dims: vmap(
            lambda x, q: plain(backend, **arguments(x))(q, k, v), dims)(*given))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["score", "mask", "table"])
def test_functions_of_the_batch_index_count_within_each_call(name):
    (q, k, v), table = qkv(7, 9), normal(2, 5)
    arguments = {
        "score": {"score_mod": lambda score, b, h, i, j: score * (1 + 0.5 * b)},
        "mask": {"mask_mod": lambda b, h, i, j: (i * j + b) % 3 != 0},
        "table": {"score_mod": lambda score, b, h, i, j: score * table[b, (i * j + i) % 5]},
    }[name]
    many = torch.stack((q, q.cos(), 2 * q))
    assert_same(lambda backend: vmap(lambda q: jvp(lambda q: plain(backend, **arguments)(q, k, v), (q,), (q.sin(),)))(many))
    assert_same(lambda backend: vmap(grad(lambda q: loss(*plain(backend, **arguments)(q, k, v))))(many))


def test_vmap_of_the_gradient_of_what_a_function_looks_up():
    (q, k, v), weights, table = qkv(7, 9), normal(2, 2), normal(2, 7)

    def of(backend):
        def run(q, table):
            return loss(*plain(backend, score_mod=by_tables(weights, table), deterministic=False)(q, k, v))
        both = torch.stack((q, q.cos())), torch.stack((table, 2 * table))
        return vmap(grad(run, (0, 1)))(*both), vmap(grad(run, (0, 1)), (0, None))(both[0], table)

    assert_same(of)


@pytest.mark.few(1)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap_draws_dropout_as_it_is_told(randomness):
    tensors = [x.expand(3, *x.shape) for x in qkv(7, 9)]

    def of(backend):
        run = plain(backend, dropout_p=0.4)
        torch.manual_seed(3)
        return [vmap(f, randomness=randomness)(*tensors) for f in (
            lambda *x: jvp(run, x, x), grad(lambda *x: loss(*run(*x)), (0, 1, 2)))]

    ((out, _), _), _ = assert_same(of)
    assert torch.equal(out[0], out[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(plain("triton", dropout_p=0.4))(*tensors)


@pytest.mark.few(1)
@pytest.mark.parametrize("more", [{}, {"causal": True, "softcap": 2.0}, {"window": (5, 0), "precise": True}], ids=str)
def test_vmap_over_packed_sequences_of_many_tiles(more):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 60, 60, 140], [0, 30, 40, 110]))
    q, k, v = normal(2, 143, 2, 9), normal(112, 1, 9), normal(112, 1, 11)

    def of(backend):
        def run(q, k, v):
            return attention_varlen(q, k, v, cu_q, cu_k, 80, 70, sinks=torch.ones(2), return_lse=True, backend=backend, **more)
        return (vmap(lambda q, t: jvp(run, (q, k, v), (t, k.sin(), v.cos())), (0, 0))(q, q.sin()),
                vmap(grad(lambda q: loss(*run(q, k, v))))(q))

    assert_same(of)
