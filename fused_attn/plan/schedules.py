"""The table of schedules: for either pass, the ways to make it, best first, each with its reasons against a call.

The first that has no reason against a call makes it; the last of either pass never has any. A new schedule is one entry here
and its steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from fused_attn.call.schema import Needs
from fused_attn.plan import backward, forward, hopper
from fused_attn.plan.problem import Problem

EVERY_GRADIENT = Needs(True, True, True, False, False, ())


class Schedule(NamedTuple):
    """A way to make one pass of a call: ``against`` gives the reasons why it cannot, ``steps`` make the results.

    In the forward both take (problem,). In the backward ``against`` takes (problem, needs), and ``steps`` takes
    (problem, saved, needs).
    """

    name: str
    against: Callable[..., tuple[str, ...]]
    steps: Callable[..., Any]
    asked: bool = False  # used only where ``settings.hopper`` or a record of `fused-attn tune` asks for it


def _nothing(*_: Any) -> tuple[str, ...]:
    return ()


FORWARD = (
    Schedule("splits", forward.against_splits, forward.splits),
    Schedule("gluon", partial(hopper.against, "gluon", "forward"), hopper.gluon_forward, True),
    Schedule("specialized", partial(hopper.against, "specialized", "forward"), forward.specialized, True),
    Schedule("descriptors", partial(hopper.against, "descriptors", "forward"), forward.descriptors, True),
    Schedule("decode", forward.against_decode, forward.decode),
    Schedule("pointers", _nothing, forward.pointers),
)
BACKWARD = (
    Schedule("gluon", hopper.against_gluon_backward, backward.gluon, True),
    Schedule("fused", backward.against_fused, backward.fused),
    Schedule("separate", _nothing, backward.separate),
)


def of_forward(problem: Problem) -> Schedule:
    """The schedule of a call's forward."""
    asked = problem.asked("forward")
    for schedule in FORWARD:
        if (not schedule.asked or schedule.name == asked) and not schedule.against(problem):
            return schedule
    raise AssertionError("the last schedule takes every call")


def of_backward(problem: Problem, needs: Needs = EVERY_GRADIENT) -> Schedule:
    """The schedule of a call's backward."""
    asked = problem.asked("backward")
    for schedule in BACKWARD:
        if (not schedule.asked or schedule.name == asked) and not schedule.against(problem, needs):
            return schedule
    raise AssertionError("the last schedule takes every call")


def against(table: tuple[Schedule, ...], name: str, problem: Problem, *more: Any) -> tuple[str, ...]:
    """Reasons why a schedule, if it is asked for, does not make a pass of a call: its own, or that another comes first."""
    at = next((i for i, schedule in enumerate(table) if schedule.name == name), None)
    if at is None:
        return (f"{name} has no {'forward' if table is FORWARD else 'backward'}",)
    before = (other.name for other in table[:at] if not other.asked and not other.against(problem, *more))
    return table[at].against(problem, *more) or tuple(f"{other} comes first" for other in before)


def named(table: tuple[Schedule, ...], name: str) -> Schedule:
    """A schedule by its name, whatever it has against a call."""
    return next(schedule for schedule in table if schedule.name == name)
