"""Fused attention in a model that exists: its torch modules become ours in place, and torch's again."""

import dataclasses
from typing import Any, NamedTuple

from torch import nn

from fused_attn import nn as fused

_AFTER: dict[type, type] = {
    nn.MultiheadAttention: fused.MultiheadAttention,
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
    nn.TransformerEncoder: fused.TransformerEncoder,
    nn.TransformerDecoder: fused.TransformerDecoder,
    nn.Transformer: fused.Transformer,
}
_KNOWN = tuple(_AFTER)
_OURS = tuple(_AFTER.values())
_FAST_PATHS = {"use_nested_tensor": False, "activation_relu_or_gelu": 0}  # attributes by which torch leaves its Python code


class _Change(NamedTuple):
    """One module's change: its class before and after, and the former values of the attributes that are set."""

    name: str
    module: nn.Module
    before: type
    after: type
    attributes: dict[str, Any]

    def make(self) -> None:
        if self.after is fused.MultiheadAttention:
            fused.MultiheadAttention.adopt(self.module)  # type: ignore[arg-type]
        else:
            self.module.__class__ = self.after
        vars(self.module).update({key: _FAST_PATHS[key] for key in self.attributes})

    def undo(self) -> None:
        """Undoes the change, also one that was only begun; an attribute that others have set since stays."""
        if isinstance(self.module, fused.MultiheadAttention) and self.before is nn.MultiheadAttention:
            self.module.release()
        elif self.before is not self.after:
            self.module.__class__ = self.before
        ours = [key for key in self.attributes if vars(self.module).get(key) == _FAST_PATHS[key]]
        vars(self.module).update({key: self.attributes[key] for key in ours})


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
    _changes: list[_Change] = dataclasses.field(default_factory=list, repr=False)

    def restore(self) -> nn.Module:
        """Makes the modules torch's again, with the weights as they are now; returns the model.

        Raises:
            RuntimeError: where something has given a module another class since, as ``fully_shard`` and parametrizations do;
                it names the modules, and restores none.
        """
        others = [f"  {change.name or '(the model itself)'}: {type(change.module).__name__}" for change in self._changes
                  if change.before is not change.after and type(change.module) not in (change.before, change.after)]
        if others:
            raise RuntimeError("restore: expected the classes that replace_attention gave; these have been "
                               "changed since by something that must be undone first:\n" + "\n".join(others))
        for change in reversed(self._changes):
            change.undo()
        self._changes, self.replaced = [], []
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
    references from elsewhere stay valid. ``print`` the report; ``restore()`` it, or use it in a ``with``, to go back.

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
    try:
        for name, module in plain:
            _make(report, name, module, _AFTER[type(module)])
            report.replaced.append(name)
        for name, module in found:  # torch's code in a user's subclass, around layers that are fused now
            if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and not isinstance(module, _OURS):
                _make(report, name, module, type(module))
    except BaseException:  # all or nothing
        report.restore()
        raise
    return report


def _make(report: Replacement, name: str, module: nn.Module, after: type) -> None:
    attributes = {key: value for key, value in vars(module).items() if key in _FAST_PATHS and value != _FAST_PATHS[key]}
    change = _Change(name, module, type(module), after, attributes)
    report._changes.append(change)
    change.make()


def _against(module: nn.Module) -> str | None:
    """Why a module is kept as it is: None if it is not kept, "" if the reason need not be reported."""
    cls = type(module)
    if cls in _KNOWN:
        return "its forward was replaced on the instance" if "forward" in vars(module) else None
    if isinstance(module, _OURS):
        return ""
    if isinstance(module, _KNOWN):
        base = next(base.__name__ for base in cls.__mro__ if base in _KNOWN)
        return f"{cls.__name__}, a subclass of torch's {base}, has code of its own"
    if _sounds_like_attention(module) and not any(
            isinstance(inner, _KNOWN) or _sounds_like_attention(inner) for inner in module.modules() if inner is not module):
        return f"{cls.__name__} is not torch's; within patch_sdpa() its scaled_dot_product_attention runs fused"
    return ""


def _sounds_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name
