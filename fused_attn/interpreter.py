"""Repairs of Triton's CPU interpreter, so that what it computes is what a GPU would.

Under TRITON_INTERPRET=1 kernels run as NumPy code. Unrepaired, bfloat16 arithmetic works on raw bit patterns, casts to it
truncate instead of rounding to nearest even, NumPy >= 2.4 breaks loops with run-time bounds on Triton 3.6, and a Python
float reaches the kernel without a type, so that ``scale: tl.float64`` cannot be converted inside it. NumPy also warns of
infinities and NaN where a GPU computes on in silence (a padded row that is never stored may hold them).
"""

from typing import Any

import numpy as np


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of ``values`` rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def repair() -> None:
    """Applies every repair to the imported Triton; a second call does nothing."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_fused_attn_repaired", False):
        return
    handle = interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def values(x: Any) -> np.ndarray:
        return bf16_to_fp32(x.data) if is_bf16(x) else x.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return handle(np.matmul(values(a), values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    binary_op, unary_op, cast_impl = builder.binary_op, builder.unary_op, builder.cast_impl

    def binary_op_bf16(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_bf16(lhs):
            return binary_op(self, lhs, rhs, op)
        result = op(values(lhs), values(rhs))
        return handle(result if result.dtype == np.bool_ else fp32_to_bf16(result), lhs.dtype.scalar)

    def unary_op_bf16(self: Any, arg: Any, op: Any) -> Any:
        if not is_bf16(arg):
            return unary_op(self, arg, op)
        return handle(fp32_to_bf16(op(values(arg))), arg.dtype.scalar)

    def cast_bf16(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast_impl(self, src, dst_type)
        if target == tl.bfloat16:
            return handle(fp32_to_bf16(src.data.astype(np.float32)), target)
        return handle(bf16_to_fp32(src.data).astype(interpreter._get_np_dtype(target)), target)

    patch_lang_tensor, implicit_cvt = interpreter._patch_lang_tensor, interpreter._implicit_cvt

    def patch_index(tensor: Any, *scope: Any) -> Any:
        result = patch_lang_tensor(tensor, *scope)
        to_int = lambda self: int(np.asarray(self.handle.data).item())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", to_int)
        else:
            tensor.__index__ = to_int
        return result

    def typed_floats(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(handle(np.array([arg], dtype=np.float64), tl.float64), tl.float64)
        return implicit_cvt(arg)

    call = interpreter.GridExecutor.__call__

    def silent_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = silent_call
    builder.create_dot = create_dot
    builder.binary_op, builder.unary_op, builder.cast_impl = binary_op_bf16, unary_op_bf16, cast_bf16
    interpreter._patch_lang_tensor, interpreter._implicit_cvt = patch_index, typed_floats
    builder._fused_attn_repaired = True
