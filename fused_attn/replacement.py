"""Fused attention in a model that exists: its torch modules become ours where they stand, and back again."""

import dataclasses
from typing import Any

from torch import nn

from fused_attn import nn as fused

_LAYERS: dict[type, type] = {
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
    nn.TransformerEncoder: fused.TransformerEncoder,
    nn.TransformerDecoder: fused.TransformerDecoder,
    nn.Transformer: fused.Transformer,
}
_KNOWN = (nn.MultiheadAttention, *_LAYERS)
_OURS = (fused.MultiheadAttention, *_LAYERS.values())
_DETOURS = {"use_nested_tensor": False, "activation_relu_or_gelu": 0}  # attributes by which torch leaves its Python code


@dataclasses.dataclass
class Replacement:
    """What ``replace_attention`` did. As a context manager it undoes that at the end.

    Attributes:
        replaced: names of the modules that are fused now.
        kept: (name, why not) of every other module that looks like attention.
    """

    model: nn.Module
    replaced: list[str] = dataclasses.field(default_factory=list)
    kept: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    _before: list[tuple[nn.Module, type, dict[str, Any]]] = dataclasses.field(default_factory=list, repr=False)

    def restore(self) -> nn.Module:
        """torch's modules again, with the weights as they are now; returns the model."""
        while self._before:
            module, cls, attributes = self._before.pop()
            if isinstance(module, fused.MultiheadAttention) and cls is nn.MultiheadAttention:
                module.release()
            module.__class__ = cls
            vars(module).update(attributes)
        self.replaced = []
        return self.model

    def __enter__(self) -> "Replacement":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules run fused attention"]
        lines += [f"  {name or '(the model itself)'}" for name in self.replaced]
        if self.kept:
            lines.append(f"{len(self.kept)} kept as they were")
            lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.kept]
        return "\n".join(lines)


def replace_attention(model: nn.Module, *, strict: bool = False) -> Replacement:
    """Turns torch's attention and transformer modules inside ``model`` into those of ``fused_attn.nn``, in place.

    The modules remain the objects they are, of another class: weights, hooks, dtype, device, training mode, optimizers and
    references from elsewhere hold. ``print`` the report; ``restore()`` it, or use it in a ``with``, to go back.

    Only torch's own classes are changed: ``MultiheadAttention``, ``TransformerEncoderLayer``, ``TransformerDecoderLayer``,
    their containers and ``Transformer``. Other code that calls ``scaled_dot_product_attention`` runs fused within
    ``patch_sdpa()``; Hugging Face models have ``fused_attn.integrations.transformers``.

    Args:
        model: any module, or one of those classes itself.
        strict: raise, and change nothing, where a module that looks like attention would be kept as it is.

    Raises:
        RuntimeError: with ``strict``, naming the modules and the reasons.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    report = Replacement(model)
    found = list(model.named_modules())
    plain = [(name, module) for name, module in found if (reason := _against(module)) is None]
    report.kept = [(name, reason) for name, module in found if (reason := _against(module))]
    if strict and report.kept:
        raise RuntimeError("strict: not everything would run fused\n"
                           + "\n".join(f"  {name or '(the model itself)'}: {reason}" for name, reason in report.kept))
    for name, module in plain:
        before = {key: value for key, value in vars(module).items() if key in _DETOURS}
        report._before.append((module, type(module), before))
        if type(module) is nn.MultiheadAttention:
            fused.MultiheadAttention.adopt(module)
        else:
            module.__class__ = _LAYERS[type(module)]
        vars(module).update({key: _DETOURS[key] for key in before})
        report.replaced.append(name)
    for _, module in found:  # torch's code in a class of one's own, around layers that are fused now
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and not isinstance(module, _OURS):
            before = {key: value for key, value in vars(module).items() if key in _DETOURS and value != _DETOURS[key]}
            report._before.append((module, type(module), before))
            vars(module).update({key: _DETOURS[key] for key in before})
    return report


def _against(module: nn.Module) -> str | None:
    """Why a module is kept: None if it is not, "" if nothing need be said of it."""
    cls = type(module)
    if cls in _KNOWN:
        return "its forward was replaced on the instance" if "forward" in vars(module) else None
    if isinstance(module, _OURS):
        return ""
    if isinstance(module, _KNOWN):
        base = next(base.__name__ for base in cls.__mro__ if base in _KNOWN)
        return f"{cls.__name__}, a subclass of torch's {base}, has code of its own"
    if "attention" in cls.__name__.lower() or "attn" in cls.__name__.lower():
        return f"{cls.__name__} is not torch's; within patch_sdpa() its scaled_dot_product_attention runs fused"
    return ""
