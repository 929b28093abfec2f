"""Exports of stored versions: whole or absent, proven, and what is written beside the reader's files."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterhub_lite as ahl
from adapterhub_lite.bases.quantization import quantized_round_trip
from adapterhub_lite.errors import AdapterMismatch, BaseUnavailable, NotFound, StoreError, StoreFull, Unsupported
from adapterhub_lite.exporting import write
from adapterhub_lite.exporting.readers import READERS
from adapterhub_lite.exporting.traits import Asked
from adapterhub_lite.merging.weights import Weights
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import export as workflow
from adapterhub_lite.workflows.receive import receive
from tests import tiny
from tests.exporting import build, emulate
from tests.store.faulty import Crash, Failing, Unsynced

FILES = {
    "peft": {"adapter_config.json", "adapter_model.safetensors"},
    "llama.cpp": {"adapter.gguf"},
    "ollama": {"adapter.gguf", "Modelfile"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def stored(base: Path, tmp_path: Path) -> Callable[..., tuple[Store, build.Made]]:
    """(kind, **changes) -> a store whose `mine@1` is such an adapter, and what PEFT made."""

    def made(kind: str, **changes: Any) -> tuple[Store, build.Made]:
        adapter = build.make(base, "llama", kind, tmp_path / f"in-{kind}", **changes)
        store = Store(tmp_path / f"store-{kind}")
        receive(adapter.folder, "mine", store=store, base=str(base))
        return store, adapter

    return made


@pytest.mark.parametrize("reader", READERS)
def test_a_version_with_patterns_for_every_reader(stored, tmp_path, reader):
    store, made = stored("patterns")
    report = ahl.export("mine", tmp_path / "out", reader=reader, store=store, base_name="org/base")
    kinds = FILES.get(reader, FILES["peft"])
    assert {file.name for file in (tmp_path / "out").iterdir()} == kinds | {"export_report.json"}
    assert set(report.files) == kinds
    assert report.error is not None
    assert report.error < 1e-6
    assert len(report.layers) == 14
    assert report.path == str(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert told == report.to_dict()
    assert (told["ref"], told["reader"]) == ("mine@1", reader)
    assert told["digest"] == store.resolve("mine").digest
    if "adapter_config.json" in kinds:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/base"
        assert build.near(build.by_peft(made, tmp_path / "out"), made.logits) < 1e-5
    else:
        deltas = emulate.llama_cpp(tmp_path / "out" / "adapter.gguf", made.config)
        assert build.near(build.with_deltas(made, deltas), made.logits) < 1e-5


def test_ollamas_modelfile(stored, tmp_path):
    store, _ = stored("lora")
    ahl.export("mine", tmp_path / "out", reader="ollama", store=store, base_name="llama3.2:1b")
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM llama3.2:1b\nADAPTER ./adapter.gguf\n"
    for name in ("two\nlines", "  ", "bell\a"):
        with pytest.raises(Unsupported, match="one line"):
            ahl.export("mine", tmp_path / "more", reader="ollama", store=store, base_name=name)


def test_dora_says_its_error_and_keeps_to_it(stored, tmp_path):
    store, made = stored("dora")
    report = ahl.export("mine", tmp_path / "out", reader="vllm", store=store)
    said = next(one.error for one in report.findings if one.rule == "dora")
    assert report.rank == 16
    assert report.error == pytest.approx(said, rel=1e-3)
    assert 0.01 < said < 1
    assert build.near(build.by_peft(made, tmp_path / "out"), made.logits) < build.near(made.bare, made.logits)
    assert {layer.rank for layer in report.layers} == {16}


def test_dora_for_peft_is_left_alone(stored, tmp_path):
    store, made = stored("dora")
    report = ahl.export("mine", tmp_path / "out", reader="peft", store=store)
    assert build.near(build.by_peft(made, tmp_path / "out"), made.logits) < 1e-6
    assert (report.rank, report.error, report.layers) == (None, None, ())


def test_what_is_written_for_a_reader_can_be_imported_again(stored, tmp_path):
    store, _ = stored("rslora")
    ahl.export("mine", tmp_path / "out", reader="sglang", store=store)
    ref = store.import_(tmp_path / "out", "again")
    assert store.card(ref).adapter["type"] == "lora"


def test_a_refusal_writes_nothing_and_says_why(stored, tmp_path):
    store, _ = stored("bias")
    with pytest.raises(Unsupported, match=r"mine@1.* is not written for vllm: biases at .*lora_bias, or bake it"):
        ahl.export("mine", tmp_path / "out", reader="vllm", store=store)
    assert not (tmp_path / "out").exists()
    pending = workflow.look("mine", reader="vllm", store=store)
    assert [one.rule for one in pending.report.refused] == ["lora_bias"]
    assert "cannot be written for vllm" in pending.report.lines()[0]


def test_an_untrusted_base_is_not_looked_for(stored, tmp_path, base):
    _, made = stored("dora")
    store = Store(tmp_path / "other")
    store.import_(made.folder, "mine")  # nobody named its base here
    found = workflow.look("mine", reader="vllm", store=store)
    assert [one.rule for one in found.report.refused] == ["dora"]
    given = workflow.look("mine", reader="vllm", store=store, base=str(base))
    assert not given.report.refused


def test_a_repository_is_the_name_that_is_written(stored):
    store, _ = stored("lora")
    card = store.card("mine")
    assert workflow._public_name(replace(card, base={**card.base, "repo": "org/base"})) == "org/base"
    smol = {"name": "smollm2-135m-instruct"}
    assert workflow._public_name(replace(card, base=smol)) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert workflow._public_name(card) is None


@pytest.mark.parametrize("reader", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")])
def test_whole_or_absent_at_every_operation(stored, tmp_path, reader, error):
    store, _ = stored("patterns")
    pending = workflow.look("mine", reader=reader, store=store)
    counting = Failing(10**9, Crash())
    pending.write(tmp_path / "whole", fs=counting)
    assert counting.count > 8
    for at in range(1, counting.count + 1):
        target = tmp_path / f"out{at}"
        with contextlib.suppress(Crash, StoreError):
            pending.write(target, fs=Failing(at, error, torn=True))
        if target.exists():  # only the sync of its parent came after
            assert {f.name for f in target.iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}
            assert at >= counting.count - 1
            shutil.rmtree(target)
        if not isinstance(error, Crash):
            assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], f"left behind after operation {at}"


def test_a_full_disk_is_called_one(stored, tmp_path):
    store, _ = stored("lora")
    pending = workflow.look("mine", reader="vllm", store=store)
    with pytest.raises(StoreFull):
        pending.write(tmp_path / "out", fs=Failing(3, OSError(errno.ENOSPC, "full"), lasting=True))
    assert not (tmp_path / "out").exists()


def test_a_file_that_reads_back_otherwise_is_not_published(stored, tmp_path, monkeypatch):
    store, _ = stored("patterns")
    pending = workflow.look("mine", reader="vllm", store=store)

    def spoilt(fs: Any, folder: Path, adapter: Any) -> Any:
        found = dict(write.write_peft(fs, folder, adapter))
        name = next(iter(found))
        return {**found, name: replace(found[name], scale=1.01)}

    monkeypatch.setattr(workflow, "write_peft", spoilt)
    with pytest.raises(AdapterMismatch, match="differs from mine@1"):
        pending.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bytes_that_changed_on_the_way_are_seen(stored, tmp_path):
    store, _ = stored("lora")
    pending = workflow.look("mine", reader="vllm", store=store)

    class Flipping(Unsynced):
        """Changes one value of the tensors on the way to the disk."""

        def write(self, fd: int, data: memoryview) -> int:
            spoilt = bytearray(data)
            if len(spoilt) > 4000:
                spoilt[-2] ^= 1
            return super().write(fd, memoryview(spoilt))

    with pytest.raises(AdapterMismatch, match="does not read back"):
        pending.write(tmp_path / "out", fs=Flipping())
    assert not (tmp_path / "out").exists()


def test_where_it_may_not_be_written(stored, tmp_path):
    store, _ = stored("lora")
    pending = workflow.look("mine", reader="vllm", store=store)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for target, why in [
        (tmp_path / "full", "not an empty folder"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "none" / "out", "no folder"),
        (tmp_path / "out.tar", "one file"),
        (tmp_path / "out.gguf", "one file"),
        (store.path / "out", "inside the store"),
    ]:
        with pytest.raises(StoreError, match=why):
            pending.write(target)
    (tmp_path / "empty").mkdir()
    assert pending.write(tmp_path / "empty").path == str(tmp_path / "empty")


def test_an_adapter_of_bfloat16_stays_one_where_nothing_is_lost(stored, tmp_path, base):
    _, made = stored("patterns", rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 8})
    weights = made.folder / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(weights).items()}, weights)
    store = Store(tmp_path / "halves")
    receive(made.folder, "mine", store=store, base=str(base))
    report = ahl.export("mine", tmp_path / "out", reader="vllm", store=store)
    assert report.error is not None
    assert report.error < 1e-15
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {str(t.dtype) for t in written.values()} == {"torch.bfloat16"}
    assert {t.shape[0] for k, t in written.items() if "lora_A" in k} == {4}


def test_asked_says_whether_ranks_may_be_cut():
    assert [Asked().cuts, Asked(rank=3).cuts, Asked(error=0.1).cuts] == [False, True, True]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_weights_are_those_that_the_adapter_was_trained_on(tiny_folder, quantization):
    folder = tiny_folder("llama", hidden_size=64, intermediate_size=128)
    config = json.loads((folder / "config.json").read_text())
    weights = Weights(folder, config, "CAUSAL_LM", quantization)
    plain = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    found = weights.weight("model.layers.0.mlp.up_proj")
    assert torch.equal(found, quantized_round_trip(plain, quantization))
    assert torch.equal(found, plain) is (quantization == "none")
    bare = Weights(folder, config, "FEATURE_EXTRACTION", quantization)
    assert torch.equal(bare.weight("layers.0.mlp.up_proj"), found)
    assert weights.bias("model.layers.0.mlp.up_proj") is None
    with pytest.raises(AdapterMismatch, match="no layer"):
        weights.weight("model.layers.7.mlp.up_proj")


def test_the_quantisation_of_the_card_counts(stored, base, monkeypatch):
    store, _ = stored("dora")
    asked = []

    class Seen(Weights):
        def __init__(self, *arguments: Any) -> None:
            asked.append(arguments[3])
            super().__init__(*arguments)

    monkeypatch.setattr(workflow, "Weights", Seen)
    card = store.card("mine")
    monkeypatch.setattr(Store, "card", lambda *_: replace(card, base={**card.base, "quantization": "nf4"}))
    workflow.look("mine", reader="vllm", store=store, base=str(base))
    assert asked == ["nf4"]


def test_of_the_base_a_configuration_is_enough(stored, tmp_path, base):
    store, made = stored("patterns")
    (tmp_path / "config").mkdir()
    shutil.copy(base / "config.json", tmp_path / "config")
    other = Store(tmp_path / "other")
    other.import_(made.folder, "mine")
    with pytest.raises(Unsupported, match="configuration is not at hand"):
        ahl.export("mine", tmp_path / "out", reader="llama.cpp", store=other)
    report = ahl.export("mine", tmp_path / "out", reader="llama.cpp", store=other, base=str(tmp_path / "config"))
    assert report.error is not None
    deltas = emulate.llama_cpp(tmp_path / "out" / "adapter.gguf", made.config)
    assert build.near(build.with_deltas(made, deltas), made.logits) < 1e-5
    dora, _ = stored("dora")
    with pytest.raises(BaseUnavailable):
        ahl.export("mine", tmp_path / "more", reader="vllm", store=dora, base=str(tmp_path / "config"))
    assert ahl.export("mine", tmp_path / "more", reader="peft", store=dora, base=str(tmp_path / "config")).path
    with pytest.raises(NotFound):
        ahl.export("mine", tmp_path / "none", reader="vllm", store=store, base="no-such-base")


def test_weights_of_conv1d_layers_are_quantised_and_output_layers_are_not(tiny_folder):
    from adapterhub_lite.bases.load import load_base
    from adapterhub_lite.bases.quantization import dense_weight

    folder = tiny_folder("gpt2")
    base = load_base(str(folder), "int8", device="cpu")
    weights = Weights(folder, json.loads((folder / "config.json").read_text()), "CAUSAL_LM", "int8")
    layer = base.view().modules["transformer.h.0.mlp.c_fc"]
    found = weights.weight("transformer.h.0.mlp.c_fc")
    held = dense_weight(layer, found.dtype)
    assert torch.equal(found, held if held.shape == found.shape else held.T)
    plain = load_file(folder / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"].T
    assert not torch.equal(found, plain)


def test_weights_of_another_base_are_refused(stored, base, tmp_path):
    from safetensors.torch import save_file

    from adapterhub_lite.bases.fingerprint import weights_digest
    from adapterhub_lite.errors import BaseMismatch

    store, made = stored("dora")
    mark = {"fingerprint": {"weights": weights_digest(base)}}
    store.import_(made.folder, "marked", mark)
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    save_file({k: v * 1.5 for k, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    assert workflow.look("marked", reader="vllm", store=store, base=str(base)).prepared.adapter is not None
    with pytest.raises(BaseMismatch, match="holds other weights"):
        workflow.look("marked", reader="vllm", store=store, base=str(other))
