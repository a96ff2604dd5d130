"""Counted beside a tutorial: the model by hand, the choice among its configurations, and ours and a stand-in emulated."""

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import counted

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).resolve().parent.parent


def test_the_model_by_hand():
    """Squares of 2, 3 and 4 blocks of 128 rows, two heads: 4, 9 and 16 squares of 4 times 64 x 64 scores each."""
    per = {"macs": 2 * 64**3, "shared": 300, "exp2": 128, "issue": 1200, "sectors": 256, "atomics": 0}

    def totals(squares, programs):
        return {"forward_kernel": Counter({name: value * 8 * squares + 7000 * programs + 99 for name, value in per.items()})}

    full = [totals(n * n, n) for n in (2, 3, 4)]
    causal = [totals(n * (n - 1) // 2, n) for n in (2, 3, 4)]
    expected = {"tensor": 512, "shared": 300, "exp2": 256, "issue": 300, "modelled": 512, "sectors": 256, "atomics": 0}
    assert counted.modelled("sm_80", False, full) == expected
    assert counted.modelled("sm_80", True, causal) == expected
    assert counted.modelled("sm_90", False, full) == {**expected, "tensor": 256, "modelled": 300}


def test_kernels_of_a_pass_are_modelled_one_after_another():
    of_tensor, of_shared = Counter({"macs": 64 * 1024 * 1000}), Counter({"shared": 64 * 1000})
    none = Counter(dict.fromkeys((*of_tensor, *of_shared), 0))
    totals = [{"dq_kernel": none, "dkv_kernel": none}, {"dq_kernel": none, "dkv_kernel": none},
              {"dq_kernel": of_tensor, "dkv_kernel": of_shared}]
    row = counted.modelled("sm_80", False, totals)
    assert (row["tensor"], row["shared"], row["modelled"]) == (4000, 4000, 8000)


def test_the_best_configuration_hardly_spills():
    def row(modelled, spilled, issue=0):
        return {"tensor": 0, "shared": 0, "exp2": 0, "issue": issue, "modelled": modelled, "spill bytes": spilled}

    assert counted.best([row(500, 9000), row(600, 0), row(700, 0)]) == row(600, 0)
    assert counted.best([row(600, 0, issue=9), row(600, 0, issue=8)]) == row(600, 0, issue=8)
    assert counted.best([row(500, 9000), row(600, 8000)]) == row(500, 9000)


def test_without_the_file_it_says_so(capsys, tmp_path):
    assert counted.main(["--tutorial", str(tmp_path / "none.py")]) == 2
    assert "--tutorial: expected a file" in capsys.readouterr().err


STAND_IN = '''
import triton, triton.language as tl, torch

DEVICE = triton.runtime.driver.active.get_active_torch_device()
assert torch.cuda.get_device_capability() == (8, 0)
configs = [triton.Config({"BLOCK_M": 128, "BLOCK_N": n}, num_stages=1, num_warps=4) for n in (128, 64, 32)]


@triton.autotune(configs, key=["N_CTX"])
@triton.jit
def _attn_fwd(Q, K, V, Out, N_CTX, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """No softmax, two products a tile."""
    head = tl.program_id(1).to(tl.int64) * N_CTX * DIM
    rows, columns, keys = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DIM), tl.arange(0, BLOCK_N)
    q = tl.load(Q + head + rows[:, None] * DIM + columns[None, :])
    total = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(0, N_CTX, BLOCK_N):
        k = tl.load(K + head + (start + keys)[None, :] * DIM + columns[:, None])
        v = tl.load(V + head + (start + keys)[:, None] * DIM + columns[None, :])
        total += tl.dot(tl.dot(q, k).to(tl.float16), v)
    tl.store(Out + head + rows[:, None] * DIM + columns[None, :], total.to(tl.float16))


class _attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        out = torch.empty_like(q)
        _attn_fwd[lambda meta: (q.shape[2] // meta["BLOCK_M"], q.shape[1])](q, k, v, out, q.shape[2], DIM=q.shape[3])
        return out


attention = _attention.apply
'''


@pytest.mark.few(1)
@pytest.mark.parametrize("which", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_ours_and_a_stand_in_are_counted_as_the_formulas_say(tmp_path, which):
    """Two products of the forward and seven of the backward, of 64^3 multiply-adds, at 1024 a cycle."""
    (tmp_path / "tutorial.py").write_text(STAND_IN)
    code = textwrap.dedent(f"""
        import json
        from pathlib import Path
        from unittest import mock
        import torch
        from benchmarks import counted
        from fused_attn.emulator import LATE, Schedule, emulated
        with emulated("sm_80", Schedule(LATE, turn=0, resident=1, races=False)) as results, \\
                mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
            rows = list(counted.ours("sm_80", 64, False, {which!r}, results))
            if {which!r} == "forward":
                rows += counted.theirs(Path({str(tmp_path / "tutorial.py")!r}), "sm_80", 64, False, "forward", results)
        print(json.dumps(rows))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    mine, *others = json.loads(done.stdout.splitlines()[-1])
    assert mine["tensor"] == {"forward": 512, "backward": 1792}[which]
    assert mine["modelled"] >= mine["tensor"]
    if which == "forward":
        assert [row["config"] for row in others] == ["128x64 w4 s1", "128x32 w4 s1"]  # BLOCK_N up to the head dim
        assert {row["tensor"] for row in others} == {512}
        assert all(row["exp2"] == 0 for row in others)
