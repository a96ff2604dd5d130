"""AMD's assembly text, parsed: instructions with their operands and modifiers, labels, the Python line of each."""

import dataclasses
import re

from fused_attn.emulator.schedule import UnknownInstructionError

_LABEL = re.compile(r"^(\.?[A-Za-z_][\w.$]*):")
_LOC = re.compile(r"^\s*\.loc\s[^;]*;\s*(.*)$")
_DIRECTIVE = re.compile(r"^\s*\.amdhsa_(\w+)\s+(\d\w*)", re.MULTILINE)
_ARGUMENT = re.compile(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)")
_MODIFIER = re.compile(r"^(?P<name>[a-z_]\w*)(?::(?P<value>\[[^]]*]|\w+\([^)]*\)|-?\w+))?$")
_HALF = re.compile(r"^(.*\bv\d+)\.([lh])(\|?)$")
# What may stand behind the operands. Everything else is an operand.
_MODIFIERS = frozenset((
    "offset", "offset0", "offset1", "offen", "idxen", "glc", "slc", "dlc", "sc0", "sc1", "nt", "lds",
    "clamp", "mul", "div", "op_sel", "op_sel_hi", "neg_lo", "neg_hi", "dst_sel", "dst_unused",
    "src0_sel", "src1_sel", "cbsz", "abid", "blgp", "quad_perm", "row_shl", "row_shr", "row_ror", "row_mirror",
    "row_half_mirror", "row_bcast", "row_newbcast", "row_share", "row_xmask", "wave_shl", "wave_shr", "wave_ror",
    "wave_rol", "row_mask", "bank_mask", "bound_ctrl", "fi", "bitop3"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``op`` without the suffix of its encoding, which is ``form``: "", "e32", "e64", "sdwa", "dpp"; ``second``: the other half
    of a dual one."""

    op: str
    form: str
    operands: tuple[str, ...]
    modifiers: dict[str, str]
    text: str
    where: str
    second: "Instruction | None" = None


@dataclasses.dataclass
class Kernel:
    """One kernel of a module. ``arguments``: (offset, bytes) in the order of the parameters; ``hidden``: what else it is told
    behind them, by name."""

    name: str
    arch: str
    arguments: list[tuple[int, int]]
    argument_bytes: int
    hidden: dict[str, tuple[int, int]]
    directives: dict[str, int]
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def lanes(self) -> int:
        """Of a wave."""
        return 32 if self.directives.get("wavefront_size32") else 64


def parse(text: str) -> Kernel:
    """The kernel of a module's assembly text."""
    arch = re.search(r'amdgcn_target "[^"]*-(\w+)', text)
    name = re.search(r"^\s*\.amdhsa_kernel (\S+)", text, re.MULTILINE)
    if arch is None or name is None:
        raise ValueError("expected the assembly text of an AMD kernel")
    directives = {name: int(number, 0) for name, number in _DIRECTIVE.findall(text)}
    section = text[text.index(".amdgpu_metadata") :]
    described = section[section.index(".args:") :].split(".group_segment_fixed_size")[0]
    arguments = [(kind, (int(offset), int(size))) for offset, size, kind in _ARGUMENT.findall(described)]
    hidden = {kind.removeprefix("hidden_"): place for kind, place in arguments if kind.startswith("hidden_")}
    places = [place for kind, place in arguments if not kind.startswith("hidden_")]
    kernel = Kernel(name[1], arch[1], places, directives["kernarg_size"], hidden, directives)
    where = "?"
    body = text[re.search(rf"^{re.escape(name[1])}:", text, re.MULTILINE).start() :]  # type: ignore[union-attr]
    for line in body.split("\n"):
        if line.lstrip().startswith((".section", ".end_amdhsa", ".Lfunc_end")):
            break
        if found := _LOC.match(line):
            where = " < ".join(re.findall(r"[\w./-]+:\d+:\d+", found[1])) or where
        if found := _LABEL.match(line):
            kernel.labels[found[1]] = len(kernel.instructions)
            line = line[found.end() :]
        line = line.split(";")[0].strip()
        if line and not line.startswith((".", "//", "/*")):
            kernel.instructions.append(_instruction(line, where))
    return kernel


def _instruction(line: str, where: str) -> Instruction:
    if "::" in line:
        first, second = (_instruction(part.strip(), where) for part in line.split("::"))
        return dataclasses.replace(first, text=line, second=second)
    op, _, rest = line.partition(" ")
    op, form = "v_" + op.removeprefix("v_dual_") if op.startswith("v_dual_") else op, ""
    while found := re.search(r"_(e32|e64|sdwa|dpp|dpp8)$", op):
        op, form = op[: found.start()], f"{found[1]}_{form}".rstrip("_")
    if op == "s_delay_alu" or op.startswith("s_waitcnt"):
        return Instruction(op, form, (rest.strip(),), {}, line, where)
    operands: list[str] = []
    modifiers: dict[str, str] = {}
    for part in _split(rest):
        words = _words(part)
        while words and (found := _MODIFIER.match(words[-1])) and found["name"] in _MODIFIERS:
            modifiers[found["name"]] = found["value"] or "1"
            words.pop()
        if words:
            operands.append(" ".join(words))
    if any(map(_HALF.match, operands)):
        if "op_sel" in modifiers or not op.startswith("v_"):
            raise UnknownInstructionError(f"halves of registers in {line}")
        operands, modifiers["op_sel"] = _halves(operands)
    return Instruction(op, form, tuple(operands), modifiers, line, where)


def _halves(operands: list[str]) -> tuple[list[str], str]:
    """Operands that name halves of registers (``v1.h``, as LLVM writes them for RDNA 3 from Triton 3.9 on) as whole ones, and
    the op_sel that says the same: a bit for every source, then one for the destination."""
    found = [_HALF.match(operand) for operand in operands]
    upper = [int(half is not None and half[2] == "h") for half in found]
    whole = [half[1] + half[3] if half else operand for half, operand in zip(found, operands, strict=True)]
    return whole, str([*upper[1:], upper[0]])


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _words(text: str) -> list[str]:
    """At the spaces that are in no brackets."""
    words, depth, word = [], 0, ""
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == " " and depth == 0:
            words.append(word)
            word = ""
        else:
            word += letter
    return [each for each in (*words, word) if each]
