"""Products with frozen matrices, against float64."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.kernels.products import Change, Packed, available, pack, product, unpacked

pytestmark = pytest.mark.skipif(not available(), reason="no native products here")

SHAPES = [(1, 3, 5), (37, 100, 70), (130, 17, 48), (50, 800, 97), (9, 3500, 40), (300, 64, 200)]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.double() - expected).abs().max() < 2e-6 * expected.abs().max().clamp(min=1) * 4


@pytest.mark.parametrize("make", [pack, unpacked])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n"), SHAPES)
def test_is_the_product(make, transposed: bool, tokens: int, k: int, n: int) -> None:
    x, weight = _random(tokens, k), _random(k, n) if transposed else _random(n, k)
    packed: Packed = make(weight, transposed)
    assert (packed.n_in, packed.n_out) == (k, n)
    matrix = weight.double() if transposed else weight.double().t()
    out = torch.full((tokens, n), float("nan"))
    product(x, packed, out)
    expected = x.double() @ matrix
    _near(out, expected)
    bias, before = _random(n), _random(tokens, n)
    out.copy_(before)
    product(x, packed, out, add=True, bias=bias)
    _near(out, before.double() + expected + bias.double())


@pytest.mark.parametrize("make", [pack, unpacked])
def test_only_the_columns_it_is_given_are_written(make) -> None:
    wide, weight = _random(40, 100), _random(50, 30)
    out = torch.full((40, 90), 7.0)
    product(wide[:, 11:41], make(weight, False), out[:, 20:70])
    _near(out[:, 20:70], wide[:, 11:41].double() @ weight.double().t())
    assert (out[:, :20] == 7).all()
    assert (out[:, 70:] == 7).all()


@pytest.mark.parametrize("make", [pack, unpacked])
def test_changes_are_added_to_their_own_rows(make) -> None:
    x, weight = _random(61, 90), _random(75, 90)
    low, ups = _random(61, 20), [_random(16, 75), _random(5, 200)[:, 60:135]]
    changes = [Change(13, low[:13, :16], ups[0]), Change(20), Change(50, low[20:50, 3:8], ups[1])]
    out = torch.empty(61, 75)
    product(x, make(weight, False), out, changes=changes)
    expected = x.double() @ weight.double().t()
    expected[:13] += low[:13, :16].double() @ ups[0].double()
    expected[20:50] += low[20:50, 3:8].double() @ ups[1].double()
    _near(out, expected)


@pytest.mark.parametrize("make", [pack, unpacked])
def test_bits_do_not_depend_on_threads_or_neighbours(make) -> None:
    x, weight, low, up = _random(203, 900), _random(310, 900), _random(203, 8), _random(8, 310)
    packed = make(weight, False)
    whole, alone, threads = torch.empty(203, 310), torch.empty(1, 310), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        product(x, packed, whole, changes=[Change(203, low, up)])
        torch.set_num_threads(1)
        for i in (0, 100, 202):
            product(x[i : i + 1], packed, alone, changes=[Change(1, low[i : i + 1], up)])
            assert torch.equal(alone[0], whole[i])
    finally:
        torch.set_num_threads(threads)


def test_packed_and_unpacked_give_the_same_bits() -> None:
    x, weight = _random(70, 1000), _random(130, 1000)
    found = [torch.empty(70, 130) for _ in range(4)]
    product(x, pack(weight, False), found[0])
    product(x, unpacked(weight, False), found[1])
    product(x, pack(weight.t().contiguous(), True), found[2])
    product(x, unpacked(weight.t().contiguous(), True), found[3])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_wrong_tensors_are_refused() -> None:
    packed, x, out = pack(_random(20, 10), False), _random(5, 10), torch.empty(5, 20)
    for wrong in (x.double(), x[:, :9], x.t(), _random(4, 10)):
        with pytest.raises(ValueError, match="should be"):
            product(wrong, packed, out)
    with pytest.raises(ValueError, match="A change ends at row 6 of 5"):
        product(x, packed, out, changes=[Change(6)])
    with pytest.raises(ValueError, match="in the order of their rows"):
        product(x, packed, out, changes=[Change(4), Change(3)])
    with pytest.raises(ValueError, match="up should be"):
        product(x, packed, out, changes=[Change(5, _random(5, 2), _random(2, 19))])
