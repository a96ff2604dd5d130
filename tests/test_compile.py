"""Offline compilation: the default kernels for real targets, read from their machine code, with no GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attn import targets
from fused_attn.call.spec import TileConfig
from fused_attn.plan.tiles import choose

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def compiled(*arguments: str) -> list[dict]:
    result = python("-m", "fused_attn", "compile", *arguments, "--json", "--gate")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


SOME = [("sm_80", "64", "bf16"), ("gfx942", "64", "bf16")]  # tests/test_profile.py has others
MOST = [("sm_86", "128", "fp16"), *((target, dim, dtype) for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for dim in ("32", "64", "128") for dtype in ("bf16", "fp16") if (target, dim, dtype) not in SOME)]


@pytest.mark.few(1)
@pytest.mark.kernels
@pytest.mark.parametrize(("target", "dim", "dtype"), [*SOME, *(pytest.param(*job, marks=pytest.mark.slow) for job in MOST)])
def test_default_kernels_neither_spill_nor_miss_the_matrix_units(target, dim, dtype):
    """--gate fails on more than a little local memory in main loops, over 160 bytes of spill, shared memory that does not fit,
    wgmma that ptxas serialises, missing matrix instructions and over ten seconds of compilation."""
    rows = compiled("--target", target, "--head-dim", dim, "--dtype", dtype, "--causal")
    assert [row["kernel"] for row in rows] == ["forward", "delta", "dq", "dkv"]
    instruction = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}.get(target, "HMMA")
    for row in rows:
        assert row["spill_bytes"] <= 160
        assert row["local_in_loops"] <= 0.04 * sum(row["loop_instructions"])
        assert row["registers"] > 0
        if row["kernel"] != "delta":
            assert any(name.startswith(instruction) for name in row["matrix"]), row["matrix"]
            assert row["loop_instructions"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86"])
@pytest.mark.parametrize(("feature", "dims"), [("plain", ("96", "136", "160", "192")), ("bias", ("96", "144", "160")),
                                               ("mask", ("96", "160"))])
def test_two_blocks_of_columns_do_not_break_ptxas(target, feature, dims):
    """Gradients at head dims whose sums lie in two blocks: some tiles make it fall to 32 registers, and spill 12 KB."""
    rows = compiled("--target", target, "--head-dim", *dims, "--feature", feature, "--pass", "backward", "--causal")
    assert {row["head_dim"] for row in rows} == set(map(int, dims))
    assert max(row["spill_bytes"] for row in rows) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("target", [name for name in targets.KNOWN if name not in targets.COMPILED])
def test_cards_that_take_anothers_tiles_compile_them(target):
    """Those that the compile matrix does not have."""
    for row in compiled("--target", target, "--head-dim", "64", "--dtype", "bf16", "--causal"):
        assert row["matrix"] or row["kernel"] == "delta", row


@pytest.mark.kernels
@pytest.mark.parametrize("dim", [72, pytest.param(40, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)])
def test_rows_of_eight_elements_are_loaded_whole(dim):
    """Head dims that 8 divides and 16 does not: 16 bytes at a time, which Triton does not find by itself."""
    found = python("-c", f"""
import re
from triton.runtime import driver
from fused_attn.tools.compile import offline
driver.set_active(offline._NoDriver(offline.gpu_target("sm_80")))
for kernel in ("forward", "dq", "dkv"):
    for launch in offline.launches("sm_80", kernel, {dim}, "bf16", True, 1, "plain", {dim}, None, "pointers"):
        ptx = offline._compile(launch, "sm_80")[0].asm["ptx"]
        print(kernel, len(re.findall(r"ld.global\\S*.b16", ptx)), len(re.findall(r"cp.async.cg.shared.global", ptx)))
""")
    assert found.returncode == 0, found.stderr
    for kernel, narrow, whole in (line.split() for line in found.stdout.splitlines()):
        assert narrow == "0", found.stdout
        assert int(whole) > 0, kernel


def test_full_precision_compiles():
    for row in compiled("--target", "sm_80", "--head-dim", "64", "--dtype", "fp64", "--pass", "forward"):
        assert any(name.startswith("DMMA") for name in row["matrix"])


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize(("target", "dtype", "feature"), [
    ("sm_80", "fp64", "mask"), *(pytest.param(*job, marks=pytest.mark.slow) for job in (
        ("sm_90", "fp64", "bias bf16"), ("sm_90", "fp64", "mask"), ("sm_80", "fp64", "bias bf16"),
        ("sm_80", "fp64", "bias fp32, mask"), ("sm_90", "fp32", "bias bf16"), ("sm_100", "fp64", "mask"),
        ("gfx942", "fp64", "mask"), ("sm_80", "tf32", "mask"), ("sm_90", "tf32", "bias bf16")))])
def test_operands_narrower_than_the_inputs_compile(target, dtype, feature):
    """Triton lays weights out by the narrowest load that they come from, and has no such layout of fp64."""
    rows = compiled("--target", target, "--head-dim", "64", "--dtype", dtype, "--causal", "--feature", feature)
    assert {"forward", "dq", "dkv"} <= {row["kernel"] for row in rows}


@pytest.mark.kernels
def test_a_mask_of_bytes_costs_halves_no_second_exp2():
    """Each weight once: by the narrowest load, a byte, the compiler would compute every one in two layouts."""
    tile, warps = 128 * 64, 8
    (forward,) = (row for row in compiled("--target", "sm_80", "--head-dim", "64", "--dtype", "bf16", "--feature", "mask",
                                          "--pass", "forward") if row["kernel"] == "forward")
    assert forward["config"].startswith("128x64 w8")
    # Two loops, over whole tiles and over partial ones; a thread's rows shrink what they have summed, one exp2 each.
    assert forward["loop_mix"]["MUFU"] <= 2 * (tile // (32 * warps) + 8)


@pytest.mark.slow
def test_fp32_by_tf32():
    """Tensor cores take fp32 as TF32, and the threefold form as three products of it."""
    products = []
    for precision in ("tf32", "tf32x3"):
        (row,) = compiled("--target", "sm_80", "--head-dim", "64", "--dtype", precision, "--pass", "forward", "--causal")
        assert all("TF32" in name for name in row["matrix"])
        products.append(sum(row["matrix"].values()))
    assert products[1] == 3 * products[0] > 0


@pytest.mark.slow
def test_a_kernel_that_was_compiled_before_is_compiled_again():
    """The list of tiles is one kernel whatever the type, and a process may ask for one target after another."""
    rows = compiled("--target", "sm_80", "--head-dim", "16", "--dtype", "bf16", "fp16", "--feature", "mask", "--pass",
                    "forward")
    assert [(row["kernel"], row["dtype"]) for row in rows] == [(kernel, dtype) for dtype in ("bf16", "fp16")
                                                               for kernel in ("list", "forward")]
    script = """if True:
        from fused_attn.tools.compile import offline
        for target in ("sm_80", "gfx942", "sm_90", "sm_80"):
            report, = offline.compile_kernel(target, "delta", 16, "bf16", False)
            print(report.instructions, type(report.code).__name__)
    """
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    first, _, other, last = result.stdout.splitlines()
    assert first == last != other


@pytest.mark.slow
def test_the_gate_sees_a_kernel_that_spills():
    script = """if True:
        from fused_attn.tools.compile import offline
        from fused_attn import targets
        from fused_attn.call.spec import TileConfig
        report, = offline.compile_kernel("sm_80", "forward", 128, "bf16", True, config=TileConfig(128, 64, 4, 3))
        print(report.problems())
    """
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert "bytes of spill" in result.stdout
    assert "of the main loops" in result.stdout


def test_a_new_length_never_compiles_again():
    """Lengths, offsets, windows and scales are run-time values; a new head dim is not."""
    script = """if True:
        import torch
        from triton.runtime import driver
        from fused_attn.tools.compile import offline
        from fused_attn.kernels import forward
        from fused_attn.kernels.launch import Call
        from fused_attn.plan.tiles import choose
        driver.set_active(offline._NoDriver(offline.gpu_target("sm_80")))
        kernels = set()
        def call(n_queries, n_keys, dim, right, scale):
            q, k = (torch.empty(1, 2, n, dim, dtype=torch.bfloat16, device="meta") for n in (n_queries, n_keys))
            lse = torch.empty(1, 2, n_queries, device="meta")
            call = Call(scale, None, right, n_keys - n_queries, "ieee", 1, n_queries, n_keys)
            config = choose("forward", dim, dim, torch.bfloat16, "sm_80")
            kernel, programs, args, tile = forward.forward_launch(q, k, k, q, lse, None, (), call, config=config)
            kernels.add(id(kernel.warmup(*args, tile, grid=(programs,), num_warps=tile.num_warps, num_stages=tile.num_stages)))
        for n_queries, n_keys, right, scale in ((1, 1, 0, .1), (1, 16, 1, .2), (16, 1000, 0, .1), (1001, 17, 16, 1.)):
            call(n_queries, n_keys, 64, right, scale)
        print(len(kernels))
        call(64, 64, 32, 0, .1)
        print(len(kernels))
    """
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1", "2"]


@pytest.mark.parametrize("arguments", [("--target", "sm90"), ("--target", "sm_90", "--dtype", "int8"), ()])
def test_bad_arguments_are_told(arguments):
    result = python("-m", "fused_attn", "compile", *arguments)
    assert result.returncode != 0
    assert "target" in result.stderr or "dtype" in result.stderr


# (queries, keys) that a shipped tile must have at least: smaller ones would compile cleanly and run slowly.
FLOOR = {
    "sm_80": {"forward": (128, 32), "dq": (128, 32), "dkv": (32, 64)},
    "sm_90": {"forward": (128, 64), "dq": (128, 64), "dkv": (32, 128)},
    "sm_100": {"forward": (128, 64), "dq": (128, 64), "dkv": (64, 128)},
    "gfx942": {"forward": (64, 64), "dq": (64, 32), "dkv": (32, 64)},
}


@pytest.mark.parametrize("target", FLOOR)
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_tiles_are_no_smaller_than_their_floor(target, dim):
    for kernel, (queries, keys) in FLOOR[target].items():
        config = choose(kernel, dim, dim, torch.bfloat16, target)
        assert config.block_m >= queries, (kernel, config)
        assert config.block_n >= keys, (kernel, config)


def test_every_target_has_a_configuration_for_every_call():
    for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_999", "gfx90a", "gfx950", "gfx1201", "gfx1301",
                   "xpu"):
        for kernel in ("forward", "delta", "dq", "dkv"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                for dim in (1, 16, 33, 64, 128, 129, 256):
                    config = choose(kernel, dim, 64, dtype, target)
                    assert isinstance(config, TileConfig)
                    assert dataclasses.astuple(config)[:2] == (config.block_m, config.block_n)


@pytest.mark.few(1)
@pytest.mark.kernels
@pytest.mark.parametrize("hopper", ["descriptors", "specialized", pytest.param("gluon", marks=pytest.mark.slow)])
def test_schedules_of_hopper_compile_without_spills(hopper):
    """On every Triton: causal forwards at head dims 64 and 128, and Gluon's backward, which may keep 4 bytes outside loops."""
    rows = compiled("--target", "sm_90", "--head-dim", "64", "128", "--causal", "--hopper", hopper)
    per_dim = ["forward", "statistics", "backward", "ordered"] if hopper == "gluon" else ["forward"]
    assert [row["kernel"] for row in rows] == 2 * per_dim
    for row in rows:
        assert row["spill_bytes"] <= (4 if row["kernel"] == "backward" else 0), row
        assert (row["local_in_loops"], row["warnings"]) == (0, [])
        assert row["kernel"] in ("statistics", "ordered") or any(name.startswith("HGMMA") for name in row["matrix"])


@pytest.mark.slow
@pytest.mark.kernels
def test_what_gluon_may_be_given_compiles():
    """Offsets of packed sequences in int64, and three consumers: 128 registers a thread are 64 Ki for 16 warps."""
    code = """if True:
        import dataclasses, torch
        from fused_attn.tools.compile import offline
        from fused_attn import targets
        from fused_attn.call.spec import TileConfig
        feature = offline._feature
        def wide(*given):
            fields, others = feature(*given)
            starts = torch.empty(3, dtype=torch.int64, device="meta")
            return fields, others._replace(cu_q=starts, cu_k=starts)
        three = TileConfig(192, 64, 4, 4, options=(("maxnreg", 128), ("enable_fp_fusion", True)))
        (report,) = offline.compile_kernel("sm_90", "forward", 64, "bf16", True, hopper="gluon", config=three)
        assert (report.spill_bytes, report.warnings, report.registers) == (0, [], 128), report
        offline._feature = wide
        (report,) = offline.compile_kernel("sm_90", "forward", 64, "bf16", True, hopper="gluon", feature="packed")
        assert report.spill_bytes == 0, report
    """
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
