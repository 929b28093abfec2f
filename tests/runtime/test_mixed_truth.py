"""Each row of a random mixed batch is what PEFT gives for that row alone: the same logits, the same greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.runtime.truth import Truth, error

FAMILIES = ("llama", "wide llama", "gpt2", "t5", "bert", "wide bert")
CLOSE = 1e-5  # of the largest logit
TIE = 1e-6


@pytest.fixture(scope="module", params=FAMILIES)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    made = Truth(tmp_path_factory.mktemp("truth"), request.param)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(8))
def test_each_row_of_a_mixed_batch_is_what_peft_gives_for_it_alone(truth: Truth, seed: int) -> None:
    kinds, rows, answers = truth.draw(seed)
    found = truth.logits(kinds, rows, answers)
    for i, kind in enumerate(kinds):
        expected = truth.peft(kind, rows[i], answers[i])
        assert error(found[i], expected.double()) < CLOSE, (i, kinds)


@pytest.mark.parametrize("seed", range(8))
def test_each_row_of_a_mixed_batch_writes_what_peft_writes_for_it_alone(truth: Truth, seed: int) -> None:
    if not truth.writes:
        pytest.skip("an encoder writes nothing")
    kinds, rows, _ = truth.draw(100 + seed, heads=False)
    for kind, row, ours in zip(kinds, rows, truth.tokens(kinds, rows), strict=True):
        theirs = truth.written(kind, row)
        if ours != theirs:
            same = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            exact = truth.after(kind, row, theirs[:same], torch.float64)[-1]
            first, second = exact.topk(2).values.tolist()
            assert first - second < TIE * float(exact.abs().max()), (kind, ours, theirs)
