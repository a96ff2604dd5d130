"""Compiling the kernels for a GPU that is not there, and reading the machine code.

The launches come from the schedules that a real call would take, on tensors without storage: signatures, specialisations and
tile configurations are those of a card. Registers, spills, shared memory and the instruction mix are read from the
binary (``sass.py``).
"""

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_attn.call import mods
from fused_attn.call.describe import Described
from fused_attn.call.schema import Directions, Forwarded, Moved, Needs, Saved
from fused_attn.call.spec import RELATIVE, TENSOR, AttentionSpec, Member, OtherTensors, TileConfig, Window
from fused_attn.kernels import fences
from fused_attn.kernels.launch import Launch, options_of
from fused_attn.plan import backward_tangent, inspection, schedules, tangent
from fused_attn.plan.plan import launches_of
from fused_attn.plan.problem import Problem
from fused_attn.plan.tiles import MAX_ADDITIVE, Kernel, against
from fused_attn.targets import COMPILED, KNOWN, target_of
from fused_attn.tools.compile import sass

FEATURES = ("plain", "softcap", "bias", "bias bf16", "bias fp32, mask", "alibi", "relative", "mask", "sinks", "dropout",
            "packed", "additive", "rotary", "decode", "fused")
# The types of tiles; "tf32" and "tf32x3" are fp32 with its products computed that way.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32,
          "tf32x3": torch.float32, "fp64": torch.float64}

# Which of FEATURES the schedules of sm_90 other than pointers take.
HOPPER_FEATURES = {
    "descriptors": ("plain", "softcap", "bias", "bias fp32, mask", "alibi", "relative", "mask", "sinks", "packed"),
    "specialized": ("plain", "softcap", "sinks"), "gluon": ("plain", "softcap", "sinks", "packed")}

_NO_PRODUCTS = ("delta", "list", "rotary", "combine", "statistics", "ordered")


def refusal(target: str, head_dim: int, dtype: str, feature: str = "plain", hopper: str = "pointers") -> str | None:
    """Why no kernel is compiled for these arguments, or None: the result could not run, or no call would launch it."""
    if target not in KNOWN:
        return f"target: expected one of {', '.join(KNOWN)}; got {target!r}"
    if dtype.startswith("tf32") and not getattr(target_of(target), dtype):
        return f"{target} has no {dtype}"
    if reason := against(head_dim, head_dim, DTYPES[dtype], target):
        return reason
    if feature == "additive" and head_dim > MAX_ADDITIVE:
        return f"head dim {head_dim}: the kernels carry additive scores up to {MAX_ADDITIVE}"
    if hopper == "pointers":
        return None
    if target != "sm_90":
        return f"schedule {hopper} is of sm_90; got target {target}"
    if feature not in HOPPER_FEATURES[hopper]:
        return f"schedule {hopper} takes {', '.join(HOPPER_FEATURES[hopper])}; got {feature}"
    if dtype not in ("fp16", "bf16") or head_dim > 256 or head_dim % 8:
        return f"schedule {hopper} takes fp16 and bf16, and head dims to 256 in steps of 8; got {dtype} and {head_dim}"
    return None


def kernels(which: str, feature: str, hopper: str = "pointers") -> tuple[Kernel, ...]:
    """The kernels of a pass, "forward" or "backward"; rotary positions have one for both, decoding two of its own, the fused
    backward one that gives dQ as well. Of the other schedules of sm_90 only Gluon's has a backward, of three kernels."""
    if hopper != "pointers":
        taken = hopper == "gluon" and feature in ("plain", "sinks")
        backward: tuple[Kernel, ...] = ("statistics", "backward", "ordered") if taken else ()
        return ("forward",) if which == "forward" else backward
    if feature == "rotary":
        return ("rotary",) if which == "forward" else ()
    if feature == "decode":
        return ("splits", "combine") if which == "forward" else ()
    if feature == "fused":
        return () if which == "forward" else ("dkv",)
    if which == "forward":
        return ("list", "forward") if "mask" in feature else ("forward",)
    has_operands = feature.startswith("bias") or feature in ("alibi", "relative")
    return ("delta", "dq", "dkv", "operand_grad") if has_operands else ("delta", "dq", "dkv")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the binary of one kernel says. ``spill_bytes`` is local memory written; ``local_in_loops`` counts instructions
    that touch local memory inside a main loop, an innermost one with matrix products (fp32: with fused multiply-adds);
    ``matrix`` counts matrix instructions by opcode, ``loop_mix`` all instructions of the main loops by opcode without
    modifiers. ``code`` is the binary itself, of a report that was just made."""

    target: str
    kernel: str
    dtype: str
    head_dim: int
    causal: bool
    feature: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    local_in_loops: int
    matrix: dict[str, int]
    instructions: int
    loop_instructions: list[int]
    loop_mix: dict[str, int]
    warnings: list[str]
    tensor_memory: int
    compile_seconds: float
    triton: str
    hopper: str = "pointers"
    code: sass.Binary | None = dataclasses.field(default=None, compare=False, repr=False)

    def row(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "code"}

    def problems(self, max_spill: int = 160, max_local: float = 0.04, max_seconds: float = 10.0) -> list[str]:
        """What breaks the rules that default configurations are held to; empty if nothing does.

        A little local memory is a cost to weigh: wider tiles may save more of shared memory than it takes. ``max_local`` is the
        share of the main loops' instructions that may touch it.
        """
        found = []
        if self.spill_bytes > max_spill:
            found.append(f"{self.spill_bytes} bytes of spill")
        if self.local_in_loops > max_local * sum(self.loop_instructions):
            found.append(f"{self.local_in_loops} local-memory accesses among {sum(self.loop_instructions)} of the main loops")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory of {self.shared_limit}")
        if self.kernel not in _NO_PRODUCTS and self.dtype in ("fp16", "bf16") and not self.matrix:
            found.append("no matrix instruction")
        if self.warnings:
            found.append("serialised matrix instructions: " + ", ".join(self.warnings))
        if self.tensor_memory > 512:
            found.append(f"{self.tensor_memory} columns of tensor memory of 512")
        if self.compile_seconds > max_seconds:
            found.append(f"{self.compile_seconds} s to compile")
        return found


class _NoDriver:
    """What Triton asks of a GPU driver while compiling."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def _cpu_seconds() -> float:
    """CPU time of this process and its children (ptxas): unlike the clock, it does not depend on what else is running."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def gpu_target(name: str) -> GPUTarget:
    """Triton's target for "sm_90", "gfx942" and the like."""
    if re.fullmatch(r"sm_\d+", name):
        return GPUTarget("cuda", int(name[3:]), 32)
    if re.fullmatch(r"gfx\w+", name):
        return GPUTarget("hip", name, target_of(name).lanes)
    raise ValueError(f"target: expected sm_NN or gfxNNN, such as {', '.join(COMPILED)}; got {name!r}")


Describe: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Described]


class Sizes(NamedTuple):
    """Of a call whose kernels are compiled: of long sequences, without storage. The emulator runs shorter ones."""

    batch: int = 2
    heads: int = 8
    length: int = 4096
    device: str = "meta"

    def tensor(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


LONG = Sizes()


def _feature(name: str, sizes: Sizes, head_dim: int, element: torch.dtype) -> tuple[dict[str, Any], OtherTensors]:
    """A feature of ``FEATURES`` as fields of the spec, and its tensors."""
    heads, length = sizes.heads, sizes.length

    def meta(*shape: int, dtype: torch.dtype = element) -> torch.Tensor:
        return sizes.tensor(*shape, dtype=dtype)

    def member(mod: Any, kind: str = TENSOR) -> tuple[Member, ...]:
        return (Member(mod.code, (kind,)),)

    empty = OtherTensors()
    cu = meta(3, dtype=torch.int32)
    found: dict[str, tuple[dict[str, Any], OtherTensors]] = {
        "plain": ({}, empty),
        "softcap": ({"softcap": 30.0}, empty),
        "bias": ({"score_mods": member(mods.BIAS)}, OtherTensors(operands=(meta(1, heads, length, length),))),
        "bias bf16": ({"score_mods": member(mods.BIAS)},
                      OtherTensors(operands=(meta(1, heads, length, length, dtype=torch.bfloat16),))),
        "bias fp32, mask": (
            {"score_mods": member(mods.BIAS), "mask_mods": member(mods.MASK)},
            OtherTensors(operands=(meta(1, heads, length, length, dtype=torch.float32),
                                 meta(1, 1, length, length, dtype=torch.bool)))),
        "alibi": ({"score_mods": member(mods.ALIBI)}, OtherTensors(operands=(meta(1, heads, 1, 1),))),
        "relative": ({"score_mods": member(mods.BIAS, RELATIVE)}, OtherTensors(operands=(meta(1, heads, 2 * length - 1),))),
        "mask": ({"mask_mods": member(mods.MASK)},
                 OtherTensors(operands=(meta(1, 1, length, length, dtype=torch.bool),))),
        "sinks": ({}, OtherTensors(sinks=meta(heads))),
        "dropout": ({"dropout_p": 0.1}, OtherTensors(seed=meta(1, dtype=torch.int64))),
        "rotary": ({}, empty),
        "decode": ({}, empty),
        "fused": ({"deterministic": False}, empty),
        "additive": ({}, OtherTensors(score_weight=meta(heads, head_dim))),
        "packed": ({"longest": (length // 2, length // 2)}, OtherTensors(cu_q=cu, cu_k=cu)),
    }
    return found[name]


def launches(target: str, kernel: Kernel, head_dim: int, dtype: str, causal: bool, group: int, feature: str, head_dim_v: int,
             config: TileConfig | None, hopper: str, sizes: Sizes = LONG, described: Describe | None = None) -> list[Launch]:
    """The launches of a kernel that a call makes, taken from its schedules; ``described`` makes one in place of ``feature``."""
    element = DTYPES[dtype]
    heads, length = sizes.heads, sizes.length
    batch = 1 if feature == "packed" else sizes.batch

    def tensor(*shape: int) -> torch.Tensor:
        return sizes.tensor(*shape, dtype=element)

    q = tensor(batch, heads, 1 if feature == "decode" else length, head_dim)
    k, v = (tensor(batch, heads // group, length, dim) for dim in (head_dim, head_dim_v))
    if kernel == "rotary":
        angles = sizes.tensor(batch, length, head_dim // 2, dtype=torch.float32)
        return list(inspection.rotary(q, angles, angles, False, False, config))
    if described is not None:
        spec, others = described(q, k, v)[3:]
    else:
        fields, others = _feature(feature, sizes, head_dim, element)
        spec = AttentionSpec(head_dim**-0.5, Window(None, 0 if causal else None), **fields,
                             fp32_precision=dtype if dtype.startswith("tf32") else "ieee")
    whose = {"statistics": "backward", "ordered": "backward", "list": "forward"}.get(kernel, kernel)
    whose = "fused" if feature == "fused" else hopper if (whose, hopper != "pointers") == ("forward", True) else whose
    problem = Problem.of(q, k, v, spec, others, target, {} if config is None else {whose: config})
    first = hopper if hopper != "pointers" else "splits" if feature == "decode" else "pointers"
    steps = schedules.named(schedules.FORWARD, first).steps(problem)
    found, (out, lse, residual) = launches_of(steps)
    if kernel.endswith("tangent"):
        found = _tangent_launches(kernel, problem, Forwarded(q, k, v, out, residual, lse))
    elif kernel not in ("list", "forward", "splits", "combine"):
        second = "gluon" if hopper == "gluon" else "fused" if feature == "fused" else "separate"
        if (second == "gluon" and max(head_dim, head_dim_v) > 128) or (second == "fused" and not problem.fused_config()):
            return []
        needs = _every_need(others)
        saved = Saved(out, None, q, k, v, out, residual, lse)
        found, _ = launches_of(schedules.named(schedules.BACKWARD, second).steps(problem, saved, needs))
    name = {"splits": "forward"}.get(kernel, kernel) + "_kernel"
    of_kernel = [launch for launch in found if launch.name == name]
    return of_kernel if kernel.startswith("dkv") else of_kernel[:1]


def _every_need(others: OtherTensors) -> Needs:
    return Needs(True, True, True, others.sinks is not None, others.score_weight is not None,
                 tuple(x.is_floating_point() for x in others.operands))


def _tangent_launches(kernel: Kernel, problem: Problem, made: Forwarded) -> list[Launch]:
    """The launches of the tangent of a forward, or of a backward whose dout does not move, along everything else."""
    others = problem.others
    operands = tuple(x if x.is_floating_point() else made.q.new_empty(0) for x in others.operands)
    along = Directions(made.q, made.k, made.v, others.sinks, others.score_weight, operands)
    if kernel == "tangent":
        return launches_of(tangent.steps(problem, made, along))[0]
    lse_t = made.lse if made.lse.dim() == 3 else made.lse[0]
    steps = backward_tangent.steps(problem, Saved(made.out, None, *made), Moved(made.out, lse_t, None, None), along,
                                   _every_need(others))
    return launches_of(steps)[0]


def _compile(launch: Launch, target: str) -> tuple[Any, str, float]:
    """(binary, what ptxas said, seconds) of a launch."""
    function, programs, arguments, tile = launch
    function.device_caches.clear()  # they know kernels by device, whatever its target, and hide the log of those they hold
    log, start = io.StringIO(), _cpu_seconds()
    lacking = fences.lacking(target, tile.descriptors)
    tile = fences.fenced(tile) if lacking else tile
    with contextlib.redirect_stdout(log), fences.putting_in() if lacking else contextlib.nullcontext():
        binary = function.warmup(*arguments, tile, grid=(programs,), **options_of(tile))
    return binary, log.getvalue(), _cpu_seconds() - start


def compile_kernel(target: str, kernel: Kernel, head_dim: int, dtype: str, causal: bool, *, group: int = 4,
                   feature: str = "plain", head_dim_v: int | None = None, config: TileConfig | None = None,
                   hopper: str = "pointers", described: Describe | None = None) -> list[Report]:
    """Compiles one kernel for ``target`` as ``attention`` would launch it on long sequences, and reads the binary.

    One report, or two, "dk" and "dv", where the configuration gives each a launch of its own. ``feature``: of ``FEATURES``;
    ``hopper``: of ``settings.HOPPER_SCHEDULES``, for a forward on sm_90; ``config`` stands in for the tiles of the kernel,
    ``described`` for the feature.
    """
    driver.set_active(_NoDriver(gpu_target(target)))
    compiled: list[tuple[Launch, Any, str, float]] = []
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        for launch in launches(target, kernel, head_dim, dtype, causal, group, feature, head_dim_v or head_dim, config, hopper,
                               described=described):
            compiled.append((launch, *_compile(launch, target)))
    names = ("dk", "dv") if len(compiled) == 2 else (kernel,) * len(compiled)
    return [
        Report(
            target=target, kernel=name, dtype=dtype, head_dim=head_dim, causal=causal, feature=feature, hopper=hopper,
            config=launch.config.words,
            shared_bytes=binary.metadata.shared, shared_limit=target_of(target).shared,
            tensor_memory=getattr(binary.metadata, "tmem_size", None) or 0,
            compile_seconds=round(seconds, 2), triton=triton.__version__,
            **_figures(sass.read(binary, log, target)),
        )
        for name, (launch, binary, log, seconds) in zip(names, compiled, strict=True)
    ]


def _figures(code: sass.Binary) -> dict[str, Any]:
    """The fields of a report that are read from the binary."""
    loops = code.listing.main_loops()
    return {
        "code": code, "registers": code.registers, "spill_bytes": code.spill_bytes, "warnings": list(code.warnings),
        "matrix": sass.opcodes(code.listing.instructions, "tensor"),
        "instructions": len(code.listing.instructions),
        "loop_mix": sass.opcodes([x for loop in loops for x in loop.instructions]),
        "local_in_loops": sum(loop.count()["local"] for loop in loops),
        "loop_instructions": [len(loop.instructions) for loop in loops],
    }
