"""Rows of several learners in one forward: shared beginnings, layers that mix rows, prefixes beside LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.prefix import prefix_shape
from adapterhub_lite.formats.peft_config import PrefixSpec
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Learner, Row, Settings
from adapterhub_lite.training.modules.computation import ModuleComputation
from adapterhub_lite.training.modules.lines import Run, Strange
from adapterhub_lite.training.trainable import TrainablePrefix
from tests.training.build import DROPLESS, precision
from tests.training.test_modules_gradients import assert_same, grads, learner, load, rows_of


@pytest.fixture(autouse=True)
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with precision(monkeypatch):
        yield


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_rows_begin_with_alike_is_computed_once(tmp_path: Path, family: str):
    base = load(tmp_path, family)
    same = list(range(60, 80))
    ends = [([5, 6], [7, 8, 2]), ([9], [10, 2]), ([], [11, 12, 13, 2]), ([5, 6, 7], [2])]
    rows = [
        Row(Example([*same, *q, *a], [IGNORED] * (20 + len(q)) + a), who, 10 * who + i)
        for who in (0, 1)
        for i, (q, a) in enumerate(ends)
    ]
    learners = [learner(base, seed) for seed in range(2)]
    computation = ModuleComputation(base, learners, DROPLESS)
    (pack,) = computation._packs(rows, False)
    assert sum(len(piece.ids) for piece in pack) < 90, "the beginning of each learner's rows stands there once"
    sums = computation.gradients(rows)
    found = grads(learners)
    for settings in (replace(DROPLESS, checkpoint=True), replace(DROPLESS, pack_tokens=30)):
        ModuleComputation(base, learners, settings).gradients(rows)
        for one, other in zip(grads(learners), found, strict=True):
            assert_same(one, other, 1e-10)
    computation._pass.packs = False
    for mine, theirs in zip(sums, computation.gradients(rows), strict=True):
        assert (mine.total, mine.count) == (pytest.approx(theirs.total, rel=1e-12), theirs.count)
    for one, other in zip(found, grads(learners), strict=True):
        assert_same(one, other, 1e-10)
    dropping = ModuleComputation(base, [learner(base, 0, 0.1), learner(base, 1)], DROPLESS)
    assert sum(len(piece.ids) for pack in dropping._packs(rows, True) for piece in pack) > 120, "dropout differs by row"


def test_layers_that_mix_rows_are_given_one_learner_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a probe did not show is noticed when it happens."""
    base = load(tmp_path, "gpt2")
    learners = [learner(base, seed) for seed in range(2)]
    rows = [row for who in range(2) for row in rows_of(base, who)]
    ModuleComputation(base, learners, DROPLESS).gradients(rows)
    expected = grads(learners)
    computation = ModuleComputation(base, learners, DROPLESS)
    own = Run.lines

    def strange(self: Run, count: int, device: torch.device) -> Any:
        if len({row.learner for row in self.rows}) > 1:
            raise Strange
        return own(self, count, device)

    monkeypatch.setattr(Run, "lines", strange)
    computation.gradients(rows)
    assert not computation._together
    for one, other in zip(grads(learners), expected, strict=True):
        assert_same(one, other, 1e-10)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_prefixes_and_changes_of_layers_together_are_each_as_alone(tmp_path: Path, family: str):
    base = load(tmp_path, family, "float32")
    shape = prefix_shape(base.config)
    learners = [learner(base, seed) for seed in range(3)]
    for one, tokens in ((0, 3), (2, 5)):
        spec = PrefixSpec(
            num_virtual_tokens=tokens,
            token_dim=shape.heads * shape.head_dim,
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_transformer_submodules=shape.submodules,
        )
        made = TrainablePrefix(spec, shape, torch.Generator().manual_seed(one), base.device)
        learners[one] = Learner(made, learners[one].head, learners[one].task_type)
    rows = [row for who in range(3) for row in rows_of(base, who)]
    sums = ModuleComputation(base, learners, Settings()).gradients(rows)
    found = grads(learners)
    for who, one in enumerate(learners):
        alone = ModuleComputation(base, [one], Settings())
        (own,) = alone.gradients([Row(r.example, 0, r.key) for r in rows_of(base, who)])
        assert own.total == pytest.approx(sums[who].total, rel=1e-5)
        assert_same(grads([one])[0], found[who], 1e-5)
