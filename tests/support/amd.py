"""Lines of AMD's assembly, executed on waves whose registers a test sets."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fused_attn.emulator.amd import machine
from fused_attn.emulator.amd.state import Memory, Shared, Wave, to_bits
from fused_attn.emulator.amd.text import Kernel, _instruction
from fused_attn.emulator.schedule import Schedule

DIRECTIVES = {"user_sgpr_count": 2, "user_sgpr_kernarg_segment_ptr": 1, "group_segment_fixed_size": 0,
              "private_segment_fixed_size": 64, "system_sgpr_workgroup_id_x": 1, "system_sgpr_workgroup_id_y": 0,
              "system_sgpr_workgroup_id_z": 0}


def kernel(lines: str, arch: str) -> Kernel:
    """A kernel of these lines; a label stands on a line of its own."""
    found = Kernel("f", arch, [], 0, {}, {**DIRECTIVES, "wavefront_size32": int(not arch.startswith("gfx9"))})
    for line in filter(None, map(str.strip, lines.split("\n"))):
        if line.endswith(":"):
            found.labels[line[:-1]] = len(found.instructions)
        else:
            found.instructions.append(_instruction(line, "here:1:1"))
    found.instructions.append(_instruction("s_endpgm", "here:1:1"))
    return found


def execute(lines: str, v: Mapping[int, Any] | None = None, s: Mapping[int, int] | None = None, arch: str = "gfx942",
            active: Any = None, scc: bool = False, shared: Shared | None = None, tensors: tuple[Any, ...] = ()) -> Wave:
    """The wave after it ran; ``v``: 32-bit words [lanes] by register, ``active`` [lanes] of bool."""
    program = machine.encode(kernel(lines, arch))
    wave = Wave(0, program.kernel.lanes, 64)
    for register, words in (v or {}).items():
        words = np.uint32(words) if isinstance(words, int) else np.ascontiguousarray(words).view(np.uint32)
        wave.v[register] = np.broadcast_to(words, wave.lanes)
    for register, word in (s or {}).items():
        wave.write_scalar(register, word & 0xFFFFFFFF, 1)
    if active is not None:
        wave.write_scalar(126, to_bits(np.asarray(active)), 2)
    wave.scc = scc
    memory = Memory([(x.ctypes.data, x.ctypes.data + x.nbytes) for x in tensors])
    with np.errstate(all="ignore"):
        machine._turn(program, wave, memory, shared or Shared(4096), np.zeros(len(program.steps), np.int64), 10_000)
    return wave


def launch(lines: str, *tensors: Any, arch: str = "gfx942", waves: int = 1, grid: int = 1, shared: int = 0) -> machine.Result:
    """Runs a kernel that finds the addresses of tensors in s[4:5], s[6:7], ..., its wave's threads in v0, the program in s2."""
    count = 2 * len(tensors)
    loads = "\n".join(f"s_load_dwordx2 s[{4 + 2 * i}:{5 + 2 * i}], s[0:1], {8 * i}" for i in range(len(tensors)))
    program = machine.encode(kernel(f"{loads}\ns_waitcnt lgkmcnt(0)\n{lines}" if count else lines, arch))
    arguments = b"".join(np.uint64(x.ctypes.data).tobytes() for x in tensors) or b"\0" * 8
    spans = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in tensors]
    return machine.run(program, (grid, 1, 1), arguments, waves, shared, spans, Schedule())
