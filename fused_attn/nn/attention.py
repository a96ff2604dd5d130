"""torch.nn.MultiheadAttention on fused attention, and what came after the paper: grouped heads, windows, rotations, sinks."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import inspection, torch_private
from fused_attn.api import attention
from fused_attn.nn.cache import KVCache, MemoryCache
from fused_attn.nn.jagged import attend_jagged, jagged_positions
from fused_attn.nn.masks import causal_bias, check_new_padding, mask_arguments
from fused_attn.nn.options import Options, check_options
from fused_attn.nn.positions import PositionEmbeddings, RotaryEmbedding, alibi_slopes
from fused_attn.nn.restorable import all_or_nothing
from fused_attn.rotary import apply_rotary


class Heads(NamedTuple):
    """A call after its projections: q [B, H, L, D], k and v [B, Hkv, S, D], and its other arguments for ``attention``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    arguments: dict[str, Any]


def stay_in_python(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: torch's layers do not bypass a module that has one by their C++ path."""


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, argument for argument and key for key, on fused attention.

    Checkpoints load both ways, the same seed draws the same weights, and outputs, weights and gradients are torch's in
    training and evaluation, for masks of both kinds, padding, ``add_bias_kv`` and ``add_zero_attn``. It differs where torch's
    answer is NaN: a query that may attend to nothing gives 0, with weights 0. Ask ``need_weights=False`` where weights are
    not wanted: they cost L x S memory, here as in torch.

    No fast C++ path bypasses it, and no mask is read to find out whether it is causal: pass ``is_causal=True``
    beside the mask, or ``torch.nn.attention.bias.causal_upper_left`` in its place, or construct with ``causal=True``.

    Args:
        embed_dim ... dtype: as in torch.
        num_kv_heads: heads of keys and values, each for a group of query heads; a divisor of ``num_heads``, by default all
            of them. The projections of keys and values shrink accordingly.
        causal: every call is causal, without a mask.
        window: (left, right), as in ``attention``: how many positions around its own a query sees.
        softcap: cap of ``softcap * tanh(score / softcap)``.
        alibi: scores lose slope * distance, with the slopes of ``alibi_slopes``; they are not learned and not saved.
        sinks: a learned logit for each head in the denominator, zero at first (parameter ``sinks`` [H]).
        rope: a ``RotaryEmbedding`` that turns queries and keys.
    """

    options = Options()  # of modules that began as torch's, by default

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
                 add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
                 device: Any = None, dtype: Any = None, *, num_kv_heads: int | None = None, causal: bool = False,
                 window: tuple[int | None, int | None] | None = None, softcap: float | None = None, alibi: bool = False,
                 sinks: bool = False, rope: RotaryEmbedding | None = None) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
                         dtype)
        self.register_forward_pre_hook(stay_in_python)
        self._extend(num_kv_heads, causal, window, softcap, alibi, sinks, rope)

    def _extend(self, num_kv_heads: int | None = None, causal: bool = False,
                window: tuple[int | None, int | None] | None = None, softcap: float | None = None, alibi: bool = False,
                sinks: bool = False, rope: RotaryEmbedding | None = None) -> None:
        """Gives torch's module the options beyond torch; projections are drawn anew only if ``num_kv_heads`` changes shapes."""
        options = Options(causal, window, softcap, alibi)
        check_options(self, num_kv_heads, options, rope)
        if options != Options():
            self.options = options
        if num_kv_heads is not None and num_kv_heads != self.num_heads:
            self._group(num_kv_heads)
        if sinks:
            self.sinks = nn.Parameter(torch.zeros_like(self.out_proj.weight[0, : self.num_heads]))
        if rope is not None:
            self.rope = rope

    @classmethod
    def adopt(cls, module: nn.MultiheadAttention, **options: Any) -> "MultiheadAttention":
        """Makes torch's module itself one of this class: its weights, hooks, device, mode and place in a model stay.

        ``options`` are those of the constructor beyond torch's. Where one does not fit, the module stays as it was.
        """
        module.__class__ = cls
        assert isinstance(module, MultiheadAttention)
        module.__dict__["_adopted"] = module.register_forward_pre_hook(stay_in_python).id
        try:
            module._extend(**options)
        except BaseException:
            module.release()
            raise
        return module

    def release(self) -> nn.MultiheadAttention:
        """Undoes ``adopt``."""
        key = self.__dict__.pop("_adopted", None)  # the key of that one hook; the user may have registered the same function
        if self._forward_pre_hooks.get(key) is stay_in_python:
            del self._forward_pre_hooks[key]
        self.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
        return self

    def _group(self, num_kv_heads: int) -> None:
        """Makes the projections of keys and values smaller, and draws the projections anew."""
        self._num_kv_heads = num_kv_heads
        own, shared = self.embed_dim, num_kv_heads * self.head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(self.out_proj.weight.new_empty(*shape))

        if self._qkv_same_embed_dim:
            self.in_proj_weight = parameter(own + 2 * shared, own)
        else:
            self.k_proj_weight, self.v_proj_weight = parameter(shared, self.kdim), parameter(shared, self.vdim)
        if self.in_proj_bias is not None:
            self.in_proj_bias = parameter(own + 2 * shared)
        if self.bias_k is not None:
            self.bias_k, self.bias_v = parameter(1, 1, shared), parameter(1, 1, shared)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        if (sinks := getattr(self, "sinks", None)) is not None:
            nn.init.zeros_(sinks)

    def alibi_slopes(self, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """The slopes, fp32 [H], if there is ``alibi``; no buffer, which ``bfloat16()`` would round and checkpoints lack."""
        return alibi_slopes(self.num_heads, device) if self.options.alibi else None

    def position_embeddings(self, x: torch.Tensor, cache: KVCache | None = None) -> PositionEmbeddings | None:
        """Rotations and slopes of self-attention over x with its ``cache``, for this module and all others with its options.

        A model that stacks layers by itself may compute them once and hand them to each, as the containers here do.
        """
        positions: torch.Tensor | int | None = None
        if x.is_nested:
            if x.layout != torch.jagged:  # every layer makes jagged ones of these
                return None
            positions = jagged_positions(x.values(), x.offsets())  # type: ignore[attr-defined]
            x = x.values()
        elif x.dim() == 3 and not self.batch_first:
            x = x.transpose(0, 1)
        if cache is not None:
            positions = cache.positions(x.shape[-2], x.shape[0])
        return self._embeddings(x, positions)

    def _embeddings(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> PositionEmbeddings | None:
        """The position embeddings of the rows of x [..., N, D], or None without ``rope`` and ``alibi``."""
        rope: RotaryEmbedding | None = getattr(self, "rope", None)
        if rope is None and not self.options.alibi:
            return None
        return PositionEmbeddings(None if rope is None else rope.angles(x, positions), self.alibi_slopes(x.device),
                                  self.position_kind)

    def _own(self, given: PositionEmbeddings) -> PositionEmbeddings:
        """``given``, checked to come from a module with the options of this one."""
        if not isinstance(given, PositionEmbeddings) or given.kind != self.position_kind:
            raise ValueError("position_embeddings: expected those of a module with this one's rope and alibi, of (rotation, "
                             f"heads with slopes) {self.position_kind}; got {getattr(given, 'kind', given)}")
        return given

    @property
    def position_kind(self) -> tuple[Any, ...]:
        """What modules with the same ``position_embeddings`` have in common."""
        rope: RotaryEmbedding | None = getattr(self, "rope", None)
        return None if rope is None else rope.kind, self.num_heads if self.options.alibi else None

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        grouped: int = self.__dict__.get("_num_kv_heads", self.num_heads)
        return grouped

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError("torch.jit.script: fused_attn's layers are no TorchScript; torch.export.export and "
                                  "torch.compile take them, and torch's own layers load their state dict")

    def extra_repr(self) -> str:
        options = [f"{name}={value}" for name, value in self.options._asdict().items() if value]
        if self.num_kv_heads != self.num_heads:
            options.append(f"num_kv_heads={self.num_kv_heads}")
        if getattr(self, "sinks", None) is not None:
            options.append("sinks=True")
        return ", ".join([f"{self.embed_dim}, {self.num_heads}", *options])

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
                attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
                cache: KVCache | MemoryCache | None = None,
                position_embeddings: PositionEmbeddings | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes torch's arguments, ``cache`` and ``position_embeddings``, and returns torch's results.

        Jagged nested tensors [B, j, E] are taken as they are, with ``need_weights=False`` and without masks.

        Args:
            cache: a ``KVCache`` makes self-attention causal and remembers keys and values: pass the new tokens alone, padded
                on the right if at all, with their ``key_padding_mask``; the module must be causal, or the call
                ``is_causal``. A ``MemoryCache`` keeps the projections of ``key`` and ``value`` of cross-attention from its
                first call; it cannot be combined with options about positions.
            position_embeddings: what the method of that name returns for ``query``, if computed once for many layers.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return attend_jagged(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, cache,
                                 position_embeddings), None
        if cache is not None and not isinstance(cache, (KVCache, MemoryCache)):
            raise TypeError(f"cache: expected a KVCache, a MemoryCache or None; got {type(cache).__name__}")
        batched = query.dim() == 3
        if isinstance(cache, KVCache):
            with all_or_nothing(cache):
                result = self._cached(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, cache,
                                      position_embeddings)
            return result, None
        with all_or_nothing(cache):
            q, k, v, arguments = self.heads(query, key, value, key_padding_mask, attn_mask, is_causal, need_weights, cache,
                                            position_embeddings)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = inspection.attention_and_weights(q, k, v, dropout_p=dropout_p, **arguments)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = attention(q, k, v, dropout_p=dropout_p, **arguments)
        return self._merge(out, batched), weights

    def heads(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_padding_mask: torch.Tensor | None = None,
              attn_mask: torch.Tensor | None = None, is_causal: bool = False, need_weights: bool = False,
              cache: MemoryCache | None = None, position_embeddings: PositionEmbeddings | None = None) -> Heads:
        """What ``forward`` gives to ``attention``, except for dropout."""
        hint, attn_mask = causal_bias(attn_mask, query, key, self.batch_first)
        batched = torch_private.mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None and not hint and not self.options.causal:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                               "`generate_square_subsequent_mask` to create this mask, or construct fused_attn.nn's modules "
                               "with causal=True.")
        if not batched:
            query, key, value = self._batched_together(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        self._check_inputs(query, key, value)
        batch_first = self.batch_first or not batched
        rope = getattr(self, "rope", None)
        if cache is not None:
            if self.options.causal or self.options.window is not None or self.options.alibi or rope is not None:
                raise ValueError("cache: expected no causal, window, alibi or rope with a MemoryCache, whose queries and keys "
                                 "are of two sequences")

            def project() -> tuple[torch.Tensor, torch.Tensor]:
                k, v = self._project(None, key, value)
                return self._keys(k, v, batch_first)

            (q,) = self._project(query, None, None)
            sizes = key.shape[:2] if batch_first else key.shape[1::-1]
            cache.claim(self)
            k, v = cache.get(sizes[0], sizes[1] + (self.bias_k is not None) + bool(self.add_zero_attn), q, project)
        else:
            q, k, v = self._project(query, key, value)
            k, v = self._keys(k, v, batch_first)
        q = _split_heads(q, self.num_heads, batch_first)
        options = self.options
        appended = (self.bias_k is not None) + bool(self.add_zero_attn)
        n_keys = k.shape[2] - appended
        # torch's hint aligns the first query with the first key: where lengths differ, the mask is taken instead.
        # torch drops a floating-point mask for the hint only if nothing else needs the mask, which may say more.
        exact = attn_mask is None or attn_mask.dtype == torch.bool or (not need_weights and key_padding_mask is None)
        hinted = (hint or (is_causal and exact)) and q.shape[2] == n_keys and not appended
        if hint and not hinted:
            attn_mask = torch.ones(q.shape[2], n_keys, dtype=torch.bool, device=q.device).triu(1)
        arguments = mask_arguments(None if hinted else attn_mask, key_padding_mask, q, n_keys, appended)
        if hinted or options.causal:
            arguments["causal"] = True
        if rope is not None and q.shape[2] != k.shape[2]:  # the last query stands at the last key
            q, k = rope.turn(q, k.shape[2] - q.shape[2]), rope.turn(k)
            position_embeddings = PositionEmbeddings(None, self.alibi_slopes(q.device), self.position_kind)
        else:
            position_embeddings = self._embeddings(q) if position_embeddings is None else self._own(position_embeddings)
            q, k = self._turned(q, k, position_embeddings)
        return Heads(q, k, v, {**arguments, **self._variant(position_embeddings)})

    def _turned(self, q: torch.Tensor, k: torch.Tensor, given: PositionEmbeddings | None) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [B, H, N, D] of the same tokens, rotated where the module has ``rope``."""
        rope: RotaryEmbedding | None = getattr(self, "rope", None)
        if rope is None:
            return q, k
        assert given is not None
        assert given.rotation is not None
        cos, sin = given.rotation
        return (apply_rotary(q, cos, sin, interleaved=rope.interleaved),
                apply_rotary(k, cos, sin, interleaved=rope.interleaved))

    def _variant(self, given: PositionEmbeddings | None) -> dict[str, Any]:
        """The arguments of ``attention`` that follow from the options, except for ``causal``."""
        found = {"window": self.options.window, "softcap": self.options.softcap, "sinks": getattr(self, "sinks", None),
                 "alibi_slopes": given.slopes if given is not None and self.options.alibi else None}
        return {name: value for name, value in found.items() if value is not None}

    def _batched_together(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Makes [1, N, E] of each [N, E]; arguments that are one tensor remain one, for one projection."""
        views: list[torch.Tensor] = []
        for i, x in enumerate(tensors):
            same = next((j for j in range(i) if tensors[j] is x), None)
            views.append(x.unsqueeze(0) if same is None else views[same])
        return tuple(views)

    def _check_inputs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self.in_proj_weight is None:
            if key.shape[:2] != value.shape[:2]:
                raise AssertionError(f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}")
        elif key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")

    def _project(self, query: torch.Tensor | None, key: torch.Tensor | None,
                 value: torch.Tensor | None) -> tuple[Any, ...]:
        """The projections of what is given, [..., H D] and [..., Hkv D]; arguments that are one tensor share one product."""
        sizes = [self.embed_dim, *[self.num_kv_heads * self.head_dim] * 2]
        if self.in_proj_weight is not None and query is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).split(sizes, -1)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            weights = self.in_proj_weight.split(sizes)
            if key is value and key is not None:
                both = self.in_proj_weight[sizes[0] :], None if biases[1] is None else self.in_proj_bias[sizes[0] :]
                k, v = F.linear(key, *both).split(sizes[1:], -1)
                return (*self._linear((query,), weights, biases), k, v)
        return self._linear((query, key, value), weights, biases)

    def _linear(self, tensors: Any, weights: Any, biases: Any) -> tuple[torch.Tensor, ...]:
        return tuple(F.linear(x, w, b) for x, w, b in zip(tensors, weights, biases, strict=False) if x is not None)

    def _keys(self, k: Any, v: Any, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Projections as [B, Hkv, S, D], with the learned key, and the key of zeros, that the module may append."""
        k, v = (_split_heads(x, self.num_kv_heads, batch_first) for x in (k, v))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((x, b.view(1, self.num_kv_heads, 1, -1).expand(x.shape[0], -1, -1, -1)), 2)
                    for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _merge(self, out: torch.Tensor, batched: bool) -> torch.Tensor:
        """[B, H, L, D] as the module's output: [B, L, E], [L, B, E] or [L, E]."""
        if not batched:
            return self.out_proj(out.transpose(1, 2).flatten(2)).squeeze(0)
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return self.out_proj(out.permute(order).flatten(2))

    def _cached(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_padding_mask: torch.Tensor | None,
                need_weights: bool, attn_mask: torch.Tensor | None, is_causal: bool, cache: KVCache,
                position_embeddings: PositionEmbeddings | None) -> torch.Tensor:
        """Self-attention of new tokens to themselves and to all before them."""
        if query is not key or key is not value or query.dim() != 3:
            raise ValueError("cache: expected batched self-attention with a KVCache; cross-attention takes a MemoryCache")
        if need_weights or attn_mask is not None or self.bias_k is not None or self.add_zero_attn or self.training:
            raise ValueError("cache: expected need_weights=False, no attn_mask (it is causal), neither add_bias_kv nor "
                             "add_zero_attn, and a module in eval()")
        self._check_inputs(query, key, value)
        if key_padding_mask is not None:
            check_new_padding(key_padding_mask, query.shape[:2] if self.batch_first else query.shape[1::-1])
        if not (self.options.causal or is_causal):
            raise ValueError("cache: expected a module with causal=True, or is_causal=True; a KVCache knows no later tokens")
        q, k, v = self._project(query, key, value)
        q = _split_heads(q, self.num_heads, self.batch_first)
        k, v = self._keys(k, v, self.batch_first)
        cache.claim(self)
        if position_embeddings is None:
            position_embeddings = self._embeddings(q, cache.positions(q.shape[2], q.shape[0]))
        else:
            position_embeddings = self._own(position_embeddings)
        q, k = self._turned(q, k, position_embeddings)
        cache.append(k, v, None if key_padding_mask is None else (~key_padding_mask).sum(1))
        return self._merge(cache.attend(q, **self._variant(position_embeddings)), True)


def _split_heads(x: torch.Tensor, heads: int, batch_first: bool) -> torch.Tensor:
    """A view [B, H, N, D] of x, which is [B, N, H D] if ``batch_first``, else [N, B, H D]."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)
