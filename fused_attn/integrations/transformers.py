"""Hugging Face transformers: ``attn_implementation="fused_attn"`` for every family that goes through its interface.

    from fused_attn.integrations import transformers as fused
    fused.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fused_attn")

Grouped heads are not repeated; sliding windows, softcaps, sinks and T5's position bias run in the kernels, with their
gradients; plain causal, sliding and padded batches need no mask of N x N. docs/integrations.md names the families that were
compared with the eager implementation; one that does not go through the interface is refused when a model of it is made.

As in eager code, the mask alone says which pairs attend, and its shape says how. None means all pairs. [B, Nk] marks the keys
that count in causal attention, and [B, Nk, 1, 1, w] the same with a window of w keys, its last, expanded extent (five
dimensions, which no mask of a caller has). [B, 1 or H, Nq or 1, Nk] says everything by itself.
What a layer says of its causality or window is not used, since not every layer says it correctly.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from fused_attn.api import attention, attention_varlen
from fused_attn.call.mods import BIAS
from fused_attn.inspection import attention_and_weights
from fused_attn.integrations.model_code import attends_on_its_own

try:
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        eager_mask,
        packed_sequence_mask_function,
        prepare_padding_mask,
        sdpa_mask,
        sliding_window_overlay,
    )
except ImportError as error:
    raise ImportError(f"transformers: expected 5.4 or later; got {transformers.__version__}") from error

NAME = "fused_attn"
OLDEST, UNTESTED = (5, 4), (5, 25)  # versions: the first that the plug works with, and the first that its tests have not seen
_AND = and_masks().__code__
_SLIDING = sliding_window_overlay(1).__code__
_PACKED = packed_sequence_mask_function(torch.empty(0)).__code__
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # packed sequences count from 0 since 5.23
_REMAPPED: Any = None if _remap is None else _remap(causal_mask_function, torch.empty(0)).__code__
_names: dict[str, None] = {}  # what is registered, in order


def register(name: str = NAME) -> None:
    """Makes ``attn_implementation=name`` known to transformers, for ``from_pretrained``, ``from_config`` and
    ``model.set_attn_implementation``.

    A model whose attention does not go through transformers' interface, or a paged variant (``"paged|" + name``, continuous
    batching), raises ValueError when it is made. ``unregister`` undoes it.

    Raises:
        ValueError: for a name that transformers reads as something else, or that others have registered.
        ImportError: for a transformers that is too old; one newer than the tests have seen gives a RuntimeWarning.
    """
    _check_version(transformers.__version__)
    _check_name(name)
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)  # without it transformers would pass no mask at all, silently
    _names[name] = None
    for method, (theirs, ours) in _CHECKS.items():
        if getattr(PreTrainedModel, method) is theirs:
            setattr(PreTrainedModel, method, ours)


def unregister(name: str = NAME) -> None:
    """Undoes ``register``. Models that run under the name must be given another implementation first. What others have put
    under the name since stays.

    Raises:
        KeyError: for a name that ``register`` was not called with.
    """
    if name not in _names:
        raise KeyError(f"name: expected one that is registered ({', '.join(_names) or 'none is'}); got {name!r}")
    for interface, ours in ((AttentionInterface, attention_forward), (AttentionMaskInterface, attention_mask)):
        if interface._global_mapping.get(name) is ours:
            del interface._global_mapping[name]
    del _names[name]
    if not _names:
        for method, (theirs, ours) in _CHECKS.items():
            if getattr(PreTrainedModel, method) is ours:  # unless others have put theirs around it
                setattr(PreTrainedModel, method, theirs)


def _check_version(version: str) -> None:
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST:
        raise ImportError(f"transformers: expected {OLDEST[0]}.{OLDEST[1]} or later; got {version}")
    if found >= UNTESTED:
        warnings.warn(f"fused_attn was tested with transformers up to {UNTESTED[0]}.{UNTESTED[1] - 1}; this is {version}",
                      RuntimeWarning, stacklevel=3)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a name; got {name!r}")
    read = [part for part in ("flash", "sdpa", "flex_attention", "/", "|", ":", "@") if part in name.lower()]
    why = None
    if read:
        why = f"{read[0]!r} in it means something else to transformers"
    elif name.lower() in ("eager", "paged", "default", "auto", "none"):
        why = "it means something else to transformers"
    elif not re.fullmatch(r"[\w.-]+", name):
        why = "a name is letters, digits, '_', '-' and '.'"
    elif (ALL_ATTENTION_FUNCTIONS.get(name, attention_forward) is not attention_forward
          or ALL_MASK_ATTENTION_FUNCTIONS.get(name, attention_mask) is not attention_mask):
        why = "it is taken"
    if why:
        raise ValueError(f"name: expected one of your own, such as {NAME!r}; got {name!r}: {why}")


def _refuse_paged(self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
    """Runs before a model is made: transformers takes ``paged|`` off a name, and would run the rest without its pages."""
    if isinstance(attn_implementation, str) and attn_implementation.removeprefix("paged|") in _names.keys() - {
            attn_implementation}:
        raise ValueError(f"attn_implementation: expected no paged variant of {attn_implementation[6:]!r}, which does not read "
                         f"paged caches; got {attn_implementation!r}")
    result: str = _CHECKS["_check_and_adjust_attn_implementation"][0](self, attn_implementation, *args, **kwargs)
    return result


def _refuse_family(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
    """Runs before a model is made, or given another implementation."""
    if requested_attention in _names and (reason := _against(type(self))):
        raise ValueError(f"attn_implementation: expected one that {type(self).__name__} can use, such as 'eager'; got "
                         f"{requested_attention!r}, but it {reason}")
    result: str = _CHECKS["get_correct_attn_implementation"][0](self, requested_attention, *args, **kwargs)
    return result


_CHECKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # methods of PreTrainedModel: theirs, and ours around it
    "_check_and_adjust_attn_implementation": (PreTrainedModel._check_and_adjust_attn_implementation, _refuse_paged),
    "get_correct_attn_implementation": (PreTrainedModel.get_correct_attn_implementation, _refuse_family),
}


def _against(model: type[PreTrainedModel]) -> str | None:
    """Why a model cannot run here, None if it can."""
    names = vars(sys.modules[model.__module__]) if model.__module__ in sys.modules else {}
    tables = [x for x in names.values() if isinstance(x, dict) and isinstance(x.get("eager"), type)]
    if tables or not model._can_set_attn_implementation() or attends_on_its_own(model):
        return "computes attention in code of its own, past transformers' interface"
    eager = [x for name, x in names.items() if name.endswith("eager_attention_forward") and inspect.isfunction(x)]
    named = [(name, parameter) for x in eager for name, parameter in [*inspect.signature(x).parameters.items()][5:]]
    unknown = {name for name, parameter in named if parameter.kind is not inspect.Parameter.VAR_KEYWORD} - _KNOWN
    return f"gives attention {', '.join(sorted(unknown))}, which is not known here" if unknown else None


_MASKS: dict[type, tuple[str, str | None]] = {}
_SLICED = re.compile(r"mask.*\[:, :, [^\]]*, ?:|\[:, :, [^\]]*, ?:.*mask")  # all four dimensions of a mask, in a family's code


def _masks_of(config: Any) -> str:
    """Which masks the models of a config take: "opaque" ones only pass them on, as flash attention's have no single shape;
    "sdpa" ones expect what torch's function takes, bool [B, 1, Nq, Nk]; "eager" ones want additive masks.

    Raises ValueError where none of the models can run here: the name was put into a config past the checks of ``_CHECKS``.
    """
    kind = type(config)
    if kind not in _MASKS:
        _MASKS[kind] = _look(kind)
    masks, reason = _MASKS[kind]
    if reason:
        raise ValueError(f"attn_implementation: expected one that models of a {kind.__name__} can use, such as 'eager'; got "
                         f"{config._attn_implementation!r}, but each {reason}")
    return masks


def _look(config: type) -> tuple[str, str | None]:
    module = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    found = () if module is None else tuple(vars(module).values())
    models = [x for x in found if isinstance(x, type) and issubclass(x, PreTrainedModel) and x is not PreTrainedModel]
    models = [x for x in models if x.config_class is config] or models
    reasons = [_against(x) for x in models]
    reason = reasons[0] if reasons and all(reasons) else None
    if all(x._supports_flash_attn for x in models):
        return "sdpa" if module is not None and _SLICED.search(inspect.getsource(module)) else "opaque", reason
    return "sdpa" if all(x._supports_sdpa for x in models) else "eager", reason


def attention_mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
                   mask_function: Callable[..., Any] = causal_mask_function, attention_mask: torch.Tensor | None = None,
                   local_size: int | None = None, allow_is_causal_skip: bool = True,
                   allow_is_bidirectional_skip: bool = False, **more: Any) -> torch.Tensor | None:
    """The mask that tells ``attention_forward`` which pairs attend, in as little memory as possible.

    None where all pairs attend. For causal attention bool [B, Nk], True for keys that count, with a stride of 0 along them
    where they all do; the same expanded to [B, Nk, 1, 1, window] under a sliding window that is shorter than the keys.
    Bool [B, 1, 1, Nk] for padding in bidirectional attention. Bool [B, 1, Nq, Nk] for every other pattern, for static caches,
    of which only a part counts, and for models that ask for a mask to look at. Families that work on their masks get those
    that transformers makes for its own SDPA, or for eager code where it refuses SDPA. Raises ValueError for a mask given in
    another form.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        _check_form(attention_mask)
    kind = "opaque" if more.get("config") is None else _masks_of(more["config"])
    if kind != "opaque":
        make = eager_mask if kind == "eager" else sdpa_mask
        mask: torch.Tensor | None = make(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size=local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **more)
        return mask
    if mask_function is bidirectional_mask_function:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            padding = padding[:, kv_offset : kv_offset + kv_length]
            if not allow_is_bidirectional_skip or is_tracing(padding) or not bool(padding.all()):
                rows = q_length if not allow_is_bidirectional_skip else 1
                return padding[:, None, None, :].expand(-1, 1, rows, -1)
        if allow_is_bidirectional_skip:
            return None
        device = more.get("device", "cpu") if padding is None else padding.device
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(batch_size, 1, q_length, kv_length)
    if attention_mask is not None and attention_mask.dim() == 5:  # made ahead, in generation, and now come back
        return attention_mask
    window = _window(mask_function, local_size)
    at_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if window is None or not at_end or not allow_is_causal_skip:
        mask = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **more)
        packed = _packed_window(mask_function, local_size)
        if packed is not None and mask is not None and not torch.compiler.is_compiling():
            mask.fused_attn_packed = packed  # type: ignore[attr-defined]  # its sequences may be given by their ends as well
        return mask
    keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, kv_offset : kv_offset + kv_length].clone(memory_format=torch.contiguous_format)  # so that no stride is 0
        # One look at the values for the whole model, which transformers' own masks take as well, saves every layer the mask.
        if not is_tracing(keys) and bool(keys.all()):
            keys = None
    if keys is None:
        keys = torch.ones(1, 1, dtype=torch.bool, device=more.get("device", "cpu")).expand(batch_size, kv_length)
    if not window or window >= kv_length:  # every key is within reach
        return keys
    return keys[:, :, None, None, None].expand(-1, -1, -1, -1, window)


def _parts(mask_function: Callable[..., Any]) -> tuple[Any, ...]:
    """The functions that ``and_masks`` joined; transformers builds its patterns of closures."""
    if getattr(mask_function, "__code__", None) is not _AND:
        return ()
    try:
        found = mask_function.__closure__[0].cell_contents  # type: ignore[index]
    except (AttributeError, TypeError, ValueError):  # torch.compile keeps the cells of functions made while tracing to itself
        return ()
    return found if isinstance(found, tuple) else ()


def _window(mask_function: Callable[..., Any], local_size: int | None) -> int | None:
    """0 for plain causality, the width of a plain sliding window, None for any other pattern."""
    if mask_function is causal_mask_function:
        return 0
    parts = _parts(mask_function) if local_size is not None else ()
    if len(parts) != 2 or parts[1] is not causal_mask_function or getattr(parts[0], "__code__", None) is not _SLIDING:
        return None
    return local_size if parts[0].__closure__[0].cell_contents == local_size else None


def _packed_window(mask_function: Callable[..., Any], local_size: int | None) -> int | None:
    """``_window`` of the pattern inside each sequence of a packed batch, None where the batch is not packed."""
    parts = _parts(mask_function)
    inner = [part for part in parts if getattr(part, "__code__", None) is not _PACKED]
    if len(parts) != 2 or len(inner) != 1:
        return None
    if _REMAPPED is not None and inner[0].__code__ is _REMAPPED:
        inner = [dict(zip(_REMAPPED.co_freevars, inner[0].__closure__, strict=True))["mask_function"].cell_contents]
    return _window(inner[0], local_size)


def attention_forward(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                      softcap: float | None = None, s_aux: torch.Tensor | None = None,
                      position_bias: torch.Tensor | None = None, **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of a layer, as transformers calls it.

    query [B, H, Nq, D], key and value [B, Hkv, Nk, D] and Dv; masks as ``attention_mask`` above gives them, or an additive
    float one. Returns ([B, Nq, H, Dv], weights [B, H, Nq, Nk] if ``output_attentions``, else None).

    Raises ValueError for a mask in another form, and for a module whose config names an implementation that transformers makes
    no masks for.
    """
    _check_called_name(module)
    if attention_mask is not None:
        _check_form(attention_mask)
    if query.shape[0] != key.shape[0]:  # learned queries, one set for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    arguments: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout,
                                 "bias": position_bias}
    if more.get("cu_seq_lens_q") is not None and query.shape[0] == 1 and not more.get("output_attentions"):
        window, whole = _within_sequences(attention_mask)
        if whole:
            return _by_ends(query, key, value, {**arguments, "window": window}, more), None
    if attention_mask is not None and attention_mask.dim() != 4:
        arguments["window"], keys = _reach(attention_mask)
        attention_mask = None if keys.stride(1) == 0 else keys[:, None, None, :]
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        arguments["bias" if position_bias is None else "score_mod"] = (
            attention_mask if position_bias is None else BIAS(attention_mask))
    elif attention_mask is not None:
        arguments["mask"] = attention_mask
    if more.get("indices") is not None:  # the keys that a model chose for each query, [B, Nq, chosen]
        chosen = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        chosen = chosen.scatter(-1, more["indices"][:, None].long(), True)
        arguments["mask"] = chosen & arguments["mask"] if "mask" in arguments else chosen
    if more.get("output_attentions"):
        out, weights = attention_and_weights(query, key, value, **arguments)
        return out.transpose(1, 2).contiguous(), weights
    return attention(query, key, value, **arguments).transpose(1, 2).contiguous(), None


_KNOWN = {*inspect.signature(attention_forward).parameters, "is_causal", "sliding_window"}  # the mask says the last two


def _check_called_name(module: torch.nn.Module) -> None:
    """Checks the name in a module's config: it may have been put there past ``_CHECKS``, or have lost its masks since."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name is not None and name not in AttentionMaskInterface._global_mapping:
        paged = ", and paged caches are not read here" if name.startswith("paged|") else ""
        raise ValueError(f"attn_implementation: expected a name that register() was called with, such as {NAME!r}; got "
                         f"{name!r}: transformers makes no masks for it{paged}")


def _check_form(mask: torch.Tensor) -> None:
    ours = mask.dtype == torch.bool and (mask.dim() == 2 or (mask.dim() == 5 and mask.shape[2:4] == (1, 1)))
    if mask.dim() != 4 and not ours:
        raise ValueError(f"attention_mask: expected [batch, keys], 1 for those that count, or bool or additive [batch, 1 or "
                         f"heads, queries, keys]; got {str(mask.dtype)[6:]} {list(mask.shape)}")


def _reach(mask: torch.Tensor) -> tuple[tuple[int | None, int], torch.Tensor]:
    """The window that a causal mask gives by its shape, and the keys that count in it, [B, Nk]."""
    return ((mask.shape[4] - 1, 0), mask[:, :, 0, 0, 0]) if mask.dim() == 5 else ((None, 0), mask)


def _within_sequences(mask: torch.Tensor | None) -> tuple[tuple[int | None, int] | None, bool]:
    """The window inside each sequence of a packed batch, and whether the mask says no more than it and the sequences' ends."""
    if mask is None:
        return None, True
    if mask.dim() != 4:
        window, keys = _reach(mask)
        return window, keys.stride(1) == 0
    packed = getattr(mask, "fused_attn_packed", None)
    return (packed - 1 if packed else None, 0), packed is not None


def _by_ends(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any],
             more: dict[str, Any]) -> torch.Tensor:
    """Sequences one after the other in a batch of one, whose ends the caller gave (``DataCollatorWithFlattening``)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = [int(more[f"max_length_{side}"]) if more.get(f"max_length_{side}") is not None
               else int(more[f"cu_seq_lens_{side}"].diff().max()) for side in "qk"]
    out = attention_varlen(q, k, v, more["cu_seq_lens_q"], more["cu_seq_lens_k"], *longest, **arguments)
    result: torch.Tensor = out[None]
    return result
