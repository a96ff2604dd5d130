"""Fused attention in other people's code, while a ``with`` lasts: torch's scaled_dot_product_attention answered by ours."""

import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fused_attn import torch_private
from fused_attn.functional import by_torch, describe_sdpa, scaled_dot_product_attention


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


class patch_sdpa(TorchFunctionMode):
    """Within it, calls of ``torch.nn.functional.scaled_dot_product_attention`` run on the kernels where they can.

    However the function was imported, and inside ``torch.nn.MultiheadAttention``; in this thread alone; nothing in torch is
    changed. ``with patch_sdpa() as report``: print the report. A call that the kernels cannot run is torch's, exactly, with
    its reason in the report; CPU tensors are.

    Args:
        strict: raise RuntimeError instead, with the reasons.
    """

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.report = PatchReport()
        self._module_attention = _undispatched(F.multi_head_attention_forward, scaled_dot_product_attention=self._attend)

    def __enter__(self) -> PatchReport:
        super().__enter__()
        return self.report

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch_private.sdpa:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._module_attention(*args, **kwargs)
        if func in _BACKWARD:  # which may run forwards again, of checkpoints
            with self:
                return _BACKWARD[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        named = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
        call, reasons = describe_sdpa(query, key, value, **named)
        counts = not torch.compiler.is_compiling()  # a count that changes would have every call compiled anew
        shown = _shown(query, key, value, named) if counts or self.strict else ""
        if call is not None:
            if counts:
                self.report.fused[shown] += 1
            return scaled_dot_product_attention(query, key, value, **named)
        if self.strict:
            raise RuntimeError(f"strict: scaled_dot_product_attention({shown}) cannot run fused: {'; '.join(reasons)}")
        if counts:
            self.report.kept[shown, "; ".join(reasons)] += 1
        return by_torch(query, key, value, **named)


def _shown(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, named: dict[str, Any]) -> str:
    """A call in words, without its values."""
    tensors = [f"{name} {_shape(x)}" for name, x in (("q", query), ("k", key), ("v", value))]
    others = [f"{name} {_shape(x) if isinstance(x, torch.Tensor) else x}" for name, x in named.items()
              if isinstance(x, torch.Tensor) or x]
    return ", ".join([*tensors, str(query.dtype)[6:], *others])


def _shape(x: torch.Tensor) -> list[Any]:
    return [x.size(0), "..."] if x.is_nested and x.layout == torch.strided else list(x.shape)


def _undispatched(function: Any, **others: Any) -> Callable[..., Any]:
    """A function of torch's that asks no mode before it runs, and some of whose names mean ``others``.

    Called from inside a mode it would be handed to the modes around; what it calls still is.
    """
    asks = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda _: False)
    names = {**function.__globals__, **asks, **others}
    names.pop("__name__")  # torch.compile reads a module's globals where it finds this
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_BACKWARD: dict[Any, Callable[..., Any]] = {
    function: _undispatched(function) for function in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)}
