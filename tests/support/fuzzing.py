"""Calls that nobody thought of: what can be drawn of a call of attention, and whether its answer is right.

A ``Trial`` says everything about one call; its repr is Python. Hypothesis draws trials, and shrinks one that fails.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st

from support.features import BY_NAME, COMBINED, Call, Inputs, Shape, compatible
from support.gates import check_bounded, check_ratio
from support.guard import memory_guard, poisoned_empty

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# "chosen" is what a caller gets who names none: on CPU tensors torch's own kernel, else the reference.
BACKENDS = {"reference": "reference", "triton": "triton", "blocked": "blocked", "chosen": None}
TORCH_SLACK = 4.0  # of torch's own kernels, which are what torch made them
# Of tensors of any rank: (..., N, D).
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "length before heads": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "head dim before length": lambda x: x.mT.contiguous().mT,
    "odd offset": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "every second column": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[..., :1, :, :].expand_as(x),
}
# Drawn by number, or part of the shape.
BY_VALUE = {"causal", "window", "scale", "softcap", "dropout", "precise", "gqa", "lengths", "dims", "dims_192", "dims_576"}
ADDED = [feature for feature in COMBINED if feature.name not in BY_VALUE]


@dataclass(frozen=True)
class Trial:
    """One call: its features beside ``arguments``, sizes, types, layouts of q, k, v and dO, and how large its numbers are.

    ``operands``: the dtype of bias, slopes and the like. ``times`` multiplies the queries, ``shift`` moves every score by about
    -shift², ``bias`` is the size of biases, of which some are -inf with ``holes``; ``v_mean`` is added to the values.
    """

    features: tuple[str, ...] = ()
    shape: Shape = dataclasses.field(default_factory=Shape)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "fp64"
    backend: str = "reference"
    compiled: bool = False
    operands: str | None = None
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4
    return_lse: bool = True
    times: float = 1.0
    shift: float = 0.0
    bias: float = 1.0
    holes: bool = False
    v_mean: float = 0.0
    seed: int = 0

    def __repr__(self) -> str:
        """What differs from the simplest trial."""
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.name == "shape" or repr(getattr(self, field.name)) != repr(getattr(Trial(), field.name))}
        return f"Trial({', '.join(f'{name}={value!r}' for name, value in told.items())})"

    @property
    def ordinary(self) -> bool:
        """Whether R has a meaning: long enough, unit-normal, in a type that rounds much, and nothing that cancels."""
        shape = self.shape
        plain = not self.features and self.arguments.keys() <= {"causal", "deterministic"} and shape.layout == "dense"
        same = (self.times, self.shift, self.v_mean) == (1, 0, 0) and "expanded" not in self.layouts
        return (plain and same and self.dtype != "fp64" and min(shape.n_queries, shape.n_keys) >= 256
                and min(shape.dim, shape.dim_v) >= 32)

    def draw(self) -> Inputs:
        dtype = DTYPES[self.dtype]
        inputs = Call(self.features, self.shape).draw(torch.float64, self.seed)
        leaves = dict(inputs.leaves)
        away = torch.zeros(self.shape.dim, dtype=torch.float64)
        away[:1] = self.shift
        leaves |= {"q": leaves["q"] * self.times + away, "k": leaves["k"] - away, "v": leaves["v"] + self.v_mean}
        wide = DTYPES[self.operands or self.dtype]
        if "bias" in leaves:
            added_in = torch.float64 if dtype == torch.float64 else torch.float32  # beyond its range a number is infinite there
            most = min(torch.finfo(wide).max, torch.finfo(added_in).max)
            bias = (leaves["bias"] * self.bias).clamp(-most, most)
            leaves["bias"] = bias.masked_fill(leaves["bias"] > 1, -math.inf) if self.holes else bias
        dout = LAYOUTS[self.layouts[3]](inputs.dout.to(dtype))
        leaves = {name: x.to(dtype if name in ("q", "k", "v") else wide) for name, x in leaves.items()}
        leaves |= {name: LAYOUTS[layout](leaves[name]) for name, layout in zip("qkv", self.layouts, strict=False)}
        dlse = inputs.dlse.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return replace(inputs, leaves=leaves, dout=dout, dlse=dlse, extra=self.arguments)


def check(trial: Trial) -> None:
    """Raises AssertionError where an answer is wrong: values, LSE, gradients, or memory that a kernel may not touch."""
    inputs, dtype = trial.draw(), DTYPES[trial.dtype]
    watched = trial.backend == "triton" and not trial.compiled
    torch._dynamo.reset()
    with memory_guard() if watched else contextlib.nullcontext(), poisoned_empty():
        through = {"through": _compiled} if trial.compiled else {}
        got = inputs.run(BACKENDS[trial.backend], return_lse=trial.return_lse, **through)
    check_bounded(inputs, got, dtype, TORCH_SLACK if trial.backend == "chosen" else 1.0)
    if trial.ordinary and trial.backend == "triton":
        check_ratio(inputs, inputs.run("triton", with_lse=False), dtype)


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, backend="aot_eager")


# --- what is drawn ---


@st.composite
def ordinary(draw: st.DrawFn) -> Trial:
    """Where R has a meaning."""
    n_queries, n_keys = draw(st.tuples(*[st.integers(256, 300)] * 2))
    shape = Shape(1, 2, draw(st.integers(1, 2)), n_queries, n_keys, *[draw(st.integers(32, 80))] * 2)
    arguments = draw(st.fixed_dictionaries({}, optional={"causal": st.just(True), "deterministic": st.booleans()}))
    layouts = draw(st.tuples(*[st.sampled_from([layout for layout in LAYOUTS if layout != "expanded"])] * 4))
    return Trial((), shape, arguments, draw(st.sampled_from(["bf16", "fp16", "fp32"])), "triton", layouts=layouts,
                 seed=draw(st.integers(0, 2**16)))


@st.composite
def unusual(draw: st.DrawFn) -> Trial:
    backend = draw(st.sampled_from(["triton", "triton", "triton", "blocked", "reference", "chosen"]))
    compiled = draw(st.integers(0, 9)) == 9
    features: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        fitting = [f.name for f in ADDED if f.name not in features and all(compatible(f, BY_NAME[name]) for name in features)]
        features.append(draw(st.sampled_from(fitting)))
    features += ["lse"] if draw(st.integers(0, 9)) == 9 else []
    shape = draw(shapes(features))
    arguments: dict[str, Any] = draw(st.fixed_dictionaries({}, optional={
        "causal": st.just(True), "window": WINDOWS, "scale": st.sampled_from([0.0, -0.3, 1.0, 1e-3]),
        "softcap": st.sampled_from([2.5, 30.0, 1e4]), "deterministic": st.booleans(), "precise": st.just(True)}))
    if backend != "chosen" and draw(st.integers(0, 5)) == 5:  # torch's own kernel drops by a mask of its own
        arguments["dropout_p"] = 0.25
    layouts = ["contiguous"] if shape.layout == "nested" else list(LAYOUTS)  # torch makes nested tensors of contiguous values
    biased = any(name.startswith("bias") for name in features)
    rare = st.integers(0, 2).map(lambda n: n == 2)  # at once they would leave little to see of one another
    return Trial(
        tuple(features), shape, arguments, draw(st.sampled_from(list(DTYPES))), backend, compiled,
        operands=draw(st.sampled_from([None, None, *DTYPES])), return_lse="lse" in features or draw(st.booleans()),
        layouts=draw(st.tuples(*[st.sampled_from(layouts)] * 4)),
        times=draw(st.sampled_from([4.0, 30.0, 300.0])) if draw(rare) else 1.0,
        shift=draw(st.sampled_from([4.0, 11.3, 30.0])) if draw(rare) else 0.0,
        bias=draw(st.sampled_from([30.0, 1e4, 1e9, 1e38, 1e300])) if biased and draw(rare) else 1.0,
        holes=biased and draw(rare), v_mean=16.0 if draw(rare) else 0.0, seed=draw(st.integers(0, 2**16)))


BOUNDS = st.one_of(st.none(), st.integers(0, 90))
WINDOWS = st.tuples(BOUNDS, BOUNDS)
LENGTHS = st.one_of(st.integers(0, 96), st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65]))
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([1, 16, 32, 59, 64, 80, 96, 111, 128, 160]))


@st.composite
def shapes(draw: st.DrawFn, features: list[str]) -> Shape:
    asked = [BY_NAME[name].shape for name in features if BY_NAME[name].shape]
    kv_heads = draw(st.integers(1, 2))
    n_queries = draw(LENGTHS)
    n_keys = n_queries if {"tree", "soft_tree"} & {*features} else draw(LENGTHS)
    heads = kv_heads * draw(st.integers(1, 3))
    shape = Shape(draw(st.integers(1, 2)), heads, kv_heads, n_queries, n_keys, draw(DIMS), draw(DIMS))
    return replace(shape, **asked[0]) if asked else shape


def trials() -> st.SearchStrategy[Trial]:
    return st.integers(0, 14).flatmap(lambda n: ordinary() if n == 14 else unusual())


def search(seed: int, count: int, seen: Callable[[Trial], None], shrink: bool = True,
           run: Callable[[Trial], None] | None = None) -> tuple[Trial, Exception] | None:
    """Checks ``count`` trials, or has them ``run`` otherwise, ``seen`` one by one; of a failure, the trial and its exception.

    ``shrink``: the smallest trial that still fails, for which Hypothesis takes five minutes at most.
    """
    last: list[tuple[Trial, Exception]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                         phases=(Phase.generate, *[Phase.shrink] * shrink), report_multiple_bugs=False, print_blob=False,
                         verbosity=Verbosity.quiet)
    @hypothesis.given(trials())
    def every(trial: Trial) -> None:
        try:
            (run or check)(trial)
        except Exception as error:
            last[:] = [(trial, error)]
            raise
        if not last:  # what passes while a failure is made small is no further evidence
            seen(trial)

    try:
        every()
    except Exception:
        if not last:
            raise
        return last[0]  # Hypothesis runs the smallest one once more, last of all
    return None
