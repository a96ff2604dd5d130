"""Trains the GPT, and compares two trainings that differ only in their attention."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import fused_attn
from fused_attn.tools.demo import data
from fused_attn.tools.demo.model import GPT, Attend, GPTConfig

# Two exact attentions round differently, and training amplifies the difference. Measured on a CPU, losses of about 3: 1e-6 in
# the first 50 steps, 1e-3 by step 800, 2e-5 in the final validation loss. A scale wrong by 1 % makes 1e-3 in 50 steps.
EARLY_STEPS, EARLY_TOLERANCE = 50, 1e-4
FINAL_TOLERANCE = 0.02


@dataclass(frozen=True)
class Recipe:
    """All that decides a training beside the seed. Losses are in nats a byte."""

    steps: int
    evaluations: int  # evenly spread; the last one follows the last step
    margin: float  # the validation loss must end this far below the unigram entropy
    sample_bytes: int
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    validation_windows: int = 256
    max_bytes: int = 4_000_000
    model: GPTConfig = field(default_factory=GPTConfig)


FULL = Recipe(steps=800, evaluations=8, margin=0.5, sample_bytes=500)
QUICK = Recipe(steps=120, evaluations=3, margin=0.2, sample_bytes=200)


@dataclass
class History:
    """What a training measured: the loss of every step, and (steps done, validation loss) now and then."""

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def backend(config: GPTConfig, batch: int, length: int, device: torch.device) -> str:
    """The backend that ``fused_attn.attention`` runs inside the model on tokens [batch, length]."""
    q = torch.empty(batch, config.heads, length, config.width // config.heads, device=device)
    return fused_attn.explain(q, q, q, causal=True).backend


@torch.no_grad()
def evaluate(model: GPT, tokens: torch.Tensor, count: int, device: torch.device) -> float:
    """Mean loss over ``count`` windows spread evenly over ``tokens``."""
    context = model.config.context
    starts = torch.linspace(0, len(tokens) - context - 1, count).long()
    losses = []
    for part in starts.split(32):
        inputs, targets = (x.to(device) for x in data.windows(tokens, part, context))
        losses.append(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum"))
    return float(torch.stack(losses).sum()) / (count * context)


def build(recipe: Recipe, seed: int, attend: Attend, device: torch.device) -> GPT:
    """A fresh model: its weights depend on the seed alone, not on the device or on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(recipe.model, attend).to(device)


def optimizer(model: GPT, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW that decays the matrices only; the learning rate warms up, then falls to a tenth along a cosine."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))

    def factor(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
        return min((step + 1) / recipe.warmup, 0.1 + 0.9 * cosine)

    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, factor)


def train(corpus: data.Corpus, recipe: Recipe, seed: int, attend: Attend, device: torch.device,
          report: Callable[[int, float], None]) -> tuple[GPT, History]:
    """One training from scratch; ``report(steps done, loss)`` follows every step.

    Raises DemoError as soon as a loss is not finite.
    """
    model, history = build(recipe, seed, attend, device), History()
    adamw, schedule = optimizer(model, recipe)
    evaluate_at = {recipe.steps * i // recipe.evaluations for i in range(1, recipe.evaluations + 1)}
    stream = data.batches(corpus.train, recipe.batch, recipe.model.context, seed)
    started = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        inputs, targets = (x.to(device) for x in next(stream))
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adamw.step()
        schedule.step()
        history.losses.append(loss.item())
        if not math.isfinite(history.losses[-1]):
            raise data.DemoError(f"the loss of step {step} is {history.losses[-1]}")
        if step in evaluate_at:
            history.validation.append((step, evaluate(model, corpus.validation, recipe.validation_windows, device)))
        report(step, history.losses[-1])
    history.seconds = time.perf_counter() - started
    return model, history


def first_step(corpus: data.Corpus, recipe: Recipe, seed: int, attend: Attend, device: torch.device,
               tokens: int) -> tuple[float, torch.Tensor]:
    """The loss of a fresh model on the beginning of one window, and the gradients of all its weights as one vector."""
    model = build(recipe, seed, attend, device)
    inputs, targets = (x[:1, :tokens].to(device) for x in next(data.batches(corpus.train, 1, recipe.model.context, seed)))
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def compare(fused: History, reference: History) -> dict[str, Any]:
    """How far two trainings lie apart, beside what is allowed: every early step, and the last validation loss."""
    differences = [abs(a - b) for a, b in zip(fused.losses, reference.losses, strict=True)]
    early, final = max(differences[:EARLY_STEPS]), abs(fused.validation[-1][1] - reference.validation[-1][1])
    return {
        "early_steps": EARLY_STEPS,
        "early_tolerance": EARLY_TOLERANCE,
        "early_max_difference": early,
        "final_tolerance": FINAL_TOLERANCE,
        "final_validation_difference": final,
        "max_difference_of_any_step": max(differences),
        "passed": early <= EARLY_TOLERANCE and final <= FINAL_TOLERANCE,
    }
