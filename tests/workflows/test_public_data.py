"""Training on real text, where a folder of public data sets is at hand (AHL_DATA)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterhub_lite.bases.fetch import cached
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.train import train

DATA = os.environ.get("AHL_DATA")

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(not DATA, reason="AHL_DATA names no folder of data sets"),
    pytest.mark.skipif(cached("minilm-l6") is None, reason="the base minilm-l6 is not in the cache"),
]

RECIPE = """
name: domains
base: minilm-l6
task: {{type: classify, text: text, label: label}}
data: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
adapter: {{type: lora, rank: 16, alpha: 32, targets: all-linear}}
training: {{max_steps: 140, batch_size: 32, learning_rate: 1.0e-3, max_length: 128, seed: 0}}
"""


def test_one_epoch_learns_the_domains_of_clinc150(tmp_path):
    """Ten labels, so chance is 0.1; three epochs do better (benchmarks/quality.py)."""
    recipe = tmp_path / "domains.yaml"
    recipe.write_text(RECIPE.format(folder=Path(str(DATA)) / "clinc150"))
    store = Store(tmp_path / "store")
    ref = train(recipe, store=store)
    assert store.card(ref).metrics["test"]["accuracy"] > 0.8
