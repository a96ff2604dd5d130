"""Which schedules of sm_90 alone (``settings.hopper``) this Triton may run: those that were tried on it and found right."""

import json
from pathlib import Path
from typing import Any

from fused_attn.settings import HOPPER_SCHEDULES
from fused_attn.targets import triton_version

# These depend on young parts of Triton. A version that cannot compile them would fail in the middle of a program, so a version
# on which nobody has compiled them does not run them. Descriptors are part of the language.
YOUNG = ("specialized", "gluon")
VERSIONS = Path(__file__).parents[1] / "versions.json"  # what was tried on which versions; `python -m tests.versions` writes it


def passed_on(rows: list[dict[str, Any]], trial: str, schedules: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Major and minor of the Tritons on which schedules passed a trial, "compiled" or "emulated", under every torch."""
    found: dict[tuple[int, int], bool] = {}
    for row in rows:
        major, minor, *_ = row["triton"].split(".")
        version = int(major), int(minor)
        found[version] = found.get(version, True) and all(row.get(trial, {}).get(name, False) for name in schedules)
    return tuple(sorted(version for version, passed in found.items() if passed))


_ROWS = json.loads(VERSIONS.read_text(encoding="utf-8"))
COMPILED_ON = passed_on(_ROWS, "compiled", YOUNG)
# The Tritons whose compiled "specialized" kernels were emulated and found right. Before the schedule was repaired, each of them
# gave wrong rows, which no interpreter of the source could show.
PROVEN_ON = passed_on(_ROWS, "emulated", ("specialized",))


def offered() -> tuple[str, ...]:
    """The schedules above pointers that this Triton may run, from the top."""
    return tuple(name for name in HOPPER_SCHEDULES[:0:-1] if name != "specialized" or triton_version() in PROVEN_ON)


def against(schedule: str) -> tuple[str, ...]:
    """Reasons why this Triton may not run a schedule above pointers."""
    here = ".".join(map(str, triton_version()))
    if schedule not in offered():
        return (f"what Triton {here} compiles of it has not been emulated and found right",)
    if schedule != "descriptors" and triton_version() not in COMPILED_ON:
        return (f"it has not been compiled on Triton {here}",)
    return ()
