"""The steps of the demo and what it leaves in its folder."""

import io
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import fused_attn
from fused_attn import files, settings
from fused_attn.tools import options, report
from fused_attn.tools.demo import data, plots, train
from fused_attn.tools.demo.model import GPT

PICTURES = ("loss.png", "attention.png")
FILES = ("summary.json", *PICTURES, "sample.txt", "checkpoint.pt")
PROMPT, TEMPERATURE = "def ", 0.8
MAP_BYTES = 56
STEP_TARGET, STEP_TOKENS, STEP_TOLERANCE = "sm_90", 48, 1e-4  # of the step on the kernels

_Result = TypeVar("_Result")


def run(console: Console, out: Path, recipe: train.Recipe, seed: int, check: Callable[[], dict[str, Any]]) -> int:
    """Runs every step in order; returns the exit status. Raises DemoError where going on makes no sense, and BadInputError
    where a file cannot be written; in both cases nothing is written."""
    options.writable(*(out / name for name in FILES))
    out.mkdir(parents=True, exist_ok=True)
    existing = [name for name in FILES if (out / name).exists()]
    if existing:
        console.print(f"{out} holds an earlier run; this one will overwrite {', '.join(existing)}")
    checked, seconds = _timed(check)
    if not checked["passed"]:
        raise data.DemoError(f"the check of backend {checked['backend']} above did not pass, so nothing was trained")
    steps: dict[str, dict[str, Any]] = {"check": {**checked, "seconds": seconds}}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = data.load(recipe.max_bytes)
    unigram = data.unigram_entropy(corpus.validation)
    backend = train.backend(recipe.model, recipe.batch, recipe.model.context, device)
    console.print(f"{corpus.files} modules of the Python standard library: {len(corpus.train):,} bytes to train on, "
                  f"{len(corpus.validation):,} held out; attention() runs on backend {backend} ({device.type})")
    with _bar(console, f"attention ({backend})", recipe.steps) as advance:
        model, fused = train.train(corpus, recipe, seed, fused_attn.attention, device, advance)
    steps["train_fused"] = _training(backend, fused)
    (sample, steps["generate"]), seconds = _timed(lambda: _sample(model, recipe.sample_bytes, seed, device))
    steps["generate"]["seconds"] = seconds
    (picture, steps["attention_map"]), seconds = _timed(lambda: _attention_picture(model, corpus, device))
    steps["attention_map"]["seconds"] = seconds
    weights = io.BytesIO()
    torch.save({"config": asdict(recipe.model), "model": model.state_dict()}, weights)
    for name, content in (("attention.png", picture), ("sample.txt", sample), ("checkpoint.pt", weights.getvalue())):
        files.write(out / name, content)  # before the other training: an interruption leaves them

    steps["step_on_kernels"], seconds = _timed(lambda: _step_on_kernels(corpus, recipe, seed, device))
    steps["step_on_kernels"]["seconds"] = seconds
    told = steps["step_on_kernels"]
    console.print(f"one step on the kernels: {told.get('not run') or told['backend']}"
                  + (f", gradients {told['gradient_difference']:.1g} from the reference's" if "loss" in told else ""))
    with _bar(console, "reference_attention", recipe.steps) as advance:
        _, reference = train.train(corpus, recipe, seed, fused_attn.reference_attention, device, advance)
    steps["train_reference"] = _training("reference", reference)

    comparison = train.compare(fused, reference)
    losses = {"validation_fused": fused.validation[-1][1], "validation_reference": reference.validation[-1][1],
              "unigram_entropy": unigram, "required_margin": recipe.margin}
    failures = _failures(losses, comparison, steps["step_on_kernels"])
    summary = {
        "passed": not failures,
        "failures": failures,
        "seed": seed,
        "conditions": _conditions(device),
        "losses_nats": losses,
        "comparison": comparison,
        "steps": steps,
        "data": {"source": "Python standard library, top-level modules", "files": corpus.files,
                 "train_tokens": len(corpus.train), "validation_tokens": len(corpus.validation)},
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": recipe.steps * recipe.batch * recipe.model.context,
        "pictures": PICTURES,
    }
    files.write(out / "loss.png", plots.losses(fused, reference, backend, unigram))
    files.write(out / "summary.json", json.dumps(summary, indent=2))

    console.print(f"validation loss {losses['validation_fused']:.3f} nats a byte, with the reference "
                  f"{losses['validation_reference']:.3f}; unigram entropy {unigram:.3f}")
    console.print(f"largest difference of the first {train.EARLY_STEPS} losses {comparison['early_max_difference']:.1g} "
                  f"(allowed {train.EARLY_TOLERANCE:g}), of the last validation losses "
                  f"{comparison['final_validation_difference']:.1g} (allowed {train.FINAL_TOLERANCE:g})")
    for failure in failures:
        console.print(f"demo failed: {failure}")
    console.print(f"{out.resolve()}: {', '.join(FILES)}")
    return 1 if failures else 0


def _timed(step: Callable[[], _Result]) -> tuple[_Result, float]:
    started = time.perf_counter()
    return step(), time.perf_counter() - started


def _failures(losses: dict[str, float], comparison: dict[str, Any], on_kernels: dict[str, Any]) -> list[str]:
    """What a training must reach and did not."""
    failures = []
    if on_kernels.get("gradient_difference", 0.0) > STEP_TOLERANCE:
        failures.append(f"gradients of a step on the kernels are {on_kernels['gradient_difference']:.1g} from the reference's, "
                        f"more than {STEP_TOLERANCE:g}")
    loss, unigram, margin = losses["validation_fused"], losses["unigram_entropy"], losses["required_margin"]
    if not loss <= unigram - margin:
        failures.append(f"validation loss {loss:.3f} is not {margin} below the unigram entropy {unigram:.3f}")
    if not comparison["passed"]:
        failures.append("trainings with attention and with reference_attention differ by more than is allowed")
    return failures


def _step_on_kernels(corpus: data.Corpus, recipe: train.Recipe, seed: int, device: torch.device) -> dict[str, Any]:
    """A step of training on the kernels themselves, wherever the training ran, beside the same step on the reference: on a CPU
    they are interpreted, or compiled for a card and executed in the emulator."""
    attend = partial(fused_attn.attention, backend="triton")
    emulates = device.type == "cpu" and not settings.interpreted()
    how = f"triton, emulated {STEP_TARGET}" if emulates else "triton, interpreted" if device.type == "cpu" else "triton"
    try:
        with fused_attn.emulated(STEP_TARGET) if emulates else nullcontext():
            loss, grads = train.first_step(corpus, recipe, seed, attend, device, STEP_TOKENS)
    except RuntimeError as error:  # without Triton, or a C compiler
        if not emulates or isinstance(error, fused_attn.emulator.EmulatorFault):
            raise
        return {"backend": how, "not run": str(error)}
    exact_loss, exact = train.first_step(corpus, recipe, seed, fused_attn.reference_attention, device, STEP_TOKENS)
    difference = float((grads - exact).norm() / exact.norm())
    return {"backend": how, "tokens": STEP_TOKENS, "loss": loss, "loss_reference": exact_loss,
            "gradient_difference": difference}


def _sample(model: GPT, count: int, seed: int, device: torch.device) -> tuple[bytes, dict[str, Any]]:
    prompt = torch.tensor([list(PROMPT.encode())], device=device)
    tokens = model.generate(prompt, count, TEMPERATURE, torch.Generator().manual_seed(seed))
    shortest, longest = (train.backend(model.config, 1, length, device) for length in (len(PROMPT), model.config.context))
    described = {"backend": shortest if shortest == longest else f"{shortest}, {longest}", "bytes": count, "prompt": PROMPT,
                 "temperature": TEMPERATURE}
    return bytes(tokens[0].tolist()).decode(errors="replace").encode(), described


@contextmanager
def _bar(console: Console, title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Shows a progress bar with the loss on it; yields the function that moves it."""
    columns = (TextColumn("{task.description:19}"), BarColumn(16), MofNCompleteColumn(),
               TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"))
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)


def _training(backend: str, history: train.History) -> dict[str, Any]:
    return {"backend": backend, "seconds": history.seconds, "first_loss": history.losses[0], "last_loss": history.losses[-1],
            "validation": [{"step": step, "loss": loss} for step, loss in history.validation]}


def _attention_picture(model: GPT, corpus: data.Corpus, device: torch.device) -> tuple[bytes, dict[str, Any]]:
    """The most focused head (least mean entropy of its rows) on the first function of the held-out text."""
    text = bytes(corpus.validation.tolist())
    start = max(text.find(b"def "), 0)
    text = text[start : start + min(MAP_BYTES, model.config.context)]
    weights = model.attention_weights(torch.tensor([list(text)], device=device))[:, 0].cpu()  # [layers, H, N, N]
    entropy = torch.special.entr(weights).sum(-1).mean(-1)
    layer, head = divmod(int(entropy.argmin()), model.config.heads)
    described = {"backend": "plain softmax", "layer": layer + 1, "head": head + 1, "text": text.decode(errors="replace")}
    return plots.attention_map(weights[layer, head], text, f"layer {layer + 1}, head {head + 1}"), described


def _conditions(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {**report.conditions(), "device": device.type, "device_name": name, "threads": torch.get_num_threads(),
            "dtype": "float32"}
