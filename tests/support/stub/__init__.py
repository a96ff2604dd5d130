"""The CUDA driver without a card: its C (cuda.c), compiled at the first use, and its structures as Python sees them.

Only a process of its own loads it: every libcuda.so.1 that is asked for after it is this one.
"""

import ctypes
import functools
import os
import struct
from pathlib import Path

import triton

from fused_attn.emulator.build import built

INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # NVIDIA's cuda.h
FLAGS = ("-O1", "-Wall", "-Werror=implicit-function-declaration", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
         "-I", str(INCLUDE))
# Map in tensormap.h: address; type, rank, swizzle, interleave, promotion, fill; dims, strides and box, the innermost first
MAP = struct.Struct("<Q6B2x5Q4Q5H")


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (*((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("n_attributes", ctypes.c_uint))


@functools.cache
def library() -> ctypes.CDLL:
    """The driver of this process and of all that Triton loads into it."""
    path = built("libcuda.so.1", Path(__file__).with_name("cuda.c"), FLAGS, {})
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    loaded.stub_record.restype = ctypes.c_char_p
    return loaded


def refusal(code: int) -> str:
    """Why the driver refused; "ok" of a success."""
    text = ctypes.c_char_p()
    library().cuGetErrorString(code, ctypes.byref(text))
    assert text.value is not None
    return text.value.decode() if code else "ok"
