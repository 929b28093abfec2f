"""What plans save memory with: which settings change something, what they hold, and that what is learnt stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.devices import Choice
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import CapacityError, RecipeError
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.training.apart import Apart
from adapterhub_lite.training.computation import Settings, heeded, make_computation
from adapterhub_lite.training.decoder.fused import FusedDecoder
from adapterhub_lite.training.divided import Divided, Share
from adapterhub_lite.training.memory import offload
from adapterhub_lite.training.planning.calibrate import calibrate, heeded_by
from adapterhub_lite.training.planning.footprint import Lora, Plan, Shape, footprint
from adapterhub_lite.training.planning.loads import rows_of
from adapterhub_lite.training.planning.plan import Setup, parse_size
from adapterhub_lite.training.train import Trained, new_members, train_adapters
from adapterhub_lite.workflows.plan import best_plan, kept_setup, setup_of
from tests.training import recipes
from tests.training.test_plan_dry import LORA, assignments_of

SHAPE = Shape(256, 1024, 6, 4, 2, 64, 1000)


def made(folder: Path, base: Base, settings: Settings = Settings(150), **more: Any) -> tuple[Any, Any, Any]:  # noqa: B008
    learners, members = new_members(assignments_of(folder, base, LORA, **more), base)
    return learners, members, make_computation(base, learners, settings)


# --- what there is to choose from ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "adapter", "found"),
    [
        ("llama", LORA, {"recompute_mlp"}),
        ("llama", {"type": "prefix", "tokens": 3}, {"recompute_mlp"}),
        ("llama", {"type": "peft", "method": "ia3"}, set()),
        ("gpt2", LORA, set()),
        ("bert", LORA, set()),
    ],
)
def test_settings_are_known_to_change_something(
    tiny_base: Callable[..., Base], tmp_path: Path, family: str, adapter: dict[str, Any], found: set[str]
) -> None:
    base = tiny_base(family)
    assert heeded_by(assignments_of(tmp_path, base, adapter), base) == found
    base.check_free()


def test_on_a_device_there_is_the_host_to_choose(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_folder("llama", tie_word_embeddings=False)), device="cpu")
    learners, _ = new_members(assignments_of(tmp_path, base, LORA), base)
    assert heeded(base, learners) == {"recompute_mlp"}
    monkeypatch.setitem(base.choices, "device", Choice("cuda", "as if"))
    assert heeded(base, learners) == {"recompute_mlp", "offload"}
    monkeypatch.setattr(offload, "movable_table", lambda base: base.model.get_input_embeddings().weight)
    assert heeded(base, learners) == {"recompute_mlp", "offload", "table_on_host"}
    others, _ = new_members(assignments_of(tmp_path, base, {"type": "peft", "method": "ia3"}), base)
    assert heeded(base, [*learners, *others]) == {"recompute_mlp", "offload"}  # others read the table as it is
    monkeypatch.undo()
    assert offload.movable_table(base) is None  # on a CPU the host is where it is


# --- what they hold --------------------------------------------------------------------------------------------------


def test_gate_and_up_are_most_of_what_a_decoder_keeps() -> None:
    """Counted from shapes: less than keeping all, more than keeping inputs alone."""
    kept, gates, twice = (
        footprint(SHAPE, [Lora(4)], Plan(settings, quantize="none"), [(512, 256)]).buffers
        for settings in (Settings(512), Settings(512, recompute_mlp=True), Settings(512, checkpoint=True))
    )
    assert twice < gates < 0.7 * kept
    # Two widths of the feed-forward part in bfloat16, of all layers but one: they share a place, and so does the last.
    assert kept - gates == (SHAPE.layers - 2) * 512 * 2 * SHAPE.inner * 2 + 256 * 2 * SHAPE.inner * 2


@pytest.mark.parametrize("setup", [Setup(64), Setup(64, recompute_mlp=True), Setup(64, True)])
def test_a_plan_of_buffers_is_what_a_run_asks_for(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: Setup
) -> None:
    """The most that the dry steps' buffers hold is the most that those of the run hold, byte for byte."""
    base = load_base(str(tiny_folder("llama")), device="cpu")
    assignments = assignments_of(tmp_path, base, LORA)
    held: list[int] = []
    inner = FusedDecoder.gradients
    monkeypatch.setattr(
        FusedDecoder, "gradients", lambda self, rows: (inner(self, rows), held.append(self.most))[0]
    )  # fmt: skip
    calibrate(assignments, base, setup.settings, None, 0)
    dry = max(held)
    held.clear()
    train_adapters(assignments, base, settings=setup.settings)
    assert max(held) == dry > 0


# --- the table of embeddings -----------------------------------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if on a device: when the table goes and comes back, and when buffers are given back."""
    told: list[str] = []
    real, release = offload.table_on_host, FusedDecoder.release

    @contextmanager
    def watched(base: Base) -> Iterator[int]:
        with real(base) as count:
            told.append("gone")
            yield count
        told.append("back")

    def released(self: FusedDecoder) -> None:
        told.append("released")
        release(self)
        assert self.nbytes == 0

    monkeypatch.setattr(offload, "movable_table", lambda base: base.model.get_input_embeddings().weight)
    monkeypatch.setattr(offload, "table_on_host", watched)
    monkeypatch.setattr(FusedDecoder, "release", released)
    return told


def test_the_table_is_away_while_a_run_learns_and_comes_back_into_free_room(
    tiny_folder: Callable[..., Path], tmp_path: Path, moved: list[str]
) -> None:
    base = load_base(str(tiny_folder("llama", tie_word_embeddings=False)), device="cpu")
    assignments = assignments_of(tmp_path, base, LORA)
    digest = base.live_digest()
    (plain,) = train_adapters(assignments, base, settings=Settings(150))
    assert not moved
    (trained,) = train_adapters(assignments, base, settings=Settings(150, table_on_host=True))
    assert moved == ["gone", "released", "back"]
    assert isinstance(trained, Trained)
    assert isinstance(plain, Trained)
    assert all(torch.equal(trained.adapter.tensors[key], plain.adapter.tensors[key]) for key in plain.adapter.tensors)
    assert base.live_digest() == digest
    moved.clear()
    found = calibrate(assignments, base, Settings(150, table_on_host=True), None, 0)
    assert moved == ["gone", "released", "back"]
    assert found.table == found.on_host == base.model.get_input_embeddings().weight.nbytes


def test_the_table_stays_where_another_computation_reads_it(
    tiny_base: Callable[..., Base], tmp_path: Path, moved: list[str]
) -> None:
    base = tiny_base("gpt2")
    train_adapters(assignments_of(tmp_path, base, LORA), base, settings=Settings(150, table_on_host=True))
    assert not moved


def test_the_table_comes_back_when_a_run_fails(
    tiny_folder: Callable[..., Path], tmp_path: Path, moved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_folder("llama", tie_word_embeddings=False)), device="cpu")
    monkeypatch.setattr(FusedDecoder, "gradients", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_adapters(assignments_of(tmp_path, base, LORA), base, settings=Settings(150, table_on_host=True))
    assert moved[0] == "gone"
    assert moved[1] == "released"
    base.check_free()


# --- what recipes ask for --------------------------------------------------------------------------------------------


def test_a_recipe_gets_what_it_asks_for_where_that_is(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    asked = {"recompute_mlp": True, "table_on_host": True}
    made = best_plan(assignments_of(tmp_path, base, LORA, asked), base)
    assert made.setup == Setup(1024, recompute_mlp=True)
    assert made.choices["recompute_mlp"].reason == "the recipe says so"
    assert made.choices["table_on_host"].value == "off"
    assert made.choices["table_on_host"].reason == "there is no device whose memory it would save"
    assert setup_of(assignments_of(tmp_path, base, LORA, asked), base) == Setup(1024, recompute_mlp=True)
    other = tiny_base("gpt2")
    made = best_plan(assignments_of(tmp_path, other, LORA, {"recompute_mlp": True}), other)
    assert made.setup == Setup(1024)
    assert made.choices["recompute_mlp"].reason == "what computes here keeps nothing of the kind"


@pytest.mark.parametrize(
    ("training", "path"),
    [
        ({"recompute_mlp": True, "checkpointing": True}, "training.recompute_mlp"),
        ({"offload": True, "checkpointing": False}, "training.offload"),
        ({"offload": "perhaps"}, "training.offload"),
        ({"table_on_host": 3}, "training.table_on_host"),
    ],
)
def test_what_recipes_cannot_ask_for(
    tiny_base: Callable[..., Base], tmp_path: Path, training: dict[str, Any], path: str
) -> None:
    with pytest.raises(RecipeError, match=path):
        load_recipe(recipes.write(tmp_path, tiny_base("llama"), LORA, training))


def test_going_on_keeps_what_a_run_was_computed_with(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    free = assignments_of(tmp_path, base, LORA)
    told = {"recompute_mlp": True, "offload": False, "table_on_host": True, "pack_tokens": 70}
    assert kept_setup(free, base, told, True) == Setup(70, recompute_mlp=True, table_on_host=True)
    assert kept_setup(free, base, {"recompute_mlp": "yes", "offload": 1}, True) == Setup(1024)


def test_what_is_enough_is_enough(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    """The size that a refusal names is one that the same plan then keeps to."""
    base = tiny_base("llama")
    assignments = assignments_of(tmp_path, base, LORA)
    with pytest.raises(CapacityError) as caught:
        best_plan(assignments, base, 10**6)
    assert "with layers computed twice" in caught.value.message
    enough = parse_size(caught.value.hint.split()[1])
    assert best_plan(assignments, base, enough).memory.peak <= enough


# --- packs of computations that hold others --------------------------------------------------------------------------


def test_packs_of_learners_apart_and_divided_are_theirs(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    learners, members, whole = made(tmp_path, base, count=2)
    rows = rows_of(members, 0)
    alone = [whole.loads([row for row in rows if row.learner == who]) for who in (0, 1)]
    shares = [Share((i,), make_computation(base, [learners[i]], Settings(150))) for i in (1, 0)]
    for computation in (Apart(whole), Divided(shares)):
        found = computation.loads(rows)
        assert sorted(load.tokens for load in found) == sorted(load.tokens for load in [*alone[0], *alone[1]])
        assert sorted(i for load in found for i in load.rows) == list(range(len(rows)))
        for load in found:
            assert len({rows[i].learner for i in load.rows}) == 1
        assert (computation.padded, computation.on_host) == (False, 0)
        assert [computation.tokens(row) for row in rows] == [len(row.example.ids) for row in rows]
        computation.gradients([replace(row, key=n) for n, row in enumerate(rows)])
        computation.release()
    assert whole.nbytes == 0
