"""Transposed copies and the search for what is no number, beside torch's."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.kernels.library import library
from adapterhub_lite.kernels.matrices import Copy, CopyTable, all_finite, copy_transposed

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


needs_library = pytest.mark.skipif(library().functions is None, reason=f"no native products: {library().reason}")


@needs_library
@pytest.mark.parametrize("before", [0, 64])
def test_copies_are_made_again_from_other_memory_to_other_memory(before: int) -> None:
    """As if each had been made by itself; what lies between the targets and around them stays."""
    generator = torch.Generator().manual_seed(0)
    total = sum(rows * columns for rows, columns in SHAPES)

    def buffers() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(total + 5, generator=generator), torch.full((before + 2 * total,), 7.0)

    def copies(source: torch.Tensor, room: torch.Tensor) -> list[Copy]:
        found, start, at = [], 5, before
        for i, (rows, columns) in enumerate(SHAPES):
            target = room[at : at + columns * (rows + i % 3)].view(columns, rows + i % 3)[:, :rows]
            found.append(Copy(source[start : start + rows * columns].view(rows, columns), target, 1.0 + i))
            start, at = start + rows * columns, at + columns * (rows + i % 3) + i
        return found

    first = buffers()
    assert CopyTable.possible(copies(*first), *first)
    table = CopyTable(copies(*first), *first)
    for _ in range(2):
        source, room = buffers()
        expected = room.clone()
        for one in copies(source, expected):
            one.target.copy_(one.source.t() * one.factor)
        assert table.copy(source, room)
        assert torch.equal(room, expected)
    source[-1] = float("inf")
    assert not table.copy(source, room)


@needs_library
def test_copies_of_other_memory_or_another_kind_have_no_table() -> None:
    source, room = torch.ones(64), torch.zeros(64)
    whole = Copy(source.view(8, 8), room.view(8, 8))
    assert CopyTable.possible([whole], source, room)
    assert not CopyTable.possible([whole], source[:63], room)
    assert not CopyTable.possible([whole], source, room[:63])
    assert not CopyTable.possible([whole], source[1:], room)
    assert not CopyTable.possible([whole], torch.ones(64), room)
    assert not CopyTable.possible([Copy(torch.ones((8, 8)), whole.target)], source, room)
    narrow = torch.ones(64, dtype=torch.bfloat16)
    assert not CopyTable.possible([Copy(narrow.view(8, 8), whole.target)], narrow, room)


@pytest.mark.parametrize("size", [10, 1 << 10, 600_000, 3 << 19])
@pytest.mark.parametrize("skipped", [0, 3])
def test_new_memory_is_filled_and_what_is_around_it_stays(size: int, skipped: int) -> None:
    """Rooms of less than a page to several pieces, wherever they begin."""
    whole = torch.full((size + 8,), 7.0)
    room = whole[skipped : skipped + size]
    rows = 2 if size < 100 else 16
    columns = size // (2 * rows)
    sources = [torch.randn((rows, columns)) for _ in range(2)]
    targets = [room[i * rows * columns : (i + 1) * rows * columns].view(columns, rows) for i in range(2)]
    copy_transposed([Copy(one, target) for one, target in zip(sources, targets, strict=True)], room)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, source.t())
    assert bool((whole[:skipped] == 7).all())
    assert bool((whole[skipped + 2 * rows * columns :] == 7).all())
