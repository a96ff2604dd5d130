"""Repairs of Triton's CPU interpreter, so that what it computes is what a GPU would.

Under TRITON_INTERPRET=1 kernels run as NumPy code. Unrepaired, bfloat16 arithmetic works on raw bit patterns, casts to it
truncate instead of rounding to nearest even, truth values carry the type of what was compared, NumPy >= 2.4 breaks loops with
run-time bounds on Triton 3.6, and a Python float reaches the kernel without a type, so that ``scale: tl.float64`` cannot be
converted inside it, and one that is not declared keeps digits that a GPU rounds away. NumPy also warns of infinities and NaN
where a GPU computes on in silence (a padded row that is never stored may hold them). Two thirds of the time goes into work
whose results nobody looks at. A function that a kernel calls must see triton.language in its module, which the compiler does
not require. While a kernel runs, triton.language itself is patched, for the whole process: two launches at once would leave it
so for good.
"""

import dataclasses
import os
import threading
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

    binary_op, unary_op, cast_impl, create_fma = builder.binary_op, builder.unary_op, builder.cast_impl, builder.create_fma

    def binary_op_bf16(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not is_bf16(lhs):
            found = binary_op(self, lhs, rhs, op)
            # A comparison's result is of the type of what it compares, by which a scalar one is spread over a tile.
            return handle(found.data, tl.int1) if found.data.dtype == np.bool_ else found
        result = op(values(lhs), values(rhs))
        return handle(result, tl.int1) if result.dtype == np.bool_ else handle(fp32_to_bf16(result), tl.bfloat16)

    def unary_op_bf16(self: Any, arg: Any, op: Any) -> Any:
        if not is_bf16(arg):
            return unary_op(self, arg, op)
        return handle(fp32_to_bf16(op(values(arg))), arg.dtype.scalar)

    def fma_bf16(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_bf16(z):
            return create_fma(self, x, y, z)
        return handle(fp32_to_bf16(values(x).astype(np.float64) * values(y) + values(z)), tl.bfloat16)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(fp32_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    reduce_or_scan = interpreter.ReduceScanOpInterface
    apply = reduce_or_scan.apply

    def narrowed(x: Any) -> Any:
        dtype = tl.block_type(tl.bfloat16, x.shape) if x.type.is_block() else tl.bfloat16
        return tl.tensor(handle(fp32_to_bf16(x.handle.data), tl.bfloat16), dtype)

    def apply_bf16(self: Any, inputs: Any) -> Any:
        """Does reductions and scans in fp32, and rounds at the end."""
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        narrow = [is_bf16(x.handle) for x in inputs]
        wide = tuple(self.to_tensor(values(x.handle), tl.float32) if is_narrow else x
                     for x, is_narrow in zip(inputs, narrow, strict=True))
        return tuple(narrowed(x) if is_narrow else x for x, is_narrow in zip(apply(self, wide), narrow, strict=True))

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

    executor = interpreter.GridExecutor
    call, copy_arguments = executor.__call__, executor._init_args_hst

    class Double(float):
        """A Python float whose parameter is declared tl.float64; Triton makes fp32 of the others."""

    def mark_doubles(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = copy_arguments(self, args, kwargs)
        declared = {name for name, annotation in self.fn.__annotations__.items() if annotation in (tl.float64, "tl.float64")}

        def marked(name: str, arg: Any) -> Any:
            return Double(arg) if name in declared and isinstance(arg, float) else arg

        args = [marked(name, arg) for name, arg in zip(self.arg_names, args, strict=False)]
        return args, {name: marked(name, arg) for name, arg in kwargs.items()}

    def typed_floats(arg: Any) -> Any:
        if isinstance(arg, float):
            np_type, dtype = (np.float64, tl.float64) if isinstance(arg, Double) else (np.float32, tl.float32)
            return tl.tensor(handle(np.array([arg], dtype=np_type), dtype), dtype)
        return implicit_cvt(arg)

    one_at_a_time = threading.RLock()
    if hasattr(os, "register_at_fork"):  # a process that forks waits for the launches of its other threads, as they leave it
        os.register_at_fork(before=one_at_a_time.acquire, after_in_parent=one_at_a_time.release,
                            after_in_child=one_at_a_time.release)

    def silent_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_at_a_time, np.errstate(all="ignore"):
            return call(self, *args, **kwargs)

    patch_lang = interpreter._patch_lang
    patched: set[int] = set()

    def patch_lang_once(fn: Any) -> Any:
        """Patches triton.language once for each launch and module, where Triton does so at every call of a jit function. A
        function that names nothing of triton.language, as a mod may, needs no patch."""
        if id(fn.__globals__) in patched:
            return None  # only the launch uses the result, and it comes first
        if patched and not any(value is tl or value is tl.core for value in fn.__globals__.values()):
            return None
        first = not patched
        scope = patch_lang(fn)
        patched.add(id(fn.__globals__))  # not before: what cannot be patched is not restored either
        if first:
            restore = scope.restore

            def restore_and_forget() -> None:
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    # No checks of integer overflow, whose results only debug=True uses.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    executor.__call__, executor._init_args_hst = silent_call, mark_doubles
    builder.create_dot, builder.create_fma, builder.get_bf16 = create_dot, fma_bf16, get_bf16
    builder.binary_op, builder.unary_op, builder.cast_impl = binary_op_bf16, unary_op_bf16, cast_bf16
    reduce_or_scan.apply = apply_bf16
    interpreter._patch_lang_tensor, interpreter._implicit_cvt = patch_index, typed_floats
    interpreter._patch_lang = patch_lang_once
    builder._fused_attn_repaired = True
