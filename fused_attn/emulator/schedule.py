"""How launches run, and what may stop one."""

import dataclasses

EAGER, LATE, RANDOM = range(3)


class EmulatorFault(RuntimeError):  # what it finds is a fault of the kernel
    """What the emulator found: a race, an access out of bounds, a deadlock, an instruction misused."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How launches run.

    landing: when asynchronous work lands: EAGER, as soon as it is issued; LATE, when a wait demands it; RANDOM, in between
    seed: of everything that is drawn: the order of programs and of warps, lateness, perturbations
    turn: how many instructions a warp runs at most before another one may; 0: until it waits
    resident: how many programs run interleaved
    races: look for races of shared and of global memory, and for registers that wgmma still uses
    proxies: among them missing proxy fences
    fences: among them registers that are written between a wgmma.fence and the wgmma that takes them, or read between a
        tcgen05.ld and its wait; not by itself, since LLVM moves conversions there, and ptxas, which sees the registers, orders
        them
    truncate: tensor cores cut off the bits of a sum that do not fit
    perturb: exp2, log2, reciprocals and the like are up to 2 ulp off

    AMD's kernels have the seed alone, which orders programs, and waves between barriers: what a wave does not wait for is a
    fault whatever the order, and so is what two waves touch with no barrier between.
    """

    landing: int = RANDOM
    seed: int = 0
    turn: int = 200
    resident: int = 2
    races: bool = True
    proxies: bool = True
    fences: bool = False
    truncate: bool = False
    perturb: bool = False


class UnknownInstructionError(NotImplementedError):
    """An instruction that the emulator does not have."""
