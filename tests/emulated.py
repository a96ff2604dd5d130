"""Every feature on every emulated card, forward and backward, with races looked for: docs/emulated-TRITON.json, and a table.

    python -m tests.emulated                     # all, about an hour
    python -m tests.emulated sm_90 gluon         # of a target and a schedule, shown alone
    python -m tests.emulated ratios              # R in fp32, where sums are chains: docs/emulated-ratios.json

The table in docs/emulator.md is of all Tritons that have such a file. Ctrl-C keeps what there is by then.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["TRITON_INTERPRET"] = "0"  # before anything imports Triton

import torch
from support.emulation import Emulation
from support.emulations import every
from support.features import Call, Shape
from support.oracle import error_ratio, max_r

from fused_attn import files
from fused_attn.plan.tiles import choose, choose_hopper
from fused_attn.tools.options import until_interrupted
from fused_attn.tools.report import conditions, git, print_table, track

DOCS = ROOT / "docs"
PAGE = DOCS / "emulator.md"
START, END = "<!-- emulated -->\n", "<!-- end of emulated -->\n"
LONG = Shape(1, 1, 1, 512, 512, 64, 64)
Row = dict[str, Any]


def emulate(emulation: Emulation) -> Row:
    """One row of the file."""
    return {"call": str(emulation), "target": emulation.target, "hopper": emulation.hopper, "dtype": emulation.dtype,
            **emulation.told()}


def speed() -> list[Row]:
    """Milliseconds that the emulator takes for a tile of scores: one pass of a program's loop, all of its warps."""
    rows = []
    for target, hopper in (("sm_80", "pointers"), ("sm_90", "pointers"), ("sm_90", "gluon"), ("sm_100", "pointers")):
        configs = {name: choose(name, LONG.dim, LONG.dim, torch.bfloat16, target) for name in ("forward", "dq", "dkv")}
        if hopper == "gluon":
            configs = {"forward": choose_hopper(hopper, LONG.dim, LONG.dim)}
        seconds = {}
        for races in (True, False):
            call = Emulation((), target, hopper=hopper, shape=LONG, schedule={"races": races},
                             arguments={"deterministic": True})
            seconds[races] = {kernel["name"]: kernel["seconds"] for kernel in call.check()["kernels"]}
        for name, config in configs.items():
            tiles = LONG.n_queries // config.block_m * (LONG.n_keys // config.block_n)
            rows.append({"card": target, "kernels": hopper, "kernel": name, "tile": f"{config.block_m}x{config.block_n}",
                         "ms, with races": round(1000 * seconds[True][f"{name}_kernel"] / tiles, 1),
                         "ms, without": round(1000 * seconds[False][f"{name}_kernel"] / tiles, 1)})
    return rows


def ratios() -> list[Row]:
    """The largest R of out, dq, dk and dv in fp32, compiled for sm_80 and of the reference, by head dim."""
    rows = []
    cases = [((), 256), (("causal",), 256), ((), 400), (("causal",), 400)]
    for dim in track((32, 64, 128), "fp32"):
        largest = {"compiled for sm_80": 0.0, "reference": 0.0}
        for features, length in cases:
            emulation = Emulation(features, "sm_80", "fp32", shape=Shape(1, 2, 2, length, length, dim, dim))
            inputs = Call(features, emulation.shape).draw(torch.float32)
            exact = inputs.to(torch.float64).run("reference", with_lse=False)
            with emulation.emulated():
                compiled = inputs.run("triton", with_lse=False)
            for name, got in (("compiled for sm_80", compiled), ("reference", inputs.run("reference", with_lse=False))):
                largest[name] = max(largest[name], *(error_ratio(got[x], exact[x]) for x in ("out", "dq", "dk", "dv")))
        rows.append({"head dim": dim, **{name: round(ratio, 1) for name, ratio in largest.items()},
                     "limit": round(max_r(torch.float32, dim)[0], 1)})
    return rows


def table(found: dict[str, list[Row]]) -> str:
    """Markdown: by card, kernels and type, how many calls were right of how many, on each Triton; then what the others had."""
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for version, rows in found.items():
        for row in rows:
            groups[row["target"], row["hopper"], row["dtype"]][version].append(row)
    lines = ["| card | kernels | type | " + " | ".join(f"Triton {version}" for version in found) + " |",
             "|---|---|---|" + "---|" * len(found)]
    for group, members in groups.items():
        right = [f"{sum(row['verdict'] == 'ok' for row in members[version])} of {len(members[version])}" for version in found]
        lines.append(f"| {' | '.join((*group, *right))} |")
    wrong = [f"- Triton {version}, {row['call']}: {row['verdict'].split(', in warp')[0][:200]}"
             for version, rows in found.items() for row in rows if row["verdict"] != "ok"]
    return "\n".join([*lines, *(["", "The others:", "", *wrong] if wrong else [])]) + "\n"


def write_table() -> None:
    """The table of docs/emulator.md, from the files that there are."""
    there = sorted(DOCS.glob("emulated-[0-9]*.json"))
    found = {file.stem.removeprefix("emulated-"): json.loads(file.read_text(encoding="utf-8")) for file in there}
    *_, newest = found
    speeds = found[newest]["speed"]
    names = list(speeds[0])
    costs = [f"What a tile of scores takes at head dim {LONG.dim}, a pass of a program's loop, Triton {newest}, one core:",
             "", f"| {' | '.join(names)} |", "|---" * len(names) + "|",
             *(f"| {' | '.join(str(row[name]) for name in names)} |" for row in speeds)]
    early = [f"The run on Triton {version} was ended after {len(content['rows'])} calls; the others have not been made.\n"
             for version, content in found.items() if not content["complete"]]
    told = "\n".join([table({version: content["rows"] for version, content in found.items()}), *early, *costs]) + "\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    files.write(PAGE, f"{before}{START}{told}{END}{rest.partition(END)[2]}")


def main(only: tuple[str, ...]) -> int:
    torch.set_num_threads(1)
    if only == ("ratios",):
        found = {"conditions": conditions(), "commit": git("describe", "--always", "--dirty"), "rows": ratios()}
        files.write(DOCS / "emulated-ratios.json", json.dumps(found, indent=1) + "\n")
        print_table(found["rows"], "the largest R in fp32")
        return 0
    asked = [emulation for emulation in every() if only in ((), (emulation.target,), (emulation.target, emulation.hopper))]
    rows: list[Row] = []
    with until_interrupted() as interrupted:
        for emulation in track(asked, "emulating"):
            rows.append(emulate(emulation))
    if only:
        print_table([{name: row[name] for name in ("call", "verdict")} for row in rows], "emulated")
        return int(any(row["verdict"] != "ok" for row in rows))
    here = conditions()
    content = {"conditions": here, "commit": git("describe", "--always", "--dirty"), "complete": not interrupted.is_set(),
               "speed": speed(), "rows": rows}
    files.write(DOCS / f"emulated-{here['triton']}.json", json.dumps(content, indent=1) + "\n")
    write_table()
    return 0


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
