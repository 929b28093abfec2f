"""A matrix plus products, rounded once: torch's float32 bits, in every format and at every edge."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.kernels.library import library
from adapterhub_lite.kernels.merge import Addition, merge_rows

pytestmark = pytest.mark.skipif(library().functions is None, reason="no native code here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 15), (2, 16), (5, 17), (6, 64), (7, 63), (13, 65), (12, 130), (31, 513), (4, 1100)]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def _in_order(source: torch.Tensor, additions: list[Addition]) -> torch.Tensor:
    """Every sum from the first rank to the last with one rounding a step, as by fused multiply-adds."""
    total = source.float()
    for a in additions:
        sums = torch.zeros(total.shape)
        for k in range(a.right.shape[0]):
            exact = a.left[:, k : k + 1].double() * a.right[k : k + 1].double()
            sums = (sums.double() + exact).float()
        total = total + sums * a.factor
    return total


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_it_is_the_sum_rounded_once(source_dtype, target_dtype, rows, columns):
    source = _random(rows, columns).to(source_dtype)
    additions = [Addition(_random(rows, r, seed=r), _random(r, columns, seed=r), 0.3 * r) for r in (1, 5)]
    target = torch.full((rows, columns), 7.0, dtype=target_dtype)
    done = merge_rows(source, additions, target)
    if done is None:
        assert torch.float16 in (source_dtype, target_dtype)
        return
    assert done
    expected = _in_order(source, additions)
    if target_dtype == torch.float32:
        # Sums in float64 that are rounded to float32 are those of a fused step but for ties of ties.
        assert (target != expected).float().mean() < 1e-3
        torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)
    else:
        assert (target != expected.to(target_dtype)).float().mean() < 1e-3
    if source_dtype == target_dtype:
        assert merge_rows(source, additions, source)
        assert torch.equal(source, target)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 15, 16, 31, 64, 128, 200])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (96, 200), (257, 131), (576, 1536)])
def test_the_bits_are_those_of_torch(rank, rows, columns):
    source, left, right = _random(rows, columns), _random(rows, rank, seed=1), _random(rank, columns, seed=2)
    target = torch.empty_like(source)
    assert merge_rows(source, [Addition(left, right, 0.7)], target)
    assert torch.equal(target, source + (left @ right) * 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_addition_is_a_change_of_format(dtype):
    source = _random(9, 77)
    target = torch.empty(9, 77, dtype=dtype)
    assert merge_rows(source, [], target) in (True, None)
    if dtype != torch.float16:
        assert torch.equal(target, source.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (6, 36), (3, 20)])
def test_values_that_are_no_numbers_are_seen(dtype, value, place):
    source, left, right = _random(7, 37).to(dtype), torch.ones(7, 2), torch.ones(2, 37)
    target = torch.empty_like(source)
    assert merge_rows(source, [Addition(left, right, 1.0)], target) in (True, None)
    source[place] = value
    assert merge_rows(source, [Addition(left, right, 1.0)], target) in (False, None)


def test_what_rounding_makes_infinite_is_seen():
    source = torch.full((4, 20), 3.0e38)
    for dtype, factor in ((torch.float32, 1.0e38), (torch.bfloat16, 0.4e38), (torch.float16, 0.0)):
        target = torch.empty(4, 20, dtype=dtype)
        found = merge_rows(source, [Addition(torch.ones(4, 1), torch.ones(1, 20), factor)], target)
        assert found in (False, None)
        if found is False:
            assert bool(torch.isinf(target).all()) or dtype == torch.float32


def test_ties_go_to_even():
    source = torch.tensor([[1.00390625, 1.01171875, -1.00390625, 1.0039062]])
    target = torch.empty(1, 4, dtype=torch.bfloat16)
    assert merge_rows(source, [], target)
    assert torch.equal(target, source.bfloat16())
    assert target.tolist() == [[1.0, 1.015625, -1.0, 1.0]]


def test_matrices_that_do_not_fit_are_an_error():
    source = torch.zeros(3, 4)
    for left, right in ((torch.zeros(2, 1), torch.zeros(1, 4)), (torch.zeros(3, 1), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match="fit together"):
            merge_rows(source, [Addition(left, right, 1.0)], source)
    assert merge_rows(source.double(), [], source.double()) is None
