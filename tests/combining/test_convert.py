"""One adapter in another form: exact where it can be, and the error that is told is the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.combining.convert import to_lora
from adapterhub_lite.errors import NoEffect, Unsupported
from adapterhub_lite.formats.specs import LoraSpec, PrefixSpec
from tests.combining import truth
from tests.combining.test_changes import oriented, setting

METHODS = ("lora", "rslora", "adalora", "loha", "lokr", "dora", "ia3")
FULL = ("dora", "ia3")


def converted(kind: str, tmp_path: Path, **wish: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    adapter, added, models = setting("llama", kind, tmp_path)
    made = to_lora(adapter, weight_of=lambda name: oriented(models["base"], name), bias_of=lambda name: None, **wish)
    assert isinstance(made.adapter.spec, LoraSpec)
    assert made.adapter.name == adapter.name
    assert made.adapter.spec.task_type == "CAUSAL_LM"
    return made, added


def check(made: Any, added: dict[str, torch.Tensor]) -> None:
    """Each layer is the best at its rank, with PEFT's merge for truth, and its error is what is told."""
    stored = truth.dense(made.adapter)
    assert set(stored) == set(added) == {layer.module for layer in made.layers}
    whole = lost = 0.0
    for layer in made.layers:
        delta, found = added[layer.module], stored[layer.module]
        measured = truth.relative(found, delta)
        assert layer.error == pytest.approx(measured, rel=1e-3, abs=2e-5)
        assert measured <= truth.best_error(delta, layer.rank) * (1 + 1e-4) + 2e-5
        whole, lost = whole + float(delta.norm()) ** 2, lost + float((found - delta).norm()) ** 2
    assert made.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_method_at_a_rank(kind: str, rank: int, tmp_path: Path):
    made, added = converted(kind, tmp_path, rank=rank)
    check(made, added)
    assert max(layer.rank for layer in made.layers) <= rank


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("error", [0.5, 0.05])
def test_a_method_within_an_error(kind: str, error: float, tmp_path: Path):
    made, added = converted(kind, tmp_path, error=error)
    check(made, added)
    for layer in made.layers:
        assert layer.error <= error
        assert layer.rank == 1 or truth.best_error(added[layer.module], layer.rank - 1) > error * 0.999


@pytest.mark.parametrize("kind", METHODS)
def test_without_a_wish_nothing_is_lost_that_has_a_low_rank(kind: str, tmp_path: Path):
    made, added = converted(kind, tmp_path)
    check(made, added)
    assert kind in FULL or made.error < 1e-6


@pytest.mark.parametrize("kind", ["lora", "patterns", "rslora", "bias"])
def test_lora_keeps_its_factors_and_its_ranks(kind: str):
    adapter = truth.lora(1, kind)
    made = to_lora(adapter)
    found = truth.dense(made.adapter)
    for module, delta in truth.dense(adapter).items():
        assert truth.relative(found[module], delta) < 1e-7
        rank = adapter.tensors[f"base_model.model.{module}.lora_A.weight"].shape[0]
        assert next(layer.rank for layer in made.layers if layer.module == module) == rank
    for module, bias in truth.biases(adapter).items():
        torch.testing.assert_close(truth.biases(made.adapter)[module], bias)


def test_there_and_back():
    adapter = truth.lora(1, "rslora", rank=5)
    once = to_lora(adapter, rank=5).adapter
    assert to_lora(once, rank=5).error < 1e-6
    assert to_lora(to_lora(once, rank=2).adapter, rank=5).layers[0].rank == 2


def test_what_is_refused():
    with pytest.raises(Unsupported, match="stays a prefix"):
        to_lora(Adapter(PrefixSpec(4, 8, 2, 2), {"prompt_embeddings": torch.ones(4, 32)}, name="p"))
    with pytest.raises(Unsupported, match="--base"):
        to_lora(truth.lora(1, "dora"), rank=4)
    for wish in ({"rank": 0}, {"rank": 2000}, {"error": 0.0}, {"error": 2.0}):
        with pytest.raises(Unsupported):
            to_lora(truth.lora(1, "dora"), weight_of=truth.weight_of, **wish)  # type: ignore[arg-type]
    untrained = truth.lora(1)
    zeros = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in untrained.tensors.items()}
    with pytest.raises(NoEffect):
        to_lora(Adapter(untrained.spec, zeros, name="zeros"))
