"""The command line: ``fused-attn`` or ``python -m fused_attn``."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_attn.settings import RUNGS

FEATURES = ("plain", "softcap", "bias", "bias fp32, mask", "alibi", "relative", "mask", "sinks", "dropout", "packed",
            "additive", "rotary", "decode", "fused")
TUNED = ("forward", "dq", "dkv", "fused")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="fused-attn", description="Fused attention in Triton: look, check, compile, try.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, devices and what would run where")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="kernels against the reference on this machine")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)

    from fused_attn.bench import command  # imports no Triton: what it times says whether kernels are interpreted

    bench = commands.add_parser("bench", help="time attention on your own shapes, beside what else is here",
                                description=command.__doc__)
    command.add_arguments(bench)
    bench.set_defaults(run=command.run)

    compile_ = commands.add_parser("compile", help="compile the kernels for any target, no GPU needed")
    compile_.add_argument("--target", help="sm_80, sm_90, gfx942, ...")
    compile_.add_argument("--head-dim", type=int, choices=range(1, 577), metavar="D", nargs="+", default=[128],
                          help="1 to 576")
    compile_.add_argument("--dtype", choices=("fp16", "bf16", "fp32", "tf32", "tf32x3", "fp64"), nargs="+", default=["bf16"])
    compile_.add_argument("--causal", action="store_true")
    compile_.add_argument("--feature", choices=FEATURES, default="plain", help="what the kernels do beside plain attention")
    compile_.add_argument("--rung", choices=RUNGS, default="pointers", help="kernels of sm_90, forward (fused_attn.hopper)")
    compile_.add_argument("--pass", dest="which", choices=("forward", "backward", "all"), default="all")
    compile_.add_argument("--json", action="store_true", help="print one JSON object a kernel")
    compile_.add_argument("--gate", action="store_true", help="fail when a kernel breaks the rules for defaults")
    compile_.add_argument("--profile", action="store_true", help="occupancy and main loops instead: the static profile")
    compile_.add_argument("--matrix", action="store_true",
                          help="every target, head dim and dtype; with --profile all that docs/profile.json holds")
    compile_.add_argument("--out", type=Path,
                          help="with --matrix: write the rows to this JSON file, of --profile also as a table beside it (.md)")
    compile_.set_defaults(run=_compile)

    tune = commands.add_parser("tune", help="search better tiles for this card, by timing, and keep them in a file")
    tune.add_argument("--kernel", choices=TUNED, nargs="+", default=list(TUNED))
    tune.add_argument("--head-dim", type=int, choices=range(1, 257), metavar="D", nargs="+", default=[64, 128], help="1 to 256")
    tune.add_argument("--dtype", choices=("fp16", "bf16"), default="bf16", help="both use what is found")
    tune.add_argument("--length", type=int, default=4096, help="of the sequences that are timed")
    tune.add_argument("--minutes", type=float, default=30, help="after which what was found so far is kept")
    tune.add_argument("--again", action="store_true", help="search what the file has already, too")
    tune.add_argument("--out", type=Path, help="the file, for FUSED_ATTN_TILES; by default the one used here")
    tune.set_defaults(run=_tune)

    demo = commands.add_parser("demo", help="check, then train a small GPT on real text and look at it")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for pictures, sample and summary")
    demo.add_argument("--quick", action="store_true", help="a shortened run")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _prepare_kernels() -> None:
    """Has the kernels run in Triton's interpreter where no GPU can run them; must precede their import."""
    from fused_attn import dispatch

    if importlib.util.find_spec("triton") is None:
        raise SystemExit("fused-attn: the kernels need Triton: pip install 'fused-attn[triton]'")
    if dispatch.kernel_device().type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from fused_attn import dispatch, report, settings, tuned

    for name, value in report.conditions().items():
        print(f"{name:12} {value}")
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        reasons = dispatch.device_reasons(torch.device(device).type, torch.device(device).index)
        default = "torch" if device == "cpu" or reasons else "triton"
        print(f"{device:12} default backend {default}; kernels: {'; '.join(reasons) or 'yes'}")
    for i in range(torch.cuda.device_count()):
        print(f"{f'cuda:{i}':12} tiles {tuned.path(torch.device('cuda', i)) or 'as shipped'}")
    print(f"{'environment':12} backend {settings.BACKEND}, strict {settings.is_strict(None)}, "
          f"interpreter {settings.interpreted()}, deterministic {settings.DETERMINISTIC}, hopper {settings.rung()}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    _prepare_kernels()
    from fused_attn import check

    result = check.run()
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        check.show(result)
    return 0 if result["passed"] else 1


def _demo(arguments: argparse.Namespace) -> int:
    _prepare_kernels()
    from fused_attn import check, demo

    def checked() -> dict[str, Any]:
        result = check.run()
        check.show(result)
        return result

    return demo.run(arguments.out, arguments.quick, arguments.seed, checked)


def _tune(arguments: argparse.Namespace) -> int:
    from fused_attn import dispatch, settings

    if not settings.interpreted() and dispatch.kernel_device().type == "cpu":
        print("fused-attn tune: there is no GPU here that the kernels run on", file=sys.stderr)
        return 1
    from fused_attn import tune

    return tune.run(arguments)


def _compile(arguments: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "0"  # compiled, whatever the surroundings interpret
    from fused_attn import matrix

    if arguments.matrix:
        return matrix.run(arguments.out, arguments.profile)
    if arguments.target is None:
        print("fused-attn compile: --target or --matrix is needed", file=sys.stderr)
        return 2
    return matrix.compile_one(arguments)
