"""Which setup a plan takes, what it refuses, and what training makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adapterhub_lite.adapters.adapter import stored_adapter
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import CapacityError, Unsupported
from adapterhub_lite.events import Event, Note, Step
from adapterhub_lite.recipe import load_recipe, recipe_dict
from adapterhub_lite.store import Store
from adapterhub_lite.training import train as training
from adapterhub_lite.training.planning.calibrate import Calibration, TooLarge, calibrate
from adapterhub_lite.training.planning.plan import Plan, Setup, ladder
from adapterhub_lite.training.runs.folders import read_identity, run_folders
from adapterhub_lite.workflows import plan as planning
from adapterhub_lite.workflows import train as workflow
from adapterhub_lite.workflows.plan import best_plan, kept_setup, plan, wanted_copies, write_recipe
from adapterhub_lite.workflows.plan_told import copies_there, line
from adapterhub_lite.workflows.train import train, train_together
from tests.training import recipes
from tests.training.test_plan_dry import LORA, assignments_of

MB = 10**6


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> list[Setup]:
    """Dry steps of a made-up size: 100 MB and one for each token, half of that computed twice, three quarters with
    gate and up computed again, 300 for copies.
    """
    tried: list[Setup] = []
    real: list[Calibration] = []

    def made_up(assignments: Any, base: Base, settings: Any, *rest: Any) -> Any:
        copies = copies_there(base)
        tried.append(Setup(settings.pack_tokens, settings.checkpoint, copies, settings.recompute_mlp))
        work = settings.pack_tokens * MB // 4 * (2 if settings.checkpoint else 3 if settings.recompute_mlp else 4)
        peak = 100 * MB + work + 300 * MB * copies
        if work >= 1024 * MB:
            raise TooLarge(peak, 100 * MB, rest[0] or 10**12)
        real[:] = real or [calibrate(assignments, base, settings, None, 1)]
        return replace(real[0], base=100 * MB, peak=peak, after=100 * MB, state=0, best=0, available=10**12)

    monkeypatch.setattr(planning, "calibrate", made_up)
    return tried


@pytest.fixture
def quantized(tiny_folder: Callable[..., Path]) -> Base:
    folder = tiny_folder("llama", hidden_size=64)
    return load_base(str(folder), "nf4", device="cpu", working_copies=True)


def test_a_smaller_limit_gives_a_setup_no_larger(quantized: Base, tmp_path: Path, needs: list[Setup]) -> None:
    assignments = assignments_of(tmp_path, quantized, LORA)
    found: list[Plan] = []
    limits = [2000, 660, 470, 400, 300, 180, 140]
    for limit in limits:
        found.append(best_plan(assignments, quantized, limit * MB))
        assert found[-1].memory.peak <= limit * MB
        assert copies_there(quantized)
    configs, heeds = [one.recipe.training for one in assignments], frozenset({"recompute_mlp"})
    order = ladder(configs, 20, True, "cpu", heeds=heeds, dequantises=True)
    places = [order.index(one.setup) for one in found]
    assert places == sorted(places)
    assert len(set(places)) >= 6
    assert {one.setup.recompute_mlp for one in found} == {one.setup.checkpointing for one in found} == {False, True}
    # What is learnt is the same in all.
    assert len({(one.steps, one.tokens, one.learnings) for one in found}) == 1
    with pytest.raises(CapacityError):
        best_plan(assignments, quantized, 130 * MB)


def test_the_first_that_fits_is_taken_and_the_reason_told(quantized: Base, tmp_path: Path, needs: list[Setup]) -> None:
    assignments = assignments_of(tmp_path, quantized, LORA)
    made = best_plan(assignments, quantized, 400 * MB)
    # Half of what took far too much is not tried.
    assert needs == [
        Setup(1024, False, True), Setup(256, False, True), Setup(1024), Setup(1024, False, True, True),
        Setup(128, False, True), Setup(256, False, True, True), Setup(1024, False, False, True),
        Setup(128, False, True, True), Setup(64, False, True), Setup(1024, True), Setup(256),
    ]  # fmt: skip
    assert made.setup == Setup(256)
    told = "packs of 1,024 tokens with layers computed twice would take 612 MB"
    assert made.choices["pack_tokens"].reason == told
    assert (made.choices["checkpointing"].value, made.choices["recompute_mlp"].value) == ("off", "off")
    assert made.overrides == [
        "training.pack_tokens=256", "training.checkpointing=false", "training.working_copies=false",
        "training.recompute_mlp=false",
    ]  # fmt: skip
    assert "packs of 256 tokens" in line(made)
    assert "computed twice" not in line(made)
    less = best_plan(assignments, quantized, 300 * MB)
    assert less.setup == Setup(256, recompute_mlp=True)
    assert less.choices["recompute_mlp"].value == "on"
    assert "gate and up computed twice" in line(less)
    tight = best_plan(assignments, quantized, 140 * MB)
    assert tight.setup == Setup(64, True, False)
    assert "layers computed twice" in line(tight)


def test_a_refusal_names_numbers_and_knobs(tiny_base: Callable[..., Base], tmp_path: Path, needs: list[Setup]) -> None:
    base = tiny_base("llama")
    fixed = {"pack_tokens": 512, "checkpointing": False}
    with pytest.raises(CapacityError) as caught:
        best_plan(assignments_of(tmp_path, base, LORA, fixed), base, 300 * MB)
    told = str(caught.value)
    assert "tiny-0 takes 484 MB" in told
    assert "gate and up computed twice" in told
    assert "packs of 512 tokens" in told
    assert "300 MB may be taken (--fit)" in told
    for knob in ("training.pack_tokens: ", "training.checkpointing: true takes about 192 MB less", "quantize: nf4",
                 "adapter.rank: 2"):  # fmt: skip
        assert knob in told
    assert "a smaller base" in told
    assert len(needs) == 3  # the least of them once more, without the limit
    assert caught.value.hint.startswith("--fit 494MB is enough.")


def test_recipes_keep_what_they_fix(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    made = best_plan(assignments_of(tmp_path, base, LORA, {"pack_tokens": 200, "checkpointing": True}), base)
    assert made.setup == Setup(200, True)
    assert made.choices["pack_tokens"].reason == made.choices["checkpointing"].reason == "the recipe says so"


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_a_plan_tells_what_is_trained(tiny_base: Callable[..., Base], tmp_path: Path, family: str) -> None:
    base = tiny_base(family)
    path = recipes.write(tmp_path, base, LORA, {"gradient_accumulation": 2})
    made = plan(path, base=base, store=Store(tmp_path / "store"))
    told = json.loads(json.dumps(made.to_dict()))
    assert told["learnings"][0] | {"trained": 0, "longest": 0} == {
        "name": "tiny", "adapter": "lora of rank 4", "rows": 12, "steps": 2, "batch_size": 4,
        "gradient_accumulation": 2, "trained": 0, "max_length": 96, "longest": 0,
    }  # fmt: skip
    assert told["memory"]["above"] == told["memory"]["peak"] - told["memory"]["base"]
    assert told["time"]["total"] > 0
    assert told["packs"] >= told["steps"] == 2
    assert told["choices"]["dtype"]["value"] == "float32"
    assert not (tmp_path / "store").exists()


def test_several_are_planned_together(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    (tmp_path / "other").mkdir()
    paths = [recipes.write(tmp_path, base, LORA), recipes.write(tmp_path / "other", base, LORA, {"epochs": 3})]
    alone = [plan(path, base=base) for path in paths]
    both = plan(*paths, base=base)
    assert both.tokens == sum(one.tokens for one in alone)
    assert both.steps == 9
    assert [one.steps for one in both.learnings] == [3, 9]
    with pytest.raises(Unsupported, match="share one base"):
        plan(paths[0], load_recipe(paths[1], {"quantize": "nf4"}))


def test_a_recipe_that_fits_is_written_once(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    recipe = load_recipe(recipes.write(tmp_path, base, LORA))
    made = plan(recipe, base=base)
    made = replace(made, setup=Setup(256, True))
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "fitting.yaml"
    write_recipe(recipe, made, target)
    again = load_recipe(target)
    assert (again.training.pack_tokens, again.training.checkpointing) == (256, True)
    assert again.training.working_copies == "auto"
    old, new = recipe_dict(recipe), recipe_dict(again)
    old["training"] = new["training"] = {k: v for k, v in new["training"].items() if k not in ("pack_tokens",)}
    assert {k: v for k, v in old.items() if k != "data"} == {k: v for k, v in new.items() if k != "data"}
    assert Path(new["data"]["train"]) == tmp_path / "train.jsonl"
    before = target.read_text()
    with pytest.raises(Unsupported, match="there already"):
        write_recipe(recipe, made, target)
    assert target.read_text() == before
    assert yaml.safe_load(before)["training"]["pack_tokens"] == 256


# --- training ----------------------------------------------------------------------------------------------------


def test_a_small_run_makes_no_dry_steps(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("llama")
    monkeypatch.setattr(planning, "best_plan", lambda *a, **k: pytest.fail("dry steps"))
    notes: list[Event] = []
    train(recipes.write(tmp_path, base, LORA), store=Store(tmp_path / "store"), base=base, on_event=notes.append)
    assert not any(isinstance(one, Note) and "tokens/s" in one.text for one in notes)


def test_a_long_run_tells_its_plan_first_and_follows_it(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path = tiny_base("llama"), recipes.write(tmp_path, tiny_base("llama"), {**LORA, "dropout": 0.2})
    plain = train(path, store=Store(tmp_path / "one"), base=base, overrides={"training.pack_tokens": 1024})
    monkeypatch.setattr(planning, "_LONG", 0)
    events: list[Event] = []
    given: list[Any] = []
    inner = training.make_computation
    monkeypatch.setattr(training, "make_computation", lambda *a: (given.append(a[2]), inner(*a))[1])
    ref = train(path, store=Store(tmp_path / "two"), base=base, on_event=events.append)
    told = next(i for i, one in enumerate(events) if isinstance(one, Note) and "tokens/s" in one.text)
    assert "tiny: 3 steps" in events[told].text  # type: ignore[union-attr]
    assert told < next(i for i, one in enumerate(events) if isinstance(one, Step))
    assert [(s.pack_tokens, s.checkpoint) for s in given] == [(1024, False)]
    ours = stored_adapter(Store(tmp_path / "two").read(ref)).tensors
    theirs = stored_adapter(Store(tmp_path / "one").read(plain)).tensors
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_does_not_fit_is_refused_before_the_first_step(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, store = tiny_base("llama"), Store(tmp_path / "store")
    monkeypatch.setattr(planning, "room", lambda device: 10)
    monkeypatch.setattr("adapterhub_lite.training.planning.calibrate.room", lambda device: 10)
    events: list[Event] = []
    with pytest.raises(CapacityError, match="Training tiny takes"):
        train(recipes.write(tmp_path, base, LORA), store=store, base=base, on_event=events.append)
    assert not any(isinstance(one, Step) for one in events)
    assert not store.names()
    assert not run_folders(store.path)
    base.check_free()


def test_what_recipes_say_reaches_the_computation(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path = tiny_base("llama"), recipes.write(tmp_path, tiny_base("llama"), LORA)
    given: list[Any] = []
    inner = training.make_computation
    monkeypatch.setattr(training, "make_computation", lambda *a: (given.append(a[2]), inner(*a))[1])
    plans = [load_recipe(path, {"name": name, "training.pack_tokens": 300, "training.checkpointing": True})
             for name in ("one", "two")]  # fmt: skip
    train_together(plans, store=Store(tmp_path / "store"), base=base)
    assert [(s.pack_tokens, s.checkpoint) for s in given] == [(300, True)]


def test_going_on_computes_as_it_was_begun(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, store = tiny_base("llama"), Store(tmp_path / "store")
    path = recipes.write(tmp_path, base, {**LORA, "dropout": 0.2}, {"epochs": 2, "checkpoint_every": 1})
    monkeypatch.setattr(workflow, "chosen_setup", lambda *arguments: Setup(100, True))

    class Gone(BaseException): ...

    def die(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            raise Gone

    with pytest.raises(Gone):
        train(path, store=store, base=base, on_event=die)
    (folder,) = run_folders(store.path)
    assert read_identity(folder)["computed"] == {
        "pack_tokens": 100, "checkpointing": True, "working_copies": False, "recompute_mlp": False, "offload": False,
        "table_on_host": False,
    }  # fmt: skip
    given: list[Any] = []
    inner = training.make_computation
    monkeypatch.setattr(training, "make_computation", lambda *a: (given.append(a[2]), inner(*a))[1])
    monkeypatch.setattr(workflow, "chosen_setup", lambda *arguments: pytest.fail("chosen anew"))
    ref = train(path, store=store, base=base, resume=True)
    monkeypatch.setattr(workflow, "chosen_setup", lambda *arguments: Setup(100, True))
    whole = train(path, store=Store(tmp_path / "whole"), base=base)
    assert [(s.pack_tokens, s.checkpoint) for s in given] == [(100, True), (100, True)]
    ours = stored_adapter(store.read(ref)).tensors
    theirs = stored_adapter(Store(tmp_path / "whole").read(whole)).tensors
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_a_run_was_begun_with_is_read_with_care(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    free = assignments_of(tmp_path, base, LORA)
    assert kept_setup(free, base, {"pack_tokens": 99, "checkpointing": True}, True) == Setup(99, True)
    assert kept_setup(free, base, {}, True) == Setup(1024)
    assert kept_setup(free, base, {"pack_tokens": "9", "checkpointing": 1}, True) == Setup(1024)
    assert kept_setup(free, base, {"pack_tokens": -4}, True) == Setup(1024)
    fixed = assignments_of(tmp_path, base, LORA, {"pack_tokens": 300})
    assert kept_setup(fixed, base, {"pack_tokens": 99, "checkpointing": True}, True) == Setup(300, True)


def test_a_run_that_did_without_copies_goes_on_without(quantized: Base, tmp_path: Path) -> None:
    assignments = assignments_of(tmp_path, quantized, LORA)
    assert kept_setup(assignments, quantized, {"working_copies": False}, own=False).working_copies
    assert copies_there(quantized)
    assert not kept_setup(assignments, quantized, {"working_copies": False}, own=True).working_copies
    assert not copies_there(quantized)
    assert quantized.memory.working_copies == 0


def test_a_base_of_ones_own_loses_its_copies_and_anothers_does_not(
    quantized: Base, tmp_path: Path, needs: list[Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_LONG", 0)
    inner = planning.fits
    monkeypatch.setattr(planning, "fits", lambda memory, fit: inner(memory, 350 * MB))
    assignments = assignments_of(tmp_path, quantized, LORA, {"pack_tokens": 200})
    with pytest.raises(CapacityError):
        planning.chosen_setup(assignments, quantized, False, lambda event: None)
    assert copies_there(quantized)
    assert planning.chosen_setup(assignments, quantized, True, lambda event: None) == Setup(200)
    assert not copies_there(quantized)


def test_whether_copies_are_wanted(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    path = recipes.write(tmp_path, tiny_base("llama"), LORA)
    one, two, three = (load_recipe(path, {"training.working_copies": w}) for w in ("auto", True, False))
    assert wanted_copies([one]) is None
    assert wanted_copies([one, two]) is True
    assert wanted_copies([two, three]) is False
