"""Transposed copies and the search for what is no number, beside torch's."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.kernels.library import library
from adapterhub_lite.kernels.matrices import Copy, all_finite, copy_transposed

SHAPES = [(1, 1), (16, 16), (16, 576), (576, 16), (3, 40), (40, 3), (17, 33), (32, 48), (15, 16), (16, 15), (64, 100)]


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_is_turned_and_nothing_else_is_written(dtype: torch.dtype, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    sources.append(torch.randn((20, 30), generator=generator).to(dtype)[:, 3:19])
    rooms = [torch.full((source.shape[1], source.shape[0] + 9), 7.0, dtype=dtype) for source in sources]
    copy_transposed([Copy(source, room[:, 4:-5], factor) for source, room in zip(sources, rooms, strict=True)])
    for source, room in zip(sources, rooms, strict=True):
        assert torch.equal(room[:, 4:-5], source.t() * factor)
        assert bool((room[:, :4] == 7).all())
        assert bool((room[:, -5:] == 7).all())


def test_a_copy_is_known_to_be_finite_only_if_it_is() -> None:
    """Also where the factor makes infinity of a number; of what torch copies nothing is known."""
    for shape in SHAPES:
        source, target = torch.full(shape, 3e38), torch.empty(shape[::-1])
        assert copy_transposed([Copy(source, target)]) == (library().functions is not None)
        assert not copy_transposed([Copy(source, target, 2.0)])
        source[-1, -1] = float("nan")
        assert not copy_transposed([Copy(torch.ones((4, 4)), torch.empty((4, 4))), Copy(source, target)])
    assert not copy_transposed([Copy(torch.ones((4, 4)).bfloat16(), torch.empty((4, 4)).bfloat16())])


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
