"""IA3, prompt tuning and P-tuning in the store: what PEFT saved comes in, is checked, goes out and loads in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.errors import AdapterHubError, AdapterMismatch, Unsupported
from adapterhub_lite.formats.specs import Ia3Spec, PromptSpec
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.receive import receive
from tests import peers
from tests.runtime.test_kinds import KINDS, config, made_by_peft, peft_logits

WEIGHTS = "adapter_model.safetensors"


def made(folder: Path, base_folder: Path, family: str, kind: str):
    task = peers.task_type(family)
    return made_by_peft(folder, base_folder, config(family, kind, task), task)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_in_run_out_and_into_peft(tiny_base, tmp_path: Path, family: str, kind: str):
    base, store = tiny_base(family), Store()
    expected = peft_logits(made(tmp_path / "in", base.source.folder, family, kind))
    runtime = Runtime(base, store)
    ref = receive(tmp_path / "in", "mine", store=store, base=str(base.source.folder))
    answers = peers.ANSWERS if family == "t5" else None
    peers.assert_logits_equal(runtime.logits(peers.ROWS, ref, answers), expected)
    runtime.close()
    assert store.verify() == []
    kept = store.card(ref).adapter
    assert kept["type"] == ("ia3" if kind.startswith("ia3") else "prompt")
    out = store.export(ref, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(peers.plain(base.source.folder, peers.task_type(family)), out).eval()
    peers.assert_logits_equal(peft_logits(again), expected)
    assert Store(tmp_path / "other").import_(out, name="again").digest == ref.digest


def test_the_modules_of_a_pattern_are_spelled_out(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    made(tmp_path, base.source.folder, "llama", "ia3 outputs")
    spec = store.spec(store.import_(tmp_path, name="mine"))
    assert isinstance(spec, Ia3Spec)
    assert "model.layers.1.mlp.gate_proj" in spec.target_modules
    assert spec.feedforward_modules == ()
    made(tmp_path / "both", base.source.folder, "llama", "ia3 default")
    raw_both = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    changes = {"target_modules": ".*_proj", "feedforward_modules": ".*down_proj"}
    (tmp_path / "both" / "adapter_config.json").write_text(json.dumps({**raw_both, **changes}))
    spec = store.spec(store.import_(tmp_path / "both", name="both"))
    assert isinstance(spec, Ia3Spec)
    assert spec.feedforward_modules == tuple(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))
    assert set(spec.feedforward_modules) < set(spec.target_modules)


def _spoiled(folder: Path, spoil) -> None:
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)


def _first(tensors):
    return next(k for k in tensors if "ia3_l" in k or k == "prompt_embeddings")


SPOILS = {
    "turned": lambda t: t.update({_first(t): t[_first(t)].T}),
    "flat": lambda t: t.update({_first(t): t[_first(t)].flatten()}),
    "gone": lambda t: t.pop(_first(t)),
    "nan": lambda t: t[_first(t)].view(-1)[1:2].fill_(float("nan")),
    "integer": lambda t: t.update({_first(t): t[_first(t)].to(torch.int32)}),
    "stranger": lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.ia3_l": torch.ones(32, 1)}),
    "LoRA too": lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("kind", ["ia3 default", "prompt"])
def test_what_does_not_fit_its_configuration_is_not_stored(tiny_base, tmp_path: Path, kind: str, spoil: str):
    store = Store()
    made(tmp_path, tiny_base("llama").source.folder, "llama", kind)
    _spoiled(tmp_path, SPOILS[spoil])
    if (kind, spoil) == ("ia3 default", "gone"):
        ref = store.import_(tmp_path, name="mine")  # the names in target_modules do not say in which layers they are
        with pytest.raises(AdapterMismatch, match="targeted but has no tensors"):
            Runtime(tiny_base("llama"), store).load(ref)
        return
    with pytest.raises(AdapterMismatch):
        store.import_(tmp_path, name="mine")
    assert store.list() == []


@pytest.mark.parametrize("kind", ["ia3 default", "prompt", "p_tuning mlp"])
def test_another_base_is_told_before_anything_is_stored(tiny_folder, tiny_base, tmp_path: Path, kind: str):
    store = Store()
    made(tmp_path, tiny_base("llama").source.folder, "llama", kind)
    wide = tiny_folder("llama", hidden_size=48)
    with pytest.raises(AdapterMismatch, match="does not fit the base"):
        receive(tmp_path, "mine", store=store, base=str(wide))
    assert store.list() == []
    assert receive(tmp_path, "mine", store=store, base=str(tiny_base("llama").source.folder)).version == 1


def test_the_specs_of_the_store(tiny_base, tmp_path: Path):
    base, store = tiny_base("t5"), Store()
    made(tmp_path, base.source.folder, "t5", "p_tuning lstm")
    spec = store.spec(store.import_(tmp_path, name="mine"))
    assert isinstance(spec, PromptSpec)
    assert (spec.method, spec.shape) == ("P_TUNING", (8, 32))


@pytest.mark.parametrize("kind", ["ia3 default", "prompt"])
def test_merging_refuses_them(tiny_base, tmp_path: Path, kind: str):
    from adapterhub_lite.workflows.merge import merge

    base, store = tiny_base("llama"), Store()
    made(tmp_path / "in", base.source.folder, "llama", kind)
    receive(tmp_path / "in", "mine", store=store, base=str(base.source.folder))
    with pytest.raises(AdapterHubError) as caught:
        merge("mine", tmp_path / "out", store=store)
    assert isinstance(caught.value, Unsupported), caught.value
    assert not (tmp_path / "out").exists()
