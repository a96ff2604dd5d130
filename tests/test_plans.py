"""A call that was made before takes its plan from then: the same bits, and never another call's."""

import gc
import itertools
import weakref

import pytest
import torch
from support.guard import is_poison, memory_guard
from support.launches import recorded
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn
from fused_attn import attention, settings
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.launch import counted
from fused_attn.plan import schedules, tiles, tuned
from fused_attn.run import execution, plans

pytestmark = pytest.mark.kernels


def qkv(n_queries=9, n_keys=40, heads=(4, 2), dim=16, batch=1, dtype=torch.bfloat16, dim_v=None):
    shapes = (heads[0], n_queries, dim), (heads[1], n_keys, dim), (heads[1], n_keys, dim_v or dim)
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def call(*tensors, **arguments):
    return attention(*tensors, return_lse=True, backend="triton", **arguments)


def counting(monkeypatch, module, name):
    """How often a function of a module was called."""
    times, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **more: times.append(1) or real(*given, **more))
    return times


def described(monkeypatch):
    """How often a call was described, which repeated ones are not."""
    return counting(monkeypatch, fused_attn.call.describe, "describe")


KINDS = [{}, {"causal": True}, {"window": (7, 2)}, {"window": (20, None), "causal": True}, {"scale": 0.5}, {"scale": -0.5},
         {"softcap": 3.0}, {"window": (200, None)}]
TENSORS = {
    "plain": qkv, "one query": lambda: qkv(1), "decoding": lambda: qkv(1, 300), "two": lambda: qkv(batch=2),
    "fp16": lambda: qkv(dtype=torch.float16), "values": lambda: qkv(dim_v=24), "no groups": lambda: qkv(heads=(4, 4)),
    "length first": lambda: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()],
    "one projection": lambda: list(torch.randn(1, 40, 3, 4, 16).bfloat16().permute(2, 0, 3, 1, 4)),
}


def test_repeated_calls_equal_first_ones(monkeypatch):
    """Every kind of call three times, in an order that mixes them, against calls that remember nothing; the third time from
    plans."""
    monkeypatch.setattr(tiles, "MANY_KEYS", 128)
    monkeypatch.setattr(tiles, "SPLIT", 64)
    # Of tensors and arguments every one, and the two that choose what runs with all of the others.
    kinds = [(make, arguments) for (name, make), arguments in itertools.product(TENSORS.items(), KINDS)
             if name in ("plain", "decoding") or arguments is KINDS[2]]
    expected = []
    inputs = [[make(), make(), make()] for make, _ in kinds]
    for (_, arguments), both in zip(kinds, inputs, strict=True):
        for tensors in both:
            plans.forget()
            expected.append(call(*tensors, **arguments))
    plans.forget()
    times, planned = described(monkeypatch), counting(monkeypatch, schedules, "of_forward")
    found = [[call(*each[turn], **arguments) for (_, arguments), each in zip(kinds, inputs, strict=True)] for turn in (0, 1, 2)]
    assert len(times) < len(kinds)  # those that differ in lengths alone are of one kind
    assert len(planned) == 3 * len(kinds)
    for want, got in zip(expected, itertools.chain(*zip(*found, strict=True)), strict=True):
        for x, y in zip(want, got, strict=True):
            assert torch.equal(x, y)
            assert x.stride() == y.stride()


def test_a_repeated_call_writes_all_that_it_returns(monkeypatch):
    monkeypatch.setattr(tiles, "MANY_KEYS", 128)
    monkeypatch.setattr(tiles, "SPLIT", 64)
    first, second = (qkv(1, 300) for _ in range(2))
    for _ in range(2):
        call(*first)
    times = counting(monkeypatch, execution, "forward")
    with memory_guard() as guard:
        out, lse = call(*second)
    assert not times
    assert guard.kernels == ["forward_kernel", "combine_kernel"]
    assert not is_poison(out).any()
    assert not is_poison(lse).any()


def test_a_new_length_is_described_no_more(monkeypatch):
    """The steps of a generation, two layers each: every layer after the first, and every later step, goes without checks."""
    monkeypatch.setattr(tiles, "MANY_KEYS", 64)
    monkeypatch.setattr(tiles, "SPLIT", 32)
    q, k, v = qkv(1, 300)
    call(q, k[:, :, :50], v[:, :, :50], causal=True)
    times = described(monkeypatch)
    for n in (60, 70, 150, 150, 150, 290):
        keys, values = k[:, :, :n], v[:, :, :n]
        got = call(q, keys, values, causal=True)
        torch.testing.assert_close(got, attention(q, keys, values, return_lse=True, backend="reference"), rtol=0.02, atol=0.02)
    assert len(times) == 6  # the reference's own
    with pytest.raises(ValueError, match=r"v: expected k's batch, heads and length"):
        call(q, k[:, :, :60], v[:, :, :61], causal=True)


def test_plans_take_tuned_tiles(monkeypatch):
    monkeypatch.setattr(tuned, "tuned", lambda device: {("forward", 16): TileConfig(16, 16, 1, 1)})
    tensors = qkv(40)
    for _ in range(4):
        with recorded() as launches:
            call(*tensors)
        assert [launch.config for launch in launches] == [TileConfig(16, 16, 1, 1)]


def test_wrong_ranks_and_layouts_are_refused_after_right_ones():
    call(torch.randn(2, 4, 9, 16).bfloat16(), *[torch.randn(2, 2, 40, 16).bfloat16() for _ in range(2)])
    q, k, v = torch.randn(2, 4, 9, 16, 2), torch.randn(2, 16, 40), torch.randn(2, 2, 40, 16)
    with pytest.raises(ValueError, match="expected"):
        call(*(x.bfloat16() for x in (q, k, v)))
    nested = torch.nested.nested_tensor([torch.randn(2, 9, 16).bfloat16()])
    with pytest.raises(ValueError, match=r"k: expected"):
        call(torch.randn(1, 2, 9, 16).bfloat16(), nested, nested)


def test_halves_on_meta_leave_no_plan():
    assert attention(*(x.to("meta") for x in qkv()), backend="torch").device.type == "meta"


def test_a_plan_keeps_no_tensor_of_the_call():
    tensors = qkv(40)
    for _ in range(3):
        call(*tensors)
    gone = [weakref.ref(x) for x in tensors]
    del tensors
    gc.collect()
    assert [x() for x in gone] == [None] * 3


@pytest.mark.parametrize("tensors", [qkv(0), qkv(5, 0), qkv(batch=0), qkv(1, 300, batch=0)],
                         ids=["no queries", "no keys", "no batch", "no batch of splits"])
@pytest.mark.parametrize("window", [None, (100, 0)])
def test_empty_calls_are_plans_too(tensors, window, monkeypatch):
    monkeypatch.setattr(tiles, "MANY_KEYS", 128)
    for _ in range(3):
        want = attention(*tensors, return_lse=True, backend="reference", window=window)
        torch.testing.assert_close(call(*tensors, window=window), want)


def test_gradients_are_never_lost():
    tensors = qkv()
    call(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = call(*leaves)
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(out.sum() + lse.sum(), leaves))
    with torch.no_grad():
        assert torch.equal(call(*leaves)[0], out)


@pytest.mark.parametrize("same_first", [True, False])
def test_one_tensor_in_two_places_is_another_kind(same_first):
    """Whether q is k is no matter of shapes: launches with one pointer twice must not answer for two tensors."""
    q, k, v = qkv(40, heads=(2, 2))
    kinds = [(q, q, q), (q, k, v), (k, k, v), (v, k, q)]
    for tensors in kinds if same_first else reversed(kinds):
        want = attention(*tensors, return_lse=True, backend="reference")
        torch.testing.assert_close(call(*tensors), want, rtol=0.02, atol=0.02)


def test_wrong_arguments_are_refused_after_right_ones():
    tensors = qkv()
    call(*tensors, causal=True, window=(3, 0))
    with pytest.raises(TypeError, match="causal"):
        call(*tensors, causal=1, window=(3, 0))
    with pytest.raises(ValueError, match="backend"):
        attention(*tensors, causal=True, window=(3, 0), backend=["triton"])
    torch.testing.assert_close(call(*tensors, causal=True, window=[3, 0]), call(*tensors, causal=True, window=(3, 0)))


def test_what_changes_a_call_from_outside_is_seen(monkeypatch):
    tensors = qkv()
    attention(*tensors, backend="triton")
    with torch.autocast("cpu", torch.float16):
        assert attention(*tensors, backend="triton").dtype == torch.float16
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert "Fake" in type(attention(*tensors, backend="triton")).__name__
    monkeypatch.setattr(settings, "BACKEND", "triton")
    attention(*tensors)
    monkeypatch.setattr(settings, "BACKEND", "reference")
    with counted() as launches:
        attention(*tensors)
    assert not launches


def test_fp32_follows_torchs_setting_at_every_call(monkeypatch):
    tensors = qkv(dtype=torch.float32)
    times = described(monkeypatch)
    for _ in range(2):
        call(*tensors)
    assert len(times) == 2


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "_MOST", 3)
    for n in range(5):
        call(*qkv(), scale=0.5 + n)
    assert len(plans._plans) <= 3
    for n in range(5, 15):
        call(*qkv(n, dim=n))
        call(*qkv(n + 1, dim=n))
    assert 1 <= len(plans._plans) <= 3
    assert 1 <= len(plans._specs) <= 3
