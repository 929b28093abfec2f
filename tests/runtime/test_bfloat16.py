"""Mixed batches in bfloat16: a row is about as near to float64 as PEFT in bfloat16 is, alone, and so is every token.

In bfloat16 rounding depends on the shape of a batch, so tokens are not compared with those of a row alone: each that is
written must be best in float64 as far as the same bound allows, after the very tokens that the row wrote before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.runtime.truth import Truth, error

BASES = [("wide llama", "none"), ("gpt2", "none"), ("wide llama", "nf4"), ("wide llama", "int8")]
FACTOR, SHARE = 1.5, 0.02  # docs/architecture.md


@pytest.fixture(scope="module", params=BASES, ids=[" ".join(one) for one in BASES])
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    made = Truth(tmp_path_factory.mktemp("truth"), *request.param, "bfloat16")
    yield made
    made.close()


def bound(theirs: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error allowed, where PEFT's logits of the same row in bfloat16 are `theirs`."""
    return FACTOR * error(theirs, exact) + SHARE


@pytest.mark.parametrize("seed", range(40, 44))
def test_each_row_of_a_mixed_batch_is_as_near_to_float64_as_peft(truth: Truth, seed: int) -> None:
    kinds, rows, answers = truth.draw(seed)
    found = truth.logits(kinds, rows, answers)
    for i, kind in enumerate(kinds):
        exact = truth.peft(kind, rows[i], answers[i], torch.float64)
        theirs = truth.peft(kind, rows[i], answers[i], torch.bfloat16)
        assert error(found[i], exact) <= bound(theirs, exact), (i, kinds)


@pytest.mark.parametrize("seed", range(50, 53))
def test_each_token_of_a_mixed_batch_is_best_as_far_as_bfloat16_can_tell(truth: Truth, seed: int) -> None:
    kinds, rows, _ = truth.draw(seed, heads=False)
    for kind, row, written in zip(kinds, rows, truth.tokens(kinds, rows), strict=True):
        exact = truth.after(kind, row, written, torch.float64)
        allowed = bound(truth.after(kind, row, written, torch.bfloat16), exact)
        assert written, "nothing was written"
        chosen = exact[:-1].gather(1, torch.tensor(written)[:, None])[:, 0]
        behind = float((exact[:-1].amax(1) - chosen).max() / exact.abs().max())
        assert behind <= 2 * allowed, (kind, written)  # one token may be too high by the bound, and the other too low
