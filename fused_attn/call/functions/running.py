"""What the PyTorch texts of traced functions call, and where they are loaded."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from fused_attn import saturation, torch_private


def part(x: torch.Tensor, dims: list[Any], extents: tuple[int, ...]) -> torch.Tensor:
    """The view [B', H', Nq', Nk'] of a tensor whose dimension i is batch, head, query or key (``dims[i]`` 0 to 3), or of which
    one element is taken, (n,)."""
    x = _wide(x)
    for i in reversed(range(len(dims))):
        if isinstance(dims[i], tuple):
            x = x.select(i, dims[i][0])
    return _lead(x, [dim for dim in dims if not isinstance(dim, tuple)], extents)


def _lead(x: torch.Tensor, dims: list[int], extents: tuple[int, ...]) -> torch.Tensor:
    """x with its first dimensions moved to where ``dims`` tells, of the four of scores, and cut to the call's extents."""
    names = "b", "h", "q_idx", "kv_idx"
    for i, dim in enumerate(dims):
        if torch_private.known(x.shape[i] < extents[dim]):
            raise IndexError(f"a captured tensor of shape {tuple(x.shape)} is indexed by {names[dim]}, which goes up to "
                             f"{extents[dim] - 1}, in dimension {i}")
        if not torch_private.known(x.shape[i] == extents[dim]):
            x = x.narrow(i, 0, extents[dim])
    ordered = sorted(dims)
    if ordered != dims:
        x = x.permute(*(dims.index(dim) for dim in ordered), *range(len(dims), x.dim()))
    return x if len(dims) == 4 else x[tuple(slice(None) if dim in dims else None for dim in range(4))]


def table(x: torch.Tensor, lead: tuple[int | None, ...], inner: tuple[int, ...], extents: tuple[int, ...]) -> torch.Tensor:
    """A tensor [B', H', Nq', Nk', ...] of which a function looks up entries; ``lead`` and ``inner`` as in an ``Argument``."""
    if any(x.shape[i] == 0 for i in inner):
        raise IndexError(f"a captured tensor of shape {tuple(x.shape)} is indexed, and has no elements")
    dims = [dim for dim, of in enumerate(lead) if of is not None]
    x = _wide(x)
    x = x if _apart(x) else x.contiguous()  # its gradient is summed in its own layout
    return _lead(x.permute(*(of for of in lead if of is not None), *inner), dims, extents)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Integers of fewer than 32 bits as such of 32, so that none wraps in one backend and not in another."""
    return x.to(torch.int32) if x.dtype in (torch.uint8, torch.int8, torch.int16) else x


def _apart(x: torch.Tensor) -> bool:
    """Whether no two elements of a tensor share their place in memory."""
    taken = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride < taken:
            return False
        taken = stride * size
    return True


def look_up(x: torch.Tensor, indices: tuple[Any, ...]) -> torch.Tensor:
    """Elements of a tensor [B', H', Nq', Nk'], each index cut to what there is."""
    if x.numel() == 0:
        raise IndexError(f"a captured tensor of shape {tuple(x.shape)} is indexed, and has no elements")
    found: torch.Tensor = _wide(x)[tuple(_within(i, size) for i, size in zip(indices, x.shape, strict=True))]
    return found[(None,) * (4 - found.dim())]


def _within(index: Any, size: int) -> Any:
    """An index as torch counts it, from the end where it is negative; the nearest that there is where it lies outside."""
    if not isinstance(index, torch.Tensor):
        return min(max(index + size if index < 0 else index, 0), size - 1)
    return torch.where(index < 0, index + size, index).clamp(0, size - 1)


def entry(x: torch.Tensor, inner: tuple[Any, ...]) -> torch.Tensor:
    """Entries of a table [b, h, m, n, ...], each of the first four full or 1, at indices that broadcast to [b, h, m, n]."""
    indices: list[Any] = []
    for dim, size in enumerate(x.shape[:4]):
        shape = [1] * 4
        shape[dim] = size
        indices.append(torch.arange(size, device=x.device).view(shape))
    indices += [_within(i, size) for i, size in zip(inner, x.shape[4:], strict=True)]
    return x[tuple(indices)]


def floor_quotient(a: Any, b: Any) -> Any:
    """a // b, which has a derivative, of 0."""
    return torch.div(torch.as_tensor(a), b, rounding_mode="floor")


def differences(extents: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Every kv_idx - q_idx, [Nq + Nk - 1]."""
    n_queries, n_keys = extents[2:]
    return torch.arange(max(n_queries + n_keys - 1, 0), device=device) + (1 - n_queries)


def relative(x: torch.Tensor) -> torch.Tensor:
    """Values [B', H', 1, Nq + Nk - 1] as those of a ``RelativeBias``."""
    return x[(None,) * (4 - x.dim())].squeeze(2)


_NAMES = {"torch": torch, "saturation": saturation, **{function.__name__: function for function in (
    part, table, look_up, entry, floor_quotient, differences, relative)}}


@functools.lru_cache(512)
def loaded(text: str, name: str) -> Callable[..., Any]:
    """The function of a generated text."""
    names: dict[str, Any] = dict(_NAMES)
    exec(compile(text, f"<fused_attn {name}>", "exec"), names)
    function: Callable[..., Any] = names[name]
    return function
