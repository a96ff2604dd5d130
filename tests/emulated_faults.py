"""Faults planted in compiled kernels, one at a time: which of them the emulator sees, and by which means.

    python -m tests.emulated_faults                 # all, into docs/emulated-faults.json
    python -m tests.emulated_faults sm_80 forward   # of a target and a kernel whose names begin so, shown alone

Every executed barrier, wait, commit, fence and poll of a kernel is taken out, or weakened, by itself; the call is made under
a late and under two random schedules, with races looked for. What none of them sees is no fault on this call as far as the
emulator orders things: races do not depend on the order that was run. To hold that against answers, the call is made under MORE
schedules that look for no race, and must be right under each. The table in docs/emulator.md is of the file. Ctrl-C keeps what
there is by then.
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
from fused_attn.emulator import LATE, RANDOM
from fused_attn.tools.options import until_interrupted
from fused_attn.tools.report import conditions, git, print_table, track

OUT, PAGE = ROOT / "docs" / "emulated-faults.json", ROOT / "docs" / "emulator.md"
START, END = "<!-- planted -->\n", "<!-- end of planted -->\n"
# Tiles enough that every stage of a ring is used again; AMD's cards, which are emulated in NumPy, have no rings.
SHAPE, SHORT = Shape(1, 1, 1, 300, 300, 128, 128), Shape(1, 1, 1, 130, 130, 64, 64)
# (target, schedule, shape), forward and backward
CALLS = (("sm_80", "pointers", SHAPE), ("sm_90", "pointers", SHAPE), ("sm_90", "descriptors", SHAPE), ("sm_90", "gluon", SHAPE),
         ("sm_100", "pointers", SHAPE), ("gfx942", "pointers", SHORT), ("gfx1100", "pointers", SHORT))
# Beginning of a line, what becomes of it: "" drops it, +1 lets one group more be pending.
PLANTS = (("bar.sync", ""), ("bar.arrive", ""), ("cp.async.wait_group", "+1"), ("cp.async.commit_group", ""),
          ("wgmma.wait_group", "+1"), ("wgmma.commit_group", ""), ("fence.proxy.async", ""), ("@!complete bra", ""),
          ("cp.async.bulk.wait_group", ""), ("tcgen05.wait", ""), ("s_waitcnt", ""), ("s_barrier", ""))
SCHEDULES = ({"landing": LATE}, {"seed": 1}, {"seed": 2, "turn": 20})
MORE = tuple({"seed": seed, "turn": (1, 7, 50, 200)[seed % 4], "landing": (RANDOM, LATE)[seed % 2], "resident": 1 + seed % 3,
              "races": False} for seed in range(3, 11))
NOT_SEEN = "not seen"
WHY = {  # what stands in for what was taken out, where nothing was seen
    "bar.sync": "other barriers order the same accesses", "bar.arrive": "other barriers order the same accesses",
    "cp.async.wait_group": "none of the copies that it waits for is read before another wait for them",
    "cp.async.commit_group": "its copies go with the next group, which is waited for before they are read",
    "wgmma.wait_group": "another wait comes before the registers are touched, or the tile is filled again",
    "wgmma.commit_group": "its products go with the next group, which is waited for",
    "fence.proxy.async": "other fences of the same threads come between",
    "@!complete bra": "the phase was complete at the first poll, or another wait for it follows",
    "cp.async.bulk.wait_group": "nothing is written where the stores still read, before the program ends",
    "tcgen05.wait": "another wait comes before the registers are touched",
    "s_waitcnt": "nothing that it waits for is under way, or another wait comes before its registers are touched",
    "s_barrier": "other barriers order the same accesses, or the waves touch bytes of their own alone",
}


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
    for target, hopper, shape in CALLS:
        whole = Emulation(("causal",), target, hopper=hopper, shape=shape)
        if only and not target.startswith(only[0]):
            continue
        for kernel, rows in executed(whole).items():
            if only[1:] and not kernel.startswith(only[1]):
                continue
            for beginning, which, where, text in rows:
                how = dict(PLANTS)[beginning]
                yield replace(whole, fault=(kernel, beginning, which, weakened(text, how))), where, text


def verdict(emulation: Emulation) -> str:
    """What the first schedule that sees the fault says, or NOT_SEEN."""
    for schedule in (*SCHEDULES, *MORE):
        told: str = replace(emulation, schedule=schedule).told()["verdict"]
        if told != "ok":
            return told.split(", in warp")[0][:160]
    return NOT_SEEN


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: how many of the faults planted in each kernel were seen, and what stands in for the others."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["hopper"], row["kernel"].removesuffix("_kernel")), []).append(row)
    lines = ["| card | kernels | kernel | planted | seen | no fault: what was taken out |", "|---|---|---|---|---|---|"]
    for group, members in groups.items():
        unseen = Counter(row["plant"] for row in members if row["verdict"] == NOT_SEEN)
        told = ", ".join(f"{count} {plant.removeprefix('@!complete ')}" for plant, count in unseen.items())
        lines.append(f"| {' | '.join(group)} | {len(members)} | {len(members) - unseen.total()} | {told} |")
    kinds = {row["plant"] for row in rows if row["verdict"] == NOT_SEEN}
    reasons = [f"- {plant.removeprefix('@!complete ')}: {why}" for plant, why in WHY.items() if plant in kinds]
    return "\n".join([*lines, "", "What stands in for them:", "", *reasons]) + "\n"


def main(only: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with until_interrupted() as interrupted:
        for emulation, where, text in track(list(planted(only)), "planting"):
            assert emulation.fault is not None
            rows.append({"target": emulation.target, "hopper": emulation.hopper, "kernel": emulation.fault[0], "line": where,
                         "plant": emulation.fault[1], "taken out": text[:60], "which": emulation.fault[2],
                         "verdict": verdict(emulation)})
    of = ("target", "hopper", "kernel")
    planting = Counter(tuple(row[name] for name in of) for row in rows)
    seen = Counter(tuple(row[name] for name in of) for row in rows if row["verdict"] != NOT_SEEN)
    print_table([{**dict(zip(of, group, strict=True)), "planted": count, "seen": seen[group]}
                 for group, count in planting.items()], "faults planted in compiled kernels")
    for row in rows:
        if row["verdict"] == NOT_SEEN:
            print(f"{NOT_SEEN}:", {name: value for name, value in row.items() if name != "verdict"})
    if not only:
        found = {"conditions": conditions(), "commit": git("describe", "--always", "--dirty"),
                 "complete": not interrupted.is_set(), "faults": rows}
        files.write(OUT, json.dumps(found, indent=1) + "\n")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        early = "" if found["complete"] else f"\nThe run was ended after {len(rows)} faults; the others were not planted.\n"
        files.write(PAGE, f"{before}{START}{table(rows)}{early}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
