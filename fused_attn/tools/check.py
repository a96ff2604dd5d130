"""``fused-attn check``: the kernels against the fp64 reference on this machine, on the GPU, in the interpreter or emulated.

The measure is the error ratio R = |x - ref64| / |round(ref64) - ref64| in Frobenius norm: 1 is perfect rounding.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

import fused_attn
from fused_attn.emulator import EmulatorFault, Schedule, emulated
from fused_attn.kernels import launch
from fused_attn.plan.backends import kernel_device
from fused_attn.targets import arch_of
from fused_attn.tools import options
from fused_attn.tools.bench.oracle import error_ratio, max_r
from fused_attn.tools.report import conditions, print_table

Draw: TypeAlias = Callable[..., torch.Tensor]


def _biased(draw: Draw) -> dict[str, Any]:
    return {"causal": True, "bias": draw(1, 2, 256, 256), "alibi_slopes": draw(2).abs() * 0.1, "sinks": draw(2)}


def _masked(draw: Draw) -> dict[str, Any]:
    documents = (draw(1, 256) > 2).cumsum(1)
    return {"causal": True, "mask_mod": fused_attn.document_mask(documents), "dropout_p": 0.1}


# (name, attention's arguments, or a function that draws them, heads, key heads, queries, keys, head dim, head dim of v)
Case: TypeAlias = tuple[str, dict[str, Any] | Callable[[Draw], dict[str, Any]], int, int, int, int, int, int]
CASES: tuple[Case, ...] = (
    ("full", {}, 2, 2, 256, 256, 64, 64),
    ("causal", {"causal": True}, 2, 2, 256, 256, 64, 64),
    ("causal, grouped heads, lengths differ", {"causal": True}, 4, 2, 257, 300, 64, 64),
    ("window, head dims differ", {"window": (64, 16)}, 2, 1, 256, 256, 80, 40),
    ("softcap", {"causal": True, "softcap": 5.0}, 2, 2, 256, 256, 64, 64),
    ("bias, ALiBi, sinks", _biased, 2, 2, 256, 256, 64, 64),
    ("document mask, dropout", _masked, 2, 2, 256, 256, 64, 64),
)
RATIOS = ("R_out", "R_dq", "R_dk", "R_dv")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def run(target: str | None = None, schedule: Schedule | None = None) -> dict[str, Any]:
    """Runs every case; returns a JSON-able summary whose ``passed`` also demands that our kernels ran. Ctrl-C ends it, and it
    is not ``complete`` then. With a ``target`` the kernels are compiled for it and emulated, and ``launches`` says what they
    did."""
    device = torch.device("cpu") if target is not None else kernel_device()
    rows = []
    emulation: contextlib.AbstractContextManager[list[Any]] = contextlib.nullcontext([])
    if target is not None:
        emulation = emulated(target, schedule or Schedule())
    with launch.counted() as launches, options.until_interrupted() as interrupted, emulation as emulations:
        for dtype in DTYPES:
            for case in CASES:
                rows.append(_row(device, dtype, case))
    count = sum(launches.values())
    return {
        "backend": "triton",
        "where": f"emulated {target}" if target is not None else "interpreter" if device.type == "cpu" else arch_of(device),
        **({"launches": _counts(emulations)} if target is not None else {}),
        "device": str(device),
        "conditions": conditions(),
        "kernel_launches": count,
        "kernels": dict(launches),
        "rows": rows,
        "complete": not interrupted.is_set(),
        "passed": not interrupted.is_set() and count > 0 and all(row["ok"] for row in rows),
    }


def _row(device: torch.device, dtype: torch.dtype, case: Case) -> dict[str, Any]:
    name, arguments, heads, kv_heads, n_queries, n_keys, dim, dim_v = case
    limit_out, limit_grad = max_r(dtype, max(dim, dim_v))
    generator = torch.Generator(device).manual_seed(0)
    if callable(arguments):
        arguments = arguments(lambda *size: torch.randn(size, generator=generator, device=device))
    shapes = ((heads, n_queries, dim), (kv_heads, n_keys, dim), (kv_heads, n_keys, dim_v), (heads, n_queries, dim_v))
    *inputs, dout = (torch.randn(1, *shape, generator=generator, device=device).to(dtype) for shape in shapes)
    start = time.perf_counter()
    told = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
    try:
        got = _with_gradients(inputs, dout, {**arguments, "backend": "triton"})
    except EmulatorFault as fault:
        return {**told, **dict.fromkeys(RATIOS, "-"), "limits": str(fault), "seconds": round(time.perf_counter() - start, 2),
                "ok": False}
    seconds = time.perf_counter() - start
    exact = _with_gradients([x.double() for x in inputs], dout.double(), {**arguments, "backend": "reference"})
    ratios = [error_ratio(x, y) for x, y in zip(got, exact, strict=True)]
    ok = ratios[0] <= limit_out and max(ratios[1:]) <= limit_grad
    return {
        **told, **{key: round(ratio, 2) for key, ratio in zip(RATIOS, ratios, strict=True)},
        "limits": f"{limit_out:.3g} / {limit_grad:.3g}", "seconds": round(seconds, 2), "ok": ok,
    }


def _with_gradients(inputs: list[torch.Tensor], dout: torch.Tensor, arguments: dict[str, Any]) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.manual_seed(0)  # for dropout: both calls draw the same mask
    out = fused_attn.attention(*leaves, **arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _counts(emulations: list[tuple[str, Any]]) -> dict[str, Any]:
    from fused_attn.emulator import counts  # here, since it needs the machine, which is built only to emulate

    return {"kernels": counts.by_kernel(emulations), "lines": counts.by_line(emulations)}


def show_counts(launches: dict[str, Any]) -> None:
    """Prints what the kernels of an emulated run did."""
    kinds = list(dict.fromkeys(kind for row in launches["kernels"] for kind in row["instructions"]))
    print_table([{"kernel": row["kernel"], **{kind: row["instructions"].get(kind, 0) for kind in kinds}}
                 for row in launches["kernels"]], "instructions of warps or waves, as compiled")
    print_table([{key: value for key, value in row.items() if key != "instructions"} for row in launches["kernels"]],
                "memory: 32-byte sectors, shared wavefronts, and the least that would do")
    print_table(launches["lines"], "lines that made the most warp instructions")


def show(result: dict[str, Any]) -> None:
    """Prints what ``run`` found."""
    versions = result["conditions"]
    print_table(result["rows"], f"kernels against fp64 on {result['device']} ({result['where']}), torch {versions['torch']}, "
                                f"Triton {versions['triton']}; R = 1 is perfect rounding")
    launches = ", ".join(f"{name} {count}" for name, count in result["kernels"].items()) or "none"
    print(f"kernel launches: {launches}")
    reason = "no kernel of ours ran" if not result["kernel_launches"] else "see the table"
    print("interrupted" if not result["complete"] else "passed" if result["passed"] else f"FAILED: {reason}")
