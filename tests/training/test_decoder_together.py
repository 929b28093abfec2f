"""Several learners at once get what each gets alone, whoever else is in the pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.load import Base
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Row, Settings, make_computation
from tests.training import decoder_cases as cases
from tests.training.decoder_cases import EXAMPLES, Peer, rows_of

BOUND = 1e-10
SOME: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 3}),
    ("dora", {"r": 5, "lora_alpha": 3}),
    ("prefix", {"tokens": 6}),
    ("lora", {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.4}),
    ("patterns", {}),
    ("projection", {"tokens": 3}),
    ("dora", {"r": 4, "lora_dropout": 0.2}),
]


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with cases.precision(monkeypatch, "float64"):
        yield cases.base_of(cases.folder(tmp_path, "qwen2"), "float64")


def some_rows(learners: int) -> list[list[Row]]:
    """Other rows, and another number of them, for each learner; some of one learner begin alike."""
    found = []
    for i in range(learners):
        same = [30 + i + j for j in range(12)]
        own = [
            *EXAMPLES[: 1 + i % 4],
            *(Example([*same, 5 + k, 9, 2], [IGNORED] * 13 + [9, 2]) for k in range(1 + (i + 1) % 3)),
        ]
        found.append(rows_of(own, i, salt=10 * i))
    return found


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("pack_tokens", [30, 1024])
def test_together_is_each_alone(base: Base, pack_tokens: int, checkpoint: bool):
    peers = [Peer(base, kind, seed=7 + i, **changes) for i, (kind, changes) in enumerate(SOME)]
    rows = some_rows(len(peers))
    alone = [peer.gradients(some) for peer, some in zip(peers, rows, strict=True)]
    settings = Settings(pack_tokens=pack_tokens, checkpoint=checkpoint)
    fused = make_computation(base, [peer.learner for peer in peers], settings)
    order = torch.randperm(sum(map(len, rows)), generator=torch.Generator().manual_seed(1)).tolist()
    mixed = [[row for some in rows for row in some][i] for i in order]
    for _ in range(2):
        for peer in peers:
            peer.clear()
        sums = fused.gradients(mixed)
        for peer, found, (total, gradients) in zip(peers, sums, alone, strict=True):
            assert found.total == pytest.approx(total, rel=1e-10)
            assert cases.error(peer.ours(), gradients) <= BOUND
    assert fused.name == "fused decoder"


def test_gradients_are_added(base: Base):
    peer = Peer(base, "lora")
    fused = make_computation(base, [peer.learner], Settings())
    rows = rows_of(EXAMPLES)
    fused.gradients(rows[:1])
    fused.gradients(rows[1:])
    assert cases.error(peer.ours(), peer.gradients(rows)[1]) <= BOUND


def test_a_learner_without_rows_gets_zeros_and_zero_sums(base: Base):
    peers = [Peer(base, "lora"), Peer(base, "prefix")]
    fused = make_computation(base, [peer.learner for peer in peers], Settings())
    first, second = fused.gradients(rows_of(EXAMPLES))
    assert (second.total, second.count, second.tokens) == (0.0, 0, 0)
    assert first.count > 0
    assert all(float(grad.abs().max()) == 0 for _, grad in peers[1].ours())
    assert cases.error(peers[0].ours(), peers[0].gradients(rows_of(EXAMPLES))[1]) <= BOUND


def test_buffers_are_reused_and_given_gradients_are_not_touched_again(base: Base):
    peer = Peer(base, "lora")
    fused: Any = make_computation(base, [peer.learner], Settings(pack_tokens=32))
    fused.gradients(rows_of(EXAMPLES))
    held = [ours.grad for _, ours, _ in peer.pairs]
    copies = [grad.clone() for grad in held]
    size = fused.nbytes
    peer.clear()
    fused.gradients(rows_of(EXAMPLES[:2]))
    fused.losses(rows_of(EXAMPLES))
    fused.gradients(rows_of(EXAMPLES))
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert fused.nbytes <= 1.3 * size


def test_checkpoints_keep_one_layer(base: Base):
    sizes = []
    for checkpoint in (False, True):
        fused: Any = make_computation(base, [Peer(base, "lora").learner], Settings(checkpoint=checkpoint))
        fused.gradients(rows_of(EXAMPLES * 8))
        sizes.append(fused.nbytes)
    assert sizes[1] < 0.7 * sizes[0]
