"""Behaviour of single features that shapes and tolerances do not show: rows without a key, NaN beyond the end, tiles that
are skipped, memory, lengths and places that hurt."""

import pytest
import torch
from support import oracle
from support.features import BY_NAME, FEATURES, Call, Inputs, Shape
from support.guard import is_poison
from support.seconds import LACK_SECOND, TORCH_LACKS
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import attention, attention_varlen, dilated_window_mask, document_mask, prefix_lm_mask
from fused_attn.call import describe
from fused_attn.call.spec import TileConfig
from fused_attn.kernels import launch
from fused_attn.kernels.tile_list import list_launch
from fused_attn.plan.problem import Problem

pytestmark = pytest.mark.kernels

NAMES = ("out", "lse", "dq", "dk", "dv")
WIDE = ("dims_192", "dims_576")


def qkv(n_queries=70, n_keys=70, heads=2, kv_heads=2, batch=1, dim=16, dim_v=16, dtype=torch.float64):
    """q, k, v and dout."""
    sizes = ((heads, n_queries, dim), (kv_heads, n_keys, dim), (kv_heads, n_keys, dim_v), (heads, n_queries, dim_v))
    return [torch.randn(batch, *size, dtype=torch.float64).to(dtype) for size in sizes]


def run(q, k, v, dout, *others, backend="triton", function=attention, **arguments):
    """out, lse, dq, dk, dv and the gradients of ``others``, tensors that are in ``arguments`` already."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_lse=True, backend=backend, **arguments)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, [*leaves, *others], dout)


def assert_same(got, want, names=NAMES):
    for name, x, expected in zip(names, got, want, strict=False):
        assert torch.equal(x, expected), f"{name}: {int((x != expected).sum())} elements differ"


def assert_close(got, want):
    for i, (x, expected) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11, msg=lambda text, i=i: f"result {i}: {text}")


# --- rows without a key ---


def no_key(way):
    """Arguments with which the second of two batch entries, or row 7 of both, sees no key; and which rows those are."""
    rows = torch.zeros(2, 2, 70, dtype=torch.bool)
    if way == "key_lengths":
        rows[1] = True
        return {"key_lengths": torch.tensor([50, 0])}, rows
    rows[:, :, 7] = True
    if way == "mask":
        return {"mask": torch.arange(70)[:, None] != 7}, rows
    if way == "bias":
        return {"bias": torch.where(torch.arange(70)[:, None] == 7, -torch.inf, 0.0)}, rows
    return {"mask_mod": document_mask(torch.zeros(70, dtype=torch.long), (torch.arange(70) == 7).long())}, rows


@pytest.mark.few(5)
@pytest.mark.parametrize(("more", "dtype"), [({}, torch.float64), ({"dropout_p": 0.3}, torch.float64),
                                             ({"precise": True, "softcap": 3.0}, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("way", ["mask", "bias", "key_lengths", "document"])
def test_rows_without_a_key_give_zero_and_minus_infinity(way, more, dtype):
    arguments, rows = no_key(way)
    leaf = arguments["bias"].to(dtype).requires_grad_() if way == "bias" else None
    others = () if leaf is None else (leaf,)
    arguments |= {} if leaf is None else {"bias": leaf}
    out, lse, dq, *rest = run(*qkv(batch=2, dtype=dtype), *others, **arguments, **more)
    assert (out[rows] == 0).all()
    assert (lse[rows] == -torch.inf).all()
    assert (dq[rows] == 0).all()
    assert lse[~rows].isfinite().all()
    assert all(x.isfinite().all() for x in (out, dq, *rest))
    if leaf is not None:
        assert (rest[-1][7] == 0).all()


def test_a_row_without_a_key_has_its_sink():
    arguments, rows = no_key("mask")
    sinks = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    tensors = qkv(batch=2)
    got = run(*tensors, sinks, sinks=sinks, **arguments)
    assert (got[0][rows] == 0).all()
    torch.testing.assert_close(got[1][rows], sinks.detach().repeat(2))
    assert_close(got, run(*tensors, sinks, sinks=sinks, backend="reference", **arguments))


# --- NaN beyond the end ---


@pytest.mark.few(3)
@pytest.mark.parametrize("more", [{}, {"precise": True}, {"causal": True, "softcap": 3.0}, {"bias": True}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nan_beyond_key_lengths_does_not_leak(backend, more):
    lengths = torch.tensor([33, 0, 64])
    q, k, v, dout = qkv(batch=3)
    bias = torch.randn(3, 1, 1, 70, dtype=torch.float64)
    more = {"bias": bias.clone().requires_grad_()} if "bias" in more else more
    others = [x for x in more.values() if isinstance(x, torch.Tensor)]
    clean = run(q, k, v, dout, *others, key_lengths=lengths, backend=backend, **more)
    beyond = torch.arange(70) >= lengths[:, None]
    k, v = (x.masked_fill(beyond[:, None, :, None], torch.nan) for x in (k, v))
    if "bias" in more:
        others = [bias.masked_fill(beyond[:, None, None, :], torch.nan).requires_grad_()]
        more = {"bias": others[0]}
    got = run(q, k, v, dout, *others, key_lengths=lengths, backend=backend, **more)
    assert_same(got, clean, (*NAMES, "dbias"))
    for grad in got[3:5]:
        assert (grad.transpose(1, 2)[beyond] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_beyond_the_keys_mean_all_of_them(dtype):
    """The largest integer of a type stands for "no limit" in many programs, and a negative length for none."""
    tensors = qkv(40, 40, batch=2)
    lengths = torch.tensor([torch.iinfo(dtype).max, torch.iinfo(dtype).min], dtype=dtype)
    got = run(*tensors, key_lengths=lengths)
    assert_same(got, run(*tensors, key_lengths=torch.tensor([40, 0])))


@pytest.mark.parametrize("more", [{}, {"precise": True}, {"causal": True}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nan_beyond_what_packed_sequences_use_does_not_leak(backend, more):
    """Neither beyond seqused nor past the last sequence; dO is NaN there too, and results are 0."""
    cu = torch.tensor([0, 40, 40, 75], dtype=torch.int32)
    used_q, used_k = torch.tensor([40, 0, 3]), torch.tensor([33, 0, 35])
    inside_q, inside_k = torch.zeros(80, dtype=torch.bool), torch.zeros(80, dtype=torch.bool)
    inside_q[:40] = inside_q[40:43] = inside_k[:33] = inside_k[40:75] = True
    tensors = [torch.randn(80, 2, 16, dtype=torch.float64) for _ in range(4)]
    packing = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 40, "max_seqlen_k": 40, "seqused_q": used_q,
               "seqused_k": used_k}
    clean = run(*tensors, function=attention_varlen, backend=backend, **packing, **more)
    poisoned = [x.masked_fill(~inside[:, None, None], torch.nan)
                for x, inside in zip(tensors, (inside_q, inside_k, inside_k, inside_q), strict=True)]
    got = run(*poisoned, function=attention_varlen, backend=backend, **packing, **more)
    assert_same(got, clean)
    out, lse, dq, dk, dv = got
    assert (lse[:, ~inside_q] == -torch.inf).all()
    for x, inside in ((out, inside_q), (dq, inside_q), (dk, inside_k), (dv, inside_k)):
        assert (x[~inside] == 0).all()
        assert x[inside].isfinite().all()
        assert x[inside].count_nonzero() > 0


# --- tiles that are skipped ---


@pytest.mark.parametrize("precise", [False, True])
def test_tiles_that_a_mask_empties_are_not_read(precise):
    """NaN in keys of which no query sees any is not even multiplied by 0."""
    mask = torch.rand(70, 160) < 0.8
    mask[:, 64:128] = False
    tensors = qkv(70, 160)
    clean = run(*tensors, mask=mask, precise=precise)
    tensors[1][:, :, 64:128] = tensors[2][:, :, 64:128] = torch.nan
    assert_same(run(*tensors, mask=mask, precise=precise), clean)


@pytest.mark.parametrize(("arguments", "keys_first", "counts"), [
    ({}, False, [[2, 0]] * 4), ({"causal": True}, False, [[0, 2]] * 4), ({"window": (None, 64)}, False, [[2, 0]] * 4),
    ({}, True, [[2, 0]] * 4), ({"causal": True}, True, [[0, 2]] * 4),
], ids=str)
def test_documents_visit_the_tiles_on_the_diagonal_alone(arguments, keys_first, counts):
    q, k, v, _ = qkv(256, 256)
    call = describe.describe(q, k, v, mask_mod=document_mask(torch.arange(256) // 64), **arguments)
    tile = TileConfig(32, 64, 1, 1) if keys_first else TileConfig(64, 32, 1, 1)
    tiles, (listing,) = list_launch(Problem.of(*call).call, q, k, tile, keys_first=keys_first)
    launch.run(listing)
    assert tiles.counts[0, 0].tolist() == counts
    for row, (full, partial) in enumerate(counts):
        entries = tiles.entries[0, 0, row]
        visited = entries[:full].tolist() + entries[len(entries) - partial:].tolist()
        heads = 2 if keys_first and tiles.counts.shape[1] > 1 else 1
        assert sorted(visited) == [2 * row, 2 * row + 1][: 2 * heads]


class Allocations(TorchDispatchMode):
    """The largest storage that any op returned, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["document", "prefix_lm", "dilated_window", "tree", "relative", "t5", "key_lengths",
                                  "bias_keys", "alibi", "kerple", "soft_tree", "dropout", "sinks", "precise", "packed"])
def test_nothing_of_the_size_of_the_scores_is_allocated(name, monkeypatch):
    """Launches are left out, so that the length can be one at which N x N stands out."""
    n = 4096
    monkeypatch.setattr(launch, "_launch", lambda *_: None)
    inputs = Call((name,), Shape(1, 1, 1, n, n, 8, 8)).draw(torch.float32)
    with Allocations() as seen:
        inputs.run("triton")
    assert 4 * n * 8 <= seen.largest < n * n / 4, f"{seen.largest} bytes at N = {n}"


@pytest.mark.parametrize("n_queries", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 2**20))])
@pytest.mark.parametrize("arguments", [{"causal": True}, {"window": (4096, 0)}], ids=str)
def test_a_million_keys_cost_memory_linear_in_them(n_queries, arguments, monkeypatch):
    """Forward and backward; what splits of the keys write is a part of what the keys themselves take."""
    monkeypatch.setattr(launch, "_launch", lambda *_: None)
    q, k, v, dout = qkv(n_queries, 2**20, heads=4, kv_heads=1, dim=8, dim_v=8, dtype=torch.float16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with Allocations() as seen:
        torch.autograd.grad(attention(*leaves, backend="triton", **arguments), leaves, dout)
    assert seen.largest <= max(x.nbytes for x in leaves)


# --- lengths, head dims and places that hurt ---


@pytest.mark.few(7)
@pytest.mark.parametrize("name", [feature.name for feature in FEATURES if feature.name not in ("lengths", *WIDE)])
def test_lengths_of_nothing_and_of_one(name):
    square = "lengths" in BY_NAME[name].without
    for n_queries, n_keys in ((0, 0), (1, 1)) if square else ((0, 0), (0, 5), (5, 0), (1, 1), (1, 40)):
        inputs = Call((name,), Shape(2, 1, 1, n_queries, n_keys)).draw(torch.float64)
        got, want = inputs.run("triton"), inputs.run("reference")
        for key, x in got.items():
            assert not is_poison(x).any(), key
            torch.testing.assert_close(x, want[key], rtol=1e-11, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 7, 9, 11, 13, 15])
def test_small_head_dims(dim):
    call = Call(("bias_keys", "causal", "mask"), Shape(1, 2, 1, 40, 40, dim, 16 - dim))
    inputs = call.draw(torch.float64)
    assert_close(inputs.run("triton").values(), inputs.run("reference").values())


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_biases_of_ten_thousand(level):
    """LSE of ten thousand, of either sign: padded keys and rows must not overflow (pytorch#196678)."""
    tensors = qkv(37, 45, dtype=torch.float32)
    bias = (torch.randn(37, 45) + level).requires_grad_()
    got = run(*tensors, bias, bias=bias)
    wide = bias.detach().double().requires_grad_()
    want = run(*(x.double() for x in tensors), wide, bias=wide, backend="reference")
    assert got[1].mean() == pytest.approx(level, rel=0.01)
    for x, expected in zip(got, want, strict=True):  # fp32 holds a score of 1e4 to 1e-3
        torch.testing.assert_close(x.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.few(2)
@pytest.mark.parametrize("dimension", range(4))
def test_biases_and_masks_whose_elements_lie_far_apart(dimension, address_space):
    """Offsets beyond 32 bits in any dimension."""
    tensors = qkv(35, 35, batch=2, dtype=torch.float16)
    bias, mask = torch.randn(2, 2, 35, 35).half(), torch.rand(2, 2, 35, 35) < 0.7
    strides, step = [0, 0, 0, 0], 1
    for dim in (3, 2, 1, 0):
        strides[dim], step = (2**31 + 16, step) if dim == dimension and dim < 2 else (
            (2**27 + 16, step) if dim == dimension else (step, step * bias.shape[dim]))
    results = []
    for place in (torch.clone, lambda x: address_space(x.view(torch.uint8) if x.dtype == torch.bool else x, strides)):
        placed, kept = place(bias).requires_grad_(), place(mask).view(torch.bool)
        results.append(run(*tensors, placed, bias=placed, mask=kept))
    assert_same(*results, (*NAMES, "dbias"))


def test_more_heads_than_grid_axes_y_and_z_hold(monkeypatch):
    """Programs past 65535 of every kernel, those of masks and of bias gradients too; only a few programs are run."""
    import triton.runtime.interpreter as interpreter

    batch, heads = 5, 16411
    chosen = [0, 1, 65534, 65535, 65536, batch * heads - 1]
    launched = []

    def some(*bounds):
        if bounds == (batch * heads,):
            launched.append(bounds)
            # The gradient's programs count batch entries first, the others' heads.
            return chosen if len(launched) < 8 else [pid % heads * batch + pid // heads for pid in chosen]
        return range(*bounds)

    monkeypatch.setattr(interpreter, "range", some, raising=False)
    tensors = [torch.randn(batch, heads, 1, 16) for _ in range(4)]
    bias = torch.randn(batch, heads, 1, 1, requires_grad=True)
    keep = torch.ones(batch, heads, 1, 1, dtype=torch.bool)
    keep.view(-1)[chosen[2]] = False
    sinks = torch.zeros(heads)
    got = run(*tensors, bias, bias=bias, mask=keep, sinks=sinks)
    want = run(*tensors, bias, bias=bias, mask=keep, sinks=sinks, backend="reference")
    assert len(launched) == 8, "four kernels, a list of tiles for three of them, and the gradient of the bias"
    for name, x, expected in zip((*NAMES, "dbias"), got, want, strict=True):
        torch.testing.assert_close(x.flatten(0, 1)[chosen], expected.flatten(0, 1)[chosen], rtol=1e-4, atol=1e-5,
                                   msg=lambda text, name=name: f"{name}: {text}")


def test_the_mean_of_v_costs_no_digits_when_precise():
    """The error ratio of dQ and dK at a mean of 16, with and without ``precise``."""
    q, k, v, dout = qkv(384, 384, 1, 1, dim=64, dim_v=64, dtype=torch.bfloat16)
    v = (v.double() + 16).bfloat16()
    want = run(*(x.double() for x in (q, k, v, dout)), causal=True, backend="reference")
    for precise in (True, False):
        got = run(q, k, v, dout, causal=True, precise=precise)
        out, _, dq, dk, _ = (oracle.error_ratio(x, ref) for x, ref in zip(got, want, strict=True))
        assert out <= 1.5
        assert (max(dq, dk) <= 2) is precise, f"precise={precise}: R of dQ and dK {dq:.2f}, {dk:.2f}"


@pytest.mark.few(8)
@pytest.mark.parametrize("name", [
    feature.name if feature.gradients or feature.shape.get("layout") else pytest.param(feature.name, marks=pytest.mark.slow)
    for feature in FEATURES if feature.name not in WIDE])
def test_second_derivatives_by_each_tensor_alone(name):
    inputs: Inputs = Call((name,), Shape(1, n_queries=17, n_keys=17)).draw(torch.float64)
    lacks = "_nested_tensor" if name == TORCH_LACKS else LACK_SECOND.get(name)  # nested: torch cannot derive their making twice

    def second(of, backend):
        leaves = {**inputs.leaves, of: inputs.leaves[of].detach().requires_grad_()}
        torch.manual_seed(1)
        out, lse = inputs.attention(leaves, backend)
        loss = (out * inputs.dout).sin().sum() + lse.nan_to_num(0, 0, 0).sin().sum()
        first, = torch.autograd.grad(loss, leaves[of], create_graph=True)
        return torch.autograd.grad(first.sin().sum(), leaves[of])[0]

    for of in inputs.leaves:
        if lacks is not None:
            with pytest.raises(NotImplementedError, match=lacks):
                second(of, "triton")
        else:
            want = second(of, "reference")
            torch.testing.assert_close(second(of, "triton"), want, rtol=1e-10, atol=1e-11 * max(1.0, want.abs().max().item()))


def test_one_tensor_may_play_two_parts():
    both = torch.rand(2, dtype=torch.float64, requires_grad=True)
    tensors = qkv(40, 40)
    assert_close(*(run(*tensors, both, sinks=both, alibi_slopes=both, backend=backend) for backend in ("triton", "reference")))


def test_prefix_alone_sees_the_prefix():
    """A prefix of all keys is full attention, one of 0 keys causal attention."""
    tensors = qkv(70, 70, dtype=torch.float32)
    for length, arguments in ((70, {}), (0, {"causal": True})):
        same = run(*tensors, mask_mod=prefix_lm_mask(torch.tensor([length])))
        for x, expected in zip(same, run(*tensors, **arguments), strict=True):
            torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(70, 70), (45, 70), (70, 45)])
def test_a_dilated_window_keeps_every_nth_key_of_a_reach(n_queries, n_keys):
    tensors = qkv(n_queries, n_keys)
    apart = torch.arange(n_queries)[:, None] + n_keys - n_queries - torch.arange(n_keys)
    mask = sum(apart == 3 * step for step in range(-4, 5)) > 0
    assert_close(run(*tensors, mask_mod=dilated_window_mask(4, 3)), run(*tensors, mask=mask))
    assert_close(run(*tensors, mask_mod=dilated_window_mask(4, 3), causal=True), run(*tensors, mask=mask & (apart >= 0)))


@pytest.mark.parametrize(("radius", "dilation", "window"), [
    (6, 1, (6, 6)), (0, 5, (0, 0)), (2**70, 1, None), (1, 2**70, (0, 0))])
def test_dilated_windows_at_their_ends_are_windows(radius, dilation, window):
    """Without dilation, of no radius, beyond all keys, and with a dilation that no other key is as far as."""
    tensors = qkv(40, 40)
    assert_close(run(*tensors, mask_mod=dilated_window_mask(radius, dilation)), run(*tensors, window=window))


def test_the_switches_of_one_call_do_not_reach_the_next():
    tensors = qkv(40, 40)
    before = run(*tensors)
    run(*tensors, causal=True, dropout_p=0.5, softcap=2.0, precise=True, sinks=torch.zeros(2))
    assert_same(run(*tensors), before)
    assert fused_attn.explain(*tensors[:3], dropout_p=0.5).backend == "blocked"
