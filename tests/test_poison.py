"""What torch.empty and its kin return in a test is NaN, and nothing else about them changes."""

import torch
from support.guard import POISON_LIMIT, is_poison
from torch.testing._internal.two_tensor import TwoTensor


def test_it_fills_what_is_allocated():
    assert torch.empty(3).isnan().all()
    assert is_poison(torch.empty(3, 4, dtype=torch.float16).T).all()
    assert not is_poison(torch.zeros(3)).any()
    assert torch.empty(3, device="meta").device.type == "meta"


def test_it_leaves_address_space_alone():
    assert not is_poison(torch.empty(POISON_LIMIT // 4 + 1)[:1]).any()


def test_it_does_not_disturb_compilation():
    def f(x):
        return torch.empty(3).copy_(x) + x.new_empty(3).zero_()

    assert torch.compile(f, backend="eager", fullgraph=True)(torch.ones(3)).eq(1).all()


def test_it_does_not_disturb_transforms():
    def f(x):
        return x.new_empty(3).copy_(x) + torch.empty(3).zero_()

    assert torch.vmap(f)(torch.ones(2, 3)).eq(1).all()
    with torch._subclasses.FakeTensorMode():
        assert torch.empty(3).shape == (3,)
    two = TwoTensor(torch.ones(3), torch.ones(3)).new_empty(2)
    assert two.a.shape == two.b.shape == (2,)
