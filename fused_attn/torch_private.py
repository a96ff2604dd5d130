"""Every private name of torch that the package uses, each with what stands in for it in a torch that has it no more."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def _private(path: str, instead: Any) -> Any:
    """What stands at ``torch.<path>``, or ``instead``."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return instead if found is None else found


# torch's own function, whatever stands in torch.nn.functional when it is called, or has stood there since before this import.
sdpa: Callable[..., torch.Tensor] = _private("_C._nn.scaled_dot_product_attention", F.scaled_dot_product_attention)

# Raises where a condition fails, and tells a compiler that it holds of a size that it does not know yet.
check: Callable[..., None] = _private("_check", lambda condition, message: None)


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds. For a compiler a size that comes from the device has no value: False, if it asks."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # here, since it imports SymPy

    return bool(guard_or_false(condition))
