"""Classes of tensors with semantics of their own: what torch's causal biases stand for, and which classes kernels refuse."""

import sys
from typing import Any

import torch

from fused_attn import torch_private
from fused_attn.call.mods import Bound, RelativeBias


def is_causal_bias(x: Any) -> bool:
    """Whether ``x`` is a CausalBias of torch, which stands for ``causal=True``: two lengths and an alignment, no elements."""
    if x is None or type(x) is torch.Tensor:
        return False
    bias = sys.modules.get("torch.nn.attention.bias")  # whoever has such a bias has imported it
    return bias is not None and isinstance(x, bias.CausalBias)


def check_causal_bias(name: str, x: Any, n_queries: int, n_keys: int) -> None:
    """Refuses a causal bias whose lengths or alignment are not those of ``causal=True``."""
    if (x.seq_len_q, x.seq_len_kv) != (n_queries, n_keys):
        raise ValueError(f"{name}: expected a CausalBias of {n_queries} queries and {n_keys} keys; "
                         f"got one of {x.seq_len_q} and {x.seq_len_kv}")
    if x.variant.name != "LOWER_RIGHT" and n_queries != n_keys:
        raise ValueError(f"{name}: expected causal_lower_right, which aligns the last query with the last key as causal=True "
                         "does; got causal_upper_left, which scaled_dot_product_attention(is_causal=True) computes")


def check_layout(name: str, x: torch.Tensor) -> None:
    """Refuses tensors that are not stored by strides, such as sparse ones and those of mkldnn."""
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got one of layout {x.layout}; x.to_dense() makes it dense")


def check_classes(**arguments: Any) -> None:
    """Refuses tensors whose class redefines torch's functions by ``__torch_function__``: kernels read the storage."""
    for name, argument in arguments.items():
        if argument is None:
            continue
        values = argument.args if isinstance(argument, Bound) else argument if isinstance(argument, tuple) else (argument,)
        for x in (y.values if isinstance(y, RelativeBias) else y for y in values):
            if isinstance(x, torch.Tensor):
                check_layout(name, x)
            if isinstance(x, torch.Tensor) and type(x) is not torch.Tensor and _speaks_for_itself(type(x)):
                raise TypeError(f"{name}: expected a plain tensor; got a {type(x).__name__}, whose values may not be those it "
                                "stores; x.as_subclass(torch.Tensor) passes what it stores")


def _speaks_for_itself(kind: Any) -> bool:
    function, inherited = (getattr(f, "__func__", f) for f in (kind.__torch_function__, torch.Tensor.__torch_function__))
    own = function not in (inherited, torch_private.disabled_torch_function)
    return own and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
