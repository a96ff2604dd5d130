"""The launches that calls make, as tests look at them."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from fused_attn.kernels import launch


@contextlib.contextmanager
def recorded() -> Iterator[list[launch.Launch]]:
    """Keeps the launches that are made within it, in their order, and makes them."""
    made: list[launch.Launch] = []
    real = launch._launch

    def noted(one: launch.Launch, *more: object) -> object:
        made.append(one)
        return real(one, *more)

    with mock.patch.object(launch, "_launch", noted):
        yield made
