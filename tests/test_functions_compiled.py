"""Plain score and mask functions within torch.compile and torch.export, and under the transforms of torch.func."""

import pytest
import torch

from fused_attn import attention

pytestmark = pytest.mark.kernels

N = 20
Q_IDX, K_IDX = torch.arange(N)[:, None], torch.arange(N)
SLOPE = 1.0


class Settings:
    """A number to capture."""

    def __init__(self, slope):
        self.slope = slope

    def through(self, s, b, h, q, k):
        return s * self.slope

    __call__ = through


def helper(s):
    return s * SLOPE


def qkv(dtype=torch.float64):
    return [torch.randn(2, 2, N, 16, dtype=dtype) for _ in range(3)]


def plain(q, k, v, factor):
    """Attention with scores changed by what is already computed."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 * factor, -1) @ v


def graph(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.fixture(autouse=True)
def without_graphs():
    yield
    torch._dynamo.reset()


def same(compiled, function, *args):
    q, k, v = qkv(torch.float32)
    torch.testing.assert_close(compiled(q, k, v, *args), function(q, k, v, *args))


def test_compiled_with_a_closure():
    """Made outside of what is compiled; the gradient of what it captures comes out."""
    gain = torch.rand(2, requires_grad=True)

    def function(s, b, h, q, k):
        return s * gain[h]

    def call(q, k, v):
        return attention(q, k, v, score_mod=function)

    same(graph(call), call)
    q, k, v = qkv(torch.float32)
    grads = [torch.autograd.grad(f(q, k, v).sin().sum(), gain)[0] for f in (graph(call), call)]
    torch.testing.assert_close(*grads)


def test_functions_made_within_a_graph_are_refused_with_the_way_out():
    gain = torch.rand(2)

    def call(q, k, v):
        return attention(q, k, v, score_mod=lambda s, b, h, i, j: s * gain[h])

    with pytest.raises(Exception, match=r"score_mod: within torch.compile, a function is made outside of the graph"):
        graph(call)(*qkv(torch.float32))


@pytest.mark.parametrize("numbers", [(0.5, 0.7, 0.9), (1, 2, 3)], ids=str)
def test_compiled_with_other_numbers(numbers):
    """No graph keeps the number of another call."""
    x = numbers[0]

    def function(s, b, h, q, k):
        return s * x + (q - k) * x

    def call(q, k, v):
        return attention(q, k, v, score_mod=function)

    compiled = graph(call)
    for x in numbers:  # noqa: B007
        same(compiled, call)


def test_compiled_with_arguments():
    def function(s, b, h, q, k, gain, factor):
        return s * gain[h] * factor

    def call(q, k, v, gain, factor):
        return attention(q, k, v, score_mod=function, mod_args=(gain, factor))

    compiled = graph(call)
    for gain, factor in ((torch.rand(2), torch.tensor(0.5)), (torch.rand(2), torch.tensor(0.7))):
        same(compiled, call, gain, factor)
    with pytest.raises(Exception, match=r"score_mod: within torch.compile, a function .* takes tensors by mod_args="):
        same(graph(call), call, torch.rand(2), 0.5)


@pytest.mark.parametrize("where", ["global", "helper", "list", "attribute", "callable object", "method"])
def test_compiled_functions_are_not_stale(where):
    """What a function reaches beside its own variables is seen, or refused."""
    global SLOPE
    own, numbers, SLOPE = Settings(1.0), [1.0], 1.0
    function = {"global": lambda s, *_: s * SLOPE, "helper": lambda s, *_: helper(s), "list": lambda s, *_: s * numbers[0],
                "attribute": lambda s, *_: s * own.slope, "callable object": own, "method": own.through}[where]

    def call(q, k, v):
        return attention(q, k, v, score_mod=function)

    compiled = graph(call)
    try:
        for x in (1.0, 2.0):
            SLOPE = own.slope = numbers[0] = x
            same(compiled, call)
    except (torch._dynamo.exc.TorchDynamoException, TypeError, RuntimeError) as error:
        assert "score_mod" in str(error)  # noqa: PT017
    finally:
        SLOPE = 1.0


class Exported(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.rand(2))

    def forward(self, q, k, v):
        gain = self.gain
        return attention(q, k, v, score_mod=lambda s, b, h, i, j: s * gain[h], mask_mod=lambda b, h, i, j: i >= j)


def test_export():
    module, tensors = Exported(), qkv(torch.float32)
    torch.testing.assert_close(torch.export.export(module, tuple(tensors)).module()(*tensors), module(*tensors))


TRANSFORMED = {
    "gain": (lambda x: lambda s, b, h, q, k: s * x[h], lambda x: x[:2, None, None]),
    "differences": (lambda x: lambda s, b, h, q, k: s * x[q - k].exp(), lambda x: x[Q_IDX - K_IDX].exp()),
    "table": (lambda x: lambda s, b, h, q, k: s * x[q % 5 + k // 4], lambda x: x[Q_IDX % 5 + K_IDX // 4]),
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("transform", [
    lambda f, x: torch.func.jvp(f, (x,), (x * 2,)), lambda f, x: torch.func.grad(lambda y: f(y).sin().sum())(x),
    lambda f, x: torch.func.vmap(f)(torch.stack([x, x * 2])),
    lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y).sin().sum()))(torch.stack([x, x * 2])),
], ids=["jvp", "grad", "vmap", "vmap of grad"])
def test_transforms(transform, name):
    """Of captured tensors; q, k and v are captured in their turn."""
    (q, k, v), x = qkv(), torch.rand(40, dtype=torch.float64)
    make, factor = TRANSFORMED[name]
    got = transform(lambda x: attention(q, k, v, score_mod=make(x), backend="blocked"), x)
    torch.testing.assert_close(got, transform(lambda x: plain(q, k, v, factor(x)), x))


def test_compiled_with_several_functions():
    """A score and a mask function, and then others, in one process: each is found, also those that come later."""
    gain = torch.rand(2)

    def call(q, k, v, scores, mask):
        return attention(q, k, v, score_mod=scores, mask_mod=mask)

    compiled = graph(call)
    masks = (lambda b, h, q, k: (q + k) % 3 != 0), (lambda b, h, q, k: (q - k) % 5 != 1)
    for scores in (lambda s, b, h, q, k: s * gain[h], [lambda s, b, h, q, k: s + gain[h], lambda s, b, h, q, k: s * 0.5]):
        for mask in masks:
            same(compiled, call, scores, mask)
