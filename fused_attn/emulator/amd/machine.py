"""Runs a kernel's programs: wave after wave up to a barrier, in an order that a seed gives, held to what was waited for."""

import ctypes
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fused_attn.emulator.amd import matrix, memory, scalar, vector
from fused_attn.emulator.amd.operands import ref
from fused_attn.emulator.amd.state import Array, Memory, Shared, Wave
from fused_attn.emulator.amd.text import Instruction, Kernel
from fused_attn.emulator.schedule import EmulatorFault, Schedule, UnknownInstructionError

_FUEL = 20_000_000  # instructions of one program
# What a kernel may be given in scalar registers before the address of its arguments, and in how many. None of ours reads it.
_BEFORE_ARGUMENTS = {"private_segment_buffer": 4, "dispatch_ptr": 2, "queue_ptr": 2}
_BARRIER, _END = -1, -2
_COUNT = np.dtype([("runs", np.int64)])
Reach = Callable[[Wave, Memory, Shared], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel, encoded: what each instruction does, and the registers that it must not touch while they are awaited."""

    kernel: Kernel
    steps: list[Reach]
    registers: list[frozenset[int]]
    filled: list[tuple[str, frozenset[int]] | None]  # by a load: its queue, in whose order it fills registers


@dataclasses.dataclass
class Result:
    """What one launch did: how often each instruction ran."""

    program: Program
    counts: Array
    seconds: float
    programs: int


def encode(kernel: Kernel) -> Program:
    """Raises UnknownInstructionError for an instruction that the emulator does not have."""
    steps, registers, filled = [], [], []
    for instruction in kernel.instructions:
        try:
            steps.append(_step(instruction, kernel))
            queue = memory.fills(instruction)
            registers.append(_registers(instruction, instruction.operands[1:] if queue else instruction.operands))
            filled.append((queue, frozenset(ref(instruction.operands[0]).registers())) if queue else None)
        except UnknownInstructionError as error:
            raise UnknownInstructionError(f"{kernel.arch}: {error}, at {instruction.where}: {instruction.text}") from None
    return Program(kernel, steps, registers, filled)


def _step(instruction: Instruction, kernel: Kernel) -> Reach:
    op, lanes = instruction.op, kernel.lanes
    if op == "s_barrier":
        return lambda wave, memory, shared: _BARRIER
    if op == "s_endpgm":
        return lambda wave, memory, shared: _END
    if reaching := memory.encode(instruction, kernel.arch, lanes):
        return reaching
    step: Any = None
    if op.startswith("s_"):
        step = scalar.encode(instruction, kernel.labels, lanes)
    elif op.startswith("v_"):
        step = matrix.encode(instruction, lanes) or vector.encode(instruction, lanes, kernel.arch)
    if step is None:
        raise UnknownInstructionError(op)
    return lambda wave, memory, shared: step(wave)


def _registers(instruction: Instruction, operands: tuple[str, ...]) -> frozenset[int]:
    """Of these operands, and of the other half of a dual instruction."""
    found: set[int] = set()
    for operand in operands:
        for text in (operand, operand.partition("(")[2].rstrip(")")):
            try:
                found |= ref(text.strip()).registers()
            except UnknownInstructionError:  # a label, "off", a wait: none
                continue
    second = instruction.second
    return frozenset(found | (_registers(second, second.operands) if second else set()))


def run(program: Program, grid: tuple[int, int, int], arguments: bytes, warps: int, shared_bytes: int,
        spans: list[tuple[int, int]], schedule: Schedule) -> Result:
    """Runs every program of a grid. Raises EmulatorFault."""
    start, kernel = time.perf_counter(), program.kernel
    given = bytearray(arguments)
    sizes = {f"block_count_{axis}": grid[i] for i, axis in enumerate("xyz")} | {"group_size_x": warps * kernel.lanes}
    for name, (offset, size) in kernel.hidden.items():
        number = sizes.get(name, 1 if name in ("group_size_y", "group_size_z", "grid_dims") else 0)
        given[offset : offset + size] = number.to_bytes(size, "little")
    held = ctypes.create_string_buffer(bytes(given), len(given))
    tensors = Memory([*spans, (ctypes.addressof(held), ctypes.addressof(held) + len(given))])
    tensors.exchanges = any("cmpswap" in instruction.op for instruction in kernel.instructions)
    random = np.random.default_rng(schedule.seed)
    counts = np.zeros(len(kernel.instructions), _COUNT)
    lds = -(-(shared_bytes + kernel.directives["group_segment_fixed_size"]) // 4) * 4
    with np.errstate(all="ignore"):
        for number in random.permutation(grid[0] * grid[1] * grid[2]):
            tensors.program = int(number)
            place = int(number) % grid[0], int(number) // grid[0] % grid[1], int(number) // (grid[0] * grid[1])
            waves = [_wave(kernel, i, place, ctypes.addressof(held)) for i in range(warps)]
            _run(program, waves, tensors, Shared(lds), random, counts["runs"])
    return Result(program, counts, time.perf_counter() - start, grid[0] * grid[1] * grid[2])


def _wave(kernel: Kernel, number: int, place: tuple[int, int, int], arguments: int) -> Wave:
    directives = kernel.directives
    wave = Wave(number, kernel.lanes, directives["private_segment_fixed_size"])
    before = sum(count * directives.get(f"user_sgpr_{name}", 0) for name, count in _BEFORE_ARGUMENTS.items())
    wave.write_scalar(before, arguments, 2)
    next_scalar = directives["user_sgpr_count"]
    for axis, index in zip("xyz", place, strict=True):
        if directives[f"system_sgpr_workgroup_id_{axis}"]:
            wave.write_scalar(next_scalar, index, 1)
            next_scalar += 1
    wave.v[0] = np.arange(kernel.lanes, dtype=np.uint32) + np.uint32(number * kernel.lanes)
    return wave


def _run(program: Program, waves: list[Wave], tensors: Memory, shared: Shared, random: Any, runs: Array) -> None:
    running = list(waves)
    fuel = _FUEL
    while running:
        waiting = []
        for i in random.permutation(len(running)):
            wave = running[i]
            stopped, fuel = _turn(program, wave, tensors, shared, runs, fuel)
            if stopped == _BARRIER:
                waiting.append(wave)
        shared.pass_barrier(waiting)
        running = waiting


def _turn(program: Program, wave: Wave, tensors: Memory, shared: Shared, runs: Array, fuel: int) -> tuple[int, int]:
    """Until a barrier or the end."""
    steps, registers, filled, pc = program.steps, program.registers, program.filled, wave.pc
    try:
        while True:
            if wave.awaited:
                load = filled[pc]
                if not wave.awaited.isdisjoint(registers[pc]) or (
                        load is not None and not load[1].isdisjoint(wave.awaited_from_others(load[0]))):
                    raise EmulatorFault("touches a register that a memory operation fills, with no s_waitcnt between")
            went = steps[pc](wave, tensors, shared)
            runs[pc] += 1
            fuel -= 1
            if went is None:
                pc += 1
            elif went < 0:
                wave.pc = pc + 1
                return went, fuel
            else:
                pc = went
            if fuel < 0:
                raise EmulatorFault(f"no end after {_FUEL} instructions")
    except (EmulatorFault, UnknownInstructionError) as fault:
        instruction = program.kernel.instructions[pc]
        raise type(fault)(f"{program.kernel.name}: {fault}, in wave {wave.number} of program {tensors.program}, at "
                          f"{instruction.where}: {instruction.text}") from None
