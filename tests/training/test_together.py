"""Recipes that are trained together on one base: each is what it is alone, and is stored with a card of its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import stored_adapter
from adapterhub_lite.bases.devices import DTYPES
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import TrainingFailed, Unsupported
from adapterhub_lite.events import Note, Step
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.train import train, train_together
from tests.checks import assert_store_sound
from tests.cli.conftest import ahl, told
from tests.training import recipes
from tests.training.test_resume import Killed, at_step, process, runs

RECIPES = {
    "first": ({"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}, {"epochs": 2, "seed": 1, "eval_every": 2}),
    "second": (
        {"type": "lora", "rank": 2, "alpha": 8},
        {"epochs": 3, "seed": 2, "batch_size": 3, "schedule": "cosine"},
    ),
    "third": (
        {"type": "lora", "rank": 4, "alpha": 8},
        {"epochs": 9, "seed": 3, "learning_rate": 0.1, "early_stopping": {"patience": 1}, "max_grad_norm": 0.1},
    ),
}


def write(folder: Path, base: Any, **changes: dict[str, Any]) -> list[Path]:
    """A file for each recipe; each has a folder of its own for its data."""
    paths = []
    for count, (name, (adapter, training)) in enumerate(RECIPES.items()):
        own = folder / name
        own.mkdir(parents=True)
        path = recipes.write(own, base, adapter, training, rows=10 + count)
        told = json.loads(path.read_text())
        told |= {"name": name, **changes.get(name, {})}
        path.write_text(json.dumps(told))
        paths.append(path)
    return paths


def values(store: Store, ref: Any) -> dict[str, torch.Tensor]:
    return stored_adapter(store.read(ref)).tensors


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_each_is_what_it_is_alone(tiny_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str):
    monkeypatch.setitem(DTYPES, "float64", torch.float64)  # which users cannot ask for
    base = load_base(str(tiny_folder(family)), device="cpu", dtype="float64")
    before, paths = base.live_digest(), write(tmp_path, base)
    crowd, alone = Store(tmp_path / "crowd"), Store(tmp_path / "alone")
    refs = train_together(paths, store=crowd, base=base)
    assert base.live_digest() == before
    assert [str(ref) for ref in refs] == ["first@1", "second@1", "third@1"]
    steps = set()
    for path, ref in zip(paths, refs, strict=True):
        single = train(path, store=alone, base=base)
        one, other = crowd.card(ref), alone.card(single)
        assert one.origin["losses"] == pytest.approx(other.origin["losses"], rel=1e-4)
        assert one.origin["tokens"] == other.origin["tokens"]
        assert one.origin.get("kept_step") == other.origin.get("kept_step")
        mine, theirs = values(crowd, ref), values(alone, single)
        for key, tensor in mine.items():
            scale = float(theirs[key].abs().max())
            assert float((tensor - theirs[key]).abs().max()) <= 1e-5 * scale, key
        assert one.origin["together"] == list(RECIPES)
        assert "together" not in other.origin
        steps.add(one.origin["steps"])
    assert len(steps) > 1, "they should end at different steps"
    assert_store_sound(crowd.path)


def test_other_bases_are_refused(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    paths = write(tmp_path, base, second={"quantize": "int8"})
    with pytest.raises(Unsupported, match=r"first has quantize: none, second has quantize: int8"):
        train_together(paths, store=Store(), base=base)
    with pytest.raises(Unsupported, match="share one base"):
        train_together(write(tmp_path / "b", base, third={"base": "smollm2-135m"}), store=Store(), base=base)


def test_one_that_diverges_does_not_cost_the_others(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    paths = write(tmp_path, base)
    from adapterhub_lite.training import train as module

    original = module.make_computation

    class Poisoned:
        def __init__(self, made: Any) -> None:
            self._made, self._calls = made, 0

        def gradients(self, rows: Any) -> Any:
            self._calls += 1
            found = self._made.gradients(rows)
            if self._calls == 3:
                found[1].total = float("nan")
            return found

        def losses(self, rows: Any) -> Any:
            return self._made.losses(rows)

    store = Store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_computation", lambda *given: Poisoned(original(*given)))
        with pytest.raises(TrainingFailed, match=r"at step 3.*Stored beside it: first@1, third@1"):
            train_together(paths, store=store, base=base)
    assert sorted(store.names()) == ["first", "third"]
    refs = train_together(paths, store=store, base=base, resume=True)
    assert [str(ref) for ref in refs] == ["first@1", "second@1", "third@1"], "what is stored is not stored again"
    assert runs(store) == []


@pytest.mark.parametrize("at", [2, 5, 7])
def test_it_resumes(tiny_base, tmp_path: Path, at: int):
    base = tiny_base("llama")
    paths = write(tmp_path, base)
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "again")
    expected = train_together(paths, store=whole, base=base, overrides={"training.checkpoint_every": 1})
    with pytest.raises(Killed):
        train_together(
            paths, store=store, base=base, overrides={"training.checkpoint_every": 1}, on_event=at_step(at, Step)
        )
    refs = train_together(paths, store=store, base=base, overrides={"training.checkpoint_every": 2}, resume=True)
    for ref, other in zip(refs, expected, strict=True):
        mine, theirs = values(store, ref), values(whole, other)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        assert store.card(ref).origin["losses"] == whole.card(other).origin["losses"]
    assert runs(store) == []


def test_killed(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    paths = write(tmp_path, base)
    died = process(",".join(map(str, paths)), tmp_path / "store", "evaluated", 2)
    assert died.wait() == -signal.SIGKILL, died.communicate()[1]
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "store")
    expected = train_together(paths, store=whole, base=base)
    refs = train_together(paths, store=store, base=base, resume=True)
    for ref, other in zip(refs, expected, strict=True):
        mine, theirs = values(store, ref), values(whole, other)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_what_changed_is_told_by_learner(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    paths, store = write(tmp_path, base), Store()
    with pytest.raises(Killed):
        train_together(paths, store=store, base=base, overrides={"training.checkpoint_every": 1}, on_event=at_step(4))
    with pytest.raises(TrainingFailed, match=r"first: training\.weight_decay was 0\.0, is 0\.5; second: "):
        train_together(paths, store=store, base=base, resume=True, overrides={"training.weight_decay": 0.5})


def test_the_command(tiny_base, tmp_path: Path):
    paths = [str(path) for path in write(tmp_path, tiny_base("llama"))]
    found = told("train", *paths, "--together", "--store", str(tmp_path / "store"))
    assert [one["ref"] for one in found["adapters"]] == ["first@1", "second@1", "third@1"]
    refused = ahl("train", *paths)
    assert (refused.exit_code, "--together" in refused.stderr) == (2, True)
    refused = ahl("train", *paths, "--together", "--name", "x")
    assert refused.exit_code == 2
    refused = ahl("train", paths[0], "--resume", "--from-scratch")
    assert refused.exit_code == 2


def test_two_versions_of_one_name_are_each_stored_once(tiny_base, tmp_path: Path):
    """Killed between the two."""
    base, store = tiny_base("llama"), Store()
    paths = write(tmp_path, base, second={"name": "first"})[:2]

    def die(event: Any) -> None:
        if isinstance(event, Note) and event.text.startswith("stored first@1"):
            raise Killed

    with pytest.raises(Killed):
        train_together(paths, store=store, base=base, on_event=die)
    refs = train_together(paths, store=store, base=base, resume=True)
    assert [str(ref) for ref in refs] == ["first@1", "first@2"]
    assert [store.card(ref).adapter["rank"] for ref in refs] == [4, 2]
    assert store.versions("first") == [1, 2]
