"""Gradients of encoders computed by hand are PEFT's through transformers, with all dropout, alone and together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import CapacityError
from adapterhub_lite.kernels.training import available
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Computation, Learner, Row, Settings, make_computation
from adapterhub_lite.training.encoder import fused as encoder
from adapterhub_lite.training.encoder import parts as encoder_parts
from adapterhub_lite.training.encoder.fused import FusedEncoder
from adapterhub_lite.training.encoder.layer import PLACES
from adapterhub_lite.training.encoder.native import NativeEncoderOps
from adapterhub_lite.training.encoder.ops import EncoderOps, Heads, Rows
from adapterhub_lite.training.modules.computation import ModuleComputation
from adapterhub_lite.training.modules.dropout import Dropping
from adapterhub_lite.training.modules.lines import Run, lines_of
from adapterhub_lite.training.packs import Piece
from tests.training import models
from tests.training.build import DROPLESS, EXAMPLES, Twin, assert_gradients_equal, peft_gradients, precision
from tests.training.test_modules_gradients import assert_same, grads, learner, load, lora, rows_of, wrapped_peer

FAMILIES = ("bert", "roberta", "electra", "distilbert")
TAGS = [
    Example([1, 5, 6, 7, 2], [IGNORED, 0, IGNORED, 1, IGNORED]),
    Example([1, 30, 2], [IGNORED, 1, IGNORED]),
    Example([1, 40, 41, 42, 43, 44, 2], [IGNORED, 1, 0, 1, IGNORED, 0, IGNORED]),
]


@pytest.fixture(autouse=True)
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with precision(monkeypatch):
        yield


def fused(base: Base, learners: Sequence[Learner], settings: Settings) -> FusedEncoder:
    made: Any = make_computation(base, learners, settings)
    assert isinstance(made, FusedEncoder), made.why
    return made


def tagger(base: Base, seed: int, dropout: float = 0.0) -> Learner:
    one = learner(base, seed, dropout)
    head = torch.nn.Linear(int(base.config.hidden_size), 2 + seed, dtype=base.dtype)
    head.weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    modules = set(base.view("TOKEN_CLS").modules.values())
    for name in [n for n, s in one.trainable.sites.items() if s.module not in modules]:
        del one.trainable.sites[name]
    return Learner(one.trainable, head, "TOKEN_CLS")


def tag_rows(who: int) -> list[Row]:
    return [Row(e, who, 1000 * who + i + (5 << 33)) for i, e in enumerate(TAGS)]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["lora", "patterns", "rslora", "dora"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_gradients_are_pefts(tmp_path: Path, family: str, kind: str, checkpoint: bool):
    base = load(tmp_path, family)
    config = lora(family, use_rslora=kind == "rslora", use_dora=kind == "dora")
    if kind == "patterns":
        config.rank_pattern = {"layer.1.attention.self.query": 7, "intermediate.dense": 2}
        config.alpha_pattern = {"layer.0.output.dense": 3}
    wrapped = wrapped_peer(base, config, torch.float64)
    twin = Twin(base, wrapped, fused, replace(DROPLESS, checkpoint=checkpoint))
    loss, ours = twin.gradients(EXAMPLES["encoder"])
    expected, theirs = peft_gradients(wrapped, twin, EXAMPLES["encoder"])
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_gradients_equal(ours, theirs, 1e-10)


@pytest.mark.parametrize(
    "targets", [["value"], ["pooler.dense"], ["layer.1.output.dense"], ["layer.0.attention.self.key"]]
)
def test_an_adapter_may_change_few_layers(tmp_path: Path, targets: list[str]):
    base = load(tmp_path, "bert")
    wrapped = wrapped_peer(base, lora("bert", target_modules=targets), torch.float64)
    for checkpoint in (False, True):
        twin = Twin(base, wrapped, fused, replace(DROPLESS, checkpoint=checkpoint))
        _, ours = twin.gradients(EXAMPLES["encoder"])
        assert_gradients_equal(ours, peft_gradients(wrapped, twin, EXAMPLES["encoder"])[1], 1e-10)


class _Numbered(Dropping):
    """The dropout of transformers' forward by the numbers that the fused encoder gives to its places."""

    def __init__(self, run: Run, numbers: Sequence[int]) -> None:
        super().__init__(run)
        self.numbers = list(numbers)

    def next_salt(self) -> int:
        return self.numbers.pop(0)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_dropout_is_where_transformers_has_it(tmp_path: Path, family: str):
    base = load(tmp_path, family, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2)
    wrapped = wrapped_peer(base, lora(family), torch.float64)
    for module in base.view("SEQ_CLS").head._blueprint[0].modules():
        module.training = True
    twin = Twin(base, wrapped, fused, Settings())
    loss, ours = twin.gradients(EXAMPLES["encoder"])
    rows = [Piece(0, 77 + i, 0, tuple(e.ids), tuple(e.labels)) for i, e in enumerate(EXAMPLES["encoder"])]
    width = max(len(row.ids) for row in rows)
    tokens, texts = (lines_of(rows, [n] * len(rows), base.device) for n in (width, 1))
    run = Run(tuple(rows), {len(tokens.keys): tokens, len(texts.keys): texts})
    places = [
        2 * PLACES,
        *(PLACES * layer + n for layer in range(2) for n in (6, 7, 8)),
        3 * PLACES + 1,
        3 * PLACES + 2,
    ]
    wrapped.train()
    with _Numbered(run, places) as numbered:
        expected, theirs = peft_gradients(wrapped, twin, EXAMPLES["encoder"])
    assert len(numbered.numbers) == (1 if family == "bert" else 0)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_gradients_equal(ours, theirs, 1e-10)
    (off,) = twin.computation.losses([Row(e) for e in EXAMPLES["encoder"]])
    assert abs(off.total - loss) > 1e-3


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_models_own_layers_do(tmp_path: Path, family: str, tags: bool):
    base = load(tmp_path, family)
    makers = tagger if tags else learner
    learners = [makers(base, seed) for seed in range(2)]
    rows = [row for who in range(2) for row in (tag_rows(who) if tags else rows_of(base, who))]
    slow = ModuleComputation(base, learners, DROPLESS)
    expected_sums, expected = slow.gradients(rows), grads(learners)
    fast = fused(base, learners, DROPLESS)
    sums = fast.gradients(rows)
    for found, wanted in zip(grads(learners), expected, strict=True):
        assert_same(found, wanted, 1e-10)
    for mine, theirs, off in zip(sums, expected_sums, fast.losses(rows), strict=True):
        assert mine.total == pytest.approx(theirs.total, rel=1e-12)
        assert (mine.count, mine.hits, mine.tokens) == (theirs.count, theirs.hits, theirs.tokens)
        assert (off.total, off.hits) == (pytest.approx(theirs.total, rel=1e-12), theirs.hits)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_learners_together_are_each_as_alone(tmp_path: Path, family: str, tags: bool, dropout: float):
    base = load(tmp_path, family)
    makers = tagger if tags else learner
    learners = [makers(base, seed, dropout) for seed in range(3)]
    rows = {who: tag_rows(who) if tags else rows_of(base, who) for who in range(3)}
    sums = fused(base, learners, Settings()).gradients([rows[w][i] for i in (2, 0, 1) for w in (2, 0, 1)])
    found = grads(learners)
    for who, one in enumerate(learners):
        for settings in (Settings(), Settings(pack_tokens=8), Settings(checkpoint=True)):
            (own,) = fused(base, [one], settings).gradients([replace(row, learner=0) for row in rows[who]])
            assert own.total == pytest.approx(sums[who].total, rel=1e-12)
            assert (own.count, own.tokens, own.hits) == (sums[who].count, sums[who].tokens, sums[who].hits)
            assert_same(grads([one])[0], found[who], 1e-10)


@pytest.mark.skipif(not available(), reason="no C compiler")
@pytest.mark.parametrize("tags", [False, True])
def test_native_code_gives_what_torch_gives(tmp_path: Path, tags: bool):
    base = load(tmp_path, "bert", "float32", hidden_size=64)
    learners = [(tagger if tags else learner)(base, seed, 0.2) for seed in range(2)]
    rows = [row for who in range(2) for row in (tag_rows(who) if tags else rows_of(base, who))]
    computation = fused(base, learners, Settings())
    assert isinstance(computation._ops, NativeEncoderOps)
    sums, ours = computation.gradients(rows), grads(learners)
    slow = FusedEncoder(base, learners, Settings(), ops=EncoderOps())
    for mine, theirs in zip(sums, slow.gradients(rows), strict=True):
        assert mine.total == pytest.approx(theirs.total, rel=1e-5)
    for found, wanted in zip(ours, grads(learners), strict=True):
        assert_same(found, wanted, 1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_in_single_precision_quantised_or_not(tmp_path: Path, quantize: str):
    base = load_base(str(models.save("bert", tmp_path, hidden_size=64)), quantize, device="cpu", dtype="float32")
    learners = [learner(base, seed) for seed in range(2)]
    rows = [row for who in range(2) for row in rows_of(base, who)]
    ModuleComputation(base, learners, DROPLESS).gradients(rows)
    expected = grads(learners)
    before = base.live_digest()
    fused(base, learners, DROPLESS).gradients(rows)
    for found, wanted in zip(grads(learners), expected, strict=True):
        assert_same(found, wanted, 2e-5)
    assert base.live_digest() == before
    assert all(p.grad is None for p in base.model.parameters())


def test_in_bfloat16_errors_are_those_of_rounding(tmp_path: Path):
    """At most twice those of the model's own layers in bfloat16, plus 5 % of a gradient's largest value."""
    base = load(tmp_path, "bert", "bfloat16")
    exact = wrapped_peer(base, lora("bert"), torch.float64)
    for parameter in exact.get_base_model().parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    twin, other = Twin(base, exact, fused), Twin(base, exact, ModuleComputation)
    _, theirs = peft_gradients(exact, twin, EXAMPLES["encoder"])
    own = twin.gradients(EXAMPLES["encoder"])[1]
    for (name, mine), (_, slow), truth in zip(own, other.gradients(EXAMPLES["encoder"])[1], theirs, strict=True):
        off, bound = (float((g.double() - truth).abs().max() / truth.abs().max()) for g in (mine, slow))
        assert off <= 2 * bound + 0.05, f"{name}: off by {off:.3f}, layers of transformers by {bound:.3f}"


def test_what_it_does_not_cover_runs_through_the_models_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def chosen(family: str, **changes: Any) -> Computation:
        base = load(tmp_path, family, "float32", **changes)
        return make_computation(base, [learner(base, 1)], Settings())

    assert isinstance(chosen("deberta"), ModuleComputation)
    other = chosen("bert", hidden_act="relu")
    assert isinstance(other, ModuleComputation)
    assert "activation" in other.why
    with monkeypatch.context() as patch:
        patch.setattr(EncoderOps, "gelu", lambda self, x, out: out.copy_(x))
        other = chosen("roberta")
    assert isinstance(other, ModuleComputation)
    assert other.why == "this roberta computes otherwise than BERT does"
    base = load(tmp_path, "electra", "float32")
    mixed = [learner(base, 1), tagger(base, 2)]
    assert encoder_parts.not_covered(base, mixed) == "the heads read different things"


def test_a_text_longer_than_the_positions_is_refused(tmp_path: Path):
    base = load(tmp_path, "roberta", "float32", max_position_embeddings=16)
    one = learner(base, 1)
    computation = fused(base, [one], Settings())
    computation.gradients([Row(Example([5] * 15, [0]))])
    with pytest.raises(CapacityError, match="16 tokens, this base has 15"):
        computation.gradients([Row(Example([5] * 16, [0]))])


def test_buffers_are_reused(tmp_path: Path):
    base = load(tmp_path, "bert", "float32")
    computation = fused(base, [learner(base, 1)], Settings())
    computation.gradients(rows_of(base, 0))
    held = computation.nbytes
    for _ in range(3):
        computation.gradients(rows_of(base, 0))
    assert computation.nbytes == held


def test_ops_follow_device_and_dtype(tmp_path: Path):
    narrow = load(tmp_path, "bert", "float32")
    assert type(encoder.ops_for(narrow)) is EncoderOps


def test_padding_beside_large_scores_gives_no_nan():
    """A query that is padding scores against real keys: e to the power of that may be infinite."""
    lengths = (2, 5)
    zeros = torch.zeros(7, dtype=torch.int64)
    rows = Rows(lengths, lengths, zeros, torch.tensor([0, 1, 0, 1, 2, 3, 4]))
    heads = Heads(1, 4, 1.0, 0, 0.0)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn((7, 4), generator=generator) * 40 for _ in range(4))
    out, sums = torch.empty(7, 4), torch.empty(7, 1)
    grads = (torch.empty(7, 4), torch.empty(7, 4), torch.empty(7, 4))
    ops = EncoderOps()
    ops.attend_rows((q, k, v), out, sums, rows, heads)
    ops.attend_rows_back((q, k, v), out, sums, grad, grads, rows, heads)
    parts = [part.clone().requires_grad_() for part in (q, k, v)]
    for first, end in ((0, 2), (2, 7)):
        some = [part[first:end] for part in parts]
        ((some[0] @ some[1].T).softmax(-1) @ some[2]).backward(grad[first:end])
    for found, part in zip(grads, parts, strict=True):
        assert part.grad is not None
        torch.testing.assert_close(found, part.grad, rtol=1e-4, atol=1e-4 * float(part.grad.abs().max()))
