"""Arguments that do not fit are refused before anything runs, by an error that names them, what came and what was expected."""

import math

import pytest
import torch
from support.guard import memory_guard

import fused_attn
from fused_attn import MaskMod, RelativeBias, ScoreMod, attention, attention_varlen, explain, reference_attention


def nested(*lengths, like):
    """A jagged nested tensor [B, H, j, D] with the heads and head dim of ``like``."""
    tokens = [torch.randn(n, like.shape[1], like.shape[3]) for n in lengths]
    return torch.nested.nested_tensor(tokens, layout=torch.jagged).transpose(1, 2)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


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
    "backend": (ValueError, r"backend: expected one of triton, torch, blocked, reference or None; got 'cudnn'", (Q, K, V),
                {"backend": "cudnn"}),
    "torch with softcap": (ValueError, r"backend: 'torch' cannot run this call: .*softcap", (Q, K, V),
                           {"backend": "torch", "softcap": 1.0}),
    "torch with LSE": (ValueError, r"backend: 'torch' cannot run this call: .*LSE", (Q, K, V),
                       {"backend": "torch", "return_lse": True}),
    "triton with head dim 577": (ValueError, r"backend: 'triton' cannot run this call: .*577.*576",
                                 (T(1, 1, 1, 577), T(1, 1, 1, 577), T(1, 1, 1, 8)), {"backend": "triton"}),
    "triton with value dim 577": (ValueError, r"backend: 'triton' cannot run this call: .*8 and 577.*576",
                                  (T(1, 1, 1, 8), T(1, 1, 1, 8), T(1, 1, 1, 577)), {"backend": "triton"}),
    "k nested": (ValueError, r"k: expected a dense tensor; got a nested one", (Q, nested(2, 3, like=K), V), {}),
    "precise": (TypeError, r"precise: expected a bool; got 1", (Q, K, V), {"precise": 1}),
    "fp32_precision": (ValueError, r"fp32_precision: expected one of ieee, tf32, tf32x3 or None; got 'fp16'", (Q, K, V),
                       {"fp32_precision": "fp16"}),
    "fp32_precision bool": (ValueError, r"fp32_precision: expected one of .*; got True", (Q, K, V), {"fp32_precision": True}),
    "torch with sinks": (ValueError, r"backend: 'torch' cannot run this call: .*sinks", (Q, K, V),
                         {"backend": "torch", "sinks": T(4)}),
    "torch with an additive score": (ValueError, r"backend: 'torch' cannot run this call: .*additive", (Q, K, V),
                                     {"backend": "torch", "score_weight": T(Q.shape[-1])}),
    "torch with a bias gradient": (ValueError, r"backend: 'torch' cannot run this call: .*bias gradient", (Q, K, V),
                                   {"backend": "torch", "bias": T(5, 7, requires_grad=True)}),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", [attention, explain])
def test_errors_name_the_argument_what_came_and_what_was_expected(case, call):
    exception, pattern, tensors, named = BAD[case]
    with memory_guard() as guard, pytest.raises(exception, match=pattern):
        call(*tensors, **named)
    assert guard.kernels == []


def test_good_bounds_are_not_refused():
    close(attention(Q, K, V, window=[None, 3], scale=2), attention(Q, K, V, window=(None, 3), scale=2.0))
    wide = attention(Q, K, V, window=(10**12, 10**12), softcap=50, backend="triton")
    close(wide, reference_attention(Q, K, V, softcap=50.0))


# --- what a call adds to plain attention ---


def packed(q, k, v, **arguments):
    """``attention`` of the same sequences by ``attention_varlen``, and so with the same extents [2, 4, 5, 7]."""
    cu_q, cu_k = (torch.arange(3, dtype=torch.int32) * n for n in (5, 7))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return attention_varlen(q, k, v, cu_q, cu_k, 5, 7, **arguments).unflatten(0, (2, 5)).transpose(1, 2)



META = torch.device("meta")
TWICE, EVEN = ScoreMod("twice", reference=lambda *a: a[0] * 2), MaskMod("even", reference=lambda q, k, *a: k % 2 == 0)
SHAPE = r"expected a shape that broadcasts to \(2, 4, 5, 7\); got "
ADDED = {  # argument: (exception, pattern after its name, value)...
    "bias": [
        (TypeError, r"expected a float tensor or a fused_attn\.RelativeBias; got \[0\.0\]", [0.0]),
        (TypeError, r"expected a float tensor or .*; got False", False), (TypeError, r"expected a float .*; got \(\)", ()),
        (TypeError, r"expected a float tensor \(a bool one is a mask\); got torch\.bool", torch.ones(5, 7) > 0),
        (TypeError, r"expected a float tensor.*; got torch\.int64", torch.ones(5, 7).long()),
        (TypeError, r"expected a float tensor.*; got torch\.complex64", torch.ones(5, 7) + 0j),
        (ValueError, SHAPE + r"\(5, 6\)", T(5, 6)), (ValueError, SHAPE + r"\(7, 5\)", T(7, 5)),
        (ValueError, SHAPE + r"\(2, 5, 7\)", T(2, 5, 7)), (ValueError, SHAPE + r"\(3, 1, 5, 7\)", T(3, 1, 5, 7)),
        (ValueError, SHAPE + r"\(1, 2, 4, 5, 7\)", T(1, 2, 4, 5, 7)), (ValueError, SHAPE + r"\(0,\)", T(0)),
        (ValueError, r"expected q's device cpu; got meta", T(5, 7, device=META)),
        (TypeError, r"expected RelativeBias of a float tensor; got \[1\.0\]", RelativeBias([1.0])),
        (TypeError, r"expected RelativeBias of a float tensor; got torch\.int64", RelativeBias(torch.ones(4, 11).long())),
        *((ValueError, rf"expected RelativeBias values \[4, 11\], .*; got \({got}\) on cpu", RelativeBias(T(shape)))
          for got, shape in (("4, 10", (4, 10)), ("4, 12", (4, 12)), ("4, 1", (4, 1)), ("11,", (11,)), ("2, 11", (2, 11)),
                             ("3, 4, 11", (3, 4, 11)), ("1, 2, 4, 11", (1, 2, 4, 11)))),
        (ValueError, r"expected RelativeBias values .* on cpu; got \(4, 11\) on meta", RelativeBias(T(4, 11, device=META))),
    ],
    "mask": [
        (TypeError, r"expected a bool tensor.* \(a float one is a bias\); got torch\.float32", torch.ones(5, 7)),
        (TypeError, r"expected a bool tensor.*; got torch\.int32", torch.ones(5, 7, dtype=torch.int32)),
        (TypeError, r"expected a bool tensor.*; got \[\[True\]\]", [[True]]),
        (TypeError, r"expected a bool tensor.*; got False", False), (TypeError, r"expected .*; got 'causal'", "causal"),
        (ValueError, SHAPE + r"\(5, 6\)", T(5, 6) > 0), (ValueError, SHAPE + r"\(2, 1, 1\)", T(2, 1, 1) > 0),
        (ValueError, SHAPE + r"\(3, 1, 1, 7\)", T(3, 1, 1, 7) > 0),
        (ValueError, SHAPE + r"\(1, 2, 4, 5, 7\)", T(1, 2, 4, 5, 7) > 0),
        (ValueError, r"expected q's device cpu; got meta", torch.ones(5, 7, dtype=torch.bool, device=META)),
    ],
    "alibi_slopes": [
        (TypeError, r"expected a float tensor \[H\] or \[B, H\]; got \[1, 2, 3, 4\]", [1, 2, 3, 4]),
        (TypeError, r"expected a float tensor .*; got torch\.int64", torch.arange(4)),
        (TypeError, r"expected a float tensor .*; got 0\.5", 0.5),
        *((ValueError, rf"expected shape \(4,\) or \(2, 4\) on cpu; got \({got}\) on cpu", T(shape))
          for got, shape in (("2,", (2,)), ("1, 4", (1, 4)), ("2, 2", (2, 2)), ("4, 2", (4, 2)), ("2, 4, 1", (2, 4, 1)),
                             ("", ()))),
        (ValueError, r"expected shape \(4,\) .* on cpu; got \(4,\) on meta", T(4, device=META)),
    ],
    "sinks": [
        (TypeError, r"expected a float tensor \[4\]; got \[0\.0", [0.0] * 4), (TypeError, r"expected .*; got 0\.0", 0.0),
        (TypeError, r"expected a float tensor \[4\]; got torch\.int64", torch.arange(4)),
        *((ValueError, rf"expected shape \(4,\) on cpu; got \({got}\) on cpu", T(shape))
          for got, shape in (("2,", (2,)), ("1,", (1,)), ("1, 4", (1, 4)), ("2, 4", (2, 4)), ("", ()))),
        (ValueError, r"expected shape \(4,\) on cpu; got \(4,\) on meta", T(4, device=META)),
    ],
    "dropout_p": [
        *((TypeError, rf"expected a float from 0 to 1; got {got}", value) for got, value in (
            ("'0.1'", "0.1"), ("''", ""), ("None", None), ("False", False), ("True", True),
            (r"tensor\(0\.5", torch.tensor(0.5, requires_grad=True)), (r"tensor\(\[0\., 0\.", torch.zeros(2)), (r"\(\)", ()),
            (r"1j", 1j))),
        *((ValueError, rf"expected a float from 0 to 1; got {value}", value) for value in (-0.1, 1.5, math.nan, math.inf, 2)),
    ],
    "score_mod": [
        *((TypeError, rf"expected a fused_attn\.ScoreMod, or one bound to its arguments; got {got}", value) for got, value in (
            ("'softcap'", "softcap"), ("False", False), (r"MaskMod\(name='even'", EVEN),
            (r"Bound\(mod=MaskMod\(name='even'", EVEN()), (r"RelativeBias", RelativeBias(T(4, 11))))),
        (TypeError, r"expected argument 1 to be a tensor or a number; got None", TWICE(1.0, None)),
        (TypeError, r"expected argument 0 to be a tensor or a number; got True", TWICE(True)),
        (TypeError, r"expected argument 0 to be a tensor or a number; got 'a'", TWICE("a")),
        (TypeError, r"expected argument 0 to be a tensor or a number; got RelativeBias", TWICE(RelativeBias(T(4, 11)))),
        (ValueError, r"expected argument 0 to be finite; got inf", TWICE(math.inf)),
        (ValueError, r"expected argument 0 to be finite; got nan", TWICE(math.nan)),
        (ValueError, r"argument 1 of twice: " + SHAPE + r"\(5, 6\)", TWICE(1.0, T(5, 6))),
        (TypeError, r"argument 0 of twice: expected a float tensor; got torch\.complex64", TWICE(T(5, 7) + 0j)),
        (ValueError, r"argument 0 of twice: expected q's device cpu; got meta", TWICE(T(5, 7, device=META))),
    ],
    "mask_mod": [
        *((TypeError, rf"expected a fused_attn\.MaskMod, or one bound to its arguments; got {got}", value) for got, value in (
            ("'causal'", "causal"), (r"ScoreMod\(name='twice'", TWICE),
            (r"Bound\(mod=ScoreMod\(name='twice'", TWICE()), (r"tensor\(\[", torch.ones(5, 7) > 0))),
        (TypeError, r"expected argument 0 to be a tensor or a number; got \[1\]", EVEN([1])),
        (ValueError, r"expected argument 0 to be finite; got -inf", EVEN(-math.inf)),
        (ValueError, r"argument 0 of even: " + SHAPE + r"\(3,\)", EVEN(torch.arange(3))),
        (ValueError, r"argument 1 of document: " + SHAPE + r"\(1, 1, 1, 6\)",
         fused_attn.document_mask(torch.arange(6), torch.arange(5))),
        (ValueError, r"argument 0 of prefix_lm: " + SHAPE + r"\(3, 1, 1, 1\)", fused_attn.prefix_lm_mask(torch.arange(3))),
        (ValueError, r"argument 0 of even: expected q's device cpu; got meta", EVEN(torch.arange(7, device=META))),
    ],
    "mod_args": [
        (TypeError, r"expected a tuple; got dict", {}), (TypeError, r"expected a tuple; got NoneType", None),
        (TypeError, r"expected a tuple; got Tensor", torch.ones(1)), (TypeError, r"expected a tuple; got float", 1.0),
        (ValueError, r"expected none without a score_mod or mask_mod .*; got 1", (1.0,)),
        (ValueError, r"expected none without a score_mod or mask_mod .*; got 2", [T(5, 7), 1]),
    ],
}
ADDED_CASES = [pytest.param(name, *case, id=f"{name}-{i}") for name, cases in ADDED.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize("call", [attention, reference_attention, explain, packed])
@pytest.mark.parametrize(("name", "exception", "pattern", "value"), ADDED_CASES)
def test_what_a_call_adds_is_checked(name, exception, pattern, value, call):
    with memory_guard() as guard, pytest.raises(exception, match=f"^{name}: {pattern}"):
        call(Q, K, V, **{name: value})
    assert guard.kernels == []


@pytest.mark.parametrize(("exception", "pattern", "value"), [
    (TypeError, r"expected an int32 or int64 tensor \[2\]; got \[7, 3\]", [7, 3]), (TypeError, r".*; got 7", 7),
    (TypeError, r".*; got False", False), (TypeError, r".*; got torch\.float32", torch.tensor([7.0, 3.0])),
    (TypeError, r".*; got torch\.int16", torch.tensor([7, 3], dtype=torch.int16)),
    (TypeError, r".*; got torch\.bool", T(2) > 0), (ValueError, r".*; got \(0,\) on cpu", torch.arange(0)),
    (ValueError, r"expected shape \(2,\) on cpu; got \(1,\) on cpu", torch.tensor([7])),
    (ValueError, r".*; got \(2, 1\) on cpu", torch.tensor([[7], [3]])), (ValueError, r".*; got \(\) on cpu", torch.tensor(7)),
    (ValueError, r".*; got \(2,\) on meta", torch.arange(2, device=META)),
])
def test_key_lengths_are_checked(exception, pattern, value):
    for call in (attention, reference_attention, explain):
        with pytest.raises(exception, match=f"^key_lengths: {pattern}"):
            call(Q, K, V, key_lengths=value)


def test_mod_args_are_no_second_arguments_of_a_bound_mod():
    with pytest.raises(ValueError, match=r"mod_args: expected none without a score_mod or mask_mod to bind them to; got 1"):
        attention(Q, K, V, score_mod=TWICE(), mask_mod=EVEN(), mod_args=(1.0,))
    shifted = ScoreMod("shifted", reference=lambda s, q, k, h, b, args: s + args[0] * k)
    given = attention(Q, K, V, score_mod=shifted, mod_args=[2.0], mask_mod=EVEN(), backend="reference")
    close(given, attention(Q, K, V, score_mod=shifted(2.0), mask_mod=EVEN, backend="reference"))
    assert not torch.equal(given, attention(Q, K, V, score_mod=shifted(0.0), mask_mod=EVEN, backend="reference"))


@pytest.mark.parametrize("value", [None, 1])
def test_unknown_arguments_are_refused(value):
    for call in (attention, reference_attention, explain, packed):
        with pytest.raises(TypeError, match="nonsense"):
            call(Q, K, V, nonsense=value)


def test_packed_sequences_take_no_key_lengths():
    for value in (torch.tensor([7, 3]), None):
        with pytest.raises(TypeError, match="key_lengths"):
            packed(Q, K, V, key_lengths=value)


@pytest.mark.parametrize("value", [None, True, False])
def test_deterministic_is_accepted(value):
    assert torch.equal(attention(Q, K, V, deterministic=value), attention(Q, K, V))
    explain(Q, K, V, deterministic=value)


# --- packed and nested sequences ---

QP, KP, VP = T(10, 4, 8), T(14, 2, 8), T(14, 2, 6)


def cu(*starts, dtype=torch.int32):
    return torch.tensor(starts, dtype=dtype)


PACKED = {"q": QP, "k": KP, "v": VP, "cu_seqlens_q": cu(0, 5, 10), "cu_seqlens_k": cu(0, 7, 14), "max_seqlen_q": 5,
          "max_seqlen_k": 7}
BAD_PACKED = [  # argument, exception, pattern, what it is given
    ("q", TypeError, r"expected a torch\.Tensor; got list", [1.0]),
    ("q", ValueError, r"expected 3 dimensions \[tokens, heads, head_dim\]; got shape \(1, 10, 4, 8\)", QP[None]),
    ("v", ValueError, r"expected 3 dimensions .*; got shape \(14, 6\)", VP[:, 0]),
    ("q", TypeError, r"expected float16, .*; got torch\.int64", QP.long()),
    ("k", TypeError, r"expected q's dtype torch\.float32; got torch\.float64", KP.double()),
    ("k", ValueError, r"expected q's device cpu; got meta", KP.to(META)),
    ("k", ValueError, r"expected .*head_dim 8", KP[..., :4]), ("v", ValueError, r"expected k's tokens and heads", VP[:13]),
    ("v", ValueError, r"expected k's .*heads", T(14, 4, 6)),
    *((f"cu_seqlens_{side}", exception, pattern, value) for side in "qk" for exception, pattern, value in (
        (TypeError, r"expected an int32 tensor \[sequences \+ 1\]; got \[0, 5\]", [0, 5]),
        (TypeError, r"expected an int32 tensor .*; got torch\.float32", torch.tensor([0.0, 5.0])),
        (TypeError, r"expected an int32 tensor .*; got None", None),
        (ValueError, r"expected \[sequences \+ 1\] on cpu; got \(1, 3\) on cpu", cu(0, 5, 10)[None]),
        (ValueError, r"expected .*; got \(0,\) on cpu", cu()), (ValueError, r"expected .*; got \(\) on cpu", cu(0)[0]),
        (ValueError, r"expected \[sequences \+ 1\] on cpu; got \(3,\) on meta", cu(0, 5, 10).to(META)),
        (ValueError, r"expected to rise from 0 to at most 1[04].*; got \[0, 5, 4\]", cu(0, 5, 4)),
        (ValueError, r"expected to rise from 0 .*; got \[1, 5, 10\]", cu(1, 5, 10)),
        (ValueError, r"expected to rise from 0 .*; got \[-2, 2, 4\]", cu(-2, 2, 4)),
        (ValueError, rf"expected .* at most 1[04], the tokens of {side}; got \[0, 5, 15\]", cu(0, 5, 15, dtype=torch.int64)))),
    ("cu_seqlens_k", ValueError, r"expected cu_seqlens_q's length 3; got 2", cu(0, 7)),
    *((f"max_seqlen_{side}", TypeError, rf"expected a non-negative int; got {value}", value)
      for side in "qk" for value in (-1, True, 5.0, None)),
    ("max_seqlen_q", ValueError, r"expected at least 5, the longest sequence; got 4", 4),
    ("max_seqlen_k", ValueError, r"expected at least 7, the longest sequence; got 0", 0),
    *((f"seqused_{side}", exception, pattern, value) for side in "qk" for exception, pattern, value in (
        (TypeError, r"expected an int32 or int64 tensor \[2\]; got \[5, 5\]", [5, 5]),
        (TypeError, r"expected .*; got torch\.float32", torch.ones(2)), (TypeError, r"expected .*; got False", False),
        (ValueError, r"expected shape \(2,\) on cpu; got \(3,\) on cpu", cu(0, 5, 10)),
        (ValueError, r"expected shape \(2,\) on cpu; got \(2,\) on meta", cu(5, 5).to(META)))),
    ("causal", TypeError, r"expected a bool; got 1", 1), ("window", ValueError, r"expected a pair .*; got 3", 3),
    ("softcap", ValueError, r"expected a positive .*; got 0", 0.0), ("scale", ValueError, r"expected .*; got nan", math.nan),
    ("strict", TypeError, r"expected a bool or None; got 1", 1), ("backend", ValueError, r"expected one of .*; got 'x'", "x"),
]


@pytest.mark.parametrize("backend", [None, "triton", "reference"])
@pytest.mark.parametrize(("name", "exception", "pattern", "value"), BAD_PACKED)
def test_packed_sequences_are_checked(name, exception, pattern, value, backend):
    with memory_guard() as guard, pytest.raises(exception, match=f"^{name}: {pattern}"):
        attention_varlen(**{"backend": backend, **PACKED, name: value})
    assert guard.kernels == []


def test_good_packings_are_not_refused():
    expected = attention_varlen(**PACKED)
    close(attention_varlen(**PACKED | {"max_seqlen_q": 100, "cu_seqlens_k": cu(0, 7, 14, dtype=torch.int64)}), expected)
    assert (attention_varlen(**PACKED | {"cu_seqlens_q": cu(0), "cu_seqlens_k": cu(0)}) == 0).all()


NESTED = {"q": nested(3, 5, like=Q), "k": nested(4, 2, like=K), "v": nested(4, 2, like=V)}
STRIDED = torch.nested.nested_tensor([T(2, 4, 8), T(2, 2, 8)])
SPARED = torch.nested.nested_tensor_from_jagged(T(10, 2, 8), torch.tensor([0, 4, 10]), torch.tensor([2, 5])).transpose(1, 2)
BAD_NESTED = [
    *((name, rf"expected a jagged nested tensor \[batch, heads, j, head_dim\], as q is nested; got {got}", value)
      for name in "kv" for got, value in (
          ("torch.strided of 4 dimensions", K), ("torch.strided of 4 dimensions", STRIDED), ("NoneType", None), ("list", [1.0]),
          ("torch.jagged of 3 dimensions", torch.nested.nested_tensor([T(4, 8), T(2, 8)], layout=torch.jagged)))),
    ("q", r"expected a jagged nested tensor .*; got torch.strided of 4 dimensions", STRIDED),
    *((name, r"expected the transpose\(1, 2\) of a contiguous nested tensor", value)
      for name in "kv" for value in (NESTED["k"].transpose(1, 2), SPARED)),
    ("k", r"expected q's batch 2; got 3", nested(4, 2, 1, like=K)),
    ("v", r"expected k's lengths, of offsets \[0, 4, 6\]; got \[0, 2, 6\]", nested(2, 4, like=V)),
    ("v", r"expected k's lengths, of offsets \[0, 4, 6\]; got \[0, 4, 6, 7\]", nested(4, 2, 1, like=V)),
    ("key_lengths", r"expected None with nested tensors", torch.tensor([3, 1])),
]


@pytest.mark.parametrize(("name", "pattern", "value"), BAD_NESTED)
def test_nested_tensors_are_checked(name, pattern, value):
    with memory_guard() as guard, pytest.raises(ValueError, match=f"^{name}: {pattern}"):
        attention(**NESTED | {name: value})
    assert guard.kernels == []


def test_dense_queries_take_no_nested_keys():
    for call in (attention, explain):
        with pytest.raises(ValueError, match=r"^k: expected a dense tensor; got a nested one"):
            call(Q, NESTED["k"], NESTED["k"])
    with pytest.raises(ValueError, match=r"^q: expected a dense tensor; got a nested one"):
        explain(**NESTED)


# --- mods ---


@pytest.mark.parametrize("kind", [ScoreMod, MaskMod])
@pytest.mark.parametrize("name", ["", "two words", "a:b", "a;b", "a,b", "1st", None, 3])
def test_a_mods_name_is_a_word(kind, name):
    with pytest.raises(ValueError, match=r"^name: expected a word of letters, digits and underscores; got "):
        kind(name)


FLOATS, TABLE = torch.zeros(3), torch.zeros(32, 4)


@pytest.mark.parametrize(("build", "exception", "message"), [
    (lambda: fused_attn.document_mask(FLOATS), TypeError, r"of_keys: expected an integer tensor \[N\] or \[B, N\]; got "),
    (lambda: fused_attn.document_mask([1, 2]), TypeError, r"of_keys: expected an integer tensor .*; got \[1, 2\]"),
    (lambda: fused_attn.document_mask(torch.arange(3), FLOATS), TypeError, "of_queries: expected an integer tensor"),
    (lambda: fused_attn.document_mask(torch.ones(1, 1, 3).long()), TypeError, r"of_keys: .* got torch.Size\(\[1, 1, 3\]\)"),
    (lambda: fused_attn.prefix_lm_mask(FLOATS), TypeError, "lengths: expected an integer tensor"),
    (lambda: fused_attn.prefix_lm_mask(torch.ones(2, 2).long()), TypeError, r"lengths: .* got torch.Size\(\[2, 2\]\)"),
    (lambda: fused_attn.prefix_lm_mask(3), TypeError, "lengths: .* got 3"),
    (lambda: fused_attn.dilated_window_mask(-1, 2), ValueError, "radius: expected an int of 0 or more; got -1"),
    (lambda: fused_attn.dilated_window_mask(2.0, 2), ValueError, "radius: expected an int of 0 or more; got 2.0"),
    (lambda: fused_attn.dilated_window_mask(2, 0), ValueError, "dilation: expected an int of 1 or more; got 0"),
    (lambda: fused_attn.dilated_window_mask(2, True), ValueError, "dilation: expected an int of 1 or more; got True"),
    (lambda: fused_attn.kerple(torch.arange(3), FLOATS), TypeError, r"r1: expected a float tensor \[H\] .*; got torch.int64"),
    (lambda: fused_attn.kerple(FLOATS, 0.5), TypeError, r"r2: expected a float tensor \[H\] or \[B, H\]; got 0.5"),
    (lambda: fused_attn.kerple(torch.ones(1, 3, 1, 1), FLOATS), ValueError, r"r1: expected shape .*; got \(1, 3, 1, 1\)"),
    (lambda: fused_attn.kerple(FLOATS, FLOATS.sum()), ValueError, r"r2: expected shape \[H\] or \[B, H\]; got \(\)"),
    (lambda: fused_attn.tree_mask(FLOATS, torch.arange(3)), TypeError, "enter: expected an integer tensor"),
    (lambda: fused_attn.tree_mask(torch.arange(3), FLOATS), TypeError, "leave: expected an integer tensor"),
    (lambda: fused_attn.soft_tree_mask(torch.arange(3), FLOATS, 1.0), TypeError, "leave: expected an integer tensor"),
    (lambda: fused_attn.tree_intervals(FLOATS), TypeError, "parents: expected an integer tensor"),
    (lambda: fused_attn.tree_intervals(torch.tensor([-1, 1])), ValueError, "parents: expected an earlier node.*node 1; got 1"),
    (lambda: fused_attn.tree_intervals(torch.tensor([2, -1, 0])), ValueError, "parents: .* node 0; got 2"),
    (lambda: fused_attn.tree_intervals(torch.tensor([-1, -2])), ValueError, "parents: .* node 1; got -2"),
    (lambda: fused_attn.t5_bias(FLOATS, 2, 2), TypeError, r"table: expected a tensor \[buckets, H\]; got torch.Size\(\[3\]\)"),
    (lambda: attention(Q, K, V, bias=fused_attn.t5_bias(TABLE, 5, 6)), ValueError, r"bias: expected .*\[4, 11\].*\(1, 4, 10\)"),
])
def test_builders_of_mods_check_what_they_are_given(build, exception, message):
    with pytest.raises(exception, match=f"^{message}"):
        build()
