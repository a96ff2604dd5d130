"""What the programs here share: text that every machine has, training that shows its progress and resumes, pictures.

Every program takes --out FOLDER, --quick (a shortened run), --seed and --fresh (forget its checkpoints). Its files begin with
its name, so that programs may share a folder.
"""

import argparse
import dataclasses
import io
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fused_attn import files
from fused_attn.tools import options

SAVE_EVERY = 200  # steps


def run(description: str, name: str, trainings: Sequence[str], pictures: Sequence[str],
        main: Callable[[argparse.Namespace], None]) -> int:
    """A program from its command line to its exit status; ``trainings`` and ``pictures`` are those that it makes, by name."""
    parser = options.Parser(description=description)
    parser.add_argument("--out", type=options.folder, default=Path("examples-output"),
                        help="folder for pictures and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    parser.add_argument("--seed", type=options.whole(*options.SEEDS), default=0)
    parser.add_argument("--fresh", action="store_true", help="train from the beginning, whatever was saved")
    parser.set_defaults(program=name)

    def command(asked: argparse.Namespace) -> int:
        checkpoints = [file(asked, f"{training}.pt") for training in trainings]
        options.writable(*checkpoints, *(file(asked, f"{picture}.png") for picture in pictures), file(asked, "summary.json"))
        options.check_call(device())
        asked.out.mkdir(parents=True, exist_ok=True)
        for checkpoint in checkpoints if asked.fresh else ():
            checkpoint.unlink(missing_ok=True)
        torch.manual_seed(asked.seed)
        main(asked)
        return 0

    return options.run(parser, None, command)


def file(asked: argparse.Namespace, name: str) -> Path:
    """A file of the program's own in the folder that it was given: gpt-loss.png."""
    path: Path = asked.out / f"{asked.program}-{name}"
    return path


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stdlib(pattern: str = "*.py") -> Iterator[tuple[Path, str]]:
    """(path within the standard library, text) of its source files, in order of name."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob(pattern)):
        if "site-packages" in path.parts or "test" in path.relative_to(folder).parts[:1]:
            continue
        try:
            yield path.relative_to(folder), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


@dataclasses.dataclass
class History:
    """A training so far: the loss of every step, and the seconds it took, those before an interruption too."""

    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def train(name: str, model: nn.Module, loss_of: Callable[[Any], torch.Tensor], batch_at: Callable[[int], Any], steps: int,
          out: Path, *, lr: float = 1e-3, warmup: int = 50) -> History:
    """AdamW with a warm-up and a cosine; ``batch_at(step)`` must depend on the step alone, so that a resumed run is the same.

    The checkpoint ``out/name.pt`` is written every 200 steps and at the end, and taken up. Raises BadInputError where it is of
    another training, which is not written over.
    """
    run = {"steps": steps, "lr": lr, "seed": torch.initial_seed(), "parameters": sum(x.numel() for x in model.parameters())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history, path = History(), out / f"{name}.pt"
    try:
        saved = torch.load(path, weights_only=True) if path.exists() else None
        if saved is not None and saved["run"] != run:
            other = ", ".join(f"{what} {saved['run'].get(what)}, here {value}" for what, value in run.items()
                              if saved["run"].get(what) != value)
            raise options.BadInputError(f"{path} is of another training ({other}); choose another folder with --out, or give "
                                        "it up with --fresh")
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            torch.set_rng_state(saved["rng"][0])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(saved["rng"][1:])
            history = History(list(saved["losses"]), float(saved["seconds"]))
            print(f"{name}: {len(history.losses)} of {steps} steps were done before")
    except options.BadInputError:
        raise
    except Exception as error:  # whatever a file that was cut short, or is none of ours, makes of torch.load
        raise options.BadInputError(f"{path} is damaged or no checkpoint of {name} ({type(error).__name__}); delete it, or "
                                    "train from the beginning with --fresh") from error

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                 "rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
                 "run": run, "losses": history.losses, "seconds": history.seconds}
        content = io.BytesIO()
        torch.save(state, content)
        files.write(path, content.getvalue())  # never half a checkpoint

    model.train()
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=steps, completed=len(history.losses), loss=float("nan"))
        for step in range(len(history.losses), steps):
            started = time.perf_counter()
            loss = loss_of(batch_at(step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            history.losses.append(loss.item())
            history.seconds += time.perf_counter() - started
            bar.update(task, advance=1, loss=history.losses[-1])
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                save()
    model.eval()
    return history


def summarise(results: dict[str, Any], asked: argparse.Namespace) -> None:
    """Writes the program's summary.json, with the conditions of the run."""
    conditions = {"device": str(device()), "torch": torch.__version__, "threads": torch.get_num_threads()}
    summary = file(asked, "summary.json")
    files.write(summary, json.dumps({**results, **conditions}, indent=1) + "\n")
    print(f"pictures, checkpoints and {summary.name} in {asked.out}")


def smooth(values: list[float], span: int = 50) -> list[float]:
    """Running means over ``span`` values."""
    x = torch.tensor(values, dtype=torch.float64)
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), x.cumsum(0)))
    span = max(1, min(span, len(values)))
    result: list[float] = ((sums[span:] - sums[:-span]) / span).tolist()
    return result


def loss_picture(histories: dict[str, History], path: Path, title: str) -> None:
    """Loss against steps of several trainings."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, history in histories.items():
        axes.plot(smooth(history.losses), label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    files.write_figure(path, figure, dpi=150)
