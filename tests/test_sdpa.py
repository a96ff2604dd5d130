"""scaled_dot_product_attention against torch's own: values, gradients, strides, errors; on the CPU's path and the kernels'."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from fused_attn import attention, scaled_dot_product_attention
from fused_attn.plan import backends
from fused_attn.run import autograd


@pytest.fixture(params=["default", pytest.param("kernels", marks=pytest.mark.kernels)])
def path(request, monkeypatch):
    """The default path of CPU tensors, or the one that GPU tensors take, with the kernels in the interpreter."""
    if request.param == "kernels":
        monkeypatch.setattr(backends.settings, "BACKEND", "triton")
    return request.param


@pytest.fixture
def ran(monkeypatch):
    """One entry for every call that the kernels answered."""
    calls = []
    real = autograd.attention

    def attention(q, k, v, spec, others):
        calls.extend([] if spec.blocked else [spec])
        return real(q, k, v, spec, others)

    monkeypatch.setattr(autograd, "attention", attention)
    return calls


def normal(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def compare(q, k, v, *args, tolerance=1e-12, others=(), theirs=F.scaled_dot_product_attention, **named):
    """Values, types, strides and the gradients of everything that requires one, ours and ``theirs``."""
    wrt = [x for x in (q, k, v, *others) if x.requires_grad]
    results = []
    for function in (theirs, scaled_dot_product_attention):
        torch.manual_seed(1)
        out = function(q, k, v, *args, **named)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, wrt, dout, allow_unused=True)) if wrt else (out,))
    (expected, *their_grads), (ours, *our_grads) = results
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return ours, expected


# --- what the kernels run ---

FUSED = {  # shapes of q, k, v, and arguments
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}),
    "causal, as many keys": ((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), {"is_causal": True}),
    "causal, more keys": ((1, 2, 5, 8), (1, 2, 9, 8), (1, 2, 9, 8), {"is_causal": True}),
    "causal, fewer keys": ((1, 2, 9, 8), (1, 2, 5, 8), (1, 2, 5, 8), {"is_causal": True}),
    "scale": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": 0.7}),
    "scale 0": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": 0.0}),
    "scale as int": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": 2}),
    "negative scale": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": -0.5}),
    "Ev > E": ((1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 9), {}),
    "Ev < E": ((1, 2, 5, 9), (1, 2, 7, 9), (1, 2, 7, 4), {"is_causal": True}),
    "grouped": ((1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"enable_gqa": True}),
    "grouped, one key head": ((1, 4, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8), {"enable_gqa": True, "is_causal": True}),
    "enable_gqa without groups": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"enable_gqa": True}),
    "no queries": ((1, 2, 0, 8), (1, 2, 7, 8), (1, 2, 7, 8), {}),
    "no keys": ((1, 2, 5, 8), (1, 2, 0, 8), (1, 2, 0, 8), {}),
    "no keys, causal": ((1, 2, 5, 8), (1, 2, 0, 8), (1, 2, 0, 8), {"is_causal": True}),
    "no batch": ((0, 2, 5, 8), (0, 2, 7, 8), (0, 2, 7, 8), {}),
    "head dims 576 and 512": ((1, 2, 5, 576), (1, 2, 7, 576), (1, 2, 7, 512), {"is_causal": True}),
}


@pytest.mark.parametrize("case", FUSED)
def test_what_the_kernels_run(case, path, ran):
    *shapes, named = FUSED[case]
    compare(*(normal(*shape) for shape in shapes), **named)
    assert len(ran) == (path == "kernels")


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_dtypes(dtype, tolerance, path, ran):
    q, k, v = normal(1, 2, 5, 8, dtype=dtype), normal(1, 2, 7, 8, dtype=dtype), normal(1, 2, 7, 8, dtype=dtype)
    compare(q, k, v, None, 0.0, True, tolerance=tolerance)
    assert len(ran) == (path == "kernels")


def test_parameters_run_on_the_kernels(path, ran):
    compare(*(torch.nn.Parameter(normal(1, 2, 5, 8)) for _ in range(3)))
    assert len(ran) == (path == "kernels")


LAYOUTS = {
    "heads before length": lambda: normal(2, 3, 5, 8, grad=False),
    "length before heads": lambda: normal(2, 5, 3, 8, grad=False).transpose(1, 2),
    "packed with k and v": lambda: normal(2, 5, 3, 3, 8, grad=False)[:, :, 0].transpose(1, 2),
    "batch after length": lambda: normal(5, 2, 3, 8, grad=False).permute(1, 2, 0, 3),
    "every second column": lambda: normal(2, 3, 5, 16, grad=False)[..., ::2],
    "expanded batch": lambda: normal(1, 3, 5, 8, grad=False).expand(2, 3, 5, 8),
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_torchs_strides(layout):
    # Code written for torch calls out.transpose(1, 2).view(B, N, -1), which only some strides allow.
    ours, theirs = compare(*(LAYOUTS[layout]() for _ in range(3)))
    assert ours.stride() == theirs.stride()


BROADCAST = {
    "rank 2": ((5, 8), (7, 8), (7, 6)), "rank 3": ((2, 5, 8), (2, 7, 8), (2, 7, 8)),
    "rank 5": ((2, 1, 3, 5, 8), (2, 1, 3, 7, 8), (2, 1, 3, 7, 8)),
    "rank 6, batches broadcast": ((2, 1, 2, 3, 5, 8), (3, 1, 3, 7, 8), (1, 1, 2, 1, 7, 8)),
    "one batch of keys": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)), "one key head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one query head": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), "v alone": ((2, 3, 5, 8), (2, 3, 7, 8), (1, 1, 7, 8)),
    "one batch of queries": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), "k alone": ((1, 1, 5, 8), (2, 3, 7, 8), (1, 1, 7, 8)),
    "ranks differ": ((2, 3, 5, 8), (3, 7, 8), (7, 8)), "queries of rank 2": ((5, 8), (3, 7, 8), (2, 1, 7, 8)),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", BROADCAST)
def test_ranks_and_broadcasting(case, is_causal, path, ran):
    ours, theirs = compare(*(normal(*shape) for shape in BROADCAST[case]), is_causal=is_causal)
    assert ours.shape == theirs.shape
    assert len(ran) == (path == "kernels")


@pytest.mark.parametrize("heads", [(4, 2, 1), (6, 2, 3), (4, 4, 2)], ids=str)
def test_unequal_key_and_value_heads(heads, path, ran):
    hq, hk, hv = heads
    compare(normal(1, hq, 5, 8), normal(1, hk, 7, 8), normal(1, hv, 7, 8), enable_gqa=True)
    assert len(ran) == (path == "kernels")


def test_grouped_heads_without_a_batch(path, ran):
    compare(normal(4, 5, 8), normal(2, 7, 8), normal(2, 7, 8), enable_gqa=True)
    assert len(ran) == (path == "kernels")


MASKS = [  # shapes of q, k and v, of the mask
    *(((2, 3), shape) for shape in ((5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7), (1, 1))),
    ((), (5, 7)), ((), (1, 7)), ((3,), (5, 7)), ((3,), (3, 1, 7)), ((3,), (1, 5, 1)),
    *(((2, 2, 3), shape) for shape in ((5, 7), (3, 5, 7), (2, 1, 5, 7), (2, 1, 3, 5, 1), (1, 2, 1, 5, 7), (2, 2, 3, 5, 7))),
]


@pytest.mark.few(5)
@pytest.mark.parametrize(("lead", "shape"), MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float with gradient", "float32 with -inf", "float32 for fp64"])
def test_masks(kind, lead, shape, path, ran):
    q, k, v = normal(*lead, 5, 8), normal(*lead, 7, 8), normal(*lead, 7, 8)
    keep = torch.rand(shape) < 0.6
    if kind == "bool":
        compare(q, k, v, keep)
    elif kind == "float32 for fp64":
        compare(q, k, v, normal(*shape, dtype=torch.float32, grad=False))
    elif kind == "float with gradient":
        mask = normal(*shape)
        compare(q, k, v, mask, others=[mask])
    else:
        q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
        compare(q, k, v, torch.zeros(shape).masked_fill(~keep, -math.inf), tolerance=1e-5)
    assert len(ran) == (path == "kernels")


@pytest.mark.usefixtures("path")
def test_fully_masked_rows():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    ours, _ = compare(normal(1, 2, 5, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 8), mask)
    assert (ours[:, :, 2] == 0).all()


@pytest.mark.usefixtures("path")
def test_causal_bias_object():
    q, k, v = normal(1, 2, 3, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 8)
    ours, _ = compare(q, k, v, causal_lower_right(3, 7))
    explicit = torch.ones(3, 7, dtype=torch.bool).tril(diagonal=4)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, explicit))


class Recorded(torch.Tensor):
    """Remembers every function that it is handed to."""

    functions = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.functions = (*cls.functions, func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("where", ["query", "attn_mask"])
def test_tensor_subclasses_receive_torchs_function(where):
    arguments = {name: normal(1, 2, 5, 8, grad=False) for name in ("query", "key", "value")} | {"attn_mask": torch.zeros(5, 5)}
    Recorded.functions = ()
    scaled_dot_product_attention(**arguments | {where: arguments[where].as_subclass(Recorded)})
    assert F.scaled_dot_product_attention in Recorded.functions


# --- dropout ---


def by_reference(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, enable_gqa=False, **named):
    """torch's function by the reference in fp64: its dropout mask is the kernels', which torch's is not."""
    dtype, q, k, v = q.dtype, q.double(), k.double(), v.double()
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    heads = [x.shape[-3] for x in (q, k, v)] if enable_gqa else [max(x.shape[-3] for x in (q, k, v))] * 3
    lead = (*batch, heads[0])
    q, k, v = (x.expand(*batch, n, *x.shape[-2:]).flatten(0, -4) if batch else x.expand(n, *x.shape[-2:])[None]
               for x, n in zip((q, k, v), heads, strict=True))
    if is_causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if attn_mask is not None:
        named["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    out = attention(q, k, v, dropout_p=dropout_p, backend="reference", **named)
    return out.to(dtype).reshape(*lead, *out.shape[2:])


DROPPED = {
    "plain": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": torch.ones(16, 20).tril(2) > 0},
    "grouped": {"enable_gqa": True},
    "bias": {"attn_mask": torch.linspace(-2, 2, 20, dtype=torch.float64).requires_grad_()[None]},
}


@pytest.mark.few(7)
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("case", DROPPED)
def test_dropout(case, p, path, ran):
    named = DROPPED[case]
    q, k, v = normal(2, 4, 16, 8), *(normal(2, 2 if case == "grouped" else 4, 20, 8) for _ in range(2))
    others = [x for x in named.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    theirs = by_reference if path == "kernels" else F.scaled_dot_product_attention
    ours, _ = compare(q, k, v, dropout_p=p, others=others, theirs=theirs, **named)
    assert (p < 1) == bool((ours != 0).any())
    assert len(ran) == (path == "kernels")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_of_the_weights_and_their_mean(p):
    """Equal weights of 1/64 and unit vectors as values: the output is the matrix of dropped weights."""
    q = torch.zeros(2, 4, 64, 64, dtype=torch.float64)
    v = torch.eye(64, dtype=torch.float64).expand(2, 4, 64, 64)

    def draw(seed):
        torch.manual_seed(seed)
        return scaled_dot_product_attention(q, q, v, dropout_p=p)

    dropped = draw(1)
    stays = dropped != 0
    torch.testing.assert_close(dropped[stays], torch.full_like(dropped[stays], 1 / 64 / (1 - p)), rtol=1e-12, atol=0)
    deviation = math.sqrt(p * (1 - p) / stays.numel())
    assert abs(float(stays.double().mean()) - (1 - p)) < 5 * deviation
    assert abs(float(dropped.sum(-1).mean()) - 1) < 5 * deviation / (1 - p)
    assert torch.equal(draw(1), dropped)
    # Seeds, batch entries, heads, queries and keys draw independently: two masks agree where p^2 + (1 - p)^2 says.
    others = (draw(2) != 0, stays.roll(1, 0), stays.roll(1, 1), stays.roll(1, 2), stays.roll(1, 3), stays.roll(4, 3), stays.mT)
    for other in others:
        assert abs(float((stays == other).double().mean()) - (p * p + (1 - p) ** 2)) < 0.02


# --- what they leave to torch ---

LEFT = {
    "no columns": ((1, 2, 5, 0), (1, 2, 7, 0), (1, 2, 7, 8), {}), "no heads": ((1, 0, 5, 8), (1, 0, 7, 8), (1, 0, 7, 8), {}),
    "no columns of v": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 0), {}),
    "wide heads": ((1, 2, 5, 577), (1, 2, 7, 577), (1, 2, 7, 8), {}),
    "wide values, dropout": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 577), {"dropout_p": 0.5}),
    "scale as bool": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": True}),
    "mask and is_causal": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"is_causal": True, "attn_mask": torch.rand(5, 7) < 0.9}),
    "a scale below fp32": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": 1e-40}),
    "a scale beyond fp32": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"scale": -1e38}),
    "dropout as bool": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"dropout_p": True}),
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", LEFT)
def test_what_the_kernels_leave_to_torch(case, ran):
    *shapes, named = LEFT[case]
    tensors = [normal(*shape) for shape in shapes]
    try:
        F.scaled_dot_product_attention(*tensors, **named)
    except RuntimeError as theirs:  # torch 2.14 refuses a mask beside is_causal, which earlier ones take
        with pytest.raises(type(theirs), match="is_causal"):
            scaled_dot_product_attention(*tensors, **named)
    else:
        compare(*tensors, **named)
    assert ran == []


# --- the call itself ---


def test_signature():
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    assert [(name, p.default, p.kind) for name, p in parameters.items()] == [
        *((name, default, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name, default in (
            ("query", inspect.Parameter.empty), ("key", inspect.Parameter.empty), ("value", inspect.Parameter.empty),
            ("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False))),
        ("scale", None, inspect.Parameter.KEYWORD_ONLY), ("enable_gqa", False, inspect.Parameter.KEYWORD_ONLY)]


Q, K, V = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
KEEP = torch.ones(5, 7, dtype=torch.bool)
BAD = {
    "query list": (([1.0], K, V), {}), "query None": ((None, K, V), {}), "key list": ((Q, [1.0], V), {}),
    "rank 1": ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}), "integers": ((Q.long(), Q.long(), Q.long()), {}),
    "dtypes differ": ((Q, Q.double(), Q), {}), "devices differ": ((Q, Q.to("meta"), Q), {}),
    "head dims differ": ((Q, Q[..., :4], Q), {}),
    "heads do not broadcast": ((Q, K, V), {}), "heads do not divide": ((Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}),
    "batches do not broadcast": ((Q.expand(2, 4, 5, 8), Q.expand(3, 4, 5, 8), Q.expand(3, 4, 5, 8)), {}),
    "mask shape": ((Q, Q, Q, KEEP[:, :4]), {}), "mask of a larger batch": ((Q, Q, Q, KEEP[:, :5].expand(3, 1, 5, 5)), {}),
    "mask of more queries": ((Q[:, :, :1], Q, Q, KEEP[:, :5]), {}), "mask of more heads": ((Q[:, :1], Q[:, :1], Q[:, :1],
                                                                                          KEEP[:, :5].expand(4, 5, 5)), {}),
    "mask of more dimensions": ((Q, Q, Q, KEEP[:, :5].expand(1, 1, 1, 5, 5)), {}),
    "mask dtype": ((Q, Q, Q, KEEP[:, :5].long()), {}), "mask rank": ((Q, Q, Q, KEEP[0, :5]), {}),
    "mask is a list": ((Q, Q, Q, [[True]]), {}), "dropout above 1": ((Q, Q, Q, None, 1.5), {}),
    "dropout below 0": ((Q, Q, Q, None, -0.5), {}), "dropout None": ((Q, Q, Q, None, None), {}),
    "scale is a string": ((Q, Q, Q), {"scale": "a"}), "is_causal None": ((Q, Q, Q, None, 0.0, None), {}),
    "grouped heads of two dimensions": ((Q[0, 0], Q[0, 0], Q[0, 0]), {"enable_gqa": True}),
    "grouped heads, one of two dimensions": ((Q, Q[0, 0], Q[0, 0]), {"enable_gqa": True}),
    "enable_gqa None": ((Q, Q, Q), {"enable_gqa": None}), "unknown name": ((Q, Q, Q), {"causal": True}),
    "too many positions": ((Q, Q, Q, None, 0.0, False, 0.5), {}), "query twice": ((Q, Q, Q), {"query": Q}),
    "value missing": ((Q, Q), {}),
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", BAD)
def test_errors_are_torchs(case):
    positional, named = BAD[case]
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as theirs:
        F.scaled_dot_product_attention(*positional, **named)
    with pytest.raises(theirs.type):
        scaled_dot_product_attention(*positional, **named)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_own_samples(dtype, path, ran):
    pytest.importorskip("expecttest", reason="torch's test database needs it")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = [*info.sample_inputs("cpu", dtype, requires_grad=True)]
    assert len(samples) >= 20
    for sample in samples:
        mask = sample.kwargs.get("attn_mask")
        others = [mask] if mask is not None and mask.requires_grad else []
        drops = sample.kwargs.get("dropout_p", 0) > 0
        # Scores of these samples reach 100: with dropout torch's own fp32 gradients are up to 8e-5 from its fp64.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4 if drops else 2e-5
        compare(sample.input, *sample.args, others=others, tolerance=tolerance,
                theirs=by_reference if drops and path == "kernels" else F.scaled_dot_product_attention, **sample.kwargs)
    assert len(ran) == (len(samples) if path == "kernels" else 0)
