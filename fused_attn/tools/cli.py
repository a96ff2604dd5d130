"""The command line: ``fused-attn`` or ``python -m fused_attn``. Every command checks what it was asked before it works."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fused_attn
from fused_attn import emulator, settings
from fused_attn.plan import backends, tuned
from fused_attn.plan.tiles import MAX_HEAD_DIM
from fused_attn.startup import PROGRAM
from fused_attn.targets import KNOWN
from fused_attn.tools import options
from fused_attn.tools.bench import command as bench  # imports no Triton: what it times says whether kernels are interpreted

FEATURES = ("plain", "softcap", "bias", "bias bf16", "bias fp32, mask", "alibi", "relative", "mask", "sinks", "dropout",
            "packed", "additive", "rotary", "decode", "fused")
TUNED = tuned.KERNELS
OF_ONE_TARGET = ("head_dim", "dtype", "causal", "feature", "hopper", "which", "json", "gate")  # options of compile


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = options.Parser(prog=PROGRAM, description="Fused attention in Triton: look, check, compile, try.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {fused_attn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, devices and what would run where")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="kernels against the reference on this machine")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--emulate", choices=emulator.TARGETS, metavar="TARGET",
                       help=f"compile for a card that is not here and execute what comes: {', '.join(emulator.TARGETS)}")
    check.add_argument("--counts", action="store_true", help="what the emulated kernels did, by kind and by line")
    check.add_argument("--seed", type=options.whole(*options.SEEDS), default=0, help="of the emulator's schedule")
    check.add_argument("--hopper", choices=settings.HOPPER_CHOICES, default=settings.hopper_schedule(),
                       help="kernels of sm_90 (fused_attn.hopper)")
    check.set_defaults(run=partial(_check, check))

    explain = commands.add_parser("explain", help="which backend answers a call here, and every reason against the others")
    bench.add_shape(explain)
    explain.add_argument("--with", dest="added", choices=bench.ADDED, nargs="+", default=[], metavar="WHAT",
                         help=f"what the call has besides: {', '.join(bench.ADDED)}")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(run=_explain)

    timing = commands.add_parser("bench", help="time attention on your own shapes, beside what else is here",
                                 description=bench.__doc__)
    bench.add_arguments(timing)
    timing.set_defaults(run=_bench)

    _add_compile(commands.add_parser("compile", help="compile the kernels for any target, no GPU needed"))
    _add_tune(commands.add_parser("tune", help="find what is quickest on this card, prove it, and keep it in a file"))

    demo = commands.add_parser("demo", help="check, then train a small GPT on real text and look at it")
    demo.add_argument("--out", type=options.folder, default=Path("demo-output"), help="folder for pictures, sample and summary")
    demo.add_argument("--quick", action="store_true", help="a shortened run")
    demo.add_argument("--seed", type=options.whole(*options.SEEDS), default=0)
    demo.set_defaults(run=_demo)

    return options.run(parser, argv, lambda asked: asked.run(asked))


def _add_compile(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", choices=KNOWN, metavar="TARGET", help=", ".join(KNOWN))
    what.add_argument("--matrix", action="store_true",
                      help="every target, head dim and dtype; with --profile all that docs/profile.json holds")
    parser.add_argument("--head-dim", type=options.whole(1, MAX_HEAD_DIM), metavar="D", nargs="+", default=[128],
                        help=f"1 to {MAX_HEAD_DIM} (128)")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32", "tf32", "tf32x3", "fp64"), nargs="+", default=["bf16"])
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--feature", choices=FEATURES, default="plain", help="what the kernels do beside plain attention")
    parser.add_argument("--hopper", choices=settings.HOPPER_SCHEDULES, default="pointers",
                        help="kernels of sm_90, forward (fused_attn.hopper)")
    parser.add_argument("--pass", dest="which", choices=("forward", "backward", "all"), default="all")
    parser.add_argument("--json", action="store_true", help="print one JSON object a kernel")
    parser.add_argument("--gate", action="store_true", help="fail when a kernel breaks the rules for defaults")
    parser.add_argument("--profile", action="store_true", help="occupancy and main loops instead: the static profile")
    parser.add_argument("--out", type=options.file(".json"),
                        help="write the rows to this JSON file, of --profile also as a table beside it (.md)")
    parser.set_defaults(run=partial(_compile, parser))


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=("tiles", "schedules", "splits"), nargs="+", default=["tiles", "schedules", "splits"],
                        help="tiles of kernels, schedules of both passes, splits of decoding (all)")
    parser.add_argument("--kernel", choices=TUNED, nargs="+", default=list(TUNED), help="whose tiles are searched (all)")
    parser.add_argument("--head-dim", type=options.whole(1, tuned.WIDEST), metavar="D", nargs="+", default=[64, 128],
                        help=f"1 to {tuned.WIDEST} (64 128)")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="bf16", help="both use what is found")
    parser.add_argument("--length", type=options.whole(*options.SIZES), default=4096,
                        help="of the sequences that are timed (4096)")
    parser.add_argument("--minutes", type=options.real(0), default=30.0, help="after which what was found so far is kept (30)")
    parser.add_argument("--again", action="store_true", help="search what the file has already, too")
    parser.add_argument("--out", type=options.file(), help="the file, for FUSED_ATTN_TILES; by default the one used here")
    parser.set_defaults(run=_tune)


def _prepare_kernels() -> None:
    """Makes the kernels run in Triton's interpreter where no GPU can run them; this must precede their import."""
    options.need("triton", "triton")
    if backends.kernel_device().type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    _check_tiles()


def _check_tiles() -> None:
    """Reads the tiles that FUSED_ATTN_TILES names before the kernels do."""
    device = backends.kernel_device()
    if settings.TILES is not None and (device.type != "cpu" or settings.interpreted()):
        try:
            tuned.tuned(device)
        except ValueError as error:
            raise options.BadInputError(str(error)) from error


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from fused_attn.tools import report

    found: dict[str, Any] = {**report.conditions(), "devices": {}}
    for device in (torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))):
        reasons = backends.device_reasons(device.type, device.index)
        default = "torch" if device.type == "cpu" or reasons else "triton"
        found["devices"][str(device)] = {"default_backend": default, "against_kernels": list(reasons)}
        if device.type != "cpu":
            found["devices"][str(device)]["tiles"] = str(tuned.path(device) or "as shipped")
    found["environment"] = {"backend": settings.BACKEND, "strict": settings.is_strict(None),
                            "hopper": settings.hopper_schedule(),
                            "interpreter": settings.interpreted(), "deterministic": settings.DETERMINISTIC}
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    devices, environment = found.pop("devices"), found.pop("environment")
    for name, value in found.items():
        print(f"{name:12} {value}")
    for name, facts in devices.items():
        print(f"{name:12} default backend {facts['default_backend']}; kernels: {'; '.join(facts['against_kernels']) or 'yes'}")
        if "tiles" in facts:
            print(f"{name:12} tiles {facts['tiles']}")
    print(f"{'environment':12} {', '.join(f'{name} {value}' for name, value in environment.items())}")
    return 0


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    given = [name for name in ("counts", "seed", "hopper") if getattr(arguments, name) != parser.get_default(name)]
    if arguments.emulate is None and given:
        parser.error(f"--{given[0]} goes with --emulate")
    if arguments.emulate is None:
        _prepare_kernels()
    else:
        options.need("triton", "triton")
        os.environ["TRITON_INTERPRET"] = "0"
    from fused_attn.tools import check

    try:
        with fused_attn.hopper(arguments.hopper):
            result = check.run(arguments.emulate, emulator.Schedule(seed=arguments.seed))
    except RuntimeError as error:
        if arguments.emulate is None:
            raise
        raise options.BadInputError(str(error)) from error
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        check.show(result)
        if arguments.counts:
            check.show_counts(result["launches"])
    return options.status(result["complete"], result["passed"])


def _explain(arguments: argparse.Namespace) -> int:
    device = options.device(arguments.device)
    found = {subject.name: bench.explanation(subject, device, arguments.added) for subject in bench.cases(arguments, device)}
    if arguments.json:
        print(json.dumps({name: dataclasses.asdict(told) for name, told in found.items()}, indent=1))
    for name, told in () if arguments.json else found.items():
        print(f"{' with '.join([name, *arguments.added])}, {device}\n{told}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    _check_tiles()
    return bench.run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    options.need("rich", "examples")
    options.need("matplotlib", "examples")
    _prepare_kernels()
    from fused_attn.tools import check, demo

    def checked() -> dict[str, Any]:
        result = check.run()
        check.show(result)
        options.status(result["complete"], result["passed"])
        return result

    return demo.run(arguments.out, arguments.quick, arguments.seed, checked)


def _tune(arguments: argparse.Namespace) -> int:
    if not settings.interpreted() and backends.kernel_device().type == "cpu":
        raise options.BadInputError("there is no GPU here that the kernels run on")
    options.need("triton", "triton")
    options.need("rich", "cli")
    from fused_attn.tools import tune

    return tune.run(arguments)


def _compile(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    given = [name for name in OF_ONE_TARGET if getattr(arguments, name) != parser.get_default(name)]
    if arguments.matrix and given:
        parser.error(f"--matrix compiles everything: --{given[0].replace('_', '-')} goes with --target")
    options.need("triton", "triton")
    os.environ["TRITON_INTERPRET"] = "0"  # compiled, whatever the surroundings interpret
    from fused_attn.tools.compile import matrix

    return matrix.run(arguments.out, arguments.profile) if arguments.matrix else matrix.compile_one(arguments)
