"""Calls of attention on Hopper's Gluon kernels, in the CPU interpreter for Gluon."""

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch

from fused_attn import execution, rungs, settings
from fused_attn.kernels.hopper import forward
from fused_attn.spec import TileConfig
from support.gluon import launch


@contextlib.contextmanager
def gluon(config: TileConfig | None = None, seed: int = 0, module: ModuleType = forward) -> Iterator[list[int]]:
    """Within it, attention(..., backend="triton") takes the card for a Hopper and runs Gluon's forward under one schedule.

    ``config``: its tiles, else those of a card; ``module``: the forward, perhaps a copy with a bug in it. Yields a list with
    an entry for each launch: the number of its programs.
    """
    launches: list[int] = []

    def schedule(kernel, programs, args, tile):
        launches.append(programs)
        launch(kernel, programs, args, tile, seed=seed)

    with contextlib.ExitStack() as stack:
        stack.enter_context(settings.hopper("gluon"))
        stack.enter_context(mock.patch.object(rungs, "arch_of", return_value="sm_90"))
        launched = functools.partial(module.launch_forward, launch=schedule)
        stack.enter_context(mock.patch.object(forward, "launch_forward", launched))
        if config is not None:
            stack.enter_context(mock.patch.object(execution, "choose_rung", return_value=config))
        yield launches


def framed(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a view into a larger tensor of NaN: what lies beyond its rows and columns shows in any result."""
    frame = x.new_full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 8), float("nan"))
    view = frame[..., : x.shape[-2], : x.shape[-1]]
    return view.copy_(x)
