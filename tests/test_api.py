"""What people meet at the surface: names, errors that name their argument, refusals, and the choice of a backend."""

import inspect
import os
import subprocess
import sys
import types
import uuid
import warnings
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn import (
    RelativeBias,
    attention,
    attention_stats,
    attention_varlen,
    explain,
    reference,
    scaled_dot_product_attention,
)
from fused_attn.plan import backends
from fused_attn.run import autograd, by_torch

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
    assert {"attention", "attention_varlen", "explain", "reference_attention", "scaled_dot_product_attention", "strict",
            "MaskMod", "RelativeBias", "ScoreMod", "dilated_window_mask", "document_mask", "kerple", "prefix_lm_mask",
            "soft_tree_mask", "t5_bias", "tree_intervals", "tree_mask"} <= public
    for name in fused_attn.__all__:
        assert len(inspect.getdoc(getattr(fused_attn, name)) or "") > 40, f"{name} is not documented"


def test_arguments_of_attention():
    parameters = inspect.signature(attention).parameters
    defaults = {"causal": False, "window": None, "scale": None, "softcap": None, "bias": None, "mask": None,
                "key_lengths": None, "alibi_slopes": None, "sinks": None, "score_weight": None, "dropout_p": 0.0,
                "score_mod": None, "mask_mod": None, "mod_args": (), "return_lse": False, "deterministic": None,
                "precise": False, "fp32_precision": None, "strict": None, "backend": None}
    assert [*parameters][:3] == ["q", "k", "v"]
    assert defaults.items() <= {name: p.default for name, p in parameters.items()}.items()
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults)
    for name in ("q", "k", "v", *defaults):
        assert f"{name}:" in attention.__doc__ or f"{name}, " in attention.__doc__, f"{name} is not documented"
    assert [*defaults, "unexpected"] == [*parameters][3:]


def test_arguments_of_attention_varlen():
    parameters = inspect.signature(attention_varlen).parameters
    positional = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    named = ["seqused_q", "seqused_k", "return_lse", "deterministic", "strict", "backend"]
    assert [*parameters] == [*positional, *named, "arguments"]
    for name in (*positional, "seqused_q", "seqused_k", "arguments"):
        assert f"{name}:" in attention_varlen.__doc__ or f"{name}, " in attention_varlen.__doc__, f"{name} is not documented"


# --- derivatives beyond the first (tests/test_second_derivatives.py, tests/test_forward_ad.py have the rest) ---


@pytest.mark.kernels
@pytest.mark.parametrize("loss", [lambda out, lse: out.sum(), lambda out, lse: out.square().sum(), lambda out, lse: lse.sum()],
                         ids=["constant dO", "dO with a gradient", "LSE"])
def test_double_backward(loss):
    """With create_graph the first derivative is what it is without, and the second is the reference's."""
    inputs, found = qkv(grad=True), []
    for backend in ("triton", "reference"):
        first = torch.autograd.grad(loss(*attention(*inputs, return_lse=True, backend=backend)), inputs, create_graph=True,
                                    materialize_grads=True)
        plain = torch.autograd.grad(loss(*attention(*inputs, return_lse=True, backend=backend)), inputs, materialize_grads=True)
        assert all(map(torch.equal, first, plain))
        total = torch.stack([grad.sin().sum() for grad in first]).sum()
        found.append(torch.autograd.grad(total, inputs, materialize_grads=True))
    for got, want in zip(*found, strict=True):
        close(got, want)


@pytest.mark.kernels
def test_double_backward_of_a_compiled_call_is_refused():
    q, k, v = qkv(grad=True)
    out = torch.compile(lambda q: attention(q, k, v, backend="triton"), fullgraph=True, backend="aot_eager")(q)

    def second_derivative():
        (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        return torch.autograd.grad(dq.sum(), q)

    with pytest.raises(REFUSAL):
        second_derivative()


# --- the choice of a backend ---


@pytest.fixture
def ran(monkeypatch):
    """Names of the backends that really ran."""
    names = []

    def spy(name, real):
        return lambda *args: names.append(name) or real(*args)

    for name, module, function in (("torch", by_torch, "torch_attention"), ("reference", reference, "attention")):
        monkeypatch.setattr(module, function, spy(name, getattr(module, function)))
    real = autograd.attention

    def fused(q, k, v, spec, others):
        names.append("blocked" if spec.blocked else "triton")
        return real(q, k, v, spec, others)

    monkeypatch.setattr(autograd, "attention", fused)
    return names


CALLS = {
    "plain": ({}, {}, "torch"), "causal": ({}, {"causal": True}, "torch"), "window": ({}, {"window": (1, 1)}, "torch"),
    "softcap": ({}, {"softcap": 2.0}, "blocked"), "LSE": ({}, {"return_lse": True}, "blocked"),
    "negative scale, causal": ({}, {"scale": -1.0, "causal": True}, "torch"), "no keys": ({"n_keys": 0}, {}, "blocked"),
    "wide heads": ({"dim": 577}, {}, "torch"), "wide values": ({"dim_v": 577}, {}, "torch"),
    "wide heads on the kernels": ({"dim": 576, "dim_v": 512}, {"backend": "triton"}, "triton"),
    "grouped": ({"heads": 4}, {}, "torch"), "Dv": ({"dim_v": 3}, {}, "torch"),
    "triton asked for": ({}, {"backend": "triton"}, "triton"), "torch asked for": ({}, {"backend": "torch"}, "torch"),
    "strict loses to a named backend": ({}, {"backend": "reference", "strict": True}, "reference"),
    "mask": ({}, {"mask": torch.ones(4, 6, dtype=torch.bool).tril()}, "torch"), "bias": ({}, {"bias": torch.randn(6)}, "torch"),
    "mask and bias": ({}, {"mask": torch.ones(4, 6, dtype=torch.bool).tril(), "bias": torch.randn(2, 1, 1)}, "torch"),
    "bias with a gradient": ({}, {"bias": torch.randn(4, 6).requires_grad_()}, "blocked"),
    "relative bias": ({}, {"bias": RelativeBias(torch.randn(2, 9))}, "blocked"),
    "key lengths": ({}, {"key_lengths": torch.tensor([5])}, "torch"), "sinks": ({}, {"sinks": torch.randn(2)}, "blocked"),
    "ALiBi": ({}, {"alibi_slopes": torch.rand(2)}, "blocked"), "dropout": ({}, {"dropout_p": 0.5}, "blocked"),
    "dropout and a mask": ({}, {"dropout_p": 0.5, "mask": torch.ones(6, dtype=torch.bool)}, "blocked"),
    "mask function": ({}, {"mask_mod": fused_attn.prefix_lm_mask(torch.tensor([3]))}, "blocked"),
    "references alone": ({}, {"score_mod": fused_attn.ScoreMod("doubled", reference=lambda s, *_: 2 * s)}, "blocked"),
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
    assert set(found.reasons) == {"triton", "torch", "blocked", "reference"}
    named = {name: value for name, value in arguments.items() if name not in ("backend", "strict")}
    for backend, reasons in found.reasons.items():
        if reasons and backend != "reference":
            with pytest.raises(ValueError, match="backend") as error:
                attention(*inputs, **named, backend=backend)
            assert all(reason in str(error.value) for reason in reasons)
            assert backend == expected or all(reason in str(found) for reason in reasons)
        else:
            attention(*inputs, **named, backend=backend)


@pytest.mark.kernels
def test_packed_sequences_choose_in_the_same_way(ran):
    q, k, v = (x[0].transpose(0, 1) for x in qkv())
    packing = (torch.tensor([0, 1, 4]), torch.tensor([0, 4, 6]), 3, 4)
    for arguments, expected in (({}, "blocked"), ({"seqused_k": torch.tensor([2, 2])}, "blocked"),
                                ({"backend": "torch"}, "torch"), ({"bias": torch.zeros(4)}, "blocked"),
                                ({"return_lse": True}, "blocked"),
                                ({"dropout_p": 0.1}, "blocked"), ({"backend": "triton"}, "triton")):
        ran.clear()
        attention_varlen(q, k, v, *packing, **arguments)
        assert set(ran) == {expected}
    with fused_attn.strict():
        attention_varlen(q, k, v, *packing, bias=torch.zeros(4))


def test_reasons_are_about_the_call():
    inputs = qkv()
    assert "softcap" in explain(*inputs, softcap=1.0).reasons["torch"][0]
    assert "LSE" in explain(*inputs, return_lse=True).reasons["torch"][0]
    assert "quadratic" in explain(*inputs).reasons["reference"][0]
    assert "empty" in explain(*qkv(n_keys=0)).reasons["torch"][0]
    assert "576" in explain(*qkv(dim=577)).reasons["triton"][0]
    assert "sinks" in explain(*inputs, sinks=torch.zeros(2)).reasons["torch"][0]
    assert "alibi" in explain(*inputs, alibi_slopes=torch.zeros(2)).reasons["torch"][0]
    assert "bias gradient" in explain(*inputs, bias=torch.zeros(6, requires_grad=True)).reasons["torch"][0]
    documents = fused_attn.document_mask(torch.arange(6), torch.arange(4))
    assert "mask functions" in explain(*inputs, mask_mod=documents).reasons["torch"][0]
    assert "doubled" in explain(*inputs, score_mod=fused_attn.ScoreMod("doubled")).reasons["triton"][0]
    assert explain(*qkv(dim=576, dim_v=512)).reasons["triton"] == ()
    assert "negative bias" in str(explain(*qkv(grad=True), bias=torch.zeros(6)))
    assert "packed" not in str(explain(*inputs))
    plain = {"mask": torch.ones(4, 6) > 0, "bias": torch.zeros(6), "key_lengths": torch.tensor([6])}
    assert explain(*inputs, **plain).reasons["triton"] == explain(*inputs, **plain).reasons["torch"] == ()
    assert explain(*inputs).reasons["triton"] == explain(*inputs).reasons["torch"] == ()
    # Without causality torch's kernel has nothing against a negative scale.
    assert not any("causal" in reason for reason in explain(*inputs, scale=-1.0).reasons["torch"])


def test_nothing_is_refused_under_strict_and_an_argument_wins(ran):
    """But for statistics that no kernel computes."""
    inputs, mod = qkv(), fused_attn.ScoreMod("doubled", reference=lambda score, *_: 2 * score)
    with fused_attn.strict():
        attention(*inputs)
        attention(*inputs, softcap=2.0)
        attention(*qkv(n_keys=0), softcap=2.0)
        for strict in (True, None):
            with pytest.raises(RuntimeError, match=r"strict.*quadratic"):
                attention_stats(*inputs[:2], score_mod=mod, strict=strict)
        attention_stats(*inputs[:2], score_mod=mod, strict=False)
        with fused_attn.strict(False):
            attention_stats(*inputs[:2], score_mod=mod)
    assert ran == ["torch", "blocked", "blocked"]


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
    lines = python("def stats(**a):\n    try: fused_attn.attention_stats(q, k, **a); return 'ran'\n"
                   "    except RuntimeError as e: return str(e)\n"
                   "print(stats()); print(stats(strict=False))\n"
                   "with fused_attn.strict(False): print(stats()); print(stats(strict=True))", FUSED_ATTN_STRICT="1")
    assert [line.split()[0] for line in lines] == ["strict:", "ran", "ran", "strict:"]


def test_backend_from_the_environment():
    lines = python("print(tried()); print(tried(softcap=1.0)); print(tried(backend='torch')); print(tried(backend='triton'))",
                   FUSED_ATTN_BACKEND="reference")
    assert lines[:3] == ["reference", "reference", "torch"]
    assert "TRITON_INTERPRET" in lines[3]  # without the interpreter there are no kernels for CPU tensors
    (line,) = python("", FUSED_ATTN_BACKEND="cudnn")
    assert line == "ValueError: FUSED_ATTN_BACKEND: expected one of triton, torch, blocked, reference; got 'cudnn'"


def test_without_triton():
    lines = python("print(tried()); print(fused_attn.explain(q, k, v).reasons['triton'][0])\n"
                   "print(fused_attn.attention(q, k, v, softcap=1.0).shape)\n"
                   "print(fused_attn.scaled_dot_product_attention(q, k, v).shape); print(tried(backend='triton'))",
                   before="import sys\nsys.modules['triton'] = None\n")
    assert lines[:4] == ["torch", "Triton is not installed", *["torch.Size([1, 1, 4, 8])"] * 2]
    assert "Triton is not installed" in lines[4]


# A meta tensor stands for one on a device that is no CPU: shapes without numbers.


@pytest.mark.parametrize(("call", "arguments", "expected"), [
    (attention, {}, "torch"), (attention, {"softcap": 1.0}, "blocked"), (scaled_dot_product_attention, {}, "torch")])
def test_fallback_warns_once_with_the_reason(call, arguments, expected, monkeypatch):
    reason = f"the card is too old ({uuid.uuid4()})"
    monkeypatch.setattr(backends, "device_reasons", lambda device_type, index: (reason,))
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



def test_kernels_are_preferred_off_the_cpu(monkeypatch, ran):
    monkeypatch.setattr(backends, "device_reasons", lambda device_type, index: ())
    inputs = qkv(device="meta")
    assert explain(*inputs).backend == "triton"
    attention(*inputs)
    scaled_dot_product_attention(*inputs)
    assert ran == ["triton", "triton"]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_backend_named_in_the_environment_holds_for_sdpa(backend, monkeypatch, ran):
    monkeypatch.setattr(backends, "device_reasons", lambda device_type, index: ())
    monkeypatch.setattr(backends.settings, "BACKEND", backend)
    scaled_dot_product_attention(*qkv(device="meta"))
    assert "triton" not in ran


def test_explain_of_packed_sequences_and_of_likely_mistakes():
    x, cu = torch.randn(12, 2, 16), torch.tensor([0, 5, 12], dtype=torch.int32)
    packing = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 7, "max_seqlen_k": 7}
    told = fused_attn.explain(x, x, x, causal=True, **packing)
    assert told.backend == "blocked"
    assert not told.hints
    with pytest.raises(TypeError, match="max_seqlen_k: expected it beside cu_seqlens_q"):
        fused_attn.explain(x, x, x, **{name: value for name, value in packing.items() if name != "max_seqlen_k"})
    swapped = torch.randn(1, 512, 8, 64)
    assert "hint: q has 512 heads of 8 queries" in str(fused_attn.explain(swapped, swapped, swapped))
    assert not fused_attn.explain(*[swapped.transpose(1, 2)] * 3).hints
