"""Attention by blocks: exact in every feature and combination, whatever the blocks, in memory linear in the length."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.features import BY_NAME, COMBINED, FEATURES, Call, Inputs, Shape, compatible, covering
from support.gates import check_bounded, check_ratio, packs

import fused_attn
from fused_attn import attention, attention_varlen
from fused_attn.call import describe
from fused_attn.call.schema import Needs, Saved
from fused_attn.run import ops
from fused_attn.run.blocked import blocks, by_kernel, calls, dense, packed
from fused_attn.run.blocked.blocks import Dense, see

HALVES = (torch.float16, torch.bfloat16)
short = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
SINGLES = [Call((feature.name,)) for feature in FEATURES]
COMBINATIONS = [Call(names, Shape(n_queries=40, n_keys=40)) for names in covering(8)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few queries and one head, so that short calls have many of them."""
    monkeypatch.setattr(dense, "ROWS", 8)
    monkeypatch.setattr(dense, "KERNEL_ROWS", 32)
    monkeypatch.setattr(dense, "SCORES", 64)
    monkeypatch.setattr(packed, "TOKENS", 100)


def check_exact(inputs: Inputs) -> None:
    """fp64: out, lse and every gradient equal the reference's to 12 digits of the largest element."""
    got, want = inputs.run("blocked"), inputs.run("reference")
    assert got.keys() == want.keys()
    for name, expected in want.items():
        infinite = expected.isinf()
        assert torch.equal(got[name][infinite], expected[infinite]), f"{name}: rows without a key differ"
        assert got[name].shape == expected.shape
        if not expected.numel():
            continue
        error = (got[name] - expected).masked_fill(infinite, 0).abs().nan_to_num(torch.inf)
        largest = max(1.0, float(expected.masked_fill(infinite, 0).abs().max()))
        assert error.max() <= 1e-12 * largest, f"{name}: off by {float(error.max()):.1e} of {largest:.1e}"


# --- exact, in fp64 ---


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("call", SINGLES, ids=str)
def test_every_feature_alone_is_exact(call):
    check_exact(call.draw(torch.float64))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("call", COMBINATIONS, ids=str)
def test_features_together_are_exact(call):
    check_exact(call.draw(torch.float64, seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("call", COMBINATIONS, ids=str)
def test_features_together_are_exact_in_blocks_of_the_usual_size(call):
    check_exact(Call(call.features, Shape(n_queries=150, n_keys=150)).draw(torch.float64, seed=3))


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from([f.name for f in COMBINED if not f.name.startswith("dims_")]), max_size=3, unique=True),
       n_queries=st.integers(0, 70), n_keys=st.integers(0, 70), seed=st.integers(0, 99))
def test_any_lengths_are_exact(names, n_queries, n_keys, seed):
    if not all(compatible(BY_NAME[a], BY_NAME[b]) for a, b in itertools.combinations(names, 2)):
        return
    if {"tree", "soft_tree"} & {*names}:
        n_queries = n_keys
    check_exact(Call(tuple(names) or ("plain",), Shape(n_queries=n_queries, n_keys=n_keys)).draw(torch.float64, seed))


# --- bounded error ---


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("with_lse", [True, False], ids=["with the LSE", "without it"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32],
                         ids=short)
@pytest.mark.parametrize("call", SINGLES, ids=str)
def test_the_error_of_every_feature_is_bounded(call, dtype, with_lse):
    if not with_lse and "lse" in call.features:
        return
    inputs = call.draw(dtype)
    check_bounded(inputs, inputs.run("blocked", return_lse=with_lse), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=short)
@pytest.mark.parametrize("call", COMBINATIONS, ids=str)
def test_the_error_of_features_together_is_bounded(call, dtype):
    inputs = call.draw(dtype, seed=1)
    check_bounded(inputs, inputs.run("blocked"), dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=short)
@pytest.mark.parametrize("feature", ["plain", "causal", "window", "softcap", "bias", "sinks", "mask", "packed"])
def test_the_error_ratio_is_small(feature, dtype):
    call = Call((feature,), Shape(1, 1, 1, 320, 320, 32, 32))
    call = call if not packs(call) else Call(call.features, Shape(1, 1, 1, 520, 520, 32, 32))
    inputs = call.draw(dtype)
    check_ratio(inputs, inputs.run("blocked", with_lse=False), dtype)


@pytest.mark.parametrize("level", [-1e9, -1e10, torch.finfo(torch.float32).min])
def test_rows_whose_keys_all_have_a_large_negative_bias(level):
    """As good as plain PyTorch: equal weights where no digit of the score is left, and gradients of these weights."""
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(40, 40)
    bias[3:9] = level
    got, want = ([out := attention(q, k, v, bias=bias, backend=backend), *torch.autograd.grad(out.sin().sum(), (q, k, v))]
                 for backend in (None, "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_results_are_the_same_from_run_to_run():
    inputs = Call(("causal", "gqa", "softcap"), Shape(n_queries=300, n_keys=300)).draw(torch.bfloat16)
    first, again = inputs.run("blocked"), inputs.run("blocked")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_score_that_is_nan_is_hidden_by_a_mask():
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    keep = torch.rand(70, 70) > 0.5
    keep[:, 7] = False
    want = attention(q, k, v, mask=keep, softcap=9.0, backend="reference")
    k[:, :, 7] = torch.nan
    torch.testing.assert_close(attention(q, k, v, mask=keep, softcap=9.0, backend="blocked"), want)


# --- which keys a block sees ---


def seen(rows, **arguments):
    call = describe.describe(*(torch.zeros(1, 2, 60, 8) for _ in range(3)), **arguments)
    block, hidden = see(Dense.of(*call), rows)
    return block, hidden


def test_keys_out_of_reach_are_no_part_of_a_block():
    assert seen(slice(20, 30))[0].keys == slice(0, 60)
    assert seen(slice(20, 30), causal=True)[0].keys == slice(0, 30)
    assert seen(slice(20, 30), window=(5, 3))[0].keys == slice(15, 33)
    assert seen(slice(20, 30), key_lengths=torch.tensor([25]))[0].keys == slice(0, 25)
    documents = torch.arange(60) // 20
    block, hidden = seen(slice(20, 30), mask_mod=fused_attn.document_mask(documents))
    assert block.keys == slice(20, 40)
    assert hidden == ()


def test_keys_between_that_nobody_sees_are_left_out():
    mask = torch.zeros(60, 60, dtype=torch.bool)
    mask[:, ::4] = True
    mask[:, 3] = True
    block, hidden = seen(slice(0, 10), mask=mask)
    assert block.keys.tolist() == [0, 3, *range(4, 60, 4)]
    assert hidden == ()
    assert seen(slice(0, 10), mask=torch.zeros(60, dtype=torch.bool))[0].n_keys == 0


def test_a_window_hides_no_more_than_edges():
    _, hidden = seen(slice(20, 30), window=(9, 0))
    assert [columns for columns, _ in hidden] == [slice(0, 9), slice(10, 19)]


# --- memory ---


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.__name__.partition(".")[0] not in ("expand", "slice", "view"):
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("arguments", [
    {"causal": True}, {"softcap": 2.0}, {"window": (16, 0)}, {"alibi_slopes": torch.ones(1)}, {"sinks": torch.ones(1)},
    {"dropout_p": 0.5}, {"mask_mod": fused_attn.prefix_lm_mask(torch.tensor([9]))}], ids=lambda a: next(iter(a)))
def test_memory_is_linear(arguments):
    n = 4096
    q, k, v = (torch.randn(1, 1, n, 8) for _ in range(3))
    call = ops.seeded(describe.describe(q, k, v, **arguments))
    spec = call.spec._replace(blocked=True)
    with Largest() as largest:
        out, lse, _ = calls.forward(q, k, v, spec, call.others)
        needs = Needs(True, True, True, False, False, (False,) * len(call.others.operands))
        calls.backward(Saved(out, None, q, k, v, out, None, lse), spec, call.others, needs)
    assert n * n // 8 > largest.elements


def test_no_call_is_quadratic_unless_that_was_asked_for():
    documents = fused_attn.document_mask(torch.arange(600) // 100)
    inputs = [torch.randn(1, 2, 600, 16, requires_grad=True) for _ in range(3)]
    for arguments in ({"softcap": 2.0}, {"mask_mod": documents}, {"dropout_p": 0.1}, {"window": (3, 0)}, {"return_lse": True}):
        with fused_attn.strict():
            attention(*inputs, **arguments)


# --- where torch's kernel does it, and where not ---


def test_which_calls_go_to_torchs_kernel():
    def takes(dtype=torch.float32, needs=(), **arguments):
        call = describe.describe(*(torch.zeros(1, 2, 60, 8, dtype=dtype) for _ in range(3)), **arguments)
        return by_kernel.takes_forward(Dense.of(*call))

    assert takes(window=(3, 0))
    assert takes(bias=torch.zeros(60))
    assert takes(sinks=torch.zeros(2))
    assert not takes(torch.float16, causal=True)
    assert not takes(torch.float64, causal=True)
    assert not takes(torch.bfloat16)  # whose LSE it does not know well
    assert not takes(softcap=1.0)
    assert not takes(dropout_p=0.5)


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [5, 0, 17, 9, 30, 31, 2, 2], [300, 4, 4, 600]], ids=str)
def test_packed_sequences_are_batched_by_length(lengths):
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    q, k, v = (torch.randn(sum(lengths) + 2, 2, 16, dtype=torch.float64) for _ in range(3))
    call = describe.describe_packed(q, k, v, cu, cu, max(lengths), max(lengths), None, None, causal=True)
    batches = list(packed.batches(*call))
    assert sum(len(range(*x.sequences.indices(99))) if isinstance(x.sequences, slice) else len(x.sequences)
               for x in batches) == sum(n > 0 for n in lengths)
    assert len(batches) < sum(n > 0 for n in lengths)
    for x in batches:
        if isinstance(x.queries, torch.Tensor):
            assert x.queries.shape[1] <= 8 or (x.queries >= 0).sum() >= 0.7 * x.queries.numel()
    got, want = (attention_varlen(q, k, v, cu, cu, max(lengths), max(lengths), causal=True, backend=backend)
                 for backend in ("blocked", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_mod_without_a_reference_is_refused_by_name():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="own has no plain PyTorch reference"):
        attention(q, q, q, score_mod=fused_attn.ScoreMod("own"), backend="blocked")


def test_blocks_are_cut_by_the_number_of_threads(monkeypatch):
    batch = Dense.of(*describe.describe(*(torch.zeros(1, 8, 4096, 64) for _ in range(3)), softcap=1.0))
    sizes = {}
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sizes[threads] = dense.Sizes.of(batch, kernel=False)
    assert sizes[4].kv_heads == 4 * sizes[1].kv_heads
    assert blocks.Block(slice(0, sizes[1].rows), slice(0, 4096), 4096).n_keys == 4096
