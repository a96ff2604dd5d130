"""Drop-in transformer layers: torch's names, signatures, weights and state dicts, on fused attention."""

from fused_attn.nn.attention import MultiheadAttention
from fused_attn.nn.cache import DecoderCache, KVCache, MemoryCache
from fused_attn.nn.generation import generate, sample, stream
from fused_attn.nn.positions import (
    LearnedPositions,
    PositionEmbeddings,
    RotaryEmbedding,
    SinusoidalPositions,
    T5RelativeBias,
    alibi_slopes,
)
from fused_attn.nn.restorable import all_or_nothing
from fused_attn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "DecoderCache",
    "KVCache",
    "LearnedPositions",
    "MemoryCache",
    "MultiheadAttention",
    "PositionEmbeddings",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "T5RelativeBias",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "alibi_slopes",
    "all_or_nothing",
    "generate",
    "sample",
    "stream",
]
