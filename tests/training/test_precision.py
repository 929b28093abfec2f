"""Products through bfloat16: when they are chosen, what torch does then, and how far gradients are from the truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.training import precision
from adapterhub_lite.training import train as training
from adapterhub_lite.training.computation import Settings, make_computation
from adapterhub_lite.training.decoder import parts as decoder_parts
from adapterhub_lite.training.precision import BFLOAT16, FLOAT32, choose_precision, products_in, through_bfloat16
from tests.training import decoder_cases as cases
from tests.training.decoder_cases import EXAMPLES, Peer, rows_of

CPU = torch.device("cpu")
PRODUCTS = ("mm", "addmm", "matmul", "bmm")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor with units for bfloat16, on which it is eight times as fast."""
    monkeypatch.setattr(precision, "has_units", lambda: True)
    monkeypatch.setattr(precision, "measured_gain", lambda: 8.0)
    return monkeypatch


def test_units_are_used_where_they_are_and_pay(units: pytest.MonkeyPatch) -> None:
    assert choose_precision(["auto"], CPU, torch.float32).name == BFLOAT16
    assert choose_precision(["auto", "bfloat16"], CPU, torch.float32).name == BFLOAT16
    units.setattr(precision, "measured_gain", lambda: 1.2)
    assert choose_precision(["auto"], CPU, torch.float32).name == FLOAT32
    assert choose_precision(["bfloat16"], CPU, torch.float32).name == BFLOAT16


def test_one_recipe_that_asks_for_float32_is_heard(units: pytest.MonkeyPatch) -> None:
    found = choose_precision(["auto", "float32", "bfloat16"], CPU, torch.float32)
    assert (found.name, found.why) == (FLOAT32, "the recipe says so")


def test_without_units_or_with_another_base_it_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_units", lambda: False)
    assert choose_precision(["bfloat16"], CPU, torch.float32).name == FLOAT32
    monkeypatch.setattr(precision, "has_units", lambda: True)
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float64)):
        assert choose_precision(["bfloat16"], torch.device(device), dtype).name == FLOAT32


def test_what_torch_is_told_is_taken_back_even_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products_in(FLOAT32):
        assert not through_bfloat16()

    def broken() -> None:
        with products_in(BFLOAT16):
            assert through_bfloat16()
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_gain_is_a_ratio_of_seconds() -> None:
    assert 0.01 < precision.measured_gain() < 100


@contextmanager
def rounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Torch's products as a processor with units computes them: values rounded to bfloat16, sums in float32."""
    counted = [0]

    def narrow(t: torch.Tensor) -> torch.Tensor:
        return t.to(torch.bfloat16).to(t.dtype) if t.dtype == torch.float32 else t

    def product(given: Any) -> Any:
        def call(a: torch.Tensor, b: torch.Tensor, **named: Any) -> torch.Tensor:
            counted[0] += 1
            return given(narrow(a), narrow(b), **named)

        return call

    def added(given: Any) -> Any:
        def call(to: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **named: Any) -> torch.Tensor:
            counted[0] += 1
            return given(to, narrow(a), narrow(b), **named)

        return call

    linear = torch.nn.functional.linear
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", product(torch.mm))
        patch.setattr(torch, "addmm", added(torch.addmm))
        patch.setattr(torch.Tensor, "addmm_", added(torch.Tensor.addmm_))
        patch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: linear(narrow(x), narrow(w), b))
        yield counted


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "lora", {"r": 4}),
    ("llama", "lora", {"r": 4, "lora_dropout": 0.2}),
    ("qwen2", "lora", {"r": 4}),
    ("qwen3", "dora", {"r": 2}),
]


@pytest.mark.parametrize(("family", "kind", "changes"), CASES)
def test_gradients_are_no_further_from_the_truth_than_those_of_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: str, changes: dict[str, Any]
) -> None:
    with cases.precision(monkeypatch, "float64"):
        folder = cases.folder(tmp_path, family)
        wide = Peer(cases.base_of(folder, "float64"), kind, **changes)
        narrow = Peer(cases.base_of(folder, "float32"), kind, **changes)
        rows = rows_of(EXAMPLES)
        truth = wide.gradients(rows)[1]
        with torch.autocast("cpu", torch.bfloat16):
            autocast = narrow.gradients(rows)[1]
        learner = narrow.learner
        with products_in(BFLOAT16), rounded(monkeypatch) as counted:
            make_computation(narrow.base, [learner], Settings()).gradients(rows)
    assert counted[0] > 20
    ours = _error([grad for _, grad in narrow.ours()], truth)
    assert ours <= 1.25 * _error(autocast, truth)
    assert ours > 1e-4  # bfloat16 it was


def _error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The error of all gradients together, as a share of their norm."""
    away = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, truth, strict=True))
    return (away / sum(float(b.double().square().sum()) for b in truth)) ** 0.5


def test_own_float32_products_stand_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_parts, "_LEAST", 1)
    monkeypatch.setattr(decoder_parts, "product", lambda *_, **__: pytest.fail("a product of float32"))
    peer = Peer(cases.base_of(cases.folder(tmp_path, "llama"), "float32"), "lora", r=4)
    with products_in(BFLOAT16):
        make_computation(peer.base, [peer.learner], Settings()).gradients(rows_of(EXAMPLES))
    assert all(float(grad.abs().max()) > 0 for _, grad in peer.ours())


def test_a_run_is_computed_so_and_says_it(
    tmp_path: Path, units: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterhub_lite.events import Note
    from adapterhub_lite.recipe.schema import DataConfig, FileData, InstructTask, LoraAdapter, Recipe
    from adapterhub_lite.recipe.training import TrainingConfig

    base = cases.base_of(cases.folder(tmp_path, "llama"), "float32")
    seen, told = [], []
    made = training.make_computation

    def watched(*given: Any) -> Any:
        seen.append(through_bfloat16())
        return made(*given)

    monkeypatch.setattr(training, "make_computation", watched)
    for wanted in ("auto", "float32"):
        config = TrainingConfig(max_steps=1, batch_size=2, precision=wanted)
        recipe = Recipe("mine", base.name, InstructTask(completion="b", prompt="a"),
                        DataConfig(train=FileData("none")), LoraAdapter(rank=2), config)  # fmt: skip
        training.train_adapter(recipe, base, EXAMPLES, on_event=told.append)
    assert seen == [True, False]
    assert len([n for n in told if isinstance(n, Note) and "bfloat16" in n.text]) == 1
    assert not through_bfloat16()
