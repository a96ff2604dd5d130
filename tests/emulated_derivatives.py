"""Second derivatives by the compiled kernels, in the emulator, against the reference in fp64: docs/emulated-derivatives.json.

    python -m tests.emulated_derivatives                 # what is not there yet, on every target of TARGETS
    python -m tests.emulated_derivatives sm_90 --dtype bf16

Each row is one feature on one target: the Hessian times random directions of every tensor, by each way to take it. An error is
that of the norm, in units of the type's rounding; races and stray accesses count as faults. A row is written when it is made.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.pop("TRITON_INTERPRET", None)  # compiled kernels, whatever the shell says

import torch
from support.features import Call, Shape
from support.seconds import WAYS, second

import fused_attn
from fused_attn import files
from fused_attn.tools import options
from fused_attn.tools.report import conditions, git, print_table, track

OUT = ROOT / "docs" / "emulated-derivatives.json"
TARGETS = ("sm_80", "sm_90")
FEATURES = ("causal", "softcap", "bias", "relative", "dropout", "sinks", "packed", "function", "mask", "gqa", "precise",
            "kerple")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = Shape(n_queries=37, n_keys=37)


def made(target: str, feature: str, dtype: str) -> dict[str, Any]:
    """A row: the largest error of any tensor's second derivative by each way, and the verdict."""
    inputs, start = Call((feature,), SMALL).draw(DTYPES[dtype]), time.monotonic()
    row: dict[str, Any] = {"target": target, "feature": feature, "dtype": dtype, "verdict": "right"}
    for way in WAYS:
        want = second(inputs.to(torch.float64), "reference", way)
        try:
            with fused_attn.emulated(target):
                got = second(inputs, "triton", way)
        except Exception as error:  # of the compiler, or a fault that the emulator saw: that is the answer
            return {**row, "verdict": f"{way}: {type(error).__name__}: {str(error)[:300]}"}
        errors = [((got[name].double() - x).norm() / x.norm()).item() for name, x in want.items()]
        row[way] = round(max(errors) / torch.finfo(DTYPES[dtype]).eps, 2)
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 where a row is not right."""
    parser = options.Parser(prog="python -m tests.emulated_derivatives", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=f"{', '.join(TARGETS)} by default")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    return options.run(parser, argv, run)


def run(asked: argparse.Namespace) -> int:
    """Makes the rows that are asked for and not there, and prints them all."""
    before = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.exists() else []
    rows = {(row["target"], row["feature"], row["dtype"]): row for row in before}
    commit = git("describe", "--always", "--dirty")
    wanted = [(target, feature, asked.dtype) for target in asked.targets for feature in FEATURES]
    for key in track([key for key in wanted if rows.get(key, {}).get("commit") != commit], "second derivatives"):
        rows[key] = {**made(*key), "commit": commit, "triton": conditions()["triton"]}
        files.write(OUT, json.dumps({"rows": [rows[key] for key in sorted(rows)]}, indent=1) + "\n")
    chosen = [rows[key] for key in wanted]
    print_table([{name: row.get(name, "") for name in ("target", "feature", *WAYS, "verdict")} for row in chosen],
                "error in units of rounding")
    return 0 if all(row["verdict"] == "right" for row in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
