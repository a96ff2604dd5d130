"""Every feature alone, and every compatible pair of them in some combination: values and gradients against the reference."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import matrix, oracle
from support.features import BY_NAME, COMBINED, FEATURES, Call, Inputs, Shape, compatible, compatible_pairs, covering
from support.gates import check_bounded, check_ratio, packs
from support.guard import is_poison, memory_guard

pytestmark = pytest.mark.kernels

HALVES = (torch.float16, torch.bfloat16)
short = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
SINGLES = [Call((feature.name,)) for feature in FEATURES]
# 8 together find faults that hide from one another's absence, and leave few enough pairs attending to see them all.
COMBINATIONS = [Call(names, Shape(n_queries=40, n_keys=40)) for names in covering(8)]
COSTLY = {"dims_576", "dims_192"}


# --- exact ---


def check_exact(inputs: Inputs) -> None:
    """fp64 under the memory guard: out, lse and every gradient equal the reference's to 12 digits of the largest element."""
    with memory_guard() as guard:
        got = inputs.run("triton")
    assert {"forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel"} <= set(guard.kernels)
    want = inputs.run("reference")
    assert got.keys() == want.keys()
    for name, expected in want.items():
        x = got[name]
        assert x.shape == expected.shape, name
        assert not is_poison(x).any(), f"{name}: {int(is_poison(x).sum())} elements were never written"
        infinite = expected.isinf()
        assert torch.equal(x[infinite], expected[infinite]), f"{name}: rows without a key differ"
        assert name == "lse" or not infinite.any()
        error = (x - expected).masked_fill(infinite, 0).abs().nan_to_num(torch.inf)
        largest = max(1.0, float(expected.masked_fill(infinite, 0).abs().max()))
        assert error.max() <= 1e-12 * largest, f"{name}: off by {float(error.max()):.1e} of {largest:.1e}"


@pytest.mark.few(3)
@pytest.mark.parametrize("call", SINGLES, ids=str)
def test_every_feature_alone_is_exact(call):
    inputs = call.draw(torch.float64)
    check_exact(inputs)
    if inputs.leaves.keys() - set("qkv"):
        gradients = inputs.run("reference")
        for name in inputs.leaves:
            assert gradients[f"d{name}"].count_nonzero() > 0, f"d{name} is 0: the test sees nothing"


WITH_COSTLY_SLOW = [pytest.param(call, id=str(call), marks=pytest.mark.slow if COSTLY & {*call.features} else ())
                    for call in COMBINATIONS]


@pytest.mark.few(2)
@pytest.mark.parametrize("call", WITH_COSTLY_SLOW)
def test_features_together_are_exact(call):
    check_exact(call.draw(torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("call", COMBINATIONS, ids=str)
def test_features_together_are_exact_over_more_tiles(call):
    check_exact(Call(call.features, Shape()).draw(torch.float64, seed=3))


def test_every_compatible_pair_is_combined():
    seen = {frozenset(pair) for call in COMBINATIONS for pair in itertools.combinations(call.features, 2)}
    assert seen == compatible_pairs()
    for call in COMBINATIONS:
        assert all(compatible(BY_NAME[a], BY_NAME[b]) for a, b in itertools.combinations(call.features, 2))


# --- bounded error ---


def check_within(inputs: Inputs, dtype: torch.dtype) -> None:
    check_bounded(inputs, inputs.run("triton"), dtype)


# Of the rest only what is exact in fp64 as well: masks and layouts take part in no rounding.
ROUNDING = ("plain", "softcap", "bias", "relative", "t5", "alibi", "kerple", "soft_tree", "score_mod", "sinks", "dropout",
            "precise", "packed")
ALONE = [pytest.param(Call((feature.name,)), dtype, id=f"{feature.name}-{short(dtype)}",
                      marks=() if dtype == torch.bfloat16 and feature.name in ROUNDING else pytest.mark.slow)
         for feature in FEATURES for dtype in (*HALVES, torch.float32)]


@pytest.mark.few(3)
@pytest.mark.parametrize(("call", "dtype"), ALONE)
def test_the_error_of_every_feature_is_bounded(call, dtype):
    check_within(call.draw(dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=short)
@pytest.mark.parametrize("call", COMBINATIONS, ids=str)
def test_the_error_of_features_together_is_bounded(call, dtype):
    check_within(call.draw(dtype, seed=1), dtype)


# --- error ratio ---

IN_FAST_SUITE = ("bias", "sinks", "dropout", "precise")
RATIOS = [pytest.param(Call((feature.name,), Shape(1, 1, 1, 320, 320, 32, 32)), id=feature.name,
                       marks=() if feature.name in IN_FAST_SUITE else pytest.mark.slow)
          for feature in FEATURES if feature.name != "lse"]


@pytest.mark.few(2)
@pytest.mark.parametrize("call", RATIOS)
def test_the_error_ratio_of_every_feature(call):
    call = Call(call.features, call.base) if not packs(call) else Call(call.features, Shape(1, 1, 1, 520, 520, 32, 32))
    inputs = call.draw(torch.bfloat16)
    check_ratio(inputs, inputs.run("triton", with_lse=False), torch.bfloat16)


# --- any call ---


@st.composite
def calls(draw):
    names: list[str] = []
    candidates = [feature for feature in COMBINED if feature.name not in COSTLY]
    for _ in range(draw(st.integers(0, 6))):
        fitting = [f.name for f in candidates if all(compatible(f, BY_NAME[name]) for name in names)]
        names.append(draw(st.sampled_from([name for name in fitting if name not in names])))
    n_queries, n_keys = draw(st.integers(0, 75)), draw(st.integers(0, 75))
    n_queries = n_keys if {"tree", "soft_tree"} & set(names) else n_queries
    kv_heads = draw(st.integers(1, 2))
    shape = Shape(draw(st.integers(1, 2)), kv_heads * draw(st.integers(1, 3)), kv_heads, n_queries, n_keys,
                  draw(st.integers(1, 33)), draw(st.integers(1, 33)))
    return Call(tuple(names), shape)


def check_any(call: Call, dtype: torch.dtype) -> None:
    check_within(call.draw(dtype, seed=2), dtype)


quiet = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(call=calls(), dtype=st.sampled_from([torch.bfloat16, torch.float64]))
@settings(quiet, max_examples=5)
def test_any_call(call, dtype):
    check_any(call, dtype)


@pytest.mark.slow
@given(call=calls(), dtype=st.sampled_from([*HALVES, torch.float32, torch.float64]))
@settings(quiet, max_examples=150)
def test_any_call_at_length(call, dtype):
    check_any(call, dtype)


# --- the measure ---


def test_the_measure_sees_what_a_feature_leaves_out():
    """E must be able to fail: an operand left out of the scores, a gradient twice as large."""
    for name, changed in (("bias", "dbias"), ("alibi", "dslopes"), ("sinks", "dsinks"), ("t5", "dtable")):
        inputs = Call((name,)).draw(torch.float64)
        want = inputs.run("reference")
        leaves = {key: x.detach().requires_grad_() for key, x in inputs.leaves.items()}
        others = {key: x for key, x in leaves.items() if key not in ("q", "k", "v")}
        bounds, largest = oracle.amplitudes_of(inputs.described(leaves), inputs.dout, inputs.dlse, torch.bfloat16, others)
        tensors = {key: inputs.leaves[key] for key in "qkv"}
        plain = Inputs(Call(("plain",)), tensors, inputs.dout, inputs.dlse, []).run("reference")
        assert oracle.bounded_error(plain["out"].bfloat16(), want["out"], bounds["out"], largest)[0] > 1.25, name
        assert oracle.bounded_error((want[changed] * 2).bfloat16(), want[changed], bounds[changed], largest)[1] > 1.25, changed


def test_the_support_matrix_is_that_of_the_list():
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(), "PYTHONPATH=.:tests python -m support.matrix"
    readme = matrix.README.read_text(encoding="utf-8")
    assert readme == matrix.with_table(readme), "PYTHONPATH=.:tests python -m support.matrix"
    assert all(feature.family in matrix.FAMILIES for feature in FEATURES)
