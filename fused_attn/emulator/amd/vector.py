"""Vector instructions: one function of a wave for each, from the table of what they compute."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fused_attn.emulator.amd import lanes as L
from fused_attn.emulator.amd import masks
from fused_attn.emulator.amd.arithmetic import TABLE, Function, any_of_three
from fused_attn.emulator.amd.operands import Ref, as_type, bits_of, is_float, ref, scalar, words
from fused_attn.emulator.amd.scalar import Step
from fused_attn.emulator.amd.state import Array, Wave, to_mask
from fused_attn.emulator.amd.text import Instruction
from fused_attn.emulator.schedule import UnknownInstructionError

Get = Callable[[Wave], Any]
Compute = Callable[[Wave], tuple[Any, ...]]  # the words of a result
Computed = tuple[Compute, Callable[[Wave, tuple[Any, ...]], None]]  # and what writes them
_OMOD = {"mul:2": 2.0, "mul:4": 4.0, "div:2": 0.5}
# Names whose destination is a source as well, of those in the table.
_ACCUMULATING = {"fmac": "fma", "mac": "fma", "dot2c": "dot2", "dot2acc": "dot2"}


def encode(instruction: Instruction, lanes: int, arch: str) -> Step | None:
    """What a vector instruction does; None for one that is none of these."""
    if instruction.second is not None:
        halves = [_computed(each, lanes, arch) for each in (instruction, instruction.second)]
        if None in halves:
            return None
        (first, write_first), (second, write_second) = halves  # type: ignore[misc]

        def both(wave: Wave) -> None:
            one, two = first(wave), second(wave)  # both read before either writes
            write_first(wave, one)
            write_second(wave, two)

        return both
    name = instruction.op.removeprefix("v_")
    if crossing := masks.encode(name, instruction, lanes):
        return crossing
    found = _computed(instruction, lanes, arch)
    if found is None:
        return None
    compute, write = found
    return lambda wave: write(wave, compute(wave))


def _computed(instruction: Instruction, lanes: int, arch: str) -> Computed | None:
    """What an instruction of the table computes, and how that is written."""
    name, operands = instruction.op.removeprefix("v_"), list(instruction.operands)
    if found := re.match(r"^(fmac|mac|dot2c|dot2acc)_(\w+)$", name):
        if "op_sel" in instruction.modifiers:
            raise UnknownInstructionError(instruction.text)
        name, operands = f"{_ACCUMULATING[found[1]]}_{found[2]}", [*operands, operands[0]]
    elif found := re.match(r"^(?:fma|mad)(ak|mk)_(f16|f32)$", name):
        name = f"fma_{found[2]}"  # fmamk: a, constant, b; fmaak: a, b, constant; both in the order of the sum
    elif name in ("cndmask_b32", "cndmask_b16"):
        return _chosen(instruction, lanes, arch)
    elif name.startswith(("pk_", "fma_mix")):
        if "clamp" in instruction.modifiers or "dpp" in instruction.form:
            raise UnknownInstructionError(instruction.text)
        return _packed(name, instruction)
    elif name.startswith("dot2_") and instruction.modifiers:
        raise UnknownInstructionError(instruction.text)
    elif name.startswith("bitop3_b"):
        table, kind = int(instruction.modifiers.get("bitop3", "0"), 0), f"u{name[-2:]}"
        gets = L.sources(instruction, (kind,) * 3, operands[1:])
        return _of(instruction, kind, gets, lambda a, b, c: any_of_three(a, b, c, table), lanes, arch)
    if name not in TABLE:
        return None
    kind, kinds, function = TABLE[name]
    if len(operands) != len(kinds) + 1:
        raise UnknownInstructionError(f"{instruction.text}: expected {len(kinds)} sources")
    return _of(instruction, kind, L.sources(instruction, kinds, operands[1:]), function, lanes, arch)


def _of(instruction: Instruction, kind: str, gets: list[Get], function: Function, lanes: int,
        arch: str) -> Computed:
    target, modifiers = ref(instruction.operands[0]).index, instruction.modifiers
    enabled: Callable[[Wave], Array] | None = None
    if "dpp" in instruction.form:
        gets[0], enabled = L.moved(gets[0], L.dpp(modifiers, lanes))
    factor = next((by for name, by in _OMOD.items() if modifiers.get(name[:3]) == name[4:]), None)
    clamped, wide = "clamp" in modifiers, kind in ("f64", "u64", "i64")
    upper = kind in ("f16", "u16", "i16") and L.numbers(modifiers, "op_sel", ())[len(gets) :] == (1,)
    keeps = kind in ("f16", "u16", "i16") and (not arch.startswith("gfx9") or upper)  # the other half of the register
    sdwa = "sdwa" in instruction.form
    if wide and enabled is not None:
        raise UnknownInstructionError(f"{instruction.text}: 64 bits of other lanes")

    def compute(wave: Wave) -> tuple[Any, ...]:
        result = function(*[get(wave) for get in gets])
        if factor is not None:
            result = result * np.asarray(factor, result.dtype)
        if clamped and is_float(kind):
            result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1)
        return bits_of(result, kind)

    def write(wave: Wave, words: tuple[Any, ...]) -> None:
        first = words[0]
        if sdwa:
            first = L.placed(first, wave.v[target], modifiers)
        elif keeps:
            first = L.half(first, wave.v[target], upper)
        if enabled is not None:
            np.copyto(wave.v[target], first, where=enabled(wave))
        else:
            wave.write(target, first)
        if wide:
            wave.write(target + 1, words[1])

    if clamped and not is_float(kind):
        raise UnknownInstructionError(f"{instruction.text}: integers that saturate")
    return compute, write


def _chosen(instruction: Instruction, lanes: int, arch: str) -> Computed:
    """v_cndmask_b32: the second where a bit of a mask is set, VCC's where none is named."""
    target, *others = instruction.operands
    mask = scalar(ref(others[2] if len(others) > 2 else "vcc" if lanes == 64 else "vcc_lo"), lanes // 32)
    index, bits = ref(target).index, instruction.op[-2:]
    kind = f"f{bits}" if any(x.startswith(("-", "|", "neg(")) for x in others[:2]) else f"u{bits}"
    upper = L.numbers(instruction.modifiers, "op_sel", (0,))[-1] == 1
    more = instruction.form not in ("", "e64") or bool({*instruction.modifiers} - {"op_sel"})
    if bits == "16" and (arch.startswith("gfx9") or more):
        raise UnknownInstructionError(instruction.text)
    gets = L.sources(instruction, (kind, kind), list(others[:2]))
    enabled: Callable[[Wave], Array] | None = None
    if "dpp" in instruction.form:
        gets[0], enabled = L.moved(gets[0], L.dpp(instruction.modifiers, lanes))

    def compute(wave: Wave) -> tuple[Any, ...]:
        return bits_of(np.where(to_mask(mask(wave), lanes), gets[1](wave), gets[0](wave)), kind)

    def write(wave: Wave, words: tuple[Any, ...]) -> None:
        if enabled is not None:
            np.copyto(wave.v[index], words[0], where=enabled(wave))
        elif bits == "16":
            wave.write(index, L.half(words[0], wave.v[index], upper))
        else:
            wave.write(index, L.placed(words[0], wave.v[index], instruction.modifiers))

    return compute, write


def _packed(name: str, instruction: Instruction) -> Computed | None:
    """Two numbers in one register or in a pair of them (v_pk), and sums of mixed types (v_fma_mix)."""
    target, *operands = instruction.operands
    index, sources, modifiers = ref(target).index, [ref(x) for x in operands], instruction.modifiers
    n = len(sources)
    low = L.numbers(modifiers, "op_sel", (0,) * n)
    high = L.numbers(modifiers, "op_sel_hi", ((0,) if "mix" in name else (1,)) * n)
    negative = [L.numbers(modifiers, each, (0,) * n) for each in ("neg_lo", "neg_hi")]
    if name.startswith("fma_mix"):
        mixed = [_mixed(*each) for each in zip(sources, high, low, *negative, strict=True)]
        function = TABLE["fma_f32"][2]

        def summed(wave: Wave) -> Any:
            return function(*[get(wave) for get in mixed])

        if name == "fma_mix_f32":
            return lambda wave: bits_of(summed(wave), "f32"), lambda wave, words: wave.write(index, words[0])

        def write_half(wave: Wave, words: tuple[Any, ...]) -> None:
            wave.write(index, L.half(words[0], wave.v[index], name == "fma_mixhi_f16"))

        return lambda wave: bits_of(summed(wave).astype(np.float16), "f16"), write_half
    found = re.match(r"^pk_(\w+?)_?([fuib])(16|32)$", name)
    if found is None:
        return None
    single = {"mov": "mov_b32"}.get(found[1], f"{found[1]}_{found[2]}{found[3]}")
    single = single if single in TABLE else single.replace("_b16", "_u16")
    if single not in TABLE:
        return None
    kind, kinds, function = TABLE[single]
    if single == "mov_b32":  # one source for each half
        second = high[1] if "op_sel_hi" in modifiers else low[1]
        chosen = [[_half(sources[0], "u32", low[0], False)], [_half(sources[1], "u32", second, False)]]
    else:
        chosen = [[_half(source, kinds[i], half[i], bool(sign[i])) for i, source in enumerate(sources)]
                  for half, sign in ((low, negative[0]), (high, negative[1]))]

    def compute(wave: Wave) -> tuple[Any, ...]:
        return tuple(bits_of(function(*[get(wave) for get in gets]), kind)[0] for gets in chosen)

    def write(wave: Wave, words: tuple[Any, ...]) -> None:
        if found[3] == "32":
            wave.write(index, words[0])
            wave.write(index + 1, words[1])
        else:
            wave.write(index, words[0] | words[1] << np.uint32(16))

    return compute, write


def _half(source: Ref, kind: str, which: int, negative: bool) -> Get:
    """The lower or upper of two: of 32 bits the registers of a pair, of 16 the halves of one, or of a constant's 32 bits."""
    if kind.endswith("32"):
        if which and source.kind == "c":
            raise UnknownInstructionError(f"the upper half of the constant {source.constant}")
        word = words(source, kind, which if source.count > 1 else 0)
    else:
        word = L.part(words(source, kind, 0), "WORD_1" if which else "WORD_0", False)
    flipped = negative != source.negative
    return lambda wave: np.negative(as_type(word(wave), kind)) if flipped else as_type(word(wave), kind)


def _mixed(source: Ref, is_half: int, which: int, negative: int, absolute: int) -> Get:
    word = words(source, "f16" if is_half else "f32", 0)
    if is_half:
        word = L.part(word, "WORD_1" if which else "WORD_0", False)

    def get(wave: Wave) -> Any:
        x = as_type(word(wave), "f16").astype(np.float32) if is_half else as_type(word(wave), "f32")
        x = np.abs(x) if absolute or source.absolute else x
        return np.negative(x) if bool(negative) != source.negative else x

    return get
