"""Reading machine code: instructions, main loops, and what of them can be counted without running anything.

NVIDIA's comes from nvdisasm, which ships with Triton, AMD's from the compiler's assembly. A *main loop* is an innermost loop
that multiplies matrices (in a kernel without matrix instructions: with fused multiply-adds), a natural loop of the control
flow: a wait that is spun on out of line, or a setmaxnreg that is tried again, branches backward too but is no main loop.
A warp-specialised kernel has one main loop or several in every consumer.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

# What an instruction is for, by its opcode; the first match counts. "exp2" is all that the special function unit does. What
# matches nothing ("other": uniform registers, constants, branches) takes an issue slot and nothing else that is counted.
FAMILIES = {
    "tensor": r"HGMMA|HMMA|DMMA|UTC\w*MMA|v_mfma|v_wmma",
    "local": r"LDL|STL|scratch_",
    "exp2": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "shuffle": r"SHFL|REDUX|ds_b?permute|ds_swizzle|v_permlane",
    "tensor memory": r"LDTM|STTM|UTCCP",
    "shared": r"LDS|STS|ATOMS|ds_",
    "global": r"LDG(?!DEP)|STG|LD\.|ST\.|RED|ATOM|UTMA|UBLK|buffer_|global_|flat_",
    "sync": r"BAR|SYNCS|WARPGROUP|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|UTCBAR|s_barrier|s_waitcnt",
    "fma": r"FFMA|FMUL|FADD|IMAD|HFMA2|HMUL2|HADD2|DFMA|DMUL|DADD|v_(pk_)?(fma|fmac|mul|add|sub|subrev)_f\d\d|v_dot2",
    "alu": r"IADD|ISETP|FSETP|FSEL|SEL|FMNMX|IMNMX|VIMNMX|VIADD|LOP3|PLOP3|SHF|LEA|PRMT|MOV|F2|I2|SGXT|BMSK|P2R|R2P\b|IABS|v_",
}
_FAMILY = re.compile("|".join(f"(?P<{name.replace(' ', '_')}>{opcodes})" for name, opcodes in FAMILIES.items()))
_FMA = re.compile(r"FFMA|DFMA|v_fma_f32|v_fmac_f32|v_pk_fma_f32|v_dot2|v_fma_f64")
_NO_RESULT = re.compile(r"\w*SETP|PLOP3|HGMMA|BAR|BRX|WARP|NANOSLEEP|RET|VOTE")  # their first register is only read


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction as printed: ``op`` with its modifiers, its operands, and "" or the predicate that may skip it."""

    op: str
    args: str = ""
    predicate: str = ""

    @property
    def family(self) -> str:
        """Its key in ``FAMILIES``, or "other"; an instruction that is never executed is "other" as well."""
        found = _FAMILY.match(self.op) if self.predicate != "!PT" else None
        return str(found.lastgroup).replace("_", " ") if found and found.lastgroup else "other"

    def written(self) -> set[int]:
        """Vector registers that it gives a new value, by number (NVIDIA; matrix instructions, which order themselves, none)."""
        first = re.match(r"\s*(?:!?U?P[T\d]\w*,\s*)*R(\d+)", self.args)
        if first is None or _NO_RESULT.match(self.op):
            return set()
        wide = 1
        if several := re.search(r"\.x(\d+)", self.op):
            wide = int(several.group(1))
        elif ".128" in self.op or (self.op.startswith("LDSM") and ".4" in self.op):
            wide = 4
        elif re.match(r"CS2R(?!.*\.32)|FFMA2|FMUL2|FADD2|D(ADD|MUL|FMA)|IMAD\.WIDE|LDSM.*\.2|(?!SHF).*\.64", self.op):
            wide = 2
        return set(range(int(first.group(1)), int(first.group(1)) + wide))


@dataclasses.dataclass(frozen=True)
class Listing:
    """The instructions of a kernel in the order of their addresses; ``labels`` names positions among them."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def successors(self, index: int) -> list[int]:
        """Where the instruction at ``index`` may lead."""
        instruction = self.instructions[index]
        op, args = instruction.op, instruction.args
        jumps = bool(re.match(r"BRA|BRX|CALL|s_c?branch", op))
        targets = [self.labels[name] for name in re.findall(r"\.L\w+", args) if name in self.labels] if jumps else []
        ends = not instruction.predicate and (
            op in ("s_branch", "s_endpgm") or re.match(r"EXIT|RET|BRX", op)
            or (op == "BRA" and args.lstrip().startswith("`")) or (op.startswith("CALL") and targets))
        return targets if ends else [*targets, *([index + 1] if index + 1 < len(self.instructions) else [])]

    def main_loops(self) -> list["Loop"]:
        """The innermost loops that multiply matrices, in the order of their addresses.

        What lies behind a loop's last branch back, such as a wait that is spun on, is no part of it.
        """
        matrix = any(x.family == "tensor" for x in self.instructions)
        busy: list[list[int]] = []
        for members, last in _natural_loops(self):
            body = [index for index in members if index <= last]
            here = [self.instructions[index] for index in body]
            multiplies = any(x.family == "tensor" if matrix else _FMA.match(x.op) for x in here)
            if multiplies and not any(x.op.startswith("USETMAXREG") for x in here):
                busy.append(body)
        inner = [a for a in busy if not any(b is not a and set(b) < set(a) for b in busy)]
        return [Loop(tuple(self.instructions[i] for i in body), tuple(self._shape(i) for i in body)) for body in sorted(inner)]

    def _shape(self, index: int) -> tuple[int, int, int] | None:
        """(M, N, K) of one matrix instruction, or None. tcgen05's M and N stand in its instruction descriptor, a constant."""
        op, args = self.instructions[index].op, self.instructions[index].args
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)|v_(?:mfma|wmma)_\w+?_(\d+)x(\d+)x(\d+)", op):
            m, n, k = (int(x) for x in found.groups() if x is not None)
            return m, n, k
        if op.startswith("HMMA.168"):
            return 16, 8, int(op[8:].split(".")[0])
        if found := re.search(r"idesc\[UR(\d+)\]", args):
            written = (x for x in reversed(self.instructions[:index]) if re.match(rf"UR{found.group(1)},", x.args))
            last = next(written, Instruction(""))
            if value := re.search(r", (0x[0-9a-f]+)$", last.args if last.op == "UMOV" else ""):
                bits = int(value.group(1), 16)
                return (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8, 16
        return None


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of one main loop in the order of their addresses, both sides of a branch in it; ``shapes`` holds
    (M, N, K) of those that multiply matrices, where it is known."""

    instructions: tuple[Instruction, ...]
    shapes: tuple[tuple[int, int, int] | None, ...] = ()

    def count(self) -> Counter[str]:
        """How many instructions of each family there are, for one warp and one iteration."""
        return Counter(x.family for x in self.instructions)

    def exp2_under_wgmma(self) -> float | None:
        """The share of exp2 issued while a warpgroup's own wgmma is in flight, or None without wgmma or exp2.

        The loop is read twice, so that what one iteration leaves in flight counts for the next. ``gsb0`` closes a group of
        HGMMA; ``WARPGROUP.DEPBAR n`` waits until at most n groups are in flight.
        """
        flying, counted = 0, []
        for turn in range(2):
            for x in self.instructions:
                if x.op.startswith("HGMMA"):
                    flying += "gsb0" in x.args
                elif x.op.startswith("WARPGROUP.DEPBAR"):
                    flying = min(flying, _left_in_flight(x))
                elif turn and x.op.startswith("MUFU.EX2"):
                    counted.append(flying > 0)
        return sum(counted) / len(counted) if counted and any(x.op.startswith("HGMMA") for x in self.instructions) else None

    def hazards(self) -> int:
        """Instructions that write a register which a wgmma in flight may still read as its A operand (none may).

        The loop is read twice, as above.
        """
        groups: list[set[int]] = []
        open_group: set[int] = set()
        found = set()
        for index, x in [*enumerate(self.instructions)] * 2:
            if x.op.startswith("HGMMA"):
                if operand := re.match(r"\s*R\d+,\s*R(\d+),\s*gdesc", x.args):
                    open_group |= set(range(int(operand.group(1)), int(operand.group(1)) + 4))
                if "gsb0" in x.args:
                    groups, open_group = [*groups, open_group], set()
            elif x.op.startswith("WARPGROUP.DEPBAR"):
                groups = groups[max(0, len(groups) - _left_in_flight(x)) :]
            elif x.written() & open_group.union(*groups):
                found.add(index)
        return len(found)

    def wide_barriers(self, threads: int) -> int:
        """Barriers at which all ``threads`` of the program meet; named ones of fewer do not count."""
        met = 0
        for x in self.instructions:
            if x.op.startswith(("BAR.SYNC", "BAR.RED")):
                expected = x.args.partition(",")[2].strip()  # none: all threads; in a register: not known, taken for fewer
                met += not expected or (expected.startswith("0x") and int(expected, 16) >= threads)
            met += x.op == "s_barrier"
        return met


def _left_in_flight(wait: Instruction) -> int:
    """How many groups a wait leaves in flight: 1 for ``WARPGROUP.DEPBAR.LE gsb0, 0x1``."""
    return int(wait.args.split(",")[1].strip(), 16)


def _natural_loops(listing: Listing) -> list[tuple[list[int], int]]:
    """(positions in order, position of the last branch back) of each loop: an edge to a block that dominates its source, and
    all that reaches the edge without passing that block."""
    n = len(listing.instructions)
    follow = [listing.successors(index) for index in range(n)]
    starts = sorted({0, *listing.labels.values(), *(i + 1 for i in range(n) if follow[i] != [i + 1])} & set(range(n)))
    ends = [*(start - 1 for start in starts[1:]), n - 1]
    block = {start: number for number, start in enumerate(starts)}
    after = [[block[target] for target in follow[end]] for end in ends]
    before: list[list[int]] = [[] for _ in starts]
    for number, targets in enumerate(after):
        for target in targets:
            before[target].append(number)

    # Dominators as bit masks. Whatever nothing leads to (behind a jump by register) is an entry, too.
    everything = (1 << len(starts)) - 1
    dominators = [1 << b if b == 0 or not before[b] else everything for b in range(len(starts))]
    changed = True
    while changed:
        changed = False
        for b in range(1, len(starts)):
            if before[b]:
                common = everything
                for source in before[b]:
                    common &= dominators[source]
                changed |= dominators[b] != common | 1 << b
                dominators[b] = common | 1 << b

    bodies: dict[int, set[int]] = {}
    last: dict[int, int] = {}
    for source, targets in enumerate(after):
        for head in targets:
            if dominators[source] >> head & 1:
                body, work = bodies.setdefault(head, {head}), [source]
                # where the loop is laid out with its head behind its end, nothing tells what else lies out of line
                last[head] = max(last.get(head, 0), ends[source] if source >= head else n)
                while work:
                    b = work.pop()
                    if b not in body:
                        body.add(b)
                        work += before[b]
    return [([i for b in sorted(body) for i in range(starts[b], ends[b] + 1)], last[head]) for head, body in bodies.items()]


def parse_nvidia(text: str) -> Listing:
    """Parses what ``nvdisasm -c`` prints."""
    line = re.compile(r"^[ \t]*(?:(\.L_\w+):|/\*[0-9a-f]+\*/ +(?:@(!?U?P\w+) +)?([A-Z][\w.]*)(.*))", re.M)
    return _listing((label, op, args.rstrip(" ;").lstrip(), predicate) for label, predicate, op, args in line.findall(text))


def parse_amd(text: str) -> Listing:
    """Parses AMD's assembly as the compiler prints it; only conditional branches have a predicate, the condition's name."""
    line = re.compile(r"^(?:(\.LBB\w+):|[ \t]+([a-z]\w+)[ \t]*([^;\n]*))", re.M)
    return _listing((label, op, args.strip(), op[9:] if op.startswith("s_cbranch_") else "")
                    for label, op, args in line.findall(text))


def _listing(lines: Iterable[tuple[str, str, str, str]]) -> Listing:
    instructions: list[Instruction] = []
    labels = {}
    for label, *instruction in lines:
        if label:
            labels[label] = len(instructions)
        else:
            instructions.append(Instruction(*instruction))
    return Listing(tuple(instructions), labels)


@dataclasses.dataclass(frozen=True)
class Binary:
    """One compiled kernel: registers a thread, bytes of local memory written by each, ptxas's C75xx warnings, threads a
    program, and its instructions."""

    registers: int
    spill_bytes: int
    warnings: tuple[str, ...]
    threads: int
    listing: Listing


def read(compiled: Any, log: str, target: str) -> Binary:
    """Reads what Triton compiled for ``target``; ``log`` is what ptxas printed."""
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s*(\d+)\s*$", assembly, re.M)}
        return Binary(field["vgpr_count"], field["private_segment_fixed_size"], (), field["max_flat_workgroup_size"],
                      parse_amd(assembly))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    return Binary(
        registers=int(re.findall(r"Used (\d+) registers", log)[-1]),
        spill_bytes=int(re.findall(r"(\d+) bytes spill stores", log)[-1]),
        warnings=tuple(sorted(set(re.findall(r"C75\d\d", log)))),
        threads=int(re.findall(r"\.reqntid (\d+)", compiled.asm["ptx"])[-1]),
        listing=parse_nvidia(text))


def opcodes(instructions: Sequence[Instruction], family: str | None = None) -> dict[str, int]:
    """How often each opcode occurs, commonest first: whole opcodes of one family, or all opcodes without their modifiers."""
    names = (x.op if family else x.op.split(".")[0] for x in instructions if family in (None, x.family))
    return dict(Counter(names).most_common())
