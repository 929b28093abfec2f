"""Learners that a referee ends, and those computed one by one: the others are what they would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.load import DTYPES, load_base
from adapterhub_lite.errors import TrainingFailed
from adapterhub_lite.training.member import Member
from adapterhub_lite.training.runs.checkpoint import Checkpoints
from adapterhub_lite.training.train import Assignment, train_adapters
from tests.training import recipes


def assignments(folder: Path, base: Any, count: int = 3) -> list[Assignment]:
    from adapterhub_lite.store import Store
    from adapterhub_lite.workflows.train import _assignment, _jobs

    made = []
    for number in range(count):
        own = folder / str(number)
        own.mkdir(parents=True)
        plan = recipes.load(
            own, base, {"type": "lora", "rank": 2 + number, "dropout": 0.1}, {"epochs": 3, "seed": number}
        )
        (job,) = _jobs([plan], Store())
        made.append(_assignment(job, base, Store(), True, lambda event: None))
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_apart_is_together(tiny_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str):
    monkeypatch.setitem(DTYPES, "float64", torch.float64)
    base = load_base(str(tiny_folder(family)), device="cpu", dtype="float64")
    group = assignments(tmp_path, base)
    together, apart = train_adapters(group, base), train_adapters(group, base, apart=True)
    for one, other in zip(together, apart, strict=True):
        assert one.history.losses == pytest.approx(other.history.losses, rel=1e-4)
        assert one.history.tokens == other.history.tokens
        assert [e["loss"] for e in one.history.evaluations] == pytest.approx(
            [e["loss"] for e in other.history.evaluations], rel=1e-4
        )


def test_one_that_is_ended_changes_no_other(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    group = assignments(tmp_path, base)
    told: list[bool] = []

    def referee(members: Any, evaluated: bool) -> None:
        told.append(evaluated)
        if members[1].step == 4:
            members[1].stop()

    whole, ended = train_adapters(group, base, apart=True), train_adapters(group, base, apart=True, referee=referee)
    assert [len(one.history.losses) for one in ended] == [9, 4, 9]
    assert ended[1].history.ended == "stopped early"
    assert ended[1].history.losses == whole[1].history.losses[:4]
    for i in (0, 2):
        assert all(torch.equal(ended[i].adapter.tensors[k], t) for k, t in whole[i].adapter.tensors.items())
    assert told.count(True) == 3, "measured after each of three epochs"
    assert len(told) == 10, "before each of nine steps, and after the last"


def test_a_checkpoint_while_one_has_made_no_step(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, original = tiny_base("llama"), Member.learn

    def learn(self: Member, sums: Any) -> bool:
        if self.index == 1:
            sums.total = float("nan")
        return original(self, sums)

    monkeypatch.setattr(Member, "learn", learn)
    home = tmp_path / "run"
    home.mkdir()
    checkpoints = Checkpoints(home, "0" * 64, steps=1)
    found = train_adapters(assignments(tmp_path, base), base, checkpoints=checkpoints)
    assert [isinstance(one, TrainingFailed) for one in found] == [False, True, False]
    state = checkpoints.latest()
    assert state is not None
    assert [one["step"] for one in state.plain] == [9, 0, 9]
    assert not state.tensors[1]["first_moment"].any()
