"""Accuracy of a classifier that both sides train on all rows for the same updates: an epoch count, batch 32."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quiet import quiet
from adapterhub_lite.training.train import train_adapter

from .rows import Row
from .training_cases import Case, classify_case
from .training_sides import DEFAULTS, load_plain, run_trainer, wrap

PART = "accuracy"
_RATE, _BATCH, _EPOCHS = 1.0e-3, 32, 3.0


def rows(name: str, epochs: float = _EPOCHS) -> Iterator[Row]:
    """One figure: ours less the peer's, on the validation part."""
    base = load_base(name)
    case = classify_case(base, None, _BATCH).trained(epochs=epochs, learning_rate=_RATE)
    held = classify_case(base, None, _BATCH, "validation")
    begun = time.perf_counter()
    ours = _ours(case, held)
    between = time.perf_counter()
    peer = _peer(case, held)
    took = f"{between - begun:.0f} s / {time.perf_counter() - between:.0f} s with measuring"
    trained = f"{epochs:g} epochs of {len(case.examples)} rows"
    what = f"accuracy on {len(held.examples)} rows of {case.source}, {trained}, {base.name}"
    # Half a percent is less than what another seed makes of it on so many rows.
    goal, met = "no lower, within 0.005", ours >= peer - 0.005
    yield Row(PART, what, figure=ours - peer, told=f"{ours:.4f} / {peer:.4f}, {took}", goal=goal, met=met)


def _ours(case: Case, held: Case) -> float:
    found = train_adapter(case.recipe, case.base, case.examples, held.examples, labels=case.labels)
    return found.history.evaluations[-1]["accuracy"]


def _peer(case: Case, held: Case) -> float:
    with quiet(), TemporaryDirectory() as folder:
        model = wrap(load_plain(case, torch.float32), case.export(Path(folder)))
        run_trainer(case, model, DEFAULTS)
        model.eval()
        right = 0
        with torch.inference_mode():
            for example in held.examples:
                given: dict[str, Any] = {"input_ids": torch.tensor([example.ids], device=case.base.device)}
                right += int(model(**given).logits.argmax()) == example.labels[0]
    return right / len(held.examples)
