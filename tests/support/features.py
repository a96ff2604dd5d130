"""The features of the package, one list: how to draw a call with each, what has a gradient, what goes with what.

Tests draw their calls from it and the support matrix is printed from it, so a feature that is not here is neither.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import fused_attn
from fused_attn.call import describe
from fused_attn.call.describe import Described
from fused_attn.run import ops
from support.mods import COMB, NEAR, bent, ribbed

Arguments = dict[str, Any]
Leaves = dict[str, torch.Tensor]


# --- shapes and draws ---


@dataclass(frozen=True)
class Shape:
    """Of a call; for packed and nested layouts the lengths are those of the longest of three sequences, one empty."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    n_queries: int = 70
    n_keys: int = 70
    dim: int = 16
    dim_v: int = 16
    layout: str = "dense"

    def lengths(self) -> tuple[list[int], list[int]]:
        """Of the packed sequences: longer than the keys, empty, and shorter than the keys."""
        queries, keys = self.n_queries, self.n_keys
        return ([queries, 0, queries // 3], [keys // 2, min(4, keys), keys])[:2]

    def rows(self, lengths: list[int]) -> int:
        """Tokens of one side: a packed one has a tail that belongs to no sequence."""
        return sum(lengths) + (3 if self.layout == "packed" else 0)


@dataclass
class Draw:
    """Random tensors of one call."""

    shape: Shape
    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def integers(self, low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=self.generator)

    def trees(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(enter, leave) [B, N] of a random tree for every batch entry."""
        trees = []
        for _ in range(self.shape.batch):
            parents = [int(self.integers(max(-1, node - 6), node, 1)) if node else -1 for node in range(self.shape.n_keys)]
            trees.append(fused_attn.tree_intervals(torch.tensor(parents, dtype=torch.int64)))
        enter, leave = ([tree[i] for tree in trees] for i in (0, 1))
        empty = torch.zeros(0, self.shape.n_keys, dtype=torch.int32)
        return (torch.stack(enter), torch.stack(leave)) if trees else (empty, empty)


# What a feature adds: tensors that want a gradient, and the arguments made from them.
Drawn = tuple[Leaves, Callable[..., Arguments]]


def constant(**arguments: Any) -> Callable[[Draw], Drawn]:
    return lambda draw: ({}, lambda: arguments)


def _bias(dims: str) -> Callable[[Draw], Drawn]:
    """A bias that has its full extent in the dimensions named among b, h, q and k, and no others in front of the first."""

    def drawn(draw: Draw) -> Drawn:
        shape = draw.shape
        extents = {"b": shape.batch, "h": shape.heads, "q": shape.n_queries, "k": shape.n_keys}
        size = [extents[name] if name in dims else 1 for name in "bhqk"]["bhqk".index(dims[0]):]
        return {"bias": draw.normal(*size)}, lambda bias: {"bias": bias}

    return drawn


def _relative(draw: Draw) -> Drawn:
    values = draw.normal(draw.shape.heads, max(0, draw.shape.n_queries + draw.shape.n_keys - 1))
    return {"values": values}, lambda values: {"bias": fused_attn.RelativeBias(values)}


def _t5(draw: Draw) -> Drawn:
    shape = draw.shape
    return ({"table": draw.normal(12, shape.heads)},
            lambda table: {"bias": fused_attn.t5_bias(table, shape.n_queries, shape.n_keys, max_distance=40)})


def _mask(draw: Draw) -> Drawn:
    shape = draw.shape
    mask = draw.integers(0, 4, shape.batch, 1, shape.n_queries, shape.n_keys) > 0
    mask[:1, :, :, 32:64] = False  # whole tiles
    mask[-1:, :, 5:6] = False  # a row without a key
    return {}, lambda: {"mask": mask}


def _key_lengths(draw: Draw) -> Drawn:
    lengths = draw.integers(0, draw.shape.n_keys + 1, draw.shape.batch)
    lengths[-1:] = draw.shape.n_keys * 2 // 3
    return {}, lambda: {"key_lengths": lengths}


def _seqused(draw: Draw) -> Drawn:
    used = [torch.tensor([max(0, n - 7) for n in lengths], dtype=torch.int32) for lengths in draw.shape.lengths()]
    return {}, lambda: {"seqused_q": used[0], "seqused_k": used[1]}


def _document(draw: Draw) -> Drawn:
    keys, queries = (draw.integers(0, 3, draw.shape.batch, n).sort().values for n in (draw.shape.n_keys, draw.shape.n_queries))
    return {}, lambda: {"mask_mod": fused_attn.document_mask(keys, queries)}


def _prefix_lm(draw: Draw) -> Drawn:
    lengths = draw.integers(0, draw.shape.n_keys + 1, draw.shape.batch)
    return {}, lambda: {"mask_mod": fused_attn.prefix_lm_mask(lengths)}


def _tree(draw: Draw) -> Drawn:
    trees = draw.trees()
    return {}, lambda: {"mask_mod": fused_attn.tree_mask(*trees)}


def _soft_tree(draw: Draw) -> Drawn:
    trees = draw.trees()
    return {"penalty": draw.normal(draw.shape.heads, 1, 1).abs()}, lambda penalty: {
        "score_mod": fused_attn.soft_tree_mask(*trees, penalty)}


def _score_mod(draw: Draw) -> Drawn:
    return {"weight": draw.normal(draw.shape.heads, 1, draw.shape.n_keys)}, lambda weight: {"score_mod": NEAR(weight, 0.75)}


def _mask_mod(draw: Draw) -> Drawn:
    marks = (draw.integers(0, 5, draw.shape.batch, 1, 1, draw.shape.n_keys) > 0).int()
    return {}, lambda: {"mask_mod": COMB(marks, 3)}


def _function(draw: Draw) -> Drawn:
    heads = draw.shape.heads
    return {"weight": draw.normal(heads), "by_distance": draw.normal(heads, 15)}, lambda weight, by_distance: {
        "score_mod": bent, "mod_args": (weight, by_distance)}


def _slopes(draw: Draw) -> Drawn:
    return {"slopes": draw.normal(draw.shape.batch, draw.shape.heads).abs() / 4}, lambda slopes: {"alibi_slopes": slopes}


def _kerple(draw: Draw) -> Drawn:
    heads = draw.shape.heads
    return {"r1": draw.normal(draw.shape.batch, heads).abs(), "r2": draw.normal(heads).abs()}, lambda r1, r2: {
        "score_mod": fused_attn.kerple(r1, r2)}


def _sinks(draw: Draw) -> Drawn:
    return {"sinks": draw.normal(draw.shape.heads) + 1}, lambda sinks: {"sinks": sinks}


def _additive(draw: Draw) -> Drawn:
    return {"score_weight": draw.normal(draw.shape.heads, draw.shape.dim)}, lambda weight: {"score_weight": weight}


NOTHING = constant()


# --- the list ---


@dataclass(frozen=True)
class Feature:
    """One feature. ``shape`` replaces fields of a Shape; of one ``group`` a call has at most one, and none of ``without``."""

    name: str
    title: str
    family: str
    draw: Callable[[Draw], Drawn] = NOTHING
    gradients: str = ""  # in words, beside q, k and v
    shape: Arguments = field(default_factory=dict)
    group: str = ""
    without: tuple[str, ...] = ()
    packed: bool = True
    dtypes: str = "fp16, bf16, fp32, fp64"
    note: str = ""


MASKS, SCORES, WEIGHTS, SHAPES, LAYOUTS, OUTPUTS = FAMILIES = (
    "who attends to whom", "scores", "softmax and weights", "shapes", "layouts", "outputs and numerics")
PACKED = {"layout": "packed", "batch": 3}
RAGGED = ("packed", "seqused", "nested")

FEATURES = (
    Feature("plain", "full attention", MASKS, group="mask_mod"),
    Feature("causal", "causal, last query at last key", MASKS, constant(causal=True)),
    Feature("window", "sliding window (left, right)", MASKS, constant(window=(24, 11))),
    Feature("scale", "scale", SCORES, constant(scale=0.4)),
    Feature("softcap", "softcap", SCORES, constant(softcap=2.5), note="a new value compiles once"),
    Feature("gqa", "grouped-query and multi-query heads", SHAPES, shape={"heads": 4, "kv_heads": 2}),
    Feature("lengths", "Nq ≠ Nk, any lengths from 0", SHAPES, shape={"n_queries": 70, "n_keys": 93}, group="lengths"),
    Feature("dims", "head dims up to 256, Dv ≠ D", SHAPES, shape={"dim": 24, "dim_v": 40}, group="dims"),
    Feature("dims_192", "head dims 192 for keys, 128 for values", SHAPES, shape={"dim": 192, "dim_v": 128}, group="dims"),
    Feature("dims_576", "head dims 576 for keys, 512 for values", SHAPES, shape={"dim": 576, "dim_v": 512}, group="dims"),
    Feature("additive", "additive score, w · tanh(q + k)", SCORES, _additive, "score weight", group="product",
            without=("dims_576",), note="head dims up to 256"),
    Feature("bias", "bias, any shape that broadcasts", SCORES, _bias("bhqk"), "bias", group="bias"),
    Feature("bias_pairs", "bias [Nq, Nk], one for all heads", SCORES, _bias("qk"), "bias", group="bias"),
    Feature("bias_keys", "bias per key [B, 1, 1, Nk]", SCORES, _bias("bk"), "bias", group="bias"),
    Feature("relative", "relative bias by k - q, never Nq x Nk", SCORES, _relative, "relative values", group="bias"),
    Feature("t5", "T5's bias", SCORES, _t5, "T5's table", group="bias"),
    Feature("alibi", "ALiBi", SCORES, _slopes, "slopes"),
    Feature("kerple", "KERPLE's logarithmic bias", SCORES, _kerple, "KERPLE's r1 and r2", group="score_mod"),
    Feature("mask", "bool mask, empty tiles skipped", MASKS, _mask),
    Feature("key_lengths", "key lengths", MASKS, _key_lengths, without=RAGGED, packed=False, note="packed: `seqused_k`"),
    Feature("document", "document mask", MASKS, _document, group="mask_mod"),
    Feature("prefix_lm", "prefix-LM mask", MASKS, _prefix_lm, group="mask_mod"),
    Feature("dilated_window", "dilated sliding window", MASKS, constant(mask_mod=fused_attn.dilated_window_mask(9, 2)),
            group="mask_mod", note="a new value compiles once"),
    Feature("tree", "tree mask", MASKS, _tree, group="mask_mod", without=("lengths",)),
    Feature("mask_mod", "custom mask function", MASKS, _mask_mod, group="mask_mod"),
    Feature("function_mask", "mask function in plain Python", MASKS, constant(mask_mod=ribbed), group="mask_mod"),
    Feature("function", "score function in plain Python", SCORES, _function, "what a function captures", group="score_mod"),
    Feature("soft_tree", "soft tree mask", SCORES, _soft_tree, "penalty", group="score_mod", without=("lengths",)),
    Feature("score_mod", "custom score function", SCORES, _score_mod, "arguments of a function", group="score_mod"),
    Feature("sinks", "sinks", WEIGHTS, _sinks, "sinks"),
    Feature("dropout", "dropout", WEIGHTS, constant(dropout_p=0.25), note="a new value compiles once"),
    Feature("precise", "`precise=True`", OUTPUTS, constant(precise=True), note="off under dropout"),
    Feature("packed", "packed sequences, empty ones too", LAYOUTS, shape=PACKED, group="layout"),
    Feature("seqused", "packed sequences used in part", LAYOUTS, _seqused, shape=PACKED, group="layout"),
    Feature("nested", "jagged nested tensors", LAYOUTS, shape={"layout": "nested", "batch": 3}, group="layout"),
    Feature("lse", "returned LSE", OUTPUTS, note="natural logarithm, fp32 or fp64"),
)
BY_NAME = {feature.name: feature for feature in FEATURES}
COMBINED = tuple(feature for feature in FEATURES if feature.name not in ("plain", "lse"))  # every call returns the LSE


def compatible(a: Feature, b: Feature) -> bool:
    return a != b and (not a.group or a.group != b.group) and a.name not in b.without and b.name not in a.without


def compatible_pairs(features: tuple[Feature, ...] = COMBINED) -> set[frozenset[str]]:
    return {frozenset((a.name, b.name)) for a, b in itertools.combinations(features, 2) if compatible(a, b)}


def covering(size: int, features: tuple[Feature, ...] = COMBINED) -> Iterator[tuple[str, ...]]:
    """Combinations of at most ``size`` features, greedily, until every compatible pair has occurred in one."""
    open_pairs = compatible_pairs(features)
    while open_pairs:
        names = min(map(sorted, open_pairs))
        while len(names) < size:
            fitting = [f.name for f in features if all(compatible(f, BY_NAME[name]) for name in names)]
            gains = {name: sum(frozenset((name, other)) in open_pairs for other in names) for name in fitting}
            best = max(fitting, key=gains.__getitem__, default="")
            if not gains.get(best):
                break
            names.append(best)
        open_pairs -= {frozenset(pair) for pair in itertools.combinations(names, 2)}
        yield tuple(sorted(names))


# --- calls ---


@dataclass(frozen=True)
class Call:
    """One call of attention with some features; ``base`` is its shape where they ask for none."""

    features: tuple[str, ...]
    base: Shape = Shape()

    def __str__(self) -> str:
        return "+".join(self.features)

    @property
    def shape(self) -> Shape:
        shape = self.base
        for name in self.features:
            shape = replace(shape, **BY_NAME[name].shape)
        return shape

    def draw(self, dtype: torch.dtype, seed: int = 0) -> "Inputs":
        shape = self.shape
        draw = Draw(shape, torch.Generator().manual_seed(seed), dtype)
        if shape.layout == "dense":
            rows = [(shape.batch, heads, n) for heads, n in ((shape.heads, shape.n_queries), (shape.kv_heads, shape.n_keys))]
            lse = rows[0]
        else:
            tokens = [shape.rows(lengths) for lengths in shape.lengths()]
            rows = [(tokens[0], shape.heads), (tokens[1], shape.kv_heads)]
            lse = (tokens[0], shape.heads) if shape.layout == "nested" else (shape.heads, tokens[0])
        leaves = {"q": draw.normal(*rows[0], shape.dim), "k": draw.normal(*rows[1], shape.dim),
                  "v": draw.normal(*rows[1], shape.dim_v)}
        dout, dlse = draw.normal(*rows[0], shape.dim_v), draw.normal(*lse)
        builders = []
        for name in self.features:
            more, build = BY_NAME[name].draw(draw)
            leaves |= more
            builders.append((tuple(more), build))
        dlse = dlse.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return Inputs(self, leaves, dout, dlse, builders)


@dataclass
class Inputs:
    """What a call is made of: tensors that want a gradient, the gradients of its outputs, and its arguments."""

    call: Call
    leaves: Leaves
    dout: torch.Tensor
    dlse: torch.Tensor
    builders: list[tuple[tuple[str, ...], Callable[..., Arguments]]]
    extra: Arguments = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Inputs":
        leaves = {name: x.to(dtype) for name, x in self.leaves.items()}
        return replace(self, leaves=leaves, dout=self.dout.to(dtype), dlse=self.dlse.to(dtype))

    def arguments(self, leaves: Leaves) -> Arguments:
        arguments: Arguments = dict(self.extra)
        for names, build in self.builders:
            arguments |= build(*(leaves[name] for name in names))
        return arguments

    @functools.cached_property
    def cu(self) -> list[torch.Tensor]:
        """Where packed sequences start: of queries, of keys."""
        return [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in self.call.shape.lengths()]

    def described(self, leaves: Leaves) -> Described:
        """As the package describes it; a nested call as a packed one."""
        arguments, shape = self.arguments(leaves), self.call.shape
        arguments.pop("deterministic", None)  # of a run, not of what is computed
        tensors = [leaves[name] for name in "qkv"]
        torch.manual_seed(1)
        if shape.layout == "dense":
            return ops.seeded(describe.describe(*tensors, **arguments))
        used = [arguments.pop(name, None) for name in ("seqused_q", "seqused_k")]
        packed = describe.describe_packed(*tensors, *self.cu, shape.n_queries, shape.n_keys, *used, **arguments)
        return ops.seeded(packed)

    def attention(self, leaves: Leaves, backend: str | None, **others: Any) -> Any:
        """(out, lse), or out with ``return_lse=False``; of nested tensors their values."""
        arguments, shape = self.arguments(leaves), self.call.shape
        tensors = [leaves[name] for name in "qkv"]
        arguments |= {"return_lse": True, "backend": backend, **others}
        if shape.layout == "dense":
            return fused_attn.attention(*tensors, **arguments)
        if shape.layout == "packed":
            return fused_attn.attention_varlen(*tensors, *self.cu, shape.n_queries, shape.n_keys, **arguments)
        cu_q, cu_k = (x.long() for x in self.cu)
        nested = [torch.nested.nested_tensor_from_jagged(x, cu) for x, cu in zip(tensors, (cu_q, cu_k, cu_k), strict=True)]
        result = fused_attn.attention(*(x.transpose(1, 2) for x in nested), **arguments)
        if not arguments["return_lse"]:
            return result.transpose(1, 2).values()
        return tuple(x.transpose(1, 2).values() for x in result)

    def run(self, backend: str | None, *, with_lse: bool = True, return_lse: bool = True,
            through: Callable[..., Any] = lambda call: call) -> Leaves:
        """out, lse if returned, and the gradient of every leaf, through out and LSE; of the feature ``lse`` through LSE alone.

        ``through`` changes the call before it is made, as torch.compile does.
        """
        leaves = {name: x.detach().requires_grad_() for name, x in self.leaves.items()}
        assert len(self.cu) == 2  # made here, not by what is compiled
        torch.manual_seed(1)  # dropout draws one seed a call
        results = through(partial(self.attention, backend=backend, return_lse=return_lse))(leaves)
        results = results if return_lse else (results,)
        wanted = [(results[0], self.dout)] if "lse" not in self.call.features else []
        wanted += [(results[1], self.dlse)] if return_lse and (with_lse or not wanted) else []
        outputs, grads = zip(*wanted, strict=True)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, materialize_grads=True)
        return {**{name: x.detach() for name, x in zip(("out", "lse"), results, strict=False)},
                **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}
