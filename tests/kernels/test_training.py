"""The native parts of a training step beside float64 torch, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from adapterhub_lite.kernels import training
from adapterhub_lite.training.dropout import keep_mask

pytestmark = pytest.mark.skipif(not training.available(), reason="no native library here")

SIZES = [(1, 16), (1, 7), (5, 576), (37, 100), (130, 64), (3, 1), (16, 33)]
SLOPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread and several: what is right with one must be so with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def room(*shape: int) -> torch.Tensor:
    """What nobody wrote yet is NaN, so that reading it shows."""
    return torch.full(shape, float("nan"))


def near(found: torch.Tensor, expected: torch.Tensor, within: float = 2e-6) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=within * scale)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(tokens: int, width: int, add: bool) -> None:
    x, weight, grad, old = (
        torch.randn(tokens, width) * 3,
        torch.rand(width),
        torch.randn(tokens, width),
        torch.randn(tokens, width),
    )
    out, inverse = room(tokens, width), room(tokens)
    training.rms_norm(x, weight, 1e-5, out, inverse)
    wide = x.double().requires_grad_()
    expected = rms(wide, weight.double(), 1e-5)
    near(out, expected.detach())
    near(inverse, (x.double().square().mean(-1) + 1e-5).rsqrt())
    expected.backward(grad.double())
    assert wide.grad is not None
    grad_x = old.clone() if add else room(tokens, width)
    training.rms_norm_back(grad, x, weight, inverse, grad_x, add)
    near(grad_x, wide.grad + (old if add else 0))
    again = grad.clone()
    training.rms_norm_back(again, x, weight, inverse, again)
    near(again, wide.grad)


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(tokens: int, width: int, biased: bool) -> None:
    x, weight, grad = torch.randn(tokens, width) + 2, torch.rand(width), torch.randn(tokens, width)
    bias = torch.randn(width) if biased else None
    out, mean, inverse, grad_x = room(tokens, width), room(tokens), room(tokens), room(tokens, width)
    training.layer_norm(x, weight, bias, 1e-2, out, mean, inverse)
    wide = x.double().requires_grad_()
    expected = F.layer_norm(wide, (width,), weight.double(), None if bias is None else bias.double(), 1e-2)
    near(out, expected.detach(), 5e-6)
    expected.backward(grad.double())
    assert wide.grad is not None
    training.layer_norm_back(grad, x, weight, mean, inverse, grad_x)
    near(grad_x, wide.grad, 5e-6)
    old = torch.randn(tokens, width)
    both = old.clone()
    training.layer_norm_back(grad, x, weight, mean, inverse, both, add=True)
    near(both, wide.grad + old, 5e-6)


@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_a_sum_and_its_norm_are_one_call(tokens: int, width: int) -> None:
    x, delta, weight, bias = (
        torch.randn(tokens, width),
        torch.randn(tokens, width),
        torch.rand(width),
        torch.randn(width),
    )
    total, out, again, mean, inverse = *(room(tokens, width) for _ in range(3)), room(tokens), room(tokens)
    training.add_rms_norm(x, delta, weight, 1e-6, total, out, inverse)
    assert torch.equal(total, x + delta)
    training.rms_norm(total, weight, 1e-6, again, inverse)
    assert torch.equal(out, again)
    keys, indices = torch.randint(2**62, (tokens,)), torch.arange(tokens)
    by = training.Dropout(keys, indices, 5, 0.3)
    training.add_layer_norm(x, delta, weight, bias, 1e-6, total, out, mean, inverse, by)
    kept = keep_mask(keys, indices, 5, width, 0.3)
    near(total, x + delta * kept / 0.7, 1e-6)
    training.layer_norm(total, weight, bias, 1e-6, again, mean, inverse)
    assert torch.equal(out, again)
    own = x.clone()
    training.add_layer_norm(own, delta, weight, bias, 1e-6, own, out, mean, inverse, by)
    assert torch.equal(own, total)


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("kind", training.ACTIVATIONS)
def test_gates_and_activations(tokens: int, width: int, kind: str) -> None:
    both, grad = torch.randn(tokens, 2 * width) * 4, torch.randn(tokens, width)
    wide = both.double().requires_grad_()
    expected = SLOPES[kind](wide[:, :width]) * wide[:, width:]
    out = room(tokens, width)
    training.swiglu(both, out, kind)
    near(out, expected.detach())
    expected.backward(grad.double())
    assert wide.grad is not None
    act, in_place = room(tokens, width), both.clone()
    training.swiglu_back(in_place, grad, act, in_place, kind)
    assert torch.equal(act, out)
    near(in_place, wide.grad)
    apart = room(tokens, 2 * width)
    training.swiglu_back(both, grad, None, apart, kind)
    assert torch.equal(apart, in_place)
    single = both.double().requires_grad_()
    expected = SLOPES[kind](single)
    found, slope = room(tokens, 2 * width), room(tokens, 2 * width)
    training.activate(both, found, kind)
    near(found, expected.detach())
    expected.backward(both.double())
    assert single.grad is not None
    training.activate_back(both, both, slope, kind)
    near(slope, single.grad)


@pytest.mark.parametrize("kind", training.ACTIVATIONS)
def test_activations_far_out(kind: str) -> None:
    x = torch.tensor(
        [-3e4, -200.0, -90.0, -50.0, -20.0, -6.0, -0.0, 0.0, 1e-20, 6.0, 50.0, 90.0, 200.0, 3e4, float("nan")]
    )
    out, slope = room(15), room(15)
    training.activate(x, out, kind)
    training.activate_back(x, torch.ones(15), slope, kind)
    wide = x.double().requires_grad_()
    expected = SLOPES[kind](wide)
    expected[:-1].sum().backward()
    torch.testing.assert_close(out.double(), expected.detach(), rtol=2e-6, atol=2e-6, equal_nan=True)
    assert wide.grad is not None
    torch.testing.assert_close(slope[:-1].double(), wide.grad[:-1], rtol=2e-6, atol=2e-6)


def test_gelu_names_its_two_forms() -> None:
    x, out, slope = torch.randn(40), room(40), room(40)
    for tanh, kind in ((False, "gelu"), (True, "gelu_tanh")):
        training.gelu(x, out, tanh)
        near(out, SLOPES[kind](x.double()))
        training.gelu_back(x, torch.ones(40), slope, tanh)
        wide = x.double().requires_grad_()
        SLOPES[kind](wide).sum().backward()
        assert wide.grad is not None
        near(slope, wide.grad)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (9, 3, 64), (20, 2, 80), (5, 4, 32), (7, 1, 6)])
def test_heads_are_turned_and_nothing_else(tokens: int, heads: int, dim: int) -> None:
    lines = torch.randn(tokens, (heads + 2) * dim + 3)
    before, angles = lines.clone(), torch.randn(tokens, dim // 2)
    view = lines[:, dim : dim + heads * dim].unflatten(1, (heads, dim))
    start = view.clone().double()
    low, high = start.chunk(2, -1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    training.rotate(view, angles.cos(), angles.sin())
    near(view, torch.cat([low * cos - high * sin, high * cos + low * sin], -1))
    assert torch.equal(lines[:, :dim], before[:, :dim])
    assert torch.equal(lines[:, dim + heads * dim :], before[:, dim + heads * dim :])
    training.rotate(view, angles.cos(), angles.sin(), inverse=True)
    near(view, start)
    part = torch.randn(tokens, heads, dim + 4)
    rest, turned = part.clone(), part[..., :dim].clone()
    training.rotate(part[..., :dim], angles.cos(), angles.sin())
    training.rotate(turned, angles.cos(), angles.sin())
    assert torch.equal(part[..., :dim], turned)
    assert torch.equal(part[..., dim:], rest[..., dim:])


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_dropout_is_the_same_in_torch(tokens: int, width: int, p: float) -> None:
    keys = torch.randint(2**62, (tokens,)) * 2 + 1
    indices, salt = torch.randint(5000, (tokens,)), 12345
    x, out = torch.rand(tokens, width) + 1, room(tokens, width)
    training.drop(x, keys, indices, salt, p, out)
    kept = keep_mask(keys, indices, salt, width, p)
    assert torch.equal(out != 0, kept)
    torch.testing.assert_close(out[kept], x[kept] / (1 - p))
    training.drop(x, keys, indices, salt, p, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 7), (20, 1000), (5, 1024), (4, 5000), (2, 49153)])
def test_cross_entropy_and_its_gradient(rows: int, vocabulary: int) -> None:
    logits = torch.randn(rows, vocabulary) * 5
    logits[0] += torch.linspace(-80, 80, vocabulary)  # larger values are found later
    targets = torch.randint(vocabulary, (rows,))
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    losses, kept = room(rows), logits.clone()
    training.cross_entropy_rows(logits, targets, losses, gradient=False)
    near(losses, expected.detach())
    assert torch.equal(logits, kept)
    again = room(rows)
    training.cross_entropy_rows(logits, targets, again)
    assert torch.equal(again, losses)
    assert wide.grad is not None
    near(logits, wide.grad, 1e-6)


def test_rows_without_a_target_have_no_loss_and_a_wrong_one_is_refused() -> None:
    logits, losses = torch.randn(3, 20), room(3)
    kept = logits.clone()
    with pytest.raises(ValueError, match="no index of 20"):
        training.cross_entropy_rows(logits, torch.tensor([1, 20, 3]), losses)
    assert torch.equal(logits, kept)
    training.cross_entropy_rows(logits, torch.tensor([1, -100, 3]), losses)
    assert losses[1] == 0
    assert losses[0] > 0
    assert not logits[1].any()
    assert logits[0].any()


def test_infinity_and_what_is_no_number_show() -> None:
    logits, losses = torch.zeros(3, 40), room(3)
    logits[0, 7], logits[1, 30], logits[2, 8] = float("nan"), float("inf"), -float("inf")
    training.cross_entropy_rows(logits, torch.tensor([1, 1, 8]), losses)
    assert losses[0].isnan()
    assert not losses[1].isfinite()
    assert losses[2] == float("inf")
    x, out, inverse = torch.ones(2, 20), room(2, 20), room(2)
    x[1, 3] = float("nan")
    training.rms_norm(x, torch.ones(20), 1e-5, out, inverse)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_what_is_not_what_it_should_be_is_refused() -> None:
    x, out, inverse, weight = torch.randn(4, 16), room(4, 16), room(4), torch.ones(16)
    cases: list[Callable[[], None]] = [
        lambda: training.rms_norm(x.double(), weight, 1e-5, out, inverse),
        lambda: training.rms_norm(x, weight[:8], 1e-5, out, inverse),
        lambda: training.rms_norm(x.t(), torch.ones(4), 1e-5, out.t(), room(16)),
        lambda: training.rms_norm(x, weight, 1e-5, room(4, 32)[:, :16], inverse),
        lambda: training.swiglu(x, out),
        lambda: training.activate(x, out, "swish"),
        lambda: training.drop(x, torch.arange(4).int(), torch.arange(4), 0, 0.1, out),
        lambda: training.drop(x, torch.arange(4), torch.arange(4), 0, 1.0, out),
        lambda: training.rotate(x.view(4, 1, 16), torch.ones(4, 16), torch.ones(4, 16)),
        lambda: training.rotate(x.view(4, 16, 1), torch.ones(4, 1), torch.ones(4, 1)),
        lambda: training.cross_entropy_rows(x, torch.zeros(4), inverse),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"should be|is none of|share to drop"):
            case()
    assert out.isnan().all()
