"""Generation token by token: sampling, and the loop that feeds a decoder its own output."""

import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fused_attn.nn.masks import readable
from fused_attn.nn.restorable import all_or_nothing

Step = Callable[..., torch.Tensor]


def sample(logits: torch.Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """One token for each row of logits [B, V]: int64 [B].

    Args:
        temperature: divides the logits; 0 takes the largest one (greedy).
        top_k: only the k most likely tokens, and those as likely as the k-th.
        top_p: only the fewest tokens that have this much probability together (nucleus), after ``top_k``; at least one.
        generator: of the draw, on the logits' device; torch's own by default.

    Source of the nucleus: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".
    """
    _check_drawing(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = _tempered(logits if logits.dtype == torch.float64 else logits.float(), temperature)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # what more likely tokens hold together
        past = before >= top_p
        past[..., 0] = False  # the most likely token stays, however top_p is rounded
        dropped = torch.zeros_like(past).scatter(-1, order, past)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)


def _check_drawing(temperature: Any, top_k: Any, top_p: Any, **_: Any) -> None:
    if not _real(temperature) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number from 0 on; got {temperature!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1):
        raise ValueError(f"top_k: expected a positive int or None; got {top_k!r}")
    if top_p is not None and (not _real(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number above 0 and at most 1, or None; got {top_p!r}")


def _real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """(logits - their maximum) / temperature, for any temperature that a Python number can be.

    The largest logits are 0, and those of -inf stay -inf, even where 1 / temperature is inf or 0 in their dtype. It subtracts
    halves, so that the difference of any two numbers of this dtype is one of them.
    """
    below = logits / 2 - logits.amax(-1, keepdim=True) / 2
    scaled = below * (2 / temperature)
    return scaled.masked_fill(below == 0, 0.0).masked_fill(below == float("-inf"), float("-inf"))


def stream(model: Step, prompt: torch.Tensor, max_new_tokens: int, *, lengths: torch.Tensor | None = None, cache: Any = None,
           temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, eos: int | None = None,
           generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
    """Yields the next token of every sequence, int64 [B], as soon as it is drawn.

    Args:
        model: called as ``model(tokens, cache=cache, padding=padding)`` with the new tokens [B, n] alone; gives their logits
            [B, n, V]. ``padding`` is None, or bool [B, n], True on the right of shorter prompts: hand it to the layers as
            ``src_key_padding_mask`` or ``tgt_key_padding_mask``.
        prompt: int [B, P], at least one token each.
        max_new_tokens: how many to draw.
        lengths: int [B]: tokens of each prompt, where they differ; what follows them is padding.
        cache: the cache of ``model``; ``model.new_cache()`` by default. It is left filled for another round, with all tokens
            but the one drawn last, with which the next prompt begins.
        eos: a token that ends a sequence, which repeats it from then on; generation stops where all have ended.
        temperature, top_k, top_p, generator: as in ``sample``.
    """
    if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or 0 in prompt.shape:
        raise ValueError("prompt: expected tokens [batch, at least 1]; got "
                         + (f"shape {tuple(prompt.shape)}" if isinstance(prompt, torch.Tensor) else repr(prompt)))
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected a non-negative int; got {max_new_tokens!r}")
    if eos is not None and (isinstance(eos, bool) or not isinstance(eos, numbers.Integral)):
        raise TypeError(f"eos: expected an int or None; got {eos!r}")
    if lengths is not None and (not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64)):
        raise TypeError(f"lengths: expected int32 or int64 [{prompt.shape[0]}]; got {getattr(lengths, 'dtype', lengths)!r}")
    if lengths is not None and lengths.shape != prompt.shape[:1]:
        raise ValueError(f"lengths: expected shape ({prompt.shape[0]},); got {tuple(lengths.shape)}")
    if lengths is not None and readable(lengths) and not bool(((lengths > 0) & (lengths <= prompt.shape[1])).all()):
        raise ValueError(f"lengths: expected 1 to {prompt.shape[1]}; got {lengths.tolist()}")
    if cache is None:
        new_cache = getattr(model, "new_cache", None)
        if new_cache is None:
            raise TypeError("cache: expected one, as the model has no new_cache()")
        cache = new_cache()
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    _check_drawing(**drawing)
    return _stream(model, prompt, max_new_tokens, lengths, cache, eos, drawing)


def _stream(model: Step, tokens: torch.Tensor, count: int, lengths: torch.Tensor | None, cache: Any, eos: int | None,
            drawing: dict[str, Any]) -> Iterator[torch.Tensor]:
    padding = last = None
    if lengths is not None:
        padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        last = (lengths - 1).clamp(min=0)
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(count):
        # Not around the yield, since the caller's code runs in between.
        with torch.no_grad(), all_or_nothing(cache):
            logits = model(tokens, cache=cache, padding=padding)
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            drawn = sample(logits[:, -1] if last is None else logits[rows, last], **drawing)
            if eos is not None:
                drawn = torch.where(ended, eos, drawn)
                ended = ended | (drawn == eos)
        yield drawn
        if eos is not None and bool(ended.all()):
            return
        tokens, padding, last = drawn[:, None], None, None


def generate(model: Step, prompt: torch.Tensor, max_new_tokens: int, **arguments: Any) -> torch.Tensor:
    """The new tokens, int64 [B, at most ``max_new_tokens``]; arguments as in ``stream``."""
    drawn = list(stream(model, prompt, max_new_tokens, **arguments))
    return torch.stack(drawn, 1) if drawn else prompt.new_empty(prompt.shape[0], 0, dtype=torch.int64)
