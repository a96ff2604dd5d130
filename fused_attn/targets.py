"""What kernels are compiled for, by name: sm_90, gfx942, and by which Triton."""

import functools

import torch

from fused_attn import settings


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
    """Major and minor: what compiles on one may spill, or fail, on another."""
    import triton  # here: a machine without it still reads the tables

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def triton_name() -> str:
    """Major and minor as one writes them, "3.7"."""
    return ".".join(map(str, triton_version()))


def has_tf32(arch: str) -> bool:
    """Whether Triton multiplies in TF32 on a target: NVIDIA's from sm_80, and of AMD's gfx942 alone."""
    return arch.startswith("sm_") or arch == "gfx942"


def has_tf32x3(arch: str) -> bool:
    """Whether Triton multiplies fp32 as three TF32 products on a target."""
    return arch.startswith("sm_")
