"""The kernels touch what their tensors reach and nothing else: every shape and layout below runs under the memory guard.

Inputs are fp32 unless a test says otherwise, and results are compared with the reference in fp64: the largest error may be
TOLERANCE times the largest element, or times 1 where that is less. Accuracy proper is measured elsewhere.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
from support.guard import is_poison, memory_guard

import fused_attn
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import WIDEST_STRIDE
from fused_attn.plan import backward, problem
from fused_attn.run import plans

pytestmark = pytest.mark.kernels
if not triton.knobs.runtime.interpret:
    pytest.skip("the guard watches Triton's interpreter", allow_module_level=True)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KERNELS = ["forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel"]
NAMES = ("out", "lse", "dq", "dk", "dv")


def draw(batch, heads, kv_heads, n_queries, n_keys, dim, dim_v, dtype=torch.float32):
    """q, k, v and dout of a call."""
    shapes = ((heads, n_queries, dim), (kv_heads, n_keys, dim), (kv_heads, n_keys, dim_v), (heads, n_queries, dim_v))
    return tuple(torch.randn(batch, *shape).to(dtype) for shape in shapes)


def run(q, k, v, dout, *, attention=fused_attn.attention, dlse=None, **arguments):
    """out, lse, dq, dk and dv of a call, on the very strides of its tensors."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))


def guarded(q, k, v, dout, **arguments):
    with memory_guard() as guard:
        results = run(q, k, v, dout, backend="triton", **arguments)
    missing = [kernel for kernel, made in zip(KERNELS, (results[0], results[1], q, k), strict=True)
               if made.numel() and kernel not in guard.kernels]
    assert not missing, "the guard did not see them run"
    return results


def check(q, k, v, dout, dlse=None, **arguments):
    """Runs a call under the guard and compares everything it gives with the reference."""
    inputs = (q, k, v, dout)
    before = [x.clone() for x in inputs]
    results = guarded(q, k, v, dout, dlse=dlse, **arguments)
    for name, x, copy in zip(("q", "k", "v", "dout"), inputs, before, strict=True):
        assert torch.equal(x, copy), f"{name} was written to"
    dlse = None if dlse is None else dlse.double()
    exact = run(*(x.double() for x in before), attention=fused_attn.reference_attention, dlse=dlse, **arguments)
    for name, x, expected in zip(NAMES, results, exact, strict=True):
        assert not is_poison(x).any(), f"{name}: {int(is_poison(x).sum())} elements were never written"
        assert_near(name, x.double(), expected, TOLERANCE[q.dtype])


def assert_near(name, x, expected, tolerance):
    assert x.shape == expected.shape, name
    if x.numel() == 0:
        return
    infinite = expected.isinf()
    assert torch.equal(x[infinite], expected[infinite]), name
    expected = expected.masked_fill(infinite, 0)
    error = (x.masked_fill(infinite, 0) - expected).abs().nan_to_num(math.inf)
    bound = tolerance * max(1.0, float(expected.abs().max()))
    worst = (error == error.max()).nonzero()
    assert not (error > bound).any(), f"{name}: off by {float(error.max()):.2e} at {worst[0].tolist()}"


# --- shapes ---

# batch, heads, key heads, queries, keys, head dim, head dim of v, further arguments
SHAPES = [
    *((1, 1, 1, n, n, 16, 16, {}) for n in (1, 2, 15, 31, 32, 33, 63, 64, 65, 96, 127, 131)),
    *((1, 1, 1, n, n, 16, 16, {"causal": True}) for n in (1, 31, 33, 64, 65, 97, 131)),
    *((1, 2, 2, 37, 41, d, d, {"causal": True}) for d in (1, 8, 40, 64, 80, 96)),
    (1, 1, 1, 33, 65, 128, 128, {}),
    (1, 1, 1, 33, 35, 17, 256, {}),
    (1, 1, 1, 33, 35, 255, 1, {}),
    (2, 1, 1, 65, 33, 64, 16, {}),
    (1, 2, 2, 37, 67, 8, 40, {"causal": True}),
    (1, 1, 1, 37, 67, 1, 3, {}),
    (2, 4, 2, 37, 67, 16, 16, {}),
    (1, 6, 2, 65, 67, 24, 16, {"causal": True}),
    (1, 3, 1, 65, 97, 16, 16, {"window": (40, 0)}),
    (2, 2, 1, 1, 129, 16, 16, {}),
    (2, 4, 1, 1, 129, 16, 16, {"causal": True}),
    (1, 2, 2, 129, 1, 16, 16, {}),
    (1, 2, 2, 129, 1, 16, 16, {"causal": True}),
    (1, 2, 1, 131, 33, 16, 16, {"causal": True}),
    (1, 1, 1, 131, 66, 20, 16, {"window": (3, 0)}),
    (1, 1, 1, 33, 131, 16, 16, {"window": (3, 2)}),
    (1, 1, 1, 131, 131, 16, 16, {"window": (0, 0)}),
    (1, 1, 1, 131, 131, 16, 16, {"window": (16, 16)}),
    (1, 1, 1, 131, 131, 16, 16, {"window": (64, 31)}),
    (1, 1, 1, 67, 131, 16, 16, {"window": (None, 3)}),
    (1, 1, 1, 131, 67, 16, 16, {"window": (7, None)}),
    (1, 1, 1, 131, 67, 16, 16, {"window": (10**9, 10**9)}),
    (1, 2, 1, 67, 70, 16, 16, {"softcap": 2.0, "causal": True}),
    (1, 1, 1, 131, 40, 16, 8, {"softcap": 0.5, "window": (20, 5), "scale": -0.3}),
    (1, 1, 1, 67, 70, 16, 16, {"scale": 0.0}),
    (0, 2, 1, 33, 33, 16, 16, {}),
    (2, 2, 1, 0, 33, 16, 16, {}),
    (2, 2, 1, 33, 0, 16, 16, {}),
    (2, 2, 1, 33, 0, 16, 16, {"causal": True}),
]


def name_of(shape):
    batch, heads, kv_heads, n_queries, n_keys, dim, dim_v, arguments = shape
    more = "".join(f"-{key}={value}" for key, value in arguments.items())
    return f"B{batch}-H{heads}:{kv_heads}-N{n_queries}:{n_keys}-D{dim}:{dim_v}{more}".replace(" ", "")


@pytest.mark.few(8)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_shapes(shape):
    *sizes, arguments = shape
    q, k, v, dout = draw(*sizes)
    check(q, k, v, dout, dlse=torch.randn(*q.shape[:3], 2)[..., 0], **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_element_types(dtype):
    check(*draw(1, 2, 1, 67, 70, 24, 40, dtype), causal=True)


@pytest.mark.few(4)
@pytest.mark.parametrize("tile", [
    TileConfig(16, 16, 1, 1), TileConfig(128, 32, 1, 1), TileConfig(16, 128, 1, 1), TileConfig(64, 32, 1, 1, wide=True),
], ids=lambda tile: f"{tile.block_m}x{tile.block_n}{'-wide' * tile.wide}")
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window": (20, 9)}], ids=str)
def test_tiles(tile, arguments, monkeypatch):
    monkeypatch.setattr(problem, "choose", lambda *_: tile)
    check(*draw(1, 2, 1, 35, 150, 12, 16), **arguments)


# --- layouts ---


def inside_nan(x, shape, view):
    """A copy of ``x`` as a view of a larger buffer that is NaN everywhere else."""
    place = view(x.new_full(shape, torch.nan))
    assert place.shape == x.shape
    return place.copy_(x)


def _layouts(x):
    b, h, n, d = x.shape
    return {
        "contiguous": lambda: inside_nan(x, (b + 2, h, n, d), lambda y: y[1:-1]),
        "offset-1": lambda: inside_nan(x, (x.numel() + 2,), lambda y: y[1:-1].view(x.shape)),
        "bnhd": lambda: inside_nan(x, (b, n, h, d), lambda y: y.transpose(1, 2)),
        "nbhd-padded": lambda: inside_nan(x, (n, b, h + 1, d + 3), lambda y: y[:, :, :h, :d].permute(1, 2, 0, 3)),
        "hbnd": lambda: inside_nan(x, (h, b, n, d), lambda y: y.transpose(0, 1)),
        "every-2nd-column": lambda: inside_nan(x, (b, h, n, 2 * d), lambda y: y[..., ::2]),
        "every-3rd-row": lambda: inside_nan(x, (b, h, 3 * n, d), lambda y: y[:, :, 1::3]),
        "columns-first": lambda: inside_nan(x, (b, h, d, n), lambda y: y.mT),
        "columns-outermost": lambda: inside_nan(x, (d, h, n, b + 1), lambda y: y[..., 1:].permute(3, 1, 2, 0)),
        "narrowed": lambda: inside_nan(x, (b, h, n + 5, d + 3), lambda y: y[:, :, 2:-3, 1:-2]),
        "one-batch": lambda: inside_nan(x[:1], (1, h, n + 1, d), lambda y: y[:, :, :-1]).expand(x.shape),
        "one-head": lambda: inside_nan(x[:, :1], (b, 1, n + 1, d), lambda y: y[:, :, :-1]).expand(x.shape),
        "one-row": lambda: inside_nan(x[:, :, :1], (b, h, 3, d), lambda y: y[:, :, 1:2]).expand(x.shape),
        "one-column": lambda: inside_nan(x[..., :1], (b, h, n, 2), lambda y: y[..., 1:]).expand(x.shape),
        "one-element": lambda: inside_nan(x[:1, :1, :1, :1], (1, 1, 1, 3), lambda y: y[..., 1:2]).expand(x.shape),
    }


LAYOUTS = list(_layouts(torch.zeros(1, 1, 1, 1)))


@pytest.mark.few(5)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, which):
    """With columns to mask (D 20, Dv 12)."""
    tensors = dict(zip(("q", "k", "v", "dout"), draw(2, 2, 2, 35, 39, 20, 12), strict=True))
    tensors[which] = _layouts(tensors[which])[layout]()
    check(**tensors, causal=True)


@pytest.mark.few(6)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_whole_tiles(layout):
    """All four tensors at once, without columns to mask: inner tiles load with no mask at all."""
    tensors = draw(2, 2, 1, 34, 66, 16, 16)
    check(*(_layouts(x)[layout]() for x in tensors))


def test_views_of_one_buffer():
    q, k, v = torch.randn(2, 67, 3, 2, 24).unbind(2)
    check(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), torch.randn(2, 2, 67, 24), causal=True)


def test_one_tensor_for_all():
    x = torch.randn(1, 2, 67, 24)
    check(x, x, x, x, causal=True)


def test_gradient_of_a_sum():
    q, k, v, _ = draw(1, 2, 1, 67, 70, 24, 16)
    with memory_guard() as guard:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        fused_attn.attention(*leaves, causal=True, backend="triton").sum().backward()
    assert guard.kernels == KERNELS
    exact = run(q.double(), k.double(), v.double(), torch.ones(1, 2, 67, 16).double(),
                attention=fused_attn.reference_attention, causal=True)
    for name, leaf, expected in zip(NAMES[2:], leaves, exact[2:], strict=True):
        assert_near(name, leaf.grad.double(), expected, TOLERANCE[torch.float32])


# --- offsets beyond 32 bits ---

# which dimension is far, its stride, length (queries and keys), which tensors
FAR = [
    ("batch", 2**30, 35, "all"), ("batch", 2**31 + 16, 35, "all"),
    ("head", 2**30, 35, "all"), ("head", 2**31 + 16, 35, "all"),
    ("row", WIDEST_STRIDE - 1, 600, "all"),  # 32-bit offsets inside a tile just fit; times the length they would not
    ("row", WIDEST_STRIDE, 70, "all"),
    *(("row", 2**27, 70, which) for which in ("all", "q", "k", "v", "dout", "outputs")),  # fits, but not times a tile
    ("row", 2**31 - 1, 70, "all"), ("row", 2**31 + 16, 70, "all"),
    ("column", 2**28, 35, "all"), ("column", 2**31 + 16, 35, "all"),
]


def far_strides(shape, dimension, stride):
    """Strides of a tensor that is compact but for one dimension."""
    far = ("batch", "head", "row", "column").index(dimension)
    strides, next_stride = [0] * 4, 1
    for dim in (3, 2, 1, 0):
        strides[dim] = stride if dim == far else next_stride
        next_stride *= 1 if dim == far else shape[dim]
    return tuple(strides)


@pytest.mark.few(4)
@pytest.mark.parametrize(("dimension", "stride", "length", "which"), FAR, ids=str)
def test_offsets_beyond_32_bits(dimension, stride, length, which, address_space, monkeypatch):
    """Tensors whose elements lie far apart give, bit for bit, what compact ones give."""
    batch, heads = 3 if dimension == "batch" else 1, 3 if dimension == "head" else 1
    tensors = draw(batch, heads, heads, length, length, 16, 16, torch.float16)
    compact = run(*tensors, backend="triton", window=(20, 0))
    plans.forget()  # the second call of a kind makes a plan, which allocates as well
    made = []

    def far_apart(x):
        return address_space(x, far_strides(x.shape, dimension, stride))

    def far_like(x, head_dim, dtype=None):
        made.append(far_apart(torch.full((*x.shape[:3], head_dim), torch.nan, dtype=dtype or x.dtype)))
        return made[-1]

    if which in ("all", "outputs"):
        for module in (problem, backward):
            monkeypatch.setattr(module, "like", far_like)
    placed = [far_apart(x) if which in ("all", name) else x
              for name, x in zip(("q", "k", "v", "dout"), tensors, strict=True)]
    for name, x, expected in zip(NAMES, guarded(*placed, window=(20, 0)), compact, strict=True):
        assert torch.equal(x, expected), name
    assert len(made) == (4 if which in ("all", "outputs") else 0)


@pytest.mark.few(2)
@pytest.mark.parametrize(("shape", "strides"), [
    ((1, 1, 70, 70), (0, 0, WIDEST_STRIDE - 1, 1)), ((1, 1, 70, 70), (0, 0, 2**27, 1)), ((1, 1, 70, 70), (0, 0, 2**31 + 16, 1)),
    ((1, 1, 70, 70), (0, 0, 1, 2**27)), ((1, 1, 1, 70), (0, 0, 0, 2**31 + 16)), ((1, 1, 70, 1), (0, 0, 2**27, 0)),
    ((2, 1, 1, 70), (2**31 + 16, 0, 0, 1)), ((1, 3, 70, 1), (0, 2**31 + 16, 1, 0)),
], ids=str)
@pytest.mark.parametrize("which", ["bias", "mask"])
def test_operands_beyond_32_bits(which, shape, strides, address_space):
    """A bias or mask whose elements lie far apart gives, bit for bit, what a compact one gives, its gradient too."""
    q, k, v, dout = draw(shape[0], shape[1], shape[1], 70, 70, 16, 16, torch.float16)
    near = torch.randn(shape) if which == "bias" else torch.rand(shape) < 0.7
    results = []
    for operand in (near, address_space(near, strides)):
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in (q, k, v, operand)]
        with memory_guard():
            out = fused_attn.attention(*inputs[:3], causal=True, backend="triton", **{which: inputs[3]})
            results.append((out, *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], dout)))
    for x, expected in zip(*results, strict=True):
        assert torch.equal(x, expected)
        assert (x != 0).any()


# --- many programs ---


@pytest.fixture
def some_programs(monkeypatch):
    """some_programs(total, chosen): launches of ``total`` programs run the chosen ones, a list for each kernel in turn."""
    import triton.runtime.interpreter as interp

    launches = {}

    def some(*bounds):
        sampled = len(bounds) == 1 and type(bounds[0]) is int and bounds[0] in launches
        return next(launches[bounds[0]]) if sampled else range(*bounds)

    monkeypatch.setattr(interp, "range", some, raising=False)
    return lambda total, chosen: launches.update({total: iter(chosen)})


def test_more_heads_than_grid_axes_y_and_z_hold(some_programs):
    batch, heads = 5, 16411
    chosen = [0, 1, 65534, 65535, 65536, 65537, batch * heads - 1]
    some_programs(batch * heads, [chosen] * len(KERNELS))
    q, k, v, dout = (torch.randn(batch, heads, 1, 16).half() for _ in range(4))
    picked = [x.flatten(0, 1)[chosen][None].double() for x in (q, k, v, dout)]
    expected = run(*picked, attention=fused_attn.reference_attention)
    for name, x, exact in zip(NAMES, guarded(q, k, v, dout), expected, strict=True):
        heads_of = x.flatten(0, 1)
        assert_near(name, heads_of[chosen][None].double(), exact, TOLERANCE[torch.float16])
        assert int(is_poison(heads_of.flatten(1)).any(1).sum()) == batch * heads - len(chosen), "others were run too"


def test_long_sequences(some_programs):
    """The last 128 rows of 70,000, and the last 128 keys; their window is 16 keys wide."""
    length, block = 70_000, 64
    total = -(-length // block)
    last = list(range(total - 3, total))
    some_programs(total, [[0, 1, 2], last, [0, 1, 2], last])  # forward and dq start with the last tile
    q, k, v, dout = (torch.randn(1, 1, length, 16) for _ in range(4))
    tail = [x[:, :, -256:].double() for x in (q, k, v, dout)]
    expected = run(*tail, attention=fused_attn.reference_attention, window=(16, 0))
    for name, x, exact in zip(NAMES, guarded(q, k, v, dout, window=(16, 0)), expected, strict=True):
        assert_near(name, x[:, :, -128:].double(), exact[:, :, -128:], TOLERANCE[torch.float32])


# --- NaN stays where it is ---


@pytest.mark.few(2)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
def test_nan_stays_in_its_batch_and_head(which):
    tensors = dict(zip(("q", "k", "v", "dout"), draw(2, 4, 2, 35, 37, 12, 16), strict=True))
    clean = run(**tensors, causal=True, backend="triton")
    tensors[which][1, -1] = torch.nan
    for name, x, expected in zip(NAMES, guarded(**tensors, causal=True), clean, strict=True):
        hit = torch.zeros(x.shape[:2], dtype=torch.bool)
        hit[1, -max(1, x.shape[1] // tensors[which].shape[1]):] = True  # a key head is shared by two query heads
        assert torch.equal(x[~hit], expected[~hit]), name
        independent = {"v": ("lse", "dv"), "dout": ("out", "lse")}.get(which, ())
        assert name in independent or x[hit].isnan().any(), f"{name}: the NaN was lost"


@pytest.mark.parametrize("used", [1, 31, 64, 70])
def test_unused_tail_of_a_cache_does_not_leak(used):
    q, k, v, dout = draw(1, 2, 1, 3, 96, 16, 16)
    expected = run(q, k[:, :, :used].contiguous(), v[:, :, :used].contiguous(), dout, causal=True, backend="triton")
    k[:, :, used:] = torch.nan
    v[:, :, used:] = torch.inf
    for name, x, wanted in zip(NAMES, guarded(q, k[:, :, :used], v[:, :, :used], dout, causal=True), expected, strict=True):
        assert torch.equal(x, wanted), name
        assert x.isfinite().all() or (name == "lse" and used == 1), name  # with 1 key, two of the queries see none
