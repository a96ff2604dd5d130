"""Reads the code of a transformers model, to tell whether its attention can go through transformers' interface."""

import inspect
import re
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from transformers import AttentionInterface, GenerationMixin, PreTrainedModel

_ATTENTION = re.compile("att(entio)?n", re.IGNORECASE)  # in the name of a class of modules
_MEANS = {"softmax", "scaled_dot_product_attention", "MultiheadAttention", "flash_attn_func", "flash_attn_varlen_func"}
_ELSEWHERE = ("ALL_ATTENTION_FUNCTIONS", "AutoModel", "AutoBackbone", "load_backbone")  # how names begin
_SHARED = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}  # what every model has, which says nothing of this one


def attends_on_its_own(model: type[PreTrainedModel]) -> bool:
    """Whether a model attends, while neither the code it runs nor anything else in its module uses transformers' interface.

    The search follows modules and functions by name from the model's methods on, in whatever files they are. A model that has
    AutoModel make its parts is taken to attend in those, which are checked when they are made.
    """
    found = list(vars(sys.modules.get(model.__module__, ModuleType(""))).values())
    if any(isinstance(x, AttentionInterface) for x in found):
        return False
    seen: set[int] = set()
    names: set[str] = set()
    attends = False
    ahead: list[Any] = [model]
    while ahead:
        reader = ahead.pop()
        if id(reader) in seen:
            continue
        seen.add(id(reader))
        is_class = isinstance(reader, type)
        attends |= is_class and _ATTENTION.search(reader.__name__) is not None
        part = not is_class or not issubclass(reader, PreTrainedModel)  # a whole model takes softmax of its outputs
        for name, value in _reads(reader):
            names.add(name)
            attends |= part and name in _MEANS
            if isinstance(value, AttentionInterface):
                return False
            ahead += filter(_is_followed, value.values() if isinstance(value, dict) else [value])
    return attends and not any(name.startswith(_ELSEWHERE) for name in names)


def _is_followed(x: Any) -> bool:
    if not isinstance(x, FunctionType | type) or (isinstance(x, type) and not issubclass(x, torch.nn.Module)):
        return False
    module = f"{x.__module__}."
    library = module.startswith("transformers.") and not module.startswith("transformers.models.")
    return x not in _SHARED and not module.startswith("torch.") and (isinstance(x, type) or not library)


def _reads(reader: Any) -> Iterator[tuple[str, Any]]:
    """The names in the code of a function, or of a class's methods, with what they mean there, None where that is not known."""
    for function in _methods(reader) if isinstance(reader, type) else [reader]:
        function = inspect.unwrap(function)
        known = function.__globals__ if isinstance(function, FunctionType) else {}
        names = {name for code in _codes(getattr(function, "__code__", None)) for name in code.co_names}
        modules = [known[name] for name in names if isinstance(known.get(name), ModuleType)]
        for name in names:
            yield name, known.get(name)
            yield from ((name, vars(module)[name]) for module in modules if name in vars(module))


def _methods(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        if base not in _SHARED and not base.__module__.startswith("torch."):
            for name, x in vars(base).items():
                x = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
                if callable(x) and name != "_init_weights":
                    yield x


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """``code``, and the code of the functions in it."""
    if code is not None:
        yield code
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from _codes(inner)
