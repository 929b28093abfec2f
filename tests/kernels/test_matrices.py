"""Transposed copies and the search for what is no number, beside torch's."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.kernels.matrices import all_finite, copy_transposed

SHAPES = [(1, 1), (16, 16), (16, 576), (576, 16), (3, 40), (40, 3), (17, 33), (32, 48), (15, 16), (16, 15), (64, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_is_turned_and_nothing_else_is_written(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    sources.append(torch.randn((20, 30), generator=generator).to(dtype)[:, 3:19])
    rooms = [torch.full((source.shape[1], source.shape[0] + 9), 7.0, dtype=dtype) for source in sources]
    copy_transposed([(source, room[:, 4:-5]) for source, room in zip(sources, rooms, strict=True)])
    for source, room in zip(sources, rooms, strict=True):
        assert torch.equal(room[:, 4:-5], source.t())
        assert bool((room[:, :4] == 7).all())
        assert bool((room[:, -5:] == 7).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_value_that_is_no_number_is_found_wherever_it_stands(value: float, dtype: torch.dtype) -> None:
    tensors = [
        torch.full((37,), 3e38, dtype=dtype),
        torch.ones((4, 5), dtype=dtype),
        torch.ones((6, 3), dtype=dtype).t(),
    ]
    assert all_finite(tensors)
    assert all_finite([])
    for tensor in tensors:
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.t().view(-1)
        for place in range(flat.numel()):
            kept = flat[place].item()
            flat[place] = value
            assert not all_finite(tensors), place
            flat[place] = kept
