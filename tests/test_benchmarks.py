"""The benchmarks, without a GPU: what they count, what their gates catch, and how they compare."""

import sys
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch

import fused_attn
from benchmarks import cases, correctness, gpu
from benchmarks.cases import correctness_cases, timing_cases
from fused_attn import settings, torch_private
from fused_attn.plan import problem, proven, schedules
from fused_attn.tools.bench import contest, oracle, peers, timing
from fused_attn.tools.bench.cases import Case, case, grid

# Arithmetic


@pytest.mark.parametrize(("subject", "forward"), [
    (grid(1024, 128, False), 4 * 16 * 16 * 1024 * 1024 * 128),
    (grid(1024, 128, True), 4 * 16 * 16 * (1024 * 1025 // 2) * 128),
    (case(4, 8, batch=1, heads=1, window=(1, None), causal=True), 4 * (1 + 2 + 2 + 2) * 8),
    (case(1, 8, batch=3, heads=4, kv_heads=2, n_keys=100, causal=True), 4 * 3 * 4 * 100 * 8),
    (case(5, 8, batch=1, heads=1, n_keys=2, causal=True), 4 * (0 + 0 + 0 + 1 + 2) * 8),
], ids=lambda x: x.name if isinstance(x, Case) else "")
def test_flops_by_hand(subject, forward):
    assert subject.flops("forward") == forward
    assert subject.flops("backward") == 2.5 * forward


def test_flops_with_two_head_dims():
    subject = case(10, 8, dv=32, batch=1, heads=1)
    assert subject.flops("forward") == 2 * 100 * (8 + 32)
    assert subject.flops("backward") == 2 * 100 * (3 * 8 + 2 * 32)


def test_grid_is_that_of_the_papers():
    members = [subject for subject in timing_cases() if subject.family == "grid"]
    assert all(s.heads * s.head_dim == 2048 and s.batch * s.n_queries == 16384 and s.dtype == "bf16" for s in members)
    assert {(s.n_queries, s.head_dim, s.causal) for s in members} == {
        (n, d, causal) for n in (512, 1024, 2048, 4096, 8192, 16384) for d in (64, 128, 256) for causal in (True, False)}
    assert members[0].name == "bf16 d128 b4 h16 n4096 causal"


@pytest.mark.parametrize("smoke", [False, True])
def test_names_tell_cases_apart(smoke):
    for found in (timing_cases(smoke), correctness_cases(smoke)):
        assert len({subject.name for subject in found}) == len(found)


def test_shrunk_cases_compile_the_same_binaries():
    """Triton specialises on strides that are 1 or divisible by 16, and on pointers divisible by 16."""

    def classes(subject: Case) -> list[tuple[bool, ...]]:
        tensors = subject.inputs("cpu")[:4]
        strides = [(s == 1, s % 16 == 0) for x in tensors for dim, s in enumerate(x.stride()) if x.shape[dim] > 1 or dim > 1]
        return [(x.storage_offset() % 8 == 0,) for x in tensors] + strides

    for subject in correctness_cases():
        small = subject.batch * subject.heads * subject.n_queries * subject.head_dim < 2**21
        if small and subject.n_queries and subject.n_keys and not subject.layout.startswith("huge"):
            alike = replace(subject, batch=1, heads=subject.heads // subject.kv_heads, kv_heads=1)
            assert subject.shrunk().compiles_as() == subject.compiles_as()
            assert classes(subject.shrunk()) == classes(alike), subject.name


# The oracle and its gates, with the reference in the place of the kernels


@pytest.fixture
def attention(monkeypatch):
    """attention() by the reference, spoilt by ``attention.spoil(out, lse) -> (out, lse)``."""
    honest = fused_attn.attention

    def attend(q, k, v, *, backend=None, return_lse=False, **arguments):
        if attend.arguments is not None:
            arguments = attend.arguments(arguments)
        out, lse = attend.spoil(*honest(q, k, v, backend="reference", return_lse=True, **arguments))
        return (out, lse) if return_lse else out

    attend.spoil, attend.arguments = (lambda out, lse: (out, lse)), None
    monkeypatch.setattr(fused_attn, "attention", attend)
    monkeypatch.setattr(Case, "answered_by", lambda *_: "triton")
    return attend


ORACLE_CASES = [
    case(9, 8, dtype="fp64"), case(9, 8, dtype="fp64", causal=True, n_keys=5, softcap=1.5),
    case(7, 8, dv=4, dtype="fp64", heads=6, kv_heads=2, n_keys=12, window=(3, 2)),
    case(6, 8, dtype="fp64", scale=-0.7, causal=True),
]


@pytest.mark.parametrize("subject", ORACLE_CASES, ids=lambda s: s.name)
@pytest.mark.parametrize("chunk", [oracle.SCORES_AT_ONCE, 1])
def test_oracle_agrees_with_autograd(attention, monkeypatch, subject, chunk):
    monkeypatch.setattr(oracle, "SCORES_AT_ONCE", chunk)
    inputs = subject.inputs("cpu")
    exact = oracle.Oracle(subject, *inputs)
    for name, got in correctness.run(subject, *inputs).items():
        torch.testing.assert_close(exact.results[name][0], got, atol=1e-12, rtol=1e-12)


def _last(x: torch.Tensor, value: float) -> torch.Tensor:
    """Zero but for the last element."""
    spike = torch.zeros_like(x)
    spike[-1, -1, -1, -1] = value
    return spike


SUBJECT = case(40, 16, dtype="fp32", causal=True, backend="triton")
WRONG = {
    "honest": (lambda out, lse: (out, lse), set()),
    "one percent": (lambda out, lse: (out * 1.01, lse), {"out", "dq", "dk", "dv"}),
    "one element": (lambda out, lse: (out + _last(out, 1e-2), lse), {"out"}),
    "NaN": (lambda out, lse: (out + _last(out, float("nan")), lse), {"out"}),
    "sign of the LSE": (lambda out, lse: (out, -lse), {"lse", "dq", "dk"}),
    "no gradient of the LSE": (lambda out, lse: (out, lse.detach() + 0 * lse), {"dq", "dk"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_gate_sees_wrong_results(attention, name):
    attention.spoil, expected = WRONG[name]
    row = correctness.check(SUBJECT, "cpu")
    assert {key for key, result in row["results"].items() if not result["ok"]} == expected
    assert row["ok"] is not bool(expected)


def test_gate_sees_a_mask_off_by_one(attention):
    attention.arguments = lambda arguments: arguments | {"causal": False, "window": (None, 1)}
    row = correctness.check(replace(SUBJECT, dtype="bf16"), "cpu")
    assert not row["ok"]


def test_gate_sees_what_no_kernel_wrote(attention):
    attention.spoil = lambda out, lse: (out + _last(torch.empty_like(out), 1.0) * torch.empty_like(out), lse)
    assert not correctness.check(SUBJECT, "cpu")["results"]["out"]["ok"]
    assert torch.empty_like.__name__ == "empty_like"


def test_gate_sees_another_backend(attention, monkeypatch):
    monkeypatch.setattr(Case, "answered_by", lambda *_: "reference")
    assert not correctness.check(SUBJECT, "cpu")["ok"]


def test_rows_without_keys_must_be_exact(attention):
    subject = case(5, 8, dtype="fp16", n_keys=2, causal=True)
    assert correctness.check(subject, "cpu")["ok"]
    attention.spoil = lambda out, lse: (out + 1e-6 * (lse == -torch.inf)[..., None], lse.clamp(min=-1e30))
    results = correctness.check(subject, "cpu")["results"]
    assert not results["out"]["ok"]
    assert not results["lse"]["ok"]


def test_no_queries_pass(attention):
    assert correctness.check(case(0, 8, dtype="fp16", n_keys=3), "cpu")["ok"]


def test_r_binds_on_ordinary_shapes(attention):
    subject = case(256, 32, batch=1, heads=2, dtype="fp16", causal=True)
    row = correctness.check(subject, "cpu")
    assert row["ok"]
    assert all("R" in row["results"][name] for name in ("out", "dq", "dk", "dv"))
    attention.spoil = lambda out, lse: (out * (1 + 2**-11), lse)  # what E forgives
    spoilt = correctness.check(subject, "cpu")["results"]["out"]
    assert spoilt["E"] < 1.25
    assert not spoilt["ok"]


def test_determinism_sees_a_difference(attention):
    assert correctness.determinism(SUBJECT, "cpu", 3)["ok"]
    runs = iter(range(100))
    attention.spoil = lambda out, lse: (out + _last(out, 1e-5 * (next(runs) == 2)), lse)
    assert correctness.determinism(SUBJECT, "cpu", 4)["differ"] == ["out"]
    attention.spoil = lambda out, lse: (out + 1e-5 * (out.shape[0] == 1), lse)
    assert correctness.determinism(SUBJECT, "cpu", 2)["differ"] == ["out of one batch entry alone"]


# Peers and times


def test_missing_peers_are_left_out(monkeypatch):
    monkeypatch.setattr(peers, "_importable", lambda module: False)
    assert [peer.name for peer in peers.found("cuda")] == ["sdpa cudnn", "sdpa flash", "sdpa efficient", "eager"]


def test_flash_attn_joins_where_it_can_be_imported(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        assert window_size == (3, 0 if causal else -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        window = tuple(None if side == -1 else side for side in window_size)
        return fused_attn.reference_attention(q, k, v, causal=causal, window=window).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # importing it raises
    found = {peer.name: peer for peer in peers.found("cuda")}
    assert "flash_attn 2" in found
    assert "flash_attn 3" not in found
    subject = case(20, 16, dtype="fp16", causal=True, window=(3, None), heads=4, kv_heads=2)
    q, k, v, *_ = subject.inputs("cpu")
    expected = fused_attn.reference_attention(q, k, v, **subject.arguments)
    torch.testing.assert_close(found["flash_attn 2"].prepare(subject, "cpu")(q, k, v), expected)


def test_every_case_has_a_peer(monkeypatch):
    present = peers.found("cuda")
    for subject in timing_cases():
        assert any(peer.against(subject) is None for peer in present), subject.name


@pytest.mark.parametrize("subject", [
    case(20, 16, dtype="fp32", causal=True, n_keys=30, softcap=2.0),
    case(20, 16, dtype="fp32", window=(4, 2), heads=4, kv_heads=2),
], ids=lambda s: s.name)
def test_eager_peer_computes_the_same(subject):
    q, k, v, *_ = subject.inputs("cpu")
    eager = next(peer for peer in peers.found("cpu") if peer.name == "eager")
    torch.testing.assert_close(eager.prepare(subject, "cpu")(q, k, v),
                               fused_attn.reference_attention(q, k, v, **subject.arguments))


def test_timing_gate_refuses_wrong_results(attention):
    attention.spoil = lambda out, lse: (out * 1.01, lse)
    rows = list(contest.time_case(SUBJECT, "cpu", peers.found("cpu")))
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row["ok"] is False
        assert "gate" in row["error"]
        assert "ms" not in row


def test_timing_refuses_a_peer_that_computes_something_else(attention):
    wrong = peers.Peer("wrong", lambda case, device: lambda q, k, v: case.attend(q, k, v) * 1.1, lambda case: None)
    absent = peers.Peer("absent", lambda case, device: pytest.fail("called"), lambda case: "no reason")
    raising = peers.Peer("raising", lambda case, device: lambda q, k, v: 1 / 0, lambda case: None)
    honest = peers.Peer("honest", lambda case, device: case.attend, lambda case: None)
    for row in contest.time_case(SUBJECT, "cpu", [wrong, absent, raising, honest]):
        assert row["ok"]
        assert row["best_peer"] == "honest"
        assert row["ratio_to_best_peer"] > 0
        assert "differs" in row["peers"]["wrong"]["error"]
        assert "ZeroDivisionError" in row["peers"]["raising"]["error"]
        assert row["peers"]["absent"] == {"not run": "no reason"}
        assert {"ms", "p20", "p80", "tflops", "first_call_s"} <= row["peers"]["honest"].keys() & row.keys()
        assert row["default"] is False, "the kernels had to be asked for"


def test_gpu_timing_takes_turns(monkeypatch):
    """The GPU's path of measure(), on a stand-in for torch.cuda that counts milliseconds."""
    clock = types.SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.ms

        def elapsed_time(self, end):
            return end.at - self.at

    fakes = {"Event": Event, "synchronize": lambda: None}
    monkeypatch.setattr(torch_private, "cuda_sleep", lambda cycles: setattr(clock, "ms", clock.ms + 7))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 16)
    empty, order = torch.empty, []
    costs = {"a": 1.0, "b": 2.0, "c": 4.0}

    def call(name):
        order.append(name)
        clock.ms += costs[name]

    with mock.patch.multiple(torch.cuda, **fakes), \
            mock.patch.object(torch, "empty", lambda *shape, device, **rest: empty(*shape, **rest)):
        times = timing.measure({name: lambda name=name: call(name) for name in costs}, "cuda")
    rounds = int(timing.MILLISECONDS_PER_CALLEE / 4)
    assert times == {name: [pytest.approx(cost)] * rounds for name, cost in costs.items()}
    timed = order[-3 * rounds:]
    assert ["".join(timed[i:i + 3]) for i in (0, 3, 6, 9)] == ["abc", "bca", "cab", "abc"]


def test_spread():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"ms": 3.5, "p20": 2.0, "p80": 5.0}


def test_on_a_hopper_every_schedule_is_checked_and_timed(monkeypatch):
    """There, and nowhere else; a case that does not run on the schedule it names fails."""
    assert not any(subject.hopper != "auto" for subject in (*timing_cases(), *correctness_cases()))
    monkeypatch.setattr(cases, "on_hopper", lambda: True)
    monkeypatch.setattr(gpu, "on_hopper", lambda: True)
    for found in (timing_cases(), correctness_cases()):
        assert {subject.hopper for subject in found} == {"auto", *proven.offered()}
        assert len({subject.name for subject in found}) == len(found)
    monkeypatch.setattr(problem, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(settings, "DETERMINISTIC", False)
    for subject in correctness_cases():
        if subject.hopper != "auto" and subject.n_keys < 1000:
            small = replace(subject, backend="triton", batch=1)
            assert small.not_as_asked(*small.inputs("cpu")[:3]) == {}, subject.name
    lost = case(20, 20, backend="triton", hopper="gluon")
    assert set(lost.not_as_asked(*lost.inputs("cpu")[:3])) == {"forward", "backward"}
    for table in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(schedules, table, getattr(schedules, table)[-1:])
    row = correctness.check(lost, "cpu")
    assert not row["ok"]
    assert set(row["missed"]) == {"forward", "backward"}
    assert set(gpu._on_every_schedule(True)) == {"side stream", "CUDA graph", "torch.compile", "packed sequences", "sinks"}
