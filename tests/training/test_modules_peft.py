"""PEFT's other methods: trained by PEFT's own layers, stored, read by plain PEFT and served with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

from adapterhub_lite.bases.load import Base
from adapterhub_lite.errors import AdapterMismatch, FormatError, RecipeError, Unsupported
from adapterhub_lite.recipe import PeftAdapter, load_recipe
from adapterhub_lite.recipe.load import recipe_dict
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.task import IGNORED
from adapterhub_lite.training.computation import Learner, Row, Settings
from adapterhub_lite.training.modules.computation import ModuleComputation
from adapterhub_lite.training.train import Trained, train_adapter
from adapterhub_lite.training.trainable_peft import TrainablePeft, peft_sites
from adapterhub_lite.workflows.train import train
from tests import injected, peers
from tests.training import recipes
from tests.training.build import EXAMPLES, assert_gradients_equal

MORE: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": ["down_proj", "c_fc", "intermediate.dense", "wo"]},
    "LOHA": {"r": 4, "alpha": 8},
    "LOKR": {"r": 4, "alpha": 8},
    # Letters, of which the rows are made.
    "TRAINABLE_TOKENS": {"token_indices": list(range(60, 110))},
}
OPTIONS = {**{method: dict(injected.OPTIONS[method]) for method in injected.METHODS}, **MORE}


def adapter_of(method: str, **more: Any) -> dict[str, Any]:
    return {"type": "peft", "method": method.lower(), "options": {**OPTIONS.get(method, {}), **more}}


@pytest.mark.parametrize("method", OPTIONS)
def test_what_is_trained_is_what_peft_reads_and_what_is_served(tiny_base, tmp_path: Path, method: str):
    base, store = tiny_base("llama"), Store()
    before = base.live_digest()
    ref = train(recipes.write(tmp_path, base, adapter_of(method), {"learning_rate": 0.02}), store=store, base=base)
    assert base.live_digest() == before
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(m.training for m in base.model.modules())
    folder = store.export(ref, tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(peers.plain(base.source.folder, "CAUSAL_LM"), folder).eval()
    peers.assert_logits_equal(Runtime(base, store).logits(peers.ROWS, ref), peers.logits(wrapped), 2e-5)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, method) for family in ("bert", "t5") for method in ("VERA", "IA3", "LN_TUNING", "LOKR", "OFT")),
        *(("gpt2", method) for method in ("VERA", "IA3", "LN_TUNING")),  # PEFT's others know no Conv1D
    ],
)
def test_other_families_learn_with_it(tiny_base, tmp_path: Path, family: str, method: str):
    base, store = tiny_base(family), Store()
    how = {"learning_rate": 0.03, "epochs": 8}
    path = recipes.write(tmp_path, base, adapter_of(method), how)
    history = trained(path, base).history
    assert min(history.losses[-4:]) < history.losses[0]
    ref = train(path, store=store, base=base, overrides={"training.epochs": 1})
    folder = store.export(ref, tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(peers.plain(base.source.folder, peers.task_type(family)), folder).eval()
    answers = peers.ANSWERS if base.kind == "seq2seq" else None
    peers.assert_logits_equal(Runtime(base, store).logits(peers.ROWS, ref, answers), peers.logits(wrapped), 2e-5)


def trained(path: Path, base: Base) -> Trained:
    recipe = load_recipe(path)
    return train_adapter(recipe, base, EXAMPLES[base.kind] * 4, labels=3)


def test_two_runs_give_the_same_adapter(tiny_base, tmp_path: Path):
    base = tiny_base("bert")
    path = recipes.write(tmp_path, base, adapter_of("VERA", vera_dropout=0.2))
    first, second = (trained(path, base).adapter for _ in range(2))
    assert first.spec == second.spec
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    assert [k for k in first.tensors if "classifier" in k]


@pytest.mark.parametrize("packs", [False, True])
def test_gradients_are_those_of_pefts_model(tiny_base, packs: bool):
    """The same layers in plain PEFT around plain transformers, over a padded batch."""
    base = tiny_base("gpt2")
    view = base.view("CAUSAL_LM")
    sites = peft_sites("VERA", ["c_attn"], view.modules, None)
    common = {"task_type": "CAUSAL_LM", "base_model": "", "revision": None, "modules_to_save": ()}
    ours = TrainablePeft("VERA", {"r": 4}, sites, view.modules, ["c_attn"], common)
    config = peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"])
    wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), config)
    theirs = [p for p in wrapped.parameters() if p.requires_grad]
    for own, other in zip(ours.parameters(), theirs, strict=True):
        other.data.normal_(0, 0.2)
        own.data = other.data.clone()
    computation = ModuleComputation(base, [Learner(ours)], Settings(dropout_of_base=False))
    assert computation._pass.packs
    computation._pass.packs = packs
    (sums,) = computation.gradients([Row(e) for e in EXAMPLES["causal"]])
    total = 0.0
    for example in EXAMPLES["causal"]:
        logits = wrapped(input_ids=torch.tensor([example.ids])).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.tensor(example.labels[1:]), ignore_index=IGNORED, reduction="sum")
        loss.backward()
        total += float(loss.detach())
    assert sums.total == pytest.approx(total, rel=1e-5)
    assert_gradients_equal([(str(i), p.grad) for i, p in enumerate(ours.parameters())], [p.grad for p in theirs], 2e-5)


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        ({"method": "ADALORA"}, Unsupported, "ADALORA is not trained through"),
        ({"method": "LORA"}, Unsupported, "LORA is not trained through"),
        ({"method": "NOSUCH"}, Unsupported, "NOSUCH is not trained"),
        ({"method": "VERA", "options": {"rank": 4}}, FormatError, "rank"),
        ({"method": "VERA", "options": {"r": 0}}, FormatError, "r: "),
        ({"method": "C3A", "options": {"block_size": 7}}, AdapterMismatch, "C3A"),
        ({"method": "VERA", "targets": ["nowhere"]}, Unsupported, "'nowhere' matches no linear layer"),
    ],
)
def test_what_cannot_be_is_said(tiny_base, tmp_path: Path, adapter: dict[str, Any], error: type, message: str):
    base = tiny_base("llama")
    before = base.live_digest()
    with pytest.raises(error, match=message):
        trained(recipes.write(tmp_path, base, {"type": "peft", **adapter}), base)
    assert base.live_digest() == before


def test_one_at_a_time(tiny_base):
    base = tiny_base("gpt2")
    view = base.view("CAUSAL_LM")
    sites = peft_sites("IA3", "all-linear", view.modules, base.model.get_output_embeddings())
    common = {"task_type": "CAUSAL_LM", "base_model": "", "revision": None, "modules_to_save": ()}
    learners = [Learner(TrainablePeft("IA3", {}, sites, view.modules, list(sites), common)) for _ in range(2)]
    with pytest.raises(Unsupported, match="one at a time"):
        ModuleComputation(base, learners, Settings())


def test_a_recipe_says_it(tiny_base, tmp_path: Path):
    options = {"r": 4, "d_initial": 0.5, "save_projection": True, "layers": [1, "two"], "map": {"a": None, "b": "1"}}
    path = recipes.write(tmp_path, tiny_base("llama"), {"type": "peft", "method": "vera", "options": options})
    recipe = load_recipe(path)
    assert recipe.adapter == PeftAdapter("peft", "VERA", "all-linear", options)
    assert recipe_dict(recipe)["adapter"]["options"] == options
    assert recipe.training.learning_rate > 0
    path = recipes.write(tmp_path, tiny_base("llama"), {"type": "peft", "method": "../vera", "rank": 4})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "name of a PEFT method" in str(caught.value)
    assert "rank" in str(caught.value)
