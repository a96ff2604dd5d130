"""The command line: bad input is one line and status 2 before any work, and Ctrl-C leaves what there is by then."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from itertools import product
from pathlib import Path

import pytest
import torch

import fused_attn
from benchmarks import compare, cpu, gpu, host, plots
from fused_attn import settings
from fused_attn.plan import tiles, tuned
from fused_attn.plan.tiles import choose
from fused_attn.targets import COMPILED, KNOWN, TARGETS
from fused_attn.tools import check, cli, demo, options
from fused_attn.tools.bench import command, contest
from fused_attn.tools.compile import matrix

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).resolve().parent.parent
UNWRITABLE = ("/dev/null/x.json", "/proc/x.json", "/dev/null", "/tmp", "n" * 300 + ".json")
NO_WHOLE, NO_REAL = ("0", "-1", "1.5", "x", "", "9" * 40, "nan"), ("nan", "inf", "-1", "x", "")

BAD = [
    "", "nonsense", "--nonsense", "info extra", "check --json extra", "info --jsonn=1",
    *(f"bench {name}={value}" for name in ("--batch", "--heads", "--kv-heads", "--length", "--keys", "--head-dim")
      for value in NO_WHOLE),
    *(f"explain {name}={value}" for name in ("--batch", "--length") for value in NO_WHOLE),
    *(f"bench --rounds={value}" for value in ("0", "-3", "x", "9" * 23)), "bench --window 3 99999999999",
    *(f"bench --softcap={value}" for value in (*NO_REAL, "0")),
    "bench --heads 4 --kv-heads 3", "bench --window 3", "bench --window 3 -2", "bench --window x 3", "bench --dtype fp8",
    "bench --device cuda", "explain --device cuda", "bench --device tpu", "bench --preset decode --pass backward",
    "bench --backend cudnn", "bench --plot x", "bench --plot x.foo", "bench --plot /tmp", "bench --plot /proc/x.png",
    "explain --with magic", "explain --head-dim 64 --length 2147483647 --batch 2147483647 --heads 2147483647",
    *(f"{name} --out={path}" for name in ("bench", "tune", "compile --target sm_80") for path in UNWRITABLE),
    *(f"demo --out={path}" for path in UNWRITABLE[:3]), "demo --seed x", "demo --seed -1", "demo --seed " + "9" * 30,
    *(f"compile --target {name}" for name in ("foo", "sm_10", "sm_75", "sm_8", "sm_1000", "gfx906", "gfx1301", "cuda")),
    "compile", "compile --matrix --target sm_80", "compile --target sm_80 --head-dim 0",
    "compile --target SM_90", "compile --target sm_80 --head-dim 577",
    "compile --target sm_80 --head-dim", "compile --target sm_80 --dtype fp8", "compile --target sm_80 --feature magic",
    *(f"compile --matrix {given}" for given in ("--head-dim 64", "--causal", "--dtype fp16", "--hopper gluon", "--json",
                                                "--gate", "--feature bias", "--pass forward")),
    *(f"compile --target {target} --hopper {hopper}" for target in ("gfx942", "sm_80", "sm_100")
      for hopper in settings.HOPPER_SCHEDULES[1:]),
    *(f"compile --target sm_90 --hopper {hopper} --feature {feature}" for hopper in settings.HOPPER_SCHEDULES[1:]
      for feature in ("rotary", "decode", "fused", "additive", "dropout")),
    "compile --target sm_90 --hopper specialized --feature packed", "compile --target sm_90 --hopper gluon --head-dim 36",
    "compile --target sm_90 --hopper gluon --head-dim 264", "compile --target sm_90 --hopper descriptors --dtype fp32",
    "compile --target sm_90 --feature rotary --pass backward", "compile --target sm_90 --feature fused --pass forward",
    "compile --target sm_86 --dtype fp64 --head-dim 256", "compile --target sm_80 --feature additive --head-dim 300",
    "compile --target gfx90a --dtype tf32", "compile --target gfx942 --dtype tf32x3", "compile --target sm_80 --out x.md",
    *(f"tune --minutes={value}" for value in NO_REAL), *(f"tune --length={value}" for value in NO_WHOLE),
    "tune --head-dim 0", "tune --head-dim 257", "tune --kernel delta", "tune --dtype fp32",
]


def words(line: str) -> list[str]:
    return line.split(" ") if line else []


@pytest.mark.parametrize("line", BAD, ids=lambda line: f"{line:.60}")
def test_bad_input_is_one_line_before_any_work(line, monkeypatch, capsys, tmp_path):
    def worked(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which compile changes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, name in ((contest, "time_case"), (check, "run"), (demo, "run"), (matrix.offline, "compile_kernel"),
                         (matrix, "_subprocess")):
        monkeypatch.setattr(module, name, worked)
    monkeypatch.chdir(tmp_path)
    assert cli.main(words(line)) == 2
    shown = capsys.readouterr()
    assert not shown.out
    (told,) = shown.err.splitlines()
    name = next(iter(words(line)), "")
    assert told.startswith((f"fused-attn {name}: ", "fused-attn: "))  # argparse tells of extra words for the whole command
    assert len(told) < 600
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("main", "line"), [
    *((gpu.main, f"--smoke --minutes={value}") for value in (*NO_REAL, "0")), (gpu.main, "--smoke --stage nonsense"),
    (gpu.main, "--smoke --out /dev/null/x"), (gpu.main, "--minutes 1"), (gpu.main, "--nonsense"),
    (compare.main, ""), (compare.main, "HEAD --rounds 0"), (compare.main, "HEAD --rounds 99999999999"),
    (compare.main, "HEAD --device cuda"),
    (compare.main, "HEAD --out /proc/x"), (compare.main, "nonsense"), (compare.main, "HEAD --root /proc"),
    (cpu.main, "--stage nonsense"), (cpu.main, "--rounds x"), (cpu.main, "--rounds 0"), (cpu.main, "--out /dev/null/x"),
    (host.main, "--out /tmp"), (host.main, "extra"), (plots.main, ""), (plots.main, "/proc"), (plots.main, "."),
], ids=lambda value: value if isinstance(value, str) else value.__module__)
def test_bad_input_of_benchmarks_is_one_line(main, line, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(words(line)) == 2
    shown = capsys.readouterr()
    assert not shown.out
    (told,) = shown.err.splitlines()
    assert told.startswith(f"python -m {main.__module__}: ")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("module", "lines"), [
    ("matplotlib", ["bench --plot x.png", "demo"]), ("rich", ["demo", "tune"]),
    ("triton", ["check", "demo", "tune", "compile --matrix"])])
def test_what_is_missing_is_told_before_the_work(module, lines, monkeypatch, capsys, tmp_path):
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else honest(name, *rest))
    monkeypatch.setattr(contest, "time_case", lambda *_: pytest.fail("timed"))
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert cli.main(words(line)) == 2
        assert f": needs {module}: pip install 'fused-attn[" in capsys.readouterr().err


PROGRAMS = {  # how a program is run, and what it calls itself
    "fused-attn": ("-m", "fused_attn", "--help"), "python -m benchmarks.cpu": ("-m", "benchmarks.cpu", "--help"),
    "fused-attn ": ("-mfused_attn", "info"), "fused-attn  ": ("-Bm", "fused_attn"), "gpt.py": ("examples/gpt.py", "--quick"),
    "python -m tests.fuzz": ("-m", "tests.fuzz", "--help"), "revision.py": ("benchmarks/revision.py", str(ROOT), "cpu"),
}


def python(*command, **environment):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


@pytest.mark.few(2)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bad_environment_is_one_line_of_a_program(program):
    done = python(*PROGRAMS[program], FUSED_ATTN_STRICT="2")
    (told,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert told.startswith(f"{program.strip()}: FUSED_ATTN_STRICT: expected 1, ")


@pytest.mark.few(1)
@pytest.mark.parametrize("command", [
    ("-c", "import fused_attn", "-m", "fused_attn"), ("-c", "import fused_attn", "-mfused_attn"),
    ("-m", "timeit", "-n1", "-r1", "import fused_attn")], ids=" ".join)
def test_a_bad_environment_is_an_exception_elsewhere(command):
    assert "ValueError: FUSED_ATTN_BACKEND: expected one of" in python(*command, FUSED_ATTN_BACKEND="cudnn").stderr


def test_tiles_of_the_environment_are_read_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(settings, "TILES", str(tmp_path / "none.json"))
    tuned.forget()
    for line in ("check", "bench", "demo"):
        assert cli.main(words(line)) == 2
        assert capsys.readouterr().err.startswith(f"fused-attn {line}: FUSED_ATTN_TILES: expected a file")


def test_version_and_info(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fused-attn {fused_attn.__version__}\n"
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fused_attn"] == fused_attn.__version__
    assert found["devices"]["cpu"]["default_backend"] == "torch"
    assert found["environment"].keys() == {"backend", "strict", "hopper", "interpreter", "deterministic"}
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for text in (found["torch"], "cpu          default backend torch; kernels: ", "environment  backend"):
        assert text in shown


@pytest.mark.parametrize("added", [(), ("lse",), ("alibi",), ("bias", "dropout"), ("mask",), ("sinks",), ("precise",)])
def test_explain_says_what_the_function_says(added, capsys):
    line = "explain --device cpu --length 24 40 --heads 4 --kv-heads 2 --head-dim 16 --causal --softcap 3"
    line += " --with" * bool(added)
    assert cli.main([*words(line), *added, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [f"fp32 d16 b1 h4/2 n{n} causal softcap3" for n in (24, 40)]
    q, k = torch.randn(1, 4, 24, 16), torch.randn(1, 2, 24, 16)
    more = {"lse": {"return_lse": True}, "alibi": {"alibi_slopes": torch.ones(4)}, "bias": {"bias": torch.ones(1, 4, 24, 24)},
            "dropout": {"dropout_p": 0.1}, "mask": {"mask": torch.ones(1, 1, 24, 24).bool()}, "sinks": {"sinks": torch.ones(4)},
            "precise": {"precise": True}}
    told = fused_attn.explain(q, k, k, causal=True, softcap=3.0, **{a: b for one in added for a, b in more[one].items()})
    assert found["fp32 d16 b1 h4/2 n24 causal softcap3"]["backend"] == told.backend
    assert found["fp32 d16 b1 h4/2 n24 causal softcap3"]["reasons"] == {a: list(b) for a, b in told.reasons.items()}
    assert cli.main([*words(line), *added]) == 0
    assert capsys.readouterr().out.count(f"backend: {told.backend}\n") == 2


def interrupting(after: int, honest):
    """``honest``, but for a Ctrl-C in place of call number ``after``."""
    calls = []

    def call(*rest, **more):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return honest(*rest, **more)

    return call


def test_an_interrupted_bench_keeps_its_rows(monkeypatch, capsys, tmp_path):
    out, line = tmp_path / "rows.json", "bench --device cpu --length 8 16 24 --head-dim 8 --heads 2 --rounds 1 --pass forward"
    monkeypatch.setattr(contest, "time_case", interrupting(3, contest.time_case))
    assert cli.main([*words(line), "--out", str(out)]) == 130
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "fused-attn bench: interrupted"
    assert "n16" in shown.out
    found = json.loads(out.read_text())
    assert (len(found["rows"]), found["complete"]) == (2, False)
    before = out.read_bytes()
    monkeypatch.setattr(contest, "time_case", interrupting(1, contest.time_case))
    assert cli.main([*words(line), "--out", str(out)]) == 130
    assert out.read_bytes() == before, "nothing was measured, and so nothing is written over"


def test_an_interrupted_check_shows_its_rows(monkeypatch, capsys):
    row = {"case": "one", "ok": True}
    monkeypatch.setattr(check, "_row", interrupting(4, lambda *_: row))
    assert cli.main(["check", "--json"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["complete"], found["passed"]) == ([row] * 3, False, False)


REPORT = matrix.offline.Report("sm_80", "forward", "bf16", 64, False, "plain", "64x64 w4 s1", 99, 0, 1024, 2048, 0, {"HMMA": 8},
                               80, [40], {"HMMA": 8}, [], 0, 0.5, "3.7")


def test_an_interrupted_compile_keeps_its_rows(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.json"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(matrix.offline, "compile_kernel", interrupting(3, lambda *_, **__: [REPORT]))
    assert cli.main([*words("compile --target sm_80 --head-dim 64"), "--out", str(out)]) == 130
    assert json.loads(out.read_text()) == [REPORT.row()] * 2


def test_a_kernel_that_does_not_compile_is_one_line_and_the_others_go_on(monkeypatch, capsys, tmp_path):

    def compiled(target, kernel, *_, **__):
        if kernel == "dq":
            raise RuntimeError("ptxas\nsays\nno")
        return [REPORT]

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(matrix.offline, "compile_kernel", compiled)
    out = tmp_path / "rows.json"
    assert cli.main([*words("compile --target sm_80 --head-dim 64"), "--out", str(out)]) == 1
    assert "sm_80 dq bf16 D64: RuntimeError: ptxas says no" in capsys.readouterr().err.splitlines()
    assert len(json.loads(out.read_text())) == 3


def test_ctrl_c_stops_the_matrix_and_its_processes(monkeypatch, capsys, tmp_path, request):
    """Jobs that would last ten minutes: two are through when Ctrl-C comes to this process alone, and no other one survives."""
    jobs = [matrix.Job("sm_80", ("bf16",), (64,), False, feature) for feature in ("plain", "bias", *["mask"] * 20)]
    started, popen = [], subprocess.Popen
    row = json.dumps(REPORT.row())

    def process(words, **more):
        seconds = 600 if "mask" in words else 0
        told = str(tmp_path / f"{uuid.uuid4()}.told")
        code = f"import time; print({row!r}, flush=True); open({told!r}, 'w'); time.sleep({seconds})"
        started.append(popen([sys.executable, "-c", code], **more))
        return started[-1]

    def ctrl_c():
        while len(list(tmp_path.glob("*.told"))) < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # Tests that run in the background inherit that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(matrix, "jobs", lambda: iter(jobs))
    monkeypatch.setattr(matrix.subprocess, "Popen", process)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out, begun = tmp_path / "matrix.json", time.monotonic()
    threading.Thread(target=ctrl_c, daemon=True).start()
    assert cli.main(["compile", "--matrix", "--out", str(out)]) == 130
    assert time.monotonic() - begun < 60
    assert all(one.poll() is not None for one in started)
    assert len(started) < len(jobs)
    assert len(json.loads(out.read_text())) >= 3, "what the jobs at work had told by then is there too"
    assert "fused-attn compile: interrupted" in capsys.readouterr().err


def test_interrupted_benchmarks_keep_their_rows(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(host, "measure_ms", interrupting(2, host.measure_ms))
    assert host.main(["--out", str(out)]) == 130
    found = json.loads(out.read_text())
    assert ([row["call"] for row in found["rows"]], found["complete"]) == (list(host.CALLS), False)
    monkeypatch.setattr(cpu, "_stages", lambda *_: {"calls": lambda: iter([{"case": "a", "pass": "forward"}]),
                                                    "layers": interrupting(1, list)})
    assert cpu.main(["--out", str(out)]) == 130
    assert json.loads(out.read_text())["rows"][0]["case"] == "a"


@pytest.mark.few(1)
@pytest.mark.parametrize(("redirected", "told"), [
    ("info --json | head -c 1", (0, "{", "")), ("info >&-", (0, "", "")), ("nonsense 2>&-", (2, "", "")),
    ("info >/dev/full", (2, "", "fused-attn info: [Errno 28] No space left on device\n"))])
def test_an_output_that_takes_nothing_is_no_traceback(redirected, told):
    done = subprocess.run(f"{sys.executable} -m fused_attn {redirected}", shell=True, capture_output=True, text=True,
                          check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == told


@pytest.mark.parametrize("arguments", [(), ("/tmp", "cpu"), (str(ROOT), "tpu"), (str(ROOT), "cpu", "more")])
def test_a_revision_alone_says_what_it_expects(arguments):
    done = python("benchmarks/revision.py", *arguments)
    assert (done.returncode, done.stderr) == (
        2, f"revision.py: expected a checkout and one of cuda, cpu; got {list(arguments)}\n")


@pytest.mark.parametrize("name", ["rows.jsonl", "summary.json", "correctness.json", "summary.md", "ratio.png"])
def test_a_folder_in_the_place_of_a_result_is_told_before_the_work(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "conditions", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(settings, "BACKEND", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which a smoke run changes
    (tmp_path / name).mkdir()
    assert gpu.main(["--smoke", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"python -m benchmarks.gpu: {str(tmp_path / name)!r} cannot be written: it is a folder\n"


@pytest.mark.parametrize("line", ["compile --matrix --profile", "compile --target sm_80 --profile"])
def test_a_profile_writes_over_no_page_of_anybody_else(line, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which compile changes
    monkeypatch.setattr(matrix.offline, "compile_kernel", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr(matrix, "_subprocess", lambda *_: pytest.fail("work was begun"))
    page = tmp_path / "notes.md"
    page.write_text("precious")
    assert cli.main([*words(line), "--out", str(tmp_path / "notes.json")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"fused-attn compile: --out: the table beside the rows is {str(page)!r}, which is there and no ")
    assert page.read_text() == "precious"
    page.unlink()
    page.mkdir()
    assert cli.main([*words(line), "--out", str(tmp_path / "notes.json")]) == 2
    assert capsys.readouterr().err == f"fused-attn compile: {str(page)!r} cannot be written: it is a folder\n"
    assert os.listdir(tmp_path) == ["notes.md"]


def test_a_profile_takes_the_place_of_its_own_page(tmp_path):
    page = tmp_path / "rows.md"
    page.write_text((ROOT / "docs" / "profile.md").read_text(encoding="utf-8"), encoding="utf-8")
    matrix._check_page(tmp_path / "rows.json", True)
    rows = json.loads((ROOT / "docs" / "profile.json").read_text(encoding="utf-8"))
    matrix._keep(rows[:1], tmp_path / "rows.json", True)
    assert matrix.profile.TITLE in page.read_text(encoding="utf-8")
    matrix._check_page(tmp_path / "rows.json", True)


def test_every_known_target_is_one_that_calls_take():
    assert all(int(name[3:]) >= 80 for name in KNOWN if name.startswith("sm_"))
    for name in KNOWN:
        for kernel in ("forward", "dq", "dkv"):
            assert choose(kernel, 64, 64, torch.bfloat16, name) in tiles._HALVES[TARGETS[name].tables][kernel].values()
    for job in (*matrix.jobs(), *matrix.profiled()):
        for dtype, head_dim in product(job.dtypes, job.head_dims):
            assert matrix.offline.refusal(job.target, head_dim, dtype, job.feature, job.hopper) is None


def test_the_matrix_has_every_feature_in_every_type_on_every_target():
    """Decoding and the fused backward are of halves; a bf16 bias in bf16 is a bias of its own type."""
    held = {(job.target, job.feature, dtype) for job in matrix.jobs() for dtype in job.dtypes if job.hopper == "pointers"}
    every = set(product(COMPILED, matrix.offline.FEATURES, ("bf16", "fp16", "fp32", "fp64")))
    missing = every - held
    assert all(feature in ("decode", "fused") or (feature, dtype) == ("bias bf16", "bf16") for _, feature, dtype in missing)


def test_options_of_cases_reach_the_defaults(capsys):
    """0 is no value that was left out, and a size that was given is the one that is used."""
    asked = options.Parser()
    command.add_shape(asked)
    (found,) = command.cases(asked.parse_args(["--batch", "3", "--heads", "2", "--length", "5", "--head-dim", "7"]), "cpu")
    assert (found.batch, found.heads, found.n_queries, found.head_dim) == (3, 2, 5, 7)
