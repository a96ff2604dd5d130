"""Compiling the kernels for a GPU that is not there, and reading the machine code.

The real launchers run on meta tensors with a launcher that only compiles, so that signatures, specialisations and tile
configurations are those of a real launch. Registers, spills, shared memory and the instruction mix are read from the
binary (``sass.py``).
"""

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_attn import mods, sass
from fused_attn.kernels import fences
from fused_attn.kernels.backward import launch_delta, launch_dkv, launch_dq, with_weight_sums
from fused_attn.kernels.combine import launch_combine
from fused_attn.kernels.forward import Split, launch_forward
from fused_attn.kernels.launch import Call, Launcher
from fused_attn.kernels.mask import list_tiles
from fused_attn.kernels.operand_grad import launch_operand_grad
from fused_attn.kernels.rotary import launch_rotary
from fused_attn.lowering import lower
from fused_attn.spec import RELATIVE, TENSOR, AttentionSpec, Companions, Member, TileConfig, Window
from fused_attn.targets import has_tf32, has_tf32x3
from fused_attn.tuning import (
    KNOWN_TARGETS,
    MAX_ADDITIVE,
    SHARED_LIMIT,
    Kernel,
    against,
    choose,
    choose_additive,
    choose_combine,
    choose_fused,
    choose_gluon_backward,
    choose_rotary,
    choose_rung,
    choose_shares,
    fit_operands,
)

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100")
FEATURES = ("plain", "softcap", "bias", "bias bf16", "bias fp32, mask", "alibi", "relative", "mask", "sinks", "dropout",
            "packed", "additive", "rotary", "decode", "fused")
# What tiles are of; "tf32" and "tf32x3" are fp32 with its products computed so.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32,
          "tf32x3": torch.float32, "fp64": torch.float64}

# What the rungs of sm_90 beside pointers take of FEATURES.
RUNG_FEATURES = {"descriptors": ("plain", "softcap", "bias", "bias fp32, mask", "alibi", "relative", "mask", "sinks", "packed"),
                 "specialized": ("plain", "softcap", "sinks"), "gluon": ("plain", "softcap", "sinks", "packed")}

_NO_PRODUCTS = ("delta", "list", "rotary", "combine", "statistics", "ordered")


def refusal(target: str, head_dim: int, dtype: str, feature: str = "plain", rung: str = "pointers") -> str | None:
    """Why no kernel is compiled for this, or None: what comes out could not run, or no call would launch it."""
    if target not in KNOWN_TARGETS:
        return f"target: expected one of {', '.join(KNOWN_TARGETS)}; got {target!r}"
    if dtype.startswith("tf32") and not (has_tf32 if dtype == "tf32" else has_tf32x3)(target):
        return f"{target} has no {dtype}"
    if reason := against(head_dim, head_dim, DTYPES[dtype], target):
        return reason
    if feature == "additive" and head_dim > MAX_ADDITIVE:
        return f"head dim {head_dim}: the kernels carry additive scores up to {MAX_ADDITIVE}"
    if rung == "pointers":
        return None
    if target != "sm_90":
        return f"rung {rung} is of sm_90; got target {target}"
    if feature not in RUNG_FEATURES[rung]:
        return f"rung {rung} takes {', '.join(RUNG_FEATURES[rung])}; got {feature}"
    if dtype not in ("fp16", "bf16") or head_dim > 256 or head_dim % 8:
        return f"rung {rung} takes fp16 and bf16, and head dims to 256 in steps of 8; got {dtype} and {head_dim}"
    return None


def kernels(which: str, feature: str, rung: str = "pointers") -> tuple[Kernel, ...]:
    """The kernels of a pass, "forward" or "backward"; rotary positions have one for both, decoding two of its own, the fused
    backward one that gives dQ as well. Of the other rungs of sm_90 only Gluon's has a backward, of three kernels."""
    if rung != "pointers":
        taken = rung == "gluon" and feature in ("plain", "sinks")
        backward: tuple[Kernel, ...] = ("statistics", "backward", "ordered") if taken else ()
        return ("forward",) if which == "forward" else backward
    if feature == "rotary":
        return ("rotary",) if which == "forward" else ()
    if feature == "decode":
        return ("shares", "combine") if which == "forward" else ()
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
    rung: str = "pointers"
    code: sass.Binary | None = dataclasses.field(default=None, compare=False, repr=False)

    def row(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "code"}

    def problems(self, max_spill: int = 64, local_in_loops: bool = False, max_seconds: float = 10.0) -> list[str]:
        """What breaks the rules that default configurations are held to; empty if nothing does."""
        found = []
        if self.spill_bytes > max_spill:
            found.append(f"{self.spill_bytes} bytes of spill")
        if self.local_in_loops and not local_in_loops:
            found.append(f"{self.local_in_loops} local-memory accesses in a main loop")
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
    """Time this process and its children (ptxas) have computed: other than the clock, it does not depend on who else does."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def gpu_target(name: str) -> GPUTarget:
    """Triton's target for "sm_90", "gfx942" and the like."""
    if re.fullmatch(r"sm_\d+", name):
        return GPUTarget("cuda", int(name[3:]), 32)
    if re.fullmatch(r"gfx\w+", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target: expected sm_NN or gfxNNN, such as {', '.join(TARGETS)}; got {name!r}")


def _feature(name: str, length: int, heads: int, head_dim: int, element: torch.dtype) -> tuple[dict[str, Any], Companions]:
    """A feature of ``FEATURES`` as fields of the spec, and its tensors."""

    def meta(*shape: int, dtype: torch.dtype = element) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def member(mod: Any, kind: str = TENSOR) -> tuple[Member, ...]:
        return (Member(mod.code, (kind,)),)

    empty = Companions()
    cu = meta(3, dtype=torch.int32)
    found: dict[str, tuple[dict[str, Any], Companions]] = {
        "plain": ({}, empty),
        "softcap": ({"softcap": 30.0}, empty),
        "bias": ({"score_mods": member(mods.BIAS)}, Companions(operands=(meta(1, heads, length, length),))),
        "bias bf16": ({"score_mods": member(mods.BIAS)},
                      Companions(operands=(meta(1, heads, length, length, dtype=torch.bfloat16),))),
        "bias fp32, mask": (
            {"score_mods": member(mods.BIAS), "mask_mods": member(mods.MASK)},
            Companions(operands=(meta(1, heads, length, length, dtype=torch.float32),
                                 meta(1, 1, length, length, dtype=torch.bool)))),
        "alibi": ({"score_mods": member(mods.ALIBI)}, Companions(operands=(meta(1, heads, 1, 1),))),
        "relative": ({"score_mods": member(mods.BIAS, RELATIVE)}, Companions(operands=(meta(1, heads, 2 * length - 1),))),
        "mask": ({"mask_mods": member(mods.MASK)},
                 Companions(operands=(meta(1, 1, length, length, dtype=torch.bool),))),
        "sinks": ({}, Companions(sinks=meta(heads))),
        "dropout": ({"dropout_p": 0.1}, Companions(seed=meta(1, dtype=torch.int64))),
        "rotary": ({}, empty),
        "decode": ({}, empty),
        "fused": ({"deterministic": False}, empty),
        "additive": ({}, Companions(score_weight=meta(heads, head_dim))),
        "packed": ({"longest": (length // 2, length // 2)}, Companions(cu_q=cu, cu_k=cu)),
    }
    return found[name]


def compile_kernel(target: str, kernel: Kernel, head_dim: int, dtype: str, causal: bool, *, group: int = 4,
                   feature: str = "plain", head_dim_v: int | None = None, config: TileConfig | None = None,
                   rung: str = "pointers") -> list[Report]:
    """Compiles one kernel for ``target`` as ``attention`` would launch it on long sequences, and reads the binary.

    One report, or two, "dk" and "dv", where the configuration gives each a launch of its own. ``feature``: of ``FEATURES``;
    ``rung``: of ``settings.RUNGS``, for a forward on sm_90.
    """
    element = DTYPES[dtype]
    head_dim_v = head_dim_v or head_dim
    driver.set_active(_NoDriver(gpu_target(target)))
    batch, heads, length = (1 if feature == "packed" else 2), 8, 4096

    def tensor(n_heads: int, *last: int, dtype: torch.dtype = element) -> torch.Tensor:
        return torch.empty(batch, n_heads, length, *last, dtype=dtype, device="meta")

    q, k = tensor(heads, head_dim), tensor(heads // group, head_dim)
    v, out = tensor(heads // group, head_dim_v), tensor(heads, head_dim_v)
    delta = lse = tensor(heads, dtype=torch.float64 if element == torch.float64 else torch.float32)
    fields, companions = _feature(feature, length, heads, head_dim, element)
    spec = AttentionSpec(head_dim**-0.5, Window(None, 0 if causal else None), **fields)
    if spec.score_mods:  # as ``layout.lse_like`` has it
        lse = torch.empty(2, *delta.shape, dtype=delta.dtype, device="meta")
    call, roles = lower(q, k, spec, companions)
    call = call._replace(precision=dtype if dtype.startswith("tf32") else "ieee")
    if config is None and kernel == "rotary":
        config = choose_rotary(head_dim)
    elif config is None and kernel == "combine":
        config = choose_combine(head_dim_v)
    elif config is None and kernel == "shares":
        config = choose_shares(group, head_dim, head_dim_v, element, target)
    elif config is None and feature == "fused":
        config = choose_fused(head_dim, head_dim_v, element, target)
        if config is None:
            return []
    elif config is None and kernel in ("statistics", "backward", "ordered"):
        if max(head_dim, head_dim_v) > 128:
            return []
        config = choose_gluon_backward(head_dim, head_dim_v)
    elif config is None and rung != "pointers":
        config = fit_operands(choose_rung(rung, head_dim, head_dim_v, call.heavy), call.loaded_bytes, element)
    elif config is None and call.extras.additive:
        config = choose_additive(kernel, head_dim, target)
    elif config is None:
        config = choose(kernel, head_dim, head_dim_v, element, target, call.heavy)
        config = fit_operands(config, call.loaded_bytes, element)
    compiled: list[tuple[Any, str, float]] = []

    def compile_only(function: Any, programs: int, args: tuple[Any, ...], tile: TileConfig) -> None:
        function.device_caches.clear()  # which know kernels by device, whatever its target, and say nothing of what they hold
        log, start = io.StringIO(), _cpu_seconds()
        lacking = fences.lacking(target, tile.descriptors)
        tile = fences.fenced(tile) if lacking else tile
        with contextlib.redirect_stdout(log), fences.putting_in() if lacking else contextlib.nullcontext():
            binary = function.warmup(*args, tile, grid=(programs,), num_warps=tile.num_warps, num_stages=tile.num_stages,
                                     **dict(tile.options))
        compiled.append((binary, log.getvalue(), _cpu_seconds() - start))

    def ignore(*_: Any) -> None:
        """A launcher for what is not looked at."""

    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        if kernel == "list":
            list_tiles(call, q, k, config, keys_first=False, launch=compile_only)
        tiles = list_tiles(call, q, k, config, keys_first=kernel == "dkv", launch=ignore)
        if kernel == "rotary":
            angles = tensor(1, head_dim // 2, dtype=torch.float32)[:, 0]
            launch_rotary(q, angles, angles, q, interleaved=False, back=False, config=config, launch=compile_only)
        elif kernel == "shares":  # one query of each head of a group
            rows, shares, shares_lse = (x[:, : heads // group, :group] for x in (q, out, lse))
            call = call._replace(n_queries=group, left=None, right=None)
            launch_forward(rows, k, v, shares.to(lse.dtype), shares_lse, None, (), call, config=config, launch=compile_only,
                           split=Split(out.stride(1), lse.stride(1)), n_shares=16)
        elif kernel == "combine":
            launch_combine(out[None, :, :, :1].to(lse.dtype), lse[None, :, :, :1], out[:, :, :1], lse[:, :, :1], None,
                           config=config, launch=compile_only)
        elif rung == "gluon":
            _launch_gluon(kernel, (q, k, v, out, lse, companions.sinks), spec.softcap, call, config, compile_only)
        elif kernel == "forward":
            launch_forward(q, k, v, out, lse, companions.sinks, tiles, call, config=config, launch=compile_only,
                           precise=bool(call.extras.additive))  # which always keep the residual
        elif kernel == "delta":
            launch_delta(out, out, lse, None, delta, call, config=config, launch=compile_only)
        elif kernel == "dq":
            if call.extras.additive:
                call, _ = with_weight_sums(call, q, config)
            launch_dq(q, k, v, out, lse, delta, q, tiles, call, config=config, launch=compile_only)
        elif kernel == "dkv":
            total = out.to(delta.dtype) if feature == "fused" else None
            launch_dkv(q, k, v, out, lse, delta, k, v, tiles, call, config=config, dq=total, launch=compile_only)
        elif kernel == "operand_grad":
            role = next(role for role in roles if role is not None)
            launch_operand_grad(q, k, v, out, lse, delta, companions.operands[0], *role, call, config=config,
                                launch=compile_only)
    names = (kernel,) if len(compiled) == 1 else ("dk", "dv")
    return [
        Report(
            target=target, kernel=name, dtype=dtype, head_dim=head_dim, causal=causal, feature=feature, rung=rung,
            config=describe(config),
            shared_bytes=binary.metadata.shared, shared_limit=SHARED_LIMIT.get(target, 64 * 1024),
            tensor_memory=getattr(binary.metadata, "tmem_size", None) or 0,
            compile_seconds=round(seconds, 2), triton=triton.__version__,
            **_figures(sass.read(binary, log, target)),
        )
        for name, (binary, log, seconds) in zip(names, compiled, strict=True)
    ]


def _launch_gluon(kernel: Kernel, tensors: tuple[Any, ...], softcap: float | None, call: Call, config: TileConfig,
                  launch: Launcher) -> None:
    from fused_attn.kernels.hopper import backward, forward, workspace  # here: Gluon is imported where it is asked for
    from fused_attn.kernels.hopper.problem import tile_width

    q, k, v, out, lse, sinks = tensors
    around = TileConfig(config.block_m, config.block_n, num_warps=4, num_stages=1)
    rows = call.batch * q.shape[1] * -(-call.n_queries // config.block_m)
    stats = lse.new_empty(2, rows, config.block_m)
    sums = lse.new_empty(rows, config.block_m * tile_width(q.shape[3]))
    if kernel == "forward":
        forward.launch_forward(q, k, v, out, lse, sinks, softcap, call, config=config, launch=launch)
    elif kernel == "statistics":
        workspace.launch_statistics(out, out, lse, None, stats, call, config=around, launch=launch)
    elif kernel == "backward":
        backward.launch_backward(q, k, v, out, stats, sums, k, v, call, config=config, launch=launch)
    else:
        workspace.launch_ordered(sums, q, call, config=around, launch=launch)


def describe(config: TileConfig) -> str:
    """A configuration in one word: ``128x64 w8 s2 edge1 wide nolicm``."""
    words = [f"{config.block_m}x{config.block_n}", f"w{config.num_warps}", f"s{config.num_stages}"]
    if config.edge_stages is not None:
        words.append(f"edge{config.edge_stages}")
    words += ["wide"] * config.wide + ["nolicm"] * config.disable_licm + ["split"] * config.split
    words += ["descriptors"] * config.descriptors + ["specialized"] * config.specialize
    return " ".join([*words, *(f"{name}={value}" for name, value in config.options)])


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
