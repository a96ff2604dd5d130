"""A compiler's liberty in the interpreter: every product that is added to something keeps all of its digits until then.

Triton's compilers contract ``a * b + c`` to one fused multiply-add, rounded once; its interpreter rounds the product first,
so what is right only where both are rounded alike looks right there. Here products of fp32 remember their exact value (fp64
holds it) until an addition or a subtraction takes them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

EXACT = "exact product"


@contextlib.contextmanager
def contracted() -> Iterator[None]:
    """Within it, launches in the interpreter contract wherever a compiler may."""
    from triton.runtime.interpreter import InterpreterBuilder

    binary_op = InterpreterBuilder.binary_op

    def contracting(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = binary_op(self, lhs, rhs, op)
        if result.data.dtype != np.float32 or lhs.data.dtype != np.float32:
            return result
        if op is np.multiply:
            result.attr[EXACT] = lhs.data.astype(np.float64) * rhs.data.astype(np.float64)
        elif op in (np.add, np.subtract) and (EXACT in lhs.attr or EXACT in rhs.attr):
            left, right = (x.attr.get(EXACT, x.data) for x in (lhs, rhs))
            if EXACT in lhs.attr and EXACT in rhs.attr:  # one of two products is rounded first
                right = rhs.data
            result.data = op(left.astype(np.float64), right.astype(np.float64)).astype(np.float32)
        return result

    with mock.patch.object(InterpreterBuilder, "binary_op", contracting):
        yield
