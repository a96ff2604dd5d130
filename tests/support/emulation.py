"""Calls whose compiled kernels run in the emulator, in a process of their own: the tests' own has Triton's interpreter.

    python -m tests.support.emulation "Emulation(('causal',), 'sm_90', hopper='gluon')" ...    # from the checkout

A call is made, forward and backward, held against fp64 by the gates E, and searched for races.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch

from support.features import Call, Inputs, Shape
from support.gates import check_bounded
from support.oracle import EPS

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "tf32x3": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}
SEVERAL = Shape(1, 2, 1, 257, 300, 64, 64)  # tiles of every kind: whole, on edges, ragged


@dataclass(frozen=True)
class Emulation:
    """One call: features, target, dtype, schedule of sm_90, shape; fields of the emulator's schedule; a fault in the PTX.

    ``what``: "attention", "rotary" positions, or "weights" and statistics of them, of the features;
    ``fenced``: with the proxy fences that Triton leaves out;
    ``fault``: (kernel, beginning of a line, which of those lines, what takes its place), the last empty to drop the line.
    """

    features: tuple[str, ...] = ()
    target: str = "sm_80"
    dtype: str = "bf16"
    hopper: str = "pointers"
    shape: Shape = dataclasses.field(default_factory=Shape)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)
    fault: tuple[str, str, int, str] | None = None
    fenced: bool = True
    what: str = "attention"

    def __repr__(self) -> str:
        """What differs from the simplest."""
        told = [f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self)[1:]
                if repr(getattr(self, field.name)) != repr(getattr(Emulation(), field.name))]
        return f"Emulation({', '.join((repr(self.features), *told))})"

    def __str__(self) -> str:
        shape = "" if self.shape == Shape() else f" {self.shape.n_queries}x{self.shape.n_keys} D{self.shape.dim}"
        what = "" if self.what == "attention" else f" {self.what}"
        return f"{self.target} {self.hopper} {self.dtype} {'+'.join(self.features) or 'plain'}{what}{shape}"

    def planted(self, name: str, text: str) -> str:
        if self.fault is None or name != self.fault[0]:
            return text
        _, beginning, which, instead = self.fault
        lines = text.split("\n")
        found = [i for i, line in enumerate(lines) if " ".join(line.split()).startswith(beginning)]
        lines[found[which]] = instead
        return "\n".join(lines)

    @contextlib.contextmanager
    def emulated(self) -> Iterator[list[tuple[str, Any]]]:
        """What runs within it runs as this one says; a list of its launches. Raises EmulatorFault."""
        import fused_attn
        from fused_attn import emulator, targets
        from fused_attn.kernels import fences
        from fused_attn.plan import proven

        proven = mock.patch.object(proven, "PROVEN_ON", (targets.triton_version(),))  # what is not is run here to be
        lacking = mock.patch.object(fences, "lacking", fences.lacking if self.fenced else lambda arch, descriptors: False)
        with proven, lacking, emulator.emulated(self.target, emulator.Schedule(**self.schedule), self.planted) as launches, \
                fused_attn.hopper(self.hopper):
            yield launches

    def launches(self) -> list[tuple[str, Any]]:
        """The launches of the call, as ``check`` makes it but for the look at its answer."""
        return self.run()[1]

    def run(self) -> tuple[Callable[[], None], list[tuple[str, Any]]]:
        """Makes the call: what holds its answer against fp64, and its launches."""
        inputs = replace(Call(self.features, self.shape).draw(DTYPES[self.dtype]), extra=self.arguments)
        make = {"attention": _attention, "rotary": _rotary, "weights": _weights}[self.what]
        with self.emulated() as launches:
            return make(inputs, self.dtype), launches

    def check(self) -> dict[str, Any]:
        """Makes the call; what its launches did. Raises EmulatorFault, or AssertionError where an answer is wrong."""
        start = time.perf_counter()
        hold, launches = self.run()
        seconds = time.perf_counter() - start
        hold()
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


def _attention(inputs: Inputs, dtype: str) -> Callable[[], None]:
    precision = {"fp32_precision": dtype} if dtype.startswith("tf32") else {}
    # TF32 is to tell of itself by the gates of bf16, which has fewer bits; an LSE of it has no such gate.
    got = replace(inputs, extra={**inputs.extra, **precision}).run("triton", return_lse=dtype != "tf32")
    return partial(check_bounded, inputs, got, torch.bfloat16 if dtype == "tf32" else DTYPES[dtype])


def _rotary(inputs: Inputs, dtype: str) -> Callable[[], None]:
    """Queries turned, and a gradient turned back; each rounds once, as in tests/test_rotary.py."""
    from fused_attn import apply_rotary

    x, dout = inputs.leaves["q"].requires_grad_(), inputs.dout
    angles = 10 * torch.rand(x.shape[2], x.shape[3] // 2)
    cos, sin = angles.cos(), angles.sin()
    out = apply_rotary(x, cos, sin, backend="triton")
    (dx,) = torch.autograd.grad(out, x, dout)

    def hold() -> None:
        for got, given, way in ((out, x, 1), (dx, dout, -1)):
            exact = apply_rotary(given.double(), cos.double(), way * sin.double(), backend="reference")
            terms = given.double().norm(dim=-1, keepdim=True)
            assert ((got.double() - exact).abs() <= 1.01 * EPS[got.dtype] * exact.abs() + 4 * EPS[torch.float32] * terms).all()

    return hold


def _weights(inputs: Inputs, dtype: str) -> Callable[[], None]:
    """Weights, which round once, and statistics of them, in fp32."""
    from fused_attn import attention_stats, attention_weights

    def seen(inputs: Inputs, backend: str) -> list[torch.Tensor]:
        tensors, arguments = (inputs.leaves["q"], inputs.leaves["k"]), inputs.arguments(inputs.leaves)
        return [attention_weights(*tensors, backend=backend, **arguments),
                *attention_stats(*tensors, backend=backend, **arguments)]

    found = seen(inputs, "triton")

    def hold() -> None:
        for got, exact in zip(found, seen(inputs.to(torch.float64), "reference"), strict=True):
            relative = 1.01 * EPS[got.dtype] + 2.0**-18  # scores in fp32, and exp2 of them
            assert ((got.double() - exact).abs() <= relative * exact.abs() + 1e-7).all()

    return hold


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
