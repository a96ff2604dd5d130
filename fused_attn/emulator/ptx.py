"""PTX text to instructions: syntax and scopes, and nothing of what an opcode does."""

import dataclasses
import re
from typing import NamedTuple

BYTES = {"pred": 4, **{kind + bits: int(bits) // 8 for kind in "bus" for bits in ("8", "16", "32", "64")},
         "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f32x2": 8, "f64": 8}
_LABEL = re.compile(r"([$%\w.]+)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?[%\w.]+)\s+)?([a-z][\w.:]*)\s*(.*)")
_NAME = r"(?<![\w%$.]){}(?![\w.])"


class Instruction(NamedTuple):
    """``op`` with all its modifiers, and operands as they stand in the text, their names those of the whole kernel."""

    op: str
    args: tuple[str, ...]
    predicate: str  # "%p1", "!%p1" or ""
    where: str  # file:line:column of the source, from the innermost function outwards
    text: str


@dataclasses.dataclass
class Kernel:
    """One entry of a module."""

    name: str
    params: dict[str, tuple[int, int]]  # offset and bytes
    param_bytes: int
    threads: int
    registers: dict[str, str] = dataclasses.field(default_factory=dict)  # type by name; a family %r<9> stands under "%r"
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)  # the instruction that follows
    tables: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of .branchtargets
    symbols: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)  # space and bytes of variables

    def type_of(self, register: str) -> str | None:
        """The type of a register, or None for what is no register."""
        return self.registers.get(register) or self.registers.get(re.sub(r"\d+$", "", register))


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at commas that no bracket holds together."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return (*parts, rest) if rest else tuple(parts)


def listed(operand: str) -> tuple[str, ...]:
    """The members of ``{a, b}``, or the operand itself."""
    return split_operands(operand.strip("{} ")) if operand.startswith("{") else (operand,)


def address(operand: str) -> tuple[str, int]:
    """Base and offset in bytes of ``[base + offset]``."""
    found = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
    if found is None:
        raise ValueError(f"expected an address; got {operand}")
    return found[1], int(found[2] or 0)


def parse(text: str) -> Kernel:
    """The only kernel of a module. Raises ValueError where there is none."""
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.S)
    threads = head and re.search(r"\.reqntid\s+(\d+)", head[3])
    if head is None or threads is None:
        raise ValueError("expected PTX with an .entry of a fixed number of threads")
    kernel = Kernel(head[1], *_params(head[2]), int(threads[1]))
    for space, kind, name, count in re.findall(r"\.(shared|global)\s[^;]*?\.(\w+)\s+([\w$]+)\[(\d*)\]", text[: head.start()]):
        kernel.symbols[name] = space, BYTES[kind] * int(count or 0)
    _Body(text, head.end(), kernel).read()
    return kernel


def _params(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    found, offset = {}, 0
    for line in filter(None, (x.strip() for x in text.split(","))):
        declared = re.search(r"\.(pred|[busf]\d+|bf16)\b.*?([\w$]+)(?:\[(\d+)\])?$", line)
        assert declared is not None, line
        size = BYTES[declared[1]] * int(declared[3] or 1)
        aligned = re.search(r"\.align (\d+) \.b8", line)
        step = int(aligned[1]) if aligned else BYTES[declared[1]]
        offset = -(-offset // step) * step
        found[declared[2]] = offset, size
        offset += size
    return found, offset


class _Body:
    """Reads what stands between the braces of a kernel; a block in braces has names of its own."""

    def __init__(self, text: str, at: int, kernel: Kernel) -> None:
        self.text, self.at, self.kernel = text, at, kernel
        self.scopes: list[dict[str, str]] = [{}]  # names of open blocks, to unique ones
        self.owned = 0
        self.where = ""
        self.last_label = ""

    def read(self) -> None:
        pending: list[tuple[Instruction, list[dict[str, str]]]] = []  # labels of a block may follow what uses them
        while self.scopes:
            self._skip()
            if self.text[self.at] == "{":
                self.scopes.append({})
                self.at += 1
            elif self.text[self.at] == "}":
                self.scopes.pop()
                self.at += 1
            elif found := _LABEL.match(self.text, self.at):
                self.last_label = self._own(found[1])
                self.kernel.labels[self.last_label] = len(pending)
                self.at = found.end()
            elif self.text.startswith((".loc", ".file", ".section"), self.at):
                self._note()
            elif (instruction := self._statement()) is not None:
                pending.append((instruction, self.scopes[1:]))
        self.kernel.instructions += [_renamed(instruction, scopes) for instruction, scopes in pending]

    def _skip(self) -> None:
        while True:
            if self.text[self.at].isspace() or self.text[self.at] == ";":
                self.at += 1
            elif self.text.startswith("//", self.at):
                self.at = self.text.index("\n", self.at)
            elif self.text.startswith("/*", self.at):
                self.at = self.text.index("*/", self.at) + 2
            else:
                return

    def _own(self, name: str) -> str:
        """A name that is declared here: unique in the kernel."""
        if len(self.scopes) > 1:
            self.owned += 1
            self.scopes[-1][name] = name = f"{name}.{self.owned}"
        return name

    def _note(self) -> None:
        end = self.text.index("\n", self.at)
        line = self.text[self.at : end]
        if line.startswith(".loc"):  # Triton says in a comment which functions were inlined: file:line:column @[ ... ]
            self.where = " < ".join(re.findall(r"[\w<>.-]+:\d+:\d+", line.partition("//")[2]))
        self.at = end

    def _statement(self) -> Instruction | None:
        end = self.text.index(";", self.at)
        statement = " ".join(re.sub(r"//[^\n]*", "", self.text[self.at : end]).split())
        self.at = end + 1
        if statement.startswith(".reg"):
            kind, names = statement[4:].strip()[1:].split(maxsplit=1)
            for name in names.split(","):
                self.kernel.registers[re.sub(r"<\d+>", "", self._own(name.strip()))] = kind
        elif statement.startswith(".branchtargets"):
            self.kernel.tables[self.last_label] = [name.strip() for name in statement[14:].split(",")]
        elif statement.startswith(".shared"):
            declared = re.search(r"\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?$", statement)
            assert declared is not None, statement
            self.kernel.symbols[declared[2]] = "shared", BYTES[declared[1]] * int(declared[3] or 1)
        elif not statement.startswith("."):
            found = _INSTRUCTION.fullmatch(statement)
            if found is None:
                raise ValueError(f"expected an instruction; got {statement}")
            return Instruction(found[2], split_operands(found[3]), found[1] or "", self.where, statement)
        return None


def _renamed(instruction: Instruction, scopes: list[dict[str, str]]) -> Instruction:
    names = {name: own for scope in scopes for name, own in scope.items()}
    if not names:
        return instruction
    pattern = re.compile("|".join(_NAME.format(re.escape(name)) for name in names))
    args = tuple(pattern.sub(lambda found: names[found[0]], arg) for arg in instruction.args)
    return instruction._replace(args=args, predicate=pattern.sub(lambda found: names[found[0]], instruction.predicate))
