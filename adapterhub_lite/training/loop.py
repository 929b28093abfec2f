"""The training loop: batches, gradients, AdamW, schedule, progress. Knows parameters and examples, not stores."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import TrainingFailed
from ..events import Evaluated, Listener, Step
from ..recipe.schema import TrainingConfig
from ..tasks.task import Example
from .batches import epoch_batches, example_length
from .objective import Objective
from .schedule import rate_factor
from .trainable import Trainable

# Speed and remaining time are those of the last steps: the first ones are slower.
_WINDOW = 20


@dataclass
class History:
    """What a run leaves for the card."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Plan:
    steps_per_epoch: int
    total: int


def run_loop(
    config: TrainingConfig,
    adapter: Trainable,
    parameters: list[nn.Parameter],
    objective: Objective,
    train: Sequence[Example],
    validation: Sequence[Example],
    on_event: Listener,
) -> History:
    """Minimise the mean loss over supervised items, `gradient_accumulation` batches to a step.

    Raises:
        TrainingFailed: a loss or gradient is not finite, or memory ran out. Parameters are then of no use.
    """
    plan = _plan(config, len(train))
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    history = History()
    recent: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)], maxlen=_WINDOW + 1)
    started = time.perf_counter()
    stream = _steps(config, train, plan)
    for step, batches in enumerate(stream):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(config.schedule, step, plan.total, config.warmup)
        loss, tokens = _one_step(config, adapter, parameters, objective, [[train[i] for i in b] for b in batches], step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.losses.append(loss)
        history.tokens += tokens
        recent.append((time.perf_counter(), history.tokens))
        on_event(_progress(step, plan, loss, optimizer.param_groups[0]["lr"], recent))
        if validation and _evaluate_now(config, step, plan):
            metrics = evaluate_loss(adapter, objective, validation, config.batch_size)
            history.evaluations.append({"step": step + 1, **metrics})
            on_event(Evaluated("validation", step + 1, metrics))
    history.seconds = time.perf_counter() - started
    return history


def evaluate_loss(
    adapter: Trainable, objective: Objective, examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """Mean loss per supervised item, and accuracy where the objective counts hits; dropout off."""
    order = sorted(range(len(examples)), key=lambda i: example_length(examples[i]))
    adapter.train(False)
    objective.train(False)
    total, count = 0.0, 0
    hits: int | None = None
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                found = objective(adapter, [examples[i] for i in order[start : start + batch_size]])
                total, count = total + float(found.total), count + found.count
                hits = hits if found.hits is None else (hits or 0) + found.hits
    finally:
        adapter.train(True)
        objective.train(True)
    return {"loss": total / count, **({} if hits is None else {"accuracy": hits / count})}


def _plan(config: TrainingConfig, examples: int) -> _Plan:
    batches = math.ceil(examples / config.batch_size)
    per_epoch = math.ceil(batches / config.gradient_accumulation)
    total = max(1, round(per_epoch * config.epochs))
    return _Plan(per_epoch, total if config.max_steps is None else min(total, config.max_steps))


def _steps(config: TrainingConfig, train: Sequence[Example], plan: _Plan) -> Iterator[list[list[int]]]:
    """The batches of each optimiser step; a step does not reach over the end of an epoch."""
    lengths = [example_length(e) for e in train]
    done = 0
    for epoch in itertools.count():
        batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
        while group := list(itertools.islice(batches, config.gradient_accumulation)):
            if done == plan.total:
                return
            yield group
            done += 1


def _one_step(
    config: TrainingConfig,
    adapter: Trainable,
    parameters: list[nn.Parameter],
    objective: Objective,
    batches: list[list[Example]],
    step: int,
) -> tuple[float, int]:
    """Gradients of the mean loss over all supervised items of the step, clipped; returns (mean loss, tokens)."""
    total, count, tokens = 0.0, 0, 0
    try:
        for batch in batches:
            found = objective(adapter, batch)
            found.total.backward()  # type: ignore[no-untyped-call]
            total, count, tokens = total + float(found.total.detach()), count + found.count, tokens + found.tokens
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(
            f"Out of memory at step {step + 1} with batch_size {config.batch_size}.",
            "Lower training.batch_size and raise training.gradient_accumulation.",
        ) from error
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= count
    norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    if not math.isfinite(total) or not math.isfinite(norm):
        raise TrainingFailed(
            f"Loss {total / max(count, 1):.4g}, gradient norm {norm:.4g} at step {step + 1}: training diverged.",
            f"Lower training.learning_rate ({config.learning_rate:g}) or add training.warmup. Nothing was published.",
        )
    return total / count, tokens


def _progress(step: int, plan: _Plan, loss: float, rate: float, recent: deque[tuple[float, int]]) -> Step:
    seconds = recent[-1][0] - recent[0][0]
    speed = (recent[-1][1] - recent[0][1]) / max(seconds, 1e-9)
    eta = (plan.total - step - 1) * seconds / max(len(recent) - 1, 1)
    return Step(step + 1, plan.total, (step + 1) / plan.steps_per_epoch, loss, rate, speed, eta)


def _evaluate_now(config: TrainingConfig, step: int, plan: _Plan) -> bool:
    every = config.eval_every or plan.steps_per_epoch
    return (step + 1) % every == 0 or step + 1 == plan.total
