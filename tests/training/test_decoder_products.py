"""Native products in the fused decoder, and gate and up made again: what they change is rounding, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.kernels.products import available
from adapterhub_lite.tasks.task import Example
from adapterhub_lite.training.computation import Row, Settings, make_computation
from adapterhub_lite.training.decoder import parts as decoder_parts
from tests.training import decoder_cases as cases
from tests.training.decoder_cases import EXAMPLES, Peer, rows_of

LONG = [*EXAMPLES, Example([*range(20, 120), 2], [*range(20, 120), 2])]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 3}),
    ("lora", {"r": 4, "lora_dropout": 0.3}),
    ("dora", {"r": 2}),
    ("dora", {"r": 2, "lora_dropout": 0.2}),
    ("lora", {"r": 2, "target_modules": ["k_proj", "up_proj"]}),
    ("prefix", {"tokens": 4}),
]


def _gradients(peers: list[Peer], rows: list[Row], settings: Settings) -> list[torch.Tensor]:
    computation = make_computation(peers[0].base, [peer.learner for peer in peers], settings)
    for _ in range(2):
        for peer in peers:
            peer.clear()
        computation.gradients(rows)
    return [p.grad.clone() for peer in peers for p in peer.learner.parameters() if p.grad is not None]


@pytest.mark.skipif(not available(), reason="no native products here")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_native_products_change_rounding_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    base = cases.base_of(cases.folder(tmp_path, family), "float32")
    peers = [Peer(base, kind, seed=i, **changes) for i, (kind, changes) in enumerate(KINDS)]
    rows = [row for i in range(len(peers)) for row in rows_of(LONG, i, salt=10 * i)]
    calls, product = [0], decoder_parts.product

    def counted(*given: Any, **named: Any) -> None:
        calls[0] += 1
        product(*given, **named)

    monkeypatch.setattr(decoder_parts, "product", counted)
    native = _gradients(peers, rows, Settings())
    assert calls[0]
    monkeypatch.setattr(decoder_parts.Frozen, "adds", lambda *_: False)
    calls[0] = 0
    other = _gradients(peers, rows, Settings())
    assert not calls[0]
    assert len(native) == len(other)
    for ours, theirs in zip(native, other, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(("kind", "changes"), KINDS)
@pytest.mark.parametrize("pack_tokens", [24, 1024])
def test_gate_and_up_made_again_change_nothing(
    tmp_path: Path, kind: str, changes: dict[str, Any], pack_tokens: int
) -> None:
    peer = Peer(cases.base_of(cases.folder(tmp_path, "qwen3"), "float32"), kind, **changes)
    rows = rows_of(LONG)
    kept = _gradients([peer], rows, Settings(pack_tokens=pack_tokens))
    again = _gradients([peer], rows, Settings(pack_tokens=pack_tokens, recompute_mlp=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_gate_and_up_are_not_kept(tmp_path: Path) -> None:
    peer = Peer(cases.base_of(cases.folder(tmp_path, "llama"), "float32"), "lora")
    sizes = {}
    for settings in (Settings(), Settings(recompute_mlp=True), Settings(checkpoint=True)):
        computation: Any = make_computation(peer.base, [peer.learner], settings)
        computation.gradients(rows_of(LONG))
        sizes[settings.recompute_mlp, settings.checkpoint] = computation.nbytes
    assert sizes[False, True] < sizes[True, False] < sizes[False, False]
