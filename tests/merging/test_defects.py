"""What once went wrong in a merge: lost files, errors without a word, what is left after an unexpected one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import BaseUnavailable, StoreError, Unsupported
from adapterhub_lite.merging.report import Thresholds
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import merge as merging
from adapterhub_lite.workflows.convert import convert
from adapterhub_lite.workflows.merge import merge
from tests import peers, tiny
from tests.merging.build import peft_folder, stored


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny.save("llama", tmp_path / "base")


@pytest.fixture
def ref(tmp_path, base, store):
    peft_folder(tmp_path / "peft", base, "llama")
    return stored(store, "mine", tmp_path / "peft", load_base(str(base), device="cpu"), None, tmp_path / "data")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "merging" in path.name or path.name == "out")


def with_biases(folder: Path) -> Path:
    """Random biases in place of zeros, which no factor would change."""
    torch.manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    made = {name: torch.randn_like(t) * 0.2 if name.endswith(".bias") else t for name, t in tensors.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "weights"])
@pytest.mark.parametrize(
    ("family", "targets", "inputs"),
    [("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), ("bert", ["key", "output.dense"], ["output.dense"])],
)
def test_ia3_on_layers_with_a_bias(tmp_path, store, family, targets, inputs, verify):
    folder, task = with_biases(tiny.save(family, tmp_path / "base")), peers.task_type(family)
    settings = IA3Config(
        task_type=task, target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=family == "gpt2"
    )
    model = get_peft_model(peers.plain(folder, task), settings).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ref = stored(store, "mine", tmp_path / "peft", load_base(str(folder), device="cpu"), None, tmp_path / "data")
    merge(ref, tmp_path / "out", store=store, verify=verify)
    peers.assert_logits_equal(peers.logits(peers.plain(tmp_path / "out", task)), peers.logits(model))


@pytest.mark.parametrize("verify", ["full", "weights"])
def test_a_classifier_with_an_adapter_on_its_embeddings_alone(tmp_path, store, verify):
    folder = tiny.save("bert", tmp_path / "base")
    model = peft_folder(tmp_path / "peft", folder, "bert", target_modules=["word_embeddings"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ref = stored(store, "mine", tmp_path / "peft", load_base(str(folder), device="cpu"), None, tmp_path / "data")
    merge(ref, tmp_path / "out", store=store, verify=verify)
    peers.assert_logits_equal(peers.logits(peers.plain(tmp_path / "out", "SEQ_CLS")), peers.logits(model))


# -- what is left -----------------------------------------------------------------------------------------------------


def failing(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", [NotImplementedError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_an_unexpected_error_leaves_nothing(tmp_path, store, ref, monkeypatch, error):
    monkeypatch.setattr(merging.Verifier, "verify", failing(error))
    with pytest.raises(type(error)):
        merge(ref, tmp_path / "out", store=store)
    assert left(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreError("The disk is gone.", ""), MemoryError()])
def test_what_another_attempt_can_go_on_from_is_kept(tmp_path, store, ref, monkeypatch, error):
    with monkeypatch.context() as patched:
        patched.setattr(merging.Verifier, "verify", failing(error))
        with pytest.raises(type(error)):
            merge(ref, tmp_path / "out", store=store)
    assert len(left(tmp_path)) == 1
    events = []
    merge(ref, tmp_path / "out", store=store, on_event=events.append)
    assert any("taken over" in str(event) for event in events)
    assert left(tmp_path) == ["out"]


# -- files ------------------------------------------------------------------------------------------------------------

TOKENIZER_FILES = (
    "additional_chat_templates/rag.jinja",
    "spm.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tekken.json",
)


@pytest.mark.parametrize("to", ["auto", "nf4"])
def test_every_file_of_a_tokenizer_is_copied_and_others_are_named(tmp_path, store, base, ref, to):
    own = {"special_tokens_map.json": "{}", "added_tokens.json": "{}", "generation_config.json": "{}"}
    (base / "additional_chat_templates").mkdir()
    for name in TOKENIZER_FILES:
        (base / name).write_text(own.get(name, json.dumps({"of": name})))
    for name in ("modules.json", "custom_code.py", "README.md", "pytorch_model.bin", ".hidden"):
        (base / name).write_text("{}")
    (base / "1_Pooling").mkdir()
    report = merge(ref, tmp_path / "out", store=store, to=to, base_name=str(base), verify="weights")
    for name in TOKENIZER_FILES:
        assert (tmp_path / "out" / name).read_text() == (base / name).read_text(), name
    note = next(note for note in report.notes if "not copied" in note)
    assert note.endswith("not copied: 1_Pooling/, custom_code.py, modules.json.")
    assert not (tmp_path / "out" / "custom_code.py").exists()


def test_a_base_of_known_files_gives_no_note(tmp_path, store, ref):
    report = merge(ref, tmp_path / "out", store=store, verify="weights")
    assert not [note for note in report.notes if "copied" in note]


def test_a_folder_of_templates_survives_an_interrupt(tmp_path, store, base, ref, monkeypatch):
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("RAG")
    with monkeypatch.context() as patched:
        patched.setattr(merging.Verifier, "verify", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            merge(ref, tmp_path / "out", store=store, base_name=str(base))
    merge(ref, tmp_path / "out", store=store, base_name=str(base))
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "RAG"


# -- what a report says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "weights"])
def test_what_an_imported_version_claims_is_said(tmp_path, store, base, ref, verify):
    store.export(ref, tmp_path / "exported")
    other = Store(tmp_path / "other")
    imported = other.import_(tmp_path / "exported", name="foreign")
    report = merge(imported, tmp_path / "out", store=other, base_name=str(base), verify=verify)
    assert f"{imported} was imported: that it was made for this base is what its card claims." in report.notes
    own = merge(ref, tmp_path / "own", store=store, verify=verify)
    assert not [note for note in own.notes if "imported" in note]


def test_a_page_holds_nothing_that_steers(tmp_path, store, ref):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red \x1b[31m \x07 \u202e turned\n" + "\u00e9 plain\n", "utf-8")
    merge(ref, tmp_path / "out", store=store, prompts=prompts)
    page = (tmp_path / "out" / "merge_report.html").read_text("utf-8")
    assert not {"\x1b", "\x07", "\u202e"} & set(page)
    assert r"red \x1b[31m \x07 \u202e turned" in page
    assert "\u00e9 plain" in page


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"model_type": "nonesuch"}, {"rms_norm_eps": "x"}, {"id2label": []}, {"hidden_size": "wide"}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("to", ["auto", "gguf-f16"])
def test_a_broken_configuration_of_a_base(tmp_path, store, base, ref, change, to):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BaseUnavailable):
        merge(ref, tmp_path / "out", store=store, base_name=str(base), to=to)


@pytest.mark.parametrize(
    "out", [os.fsdecode(b"o\xffut"), "~nobody-of-this-name/q", "nul\0byte"], ids=["bytes", "home", "nul"]
)
def test_a_place_that_cannot_be(tmp_path, store, ref, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError):
        merge(ref, out, store=store)
    assert left(tmp_path) == []


def test_any_place_in_the_store_but_its_folder_for_them_is_refused(tmp_path, store, ref):
    for place in ("x", "merged", "adapters/merged/x"):
        with pytest.raises(StoreError, match="is inside"):
            merge(ref, store.path / place, store=store)
        assert not (store.path / place).exists()
    merge(ref, store.path / "merged" / "mine-1", store=store)
    assert (store.path / "merged" / "mine-1" / "merge_report.json").is_file()


def test_a_chat_template_that_is_no_text(tmp_path, store, base):
    (base / "chat_template.jinja").unlink()
    told = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": 5}))
    peft_folder(tmp_path / "peft", base, "llama")
    ref = stored(store, "mine", tmp_path / "peft", load_base(str(base), device="cpu"), None, tmp_path / "data")
    with pytest.raises(Unsupported, match="chat_template is no text"):
        merge(ref, tmp_path / "out", store=store, to="gguf-f16")


@pytest.mark.parametrize(
    "options",
    [
        {"thresholds": Thresholds(max_kl=float("nan"))},
        {"thresholds": Thresholds(max_lost=-1.0)},
        {"thresholds": Thresholds(max_kl=None)},  # type: ignore[arg-type]
        {"thresholds": Thresholds(max_kl="small")},  # type: ignore[arg-type]
        {"thresholds": Thresholds(min_top1=2.0)},
        {"thresholds": Thresholds(max_layer_error=float("nan"))},
        {"thresholds": {"max_kl": 1}},
        {"residual": 1.5, "to": "nf4"},
        {"residual": True, "to": "nf4"},
        {"metric_rows": 1.5},
        {"metric_rows": None},
        {"residual": -1, "to": "nf4"},
    ],
    ids=str,
)
def test_a_request_is_checked_before_any_work(tmp_path, store, ref, monkeypatch, options):
    monkeypatch.setattr(merging, "known_base", failing(AssertionError("work was begun")))
    with pytest.raises(Unsupported) as found:
        merge(ref, tmp_path / "out", store=store, **options)
    assert found.value.hint


@pytest.mark.parametrize("options", [{"rank": 1.5}, {"rank": True}, {"rank": "4"}, {"error": "0.1"}, {"error": True}])
def test_a_conversion_is_checked_before_any_work(store, options):
    with pytest.raises(Unsupported, match="number"):
        convert("nothing@1", store=store, **options)
