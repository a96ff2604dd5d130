"""Faults planted in the PTX of compiled kernels, one at a time: which of them the emulator sees, and by which means.

    python -m tests.emulated_faults                 # all, into docs/emulated-faults.json
    python -m tests.emulated_faults sm_80 forward   # of a target and a kernel whose names begin so, shown alone

Every executed barrier, wait, commit, fence and poll of a kernel is taken out, or weakened, by itself; the call is made under
a late and under two random schedules, with races looked for. docs/emulator.md says of what is not seen why.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["TRITON_INTERPRET"] = "0"  # before anything imports Triton

import torch
from support.emulation import Emulation
from support.features import Shape

from fused_attn import files
from fused_attn.emulator import LATE
from fused_attn.report import conditions, print_table, track

OUT = ROOT / "docs" / "emulated-faults.json"
SHAPE = Shape(1, 2, 1, 300, 300, 128, 128)
# (target, rung, arguments of the call): forward and backward, with tiles enough that every stage of a ring is used again.
CALLS = (("sm_80", "pointers", {}), ("sm_90", "pointers", {}), ("sm_90", "descriptors", {}), ("sm_90", "gluon", {}),
         ("sm_100", "pointers", {}))
# Beginning of a line, what becomes of it: "" drops it, +1 lets one group more be pending.
PLANTS = (("bar.sync", ""), ("bar.arrive", ""), ("cp.async.wait_group", "+1"), ("cp.async.commit_group", ""),
          ("wgmma.wait_group", "+1"), ("wgmma.commit_group", ""), ("fence.proxy.async", ""), ("@!complete bra", ""),
          ("cp.async.bulk.wait_group", ""), ("tcgen05.wait", ""))
SCHEDULES = ({"landing": LATE}, {"seed": 1}, {"seed": 2, "turn": 20})


def weakened(line: str, how: str) -> str:
    if how == "":
        return ""
    head, number = line.strip().rstrip(";").rsplit(maxsplit=1)
    return f"{head} {int(number, 0) + int(how)};"


def executed(emulation: Emulation) -> dict[str, list[tuple[str, int, str, str]]]:
    """(kernel, beginning, which line, where) of every instruction that could be taken out and was executed, by kernel."""
    found: dict[str, list[tuple[str, int, str, str]]] = {}
    for name, result in emulation.launches():
        numbers: Counter[str] = Counter()
        rows = found.setdefault(name, [])
        for instruction, count in zip(result.program.kernel.instructions, result.counts, strict=True):
            beginning = next((plant for plant, _ in PLANTS if instruction.text.startswith(plant)), None)
            if beginning is None:
                continue
            row = (beginning, numbers[beginning], instruction.where.split(" < ")[0], instruction.text)
            numbers[beginning] += 1
            if count["runs"] and row not in rows:
                rows.append(row)
    return found


def planted(only: tuple[str, ...]) -> Iterator[tuple[Emulation, str, str]]:
    """Calls with one fault each, where it stands, and what it was."""
    for target, rung, arguments in CALLS:
        whole = Emulation(("causal",), target, rung=rung, shape=SHAPE, arguments=arguments)
        if only and not target.startswith(only[0]):
            continue
        for kernel, rows in executed(whole).items():
            if only[1:] and not kernel.startswith(only[1]):
                continue
            for beginning, which, where, text in rows:
                how = dict(PLANTS)[beginning]
                yield replace(whole, fault=(kernel, beginning, which, weakened(text, how))), where, text


def verdict(emulation: Emulation) -> str:
    """What the first schedule that sees the fault says, or "not seen"."""
    for schedule in SCHEDULES:
        told: str = replace(emulation, schedule=schedule).told()["verdict"]
        if told != "ok":
            return told.split(", in warp")[0][:160]
    return "not seen"


def main(only: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for emulation, where, text in track(list(planted(only)), "planting"):
        assert emulation.fault is not None
        rows.append({"target": emulation.target, "rung": emulation.rung, "kernel": emulation.fault[0], "line": where,
                     "taken out": text[:60], "which": emulation.fault[2], "verdict": verdict(emulation)})
    of = ("target", "rung", "kernel")
    planting = Counter(tuple(row[name] for name in of) for row in rows)
    seen = Counter(tuple(row[name] for name in of) for row in rows if row["verdict"] != "not seen")
    print_table([{**dict(zip(of, group, strict=True)), "planted": count, "seen": seen[group]}
                 for group, count in planting.items()], "faults planted in compiled kernels")
    for row in rows:
        if row["verdict"] == "not seen":
            print("not seen:", {name: value for name, value in row.items() if name != "verdict"})
    if not only:
        found = {"conditions": conditions(), "faults": rows}
        files.write(OUT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
