"""The GPUs that kernels are compiled for, a record each, by name (sm_90, gfx942), and the Triton that compiles them.

A new GPU is a record in ``TARGETS``, and tables of tiles (``plan.tiles``) if it does not share another's.
"""

import functools
from dataclasses import dataclass

import torch

from fused_attn import settings

_KIB = 1024


@dataclass(frozen=True)
class Rates:
    """What a scheduler's pipes do: ``tensor`` multiply-adds of fp16 or bf16 a cycle, and the cycles that one warp's
    instruction keeps a pipe busy: ``exp2``, ``fma``, ``imad`` (integer multiply-adds, in the FMA pipe), ``alu``. ``packed``
    is a fma of two values. ``one_pipe``: vector instructions share one pipe. ``mma_sync``: HMMA reaches the tensor rate."""

    tensor: int
    exp2: int
    fma: int
    imad: int
    alu: int
    packed: int
    one_pipe: bool = False
    mma_sync: bool = False


@dataclass(frozen=True)
class Machine:
    """What fits on a multiprocessor: ``warps`` a scheduler, ``programs``, bytes of ``shared`` memory, of which each program
    takes ``reserved`` beside its own, rounded up to a multiple of ``granule``; 32-bit ``registers`` a scheduler has for each
    lane, handed out in multiples of ``register_granule``."""

    warps: int
    programs: int
    shared: int
    reserved: int = 1024
    granule: int = 128
    registers: int = 512
    register_granule: int = 8
    rates: Rates | None = None


@dataclass(frozen=True)
class Target:
    """A kind of GPU: bytes of shared memory that one program may have (``shared``); the target whose tiles it takes (``tiles``,
    its own where none is named); lanes of a warp; whether Triton multiplies fp32 in TF32 or in three products of it; and what
    fits on its multiprocessors, where the compile matrix, the static profile and the emulator have it (``machine``)."""

    name: str
    shared: int
    tiles: str = ""
    lanes: int = 32
    tf32: bool = True
    tf32x3: bool = True
    machine: Machine | None = None

    @property
    def tables(self) -> str:
        """The name under which the tables have its tiles."""
        return self.tiles or self.name


def _amd(name: str, kib: int, tiles: str = "", machine: Machine | None = None, tf32: bool = False) -> Target:
    return Target(name, kib * _KIB, tiles, 64 if name.startswith("gfx9") else 32, tf32, False, machine)


# Limits: cuda_occupancy.h of the CUDA toolkit; LLVM's AMDGPU back end. Rates: the throughput table of the CUDA programming
# guide and peak over clock and multiprocessors of A100 (312 TFLOP/s), H100 (989), B200 (2250) and MI300X (1307); there a
# wave64 takes a SIMD of 16 lanes 4 cycles, and exp2 has a quarter of that rate.
TARGETS = {target.name: target for target in (
    Target("sm_80", 163 * _KIB, machine=Machine(16, 32, 164 * _KIB, rates=Rates(256, 8, 2, 2, 2, 4, mma_sync=True))),
    Target("sm_86", 99 * _KIB, machine=Machine(12, 16, 100 * _KIB)),
    Target("sm_87", 163 * _KIB, "sm_86"),
    Target("sm_89", 99 * _KIB, "sm_86", machine=Machine(12, 24, 100 * _KIB)),
    Target("sm_90", 227 * _KIB, machine=Machine(16, 32, 228 * _KIB, rates=Rates(512, 8, 1, 2, 2, 2))),
    Target("sm_100", 227 * _KIB, machine=Machine(16, 32, 228 * _KIB, rates=Rates(1024, 8, 1, 2, 2, 2))),
    Target("sm_103", 227 * _KIB, "sm_100"),
    Target("sm_110", 227 * _KIB, "sm_100"),
    Target("sm_120", 99 * _KIB, machine=Machine(12, 24, 100 * _KIB)),
    Target("sm_121", 99 * _KIB, "sm_120"),
    _amd("gfx90a", 64, "gfx942", Machine(8, 16, 64 * _KIB, 0, 512)),
    _amd("gfx942", 64, "", Machine(8, 16, 64 * _KIB, 0, 512, rates=Rates(256, 16, 4, 4, 4, 4, one_pipe=True)), tf32=True),
    _amd("gfx950", 160, "gfx942", Machine(8, 16, 160 * _KIB, 0, 1280)),
    _amd("gfx1100", 64, "", Machine(16, 32, 128 * _KIB, 0, 512, 1536, 24)),
    _amd("gfx1101", 64, "gfx1100"),
    _amd("gfx1102", 64, "gfx1100"),
    *(_amd(name, 64, "gfx1100") for name in ("gfx1150", "gfx1151", "gfx1200", "gfx1201")),  # RDNA 3.5 and 4
)}
KNOWN = tuple(sorted(TARGETS))
# Those that the compile matrix, the static profile and the emulator have.
COMPILED = tuple(name for name, target in TARGETS.items() if target.machine is not None)


@functools.cache
def target_of(arch: str) -> Target:
    """The record of a target; one that nobody has tried gets the smallest tiles of its maker."""
    if arch in TARGETS:
        return TARGETS[arch]
    if arch.startswith("gfx"):
        return _amd(arch, 64, "gfx1100")
    return Target(arch, 64 * _KIB, "sm_86", tf32=arch.startswith("sm_"), tf32x3=arch.startswith("sm_"))


def arch_of(device: torch.device) -> str:
    """Target name of a device: sm_90, gfx942, ..., or for the CPU "interpreter", or the card that is emulated there."""
    if (target := settings.emulated_target()) is not None and device.type == "cpu":
        return target
    return _arch(device)


@functools.cache
def _arch(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def triton_version() -> tuple[int, int]:
    """Triton's major and minor version: what compiles on one may spill, or fail, on another."""
    import triton  # here, so that a machine without it can still read the tables

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def triton_name() -> str:
    """Triton's major and minor version as text, "3.7"."""
    return ".".join(map(str, triton_version()))
