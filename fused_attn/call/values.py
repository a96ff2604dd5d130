"""Plain values among the arguments of a call."""

import math
import numbers
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def number(x: Any) -> Any:
    """A scalar of NumPy, or a tensor of no dimensions that asks for no gradient, as a Python number; anything else as it is."""
    if x is None or isinstance(x, (bool, int, float)) or getattr(x, "ndim", None) != 0 or getattr(x, "requires_grad", False):
        return x
    return x.item()


def is_finite(value: Any, name: str, expected: str) -> bool:
    """Whether a number is finite; ``name`` and ``expected`` are for the error where it is none."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected {expected}; got {value!r}")
    finite: bool = -math.inf < value < math.inf  # type: ignore[operator]  # math.isfinite breaks graphs whose scale varies
    return finite
