"""Every feature on every emulated card, forward and backward, with races looked for: docs/emulated.json, and a table of it.

    python -m tests.emulated                     # all, about half an hour
    python -m tests.emulated sm_90 gluon         # of a target and a rung, shown alone
"""

import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["TRITON_INTERPRET"] = "0"  # before anything imports Triton

import torch
from support.emulation import SEVERAL, Emulation
from support.features import FEATURES

from fused_attn import files
from fused_attn.report import conditions, git, print_table, track

OUT, PAGE = ROOT / "docs" / "emulated.json", ROOT / "docs" / "emulator.md"
START, END = "<!-- emulated -->\n", "<!-- end of emulated -->\n"
CARDS = (("sm_80", "pointers"), ("sm_86", "pointers"), ("sm_90", "pointers"), ("sm_90", "descriptors"), ("sm_90", "gluon"),
         ("sm_90", "specialized"), ("sm_100", "pointers"), ("sm_120", "pointers"))
GLUON = ("plain", "causal", "window", "scale", "softcap", "gqa", "lengths", "sinks", "packed", "seqused", "lse")
SPECIALIZED = ("plain", "causal", "window", "softcap", "gqa", "lengths", "sinks", "lse")
TAKEN = {"gluon": GLUON, "specialized": SPECIALIZED}  # of the rungs that take few; what they do not take runs on pointers
OTHER_TYPES = ("fp16", "fp32", "tf32x3", "fp64")
SOME = ("causal", "bias", "mask", "dropout", "packed")  # of the other types


def emulations() -> Iterator[Emulation]:
    for target, rung in CARDS:
        names = TAKEN.get(rung, tuple(feature.name for feature in FEATURES if feature.name != "dims_576"))
        for name in names:
            features = () if name == "plain" else (name,)
            yield Emulation(features, target, rung=rung)
        yield Emulation(("causal",), target, rung=rung, shape=SEVERAL)
    for rung in ("descriptors", "specialized", "gluon"):  # the widths whose configurations differ
        yield from (Emulation(features, "sm_90", rung=rung, shape=dataclasses.replace(SEVERAL, dim=dim, dim_v=dim))
                    for dim in (64, 128, 256) for features in ((), ("causal",), ("window",)))
    for target in ("sm_80", "sm_90", "sm_100", "sm_120"):
        for dtype in OTHER_TYPES:
            yield from (Emulation((name,), target, dtype) for name in SOME)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: cards and types, how many calls were right of how many, and what was found in the others."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["target"], row["rung"], row["dtype"]].append(row)
    lines = ["| card | kernels | type | calls | right, no fault | found in the others |", "|---|---|---|---|---|---|"]
    for (target, rung, dtype), members in groups.items():
        wrong = [row for row in members if row["verdict"] != "ok"]
        said = "; ".join(f"{row['features'] or 'plain'}: {row['verdict'].split(', in warp')[0][:110]}" for row in wrong[:2])
        said += f"; and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        lines.append(f"| {target} | {rung} | {dtype} | {len(members)} | {len(members) - len(wrong)} | {said} |")
    return "\n".join(lines) + "\n"


def main(only: tuple[str, ...]) -> int:
    torch.set_num_threads(1)
    asked = [emulation for emulation in emulations() if only in ((), (emulation.target,), (emulation.target, emulation.rung))]
    rows = []
    for emulation in track(asked, "emulating"):
        told = emulation.told()
        rows.append({"features": "+".join(emulation.features), "target": emulation.target, "rung": emulation.rung,
                     "dtype": emulation.dtype, "shape": list(vars(emulation.shape).values())[:7], **told})
    if only:
        shown = "features", "target", "rung", "dtype", "verdict"
        print_table([{name: row[name] for name in shown} for row in rows], "emulated")
        return int(any(row["verdict"] != "ok" for row in rows))
    files.write(OUT, json.dumps({"conditions": conditions(), "commit": git("describe", "--always", "--dirty"), "rows": rows},
                                indent=1) + "\n")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    files.write(PAGE, f"{before}{START}{table(rows)}{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
