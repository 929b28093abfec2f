"""One learner of a run: what it learns from, its optimiser, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import Unsupported
from ..recipe.training import TrainingConfig
from ..tasks.task import Example
from .batches import Order, example_length, row_key
from .computation import Learner, Row, Sums
from .optimizer import FlatAdamW
from .schedule import rate_factor
from .stopping import Watch

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped early", "failed"
_SHOWN = 8  # rows of a step that went wrong
_EVALUATED_TOGETHER = 64  # rows between two looks at whether to stop


@dataclass
class History:
    """What a run leaves for the card.

    Attributes:
        kept_step: the step whose parameters were kept, where that is not the last one.
        ended: why it came to its end: "finished" or "stopped early".
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    kept_step: int | None = None
    ended: str = FINISHED


@dataclass(frozen=True)
class Course:
    """What a learner is to learn.

    Attributes:
        lines: where in its file each training example is, for messages; or nothing.
    """

    config: TrainingConfig
    train: Sequence[Example]
    validation: Sequence[Example] = ()
    name: str = ""
    lines: Sequence[int] = ()


class Member:
    """A learner with its course and its state; `index` is its place among those that are trained together."""

    def __init__(self, index: int, learner: Learner, course: Course) -> None:
        config = course.config
        self.index, self.course, self.config = index, course, config
        self.order = Order(config, course.train)
        self.optimizer = FlatAdamW(learner.parameters(), config.weight_decay)
        patience = config.early_stopping.patience if config.early_stopping else None
        metric = config.early_stopping.metric if config.early_stopping else "loss"
        self.watch = Watch(metric, patience)
        self.history = History()
        self.step, self.status, self.failure = 0, RUNNING, ""
        self._best: torch.Tensor | None = None
        validation = sorted(range(len(course.validation)), key=lambda i: example_length(course.validation[i]))
        self._validation = [course.validation[i] for i in validation]

    @property
    def keeps_best(self) -> bool:
        """Whether the parameters of the best evaluation are kept rather than those of the last step."""
        keep = self.config.keep or ("best" if self.config.early_stopping else "last")
        return keep == "best" and bool(self._validation)

    def rate(self, step: int) -> float:
        """The learning rate of step 0..total-1."""
        config = self.config
        return config.learning_rate * rate_factor(config.schedule, step, self.order.total, config.warmup)

    @property
    def is_active(self) -> bool:
        """Whether there is a step to come."""
        return self.status == RUNNING and self.step < self.order.total

    @property
    def owes_evaluation(self) -> bool:
        """Whether the validation part is to be measured now; a checkpoint may lie between a step and that."""
        if self.status == FAILED or not self.step or not self._validation:
            return False
        every = self.config.eval_every or self.order.steps_per_epoch
        due = self.step % every == 0 or self.step == self.order.total
        evaluated = self.history.evaluations
        return due and not (evaluated and evaluated[-1]["step"] == self.step)

    def rows(self) -> list[Row]:
        """The rows of the step to come."""
        seed, step = self.config.seed, self.step
        indices = self.order.rows(step)
        return [Row(self.course.train[i], self.index, row_key(seed, step, n)) for n, i in enumerate(indices)]

    def validation_rows(self) -> list[list[Row]]:
        """All validation rows in parts, rows of like lengths together."""
        rows = [Row(example, self.index) for example in self._validation]
        return [rows[i : i + _EVALUATED_TOGETHER] for i in range(0, len(rows), _EVALUATED_TOGETHER)]

    def learn(self, sums: Sums) -> bool:
        """Make the step whose gradients are summed; False, with the parameters as they were, if they are not finite."""
        rate, norm = self.rate(self.step), self.optimizer.mean(max(sums.count, 1))
        loss = sums.total / max(sums.count, 1)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found = f"Loss {loss:.4g}, gradient norm {norm:.4g} at step {self.step + 1}"
            self._fail(f"{found}: training diverged (learning rate {rate:.3g}, {self._places()}).")
            return False
        self.optimizer.step(rate, norm, self.config.max_grad_norm)
        self.history.losses.append(loss)
        self.history.tokens += sums.tokens
        self.step += 1
        return True

    def evaluated(self, sums: Sums) -> dict[str, float]:
        """Take note of the sums of the validation part; returns its metrics."""
        metrics = {"loss": sums.total / max(sums.count, 1)}
        if sums.hits is not None:
            metrics["accuracy"] = sums.hits / max(sums.count, 1)
        if self.watch.metric not in metrics:
            raise Unsupported(
                f"early_stopping.metric: {self.watch.metric} is not measured in training this task on this base.",
                "Use loss.",
            )
        if not math.isfinite(metrics["loss"]):
            found = f"Validation loss {metrics['loss']:.4g} after step {self.step}"
            self._fail(f"{found}: training diverged (learning rate {self.rate(self.step - 1):.3g}).")
            return metrics
        self.history.evaluations.append({"step": self.step, **metrics})
        if self.watch.see(self.step, metrics) and self.keeps_best:
            self._best = self.optimizer.values.detach().clone()
        if self.watch.has_enough and self.is_active:
            self.status = STOPPED
        return metrics

    def stop(self) -> None:
        """Make no further step."""
        if self.is_active:
            self.status = STOPPED

    def finish(self) -> None:
        """Bring the parameters that are kept into place."""
        self.history.ended = STOPPED if self.status == STOPPED else FINISHED
        if self._best is not None and self.watch.best_step != self.step:
            self.optimizer.set_values(self._best)
            self.history.kept_step = self.watch.best_step

    def _fail(self, failure: str) -> None:
        self.status, self.failure = FAILED, failure

    def _places(self) -> str:
        """Which rows the step to come takes."""
        indices = self.order.rows(self.step)
        places = sorted(self.course.lines[i] if self.course.lines else i for i in indices)
        shown = ", ".join(map(str, places[:_SHOWN])) + (", ..." if len(places) > _SHOWN else "")
        return f"{'lines' if self.course.lines else 'examples'} {shown}"

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and plain values from which `restore` goes on. The order of rows is a function of the step."""
        tensors = {**self.optimizer.tensors(), "losses": torch.tensor(self.history.losses, dtype=torch.float64)}
        if self._best is not None:
            tensors["best"] = self._best
        history = self.history
        plain: dict[str, Any] = {
            "step": self.step,
            "stopped": self.status == STOPPED,
            "evaluations": history.evaluations,
            "tokens": history.tokens,
            "seconds": history.seconds,
            "watch": self.watch.state(),
        }
        return tensors, plain

    def restore(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from `state()`.

        Raises:
            ValueError, LookupError, TypeError: it is not what a learner of this size leaves.
        """
        self._check(tensors, plain)
        self.step = plain["step"]
        self.optimizer.restore(tensors, self.step)
        self.history.losses = tensors["losses"].tolist()
        self.history.evaluations = [dict(one) for one in plain["evaluations"]]
        self.history.tokens, self.history.seconds = plain["tokens"], plain["seconds"]
        self.watch.restore(plain["watch"])
        self._best = tensors.get("best")
        self.status = STOPPED if plain["stopped"] else RUNNING

    def _check(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Raise ValueError, LookupError or TypeError of what a run could not go on from."""
        step, losses, best, watch = plain["step"], tensors["losses"], tensors.get("best"), plain["watch"]
        if type(step) is not int or not 0 <= step <= self.order.total:
            raise ValueError(f"step {step!r} is none of {self.order.total}")
        if losses.dtype != torch.float64 or losses.shape != (step,):
            raise ValueError(f"there are losses {losses.dtype} {list(losses.shape)} of {step} steps")
        values = self.optimizer.values
        if best is not None and (best.shape != values.shape or best.dtype != values.dtype):
            raise ValueError(f"best is {best.dtype} {list(best.shape)}, not {list(values.shape)}")
        named = [*plain["evaluations"], {"step": watch["best_step"], "waited": watch["waited"]}]
        numbers = [plain["tokens"], plain["seconds"], 0 if watch["best"] is None else watch["best"]]
        numbers += [value for one in named for value in (one["step"], *one.values())]
        if any(type(number) not in (int, float) for number in numbers):
            raise TypeError("a figure is no number")
