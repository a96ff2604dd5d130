"""What launches did, from the counts of their instructions: by kind, by line of Python, and what memory accesses cost.

Instructions are PTX's and count warps: ptxas removes moves and address sums; AMD's are those of the binary, and count waves.
Sectors and wavefronts, of NVIDIA's cards alone, are the card's: a request of a warp to global memory takes 32-byte sectors, one
to shared memory wavefronts of at most 128 bytes from different banks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from fused_attn.emulator.machine import Result

# Kinds by the beginning of an opcode; the first that fits.
_KINDS = (
    ("matrix products", ("mma.", "wgmma.mma_async", "tcgen05.mma")),
    ("exp2 and the like", ("ex2.", "lg2.", "rcp.", "sqrt.", "rsqrt.", "tanh.", "sin.", "cos.", "div.full", "div.rn.f32")),
    ("shared memory", ("ld.shared", "st.shared", "atom.shared", "red.shared", "ldmatrix", "stmatrix")),
    ("tensor memory", ("tcgen05.ld", "tcgen05.st")),
    ("global memory", ("ld.global", "st.global", "atom.global", "red.global")),
    ("asynchronous copies", ("cp.async.ca", "cp.async.cg", "cp.async.bulk.tensor")),
    ("barriers and waits", ("bar.", "barrier.", "mbarrier.", "fence.", "cp.async", "wgmma.", "tcgen05.")),
    ("shuffles and votes", ("shfl.", "vote.", "redux.", "elect.", "activemask")),
    ("control", ("bra", "brx", "ret", "exit", "setp.")),
    ("moves and conversions", ("mov.", "cvt", "selp.", "prmt.", "ld.param")),
)
_AMD_KINDS = (
    ("matrix products", ("v_mfma", "v_wmma", "v_dot")),
    ("exp2 and the like", ("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos", "v_div")),
    ("shuffles and votes", ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane", "v_read", "v_write")),
    ("shared memory", ("ds_",)), ("global memory", ("buffer_", "global_", "flat_", "s_load")), ("scratch", ("scratch_",)),
    ("barriers and waits", ("s_barrier", "s_wait", "s_nop", "s_delay", "s_clause")),
    ("control", ("s_branch", "s_cbranch", "s_endpgm", "v_cmp", "s_cmp")), ("scalars", ("s_",)),
    ("moves and conversions", ("v_mov", "v_cvt", "v_cndmask", "v_perm", "v_pack", "v_accvgpr")),
)
_MEMORY = ("sectors", "least_sectors", "wavefronts", "least_wavefronts")
_FLOATS = (".f32", ".f64", ".f16", ".bf16", ".f32x2", ".f16x2", ".bf16x2")


def kind(op: str) -> str:
    """What an opcode is for."""
    of_amd = op.startswith(("s_", "v_", "ds_", "buffer_", "global_", "flat_", "scratch_"))
    for name, beginnings in _AMD_KINDS if of_amd else _KINDS:
        if op.startswith(beginnings):
            return name
    return "floating point" if op.endswith(("_f32", "_f64", "_f16") if of_amd else _FLOATS) else "integers"


def summary(name: str, results: Iterable[Result]) -> dict[str, Any]:
    """Of the launches of one kernel together: warp instructions by kind; on NVIDIA's cards sectors and wavefronts, each beside
    the least that the bytes asked for would need, and the most bytes of loads that a warp had in flight."""
    instructions: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    programs, launches, seconds, in_flight = 0, 0, 0.0, 0
    for result in results:
        launches, programs, seconds = launches + 1, programs + result.programs, seconds + result.seconds
        in_flight = max(in_flight, getattr(result, "bytes_in_flight", 0))
        for instruction, count in zip(result.program.kernel.instructions, result.counts, strict=True):
            if not count["runs"]:
                continue
            what = kind(instruction.op)
            instructions[what] += int(count["runs"])
            memory.update({name: int(count[name]) for name in _MEMORY if name in (result.counts.dtype.names or ())})
    return {"kernel": name, "launches": launches, "programs": programs, "seconds": round(seconds, 3),
            "instructions": dict(instructions.most_common()), **memory, **({"bytes_in_flight": in_flight} if memory else {})}


def by_kernel(launches: Iterable[tuple[str, Result]]) -> list[dict[str, Any]]:
    """``summary`` of each kernel, in the order of their first launches."""
    found: dict[str, list[Result]] = defaultdict(list)
    for name, result in launches:
        found[name].append(result)
    return [summary(name, results) for name, results in found.items()]


def by_line(launches: Iterable[tuple[str, Result]], most: int = 12) -> list[dict[str, Any]]:
    """The lines of Python that made the most warp instructions: the innermost of each."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for _, result in launches:
        for instruction, count in zip(result.program.kernel.instructions, result.counts, strict=True):
            if count["runs"]:
                line = instruction.where.split(" < ")[0].rpartition(":")[0] or "?"
                total[line]["instructions"] += int(count["runs"])
                for name in {"sectors", "wavefronts"}.intersection(result.counts.dtype.names or ()):
                    total[line][name] += int(count[name])
    rows = sorted(total.items(), key=lambda item: -item[1]["instructions"])
    return [{"line": line, **counts} for line, counts in rows[:most]]
