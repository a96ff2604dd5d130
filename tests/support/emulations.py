"""Every call that is emulated: features by card and schedule, pairs, types, head dims; rotary positions, weights."""

from collections.abc import Iterator
from dataclasses import replace

from fused_attn.targets import TARGETS
from support.emulation import SEVERAL, Emulation
from support.features import FEATURES, Shape, covering

CARDS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
NAMES = tuple(feature.name for feature in FEATURES if feature.name != "dims_576")  # which is among HEAD_DIMS
# Of the schedules of sm_90; what a schedule does not take runs on pointers.
TAKEN = {"descriptors": NAMES,
         "specialized": ("plain", "causal", "window", "softcap", "gqa", "lengths", "sinks", "lse"),
         "gluon": ("plain", "causal", "window", "scale", "softcap", "gqa", "lengths", "sinks", "packed", "seqused", "lse")}
OTHER_TYPES = ("fp16", "fp32", "tf32", "tf32x3", "fp64")
SOME = ("causal", "bias", "mask", "dropout", "packed")  # features, of the other types
HEAD_DIMS = (1, 8, 24, 40, 72, 96, 128, 200, 256, 320, 576)
DECODE = Shape(2, 4, 2, 1, 1100, 64, 64)  # keys enough that they go in splits
APART = 6  # features in a call of which every pair is to be met


def every() -> Iterator[Emulation]:
    """Each once, in the order in which the table has them."""
    for target in CARDS:
        yield from (Emulation(_features(name), target) for name in NAMES)
        yield Emulation(("causal",), target, shape=SEVERAL)
        yield Emulation((), target, shape=DECODE)
        yield Emulation((), target, what="rotary")
        yield Emulation(("window", "sinks"), target, what="weights")
    for hopper, names in TAKEN.items():
        yield from (Emulation(_features(name), "sm_90", hopper=hopper) for name in names)
        yield from (Emulation(_features(name), "sm_90", hopper=hopper, shape=replace(SEVERAL, dim=dim, dim_v=dim))
                    for dim in (64, 128, 256) for name in TAKEN["specialized"])
    yield from (Emulation(_features(name), target) for target in ("gfx90a", "gfx950") for name in ("plain", "gqa", *SOME))
    for target in (card for card in CARDS if card not in ("sm_86", "sm_120")):
        types = [dtype for dtype in OTHER_TYPES if has(target, dtype)]
        yield from (Emulation((name,), target, dtype) for dtype in types for name in SOME)
    for target in ("sm_80", "sm_90"):
        yield from (Emulation(("causal",), target, shape=Shape(1, 2, 1, 70, 90, dim, dim)) for dim in HEAD_DIMS)
        yield from (Emulation(names, target) for names in covering(APART) if "dims_576" not in names)


def has(target: str, dtype: str) -> bool:
    """Whether Triton multiplies in a type on a target."""
    found: bool = getattr(TARGETS[target], dtype, True)
    return found


def _features(name: str) -> tuple[str, ...]:
    return () if name == "plain" else (name,)
