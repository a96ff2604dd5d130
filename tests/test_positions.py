"""Where tokens stand: each module against its formula, the rotary kernel against its plain twin."""

import cmath
import copy
import itertools
import math

import pytest
import torch
from support.guard import memory_guard
from support.layouts import LAYOUTS
from support.oracle import EPS
from torch._dynamo.testing import CompileCounterWithBackend

from fused_attn import attention, ops  # noqa: F401  # repairs first
from fused_attn.nn import (
    LearnedPositions,
    MultiheadAttention,
    RotaryEmbedding,
    SinusoidalPositions,
    T5RelativeBias,
    alibi_slopes,
)
from fused_attn.rotary import apply_rotary

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
    for length, first in ((6, None), (3, 3), (1, 5)):
        with pytest.raises(ValueError, match="x: expected positions below 5; got a length that ends at 6"):
            module(torch.zeros(1, length, 4), first)
    drawn = LearnedPositions(1000, 64).weight
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    assert list(module.state_dict()) == ["weight"]


# --- rotations ---


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


def test_tables_are_no_part_of_the_module():
    """Rounding the module, copying it, growing its tables: nothing changes the angles."""
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


def test_frequencies_may_be_given():
    q, k = normal(1, 1, 3, 4), normal(1, 1, 3, 4)
    out = RotaryEmbedding(4, frequencies=torch.tensor([0.5, 0.25], requires_grad=True))(q, k)
    close(out[1], turned(k, [[0, 1, 2]], [0.5, 0.25], False))
    with pytest.raises(ValueError, match=r"frequencies: expected shape \(2,\); got \(4,\)"):
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


# --- the kernel ---


def drawn(batch, heads, length, dim, pairs, dtype=torch.float64, tables=3):
    """x, and cos and sin [N, pairs], [1, N, pairs] or [B, N, pairs] by ``tables`` 2, 1 or 3."""
    angles = normal(*{2: (), 1: (1,), 3: (batch,)}[tables], length, pairs) * 10
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return normal(batch, heads, length, dim, dtype=dtype), angles.cos().to(wide), angles.sin().to(wide)


SIZES = [  # batch, heads, length, head dim, pairs: odd, one of each, more heads than a program takes, more rows than a tile
    (2, 3, 7, 10, 5), (2, 3, 7, 11, 3), (1, 1, 1, 2, 1), (3, 9, 70, 16, 4), (1, 2, 130, 96, 48), (2, 5, 3, 300, 65),
    (2, 2, 0, 8, 4)]


@pytest.mark.kernels
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, *(
    pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))], ids=str)
@pytest.mark.parametrize(("size", "tables"), [*zip(SIZES, itertools.cycle((3, 2, 1)), strict=False)], ids=str)
def test_kernel_is_its_plain_twin(size, tables, dtype, interleaved):
    """Both round once: what is computed in fp64 from the same numbers, and then rounded."""
    x, cos, sin = drawn(*size, dtype, tables)
    with memory_guard() as guard:
        out = apply_rotary(x, cos, sin, interleaved=interleaved, backend="triton")
    assert guard.kernels == (["rotary_kernel"] if x.numel() else [])
    exact = apply_rotary(x.double(), cos.double(), sin.double(), interleaved=interleaved, backend="reference")
    terms = x.double().norm(dim=-1, keepdim=True)
    for result in (out, apply_rotary(x, cos, sin, interleaved=interleaved)):
        assert (result.dtype, result.shape) == (x.dtype, x.shape)
        unit = 0.0 if dtype == torch.float64 else EPS[dtype]
        assert ((result.double() - exact).abs() <= unit * exact.abs() * 1.01 + 4 * EPS[cos.dtype] * terms).all()
    assert torch.equal(out[..., 2 * cos.shape[-1] :], x[..., 2 * cos.shape[-1] :])


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_takes_any_strides(layout):
    x = LAYOUTS[layout](2, 3, 9, 12).double().requires_grad_()
    cos, sin = (t.T for t in normal(2, 5, 9))  # transposed too
    with memory_guard():
        out = apply_rotary(x, cos, sin, backend="triton")
        (grad,) = torch.autograd.grad(out.sin().sum(), x)
    exact = apply_rotary(x, cos, sin, backend="reference")
    close((out, grad), (exact, *torch.autograd.grad(exact.sin().sum(), x)))


@pytest.mark.kernels
@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "heads", "length", "columns"])
def test_kernel_addresses_beyond_31_bits(dim, address_space):
    x, cos, sin = drawn(3, 5, 3, 6, 2, torch.float16)
    strides = list(x.stride())
    strides[dim] = 2**30 + 7
    far = address_space(x, strides)
    with memory_guard():
        out = apply_rotary(far, cos, sin, backend="triton")
    assert torch.equal(out, apply_rotary(x, cos, sin, backend="triton"))


@pytest.mark.kernels
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_kernel_has_derivatives_of_any_order(interleaved):
    x, cos, sin = drawn(1, 2, 2, 5, 2)

    def run(x):
        return apply_rotary(x, cos, sin, interleaved=interleaved, backend="triton").sin()

    torch.autograd.gradcheck(run, (x.requires_grad_(),))
    torch.autograd.gradgradcheck(run, (x,), fast_mode=True)


@pytest.mark.kernels
def test_kernel_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: apply_rotary(*x, backend="triton"), fullgraph=True, backend=counter)
    for length in (6, 9, 17, 5):
        x, cos, sin = drawn(2, 3, length, 8, 4)
        x.requires_grad_()
        found, exact = (f(x, cos, sin) for f in (compiled, apply_rotary))
        close((found, *torch.autograd.grad(found.sin().sum(), x)), (exact, *torch.autograd.grad(exact.sin().sum(), x)))
    assert counter.frame_count <= 2  # static, dynamic
    torch._dynamo.reset()


@pytest.mark.kernels
@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", torch.float64), ("length before heads", torch.bfloat16),
                                               ("expanded heads", torch.float32), ("every second column", torch.float32)])
def test_op_keeps_torchs_rules(layout, dtype):
    x, tables = LAYOUTS[layout](2, 3, 5, 8).to(dtype), [t.expand(2, 5, 3) for t in normal(2, 5, 3, dtype=torch.float32)]
    torch.library.opcheck(torch.ops.fused_attn.rotary.default, (x, *tables, True, False))
    torch.library.opcheck(torch.ops.fused_attn.rotary.default, (x, *tables, False, True))


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_kernel_under_transforms_is_an_error_or_right():
    x, cos, sin = drawn(2, 1, 3, 4, 2)

    def run(x):
        return apply_rotary(x, cos, sin, backend="triton")

    assert torch.equal(torch.func.vmap(run)(x[None])[0], run(x))
    with pytest.raises(RuntimeError, match=r"carries no gradient.*forward AD"):
        torch.func.jvp(run, (x,), (x,))
    of_kernel, of_formula = (torch.func.grad(lambda x, b=b: apply_rotary(x, cos, sin, backend=b).sin().sum())(x)
                             for b in ("triton", "reference"))
    close(of_kernel, of_formula)
    with pytest.raises(RuntimeError, match="carries no gradient"):
        torch.ops.fused_attn.rotary(x.requires_grad_(), cos, sin, False, False)


X, COS = torch.zeros(2, 3, 5, 8), torch.ones(5, 4)
BAD_CALLS = {  # what the error says, arguments
    "x: expected a float tensor; got torch.int64": (X.long(), COS, COS), "x: expected a float tensor; got 3": (3, COS, COS),
    "cos: expected a float tensor; got torch.int32": (X, COS.int(), COS), "sin: expected a float tensor": (X, COS, None),
    "x: expected 4 dimensions": (X[0], COS, COS), "cos: expected .5, pairs.*at most 4": (X, torch.ones(5, 5), torch.ones(5, 5)),
    "cos: expected.*got shape .4, 4.": (X, COS[1:], COS), "sin: expected.*got shape .5, 3.": (X, COS, COS[:, 1:]),
    "cos: expected.*2, 5, pairs": (X, COS.expand(3, 5, 4), COS.expand(3, 5, 4)), "cos: expected.*got shape .5, 0.": (
        X, COS[:, :0], COS[:, :0]), "cos: expected x's device cpu; got meta": (X, COS.to("meta"), COS),
    "sin: expected no gradient": (X, COS, torch.ones(5, 4, requires_grad=True)),
}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_bad_calls_are_named(text):
    with pytest.raises((TypeError, ValueError), match=f"^{text}"):
        apply_rotary(*BAD_CALLS[text])


def test_backends_are_named():
    with pytest.raises(ValueError, match="backend: expected 'triton', 'reference' or None; got 'torch'"):
        apply_rotary(X, COS, COS, backend="torch")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this call: there are no kernels for device type 'meta'"):
        apply_rotary(X.to("meta"), COS.to("meta"), COS.to("meta"), backend="triton")
