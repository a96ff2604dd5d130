"""What people meet at the surface: names, errors that name their argument, refusals, and the choice of a backend."""

import inspect
import math
import os
import subprocess
import sys
import types
import uuid
import warnings
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwd_ad
from support.guard import memory_guard

import fused_attn
from fused_attn import attention, autograd, dispatch, explain, reference, reference_attention, scaled_dot_product_attention

ROOT = Path(__file__).resolve().parent.parent
REFUSAL = (NotImplementedError, RuntimeError)


def qkv(n_queries=4, n_keys=6, *, heads=2, kv_heads=2, dim=8, dim_v=8, dtype=torch.float64, device="cpu", grad=False):
    shapes = (1, heads, n_queries, dim), (1, kv_heads, n_keys, dim), (1, kv_heads, n_keys, dim_v)
    return tuple(torch.randn(shape, dtype=dtype, device=device, requires_grad=grad) for shape in shapes)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the names ---


def test_public_names():
    public = {name for name, value in vars(fused_attn).items()
              if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert public == set(fused_attn.__all__)
    assert {"attention", "explain", "reference_attention", "scaled_dot_product_attention", "strict"} <= public
    for name in fused_attn.__all__:
        assert len(inspect.getdoc(getattr(fused_attn, name)) or "") > 40, f"{name} is not documented"


def test_arguments_of_attention():
    parameters = inspect.signature(attention).parameters
    defaults = {"causal": False, "window": None, "scale": None, "softcap": None, "bias": None, "mask": None,
                "key_lengths": None, "alibi_slopes": None, "sinks": None, "dropout_p": 0.0, "score_mod": None,
                "mask_mod": None, "mod_args": (), "return_lse": False, "deterministic": None, "precise": False,
                "strict": None, "backend": None}
    assert [*parameters][:3] == ["q", "k", "v"]
    assert defaults.items() <= {name: p.default for name, p in parameters.items()}.items()
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults)
    for name in ("q", "k", "v", *defaults):
        assert f"{name}:" in attention.__doc__ or f"{name}, " in attention.__doc__, f"{name} is not documented"


# --- errors ---

T = torch.randn
Q, K, V = T(2, 4, 5, 8), T(2, 2, 7, 8), T(2, 2, 7, 6)
BAD = {  # name: (exception, pattern, positional, named)
    "q list": (TypeError, r"q: expected a torch\.Tensor; got list", ([1.0], K, V), {}),
    "v None": (TypeError, r"v: expected a torch\.Tensor; got NoneType", (Q, K, None), {}),
    "q rank 3": (ValueError, r"q: expected 4 dimensions.*\(4, 5, 8\)", (Q[0], K, V), {}),
    "v rank 5": (ValueError, r"v: expected 4 dimensions.*\(1, 2, 2, 7, 6\)", (Q, K, V[None]), {}),
    "int": (TypeError, r"q: expected float16, bfloat16, float32 or float64; got torch\.int64", [x.long() for x in (Q, K, V)],
            {}),
    "k dtype": (TypeError, r"k: expected q's dtype torch\.float32; got torch\.float64", (Q, K.double(), V), {}),
    "v dtype": (TypeError, r"v: expected q's dtype torch\.float32; got torch\.bfloat16", (Q, K, V.bfloat16()), {}),
    "k device": (ValueError, r"k: expected q's device cpu; got meta", (Q, K.to("meta"), V), {}),
    "v device": (ValueError, r"v: expected q's device cpu; got meta", (Q, K, V.to("meta")), {}),
    "k batch": (ValueError, r"k: expected batch 2.*\(1, 2, 7, 8\)", (Q, K[:1], V[:1]), {}),
    "k head dim": (ValueError, r"k: expected.*head_dim 8.*\(2, 2, 7, 4\)", (Q, K[..., :4], V), {}),
    "v heads": (ValueError, r"v: expected k's.*heads.*\(2, 2, 7\).*\(2, 1, 7, 6\)", (Q, K, V[:, :1]), {}),
    "v length": (ValueError, r"v: expected k's.*length.*\(2, 2, 7\).*\(2, 2, 6, 6\)", (Q, K, V[:, :, :6]), {}),
    "heads": (ValueError, r"k: expected a number of heads that divides q's 4; got 3", (Q, T(2, 3, 7, 8), T(2, 3, 7, 6)), {}),
    "head dim 0": (ValueError, r"q.*head dims? of at least 1; got 0", (Q[..., :0], K[..., :0], V), {}),
    "value dim 0": (ValueError, r"v.*head dims? of at least 1; got 8 and 0", (Q, K, V[..., :0]), {}),
    "window int": (ValueError, r"window: expected a pair \(left, right\); got 3", (Q, K, V), {"window": 3}),
    "window triple": (ValueError, r"window: expected a pair.*got \(1, 2, 3\)", (Q, K, V), {"window": (1, 2, 3)}),
    "window negative": (ValueError, r"window: expected left to be a non-negative int or None; got -4$", (Q, K, V),
                        {"window": (-4, 0)}),
    "window -1": (ValueError, r"window: expected right.*got -1; None, not -1, leaves a side open", (Q, K, V),
                  {"window": (2, -1)}),
    "window bool": (ValueError, r"window: expected left.*int or None; got True", (Q, K, V), {"window": (True, 0)}),
    "window float": (ValueError, r"window: expected right.*int or None; got 2\.0", (Q, K, V), {"window": (1, 2.0)}),
    "scale nan": (ValueError, r"scale: expected a finite float; got nan", (Q, K, V), {"scale": math.nan}),
    "scale inf": (ValueError, r"scale: expected a finite float; got -inf", (Q, K, V), {"scale": -math.inf}),
    "scale str": (TypeError, r"scale: expected .*float.*; got '?(a|str)", (Q, K, V), {"scale": "a"}),
    "softcap 0": (ValueError, r"softcap: expected a positive finite float or None; got 0", (Q, K, V), {"softcap": 0.0}),
    "softcap -1": (ValueError, r"softcap: expected a positive.*got -1", (Q, K, V), {"softcap": -1.0}),
    "softcap nan": (ValueError, r"softcap: expected a positive.*got nan", (Q, K, V), {"softcap": math.nan}),
    "softcap str": (TypeError, r"softcap: expected .*float.*; got '?(a|str)", (Q, K, V), {"softcap": "a"}),
    "backend": (ValueError, r"backend: expected one of triton, torch, reference or None; got 'cudnn'", (Q, K, V),
                {"backend": "cudnn"}),
    "torch with softcap": (ValueError, r"backend: 'torch' cannot run this call: .*softcap", (Q, K, V),
                           {"backend": "torch", "softcap": 1.0}),
    "torch with LSE": (ValueError, r"backend: 'torch' cannot run this call: .*LSE", (Q, K, V),
                       {"backend": "torch", "return_lse": True}),
    "triton with head dim 257": (ValueError, r"backend: 'triton' cannot run this call: .*257.*256",
                                 (T(1, 1, 1, 257), T(1, 1, 1, 257), T(1, 1, 1, 8)), {"backend": "triton"}),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", [attention, explain])
def test_errors_name_the_argument_what_came_and_what_was_expected(case, call):
    exception, pattern, tensors, named = BAD[case]
    with memory_guard() as guard, pytest.raises(exception, match=pattern):
        call(*tensors, **named)
    assert guard.kernels == []


def test_good_bounds_are_not_refused():
    close(attention(Q, K, V, window=[None, 3], scale=2), attention(Q, K, V, window=(None, 3), scale=2.0), 1e-6)
    assert attention(Q, K, V, window=(10**12, 10**12), softcap=50, backend="triton").shape == (2, 4, 5, 6)


UNBUILT = {
    "bias": [T(5, 7), torch.zeros(5, 7), torch.zeros(1), torch.zeros(())], "sinks": [T(4), torch.zeros(1)],
    "mask": [torch.ones(5, 7, dtype=torch.bool), torch.zeros(1, dtype=torch.bool), torch.tensor(False)],
    "key_lengths": [torch.tensor([7, 3]), torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)],
    "alibi_slopes": [T(4), torch.zeros(1)], "dropout_p": [0.1, 1.0], "precise": [True],
    "score_mod": [lambda *a: a[0], "softcap"], "mask_mod": [lambda *a: True], "mod_args": [(1,), (torch.zeros(1),), [T(3)]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNBUILT.items() for value in values],
                         ids=lambda x: x if isinstance(x, str) else "")
def test_unbuilt_arguments_are_refused_by_name(name, value):
    for call in (attention, reference_attention, explain):
        with pytest.raises(NotImplementedError, match=name):
            call(Q, K, V, **{name: value})


def test_unknown_arguments_are_refused():
    for call in (attention, reference_attention, explain):
        for value in (None, 1):
            with pytest.raises(TypeError, match="nonsense"):
                call(Q, K, V, nonsense=value)


@pytest.mark.parametrize("value", [None, True, False])
def test_deterministic_is_accepted(value):
    assert torch.equal(attention(Q, K, V, deterministic=value), attention(Q, K, V))
    explain(Q, K, V, deterministic=value)


# --- derivatives that are not built: refused, never silently constant ---


@pytest.mark.kernels
@pytest.mark.parametrize("loss", [lambda out, lse: out.sum(), lambda out, lse: out.square().sum(), lambda out, lse: lse.sum()],
                         ids=["constant dO", "dO with a gradient", "LSE"])
def test_double_backward_is_refused(loss):
    inputs = qkv(grad=True)
    first = torch.autograd.grad(loss(*attention(*inputs, return_lse=True, backend="triton")), inputs, create_graph=True,
                                materialize_grads=True)
    plain = torch.autograd.grad(loss(*attention(*inputs, return_lse=True, backend="triton")), inputs)
    for grad, same in zip(first, plain, strict=True):
        assert torch.equal(grad, same)
        with pytest.raises(NotImplementedError, match=r"(?i)fused_attn.*second derivatives.*reference"):
            torch.autograd.grad(grad.sum(), inputs, retain_graph=True)


@pytest.mark.kernels
def test_double_backward_of_a_compiled_call_is_refused():
    q, k, v = qkv(grad=True)
    out = torch.compile(lambda q: attention(q, k, v, backend="triton"), fullgraph=True, backend="aot_eager")(q)

    def second_derivative():
        (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        return torch.autograd.grad(dq.sum(), q)

    with pytest.raises(REFUSAL):
        second_derivative()


@pytest.mark.kernels
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wrt", [0, 1, 2])
def test_forward_mode_is_refused(wrt, grad):
    inputs = list(qkv(grad=grad))
    with fwd_ad.dual_level():
        inputs[wrt] = fwd_ad.make_dual(inputs[wrt], torch.ones_like(inputs[wrt]))
        with pytest.raises(REFUSAL, match=r"(?i)forward|jvp"):
            attention(*inputs, backend="triton")


@pytest.mark.kernels
@pytest.mark.parametrize("wrt", [0, 1, 2])
def test_functional_jvp_is_refused(wrt):
    inputs = list(qkv())

    def call(x):
        return attention(*inputs[:wrt], x, *inputs[wrt + 1:], backend="triton")

    with pytest.raises(REFUSAL, match=r"(?i)forward|jvp|setup_context"):
        torch.func.jvp(call, (inputs[wrt],), (torch.ones_like(inputs[wrt]),))


@pytest.mark.kernels
@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_functional_gradients_are_right_or_refused(transform):
    q, k, v = qkv()

    def gradient(backend):
        grad = torch.func.grad(lambda q: attention(q, k, v, backend=backend).sin().sum())
        return grad(q) if transform == "grad" else torch.vmap(grad)(torch.stack([q, 2 * q]))

    expected = gradient("reference")
    try:
        actual = gradient("triton")
    except REFUSAL as error:
        assert "setup_context" in str(error) or "fused_attn" in str(error)  # noqa: PT017
    else:
        close(actual, expected)


@pytest.mark.kernels
def test_vmap_is_right_or_refused():
    q, k, v = qkv()
    stacked = torch.stack([q, 2 * q, -q]).requires_grad_()
    copy = stacked.detach().clone().requires_grad_()
    expected = torch.stack([reference_attention(q, k, v) for q in copy])
    expected.sin().sum().backward()
    try:
        out = torch.vmap(lambda q: attention(q, k, v, backend="triton"))(stacked)
        out.sin().sum().backward()
    except REFUSAL:
        return
    close(out, expected)
    assert stacked.grad is not None, "the gradient is silently lost"
    close(stacked.grad, copy.grad)


# --- the choice of a backend ---


@pytest.fixture
def ran(monkeypatch):
    """Names of the backends that really ran."""
    names = []

    def spy(name, real):
        return lambda *args: names.append(name) or real(*args)

    for name, module, function in (("triton", autograd, "attention"), ("torch", dispatch, "torch_attention"),
                                   ("reference", reference, "attention")):
        monkeypatch.setattr(module, function, spy(name, getattr(module, function)))
    return names


CALLS = {
    "plain": ({}, {}, "torch"), "causal": ({}, {"causal": True}, "torch"), "window": ({}, {"window": (1, 1)}, "torch"),
    "softcap": ({}, {"softcap": 2.0}, "reference"), "LSE": ({}, {"return_lse": True}, "reference"),
    "negative scale, causal": ({}, {"scale": -1.0, "causal": True}, "torch"), "no keys": ({"n_keys": 0}, {}, "reference"),
    "wide heads": ({"dim": 257}, {}, "torch"), "grouped": ({"heads": 4}, {}, "torch"), "Dv": ({"dim_v": 3}, {}, "torch"),
    "triton asked for": ({}, {"backend": "triton"}, "triton"), "torch asked for": ({}, {"backend": "torch"}, "torch"),
    "strict loses to a named backend": ({}, {"backend": "reference", "strict": True}, "reference"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("case", CALLS)
def test_explain_tells_what_runs(case, ran):
    shape, arguments, expected = CALLS[case]
    inputs = qkv(**shape)
    found = explain(*inputs, **arguments)
    assert ran == []
    attention(*inputs, **arguments)
    assert ran == [found.backend] == [expected]
    assert f"backend: {expected}" in str(found)
    assert set(found.reasons) == {"triton", "torch", "reference"}
    named = {name: value for name, value in arguments.items() if name not in ("backend", "strict")}
    for backend, reasons in found.reasons.items():
        if reasons and backend != "reference":
            with pytest.raises(ValueError, match="backend") as error:
                attention(*inputs, **named, backend=backend)
            assert all(reason in str(error.value) for reason in reasons)
            assert backend == expected or all(reason in str(found) for reason in reasons)
        else:
            attention(*inputs, **named, backend=backend)


def test_reasons_are_about_the_call():
    inputs = qkv()
    assert "softcap" in explain(*inputs, softcap=1.0).reasons["torch"][0]
    assert "LSE" in explain(*inputs, return_lse=True).reasons["torch"][0]
    assert "quadratic" in explain(*inputs).reasons["reference"][0]
    assert "empty" in explain(*qkv(n_keys=0)).reasons["torch"][0]
    assert "256" in explain(*qkv(dim=300)).reasons["triton"][0]
    assert explain(*inputs).reasons["triton"] == explain(*inputs).reasons["torch"] == ()
    # Without causality torch's kernel has nothing against a negative scale.
    assert not any("causal" in reason for reason in explain(*inputs, scale=-1.0).reasons["torch"])


QUADRATIC = {"softcap": 2.0}  # on a CPU only the reference runs this


def test_strict_argument_context_and_their_precedence(ran):
    inputs = qkv()
    attention(*inputs, **QUADRATIC)
    with pytest.raises(RuntimeError, match=r"strict.*quadratic.*softcap"):
        attention(*inputs, **QUADRATIC, strict=True)
    with fused_attn.strict():
        attention(*inputs)
        attention(*qkv(n_keys=0), **QUADRATIC)  # an empty matrix is not quadratic
        attention(*inputs, **QUADRATIC, strict=False)
        for call in (attention, explain):
            with pytest.raises(RuntimeError, match="strict"):
                call(*inputs, **QUADRATIC)
        with fused_attn.strict(False):
            attention(*inputs, **QUADRATIC)
        with pytest.raises(RuntimeError, match="strict"):
            attention(*inputs, **QUADRATIC)
    attention(*inputs, **QUADRATIC)
    assert ran == ["reference", "torch", *["reference"] * 4]


def python(code, **environment):
    """Output of ``code`` in a fresh interpreter that knows q, k, v and strict calls."""
    start = "import torch, fused_attn\nq = k = v = torch.randn(1, 1, 4, 8)\n" \
            "def tried(**a):\n    try: return fused_attn.explain(q, k, v, **a).backend\n" \
            "    except Exception as e: return f'{type(e).__name__} {e}'\n"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_ATTN_", "TRITON_INTERPRET"))}
    done = subprocess.run([sys.executable, "-c", environment.pop("before", "") + start + code], capture_output=True, text=True,
                          check=False, cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT)} | environment)
    return done.stdout.splitlines() or done.stderr.splitlines()[-1:]


def test_strict_from_the_environment():
    lines = python("print(tried(softcap=1.0)); print(tried(softcap=1.0, strict=False))\n"
                   "with fused_attn.strict(False): print(tried(softcap=1.0)); print(tried(softcap=1.0, strict=True))",
                   FUSED_ATTN_STRICT="1")
    assert [line.split()[0] for line in lines] == ["RuntimeError", "reference", "reference", "RuntimeError"]


def test_backend_from_the_environment():
    lines = python("print(tried()); print(tried(softcap=1.0)); print(tried(backend='torch')); print(tried(backend='triton'))",
                   FUSED_ATTN_BACKEND="reference")
    assert lines[:3] == ["reference", "reference", "torch"]
    assert "TRITON_INTERPRET" in lines[3]  # without the interpreter there are no kernels for CPU tensors
    (line,) = python("", FUSED_ATTN_BACKEND="cudnn")
    assert line == "ValueError: FUSED_ATTN_BACKEND: expected one of triton, torch, reference; got 'cudnn'"


def test_without_triton():
    lines = python("print(tried()); print(fused_attn.explain(q, k, v).reasons['triton'][0])\n"
                   "print(fused_attn.attention(q, k, v, softcap=1.0).shape)\n"
                   "print(fused_attn.scaled_dot_product_attention(q, k, v).shape); print(tried(backend='triton'))",
                   before="import sys\nsys.modules['triton'] = None\n")
    assert lines[:4] == ["torch", "Triton is not installed", *["torch.Size([1, 1, 4, 8])"] * 2]
    assert "Triton is not installed" in lines[4]


# A meta tensor stands for one on a device that is no CPU: shapes without numbers.


@pytest.mark.parametrize(("call", "arguments", "expected"), [
    (attention, {}, "torch"), (attention, {"softcap": 1.0}, "reference"), (scaled_dot_product_attention, {}, "torch")])
def test_fallback_warns_once_with_the_reason(call, arguments, expected, monkeypatch):
    reason = f"the card is too old ({uuid.uuid4()})"
    monkeypatch.setattr(dispatch, "device_reasons", lambda device_type, index: (reason,))
    inputs = qkv(device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if call is attention:
            assert explain(*inputs, **arguments).backend == expected  # telling is no falling back: no warning
    with pytest.warns(RuntimeWarning) as caught:
        assert [call(*inputs, **arguments).shape for _ in range(3)] == [(1, 2, 4, 8)] * 3
    (warning,) = caught
    assert reason in str(warning.message)
    assert expected in str(warning.message)
    assert warning.filename == __file__


def test_fallback_to_the_reference_is_refused_where_strict(monkeypatch):
    monkeypatch.setattr(dispatch, "device_reasons", lambda device_type, index: ("the card is too old",))
    with pytest.raises(RuntimeError, match=r"too old.*softcap"):
        attention(*qkv(device="meta"), softcap=1.0, strict=True)


def test_kernels_are_preferred_off_the_cpu(monkeypatch, ran):
    monkeypatch.setattr(dispatch, "device_reasons", lambda device_type, index: ())
    inputs = qkv(device="meta")
    assert explain(*inputs).backend == "triton"
    attention(*inputs)
    scaled_dot_product_attention(*inputs)
    assert ran == ["triton", "triton"]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_backend_named_in_the_environment_holds_for_sdpa(backend, monkeypatch, ran):
    monkeypatch.setattr(dispatch, "device_reasons", lambda device_type, index: ())
    monkeypatch.setattr(dispatch.settings, "BACKEND", backend)
    scaled_dot_product_attention(*qkv(device="meta"))
    assert "triton" not in ran
