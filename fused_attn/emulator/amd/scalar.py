"""Scalar instructions: arithmetic on a wave's scalar registers, comparisons, branches."""

import re
from collections.abc import Callable
from typing import Any

from fused_attn.emulator.amd.operands import ref, scalar
from fused_attn.emulator.amd.state import EXEC, VCC, Wave
from fused_attn.emulator.amd.text import Instruction
from fused_attn.emulator.schedule import UnknownInstructionError

Step = Callable[[Wave], int | None]
_WORD = 0xFFFFFFFF


def _signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 & 1 else x


def _field(x: int, how: int, bits: int) -> tuple[int, int]:
    """(field, its width) that s_bfe cuts out of x: offset in the lower bits, width from bit 16 on."""
    width = how >> 16 & 0x7F
    return x >> (how & bits - 1) & (1 << width) - 1, width


def _bfe_signed(x: int, how: int, bits: int) -> int:
    found, width = _field(x, how, bits)
    return _signed(found, width) if width else 0


# Of two operands, with the carry: (result, SCC or None to leave it). Results are cut to their bits.
_TWO: dict[str, Callable[[int, int, int, bool], tuple[int, bool | None]]] = {
    "add_u": lambda a, b, n, c: (a + b, a + b >= 1 << n),
    "addc_u": lambda a, b, n, c: (a + b + c, a + b + c >= 1 << n),
    "sub_u": lambda a, b, n, c: (a - b, b > a),
    "subb_u": lambda a, b, n, c: (a - b - c, b + c > a),
    "add_i": lambda a, b, n, c: (a + b, not -(1 << n - 1) <= _signed(a, n) + _signed(b, n) < 1 << n - 1),
    "sub_i": lambda a, b, n, c: (a - b, not -(1 << n - 1) <= _signed(a, n) - _signed(b, n) < 1 << n - 1),
    "mul_i": lambda a, b, n, c: (a * b, None),
    "mul_hi_u": lambda a, b, n, c: (a * b >> n, None),
    "mul_hi_i": lambda a, b, n, c: (_signed(a, n) * _signed(b, n) >> n, None),
    "min_i": lambda a, b, n, c: (a, True) if _signed(a, n) < _signed(b, n) else (b, False),
    "max_i": lambda a, b, n, c: (a, True) if _signed(a, n) > _signed(b, n) else (b, False),
    "min_u": lambda a, b, n, c: (min(a, b), a < b),
    "max_u": lambda a, b, n, c: (max(a, b), a > b),
    "bfm_b": lambda a, b, n, c: ((1 << (a & n - 1)) - 1 << (b & n - 1), None),
    "cselect_b": lambda a, b, n, c: (a if c else b, None),
    "pack_ll_b32_b16": lambda a, b, n, c: (a & 0xFFFF | (b & 0xFFFF) << 16, None),
    "pack_lh_b32_b16": lambda a, b, n, c: (a & 0xFFFF | b & 0xFFFF0000, None),
    "pack_hh_b32_b16": lambda a, b, n, c: (a >> 16 | b & 0xFFFF0000, None),
}
# The same, with SCC where the result is not 0.
_LOGIC: dict[str, Callable[[int, int, int], int]] = {
    "and_b": lambda a, b, n: a & b, "or_b": lambda a, b, n: a | b, "xor_b": lambda a, b, n: a ^ b,
    "andn2_b": lambda a, b, n: a & ~b, "and_not1_b": lambda a, b, n: a & ~b, "orn2_b": lambda a, b, n: a | ~b,
    "or_not1_b": lambda a, b, n: a | ~b, "nand_b": lambda a, b, n: ~(a & b), "nor_b": lambda a, b, n: ~(a | b),
    "xnor_b": lambda a, b, n: ~(a ^ b), "lshl_b": lambda a, b, n: a << (b & n - 1), "lshr_b": lambda a, b, n: a >> (b & n - 1),
    "ashr_i": lambda a, b, n: _signed(a, n) >> (b & n - 1), "bfe_u": lambda a, b, n: _field(a, b, n)[0], "bfe_i": _bfe_signed,
}
_ONE: dict[str, Callable[[int, int], tuple[int, bool]]] = {  # of one operand, always with SCC
    "not_b": lambda a, n: (~a, ~a & (1 << n) - 1 != 0), "abs_i": lambda a, n: (abs(_signed(a, n)), a != 0),
    "bcnt1_i32_b": lambda a, n: (a.bit_count(), a != 0),
}
_PLAIN: dict[str, Callable[[int, int], int]] = {  # of one operand, without
    "mov_b": lambda a, n: a, "brev_b": lambda a, n: int(f"{a:0{n}b}"[::-1], 2),
    "sext_i32_i8": lambda a, n: _signed(a & 0xFF, 8), "sext_i32_i16": lambda a, n: _signed(a & 0xFFFF, 16),
    "ff1_i32_b": lambda a, n: (a & -a).bit_length() - 1,
    "ctz_i32_b": lambda a, n: (a & -a).bit_length() - 1, "flbit_i32_b": lambda a, n: n - a.bit_length() if a else -1,
    "clz_i32_u": lambda a, n: n - a.bit_length() if a else -1,
}
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "eq": int.__eq__, "lg": int.__ne__, "gt": int.__gt__, "ge": int.__ge__, "lt": int.__lt__, "le": int.__le__}
_ACCUMULATED = {"lshl1_add_u": 1, "lshl2_add_u": 2, "lshl3_add_u": 3, "lshl4_add_u": 4}
_BRANCHES: dict[str, Callable[[Wave], bool]] = {
    "branch": lambda w: True, "cbranch_scc0": lambda w: not w.scc, "cbranch_scc1": lambda w: w.scc,
    "cbranch_vccz": lambda w: w.scalar(VCC, w.lanes // 32) == 0, "cbranch_vccnz": lambda w: w.scalar(VCC, w.lanes // 32) != 0,
    "cbranch_execz": lambda w: not w.mask.any(), "cbranch_execnz": lambda w: bool(w.mask.any()),
}
_NOTHING = ("nop", "clause", "delay_alu", "waitcnt_depctr", "sendmsg", "setprio", "sleep", "inst_prefetch",
            "set_inst_prefetch_distance", "code_end", "sethalt", "wait_idle", "icache_inv", "dcache_wb", "dcache_inv")


def encode(instruction: Instruction, labels: dict[str, int], lanes: int) -> Step | None:
    """What a scalar instruction does; None for one that is none of these."""
    name = instruction.op.removeprefix("s_")
    if name in _NOTHING:
        return lambda wave: None
    if name in _BRANCHES:
        taken, target = _BRANCHES[name], labels[instruction.operands[0]]
        return lambda wave: target if taken(wave) else None
    sources = [ref(operand) for operand in instruction.operands]
    if name.startswith("cmp"):
        return _comparison(name, sources)
    if found := re.match(r"^bitcmp([01])_b(32|64)$", name):
        a, b, wanted, bits = scalar(sources[0], int(found[2]) // 32), scalar(sources[1], 1), int(found[1]), int(found[2])
        return lambda wave: setattr(wave, "scc", a(wave) >> (b(wave) & bits - 1) & 1 == wanted)
    if name.endswith("_saveexec_b64") or name.endswith("_saveexec_b32"):
        return _saveexec(name, sources, lanes)
    if found := re.match(r"^(movk|addk|mulk|cmovk)_i32$", name):
        return _with_constant(found[1], sources)
    kind, bits = _kind(name)
    return _arithmetic(kind, bits, sources, instruction)


def _kind(name: str) -> tuple[str, int]:
    """("add_u", 32) of add_u32."""
    if name.startswith("pack_"):
        return name, 32
    found = re.match(r"^(.*?)(32|64)$", name)
    return (found[1], int(found[2])) if found else (name, 32)


def _result(wave: Wave, index: int, value: int, bits: int) -> None:
    wave.write_scalar(index, value & (1 << bits) - 1, bits // 32)


def _arithmetic(kind: str, bits: int, sources: list[Any], instruction: Instruction) -> Step | None:
    target, *rest = sources
    count, index = bits // 32, target.index
    narrow = ("lshl_b", "lshr_b", "ashr_i", "bfe_u", "bfe_i", "bfm_b")  # whose second operand always has 32 bits
    values = [scalar(x, 1 if i and kind in narrow else count) for i, x in enumerate(rest)]
    if kind in _LOGIC:
        (a, b), logic = values, _LOGIC[kind]

        def step(wave: Wave) -> None:
            result = logic(a(wave), b(wave), bits) & (1 << bits) - 1
            _result(wave, index, result, bits)
            wave.scc = result != 0
    elif kind in _TWO:
        (a, b), two = values, _TWO[kind]

        def step(wave: Wave) -> None:
            result, scc = two(a(wave), b(wave), bits, wave.scc)
            _result(wave, index, result, bits)
            wave.scc = wave.scc if scc is None else bool(scc)
    elif kind in _ACCUMULATED:
        (a, b), by = values, _ACCUMULATED[kind]

        def step(wave: Wave) -> None:
            result = (a(wave) << by) + b(wave)
            _result(wave, index, result, bits)
            wave.scc = result > _WORD
    elif kind in _ONE:
        (a,), one = values, _ONE[kind]
        out = 32 if kind.startswith("bcnt") else bits

        def step(wave: Wave) -> None:
            result, wave.scc = one(a(wave), bits)
            _result(wave, index, result, out)
    elif kind in _PLAIN:
        (a,), plain = values, _PLAIN[kind]
        out = bits if kind in ("mov_b", "brev_b") else 32

        def step(wave: Wave) -> None:
            _result(wave, index, plain(a(wave), bits), out)
    elif kind == "cmov_b":
        (a,) = values

        def step(wave: Wave) -> None:
            if wave.scc:
                _result(wave, index, a(wave), bits)
    else:
        return None
    return step


def _comparison(name: str, sources: list[Any]) -> Step:
    found = re.match(r"^cmpk?_(eq|lg|gt|ge|lt|le)_([iu])(32|64)$", name)
    if found is None:
        raise UnknownInstructionError(f"s_{name}")
    compare, bits, signed = _COMPARED[found[1]], int(found[3]), found[2] == "i"
    a, b = (scalar(x, bits // 32) for x in sources)
    if name.startswith("cmpk") and signed:  # a constant of 16 bits
        constant = _signed(int(sources[1].constant, 0) & 0xFFFF, 16) & _WORD

        def b(wave: Wave) -> int:
            return constant

    def step(wave: Wave) -> None:
        x, y = a(wave), b(wave)
        wave.scc = compare(_signed(x, bits), _signed(y, bits)) if signed else compare(x, y)

    return step


def _saveexec(name: str, sources: list[Any], lanes: int) -> Step:
    """Keeps EXEC, and makes a new one of it and the operand."""
    logic = name.partition("_saveexec")[0]
    target, count = sources[0].index, lanes // 32
    a, whole = scalar(sources[1], count), (1 << lanes) - 1
    make: dict[str, Callable[[int, int], int]] = {
        "and": lambda x, e: x & e, "or": lambda x, e: x | e, "xor": lambda x, e: x ^ e, "andn2": lambda x, e: x & ~e,
        "and_not1": lambda x, e: x & ~e, "and_not0": lambda x, e: ~x & e, "andn1": lambda x, e: ~x & e,
        "orn2": lambda x, e: x | ~e, "or_not1": lambda x, e: x | ~e}
    if logic not in make:
        raise UnknownInstructionError(f"s_{name}")

    def step(wave: Wave) -> None:
        x, before = a(wave), wave.scalar(EXEC, count)
        wave.write_scalar(target, before, count)
        after = make[logic](x, before) & whole
        wave.write_scalar(EXEC, after, count)
        wave.scc = after != 0

    return step


def _with_constant(kind: str, sources: list[Any]) -> Step:
    index, constant = sources[0].index, _signed(int(sources[1].constant, 0) & 0xFFFF, 16)

    def step(wave: Wave) -> None:
        if kind == "movk" or (kind == "cmovk" and wave.scc):
            _result(wave, index, constant, 32)
        elif kind == "addk":
            total = _signed(wave.s[index]) + constant
            _result(wave, index, total, 32)
            wave.scc = not -(1 << 31) <= total < 1 << 31
        elif kind == "mulk":
            _result(wave, index, _signed(wave.s[index]) * constant, 32)

    return step
