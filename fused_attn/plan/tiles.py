"""Tile configurations: one shipped choice for every kernel, head dim, element type and target, and no autotuning.

The tables are static findings: large tiles that compile for the target with little or no spilling (docs/compile-matrix.json
holds what each gives; CONTRIBUTING.md tells how to check a change). Only a timing on the card can rank them; none has been
made yet.
"""

import dataclasses
import functools
from typing import Literal

import torch

from fused_attn.call.spec import AttentionSpec, OtherTensors
from fused_attn.call.spec import TileConfig as T
from fused_attn.targets import TARGETS, target_of

Kernel = Literal["forward", "splits", "combine", "delta", "dq", "dkv", "operand_grad", "list", "rotary",
                 "statistics", "backward", "ordered", "fused", "tangent", "dq_tangent",
                 "dkv_tangent"]

_CDNA = (("matrix_instr_nonkdim", 16),)  # 16x16 matrix instructions: the default 32x32 ones fit 64-row tiles badly
_CDNA2 = (*_CDNA, ("waves_per_eu", 2))

# target -> kernel -> widest head dim it serves -> T(queries, keys, warps, pipeline stages), for fp16 and bf16.
_HALVES: dict[str, dict[str, dict[int, T]]] = {
    "sm_80": {
        "forward": {32: T(128, 64, 4, 3), 64: T(128, 64, 4, 3), 128: T(128, 32, 4, 2), 192: T(128, 64, 8, 2),
                    256: T(64, 64, 4, 2, wide=True)},
        "dq": {32: T(128, 64, 4, 2), 64: T(128, 32, 4, 2), 96: T(128, 32, 4, 2), 128: T(128, 32, 4, 2), 160: T(128, 32, 8, 2),
               192: T(128, 32, 8, 2), 256: T(64, 64, 8, 1)},
        "dkv": {32: T(64, 128, 4, 2), 64: T(32, 128, 4, 2, edge_stages=1), 96: T(32, 64, 4, 2), 112: T(32, 64, 4, 2),
                128: T(64, 64, 4, 2), 160: T(16, 64, 4, 2), 192: T(16, 64, 4, 2),
                256: T(64, 64, 8, 1, wide=True)},
    },
    # 99 KiB of shared memory
    "sm_86": {
        "forward": {32: T(128, 64, 4, 3), 64: T(128, 64, 4, 2, wide=True), 128: T(128, 32, 8, 3), 256: T(32, 32, 4, 2)},
        "dq": {32: T(64, 64, 4, 3), 64: T(128, 64, 8, 2), 96: T(128, 32, 8, 2), 128: T(128, 32, 8, 2), 160: T(64, 32, 8, 2),
               256: T(32, 32, 4, 1)},
        "dkv": {32: T(32, 128, 4, 2, edge_stages=1), 64: T(32, 128, 8, 2), 96: T(32, 64, 4, 2), 128: T(64, 64, 8, 2),
                160: T(16, 64, 4, 2), 256: T(32, 32, 4, 1, wide=True)},
    },
    # A pipelined edge loop makes ptxas serialise every wgmma (C7515), so that loop has one stage.
    "sm_90": {
        "forward": {32: T(128, 64, 4, 3, edge_stages=1), 64: T(128, 64, 4, 3, edge_stages=1),
                    128: T(128, 128, 8, 2, edge_stages=1), 256: T(128, 64, 8, 2, edge_stages=1, disable_licm=True)},
        "dq": {32: T(128, 64, 8, 3, edge_stages=1), 64: T(128, 64, 8, 3, edge_stages=1),
               128: T(128, 128, 8, 2, edge_stages=1), 256: T(128, 32, 8, 2, edge_stages=1)},
        "dkv": {32: T(64, 128, 8, 2, edge_stages=1), 64: T(64, 128, 8, 2, edge_stages=1),
                128: T(64, 128, 8, 2, edge_stages=1, disable_licm=True),
                256: T(32, 128, 8, 1, disable_licm=True, separate=True)},
    },
    "sm_100": {
        "forward": {32: T(128, 64, 4, 3), 64: T(128, 64, 4, 3), 128: T(128, 128, 8, 2, edge_stages=1),
                    256: T(128, 64, 8, 2, edge_stages=1, disable_licm=True)},
        "dq": {32: T(128, 64, 8, 2), 64: T(128, 64, 8, 2, edge_stages=1), 128: T(128, 64, 8, 2), 256: T(128, 64, 8, 1)},
        "dkv": {32: T(64, 128, 8, 2), 64: T(64, 128, 8, 2), 128: T(64, 128, 8, 1, disable_licm=True),
                256: T(64, 64, 8, 1, disable_licm=True)},
    },
    "gfx942": {
        "forward": {32: T(128, 64, 4, 1, options=_CDNA), 64: T(128, 64, 4, 1, options=_CDNA),
                    128: T(64, 64, 4, 1, options=_CDNA), 256: T(64, 32, 4, 1, options=_CDNA2)},
        "dq": {32: T(64, 64, 4, 1, options=_CDNA), 64: T(64, 64, 4, 1, options=_CDNA),
               128: T(64, 32, 4, 1, options=_CDNA), 256: T(64, 16, 4, 1, options=_CDNA)},
        "dkv": {32: T(32, 128, 4, 1, options=_CDNA), 64: T(64, 64, 4, 1, options=_CDNA2),
                128: T(32, 64, 4, 1, options=_CDNA2), 256: T(16, 64, 4, 1, options=_CDNA)},
    },
    "gfx1100": {
        "forward": {32: T(64, 32, 4, 1), 64: T(64, 32, 4, 1), 128: T(64, 16, 4, 1), 256: T(32, 16, 8, 1)},
        "dq": {32: T(64, 32, 4, 1), 64: T(64, 32, 4, 1), 128: T(32, 16, 4, 1), 256: T(16, 16, 4, 1, wide=True)},
        "dkv": {32: T(32, 64, 4, 1), 64: T(16, 32, 4, 1), 128: T(16, 32, 4, 1, separate=True),
                256: T(16, 16, 4, 1, separate=True)},
    },
}

_HALVES["sm_120"] = {**_HALVES["sm_86"], "forward": {**_HALVES["sm_86"]["forward"], 64: T(64, 64, 4, 3)}}

# What replaces these entries where a bias, a mask or dropout takes registers beside each tile of scores.
_HEAVY: dict[str, dict[str, dict[int, T]]] = {
    "sm_80": {
        "forward": {64: T(128, 64, 8, 3), 128: T(128, 32, 8, 3), 192: T(128, 32, 8, 2), 256: T(64, 64, 8, 2)},
        "dq": {32: T(64, 64, 4, 3), 64: T(128, 32, 8, 2), 96: T(64, 32, 8, 2), 128: T(64, 64, 8, 2), 160: T(32, 16, 4, 1),
               192: T(64, 32, 8, 2), 256: T(32, 32, 4, 1)},
        "dkv": {32: T(32, 128, 4, 2, edge_stages=1), 64: T(32, 128, 8, 2, edge_stages=1), 96: T(16, 64, 4, 1),
                112: T(64, 64, 8, 2), 128: T(64, 64, 8, 2), 160: T(16, 64, 4, 1, separate=True), 192: T(32, 32, 4, 1)},
    },
    "sm_90": {
        "forward": {64: T(128, 64, 8, 3, edge_stages=1), 128: T(128, 64, 8, 2, edge_stages=1, disable_licm=True)},
        "dq": {128: T(128, 64, 8, 2, edge_stages=1)},
        "dkv": {64: T(32, 128, 8, 2, edge_stages=1), 128: T(32, 64, 4, 2, edge_stages=1, disable_licm=True, wide=True)},
    },
    "sm_86": {
        "forward": {64: T(128, 64, 8, 2)},
        "dq": {64: T(128, 32, 8, 2), 96: T(64, 32, 8, 2), 128: T(64, 64, 8, 2), 160: T(32, 16, 4, 1)},
        "dkv": {96: T(16, 64, 4, 1), 160: T(16, 64, 4, 1, separate=True)},
    },
    "sm_100": {"forward": {64: T(128, 64, 8, 2, edge_stages=1), 128: T(128, 64, 8, 2, edge_stages=1)}},
    "gfx942": {"dkv": {64: T(32, 64, 4, 1, options=_CDNA)}},
}
_HEAVY["sm_120"] = _HEAVY["sm_86"]

# Of the kernels that hold tangents beside their tiles, where a bias, a mask or dropout takes registers too and where not: at
# most 64 bytes of spill in plain attention, none of them in a loop. Head dims past these take the smallest tiles, and so do
# targets that are not listed.
_TANGENTS: dict[str, dict[str, dict[int, tuple[T, T]]]] = {
    "sm_80": {
        "tangent": {64: (T(128, 64, 8, 2), T(128, 32, 8, 2, edge_stages=1)),
                    128: (T(64, 32, 8, 2, edge_stages=1), T(64, 32, 8, 1))},
        "dq_tangent": {64: (T(128, 32, 8, 2, edge_stages=1), T(64, 32, 8, 2, edge_stages=1)),
                       128: (T(64, 32, 8, 1), T(32, 32, 4, 1))},
        "dkv_tangent": {64: (T(32, 64, 4, 1, wide=True), T(32, 64, 8, 1)),
                        128: (T(32, 64, 8, 1), T(16, 64, 4, 1, separate=True))},
    },
    "sm_90": {
        "tangent": {64: (T(128, 64, 8, 2, edge_stages=1), T(128, 32, 8, 1)),
                    128: (T(128, 32, 8, 2, edge_stages=1), T(32, 32, 4, 1))},
        "dq_tangent": {64: (T(128, 32, 8, 2, edge_stages=1),) * 2, 128: (T(128, 32, 8, 1), T(32, 32, 4, 1))},
        "dkv_tangent": {64: (T(32, 128, 8, 1), T(16, 64, 4, 1)), 128: (T(16, 64, 4, 1, separate=True), T(16, 32, 4, 1))},
    },
}
_TANGENTS["sm_100"] = _TANGENTS["sm_90"]

# Head dims beyond 256, up to those of latent attention (576 for keys, 512 for values), where shared memory has room for
# 32 rows of everything, and where it has not.
_WIDE: dict[str, T] = {"forward": T(32, 32, 8, 1), "dq": T(32, 32, 8, 1), "dkv": T(32, 32, 8, 1, separate=True)}
_WIDE_SMALL: dict[str, T] = {"forward": T(16, 16, 4, 1), "dq": T(16, 16, 4, 1), "dkv": T(16, 16, 4, 1, separate=True)}
MAX_HEAD_DIM = 576


def against(head_dim: int, head_dim_v: int, dtype: torch.dtype, arch: str) -> str | None:
    """Why a target cannot run these head dims: the smallest tiles of fp32 and fp64 may need more shared memory than it has."""
    if dtype not in (torch.float32, torch.float64) or arch not in TARGETS or arch.startswith("gfx"):
        return None
    limit = TARGETS[arch].shared
    widths = 2 * (head_dim + head_dim_v) + (max(head_dim, head_dim_v) if dtype == torch.float64 else 0)
    needed = 16 * dtype.itemsize * widths  # what the backward's 16-row tiles of q, k, v, dO take (docs/compile-matrix.json)
    if needed <= limit:
        return None
    return (f"{dtype} with head dims {head_dim} and {head_dim_v} needs {needed // 1024} KiB of shared memory; "
            f"{arch} has {limit // 1024}")


def fit_operands(config: T, loaded_bytes: int, dtype: torch.dtype) -> T:
    """``config``, not pipelined where operands take more bytes for each score than the tables reckon with.

    They reckon with one operand of the inputs' type. A bias in fp32 beside a mask needs more shared memory for each stage
    of the pipeline than a small card has, and on sm_90 serialises the matrix products (C7515).
    """
    if loaded_bytes <= dtype.itemsize or config.num_stages == 1:
        return config
    return dataclasses.replace(config, num_stages=1, edge_stages=None)


@functools.cache
def choose(kernel: Kernel, head_dim: int, head_dim_v: int, dtype: torch.dtype, arch: str, heavy: bool = False) -> T:
    """The shipped configuration of a kernel; head dims between the tables' use the next wider one.

    ``heavy`` where a bias, a mask or dropout takes registers beside each tile of scores.
    """
    widest = max(head_dim, head_dim_v)
    if not 1 <= widest <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim: expected 1 to {MAX_HEAD_DIM}; got {widest}")
    if arch == "interpreter":  # small enough that tests cross tile edges, and not square
        return {"dkv": T(32, 64, 1, 1), "operand_grad": T(32, 32, 1, 1)}.get(kernel, T(64, 32, 1, 1))
    if kernel == "list":  # of the forward's tiles
        kernel = "forward"
    if kernel == "delta":
        return T(64 if widest <= 128 else 32 if widest <= 256 else 16, 64, 4, 1)
    if dtype == torch.float64:
        return T(16, 16, 4, 1)
    if dtype == torch.float32:
        if widest > 128:
            return T(16, 16, 4, 1)
        return T(32, 32, 8 if kernel == "dkv" else 4, 1)
    if widest > 256:
        roomy = target_of(arch).tables in ("sm_80", "sm_90", "sm_100")
        return (_WIDE if roomy else _WIDE_SMALL).get(kernel, T(16, 16, 4, 1))
    if kernel == "operand_grad":  # square, for the sums along diagonals
        large = widest <= (128 if arch in ("sm_90", "sm_100") else 64) and not arch.startswith("gfx11")
        return T(64, 64, 8, 1) if large else T(32, 32, 4, 1)
    if kernel in ("tangent", "dq_tangent", "dkv_tangent"):
        table = _TANGENTS.get(target_of(arch).tables, {}).get(kernel, {})
        return next((table[width][heavy] for width in sorted(table) if widest <= width), T(16, 16, 4, 1))
    width = served(kernel, head_dim, head_dim_v, arch)
    shipped = _table(arch)[kernel][width]
    lean: T = _HEAVY.get(target_of(arch).tables, {}).get(kernel, {}).get(width, shipped)
    return lean if heavy else shipped


def _table(arch: str) -> dict[str, dict[int, T]]:
    return _HALVES[target_of(arch).tables]


def served(kernel: str, head_dim: int, head_dim_v: int, arch: str) -> int:
    """The widest head dim of the entry that serves these in fp16 and bf16, up to 256; tuned tiles are kept under it."""
    widest = max(head_dim, head_dim_v)
    if arch == "interpreter":
        return widest
    widths = _FUSED.get(target_of(arch).tables, {}) if kernel == "fused" else _table(arch)[kernel]
    return next((width for width in sorted(widths) if widest <= width), widest)


_Single = functools.partial(T, single_atomics=True)  # before sm_90, atomics take one float a lane

# One kernel for dK, dV and, by atomics, dQ of plain attention in fp16 and bf16; targets and widths not listed have two kernels,
# and so have those of None: a second block of 16 or 32 columns breaks ptxas there. _SEPARATE_FIRST: where two kernels come
# first all the same, until a card's own timing says otherwise, since shared memory binds the one, or it spills.
_FUSED: dict[str, dict[int, T | None]] = {
    "sm_80": {32: _Single(32, 128, 4, 2), 64: _Single(64, 64, 4, 2),
              128: _Single(64, 64, 8, 2, disable_licm=True), 160: None,
              192: _Single(32, 64, 8, 1, disable_licm=True),
              256: T(64, 64, 8, 1, wide=True, disable_licm=True)},
    "sm_86": {64: _Single(32, 64, 4, 2), 128: _Single(64, 64, 8, 2, disable_licm=True)},
    "sm_90": {64: T(64, 128, 8, 2, edge_stages=1), 128: T(64, 128, 8, 2, edge_stages=1, disable_licm=True)},
    "sm_100": {64: T(64, 128, 8, 2), 128: T(64, 64, 8, 1)},
    "gfx942": {64: _Single(32, 64, 4, 1, options=_CDNA), 128: _Single(32, 64, 4, 1, options=_CDNA)},
}
_FUSED["sm_120"] = {64: T(32, 64, 4, 2), 128: T(64, 64, 8, 2, disable_licm=True)}
_SEPARATE_FIRST = {"sm_80": (32, 64, 128, 192, 256), "sm_90": (128,)}


def separate_first(head_dim: int, head_dim_v: int, arch: str) -> bool:
    """Whether the model has dQ made by a kernel of its own, as the quicker way, where one kernel could make all three."""
    return served("fused", head_dim, head_dim_v, arch) in _SEPARATE_FIRST.get(target_of(arch).tables, ())


@functools.cache
def choose_fused(head_dim: int, head_dim_v: int, dtype: torch.dtype, arch: str) -> T | None:
    """The configuration of the fused backward, or None where there is none."""
    if arch == "interpreter":
        return T(32, 64, 1, 1)
    tried = dtype in (torch.float16, torch.bfloat16) and arch in TARGETS  # the cost of atomics elsewhere is not known
    table = _FUSED.get(target_of(arch).tables, {}) if tried else {}
    return next((table[width] for width in sorted(table) if max(head_dim, head_dim_v) <= width), None)


# The forward's schedules on sm_90 beside the table above. 240 or 160 registers a thread for two or three consumers.
_SPECIALIZED = {64: T(128, 128, 4, 2), 128: T(128, 128, 4, 2), 256: T(128, 64, 4, 2)}
_GLUON_OPTIONS = (("maxnreg", 168), ("enable_fp_fusion", True))
_GLUON = {64: T(128, 128, 4, 4, options=_GLUON_OPTIONS), 128: T(128, 128, 4, 2, options=_GLUON_OPTIONS),
          256: T(128, 64, 4, 2, options=_GLUON_OPTIONS)}
_DESCRIPTORS = {64: T(128, 64, 4, 3, edge_stages=1), 128: T(128, 64, 4, 2, edge_stages=1, disable_licm=True),
                256: T(128, 64, 8, 2, edge_stages=1)}


# The Gluon backward's main kernel; those around it take the same tiles.
_GLUON_BACKWARD = {64: T(128, 128, 4, 2, options=_GLUON_OPTIONS), 128: T(64, 128, 4, 2, options=_GLUON_OPTIONS)}


@functools.cache
def choose_gluon_backward(head_dim: int, head_dim_v: int) -> T:
    """The configuration of the Gluon backward on sm_90, in fp16 and bf16 up to head dim 128."""
    return _GLUON_BACKWARD[64 if max(head_dim, head_dim_v) <= 64 else 128]


@functools.cache
def choose_hopper(schedule: str, head_dim: int, head_dim_v: int, heavy: bool = False) -> T:
    """The forward's configuration on sm_90 for "descriptors", "specialized" or "gluon", in fp16 and bf16 up to head dim 256."""
    widest = max(head_dim, head_dim_v)
    if schedule == "descriptors" and heavy:
        return dataclasses.replace(choose("forward", head_dim, head_dim_v, torch.bfloat16, "sm_90", heavy), descriptors=True)
    tables = {"descriptors": _DESCRIPTORS, "specialized": _SPECIALIZED, "gluon": _GLUON}
    config = next(config for width, config in tables[schedule].items() if widest <= width)
    return dataclasses.replace(config, descriptors=schedule != "gluon", specialize=schedule == "specialized")


# Few queries over many keys, as in decoding: the keys are cut into splits, to have enough programs to fill a GPU.
FEW_QUERIES, MANY_KEYS = 64, 1024
MAX_SPLITS = 128
SPLIT = 256  # least number of keys in a split, where a card's own timing says nothing else
SPLIT_A_ROW = 8  # and for each row of queries, so that what splits write and read again stays below a quarter


def n_splits(n_queries: int, n_keys: int, longest_q: int, longest_k: int, group: int, least: int | None = None) -> int:
    """How many splits the keys are cut into: by lengths alone, so that a batch entry's result is the same in any batch.

    ``n_queries`` and ``n_keys`` are those of the tensors, ``longest_q`` and ``longest_k`` of the longest sequence in them;
    ``least``: of the keys in a split, a power of two, in place of SPLIT.
    """
    if longest_q > FEW_QUERIES or longest_k < MANY_KEYS:
        return 1
    split = max(least or SPLIT, 1 << (-(-longest_k // MAX_SPLITS) - 1).bit_length())
    return max(1, min(-(-longest_k // split), n_keys // (SPLIT_A_ROW * max(1, n_queries) * group)))


def unseen_keys(spec: AttentionSpec, others: OtherTensors, n_queries: int, n_keys: int) -> int:
    """How many keys come before the first that some query's window reaches; 0 where keys differ by more than position."""
    plain = not (spec.score_mods or spec.mask_mods or spec.dropout_p) and others.cu_k is None and others.used_k is None
    return max(0, spec.offset(n_queries, n_keys) - spec.window.left) if plain and spec.window.left is not None else 0


@functools.cache
def choose_splits(rows: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, arch: str) -> T:
    """The configuration of the forward over splits of the keys, with as few rows of queries as there are."""
    widest = max(head_dim, head_dim_v)
    if arch == "interpreter":
        return T(16, 32, 1, 1)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if dtype in (torch.float32, torch.float64):
        return T(16, 16 if widest > 128 else 32, 4, 1)
    if widest > 256:
        return T(16, 16 if target_of(arch).shared < 128 * 1024 else 32, 4, 1)
    stages = 1 if arch.startswith("gfx") else 3 if widest <= 128 else 2
    block_n = 64 if widest <= 128 or target_of(arch).shared > 128 * 1024 else 32
    return T(block_m, block_n, 4, stages, edge_stages=1, options=_CDNA if arch.startswith("gfx9") else ())


@functools.cache
def choose_combine(head_dim_v: int) -> T:
    """The configuration that joins splits: how many at a time, and how many there may be."""
    return T(16 if head_dim_v <= 256 else 4, MAX_SPLITS, 4, 1)


MAX_ADDITIVE = 256  # head dim: a tile of tanh is [rows, rows, head dim] in registers


@functools.cache
def choose_additive(kernel: Kernel, head_dim: int, arch: str) -> T:
    """The configuration of every kernel of an additive score: 64 values of the tile of tanh in each thread.

    On NVIDIA targets that spills nothing up to head dim 64, and in the forward up to 128.
    """
    if arch == "interpreter":
        return T(16, 16, 1, 1) if kernel == "operand_grad" else T(32, 16, 1, 1)  # square, for the sums along diagonals
    warps = 4 if head_dim <= 64 else 8 if head_dim <= 128 else 16
    return T(16, 16, warps if arch.startswith("gfx9") else 2 * warps, 1, separate=head_dim > 64)


@functools.cache
def choose_rotary(head_dim: int) -> T:
    """The configuration of the rotary kernel: about 4096 elements of each head a program; memory is its bound."""
    return T(max(1, 4096 // max(64, 1 << (head_dim - 1).bit_length())), 1, 4, 1)
