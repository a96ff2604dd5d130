"""The CUDA driver without a card: its C (cuda.c), compiled at the first use, and its structures as Python sees them.

Only a process of its own loads it: every libcuda.so.1 that is asked for after it is this one.
"""

import ctypes
import functools
import hashlib
import os
import struct
import subprocess
import tempfile
from pathlib import Path

import triton

from fused_attn.emulator.machine import compiler

SOURCES = Path(__file__).parent
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # NVIDIA's cuda.h
FLAGS = ("-O1", "-Wall", "-Werror=implicit-function-declaration", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
# Map in tensormap.h: address; type, rank, swizzle, interleave, promotion, fill; dims, strides and box, the innermost first
MAP = struct.Struct("<Q6B2x5Q4Q5H")


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (*((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("n_attributes", ctypes.c_uint))


def built() -> Path:
    """The compiled libcuda.so.1, kept beside Triton's own cache. Raises RuntimeError where it cannot be compiled."""
    written = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    parts = (*(path.read_bytes() for path in written), *(part.encode() for part in (compiler(), str(INCLUDE), *FLAGS)))
    path = Path(triton.knobs.cache.dir) / f"fused_attn-stub-{hashlib.sha256(b''.join(parts)).hexdigest()[:32]}" / "libcuda.so.1"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            command = (compiler(), *FLAGS, "-I", str(INCLUDE), str(SOURCES / "cuda.c"), "-o", str(fresh))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{compiler()} could not compile the stub: {done.stderr.strip()[-500:]}")
            fresh.replace(path)
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The driver of this process and of all that Triton loads into it."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(built().parent)
    loaded = ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
    loaded.stub_record.restype = ctypes.c_char_p
    return loaded


def refusal(code: int) -> str:
    """Why the driver refused; "ok" of a success."""
    text = ctypes.c_char_p()
    library().cuGetErrorString(code, ctypes.byref(text))
    assert text.value is not None
    return text.value.decode() if code else "ok"
