"""Tensor descriptors of CPU tensors."""

from collections.abc import Sequence

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from support.gluon.values import DTYPES


def descriptor(tensor: torch.Tensor, block: Sequence[int], shape: Sequence[int] | None = None,
               strides: Sequence[int] | None = None) -> TensorDescriptor:
    """Of a tensor, or with a shape and strides of its own from the tensor's first element on."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(shape or tensor.shape), list(strides or tensor.stride()), list(block), layout)
