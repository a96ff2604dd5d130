"""scaled_dot_product_attention against torch's own: values, gradients, strides, errors; on the CPU's path and the kernels'."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from fused_attn import autograd, dispatch, scaled_dot_product_attention


@pytest.fixture(params=["default", pytest.param("kernels", marks=pytest.mark.kernels)])
def path(request, monkeypatch):
    """The default path of CPU tensors, or the one that GPU tensors take, with the kernels in the interpreter."""
    if request.param == "kernels":
        monkeypatch.setattr(dispatch.settings, "BACKEND", "triton")
    return request.param


@pytest.fixture
def ran(monkeypatch):
    """One entry for every call that the kernels answered."""
    calls = []
    real = autograd.attention
    monkeypatch.setattr(autograd, "attention", lambda *args: calls.append(args) or real(*args))
    return calls


def normal(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def compare(q, k, v, *args, tolerance=1e-12, others=(), **named):
    """Values, types, strides and the gradients of everything that requires one."""
    wrt = [x for x in (q, k, v, *others) if x.requires_grad]
    results = []
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        torch.manual_seed(1)
        out = function(q, k, v, *args, **named)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, wrt, dout, allow_unused=True)) if wrt else (out,))
    (theirs, *their_grads), (ours, *our_grads) = results
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return ours, theirs


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
    "no heads": ((1, 0, 5, 8), (1, 0, 7, 8), (1, 0, 7, 8), {}),
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


# --- what they leave to torch ---

BROADCAST = {
    "rank 2": ((5, 8), (7, 8), (7, 6)), "rank 3": ((2, 5, 8), (2, 7, 8), (2, 7, 8)),
    "rank 5": ((2, 1, 3, 5, 8), (2, 1, 3, 7, 8), (2, 1, 3, 7, 8)),
    "one batch of keys": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)), "one key head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one query head": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), "v alone": ((2, 3, 5, 8), (2, 3, 7, 8), (1, 1, 7, 8)),
    "ranks differ": ((2, 3, 5, 8), (3, 7, 8), (7, 8)), "no columns": ((1, 2, 5, 0), (1, 2, 7, 0), (1, 2, 7, 8)),
    "no columns of v": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 0)),
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", BROADCAST)
def test_ranks_and_broadcasting(case, is_causal, ran):
    compare(*(normal(*shape) for shape in BROADCAST[case]), is_causal=is_causal)
    assert ran == []


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("heads", [(4, 2, 1), (6, 2, 3), (4, 4, 2)], ids=str)
def test_unequal_key_and_value_heads(heads):
    hq, hk, hv = heads
    compare(normal(1, hq, 5, 8), normal(1, hk, 7, 8), normal(1, hv, 7, 8), enable_gqa=True)


@pytest.mark.usefixtures("path")
def test_grouped_heads_without_a_batch():
    compare(normal(4, 5, 8), normal(2, 7, 8), normal(2, 7, 8), enable_gqa=True)


MASK_SHAPES = [(5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7)]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float with gradient", "float32 with -inf"])
def test_masks(kind, shape):
    q, k, v = normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 8)
    keep = torch.rand(shape) < 0.6
    if kind == "bool":
        compare(q, k, v, keep)
    elif kind == "float with gradient":
        mask = normal(*shape)
        compare(q, k, v, mask, others=[mask])
    else:
        q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
        compare(q, k, v, torch.zeros(shape).masked_fill(~keep, -math.inf), tolerance=1e-5)


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


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p, ran):
    q, k, v = (normal(1, 2, 16, 8) for _ in range(3))
    ours, theirs = compare(q, k, v, None, p)
    assert torch.equal(ours, theirs)
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
    "mask shape": ((Q, Q, Q, KEEP[:, :4]), {}),
    "mask dtype": ((Q, Q, Q, KEEP[:, :5].long()), {}), "mask rank": ((Q, Q, Q, KEEP[0, :5]), {}),
    "mask is a list": ((Q, Q, Q, [[True]]), {}), "dropout above 1": ((Q, Q, Q, None, 1.5), {}),
    "dropout below 0": ((Q, Q, Q, None, -0.5), {}), "dropout None": ((Q, Q, Q, None, None), {}),
    "scale is a string": ((Q, Q, Q), {"scale": "a"}), "is_causal None": ((Q, Q, Q, None, 0.0, None), {}),
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


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_own_samples(dtype, ran):
    pytest.importorskip("expecttest", reason="torch's test database needs it")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = [*info.sample_inputs("cpu", dtype, requires_grad=True)]
    assert len(samples) >= 20
    for sample in samples:
        mask = sample.kwargs.get("attn_mask")
        others = [mask] if mask is not None and mask.requires_grad else []
        compare(sample.input, *sample.args, others=others, tolerance=1e-12 if dtype == torch.float64 else 2e-5, **sample.kwargs)
    assert ran or dispatch.settings.BACKEND is None
