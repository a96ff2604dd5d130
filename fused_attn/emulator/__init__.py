"""Compiled kernels on a CPU: what Triton makes for a card is executed, held to its tensors and searched for races.

    with fused_attn.emulated("sm_90"):
        out = fused_attn.attention(q, k, v, backend="triton")  # CPU tensors; the backward, too
"""

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fused_attn import settings, targets
from fused_attn.emulator.schedule import EAGER, LATE, RANDOM, EmulatorFault, Schedule, UnknownInstructionError

if TYPE_CHECKING:
    from fused_attn.emulator.machine import Result

__all__ = ["EAGER", "LATE", "RANDOM", "TARGETS", "EmulatorFault", "Schedule", "UnknownInstructionError", "emulated"]

TARGETS = targets.COMPILED
_DEFAULT = Schedule()
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def emulated(target: str, schedule: Schedule = _DEFAULT,
             change: Callable[[str, str], str] | None = None) -> Iterator[list[tuple[str, "Result"]]]:
    """Within it, ``backend="triton"`` runs on CPU tensors as on a card: kernels are compiled for ``target`` and executed.

    What it gives is a list that grows with every launch: the kernel's name and what it counted. A kernel that reads or writes
    outside of its tensors, races, deadlocks or misuses an instruction raises EmulatorFault, which names the line. It executes
    PTX, which ptxas has not seen, or AMD's assembly; docs/emulator.md says what that proves and what not.

    schedule: when asynchronous work lands and who goes on; what is looked for
    change: rewrites the PTX or assembly of a kernel, given its name and text, before it runs: to plant a fault, say

    It holds for the whole process: other threads wait at its door. Raises ValueError for a target that it does not know,
    RuntimeError without Triton or a C compiler, and where TRITON_INTERPRET has made Triton's interpreter of the kernels.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}; got {target!r}")
    if settings.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 has kernels interpreted, not compiled: unset it before fused_attn is imported")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("the emulator runs what Triton compiles, and Triton is not installed: pip install triton")
    from triton.runtime import driver  # here, and what imports it: the package works without Triton

    from fused_attn.emulator import machine
    from fused_attn.emulator.driver import Driver

    if not target.startswith("gfx"):
        machine.library()  # where it cannot be built, say so here
    card = Driver(target, targets.TARGETS[target].shared, schedule, change)
    with _one_at_a_time, settings.emulating(target):
        before = driver._active  # None until somebody asks for a card
        driver.set_active(card)
        try:
            yield card.results
        finally:
            driver.set_active(before)
