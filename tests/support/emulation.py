"""Calls whose compiled kernels run in the emulator, in a process of their own: the tests' own has Triton's interpreter.

    python -m tests.support.emulation "Emulation(('causal',), 'sm_90', rung='gluon')" ...    # from the checkout

A call is made, forward and backward, held against fp64 by the gates E, and searched for races.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch

from support.features import Call, Inputs, Leaves, Shape
from support.gates import check_bounded

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "tf32x3": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}
SEVERAL = Shape(1, 2, 1, 257, 300, 64, 64)  # tiles of every kind: whole, on edges, ragged


@dataclass(frozen=True)
class Emulation:
    """One call: features, target, dtype, rung of sm_90, shape; fields of the schedule; a fault planted in a kernel's PTX.

    ``fenced``: with the proxy fences that Triton leaves out;
    ``fault``: (kernel, beginning of a line, which of those lines, what takes its place), the last empty to drop the line.
    """

    features: tuple[str, ...] = ()
    target: str = "sm_80"
    dtype: str = "bf16"
    rung: str = "pointers"
    shape: Shape = dataclasses.field(default_factory=Shape)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)
    fault: tuple[str, str, int, str] | None = None
    fenced: bool = True

    def __repr__(self) -> str:
        """What differs from the simplest."""
        told = [f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self)[1:]
                if repr(getattr(self, field.name)) != repr(getattr(Emulation(), field.name))]
        return f"Emulation({', '.join((repr(self.features), *told))})"

    def __str__(self) -> str:
        shape = "" if self.shape == Shape() else f" {self.shape.n_queries}x{self.shape.n_keys} D{self.shape.dim}"
        return f"{self.target} {self.rung} {self.dtype} {'+'.join(self.features) or 'plain'}{shape}"

    def planted(self, name: str, text: str) -> str:
        if self.fault is None or name != self.fault[0]:
            return text
        _, beginning, which, instead = self.fault
        lines = text.split("\n")
        found = [i for i, line in enumerate(lines) if " ".join(line.split()).startswith(beginning)]
        lines[found[which]] = instead
        return "\n".join(lines)

    def run(self) -> tuple[Inputs, Leaves, list[tuple[str, Any]]]:
        """Makes the call: what it was made of, what came, and its launches. Raises EmulatorFault."""
        import fused_attn
        from fused_attn import emulator, rungs, targets
        from fused_attn.kernels import fences

        inputs = Call(self.features, self.shape).draw(DTYPES[self.dtype])
        precision = {"fp32_precision": self.dtype} if self.dtype.startswith("tf32") else {}
        asked = replace(inputs, extra={**self.arguments, **precision})
        proven = mock.patch.object(rungs, "PROVEN_ON", (targets.triton_version(),))  # what is not is run here to be
        fenced = mock.patch.object(fences, "lacking", fences.lacking if self.fenced else lambda arch, descriptors: False)
        with proven, fenced, emulator.emulated(self.target, emulator.Schedule(**self.schedule), self.planted) as launches, \
                fused_attn.hopper(self.rung):
            return replace(inputs, extra=self.arguments), asked.run("triton"), launches

    def launches(self) -> list[tuple[str, Any]]:
        """The launches of the call: names of kernels, and what they did."""
        return self.run()[2]

    def check(self) -> dict[str, Any]:
        """Makes the call; what its launches did. Raises EmulatorFault, or AssertionError where an answer is wrong."""
        start = time.perf_counter()
        inputs, got, launches = self.run()
        seconds = time.perf_counter() - start
        check_bounded(inputs, got, torch.bfloat16 if self.dtype == "tf32" else DTYPES[self.dtype])
        return {"seconds": round(seconds, 2), "kernels": [
            {"name": name, "programs": result.programs, "seconds": round(result.seconds, 3),
             "instructions": int(result.counts["runs"].sum())} for name, result in launches]}

    def told(self) -> dict[str, Any]:
        """``check`` as JSON has it: with ``verdict``, which is "ok" or says what was found."""
        from fused_attn.emulator import EmulatorFault, UnknownInstructionError

        try:
            return {"verdict": "ok", **self.check()}
        except (EmulatorFault, UnknownInstructionError, AssertionError, ValueError, RuntimeError) as error:
            return {"verdict": f"{type(error).__name__}: {str(error)[:600]}", "kernels": []}


class Worker:
    """A process without Triton's interpreter, which does what it is told, line after line; ``module`` is what it runs."""

    def __init__(self, module: str = "tests.support.emulation") -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "FUSED_ATTN_DETERMINISTIC": "0", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, told: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(repr(told) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process that was told {told!r} died"
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        self.process.communicate()


def main() -> None:
    """Emulates the calls of the command line, else those of the lines that come in; one line of JSON for each."""
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr  # of whatever else prints
    for line in sys.argv[1:] or sys.stdin:
        emulation = eval(line, {"Emulation": Emulation, "Shape": Shape, "SEVERAL": SEVERAL})
        print(json.dumps(emulation.told()), file=answers, flush=True)


if __name__ == "__main__":
    main()
