"""What the ops cost, for torch.utils.flop_counter: matrix products over the pairs that windows and lengths keep.

Masks count as if they kept everything, and so do lengths that cannot be read, such as those of FakeTensors.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fused_attn.call.schema import BACKWARD, BACKWARD_TANGENT, FORWARD, INSPECTION, TANGENT
from fused_attn.call.spec import AttentionSpec, Longest, MaybeTensor, OtherTensors, attention_flops, kept_pairs
from fused_attn.run import ops  # noqa: F401  # which are counted

_COUNTER = "torch.utils.flop_counter"


def _pairs(q: torch.Tensor, k: torch.Tensor, others: OtherTensors, spec: AttentionSpec) -> int:
    """Pairs of a query and a key that a head keeps, in all sequences together."""
    packed = others.cu_q is not None
    batch = others.cu_q.shape[0] - 1 if packed else q.shape[0]
    longest = spec.longest or Longest(q.shape[2], k.shape[2])
    queries = _lengths(others.cu_q, others.used_q, batch, longest.queries)
    keys = _lengths(others.cu_k, others.used_k, batch, longest.keys)
    # Packed sequences align their own ends; in a dense batch positions do not move with the length.
    offsets = (spec.offset(*(pair if packed else longest)) for pair in zip(queries, keys, strict=True))
    return sum(kept_pairs(n, m, spec.window, offset) for n, m, offset in zip(queries, keys, offsets, strict=True))


def _lengths(cu: MaybeTensor, used: MaybeTensor, batch: int, longest: int) -> list[int]:
    lengths = [longest] * batch
    for limits in (None if cu is None else cu.diff(), used):
        if type(limits) is torch.Tensor and not limits.is_meta:
            lengths = [max(0, min(n, limit)) for n, limit in zip(lengths, limits.tolist(), strict=True)]
    return lengths


def _forward(*arguments: Any, **_: Any) -> int:
    (q, k, v), others, spec = FORWARD.records(arguments)
    return _of_call(q, k, v, others, spec, products_qk=1, products_v=1)


def _backward(*arguments: Any, **_: Any) -> int:
    saved, others, spec, needs = BACKWARD.records(arguments)
    return _of_call(saved.q, saved.k, saved.v, others, spec, products_qk=1 + needs.dq + needs.dk,
                    products_v=int(needs.dq or needs.dk) + needs.dv)


def _tangent(*arguments: Any, **_: Any) -> int:
    made, along, others, spec = TANGENT.records(arguments)
    q_t, k_t, v_t = (int(x is not None) for x in along[:3])
    return _of_call(made.q, made.k, made.v, others, spec, products_qk=1 + q_t + k_t, products_v=1 + v_t)


def _backward_tangent(*arguments: Any, **_: Any) -> int:
    saved, moved, along, others, spec, needs = BACKWARD_TANGENT.records(arguments)
    q_t, k_t, v_t, dout_t = (int(x is not None) for x in (*along[:3], moved.dout_t))
    products_qk = 1 + q_t + k_t + needs.dq * (1 + k_t) + needs.dk * (1 + q_t)
    products_v = 1 + dout_t + v_t + needs.dv * (1 + dout_t)
    return _of_call(saved.q, saved.k, saved.v, others, spec, products_qk=products_qk, products_v=products_v)


def _of_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, others: OtherTensors, spec: AttentionSpec, *, products_qk: int,
             products_v: int) -> int:
    return attention_flops(1, q.shape[1], _pairs(q, k, others, spec), q.shape[3], v.shape[3], products_qk=products_qk,
                           products_v=products_v)


def _inspection(*arguments: Any, **_: Any) -> int:
    """FLOPs of statistics and of weights: both multiply Q and K twice, for the LSE and for the result."""
    (q, k), others, spec = INSPECTION.records(arguments)
    return attention_flops(1, q.shape[1], _pairs(q, k, others, spec), q.shape[3], 0, products_qk=2, products_v=0)


def _register(counter: ModuleType) -> None:
    formulas = {"forward": _forward, "backward": _backward, "tangent": _tangent, "backward_tangent": _backward_tangent,
                "statistics": _inspection, "weights": _inspection}
    for name, formula in formulas.items():
        counter.register_flop_formula(getattr(torch.ops.fused_attn, name), get_raw=True)(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the formulas with the counter as soon as it is imported.

    A counter reads the registry when it is made, so the formulas must be there before. Importing it here would import Triton:
    half a second that ``import fused_attn`` need not take.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)  # until it is imported: others may only ask whether it could be
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _Finder())
