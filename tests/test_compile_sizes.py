"""Compiled and exported calls whose lengths vary, whose arguments are learned, or whose graph is computed twice."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fused_attn
from fused_attn.plan import backends

pytestmark = pytest.mark.kernels


@pytest.mark.few(2)
@pytest.mark.parametrize("backend", [None, "triton", "reference"])
@pytest.mark.parametrize("budget", [0.01, 0.5])
def test_the_output_and_its_gradient_are_of_one_mask(backend, budget):
    """The output is linear in V: sum(V * dV) is the sum of the output, of one mask alone."""
    q, k, v = (torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3))
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        out = torch.compile(lambda q, k, v: fused_attn.attention(q, k, v, dropout_p=0.5, backend=backend),
                            backend="aot_eager_decomp_partition", fullgraph=True)(q, k, v)
        grad, = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum(), rtol=1e-4, atol=1e-4)


def test_torchs_own_function_warns_of_its_dropout():
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    torch._dynamo.reset()
    backends._warn_once.cache_clear()
    compiled = torch.compile(lambda q: fused_attn.scaled_dot_product_attention(q, q, q, dropout_p=0.5), backend="aot_eager")
    with torch._functorch.config.patch(activation_memory_budget=0.5), pytest.warns(RuntimeWarning, match="another dropout"):
        compiled(q)


SOME_WINDOWS = [(5, 0), (None, 2), *(pytest.param(window, marks=pytest.mark.slow) for window in ((3, 3), (200, 0), (0, None)))]


@pytest.mark.parametrize("lengths", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", SOME_WINDOWS, ids=str)
def test_a_window_of_an_exported_length(window, lengths):
    """No length is ruled out, though for some no query reaches a bound."""
    class Module(torch.nn.Module):
        def forward(self, q, k, n):
            return fused_attn.attention(q, k, k, window=window, key_lengths=n if lengths else None)

    def drawn(n, m):
        return torch.randn(2, 2, n, 16), torch.randn(2, 2, m, 16), torch.tensor([m, m // 2])

    n, m = (torch.export.Dim(name, min=2, max=600) for name in "nm")
    for dynamic, sizes, others in (({2: n}, (13, 13), [(2, 2), (300, 300)]), ({2: m}, (13, 17), [(2, 300), (300, 5)])):
        shapes = ({2: n}, dynamic, None)
        program = torch.export.export(Module(), drawn(*sizes), dynamic_shapes=shapes).module()
        for other in others:
            inputs = drawn(*other)
            torch.testing.assert_close(program(*inputs), Module()(*inputs))


@pytest.mark.parametrize("window", SOME_WINDOWS, ids=str)
def test_a_window_over_ten_lengths_is_two_graphs(window):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda q: fused_attn.attention(q, q, q, window=window), backend=counter, fullgraph=True)
    for n in range(3, 23, 2):
        q = torch.randn(1, 2, n, 16)
        torch.testing.assert_close(compiled(q), fused_attn.attention(q, q, q, window=window))
    assert counter.frame_count <= 2


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "shape", "backend"), [
    pytest.param(name, shape, backend, marks=() if (backend is None) == (name == "alibi_slopes") else pytest.mark.slow)
    for name, shape in (("alibi_slopes", (4,)), ("alibi_slopes", (2, 4)), ("score_weight", (16,)), ("score_weight", (4, 16)),
                        ("sinks", (4,)), ("bias", (4, 1, 1))) for backend in (None, "triton")], ids=str)
def test_learned_arguments_beside_dynamic_shapes(name, shape, backend):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.learned = torch.nn.Parameter(torch.rand(shape))

        def forward(self, q):
            return fused_attn.attention(q, q, q, backend=backend, **{name: self.learned})

    torch._dynamo.reset()
    module, q = Module(), torch.randn(2, 4, 9, 16)
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), module(q))


def test_a_scale_that_is_a_tensor_says_so_compiled():
    q, scale = torch.randn(1, 2, 9, 16), torch.tensor(0.1)
    torch.testing.assert_close(fused_attn.attention(q, q, q, scale=scale), fused_attn.attention(q, q, q, scale=0.1))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"scale, softcap: expected Python numbers under torch\.compile"):
        torch.compile(lambda q, scale: fused_attn.attention(q, q, q, scale=scale), backend="eager", fullgraph=True)(q, scale)
