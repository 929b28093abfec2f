"""Dry steps on tiny bases: they do what the run does, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.bases.quantization import is_quantized
from adapterhub_lite.recipe import load_recipe
from adapterhub_lite.store import Store
from adapterhub_lite.training.computation import Settings, make_computation
from adapterhub_lite.training.decoder import fused as decoder
from adapterhub_lite.training.encoder import fused as encoder
from adapterhub_lite.training.modules import computation as modules
from adapterhub_lite.training.planning import calibrate as dry
from adapterhub_lite.training.planning.calibrate import TooLarge, calibrate, copies_dropped
from adapterhub_lite.training.planning.loads import evaluated_after, rows_of, work_of
from adapterhub_lite.training.train import Assignment, Trained, new_members, train_adapters
from adapterhub_lite.workflows.plan import best_plan
from adapterhub_lite.workflows.train import _assignment, _jobs
from tests.training import recipes

LORA = {"type": "lora", "rank": 4, "alpha": 8}
KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", LORA, "fused decoder"),
    ("llama", {**LORA, "dropout": 0.3}, "fused decoder"),
    ("llama", {"type": "prefix", "tokens": 3}, "fused decoder"),
    ("gpt2", LORA, "layers of transformers"),
    ("t5", LORA, "layers of transformers"),
    ("bert", LORA, "fused encoder"),
    ("bert", {"type": "peft", "method": "ia3"}, "layers of transformers"),
]
SETTINGS = Settings(pack_tokens=150)


def assignments_of(
    folder: Path, base: Base, adapter: dict[str, Any], training: dict[str, Any] | None = None, count: int = 1
) -> list[Assignment]:
    path = recipes.write(folder, base, adapter, training, rows=14)
    plans = [load_recipe(path, {"training.seed": i, "name": f"tiny-{i}"}) for i in range(count)]
    store = Store(folder / "store")
    return [_assignment(job, base, store, count > 1, lambda event: None) for job in _jobs(plans, store)]


@pytest.mark.parametrize(("family", "adapter", "name"), KINDS)
def test_planned_packs_are_those_that_are_computed(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str,
    adapter: dict[str, Any], name: str,
) -> None:  # fmt: skip
    """Rows and supervised tokens of each pack, of every step and of the validation part."""
    base = tiny_base(family)
    if adapter["type"] == "peft":
        pytest.importorskip("peft")
    assignments = assignments_of(tmp_path, base, adapter, {"epochs": 2})
    learners, members = new_members(assignments, base)
    computation = make_computation(base, learners, SETTINGS)
    assert computation.name == name
    seen: list[tuple[int, int]] = []
    for owner, method in ((decoder.FusedDecoder, "_one"), (encoder.FusedEncoder, "_one")):
        inner = getattr(owner, method)

        def one(self: Any, pack: Any, *rest: Any, inner: Any = inner) -> Any:
            seen.append((pack.tokens, len({piece.key for piece in pack.pieces})))
            return inner(self, pack, *rest)

        monkeypatch.setattr(owner, method, one)
    forward = modules.ModuleComputation._forward

    def spied(self: Any, pack: Any) -> Any:
        tokens = sum(len(p.ids) for p in pack) if self._pass.packs else len(pack) * max(len(p.ids) for p in pack)
        if family == "t5":
            tokens += len(pack) * max(len(p.targets) for p in pack)
        seen.append((tokens, len({piece.key for piece in pack})))
        return forward(self, pack)

    monkeypatch.setattr(modules.ModuleComputation, "_forward", spied)
    member = members[0]
    for step in range(member.order.total):
        planned = computation.loads(rows_of(members, step))
        seen.clear()
        computation.gradients(member.rows())
        assert sorted(seen) == sorted((load.tokens, len(load.rows)) for load in planned)
        member.step += 1
    (part,) = member.validation_rows()
    planned = computation.loads(part, training=False)
    seen.clear()
    computation.losses(part)  # its rows have no keys of their own
    assert sorted(tokens for tokens, _ in seen) == sorted(load.tokens for load in planned)


@pytest.mark.parametrize(("family", "adapter", "name"), KINDS)
def test_tokens_and_steps_are_those_of_the_run(
    tiny_base: Callable[..., Base], tmp_path: Path, family: str, adapter: dict[str, Any], name: str
) -> None:
    base = tiny_base(family)
    assignments = assignments_of(tmp_path, base, adapter, {"epochs": 1.5, "gradient_accumulation": 2})
    made = best_plan(assignments, base)
    (trained,) = train_adapters(assignments, base, settings=made.setup.settings)
    assert isinstance(trained, Trained)
    assert made.tokens == trained.history.tokens
    assert made.steps == len(trained.history.losses)
    assert made.choices["computation"].value == name
    assert made.time is not None
    assert made.time.total > made.time.evaluating > 0
    assert made.memory.peak > made.memory.base > 0
    trained_count = sum(t.numel() for t in trained.adapter.tensors.values())
    assert made.learnings[0].trained == trained_count


def test_evaluations_are_those_of_the_run(tiny_base: Callable[..., Base], tmp_path: Path) -> None:
    base = tiny_base("bert")
    for training in ({"epochs": 2}, {"epochs": 2, "eval_every": 3}, {"epochs": 1.6, "eval_every": 50}):
        assignments = assignments_of(tmp_path, base, LORA, training)
        _, members = new_members(assignments, base)
        (trained,) = train_adapters(assignments, base)
        assert isinstance(trained, Trained)
        assert evaluated_after(members[0]) == [one["step"] for one in trained.history.evaluations]


def test_a_long_run_is_looked_at_here_and_there(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("llama")
    assignments = assignments_of(tmp_path, base, LORA, {"epochs": 40, "batch_size": 2})
    learners, members = new_members(assignments, base)
    computation = make_computation(base, learners, SETTINGS)
    whole = work_of(computation, members)
    monkeypatch.setattr("adapterhub_lite.training.planning.loads._LOOKED_AT", 60)
    some = work_of(computation, members)
    assert (len(whole.strides), whole.steps) == (280, 280)
    assert 60 <= len(some.strides) <= 62
    assert sum(stride.weight for stride in some.strides) == pytest.approx(280)
    assert some.tokens == pytest.approx(whole.tokens, rel=0.05)
    longest = max(len(row.example.ids) for stride in whole.strides for row in stride.rows)
    assert longest == max(len(row.example.ids) for stride in some.strides for row in stride.rows)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_dry_steps_change_nothing(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = tiny_base(family)
    assignments = assignments_of(tmp_path, base, {**LORA, "dropout": 0.2}, count=2)
    kept: list[tuple[list[Any], list[torch.Tensor]]] = []

    def watched(*arguments: Any) -> Any:
        learners, members = new_members(*arguments)
        parameters = [p for learner in learners for p in learner.parameters()]
        kept.append((parameters, [p.detach().clone() for p in parameters]))
        return learners, members

    monkeypatch.setattr(dry, "new_members", watched)
    digest = base.live_digest()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    calibrate(assignments, base, SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert base.live_digest() == digest
    ((parameters, before),) = kept
    assert len(parameters) > 4
    assert all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))
    assert not any(p.requires_grad for p in base.model.parameters())
    base.check_free()


def _tensors(assignments: list[Assignment], base: Base) -> dict[str, torch.Tensor]:
    (found,) = train_adapters(assignments, base, settings=SETTINGS)
    assert isinstance(found, Trained)
    adapter: Adapter = found.adapter
    return dict(adapter.tensors)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_a_run_after_a_plan_is_the_run_without_one(
    tiny_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    found = []
    for planned in (False, True):
        base = load_base(str(tiny_folder(family)), device="cpu")
        assignments = assignments_of(tmp_path, base, {**LORA, "dropout": 0.2})
        if planned:
            best_plan(assignments, base)
        found.append(_tensors(assignments, base))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_gradients_that_are_not_finite_change_no_parameter(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("llama")
    kept: list[Any] = []

    def poisoned(*arguments: Any) -> Any:
        learners, members = new_members(*arguments)
        with torch.no_grad():
            next(iter(learners[0].trainable.sites.values())).a.fill_(float("inf"))  # type: ignore[union-attr]
        kept.extend(learners[0].parameters()[1:])
        return learners, members

    monkeypatch.setattr(dry, "new_members", poisoned)
    calibrate(assignments_of(tmp_path, base, LORA), base, SETTINGS)
    assert all(bool(torch.isfinite(p).all()) for p in kept)


def test_a_limit_that_is_too_low_ends_before_the_largest_pack(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("llama")
    assignments = assignments_of(tmp_path, base, LORA)
    tried: list[int] = []
    inner = dry._Dry._compute
    monkeypatch.setattr(dry._Dry, "_compute", lambda self, rows, v: (tried.append(len(rows)), inner(self, rows, v)))
    with pytest.raises(TooLarge) as caught:
        calibrate(assignments, base, SETTINGS, limit=1000)
    assert caught.value.bytes > 1000
    assert not tried
    base.check_free()


def test_no_memory_left_is_too_large(
    tiny_base: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no")

    base = tiny_base("llama")
    monkeypatch.setattr(dry, "make_computation", fails)
    with pytest.raises(TooLarge):
        calibrate(assignments_of(tmp_path, base, LORA), base, SETTINGS)
    base.check_free()


def test_working_copies_come_back_bit_for_bit(tiny_folder: Callable[..., Path]) -> None:
    base = load_base(str(tiny_folder("llama", hidden_size=64)), "nf4", device="cpu", working_copies=True)
    layers = [m for m in base.model.modules() if is_quantized(m)]
    before = [m._ahl_copy.clone() for m in layers]
    digest = base.live_digest()
    with copies_dropped(base, lambda: True):
        assert all(m._ahl_copy is None for m in layers)
    assert all(torch.equal(m._ahl_copy, was) for m, was in zip(layers, before, strict=True))
    assert base.live_digest() == digest
    with pytest.raises(ZeroDivisionError), copies_dropped(base, lambda: True):
        raise ZeroDivisionError
    assert all(m._ahl_copy is not None for m in layers)
    with copies_dropped(base, lambda: False):
        pass
    assert all(m._ahl_copy is None for m in layers)
