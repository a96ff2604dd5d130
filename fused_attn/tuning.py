"""Tile configurations: one shipped choice for every kernel, head dim, element type and target, and no autotuning.

The tables are static findings: large tiles that compile for the target with little or no spilling (docs/compile-matrix.json
holds what each gives; CONTRIBUTING.md tells how to check a change). Only a timing on the card can rank them; none has been
made yet.
"""

import functools
from typing import Literal

import torch

from fused_attn.spec import TileConfig as T

Kernel = Literal["forward", "delta", "dq", "dkv"]

_CDNA = (("matrix_instr_nonkdim", 16),)  # 16x16 matrix instructions: the default 32x32 ones fit 64-row tiles badly
_CDNA2 = (*_CDNA, ("waves_per_eu", 2))

# target -> kernel -> widest head dim it serves -> T(queries, keys, warps, pipeline stages), for fp16 and bf16.
_HALVES: dict[str, dict[str, dict[int, T]]] = {
    "sm_80": {
        "forward": {32: T(128, 64, 4, 3), 64: T(128, 64, 4, 3), 128: T(128, 64, 8, 3, wide=True), 256: T(64, 64, 8, 2)},
        "dq": {32: T(64, 64, 4, 3), 64: T(64, 64, 4, 2), 128: T(128, 32, 8, 2), 256: T(32, 32, 4, 1)},
        "dkv": {32: T(32, 128, 4, 2, edge_stages=1), 64: T(64, 128, 8, 2, edge_stages=1), 128: T(64, 64, 8, 2),
                256: T(64, 64, 8, 1, wide=True)},
    },
    # 99 KiB of shared memory
    "sm_86": {
        "forward": {32: T(128, 64, 4, 3), 64: T(128, 64, 4, 2, wide=True), 128: T(128, 32, 8, 3), 256: T(32, 32, 4, 2)},
        "dq": {32: T(64, 64, 4, 3), 64: T(128, 64, 8, 2), 128: T(128, 32, 8, 2), 256: T(32, 32, 4, 1)},
        "dkv": {32: T(32, 128, 4, 2, edge_stages=1), 64: T(32, 128, 8, 2), 128: T(64, 64, 8, 2),
                256: T(32, 32, 4, 1, wide=True)},
    },
    # A pipelined edge loop makes ptxas serialise every wgmma (C7515): one stage there.
    "sm_90": {
        "forward": {32: T(128, 64, 4, 3, edge_stages=1), 64: T(128, 64, 4, 3, edge_stages=1),
                    128: T(128, 128, 8, 2, edge_stages=1), 256: T(128, 64, 8, 2, edge_stages=1, disable_licm=True)},
        "dq": {32: T(128, 64, 8, 3, edge_stages=1), 64: T(128, 64, 8, 3, edge_stages=1),
               128: T(128, 64, 8, 2, edge_stages=1), 256: T(128, 32, 8, 2, edge_stages=1)},
        "dkv": {32: T(64, 128, 8, 2, edge_stages=1), 64: T(64, 128, 8, 2, edge_stages=1),
                128: T(32, 128, 8, 2, edge_stages=1), 256: T(32, 128, 8, 1, disable_licm=True, split=True)},
    },
    "sm_100": {
        "forward": {32: T(128, 64, 4, 3), 64: T(128, 64, 4, 3), 128: T(128, 128, 8, 2, edge_stages=1),
                    256: T(128, 64, 8, 2, edge_stages=1, disable_licm=True)},
        "dq": {32: T(128, 64, 8, 2), 64: T(128, 64, 8, 2, edge_stages=1), 128: T(128, 64, 8, 2), 256: T(128, 64, 8, 1)},
        "dkv": {32: T(64, 128, 8, 2), 64: T(64, 128, 8, 2), 128: T(64, 128, 8, 1, disable_licm=True),
                256: T(64, 64, 8, 1, disable_licm=True)},
    },
    "gfx942": {
        "forward": {32: T(128, 64, 4, 1, options=_CDNA), 64: T(128, 64, 4, 1, options=_CDNA),
                    128: T(64, 64, 4, 1, options=_CDNA), 256: T(64, 32, 4, 1, options=_CDNA2)},
        "dq": {32: T(64, 64, 4, 1, options=_CDNA), 64: T(64, 64, 4, 1, options=_CDNA),
               128: T(64, 32, 4, 1, options=_CDNA), 256: T(64, 16, 4, 1, options=_CDNA)},
        "dkv": {32: T(32, 128, 4, 1, options=_CDNA), 64: T(64, 64, 4, 1, options=_CDNA2),
                128: T(32, 64, 4, 1, options=_CDNA2), 256: T(16, 64, 4, 1, options=_CDNA)},
    },
    "gfx1100": {
        "forward": {32: T(64, 32, 4, 1), 64: T(64, 32, 4, 1), 128: T(64, 16, 4, 1), 256: T(32, 16, 8, 1)},
        "dq": {32: T(64, 32, 4, 1), 64: T(64, 32, 4, 1), 128: T(32, 16, 4, 1), 256: T(16, 16, 4, 1, wide=True)},
        "dkv": {32: T(32, 64, 4, 1), 64: T(16, 32, 4, 1), 128: T(16, 32, 4, 1, split=True), 256: T(16, 16, 4, 1, split=True)},
    },
}

_HALVES["sm_120"] = {**_HALVES["sm_86"], "forward": {**_HALVES["sm_86"]["forward"], 64: T(64, 64, 4, 3)}}

# Targets that share the table of another one.
_SAME = {"sm_87": "sm_86", "sm_89": "sm_86", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120",
         "gfx90a": "gfx942", "gfx950": "gfx942", "gfx1101": "gfx1100", "gfx1102": "gfx1100"}


def arch_of(device: torch.device) -> str:
    """Target name of a device: sm_90, gfx942, ..., or "interpreter" for the CPU."""
    return _arch(device.type, device.index)


@functools.cache
def _arch(device_type: str, index: int | None) -> str:
    if device_type == "cpu":
        return "interpreter"
    if device_type != "cuda":
        return device_type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def has_tf32(arch: str) -> bool:
    """Whether Triton multiplies in TF32 on a target: NVIDIA's from sm_80, and of AMD's gfx942 alone."""
    return arch.startswith("sm_") or arch == "gfx942"


def has_tiles(arch: str) -> bool:
    """Whether the tables know a target, itself or as one that shares another's."""
    return _SAME.get(arch, arch) in _HALVES


@functools.cache
def choose(kernel: Kernel, head_dim: int, head_dim_v: int, dtype: torch.dtype, arch: str) -> T:
    """The shipped configuration of a kernel; head dims between the tables' use the next wider one."""
    widest = max(head_dim, head_dim_v)
    if not 1 <= widest <= 256:
        raise ValueError(f"head_dim: expected 1 to 256; got {widest}")
    if arch == "interpreter":  # small enough that tests cross tile edges, and not square
        return T(32, 64, 1, 1) if kernel == "dkv" else T(64, 32, 1, 1)
    if kernel == "delta":
        return T(64 if widest <= 128 else 32, 64, 4, 1)
    if dtype == torch.float64:
        return T(16, 16, 4, 1)
    if dtype == torch.float32:
        if widest > 128:
            return T(16, 16, 4, 1)
        return T(32, 32, 8 if kernel == "dkv" else 4, 1)
    table = _HALVES.get(_SAME.get(arch, arch)) or _HALVES["gfx1100" if arch.startswith("gfx") else "sm_86"]
    by_width = table[kernel]
    return by_width[next(width for width in sorted(by_width) if widest <= width)]
