"""A plan: the steps of a call with places instead of tensors, to be repeated with other tensors."""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from fused_attn import torch_private
from fused_attn.kernels.launch import Launch, run

Result = TypeVar("Result")


class Operation(NamedTuple):
    """What torch does between two launches: ``function(*arguments)``, tensors first, which writes to one of them."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


Made: TypeAlias = Launch | Operation


class Buffer(NamedTuple):
    """A tensor that a plan allocates."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """An argument that is a part of tensor number ``which``, from ``offset`` on, or a descriptor (``box``) of it. For a whole
    tensor, a plan has its number alone. Kernels take strides beside their pointers, so shapes do not matter."""

    which: int
    offset: int
    box: Any = None

    def of(self, tensors: list[torch.Tensor]) -> Any:
        x = tensors[self.which]
        if self.offset:
            x = x.as_strided((1,), (1,), x.storage_offset() + self.offset)
        return x if self.box is None else dataclasses.replace(self.box, base=x)


class Step(NamedTuple):
    """A launch or operation whose arguments begin with what is at ``places`` and go on with ``rest``."""

    made: Made
    places: tuple[int | Place | None, ...]
    rest: tuple[Any, ...]


class Plan(NamedTuple):
    """The steps of a call, what they allocate, and which tensors (those given first, then those allocated) are its results.

    ``compiled``: the kernel of each step, once it was launched with pointers that are multiples of 16.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    results: tuple[int, ...]
    compiled: list[Any]

    def __call__(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Performs the steps with the tensors ``given``; its results.

        Raises:
            UnfitTilesError: of pointers that are the first to ask for another variant of a kernel, which does not fit the card.
        """
        steps, buffers, results, compiled = self
        device, begins = given[0].device, 0
        tensors = list(given)
        for x in given:
            begins |= x.data_ptr()
        for shape, stride, dtype in buffers:
            tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        if begins % 16:  # what torch allocates is a multiple
            compiled = [None] * len(steps)
        for i, (made, places, rest) in enumerate(steps):
            begin = [tensors[x] if isinstance(x, int) else None if x is None else x.of(tensors) for x in places]
            if isinstance(made, Launch):  # built anew: _replace takes twice as long
                compiled[i] = run(Launch(made[0], made[1], (*begin, *rest), made[3]), compiled[i])
            else:
                made.function(*begin, *rest)
        return tuple([tensors[i] for i in results])


def perform(made: Made) -> None:
    """Runs a launch, or does what an operation says."""
    if isinstance(made, Operation):
        made.function(*made.arguments)
    else:
        run(made)


def finish(steps: Generator[Made, None, Result], take: Callable[[Made], None] = perform) -> Result:
    """Gives what steps yield to ``take``, which by default performs it; returns what the steps return."""
    while True:
        try:
            made = next(steps)
        except StopIteration as end:
            return end.value
        take(made)


def collect(steps: Generator[Made, None, Result]) -> tuple[list[Made], Result]:
    """(what steps yield, none of which is performed; what the steps return)."""
    found: list[Made] = []
    result = finish(steps, found.append)
    return found, result


def launches_of(steps: Generator[Made, None, Result]) -> tuple[list[Launch], Result]:
    """(the launches among what steps yield, none of which is run; what the steps return)."""
    found, result = collect(steps)
    return [made for made in found if isinstance(made, Launch)], result


def unstored(x: torch.Tensor) -> torch.Tensor:
    """A tensor without storage that lies as ``x`` does."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def plan(steps: Generator[Made, None, Any], given: tuple[torch.Tensor, ...]) -> Plan | None:
    """The plan of steps over ``given``, tensors without storage; results of the steps may be None.

    Returns None where torch computes something that the steps do not yield, where the tensors of a step (or a None in place of
    one) are not its first arguments, or where a result or what is allocated is only a part of a tensor.
    """
    (found, results), computes = torch_private.observed(lambda: collect(steps))
    if computes:
        return None
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
    results = [x for x in results if x is not None]
    indices = tuple([i for i in map(place, results) if isinstance(i, int)])
    if [(x.shape, x.stride()) for x in results] != [(tensors[i].shape, tensors[i].stride()) for i in indices]:
        return None
    planned = []
    for made in found:
        if isinstance(made, Launch) and not made.programs:
            continue
        are_tensors = [isinstance(x, torch.Tensor) or hasattr(x, "block_shape") for x in made.arguments]
        count = len(are_tensors) - are_tensors[::-1].index(True)
        if not all(is_tensor or x is None for is_tensor, x in zip(are_tensors, made.arguments[:count], strict=False)):
            return None
        places = tuple([None if x is None else place(x) for x in made.arguments[:count]])
        if isinstance(made, Operation) and not all(
                isinstance(i, int) and (x.shape, x.stride()) == (tensors[i].shape, tensors[i].stride())
                for i, x in zip(places, made.arguments, strict=False)):
            return None  # unlike kernels, which are told strides, torch takes tensors by their shapes
        planned.append(Step(made._replace(arguments=()), places, made.arguments[count:]))
    made_anew = tensors[len(given) :]
    whole = all(x.numel() * x.element_size() == x.untyped_storage().nbytes() for x in made_anew)
    buffers = tuple(Buffer(x.shape, x.stride(), x.dtype) for x in made_anew)
    return Plan(tuple(planned), buffers, indices, [None] * len(planned)) if whole else None
