"""What the programs here share: text that every machine has, training that shows its progress and resumes, pictures.

Every program takes --out FOLDER, --quick (a shortened run), --seed and --fresh (forget the checkpoints).
"""

import argparse
import dataclasses
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

SAVE_EVERY = 200  # steps


def arguments(description: str, name: str) -> argparse.Namespace:
    """The command line of a program."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("examples-output") / name, help="folder for pictures and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="train from the beginning, whatever was saved")
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    if parsed.fresh:
        for checkpoint in parsed.out.glob("*.pt"):
            checkpoint.unlink()
    torch.manual_seed(parsed.seed)
    return parsed


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

    The checkpoint ``out/name.pt`` is written every 200 steps and at the end, and taken up where it is of the same training.
    """
    run = {"steps": steps, "lr": lr, "seed": torch.initial_seed(), "parameters": sum(x.numel() for x in model.parameters())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history, path = History(), out / f"{name}.pt"
    saved = torch.load(path, weights_only=True) if path.exists() else None
    if saved is not None and saved["run"] != run:
        print(f"{name}: {path} is of another training; starting over")
    elif saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"][0])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["rng"][1:])
        history = History(saved["losses"], saved["seconds"])
        print(f"{name}: {len(history.losses)} of {steps} steps were done before")

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                 "rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
                 "run": run, "losses": history.losses, "seconds": history.seconds}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # never half a checkpoint

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


def summarise(results: dict[str, Any], out: Path) -> None:
    """Writes summary.json, with the conditions of the run."""
    conditions = {"device": str(device()), "torch": torch.__version__, "threads": torch.get_num_threads()}
    (out / "summary.json").write_text(json.dumps({**results, **conditions}, indent=1) + "\n", encoding="utf-8")
    print(f"pictures, checkpoints and summary.json in {out}")


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
    figure.savefig(path, dpi=150)
