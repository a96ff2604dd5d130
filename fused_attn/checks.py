"""``check_mod``: whether what somebody wrote by hand of a score or mask function fits together."""

import contextlib
from typing import Any

import torch

from fused_attn import settings
from fused_attn.api import attention
from fused_attn.call.mods import Bound, MaskMod, ScoreMod
from fused_attn.emulator import emulated
from fused_attn.plan import backends

_TOLERANCE = 1e-6  # of the largest of a tensor: what is wrong is wrong by more, and a bare number has the digits of fp32


def check_mod(mod: ScoreMod | MaskMod | Bound, *args: Any, n_queries: int = 40, n_keys: int = 56, heads: int = 2,
              target: str = "sm_80") -> None:
    """Holds the jit functions of a ``ScoreMod`` or ``MaskMod`` to its plain PyTorch reference, in fp64.

    The function is compared by the output of attention, its slope by the gradients of q and k, the slope of each argument by
    the argument's gradient, which autograd derives from the reference. The kernels run on a GPU if there is one, else in
    Triton's interpreter if that is on, else compiled for ``target`` in the emulator. A plain function needs no check: nothing
    of it is written twice.

    Args:
        mod: with ``args``, its arguments, unless it is bound to them: tensors that broadcast to [1, heads, n_queries, n_keys]
            and numbers.
        n_queries, n_keys, heads: of the calls that are made.
        target: what the emulator compiles for.

    Raises:
        ValueError: the function, the slope or the slope of an argument that does not fit the reference, by name; or a mod that
            lacks one of the two.
    """
    bound = mod if isinstance(mod, Bound) else mod(*args) if isinstance(mod, (ScoreMod, MaskMod)) else None
    if bound is None:
        raise TypeError(f"mod: expected a ScoreMod or MaskMod, or one bound to its arguments; got {mod!r}")
    code = bound.mod.code
    if bound.mod.plain is None or not code.has_kernel:
        raise ValueError(f"{code.name}: expected a jit function and a plain PyTorch reference to compare; it lacks one of them")
    device = backends.kernel_device()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 16, dtype=torch.float64, generator=generator).to(device)
               for n in (n_queries, n_keys, n_keys))
    name = "mask_mod" if isinstance(bound.mod, MaskMod) else "score_mod"
    derived = name == "score_mod" and (code.function is None or code.slope is not None)
    slopes = code.arg_slopes + (None,) * len(bound.args)
    # What ships brings every slope; of one's own, those that are there are looked at.
    learned = [i for i, x in enumerate(bound.args)
               if derived and _floats(x) and (code.function is None or slopes[i] is not None)]

    def run(backend: str) -> list[tuple[str, torch.Tensor]]:
        leaves = [x.clone().requires_grad_(derived) for x in (q, k)]
        given = [_leaf(x, device, i in learned) for i, x in enumerate(bound.args)]
        arguments: Any = {name: bound.mod(*given), "backend": backend, "return_lse": True}
        out, lse = attention(leaves[0], leaves[1], v, **arguments)  # the LSE shows what cancels in the weights
        lse = lse.masked_fill(lse == -torch.inf, 0)
        found = [("function", out.detach()), ("function", lse.detach())]
        if derived:
            wanted = [("slope", x) for x in leaves] + [(f"slope of argument {i}", given[i]) for i in learned]
            weighed = tuple(torch.cos(x.detach() * 3) for x in (out, lse))
            grads = torch.autograd.grad((out, lse), [x for _, x in wanted], weighed, allow_unused=True, materialize_grads=True)
            found += [(what, grad) for (what, _), grad in zip(wanted, grads, strict=True)]
        return found

    want = run("reference")
    compiled = device.type == "cpu" and not settings.interpreted() and settings.emulated_target() is None
    with emulated(target) if compiled else contextlib.nullcontext():
        got = run("triton")
    for (what, x), (_, expected) in zip(got, want, strict=True):
        apart, most = (x - expected).abs().max().item(), expected.abs().max().item()
        if not apart <= _TOLERANCE * max(most, 1e-3):
            which = "outputs" if what == "function" else "gradients"
            raise ValueError(f"{code.name}: its {what} does not fit its reference: {which} differ by {apart:.3g}, where they "
                             f"are {most:.3g} at most")


def _floats(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _leaf(x: Any, device: torch.device, learned: bool) -> Any:
    """An argument as one of a call in fp64, with a gradient if it is ``learned``."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().to(device)
    return x.double().requires_grad_(learned) if x.is_floating_point() else x
