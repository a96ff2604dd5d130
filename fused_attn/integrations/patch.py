"""Fused attention in other people's code, while a ``with`` lasts: ours answers torch's scaled_dot_product_attention."""

import contextlib
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fused_attn import torch_private
from fused_attn.sdpa import describe_sdpa, scaled_dot_product_attention, sdpa_by_torch


class PatchReport:
    """What ``patch_sdpa`` met: how often each kind of call ran fused, or why it went to torch.

    Attributes:
        fused: {description: calls} that the kernels answered.
        kept: {(description, reasons): calls} that torch answered.
    """

    def __init__(self) -> None:
        self.fused: Counter[str] = Counter()
        self.kept: Counter[tuple[str, str]] = Counter()

    def __str__(self) -> str:
        lines = [f"{self.fused.total()} calls ran fused, {self.kept.total()} went to torch"]
        lines += [f"  {count} x {call}" for call, count in self.fused.most_common()]
        lines += [f"  {count} x {call}: {reasons}" for (call, reasons), count in self.kept.most_common()]
        return "\n".join(lines)


class patch_sdpa:
    """Within this context, calls of ``torch.nn.functional.scaled_dot_product_attention`` run on the kernels where they can.

    This holds however the function was imported, and inside ``torch.nn.MultiheadAttention``; nothing in torch is changed. It
    holds in this thread alone and, of its tasks, in the one that entered it and those started within. ``with patch_sdpa() as
    report`` gives a report to print. A call that the kernels cannot run, such as one on CPU tensors, is torch's, exactly, and
    the report has the reason. Patches may be nested, entered again, and left in any order.

    Args:
        strict: raise RuntimeError instead, with the reasons.

    Raises:
        RuntimeError: where it is left more often than it was entered.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.report = PatchReport()
        self._stays: list[_Stay] = []

    def __enter__(self) -> PatchReport:
        torch_private.drop_function_modes(_is_over)
        stay = _Stay(self)
        self._stays.append(stay)
        _entered.set((*(other for other in _entered.get() if not _is_over(other)), stay))
        stay.__enter__()
        return self.report

    def __exit__(self, *raised: object) -> None:
        stays = [stay for stay in self._stays if stay in _entered.get()] or self._stays
        if not stays:
            raise RuntimeError("patch_sdpa: expected to be left as often as it was entered; got one more __exit__")
        stay = stays[-1]
        self._stays.remove(stay)
        stay.over = True  # which ends it, wherever its mode is; one that was entered in another thread stays on that stack
        torch_private.drop_function_modes(_is_over)


class _Mode(TorchFunctionMode):
    """A mode in which a patch answers."""

    def __init__(self, patch: patch_sdpa) -> None:
        super().__init__()
        self.patch = patch
        self._module_attention = _undispatched(F.multi_head_attention_forward, scaled_dot_product_attention=self._attend)

    def strictness(self) -> bool | None:
        """Whether a call that cannot run fused raises; None where the patch does not hold."""
        return self.patch.strict

    def around_backward(self) -> AbstractContextManager[Any]:
        """Makes the patch answer in a backward too, which may run forwards again where there are checkpoints."""
        return self

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        answered = func is torch_private.sdpa or func is F.multi_head_attention_forward or func in _BACKWARD
        if not answered or self.strictness() is None:
            return func(*args, **kwargs)
        if func is torch_private.sdpa:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._module_attention(*args, **kwargs)
        with self.around_backward():
            return _BACKWARD[func](*args, **kwargs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        named = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
        call, reasons = describe_sdpa(query, key, value, **named)
        counts = not torch.compiler.is_compiling()  # a count that changes would have every call compiled anew
        strict = self.strictness()
        shown = _shown(query, key, value, named) if counts or strict else ""
        if call is not None:
            if counts:
                self.patch.report.fused[shown] += 1
            return scaled_dot_product_attention(query, key, value, **named)
        if strict:
            raise RuntimeError(f"strict: scaled_dot_product_attention({shown}) cannot run fused: {'; '.join(reasons)}")
        if counts:
            self.patch.report.kept[shown, "; ".join(reasons)] += 1
        return sdpa_by_torch(query, key, value, **named)


class _Stay(_Mode):
    """The mode of one ``with``. All tasks of a thread meet its modes, so each checks whether the present task entered it."""

    def __init__(self, patch: patch_sdpa) -> None:
        super().__init__(patch)
        self.over = False
        self.thread = threading.get_ident()

    def strictness(self) -> bool | None:
        if torch.compiler.is_dynamo_compiling():
            present: bool | None = _this.STRICTNESS
            return present
        return self.patch.strict if self in _holding() else None

    @contextlib.contextmanager
    def around_backward(self) -> Iterator[None]:
        """In autograd's own threads there is no task to check: modes that do not check it take the place of all that hold."""
        stays = _holding()
        token = _entered.set(())
        try:
            with contextlib.ExitStack() as modes:
                for stay in stays:
                    modes.enter_context(_Mode(stay.patch))
                yield
        finally:
            _entered.reset(token)


_entered: ContextVar[tuple[_Stay, ...]] = ContextVar("patches", default=())
_this = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    """STRICTNESS is that of all patches that hold, together. A compiled call counts nothing, so it need not tell them apart;
    torch.compile cannot trace a context variable, but guards a compiled call on the value of a module's attribute."""
    if name != "STRICTNESS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return any(stay.patch.strict for stay in _holding()) if _holding() else None


def _holding() -> list[_Stay]:
    return [stay for stay in _entered.get() if not stay.over and stay.thread == threading.get_ident()]


def _is_over(mode: TorchFunctionMode) -> bool:
    return isinstance(mode, _Stay) and mode.over


def _shown(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, named: dict[str, Any]) -> str:
    """A call in words, without its values."""
    tensors = [f"{name} {_shape(x)}" for name, x in (("q", query), ("k", key), ("v", value))]
    others = [f"{name} {_shape(x) if isinstance(x, torch.Tensor) else x}" for name, x in named.items()
              if isinstance(x, torch.Tensor) or x]
    return ", ".join([*tensors, str(query.dtype)[6:], *others])


def _shape(x: torch.Tensor) -> list[Any]:
    return [x.size(0), "..."] if x.is_nested and x.layout == torch.strided else list(x.shape)


def _undispatched(function: Any, **others: Any) -> Callable[..., Any]:
    """A copy of a function of torch's that asks no mode before it runs, and in which some names mean ``others``.

    Called from inside a mode, the original would be handed to the outer modes; what it calls still is.
    """
    asks = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda _: False)
    names = {**function.__globals__, **asks, **others}
    names.pop("__name__")  # torch.compile reads a module's globals where it finds this
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_BACKWARD: dict[Any, Callable[..., Any]] = {
    function: _undispatched(function) for function in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)}
