"""Labels that do not fit a head, and heads that make no numbers: said, and not guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import AdapterMismatch, CapacityError, NoEffect
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build


@pytest.fixture
def runtime(tiny_folder: Callable[..., Path], tmp_path: Path) -> Runtime:
    return Runtime(load_base(str(tiny_folder("bert")), device="cpu"), Store(tmp_path / "store"))


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c", "d", "e"], ["a", "a", "b"]])
def test_a_card_with_other_labels_than_the_head_is_refused(runtime: Runtime, labels: list[str]) -> None:
    task = {"type": "classify", "text": "text", "label": "label"}
    for seed, (name, own) in enumerate((("good", ["a", "b", "c"]), ("bad", labels))):
        adapter = build.lora(runtime.base, seed, labels=3)
        build.stored(runtime.store, runtime.base, name, adapter, {**task, "labels": own})
    before = runtime.predict(["hello"], "good")
    with pytest.raises(AdapterMismatch, match="bad@1 has a head of 3 labels, and its card names a"):
        runtime.predict(["hello", "hello"], ["good", "bad"])
    assert runtime.predict(["hello"], "good") == before


def test_logits_that_are_no_numbers_are_no_prediction(runtime: Runtime) -> None:
    adapter = build.lora(runtime.base, 3, labels=3)
    for name in adapter.tensors:
        if "lora_B" in name:
            adapter.tensors[name] *= 1e37
    ref = runtime.attach(adapter)
    with pytest.raises(NoEffect, match="not finite"):
        runtime.predict(["hello"], ref)


@pytest.mark.parametrize("rows", [0, -3, 2.5, True, "8"])
def test_a_batch_of_no_rows_is_refused_at_once(runtime: Runtime, rows: object) -> None:
    with pytest.raises(CapacityError, match="at least one row"):
        Runtime(runtime.base, runtime.store, batch_size=rows)  # type: ignore[arg-type]
