"""Matrices by rows whose space is grown in float32: as near to the best as in float64, at any scale, held or not."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.combining import streamed
from adapterhub_lite.combining.streamed import Streamed, brought_to_rank


def drawn(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(160, 120, dtype=torch.float64, generator=generator)
    if kind == "rows scaled":  # as DoRA's change is: weights times a gain of each row
        return noise * (0.01 * torch.randn(160, 1, dtype=torch.float64, generator=generator))
    low = torch.randn(160, 5, dtype=torch.float64, generator=generator) @ noise[:5]
    return low + noise if kind == "low and noise" else low + 1e-4 * noise


def best_error(dense: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(dense)
    return float(values[rank:].norm() / values.norm())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    own, seen = streamed._Krylov._grow, []

    def grow(self: streamed._Krylov, fresh: torch.Tensor) -> torch.Tensor:
        seen.append(fresh.dtype)
        return own(self, fresh)

    monkeypatch.setattr(streamed._Krylov, "_grow", grow)
    return seen


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("small", [0, 640])
@pytest.mark.parametrize("held", [0, 1 << 21])
@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["rows scaled", "low and noise"])
def test_float32_is_as_near_at_any_scale(monkeypatch, kind, scale, held, small, turned):
    monkeypatch.setattr(streamed, "_HELD", held)
    monkeypatch.setattr(streamed, "_SMALL", small)
    seen, dense = counted(monkeypatch), drawn(kind) * scale
    dense = dense.mT.contiguous() if turned else dense
    found = brought_to_rank(Streamed(tuple(dense.shape), lambda start, stop: dense[start:stop], 700), 8, None, 512)
    assert set(seen) == (set() if small and (held or not turned) else {torch.float32})
    best = best_error(dense, 8)
    assert best - 1e-9 <= found.error <= best * (1 + 1e-4)
    made = found.matrix.rows(0, len(dense))
    assert float((made - dense).norm() / dense.norm()) == pytest.approx(found.error, rel=1e-6)


def test_where_little_is_left_float64_decides(monkeypatch):
    monkeypatch.setattr(streamed, "_SMALL", 0)
    seen, dense = counted(monkeypatch), drawn("nearly low")
    found = brought_to_rank(Streamed((160, 120), lambda start, stop: dense[start:stop]), 8, None, 512)
    assert seen[-1] == torch.float64
    assert found.error <= best_error(dense, 8) * (1 + 1e-4)
    assert seen.count(torch.float32) <= 2


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7])
def test_products_lose_nothing_that_counts(noise):
    """What is left is measured, not the rounding of squares of what is there."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(200, 4, dtype=torch.float64, generator=generator) @ torch.randn(
        4, 90, dtype=torch.float64, generator=generator
    )
    dense = low + noise * torch.randn(200, 90, dtype=torch.float64, generator=generator)
    found = brought_to_rank(Streamed((200, 90), lambda start, stop: dense[start:stop]), 4, None, 512)
    made = found.matrix.rows(0, 200)
    assert found.error == pytest.approx(float((made - dense).norm() / dense.norm()), rel=1e-6)
    assert found.error == pytest.approx(best_error(dense, 4), rel=1e-4)


@pytest.mark.parametrize("small", [0, 640])
def test_a_small_matrix_is_formed_once(monkeypatch, small):
    monkeypatch.setattr(streamed, "_SMALL", small)
    dense, asked = drawn("rows scaled"), []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return dense[start:stop]

    brought_to_rank(Streamed((160, 120), rows), 8, None, 512)
    assert sum(asked) == 160
    asked.clear()
    monkeypatch.setattr(streamed, "_HELD", 0)
    brought_to_rank(Streamed((160, 120), rows), 8, None, 512)
    assert sum(asked) == 2 * 160 if small else sum(asked) > 4 * 160
