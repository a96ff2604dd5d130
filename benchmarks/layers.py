"""Layers as subjects of a contest: the package's beside torch's, of one set of weights, held to torch's in fp64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import fused_attn.nn
from fused_attn import settings
from fused_attn.call.spec import Window, attention_flops, kept_pairs
from fused_attn.tools.bench.cases import DTYPES, Pass
from fused_attn.tools.bench.contest import Entry, Subject, Tensors, gate_by
from fused_attn.tools.bench.oracle import Row

# dtype: largest relative error of out and of a gradient
LIMITS = {"fp32": (2e-5, 2e-4), "fp16": (4e-3, 1e-2), "bf16": (2e-2, 4e-2)}


@dataclass(frozen=True)
class Sizes:
    """Of a layer: tokens [batch, length, width] in ``heads`` heads, ``inner`` columns in its feed-forward part."""

    batch: int
    length: int
    width: int
    heads: int
    inner: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} B{self.batch} N{self.length} d{self.width} h{self.heads}"


LAYERS: dict[str, tuple[str, float]] = {  # name: class in torch.nn and in fused_attn.nn, dropout
    "MultiheadAttention": ("MultiheadAttention", 0.0), "encoder layer": ("TransformerEncoderLayer", 0.0),
    "encoder layer, dropout 0.1": ("TransformerEncoderLayer", 0.1), "decoder layer": ("TransformerDecoderLayer", 0.0),
}


def gate_of(exact: Tensors, dtype: str) -> Callable[[str, Tensors], tuple[Row, str | None]]:
    """The gate of results that went through products other than attention's."""
    return gate_by(exact, lambda result: LIMITS[dtype][result != "out"])


def matrices(module: nn.Module) -> int:
    """Elements of the weights that tokens are multiplied with."""
    return sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2 and not name.startswith("positions"))


def products(weights: int, tokens: int, attention: int, which: Pass) -> int:
    """FLOPs of matrix products: each of ``weights`` elements meets each token, once forward and twice backward.

    ``attention``: forward FLOPs of attention, of which a backward makes 2.5 times as many.
    """
    forward = 2 * tokens * weights
    return forward + attention if which == "forward" else 2 * forward + int(2.5 * attention)


def moved(module: nn.Module, tokens: torch.Tensor, which: Pass) -> int:
    """The least bytes a pass of a module moves: weights, input and output; backward, the gradients of all three besides."""
    forward = sum(p.numel() * p.element_size() for p in module.parameters()) + 2 * tokens.numel() * tokens.element_size()
    return forward if which == "forward" else 2 * forward


def layer(name: str, sizes: Sizes, device: str, training: bool) -> Subject:
    """A layer in training, forward and backward apart, or in evaluation, where torch takes its C++ path.

    With dropout nothing is compared, since each draws masks of its own.
    """
    cls, dropout = LAYERS[name]
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[sizes.dtype]
    x, dout = (torch.randn(sizes.batch, sizes.length, sizes.width, device=device, generator=generator).to(dtype)
               for _ in range(2))
    options: dict[str, Any] = {"batch_first": True, "dropout": dropout}
    if cls != "MultiheadAttention":
        options |= {"dim_feedforward": sizes.inner, "activation": "gelu"}  # ReLU's kink would blur the gate

    def make(package: Any, wide: bool = False) -> Entry:
        torch.manual_seed(0)
        module = getattr(package, cls)(sizes.width, sizes.heads, **options).train(training).to(device, dtype)
        tokens = x
        if wide:
            module, tokens = module.double(), x.double()
        if training:
            tokens = tokens.clone().requires_grad_()
        repeated = {"MultiheadAttention": 3, "TransformerDecoderLayer": 2}.get(cls, 1)
        more = {"need_weights": False} if cls == "MultiheadAttention" else {}

        def call() -> torch.Tensor:
            with torch.set_grad_enabled(training):
                out = module(*[tokens] * repeated, **more)
            result: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return result

        leaves = {"x": tokens, **dict(module.named_parameters())} if training else {}
        return Entry(call, leaves, dout.to(tokens.dtype))

    gate = gate_of(make(nn, wide=True).results(training), sizes.dtype) if not dropout else _ungated
    module = getattr(nn, cls)(sizes.width, sizes.heads, **options, device="meta")
    pairs = kept_pairs(sizes.length, sizes.length, Window(), 0)
    attention = attention_flops(sizes.batch, sizes.heads, pairs, *[sizes.width // sizes.heads] * 2, products_qk=1, products_v=1)
    attention *= 2 if cls == "TransformerDecoderLayer" else 1
    return Subject(
        ("forward", "backward") if training else ("forward",), partial(make, fused_attn.nn), {"torch.nn": partial(make, nn)},
        gate, partial(products, matrices(module), sizes.batch * sizes.length, attention), partial(moved, module.to(dtype), x),
        {"family": "layers", "layer": name, "mode": "training" if training else "evaluation", "dtype": sizes.dtype,
         "default": settings.BACKEND is None})


def _ungated(name: str, found: Tensors) -> tuple[Row, str | None]:
    return {}, None


def layers(sizes: Sizes, device: str) -> dict[str, Callable[[], Subject]]:
    """Every layer in both modes, by name."""
    return {f"{name}, {'training' if training else 'evaluation'} {sizes}": partial(layer, name, sizes, device, training)
            for name, (_, dropout) in LAYERS.items() for training in (True, False) if training or not dropout}
