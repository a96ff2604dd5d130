"""What a tile of a compiled kernel moves through shared and global memory: counted in the emulator, on a CPU.

A kernel is run on squares of 2, 3 and 4 blocks of rows. What it does for a program is linear in their number, what it does for
a tile grows with its square: of three counts, the second difference is what tiles without a mask cost.
"""

import dataclasses
import re
from collections import Counter
from math import prod
from typing import Any

from fused_attn.emulator import LATE, Schedule, emulated
from fused_attn.kernels import launch as launching
from fused_attn.plan.tiles import Kernel
from fused_attn.tools.compile.offline import Sizes, launches

FEATURES = ("plain", "fused", "softcap", "bias", "alibi", "dropout", "sinks")  # in whose calls no tensor says what to skip
KERNELS = ("forward", "dq", "dkv", "backward")
_HEADS = 2
_LATE = Schedule(LATE, turn=0, resident=1, races=False)  # what is in flight stays so until it is waited for
_PRODUCT = re.compile(r"(w?g?mma)\.\S*m(\d+)n(\d+)k(\d+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one tile, by all warps of a program: ``wavefronts`` of shared memory, each a cycle of a multiprocessor, and the least
    that its bytes need without bank conflicts; ``requests`` of warps to global memory, the 32-byte ``sectors`` that they touch
    and the least; those of atomics alone; ``multiply_adds`` of matrix products, 0 where the text does not tell them (tcgen05);
    and the most bytes of loads that a warp had in flight."""

    wavefronts: int
    least_wavefronts: int
    requests: int
    sectors: int
    least_sectors: int
    atomic_requests: int
    atomic_sectors: int
    multiply_adds: int
    bytes_in_flight: int


def traffic(target: str, kernel: Kernel, head_dim: int, dtype: str, causal: bool, *, feature: str = "plain",
            head_dim_v: int | None = None, config: Any = None, hopper: str = "pointers") -> list[Traffic]:
    """Of each launch that makes a kernel of ``KERNELS``, as ``offline.compile_kernel`` takes it: one, or dK's and dV's."""
    totals: list[list[Counter[str]]] = []
    for blocks in (2, 3, 4):
        made = launches(target, kernel, head_dim, dtype, causal, _HEADS, feature, head_dim_v or head_dim, config, hopper,
                        Sizes(1, _HEADS, 128, "cpu"))
        if not made:  # no such kernel at this head dim
            return []
        edge = max(max(launch.config.block_m, launch.config.block_n) for launch in made)
        made = launches(target, kernel, head_dim, dtype, causal, _HEADS, feature, head_dim_v or head_dim, config, hopper,
                        Sizes(1, _HEADS, blocks * edge, "cpu"))
        with emulated(target, _LATE) as results:
            for launch in made:
                launching.run(launch)
        totals.append([total_of(result) for _, result in results])
    found = []
    for launch, two, three, four in zip(made, *totals, strict=True):
        # blocks * blocks squares, or with a causal window blocks * (blocks - 1) / 2
        squares = _HEADS * (1 if causal else 2) * edge**2 / (launch.config.block_m * launch.config.block_n)
        of_tile = {name: round((four[name] - 2 * three[name] + two[name]) / squares) for name in four}
        of_tile["bytes_in_flight"] = four["bytes_in_flight"]
        found.append(Traffic(**of_tile))
    return found


def total_of(result: Any) -> Counter[str]:
    """Of a launch, by the fields of Traffic."""
    total = Counter(dict.fromkeys((field.name for field in dataclasses.fields(Traffic)), 0))
    total["bytes_in_flight"] = result.bytes_in_flight
    for instruction, count in zip(result.program.kernel.instructions, result.counts, strict=True):
        atomic = instruction.op.startswith(("red.global", "atom.global"))
        of_global = instruction.op.startswith(("ld.global", "st.global", "red.global", "atom.global", "cp.async"))
        for name in ("wavefronts", "least_wavefronts", "sectors", "least_sectors"):
            total[name] += int(count[name])
        total["requests"] += int(count["requests"]) * of_global
        total["atomic_requests"] += int(count["requests"]) * atomic
        total["atomic_sectors"] += int(count["sectors"]) * atomic
        if found := _PRODUCT.match(instruction.op):
            warps = 4 if found[1] == "wgmma" else 1  # which issue one product together
            total["multiply_adds"] += int(count["runs"]) * prod(map(int, found.groups()[1:])) // warps
    return total
