"""Combining by every rule against brute force on dense changes in float64, its identities, and what PEFT computes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.combining.changes import changes_of
from adapterhub_lite.combining.combine import Combined, Options, combine
from adapterhub_lite.combining.rules import RULES
from adapterhub_lite.combining.rules.dare import stream
from adapterhub_lite.combining.written import target_names
from adapterhub_lite.errors import AdapterMismatch, BaseMismatch, NoEffect, Unsupported
from adapterhub_lite.events import Event, Note
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.peft_config import adapter_config_bytes, parse_adapter_config
from tests import peers, tiny
from tests.combining import truth

QUERIES = tuple(m for m in truth.SHAPES if m.endswith("q_proj"))
MIXES: dict[str, list[Adapter]] = {
    "alike": [truth.lora(1), truth.lora(2)],
    "ranks": [truth.lora(1, rank=2), truth.lora(2, rank=7), truth.lora(3, rank=30)],
    "targets": [truth.lora(1, modules=QUERIES), truth.lora(2, rank=6, alpha=1.5)],
    "disjoint": [truth.lora(1, modules=QUERIES), truth.lora(2, modules=[m for m in truth.SHAPES if m not in QUERIES])],
    "patterns": [truth.lora(1, "patterns"), truth.lora(2, "patterns", rank=5, alpha=3.0)],
    "rslora": [truth.lora(1, "rslora"), truth.lora(2, "rslora", rank=9), truth.lora(3)],
    "bias": [truth.lora(1, "bias"), truth.lora(2)],
    "biases": [truth.lora(1, "bias"), truth.lora(2, "bias", rank=3)],
    "dora": [truth.lora(1, "dora"), truth.lora(2)],
    "all": [truth.lora(i, kind, rank=3 + i) for i, kind in enumerate(truth.KINDS)],
}
WEIGHTS = {1: [0.7], 2: [0.7, -0.4], 3: [0.7, -0.4, 1.3], 5: [0.7, -0.4, 1.3, 0.2, 1.0]}
SUMS = ("linear", "cat", "svd", "task_arithmetic")
BY_VALUE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def members(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[tuple[Any, float]]:
    return [(truth.changes(adapter), weight) for adapter, weight in zip(adapters, weights, strict=True)]


def exact(adapters: Sequence[Adapter], weights: Sequence[float], method: str, options: Options) -> dict[str, Any]:
    """What the rule makes of the dense changes, by brute force; of those alone that change a layer."""
    found, values = {}, [truth.dense(adapter) for adapter in adapters]
    for module in truth.union(adapters):
        held = [(v[module], w, a) for v, w, a in zip(values, weights, adapters, strict=True) if module in v]
        deltas, shares = [delta for delta, _, _ in held], [weight for _, weight, _ in held]
        if method in ("ties", "magnitude_prune"):
            deltas = [truth.trim(delta, options.density) for delta in deltas]
        if method.startswith("dare"):
            begun = [stream(options.seed, f"{adapter.name}\n0", module) for _, _, adapter in held]
            deltas = [truth.drop(delta, options.density, b) for delta, b in zip(deltas, begun, strict=True)]
        elects = method.endswith("ties")
        found[module] = truth.elect(deltas, shares, options.majority_sign) if elects else truth.summed(deltas, shares)
    return found


def check(made: Combined, expected: dict[str, torch.Tensor], largest: int | None) -> None:
    """Every layer is the best there is at its rank, the error that is told is the error, and the whole adds up."""
    stored = truth.dense(made.adapter)
    assert set(stored) == {layer.module for layer in made.layers} == set(expected)
    whole = lost = 0.0
    for layer in made.layers:
        delta, matrix = expected[layer.module], stored[layer.module]
        measured, best = truth.relative(matrix, delta), truth.best_error(delta, layer.rank)
        assert made.adapter.tensors[f"base_model.model.{layer.module}.lora_A.weight"].shape[0] == layer.rank
        assert measured == pytest.approx(layer.error, abs=2e-6, rel=1e-5)
        assert measured <= best * (1 + 1e-4) + 2e-6
        if largest is not None:
            assert layer.rank <= largest
        whole, lost = whole + float(delta.norm()) ** 2, lost + float((matrix - delta).norm()) ** 2
    assert made.error == pytest.approx((lost / whole) ** 0.5, abs=2e-6, rel=1e-5)


def check_plain(adapter: Adapter) -> None:
    """Float32, scaling 1 in every layer for PEFT's patterns and for ours, and a configuration that is read back."""
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in adapter.tensors.values())
    spec: Any = adapter.spec
    assert parse_adapter_config(adapter_config_bytes(spec)) == spec
    for key, tensor in adapter.tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert spec.rank_of(module) == tensor.shape[0]
            assert spec.scaling(module) == truth.scaling(spec, module) == 1.0
            assert spec.targets(module)


@pytest.mark.parametrize("method", SUMS)
@pytest.mark.parametrize("mix", MIXES)
def test_sums_are_those_of_the_dense_changes(mix: str, method: str):
    adapters, weights = MIXES[mix], WEIGHTS[len(MIXES[mix])]
    made = combine(members(adapters, weights), method)
    expected = exact(adapters, weights, method, Options())
    check(made, expected, None)
    check_plain(made.adapter)
    for layer in made.layers:
        held = [truth.changes(adapter).modules.get(layer.module) for adapter in adapters]
        ranks = [change.matrix.rank for change in held if change is not None]
        whole = int(torch.linalg.matrix_rank(expected[layer.module]))
        assert layer.rank == {"cat": sum(ranks), "svd": min(max(ranks), whole)}.get(method, whole)
        assert method == "svd" or layer.error < 1e-6
    check_biases(made, adapters, weights)


def check_biases(made: Combined, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    each = [truth.biases(adapter) for adapter in adapters]
    found = truth.biases(made.adapter)
    assert set(found) == ({layer.module for layer in made.layers} if any(each) else set())
    for module, bias in found.items():
        held = [w * one[module] for one, w in zip(each, weights, strict=True) if module in one]
        torch.testing.assert_close(bias, sum(held, torch.zeros_like(bias)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", BY_VALUE)
@pytest.mark.parametrize("mix", MIXES)
def test_rules_on_values_mean_the_dense_changes(mix: str, method: str):
    adapters, weights = MIXES[mix], WEIGHTS[len(MIXES[mix])]
    options = Options(density=0.4, seed=5, rank=6)
    made = combine(members(adapters, weights), method, options)
    check(made, exact(adapters, weights, method, options), 6)
    check_plain(made.adapter)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("method", BY_VALUE)
def test_rules_on_values_at_full_rank_are_exact(method: str, density: float, majority: Any):
    adapters, weights = MIXES["ranks"], WEIGHTS[3]
    options = Options(density=density, majority_sign=majority, rank=20)
    made = combine(members(adapters, weights), method, options)
    check(made, exact(adapters, weights, method, options), 20)
    assert made.error < 1e-6


@pytest.mark.parametrize("method", BY_VALUE)
def test_rules_on_values_have_the_rank_of_the_largest_member(method: str):
    made = combine(members(MIXES["patterns"], [1, 1]), method)
    ranks = {layer.module: layer.rank for layer in made.layers}
    assert ranks["layers.1.attn.q_proj"] == 2
    assert set(ranks.values()) == {2, 3, 5}


@pytest.mark.parametrize("method", [m for m in RULES if m not in ("cat", "slerp")])
@pytest.mark.parametrize("wished", [0.6, 0.2, 0.01])
def test_a_wished_error_is_kept_in_every_layer_with_the_least_rank(method: str, wished: float):
    adapters, weights = MIXES["ranks"], WEIGHTS[3]
    options = Options(error=wished, density=0.4)
    made = combine(members(adapters, weights), method, options)
    expected = exact(adapters, weights, method, options)
    check(made, expected, None)
    for layer in made.layers:
        assert layer.error <= wished
        assert layer.rank == 1 or truth.best_error(expected[layer.module], layer.rank - 1) > wished * (1 - 1e-4)


@pytest.mark.parametrize("method", ["linear", "svd", "task_arithmetic"])
@pytest.mark.parametrize("rank", [1, 5, 1000])
def test_a_wished_rank(method: str, rank: int):
    made = combine(members(MIXES["all"], WEIGHTS[5]), method, Options(rank=rank))
    check(made, exact(MIXES["all"], WEIGHTS[5], method, Options()), rank)


@pytest.mark.parametrize("mix", [mix for mix, some in MIXES.items() if len(some) == 2])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_of_whole_changes(mix: str, t: float):
    adapters = MIXES[mix]
    made = combine(members(adapters, [1 - t, t]), "slerp")
    modules, values = truth.union(adapters), [truth.dense(adapter) for adapter in adapters]
    each = [truth.biases(adapter) for adapter in adapters]
    flat = [
        torch.cat([
            *(delta.flatten() for m in modules for delta in truth.by_module([v], m)),
            *(b.get(m, torch.zeros(truth.SHAPES[m][0], dtype=torch.float64)) for m in modules),
        ])
        for v, b in zip(values, each, strict=True)
    ]  # fmt: skip
    one, two = flat
    angle = torch.acos(one @ two / one.norm() / two.norm())
    length = (1 - t) * one.norm() + t * two.norm()
    way = torch.sin((1 - t) * angle) * one / one.norm() + torch.sin(t * angle) * two / two.norm()
    expected = length * way / torch.sin(angle)
    stored, biases, start = truth.dense(made.adapter), truth.biases(made.adapter), 0
    for module in modules:
        n_out, n_in = truth.SHAPES[module]
        part = expected[start : start + n_out * n_in].view(n_out, n_in)
        found = stored.get(module, torch.zeros_like(part))
        torch.testing.assert_close(found, part, rtol=1e-5, atol=1e-6)
        start += n_out * n_in
    for module in modules:
        part = expected[start : start + truth.SHAPES[module][0]]
        torch.testing.assert_close(biases.get(module, torch.zeros_like(part)), part, rtol=1e-5, atol=1e-6)
        start += len(part)


def test_the_angle_of_slerp_is_no_warning():
    events: list[object] = []
    made = combine(members(MIXES["ranks"][:2], [0.5, 0.5]), "slerp", on_event=events.append)
    (angle,) = [event for event in events if isinstance(event, Note) and "degrees between them" in event.text]
    assert angle.level == "info"
    assert angle.text in made.notes


def test_slerp_takes_two():
    with pytest.raises(Unsupported, match="takes 2 adapters, not 3"):
        combine(members(MIXES["ranks"], [1, 1, 1]), "slerp")


# --- identities --------------------------------------------------------------------------------------------------

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KIND = st.sampled_from(truth.KINDS)
WEIGHT = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)
METHOD = st.sampled_from([method for method in RULES if method != "slerp"])


@FEW
@given(kind=KIND, seed=st.integers(0, 50), method=METHOD, rank=st.integers(1, 9))
def test_weight_1_is_the_adapter_itself(kind: str, seed: int, method: str, rank: int):
    adapter = truth.lora(seed, kind, rank=rank)
    made = combine(members([adapter], [1.0]), method, Options(density=1.0))
    found = truth.dense(made.adapter)
    for module, delta in truth.dense(adapter).items():
        assert truth.relative(found[module], delta) < 2e-6
    for module, bias in truth.biases(adapter).items():
        torch.testing.assert_close(truth.biases(made.adapter)[module], bias)


@FEW
@given(kinds=st.lists(KIND, min_size=2, max_size=3), method=METHOD, data=st.data())
def test_the_order_changes_nothing(kinds: list[str], method: str, data: st.DataObject):
    some = [(truth.changes(truth.lora(i, kind)), data.draw(WEIGHT)) for i, kind in enumerate(kinds)]
    options = Options(density=0.5)
    made = [combine(order, method, options).adapter.tensors for order in (some, data.draw(st.permutations(some)))]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][key]) for key, tensor in made[0].items())


@FEW
@given(kind=KIND, weight=WEIGHT, method=METHOD)
def test_weight_0_takes_no_part(kind: str, weight: float, method: str):
    one, gone = truth.changes(truth.lora(1, kind)), truth.changes(truth.lora(2, "bias", rank=11))
    made = combine([(one, weight), (gone, 0.0)], method)
    alone = combine([(one, weight)], method)
    assert "bias-2 has the weight 0 and takes no part." in made.notes
    assert all(torch.equal(tensor, made.adapter.tensors[key]) for key, tensor in alone.adapter.tensors.items())
    assert made.adapter.tensors.keys() == alone.adapter.tensors.keys()


@FEW
@given(kind=KIND, weight=WEIGHT, method=st.sampled_from([*SUMS, "ties", "magnitude_prune"]))
def test_a_less_a_is_nothing(kind: str, weight: float, method: str):
    one = truth.changes(truth.lora(1, kind))
    with pytest.raises(NoEffect, match="Nothing is left"):
        combine([(one, weight), (one, -weight)], method)
    with pytest.raises(NoEffect, match="Nothing is left"):
        combine([(one, 0.1), (one, 0.2), (one, -0.3)], "linear")


@FEW
@given(one=WEIGHT, two=WEIGHT, factor=WEIGHT, method=st.sampled_from(["linear", "cat", *BY_VALUE]))
def test_the_result_grows_as_the_weights_do(one: float, two: float, factor: float, method: str):
    some, options = [truth.lora(1), truth.lora(2, "rslora")], Options(rank=None if method == "cat" else 20)
    # Identities, not weights, decide what is dropped.
    plain = truth.dense(combine(members(some, [one, two]), method, options).adapter)
    more = truth.dense(combine(members(some, [one * factor, two * factor]), method, options).adapter)
    for module, delta in plain.items():
        assert truth.relative(more[module], factor * delta) < 1e-5


@FEW
@given(weights=st.tuples(WEIGHT, WEIGHT, WEIGHT), kinds=st.tuples(KIND, KIND, KIND))
def test_sums_of_sums_are_sums(weights: tuple[float, float, float], kinds: tuple[str, str, str]):
    some = [truth.changes(truth.lora(i, kind)) for i, kind in enumerate(kinds)]
    at_once = combine(list(zip(some, weights, strict=True)), "linear").adapter
    first = combine(list(zip(some[:2], weights[:2], strict=True)), "cat").adapter
    in_turn = combine([(changes_of(replace(first, name="first")), 1.0), (some[2], weights[2])], "linear").adapter
    found = truth.dense(in_turn)
    for module, delta in truth.dense(at_once).items():
        assert truth.relative(found[module], delta) < 1e-5


def test_other_seeds_drop_others():
    some = members(MIXES["alike"], [1, 1])
    made = [combine(some, "dare_linear", Options(seed=seed, rank=20)).adapter for seed in (0, 0, 1)]
    dense = [truth.dense(adapter)["layers.0.attn.q_proj"] for adapter in made]
    assert torch.equal(dense[0], dense[1])
    assert truth.relative(dense[2], dense[0]) > 0.1


def test_the_same_adapter_twice_is_dropped_twice():
    one = truth.changes(truth.lora(1))
    made = combine([(one, 0.5), (one, 0.5)], "dare_linear", Options(rank=20))
    alone = combine([(one, 1.0)], "dare_linear", Options(rank=20))
    module = "layers.0.attn.q_proj"
    assert truth.relative(truth.dense(made.adapter)[module], truth.dense(alone.adapter)[module]) > 0.1


def test_blocks_of_rows_change_nothing_and_are_never_whole(monkeypatch: pytest.MonkeyPatch):
    from adapterhub_lite.combining import low_rank, streamed

    some = members(MIXES["ranks"], WEIGHTS[3])
    whole = {method: combine(some, method, Options(rank=4)) for method in BY_VALUE}
    seen: list[int] = []
    rows = low_rank.LowRank.rows

    def noted(self: Any, start: int, stop: int) -> torch.Tensor:
        seen.append((min(stop, self.shape[0]) - start) * self.shape[1])
        return rows(self, start, stop)

    monkeypatch.setattr(low_rank.LowRank, "rows", noted)
    blocks = streamed.Streamed.blocks

    def small(self: Any) -> Any:
        return blocks(replace(self, block=45))

    monkeypatch.setattr(streamed.Streamed, "blocks", small)
    for method in BY_VALUE:
        made = combine(some, method, Options(rank=4))
        assert made.error == pytest.approx(whole[method].error, rel=1e-5)
        for layer, other in zip(made.layers, whole[method].layers, strict=True):
            assert layer.error == pytest.approx(other.error, rel=1e-4)
    assert max(seen) <= 45


# --- what is told ------------------------------------------------------------------------------------------------


def test_layers_that_cancel_are_left_out_and_told():
    one, two = truth.lora(1), truth.lora(2, modules=QUERIES)
    same = {k: v for k, v in one.tensors.items() if "down_proj" in k}
    less = Adapter(replace(one.spec, target_modules=("down_proj",)), same, name="less")
    heard: list[Event] = []
    made = combine(members([one, two, less], [1, 1, -1]), "linear", on_event=heard.append)
    assert {layer.module for layer in made.layers} == set(QUERIES)
    assert made.adapter.spec.target_modules == ("q_proj",)
    told = [event.text for event in heard if isinstance(event, Note)]
    assert told == list(made.notes)
    assert any("2 of 4 layers are left out" in text and "layers.0.mlp.down_proj" in text for text in told)
    assert any("less has no part in 2 of 4 layers" in text for text in told)
    check_plain(made.adapter)


def test_a_layer_left_out_of_many_of_its_name_is_not_targeted():
    one = truth.lora(1)
    gone = "layers.1.mlp.down_proj"
    less = Adapter(replace(one.spec, target_modules=()), {k: v for k, v in one.tensors.items() if gone in k}, name="l")
    made = combine(members([one, less], [1, -1]), "linear")
    spec: Any = made.adapter.spec
    assert spec.target_modules == ("layers.0.mlp.down_proj", "q_proj")
    assert not spec.targets(gone)


def test_target_names():
    specs = [truth.lora(1).spec]
    names = tuple(truth.SHAPES)
    assert target_names(names, [], specs) == ("down_proj", "q_proj")
    assert target_names(names, [], [replace(specs[0], target_modules=())]) == tuple(sorted(names))
    assert target_names(names[:3], names[3:], specs) == ("layers.0.mlp.down_proj", "q_proj")


def test_a_bias_alone_is_a_layer():
    one = truth.lora(1, "bias")
    plain = Adapter(replace(one.spec, lora_bias=False), {k: v for k, v in one.tensors.items() if "bias" not in k})
    made = combine(members([one, replace(plain, name="plain")], [1, -1]), "linear")
    assert {layer.rank for layer in made.layers} == {1}
    assert all(float(delta.norm()) == 0 for delta in truth.dense(made.adapter).values())
    for module, bias in truth.biases(one).items():
        torch.testing.assert_close(truth.biases(made.adapter)[module], bias)


def test_members_of_an_approximation_are_told():
    some = [(changes_of(truth.lora(1, "dora"), truth.weight_of, rank=3), 1.0), (truth.changes(truth.lora(2)), 1.0)]
    notes = combine(some, "linear").notes
    assert any(note.startswith("dora-1 was brought to low rank first, with a relative error of 0.") for note in notes)
    change = some[0][0].modules
    dense = truth.dense(truth.lora(1, "dora"))
    lost = sum(float((change[m].matrix.rows(0, 99) - d).norm()) ** 2 for m, d in dense.items())
    error = (lost / sum(float(d.norm()) ** 2 for d in dense.values())) ** 0.5
    assert any(f"{error:.3g}" in note for note in notes)


def test_plain_form_and_lines():
    made = combine(members(MIXES["targets"], [1, -0.5]), "svd", Options(rank=2))
    told = made.to_dict()
    assert told["weights"] == [{"name": "lora-1", "weight": 1.0}, {"name": "lora-2", "weight": -0.5}]
    assert told["layers"][0] == {
        "module": "layers.0.attn.q_proj", "rank": 2, "error": made.layers[0].error, "members": ("lora-1", "lora-2"),
    }  # fmt: skip
    assert made.layers[1].members == ("lora-2",)
    lines = made.lines()
    assert lines[0] == "svd of 1*lora-1 + -0.5*lora-2"
    assert lines[1].startswith("4 layers of rank 2, relative error 0.")
    assert lines[-1] == "lora-1 has no part in 2 of 4 layers."


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("nothing", Options(), "no rule 'nothing'"),
        ("svd", Options(rank=0), "rank of 0"),
        ("svd", Options(rank=1025), "rank of 1025"),
        ("svd", Options(error=0.0), "no relative error"),
        ("svd", Options(error=1.0), "no relative error"),
        ("ties", Options(density=0.0), "no share"),
        ("ties", Options(density=1.1), "no share"),
        ("ties", Options(majority_sign="most"), "elect"),  # type: ignore[arg-type]
        ("cat", Options(rank=3), "keeps all ranks"),
        ("cat", Options(error=0.1), "keeps all ranks"),
    ],
)
def test_options_out_of_range(method: str, options: Options, why: str):
    with pytest.raises(Unsupported, match=why):
        combine(members(MIXES["alike"], [1, 1]), method, options)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "1"])
def test_weights_that_are_no_numbers(weight: Any):
    with pytest.raises(Unsupported, match="no finite number"):
        combine([(truth.changes(truth.lora(1)), weight)], "linear")


def test_nothing_to_combine():
    with pytest.raises(Unsupported, match="nothing to combine"):
        combine([], "linear")
    with pytest.raises(NoEffect, match="All weights are 0"):
        combine(members(MIXES["alike"], [0, 0]), "linear")
    with pytest.raises(NoEffect, match="Nothing is left"):
        combine(members(MIXES["alike"], [1e-300, 1e-300]), "linear")


@pytest.mark.parametrize("method", ["linear", "cat", "ties"])
@pytest.mark.parametrize("weight", [1e300, 1e39])
def test_weights_beyond_float32(method: str, weight: float):
    with pytest.raises(AdapterMismatch, match="beyond what float32 holds"):
        combine(members(MIXES["biases"], [weight, 1]), method)


def test_shapes_that_differ():
    one, other = truth.lora(1), truth.lora(2)
    key = "base_model.model.layers.0.attn.q_proj.lora_A.weight"
    wide = Adapter(other.spec, {**other.tensors, key: torch.ones(4, 21)}, name="wide")
    for method in ("linear", "slerp", "ties"):
        with pytest.raises(AdapterMismatch, match=r"\[12, 20\] in lora-1 and \[12, 21\] in wide"):
            combine([(changes_of(one), 1.0), (changes_of(wide), 1.0)], method)


def test_a_rank_that_cannot_be_stored():
    some = [(changes_of(truth.lora(i, rank=400)), 1.0) for i in range(3)]
    with pytest.raises(Unsupported, match="rank 1200, and 1024 is the largest"):
        combine(some, "cat")
    assert combine(some, "linear").layers[0].rank == 12


def carded(adapter: Adapter, **marks: str) -> Adapter:
    return replace(adapter, card=Card(base={"name": "b", "fingerprint": marks}))


def test_cards_of_different_bases():
    one, two = truth.lora(1), truth.lora(2)
    mine, theirs = carded(one, weights="a", quantization="x"), carded(two, weights="b")
    with pytest.raises(BaseMismatch, match="their weights differ"):
        combine([(changes_of(mine), 1.0), (changes_of(theirs), 1.0)], "linear")
    again = carded(two, weights="a", quantization="y")
    combine([(changes_of(mine), 1.0), (changes_of(again), 1.0), (changes_of(truth.lora(3)), 1.0)], "linear")


def test_names_of_different_bases_are_told():
    some = members([truth.lora(1, base_model="x"), truth.lora(2, base_model="y")], [1, 1])
    made = combine(some, "linear")
    assert any("different bases: x, y" in note for note in made.notes)


def headed(seed: int, value: float, task: str | None = "SEQ_CLS") -> Adapter:
    made = truth.lora(seed, task_type=task, modules_to_save=("score",))
    return replace(made, tensors={**made.tensors, "base_model.model.score.weight": torch.full((2, 12), value)})


def test_heads_are_not_summed():
    one, same, other = (truth.changes(headed(seed, value)) for seed, value in ((1, 1.0), (2, 1.0), (3, 2.0)))
    key = "base_model.model.score.weight"
    made = combine([(one, 0.5), (same, 0.5)], "linear").adapter
    assert torch.equal(made.tensors[key], torch.ones(2, 12))
    assert made.spec.modules_to_save == ("score",)
    with pytest.raises(Unsupported, match="heads are not summed") as caught:
        combine([(one, 0.5), (other, 0.5)], "linear")
    assert "lora-1, lora-3" in str(caught.value)
    assert "head_of" in caught.value.hint
    for index, value in ((0, 1.0), (1, 2.0)):
        made = combine([(one, 0.5), (other, 0.5)], "linear", head_of=index).adapter
        assert torch.equal(made.tensors[key], torch.full((2, 12), value))
    assert torch.equal(combine([(one, 0.5), (other, 0.0)], "linear").adapter.tensors[key], torch.ones(2, 12))
    made = combine([(one, 0.5), (other, 0.0)], "linear", head_of=1).adapter
    assert torch.equal(made.tensors[key], torch.full((2, 12), 2.0))


def test_the_head_that_is_named_must_be_there():
    one, bare = truth.changes(headed(1, 1.0)), truth.changes(truth.lora(2))
    with pytest.raises(Unsupported, match="lora-2 has no head"):
        combine([(one, 1.0), (bare, 1.0)], "linear", head_of=1)
    for index in (-1, 2):
        with pytest.raises(Unsupported, match="no member"):
            combine([(one, 1.0), (bare, 1.0)], "linear", head_of=index)
    assert combine([(one, 1.0), (bare, 1.0)], "linear").adapter.spec.modules_to_save == ("score",)


def test_task_types():
    causal, other = truth.lora(1, task_type="CAUSAL_LM"), truth.lora(2)
    assert combine(members([causal, other], [1, 1]), "linear").adapter.spec.task_type == "CAUSAL_LM"
    features = truth.lora(3, task_type="FEATURE_EXTRACTION")
    with pytest.raises(Unsupported, match="task types differ"):
        combine(members([causal, features], [1, 1]), "linear")
    made = combine(members([causal, headed(4, 1.0)], [1, 1]), "linear")
    assert made.adapter.spec.task_type == "SEQ_CLS"
    assert any("task types differ (CAUSAL_LM, SEQ_CLS)" in note for note in made.notes)


# --- in plain PEFT -----------------------------------------------------------------------------------------------

PEERS = list(itertools.product(("llama", "gpt2", "bert"), truth.KINDS))


def saved(folder: Path, family: str, kind: str, seed: int, **changes: Any) -> Adapter:
    model = tiny.model(family, num_labels=peers.LABELS) if family == "bert" else tiny.model(family)
    made = peers.wrap(model, peers.config(family, kind, peers.task_type(family), **changes), seed)
    made.save_pretrained(folder)
    return read_adapter(folder, name=f"{kind}-{seed}")


@pytest.mark.parametrize(("family", "kind"), PEERS)
def test_plain_peft_gives_the_logits_of_the_base_with_the_true_sum(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    labels = {"num_labels": peers.LABELS} if family == "bert" else {}
    base = tiny.model(family, **labels)
    monkeypatch.setattr(truth, "weight_of", lambda name: oriented(base, name))
    one = saved(tmp_path / "one", family, kind, 1)
    two = saved(tmp_path / "two", family, "lora", 2, r=3, target_modules=[peers._SPECIAL[family][1].split(".")[-1]])
    weights = [0.8, -0.5]
    some = [(changes_of(a, truth.weight_of, rank=64), w) for a, w in zip((one, two), weights, strict=True)]
    made = combine(some, "linear", head_of=0 if some[0][0].head else None)
    summed = tiny.model(family, **labels)
    for adapter, weight in zip((one, two), weights, strict=True):
        add(summed, adapter, weight)
    for key, tensor in some[0][0].head.items():
        summed.get_parameter(key).data.copy_(tensor)
    folder = tmp_path / "made"
    folder.mkdir()
    for name, data in made.adapter.files().items():
        (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(tiny.model(family, **labels), str(folder)).eval()
        peers.assert_logits_equal(peers.logits(loaded), peers.logits(summed), 2e-5)
        assert not torch.allclose(peers.logits(summed)[0], peers.logits(base)[0], atol=1e-3)


def add(model: Any, adapter: Adapter, weight: float) -> None:
    """Add what an adapter adds to a plain model, in place."""
    for name, delta in truth.dense(adapter).items():
        layer: Any = model.get_submodule(name)
        layer.weight.data += weight * (delta.T if type(layer).__name__ == "Conv1D" else delta).float()
    for name, bias in truth.biases(adapter).items():
        layer = model.get_submodule(name)
        own = layer.bias.data if layer.bias is not None else 0.0
        layer.bias = torch.nn.Parameter(own + weight * bias.float())


def oriented(model: Any, name: str) -> torch.Tensor:
    layer = model.get_submodule(name)
    weight = layer.weight.detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def test_keys_of_patterns_match_their_own_module_alone_in_peft(tmp_path: Path):
    """Modules whose names end alike, with ranks of their own: nested h.1 and block.h.1, x1 and y.x1."""

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(8, 8, bias=False)
            self.xq = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.xq(x)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.a_b, self.q = Inner(), torch.nn.ModuleDict({"a": Inner()}), torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.a_b["a"](x) + self.q(x)

    names = ["a.q", "a.xq", "a_b.a.q", "a_b.a.xq", "q"]
    generator = torch.Generator().manual_seed(0)
    spec = replace(truth.lora(1).spec, rank=5, alpha=5.0, target_modules=("q", "xq"))
    tensors, deltas = {}, {}
    for rank, name in enumerate(names, 1):  # of rank 1 to 5, in an adapter of rank 5
        up, down = torch.randn(8, rank, generator=generator), torch.randn(rank, 8, generator=generator)
        deltas[name] = up @ down
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([down, torch.zeros(5 - rank, 8)])
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat([up, torch.zeros(8, 5 - rank)], 1)
    made = combine([(changes_of(Adapter(spec, tensors, name="one")), 1.0)], "linear")
    assert {layer.module: layer.rank for layer in made.layers} == {n: i for i, n in enumerate(names, 1)}
    assert len(made.adapter.spec.rank_pattern) == 4  # type: ignore[union-attr]
    for name, data in made.adapter.files().items():
        (tmp_path / name).write_bytes(data)
    expected = Model()
    for name, delta in deltas.items():
        layer: Any = expected.get_submodule(name)
        layer.weight.data += delta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), expected(x), rtol=1e-4, atol=1e-4)


def test_an_embedding_in_plain_peft(tmp_path: Path):
    model = tiny.model("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["embed_tokens", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = peft.get_peft_model(model, config).eval()
        for name, parameter in one.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
        expected = peers.logits(one)
        one.save_pretrained(tmp_path / "one", save_embedding_layers=False)
        made = combine([(changes_of(read_adapter(tmp_path / "one")), 1.0)], "linear")
        (tmp_path / "made").mkdir()
        for name, data in made.adapter.files().items():
            (tmp_path / "made" / name).write_bytes(data)
        loaded = peft.PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path / "made")).eval()
        peers.assert_logits_equal(peers.logits(loaded), expected, 2e-5)
    biased = truth.changes(truth.lora(1, "bias"))
    with pytest.raises(Unsupported, match="lora_bias"):
        combine([(changes_of(read_adapter(tmp_path / "one")), 1.0), (biased, 1.0)], "linear")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rank": 1.5}, "rank is a whole number"),
        ({"rank": True}, "rank is a whole number"),
        ({"error": "x"}, "relative error is a number"),
        ({"error": True}, "relative error is a number"),
        ({"density": "x"}, "no share of values"),
        ({"density": None}, "no share of values"),
        ({"density": True}, "no share of values"),
        ({"seed": "x"}, "seed is a whole number"),
        ({"seed": 1.0}, "seed is a whole number"),
        ({"seed": True}, "seed is a whole number"),
        ({"majority_sign": ["total"]}, "no way to elect"),
    ],
)
def test_options_that_are_of_another_type(options: dict[str, Any], why: str):
    with pytest.raises(Unsupported, match=why):
        combine(members([truth.lora(1), truth.lora(2)], [1, 1]), "dare_ties", Options(**options))


@pytest.mark.parametrize("small", [0, 640])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear"])
def test_an_error_below_rounding_is_told_as_what_float32_keeps(
    method: str, small: int, monkeypatch: pytest.MonkeyPatch
):
    """All ranks there are reach any error, whatever the rounding of squares says."""
    monkeypatch.setattr("adapterhub_lite.combining.streamed._SMALL", small)
    for seed in range(4):
        given_ = members([truth.lora(seed), truth.lora(seed + 10, rank=3)], [1, 1])
        with pytest.raises(Unsupported, match=r"An error of 1e-09 cannot be kept .* of which float32 makes"):
            combine(given_, method, Options(error=1e-9))
