"""Birth certificates: figures counted by hand, and loads of adapters whose effect is not what their card says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import BaseMismatch, EffectChanged, NoEffect, Unsupported
from adapterhub_lite.events import Note
from adapterhub_lite.formats.card import Card
from adapterhub_lite.runtime import memo
from adapterhub_lite.runtime.admit import _is_exact
from adapterhub_lite.runtime.certificate import PROBES, compare, measure, measure_fitted
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.certified import Forwards, certified, effect_of, made, scaled

ROW = [[5, 6, 7, 8]]
KINDS = [
    ("llama", "lora"), ("llama", "dora"), ("llama", "prefix"), ("llama", "head"), ("gpt2", "lora"), ("gpt2", "dora"),
    ("t5", "lora"), ("t5", "prefix"), ("bert", "lora"), ("bert", "prefix"), ("roberta", "lora"), ("roberta", "prefix"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A machine on which nothing was measured yet."""
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tiny_base):
    return tiny_base("llama", seed=3)


@pytest.fixture
def runtime(base):
    made = Runtime(base, Store(), slots=2)
    yield made
    made.close()
    assert not any(m._forward_hooks for m in base.model.modules()), "a hook was left"


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_figures_are_those_of_one_text_at_a_time(tiny_base, family: str, kind: str):
    base = tiny_base(family)
    runtime = Runtime(base, Store())
    ref = runtime.attach(made(base, kind))
    found = measure(runtime, ref)
    changes, losses, bare_losses, labels = [], [], [], []
    for text in PROBES:
        ids = base.tokenizer(text, truncation=True, max_length=64)["input_ids"]
        if base.kind == "encoder" or kind == "head":
            labels.append(runtime.logits([ids], ref)[0])
            continue
        given = [ids[:8]] if base.kind == "seq2seq" else None
        own, bare = (runtime.logits([ids], r, given)[0] for r in (ref, None))
        wanted = torch.tensor(ids[:8] if given else ids[1:])
        changes.append((own - bare).abs().flatten())
        losses.append(F.cross_entropy(own[:-1], wanted, reduction="none"))
        bare_losses.append(F.cross_entropy(bare[:-1], wanted, reduction="none"))
    runtime.close()
    if labels:
        rows = torch.stack(labels)
        changes = [(rows - rows.mean(0)).abs().flatten()]
        losses = [-rows.softmax(-1).max(-1).values.log()]
        assert "base_loss" not in found
    else:
        assert found["base_loss"] == pytest.approx(float(torch.cat(bare_losses).mean()), rel=1e-4)
    assert found["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert found["max_logit_change"] == pytest.approx(float(torch.cat(changes).max()), rel=1e-4)
    assert found["mean_logit_change"] == pytest.approx(float(torch.cat(changes).mean()), rel=1e-4)
    assert (found["probe_set"], found["probes"]) == (1, 4)
    assert Card(effect=found).effect == json.loads(json.dumps(found))


def test_the_change_of_a_layer_is_that_of_its_matrices(base):
    adapter = build.lora(base, 1)
    found = effect_of(base, adapter)["layer_change"]
    each = []
    for name, down in adapter.tensors.items():
        if "lora_A" in name:
            signs = torch.tensor([-1.0 if i % 3 == 0 else 1.0 for i in range(down.shape[1])])
            each.append((2 * adapter.tensors[name.replace("lora_A", "lora_B")] @ down @ signs).abs().mean())
    assert found == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    assert effect_of(base, scaled(adapter, 2.0))["layer_change"] == pytest.approx(2 * found, rel=1e-5)


def test_probes_are_cut_to_the_positions_that_a_prefix_leaves(tiny_base):
    base = tiny_base("llama", max_position_embeddings=20)
    assert effect_of(base, build.prefix(base, 1, tokens=15))["max_logit_change"] > 0


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_an_adapter_with_its_effect_loads_and_one_with_another_does_not(tiny_base, family: str, kind: str):
    base = tiny_base(family)
    adapter = made(base, kind)
    store = Store()
    good = certified(base, "good", adapter, store=store)
    runtime = Runtime(base, store)
    runtime.load(good)
    for factor in (2.0, 0.5):
        bad = certified(base, "bad", scaled(adapter, factor), effect_of(base, adapter), store)
        with pytest.raises(EffectChanged, match=f"bad@{bad.version} does not do .*, recorded "):
            runtime.load(bad)
    assert runtime.resident() == ["good@1"]
    runtime.close()


def test_the_error_shows_both_figures(base, runtime):
    effect = {**effect_of(base, build.lora(base, 1)), "loss": 1.25}
    with pytest.raises(EffectChanged) as failed:
        runtime.load(certified(base, "bad", build.lora(base, 1), effect))
    true = f"{effect_of(base, build.lora(base, 1))['loss']:.4g}"
    assert f"loss with the adapter {true}, recorded 1.25" in failed.value.message
    assert "verify --deep bad@1" in failed.value.hint


def test_a_failed_load_leaves_everything_as_it_was(base, runtime):
    good = [certified(base, name, build.lora(base, seed)) for seed, name in enumerate(("a", "b"), 1)]
    before = [runtime.logits(ROW, ref)[0] for ref in good]
    mixed = runtime.logits(ROW * 3, [*good, None])
    runtime.use(good[0])
    hooks = sum(len(m._forward_hooks) for m in base.model.modules())
    bad = certified(base, "bad", scaled(build.prefix(base, 3), 2.0), effect_of(base, build.prefix(base, 3)))
    for _ in range(2):
        with pytest.raises(EffectChanged):
            runtime.load(bad)
        with pytest.raises(EffectChanged):
            runtime.use(bad)
        with pytest.raises(EffectChanged):
            runtime.generate_ids(ROW * 2, [good[1], bad], 3)
    assert runtime.resident() == ["a@1", "b@1"], "a slot was taken"
    assert runtime.default == "a@1"
    assert not runtime._engine.slots._leases
    assert sum(len(m._forward_hooks) for m in base.model.modules()) == hooks
    assert all(torch.equal(runtime.logits(ROW, ref)[0], old) for ref, old in zip(good, before, strict=True))
    again = runtime.logits(ROW * 3, [*good, None])
    assert all(torch.equal(one, other) for one, other in zip(again, mixed, strict=True))


def test_another_base_under_the_same_fingerprint_is_noticed(tiny_folder, base):
    other = load_base(str(tiny_folder("llama", seed=4)), device="cpu")
    other.fingerprint = base.fingerprint
    ref = certified(base, "mine", build.lora(base, 1))
    with pytest.raises(EffectChanged, match="loss of the bare base"):
        Runtime(other, Store()).load(ref)
    runtime = Runtime(base, Store())
    runtime.load(ref)
    runtime.close()


def test_an_adapter_whose_effect_is_lost_in_rounding_is_not_served(base):
    base = load_base(base.name, device="cpu", dtype="bfloat16")
    runtime = Runtime(base, Store())
    adapter = build.lora(base, 1)
    for name, tensor in adapter.tensors.items():
        tensor.mul_(1e-8 if "lora_B" in name else 1.0)
    ref = build.stored(runtime.store, base, "idle", adapter)
    with pytest.raises(NoEffect, match="idle@1 moves no logit"):
        runtime.load(ref)
    assert runtime.resident() == []


def test_a_head_that_says_the_same_to_everything_is_not_served(tiny_base):
    base = tiny_base("bert")
    adapter = build.lora(base, 1)
    for name, tensor in adapter.tensors.items():
        if "classifier.weight" in name:
            tensor.zero_()
    store = Store()
    with pytest.raises(NoEffect):
        Runtime(base, store).load(build.stored(store, base, "idle", adapter))


def test_an_adapter_that_makes_nan_of_the_logits_is_not_served(base, runtime):
    """Each tensor is finite; what they do to the logits is not."""
    adapter = build.lora(base, 1)
    for name, tensor in adapter.tensors.items():
        tensor.fill_(1e30 if "lora_B" in name else 1e12)
    with pytest.raises(NoEffect, match="not finite"):
        runtime.load(build.stored(runtime.store, base, "wild", adapter))
    assert runtime.resident() == []


def test_an_encoders_adapter_without_head_is_measured_by_hidden_states(tiny_base):
    base = tiny_base("bert")
    plain = build.lora(base, 1)
    tensors = {k.replace("model.bert.", "model."): v for k, v in plain.tensors.items() if "lora" in k}
    targets = tuple(t.removeprefix("bert.") for t in plain.spec.target_modules)
    spec = replace(plain.spec, task_type="FEATURE_EXTRACTION", modules_to_save=(), target_modules=targets)
    adapter = Adapter(spec, tensors, name="hidden")
    store = Store()
    runtime = Runtime(base, store)
    runtime.load(certified(base, "hidden", adapter, store=store))
    with pytest.raises(EffectChanged):
        runtime.load(certified(base, "hidden", scaled(adapter, 2.0), effect_of(base, adapter), store))
    runtime.close()


# -- in the middle of other work ---------------------------------------------------------------------------------------


def test_adapters_of_a_mixed_batch_are_measured_before_it_runs(base, runtime):
    a, b = (certified(base, name, build.lora(base, seed)) for seed, name in enumerate(("a", "b"), 1))
    expected = []
    for ref in (a, b, None):
        alone = Runtime(base, Store())
        expected += alone.generate_ids(ROW, ref, 5)
        alone.close()
    memo.cache_root().joinpath("certificates.json").unlink()
    assert runtime.generate_ids(ROW * 3, [a, b, None], 5) == expected
    assert len(json.loads((memo.cache_root() / "certificates.json").read_text())) == 2


def test_a_first_load_in_the_middle_of_a_stream_does_not_touch_it(base, runtime):
    a, b = (certified(base, name, build.lora(base, seed)) for seed, name in enumerate(("a", "b"), 1))
    whole = runtime.generate("abc", a, max_new_tokens=8)[0]
    stream = runtime.stream("abc", a, raw=True, max_new_tokens=8)
    text = next(stream)
    runtime.load(b)
    assert text + "".join(stream) == whole


def test_nothing_is_measured_while_an_adapter_is_trained(base, runtime):
    ref = certified(base, "mine", build.lora(base, 1))
    with base.training(), pytest.raises(Unsupported, match="being trained"):
        runtime.load(ref)
    runtime.load(ref)


# -- three answers -----------------------------------------------------------------------------------------------------


def _notes(base, ref, times: int = 3) -> list[str]:
    """What is said while `ref` is loaded, evicted and loaded again, under each of its names."""
    said: list[str] = []
    runtime = Runtime(base, Store(), slots=1, on_event=lambda e: said.append(e.text) if isinstance(e, Note) else None)
    other = runtime.attach(build.lora(base, 9))
    for name in (ref, f"{ref.name}@{ref.version}", f"{ref.name}:prod") * times:
        runtime.load(name)
        runtime.unload(name)
    runtime.close()
    assert other.version is None
    return said


def test_on_the_very_base_nothing_is_said(base):
    ref = certified(base, "mine", build.lora(base, 1))
    Store().alias("mine", "prod", 1)
    assert _notes(base, ref) == []


@pytest.mark.parametrize(("quantize", "dtype"), [("nf4", "float32"), ("int8", "float32"), ("none", "bfloat16")])
def test_the_same_weights_in_another_precision_work_and_it_is_said_once(tiny_folder, quantize: str, dtype: str):
    folder = str(tiny_folder("llama", hidden_size=64, intermediate_size=128))
    base = load_base(folder, device="cpu")
    adapter = build.lora(base, 1)
    ref = certified(base, "mine", adapter)
    Store().alias("mine", "prod", 1)
    here = load_base(folder, quantize, "cpu", dtype)
    now = dtype if quantize == "none" else f"{quantize} ({dtype})"
    assert _notes(here, ref) == [
        f"mine@1 was trained on {base.name} in float32; this base has the same weights in {now}."
    ]
    for factor in (2.0, 0.5):
        with pytest.raises(EffectChanged, match="change of a layer"):
            Runtime(here, Store()).load(certified(base, "bad", scaled(adapter, factor), effect_of(base, adapter)))


@pytest.mark.parametrize(
    ("quantize", "dtype", "changed", "exact"),
    [
        ("none", "float32", {}, True),
        ("nf4", "float32", {}, True),
        ("int8", "float32", {}, False),  # its products depend on the device
        ("none", "bfloat16", {}, False),
        ("none", "bfloat16", {"dtype": "float32"}, False),
        ("none", "float32", {"dtype": "bfloat16"}, False),
        ("none", "float32", {"dtype": None}, False),
        ("none", "float32", {"fingerprint": {}}, False),
        ("nf4", "float32", {"chat_template": "0" * 64}, True),
        ("nf4", "float32", {"quantization": "none"}, False),
        ("nf4", "float32", {"quantization": ""}, False),
    ],
)
def test_figures_must_be_exact_on_the_same_weights_in_float32(tiny_folder, quantize: str, dtype: str, changed, exact):
    folder = str(tiny_folder("llama", hidden_size=64, intermediate_size=128))
    base = load_base(folder, quantize, "cpu", dtype)
    mark = {k: v for k, v in changed.items() if k not in ("dtype", "fingerprint")}
    told = {"dtype": dtype, "fingerprint": {**base.fingerprint.to_dict(), **mark}}
    assert _is_exact({**told, **{k: v for k, v in changed.items() if k not in mark}}, base) is exact


def test_another_base_is_refused_with_both_fingerprints(tiny_base, base):
    other = tiny_base("llama", seed=8)
    ref = certified(other, "mine", build.lora(other, 1))
    with pytest.raises(BaseMismatch, match="weights differ") as failed:
        Runtime(base, Store()).load(ref)
    assert base.fingerprint.digest[:12] in failed.value.message
    assert other.fingerprint.digest[:12] in failed.value.message


# -- foreign adapters --------------------------------------------------------------------------------------------------


def test_a_foreign_certificate_is_put_to_the_test(base, tmp_path):
    mine, theirs = Store(tmp_path / "mine"), Store(tmp_path / "theirs")
    adapter = build.lora(base, 1)
    true = certified(base, "true", adapter, store=theirs)
    false = certified(base, "false", scaled(adapter, 2.0), effect_of(base, adapter), theirs)
    for ref in (true, false):
        theirs.export(ref, tmp_path / ref.name)
        mine.import_(tmp_path / ref.name, ref.name)
    runtime = Runtime(base, mine)
    assert mine.card("true").origin["kind"] == "imported"
    runtime.load("true")
    with pytest.raises(EffectChanged):
        runtime.load("false")
    assert runtime.resident() == ["true@1"]
    runtime.close()


def test_a_foreign_adapter_without_certificate_is_measured_once(base, tmp_path):
    for name, data in build.lora(base, 1).files().items():
        (tmp_path / "peft").mkdir(exist_ok=True)
        (tmp_path / "peft" / name).write_bytes(data)
    ref = Store().import_(tmp_path / "peft", "foreign")
    assert Store().card(ref).effect == {}
    for expected in (2, 0):
        runtime = Runtime(base, Store())
        with Forwards(base) as forwards:
            runtime.load(ref)
        assert forwards.count == expected
        runtime.close()


# -- comparing ---------------------------------------------------------------------------------------------------------

FOUND = {"probe_set": 1, "loss": 2.0, "base_loss": 3.0, "max_logit_change": 4.0, "mean_logit_change": 1.0}


@pytest.mark.parametrize(
    ("changed", "exact", "loose"),
    [
        ({}, [], []),
        ({"loss": 2.001}, [], []),
        ({"loss": 2.01}, ["loss with"], []),
        ({"loss": 2.2}, ["loss with"], ["loss with"]),
        ({"base_loss": 3.3}, ["bare base"], ["bare base"]),
        ({"mean_logit_change": 1.009}, [], []),
        ({"mean_logit_change": 1.1}, ["mean change of a logit"], []),
        ({"mean_logit_change": 8.0}, ["mean change of a logit"], ["mean change of a logit"]),
        ({"max_logit_change": 8.0}, ["largest change"], []),
        ({"layer_change": 2.0}, [], []),
        ({"probe_set": 2, "loss": 9.0}, [], []),
    ],
)
def test_what_counts_as_another_effect(changed: dict, exact: list[str], loose: list[str]):
    for expected, is_exact in ((exact, True), (loose, False)):
        problems = compare({**FOUND, **changed}, FOUND, is_exact)
        assert len(problems) == len(expected)
        assert all(part in problem for part, problem in zip(expected, problems, strict=True))


def test_a_card_from_before_certificates_is_compared_by_what_it_has(base, runtime):
    adapter = build.lora(base, 1)
    found = effect_of(base, adapter)
    old = {name: found[name] for name in ("max_logit_change", "mean_logit_change", "probes")}
    runtime.load(certified(base, "good", adapter, old))
    with pytest.raises(EffectChanged, match="mean change of a logit"):
        runtime.load(certified(base, "bad", scaled(adapter, 2.0), old))


def test_a_measurement_is_the_same_twice(base):
    runtime = Runtime(base, Store())
    ref = runtime.attach(build.lora(base, 1))
    found = measure(runtime, ref)
    assert measure_fitted(base, runtime.fitted(ref)) == found
    assert math.isfinite(found["loss"])
    runtime.close()
