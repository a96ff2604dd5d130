"""What every command of the project shares: options with ranges, and one-line errors where it cannot do what it was asked.

Bad input ends a command with status 2 before it does any work, Ctrl-C with 130. All use argparse, as some of the commands run
on machines where nothing but torch and Triton is installed.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fused_attn import files
from fused_attn.api import explain

PICTURES = (".png", ".svg", ".pdf")
SIZES = (1, 2**31 - 1)  # of what a tensor has: batches, heads, rows
SEEDS = (0, 2**63 - 1)
COUNTS = (1, 1_000_000)  # of rounds, and of whatever else is done one after the other
DEVICES = ("cuda", "cpu")


class BadInputError(Exception):
    """A command was asked for what makes no sense, or for what needs something that is not here."""


class Parser(argparse.ArgumentParser):
    """A parser, of a command or of its subcommands, whose errors are one line; how to call it is in ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an option: a whole number within a range."""

    def value(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (number := int(text)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}; got {text!r:.80}")

    return value


def real(least: float, *, open_below: bool = False) -> Callable[[str], float]:
    """The type of an option: a finite number from ``least`` on, or beyond it."""

    def value(text: str) -> float:
        with contextlib.suppress(ValueError):
            number = float(text)
            if math.isfinite(number) and (number > least or (number == least and not open_below)):
                return number
        raise argparse.ArgumentTypeError(
            f"expected a finite number {'above' if open_below else 'of at least'} {least:g}; got {text!r:.80}")

    return value


def file(*suffixes: str) -> Callable[[str], Path]:
    """The type of an option: a file that can be written here and now, with one of these endings if any are given."""

    def value(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(suffixes)}; got {text!r}")
        if reason := files.against(path):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {reason}")
        return path

    return value


def writable(*paths: Path) -> None:
    """Raises BadInputError where one of the files that a command will write cannot be written."""
    for path in paths:
        if reason := files.against(path):
            raise BadInputError(f"{str(path)!r} cannot be written: {reason}")


def folder(text: str) -> Path:
    """The type of an option: a folder that files can be written to, made where it is missing."""
    path = Path(text)
    if reason := files.against(path / "file"):
        raise argparse.ArgumentTypeError(f"no files can be written to {text!r}: {reason}")
    return path


def device(asked: str | None) -> str:
    """The one of ``DEVICES`` that was asked for, else a GPU where there is one. Raises BadInputError where a GPU is missing."""
    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise BadInputError("--device cuda: torch finds no GPU here")
    return asked or ("cuda" if found else "cpu")


def check_call(device: str | torch.device, **arguments: Any) -> None:
    """Raises BadInputError where the environment asks for a backend that cannot answer such calls of ``attention`` here."""
    q = torch.empty(1, 1, 8, 16, device=device)
    try:
        explain(q, q, q, **arguments)
    except (ValueError, RuntimeError) as error:
        raise BadInputError(str(error)) from error


def need(module: str, extra: str) -> None:
    """Raises BadInputError where a package of an extra is not installed."""
    with contextlib.suppress(ImportError, ValueError):
        if importlib.util.find_spec(module) is not None:
            return
    raise BadInputError(f"needs {module}: pip install 'fused-attn[{extra}]'")


@contextlib.contextmanager
def until_interrupted() -> Iterator[threading.Event]:
    """Ctrl-C ends the code within and sets the event that is yielded; the code after it can show and keep what there is."""
    interrupted = threading.Event()
    try:
        yield interrupted
    except KeyboardInterrupt:
        interrupted.set()


def status(complete: bool, ok: bool) -> int:
    """The exit status of a command that has shown and kept what it had; raises an earlier interruption again."""
    if not complete:
        raise KeyboardInterrupt
    return 0 if ok else 1


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], int]) -> int:
    """Runs a command on its parsed arguments; returns its exit status. Whatever ends it early becomes one line on stderr."""
    program = parser.prog
    _open_streams()
    try:
        try:
            asked = parser.parse_args(argv)
            program = " ".join(filter(None, (parser.prog, getattr(asked, "command", None))))
            done = command(asked)
        except SystemExit as stopped:  # of the parser: its errors, --help and --version
            if not isinstance(stopped.code, int):
                raise
            done = stopped.code
        sys.stdout.flush()
    except BadInputError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has seen enough
        _leave_output()
        return 141
    except OSError as error:  # a disk that is full, for one
        print(f"{program}: {error}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _leave_output()
        return 2
    return done


def _open_streams() -> None:
    """Opens the streams that the process was started without (``>&-``), which else would be the next file that it opens."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as the process lasts


def _leave_output() -> None:
    """Discards what is left of the output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
