"""Both sides of a training run: ours, and transformers' Trainer with PEFT, update by update.

Timed are optimiser updates alone, the first of every run left out as warm-up: ours from one Step event to the next
(batches, gradients, clipping, update), Trainer's from its `on_step_begin` to its `on_step_end`. Neither loading, nor
wrapping, nor logging is in it; of ours the event is. Tokens are counted from the examples, without padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adapterhub_lite.bases.load import Base
from adapterhub_lite.bases.quantization import quantization_config
from adapterhub_lite.bases.quiet import quiet
from adapterhub_lite.events import Event, Step
from adapterhub_lite.tasks.task import Example
from adapterhub_lite.training.computation import Settings
from adapterhub_lite.training.train import train_adapter

from .common import synchronise
from .training_cases import Case


@dataclass(frozen=True)
class Update:
    """One optimiser update: its seconds, real tokens, mean loss, and tokens with padding."""

    seconds: float
    tokens: int
    loss: float
    padded: int


@dataclass(frozen=True)
class Run:
    """All updates of a run; `busy` is the share of its processor cores that it had while it was timed."""

    updates: Sequence[Update]
    busy: float = 1.0

    @property
    def timed(self) -> Sequence[Update]:
        """All but the first update."""
        return self.updates[1:]

    @property
    def tokens(self) -> int:
        """Real tokens of all updates."""
        return sum(update.tokens for update in self.updates)

    @property
    def per_thousand(self) -> float:
        """Seconds of 1,000 real tokens."""
        return 1000 * sum(u.seconds for u in self.timed) / sum(u.tokens for u in self.timed)

    @property
    def last_half(self) -> float:
        """Mean loss of the last half of the updates."""
        losses = [update.loss for update in self.updates]
        kept = losses[len(losses) // 2 :]
        return sum(kept) / len(kept)


class Clock:
    """Seconds of updates, and how busy the processor was with us from the second update on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._from: tuple[float, float] | None = None
        self._begun = 0.0

    def begin(self) -> None:
        """An update begins."""
        synchronise()
        self._begun = time.perf_counter()

    def end(self) -> None:
        """It ends."""
        synchronise()
        now = time.perf_counter()
        self.seconds.append(now - self._begun)
        self._to = (now, time.process_time())
        self._from = self._from or self._to

    @property
    def busy(self) -> float:
        """Share of the cores, 1 where too little was timed."""
        if self._from is None or self._to[0] <= self._from[0]:
            return 1.0
        share = (self._to[1] - self._from[1]) / (self._to[0] - self._from[0])
        return share / torch.get_num_threads()


def run_ours(case: Case, settings: Settings | None = None) -> Run:
    """Train with our public API; `settings` say how, else it is computed as `Settings` are by themselves."""
    clock = Clock()
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Step):
            clock.end()
            losses.append(event.loss)
            clock.begin()

    clock.begin()
    found = train_adapter(case.recipe, case.base, case.examples, labels=case.labels, settings=settings, on_event=listen)
    counts = [sum(len(example.ids) for example in rows) for rows in case.order()]
    assert len(counts) == len(losses) == len(found.history.losses)
    made = zip(clock.seconds, counts, losses, strict=True)
    return Run([Update(seconds, tokens, loss, tokens) for seconds, tokens, loss in made], clock.busy)


@dataclass(frozen=True)
class Peer:
    """How Trainer is run.

    Attributes:
        flat: rows one after another without padding (DataCollatorWithFlattening; attention stays within rows).
        autocast: `bf16=True`.
        dtype: of the weights.
        same_order: the rows in the order in which ours takes them, else Trainer's own random one.
    """

    name: str = "Trainer"
    flat: bool = False
    autocast: bool = False
    dtype: torch.dtype = torch.float32
    same_order: bool = False


DEFAULTS = Peer("Trainer")
CANDIDATES = (
    Peer("Trainer by length", same_order=True),
    Peer("Trainer flat", flat=True, same_order=True),
    Peer("flat, bf16", flat=True, autocast=True, same_order=True),
    Peer("flat, all bf16", flat=True, dtype=torch.bfloat16, same_order=True),
)
"""Public settings that may be fastest. `torch_compile` is none of them: it compiles anew for new lengths, for minutes
on a CPU. Workers of the data loader have nothing to do, since the examples are token ids already."""


def run_peer(case: Case, peer: Peer, start: Path) -> Run:
    """Train a fresh copy of the model with Trainer and PEFT from the adapter in folder `start`."""
    with quiet():
        wrapped = wrap(load_plain(case, peer.dtype), start)
        return run_trainer(case, wrapped, peer)


def load_plain(case: Case, dtype: torch.dtype) -> Any:
    """transformers' model of the same files in the same quantisation."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    base: Base = case.base
    quantized = quantization_config(base.quantization, dtype, ["lm_head"])
    given: dict[str, Any] = {"dtype": dtype, "quantization_config": quantized}
    if base.kind == "encoder":
        return AutoModelForSequenceClassification.from_pretrained(
            base.source.folder, num_labels=case.labels, ignore_mismatched_sizes=True, **given
        ).to(base.device)
    model = AutoModelForCausalLM.from_pretrained(base.source.folder, **given)
    return model if base.quantization != "none" else model.to(base.device)


def wrap(model: Any, start: Path) -> Any:
    """The model with the adapter that both sides start with."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, start, is_trainable=True)


def run_trainer(case: Case, wrapped: Any, peer: Peer, **settings: Any) -> Run:
    """Trainer on a model with an adapter."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    clock, losses = Clock(), []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *given: Any, **more: Any) -> None:
            clock.begin()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **more: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    collate, counted = _collator(case, peer)
    with TemporaryDirectory() as out:
        trainer = Trainer(
            wrapped, arguments(case, peer, out, **settings), data_collator=collate, callbacks=[Watch()],
            train_dataset=dataset(case, peer),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    updates = zip(clock.seconds, counted, losses, strict=True)
    return Run([Update(s, tokens, loss, padded) for s, (tokens, padded), loss in updates], clock.busy)


def arguments(case: Case, peer: Peer, out: str, **settings: Any) -> Any:
    """Trainer's arguments: our recipe's, and nothing saved, evaluated or shown; all else as it comes."""
    from transformers import TrainingArguments

    config = case.recipe.training
    return TrainingArguments(
        out, num_train_epochs=config.epochs, per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.schedule, seed=config.seed, bf16=peer.autocast,
        train_sampling_strategy="sequential" if peer.same_order else "random", use_cpu=case.base.device.type == "cpu",
        report_to=[], save_strategy="no", eval_strategy="no", logging_strategy="steps", logging_steps=1,
        disable_tqdm=True, **settings,
    )  # fmt: skip


def dataset(case: Case, peer: Peer) -> list[dict[str, Any]]:
    """The same examples as Trainer takes them."""
    rows = [row for batch in case.order() for row in batch] if peer.same_order else case.examples
    return [_features(row, case, peer.flat) for row in rows]


def _features(row: Example, case: Case, flat: bool) -> dict[str, Any]:
    labels = row.labels[0] if case.base.kind == "encoder" else row.labels
    mask = {} if flat else {"attention_mask": [1] * len(row.ids)}
    return {"input_ids": row.ids, "labels": labels, **mask}


def _collator(case: Case, peer: Peer) -> tuple[Callable[[list[dict[str, Any]]], Any], list[tuple[int, int]]]:
    """A collator that counts real and padded tokens of each batch."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, DataCollatorWithPadding

    tokenizer = case.base.tokenizer
    inner: Any
    if peer.flat:
        inner = DataCollatorWithFlattening()
    elif case.base.kind == "encoder":
        inner = DataCollatorWithPadding(tokenizer)
    else:
        inner = DataCollatorForSeq2Seq(tokenizer)
    counted: list[tuple[int, int]] = []

    def collate(features: list[dict[str, Any]]) -> Any:
        real = sum(len(row["input_ids"]) for row in features)
        batch = inner(features)
        counted.append((real, batch["input_ids"].numel()))
        return batch

    return collate, counted
