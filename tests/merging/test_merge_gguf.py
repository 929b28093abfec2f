"""`merge` into GGUF files: read back as what they are, refused before anything is measured, staged as other merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import StoreError, Unsupported
from adapterhub_lite.events import Note
from adapterhub_lite.merging.gguf_names import Layout
from adapterhub_lite.merging.journal import claimed
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem
from adapterhub_lite.workflows import merge as merging
from adapterhub_lite.workflows.merge import merge
from tests.merging import gguf_models as tiny
from tests.merging.build import peft_folder, stored
from tests.merging.test_gguf import LLAMA3, VARIANTS


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def made(tmp_path: Path, store: Store, family: str, **changes):
    """A base in memory and a version for it."""
    folder = tiny.save(family, tmp_path / "base", **changes)
    base = load_base(str(folder), device="cpu")
    kin = "gpt2" if family == "gpt2" else "llama"
    peft_folder(tmp_path / "peft", folder, kin, target_modules="all-linear")
    return base, stored(store, "mine", tmp_path / "peft", base, None, tmp_path / "data")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *VARIANTS,
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("mistral", {}),
        ("mistral", {"head_dim": 32, "rope_parameters": LLAMA3}),
    ],
)
def test_the_file_is_measured_as_the_model_that_it_is(tmp_path, store, family, changes):
    base, ref = made(tmp_path, store, family, **changes)
    report = merge(ref, tmp_path / "out", store=store, base=base, to="gguf-f16")
    assert report.passed
    assert report.forward == "loaded"
    assert report.difference is not None
    assert report.difference.mean_kl < 1e-5


def test_a_mistral_in_a_folder_of_that_name(tmp_path, store):
    base, ref = made(tmp_path, store, "mistral")
    assert merge(ref, tmp_path / "mistral", store=store, base=base, to="gguf-f16").passed


def unreachable(*_, **__):
    raise AssertionError("this is too late")


def test_a_model_without_a_place_is_refused_before_anything_is_measured(tmp_path, store, monkeypatch):
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    base, ref = made(tmp_path, store, "llama", rope_parameters=scaled)
    monkeypatch.setattr(merging, "probe_of", unreachable)
    monkeypatch.setattr(merging, "load_own_base", unreachable)
    with pytest.raises(Unsupported, match="positions are scaled by dynamic"):
        merge(ref, tmp_path / "out", store=store, base=base, to="gguf-f16")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_name_is_refused_before_anything_is_measured(tmp_path, store, monkeypatch):
    folder = tiny.save("llama", tmp_path / "base")
    told = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**told, "normalizer": {"type": "Lowercase"}}), "utf-8")
    base = load_base(str(folder), device="cpu")
    peft_folder(tmp_path / "peft", folder, "llama")
    ref = stored(store, "mine", tmp_path / "peft", base, None, tmp_path / "data")
    monkeypatch.setattr(merging, "probe_of", unreachable)
    with pytest.raises(Unsupported, match="okeni"):
        merge(ref, tmp_path / "out", store=store, base=base, to="gguf-f16")


def test_a_mistral_is_read_as_the_llama_that_the_file_says(tmp_path, store):
    folder = tiny.save("mistral", tmp_path / "base", head_dim=32)
    layout = Layout.of(json.loads((folder / "config.json").read_text("utf-8")))
    assert (layout.read_config.model_type, layout.read_config.head_dim) == ("llama", 32)
    assert layout.read_config.num_key_value_heads == 2


# -- staged as other merges are ---------------------------------------------------------------------------------------


def test_another_merge_at_work_is_waited_for(tmp_path, store):
    base, ref = made(tmp_path, store, "llama")
    out = tmp_path / "out"
    with claimed(FileSystem(), out, "another identity"), pytest.raises(StoreError, match="merg"):
        merge(ref, out, store=store, base=base, to="gguf-f16", verify="weights")
    assert not out.exists()
    merge(ref, out, store=store, base=base, to="gguf-f16", verify="weights")
    assert (out / "model.gguf").is_file()
    assert not list(tmp_path.glob(".out.merging-*"))


def test_what_a_dead_merge_left_is_told_and_removed(tmp_path, store):
    base, ref = made(tmp_path, store, "llama")
    out, told = tmp_path / "out", []
    with claimed(FileSystem(), out, "another identity") as work:
        left = work.folder
    merge(ref, out, store=store, base=base, to="gguf-f16", verify="weights", on_event=told.append)
    texts = [one.text for one in told if isinstance(one, Note)]
    assert any("did not end" in text for text in texts)
    assert any("is removed" in text for text in texts)
    assert not left.exists()


def test_a_failed_write_leaves_nothing(tmp_path, store, monkeypatch):
    base, ref = made(tmp_path, store, "llama")
    monkeypatch.setattr("adapterhub_lite.workflows.merge_write.write_gguf", unreachable)
    with pytest.raises(AssertionError, match="too late"):
        merge(ref, tmp_path / "out", store=store, base=base, to="gguf-f16", verify="weights")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.merging-*"))
