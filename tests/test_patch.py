"""patch_sdpa: which calls the kernels answer, which torch does, what they give, and what the report says of them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_name

import fused_attn  # noqa: F401  # repairs first
from fused_attn import patch_sdpa, settings
from fused_attn.kernels import launch

sdpa = F.scaled_dot_product_attention
ON_CPU = "the tensors are on the CPU"


@pytest.fixture
def kernels(monkeypatch):
    """The kernels as the default backend; launches by name."""
    monkeypatch.setattr(settings, "BACKEND", "triton")
    with launch.counted() as launches:
        yield launches


def normal(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def drawn(lead, n_queries=5, n_keys=5, key_lead=None):
    key_lead = lead if key_lead is None else key_lead
    return [normal(*shape, 8, grad=True) for shape in ((*lead, n_queries), (*key_lead, n_keys), (*key_lead, n_keys))]


def keep():
    return torch.rand(2, 1, 5, 7) < 0.6


CALLS = {  # q, k and v; what follows them
    "plain": (lambda: drawn((2, 3)), lambda: ((), {})), "causal": (lambda: drawn((2, 3)), lambda: ((), {"is_causal": True})),
    "positional": (lambda: drawn((2, 3)), lambda: ((None, 0.0, True), {})),
    "scale": (lambda: drawn((2, 3), 5, 7), lambda: ((), {"scale": 0.7})),
    "causal, more keys": (lambda: drawn((1, 2), 3, 7), lambda: ((), {"is_causal": True})),
    "bool mask": (lambda: drawn((2, 3), 5, 7), lambda: ((), {"attn_mask": keep()})),
    "positional bool mask": (lambda: drawn((2, 3), 5, 7), lambda: ((keep(),), {})),
    "float mask": (lambda: drawn((2, 3), 5, 7), lambda: ((normal(3, 5, 7),), {"scale": 0.2})),
    "float mask of each key": (lambda: drawn((2, 3), 5, 7), lambda: ((), {"attn_mask": normal(2, 1, 1, 7)})),
    "grouped": (lambda: drawn((2, 4), 5, 7, (2, 2)), lambda: ((), {"enable_gqa": True})),
    "three dimensions": (lambda: drawn((3,)), lambda: ((), {"is_causal": True})),
    "five dimensions": (lambda: drawn((2, 2, 3), 4, 4), lambda: ((), {})),
    "dropout of 0": (lambda: drawn((1, 2)), lambda: ((None, 0), {})),
}


def called(case):
    tensors, (args, kwargs) = CALLS[case][0](), CALLS[case][1]()

    def call():
        out = sdpa(*tensors, *args, **kwargs)
        return out, *torch.autograd.grad(out.sin().sum(), tensors)

    return call


# --- which calls, and what they give ---


@pytest.mark.parametrize("case", CALLS)
def test_on_the_cpu_it_is_torchs_answer_to_the_bit(case):
    call = called(case)
    expected = call()
    with patch_sdpa() as report:
        results = call()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert not report.fused
    assert [(reason, count) for (_, reason), count in report.kept.items()] == [(ON_CPU, 1)]


@pytest.mark.kernels
@pytest.mark.parametrize("case", CALLS)
def test_the_kernels_answer_with_gradients(case, kernels):
    call = called(case)
    expected = call()
    assert not kernels
    with patch_sdpa(strict=True) as report:
        results = call()
    assert kernels["forward_kernel"] == kernels["dq_kernel"] == 1
    assert (report.fused.total(), report.kept.total()) == (1, 0)
    for mine, exact in zip(results, expected, strict=True):
        close(mine, exact)
    call()
    assert kernels["forward_kernel"] == 1  # torch's again


@pytest.mark.kernels
def test_a_mask_gets_its_gradient(kernels):
    q, k, v, bias = *drawn((2, 3)), normal(3, 5, 5, grad=True)
    expected = torch.autograd.grad(sdpa(q, k, v, bias).sin().sum(), bias)
    with patch_sdpa():
        close(torch.autograd.grad(sdpa(q, k, v, attn_mask=bias).sin().sum(), bias), expected)
    assert kernels["forward_kernel"] == 1


@pytest.mark.kernels
def test_dropout_drops(kernels):
    q, v = normal(2, 4, 30, 8), torch.ones(2, 4, 30, 8, dtype=torch.float64)
    with patch_sdpa() as report:
        assert not sdpa(q, q, v, dropout_p=1.0).any()
        mean = sdpa(q, q, v, None, 0.5).mean()
    assert 0.9 < mean < 1.1
    assert mean != 1
    assert report.fused.total() == 2


FORMS = {
    "a name imported before": imported_name, "torch's own builtin": torch._C._nn.scaled_dot_product_attention,
    "a partial of it": functools.partial(imported_name),
    "an attribute, looked up late": lambda *args: F.scaled_dot_product_attention(*args),
}


@pytest.mark.kernels
@pytest.mark.parametrize("form", FORMS)
def test_however_the_function_was_imported(form, kernels):
    q, k, v = drawn((1, 2))
    with patch_sdpa() as report:
        close(FORMS[form](q, k, v), sdpa(q, k, v))
    assert report.fused.total() == kernels["forward_kernel"] == 2


def attend():
    """torch's module as most code calls it: attention without weights."""
    module, x = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64), normal(2, 5, 16)
    return module, lambda: module(x, x, x, need_weights=False)[0]


PADDED = torch.arange(5) >= torch.tensor([[3], [5]])


def padded():
    module, x = nn.MultiheadAttention(16, 2, dtype=torch.float64, dropout=0.0), normal(5, 2, 16)
    return module, lambda: module(x, x, x, key_padding_mask=PADDED, need_weights=False)[0]


def layers():
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, dtype=torch.float64)
    module, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), normal(2, 5, 16)
    return module, lambda: module(x, src_key_padding_mask=PADDED)


@pytest.mark.kernels
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", [attend, padded, layers])
def test_inside_torchs_modules(build, training, kernels):
    module, call = build()
    module.train(training)

    def results():
        if not training:
            with torch.no_grad():
                return (call()[~PADDED] if build is layers else call(),)
        out = call()
        return out, *torch.autograd.grad(out.sin().sum(), list(module.parameters()))

    expected = results()
    with patch_sdpa(strict=True) as report:
        actual = results()
    assert kernels["forward_kernel"] == report.fused.total() == 1
    for mine, exact in zip(actual, expected, strict=True):
        close(mine, exact)


def test_a_module_asked_for_weights_is_torchs():
    module, x = nn.MultiheadAttention(16, 2), normal(4, 2, 16, dtype=torch.float32)
    expected = module(x, x, x)
    with patch_sdpa(strict=True):
        results = module(x, x, x)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.kernels
def test_in_autocast(kernels):
    q = normal(1, 2, 5, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sdpa(q, q, q)
        with patch_sdpa() as report:
            out = sdpa(q, q, q)
    assert out.dtype == expected.dtype == torch.bfloat16
    close(out, expected, 1e-2)
    assert report.fused.total() == kernels["forward_kernel"] == 1


# --- what goes to torch, and is told ---


class Subclass(torch.Tensor):
    pass


def jagged():
    parts = [normal(n, 2, 8) for n in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def strided():
    return torch.nested.nested_tensor([normal(2, n, 8) for n in (3, 5)])


KEPT = {  # a call that the kernels leave to torch, its reason
    "subclass": (lambda: sdpa(*[normal(1, 2, 5, 8).as_subclass(Subclass)] * 3), "a tensor subclass or a nested tensor"),
    "jagged": (lambda: sdpa(*[jagged()] * 3).values(), "a tensor subclass or a nested tensor"),
    "strided nested": (lambda: torch.cat([x.flatten() for x in sdpa(*[strided()] * 3).unbind()]), "nested tensor"),
    "vmap": (lambda: torch.func.vmap(lambda q: sdpa(q, q, q))(normal(3, 2, 5, 8)), "a transform of torch.func"),
    "no heads": (lambda: sdpa(*[normal(2, 0, 5, 8)] * 3), "there are no heads"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", KEPT)
def test_what_the_kernels_cannot_run_is_torchs_and_says_why(case, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", "triton")
    call, reason = KEPT[case]
    torch.manual_seed(1)
    expected = call()
    torch.manual_seed(1)
    with patch_sdpa() as report:
        assert torch.equal(call(), expected)
    assert not report.fused
    ((shown, why), count), = report.kept.items()
    assert reason in why
    assert shown.startswith("q [")
    assert count == 1
    with patch_sdpa(strict=True), pytest.raises(RuntimeError, match=f"strict: .*cannot run fused: .*{reason}"):
        call()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_backend_of_the_environment_keeps_all_calls_for_torch(backend, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", backend)
    q, k, v = drawn((1, 2))
    with patch_sdpa() as report:
        assert torch.equal(sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert [why for _, why in report.kept] == [f"FUSED_ATTN_BACKEND is {backend}"]


BAD = {
    "an int mask": lambda q: sdpa(q, q, q, torch.zeros(5, 5, dtype=torch.int32)), "head dims": lambda q: sdpa(q, q[..., :4], q),
    "a mask of another size": lambda q: sdpa(q, q, q, torch.ones(4, 4, dtype=torch.bool)),
    "too many positions": lambda q: sdpa(q, q, q, None, 0.0, False, 0.5), "a name too much": lambda q: sdpa(q, q, q, scal=2.0),
    "one dimension": lambda q: sdpa(q[0, 0, 0], q, q), "no tensor": lambda q: sdpa(q, None, q),
    "twice": lambda q: sdpa(q, q, q, None, attn_mask=None), "probability": lambda q: sdpa(q, q, q, dropout_p=1.5),
}


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("case", BAD)
def test_bad_calls_raise_torchs_errors(case, backend, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", backend)
    q = normal(1, 2, 5, 8)
    with pytest.raises((TypeError, RuntimeError, ValueError)) as theirs:
        BAD[case](q)
    with patch_sdpa(), pytest.raises(theirs.type) as ours:
        BAD[case](q)
    assert str(ours.value) == str(theirs.value)


def test_strict_names_the_call_and_the_reason():
    q = normal(2, 3, 5, 8, dtype=torch.float32)
    with patch_sdpa(strict=True) as report:
        with pytest.raises(RuntimeError) as caught:
            sdpa(q, q, q, is_causal=True, scale=0.5)
        assert report.kept.total() == 0  # it went nowhere
    shown = "q [2, 3, 5, 8], k [2, 3, 5, 8], v [2, 3, 5, 8], float32, is_causal True, scale 0.5"
    assert str(caught.value) == f"strict: scaled_dot_product_attention({shown}) cannot run fused: {ON_CPU}"


@pytest.mark.kernels
def test_the_report_counts_and_describes(kernels):
    q, k = normal(1, 2, 5, 8, dtype=torch.float32), normal(1, 2, 7, 8, dtype=torch.float32)
    mask = torch.rand(5, 7) < 0.9
    with patch_sdpa() as report:
        for _ in range(3):
            sdpa(q, k, k, attn_mask=mask)
        sdpa(q, q, q, None, 0.0, True)
        sdpa(*[q.as_subclass(Subclass)] * 3)
    assert str(report).splitlines() == [
        "4 calls ran fused, 1 went to torch",
        "  3 x q [1, 2, 5, 8], k [1, 2, 7, 8], v [1, 2, 7, 8], float32, attn_mask [5, 7]",
        "  1 x q [1, 2, 5, 8], k [1, 2, 5, 8], v [1, 2, 5, 8], float32, is_causal True",
        "  1 x q [1, 2, 5, 8], k [1, 2, 5, 8], v [1, 2, 5, 8], float32: a tensor subclass or a nested tensor",
    ]
    assert sorted(report.fused.values()) == [1, 3]
    assert kernels["forward_kernel"] == 4
