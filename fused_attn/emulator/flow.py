"""Where the sides of a branch meet again: the immediate post-dominator of its block."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """An instruction as control flow sees it."""

    jumps: bool  # it may go elsewhere than on
    targets: tuple[int, ...]
    conditional: bool
    leaves: bool  # the kernel


def meeting_points(steps: Sequence[Step]) -> dict[int, int]:
    """For every conditional branch the first instruction that all paths from there pass; -1: they meet nowhere."""
    n = len(steps)

    def after(i: int) -> list[int]:
        step = steps[i]
        goes_on = not step.jumps or step.conditional
        return [*step.targets, *[n] * step.leaves, *[i + 1] * goes_on]

    firsts = sorted({0, n, *(x for i, step in enumerate(steps) if step.jumps for x in (*after(i), i + 1))})
    number = {first: k for k, first in enumerate(firsts)}
    blocks = list(itertools.pairwise(firsts))
    successors = [[number[x] for x in after(stop - 1)] for _, stop in blocks]
    last = len(firsts) - 1  # stands for the end
    everything = (1 << len(firsts)) - 1
    passed = [everything] * last + [1 << last]  # which blocks every path from a block passes, as bits
    changed = True
    while changed:
        changed = False
        for k in reversed(range(last)):
            new = everything
            for x in successors[k]:
                new &= passed[x]
            new |= 1 << k
            changed, passed[k] = changed or new != passed[k], new
    found = {}
    for k, (_, stop) in enumerate(blocks):
        step = steps[stop - 1]
        if step.conditional and step.targets:
            others = passed[k] & ~(1 << k)
            nearest = max((x for x in range(last + 1) if others >> x & 1), key=lambda x: passed[x].bit_count())
            found[stop - 1] = -1 if nearest == last else firsts[nearest]
    return found
