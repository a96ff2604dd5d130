"""Every launch as the driver gets it: its parameters are its arguments, a new length compiles nothing, and limits hold."""

import dataclasses
import itertools
import re
from collections import defaultdict

import pytest

pytest.importorskip("triton")

from support.emulation import SEVERAL
from support.features import FEATURES, Shape
from support.launching import LAYOUTS, Configuration, Launching, TensorMap, process

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def worker():
    yield from process()


def one(*arguments, slow=False, **others):
    launching = Launching(*arguments, **others)
    return pytest.param(launching, id=str(launching), marks=[pytest.mark.slow] * slow)


# --- parameters ---

NAMES = [feature.name for feature in FEATURES]
GLUON = ("plain", "causal", "window", "gqa", "sinks", "packed", "softcap")  # what its kernels run
SQUARE = Shape(1, 2, 1, 300, 300, 64, 64)
DECODE = Shape(2, 8, 2, 1, 4096, 64, 64)
FEW = [
    one(("causal",), "sm_80", shape=SEVERAL), one(("packed",), "sm_90", shape=Shape(3, 2, 1, 65, 129, 64, 64, "packed")),
    one(("causal",), "sm_90", "descriptors", shape=SEVERAL), one(("causal", "gqa"), "sm_90", "gluon", shape=SEVERAL),
    one(layout="far rows", asks="output"),
]
MANY = [
    one(("mask", "dropout"), "sm_80", slow=True), one((), "sm_80", dtype="fp64", slow=True),
    one(shape=DECODE, asks="output", slow=True), one(layout="far rows", slow=True),
    one(layout="far batch", asks="output", slow=True),
    *(one((name,), target, slow=True) for target in ("sm_80", "sm_90") for name in NAMES),
    *(one((name,), "sm_90", "descriptors", slow=True) for name in NAMES),
    *(one((name,), "sm_90", "gluon", shape=SQUARE, slow=True) for name in NAMES),
    *(one((name,), target, dtype=dtype, slow=True) for target in ("sm_80", "sm_90")
      for dtype in ("fp16", "fp32", "fp64", "tf32x3") for name in ("causal", "bias", "mask", "packed", "dropout")),
    *(one((name,), target, arguments={"deterministic": True}, slow=True) for target in ("sm_80", "sm_90")
      for name in ("causal", "bias", "alibi", "packed")),
    *(one((), target, layout=layout, slow=True) for target in ("sm_80", "sm_90") for layout in LAYOUTS),
    *(one((), "sm_90", hopper, shape=SEVERAL, layout=layout, slow=True) for hopper in ("descriptors", "gluon")
      for layout in LAYOUTS),
    *(one((name,), target, asks=asks, slow=True) for target in ("sm_80", "sm_90") for asks in ("weights", "stats")
      for name in ("causal", "bias", "mask", "sinks")),
    *(one((), target, dtype=dtype, asks="rotary", slow=True) for target in ("sm_80", "sm_90") for dtype in ("bf16", "fp64")),
    *(one(names, target, shape=DECODE, asks="output", slow=True) for target in ("sm_80", "sm_90")
      for names in (("causal",), ("sinks", "key_lengths"), ("bias_keys",), ("mask",))),
    *(one(("causal",), target, shape=Shape(1, 2, 1, 70, 90, dim, dim), slow=True) for target in ("sm_80", "sm_90")
      for dim in (1, 8, 24, 40, 72, 96, 128, 200, 256, 320, 576)),
    *(one(shape=Shape(*sizes, 64, 64), slow=True) for sizes in ((0, 2, 2, 5, 5), (1, 2, 2, 0, 5), (1, 2, 2, 5, 0))),
    one(shape=Shape(70_000, 1, 1, 1, 1, 64, 64), asks="output", slow=True),  # more than a grid's other dimensions hold
]


@pytest.mark.few(2)
@pytest.mark.parametrize("launching", [*FEW, *MANY])
def test_parameters_are_the_arguments(worker, launching):
    told = worker(launching)
    assert (told["verdict"], told["warned"]) == ("ok", []), f"{launching!r}: {told['verdict']}, {told['warned']}"
    assert told["launches"] or 0 in (launching.shape.batch, launching.shape.n_queries)
    assert all(launch["registers"] <= 255 for launch in told["launches"])
    if launching.layout.startswith("far"):
        assert "i64" in told["launches"][0]["kinds"], "strides beyond 32 bits"
    if launching.hopper == "gluon" and launching.layout == "bhnd" and set(launching.features) <= set(GLUON):
        assert "map" in told["launches"][0]["kinds"]
        assert told["launches"][0]["module"] == "fused_attn.kernels.hopper.forward"
    if launching.hopper == "descriptors" and launching.features == ("causal",):
        assert told["launches"][0]["scratch"] > 0, "where the kernel writes its descriptors"


@pytest.mark.slow
def test_every_kernel_goes_this_way(worker):
    from fused_attn.kernels import backward, combine, forward, inspection, operand_grad, rotary, tile_list
    from fused_attn.kernels.hopper import backward as gluon_backward
    from fused_attn.kernels.hopper import forward as gluon_forward
    from fused_attn.kernels.hopper import workspace

    modules = [backward, combine, forward, inspection, operand_grad, rotary, tile_list]
    modules += [gluon_backward, gluon_forward, workspace]
    known = {(module.__name__, name) for module in modules for name in vars(module) if name.endswith("_kernel")
             and vars(module)[name].fn.__module__ == module.__name__}
    launched = set()
    for launching in (Launching(("bias",), arguments={"deterministic": True}), Launching(("mask",), shape=SEVERAL),
                      Launching(shape=DECODE, asks="output"), Launching(asks="weights"), Launching(asks="stats"),
                      Launching(asks="rotary"), Launching(("causal",), "sm_90", "gluon", shape=SEVERAL)):
        launched |= {(launch["module"], launch["kernel"]) for launch in worker(launching)["launches"]}
    assert launched >= known, known - launched


# --- kernels that are launched again ---

REPEATED = [  # a call, and how many launches are made again: of six turns all but the first and the fifth, which is unaligned
    (Launching(("causal",), "sm_80", asks="output", repeats=6), 4),
    (Launching(("causal",), "sm_80", repeats=6), 17),  # delta's tensors are our own, aligned in every turn
    (Launching(("causal",), "sm_90", "descriptors", shape=SEVERAL, asks="output", repeats=6), 4),
    (Launching(("causal", "gqa"), "sm_90", "gluon", shape=SEVERAL, repeats=6), 12),
    (Launching(shape=DECODE, asks="output", repeats=6), 9),
]


@pytest.mark.parametrize(("launching", "again"), REPEATED, ids=str)
def test_compiled_kernels_are_launched_again(worker, launching, again):
    """With the pointers of each time; where they are not aligned, Triton is asked."""
    told = worker(launching)
    assert told["verdict"] == "ok", told["verdict"]
    assert told["again"] == again
    unaligned = worker(dataclasses.replace(launching, repeats=5))  # the same but for its last call
    assert told["again"] - unaligned["again"] > 0, "after an unaligned call aligned ones are launched again"
    assert len({launch["variant"] for launch in told["launches"]}) > 1 or launching.hopper != "pointers"


# One more query's keys each time in a cache of one capacity, over a number of splits that grows, too.
GROWING = [
    (Launching(shape=Shape(1, 8, 2, 1, 3000, 64, 64), layout="capacity", asks="output", repeats=8, grows=7), 13),
    (Launching(shape=Shape(1, 8, 2, 1, 3900, 64, 64), layout="capacity", asks="output", repeats=8, grows=100), 13),
    (Launching(("causal",), shape=Shape(1, 2, 2, 40, 300, 64, 64), layout="capacity", asks="output", repeats=8, grows=1), 6),
    (Launching(("window",), shape=Shape(1, 8, 2, 1, 3000, 64, 64), layout="capacity", asks="output", repeats=8, grows=7), 6),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("launching", "again"), GROWING, ids=str)
def test_a_new_length_launches_what_another_one_compiled(worker, launching, again):
    """All but the first turn's launches and those of the turn whose tensors are not aligned."""
    told = worker(launching)
    assert told["verdict"] == "ok", told["verdict"]
    assert told["again"] == again


def test_strides_of_another_alignment_are_another_kernel(worker):
    """Columns lie 300, 304, ... apart, and 16 divides some of these: what was compiled for them is not for the others."""
    told = worker(Launching(shape=Shape(1, 2, 2, 64, 300, 64, 64), layout="columns", asks="output", repeats=6, grows=4))
    assert told["verdict"] == "ok", told["verdict"]
    assert told["again"] == 0
    assert len({launch["variant"] for launch in told["launches"]}) > 1


# --- faults that are planted ---


@pytest.mark.parametrize(("fault", "called"), [
    ("order", "parameter 0, .*bf16.* came, .* was expected; .*parameter 1"), ("dropped", "number of parameters: 25 came, 24"),
    ("constant", r"argument \(19,\): .*wide=False.* where .*wide=True.* is compiled in")])
def test_planted_faults_are_seen(worker, fault, called):
    verdict = worker(Launching(asks="output", fault=fault))["verdict"]
    assert re.search(called, verdict), verdict


# --- variants ---


def variants(worker, launchings):
    """The compiled variants of each kernel that these calls launch."""
    found = defaultdict(set)
    for launching in launchings:
        told = worker(launching)
        assert told["verdict"] == "ok", f"{launching!r}: {told['verdict']}"
        for launch in told["launches"]:
            found[launch["kernel"]].add(launch["variant"])
    return found


def counted(found):
    return {name: len(each) for name, each in found.items()}


def sizes(dim, features=(), layouts=("bhnd", "bnhd", "qkv"), batches=(1, 3), heads=(1, 2), target="sm_80", **others):
    """Of some lengths, calls of every combination."""
    return lambda lengths: [
        Launching(features, target, shape=Shape(batch, count, count, n, n, dim, dim), layout=layout, **others)
        for layout, batch, count, n in itertools.product(layouts, batches, heads, lengths)]


def decoding(lengths):
    return [Launching(shape=Shape(*shape, 1, 20 * n + 4000, 64, 64), layout=layout, asks="output")
            for layout in ("bhnd", "cache") for shape in ((1, 8, 2), (2, 8, 2), (3, 8, 2), (1, 12, 4)) for n in lengths]


FUSED = {"forward_kernel": 1, "delta_kernel": 1, "dkv_kernel": 1}
ONE = {**FUSED, "dq_kernel": 1}
ONE_AND_DECODE = {**ONE, "forward_kernel": 2}  # one query has tiles of its own
# What lengths, batches, heads and layouts make of kernels: Triton compiles anew where a stride or an address stops, or
# starts, to be a multiple of 16, and for a stride of 1. Rows of D64 and D80 always are; rows of D72, and of a bias as long as
# the keys, are when their number is; of a split's LSE, when batch times heads is.
COUNTED = {
    "D64": (sizes(64), ONE_AND_DECODE), "D64 sm_90": (sizes(64, target="sm_90"), {**FUSED, "forward_kernel": 2}),
    "D80": (sizes(80), ONE_AND_DECODE),
    "D72": (sizes(72, batches=(3,)), {"forward_kernel": 7, "delta_kernel": 6, "dq_kernel": 6, "dkv_kernel": 6}),
    "packed": (lambda lengths: [Launching(("packed",), shape=Shape(3, 2, 2, n, n, 64, 64)) for n in lengths], ONE),
    "key lengths": (sizes(64, ("key_lengths",), ("bnhd",)), ONE_AND_DECODE),
    "window": (sizes(64, ("window",), ("bnhd",)), ONE_AND_DECODE),
    "decoding": (decoding, {"forward_kernel": 2, "combine_kernel": 2}),
    "bias": (sizes(64, ("bias",), ("bnhd",), heads=(4,), asks="output"), {"forward_kernel": 9}),
    "bias of keys": (sizes(64, ("bias_keys",), ("bnhd",), heads=(4,), asks="output"), {"forward_kernel": 5}),
    "mask": (sizes(64, ("mask",), ("bnhd",), heads=(4,), asks="output"), {"list_kernel": 7, "forward_kernel": 7}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COUNTED)
def test_variants_are_few_and_no_length_adds_to_them(worker, what):
    calls, expected = COUNTED[what]
    found = variants(worker, calls((1, 2, 4, 7, 8, 16, 33, 50, 64)))
    assert counted(found) == expected
    for name, others in variants(worker, calls((3, 36, 40, 41, 66, 80, 129, 200))).items():
        assert others <= found[name], name


def test_a_new_length_batch_or_number_of_heads_compiles_nothing(worker):
    drawn = itertools.product((1, 2, 3), (1, 2, 8), (1, 16, 33, 129))
    calls = (Launching(shape=Shape(batch, heads, heads, n, n + 31, 64, 64), layout=layout)
             for (batch, heads, n), layout in zip(drawn, itertools.cycle(("bhnd", "bnhd", "qkv", "cache")), strict=False))
    assert counted(variants(worker, calls)) == ONE_AND_DECODE


def test_a_kernel_that_is_compiled_for_every_length_is_seen(worker):
    calls = [Launching(shape=Shape(n_queries=n, n_keys=n), asks="output", fault="specialised") for n in (64, 65)]
    assert counted(variants(worker, calls)) == {"forward_kernel": 2}


# --- the driver's own rules ---

REFUSED = [  # what breaks one rule, and what the driver says
    ({"kind": 16}, "tensorDataType"), ({"interleave": 3}, "interleave"), ({"swizzle": 7}, "swizzle"),
    ({"promotion": 4}, "l2Promotion"), ({"fill": 2}, "oobFill"), ({"shift": 32}, "the map's own address"),
    ({"rank": 0}, "tensorRank: 1 to 5"), ({"rank": 6}, "tensorRank: 1 to 5"),
    ({"rank": 2, "interleave": 1}, "tensorRank: 3 to 5"),
    ({"address": (1 << 20) + 8}, "globalAddress: a multiple of 16"),
    ({"address": (1 << 20) + 16, "interleave": 2, "swizzle": 1}, "globalAddress: a multiple of 32"),
    ({"dims": (64, 0, 4, 1, 1)}, "globalDim"), ({"dims": (64, 2**32 + 1, 4, 1, 1)}, "globalDim"),
    ({"strides": (136, 128 * 128, 0, 0)}, "globalStrides: multiples of 16"),
    ({"strides": (128, 2**40, 0, 0)}, "globalStrides: below 2^40"),
    ({"strides": (144, 128 * 128, 0, 0), "interleave": 2, "swizzle": 1}, "globalStrides: multiples of 32"),
    ({"box": (64, 257, 1, 1, 1)}, "boxDim: 1 to 256"), ({"box": (64, 0, 1, 1, 1)}, "boxDim: 1 to 256"),
    ({"box": (68, 64, 1, 1, 1), "swizzle": 0}, "boxDim[0]: a multiple of 16 bytes"),
    ({"box": (128, 64, 1, 1, 1)}, "boxDim[0]: no wider than the swizzle"),
    ({"box": (64, 64, 1, 1, 1), "swizzle": 2}, "boxDim[0]: no wider than the swizzle"),
    ({"box": (32, 64, 1, 1, 1), "swizzle": 1}, "boxDim[0]: no wider than the swizzle"),
    ({"interleave": 2}, "swizzle: of 32 bytes"),
    ({"steps": (1, 9, 1, 1, 1)}, "elementStrides"), ({"steps": (1, 0, 1, 1, 1)}, "elementStrides"),
    ({"kind": 2, "box": (32, 64, 1, 1, 1), "fill": 1}, "oobFill: NaN in floating point"),
    ({"kind": 15, "dims": (64, 128, 4, 1, 1)}, "globalDim[0]: a multiple of 128"),
    ({"kind": 14, "dims": (128, 128, 4, 1, 1)}, "boxDim[0]: 128"),
    ({"kind": 13, "dims": (63, 128, 4, 1, 1)}, "globalDim[0]: a multiple of 2"),
    ({"kind": 15, "dims": (128, 8, 4, 1, 1), "box": (128, 8, 1, 1, 1), "interleave": 1}, "interleave: none for this type"),
    ({"kind": 15, "dims": (128, 8, 4, 1, 1), "box": (128, 8, 1, 1, 1), "swizzle": 5}, "swizzle: none such"),
    ({"kind": 14, "dims": (128, 8, 4, 1, 1), "box": (128, 8, 1, 1, 1), "swizzle": 6}, "swizzle: none such"),
    ({"target": "sm_80"}, "a card of sm_80 has none"),
]


@pytest.mark.parametrize(("changed", "called"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else None)
def test_the_driver_refuses_wrong_tensor_maps(worker, changed, called):
    told = worker(TensorMap(**changed))
    assert told["verdict"].startswith("tensor map: ")
    assert called in told["verdict"]
    assert told["map"] is None


@pytest.mark.parametrize("changed", [{}, {"rank": 1}, {"box": (64, 256, 1, 1, 1)}, {"strides": (144, 2**40 - 16, 0, 0)},
                                     {"dims": (1, 2**32, 1, 1, 1)}, {"fill": 1}, {"steps": (0, 8, 1, 1, 1)},
                                     {"interleave": 2, "swizzle": 1}], ids=str)
def test_the_driver_takes_tensor_maps_at_the_limits(worker, changed):
    told = worker(TensorMap(**changed))
    assert told["verdict"] == "ok"
    assert told["map"][0] == 1 << 20


@pytest.mark.parametrize(("changed", "called"), [
    ({}, "ok"), ({"grid": (2**31 - 1, 65535, 65535)}, "ok"), ({"shared": 48 << 10}, "ok"),
    ({"shared": 100_000, "asked": 100_000}, "ok"), ({"grid": (2**31, 1, 1)}, "grid"), ({"grid": (1, 65536, 1)}, "grid"),
    ({"grid": (1, 1, 65536)}, "grid"), ({"grid": (0, 1, 1)}, "grid"), ({"threads": 0}, "0 threads"),
    ({"threads": 1025}, "1025 threads"), ({"threads": 1024}, r"\d+ registers for each of 1024 threads"),
    ({"threads": 64}, "64 threads of a kernel made for 128"), ({"shared": 50_000}, "50000 bytes of shared memory where 49152"),
    ({"asked": 166_913}, "166913 bytes of dynamic shared memory: the card has 166912"),
    ({"loaded_on": "sm_90"}, "a cubin of sm_80 on a card of sm_90"),
    ({"launched_on": "sm_90"}, "a kernel of sm_80 on a card of sm_90")],
    ids=lambda value: str(value) if isinstance(value, dict) else None)
def test_the_driver_holds_launches_to_the_cards_limits(worker, changed, called):
    assert re.match(called, worker(Configuration(**changed))["verdict"])
