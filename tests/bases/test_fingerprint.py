"""The fingerprint says what a base is: the same for the same, another for anything that computes otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.bases.fingerprint import Fingerprint, live_digest, weights_digest
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import BaseMismatch, BaseUnavailable, Unsupported
from adapterhub_lite.events import Note
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import peers, tiny

FIELDS = ("config", "tokenizer", "chat_template", "weights", "quantization")


@pytest.fixture
def folder(tiny_folder, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "copy"))


def mark(folder: Path, quantize: str = "none") -> Fingerprint:
    return load_base(str(folder), quantize, device="cpu").fingerprint


def changed(before: Fingerprint, after: Fingerprint) -> set[str]:
    return {name for name in FIELDS if getattr(before, name) != getattr(after, name)}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_sharding_does_not_matter(folder: Path, tmp_path: Path):
    tiny.model("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert changed(mark(folder), mark(tmp_path / "shards")) == set()


def test_the_weights_digest_is_what_its_docstring_says(folder: Path):
    lines = []
    for name, tensor in load_file(folder / "model.safetensors").items():
        data = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        lines.append(f"{name} F32 {list(tensor.shape)} {data}")
    expected = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert weights_digest(folder) == expected


def test_what_libraries_write_does_not_matter(folder: Path):
    before = mark(folder)
    edit(folder / "config.json", transformers_version="99.0", use_cache=False, _name_or_path="elsewhere")
    assert changed(before, mark(folder)) == set()


def test_one_weight_matters(folder: Path):
    before = mark(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = mark(folder)
    assert changed(before, after) == {"weights"}
    assert before.identity != after.identity
    assert before.digest != after.digest


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_a_number_of_the_configuration_matters(folder: Path, name: str):
    before = mark(folder)
    edit(folder / "config.json", **{name: 1e-3})
    assert changed(before, mark(folder)) == {"config"}


def test_the_tokenizer_matters(folder: Path):
    before = mark(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    after = mark(folder)
    assert changed(before, after) == {"tokenizer"}
    assert before.identity != after.identity


def test_the_chat_template_matters_but_is_not_the_identity(folder: Path):
    before = mark(folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    after = mark(folder)
    assert changed(before, after) == {"chat_template"}
    assert before.identity == after.identity
    assert before.digest != after.digest


def test_the_quantisation_matters_but_is_not_the_identity(folder: Path):
    plain, nf4, int8 = (mark(folder, q) for q in ("none", "nf4", "int8"))
    assert changed(plain, nf4) == changed(plain, int8) == {"quantization"}
    assert len({m.digest for m in (plain, nf4, int8)}) == 3
    assert len({m.identity for m in (plain, nf4, int8)}) == 1


def test_the_memo_notices_a_changed_file(folder: Path, tmp_path: Path):
    memo = tmp_path / "memo.json"
    before = weights_digest(folder, memo)
    assert weights_digest(folder, memo) == before == weights_digest(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    after = weights_digest(folder, memo)
    assert after == weights_digest(folder) != before


def test_the_memo_forgets_files_that_are_gone(folder: Path, tmp_path: Path):
    memo = tmp_path / "memo.json"
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    weights_digest(folder, memo)
    shutil.rmtree(folder)
    weights_digest(other, memo)
    assert len(json.loads(memo.read_text())) == 1


@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": 1}', "{"])
def test_a_broken_memo_costs_nothing(folder: Path, tmp_path: Path, content: str):
    memo = tmp_path / "memo.json"
    memo.write_text(content)
    assert weights_digest(folder, memo) == weights_digest(folder)


def test_the_live_digest_sees_one_bit(folder: Path):
    base = load_base(str(folder), "nf4", device="cpu")
    before = base.live_digest()
    assert base.live_digest() == before
    layer = base.model.model.layers[0].self_attn.q_proj
    for tensor in (layer.weight.data, layer.weight.quant_state.absmax, base.model.model.norm.weight.data):
        flat = tensor.view(-1)
        kept = flat[0].clone()
        flat[0] = flat[0] + 1
        assert base.live_digest() != before
        flat[0] = kept
        assert base.live_digest() == before


def test_the_live_digest_of_an_encoder_does_not_depend_on_its_views(tiny_folder):
    base = load_base(str(tiny_folder("bert")), device="cpu")
    before = live_digest(base.model)
    base.view("SEQ_CLS")
    base.view(None)
    assert live_digest(base.model) == before


class TestAnswersAtLoad:
    """The same base, the same weights otherwise held, another base."""

    @pytest.fixture
    def store(self, folder: Path, tmp_path: Path) -> Store:
        """Holds `mine`, whose card names the nf4 form of the folder's base."""
        base = load_base(str(folder), "nf4", device="cpu")
        wrapped = peers.wrap(peers.plain(folder, "CAUSAL_LM"), peers.config("llama", "lora", "CAUSAL_LM"))
        wrapped.save_pretrained(tmp_path / "peft")
        store = Store()
        store.import_(tmp_path / "peft", "mine", {"name": "little", "fingerprint": base.fingerprint.to_dict()})
        return store

    def notes(self, store: Store, folder: Path, quantize: str) -> list[Note]:
        said: list[Any] = []
        runtime = Runtime(load_base(str(folder), quantize, device="cpu"), store, on_event=said.append)
        runtime.load("mine")
        runtime.unload("mine")
        runtime.load("mine")
        return [event for event in said if isinstance(event, Note)]

    def test_the_very_same_base_needs_no_word(self, store: Store, folder: Path):
        assert self.notes(store, folder, "nf4") == []

    def test_another_precision_is_said_once(self, store: Store, folder: Path):
        (note,) = self.notes(store, folder, "none")
        assert note.level == "warning"
        assert "nf4" in note.text
        assert "same weights in float32" in note.text

    def test_another_chat_template_is_said(self, store: Store, folder: Path):
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        (note,) = self.notes(store, folder, "nf4")
        assert "chat template" in note.text

    def test_another_base_is_refused_with_both_fingerprints(self, store: Store, tmp_path: Path):
        other = load_base(str(tiny.save("llama", tmp_path / "other", seed=5)), "nf4", device="cpu")
        runtime = Runtime(other, store)
        recorded = store.card("mine").base["fingerprint"]["digest"]
        with pytest.raises(BaseMismatch) as caught:
            runtime.load("mine")
        for text in (recorded[:12], other.fingerprint.digest[:12], "weights", "little"):
            assert text in str(caught.value)
        assert runtime.resident() == []

    def test_an_adapter_that_names_no_base_is_said(self, store: Store, folder: Path, tmp_path: Path):
        store.import_(tmp_path / "peft", "mine")
        (note,) = self.notes(store, folder, "none")
        assert "does not say" in note.text


class TestRefusedFolders:
    """What is no base is refused with a reason."""

    def test_an_incomplete_checkpoint(self, folder: Path):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseUnavailable, match=r"lacks 1 tensors.*up_proj"):
            load_base(str(folder), device="cpu")

    def test_remote_code(self, folder: Path):
        edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
        (folder / "evil.py").write_text("raise SystemExit('ran')")
        with pytest.raises(BaseUnavailable, match="auto_map"):
            load_base(str(folder), device="cpu")

    def test_quantised_already(self, folder: Path):
        edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
        with pytest.raises(Unsupported, match="quantised already"):
            load_base(str(folder), device="cpu")

    def test_an_image_model(self, folder: Path):
        edit(folder / "config.json", model_type="vit", architectures=["ViTForImageClassification"])
        with pytest.raises(Unsupported, match="not a text model"):
            load_base(str(folder), device="cpu")

    def test_a_device_that_is_not_here(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(Unsupported, match="cuda"):
            load_base(str(folder), device="cuda")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_loaded_is_frozen_and_evaluates(tiny_base, family: str):
    base = tiny_base(family)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.kind == tiny.kind_of(family)
    logits = peers.logits(peers.plain(base.source.folder, peers.task_type(family)))
    if base.kind != "encoder":
        found = Runtime(base, Store()).logits(peers.ROWS, None, peers.ANSWERS if base.kind == "seq2seq" else None)
        peers.assert_logits_equal(found, logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_asked_for(tiny_folder, dtype: str):
    base = load_base(str(tiny_folder("llama")), device="cpu", dtype=dtype)
    assert {str(p.dtype) for p in base.model.parameters()} == {f"torch.{dtype}"}
    assert base.dtype == getattr(torch, dtype)
