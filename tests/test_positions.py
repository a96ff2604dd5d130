"""Where tokens stand: each module against its formula, the rotary kernel against its plain form."""

import cmath
import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from fused_attn import attention
from fused_attn.call.mods import t5_bias
from fused_attn.nn import (
    LearnedPositions,
    MultiheadAttention,
    RotaryEmbedding,
    SinusoidalPositions,
    T5RelativeBias,
    alibi_slopes,
)
from fused_attn.run import ops  # noqa: F401  # repairs first

FAR = 100_000
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)])


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def placed(positions, batch, length):
    """[B][N] positions as Python ints."""
    if isinstance(positions, torch.Tensor):
        return positions.expand(batch, length).tolist()
    return [[(positions or 0) + n for n in range(length)]] * batch


POSITIONS = {  # of a batch of 2, lengths of 5
    "from zero": None, "from an int": 37, "far": FAR, "[N]": torch.tensor([3, 0, 9, 9, 70_000]),
    "[B, N]": torch.tensor([[0, 1, 2, 3, 4], [500, 7, 7, 0, FAR]]),
}


# --- sinusoids ---


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_sinusoids_are_the_papers(positions):
    x, at = normal(2, 5, 6), placed(positions, 2, 5)
    exact = torch.tensor([[[math.sin(p / 10000 ** (i / 6)) if i % 2 == 0 else math.cos(p / 10000 ** ((i - 1) / 6))
                            for i in range(6)] for p in row] for row in at], dtype=torch.float64)
    module = SinusoidalPositions(6)
    close(module(x, positions), x + exact)
    close(module(x.float(), positions), x.float() + exact.float(), 1e-6)
    half = module.bfloat16()(x.bfloat16(), positions)
    assert torch.equal(half, x.bfloat16() + exact.bfloat16())  # whatever the module was rounded to
    assert list(module.state_dict()) == []


def test_sinusoids_of_any_length_and_their_dropout():
    module, x = SinusoidalPositions(4, dropout=1.0), normal(1, 700, 4)
    assert not module(x).any()
    module.eval()
    short = module(x[:, :3])
    long = module(x)
    assert torch.equal(long[:, :3], short)
    assert torch.equal(long, SinusoidalPositions(4)(x))
    assert torch.equal(module(x[:, 600:], 600), long[:, 600:])
    for bad in (0, 3, -2):
        with pytest.raises(ValueError, match=f"embed_dim: expected a positive even int; got {bad}"):
            SinusoidalPositions(bad)


# --- learned positions ---


@pytest.mark.parametrize("positions", [None, 3, torch.tensor([3, 0, 9, 9, 1]), torch.tensor([[0, 1, 2, 3, 4], [9, 7, 7, 0, 5]])
                                       ], ids=["from zero", "from an int", "[N]", "[B, N]"])
def test_learned_positions(positions):
    module, x = LearnedPositions(10, 6, dtype=torch.float64), normal(2, 5, 6)
    one_hot = torch.nn.functional.one_hot(torch.tensor(placed(positions, 2, 5)), 10).double()
    out, cotangent = module(x, positions), normal(2, 5, 6)
    close(out, x + one_hot @ module.weight)
    (grad,) = torch.autograd.grad(out, module.weight, cotangent)
    close(grad, one_hot.flatten(0, 1).T @ cotangent.flatten(0, 1))


def test_learned_positions_end():
    module = LearnedPositions(5, 4)
    assert module(torch.zeros(1, 5, 4)).shape == (1, 5, 4)
    with pytest.raises(ValueError, match="positions: expected 0 or more; got -1"):
        module(torch.zeros(1, 2, 4), -1)
    for bad in (torch.tensor([-1, 0]), torch.tensor([[0, 5]]), torch.tensor(-1), torch.tensor(4)):
        with pytest.raises(ValueError, match="positions: expected 0 to 4; got"):
            module(torch.zeros(1, 2, 4), bad)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)  # where nobody looks first, it is no other position
    with pytest.raises(IndexError, match="out of"):
        compiled(torch.zeros(1, 2, 4), torch.tensor([-1, 0]))
    torch._dynamo.reset()
    for length, first in ((6, None), (3, 3), (1, 5)):
        with pytest.raises(ValueError, match="x: expected positions below 5; got a length that ends at 6"):
            module(torch.zeros(1, length, 4), first)
    drawn = LearnedPositions(1000, 64).weight
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize("make", [lambda: SinusoidalPositions(4), lambda: LearnedPositions(9, 4), lambda: RotaryEmbedding(4)],
                         ids=["sinusoids", "learned", "rotary"])
@pytest.mark.parametrize(("positions", "error"), [
    (1.5, TypeError), (True, TypeError), ("3", TypeError), ([0, 1, 2], TypeError), (torch.tensor([0.0, 1.0, 2.0]), ValueError),
    (torch.tensor([True, False, True]), ValueError), (torch.tensor([0, 1]), ValueError), (torch.zeros(3, 3).long(), ValueError),
    (torch.zeros(1, 1, 3).long(), ValueError)], ids=str)
def test_positions_are_integers_of_each_token(make, positions, error):
    module, x = make(), normal(2, 3, 4)
    call, x = (module.turn, x[:, None]) if isinstance(module, RotaryEmbedding) else (module, x)
    with pytest.raises(error, match=r"^positions: expected an int, or integers \[3\] or \[2, 3\]; got"):
        call(x, positions)


@pytest.mark.parametrize("first", [np.int64(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)], ids=repr)
@pytest.mark.parametrize("make", [lambda: SinusoidalPositions(4), lambda: LearnedPositions(9, 4)], ids=["sinusoids", "learned"])
def test_a_first_position_may_be_a_tensor(make, first):
    x, module = normal(2, 3, 4), make()
    assert torch.equal(module(x, first), module(x, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("make", [lambda: SinusoidalPositions(4), lambda: LearnedPositions(300, 4),
                                  lambda: LearnedPositions(3, 4), lambda: RotaryEmbedding(4)],
                         ids=["sinusoids", "learned", "few", "rotary"])
def test_positions_of_any_integer_type(make, dtype):
    module, x = make(), normal(2, 3, 4)
    call, x = (module.turn, x[:, None]) if isinstance(module, RotaryEmbedding) else (module, x)
    for positions in (torch.tensor([2, 2, 2]), torch.tensor([0, 2, 1]), torch.tensor([[0, 1, 2], [2, 1, 0]])):
        assert torch.equal(call(x, positions.to(dtype)), call(x, positions))


@pytest.mark.parametrize("make", [lambda: SinusoidalPositions(4), lambda: LearnedPositions(9, 4)], ids=["sinusoids", "learned"])
def test_positions_go_to_tokens_of_their_own_sequence(make):
    """In tensors of more dimensions too, where as many heads as sequences might take them for theirs."""
    module, x = make().double(), normal(2, 2, 3, 4)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    expected = torch.stack([module(x[:, h], positions) for h in range(2)], 1)
    assert torch.equal(module(x, positions), expected)
    for bad in (torch.zeros(2, 3, 1), torch.zeros(2, 3, 8), torch.zeros(4), None):
        with pytest.raises(ValueError, match=r"^x: expected \[..., length, 4\]; got "):
            module(bad)


@pytest.mark.parametrize(("error", "make"), [
    ("frequencies: expected real numbers of shape .2,.; got torch.complex64",
     lambda: RotaryEmbedding(4, frequencies=torch.ones(2) * 1j)),
    ("frequencies: expected finite", lambda: RotaryEmbedding(4, frequencies=torch.tensor([1.0, math.nan]))),
    ("positions: expected an int below 2..53", lambda: RotaryEmbedding(4).turn(normal(1, 1, 3, 4), 10**30)),
    ("positions: expected an int below 2..53", lambda: SinusoidalPositions(4)(normal(1, 3, 4), -2**53))])
def test_angles_are_of_numbers(error, make):
    with pytest.raises(ValueError, match=f"^{error}"):
        make()


# --- rotations ---


@pytest.mark.parametrize("first", [-1, -100, -FAR])
def test_negative_positions_turn_back(first):
    """Before 0 there are positions too: none of them is another one's."""
    x, rope, sinusoids = normal(2, 4, 5, 8), RotaryEmbedding(8, base=500.0), SinusoidalPositions(8)
    at, frequencies = placed(first, 2, 5), [500.0 ** (-2 * i / 8) for i in range(4)]
    close(rope(x, x, first)[0], turned(x, at, frequencies, False), 1e-10)
    close(rope(x, x, first)[1], rope.turn(x, torch.tensor(at)))
    close(sinusoids(x[:, 0], first), sinusoids(x[:, 0], torch.tensor(at)))
    close(sinusoids(x[:, 0], first)[0, 0, 0] - x[0, 0, 0, 0], torch.tensor(math.sin(first), dtype=torch.float64))


def turned(x, at, frequencies, interleaved):
    """x [B, H, N, D] turned, pair by pair, as complex numbers; fp64."""
    out, n_pairs = x.double().clone(), len(frequencies)
    for b, n, i in itertools.product(range(x.shape[0]), range(x.shape[2]), range(n_pairs)):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + n_pairs)
        turn = cmath.exp(1j * at[b][n] * frequencies[i])
        a, c = x[b, :, n, first].double(), x[b, :, n, second].double()
        out[b, :, n, first], out[b, :, n, second] = a * turn.real - c * turn.imag, c * turn.real + a * turn.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dim", [8, 6], ids=["all columns", "partial"])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_rotations_are_the_papers(positions, dim, interleaved):
    q, k, at = normal(2, 4, 5, 8), normal(2, 2, 5, 8), placed(positions, 2, 5)
    rope = RotaryEmbedding(dim, base=500.0, interleaved=interleaved)
    frequencies = [500.0 ** (-2 * i / dim) for i in range(dim // 2)]
    for x, out in zip((q, k), rope(q, k, positions), strict=True):
        close(out, turned(x, at, frequencies, interleaved), 1e-10)  # an fp64 angle of 1e5 has 1e-11
        assert torch.equal(out[..., dim:], x[..., dim:])
    q, k = q.clamp(-1, 1).float(), k.clamp(-1, 1).float()
    for x, out in zip((q, k), rope(q, k, positions), strict=True):
        assert out.dtype == torch.float32
        assert (out - turned(x, at, frequencies, interleaved)).abs().max() < 1e-6


@pytest.mark.parametrize("offset", [1, 300, FAR])
def test_scores_depend_on_the_difference_alone(offset):
    q, k, rope = normal(2, 4, 9, 16), normal(2, 4, 9, 16), RotaryEmbedding(16)
    (q0, k0), (q1, k1) = rope(q, k), rope(q, k, offset)
    close(q0 @ k0.mT, q1 @ k1.mT, 1e-9)
    assert not torch.allclose(q0 @ k0.mT, q0 @ k1.mT)


def test_angles_are_no_part_of_the_module():
    """Rounding the module, copying it, calling it with other lengths: nothing changes the angles."""
    x = normal(1, 2, 900, 8, dtype=torch.float32)
    rope = RotaryEmbedding(8)
    short = rope(x[:, :, :5], x[:, :, :5])[0]
    expected = rope(x, x)[0]
    assert torch.equal(short, expected[:, :, :5])
    assert torch.equal(rope(x[:, :, 400:], x[:, :, 400:], 400)[0], expected[:, :, 400:])
    for module in (rope.bfloat16(), copy.deepcopy(rope).half(), RotaryEmbedding(8).double()):
        assert torch.equal(module(x, x)[0], expected)
    assert list(rope.state_dict()) == list(rope.buffers()) == []
    positions = torch.arange(900).expand(1, -1)
    close(rope(x, x, positions)[0], expected, 1e-6)


@pytest.mark.parametrize("move", [
    lambda m: m.bfloat16(), lambda m: m.half().double(), lambda m: m.to("meta").to_empty(device="cpu"), copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m))], ids=["bfloat16", "half", "to_empty", "copied", "pickled"])
def test_given_frequencies_keep_their_digits(move):
    given, x = torch.tensor([0.3, 1 / 3000], dtype=torch.float64), normal(1, 1, 3, 4)
    rope = RotaryEmbedding(4, frequencies=given)
    expected = rope.turn(x, FAR)
    assert torch.equal(move(rope).turn(x, FAR), expected)
    assert list(rope.state_dict()) == []


def test_frequencies_may_be_given():
    q, k = normal(1, 1, 3, 4), normal(1, 1, 3, 4)
    out = RotaryEmbedding(4, frequencies=torch.tensor([0.5, 0.25], requires_grad=True))(q, k)
    close(out[1], turned(k, [[0, 1, 2]], [0.5, 0.25], False))
    for bad in ([0.5, 0.25], torch.ones(2, device="meta")):
        with pytest.raises(TypeError, match="frequencies: expected a tensor with values, or None"):
            RotaryEmbedding(4, frequencies=bad)
    for bad in (0, -1.0, math.nan, math.inf, "10"):
        with pytest.raises(ValueError, match="base: expected a positive finite number"):
            RotaryEmbedding(4, base=bad)
    with pytest.raises(ValueError, match=r"frequencies: expected real numbers of shape \(2,\); got .* of shape \(4,\)"):
        RotaryEmbedding(4, frequencies=torch.ones(4))
    for bad in (0, 5):
        with pytest.raises(ValueError, match=f"dim: expected a positive even int; got {bad}"):
            RotaryEmbedding(bad)


def test_tables_made_in_inference_mode_serve_training():
    """A validation run under inference_mode before the first step."""
    rope, q = RotaryEmbedding(4), normal(1, 2, 5, 4).requires_grad_()
    with torch.inference_mode():
        expected = rope(q, q)[0]
    out = rope(q, q)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    close(out, expected.clone())
    close(grad, 2 * q)  # a rotation keeps lengths


@pytest.mark.parametrize("make", [lambda: RotaryEmbedding(4), lambda: SinusoidalPositions(4)], ids=["rotary", "sinusoids"])
def test_default_devices_do_not_matter(make):
    """Neither that of the construction, which may be meta, nor that of the call."""
    x = normal(1, 1, 5, 4)
    run = [lambda module: module(x, x)[0], lambda module: module(x[0])][isinstance(make(), SinusoidalPositions)]
    expected = run(make())
    module = make()
    with torch.device("meta"):
        deferred = make()
        close(run(module), expected)
    close(run(deferred), expected)


# --- slopes and buckets ---


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    twelve = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert torch.equal(alibi_slopes(12), torch.tensor(twelve))
    assert alibi_slopes(1).tolist() == [2**-8]
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    with pytest.raises(ValueError, match="heads: expected at least 1; got 0"):
        alibi_slopes(0)


def test_a_modules_slopes_keep_their_digits():
    module = MultiheadAttention(24, 12, alibi=True)
    assert list(module.state_dict()) == list(MultiheadAttention(24, 12).state_dict())
    assert torch.equal(module.alibi_slopes(), alibi_slopes(12))
    assert torch.equal(module.bfloat16().alibi_slopes(), alibi_slopes(12))


def test_a_modules_slopes_survive_deferred_construction():
    with torch.device("meta"):
        module = MultiheadAttention(24, 12, alibi=True)
    module.to_empty(device="cpu").load_state_dict(MultiheadAttention(24, 12).state_dict())
    assert torch.equal(module.alibi_slopes(), alibi_slopes(12))


def bucket(distance, buckets, longest, bidirectional):
    """T5's, of one k - q."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
    away = abs(distance) if bidirectional else max(-distance, 0)
    exact = buckets // 2
    if away < exact:
        return first + away
    return first + min(exact + int(math.log(away / exact) / math.log(longest / exact) * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_that_leave_no_range_are_refused(bidirectional):
    """At construction and in the call: at and below the single distances, and too few buckets for any."""
    exact, least = (8, 4) if bidirectional else (16, 2)
    for bad in (exact, exact - 1, 1, 0, -3, float(exact + 1), math.inf, math.nan, True, None):
        for call in (lambda bad=bad: T5RelativeBias(3, 32, bad, bidirectional),
                     lambda bad=bad: t5_bias(torch.zeros(32, 3), 4, 4, max_distance=bad, bidirectional=bidirectional)):
            with pytest.raises(ValueError, match=f"^max_distance: expected an int above {exact}, .*; got {bad}"):
                call()
    for few in range(least):
        with pytest.raises(ValueError, match=f"^num_buckets: expected at least {least} buckets.*; got {few}"):
            T5RelativeBias(3, few, 128, bidirectional)
        with pytest.raises(ValueError, match=f"^table: expected at least {least} buckets.*; got {few}"):
            t5_bias(torch.zeros(few, 3), 4, 4, bidirectional=bidirectional)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 17), (32, 128), (4, 2), (4, 3), (9, 10), (5, 1000)])
def test_t5_buckets_up_to_the_edge(buckets, longest, bidirectional):
    """Where the range is one distance wide, and where it is all but everything; every bucket is one of the table's."""
    longest = max(longest, buckets // (4 if bidirectional else 2) + 1)
    table = torch.arange(float(buckets))[:, None]
    values = t5_bias(table, 50, 60, bidirectional=bidirectional, max_distance=longest).values[0, 0].tolist()
    exact = [bucket(d, buckets, longest, bidirectional) for d in range(-59, 50)]
    assert values == exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_t5_buckets_are_the_same_whatever_the_default_dtype(dtype):
    expected = t5_bias(torch.arange(32.0)[:, None], 500, 500).values
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(t5_bias(torch.arange(32.0, dtype=torch.float32)[:, None], 500, 500).values, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (12, 40)])
@BACKENDS
def test_t5_bias(backend, buckets, longest, bidirectional):
    n_queries, n_keys = (150, 190) if backend == "reference" else (5, 60)
    module = T5RelativeBias(3, buckets, longest, bidirectional, dtype=torch.float64)
    q, k, v = normal(1, 3, n_queries, 8), normal(1, 3, n_keys, 8), normal(1, 3, n_keys, 8)
    index = torch.tensor([[bucket(j - (i + n_keys - n_queries), buckets, longest, bidirectional) for j in range(n_keys)]
                          for i in range(n_queries)])
    table = module.weight.detach().requires_grad_()
    exact = torch.softmax(q @ k.mT + table[index].permute(2, 0, 1), -1) @ v
    out = attention(q, k, v, bias=module(n_queries, n_keys), scale=1.0, backend=backend)
    close(out, exact)
    close(*(torch.autograd.grad(x.sin().sum(), weight) for x, weight in ((out, module.weight), (exact, table))))
