"""The options of attention modules beyond torch's, and whether a module of torch's can have them."""

from typing import NamedTuple

from torch import nn

from fused_attn.call import describe
from fused_attn.nn.positions import RotaryEmbedding


class Options(NamedTuple):
    """What a ``MultiheadAttention`` does beyond torch's."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: bool = False


def check_options(module: nn.MultiheadAttention, num_kv_heads: int | None, scores: Options,
                   rope: RotaryEmbedding | None) -> None:
    """Raises, by name, for options that torch's ``module`` cannot have."""
    describe.describe_scores(module.head_dim, scores.causal, scores.window, None, scores.softcap)
    if rope is not None and not isinstance(rope, RotaryEmbedding):
        raise TypeError(f"rope: expected a RotaryEmbedding or None; got {rope!r}")
    if rope is not None and rope.dim > module.head_dim:
        raise ValueError(f"rope: expected at most {module.head_dim} columns, the head dim; got {rope.dim}")
    if num_kv_heads is not None:
        whole = isinstance(num_kv_heads, int) and not isinstance(num_kv_heads, bool)
        if not whole or num_kv_heads < 1 or module.num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads {module.num_heads}; got {num_kv_heads!r}")
    appended = module.bias_k is not None or module.add_zero_attn
    if appended and (scores.causal or scores.window is not None or scores.alibi or rope is not None):
        raise ValueError("add_bias_kv, add_zero_attn: expected neither with causal, window, alibi or rope, since the keys "
                         "they append have no position")
