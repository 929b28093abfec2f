"""Gradients through a model's own forward are PEFT's, whatever is packed, padded, quantised or dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from adapterhub_lite.adapters.sites import is_conv1d, linear_sites, select_sites
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.bases.quantization import dense_weight
from adapterhub_lite.formats.peft_config import LoraSpec
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Learner, Row, Settings
from adapterhub_lite.training.dropout import keep_mask
from adapterhub_lite.training.modules.computation import ModuleComputation
from adapterhub_lite.training.modules.dropout import Dropping
from adapterhub_lite.training.modules.lines import Run, lines_of
from adapterhub_lite.training.modules.sites import FIRST_SITE
from adapterhub_lite.training.packs import Piece
from adapterhub_lite.training.trainable import TrainableLora
from tests import peers
from tests.training import models
from tests.training.build import DROPLESS, EXAMPLES, Twin, assert_gradients_equal, peft_gradients, precision

MORE = ("opt", "bart", "gemma2", "electra", "deberta")
# What these families compute in float32 whatever the model's precision, no float64 can make equal to more digits.
IN_DOUBLE = ("gpt2", "opt", "bart", "bert", "roberta", "electra", "deberta")


@pytest.fixture(autouse=True)
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with precision(monkeypatch):
        yield


def load(tmp_path: Path, family: str, dtype: str = "float64", **changes: Any) -> Base:
    folder = models.save(family, tmp_path / f"{family} {dtype}", **changes)
    return load_base(str(folder), device="cpu", dtype=dtype)


def lora(family: str, **changes: Any) -> peft.LoraConfig:
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    return peft.LoraConfig(task_type=models.task_type(family), **given)


def wrapped_peer(base: Base, config: Any, dtype: torch.dtype) -> Any:
    model = peers.plain(base.source.folder, config.task_type).to(dtype)
    return peers.wrap(model, config).to(dtype)


def learner(base: Base, seed: int, dropout: float = 0.0, dora: bool = False, targets: Any = "all-linear") -> Learner:
    """One of several learners, with tensors of its own."""
    task = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}[base.kind]
    view, generator = base.view(task), torch.Generator().manual_seed(seed)
    output = None if base.kind == "encoder" else base.model.get_output_embeddings()
    spec = LoraSpec(rank=2 + seed, alpha=8, dropout=dropout, use_dora=dora)
    made = TrainableLora(spec, select_sites(view.modules, targets, output), generator)
    for site in made.sites.values():
        site.b.data.normal_(0, 0.2, generator=generator)
        for parameter in (site.a, site.b, site.magnitude):
            if parameter is not None:
                parameter.data = parameter.data.to(base.dtype)
    head = None
    if base.kind == "encoder":
        head = view.head.build(view.head.fresh(2 + seed, generator, 0.5)).to(base.dtype).requires_grad_(True)
    return Learner(made, head, task)


def rows_of(base: Base, who: int, first: int = 0) -> list[Row]:
    some = EXAMPLES[base.kind]
    if base.kind == "encoder":
        some = [Example(e.ids, [e.labels[0] % 2]) for e in some]
    return [Row(e, who, 1000 * who + first + i + (7 << 40)) for i, e in enumerate(some)]


def grads(learners: Sequence[Learner]) -> list[list[torch.Tensor]]:
    """The gradients, which are then gone."""
    found = [[p.grad.clone() for p in one.parameters()] for one in learners]
    for one in learners:
        for p in one.parameters():
            p.grad = None
    return found


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], relative: float) -> None:
    assert_gradients_equal([(str(i), g) for i, g in enumerate(found)], expected, relative)


@pytest.mark.parametrize("family", MORE)
def test_other_families_have_pefts_gradients(tmp_path: Path, family: str):
    exact = family in IN_DOUBLE
    base = load(tmp_path, family, "float64" if exact else "float32")
    wrapped = wrapped_peer(base, lora(family), base.dtype)
    twin = Twin(base, wrapped, ModuleComputation)
    loss, ours = twin.gradients(EXAMPLES[base.kind])
    expected, theirs = peft_gradients(wrapped, twin, EXAMPLES[base.kind])
    assert loss == pytest.approx(expected, rel=1e-12 if exact else 1e-5)
    assert_gradients_equal(ours, theirs, relative=1e-10 if exact else 2e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "patterns"])
def test_packed_rows_have_the_gradients_of_padded_ones(tmp_path: Path, family: str, kind: str):
    base = load(tmp_path, family)
    config = lora(family, use_rslora=kind == "rslora", use_dora=kind == "dora")
    if kind == "patterns":
        config.rank_pattern, config.alpha_pattern = {"layers.1.fc1": 7, "h.1.attn.c_attn": 7}, {"fc2": 3, "c_proj": 3}
    wrapped = wrapped_peer(base, config, torch.float64)
    twin = Twin(base, wrapped, ModuleComputation)
    assert twin.computation._pass.packs
    _, theirs = peft_gradients(wrapped, twin, EXAMPLES["causal"])
    assert_gradients_equal(twin.gradients(EXAMPLES["causal"])[1], theirs, 1e-10)
    twin.computation._pass.packs = False
    assert_gradients_equal(twin.gradients(EXAMPLES["causal"])[1], theirs, 1e-10)


def test_a_model_whose_attention_is_not_ours_is_padded(tmp_path: Path):
    """Gemma 2 caps its scores and lets layers see a window."""
    base = load(tmp_path, "gemma2", "float32")
    assert not ModuleComputation(base, [learner(base, 1)], Settings())._pass.packs


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "c_attn"], ["lm_head", "q_proj"]])
def test_an_adapter_may_change_the_output_layer(tmp_path: Path, family: str, targets: list[str]):
    """Which shares its weight with the embedding here; that stays as it is."""
    if targets[-1] not in ("lm_head", {"gpt2": "c_attn", "opt": "q_proj"}[family]):
        pytest.skip("not a layer of this family")
    base = load(tmp_path, family)
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    wrapped = wrapped_peer(base, lora(family, target_modules=targets), torch.float64)
    twin = Twin(base, wrapped, ModuleComputation)
    loss, ours = twin.gradients(EXAMPLES["causal"])
    expected, theirs = peft_gradients(wrapped, twin, EXAMPLES["causal"])
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_gradients_equal(ours, theirs, 1e-10)


class _Masked(nn.Module):
    """PEFT's dropout layer with the masks of `keep_mask`."""

    def __init__(self, rows: Sequence[int], salt: int, p: float) -> None:
        super().__init__()
        self.rows, self.salt, self.p = rows, salt, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x[0, ..., 0].numel()
        keys = torch.tensor(self.rows).repeat_interleave(count)
        kept = keep_mask(keys, torch.arange(count).repeat(len(self.rows)), self.salt, x.shape[-1], self.p)
        return x * kept.view(x.shape) / (1 - self.p)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_dropout_of_adapters_is_pefts_with_our_masks(tmp_path: Path, family: str, dora: bool):
    base = load(tmp_path, family)
    config = lora(family, lora_dropout=0.4, use_dora=dora)
    wrapped = wrapped_peer(base, config, torch.float64)
    order = {name: i for i, (name, _) in enumerate(base.view(config.task_type).model.named_modules())}
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = _Masked([77, 78, 79], FIRST_SITE + order[name], 0.4)
            for layer in (module, *module.lora_magnitude_vector.values()):
                layer.training = True
    twin = Twin(base, wrapped, ModuleComputation)
    loss, ours = twin.gradients(EXAMPLES[base.kind])
    expected, theirs = peft_gradients(wrapped, twin, EXAMPLES[base.kind])
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_gradients_equal(ours, theirs, 1e-10)
    other = twin.computation.losses([Row(e) for e in EXAMPLES[base.kind]])[0]
    assert abs(other.total - loss) > 1e-3, "dropout did not act, or was not off"


def test_dropout_of_the_base_is_the_same_packed_and_padded(tmp_path: Path):
    """A padded batch of plain PEFT in training mode, its dropout answered by the same masks."""
    base = load(tmp_path, "gpt2")
    wrapped = wrapped_peer(base, lora("gpt2"), torch.float64)
    twin = Twin(base, wrapped, ModuleComputation, Settings())
    assert twin.computation._pass.packs
    loss, ours = twin.gradients(EXAMPLES["causal"])
    rows = [Piece(0, 77 + i, 0, tuple(e.ids), tuple(e.labels)) for i, e in enumerate(EXAMPLES["causal"])]
    width = max(len(row.ids) for row in rows)
    lines = lines_of(rows, [width] * len(rows), base.device)
    wrapped.train()
    with Dropping(Run(tuple(rows), {len(lines.keys): lines})):
        expected, theirs = peft_gradients(wrapped, twin, EXAMPLES["causal"])
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_gradients_equal(ours, theirs, 1e-10)
    assert abs(twin.computation.losses([Row(e) for e in EXAMPLES["causal"]])[0].total - loss) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "deberta", "bart", "t5"])
def test_learners_together_are_each_as_alone(tmp_path: Path, family: str, dropout: float):
    base = load(tmp_path, family)
    kinds = ((0, False), (1, True), (2, False))
    learners = [learner(base, seed, dropout, dora) for seed, dora in kinds]
    together = ModuleComputation(base, learners, Settings())
    rows = [row for who in range(3) for row in rows_of(base, who)]
    sums = together.gradients([rows[i] for i in (8, 0, 4, 3, 1, 7, 2, 6, 5)])
    found = grads(learners)
    for who, one in enumerate(learners):
        for settings in (Settings(), Settings(pack_tokens=8), Settings(checkpoint=True)):
            alone = ModuleComputation(base, [one], settings)
            (own,) = alone.gradients([Row(r.example, 0, r.key) for r in rows_of(base, who)])
            assert own.total == pytest.approx(sums[who].total, rel=1e-6 if family == "t5" else 1e-12)
            assert (own.count, own.tokens, own.hits) == (sums[who].count, sums[who].tokens, sums[who].hits)
            assert_same(grads([one])[0], found[who], 1e-5 if family == "t5" else 1e-10)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["opt", "bert", "t5"])
def test_quantised_bases_have_the_gradients_of_the_weights_they_stand_for(
    tmp_path: Path, family: str, kind: str, quantize: str
):
    folder = models.save(family, tmp_path)
    base = load_base(str(folder), quantize, device="cpu")
    config = lora(family, use_dora=kind == "dora")
    model = peers.plain(folder, config.task_type)
    stored = linear_sites(dict(base.view(config.task_type).model.named_modules()))
    for name, module in linear_sites(dict(model.named_modules())).items():
        if name in stored and module.weight.shape == dense_weight(stored[name]).shape:
            module.weight.data = dense_weight(stored[name], torch.float32).clone()
            assert not is_conv1d(module)
    wrapped = peers.wrap(model, config)
    twin = Twin(base, wrapped, ModuleComputation)
    loss, ours = twin.gradients(EXAMPLES[base.kind])
    expected, theirs = peft_gradients(wrapped, twin, EXAMPLES[base.kind])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_gradients_equal(ours, theirs, 5e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert"])
def test_in_bfloat16_errors_are_those_of_rounding(tmp_path: Path, family: str):
    """Within 10 % of a gradient's largest value, or twice what PEFT in bfloat16 is off by."""
    base = load(tmp_path, family, "bfloat16")
    exact = wrapped_peer(base, lora(family), torch.float64)
    model = peers.plain(base.source.folder, models.task_type(family))
    for parameter in (*model.parameters(), *exact.get_base_model().parameters()):
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    rounded = peers.wrap(model.bfloat16(), lora(family))
    rounded.load_state_dict(exact.state_dict())
    twin = Twin(base, exact, ModuleComputation)
    _, ours = twin.gradients(EXAMPLES[base.kind])
    _, theirs = peft_gradients(exact, twin, EXAMPLES[base.kind])
    _, peers_own = peft_gradients(rounded, Twin(base, rounded, ModuleComputation), EXAMPLES[base.kind])
    for (name, own), truth, other in zip(ours, theirs, peers_own, strict=True):
        scale = float(truth.abs().max())
        off, theirs_off = (float((g.double() - truth).abs().max()) / scale for g in (own, other))
        assert off <= max(0.1, 2 * theirs_off), f"{name}: {off:.3f} against PEFT's {theirs_off:.3f}"


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "bart"])
def test_the_base_is_as_before(tmp_path: Path, family: str):
    base = load(tmp_path, family, "float32")
    before = base.live_digest()
    buffers = {n: b.clone() for n, b in base.model.named_buffers()}
    attention = base.config._attn_implementation
    state = torch.get_rng_state()
    one = learner(base, 1, 0.2)
    computation = ModuleComputation(base, [one], Settings(checkpoint=True))
    computation.gradients(rows_of(base, 0))
    computation.losses(rows_of(base, 0))
    assert base.live_digest() == before
    assert all(torch.equal(b, buffers[n]) for n, b in base.model.named_buffers())
    assert all(p.grad is None for p in base.model.parameters())
    assert not any(m.training for m in base.model.modules())
    assert not [n for n, m in base.model.named_modules() if "forward" in m.__dict__]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.model.modules())
    assert base.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_without_a_supervised_token_change_nothing(tmp_path: Path):
    base = load(tmp_path, "gpt2")
    one = learner(base, 1)
    computation = ModuleComputation(base, [one], DROPLESS)
    computation.gradients(rows_of(base, 0))
    (expected,) = grads([one])
    (sums,) = computation.gradients([*rows_of(base, 0), Row(Example([5, 6, 7], [IGNORED] * 3))])
    assert_same(grads([one])[0], expected, 1e-12)
    assert sums.count == 8
    (nothing,) = computation.gradients([Row(Example([5, 6, 7], [IGNORED] * 3))])
    assert (nothing.total, nothing.count) == (0.0, 0)
