"""What PEFT saved, imported into the store and run by us, gives PEFT's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapterhub_lite.errors import AdapterHubError, AdapterMismatch
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.receive import receive
from tests import peers, tiny

LANGUAGE = ("llama", "gpt2", "t5")


def check(tiny_base, tmp_path: Path, family: str, kind: str, task: str) -> None:
    base = tiny_base(family)
    model = peers.plain(base.source.folder, task)
    bare = peers.logits(model)
    wrapped = peers.wrap(model, peers.config(family, kind, task))
    wrapped.save_pretrained(tmp_path / "peft")
    expected = peers.logits(wrapped)
    assert not torch.allclose(expected[0], bare[0], atol=1e-3), "the reference adapter itself does nothing"
    store = Store()
    runtime = Runtime(base, store)
    before = base.live_digest()
    try:
        # With its base named: whatever loads below must also pass the comparison of shapes.
        ref = receive(tmp_path / "peft", "mine", store=store, base=str(base.source.folder))
        answers = peers.ANSWERS if task == "SEQ_2_SEQ_LM" else None
        peers.assert_logits_equal(runtime.logits(peers.ROWS, ref, answers), expected)
    finally:
        runtime.close()
    assert base.live_digest() == before


@pytest.mark.parametrize("kind", peers.KINDS)
@pytest.mark.parametrize("family", LANGUAGE)
def test_language_models(tiny_base, tmp_path: Path, family: str, kind: str):
    check(tiny_base, tmp_path, family, kind, peers.task_type(family))


@pytest.mark.parametrize("kind", peers.KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_classification_heads(tiny_base, tmp_path: Path, family: str, kind: str):
    if family == "t5" and kind in ("prefix", "projection"):
        pytest.skip("PEFT itself has no prefix for T5ForSequenceClassification")
    check(tiny_base, tmp_path, family, kind, "SEQ_CLS")


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_the_head_of_the_file_is_used_and_not_the_checkpoints(tiny_base, tmp_path: Path, family: str, kind: str):
    base = tiny_base(family)
    store, runtime = Store(), Runtime(base, Store())
    found = []
    for seed in (1, 2):
        model = peers.plain(base.source.folder, "SEQ_CLS", labels=5, seed=seed)
        peers.wrap(model, peers.config(family, kind, "SEQ_CLS")).save_pretrained(tmp_path / str(seed))
        store.import_(tmp_path / str(seed), name="mine")
        found.append(runtime.logits(peers.ROWS, "mine")[0])
    runtime.close()
    assert found[0].shape == (5,)
    assert not torch.allclose(*found)


def test_another_familys_adapter_is_refused(tiny_base, tmp_path: Path):
    store, runtime = Store(), Runtime(tiny_base("gpt2"), Store())
    for kind in ("lora", "prefix"):
        model = peers.plain(tiny_base("llama").source.folder, "CAUSAL_LM")
        peers.wrap(model, peers.config("llama", kind, "CAUSAL_LM")).save_pretrained(tmp_path / kind)
        store.import_(tmp_path / kind, name="mine")
        with pytest.raises(AdapterMismatch, match=r"this base"):
            runtime.load("mine")
    assert runtime.resident() == []


def test_a_module_too_few_is_refused(tiny_base, tmp_path: Path):
    """An adapter of a one-layer model names every module that it has; the two-layer base has more of them."""
    store, base = Store(), tiny_base("llama")
    folder = tiny.save("llama", tmp_path / "base", num_hidden_layers=1)
    config = peers.config("llama", "lora", "CAUSAL_LM", target_modules=["q_proj"])
    peers.wrap(peers.plain(folder, "CAUSAL_LM"), config).save_pretrained(tmp_path / "peft")
    store.import_(tmp_path / "peft", name="mine")
    with pytest.raises(AdapterMismatch, match=r"targeted but has no tensors"):
        Runtime(base, store).load("mine")


@pytest.mark.parametrize("part", ["lora_B.bias", "classifier.bias", "classifier"])
def test_a_missing_tensor_is_refused_before_anything_runs(tiny_base, tmp_path: Path, part: str):
    from safetensors.torch import load_file, save_file

    base, store = tiny_base("bert"), Store()
    model = peers.plain(base.source.folder, "SEQ_CLS")
    peers.wrap(model, peers.config("bert", "bias", "SEQ_CLS")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = [k for k in tensors if part in k][: None if part == "classifier" else 1]
    assert gone
    save_file({k: v for k, v in tensors.items() if k not in gone}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterHubError):
        Runtime(base, store).load(store.import_(tmp_path, name="mine"))
