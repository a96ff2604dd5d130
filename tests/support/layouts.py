"""Memory layouts of [B, H, N, D] tensors that torch's users hand over."""

import torch

LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "length before heads": lambda b, h, n, d: torch.randn(b, n, h, d).transpose(1, 2),
    "head dim before length": lambda b, h, n, d: torch.randn(b, h, d, n).transpose(2, 3),
    "expanded heads": lambda b, h, n, d: torch.randn(b, 1, n, d).expand(b, h, n, d),
    "every second column": lambda b, h, n, d: torch.randn(b, h, n, 2 * d)[..., ::2],
    "part of a packed tensor": lambda b, h, n, d: torch.randn(b, n, 3, h, d)[:, :, 1].transpose(1, 2),
}
