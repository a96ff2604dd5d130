"""A static report on a compiled kernel: how many of its programs fit on a multiprocessor, and what its main loops keep busy.

Nothing here has run: the figures rank variants of a kernel, they do not predict times. The model of a main loop counts what
one iteration, a tile, costs in cycles of each pipe of a multiprocessor, with these assumptions:

- The program's warps are spread evenly over the four schedulers; a pipe takes its instructions at its published rate and
  matrix products at the tensor cores' dense peak for fp16 and bf16.
- Two bounds: *overlapped*, where the busiest pipe hides all others, and *in turn*, where the tensor cores wait while the
  busiest of the other pipes does its part. What a program reaches lies between them; other programs on the multiprocessor,
  and exp2 issued while a wgmma is in flight, move it towards the first.
- Shared memory moves one wavefront, at most 128 bytes, in a cycle. Wavefronts are counted in the emulator, bank conflicts
  among them, with the operands that wgmma and tcgen05 read and what bulk copies write (``traffic.py``); they are put down to
  the loop over tiles that need no mask. Local memory takes the same way, a wavefront an access. AMD's are not counted.
- There are no latencies, no waits and no caches: global memory and its atomics are counted in sectors, for which no rate is
  published, and bind no loop. Both sides of a branch in the loop count. Address arithmetic by uniform registers costs its
  issue slot.
- In a warp-specialised kernel a main loop is run by one warpgroup.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fused_attn.targets import Machine, Rates, target_of
from fused_attn.tools.compile.offline import Report
from fused_attn.tools.compile.sass import FAMILIES, Loop
from fused_attn.tools.compile.traffic import Traffic

TITLE = "# Static profile of the kernels"  # the first line of the readable table
SCHEDULERS = 4  # of an NVIDIA multiprocessor; SIMDs of AMD's compute unit


TENSOR_COLUMNS = 512  # tensor memory of a multiprocessor of sm_100


@dataclasses.dataclass(frozen=True)
class LoopProfile:
    """One main loop. ``instructions`` and their ``mix`` by family (``sass.FAMILIES``) are those of one warp in one iteration.
    ``cycles`` are those of each pipe for a tile, of all warps of the program; ``cycles_overlapped`` and ``cycles_in_turn`` are
    the two bounds on a tile, None where the model does not know the rates of the target or of its matrix instruction.
    ``utilisation_*`` are the shares of the tensor cores' cycles in these bounds. ``other_per_matrix`` is the number of other
    instructions to each matrix instruction, where warps issue them one by one (mma.sync, MFMA). ``exp2_under_wgmma`` is the
    share of exp2 issued while the warpgroup's own wgmma is in flight, None without either. ``wide_barriers`` counts barriers of
    the whole program, ``hazards`` writes to registers that a wgmma in flight may still read."""

    instructions: int
    mix: dict[str, int]
    cycles: dict[str, int]
    bound: str | None
    cycles_overlapped: int | None
    cycles_in_turn: int | None
    utilisation_overlapped: float | None
    utilisation_in_turn: float | None
    other_per_matrix: float | None
    exp2_under_wgmma: float | None
    wide_barriers: int
    hazards: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """The static report on one kernel. Registers are those of a thread, ``spill_bytes`` the bytes of local memory that each
    thread writes, ``shared_bytes`` those of a program. ``programs`` is how many fit on a multiprocessor (CTAs on an SM,
    workgroups on a compute unit), as ``limited_by`` allows; ``waves_per_simd`` is AMD's measure of the same. ``warnings`` are
    those of ptxas on serialised wgmma (C7510 to C7515). ``loops`` come in the order of their addresses. ``traffic`` is
    a tile's, None where it is not counted."""

    target: str
    kernel: str
    dtype: str
    head_dim: int
    causal: bool
    feature: str
    hopper: str
    config: str
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    programs: int | None
    limited_by: str | None
    waves_per_simd: float | None
    warnings: list[str]
    loops: list[LoopProfile]
    traffic: Traffic | None = None


def profile(report: Report, traffic: Traffic | None = None) -> Profile:
    """The static report on a kernel that ``offline.compile_kernel`` has read, with what its tiles move."""
    assert report.code is not None, "the report of a kernel just compiled"
    target = target_of(report.target)
    machine, lanes = target.machine, target.lanes
    warps = -(-report.code.threads // lanes)
    programs, limited_by = (None, None) if machine is None else occupancy(
        machine, report.registers, report.shared_bytes, warps, report.tensor_memory)
    waves = round(programs * warps / SCHEDULERS, 2) if programs and report.target.startswith("gfx") else None
    specialised = any(x.op.startswith("USETMAXREG") for x in report.code.listing.instructions)
    rates = machine.rates if machine and report.dtype in ("fp16", "bf16") else None
    found = report.code.listing.main_loops()
    leanest = min(range(len(found)), key=lambda i: _leanness(len(found[i].instructions), found[i].count())) if found else None
    loops = [profile_loop(loop, 4 if specialised else warps, report.code.threads, rates, traffic if i == leanest else None)
             for i, loop in enumerate(found)]
    return Profile(
        report.target, report.kernel, report.dtype, report.head_dim, report.causal, report.feature, report.hopper,
        report.config, report.triton, report.registers, report.spill_bytes, report.shared_bytes, warps, programs, limited_by,
        waves, report.warnings, loops, traffic)


def occupancy(machine: Machine, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0) -> tuple[int, str]:
    """How many programs of ``warps`` fit on a multiprocessor, and what keeps it from more; ``registers`` are a thread's."""

    def rounded(value: int, granule: int) -> int:
        return -(-value // granule) * granule

    a_lane = rounded(max(registers, 1), machine.register_granule)
    fits = rounded(warps, SCHEDULERS) // SCHEDULERS * a_lane <= machine.registers
    limits = {
        "registers": machine.registers // a_lane * SCHEDULERS // warps if fits else 0,
        "shared memory": machine.shared // max(1, rounded(shared_bytes + machine.reserved, machine.granule)),
        "threads": min(machine.programs, machine.warps * SCHEDULERS // warps),
    }
    if tensor_columns:
        limits["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    least = min(limits.values())
    return least, ", ".join(name for name, limit in limits.items() if limit == least)


def profile_loop(loop: Loop, warps: int, threads: int, rates: Rates | None, traffic: Traffic | None = None) -> LoopProfile:
    """The model of one main loop that ``warps`` run, of a program of ``threads``."""
    mix = loop.count()
    cycles = pipe_cycles(loop, warps, rates) if rates else {}
    if traffic is not None and rates and "tensor" in cycles:
        # of a tile, whose products several warpgroups may share
        part = cycles["tensor"] * SCHEDULERS * rates.tensor / traffic.multiply_adds if traffic.multiply_adds else 1.0
        cycles = {**cycles, "shared": round(part * traffic.wavefronts) + warps * mix["local"]}
    others = [value for pipe, value in cycles.items() if pipe != "tensor"]
    tensor = cycles.get("tensor")
    together, in_turn = (max(tensor, *others), tensor + max(others)) if tensor else (None, None)
    one_by_one = any(x.op.startswith(("HMMA", "DMMA", "v_")) for x in loop.instructions if x.family == "tensor")
    share = loop.exp2_under_wgmma()
    return LoopProfile(
        instructions=len(loop.instructions), mix=dict(mix.most_common()), cycles=cycles,
        bound=max(cycles, key=lambda pipe: cycles[pipe]) if tensor else None,
        cycles_overlapped=together, cycles_in_turn=in_turn,
        utilisation_overlapped=round(tensor / together, 3) if tensor and together else None,
        utilisation_in_turn=round(tensor / in_turn, 3) if tensor and in_turn else None,
        other_per_matrix=round((len(loop.instructions) - mix["tensor"]) / mix["tensor"], 2) if one_by_one else None,
        exp2_under_wgmma=None if share is None else round(share, 3),
        wide_barriers=loop.wide_barriers(threads), hazards=loop.hazards())


def pipe_cycles(loop: Loop, warps: int, rates: Rates) -> dict[str, int]:
    """Cycles that a tile keeps each pipe of a scheduler busy; without "tensor" where a product's rate is not known."""
    mix = loop.count()
    imad = sum(x.op.startswith("IMAD") for x in loop.instructions)
    packed = sum(x.op.startswith(("FFMA2", "FMUL2", "FADD2", "v_pk_")) and x.family == "fma" for x in loop.instructions)
    cycles = {"exp2": rates.exp2 * mix["exp2"],
              "fma": rates.fma * (mix["fma"] - imad - packed) + rates.imad * imad + rates.packed * packed,
              "alu": rates.alu * mix["alu"]}
    cycles = {"vector": sum(cycles.values())} if rates.one_pipe else {**cycles, "issue": len(loop.instructions)}
    per_scheduler = -(-warps // SCHEDULERS)
    cycles = {pipe: value * per_scheduler for pipe, value in cycles.items()}

    products = 0  # multiply-adds of all warps
    for x, shape in zip(loop.instructions, loop.shapes, strict=True):
        if x.family == "tensor":
            if shape is None or (x.op.startswith("HMMA") and not rates.mma_sync):
                return cycles
            # wgmma is issued for a group of four warps at once, tcgen05 for the program
            times = 1 if x.op.startswith("UTC") else per_scheduler * (1 if x.op.startswith("HGMMA") else SCHEDULERS)
            products += math.prod(shape) * times
    return {"tensor": round(products / (SCHEDULERS * rates.tensor)), **cycles} if products else cycles


def steady(loops: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The loop over tiles that need no mask, where long sequences spend their time: the leanest for its matrix products."""
    return min(loops, key=lambda loop: _leanness(loop["instructions"], loop["mix"]))


def _leanness(instructions: int, mix: Mapping[str, int]) -> float:
    return instructions / max(1, mix.get("tensor", 0))


def worse(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Which figures of a row are worse than those of ``before``, and from what to what.

    The compiler's own noise is allowed: 2 % of instructions and cycles of a loop, 0.02 of the share of exp2.
    """
    found = []

    def rises(name: str, new: float | None, old: float | None, tolerance: float = 1.0) -> None:
        if new is not None and old is not None and new > old * tolerance:
            found.append(f"{name} from {old} to {new}")

    rises("spill bytes", now["spill_bytes"], before["spill_bytes"])
    if (now["programs"] or 0) < (before["programs"] or 0):
        found.append(f"programs a multiprocessor from {before['programs']} to {now['programs']} ({now['limited_by']})")
    if new := sorted(set(now["warnings"]) - set(before["warnings"])):
        found.append(f"warnings from {before['warnings']} to {now['warnings']}: {', '.join(new)} new")
    for figure in ("wavefronts", "sectors", "atomic_sectors") if now["traffic"] and before.get("traffic") else ():
        rises(f"{figure.replace('_', ' ')} of a tile", now["traffic"][figure], before["traffic"][figure], 1.02)
    if len(now["loops"]) != len(before["loops"]):
        return [*found, f"main loops from {len(before['loops'])} to {len(now['loops'])}"]
    for number, (loop, old) in enumerate(zip(now["loops"], before["loops"], strict=True)):
        where = f"main loop {number}:"
        rises(f"{where} local memory", loop["mix"].get("local", 0), old["mix"].get("local", 0))
        for figure in ("wide_barriers", "hazards"):
            rises(f"{where} {figure.replace('_', ' ')}", loop[figure], old[figure])
        for figure in ("instructions", "cycles_overlapped", "cycles_in_turn"):
            rises(f"{where} {figure.replace('_', ' ')}", loop[figure], old[figure], 1.02)
        if (old["exp2_under_wgmma"] or 0) - (loop["exp2_under_wgmma"] or 0) > 0.02:
            found.append(f"{where} exp2 under wgmma from {old['exp2_under_wgmma']} to {loop['exp2_under_wgmma']}")
    return found


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The tables that are printed for rows, by title."""
    occupied = [{
        "kernel": row["kernel"], "dtype": row["dtype"], "D": row["head_dim"], "config": row["config"],
        "registers": row["registers"], "spill bytes": row["spill_bytes"], "shared KiB": round(row["shared_bytes"] / 1024, 1),
        "warps": row["warps"], "programs": _shown(row["programs"]), "limited by": _shown(row["limited_by"]),
        "waves per SIMD": _shown(row["waves_per_simd"]), "warnings": " ".join(row["warnings"]),
    } for row in rows]
    loops = [({"kernel": row["kernel"], "dtype": row["dtype"], "D": row["head_dim"], "loop": number}, loop)
             for row in rows for number, loop in enumerate(row["loops"])]
    moved = [{"kernel": row["kernel"], "dtype": row["dtype"], "D": row["head_dim"], "config": row["config"],
              **{name.replace("_", " "): value for name, value in row["traffic"].items()}} for row in rows if row["traffic"]]
    pipes = dict.fromkeys(pipe for _, loop in loops for pipe in loop["cycles"])
    found = {
        "how many programs fit on a multiprocessor": occupied,
        "main loops: instructions of a warp": [
            {**name, **{family: loop["mix"].get(family, 0) for family in (*FAMILIES, "other")}, "all": loop["instructions"],
             "other per matrix": _shown(loop["other_per_matrix"])} for name, loop in loops],
        "what a tile moves, counted in the emulator": moved,
        "main loops: cycles of a tile by pipe (static model)": [
            {**name, **{pipe: _shown(loop["cycles"].get(pipe)) for pipe in pipes}, **_judged(loop)} for name, loop in loops],
    }
    return {title: table for title, table in found.items() if table}


def _moved(traffic: dict[str, int] | None) -> dict[str, Any]:
    """The figures of a tile's traffic, each beside the least."""
    if traffic is None:
        return dict.fromkeys(("wavefronts", "sectors", "by atomics"), "-")
    return {"wavefronts": f"{traffic['wavefronts']} of {traffic['least_wavefronts']}",
            "sectors": f"{traffic['sectors']} of {traffic['least_sectors']}", "by atomics": traffic["atomic_sectors"]}


def _judged(loop: dict[str, Any]) -> dict[str, Any]:
    """The figures of a loop that rank it."""
    known = loop["bound"] is not None
    return {
        "bound": _shown(loop["bound"]),
        "utilisation": f"{loop['utilisation_in_turn']:.2f} to {loop['utilisation_overlapped']:.2f}" if known else "-",
        "exp2 under wgmma": _shown(loop["exp2_under_wgmma"]),
        "wide barriers": loop["wide_barriers"], "hazards": loop["hazards"],
    }


def _shown(value: object) -> object:
    return "-" if value is None else value


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The readable table of the rows of a profile: a line a kernel, with the main loop over tiles that need no mask."""
    text = [
        TITLE,
        "",
        f"Made by `make profile` with Triton {rows[0]['triton']}. All of it is read from machine code, counted in the emulator "
        "and modelled;",
        "nothing was timed. It ranks variants of a kernel and predicts no times; `profile.py` says what the model assumes, and",
        "[profile.json](profile.json) holds every main loop with its instruction mix. This table has the loop over tiles that "
        "need no mask.",
        "",
        "Programs: how many fit on a multiprocessor, and what keeps it from more. Cycles: what a tile costs each pipe. "
        "Utilisation: of the",
        "tensor cores, from where no pipe hides another to where the busiest hides all others. Other per matrix: instructions "
        "to each matrix",
        "instruction. Exp2 under wgmma: the share issued while the warpgroup's own wgmma is in flight. Wavefronts of shared "
        "memory and sectors",
        "of global memory are those of a tile, beside the least that its bytes need; of the sectors, those that atomics touch.",
    ]
    for target in sorted({row["target"] for row in rows}):
        lines = []
        for row in rows:
            if row["target"] == target and row["loops"]:
                loop = steady(row["loops"])
                lines.append({
                    "kernel": ", ".join([row["kernel"], *[row["feature"]] * (row["feature"] == "fused"),
                                         *[row["hopper"]] * (row["hopper"] != "pointers")]), "D": row["head_dim"],
                    "window": "causal" if row["causal"] else "full", "config": row["config"], "registers": row["registers"],
                    "spill bytes": row["spill_bytes"], "programs": f"{row['programs']} ({row['limited_by']})",
                    "instructions": loop["instructions"], "other per matrix": _shown(loop["other_per_matrix"]),
                    "cycles": ", ".join(f"{pipe} {value}" for pipe, value in loop["cycles"].items()), **_judged(loop),
                    **_moved(row["traffic"])})
        if not lines:  # kernels without a main loop
            continue
        text += ["", f"## {target}", "", "| " + " | ".join(lines[0]) + " |", "|---" * len(lines[0]) + "|"]
        text += ["| " + " | ".join(str(value) for value in line.values()) + " |" for line in lines]
    return "\n".join(text) + "\n"
