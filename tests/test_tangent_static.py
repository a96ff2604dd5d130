"""The compiled kernels of tangents: what their default tiles spill, and how many matrix products they take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.kernels
PRODUCTS = {"tangent": 5, "dq_tangent": 7, "dkv_tangent": 8}  # of a tile, where q, k and v move, and dout does not


def reports(*arguments):
    """Those of ``offline.compile_kernel``, which compiles and so has a process of its own."""
    program = ("import sys, json; from fused_attn.tools.compile import offline; target, kernel, dim, feature = sys.argv[1:]; "
               "found = offline.compile_kernel(target, kernel, int(dim), 'bf16', True, feature=feature); "
               "print(json.dumps([report.row() for report in found]))")
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          check=False, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.few(2)
@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("feature", ["plain", "bias"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_default_tiles_hardly_spill(target, head_dim, feature, kernel):
    """Nothing in plain attention at head dim 64, and elsewhere at most 64 bytes a thread, none of them in a loop."""
    for report in reports(target, kernel, head_dim, feature):
        assert report["spill_bytes"] <= (0 if (head_dim, feature) == (64, "plain") else 64), report
        assert report["local_in_loops"] == 0, report
        assert report["shared_bytes"] <= report["shared_limit"], report
        assert not report["warnings"], report
        assert report["matrix"], report


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_matrix_products_are_as_few_as_the_formulas_say(kernel):
    """Counted as mma of 16 x 8 x 16, in the two loops of a kernel; with the forward's tangent, a double backward takes 20."""
    report, = reports("sm_80", kernel, 64, "plain")
    tile, warps = report["config"].split()[:2]
    rows, columns = map(int, tile.split("x"))
    product = rows * columns * 64 // (16 * 8 * 16 * int(warps[1:]))
    assert sum(report["matrix"].values()) == 2 * product * PRODUCTS[kernel], report
