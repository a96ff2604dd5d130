"""The gates E and R over whole calls of any features: out, LSE and the gradient of every leaf against the reference in fp64."""

import torch

from support import oracle
from support.features import Call, Inputs, Leaves

FEW = 64  # different numbers, whose roundings do not average: P, dS and the output once each make up to 3


def packs(call: Call) -> bool:
    return call.shape.layout != "dense"


def as_heads(x: torch.Tensor, call: Call) -> torch.Tensor:
    """[T, H, ...] of packed sequences as the oracle has it, [1, H, T, ...]."""
    return x.transpose(0, 1)[None] if packs(call) else x


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return max(a, b, key=oracle.EPS.__getitem__)


def held_by(got: torch.Tensor, want: torch.Tensor, type_: torch.dtype) -> torch.Tensor:
    """``got`` in ``type_``, right where its own type has no number nearer to ``want``: fp16 has fewer small ones than bf16."""
    own = torch.finfo(got.dtype)
    if own.tiny <= torch.finfo(type_).tiny:
        return got.to(type_)
    return torch.where((got.double() - want).abs() <= own.tiny * own.eps / 2, want, got.double())


def check_bounded(inputs: Inputs, got: Leaves, dtype: torch.dtype, slack: float = 1.0) -> None:
    """E of out and of every gradient, over the whole and over single rows; the LSE to its own digits.

    ``got``: results of a call in ``dtype``, with the LSE where it was returned; ``slack`` widens the limits of E.
    """
    call, exact = inputs.call, inputs.to(torch.float64)
    want = exact.run("reference", with_lse="lse" in got)
    dlse = inputs.dlse[None] if call.shape.layout == "packed" else as_heads(inputs.dlse, call)
    dout = as_heads(inputs.dout, call) * (0 if "lse" in call.features else 1)
    leaves = {name: x.detach().requires_grad_() for name, x in exact.leaves.items()}
    others = {name: x for name, x in leaves.items() if name not in ("q", "k", "v")}
    # Operands may be of another type: their gradients err, and underflow, as the coarser of the two.
    held = {name: coarser(dtype, x.dtype) for name, x in got.items() if name != "lse"}
    amplitudes = {each: oracle.amplitudes_of(exact.described(leaves), dout, dlse if "lse" in got else None, each, others)
                  for each in {*held.values()}}
    for name, type_ in held.items():
        amplitude, largest = amplitudes[type_]
        assert got[name].shape == want[name].shape, f"{name}: shape {tuple(got[name].shape)}"
        assert torch.isfinite(got[name]).all(), f"{name} is not finite"
        bound = amplitude[name][0].transpose(0, 1) if packs(call) and name in ("out", "dq", "dk", "dv") else amplitude[name]
        whole, row = oracle.bounded_error(held_by(got[name], want[name], type_), want[name], bound, largest)
        limit = oracle.E_LIMIT[type_]
        limit_row = max(oracle.E_ROW_LIMIT, limit)
        few = want[name].unique().numel() < FEW
        assert whole <= slack * (limit_row if few else limit), f"{name}: E = {whole:.2f}"
        assert row <= slack * limit_row, f"{name}: worst row E = {row:.2f}"
    if "lse" in got:
        _check_lse(inputs, got["lse"], want["lse"], dtype, amplitudes[dtype][1])


def _check_lse(inputs: Inputs, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, largest: float) -> None:
    empty = want == -torch.inf
    assert torch.equal(got == -torch.inf, empty), "rows without a key differ"
    lse = want.masked_fill(empty, 0)
    error = (got.double().masked_fill(empty, 0) - lse).abs()
    precision = 2.0**-51 if dtype == torch.float64 else 2.0**-22
    # The cheap tanh of halves is exact to 2**-23 of the cap, whatever the score (kernels/score.py).
    cap = (inputs.extra.get("softcap") or 0.0) / 8 if dtype in (torch.float16, torch.bfloat16) else 0.0
    limit = 8 * precision * max(1.0, largest, cap, *lse.abs().flatten().tolist())
    assert error.numel() == 0 or error.max() <= limit, f"lse: off by {float(error.max()):.1e}, limit {limit:.1e}"


def check_ratio(inputs: Inputs, got: Leaves, dtype: torch.dtype) -> None:
    """R of out and of gradients of a thousand elements and more: of a few numbers the ratio is luck."""
    want = inputs.to(torch.float64).run("reference", with_lse=False)
    limit_out, limit_grad = oracle.max_r(dtype, max(inputs.call.shape.dim, inputs.call.shape.dim_v))
    for name in got.keys() - {"lse"}:
        if got[name].numel() >= 1000:
            ratio = oracle.error_ratio(got[name], want[name])
            assert ratio <= (limit_out if name == "out" else limit_grad), f"{name}: R = {ratio:.2f}"
