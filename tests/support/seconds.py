"""Second derivatives of whole calls, by every way that there is: twice backwards, forwards over backwards, and the reverse."""

from collections.abc import Callable
from typing import Any

import torch

from support.features import Inputs

LACK_SECOND = {  # a feature -> what is said where it has no second derivatives on the kernels
    "additive": "second derivatives of an additive score", "score_mod": "near: a mod written by hand has no second derivatives",
}
TORCH_LACKS = "nested"  # torch has no transform of nested tensors, and no second derivative of their making

Result = dict[str, torch.Tensor]


def loss(inputs: Inputs, backend: str, with_lse: bool = True) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
    """A scalar of a call's leaves, of which neither the first nor the second derivative is constant in anything."""

    def function(leaves: tuple[torch.Tensor, ...]) -> torch.Tensor:
        torch.manual_seed(1)  # dropout draws one seed a call
        out, lse = inputs.attention(dict(zip(inputs.leaves, leaves, strict=True)), backend)
        total = (out * inputs.dout).sin().sum()
        if not with_lse:
            return total
        seen = lse > -torch.inf  # a row without a key
        return total + (torch.where(seen, lse, 0.0) * inputs.dlse).cos().sum()

    return function


def twice_backwards(function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...],
                    along: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The Hessian times ``along``, as the gradient of a gradient."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    first = torch.autograd.grad(function(leaves), leaves, create_graph=True, materialize_grads=True)
    moved = torch.stack([(x * y).sum() for x, y in zip(first, along, strict=True)]).sum()
    return torch.autograd.grad(moved, leaves, materialize_grads=True)


def forward_over_backward(function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...],
                          along: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The Hessian times ``along``, as the tangent of a gradient."""
    moved: tuple[torch.Tensor, ...] = torch.func.jvp(torch.func.grad(function), (leaves,), (along,))[1]
    return moved


def backward_over_forward(function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...],
                          along: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The Hessian times ``along``, as the gradient of a tangent."""
    found: tuple[torch.Tensor, ...] = torch.func.grad(lambda x: torch.func.jvp(function, (x,), (along,))[1])(leaves)
    return found


WAYS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "vjp of vjp": twice_backwards, "jvp of vjp": forward_over_backward, "vjp of jvp": backward_over_forward}


def second(inputs: Inputs, backend: str, way: str, seed: int = 0) -> Result:
    """The Hessian of ``loss`` times random directions of every leaf."""
    generator = torch.Generator().manual_seed(seed)
    leaves = tuple(x.detach() for x in inputs.leaves.values())
    along = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in leaves)
    found: Any = WAYS[way](loss(inputs, backend), leaves, along)
    return dict(zip(inputs.leaves, found, strict=True))
