"""Mixed batches and weighted mixes on bases of other precisions: PEFT, or plain sums, on the weights they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import peers
from tests.runtime import test_decoder, test_mixes
from tests.runtime.truth import Truth, error

BASES = [(family, quantize) for family in ("wide llama", "llama", "wide bert") for quantize in ("nf4", "int8")]
CLOSE = 1e-5  # of the largest logit


@pytest.fixture(scope="module", params=BASES, ids=[" ".join(one) for one in BASES])
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    made = Truth(tmp_path_factory.mktemp("truth"), *request.param)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(20, 25))
def test_each_row_is_what_peft_gives_on_the_dequantised_weights(truth: Truth, seed: int) -> None:
    kinds, rows, answers = truth.draw(seed)
    found = truth.logits(kinds, rows, answers)
    for i, kind in enumerate(kinds):
        expected = truth.peft(kind, rows[i], answers[i])
        assert error(found[i], expected.double()) < CLOSE, (i, kinds)


def test_each_row_writes_what_peft_writes_on_the_dequantised_weights(truth: Truth) -> None:
    if not truth.writes:
        pytest.skip("an encoder writes nothing")
    kinds, rows, _ = truth.draw(25, heads=False)
    assert truth.tokens(kinds, rows) == [truth.written(kind, row) for kind, row in zip(kinds, rows, strict=True)]


@pytest.mark.parametrize(("quantize", "dtype"), [("nf4", "auto"), ("int8", "auto"), ("none", "bfloat16")])
def test_weighted_mixes_are_the_sum_of_weighted_changes(tmp_path: Path, quantize: str, dtype: str) -> None:
    """In bfloat16, as near to float64 as a mixed batch is held to be; beside it the merged model in bfloat16."""
    base = load_base(str(test_decoder.checkpoint(tmp_path, "llama")), quantize, device="cpu", dtype=dtype)
    runtime, adapters = Runtime(base, Store(), slots=None), test_mixes.zoo(base)
    refs = {name: runtime.attach(adapter) for name, adapter in adapters.items()}
    for weights in test_mixes.MIXES:
        if max(weights.values()) > 5:  # a change so large makes rounding as large
            continue
        model = test_mixes.merged(base, [(adapters[n], w) for n, w in weights.items()], quantize != "none")
        exact = peers.logits(model)
        near = peers.logits(model.to(torch.bfloat16)) if dtype == "bfloat16" else None
        mix = {refs[name]: weight for name, weight in weights.items()}
        mixed = runtime.logits([*peers.ROWS, [9, 9]], [mix, mix, mix, refs["lora"]])[:3]
        for found in (runtime.logits(peers.ROWS, mix), mixed):
            for i, one in enumerate(found):
                allowed = CLOSE if near is None else 1.5 * error(near[i], exact[i]) + 0.02
                assert error(one, exact[i]) < allowed, (weights, i)
    runtime.close()
