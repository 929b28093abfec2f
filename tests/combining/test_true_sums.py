"""Members of full rank, or that nearly cancel: the error that is said is that of what is stored to the truth."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.combining.changes import Changes, changes_of
from adapterhub_lite.combining.combine import Combined, Options, combine
from adapterhub_lite.combining.rules import RULES
from adapterhub_lite.combining.rules.dare import stream
from adapterhub_lite.errors import AdapterMismatch, Unsupported
from adapterhub_lite.formats.specs import Ia3Spec
from tests.combining import truth

SIZES = [{}, {"rank": 3}, {"rank": 8}, {"rank": 99}, {"error": 0.05}, {"error": 0.3}]


def ia3(seed: int) -> Adapter:
    """Scales the outputs of queries and the inputs of the others."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, (n_out, n_in) in truth.SHAPES.items():
        shape = (n_out, 1) if module.endswith("q_proj") else (1, n_in)
        tensors[f"base_model.model.{module}.ia3_l"] = 1 + 0.2 * torch.randn(shape, generator=generator)
    spec = Ia3Spec(("down_proj", "q_proj"), ("down_proj",))
    return Adapter(spec, tensors, name=f"ia3-{seed}")


def near(adapter: Adapter, share: float) -> Adapter:
    """Another that differs by a share of each value."""
    generator = torch.Generator().manual_seed(7)
    moved = {
        key: tensor * (1 + share * torch.randn(tensor.shape, generator=generator))
        for key, tensor in adapter.tensors.items()
    }
    return replace(adapter, tensors=moved, name=f"{adapter.name}-near")


DORA = truth.lora(1, "dora", rank=1)
MIXES: dict[str, tuple[list[Adapter], list[float]]] = {
    "dora": ([DORA, truth.lora(2)], [0.5, 0.5]),
    "two": ([DORA, truth.lora(5, "dora", rank=2)], [0.7, 0.6]),
    "cancelling": ([DORA, near(DORA, 0.02)], [1.0, -1.0]),
    "ia3": ([ia3(3), truth.lora(4, rank=2)], [1.0, 0.4]),
    "all": ([DORA, ia3(3), truth.lora(4, rank=2)], [0.7, 1.0, 0.4]),
}


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    if not isinstance(adapter.spec, Ia3Spec):
        return truth.dense(adapter)
    return {
        module: (adapter.tensors[f"base_model.model.{module}.ia3_l"].double() - 1) * truth.weight_of(module).double()
        for module in truth.SHAPES
    }


def whole(adapter: Adapter) -> Changes:
    return changes_of(adapter, truth.weight_of, bias_of=lambda module: None, whole=True)


def great_circle(values: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> list[float]:
    one, two = (torch.cat([value[m].flatten() for m in truth.SHAPES]) for value in values)
    t, angle = weights[1] / sum(weights), math.acos(float(one @ two / one.norm() / two.norm()))
    length = (1 - t) * float(one.norm()) + t * float(two.norm())
    sines = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [length * sines[0] / float(one.norm()), length * sines[1] / float(two.norm())]


def expected(adapters: Sequence[Adapter], weights: Sequence[float], method: str, options: Options) -> dict[str, Any]:
    values, found = [dense(adapter) for adapter in adapters], {}
    factors = great_circle(values, weights) if method == "slerp" else weights
    for module in truth.SHAPES:
        deltas = [value[module] for value in values]
        if RULES[method].sparsify == "trim":
            deltas = [truth.trim(delta, options.density) for delta in deltas]
        if RULES[method].sparsify == "drop":
            begun = [stream(options.seed, f"{adapter.name}\n0", module) for adapter in adapters]
            deltas = [truth.drop(delta, options.density, b) for delta, b in zip(deltas, begun, strict=True)]
        found[module] = (truth.elect if method.endswith("ties") else truth.summed)(deltas, factors)
    return found


def check(made: Combined, exact: dict[str, torch.Tensor], best: bool = True) -> None:
    stored = truth.dense(made.adapter)
    assert [layer.module for layer in made.layers] == sorted(exact)
    lost = 0.0
    for layer in made.layers:
        true = truth.relative(stored[layer.module], exact[layer.module])
        assert layer.error == pytest.approx(true, rel=1e-3, abs=1e-6)
        assert not best or true <= truth.best_error(exact[layer.module], layer.rank) * (1 + 1e-3) + 1e-6
        lost += float((stored[layer.module] - exact[layer.module]).norm()) ** 2
    norm = sum(float(delta.norm()) ** 2 for delta in exact.values())
    assert made.error == pytest.approx(math.sqrt(lost / norm), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("mix", MIXES)
def test_the_error_is_that_to_what_members_truly_add(mix: str, method: str, size: dict[str, Any]):
    adapters, weights = MIXES[mix]
    if (method == "cat" and size) or (method == "slerp" and (len(adapters) != 2 or min(weights) < 0)):
        pytest.skip("the rule has no meaning for these")
    options = Options(density=0.4, **size)
    made = combine([(whole(a), w) for a, w in zip(adapters, weights, strict=True)], method, options)
    check(made, expected(adapters, weights, method, options))
    for layer in made.layers:
        assert layer.error <= size.get("error", 1)
        least = min(truth.SHAPES[layer.module])
        assert layer.rank <= min(size.get("rank", least), least)
        if size.get("rank") == 99:
            assert layer.error < 1e-6
    assert any("is of full rank" in note for note in made.notes)


@pytest.mark.parametrize(("method", "ranks"), [("linear", 8), ("cat", 8), ("task_arithmetic", 8), ("svd", 4)])
def test_the_rank_where_none_is_wished(method: str, ranks: int):
    made = combine([(whole(DORA), 0.5), (whole(truth.lora(2)), 0.5)], method)
    assert {layer.rank for layer in made.layers} == {ranks}


def test_of_a_layer_one_weight_for_each_member_is_in_memory():
    alive: list[weakref.ref[Any]] = []
    most = []

    def weight_of(module: str) -> torch.Tensor:
        values = truth.weight_of(module).numpy().copy()
        alive.append(weakref.ref(values))
        most.append(sum(one() is not None for one in alive))
        return torch.from_numpy(values)

    some = [changes_of(one, weight_of, bias_of=lambda m: None, whole=True) for one in (DORA, ia3(3))]
    for method in ("linear", "slerp", "ties"):
        combine([(one, 1.0) for one in some], method)
    assert max(most) == 2


def test_equal_ones_leave_nothing():
    some = [(whole(DORA), 1.0), (whole(replace(DORA, name="same")), -1.0), (whole(truth.lora(2)), 0.5)]
    check(combine(some, "linear"), {m: 0.5 * delta for m, delta in truth.dense(truth.lora(2)).items()})
    shares = [(whole(replace(DORA, name=f"same-{weight}")), weight) for weight in (0.1, 0.2, -0.3)]  # 5e-17 is left
    only = [*shares, (whole(truth.lora(2, modules=list(truth.SHAPES)[:1])), 0.5)]
    made = combine(only, "linear")
    assert [layer.module for layer in made.layers] == list(truth.SHAPES)[:1]
    assert any(note.startswith("3 of 4 layers are left out") for note in made.notes)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "task_arithmetic"])
@pytest.mark.parametrize("off", [1e-3, 1e-6, 1e-8])
def test_members_that_nearly_cancel_have_the_error_of_what_is_stored(off: float, method: str):
    adapters, weights = [truth.lora(1), replace(truth.lora(1), name="same")], [1.0, -1 + off]
    made = combine([(whole(a), w) for a, w in zip(adapters, weights, strict=True)], method)
    check(made, expected(adapters, weights, method, Options()), best=method != "cat")
    if (method, off) == ("cat", 1e-8):
        assert made.error > 0.5
        assert any("layers nearly cancel" in note for note in made.notes)
    if method != "cat":
        assert made.error < 1e-4
        assert not made.notes


@pytest.mark.parametrize("off", [1e-11, 1e-12])
def test_what_float64_loses_of_members_that_cancel_counts_too(off: float):
    """The exact sum is a multiple of one of them; its own rounding is no larger than what is looked for."""
    made = combine([(whole(truth.lora(1)), 1.0), (whole(replace(truth.lora(1), name="same")), -1 + off)], "linear")
    stored, lost, norm = truth.dense(made.adapter), 0.0, 0.0
    for module, delta in truth.dense(truth.lora(1)).items():
        lost += float((stored[module] - (1.0 + (-1 + off)) * delta).norm()) ** 2
        norm += float((off * delta).norm()) ** 2
    true = math.sqrt(lost / norm)
    assert true > 1e-6
    assert true / 4 < made.error < 4 * true


def test_an_error_that_float32_cannot_keep_is_refused():
    with pytest.raises(Unsupported, match="cannot be kept at"):
        combine([(whole(truth.lora(1)), 0.3), (whole(truth.lora(2)), 0.7)], "linear", Options(error=1e-9))


def test_weights_beyond_float32_are_refused():
    with pytest.raises(AdapterMismatch, match="beyond what float32 holds"):
        combine([(whole(DORA), 1e300)], "linear")


def test_full_rank_needs_its_base_at_once():
    for adapter in (DORA, ia3(3)):
        with pytest.raises(Unsupported, match="depends on the layer's own weight"):
            changes_of(adapter, whole=True)
