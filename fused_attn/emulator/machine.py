"""The machine from Python: builds its C at the first use, runs a launch, tells what went wrong where, and counts."""

import ctypes
import dataclasses
import functools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fused_attn.emulator import generate
from fused_attn.emulator.build import built
from fused_attn.emulator.encode import Program
from fused_attn.emulator.operands import SHARED_BASE
from fused_attn.emulator.schedule import RANDOM, EmulatorFault, Schedule

FUEL = 2_000_000_000  # warp instructions of one launch, far beyond any that ends
_FLAGS = ("-O2", "-ftree-vectorize", "-march=native", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off",
          "-fno-math-errno", "-w", "-shared", "-fPIC")
_COUNTED = ("runs", "lanes", "requests", "sectors", "least_sectors", "wavefronts", "least_wavefronts")
_COUNT = np.dtype([(name, np.uint64) for name in _COUNTED])
_RANGE = np.dtype([(name, np.uint64) for name in ("first", "last", "shadow")])


@dataclasses.dataclass(frozen=True)
class Result:
    """What one launch did: ``counts`` of every instruction (_COUNT), and the most bytes that loads of a warp had in flight."""

    program: Program
    counts: np.ndarray
    seconds: float
    programs: int
    bytes_in_flight: int


class _Job(ctypes.Structure):
    """Job in machine/state.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "operands", "ranges", "frame", "order", "counts", "error")),
        *((name, ctypes.c_uint64) for name in ("params", "seed", "in_flight")), ("fuel", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in (
            "n_code", "n_ranges", "n_order", "n_warps", "n_slots", "shared_bytes", "shared_base", "shared_shift",
            "global_shift", "tid_slot", "lane_slot", "program_slot", "grid_x", "grid_y", "landing", "races", "proxies",
            "truncate", "perturb", "turn", "resident", "hazards", "fences")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled machine. Raises RuntimeError where it cannot be compiled."""
    main = Path(__file__).with_name("machine") / "machine.c"
    return ctypes.CDLL(str(built("machine.so", main, _FLAGS, {"ops.h": generate.header()}, ("-lm",))))


def run(program: Program, grid: tuple[int, int, int], params: bytes, shared_bytes: int, spans: Sequence[tuple[int, int]],
        schedule: Schedule) -> Result:
    """Runs a launch. ``spans``: first and last-plus-one address of everything that it may touch. Raises EmulatorFault."""
    program.params[: len(params)] = np.frombuffer(params, np.uint8)
    own = program.params.ctypes.data
    ranges = np.array(_with_shadows([*spans, (own, own + len(program.params))], program.shifts[1]), _RANGE)
    counts = np.zeros(len(program.code), _COUNT)
    error = ctypes.create_string_buffer(2048)
    total = grid[0] * grid[1] * grid[2]
    order = list(range(total))
    if schedule.landing == RANDOM:
        random.Random(schedule.seed).shuffle(order)
    sequence = np.array(order, np.uint32)
    tid, lane, own_slot = program.special
    job = _Job(
        program.code.ctypes.data, program.operands.ctypes.data, ranges.ctypes.data, program.frame.ctypes.data,
        sequence.ctypes.data, counts.ctypes.data, ctypes.addressof(error), own,
        (schedule.seed * 0x9E3779B97F4A7C15 + 1) % 2**64, 0, FUEL, len(program.code), len(ranges), total,
        program.kernel.threads // 32, len(program.frame), shared_bytes + program.shared_extra,
        SHARED_BASE, *program.shifts, tid, lane, own_slot, grid[0], grid[1], schedule.landing, schedule.races,
        schedule.races and schedule.proxies, schedule.truncate, schedule.perturb, schedule.turn, max(1, schedule.resident),
        schedule.races and program.hazards, schedule.fences)
    start = time.perf_counter()
    failed = library().run_launch(ctypes.byref(job)) if total else 0
    if failed:
        raise EmulatorFault(_told(error.value.decode(), program, grid))
    return Result(program, counts, time.perf_counter() - start, total, job.in_flight)


def _with_shadows(spans: list[tuple[int, int]], shift: int) -> list[tuple[int, int, int]]:
    """Disjoint ranges in the order of their addresses, each with the number of its first cell in the shadow of memory."""
    joined: list[list[int]] = []
    for first, last in sorted(spans):
        if joined and first < joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], last)
        elif first < last:
            joined.append([first, last])
    found, cells = [], 0
    for first, last in joined:
        found.append((first, last, cells))
        cells += ((last - first) >> shift) + 1
    return found


def _told(error: str, program: Program, grid: tuple[int, int, int]) -> str:
    number, warp, at, message = error.split("|", 3)
    place = int(number) % grid[0], int(number) // grid[0] % grid[1], int(number) // grid[0] // grid[1]
    instruction = program.kernel.instructions[min(int(at), len(program.kernel.instructions) - 1)]
    return (f"{program.kernel.name}: {message}, in warp {warp} of program {place[0] if grid[1:] == (1, 1) else place}, at "
            f"{instruction.where or '?'}: {instruction.text}")
