"""Each rule as a function of tensors, against brute force value by value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.combining.rules import RULES
from adapterhub_lite.combining.rules.dare import dropped, stream
from adapterhub_lite.combining.rules.prune import trimmed
from adapterhub_lite.combining.rules.rule import added
from adapterhub_lite.combining.rules.slerp import great_circle
from adapterhub_lite.combining.rules.ties import elected_mean
from adapterhub_lite.errors import NoEffect, Unsupported
from tests.combining import truth

NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.0]), st.floats(-8, 8).map(lambda v: round(v, 3)))
MATRICES = st.integers(1, 4).flatmap(
    lambda count: st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=count, max_size=count)
)


def test_the_rules_there_are():
    assert set(RULES) == {
        "linear", "cat", "svd", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    }  # fmt: skip
    assert all(rule.name == name and rule.summary and rule.source for name, rule in RULES.items())


def tensors(values: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=torch.float64).view(2, 3) for v in values]


@settings(max_examples=200, deadline=None)
@given(values=MATRICES, majority=st.sampled_from(["total", "frequency"]))
def test_elected_mean_value_by_value(values: list[list[float]], majority: str):
    changes = tensors(values)
    expected = truth.elect(changes, [1.0] * len(changes), majority)
    torch.testing.assert_close(elected_mean(changes, majority), expected)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(changes, tensors(values), strict=True)), "members were changed"


def test_elections():
    one, two, three = torch.tensor([[3.0]]), torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    assert elected_mean([one, two, three], "total").item() == 3.0  # by mass
    assert elected_mean([one, two, three], "frequency").item() == -1.25  # by number
    assert elected_mean([one, two], "frequency").item() == 3.0  # the sum decides between equals
    assert elected_mean([one, -one], "total").item() == 0.0
    assert elected_mean([one, torch.zeros(1, 1)], "total").item() == 3.0  # zeros agree with nobody


@settings(max_examples=100, deadline=None)
@given(values=MATRICES)
def test_the_sum(values: list[list[float]]):
    changes = tensors(values)
    torch.testing.assert_close(added(changes), sum(changes))
    assert all(torch.equal(a, b) for a, b in zip(changes, tensors(values), strict=True)), "members were changed"


def test_trimmed_keeps_what_is_large_enough():
    change = torch.tensor([[3.0, -2.0, 1.0], [0.0, -5.0, 2.0]], dtype=torch.float64)
    assert trimmed(change, 2.0).tolist() == [[3, -2, 0], [0, -5, 2]]
    assert trimmed(change, math.nextafter(2.0, 3)).tolist() == [[3, 0, 0], [0, -5, 0]]
    assert torch.equal(trimmed(change, 0.0), change)
    assert torch.equal(trimmed(change * 5e-324, 5e-324), change * 5e-324)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.97])
def test_dropped_is_the_hash_of_each_place(density: float):
    change = torch.randn(7, 11, dtype=torch.float64)
    begun = stream(3, "a", "layers.0")
    expected = truth.drop(change, density, begun)
    torch.testing.assert_close(dropped(change, density, begun, 0), expected)
    parts = [dropped(change[i : i + 2], density, begun, i) for i in range(0, 7, 2)]
    torch.testing.assert_close(torch.cat(parts), expected)


def test_what_is_dropped_depends_on_seed_member_and_module_and_on_nothing_else():
    change = torch.ones(50, 40, dtype=torch.float64)
    named = [(0, "a", "x"), (1, "a", "x"), (0, "b", "x"), (0, "a", "y")]
    found = [dropped(change, 0.5, stream(*name), 0) for name in named]
    assert torch.equal(found[0], dropped(change, 0.5, stream(0, "a", "x"), 0))
    for other in found[1:]:
        assert 0.4 < float((other != found[0]).double().mean()) < 0.6


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_dropping_keeps_the_expected_value(density: float):
    found = dropped(torch.ones(1000, 500, dtype=torch.float64), density, stream(0, "a", "x"), 0)
    assert set(found.unique().tolist()) == {0.0, 1 / density}
    deviation = math.sqrt((1 - density) / density / found.numel())
    assert abs(float(found.mean()) - 1) < 5 * deviation
    rows, columns = found.mean(1), found.mean(0)
    assert abs(float(rows.std()) / math.sqrt((1 - density) / density / 500) - 1) < 0.2
    assert abs(float(columns.std()) / math.sqrt((1 - density) / density / 1000) - 1) < 0.2


# --- slerp -------------------------------------------------------------------------------------------------------


def circle(one: torch.Tensor, two: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    pair = torch.stack([one, two])
    factors, _ = great_circle(pair @ pair.T, weights)
    return factors[0] * one + factors[1] * two


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), t=st.floats(0, 1), size=st.floats(0.1, 10))
def test_slerp_turns_by_the_share_of_the_angle(seed: int, t: float, size: float):
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    two = two * size
    found = circle(one, two, (1 - t, t))
    whole = math.acos(float(one @ two / one.norm() / two.norm()))
    turned = math.acos(max(-1.0, min(1.0, float(one @ found / one.norm() / found.norm()))))
    assert turned == pytest.approx(t * whole, abs=1e-6)
    assert float(found.norm()) == pytest.approx(float((1 - t) * one.norm() + t * two.norm()))
    again = circle(two, one, (3 * t, 3 * (1 - t)))
    torch.testing.assert_close(again, found)


def test_the_ends_of_the_way():
    one, two = torch.randn(2, 9, dtype=torch.float64)
    assert torch.equal(circle(one, two, (1, 0)), one)
    assert torch.equal(circle(one, two, (0, 2)), two)
    assert torch.equal(circle(one, -one, (1, 0)), one)


def test_parallel_changes_are_mixed_along_the_line():
    one = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(circle(one, 3 * one, (0.5, 0.5)), 2 * one)
    pair = torch.stack([one, 3 * one])
    assert "parallel" in great_circle(pair @ pair.T, (1, 1))[1]


def test_opposite_changes_have_no_way_between():
    one = torch.randn(9, dtype=torch.float64)
    with pytest.raises(Unsupported, match="opposite"):
        circle(one, -2 * one, (0.5, 0.5))


@pytest.mark.parametrize("weights", [(-1, 2), (0, 0)])
def test_shares_of_the_way(weights: tuple[float, float]):
    with pytest.raises(Unsupported, match="no shares"):
        circle(torch.ones(2, dtype=torch.float64), torch.arange(2, dtype=torch.float64), weights)


def test_nothing_has_no_direction():
    with pytest.raises(NoEffect, match="no direction"):
        circle(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), (1, 1))
