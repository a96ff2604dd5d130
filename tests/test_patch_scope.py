"""How far patch_sdpa reaches: a ``with``, one thread, other modes, recomputation, and compiled functions."""

import asyncio
import contextvars
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import fused_attn  # noqa: F401  # repairs first
from fused_attn import patch_sdpa, settings
from fused_attn.kernels import launch

sdpa = F.scaled_dot_product_attention


@pytest.fixture
def kernels(monkeypatch):
    """The kernels as the default backend; launches by name."""
    monkeypatch.setattr(settings, "BACKEND", "triton")
    with launch.counted() as launches:
        yield launches


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def drawn(n=5):
    return [torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def ask():
    """A call that a report of an active patch counts."""
    return sdpa(*[torch.ones(1, 1, 2, 4)] * 3)


def attend():
    """The same of torch's module, as most code calls it: without weights."""
    module, x = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    return lambda: module(x, x, x, need_weights=False)[0]


def layers():
    """The same of torch's layers."""
    module, x = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), torch.randn(2, 5, 16)
    return lambda: module(x, src_key_padding_mask=torch.arange(5) >= torch.tensor([[3], [5]]))


def test_nothing_in_torch_is_changed():
    before = F.scaled_dot_product_attention, F.multi_head_attention_forward, torch._C._nn.scaled_dot_product_attention
    names = dict(vars(F))
    with patch_sdpa() as report:
        assert (F.scaled_dot_product_attention, F.multi_head_attention_forward,
                torch._C._nn.scaled_dot_product_attention) == before
        attend()()
    assert vars(F) == names
    assert _get_current_function_mode_stack() == []
    ask()
    assert report.kept.total() == 1


def test_an_exception_ends_it():
    with pytest.raises(KeyError), patch_sdpa() as report:  # noqa: PT012  # the second statement is the point
        ask()
        raise KeyError
    assert _get_current_function_mode_stack() == []
    ask()
    assert report.kept.total() == 1


def test_other_threads_are_left_alone():
    def elsewhere():
        seen.append(_get_current_function_mode_stack())
        ask()

    seen = []
    with patch_sdpa() as report:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert (seen, report.kept.total()) == ([[]], 0)
        ask()
    assert report.kept.total() == 1


def test_entered_again_it_goes_on_counting():
    patch = patch_sdpa()
    with patch as report:
        with patch as inner:
            ask()
        counted = report.kept.total()
        ask()
    with patch as again:
        ask()
    assert report is inner is again is patch.report
    assert report.kept.total() - counted == 2
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("build", [lambda: ask, attend], ids=["function", "module"])
def test_of_nested_patches_the_inner_one_is_asked_first(build):
    call = build()
    with patch_sdpa(), patch_sdpa(strict=True), pytest.raises(RuntimeError, match="strict"):
        call()
    with patch_sdpa(strict=True), patch_sdpa() as inner:
        with pytest.raises(RuntimeError, match="strict"):  # which leaves it to the outer one
            call()
        assert inner.kept.total() == 1


class Bystander(TorchFunctionMode):
    """A mode of other code that passes everything on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("other", [lambda: torch.device("cpu"), Bystander], ids=["torch.device", "a mode"])
@pytest.mark.parametrize("build", [lambda: ask, attend, layers], ids=["function", "module", "layers"])
def test_within_and_around_other_modes(build, other):
    """``torch.set_default_device`` is such a mode, and lasts for the whole program."""
    call = build()
    with other(), patch_sdpa() as report:
        call()
    assert report.kept.total() == 1
    with patch_sdpa() as report, other():
        call()
    assert report.kept.total() == 1


# --- patches that overlap ---


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_patches_are_left_in_any_order(order):
    """Each counts until it is left; another mode, entered between them, stays."""
    patches, other = [patch_sdpa() for _ in range(3)], Bystander()
    for i, patch in enumerate(patches):
        patch.__enter__()
        if i == 1:
            other.__enter__()
    left = set()
    for i in order:
        before = [patch.report.kept.total() for patch in patches]
        ask()
        counted = [patch.report.kept.total() - count for patch, count in zip(patches, before, strict=True)]
        assert counted == [int(k not in left) for k in range(3)]
        patches[i].__exit__(None, None, None)
        left.add(i)
    assert _get_current_function_mode_stack() == [other]
    other.__exit__(None, None, None)


def test_one_patch_entered_in_two_generators():
    def within():
        with patch:
            yield

    patch = patch_sdpa()
    first, second = within(), within()
    next(first)
    next(second)
    first.close()
    ask()
    assert patch.report.kept.total() == 1
    second.close()
    ask()
    assert patch.report.kept.total() == 1
    assert _get_current_function_mode_stack() == []


def test_left_more_often_than_entered():
    patch = patch_sdpa()
    with patch_sdpa() as report:
        with patch:
            pass
        with pytest.raises(RuntimeError, match="patch_sdpa: expected to be left as often as it was entered"):
            patch.__exit__(None, None, None)
        ask()
    assert report.kept.total() == 1


def test_left_in_another_thread():
    """It ends at once; the next patch takes its mode off."""
    patch = patch_sdpa(strict=True)
    patch.__enter__()
    thread = threading.Thread(target=patch.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    ask()
    with patch_sdpa():
        ask()
    assert _get_current_function_mode_stack() == []


def in_two_tasks(call):
    """Whether ``call`` is refused: in a task inside a strict patch, in one that was started there, and in one beside it."""
    async def run():
        entered, asked = asyncio.Event(), asyncio.Event()

        async def inside():
            with patch_sdpa(strict=True):
                entered.set()
                started = asyncio.create_task(attempt())
                await asked.wait()
                return await attempt(), await started

        async def attempt():
            try:
                call()
            except Exception as error:
                return "strict" in str(error)
            return False

        async def beside():
            await entered.wait()
            with patch_sdpa() as report:
                refused = await attempt()
            refused |= await attempt()
            asked.set()
            return refused, report.kept.total()

        return await asyncio.gather(inside(), beside())

    return asyncio.run(run())


def test_tasks_do_not_see_each_other():
    assert in_two_tasks(ask) == [(True, True), (False, 1)]
    assert _get_current_function_mode_stack() == []


def test_tasks_do_not_see_each_other_in_compiled_calls():
    torch._dynamo.reset()
    call = torch.compile(ask, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # compiled, and found compiled
        assert in_two_tasks(call) == [(True, True), (False, 0)]


def test_a_function_that_patches_compiled():
    torch._dynamo.reset()

    def within(x, strict):
        with patch_sdpa(strict=strict):
            return sdpa(x, x, x)

    x, call = torch.randn(1, 1, 4, 8), torch.compile(within, backend="aot_eager")
    with pytest.raises(RuntimeError, match="strict"):
        call(x, True)
    assert _get_current_function_mode_stack() == []
    torch.testing.assert_close(call(x, False), sdpa(x, x, x))
    assert _get_current_function_mode_stack() == []


# --- recomputation ---


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpoint_recomputes_in_a_thread_of_autograds(reentrant):
    """Where context variables have their defaults, as in the empty context here; all patches that hold are asked."""
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    with patch_sdpa() as outer, patch_sdpa() as inner:
        out = checkpoint(lambda x: contextvars.Context().run(sdpa, x, x, x), x, use_reentrant=reentrant)
        assert (outer.kept.total(), inner.kept.total()) == (0, 0)
        out.sum().backward()
        ask()
    assert (outer.kept.total(), inner.kept.total()) == (2, 2)
    assert _get_current_function_mode_stack() == []


@pytest.mark.kernels
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpoint_recomputes_on_the_kernels_too(reentrant, kernels):
    q, k, v = drawn()
    expected = torch.autograd.grad(sdpa(q, k, v).sin().sum(), (q, k, v))
    with patch_sdpa() as report:
        checkpoint(sdpa, q, k, v, use_reentrant=reentrant).sin().sum().backward()
    close([x.grad for x in (q, k, v)], list(expected))
    assert report.fused.total() == kernels["forward_kernel"] == 2


# --- torch.compile ---


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.kernels)])
def test_compiled_within(backend, monkeypatch):
    """One graph that runs fused inside and one of torch's outside, however often they are called; one more for any length."""
    torch._dynamo.reset()
    monkeypatch.setattr(settings, "BACKEND", backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: 2 * sdpa(q, k, v, is_causal=True), fullgraph=True, backend=counter)

    tensors = drawn()
    with launch.counted() as launches:
        with patch_sdpa():
            for _ in range(10):
                out = compiled(*tensors)
        assert launches["forward_kernel"] == (10 if backend else 0)
        close(out, compiled(*tensors))
        close(out, 2 * sdpa(*tensors, is_causal=True))
        assert launches["forward_kernel"] == (10 if backend else 0)
    assert counter.frame_count == 2
    for n in (6, 7, 8, 9):
        tensors = drawn(n)
        with patch_sdpa():
            out = compiled(*tensors)
            grads = torch.autograd.grad(out.sin().sum(), tensors)
        expected = 2 * sdpa(*tensors, is_causal=True)
        close((out, *grads), (expected, *torch.autograd.grad(expected.sin().sum(), tensors)))
    assert counter.frame_count <= 3


@pytest.mark.kernels
@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks allowed", "one graph"])
def test_a_module_compiled_within(fullgraph, kernels):
    torch._dynamo.reset()
    call = attend()
    expected = call()
    compiled = torch.compile(call, fullgraph=fullgraph, backend="aot_eager")
    with patch_sdpa():
        close(compiled(), expected)
    assert kernels["forward_kernel"] == 1
    close(compiled(), expected)
    assert kernels["forward_kernel"] == 1
