"""Calls with gradients that were made before take the plans of their forward and backward: the same bits, and no other's."""

import gc
import itertools
import weakref

import pytest
import torch
from support.guard import memory_guard
from torch.utils.checkpoint import checkpoint

import fused_attn
from fused_attn import attention, torch_private
from fused_attn.kernels.launch import Launch, counted
from fused_attn.plan import schedules, tiles
from fused_attn.plan.plan import Operation, plan, unstored
from fused_attn.run import execution, plans

pytestmark = pytest.mark.kernels

BOTH = {"two kernels": True, "one kernel": False}  # deterministic


def qkv(n_queries=40, n_keys=40, heads=(4, 2), dim=16, dtype=torch.bfloat16):
    shapes = (heads[0], n_queries, dim), (heads[1], n_keys, dim), (heads[1], n_keys, dim)
    return [torch.randn(1, *shape).to(dtype) for shape in shapes]


@pytest.fixture(params=BOTH.values(), ids=BOTH)
def deterministic(request, monkeypatch):
    """Both backwards of a plain call; the fused one has tiles in the interpreter."""
    monkeypatch.setattr("fused_attn.plan.problem.choose_fused", lambda *_: tiles.T(16, 32, 1, 1))
    return request.param


def gradients(tensors, deterministic, *, needs=(True, True, True), of_lse=False, dout=None, **arguments):
    """(out, lse, gradients of those that need them)."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    out, lse = attention(*leaves, return_lse=True, deterministic=deterministic, backend="triton", **arguments)
    loss = (out * dout).sum() if dout is not None else out.sum()
    if of_lse:
        loss = loss + lse.sin().sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])


def same(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


KINDS = [{}, {"causal": True}, {"window": (7, 2)}, {"scale": 0.5}, {"softcap": 3.0}, {"of_lse": True},
         {"needs": (True, False, False)}, {"needs": (False, True, True)}, {"needs": (False, False, True), "causal": True}]


def test_repeated_gradients_equal_first_ones(deterministic, monkeypatch):
    """Every kind four times, in an order that mixes them, with gradients of all strides; the last times by plans."""
    douts = [None, torch.randn(1, 4, 40, 16).bfloat16(), torch.randn(1, 40, 4, 16).bfloat16().transpose(1, 2)]
    calls = [(kind, dout) for kind, dout in itertools.product(KINDS, douts) if dout is None or kind in KINDS[:2]]
    inputs = [[qkv() for _ in range(4)] for _ in calls]
    expected = []
    for (kind, dout), each in zip(calls, inputs, strict=True):
        for tensors in each:
            plans.forget()
            expected.append(gradients(tensors, deterministic, dout=dout, **kind))
    plans.forget()
    ran = {name: [] for name in ("forward", "backward")}
    for name, real in [(name, getattr(execution, name)) for name in ran]:
        monkeypatch.setattr(execution, name, lambda *a, n=name, f=real: ran[n].append(1) or f(*a))
    found = [[gradients(each[turn], deterministic, dout=dout, **kind) for (kind, dout), each in zip(calls, inputs, strict=True)]
             for turn in range(4)]
    for got, want in zip(itertools.chain(*zip(*found, strict=True)), expected, strict=True):
        same(got, want)
    assert len(ran["forward"]) <= 2 * len(calls)
    assert len(ran["backward"]) <= 3 * len(calls)


def test_both_backwards_are_told_apart(monkeypatch):
    monkeypatch.setattr("fused_attn.plan.problem.choose_fused", lambda *_: tiles.T(16, 32, 1, 1))
    tensors = qkv()
    for turn, which in enumerate([True, False] * 4):
        with counted() as launches:
            gradients(tensors, which)
        assert ("dq_kernel" in launches) == which, turn


def test_no_gradient_is_lost_between_calls_with_and_without():
    tensors = qkv()
    for _ in range(4):
        assert not attention(*tensors, backend="triton").requires_grad
        assert all(x.abs().sum() > 0 for x in gradients(tensors, True)[2:])
        with torch.no_grad():
            assert not attention(*[x.requires_grad_() for x in qkv()], backend="triton").requires_grad


def test_repeated_gradients_write_all_that_they_return(deterministic):
    for _ in range(3):
        gradients(qkv(37, 43), deterministic)
    with memory_guard():
        results = gradients(qkv(37, 43), deterministic)
    assert not any(x.isnan().any() for x in results)


def test_saved_tensors_may_have_been_moved(deterministic):
    """Hooks give them back with strides of their own: none takes the plan of others."""
    moved = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x.clone()  # noqa: E731
    tensors = qkv()
    plans.forget()
    want = gradients(tensors, deterministic)
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(moved, lambda x: x):
            for x, y in zip(gradients(tensors, deterministic), want, strict=True):
                assert torch.equal(x, y)
        same(gradients(tensors, deterministic), want)


def test_checkpointing_recomputes_with_plans(deterministic):
    tensors = qkv()
    plans.forget()
    want = gradients(tensors, deterministic)[2:]
    for _ in range(4):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = checkpoint(lambda *x: attention(*x, deterministic=deterministic, backend="triton"), *leaves, use_reentrant=False)
        same(torch.autograd.grad(out.sum(), leaves), want)


def test_a_second_derivative_is_right_beside_plans():
    """The first calls leave plans, and the later ones find them."""
    tensors = qkv()
    for _ in range(4):
        found = []
        for backend in ("triton", "reference"):
            leaves = [x.detach().double().requires_grad_() if backend == "reference" else x.detach().requires_grad_()
                      for x in tensors]
            (dq,) = torch.autograd.grad(attention(*leaves, backend=backend).sin().sum(), leaves[:1], create_graph=True)
            found.append(torch.autograd.grad(dq.sin().sum(), leaves))
        for got, want in zip(*found, strict=True):
            assert (got - want).norm() < 0.05 * want.norm()


def test_batches_of_gradients_take_no_plan():
    tensors = qkv()
    for _ in range(4):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attention(*leaves, deterministic=True, backend="triton")
        dout = torch.randn(2, *out.shape).bfloat16()
        each = [torch.autograd.grad(out, leaves, x, retain_graph=True) for x in dout]
        same(torch.autograd.grad(out, leaves, dout, is_grads_batched=True), [torch.stack(x) for x in zip(*each, strict=True)])


def test_a_graph_may_be_differentiated_again(deterministic):
    for _ in range(3):
        leaves = [x.requires_grad_() for x in qkv()]
        out = attention(*leaves, deterministic=deterministic, backend="triton")
        same(*(torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2)))


def test_plans_of_gradients_keep_no_tensor(deterministic):
    tensors = qkv()
    results = [gradients(tensors, deterministic) for _ in range(4)]
    gone = [weakref.ref(x) for x in (*tensors, *itertools.chain(*results))]
    del tensors, results
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_what_is_no_plan_is_not_planned_again(monkeypatch):
    times = []
    monkeypatch.setattr(execution, "plan_forward", lambda *_: times.append(1))
    monkeypatch.setattr(execution, "plan_backward", lambda *_: times.append(2))
    for _ in range(6):
        gradients(qkv(), True)
    assert times == [1, 2]


class Kernel:
    fn = test_what_is_no_plan_is_not_planned_again  # something with a name


def made(tensor, *arguments):
    return Launch(Kernel, 1, (tensor, *arguments), None)


def steps_of(kind):
    def steps(x):
        y = torch.empty_like(x)
        if kind == "computes":
            y = x + 1
        elif kind == "fills":
            y.zero_()
        yield made(x, 3, y) if kind == "late tensors" else made(x, None, y, 3)
        if kind == "operation":
            yield Operation(torch.Tensor.mul_, (y, 2.0))
        return {"part": (y[..., 0],), "part of what is given": (x[..., 0],)}.get(kind, (y,))

    return steps


@pytest.mark.parametrize(("kind", "planned"), [
    ("launches", True), ("operation", True), ("computes", False), ("fills", False), ("late tensors", False), ("part", False),
    ("part of what is given", False)])
def test_a_plan_loses_nothing_that_the_steps_do(kind, planned):
    given = (unstored(torch.randn(2, 3, 4, 5)),)
    assert (plan(steps_of(kind)(*given), given) is not None) == planned


def test_the_backwards_steps_are_a_plan(deterministic):
    """Neither schedule does anything by torch that it does not yield."""
    q, k, v = qkv()
    call = fused_attn.call.describe.describe(q, k, v, causal=True)
    spec = call.spec._replace(deterministic=deterministic)
    out, lse, _ = execution.forward(q, k, v, spec, call.others)
    saved = fused_attn.call.schema.Saved(torch.randn_like(out), None, q, k, v, out, None, lse)
    found = execution.plan_backward(saved, spec, schedules.EVERY_GRADIENT)
    assert found is not None
    assert len(found.steps) == (3 if deterministic else 4)


@pytest.mark.parametrize("operation", [lambda x: x.transpose(1, 2).contiguous(), lambda x: x.to(torch.float16),
                                       lambda x: x.transpose(1, 2).flatten(0, 1)], ids=["contiguous", "to", "flatten"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_copies_are_seen_in_every_mode(operation, context):
    """In inference mode they reach a dispatch mode whole, and call themselves views."""
    with context():
        assert torch_private.observed(lambda: operation(torch.empty(2, 3, 4, 5, device="meta")))[1]
        assert not torch_private.observed(lambda: torch.empty(2, 3, 4, 5, device="meta").flatten(0, 1)[1:].mT)[1]


def test_operations_take_whole_tensors():
    """torch is told no strides: in a plan a part of a tensor would be another one."""
    def steps(x):
        y = torch.empty_like(x)
        yield made(x, y, 3)
        yield Operation(torch.Tensor.zero_, (y[:, :, 1:],))
        return (y,)

    given = (unstored(torch.randn(2, 3, 4, 5)),)
    assert plan(steps(*given), given) is None


def test_a_backward_of_unaligned_gradients_has_no_plan_on_hopper(monkeypatch):
    """Gluon's steps copy them, which steps over tensors without storage would not see."""
    tensors = qkv()
    spec = fused_attn.call.describe.describe(*tensors).spec._replace(hopper="gluon")
    monkeypatch.setattr(execution, "plan_backward", lambda *_: pytest.fail("planned"))
    dout = torch.randn(4 * 40 * 16 + 1).bfloat16()[1:].view(1, 4, 40, 16)
    saved = fused_attn.call.schema.Saved(dout, None, *tensors, dout, None, torch.randn(1, 4, 40))
    for _ in range(3):
        assert plans.backward(("key",), saved, spec, schedules.EVERY_GRADIENT) is None
