"""torch.compile(fullgraph=True) of every feature with every other: static and dynamic, on the kernels and on what answers CPU
tensors, values and gradients against the same call made eagerly. And what else traces a call: lengths that are still on the
device, torch.jit.trace, torch's own signature."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.features import BY_NAME, COMBINED, Call, Shape, covering
from torch._dynamo.testing import CompileCounterWithBackend

import fused_attn
from fused_attn import attention_varlen, scaled_dot_product_attention, settings

pytestmark = pytest.mark.kernels

SMALL = Shape(batch=2, heads=2, kv_heads=2, n_queries=10, n_keys=10, dim=8, dim_v=8)
WIDE = ("dims_192", "dims_576")  # head dims, which tracing does not look at


def combinations(*without):
    """Calls in which every feature, but for these, meets every other one."""
    return [Call(names, SMALL) for names in covering(8, tuple(f for f in COMBINED if f.name not in (*WIDE, *without)))]


COMBINATIONS = combinations()
KERNELS, CPU = ("triton", True), (None, False)  # backend, return_lse: with the LSE torch's own kernel answers nothing


def some_of_each(calls):
    """The first of ``calls`` in which some feature has not occurred yet."""
    seen = set()
    for call in calls:
        if not seen >= {*call.features}:
            seen |= {*call.features}
            yield call


# Additive scores with one other: they take the interpreter ten times as long as others.
FAST = [Call(("additive", "causal"), SMALL), *some_of_each(combinations("additive"))]
ALONE = ["plain", "bias", "key_lengths", "packed", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "causal", "window", "mask", "gqa", "dims", "dropout", "seqused", "lengths"))]


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def check_same(call, way, dynamic):
    """One graph, whose values and gradients are those of the eager call to 12 digits."""
    backend, return_lse = way
    inputs = call.draw(torch.float64)
    names, _ = list(inputs.leaves), inputs.cu  # before anything is traced

    def attend(tensors, backend=backend):
        result = inputs.attention(dict(zip(names, tensors, strict=True)), backend, return_lse=return_lse)
        return result if return_lse else (result,)

    # On a CPU, dropout of eager calls is torch's own mask; a graph draws from a seed, as the blocks do by name.
    eager = partial(attend, backend="blocked") if backend is None and "dropout" in call.features else attend
    results = []
    for function in (eager, compiled(attend, dynamic=dynamic)):
        torch.manual_seed(1)
        tensors = [x.detach().requires_grad_() for x in inputs.leaves.values()]
        outputs = function(tensors)
        grads = torch.autograd.grad(outputs, tensors, [inputs.dout, inputs.dlse][: len(outputs)], materialize_grads=True)
        results.append((*outputs, *grads))
    close(*reversed(results))


def test_every_feature_is_in_the_fast_selection():
    assert {name for call in FAST for name in call.features} == {name for call in COMBINATIONS for name in call.features}


ways = pytest.mark.parametrize("way", [KERNELS, CPU], ids=["kernels", "CPU"])
dynamics = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@pytest.mark.few(2)
@pytest.mark.parametrize(("call", "dynamic", "way"), [
    pytest.param(call, dynamic, way, marks=() if (dynamic, way == CPU) == (i % 2 == 1, i // 2 % 2 == 1) else pytest.mark.slow)
    for i, call in enumerate(FAST) for dynamic in (False, True) for way in (KERNELS, CPU)], ids=str)
def test_features_together_compile_whole(call, dynamic, way):
    """In the fast part each once, in turns: static and dynamic, on the kernels and on a CPU."""
    check_same(call, way, dynamic)


@pytest.mark.slow
@ways
@dynamics
@pytest.mark.parametrize("call", COMBINATIONS, ids=str)
def test_every_pair_of_features_compiles_whole(call, dynamic, way):
    check_same(call, way, dynamic)


@pytest.mark.few(1)
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ALONE)
def test_what_torchs_kernel_answers_compiles_whole(name, dynamic):
    """On a CPU: what meets in combinations is the reference's as a rule."""
    check_same(Call((name,), SMALL), CPU, dynamic)


@pytest.mark.slow
@dynamics
@ways
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in (*WIDE, "lse")])
def test_every_feature_alone_compiles_whole(name, dynamic, way):
    check_same(Call((name,), SMALL), way, dynamic)


# --- torch's own signature ---


SDPA = {  # heads of q, k and v, a mask, and arguments
    "plain": ((2, 2, 2), None, {}), "causal": ((2, 2, 2), None, {"is_causal": True}),
    "grouped": ((4, 2, 2), None, {"enable_gqa": True}), "unequal groups": ((12, 4, 6), None, {"enable_gqa": True}),
    "bool mask": ((2, 2, 2), torch.ones(5, 7).tril(2) > 0, {}),
    "bias": ((2, 2, 2), torch.linspace(-1, 1, 7).double()[None], {}),
}


@pytest.mark.few(3)
@pytest.mark.parametrize(("case", "dynamic", "backend"), [
    pytest.param(case, dynamic, backend, marks=() if dynamic == (backend is None) else pytest.mark.slow)
    for case in SDPA for dynamic in (False, True) for backend in ("triton", None)])
def test_torchs_signature_compiles_whole(case, dynamic, backend, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", backend)
    heads, mask, named = SDPA[case]
    inputs = [torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in zip(heads, (5, 7, 7), strict=True)]
    out = compiled(lambda *x: scaled_dot_product_attention(*x, mask, **named), dynamic=dynamic)(*inputs)
    want = F.scaled_dot_product_attention(*inputs, mask, **named)
    close(out, want)
    close(torch.autograd.grad(out.sin().sum(), inputs), torch.autograd.grad(want.sin().sum(), inputs))


# --- packed sequences whose lengths nobody has looked at ---

CU_Q, CU_K = (torch.tensor(starts, dtype=torch.int32) for starts in ([0, 4, 4, 10], [0, 3, 8, 13]))
SLOPES, TABLE = torch.linspace(0.1, 1, 2, dtype=torch.float64), torch.linspace(-1, 1, 24, dtype=torch.float64).view(12, 2)
FROM_THE_DEVICE = {  # arguments made of the longest lengths
    "plain": lambda n, m: {}, "causal": lambda n, m: {"causal": True}, "window": lambda n, m: {"window": (2, 1)},
    "alibi": lambda n, m: {"alibi_slopes": SLOPES, "softcap": 2.0},
    "t5": lambda n, m: {"bias": fused_attn.t5_bias(TABLE, n, m)},
    "bias": lambda n, m: {"bias": torch.arange(n).double()[:, None] * torch.linspace(-1, 1, 2)[:, None, None].double()},
    "relative": lambda n, m: {"bias": fused_attn.RelativeBias(torch.arange(n + m - 1).double().sin()[None])},
    "sinks, used": lambda n, m: {"sinks": SLOPES, "seqused_k": torch.tensor([2, 5, 1])},
}


@pytest.mark.few(3)
@ways
@pytest.mark.parametrize("case", FROM_THE_DEVICE)
def test_longest_lengths_from_the_device(case, way):
    x, y = (torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (12, 14))

    def attend(x, y, cu_q, cu_k):
        n, m = cu_q.diff().max().item(), cu_k.diff().max().item()
        return attention_varlen(x, y, y, cu_q, cu_k, n, m, backend=way[0], **FROM_THE_DEVICE[case](n, m))

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        out = compiled(attend)(x, y, CU_Q, CU_K)
    want = attend(x, y, CU_Q, CU_K)
    close(out, want)
    close(torch.autograd.grad(out.sin().sum(), (x, y)), torch.autograd.grad(want.sin().sum(), (x, y)))


@ways
def test_other_lengths_of_packed_sequences_compile_nothing(way):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def attend(x, cu):
        return attention_varlen(x, x, x, cu, cu, 8, 8, causal=True, backend=way[0])

    call = torch.compile(attend, fullgraph=True, backend=counter)
    for starts in ([0, 4, 10], [0, 8, 10], [0, 0, 3]):
        x, cu = torch.randn(10, 2, 8, dtype=torch.float64), torch.tensor(starts, dtype=torch.int32)
        close(call(x, cu), attend(x, cu))
    assert counter.frame_count == 1


def test_more_than_the_longest_sequence_makes_nothing_wider():
    """Padded to max_seqlen, a batch would hold 2e12 scores."""
    x = torch.randn(10, 2, 8, dtype=torch.float64)
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    for arguments in ({}, {"softcap": 2.0}):
        out = compiled(lambda x, cu, a=arguments: attention_varlen(x, x, x, cu, cu, 10**6, 10**6, causal=True, **a))(x, cu)
        close(out, attention_varlen(x, x, x, cu, cu, 6, 6, causal=True, **arguments))


# --- torch.jit.trace ---


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("function", ["attention", "grouped", "torch's", "packed"])
def test_traced_by_jit(function, backend, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", backend)
    calls = {
        "attention": lambda q, k: fused_attn.attention(q, k, k, causal=True),
        "grouped": lambda q, k: fused_attn.attention(q, k[:, :1], k[:, :1]),
        "torch's": lambda q, k: scaled_dot_product_attention(q, k[:, :1], k[:, :1], enable_gqa=True),
    }

    def inputs(n, starts):
        q, k = torch.randn(2, 4, n, 8, dtype=torch.float64), torch.randn(2, 4, n, 8, dtype=torch.float64)
        return (q[0].transpose(0, 1), torch.tensor(starts, dtype=torch.int32)) if function == "packed" else (q, k)

    def attend(a, b):
        return attention_varlen(a, a, a, b, b, 9, 9, causal=True) if function == "packed" else calls[function](a, b)

    traced = torch.jit.trace(attend, inputs(9, [0, 3, 9]), check_trace=False)
    for example in (inputs(9, [0, 3, 9]), inputs(9, [0, 7, 8])):
        close(traced(*example), attend(*example))
