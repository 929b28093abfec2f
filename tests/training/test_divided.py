"""Learners that no one computation takes: whoever is beside a learner, it drops and sums what it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapterhub_lite.adapters.prefix import prefix_shape
from adapterhub_lite.bases.load import Base
from adapterhub_lite.formats.peft_config import PrefixSpec
from adapterhub_lite.training.computation import Learner, Row, Settings, make_computation
from adapterhub_lite.training.divided import Divided
from adapterhub_lite.training.trainable import TrainablePrefix
from tests.training.build import precision
from tests.training.test_encoder_gradients import tag_rows, tagger
from tests.training.test_modules_gradients import assert_same, grads, learner, load, rows_of


@pytest.fixture(autouse=True)
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with precision(monkeypatch):
        yield


def assert_each_as_alone(base: Base, learners: list[Learner], rows: list[Row], within: float = 1e-12) -> None:
    together = make_computation(base, learners, Settings())
    assert isinstance(together, Divided)
    measured = together.losses(rows)
    sums = together.gradients(rows)
    found = grads(learners)
    for who, one in enumerate(learners):
        alone = make_computation(base, [one], Settings())
        own = [replace(row, learner=0) for row in rows if row.learner == who]
        assert alone.losses(own)[0].total == pytest.approx(measured[who].total, rel=within)
        (sum_,) = alone.gradients(own)
        assert sum_.total == pytest.approx(sums[who].total, rel=within)
        assert (sum_.count, sum_.tokens, sum_.hits) == (sums[who].count, sums[who].tokens, sums[who].hits)
        assert_same(grads([one])[0], found[who], 100 * within)


def test_a_classifier_a_tagger_and_a_prefix(tmp_path: Path):
    base = load(tmp_path, "bert", "float32")
    shape = prefix_shape(base.config)
    spec = PrefixSpec(
        num_virtual_tokens=3,
        token_dim=shape.heads * shape.head_dim,
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_transformer_submodules=shape.submodules,
    )
    prefix = TrainablePrefix(spec, shape, torch.Generator().manual_seed(0), base.device)
    learners = [learner(base, 0, 0.3), tagger(base, 1, 0.3), Learner(prefix, learner(base, 2).head, "SEQ_CLS")]
    rows = [*rows_of(base, 0), *tag_rows(1), *rows_of(base, 2)]
    assert_each_as_alone(base, learners, rows[::-1], 1e-6)


def test_a_decoders_layers_and_its_output(tmp_path: Path):
    base = load(tmp_path, "llama")
    learners = [learner(base, 0, 0.3), learner(base, 1, 0.2, targets=["lm_head", "q_proj"]), learner(base, 2, 0.1)]
    rows = [row for who in range(3) for row in rows_of(base, who)]
    assert_each_as_alone(base, learners, rows)


def test_a_learner_without_rows_in_a_step(tmp_path: Path):
    base = load(tmp_path, "llama")
    learners = [learner(base, 0), learner(base, 1, targets=["lm_head"])]
    first, second = make_computation(base, learners, Settings()).losses(rows_of(base, 0))
    assert first.count
    assert not second.count
