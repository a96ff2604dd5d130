"""How PyTorch and Python call the operations that plain functions may use, and what else they may ask of tensors."""

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F

# What functions call an operation: the names of torch, torch.Tensor, torch.nn.functional and operator.
ALIASES = {
    "add": "add", "sub": "sub", "subtract": "sub", "rsub": "rsub", "mul": "mul", "multiply": "mul", "div": "div",
    "divide": "div", "true_divide": "div", "truediv": "div", "floordiv": "floordiv", "floor_divide": "floordiv", "mod": "mod",
    "remainder": "mod", "pow": "pow", "maximum": "maximum", "minimum": "minimum", "where": "where", "clamp": "clamp",
    "clip": "clamp", "clamp_min": "clamp_min", "clamp_max": "clamp_max", "logical_and": "logical_and",
    "logical_or": "logical_or", "logical_xor": "logical_xor", "logical_not": "not", "bitwise_and": "and", "bitwise_or": "or",
    "bitwise_xor": "xor", "and_": "and", "or_": "or", "xor": "xor", "bitwise_not": "invert", "invert": "invert",
    "inv": "invert", "neg": "neg", "negative": "neg", "pos": "pos", "positive": "pos", "abs": "abs", "absolute": "abs",
    "lshift": "lshift", "rshift": "rshift", "bitwise_left_shift": "lshift", "bitwise_right_shift": "rshift",
    "square": "square", "reciprocal": "reciprocal", "relu": "relu", "softplus": "softplus", "silu": "silu", "gelu": "gelu",
    "to": "to", "type_as": "type_as", "float": "float", "double": "double", "half": "half", "bfloat16": "bfloat16",
    "int": "int", "long": "long", "bool": "bool", "eq": "eq", "ne": "ne", "not_equal": "ne", "lt": "lt", "less": "lt",
    "le": "le", "less_equal": "le", "gt": "gt", "greater": "gt", "ge": "ge", "greater_equal": "ge",
    "special_expit": "sigmoid", "expit": "sigmoid", "clone": "pos", "contiguous": "pos", "detach": "detach", "sign": "sign",
    "sgn": "sign", "fix": "trunc",
    **{name: name for name in ("floor", "ceil", "round", "trunc", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt",
                               "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf", "isnan", "isinf")},
}
BY_NAME = {name: op for name, op in ALIASES.items() if hasattr(torch.Tensor, name)}
NEW = ("new_ones", "new_zeros", "new_full", "new_tensor")
CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
          "int": torch.int32, "long": torch.int64, "bool": torch.bool}
DTYPES = frozenset((*CASTS.values(), torch.int8, torch.int16, torch.uint8))

MAGIC = {
    "__add__": "add", "__radd__": "radd", "__sub__": "sub", "__rsub__": "rsub", "__mul__": "mul", "__rmul__": "rmul",
    "__truediv__": "div", "__rtruediv__": "rdiv", "__floordiv__": "floordiv", "__rfloordiv__": "rfloordiv",
    "__mod__": "mod", "__rmod__": "rmod", "__pow__": "pow", "__rpow__": "rpow", "__and__": "and", "__rand__": "rand",
    "__or__": "or", "__ror__": "ror", "__xor__": "xor", "__rxor__": "rxor", "__lshift__": "lshift", "__rshift__": "rshift",
    "__rlshift__": "rlshift", "__rrshift__": "rrshift", "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le",
    "__gt__": "gt", "__ge__": "ge", "__neg__": "neg", "__pos__": "pos", "__abs__": "abs", "__invert__": "invert",
}
REVERSED = frozenset(op[1:] for name, op in MAGIC.items() if name.startswith("__r") and op[1:] in MAGIC.values())


@functools.cache
def by_function() -> dict[Any, str]:
    """The operation of each function that means one."""
    found: dict[Any, str] = {}
    for name, op in ALIASES.items():
        for module in (torch, torch.Tensor, F, torch.special, operator):
            if (function := getattr(module, name, None)) is not None:
                found[function] = op
    for name in MAGIC:
        found[getattr(torch.Tensor, name)] = MAGIC[name]
    return found


ASKS_FOR_VALUE = frozenset((torch.equal, torch.allclose, torch.is_nonzero, *(getattr(torch.Tensor, name) for name in (
    "__bool__", "item", "__int__", "__float__", "__index__", "tolist", "numpy", "__array__", "__contains__", "equal",
    "allclose", "is_nonzero"))))
IN_PLACE = frozenset(("__setitem__", "__delitem__", "__set__", *(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"))))
# What a tensor tells of itself that ``shape_of`` holds.
TELLS_SHAPE = frozenset((
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.__len__, torch.Tensor.stride,
    torch.Tensor.is_floating_point, torch.is_floating_point, torch.numel, *(getattr(torch.Tensor, name).__get__ for name in (
        "shape", "ndim", "dtype", "device", "requires_grad"))))
