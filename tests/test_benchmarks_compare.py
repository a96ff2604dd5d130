"""Two revisions measured in turns: a planted slowdown is seen, and nothing stays behind."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import compare, cpu, layers
from fused_attn.tools.bench.contest import Contest

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")


def git(root: Path, *command: str) -> str:
    done = subprocess.run(("git", "-C", str(root), *IDENTITY, *command), capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository of two revisions of the package; the working tree has a slower attention()."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path / "checkout"
    for part in ("fused_attn", "kernels"):
        shutil.copytree(ROOT / part, root / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    git(root.parent, "init", "-q", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "base")
    file = root / "fused_attn" / "api.py"
    text = file.read_text()
    check = "    deterministic, strict = _switches(deterministic, strict)\n"
    slow = text.replace(check, "    sum(range(20000))\n" + check, 1)
    assert slow != text
    file.write_text(slow)
    return root


def test_a_slowdown_is_seen(checkout, tmp_path, capfd):
    out = tmp_path / "out" / "compare.json"
    assert compare.main(["HEAD", "--root", str(checkout), "--device", "cpu", "--rounds", "3", "--only", "tiny", "--out",
                         str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["conditions"]["base"] == git(checkout, "rev-parse", "HEAD")
    forward, backward = found["rows"]
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    assert forward["p20"] > 1.5
    assert forward["p20"] <= forward["ratio"] <= forward["p80"]
    assert "slower" in capfd.readouterr().out
    assert len(git(checkout, "worktree", "list").splitlines()) == 1


def test_what_cannot_be_compared_is_one_line(checkout, capsys):
    assert compare.main(["nonsense", "--root", str(checkout)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks.compare: git rev-parse --verify nonsense")
    (checkout / "fused_attn" / "api.py").write_text("raise RuntimeError('planted')\n")
    with pytest.raises(SystemExit, match="process ended"):
        compare.main(["HEAD", "--root", str(checkout), "--device", "cpu", "--only", "tiny"])
    assert len(git(checkout, "worktree", "list").splitlines()) == 1


class Scripted:
    """A revision with answers of its own."""

    def __init__(self, ms, error=None):
        self.ms, self.error = iter(ms), error

    def ask(self, **request):
        if "prepare" in request:
            return {"error": self.error} if self.error else {"passes": {"forward": 10.0}}
        return {"ms": next(self.ms)}


def test_ratios_and_their_spread():
    row, = compare.compare("x", Scripted([99, 2, 4, 6, 8, 10]), Scripted([1, 2, 2, 2, 2, 2]), 5)
    assert (row["ms"], row["base_ms"], row["ratio"]) == (6, 2, 3)
    assert (row["p20"], row["p80"]) == (2, 4)


def test_what_one_revision_cannot_do_is_said():
    row, = compare.compare("x", Scripted([]), Scripted([], "ImportError: no such thing"), 5)
    assert row == {"case": "x", "base_error": "ImportError: no such thing"}
    assert "base: ImportError" in compare._shown(row)["now_ms"]


def test_the_harness_of_each_device_knows_its_cases():
    assert {name.split(",")[0] for name in cpu.subjects()} >= {"tiny", "layer", "long", "encoder layer", "decoder layer"}


SMALL = layers.Sizes(2, 5, 16, 4, 24, "fp32")


@pytest.mark.parametrize("name", layers.layers(SMALL, "cpu"))
def test_layers_agree_with_torch_in_fp64(name):
    contest = Contest(layers.layers(SMALL, "cpu")[name](), "cpu", 2)
    rows = list(contest.rows())
    assert [row["pass"] for row in rows] == (["forward", "backward"] if "training" in name else ["forward"])
    for row in rows:
        assert row["ok"], row
        assert "ms" in row["peers"]["torch.nn"], row["peers"]
        assert row["ratio_to_best_peer"] > 0


def test_a_wrong_layer_is_refused(monkeypatch):
    import fused_attn.nn

    class Wrong(fused_attn.nn.TransformerEncoderLayer):
        def forward(self, *args, **options):
            return super().forward(*args, **options) * 1.001

    monkeypatch.setattr(fused_attn.nn, "TransformerEncoderLayer", Wrong)
    for row in Contest(layers.layer("encoder layer", SMALL, "cpu", True), "cpu", 2).rows():
        assert "gate" in row["error"]
        assert "ms" not in row


@pytest.mark.parametrize("name", ["MultiheadAttention", "encoder layer", "decoder layer"])
def test_flops_of_layers_are_torchs_count(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    subject = layers.layer(name, SMALL, "cpu", True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        entry = subject.peers["torch.nn"]()
        out = entry.call()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, list(entry.leaves.values()), entry.dout)
    assert subject.flops("forward") == forward.get_total_flops()
    # torch's plain attention keeps the weights and makes four products backward, where five are the convention
    cross = 2 if name == "decoder layer" else 1
    recomputed = cross * 2 * SMALL.batch * SMALL.length**2 * SMALL.width
    assert subject.flops("backward") == backward.get_total_flops() + recomputed
