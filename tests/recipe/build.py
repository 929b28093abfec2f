"""Recipes for the tests of this room, and what they say when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_lite.errors import Problem, RecipeError
from adapterhub_lite.recipe import load_recipe

GOOD = """\
# Topics of short texts.
#   ahl train topics
name: topics
base: minilm-l6
quantize: none
task:    {type: classify, text: text, label: label}
data:    {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}
adapter: {type: lora, rank: 8, alpha: 32, targets: all-linear}
training: {epochs: 3, batch_size: 32, learning_rate: 1.0e-3, max_length: 128, seed: 0}
"""
LEAST = """\
name: a
base: b
task: {type: instruct}
data: {train: {hub: org/set, split: train}}
adapter: {type: prefix}
"""


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def problems(folder: Path, text: str | bytes, overrides: object = ()) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)  # type: ignore[arg-type]
    assert caught.value.source.endswith("r.yaml")
    return caught.value.problems
