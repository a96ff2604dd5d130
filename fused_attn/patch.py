"""Fused attention in other people's code, while a ``with`` lasts: torch's scaled_dot_product_attention answered by ours."""

import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fused_attn.functional import describe_sdpa, scaled_dot_product_attention


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

    def __enter__(self) -> PatchReport:
        super().__enter__()
        return self.report

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _with_attention(func, self._attend)(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        named = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
        call, reasons = describe_sdpa(query, key, value, **named)
        shown = ", ".join([f"q {list(query.shape)}", f"k {list(key.shape)}", f"v {list(value.shape)}", str(query.dtype)[6:],
                           *(f"{name} {list(x.shape) if isinstance(x, torch.Tensor) else x}" for name, x in named.items()
                             if x is not None and x is not False and x != 0.0)])
        if call is not None:
            self.report.fused[shown] += 1
            return scaled_dot_product_attention(query, key, value, **named)
        if self.strict:
            raise RuntimeError(f"strict: scaled_dot_product_attention({shown}) cannot run fused: {'; '.join(reasons)}")
        self.report.kept[shown, "; ".join(reasons)] += 1
        return F.scaled_dot_product_attention(query, key, value, **named)


def _with_attention(function: Callable[..., Any], attend: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """torch's multi_head_attention_forward with another scaled_dot_product_attention: calls from inside reach no mode."""
    assert isinstance(function, types.FunctionType)
    names = {**function.__globals__, "scaled_dot_product_attention": attend}
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
