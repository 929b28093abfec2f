"""`verify --deep`: every version on its own base, measured anew whatever was remembered."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.formats.card import Card
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import deep_verify
from adapterhub_lite.workflows.deep_verify import verify_deep
from adapterhub_lite.workflows.train import train
from tests import tiny
from tests.runtime import build
from tests.runtime.certified import certified, effect_of, made, scaled
from tests.training import recipes


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch):
    """The bases that were loaded, in order."""
    seen = []
    load = deep_verify.load_own_base

    def counted(card, **named):
        seen.append((card.base["name"], card.base["quantization"]))
        return load(card, **named)

    monkeypatch.setattr(deep_verify, "load_own_base", counted)
    return seen


def test_sound_versions_are_measured_each_base_once(tiny_base, loaded):
    store = Store()
    bases = [tiny_base("llama", seed=3), tiny_base("bert"), tiny_base("llama", "nf4", seed=3), tiny_base("t5")]
    refs = []
    for base in bases * 2:
        refs.append(certified(base, base.kind, made(base, "prefix" if base.kind == "seq2seq" else "lora", len(refs))))
    seen = []
    assert verify_deep(refs, store=store, device="cpu", on_event=seen.append) == ([], [])
    assert sorted(loaded) == sorted((base.name, base.quantization) for base in bases)
    assert (seen[-1].done, seen[-1].total) == (8, 8)


def test_a_version_with_another_effect_is_found_although_it_was_remembered(tiny_base, cache):
    base = tiny_base("llama", seed=3)
    adapter = build.lora(base, 1)
    good = certified(base, "mine", adapter)
    bad = certified(base, "mine", scaled(adapter, 2.0), effect_of(base, adapter))
    Runtime(base, Store()).load(good)
    memo = json.loads((cache / "certificates.json").read_text())
    (key,) = memo
    memo[key.replace(good.digest, bad.digest)] = memo[key]
    (cache / "certificates.json").write_text(json.dumps(memo))
    runtime = Runtime(base, Store())
    runtime.load(bad)
    runtime.close()
    wrong, unchecked = verify_deep(["mine@1", "mine@2"], store=Store(), device="cpu")
    assert [one.where for one in wrong] == ["mine@2"]
    assert "mean change of a logit" in wrong[0].problem
    assert unchecked == []


def test_an_idle_adapter_and_a_damaged_file_are_findings(tiny_base):
    base = tiny_base("bert")
    adapter = build.lora(base, 1)
    for name, tensor in adapter.tensors.items():
        if "classifier.weight" in name:
            tensor.zero_()
    store = Store()
    build.stored(store, base, "idle", adapter)
    ref = build.stored(store, base, "broken", build.lora(base, 2))
    path = store.folder(ref) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    wrong, unchecked = verify_deep(["idle", "broken", "missing"], store=store, device="cpu")
    assert [one.where for one in wrong] == ["missing", "idle@1", "broken@1"]
    for part, one in zip(("no adapter", "moves no logit", "broken@1"), wrong, strict=True):
        assert part in one.problem
    assert unchecked == []


def test_versions_whose_base_is_not_here_are_named_with_the_reason(tiny_base, tmp_path):
    store = Store()
    base = load_base(str(tiny.save("llama", tmp_path / "base", seed=5)), device="cpu")
    changed = certified(base, "changed", build.lora(base, 1))
    gone = load_base(str(tiny.save("llama", tmp_path / "gone", seed=6)), device="cpu")
    certified(gone, "gone", build.lora(gone, 1))
    certified(gone, "gone", build.lora(gone, 2))
    store.put("nameless", dict(build.lora(base, 3).files()), Card())
    store.export(changed, tmp_path / "export")
    store.import_(tmp_path / "export", "foreign")
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    tiny.save("llama", tmp_path / "base", seed=7)
    wrong, unchecked = verify_deep(["changed", "gone@1", "gone@2", "nameless", "foreign"], store=store, device="cpu")
    assert wrong == []
    told = {one.where: one.problem for one in unchecked}
    assert set(told) == {"changed@1", "gone@1", "gone@2", "nameless@1", "foreign@1"}
    assert all(problem.startswith("not checked: ") for problem in told.values())
    assert "weights differ" in told["changed@1"]
    assert "There is no base" in told["gone@1"]
    assert "does not say which base" in told["nameless@1"]
    assert "--base" in told["foreign@1"]


def test_what_is_trained_here_has_a_certificate_that_holds(tiny_base, tmp_path):
    base = tiny_base("llama", seed=3)
    store = Store()
    path = recipes.write(tmp_path, base, {"type": "lora", "rank": 2, "alpha": 4})
    ref = train(path, store=store, base=base)
    effect = store.card(ref).effect
    assert set(effect) >= {"loss", "base_loss", "max_logit_change", "mean_logit_change", "probe_set"}
    assert verify_deep([ref], store=store, device="cpu") == ([], [])
    lies = store.card(ref)
    files = {name: store.folder(ref) / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    store.put("lies", files, replace(lies, effect={**effect, "loss": effect["loss"] + 0.1}))
    wrong, _ = verify_deep(["lies"], store=store, device="cpu")
    assert "loss with the adapter" in wrong[0].problem
