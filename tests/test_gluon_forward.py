"""The Gluon forward for Hopper on the CPU: fp64's values under adversarial schedules, and planted bugs that must be caught."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import oracle
from support.gluon import mutated
from support.hopper import framed, gluon

import fused_attn
from fused_attn.call.spec import TileConfig
from fused_attn.kernels.hopper import forward

SCHEDULES = 200
HALVES = (torch.bfloat16, torch.float16)


def tile(block_n: int, stages: int = 2, consumers: int = 2) -> TileConfig:
    return TileConfig(64 * consumers, block_n, 4, stages)


USUAL = tile(64)


@dataclass(frozen=True)
class Case:
    """One call: (queries, keys) of a dense batch, or of every packed sequence."""

    lengths: tuple[tuple[int, int], ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    dim: int = 64
    dim_v: int | None = None
    tile: TileConfig = USUAL
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    amplitude: float = 1.0
    packed: bool = False
    starts: torch.dtype = torch.int32  # of packed sequences
    lost: int | None = None  # the batch entry or sequence whose keys and values are NaN

    def draw(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """q, k, v, framed by NaN, and the arguments of the call."""
        generator = torch.Generator().manual_seed(1)
        n_queries, n_keys = (sum(pair[i] for pair in self.lengths) for i in (0, 1))

        def normal(heads: int, length: int, dim: int, factor: float = 1.0) -> torch.Tensor:
            shape = (heads, length, dim) if self.packed else (self.batch, heads, length, dim)
            x = framed((torch.randn(shape, generator=generator) * factor).to(self.dtype))
            return x.transpose(0, 1) if self.packed else x

        dim_v = self.dim_v or self.dim
        tensors = [normal(self.heads, n_queries, self.dim, self.amplitude), normal(self.kv_heads, n_keys, self.dim),
                   normal(self.kv_heads, n_keys, dim_v)]
        if self.lost is not None:
            first = sum(pair[1] for pair in self.lengths[: self.lost])
            for x in tensors[1:]:
                (x[first : first + self.lengths[self.lost][1]] if self.packed else x[self.lost]).fill_(float("nan"))
        return tensors, self.arguments

    def run(self, tensors: list[torch.Tensor], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """out and LSE."""
        arguments = {**self.arguments, "return_lse": True, "backend": backend}
        if not self.packed:
            return fused_attn.attention(*tensors, **arguments)
        starts = [torch.tensor([0, *(pair[i] for pair in self.lengths)]).cumsum(0).to(self.starts) for i in (0, 1)]
        longest = [max(pair[i] for pair in self.lengths) for i in (0, 1)]
        return fused_attn.attention_varlen(*tensors, *starts, *longest, **arguments)

    def counted(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of out or LSE whose keys and values are numbers."""
        if self.lost is None:
            return x
        if not self.packed:
            return torch.cat((x[: self.lost], x[self.lost + 1 :]))
        rows = torch.cat([torch.full((pair[0],), i != self.lost) for i, pair in enumerate(self.lengths)])
        return x[rows] if x.dim() == 3 else x[:, rows]


def sinks(heads: int) -> torch.Tensor:
    return torch.linspace(-1, 2, heads)


CASES = {
    "full": Case(((128, 256),), tile=tile(128)),
    "causal": Case(((256, 256),), {"causal": True}),
    "causal, head dim 128": Case(((256, 256),), {"causal": True}, dim=128, tile=tile(128)),
    "causal, head dim 256": Case(((128, 128),), {"causal": True}, dim=256),
    "three consumers, causal": Case(((256, 256),), {"causal": True}, tile=tile(64, 4, 3)),
    "three consumers, tails": Case(((100, 200),), tile=tile(64, 4, 3)),
    "head dim 96 in tiles of 128, tails, fp16": Case(((70, 130),), {"causal": True}, dim=96, dtype=torch.float16),
    "head dim 80, full": Case(((65, 63),), dim=80),
    "values of another head dim": Case(((66, 90),), dim=96, dim_v=72),
    "one query, one key": Case(((1, 1),), {"causal": True}),
    "few queries, many keys": Case(((5, 300),), {"causal": True}),
    "queries before the first key": Case(((300, 70),), {"causal": True}),
    "offset not a multiple of the tiles": Case(((130, 197),), {"causal": True}),
    "the same in tiles of 128": Case(((190, 257),), {"causal": True}, tile=tile(128)),
    "tiles of 32 under 128 queries, 3 stages": Case(((256, 256),), {"causal": True}, tile=tile(32, 3)),
    "one stage": Case(((128, 320),), {"causal": True}, tile=tile(64, 1)),
    "window (40, 0)": Case(((256, 256),), {"window": (40, 0)}),
    "window (17, 9), tails": Case(((200, 230),), {"window": (17, 9)}, tile=tile(32)),
    "window (100, None)": Case(((150, 333),), {"window": (100, None)}),
    "window (None, 30)": Case(((150, 150),), {"window": (None, 30)}),
    "window (0, 0)": Case(((130, 130),), {"window": (0, 0)}),
    "window, queries without a key": Case(((260, 60),), {"window": (30, 0)}, tile=tile(32)),
    "window, three consumers": Case(((384, 384),), {"window": (70, 0)}, tile=tile(64, 4, 3)),
    "window, four stages": Case(((200, 260),), {"window": (90, 3)}, heads=3, tile=tile(64, 4)),
    "grouped heads, batch 2": Case(((140, 140),), {"causal": True}, batch=2, heads=4, kv_heads=2),
    "softcap": Case(((130, 130),), {"causal": True, "softcap": 2.5}, amplitude=3.0),
    "softcap, full": Case(((65, 150),), {"softcap": 30.0}, amplitude=8.0),
    "sinks": Case(((70, 150),), {"causal": True, "sinks": sinks(2)}, heads=2),
    "sinks, queries without a key": Case(((150, 70),), {"causal": True, "sinks": sinks(2)}, heads=2),
    "sinks that take everything or nothing": Case(((70, 70),), {"sinks": torch.tensor([3e38, -3e38])}, heads=2),
    "large scores": Case(((128, 192),), {"causal": True}, amplitude=8.0),
    "scale": Case(((100, 100),), {"scale": 0.5}),
    "NaN in one batch entry stays there": Case(((70, 90),), {"causal": True}, batch=3, lost=1),
    "packed, causal, grouped heads": Case(((70, 70), (1, 130), (0, 5), (129, 129)), {"causal": True}, heads=2, packed=True),
    "packed, starts in int64": Case(((70, 70), (20, 90)), {"causal": True}, packed=True, starts=torch.int64),
    "packed, sequences without keys": Case(((40, 0), (65, 30), (3, 200)), {"causal": True}, packed=True),
    "packed, full": Case(((10, 100), (140, 77), (64, 64)), heads=2, kv_heads=2, packed=True),
    "packed, window, fp16": Case(((150, 170), (33, 33)), {"window": (20, 5)}, packed=True, dtype=torch.float16, tile=tile(32)),
    "packed, NaN in one sequence stays there": Case(((70, 70), (20, 90), (66, 100)), {"causal": True}, heads=2, packed=True,
                                                    lost=1),
    "packed, used in part": Case(((70, 70), (90, 60)), {"seqused_q": torch.tensor([70, 50], dtype=torch.int32),
                                                        "seqused_k": torch.tensor([33, 60], dtype=torch.int32)}, packed=True),
}
FAST = ("full", "causal", "window (17, 9), tails", "one stage")


def check(case: Case, schedules: range, modules: dict[str, Any] | None = None) -> None:
    """Every schedule gives the same bits, and they are as near to fp64 as halves can be."""
    tensors, _ = case.draw()
    first = None
    for seed in schedules:
        with gluon(case.tile, seed, modules) as launches:
            out, lse = case.run(tensors, "triton")
        assert launches == ["forward_kernel"]
        if first is None:
            first = out, lse
            want, want_lse = case.run([x.double() for x in tensors], "reference")
            out, lse, want, want_lse = (case.counted(x) for x in (out, lse, want, want_lse))
            assert not out.isnan().any()
            some = want_lse > -torch.inf
            assert torch.equal(lse == -torch.inf, ~some)
            assert (lse[some] - want_lse[some]).abs().max() < 2e-5 * max(1.0, case.amplitude)
            if oracle.error_ratio(out, want) > 1.5:  # of few values none may be lost by rounding
                torch.testing.assert_close(out.double(), want, rtol=2 * oracle.EPS[case.dtype], atol=1e-6)
        else:
            for x, y in zip((out, lse), first, strict=True):
                assert torch.equal(case.counted(x), case.counted(y)), f"seed {seed} differs"


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FAST)
def test_values_under_adversarial_schedules(name):
    check(CASES[name], range(SCHEDULES))


@pytest.mark.kernels
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_values(name):
    check(CASES[name], range(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_values_under_all_schedules(name):
    check(CASES[name], range(SCHEDULES))


RING, PROBLEM, FORWARD = (f"fused_attn.kernels.hopper.{name}" for name in ("ring", "problem", "forward"))
CAUSAL, PACKED = CASES["causal"], CASES["packed, causal, grouped heads"]
SECTIONS = Case(((140, 140),), {"causal": True}, heads=5, kv_heads=5)
PAIRS = 4 * 140 * 64 * 2  # bytes of K and V: what makes a section of two heads of SECTIONS
BUGS: dict[str, tuple[str, str, str, Case]] = {  # a module, what stands there, what is put in its place, and a call
    "V released before its product is done": (
        FORWARD, "        acc = warpgroup_mma_wait(0, deps=(acc,))\n        release(v, step - 1)",
        "        release(v, step - 1)\n        acc = warpgroup_mma_wait(0, deps=(acc,))", CAUSAL),
    "K released before its product is done": (
        FORWARD, "        s = warpgroup_mma_wait(1, deps=(s,))\n        release(k, step)",
        "        release(k, step)\n        s = warpgroup_mma_wait(1, deps=(s,))", CAUSAL),
    "no wait for V": (FORWARD, "        await_tile(v, step - 1)\n", "", CAUSAL),
    "no wait for the last V": (FORWARD, "    await_tile(v, base + count - 1)\n", "", CAUSAL),
    "no wait for the next K": (FORWARD, "        await_tile(k, step + 1, pred=i + 1 < count)\n", "", CAUSAL),
    "the next K awaited in the wrong slot": (FORWARD, "await_tile(k, step + 1, pred=i", "await_tile(k, step, pred=i", CAUSAL),
    "no wait for the queries": (FORWARD, "        mbarrier.wait(q.full.index(which), 0)\n", "", CAUSAL),
    "scores read one product too early": (FORWARD, "s = warpgroup_mma_wait(1,", "s = warpgroup_mma_wait(2,", CAUSAL),
    "the producer does not wait for empty slots": (
        RING, "    await_step_before(ring.empty, step)\n", "", CAUSAL),
    "the producer waits with the wrong parity": (RING, "shape[0] + 1) & 1)", "shape[0]) & 1)", CAUSAL),
    "the empty barrier counts one consumer": (RING, "(STAGES, CONSUMERS)\n", "(STAGES, 1)\n", CAUSAL),
    "twice the bytes expected": (RING, "desc.block_type.nbytes)", "desc.block_type.nbytes * 2)", CAUSAL),
    "tiles unseen on the right not handed back": (
        FORWARD, "            discard(k, v, 0, base)\n", "            pass\n", CAUSAL),
    "tiles unseen on the left not handed back": (
        FORWARD, "            discard(k, v, base + count, program_last - program_first)\n", "            pass\n",
        Case(((384, 384),), {"window": (70, 0)}, tile=tile(32, 2, 3))),
    "unseen tiles handed back before they land": (
        FORWARD, "        await_tile(k, step)\n        release(k, step)\n        await_tile(v, step)\n",
        "        release(k, step)\n",
        Case(((512, 512),), {"window": (0, 0)}, tile=tile(32))),
    "no fence before the output's store": (FORWARD, "    fence_async_shared()\n", "", CAUSAL),
    "the output's store never awaited": (FORWARD, "    tma.store_wait(0)\n", "", CAUSAL),
    "diagonal off by one": (PROBLEM, "problem.right[0], item.n_keys - 1", "problem.right[0] + 1, item.n_keys - 1", CAUSAL),
    "first query at the first key": (PROBLEM, "    position = row + item.offset + gl.arange", "    position = row + gl.arange",
                                     Case(((130, 197),), {"causal": True})),
    "inner tiles one key too far on the right": (
        PROBLEM, "position + problem.right[0] + 1)", "position + problem.right[0] + 2)", Case(((130, 192),), {"causal": True})),
    "inner tiles one key too far on the left": (
        PROBLEM, "position + ROWS - 1 - problem", "position + ROWS - 2 - problem", Case(((256, 256),), {"window": (126, 0)})),
    "the walk one key short on the right": (
        PROBLEM, "problem.right[0] + n_rows)", "problem.right[0] + n_rows - 1)", Case(((128, 193),), {"causal": True})),
    "the walk one key short on the left": (
        PROBLEM, "gl.maximum(position - problem.left[0], 0) // BLOCK_N",
        "gl.maximum(position - problem.left[0] + 1, 0) // BLOCK_N",
        Case(((256, 256),), {"window": (65, 0)})),
    "keys past the end not masked": (PROBLEM, "(keys < item.n_keys)[None, :]", "(keys < item.n_keys + 64)[None, :]",
                                     Case(((64, 100),))),
    "-inf subtracted from -inf": (FORWARD, "gl.where(new_max == NEG_INF, 0.0, new_max)", "new_max",
                                  CASES["queries before the first key"]),
    "division by an empty sum": (FORWARD, "gl.where(row_sum == 0.0, 0.0, shrink / row_sum)", "1.0 / row_sum",
                                 CASES["queries before the first key"]),
    "LSE of queries past the end": (FORWARD, ", mask=rows < item.n_queries)", ")", Case(((70, 64),))),
    "no rescaling": (FORWARD, "        acc = acc * by_row(shrink, acc)\n", "", CAUSAL),
    "the wrong key head": (FORWARD, "item.head // problem.group", "item.head % problem.group", CASES["grouped heads, batch 2"]),
    "the last section taken for a full one": (
        PROBLEM, "gl.minimum(problem.section, gl.num_programs(0) // q_tiles - first)", "problem.section", SECTIONS),
    "packed neighbours not cut off": (PROBLEM, "RAGGED_END - length + row, 0", "RAGGED_END - length - 64 + row, 0", PACKED),
    "packed sequences one row late": (PROBLEM, "return RAGGED_END, start + length,", "return RAGGED_END, start + length + 1,",
                                      PACKED),
    "softcap after the mask": (
        FORWARD, "    if MASKED:\n        s = gl.where(visible(row, tile, item, problem, LAYOUT, BLOCK_N), s, NEG_INF)\n", "",
        CASES["softcap"]),
    "a sink that takes no weight": (FORWARD, "row_sum * shrink + gl.exp2((sink - top) * LOG2E)",
                                   "row_sum * shrink", CASES["sinks"]),
    "one tile too few of three consumers": (FORWARD, "base = program_last - last", "base = program_last - last + 1",
                                            CASES["three consumers, causal"]),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name):
    """Each within 60 schedules, by a wrong value, a fault or a deadlock."""
    module, old, new, case = BUGS[name]
    edits = {module: [(old, new)]}
    if case is SECTIONS:
        edits[module].append(("L2_BYTES = 32 << 20", f"L2_BYTES = {PAIRS}"))
    with mutated(edits) as modules, pytest.raises((AssertionError, RuntimeError, OverflowError)):
        check(case, range(60), modules)


def test_heads_are_walked_in_sections(monkeypatch):
    """Five heads, two of which are walked together: one is left over."""
    monkeypatch.setattr(forward, "L2_BYTES", PAIRS)
    check(SECTIONS, range(3))


def test_the_stride_of_a_single_head_is_anyones():
    """torch calls tensors contiguous whose single head has any stride; TMA would not have it."""
    q, k, v = (torch.randn(66, 64).bfloat16().as_strided((66, 1, 64), (64, 1, 1)) for _ in range(3))
    starts = torch.tensor([0, 20, 66], dtype=torch.int32)
    with gluon() as launches:
        out = fused_attn.attention_varlen(q, k, v, starts, starts, 46, 46, causal=True, backend="triton")
    assert launches == ["forward_kernel"]
    wide = [x.double() for x in (q, k, v)]
    want = fused_attn.attention_varlen(*wide, starts, starts, 46, 46, causal=True, backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)


def test_short_and_narrow_heads_and_many_queries_of_one_key_head():
    for dim, heads in ((8, 4), (40, 1)):
        q = torch.randn(1, heads, 70, dim).bfloat16()
        k, v = (torch.randn(1, 1, 90, dim).bfloat16() for _ in range(2))
        with gluon() as launches:
            out = fused_attn.attention(q, k, v, causal=True, backend="triton")
        assert launches == ["forward_kernel"]
        want = fused_attn.attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
