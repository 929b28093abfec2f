"""Native element-wise work, attention and masks give what torch's give; dropout's masks are what they claim to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapterhub_lite.kernels import training as native
from adapterhub_lite.training import losses
from adapterhub_lite.training.decoder.native import NativeOps
from adapterhub_lite.training.decoder.ops import AttentionShape, Ops, TorchOps
from adapterhub_lite.training.dropout import keep_mask
from adapterhub_lite.training.memory.buffers import Buffers

needs_native = pytest.mark.skipif(not native.available(), reason="no native library")


def outputs(ops: Ops, seed: int, window: int | None) -> dict[str, torch.Tensor]:
    """What every operation writes for the same random input."""
    torch.manual_seed(seed)
    count, width, inner, shape = 37, 48, 32, AttentionShape(4, 2, 16, 0.3, window)
    x, delta, grad = (torch.randn(count, width) for _ in range(3))
    weight = torch.rand(width) + 0.5
    found = {name: torch.randn(count, width) for name in ("normed", "total", "normed 2", "slope", "slope 2", "dropped")}
    found |= {"inverse": torch.empty(count), "inverse 2": torch.empty(count)}
    ops.rms_norm(x, weight, 1e-5, found["normed"], found["inverse"])
    ops.add_rms_norm(x, delta, weight, 1e-5, found["total"], found["normed 2"], found["inverse 2"])
    ops.rms_norm_back(grad, x, weight, found["inverse"], found["slope"], False)
    ops.rms_norm_back(grad, x, weight, found["inverse"], found["slope 2"], True)
    found["gate_up"], found["active"], found["active 2"] = torch.randn(count, 2 * inner), *torch.empty(2, count, inner)
    ops.swiglu(found["gate_up"], found["active"])
    ops.swiglu_back(found["gate_up"], torch.randn(count, inner), found["active 2"])
    keys = torch.randint(0, 2**62, (count,))
    ops.drop(x, keys, torch.arange(count), 5, 0.3, found["dropped"])
    found["logits"], found["losses"] = torch.randn(count, 97) * 4, torch.empty(count)
    ops.cross_entropy(found["logits"], torch.randint(97, (count,)), found["losses"])
    found["qkv"] = torch.randn(5 + count, 128)
    turns = torch.randn(count, 8).cos(), torch.randn(count, 8).sin()
    ops.rotate(found["qkv"][5:, :96].unflatten(1, (6, 16)), turns, False)
    spans = torch.tensor([[0, 11, 5, 0, 5], [11, 9, 16, 5, 11], [20, 17, 25, 5, 11]])
    parts = found["qkv"][5:, :64], found["qkv"][:, 64:96], found["qkv"][:, 96:]
    found |= {"seen": torch.empty(count, 64), "sums": torch.empty(count, 4), "grads": torch.randn(5 + count, 128)}
    grads = found["grads"][5:, :64], found["grads"][:, 64:96], found["grads"][:, 96:]
    ops.attend(parts, found["seen"], found["sums"], spans, shape)
    ops.attend_back(parts, found["seen"], found["sums"], torch.randn(count, 64), grads, spans, shape)
    found["grads"] = torch.cat([found["grads"][5:, :64].flatten(), found["grads"][:, 64:].flatten()])
    return found


@needs_native
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_native_is_torch(seed: int, window: int | None):
    ours, theirs = outputs(NativeOps(), seed, window), outputs(TorchOps(), seed, window)
    for name, value in ours.items():
        scale = float(theirs[name].abs().max())
        assert float((value - theirs[name]).abs().max()) <= 3e-6 * scale, name


@needs_native
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_masks_are_the_same_to_the_last_bit(p: float):
    torch.manual_seed(0)
    keys = torch.randint(0, 2**63 - 1, (300,))
    tokens = torch.randint(0, 100_000, (300,))
    for salt in (0, 1, 239, 65_535):
        out = torch.empty(300, 70)
        native.drop(torch.ones(300, 70), keys, tokens, salt, p, out)
        assert torch.equal(out != 0, keep_mask(keys, tokens, salt, 70, p))


def test_masks_keep_the_right_share_and_depend_on_everything():
    keys, tokens = torch.full((400,), 2**61 + 12345), torch.arange(400)
    mask = keep_mask(keys, tokens, 3, 500, 0.2)
    assert float(mask.double().mean()) == pytest.approx(0.8, abs=0.003)
    others = (
        keep_mask(keys + 1, tokens, 3, 500, 0.2),
        keep_mask(keys + 2**40, tokens, 3, 500, 0.2),
        keep_mask(keys, tokens, 4, 500, 0.2),
        keep_mask(keys, tokens + 1, 3, 500, 0.2),
    )
    for other in (*others, mask[:, torch.randperm(500)]):
        assert float((mask == other).double().mean()) == pytest.approx(0.68, abs=0.01)
    assert torch.equal(keep_mask(keys[7:9], tokens[7:9], 3, 500, 0.2), mask[7:9])
    assert torch.equal(keep_mask(keys, tokens, 3, 20, 0.2), mask[:, :20])
    columns, lines = mask.double().mean(0), mask.double().mean(1)
    assert float(columns.std()) == pytest.approx((0.16 / 400) ** 0.5, rel=0.2)
    assert float(lines.std()) == pytest.approx((0.16 / 500) ** 0.5, rel=0.2)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 53])
@pytest.mark.parametrize("biased", [False, True])
def test_losses_in_chunks_are_the_whole_cross_entropy(monkeypatch: pytest.MonkeyPatch, tokens: int, biased: bool):
    monkeypatch.setattr(losses, "LOGITS_BYTES", 16 * 97 * 8 + 5)
    torch.manual_seed(tokens)
    weight = torch.randn(97, 24, dtype=torch.float64)
    bias = torch.randn(97, dtype=torch.float64) if biased else None
    targets = torch.randint(97, (tokens,))
    hidden = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    whole = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    whole.sum().backward()
    tools = TorchOps(), Buffers(torch.device("cpu"), torch.float64)
    untouched, ours = hidden.detach().clone(), hidden.detach().clone()
    alone = losses.head_losses(untouched, (weight, bias), targets, tools, False).clone()
    found = losses.head_losses(ours, (weight, bias), targets, tools, True)
    assert tools[1]("logits", 1, 97).untyped_storage().nbytes() <= 16 * 97 * 8
    torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(alone, found)
    assert torch.equal(untouched, hidden.detach())
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-11, atol=1e-12)
