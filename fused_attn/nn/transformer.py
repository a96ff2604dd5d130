"""torch's transformer layers on fused attention, for training and for generation token by token.

Each is torch's own class with another ``forward``: the submodules, the keys of the state dict and the order in which weights
are drawn are torch's because torch's code does it. The forwards here never take torch's fast C++ path, which reads the
weights of the attention module and bypasses it, and never compare a mask with a causal one to find out what it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_attn.nn.attention import MultiheadAttention
from fused_attn.nn.cache import DecoderCache, KVCache, MemoryCache
from fused_attn.nn.masks import readable
from fused_attn.nn.positions import PositionEmbeddings
from fused_attn.nn.restorable import all_or_nothing, caches_in

Activation = str | Callable[[torch.Tensor], torch.Tensor]
_SELF_ONLY = ("causal", "window", "alibi", "rope")  # options about positions, which mean nothing between two sequences


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` on fused attention; with ``causal=True``, the block of a decoder-only model.

    Args:
        d_model ... dtype: as in torch.
        attention: options of ``MultiheadAttention`` beyond torch's: num_kv_heads, causal, window, softcap, alibi, sinks, rope.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: Activation = F.relu, layer_norm_eps: float = 1e-5, batch_first: bool = False,
                 norm_first: bool = False, bias: bool = True, device: Any = None, dtype: Any = None, **attention: Any) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
                         device, dtype)
        self.self_attn = MultiheadAttention.adopt(self.self_attn, **attention)
        self.activation_relu_or_gelu = 0  # which keeps torch's own TransformerEncoder from making strided nested tensors

    def forward(self, src: torch.Tensor, src_mask: torch.Tensor | None = None,
                src_key_padding_mask: torch.Tensor | None = None, is_causal: bool = False, *,
                cache: KVCache | None = None, position_embeddings: PositionEmbeddings | None = None) -> torch.Tensor:
        """Takes torch's arguments, and ``cache`` and ``position_embeddings`` as in ``MultiheadAttention.forward``."""
        _check_types(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a KVCache or None; got {type(cache).__name__}")
        attend = self._sa_block
        if cache is not None or position_embeddings is not None:
            attend = _self_attend(self.self_attn, self.dropout1, cache, position_embeddings)
        with all_or_nothing(cache):
            return self._forward(src, attend, src_mask, src_key_padding_mask, is_causal)

    def _forward(self, x: torch.Tensor, attend: Callable[..., torch.Tensor], src_mask: torch.Tensor | None,
                 src_key_padding_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        if self.norm_first:
            x = x + attend(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attend(x, src_mask, src_key_padding_mask, is_causal))
        normed: torch.Tensor = self.norm2(x + self._ff_block(x))
        return normed


def _check_types(**masks: torch.Tensor | None) -> None:
    for name, mask in masks.items():
        if isinstance(mask, torch.Tensor) and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise AssertionError(f"only bool and floating types of {name} are supported")


def _self_attend(module: nn.Module, dropout: nn.Module, cache: KVCache | None,
                 position_embeddings: PositionEmbeddings | None, causal: bool = False) -> Callable[..., torch.Tensor]:
    """A layer's self-attention block with a cache or given position embeddings; ``causal`` overrides what the call says."""

    def attend(x: torch.Tensor, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None,
               is_causal: bool) -> torch.Tensor:
        out, _ = module(x, x, x, key_padding_mask, False, attn_mask, is_causal=is_causal or causal, cache=cache,
                        position_embeddings=position_embeddings)
        result: torch.Tensor = dropout(out)
        return result

    return attend


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` on fused attention: self-attention, then attention to the memory.

    Args:
        d_model ... dtype: as in torch.
        attention: options as in ``TransformerEncoderLayer``; those about positions (causal, window, alibi, rope) go to the
            self-attention alone.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: Activation = F.relu, layer_norm_eps: float = 1e-5, batch_first: bool = False,
                 norm_first: bool = False, bias: bool = True, device: Any = None, dtype: Any = None, **attention: Any) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
                         device, dtype)
        self.self_attn = MultiheadAttention.adopt(self.self_attn, **attention)
        shared = {name: value for name, value in attention.items() if name not in _SELF_ONLY}
        self.multihead_attn = MultiheadAttention.adopt(self.multihead_attn, **shared)

    def forward(self, tgt: torch.Tensor, memory: torch.Tensor, tgt_mask: torch.Tensor | None = None,
                memory_mask: torch.Tensor | None = None, tgt_key_padding_mask: torch.Tensor | None = None,
                memory_key_padding_mask: torch.Tensor | None = None, tgt_is_causal: bool = False,
                memory_is_causal: bool = False, *, cache: DecoderCache | None = None,
                position_embeddings: PositionEmbeddings | None = None) -> torch.Tensor:
        """Takes torch's arguments. ``cache`` makes self-attention causal, remembers its tokens, and projects ``memory`` once.

        ``position_embeddings`` are those of the self-attention, as in ``MultiheadAttention.forward``.
        """
        if cache is not None and not isinstance(cache, DecoderCache):
            raise TypeError(f"cache: expected a DecoderCache or None; got {type(cache).__name__}")
        self_attend, cross_attend = self._sa_block, self._mha_block
        if cache is not None or position_embeddings is not None:
            self_attend = _self_attend(self.self_attn, self.dropout1, None if cache is None else cache.own,
                                       position_embeddings, causal=cache is not None)
        if cache is not None:
            cross_attend = self._cross_attend_with(cache.memory)
        with all_or_nothing(cache):
            return self._forward(tgt, memory, self_attend, cross_attend, (tgt_mask, tgt_key_padding_mask, tgt_is_causal),
                                 (memory_mask, memory_key_padding_mask, memory_is_causal))

    def _forward(self, x: torch.Tensor, memory: torch.Tensor, self_attend: Callable[..., torch.Tensor],
                 cross_attend: Callable[..., torch.Tensor], own: tuple[Any, ...], across: tuple[Any, ...]) -> torch.Tensor:
        if self.norm_first:
            x = x + self_attend(self.norm1(x), *own)
            x = x + cross_attend(self.norm2(x), memory, *across)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self_attend(x, *own))
        x = self.norm2(x + cross_attend(x, memory, *across))
        normed: torch.Tensor = self.norm3(x + self._ff_block(x))
        return normed

    def _cross_attend_with(self, cache: MemoryCache) -> Callable[..., torch.Tensor]:
        def cross_attend(x: torch.Tensor, memory: torch.Tensor, attn_mask: torch.Tensor | None,
                         key_padding_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
            out, _ = self.multihead_attn(x, memory, memory, key_padding_mask, False, attn_mask, is_causal=is_causal,
                                         cache=cache)
            result: torch.Tensor = self.dropout2(out)
            return result

        return cross_attend


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` without its fast paths: no C++ path, no conversion to nested tensors, no mask recognised.

    ``enable_nested_tensor`` and ``mask_check`` are accepted and kept, but change nothing: outputs at padded positions are what
    the layers make of them, in evaluation too, where torch's path through nested tensors gives 0. ``is_causal=None`` means
    False: pass True beside a causal mask, or construct the layers with ``causal=True``.
    """

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None,
                 enable_nested_tensor: bool = True, mask_check: bool = True) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor

    def forward(self, src: torch.Tensor, mask: torch.Tensor | None = None,
                src_key_padding_mask: torch.Tensor | None = None, is_causal: bool | None = None, *,
                cache: Sequence[KVCache] | None = None) -> torch.Tensor:
        """Takes torch's arguments, and ``cache``, from ``new_cache()``, as in ``MultiheadAttention.forward``."""
        _check_types(mask=mask, src_key_padding_mask=src_key_padding_mask)
        output = src
        with all_or_nothing(cache):
            for layer, more in zip(self.layers, _given(self.layers, src, cache), strict=True):
                output = layer(output, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal),
                               **more)
            return output if self.norm is None else self.norm(output)

    def new_cache(self, capacity: int | None = None) -> list[KVCache]:
        """An empty cache for each layer; ``capacity`` as in ``KVCache``."""
        return [KVCache(capacity) for _ in range(self.num_layers)]


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``; no mask is recognised, ``tgt_is_causal=None`` means False."""

    def forward(self, tgt: torch.Tensor, memory: torch.Tensor, tgt_mask: torch.Tensor | None = None,
                memory_mask: torch.Tensor | None = None, tgt_key_padding_mask: torch.Tensor | None = None,
                memory_key_padding_mask: torch.Tensor | None = None, tgt_is_causal: bool | None = None,
                memory_is_causal: bool = False, *, cache: Sequence[DecoderCache] | None = None) -> torch.Tensor:
        """Takes torch's arguments, and ``cache``, from ``new_cache()``, as in ``TransformerDecoderLayer.forward``."""
        output = tgt
        with all_or_nothing(cache):
            for layer, more in zip(self.layers, _given(self.layers, tgt, cache), strict=True):
                output = layer(output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                               tgt_key_padding_mask=tgt_key_padding_mask, memory_key_padding_mask=memory_key_padding_mask,
                               tgt_is_causal=bool(tgt_is_causal), memory_is_causal=memory_is_causal, **more)
            return output if self.norm is None else self.norm(output)

    def new_cache(self, capacity: int | None = None) -> list[DecoderCache]:
        """An empty cache for each layer; ``capacity`` is that of the self-attention, as in ``KVCache``."""
        return [DecoderCache(KVCache(capacity), MemoryCache()) for _ in range(self.num_layers)]


def _given(layers: Any, x: torch.Tensor, cache: Sequence[Any] | None) -> list[dict[str, Any]]:
    """What each layer is given beyond torch's arguments: its cache, if there is one, and position embeddings, if it takes them,
    which layers of one kind share. Without these it is given nothing, so that layers of other code run too."""
    caches = _checked(cache, layers)
    given: list[dict[str, Any]] = []
    made: dict[Any, PositionEmbeddings | None] = {}
    for layer, one in zip(layers, caches, strict=True):
        more = {} if one is None else {"cache": one}
        if _takes_embeddings(layer):
            kind = layer.self_attn.position_kind
            if kind not in made:
                made[kind] = layer.self_attn.position_embeddings(x, one.own if isinstance(one, DecoderCache) else one)
            if made[kind] is not None:
                more["position_embeddings"] = made[kind]
        given.append(more)
    return given


def _takes_embeddings(layer: nn.Module) -> bool:
    """Whether a layer's forward is one of this file: another one, or a wrapper's, may not know the argument."""
    own = any(isinstance(layer, cls) and type(layer).forward is cls.forward and type(layer)._sa_block is cls._sa_block
              for cls in (TransformerEncoderLayer, TransformerDecoderLayer))
    return own and isinstance(layer.self_attn, MultiheadAttention)


def _checked(cache: Sequence[Any] | None, layers: Any) -> Sequence[Any]:
    """A cache for each layer, checked to hold the same tokens, or None for each."""
    if cache is None:
        return [None] * len(layers)
    if not isinstance(cache, (list, tuple)) or isinstance(cache, DecoderCache):
        raise TypeError(f"cache: expected a list, one for each of {len(layers)} layers; got {type(cache).__name__}")
    if len(cache) != len(layers):
        raise ValueError(f"cache: expected one for each of {len(layers)} layers; got {len(cache)}")
    for i, (layer, one) in enumerate(zip(layers, cache, strict=True)):
        kind = next((kind for cls, kind in ((TransformerEncoderLayer, KVCache), (TransformerDecoderLayer, DecoderCache))
                     if isinstance(layer, cls)), object)
        if one is None or not isinstance(one, kind):
            raise TypeError(f"cache: expected a {'cache' if kind is object else kind.__name__} for layer {i}; got "
                            f"{type(one).__name__}")
    every = list(caches_in(cache))
    if any(one is other for i, one in enumerate(every) for other in every[:i]):
        raise ValueError("cache: expected a cache of its own for each layer; got one of them twice")
    own = [one for one in every if isinstance(one, KVCache)]
    seen = [one.lengths for one in own if not one.even and one.lengths is not None and readable(one.lengths)]
    if any(one.length != own[0].length for one in own) or any(not torch.equal(x, seen[0]) for x in seen[1:]):
        raise ValueError(f"cache: expected caches that hold the same tokens; got lengths {[one.length for one in own]}: if a "
                         "step failed half way, truncate() them to what all hold")
    return cache


class Transformer(nn.Transformer):
    """``torch.nn.Transformer``, the paper's encoder and decoder, on fused attention.

    Args:
        d_model ... dtype: as in torch.
        attention: options of the layers' attention, as in ``TransformerDecoderLayer``; ``causal`` goes to the decoder alone.
    """

    def __init__(self, d_model: int = 512, nhead: int = 8, num_encoder_layers: int = 6, num_decoder_layers: int = 6,
                 dim_feedforward: int = 2048, dropout: float = 0.1, activation: Activation = F.relu,
                 custom_encoder: Any = None, custom_decoder: Any = None, layer_norm_eps: float = 1e-5,
                 batch_first: bool = False, norm_first: bool = False, bias: bool = True, device: Any = None,
                 dtype: Any = None, **attention: Any) -> None:
        shape = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
                 device, dtype)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            both = {name: value for name, value in attention.items() if name != "causal"}
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*shape, **both), num_encoder_layers, norm())
        if custom_decoder is None:
            layer = TransformerDecoderLayer(*shape, **attention)
            custom_decoder = TransformerDecoder(layer, num_decoder_layers, norm())
        elif custom_encoder is not None and attention:
            raise TypeError(f"unexpected arguments {', '.join(attention)}: a custom encoder and decoder bring their own")
        super().__init__(d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first)
