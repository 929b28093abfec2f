"""Thin factors against dense float64: the best approximation, its error, and matrices that are known by rows alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.combining.low_rank import LowRank, svds
from adapterhub_lite.combining.streamed import Streamed, _counted, brought_to_rank, largest
from adapterhub_lite.errors import Unsupported
from tests.combining.truth import best_error, relative

SHAPES = [(30, 20, 4), (20, 30, 12), (8, 40, 20), (40, 8, 20), (5, 5, 9), (1, 7, 3), (7, 1, 3), (64, 64, 1)]


def matrix(n_out: int, n_in: int, rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator))


def whole(found: LowRank) -> torch.Tensor:
    return found.up.double() @ found.down.double()


def streamed(dense: torch.Tensor, block: int = 64) -> Streamed:
    return Streamed((dense.shape[0], dense.shape[1]), lambda start, stop: dense[start:stop], block)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 50])
def test_truncation_is_the_best_there_is(shape: tuple[int, int, int], rank: int):
    given_ = matrix(*shape)
    dense = whole(given_)
    cut, error = given_.truncated(rank)
    assert cut.rank <= rank
    assert error == pytest.approx(best_error(dense, rank), abs=1e-12)
    assert relative(whole(cut), dense) == pytest.approx(best_error(dense, rank), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wished", [0.9, 0.3, 0.05, 1e-6])
def test_an_error_gets_the_least_rank_within_it(shape: tuple[int, int, int], wished: float):
    given_ = matrix(*shape)
    dense = whole(given_)
    cut, error = given_.truncated(error=wished)
    assert error <= wished
    assert relative(whole(cut), dense) <= wished * (1 + 1e-9)
    assert cut.rank == 1 or best_error(dense, cut.rank - 1) > wished
    limited, _ = given_.truncated(rank=1, error=wished)
    assert limited.rank == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_inner_product_singular_values_and_rows(shape: tuple[int, int, int]):
    one, two = matrix(*shape), matrix(*shape, seed=1)
    a, b = whole(one), whole(two)
    assert one.norm() == pytest.approx(float(a.norm()))
    assert one.inner(two) == pytest.approx(float((a * b).sum()), rel=1e-9, abs=1e-9)
    assert one.shape == a.shape
    expected = torch.linalg.svdvals(a)[: one.singular_values().numel()]
    torch.testing.assert_close(one.singular_values(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.rows(1, 4), a[1:4])
    torch.testing.assert_close(whole(one.scaled(-2.5)), -2.5 * a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole(one.plus([two])), a + b)
    assert one.plus([two]).rank == one.rank + two.rank


def test_what_cancels_is_of_rank_0():
    one = matrix(30, 20, 6)
    gone, error = one.plus([one.scaled(-1.0)]).truncated()
    assert (gone.rank, error, gone.shape) == (0, 0.0, (30, 20))
    assert one.plus([one.scaled(-1.0)]).norm() < 1e-12 * one.norm()
    assert LowRank.zero((3, 4)).truncated(2)[0].rank == 0
    assert LowRank.zero((3, 4)).norm() == 0.0


def test_the_numerical_rank_is_that_of_the_sum():
    one, two = matrix(30, 20, 6), matrix(30, 20, 3, seed=1)
    found, error = one.plus([two.scaled(2.0), one.scaled(0.5)]).truncated()
    assert (found.rank, error) == (9, pytest.approx(0, abs=1e-12))


def test_factors_of_unlike_size_lose_nothing():
    one, two = matrix(30, 20, 6), matrix(30, 20, 3, seed=1)
    large = LowRank(one.down.double() * 2.0**40, one.up.double() * 2.0**-40)
    small = LowRank(two.down.double() * 2.0**-40, two.up.double() * 2.0**40)
    found, _ = large.balanced().plus([small.balanced()]).truncated()
    assert found.rank == 9
    assert relative(whole(found), whole(one) + whole(two)) < 1e-12
    assert torch.equal(whole(large.balanced()), whole(large))


def test_a_remainder_of_two_that_nearly_cancel_is_kept():
    one, rest = matrix(30, 20, 6), matrix(30, 20, 2, seed=1).scaled(1e-7)
    found, _ = one.plus([one.scaled(-1.0), rest]).truncated()
    assert found.rank == 2
    assert relative(whole(found), whole(rest)) < 1e-6


def test_a_matrix_too_large_to_be_formed():
    given_ = matrix(60_000, 50_000, 8)  # 12 GB in float32
    cut, error = given_.truncated(4)
    values = given_.singular_values()
    assert error == pytest.approx(float(values[4:].norm() / values.norm()))
    assert cut.up.shape == (60_000, 4)


def test_many_at_once_are_what_each_is_alone():
    """Weighted sums, some of whose columns depend on each other."""
    sums = [[(matrix(30, 20, 6, seed), 0.5), (matrix(30, 20, 2, seed % 2), -1.5)] for seed in range(5)]
    sums[3] = [(sums[3][0][0], 1.0), (LowRank(torch.zeros(2, 20), torch.ones(30, 2)), 1.0)]
    sums[4] = [(matrix(30, 20, 6), 1.0), (LowRank(*(m.double() for m in part(matrix(30, 20, 6), 2))), -1.0)]
    ranks = []
    for one, found in zip(sums, svds(sums), strict=True):
        dense = sum(weight * whole(some) for some, weight in one)
        for kept in (1, 4, 8):
            assert found.error_at(kept) == pytest.approx(best_error(dense, kept), abs=1e-12)
            assert relative(whole(found.cut(min(kept, found.rank))), dense) == pytest.approx(
                best_error(dense, kept), abs=1e-10
            )
        assert found.norm == pytest.approx(float(dense.norm()))
        assert found.rank == int(torch.linalg.matrix_rank(dense))
        ranks.append(found.rank)
    assert ranks[2:] == [8, 6, 4]


def part(given_: LowRank, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return given_.down[:count], given_.up[:, :count]


@settings(max_examples=150, deadline=None)
@given(
    closeness=st.floats(-14, 0),
    size=st.floats(-12, 12),
    weight=st.one_of(st.just(-1.0), st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)),
    side=st.sampled_from(["up", "down", "both"]),
)
def test_columns_that_nearly_depend_on_each_other(closeness: float, size: float, weight: float, side: str):
    """However near, and however unlike in size: the truncation stays the best, and nothing is lost but the digits that
    two terms of unlike sign have in common.
    """
    one, other = (LowRank(m.down.double(), m.up.double()) for m in (matrix(30, 20, 4), matrix(30, 20, 4, seed=1)))
    near = 10**closeness
    down = one.down + near * other.down if side != "up" else other.down
    up = one.up + near * other.up if side != "down" else other.up
    two = LowRank(down * 10**size, up / 10**size)
    dense = whole(one) + weight * whole(two)
    close = 3e-9 + 1e-12 * float(whole(one).norm() / dense.norm())
    found = svds([[(one, 1.0), (two, weight)]])[0]
    assert relative(whole(found.cut(found.rank)), dense) < close
    for kept in (1, 3, 6):
        best = best_error(dense, kept)
        assert found.error_at(kept) == pytest.approx(best, abs=close)
        assert relative(whole(found.cut(min(kept, found.rank))), dense) == pytest.approx(best, abs=close)


# --- by rows alone -----------------------------------------------------------------------------------------------


def spectra() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    decaying = torch.linalg.qr(draw(90, 70)).Q * (0.9 ** torch.arange(70)) @ torch.linalg.qr(draw(70, 70)).Q
    low = draw(90, 5) @ draw(5, 130)
    return {
        "flat": draw(90, 130),
        "tall": draw(300, 40),
        "square": torch.linalg.qr(draw(64, 64)).Q,
        "decaying": decaying,
        "low": low,
        "low and noise": low + 0.3 * draw(90, 130),
        "sparse": draw(200, 150) * (torch.rand(200, 150, generator=generator) < 0.1),
        "row": draw(1, 50),
        "column": draw(50, 1),
    }


SPECTRA = spectra()


@pytest.fixture(params=["all products", "a space that is grown"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices have a way of their own; large ones' is taken by making none small."""
    if request.param != "all products":
        monkeypatch.setattr("adapterhub_lite.combining.streamed._SMALL", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rank", [1, 6, 16, 200])
@pytest.mark.parametrize("kind", SPECTRA)
def test_rows_are_brought_to_the_best_of_a_rank(kind: str, rank: int):
    dense = SPECTRA[kind]
    found = brought_to_rank(streamed(dense), rank, None, 1024)
    best = best_error(dense, rank)
    measured = relative(whole(found.matrix), dense)
    assert found.matrix.rank <= rank
    assert found.error == pytest.approx(measured, rel=1e-6, abs=1e-7)
    assert best - 1e-7 <= found.error <= best * (1 + 1e-4) + 1e-7
    assert found.norm == pytest.approx(float(dense.norm()))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("wished", [0.9, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("kind", SPECTRA)
def test_rows_are_brought_to_the_least_rank_within_an_error(kind: str, wished: float):
    dense = SPECTRA[kind]
    found = brought_to_rank(streamed(dense), None, wished, 1024)
    assert found.error <= wished * (1 + 1e-9)
    assert relative(whole(found.matrix), dense) <= wished * (1 + 1e-6)
    assert best_error(dense, found.matrix.rank - 1) > wished * (1 - 1e-4)


@pytest.mark.usefixtures("way")
def test_an_error_that_needs_too_large_a_rank_is_refused():
    with pytest.raises(Unsupported, match="more than 10"):
        brought_to_rank(streamed(SPECTRA["flat"]), None, 0.01, 10)


@pytest.mark.usefixtures("way")
def test_an_error_with_a_rank_is_aimed_at():
    found = brought_to_rank(streamed(SPECTRA["flat"]), 5, 0.01, 1024)
    assert found.matrix.rank == 5
    assert found.error == pytest.approx(best_error(SPECTRA["flat"], 5), rel=1e-4)


@pytest.mark.usefixtures("way")
def test_rows_of_zeros_are_of_rank_0():
    found = brought_to_rank(streamed(torch.zeros(5, 6, dtype=torch.float64)), 3, None, 1024)
    assert (found.matrix.rank, found.error, found.norm) == (0, 0.0, 0.0)


def test_many_columns_converge_with_restarts():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(500, 700, dtype=torch.float64, generator=generator)
    found = brought_to_rank(streamed(dense, 1 << 16), 3, None, 1024)
    assert found.error <= best_error(dense, 3) * (1 + 1e-4)


def test_no_block_is_larger_than_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adapterhub_lite.combining.streamed._HELD", 0)
    monkeypatch.setattr("adapterhub_lite.combining.streamed._SMALL", 0)
    seen = []

    def rows(start: int, stop: int) -> torch.Tensor:
        seen.append((stop - start) * 70)
        return SPECTRA["decaying"][start:stop]

    given_ = Streamed((90, 70), rows, 1000)
    brought_to_rank(given_, 4, None, 1024)
    largest(given_, 100)
    assert max(seen) <= 1000


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("held", [0, 1 << 21])
@pytest.mark.parametrize("block", [1, 50, 999, 1 << 20])
def test_the_size_of_blocks_changes_nothing(block: int, held: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adapterhub_lite.combining.streamed._HELD", held)
    dense = SPECTRA["sparse"]
    assert largest(streamed(dense, block), 123) == largest(streamed(dense), 123)
    found, other = (brought_to_rank(streamed(dense, size), 4, None, 1024) for size in (block, 64))
    assert found.error == pytest.approx(other.error, rel=1e-4)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            st.floats(allow_nan=False, allow_infinity=False, width=64),
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, 1.0000000000000002]),
        ),
        min_size=1,
        max_size=60,
    ),
    data=st.data(),
)
def test_the_largest_magnitude_is_exact(values: list[float], data: st.DataObject):
    count = data.draw(st.integers(1, len(values)))
    dense = torch.tensor(values, dtype=torch.float64)[:, None]
    expected = sorted((abs(v) for v in values), reverse=True)[count - 1]
    assert largest(streamed(dense, 7), count) == _counted(streamed(dense, 7), count) == expected


def test_the_largest_magnitude_among_very_many_alike(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adapterhub_lite.combining.streamed._GATHERED", 3)
    monkeypatch.setattr("adapterhub_lite.combining.streamed._HELD", 0)
    generator = torch.Generator().manual_seed(0)
    dense = 1 + 1e-9 * torch.rand(40, 50, dtype=torch.float64, generator=generator)
    dense[:10] = -1.5
    dense[10] = 0
    ordered = dense.abs().flatten().sort(descending=True).values
    for count in (1, 500, 501, 777, 1949, 1950, 1951, 2000):
        assert largest(streamed(dense), count) == float(ordered[count - 1])
    assert math.copysign(1, largest(streamed(dense), 2000)) == 1
