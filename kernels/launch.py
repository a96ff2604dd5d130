"""Launching: the one place where a kernel meets its device, its options and its tile configuration."""

import contextlib
import contextvars
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources, PTXASError

from fused_attn import interpreter, settings
from fused_attn.call.spec import Kind, TileConfig
from fused_attn.kernels import fences
from fused_attn.kernels.tiles import Sequences
from fused_attn.targets import arch_of

if settings.interpreted():
    interpreter.repair()


# A tile has at most 256 rows and 256 columns: below this stride its 32-bit offsets cannot overflow.
WIDEST_STRIDE = 2**31 // 512
EIGHT = tl.constexpr(8)


class Extras(NamedTuple):
    """What a call adds to plain attention, as kernels take it: a tuple that is empty costs nothing.

    No field of these tuples is ever None, since Triton 3.6 loses a None on its way into a function.
    """

    mods: tuple[Any, ...] = ()  # score.Mod records, in the order in which they act
    keeps: tuple[Any, ...] = ()  # mask.Keep records
    sequences: Sequences = Sequences()
    dropout: tuple[Any, ...] = ()  # a dropout.Dropout
    additive: tuple[Any, ...] = ()  # a product.Additive, in place of the inner product
    lse_rest: tuple[Any, ...] = ()  # (pointer,): what rounding took from the LSE, laid out like it (``with_lse``)


PLAIN = Extras()


class Call(NamedTuple):
    """One call of attention, all but its tensors q, k, v [B, H, N, D] (packed: [1, H, T, D], whatever the batch)."""

    scale: float
    left: int | None
    right: int | None
    offset: int  # position of query 0 among the keys; packed sequences have their own
    precision: str
    batch: int
    n_queries: int  # of the longest sequence
    n_keys: int
    extras: Extras = PLAIN
    masks_by: tuple[bool, bool] = (False, False)  # whether the masks differ between batch entries, and between heads
    widest: int = 0  # largest query or key stride of an operand
    loaded_bytes: int = 0  # bytes of operands that are loaded for each score

    @property
    def heavy(self) -> bool:
        """Whether a tile of scores takes more registers than in plain attention, so that tile configurations differ."""
        return bool(self.extras.mods or self.extras.keeps or self.extras.dropout)

    def strides(self, *tensors: torch.Tensor) -> tuple[tuple[Any, ...], ...]:
        """Strides of [B, H, N, D] tensors in the form that ``tiles.head_view`` takes; packed ones have none of the batch."""
        packed = bool(self.extras.sequences.total_q)
        if not packed and not any(t.shape[3] % 16 == 8 for t in tensors):
            return tuple([t.stride() for t in tensors])
        return tuple([_with_unit((tl.constexpr(0), *t.stride()[1:]) if packed else t.stride(), t) for t in tensors])


def _with_unit(strides: tuple[Any, ...], x: torch.Tensor) -> tuple[Any, ...]:
    """``strides`` and, where all are multiples of 8 though not of 16, that: Triton tells apart multiples of 16 alone."""
    *rows, column = x.stride()
    eighths = x.shape[3] % 16 == 8 and column == 1 and not any(stride % 8 for stride in rows)
    return (*strides, EIGHT) if eighths else strides


class Launch(NamedTuple):
    """A launch as a value, which may be run, compiled, timed or described.

    ``arguments`` are those of the kernel up to TILE, which ``config`` becomes; the first is a tensor, on whose device it runs.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    config: TileConfig

    @property
    def name(self) -> str:
        """The kernel's name, such as "forward_kernel"."""
        name: str = self.kernel.fn.__name__
        return name


class UnfitTilesError(RuntimeError):
    """A kernel does not fit the card with the tiles that it was given, for a reason that smaller ones may take away.

    ``schedule``: the one with tiles of its own that the kernel is of, or None for those that have smaller ones. ``compiled``: a
    kernel that does run, and spills ``spilled`` bytes a thread. The tensors of the launch are not kept.
    """

    def __init__(self, launch: Launch, reason: str, compiled: Any = None) -> None:
        super().__init__(f"{launch.name} with tiles {launch.config.words} {reason}")
        self.name, self.config, self.compiled = launch.name, launch.config, compiled
        self.argument_types = tuple([type(x) for x in launch.arguments])
        self.schedule: str | None = None
        if launch.kernel.fn.__module__.startswith("fused_attn.kernels.hopper"):
            self.schedule = "gluon"
        elif self.config.specialize or self.config.descriptors:
            self.schedule = "specialized" if self.config.specialize else "descriptors"
        elif getattr(launch.arguments[-1], "fused", False):
            self.schedule = "fused"

    @property
    def spilled(self) -> int:
        return 0 if self.compiled is None else _spill(self.compiled)


def accept(compiled: Any) -> None:
    """Lets a kernel that spills be launched from now on."""
    _fitting.add(compiled)


_counters: list[Counter[str]] = []


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the launches made within the context, by kernel name."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]  # remove() would compare counts


def run(launch: Launch, compiled: Any = None) -> Any:
    """Launches on the device of the first argument and on that device's current stream; without a program, nothing.

    Returns the compiled kernel, where a later launch whose arguments are of the same types, with the same integers and with
    pointers that are multiples of 16 as well, may give it as ``compiled``: that spares the host Triton's search for it.
    """
    if launch.programs == 0:
        return None
    device = launch.arguments[0].device
    here = device.type == "cpu" or device.index == torch.accelerator.current_device_index()
    for counter in _counters:
        counter[launch.name] += 1
    if here:
        return _launch(launch, device, compiled)
    with torch.accelerator.device_index(device.index):
        return _launch(launch, device, compiled)


_compiled: dict[Any, Any] = {}  # kernels that were compiled, by what Triton tells apart: ``_variant``
_MOST_COMPILED = 1024  # past them all are forgotten, which costs a search each


def _variant(launch: Launch, device: torch.device) -> Any:
    """What launches that share a compiled kernel have in common, or None where only Triton can tell.

    Numbers for which a kernel is not specialised, lengths among them, are no part of it. Tensors must be aligned, and tuples
    hold nothing but integers, as those of plain calls do.
    """
    found: list[Any] = [launch.kernel, launch.config, device]
    for argument, fixed in zip(launch.arguments, _specialised(launch.kernel), strict=False):
        cls = type(argument)
        if cls is int or cls is float:
            if fixed or (cls is int and not -(2**31) <= argument < 2**31):
                return None
            found.append(cls)
        elif isinstance(argument, torch.Tensor):
            if argument.data_ptr() % 16:
                return None
            found.append(argument.dtype)
        elif argument is None or argument is PLAIN or isinstance(argument, Kind) or _of_integers(argument):
            found.append(argument)
        else:
            return None
    return tuple(found)


def forget() -> None:
    """Asks Triton for every kernel again."""
    _compiled.clear()


def _of_integers(x: Any) -> bool:
    """Whether x is a tuple of integers, Nones and such tuples."""
    return isinstance(x, tuple) and all(type(y) is int or y is None or _of_integers(y) for y in x)


@functools.cache
def _specialised(kernel: Any) -> tuple[bool, ...]:
    """By parameter, whether another number makes Triton compile a kernel anew; what has a type of its own never does."""
    return tuple(not (parameter.do_not_specialize or parameter.annotation) for parameter in kernel.params)


def _launch(launch: Launch, device: torch.device, compiled: Any) -> Any:
    if compiled is not None:
        return _launch_again(launch, compiled)
    variant = _variant(launch, device) if _kept_on(device) else None
    if variant is not None and (compiled := _compiled.get(variant)) is not None:
        return _launch_again(launch, compiled)
    compiled = _launch_first(launch, device)
    if variant is not None and compiled is not None:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[variant] = compiled
    return compiled


def _launch_first(launch: Launch, device: torch.device) -> Any:
    """The way through Triton, which compiles the kernel or finds what it has compiled."""
    if fences.lacking(arch_of(device), launch.config.descriptors):
        with fences.putting_in():
            compiled = _launch_as_it_is(launch._replace(config=fences.fenced(launch.config)), device)
    else:
        compiled = _launch_as_it_is(launch, device)
    return compiled if _kept_on(device) and type(compiled) is CompiledKernel else None


_fitting: set[Any] = set()  # compiled kernels that were looked at
MOST_SPILL = 1024  # bytes a thread; no shipped tiles that were compiled for their own target come near


def _look(launch: Launch, compiled: Any) -> None:
    """Raises UnfitTilesError where what Triton compiled spills too much; its first launch is then made in vain."""
    if compiled in _fitting or _capturing():
        return
    if _spill(compiled) > MOST_SPILL:
        raise UnfitTilesError(launch, f"spills {_spill(compiled)} bytes a thread", compiled)
    _fitting.add(compiled)


def _spill(compiled: Any) -> int:
    return 4 * (compiled.n_spills or 0)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: what would be launched instead would be in it as well."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_card(device: torch.device) -> bool:
    return device.type != "cpu"


def _kept_on(device: torch.device) -> bool:
    """Whether kernels that were compiled for a device are launched again. AMD's also differ by the sizes of tensors."""
    return device.type == "cuda" and torch.version.hip is None


def _launch_again(launch: Launch, compiled: Any) -> Any:
    """With the arguments that the kernel was compiled for, but for pointers; fences are in it, if it lacked them."""
    config = launch.config
    if config.descriptors:
        contextvars.copy_context().run(_with_scratch, compiled[(launch.programs, 1, 1)], (*launch.arguments, config), {})
    else:
        compiled[(launch.programs, 1, 1)](*launch.arguments, config)
    return compiled


def options_of(config: TileConfig) -> dict[str, Any]:
    """What the compiler is told. Multiplications and additions are fused, also where a later Triton does not by itself."""
    return dict(config.options, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


def _launch_as_it_is(launch: Launch, device: torch.device) -> Any:
    kernel, programs, arguments, config = launch
    options = options_of(config)
    try:
        if config.descriptors:  # which the kernel writes; a context of its own keeps the user's allocator
            compiled = contextvars.copy_context().run(_with_scratch, kernel[(programs,)], (*arguments, config), options)
        else:
            compiled = kernel[(programs,)](*arguments, config, **options)
    except Exception as error:
        if not _is_of_tiles(error) or _capturing():
            raise
        raise UnfitTilesError(launch, f"does not fit: {' '.join(str(error).split())[:200]}") from error
    if _is_card(device) and type(compiled) is CompiledKernel:
        _look(launch, compiled)
    return compiled


def _is_of_tiles(error: Exception) -> bool:
    """Whether smaller tiles may take an error away, which is not so where a source is wrong, such as that of a user's mod."""
    text = str(error)
    if isinstance(error, PTXASError):
        return "too much shared data" in text or "register" in text
    return isinstance(error, OutOfResources) or "PassManager::run failed" in text


def _with_scratch(launcher: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    triton.set_allocator(_scratch)
    return launcher(*arguments, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device=torch.accelerator.current_accelerator())


def with_lse(call: Call, lse: torch.Tensor) -> tuple[torch.Tensor, Call]:
    """Returns (lse, call) in the form that kernels take, given an LSE [..., H, Nq], or [2, ..., H, Nq], the LSE and its rest.

    Calls with mods need both: where scores are near -1e9, one fp32 number cannot hold the logarithm of a sum as well.
    """
    if lse.dim() == 3:
        return lse, call
    return lse[0], call._replace(extras=call.extras._replace(lse_rest=(lse[1],)))


def fit_offsets(config: TileConfig, call: Call, *tensors: torch.Tensor) -> TileConfig:
    """``config``, with 64-bit offsets inside a tile where some tensor's strides ask for them."""
    narrow = call.widest < WIDEST_STRIDE
    if config.wide:
        return config
    for t in tensors:
        *_, row, column = t.stride()
        narrow = narrow and row < WIDEST_STRIDE and column < WIDEST_STRIDE
    return config if narrow else dataclasses.replace(config, wide=True)


def programs(length: int, block: int, heads: int) -> int:
    """Grid size for ``heads`` sequences of ``length`` rows, with one program for each tile of ``block`` rows."""
    return -(-length // block) * heads


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Type of the softmax state and of every sum, for inputs of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# Each kind is made once, which makes launches quicker.
kind_of = functools.cache(Kind)
