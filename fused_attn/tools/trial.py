"""One pass of attention as ``fused-attn tune`` tries it: by any schedule, with any tiles, held to fp64 before it is timed."""

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch

import fused_attn
from fused_attn.call.schema import Needs, Saved
from fused_attn.call.spec import NO_OTHERS, AttentionSpec, TileConfig, Window
from fused_attn.plan import schedules
from fused_attn.plan.plan import Made, collect, finish, perform
from fused_attn.plan.problem import Problem
from fused_attn.plan.tuned import Pass
from fused_attn.tools.bench.oracle import error_ratio, max_r

Tiles = Mapping[str, TileConfig]
TABLES = {"forward": schedules.FORWARD, "backward": schedules.BACKWARD}
SMALL = (333, 470)  # queries and keys of what is held to fp64: tiles of every kind, and lengths that end within one
SMALL_ON_A_CPU = (40, 72)
MAX_LSE_ERROR = 1e-4  # relative


class Inputs:
    """q, k, v, dout of a full and of a causal call, and, for a backward, what their forwards keep."""

    def __init__(self, which: Pass, tensors: list[torch.Tensor], tiles: Tiles) -> None:
        self.q, self.k, self.v, self.dout = tensors
        self.specs = [AttentionSpec(self.q.shape[3] ** -0.5, Window(None, right), hopper="pointers") for right in (None, 0)]
        self.saved: list[Saved] = []
        for spec in self.specs if which == "backward" else ():
            out, lse, _ = finish(schedules.named(schedules.FORWARD, "pointers").steps(self.problem(spec, tiles)))
            self.saved.append(Saved(self.dout, None, self.q, self.k, self.v, out, None, lse))

    def problem(self, spec: AttentionSpec, tiles: Tiles) -> Problem:
        return Problem.of(self.q, self.k, self.v, spec, NO_OTHERS, tiles=dict(tiles))

    def exact(self) -> list[dict[str, torch.Tensor]]:
        """Results of each call in fp64 by the reference, by name."""
        found = []
        for spec in self.specs:
            leaves = [x.detach().double().requires_grad_() for x in (self.q, self.k, self.v)]
            out, lse = fused_attn.attention(*leaves, causal=spec.window.right == 0, return_lse=True, backend="reference")
            grads = torch.autograd.grad(out, leaves, self.dout.double())
            found.append(dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True)))
        return found


class Trial:
    """A pass at one head dim on one device. ``tiles`` are those of every kernel but for what a candidate brings; ``needs``:
    the gradients that a backward makes."""

    def __init__(self, which: Pass, head_dim: int, device: torch.device, dtype: torch.dtype, length: int = 4096, *,
                 tiles: Tiles | None = None, needs: Needs = schedules.EVERY_GRADIENT) -> None:
        self.which, self.head_dim, self.device, self.needs = which, head_dim, device, needs
        self.tiles: Tiles = tiles or {}
        on_cpu = device.type == "cpu"
        heads, batch = (2, 1) if on_cpu else (max(1, 2048 // head_dim), max(1, 16384 // length))
        generator = torch.Generator(device).manual_seed(0)

        def drawn(batch: int, heads: int, queries: int, keys: int) -> Inputs:
            return Inputs(which, [torch.randn(batch, heads, n, head_dim, device=device, generator=generator).to(dtype)
                                  for n in (queries, keys, keys, queries)], self.tiles)

        self.large = drawn(batch, heads, length, length)
        self.small = drawn(1, 2, *(SMALL_ON_A_CPU if on_cpu else SMALL))
        self._exact: list[dict[str, torch.Tensor]] = []

    def against(self, schedule: str) -> tuple[str, ...]:
        """Reasons not to try a schedule here."""
        problem = self.small.problem(_asking(self.small.specs[0], schedule), self.tiles)
        more = (self.needs,) if self.which == "backward" else ()
        return schedules.named(TABLES[self.which], schedule).against(problem, *more)

    def _steps(self, inputs: Inputs, schedule: str, tiles: Tiles) -> Iterator[Generator[Made, None, Any]]:
        """The steps of the full and of the causal call."""
        make = schedules.named(TABLES[self.which], schedule).steps
        for i, spec in enumerate(inputs.specs):
            problem = inputs.problem(_asking(spec, schedule), {**self.tiles, **tiles})
            yield make(problem, inputs.saved[i], self.needs) if self.which == "backward" else make(problem)

    def results(self, schedule: str, tiles: Tiles | None = None, inputs: Inputs | None = None) -> list[dict[str, torch.Tensor]]:
        """What a schedule makes of each call, by name, with ``tiles`` in place of some of the trial's own."""
        names = ("out", "lse") if self.which == "forward" else ("dq", "dk", "dv")
        return [{name: x for name, x in zip(names, finish(steps), strict=False) if x is not None}
                for steps in self._steps(inputs or self.large, schedule, tiles or {})]

    def made(self, schedule: str, tiles: Tiles | None = None) -> list[Made]:
        """The launches and operations of both calls, each performed once, to be performed again."""
        found = [made for steps in self._steps(self.large, schedule, tiles or {}) for made in collect(steps)[0]]
        for made in found:
            perform(made)
        return found

    def wrong(self, schedule: str, tiles: Tiles | None = None) -> str | None:
        """What is wrong with a candidate, held to fp64 on this device, if anything."""
        try:
            results = self.results(schedule, tiles, self.small)
            if self.device.type != "cpu":
                torch.cuda.synchronize(self.device)
        except Exception as error:  # too much shared memory, or whatever the compiler has against it
            return told(error)
        self._exact = self._exact or self.small.exact()
        limits = dict(zip(("out", "grad"), max_r(self.small.q.dtype, self.head_dim), strict=True))
        for got, want in zip(results, self._exact, strict=True):
            for name, x in got.items():
                if name == "lse":
                    difference = float((x.double() - want[name]).norm() / want[name].norm())
                    if not difference <= MAX_LSE_ERROR:
                        return f"lse differs from fp64's by {difference:.2g}"
                elif not (ratio := error_ratio(x, want[name])) <= limits.get(name, limits["grad"]):
                    return f"R of {name} against fp64 is {ratio:.3g}, and at most {limits.get(name, limits['grad'])} is right"
        return None


def _asking(spec: AttentionSpec, schedule: str) -> AttentionSpec:
    return spec._replace(hopper=schedule, deterministic=schedule == "separate")


def told(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
