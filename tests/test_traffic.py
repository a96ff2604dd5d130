"""What tiles move: wavefronts and sectors by hand, and the emulator's count of products beside that of the machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from support.ptx import launch

from fused_attn.emulator.schedule import LATE, Schedule

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).parents[1]


def counts(result, op):
    """Of the one instruction that begins so."""
    (found,) = (count for instruction, count in zip(result.program.kernel.instructions, result.counts, strict=True)
                if instruction.op.startswith(op))
    return {name: int(found[name]) for name in result.counts.dtype.names}


# 32 banks of 4 bytes. Lanes l read 4, 8 or 16 bytes at l * stride: (vector, bytes between lanes, wavefronts, the least).
@pytest.mark.parametrize(("vector", "stride", "wavefronts", "least"), [
    ("", 4, 1, 1), ("", 0, 1, 1), ("", 8, 2, 1), ("", 16, 4, 1), ("", 128, 32, 1), ("", 132, 1, 1),
    (".v2", 8, 2, 2), (".v2", 16, 4, 2), (".v4", 16, 4, 4), (".v4", 32, 8, 4), (".v4", 128, 32, 4), (".v4", 144, 4, 4)])
def test_wavefronts_of_shared_loads(vector, stride, wavefronts, least):
    n = int(vector[2:] or 1)
    registers = ", ".join(f"%x{k}" for k in range(n))
    body = f""".reg .b32 %at, %base, {registers};
    mov.u32 %base, smem; mad.lo.s32 %at, %lane, {stride}, %base;
    ld.shared{vector}.b32 {f"{{{registers}}}" if vector else registers}, [%at];"""
    found = counts(launch(body, [np.zeros(1)], shared=8192, schedule=Schedule(races=False)), "ld.shared")
    assert (found["wavefronts"], found["least_wavefronts"]) == (wavefronts, least)


# 32 lanes of 4 bytes: 128, which is 4 sectors, or one each; atomics are counted like stores.
@pytest.mark.parametrize("what", ["ld", "red"])
@pytest.mark.parametrize(("stride", "first", "sectors"), [(4, 0, 4), (4, 16, 5), (16, 0, 16), (32, 0, 32), (0, 0, 1)])
def test_sectors_of_global_memory(what, stride, first, sectors):
    room = np.zeros(1024 + 8, np.float32)
    start = -(room.ctypes.data // 4) % 8  # of a sector
    body = f""".reg .b64 %at; .reg .f32 %x; mov.f32 %x, 0f00000000;
    mad.wide.u32 %at, %lane, {stride}, %a0; add.s64 %at, %at, {first};
    {"ld.global.f32 %x, [%at];" if what == "ld" else "red.global.add.f32 [%at], %x;"}"""
    result = launch(body, [room[start : start + 1024]])
    found = counts(result, f"{what}.global")
    assert (found["requests"], found["sectors"], found["least_sectors"]) == (1, sectors, 4)


@pytest.mark.parametrize("there", [32, 5, 0])
def test_a_copy_into_shared_memory_is_one_request(there):
    """cp.async of 16 bytes a lane, of which ``there`` lanes have something to read and the others write zeros."""
    source = np.zeros(128 + 8, np.float32)
    start = -(source.ctypes.data // 4) % 8
    body = f""".reg .b64 %at; .reg .b32 %to, %size; .reg .pred %p;
    mov.u32 %to, smem; mad.lo.s32 %to, %lane, 16, %to; mad.wide.u32 %at, %lane, 16, %a0;
    setp.lt.u32 %p, %lane, {there}; selp.b32 %size, 16, 0, %p;
    cp.async.cg.shared.global [%to], [%at], 16, %size; cp.async.wait_all;"""
    result = launch(body, [source[start : start + 128]], shared=512, schedule=Schedule(LATE))
    found = counts(result, "cp.async.cg")
    assert (found["requests"], found["sectors"], found["wavefronts"]) == (there > 0, -(-there // 2), 4)
    assert result.bytes_in_flight == 16 * there


CASES = {
    # 128 x 64 tiles, 4 warps: Q's 128 rows once, K and V by every warp, K and V written. 64 halves a row are one wavefront.
    "sm_80 forward 64 plain pointers full": {"wavefronts": 128 + 2 * 4 * 64 + 2 * 64, "sectors": 2 * 64 * 64 * 2 // 32},
    # two warpgroups of 64 rows: Q and K of one product, V of the other, whose P is in registers; K and V written by bulk copies
    "sm_90 forward 128 plain gluon full": {"wavefronts": 2 * (128 + 256 + 256) + 2 * 256, "sectors": 2 * 128 * 128 * 2 // 32},
    # dQ: 64 x 64 floats by atomics of 4 bytes, side by side: 4 sectors a warp of them
    "sm_80 dkv 64 fused pointers causal": {"atomic_requests": 128, "atomic_sectors": 512},
    "sm_90 dq 64 plain pointers causal": {}, "sm_100 forward 64 plain pointers full": {},
}


def python(code):
    """What a process that compiles prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def row_of(case):
    """Of the profile."""
    return json.loads(python(f"""if True:
        import dataclasses, json
        from fused_attn.tools.compile import offline, profile, traffic
        target, kernel, dim, feature, hopper, window = {case!r}.split()
        what = target, kernel, int(dim), "bf16", window == "causal"
        report, = offline.compile_kernel(*what, feature=feature, hopper=hopper)
        moved, = traffic.traffic(*what, feature=feature, hopper=hopper)
        print(json.dumps(dataclasses.asdict(profile.profile(report, moved))))
    """))


@pytest.mark.few(2)
@pytest.mark.parametrize("case", CASES)
def test_what_a_tile_moves(case):
    """By hand; without bank conflicts; and as many multiply-adds as its loop has in the machine code."""
    row = row_of(case)
    moved, loop = row["traffic"], min((x for x in row["loops"] if "shared" in x["cycles"]), key=lambda x: x["instructions"])
    assert {name: moved[name] for name in CASES[case]} == CASES[case]
    assert moved["wavefronts"] == moved["least_wavefronts"] > 0
    assert moved["sectors"] >= moved["least_sectors"] > 0
    if row["target"] == "sm_100":  # the shape of a tcgen05 product is in a register
        assert moved["multiply_adds"] == 0
        return
    m, n = map(int, row["config"].split()[0].split("x"))
    products = {"forward": 2, "dq": 3, "dkv": 5}[row["kernel"]]
    assert moved["multiply_adds"] == products * m * n * row["head_dim"]
    consumers = 2 if row["hopper"] == "gluon" else 1
    rate = {"sm_80": 256, "sm_90": 512}[row["target"]]
    assert loop["cycles"]["tensor"] * 4 * rate * consumers == moved["multiply_adds"]
    assert loop["cycles"]["shared"] == moved["wavefronts"] // consumers


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86"])
def test_atomics_of_one_float_lie_side_by_side(target):
    """dQ [32, 64] in fp32: 32 lanes of 4 bytes are 4 sectors, where lanes four floats apart touch 16."""
    told = python(f"""if True:
        from fused_attn.call.spec import TileConfig
        from fused_attn.tools.compile import traffic
        for single in (False, True):
            config = TileConfig(32, 64, 4, 2, single_atomics=single)
            moved, = traffic.traffic({target!r}, "dkv", 64, "bf16", True, feature="fused", config=config)
            print(moved.atomic_requests, moved.atomic_sectors)
    """)
    assert told.splitlines() == ["64 1024", "64 256"]


@pytest.mark.slow
def test_kernels_that_do_not_exist_move_nothing():
    told = python("""if True:
        from fused_attn.tools.compile import traffic
        print(traffic.traffic("sm_90", "backward", 256, "bf16", True, hopper="gluon"),
              traffic.traffic("sm_90", "dkv", 256, "bf16", True, feature="fused"))
    """)
    assert told == "[] []\n"
