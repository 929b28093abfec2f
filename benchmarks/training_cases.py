"""What is trained: a recipe, a base, and examples made once by our task, so that both sides learn from the same.

Real rows (dolly, sst2) where `AHL_DATA` names a folder of data sets, else rows of the built-in recipes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_lite.bases.load import Base
from adapterhub_lite.recipe.load import recipe_dict
from adapterhub_lite.recipe.schema import ClassifyTask, DataConfig, FileData, InstructTask, LoraAdapter, Recipe
from adapterhub_lite.recipe.training import TrainingConfig
from adapterhub_lite.tasks.classify import Classify
from adapterhub_lite.tasks.registry import make_task
from adapterhub_lite.tasks.rows import read_jsonl
from adapterhub_lite.tasks.task import Example
from adapterhub_lite.training.batches import Order
from adapterhub_lite.training.train import train_adapter

MAX_LENGTH = 512
RATE = 5.0e-4
_RECIPES = Path(__file__).parents[1] / "recipes" / "data"


@dataclass(frozen=True)
class Case:
    """One training run that both sides make.

    Attributes:
        source: which rows these are, in a few words.
        labels: number of classes, for an encoder.
    """

    recipe: Recipe
    base: Base
    examples: Sequence[Example]
    source: str
    labels: int = 0

    @property
    def rows(self) -> int:
        """Rows of one optimiser update."""
        return self.recipe.training.batch_size

    @property
    def tokens(self) -> int:
        """Real tokens of one epoch."""
        return sum(len(example.ids) for example in self.examples)

    def order(self) -> list[list[Example]]:
        """The rows of each update in the order in which ours takes them: batches of like lengths, shuffled."""
        order = Order(self.recipe.training, self.examples)
        return [[self.examples[i] for i in order.rows(step)] for step in range(order.total)]

    def seeded(self, seed: int) -> Case:
        """The same with another seed."""
        return self.trained(seed=seed)

    def trained(self, **settings: Any) -> Case:
        """The same with other settings of training."""
        return replace(self, recipe=replace(self.recipe, training=replace(self.recipe.training, **settings)))

    def first(self, count: int) -> Case:
        """The same with its first rows alone."""
        return replace(self, examples=list(self.examples[:count]))

    def export(self, folder: Path) -> Path:
        """The adapter that training starts with, as a folder of PEFT's.

        One update of a rate near 0 leaves A as it was drawn, since its gradient is 0 while B is 0, and B near 0.
        """
        shortest = min(self.examples, key=lambda e: len(e.ids))
        start = self.trained(learning_rate=1e-12, max_steps=1, batch_size=1)
        found = train_adapter(start.recipe, self.base, [shortest], labels=self.labels)
        for name, data in found.adapter.files().items():
            (folder / name).write_bytes(data)
        return folder


def instruct_case(base: Base, updates: int, rows: int = 8, quantize: str = "none") -> Case:
    """LoRA r=16 on all linear layers of a chat model, one epoch of so many updates."""
    path = _found("dolly/train.jsonl")
    if path:
        task, source = InstructTask(prompt="instruction", completion="output"), "dolly"
    else:
        path = _RECIPES / "sql" / "train.jsonl"
        task, source = InstructTask(completion="sql", template="{schema}\n\n{question}"), "the recipe's SQL rows"
    recipe = _recipe(base, task, path, rows, quantize)
    made = make_task(recipe_dict(recipe)["task"])
    data = read_jsonl(path)
    made.prepare(data)
    examples = made.examples(data, base.tokenizer, base.kind, recipe.training.max_length)
    return Case(recipe, base, _some(examples, updates * rows), source)


def classify_case(base: Base, updates: int | None, rows: int = 8, part: str = "train") -> Case:
    """LoRA r=16 on all linear layers of an encoder, and a head; None takes all rows."""
    train, path = _classify_file("train"), _classify_file(part)
    text = "text" if train.parent.name == "sst2" else "review"
    recipe = _recipe(base, ClassifyTask(text=text), train, rows, "none")
    task = make_task(recipe_dict(recipe)["task"])
    task.prepare(read_jsonl(train))
    assert isinstance(task, Classify)
    limit = min(MAX_LENGTH, base.config.max_position_embeddings)
    examples = task.examples(read_jsonl(path), base.tokenizer, base.kind, limit)
    source = "sst2" if text == "text" else "the recipe's reviews"
    return Case(
        recipe, base, examples if updates is None else _some(examples, updates * rows), source, len(task.labels)
    )


def _classify_file(part: str) -> Path:
    return _found(f"sst2/{part}.jsonl") or _RECIPES / "reviews" / f"{part}.jsonl"


def _found(name: str) -> Path | None:
    root = os.environ.get("AHL_DATA")
    path = Path(root or "") / name
    return path if root and path.is_file() else None


def _some(examples: Sequence[Example], count: int) -> list[Example]:
    """So many in a random order, the same every time; again from the start where there are too few."""
    order = random.Random(0).sample(range(len(examples)), len(examples))
    return [examples[order[i % len(order)]] for i in range(count)]


def _recipe(base: Base, task: InstructTask | ClassifyTask, path: Path, rows: int, quantize: str) -> Recipe:
    return Recipe(
        name="benchmark",
        base=base.name,
        task=task,
        data=DataConfig(train=FileData(str(path))),
        adapter=LoraAdapter(),
        training=TrainingConfig(
            epochs=1.0, batch_size=rows, learning_rate=RATE, max_length=MAX_LENGTH, checkpoint_every="never"
        ),
        quantize=quantize,  # type: ignore[arg-type]
    )
