"""What tests of caches share: values in fp64, closeness to 12 digits, and all that a cache holds."""

import torch


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def state(cache):
    """All that a cache holds, down to the values."""
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in vars(cache).items()}


def same(before, after):
    return before.keys() == after.keys() and all(
        torch.equal(x, after[name]) if isinstance(x, torch.Tensor) and isinstance(after[name], torch.Tensor)
        else x == after[name] for name, x in before.items())
