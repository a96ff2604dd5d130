"""Small kernels written in PTX, for the emulator alone: they take the addresses of NumPy arrays."""

from collections.abc import Sequence

import numpy as np

from fused_attn.emulator import machine
from fused_attn.emulator.encode import encode
from fused_attn.emulator.ptx import parse
from fused_attn.emulator.schedule import Schedule

HEAD = """
.extern .shared .align 1024 .b8 smem[];
.visible .entry f({params}) .reqntid {threads} {{
.reg .b32 %t, %cta, %lane, %warp; .reg .b64 {pointers};
mov.u32 %t, %tid.x; mov.u32 %cta, %ctaid.x; mov.u32 %lane, %laneid; shr.u32 %warp, %t, 5;
"""


def launch(body: str, arrays: Sequence[np.ndarray], *, grid: int = 1, threads: int = 32, shared: int = 0,
           schedule: Schedule | None = None) -> machine.Result:
    """Runs ``body`` with %a0, %a1, ... the addresses of arrays, %t the thread, %lane, %warp and %cta; raises EmulatorFault."""
    params = ", ".join(f".param .u64 p{k}" for k in range(len(arrays)))
    pointers = ", ".join(f"%a{k}" for k in range(len(arrays)))
    loads = "".join(f"ld.param.b64 %a{k}, [p{k}];\n" for k in range(len(arrays)))
    text = HEAD.format(params=params, threads=threads, pointers=pointers) + loads + body + "\nret; }"
    program = encode(parse(text), (grid, 1, 1), shared)
    values = b"".join(np.uint64(x.ctypes.data).tobytes() for x in arrays)
    spans = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays]
    return machine.run(program, (grid, 1, 1), values, shared, spans, schedule or Schedule())
