"""Accuracy of MiniLM classifiers on public data sets over three seeds: ours, and with --peer PEFT + Trainer as well.

Both: LoRA r=16, alpha 32, all linear layers, learning rate 1e-3, 3 epochs, batch 32, length 128. The data sets (sst2,
clinc150: train.jsonl, test.jsonl with text and label) are found in the folder that AHL_DATA names.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.bases.quiet import quiet
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.train import train

from .common import print_head

SETS = ("sst2", "clinc150")
SEEDS = (0, 1, 2)
RECIPE = """
name: {name}
base: minilm-l6
task: {{type: classify, text: text, label: label}}
data: {{train: {data}/train.jsonl, test: {data}/test.jsonl}}
adapter: {{type: lora, rank: 16, alpha: 32, targets: all-linear}}
training: {{epochs: 3, batch_size: 32, learning_rate: 1.0e-3, max_length: 128, seed: {seed}}}
"""


def main() -> None:
    """Print accuracies, means and times."""
    root = os.environ.get("AHL_DATA")
    if not root:
        print("   quality: skipped, AHL_DATA names no folder of data sets")
        return
    base = load_base("minilm-l6")
    print_head("quality: test accuracy of LoRA classifiers on MiniLM-L6", base)
    with TemporaryDirectory() as folder, quiet():
        for name in SETS:
            _report(name, "ours", [_ours(Path(folder), name, Path(root) / name, seed, base) for seed in SEEDS])
            if "--peer" in sys.argv:
                _report(name, "PEFT + Trainer", [_peer(Path(root) / name, seed, base) for seed in SEEDS])


def _report(name: str, who: str, runs: list[tuple[float, float]]) -> None:
    accuracies = [a for a, _ in runs]
    seconds = statistics.median(s for _, s in runs)
    shown = " ".join(f"{a:.3f}" for a in accuracies)
    print(
        f"   {name:<10}{who:<16} accuracy {statistics.mean(accuracies):.4f} ({shown}), {seconds:.0f} s a run",
        flush=True,
    )


def _ours(folder: Path, name: str, data: Path, seed: int, base: Base) -> tuple[float, float]:
    recipe = folder / f"{name}-{seed}.yaml"
    recipe.write_text(RECIPE.format(name=name, data=data, seed=seed))
    store = Store(folder / "store")
    begun = time.perf_counter()
    ref = train(recipe, store=store, base=base)
    return store.card(ref).metrics["test"]["accuracy"], time.perf_counter() - begun


def _peer(data: Path, seed: int, base: Base) -> tuple[float, float]:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    def rows(split: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / f"{split}.jsonl").read_text("utf-8").splitlines()]

    train_rows, test_rows = rows("train"), rows("test")
    labels = sorted({str(r["label"]) for r in train_rows})

    def encoded(part: list[dict[str, Any]]) -> Dataset:
        texts = base.tokenizer([r["text"] for r in part], truncation=True, max_length=128)
        return Dataset.from_dict({**texts, "labels": [labels.index(str(r["label"])) for r in part]})

    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base.source.folder, num_labels=len(labels))
    peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"))
    begun = time.perf_counter()
    with TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, num_train_epochs=3, per_device_train_batch_size=32, per_device_eval_batch_size=64, seed=seed,
            learning_rate=1e-3, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            peft, arguments, train_dataset=encoded(train_rows), data_collator=DataCollatorWithPadding(base.tokenizer)
        )
        trainer.train()
        logits = torch.tensor(trainer.predict(encoded(test_rows)).predictions)
    expected = torch.tensor([labels.index(str(r["label"])) for r in test_rows])
    return float((logits.argmax(-1) == expected).float().mean()), time.perf_counter() - begun


if __name__ == "__main__":
    main()
