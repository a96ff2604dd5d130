"""Forward and backward of the kernels against fp64: the gates R and E, over shapes chosen to hurt."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle
from support.oracle import Case

import fused_attn
from fused_attn.call.spec import TileConfig

pytestmark = pytest.mark.kernels

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
short = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731


def check_e(case: Case, dtype: torch.dtype, *, with_dlse: bool = True) -> None:
    inputs, dout, dlse = case.draw(dtype)
    dlse = dlse if with_dlse else None
    got = oracle.run(inputs, dout, dlse, {**case.arguments, "backend": "triton"})
    want = oracle.exact(inputs, dout, dlse, case.arguments)
    amplitude, largest = oracle.amplitudes(inputs, dout, dlse, case.arguments)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.isfinite(got[name]).all(), f"{name} is not finite"
        whole, row = oracle.bounded_error(got[name], want[name], amplitude[name], largest)
        assert whole <= oracle.E_LIMIT[dtype], f"{name}: E = {whole:.2f}"
        assert row <= max(oracle.E_ROW_LIMIT, oracle.E_LIMIT[dtype]), f"{name}: worst row E = {row:.2f}"
    empty = want["lse"] == float("-inf")
    assert torch.equal(got["lse"] == float("-inf"), empty), "rows without a key differ"
    precision = 2.0**-51 if dtype == torch.float64 else 2.0**-22
    lse = want["lse"].masked_fill(empty, 0)
    error = (got["lse"].double().masked_fill(empty, 0) - lse).abs()
    # The cheap tanh of halves is exact to 2**-23 of the cap, whatever the score (kernels/score.py).
    cap = (case.arguments.get("softcap") or 0.0) / 8 if dtype in HALVES else 0.0
    assert error.numel() == 0 or error.max() <= 8 * precision * max(1.0, largest, cap, float(lse.abs().max()))


HEAD_DIMS = [1, 8, 40, 59, 64, 80, 96, 111, 128, 192, 256]
HURTING = [
    *(Case(n_queries=n, n_keys=m, dim=16, arguments={"causal": True}) for n, m in
      [(1, 1), (1, 70), (70, 1), (31, 31), (32, 32), (33, 33), (63, 65), (64, 64), (65, 63), (97, 101), (37, 113), (113, 37)]),
    *(Case(n_queries=n, n_keys=m, dim=16) for n, m in [(0, 5), (5, 0), (0, 0), (1, 1), (67, 129), (129, 67)]),
    Case(heads=6, kv_heads=2, n_queries=70, n_keys=90, dim=24, dim_v=40),
    Case(heads=4, kv_heads=1, n_queries=90, n_keys=70, dim=40, dim_v=24, arguments={"causal": True}, batch=2),
    Case(n_queries=100, n_keys=100, arguments={"window": (17, 0)}),
    Case(n_queries=100, n_keys=131, arguments={"window": (0, 0)}),
    Case(n_queries=131, n_keys=100, arguments={"window": (5, 40)}),
    Case(n_queries=131, n_keys=40, arguments={"window": (5, 3)}),
    Case(n_queries=70, n_keys=150, arguments={"window": (None, 20)}),
    Case(n_queries=70, n_keys=150, arguments={"window": (64, None)}),
    Case(n_queries=70, n_keys=150, arguments={"window": (2**40, 2**40)}),
    Case(heads=4, kv_heads=2, n_queries=97, n_keys=97, arguments={"window": (33, 5), "causal": True, "softcap": 2.0}),
    Case(n_queries=80, n_keys=80, arguments={"softcap": 1.0}, q_scale=4),
    Case(n_queries=80, n_keys=80, arguments={"softcap": 1e4}),
    Case(n_queries=70, n_keys=70, arguments={"scale": -0.3, "causal": True}),
    Case(n_queries=70, n_keys=70, arguments={"scale": 0.0}),
    Case(n_queries=70, n_keys=70, arguments={"scale": 1.0, "causal": True}),
    Case(n_queries=70, n_keys=70, q_scale=300, arguments={"causal": True}),
    Case(n_queries=70, n_keys=70, v_mean=16, arguments={"causal": True}),
]


# fp16 and fp32 walk the same code as bf16 and fp64: the fast suite leaves them to ordinary shapes and drawn calls.
THOROUGH = [torch.bfloat16, torch.float64, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float16, torch.float32))]


@pytest.mark.few(5)
@pytest.mark.parametrize("dtype", THOROUGH, ids=short)
@pytest.mark.parametrize("case", HURTING, ids=str)
def test_error_is_bounded_on_shapes_that_hurt(case, dtype):
    check_e(case, dtype)


@pytest.mark.few(6)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_error_is_bounded_for_every_head_dim(dim, dtype):
    check_e(Case(heads=2, kv_heads=1, n_queries=40, n_keys=70, dim=dim, arguments={"causal": True}), dtype)


ORDINARY = [
    Case(heads=1, kv_heads=1, n_queries=256, n_keys=256, dim=64, arguments={"causal": True}),
    Case(heads=2, kv_heads=1, n_queries=256, n_keys=320, dim=32),
    Case(heads=1, kv_heads=1, n_queries=320, n_keys=320, dim=32, arguments={"window": (64, 0), "softcap": 4.0}),
]


def check_r(case: Case, dtype: torch.dtype, backend: str = "triton") -> None:
    inputs, dout, _ = case.draw(dtype)
    got = oracle.run(inputs, dout, None, {**case.arguments, "backend": backend})
    want = oracle.exact(inputs, dout, None, case.arguments)
    limit_out, limit_grad = oracle.max_r(dtype, case.dim)
    for name in ("out", "dq", "dk", "dv"):
        ratio = oracle.error_ratio(got[name], want[name])
        assert ratio <= (limit_out if name == "out" else limit_grad), f"{name}: R = {ratio:.2f}"
    if dtype in HALVES:
        error = got["out"].double() - want["out"]
        assert abs(float(error.mean() / error.std())) <= 0.05, "rounding is biased"


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=short)
@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_error_ratio_on_ordinary_shapes(case, dtype):
    check_r(case, dtype)


@pytest.mark.parametrize("dim", [pytest.param(d, marks=pytest.mark.slow) if d != 128 else d for d in (32, 96, 128, 192, 256)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_error_ratio_of_fp32_grows_with_the_head_dim_as_told(backend, dim):
    check_r(Case(2, 1, 256, 256, dim), torch.float32, backend)


def test_the_limit_of_the_ratio_is_a_law_of_the_head_dim():
    """Independent errors, one of them of D terms: squares grow in proportion to D; for halves D plays no part."""
    squares = [oracle.max_r(torch.float32, dim)[1] ** 2 for dim in (32, 64, 128, 256)]
    assert squares == pytest.approx([556, 628, 772, 1060])
    assert all(oracle.max_r(dtype, dim) == (1.5, 2.0) for dtype in HALVES for dim in (32, 256))


def test_error_ratio_with_large_queries():
    case = Case(heads=1, kv_heads=1, n_queries=256, n_keys=256, dim=64, q_scale=8, arguments={"causal": True})
    inputs, dout, _ = case.draw(torch.bfloat16)
    got = oracle.run(inputs, dout, None, {**case.arguments, "backend": "triton"})
    want = oracle.exact(inputs, dout, None, case.arguments)
    ratios = {name: oracle.error_ratio(got[name], want[name]) for name in ("out", "dq", "dk", "dv")}
    assert ratios.pop("out") <= 1.5
    assert max(ratios.values()) <= 4.0, ratios


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_the_reference_is_held_to_the_same_ratio(dtype):
    case = ORDINARY[0]
    inputs, dout, _ = case.draw(dtype)
    got = oracle.run(inputs, dout, None, {**case.arguments, "backend": "reference"})
    want = oracle.exact(inputs, dout, None, case.arguments)
    for name in ("out", "dq", "dk", "dv"):
        assert oracle.error_ratio(got[name], want[name]) <= 1.5


def test_the_measures_see_a_wrong_kernel():
    """E and R must be able to fail: a forgotten key, a factor in one gradient, a state kept in bf16."""
    case = ORDINARY[0]
    inputs, dout, _ = case.draw(torch.bfloat16)
    want = oracle.exact(inputs, dout, None, case.arguments)
    amplitude, largest = oracle.amplitudes(inputs, dout, None, case.arguments)
    forgetful = oracle.exact(inputs, dout, None, {"window": (127, 0)})
    assert oracle.bounded_error(forgetful["out"].bfloat16(), want["out"], amplitude["out"], largest)[1] > oracle.E_ROW_LIMIT
    scaled = (want["dk"] * 1.02).bfloat16()
    assert oracle.error_ratio(scaled, want["dk"]) > 2.0
    q, k, v = (x.detach() for x in inputs)
    naive = torch.softmax((q @ k.mT * 0.125).masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), -torch.inf), -1) @ v
    assert oracle.error_ratio(naive, want["out"]) > 1.5


# Bugs that other libraries had, by name.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=short)
@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_logits_of_ten_thousand(dtype, logit, softcap):
    q = torch.full((1, 1, 40, 16), 100.0).to(dtype)
    k = (torch.randn(1, 1, 40, 16) * 0.01 + logit / 1600).to(dtype)
    v, dout = torch.randn(1, 1, 40, 16).to(dtype), torch.randn(1, 1, 40, 16).to(dtype)
    arguments = {"scale": 1.0, "softcap": softcap, "causal": True}
    got = oracle.run([q, k, v], dout, None, {**arguments, "backend": "triton"})
    want = oracle.exact([q, k, v], dout, None, arguments)
    amplitude, largest = oracle.amplitudes([q, k, v], dout, None, arguments)
    assert largest > 9e3
    for name in ("out", "dq", "dk", "dv"):
        assert torch.isfinite(got[name]).all()
        assert oracle.bounded_error(got[name], want[name], amplitude[name], largest)[0] <= oracle.E_LIMIT[dtype]


def test_very_negative_lse_does_not_overflow_padded_keys():
    """exp(0 - LSE) of a padded key overflows once LSE < -88.7 (pytorch#196678)."""
    q, k = torch.full((1, 1, 37, 16), 4.0), torch.full((1, 1, 37, 16), -4.0)
    v, dout = torch.randn(1, 1, 37, 16), torch.randn(1, 1, 37, 16)
    got = oracle.run([q, k, v], dout, None, {"scale": 1.0, "backend": "triton"})
    want = oracle.exact([q, k, v], dout, None, {"scale": 1.0})
    assert want["lse"].max() < -200
    for name in oracle.NAMES:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-4)


def test_rows_without_a_key_give_zero_and_minus_infinity():
    inputs, dout, dlse = Case(n_queries=50, n_keys=20, dim=16, arguments={"causal": True}).draw(torch.float32)
    got = oracle.run(inputs, dout, dlse, {"causal": True, "backend": "triton"})
    assert (got["out"][:, :, :30] == 0).all()
    assert (got["lse"][:, :, :30] == -torch.inf).all()
    assert (got["dq"][:, :, :30] == 0).all()
    for name in ("out", "dq", "dk", "dv"):
        assert torch.isfinite(got[name]).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("block", [(16, 16), (16, 64), (64, 16), (128, 32)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_tiles_do_not_change_the_answer(monkeypatch, block):
    """Other tile shapes walk other interior and edge tiles: the answer is the same up to rounding."""
    from fused_attn.plan import problem

    monkeypatch.setattr(problem, "choose", lambda *_: TileConfig(*block, 1, 1))
    for arguments in ({"causal": True}, {"window": (30, 7)}, {}):
        check_e(Case(heads=4, kv_heads=2, n_queries=75, n_keys=110, dim=16, arguments=arguments), torch.float64)


def test_dk_and_dv_by_a_launch_each_are_bitwise_the_same(monkeypatch):
    from fused_attn.plan import problem

    inputs, dout, dlse = Case(heads=4, kv_heads=2, n_queries=75, n_keys=90, dim=16).draw(torch.float32)
    together = oracle.run(inputs, dout, dlse, {"causal": True, "backend": "triton"})
    monkeypatch.setattr(problem, "choose", lambda *_: TileConfig(32, 64, 1, 1, separate=True))
    joint = lambda *_: TileConfig(32, 64, 1, 1)  # noqa: E731
    apart = oracle.run(inputs, dout, dlse, {"causal": True, "backend": "triton"})
    monkeypatch.setattr(problem, "choose", joint)
    joined = oracle.run(inputs, dout, dlse, {"causal": True, "backend": "triton"})
    for name in ("dk", "dv"):
        assert torch.equal(apart[name], joined[name])
        torch.testing.assert_close(apart[name], together[name])


def test_backward_is_deterministic_to_the_bit():
    inputs, dout, dlse = Case(heads=4, kv_heads=2, n_queries=70, n_keys=100).draw(torch.bfloat16)
    first, second = (oracle.run(inputs, dout, dlse, {"backend": "triton"}) for _ in range(2))
    for name in oracle.NAMES:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("arguments", [{"causal": True}, {"window": (2, 1), "softcap": 1.5}], ids=str)
def test_gradcheck(arguments):
    q, k, v = (torch.randn(1, heads, n, 3, dtype=torch.float64, requires_grad=True) for heads, n in ((2, 4), (1, 5), (1, 5)))

    def call(q, k, v):
        return fused_attn.attention(q, k, v, return_lse=True, backend="triton", **arguments)

    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)


windows = st.one_of(st.none(), st.tuples(st.one_of(st.none(), st.integers(0, 80)), st.one_of(st.none(), st.integers(0, 80))))


@given(
    n_queries=st.integers(0, 80), n_keys=st.integers(0, 80), dim=st.integers(1, 40), dim_v=st.integers(1, 40),
    kv_heads=st.integers(1, 2), group=st.integers(1, 3), causal=st.booleans(), window=windows,
    softcap=st.one_of(st.none(), st.floats(0.5, 50)), dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_call(n_queries, n_keys, dim, dim_v, kv_heads, group, causal, window, softcap, dtype):
    arguments = {"causal": causal, "window": window, "softcap": softcap}
    check_e(Case(kv_heads * group, kv_heads, n_queries, n_keys, dim, dim_v, arguments=arguments), dtype)
