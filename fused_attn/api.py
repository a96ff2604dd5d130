"""The functions people call: a call is checked once, described once, and handed to one backend."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from fused_attn import reference, torch_private, tracing
from fused_attn.call import arguments as named
from fused_attn.call import describe
from fused_attn.call.arguments import Arguments, DenseArguments, Functions
from fused_attn.call.describe import Described
from fused_attn.call.mods import RelativeBias
from fused_attn.call.values import number
from fused_attn.plan import backends
from fused_attn.plan.backends import Explanation
from fused_attn.run import autograd, by_torch, ops, plans

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _switches(deterministic: bool | None, strict: bool | None) -> tuple[bool | None, bool | None]:
    """(deterministic, strict), checked."""
    if deterministic is None and strict is None:
        return None, None
    deterministic, strict = number(deterministic), number(strict)
    for name, value in (("deterministic", deterministic), ("strict", strict)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool or None; got {value!r}")
    return deterministic, strict


def run(call: Described, return_lse: bool, backend: str | None, strict: bool | None,
        key: tuple[Any, ...] | None = None) -> tuple[torch.Tensor, Any]:
    """(out, lse or None) of a described call, on the backend that runs it; ``key`` is that of ``plans``, if there is one."""
    chosen = backends.choose(call, return_lse, backend, strict)
    if chosen == "torch":
        return by_torch.torch_attention(*call), None
    if chosen == "blocked":
        return autograd.blocked(call, with_lse=return_lse, by_seed=backend == "blocked")
    call = ops.seeded(call)
    if chosen == "triton":
        if key is not None:
            plans.keep(key, call.spec)
        return autograd.attention(*call)
    return reference.attention(*call)


@overload
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[False] = False,
              **arguments: "Unpack[DenseArguments]") -> torch.Tensor: ...
@overload
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True],
              **arguments: "Unpack[DenseArguments]") -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool,
              **arguments: "Unpack[DenseArguments]") -> Any: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    score_weight: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    score_mod: Functions = None,
    mask_mod: Functions = None,
    mod_args: tuple[Any, ...] = (),
    return_lse: bool = False,
    deterministic: bool | None = None,
    precise: bool = False,
    fp32_precision: str | None = None,
    strict: bool | None = None,
    backend: str | None = None,
    **unexpected: Any,
) -> Any:
    """Fused softmax(scale * Q K^T) V with its gradients.

    Scores are scaled, capped, passed through ``score_mod``, then ``bias`` and ALiBi are added, then masks apply. "Position"
    of query i is i + Nk - Nq: the last query stands at the last key.

    Args:
        q: queries [B, H, Nq, D]; fp16, bf16, fp32 or fp64, any strides; or a jagged nested tensor [B, H, j, D].
        k: keys [B, Hkv, Nk, D] with Hkv dividing H: query head h uses key head h // (H // Hkv).
        v: values [B, Hkv, Nk, Dv].
        causal: a query sees the keys up to its position.
        window: (left, right), inclusive: a query sees keys from its position - left to its position + right. None leaves a
            side open; ``causal`` caps right at 0.
        scale: factor of the scores; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(score / softcap). A new value compiles the kernels once.
        bias: added to the scores; any float dtype, broadcastable to [B, H, Nq, Nk]; its gradient is summed over what it
            broadcasts along. Or a ``RelativeBias``, values by k - q.
        mask: bool, True where a query attends, broadcastable to [B, H, Nq, Nk]. Tiles of scores that it empties are skipped.
        key_lengths: int [B]: how many keys of each batch entry count. The rest is never read; positions do not move.
        alibi_slopes: [H] or [B, H]: scores lose slope * |position - key|. They have a gradient.
        sinks: [H]: a logit per head that takes part in the softmax and has no value. They have a gradient.
        score_weight: [D] or [H, D]: scores become additive, see ``additive_attention``.
        dropout_p: probability that a weight becomes 0, while those that stay grow by 1 / (1 - p). Drawn from torch's
            generator, one seed a call; on a CPU, where no backend was named, torch's own mask. A new value compiles the kernels
            once.
        score_mod: a plain function (score, b, h, q_idx, kv_idx) -> score of torch operations, with FlexAttention's raw indices;
            tensors that it captures are operands, with gradients. Or a ``ScoreMod``; or a list, applied in its order.
        mask_mod: a plain function (b, h, q_idx, kv_idx) -> bool, True where a pair attends. Bounds on kv_idx - q_idx become a
            window; tiles that anything else empties are skipped. Or a ``MaskMod``; or a list, all of which must hold.
        mod_args: further arguments of the functions, tensors or numbers.
        return_lse: also return the natural-log log-sum-exp of every row of scores, [B, H, Nq], fp32 (fp64 for fp64
            inputs), differentiable; sinks are in it, dropout is not.
        deterministic: gradients equal to the bit from run to run. None follows torch.use_deterministic_algorithms, then
            FUSED_ATTN_DETERMINISTIC, else it is False. If False, dQ is summed by atomics while dK and dV are made, in five
            matrix products instead of seven, and its last bits may differ. This is so where there are tiles for it: fp16 and
            bf16, head dims up to 128 (Hopper 64, Ampere's A100 256), no softcap, bias, mask or dropout, NVIDIA and CDNA. No
            card has timed it yet.
        precise: keep the output in twice its digits for the backward, and correct it for the rounding of the weights: dQ and
            dK of fp16 and bf16 stay accurate when the mean of V is large. Dropout switches it off.
        fp32_precision: how fp32 products are computed on a GPU: "ieee", "tf32", "tf32x3" (NVIDIA), or None for torch's
            own setting. On targets without TF32, IEEE.
        strict: raise rather than run the reference, whose memory is quadratic, where no backend was named.
            None follows ``fused_attn.strict()`` and FUSED_ATTN_STRICT.
        backend: "triton", "torch", "blocked" (plain PyTorch by blocks, any device, linear memory, every derivative),
            "reference" or None to choose; ``explain`` tells what would run and why.

    Returns:
        out [B, H, Nq, Dv] in q's dtype, or (out, lse). A query that sees no key gives 0, LSE -inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    if unexpected:
        raise named.unexpected(unexpected, DenseArguments.__annotations__)
    deterministic, strict = _switches(deterministic, strict)
    if getattr(q, "is_nested", False):
        arguments = {
            "causal": causal, "window": window, "scale": scale, "softcap": softcap, "bias": bias, "mask": mask,
            "alibi_slopes": alibi_slopes, "sinks": sinks, "score_weight": score_weight, "dropout_p": dropout_p,
            "score_mod": score_mod, "mask_mod": mask_mod, "mod_args": mod_args, "precise": precise,
            "fp32_precision": fp32_precision, "deterministic": deterministic,
        }
        if key_lengths is not None:
            raise ValueError("key_lengths: expected None with nested tensors, which have lengths of their own")
        return _nested(q, k, v, return_lse, strict, backend, arguments)
    plain = (
        bias is None and mask is None and key_lengths is None and alibi_slopes is None and sinks is None
        and score_weight is None and score_mod is None and mask_mod is None and type(mod_args) is tuple and not mod_args
        and type(dropout_p) is float and dropout_p == 0 and precise is False and fp32_precision is None
    )
    key = plans.key(q, k, v, causal, window, scale, softcap, backend, deterministic) if plain else None
    if key is not None and (found := autograd.repeated(key, q, k, v)) is not None:
        return found if return_lse else found[0]
    call = describe.describe(
        q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, fp32_precision=fp32_precision, precise=precise,
        key_lengths=key_lengths, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p,
        score_mod=score_mod, mask_mod=mask_mod, mod_args=mod_args, score_weight=score_weight,
    )
    if deterministic is not None:
        call = call._replace(spec=call.spec._replace(deterministic=deterministic))
    out, lse = run(call, return_lse, backend, strict, key)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
                     cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
                     seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None,
                     return_lse: Literal[False] = False, **arguments: "Unpack[Arguments]") -> torch.Tensor: ...
@overload
def attention_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
                     cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
                     seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None,
                     return_lse: Literal[True], **arguments: "Unpack[Arguments]",
                     ) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
                     cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
                     seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None,
                     return_lse: bool, **arguments: "Unpack[Arguments]") -> Any: ...
def attention_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
                     cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
                     seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None, return_lse: bool = False,
                     deterministic: bool | None = None, strict: bool | None = None, backend: str | None = None,
                     **arguments: Any) -> Any:
    """``attention`` of sequences packed one after the other, without padding and without waiting for the device.

    Args:
        q: [Tq, H, D], k: [Tk, Hkv, D], v: [Tk, Hkv, Dv]: the tokens of all sequences.
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1]: sequence s owns the rows from its entry up to the next one. Lengths
            may be 0, and differ between queries and keys. Rows past the last entry are not read, and their results are 0.
        max_seqlen_q, max_seqlen_k: at least the longest lengths; on a GPU a longer sequence is cut there.
        seqused_q, seqused_k: int [S]: how many rows of each sequence count, beginning with its first.
        arguments: those of ``attention``, apart from ``key_lengths``; positions are per sequence (its last query stands at
            its last key), and bias, mask and the like broadcast to [S, H, max_seqlen_q, max_seqlen_k].

    Returns:
        out [Tq, H, Dv], or (out, lse [H, Tq]).
    """
    deterministic, strict = _switches(deterministic, strict)
    call = describe.describe_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
                                    **arguments)
    if deterministic is not None:
        call = call._replace(spec=call.spec._replace(deterministic=deterministic))
    out, lse = run(call, return_lse, backend, strict)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _nested(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool, strict: bool | None, backend: str | None,
            arguments: dict[str, Any]) -> Any:
    """``attention`` of jagged nested tensors [B, H, j, D], as [B, j, H, D] transposed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not (isinstance(x, torch.Tensor) and x.is_nested and x.layout == torch.jagged and x.dim() == 4):
            got = f"{x.layout} of {x.dim()} dimensions" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected a jagged nested tensor [batch, heads, j, head_dim], as q is nested; got {got}")
        if not x.transpose(1, 2).is_contiguous():
            raise ValueError(f"{name}: expected the transpose(1, 2) of a contiguous nested tensor [batch, j, heads, head_dim]")
    tokens: list[Any] = [x.transpose(1, 2) for x in (q, k, v)]
    offsets_q, offsets_k, offsets_v = (x.offsets() for x in tokens)
    if len(offsets_k) != len(offsets_q):
        raise ValueError(f"k: expected q's batch {len(offsets_q) - 1}; got {len(offsets_k) - 1}")
    # While a compiler traces there are no lengths to look at; the packed call checks that v has as many rows as k.
    if offsets_v is not offsets_k and not tracing.traced(offsets_k) and not torch.equal(offsets_v, offsets_k):
        raise ValueError(f"v: expected k's lengths, of offsets {offsets_k.tolist()}; got {offsets_v.tolist()}")
    packed = attention_varlen(
        tokens[0].values(), tokens[1].values(), tokens[2].values(), offsets_q.to(torch.int32), offsets_k.to(torch.int32),
        torch_private.longest(tokens[0]), torch_private.longest(tokens[1]), return_lse=return_lse, strict=strict,
        backend=backend, **arguments)
    out, lse = packed if return_lse else (packed, None)
    nested = torch.nested.nested_tensor_from_jagged(out, offsets_q).transpose(1, 2)
    if lse is None:
        return nested
    return nested, torch.nested.nested_tensor_from_jagged(lse.T, offsets_q).transpose(1, 2)


def additive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score_weight: torch.Tensor,
                       **arguments: Any) -> Any:
    """softmax(score) V with the additive score of alignment models, sum_d w_d tanh(q_d + k_d): ``attention(score_weight=w)``.

    Forward and backward are fused: on the kernels no tensor of Nq x Nk x D exists. The caller makes the projections: with
    decoder states s and encoder states h, q = W s, k = U h and v = h. Head dims up to 256 on the kernels.

    Args:
        q, k, v: [B, H, Nq, D], [B, Hkv, Nk, D], [B, Hkv, Nk, Dv].
        score_weight: w, [D] or [H, D], any float dtype; it has a gradient.
        arguments: those of ``attention``, masks, windows, biases, sinks and dropout included. ``scale`` is 1 by default.

    Returns:
        out [B, H, Nq, Dv] in q's dtype, or (out, lse [B, H, Nq]). For the weights: ``attention_weights(q, k, score_weight=w)``.

    Source: Bahdanau, Cho & Bengio 2014, "Neural Machine Translation by Jointly Learning to Align and Translate".
    """
    if score_weight is None:
        raise TypeError("score_weight: expected a float tensor; got None")
    return attention(q, k, v, score_weight=score_weight, **arguments)


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> Any:
    """``attention`` by the reference: plain PyTorch, exact, any device, any derivative, quadratic memory."""
    return attention(q, k, v, **{**arguments, "backend": "reference"})


_PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool = False,
            deterministic: bool | None = None, strict: bool | None = None, backend: str | None = None,
            **arguments: Any) -> Explanation:
    """Which backend ``attention`` would run for these arguments, and every reason against the others.

    With ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q`` and ``max_seqlen_k`` among them, and perhaps ``seqused_q`` and
    ``seqused_k``, the same for ``attention_varlen``. Its ``hints`` name what is likely a mistake.
    """
    deterministic, strict = _switches(deterministic, strict)
    if arguments.keys() & _PACKING:
        if missing := [name for name in _PACKING if name not in arguments]:
            raise TypeError(f"{missing[0]}: expected it beside {next(name for name in _PACKING if name in arguments)}")
        cu_q, cu_k, longest_q, longest_k = (arguments.pop(name) for name in _PACKING)
        used_q, used_k = arguments.pop("seqused_q", None), arguments.pop("seqused_k", None)
        call = describe.describe_packed(q, k, v, cu_q, cu_k, longest_q, longest_k, used_q, used_k, **arguments)
    else:
        call = describe.describe(q, k, v, **arguments)
    if deterministic is not None:
        call = call._replace(spec=call.spec._replace(deterministic=deterministic))
    return backends.explain(call, return_lse, backend, strict)
