"""Every private name of torch that the package uses, each with what replaces it in a torch that no longer has it.

The replacement is public and slower, or gives the careful answer: that a transform, mode or profiler is there.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_F = TypeVar("_F", bound=Callable[..., Any])
_R = TypeVar("_R")
_ALLOCATING = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty")


def _private(path: str, instead: Any) -> Any:
    """What stands at ``torch.<path>``, or ``instead``."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return instead if found is None else found


# torch's own function, whatever stands in torch.nn.functional when it is called, or has stood there since before this import.
sdpa: Callable[..., torch.Tensor] = _private("_C._nn.scaled_dot_product_attention", F.scaled_dot_product_attention)
# torch's fused CPU kernel, (q, k, v, attn_mask=, scale=) -> (out, lse [B, H, Nq]), and its backward; heads must be alike.
flash_cpu: Callable[..., Any] | None = _private("ops.aten._scaled_dot_product_flash_attention_for_cpu", None)
flash_cpu_backward: Callable[..., Any] | None = _private("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", None)
# Raises where a condition fails, and tells a compiler that it holds for a size that the compiler does not know yet.
check: Callable[..., None] = _private("_check", lambda condition, message: None)
# (query, key, value, key_padding_mask, attn_mask, num_heads) -> whether there is a batch; raises torch's own errors.
mha_shape_check: Callable[..., bool] = _private("nn.functional._mha_shape_check", lambda query, *_: query.dim() == 3)

# What watches a call: the number of dispatch modes; a transform of torch.func; a profiler.
dispatch_modes: Callable[[], int] = _private("_C._len_torch_dispatch_stack", lambda: 1)
transforms_active: Callable[[], bool] = _private("_C._are_functorch_transforms_active", lambda: True)
profiler_enabled: Callable[[], bool] = _private("_C._autograd._profiler_enabled", lambda: True)
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]  # public, and not exported

# The __torch_function__ of a subclass that wants torch's functions to see it as a plain tensor.
disabled_torch_function: Any = _private("_C._disabled_torch_function_impl", None)
# The set of dispatch keys of a tensor, by name: nothing else shows the older vmap, that of is_grads_batched.
_dispatch_keys: Callable[[torch.Tensor], Any] | None = _private("_C._dispatch_keys", None)
# Whether autograd made a tensor of zeros without storing them.
is_zero: Callable[[torch.Tensor], bool] = _private("Tensor._is_zerotensor", lambda x: False)
# Keeps the device busy for that many cycles, so that what is timed waits for nothing but its turn.
cuda_sleep: Callable[[int], None] = _private("cuda._sleep", lambda cycles: None)
# A context below autograd, in which an op that answers for autograd calls its own implementation.
below_autograd: Callable[[], Any] | None = _private("_C._AutoDispatchBelowAutograd", None)
# The modes of torch.overrides in this thread, outermost first; none where torch does not say.
_function_modes: Callable[[], list[Any]] = _private("overrides._get_current_function_mode_stack", list)
# What torch.compile keeps of the present trace; where torch does not say, all traces of the process count as one.
current_trace: Callable[[], Any] = _private("_guards.TracingContext.try_get", lambda: torch)


# What of torch's dispatch is left out and put in, in this thread, and a context that sets both.
_excluded_keys: Callable[[], Any] = _private("_C._dispatch_tls_local_exclude_set", None)
_included_keys: Callable[[], Any] = _private("_C._dispatch_tls_local_include_set", None)
_force_keys: Callable[[Any, Any], Any] | None = _private("_C._ForceDispatchKeyGuard", None)

_DispatchMode: Any = _private("utils._python_dispatch.TorchDispatchMode", None)


def observed(function: Callable[[], _R]) -> tuple[_R, bool]:
    """(the result of ``function``, whether torch did more in it than to allocate and to view); True where nobody can tell."""
    if _DispatchMode is None:
        return function(), True
    computed = []

    class Observer(_DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            made = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            views = func.is_view and all(any(own is x for x in given) for own in made)  # in inference mode some copy after all
            if not views and func.__name__.partition(".")[0] not in _ALLOCATING:
                computed.append(func)
            return result

    with Observer():
        return function(), bool(computed)


def recording() -> contextlib.AbstractContextManager[Any]:
    """A context in which autograd records, also within an op, below autograd. Raises where torch has no way back up."""
    recorder = contextlib.ExitStack()
    recorder.enter_context(torch.enable_grad())
    if not (torch.zeros((), requires_grad=True) * 1).requires_grad:
        if _force_keys is None:
            raise RuntimeError("fused_attn: this torch cannot differentiate score functions within an op; call them without "
                               "torch.compile")
        excluded = _excluded_keys()
        for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
            if hasattr(torch._C.DispatchKey, key):
                excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
        recorder.enter_context(_force_keys(_included_keys(), excluded))
    return recorder


def forward_mode() -> bool:
    """Whether forward AD is on."""
    level: int = getattr(forward_ad, "_current_level", 0)
    return level >= 0


def is_batched(x: torch.Tensor) -> bool:
    """Whether x is a batch of gradients that ``is_grads_batched`` made."""
    return _dispatch_keys is not None and bool(_dispatch_keys(x).has("Batched"))


# Take the dimension off that the older vmap of a level has put on tensors, to the front, and put it on.
_remove_batch: Callable[..., torch.Tensor] | None = _private("_remove_batch_dim", None)
_add_batch: Callable[..., torch.Tensor] | None = _private("_add_batch_dim", None)
_enter_vmap: Callable[[], int] | None = _private("_C._vmapmode_increment_nesting", None)
_leave_vmap: Callable[[], int] | None = _private("_C._vmapmode_decrement_nesting", None)


def unbatched(x: torch.Tensor) -> torch.Tensor:
    """A batch that ``is_grads_batched`` made, as a tensor with one more dimension in front; raises where torch shows none."""
    if _remove_batch is None or _add_batch is None or _enter_vmap is None or _leave_vmap is None:
        raise NotImplementedError("fused_attn: this torch does not show batched gradients; torch.func.vmap works")
    return _remove_batch(x, _level(), 0, 0)


def batched(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of ``unbatched``, for a batch that lies in ``dim``."""
    assert _add_batch is not None
    return _add_batch(x, dim, _level())


def _level() -> int:
    """Of the innermost of the older vmaps."""
    assert _enter_vmap is not None
    assert _leave_vmap is not None
    _enter_vmap()
    return _leave_vmap()


# Whether a transform of torch.func has wrapped a tensor.
_is_wrapped: Callable[[torch.Tensor], bool] = _private("_C._functorch.is_functorch_wrapped_tensor", lambda x: True)


def is_transformed(x: torch.Tensor) -> bool:
    """Whether x belongs to a transform of torch.func, or carries a tangent."""
    return (transforms_active() and _is_wrapped(x)) or (forward_mode() and forward_ad.unpack_dual(x).tangent is not None)


def is_fake(x: Any) -> bool:
    """Whether x is a tracer's stand-in for a tensor, as FakeTensorMode and torch.export make them: it has no values."""
    traced = sys.modules.get("torch._subclasses.fake_tensor")  # whoever has one has imported it
    return traced is not None and isinstance(x, traced.FakeTensor)


def longest(jagged: Any) -> int:
    """The longest sequence of a jagged nested tensor, without asking the device where torch knows it."""
    known_to_torch = getattr(jagged, "_get_max_seqlen", None)
    length: int = jagged.offsets().diff().max().item() if known_to_torch is None else known_to_torch()
    return length


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds; False for a compiler, where a size comes from the device and has no value yet."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    try:
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # here, since it imports SymPy
    except ImportError:
        return bool(condition)
    return bool(guard_or_false(condition))


def surely(condition: Any) -> bool:
    """Whether a comparison of sizes holds whatever they are; of plain sizes, whether it holds. Nothing is guarded on."""
    if not torch.compiler.is_compiling() and not isinstance(condition, torch.SymBool):
        return bool(condition)
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # here, since it imports SymPy
    except ImportError:
        return bool(condition)
    return bool(statically_known_true(condition))


def equal(size: Any, full: Any, otherwise: str) -> bool:
    """Whether two sizes are equal. A compiler does not know it for a size that comes from the device: then the compiled program
    checks it, and raises with ``otherwise``."""
    if known(size == full):
        return True
    if known(size != full):
        return False
    check(size == full, lambda: otherwise)
    return True


def drop_function_modes(is_over: Callable[[TorchFunctionMode], bool]) -> None:
    """Takes the modes for which ``is_over`` holds off this thread's stack, wherever they are in it."""
    modes = _function_modes()
    if any(map(is_over, modes)):
        for mode in reversed(modes):
            TorchFunctionMode.__exit__(mode, None, None, None)  # the base class's: those above stay entered
        for mode in modes:
            if not is_over(mode):
                TorchFunctionMode.__enter__(mode)


def constant_when_traced(function: _F) -> _F:
    """Makes torch.compile call ``function`` while tracing and keep the result, as ``torch.compiler.assume_constant_result``
    does; that one imports torch._dynamo and, through it, Triton: over a second that ``import fused_attn`` need not take."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def keep_buffers_of_graphs() -> None:
    """Lets a compiled backward run more than once on one graph: otherwise torch may have it overwrite what it saved."""
    config = _compiler_config()
    if config is not None:
        config.donated_buffer = False


@constant_when_traced
def activation_memory_budget() -> float:
    """What part of a graph's activations a compiler may save for the backward, 1 for all."""
    return float(getattr(_compiler_config(), "activation_memory_budget", 1))


def _compiler_config() -> Any:
    try:
        from torch._functorch import config  # imported here, since it belongs to the compiler
    except ImportError:
        return None
    return config
