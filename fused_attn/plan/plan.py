"""A plan: the launches of a call with places in the stead of tensors, to be made again and again with other tensors."""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import torch

from fused_attn.kernels.launch import Launch, run

Result = TypeVar("Result")


class Buffer(NamedTuple):
    """What a plan allocates."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """An argument that is a part of the tensor ``which``, from ``offset`` on, or a descriptor (``box``) of it; where it is the
    whole tensor a plan has its number alone. Kernels are told strides beside their pointers, so shapes do not matter."""

    which: int
    offset: int
    box: Any = None

    def of(self, tensors: list[torch.Tensor]) -> Any:
        x = tensors[self.which]
        if self.offset:
            x = x.as_strided((1,), (1,), x.storage_offset() + self.offset)
        return x if self.box is None else dataclasses.replace(self.box, base=x)


class Step(NamedTuple):
    """A launch whose arguments begin with ``places`` and go on with what its own have there."""

    launch: Launch
    places: tuple[int | Place, ...]
    rest: tuple[Any, ...]


class Plan(NamedTuple):
    """The steps of a call, what they allocate, and which tensors (those given first, then those allocated) are its results."""

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    results: tuple[int, ...]

    def __call__(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs the launches with the tensors ``given``; its results."""
        device = given[0].device
        tensors = list(given)
        for shape, stride, dtype in self.buffers:
            tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        for (kernel, programs, _, config), places, rest in self.steps:
            begin = [tensors[place] if isinstance(place, int) else place.of(tensors) for place in places]
            run(Launch(kernel, programs, (*begin, *rest), config))
        return tuple([tensors[i] for i in self.results])


def finish(steps: Generator[Launch, None, Result], take: Callable[[Launch], None] = run) -> Result:
    """Gives the launches that steps yield to ``take``, which runs them where nothing else is said; what the steps return."""
    while True:
        try:
            launch = next(steps)
        except StopIteration as end:
            return end.value
        take(launch)


def collect(steps: Generator[Launch, None, Result]) -> tuple[list[Launch], Result]:
    """(the launches of steps, none of which is run; what the steps return)."""
    found: list[Launch] = []
    result = finish(steps, found.append)
    return found, result


def unstored(x: torch.Tensor) -> torch.Tensor:
    """A tensor without storage that lies as ``x`` does."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def plan(steps: Generator[Launch, None, Any], given: tuple[torch.Tensor, ...]) -> Plan | None:
    """The plan of steps over ``given``, tensors without storage, that do nothing but launch; their results may be None.

    None where the tensors of a launch are not its first arguments, or a result is a part of a tensor.
    """
    launches, results = collect(steps)
    tensors: list[torch.Tensor] = []
    storages: list[Any] = []  # of these tensors; a tensor and its views have one object for it

    def place(argument: Any) -> int | Place:
        x = argument.base if hasattr(argument, "block_shape") else argument
        own = x.untyped_storage()
        index = next((i for i, storage in enumerate(storages) if storage is own), len(tensors))
        if index == len(tensors):
            tensors.append(x)
            storages.append(own)
        offset = x.storage_offset() - tensors[index].storage_offset()
        return index if x is argument and not offset else Place(index, offset, None if x is argument else argument)

    if [place(x) for x in given] != list(range(len(given))):
        return None
    made = tuple([place(x) for x in results if x is not None])
    planned = []
    for launch in filter(lambda launch: launch.programs, launches):
        are_tensors = [isinstance(x, torch.Tensor) or hasattr(x, "block_shape") for x in launch.arguments]
        count = are_tensors.index(False)
        if any(are_tensors[count:]):
            return None
        places = tuple(map(place, launch.arguments[:count]))
        planned.append(Step(launch._replace(arguments=()), places, launch.arguments[count:]))
    buffers = tuple(Buffer(x.shape, x.stride(), x.dtype) for x in tensors[len(given) :])
    indices = tuple([i for i in made if isinstance(i, int)])
    return Plan(tuple(planned), buffers, indices) if len(indices) == len(made) else None
