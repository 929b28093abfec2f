"""All layers of an encoder in one native call give the gradients that torch's operations give, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.load import Base
from adapterhub_lite.kernels.encoder import has_encoder
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Learner, Row, Settings
from adapterhub_lite.training.encoder.fused import FusedEncoder
from adapterhub_lite.training.encoder.ops import EncoderOps
from adapterhub_lite.training.encoder.parts import not_covered
from tests.training.test_encoder_gradients import tagger
from tests.training.test_modules_gradients import assert_same, grads, learner, load

pytestmark = pytest.mark.skipif(not has_encoder(), reason="no native code for AVX-512")
# One token, a strip of queries, more than a block of them.
LENGTHS = (1, 3, 17, 48, 60)
SIZES: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 2, "intermediate_size": 200, "num_hidden_layers": 3}


def some_rows(base: Base, who: int, tags: bool = False) -> list[Row]:
    generator = torch.Generator().manual_seed(who)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(3, int(base.config.vocab_size), (length,), generator=generator).tolist()
        labels = [j % 2 if j % 3 != 1 else IGNORED for j in range(length)] if tags else [i % 2]
        rows.append(Row(Example(ids, labels), who, 1000 * who + i + (3 << 35)))
    return rows


def base_of(tmp_path: Path, family: str = "bert", **changes: Any) -> Base:
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    return load(tmp_path, family, "float32", **{**SIZES, **drops, "max_position_embeddings": 80, **changes})


def made(base: Base, learners: Sequence[Learner], **settings: Any) -> FusedEncoder:
    assert not_covered(base, learners) is None
    return FusedEncoder(base, learners, Settings(**settings))


def assert_as_torch(base: Base, learners: list[Learner], rows: list[Row]) -> None:
    whole, slow = made(base, learners), FusedEncoder(base, learners, Settings(), ops=EncoderOps())
    assert whole._whole is not None
    assert slow._whole is None
    for found, wanted in zip(whole.losses(rows), slow.losses(rows), strict=True):
        assert found.total == pytest.approx(wanted.total, rel=1e-5)
        assert found.hits == wanted.hits
    sums, ours = whole.gradients(rows), grads(learners)
    for mine, theirs in zip(sums, slow.gradients(rows), strict=True):
        assert mine.total == pytest.approx(theirs.total, rel=1e-5)
    for mine, theirs in zip(ours, grads(learners), strict=True):
        assert_same(mine, theirs, 1e-5)


@pytest.mark.parametrize("tags", [False, True])
def test_several_learners_of_other_ranks_on_short_and_long_rows(tmp_path: Path, tags: bool):
    base = base_of(tmp_path)
    learners = [(tagger if tags else learner)(base, seed) for seed in (0, 1, 15)]
    assert_as_torch(base, learners, [row for who in range(3) for row in some_rows(base, who, tags)])


@pytest.mark.parametrize(
    "targets", [["value"], ["query", "layer.2.output.dense"], ["layer.1.intermediate.dense"], ["pooler.dense", "key"]]
)
def test_adapters_of_few_layers(tmp_path: Path, targets: list[str]):
    base = base_of(tmp_path)
    assert_as_torch(
        base, [learner(base, 1, targets=targets), learner(base, 2)], some_rows(base, 0) + some_rows(base, 1)
    )
    assert_as_torch(base, [learner(base, 1, targets=targets)], some_rows(base, 0))


def test_what_stands_before_the_layers_gets_its_gradient(tmp_path: Path):
    base = base_of(tmp_path, "electra")
    assert_as_torch(base, [learner(base, 1)], some_rows(base, 0))


def test_gradients_add_up_and_belong_to_nobody_else(tmp_path: Path):
    base = base_of(tmp_path)
    one, rows = learner(base, 3), some_rows(base, 0)
    computation = made(base, [one])
    computation.gradients(rows)
    once = grads([one])[0]
    computation.gradients(rows)
    held = [p.grad for p in one.parameters()]
    computation.gradients(rows)
    assert all(p.grad is before for p, before in zip(one.parameters(), held, strict=True))
    assert_same(grads([one])[0], [2 * g for g in once], 1e-6)


def test_results_do_not_depend_on_threads_or_neighbours(tmp_path: Path):
    base = base_of(tmp_path)
    learners = [learner(base, seed) for seed in range(2)]
    rows = [some_rows(base, who) for who in range(2)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            computation = made(base, learners, pack_tokens=100)
            computation.gradients(rows[0] + rows[1])
            found.append(grads(learners))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, same in zip(other, found[0], strict=True):
            assert_same(one, same, 1e-6)
    made(base, learners).gradients(rows[1])
    assert_same(grads(learners[1:])[0], found[0][1], 1e-5)


def test_what_one_call_does_not_compute_goes_layer_by_layer(tmp_path: Path):
    base = base_of(tmp_path)

    def whole(one: Learner, **settings: Any) -> Any:
        return made(base, [one], **settings)._whole

    assert whole(learner(base, 1)) is not None
    assert whole(learner(base, 1, dropout=0.1)) is None
    assert whole(learner(base, 1, dora=True)) is None
    assert whole(learner(base, 1), checkpoint=True) is None
