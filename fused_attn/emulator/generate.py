"""The part of the machine's C that the table of opcodes gives: their numbers, and a case of a switch for each."""

from fused_attn.emulator import opcodes
from fused_attn.emulator.encode import HANDLERS

_WORD = {4: "u32", 8: "u64"}


def header() -> str:
    """ops.h: what machine.c includes."""
    names = ", ".join(f"{name} = {len(opcodes.table()) + k}" for k, name in enumerate(HANDLERS))
    cases = " \\\n".join(_case(number, op) for number, op in enumerate(opcodes.table()))
    return f"enum {{ {names} }};\n#define approx(v) perturbed(m, v)\n#define ARITHMETIC \\\n{cases}\n"


def _case(number: int, op: opcodes.Op) -> str:
    if op.types[0] in opcodes.PAIRS:
        return _case_of_pairs(number, op)
    out, *operands = op.types
    declared = "".join(f"const {_word(kind)} *p{k} = OPERAND({_word(kind)}, {k + 1}); " for k, kind in enumerate(operands))
    values = "".join(_value(kind, name, f"p{k}[l]") for k, (kind, name) in enumerate(zip(operands, "abce", strict=False)))
    word, c_type = _word(out), _type(out)
    return (f"case {number}: {{ {word} *d = OPERAND({word}, 0); {declared}"
            f"LANES {{ {values}{c_type} v = ({c_type})({op.expression}); "
            f"{word} y = {opcodes.LANES[out][2]}; d[l] = on[l] ? y : d[l]; }} break; }}")


def _case_of_pairs(number: int, op: opcodes.Op) -> str:
    """Two numbers to a word, each computed by itself."""
    kind = opcodes.PAIRS[op.types[0]]
    word, bits = ("u64", 32) if kind == "f32" else ("u32", 16)
    operands = op.types[1:]
    declared = "".join(f"const {word} *p{k} = OPERAND({word}, {k + 1}); " for k in range(len(operands)))
    values = "".join(_value(kind, name, f"(u32)(p{k}[l] >> {bits} * h & {hex(2**bits - 1)})")
                     for k, (name, _) in enumerate(zip("abce", operands, strict=False)))
    half = f"{values}{_type(kind)} v = ({_type(kind)})({op.expression}); y |= ({word}){opcodes.LANES[kind][2]} << {bits} * h;"
    return (f"case {number}: {{ {word} *d = OPERAND({word}, 0); {declared}"
            f"LANES {{ {word} y = 0; for (int h = 0; h < 2; h++) {{ {half} }} d[l] = on[l] ? y : d[l]; }} break; }}")


def _word(kind: str) -> str:
    return _WORD[opcodes.lane_bytes(kind)]


def _type(kind: str) -> str:
    return opcodes.C_TYPE.get(kind, kind)


def _value(kind: str, name: str, stored: str) -> str:
    return f"{_type(kind)} {name} = ({{ {_word(kind)} x = {stored}; {opcodes.LANES[kind][1]}; }}); "
