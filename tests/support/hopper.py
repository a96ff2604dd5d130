"""Calls of attention on Hopper's Gluon kernels, in the CPU interpreter for Gluon."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fused_attn import settings
from fused_attn.call.spec import TileConfig
from fused_attn.kernels import launch as launching
from fused_attn.kernels.hopper import backward, forward, workspace
from fused_attn.kernels.launch import Launch
from fused_attn.plan import problem
from fused_attn.run import plans
from support.gluon import launch


@contextlib.contextmanager
def gluon(config: TileConfig | None = None, seed: int = 0, modules: dict[str, ModuleType] | None = None,
          backward_config: TileConfig | None = None) -> Iterator[list[str]]:
    """Within it, attention(..., backend="triton") takes the card for a Hopper and runs Gluon's kernels under one schedule.

    ``config``, ``backward_config``: their tiles, else those of a card; ``modules``: copies of kernels.hopper's modules, with
    bugs in them. Yields the names of the Gluon kernels that were launched.
    """
    launches: list[str] = []
    own, started = [], launching._launch  # kernels that Triton's interpreter does not take; how the others start

    def scheduled(one: Launch, *more: Any) -> None:
        if one.kernel in own:
            launches.append(one.name)
            launch(*one, seed=seed)
        else:
            started(one, *more)

    plans.forget()  # which would launch other kernels than these
    with contextlib.ExitStack() as stack:
        stack.callback(plans.forget)
        stack.enter_context(settings.hopper("gluon"))
        stack.enter_context(mock.patch.object(problem, "arch_of", return_value="sm_90"))
        stack.enter_context(mock.patch.object(launching, "_launch", scheduled))
        of_gluon = (forward, "forward_launch", "forward_kernel"), (backward, "backward_launch", "backward_kernel")
        for module, name, kernel in (*of_gluon, (workspace, "statistics_launch", ""), (workspace, "ordered_launch", "")):
            source = (modules or {}).get(module.__name__, module)
            stack.enter_context(mock.patch.object(module, name, getattr(source, name)))
            own += [getattr(source, kernel)] if kernel else []
        for name, chosen in (("choose_hopper", config), ("choose_gluon_backward", backward_config)):
            if chosen is not None:
                stack.enter_context(mock.patch.object(problem, name, return_value=chosen))
        yield launches


def framed(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a view into a larger tensor of NaN: what lies beyond its rows and columns shows in any result."""
    frame = x.new_full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 8), float("nan"))
    view = frame[..., : x.shape[-2], : x.shape[-1]]
    return view.copy_(x)
