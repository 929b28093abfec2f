"""What `merge` finds wrong, measures and refuses: for every target, in memory and streamed from the disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import BaseMismatch, DataError, MergeFailed, StoreError, Unsupported
from adapterhub_lite.events import Progress
from adapterhub_lite.merging.checkpoint import Checkpoint, Planned
from adapterhub_lite.merging.report import TARGETS, BakeFigures, Difference, Thresholds
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.store.reports import kept_reports
from adapterhub_lite.workflows import merge as merging
from adapterhub_lite.workflows import merge_bakes, merge_write
from adapterhub_lite.workflows.merge import merge
from adapterhub_lite.workflows.merge_bakes import better
from adapterhub_lite.workflows.merge_expected import Expected
from adapterhub_lite.workflows.merge_request import members_of
from adapterhub_lite.workflows.merge_served import logits_of, plain_logits
from adapterhub_lite.workflows.merge_stream import streamed_model
from adapterhub_lite.workflows.merge_tensors import Stored
from tests import peers, tiny
from tests.merging.build import CLASSIFY, INSTRUCT, TAG, peft_folder, stored

LOOSE = Thresholds(max_kl=1e9, min_top1=0.0, max_lost=1e9, max_metric_drop=1.0)
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def llama(tmp_path, tiny_folder, store):
    """(base, reference) of a Llama with a LoRA that was trained to do something."""
    folder = tiny_folder("llama", **SIZES)
    base = load_base(str(folder), device="cpu")
    peft_folder(tmp_path / "peft", folder, "llama")
    return base, stored(store, "mine", tmp_path / "peft", base, INSTRUCT, tmp_path / "data")


def plant(monkeypatch, wrong, which: str = "up_proj") -> list[str]:
    """Let one planned tensor be made wrongly; returns the list that its name comes into."""
    own, planted = merge_write.plan_merge, []

    def planned(*arguments, **named):
        plan = own(*arguments, **named)
        for tensors in plan.shards.values():
            for i, one in enumerate(tensors):
                if which in one.name and one.name in plan.changed and (not planted or planted == [one.name]):
                    planted[:] = [one.name]
                    tensors[i] = Planned(one.name, one.dtype, one.shape, lambda one=one: wrong(one.make()))
        return plan

    monkeypatch.setattr(merge_write, "plan_merge", planned)
    return planted


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or list(folder.iterdir()) == []


# -- wrong tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "weights"])
@pytest.mark.parametrize("to", TARGETS)
def test_one_wrong_tensor_fails_the_merge_and_leaves_nothing(tmp_path, llama, store, monkeypatch, to, verify):
    base, ref = llama
    planted = plant(monkeypatch, lambda tensor: tensor.flip(0))
    out = tmp_path / "deep" / "out"
    with pytest.raises(MergeFailed, match=r"relative error of .*Nothing was written") as failed:
        merge(ref, out, store=store, base=base, to=to, verify=verify, metric_rows=0)
    assert planted[0] in str(failed.value)
    assert nothing_left(tmp_path / "deep")


@pytest.mark.parametrize("which", ["up_proj", "v_proj"])
def test_a_layer_of_zeros_fails_by_its_error_alone(tmp_path, llama, store, monkeypatch, which):
    """Codes that were chosen by inputs may be far from the weights, but not that far."""
    base, ref = llama
    monkeypatch.setattr(merging._Job, "_calibration", lambda self, base: [[5 + i % 250 for i in range(256)]] * 2)
    planted = plant(monkeypatch, lambda tensor: tensor * 1e-3, which)
    limits = replace(LOOSE, max_layer_error=None)
    with pytest.raises(MergeFailed, match="relative error") as failed:
        merge(ref, tmp_path / "out", store=store, base=base, to="nf4", thresholds=limits, metric_rows=0)
    assert planted[0] in str(failed.value)
    assert "--residual 8" in failed.value.hint


@pytest.mark.parametrize("to", ["auto", "int8", "nf4", "gguf-f16", "gguf-q8_0"])
def test_logits_alone_show_a_wrong_tensor(tmp_path, llama, store, monkeypatch, to):
    base, ref = llama
    plant(monkeypatch, lambda tensor: tensor.flip(0))
    limits = replace(Thresholds.of(to), max_layer_error=1e9)
    with pytest.raises(MergeFailed, match="mean KL"):
        merge(ref, tmp_path / "out", store=store, base=base, to=to, thresholds=limits, metric_rows=0)


def test_a_missing_change_is_seen_without_logits(tmp_path, llama, store, monkeypatch):
    """In 4 bits the error of a layer does not tell whether the adapter's change is there; its share does."""
    base, ref = llama
    checkpoint = Checkpoint.open(base.source.folder)
    planted = plant(monkeypatch, lambda tensor: tensor)
    own = merge_write.plan_merge

    def lost(*arguments, **named):
        plan = own(*arguments, **named)
        for tensors in plan.shards.values():
            for i, one in enumerate(tensors):
                if one.name == planted[0]:
                    tensors[i] = Planned(one.name, one.dtype, one.shape, lambda one=one: checkpoint.read(one.name))
        return plan

    monkeypatch.setattr(merge_write, "plan_merge", lost)
    limits = Thresholds(max_layer_error=10.0)
    with pytest.raises(MergeFailed, match=r"share of the change that .*up_proj.* keeps"):
        merge(ref, tmp_path / "out", store=store, base=base, to="nf4", verify="weights", thresholds=limits)


def test_a_tensor_that_is_missing_or_nobody_knows_fails(tmp_path, llama, store, monkeypatch):
    base, ref = llama
    own = merge_write.plan_merge

    def more(*arguments, **named):
        plan = own(*arguments, **named)
        for tensors in plan.shards.values():
            tensors.append(Planned("model.stray", torch.float32, (2,), lambda: torch.zeros(2)))
        return plan

    monkeypatch.setattr(merge_write, "plan_merge", more)
    with pytest.raises(MergeFailed, match=r"model\.stray"):
        merge(ref, tmp_path / "out", store=store, base=base, verify="weights")


def test_a_byte_that_changed_on_the_disk_is_found(tmp_path, llama, store, monkeypatch):
    base, ref = llama
    own = merge_write.staged_merge
    from contextlib import contextmanager

    @contextmanager
    def flipping(*arguments, **named):
        with own(*arguments, **named) as folder:
            path = folder / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[-5] ^= 0x40
            path.write_bytes(bytes(data))
            yield folder

    monkeypatch.setattr(merge_write, "staged_merge", flipping)
    with pytest.raises(MergeFailed, match="relative error"):
        merge(ref, tmp_path / "out", store=store, base=base, verify="weights")


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
def test_every_target_is_compared_in_logits_tensors_and_metric(tmp_path, llama, store, to):
    base, ref = llama
    report = merge(ref, tmp_path / "out", store=store, base=base, to=to, thresholds=LOOSE)
    assert (report.forward, report.to, len(report.metrics)) == ("loaded", to, 1)
    assert report.difference is not None
    assert report.difference.rows[0].text == "say 1000 please"
    assert report.metrics[0].rows == 6
    assert {layer.tensor for layer in report.layers} == set(Checkpoint.open(base.source.folder).tensors)
    assert all(layer.error <= layer.limit for layer in report.layers)
    changed = [layer for layer in report.layers if layer.kept is not None]
    assert len(changed) == report.changed_tensors
    assert all(layer.kept == pytest.approx(1, abs=0.15) for layer in changed)
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert told["passed"] is True
    assert (tmp_path / "out" / "merge_report.html").read_text().startswith("<!doctype html>")
    assert [kept["to"] for _, kept in kept_reports(store.path, "mine", 1)] == [to]


def test_the_formats_errors_order_as_their_bits_do(tmp_path, llama, store):
    base, ref = llama
    found = {}
    for to in ("float32", "gguf-f16", "bfloat16", "gguf-q8_0", "int8", "nf4"):
        report = merge(ref, tmp_path / to, store=store, base=base, to=to, thresholds=LOOSE, verify="weights")
        found[to] = max(layer.error for layer in report.layers)
    assert list(found.values()) == sorted(found.values())
    assert found["float32"] < 1e-6


def test_the_verdict_is_on_what_is_on_the_disk_in_either_forward(tmp_path, llama, store, monkeypatch):
    base, ref = llama
    monkeypatch.setattr(merging._Job, "_calibration", lambda self, base: [])  # no codes are chosen by inputs
    loaded = merge(ref, tmp_path / "loaded", store=store, base=base, to="nf4", thresholds=LOOSE, metric_rows=0)
    monkeypatch.setattr("adapterhub_lite.workflows.merge.fits", lambda base, models: False)
    monkeypatch.setattr("adapterhub_lite.workflows.merge_verify.fits", lambda base, models: False)
    monkeypatch.setattr(merging, "load_own_base", unreachable)
    streamed = merge(ref, tmp_path / "streamed", store=store, to="nf4", thresholds=LOOSE)
    assert (loaded.forward, streamed.forward) == ("loaded", "streamed")
    assert loaded.difference is not None
    assert streamed.difference is not None
    assert streamed.metrics == ()
    assert any("streamed from the disk" in note for note in streamed.notes)
    assert streamed.difference.mean_kl == pytest.approx(loaded.difference.mean_kl, rel=1e-3)
    assert streamed.difference.mean_kl > 1e-3
    assert streamed.effect_kl == pytest.approx(loaded.effect_kl, rel=1e-3)


@pytest.fixture
def mamba(tmp_path, store):
    """A model whose forward reads weights of layers that it does not call."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=4, pad_token_id=0)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tiny.tokenizer().save_pretrained(tmp_path / "mamba")
    peft_folder(tmp_path / "peft", tmp_path / "mamba", "llama", target_modules=["in_proj", "x_proj"], task="CAUSAL_LM")
    base = load_base(str(tmp_path / "mamba"), device="cpu")
    return base, stored(store, "mine", tmp_path / "peft", base, None, tmp_path / "data")


def test_a_forward_that_cannot_use_8_bits_is_refused(tmp_path, store, mamba):
    base, ref = mamba
    assert merge(ref, tmp_path / "deep" / "floats", store=store, base=base).passed
    with pytest.raises(Unsupported, match="MambaForCausalLM does not compute with weights in this form") as refused:
        merge(ref, tmp_path / "new" / "out", store=store, base=base, to="int8")
    assert refused.value.hint == "Merge to float weights."
    assert nothing_left(tmp_path / "new")


def test_a_forward_that_cannot_be_streamed_is_refused(tmp_path, store, mamba, monkeypatch):
    _, ref = mamba
    monkeypatch.setattr("adapterhub_lite.workflows.merge.fits", lambda base, models: False)
    monkeypatch.setattr("adapterhub_lite.workflows.merge_verify.fits", lambda base, models: False)
    with pytest.raises(Unsupported, match="does not compute with weights in this form") as refused:
        merge(ref, tmp_path / "new" / "out", store=store)
    assert "--verify weights" in refused.value.hint
    assert nothing_left(tmp_path / "new")
    assert merge(ref, tmp_path / "weights", store=store, verify="weights").passed


@pytest.mark.parametrize(("family", "task"), [("llama", INSTRUCT), ("gpt2", INSTRUCT), ("bert", CLASSIFY)])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_streamed_reference_is_the_runtimes(tmp_path, tiny_folder, store, monkeypatch, family, task, kind):
    """Without room for two models the same merge gives the same figures, and a wrong one still fails."""
    folder = tiny_folder(family)
    base = load_base(str(folder), device="cpu")
    peft_folder(tmp_path / "peft", folder, family, kind)
    ref = stored(store, "mine", tmp_path / "peft", base, task, tmp_path / "data")
    monkeypatch.setattr("adapterhub_lite.workflows.merge.fits", lambda base, models: False)
    monkeypatch.setattr("adapterhub_lite.workflows.merge_verify.fits", lambda base, models: False)
    report = merge(ref, tmp_path / "out", store=store)
    assert report.forward == "streamed"
    assert report.difference is not None
    assert report.difference.max_logit < 1e-4
    monkeypatch.undo()
    again = merge(ref, tmp_path / "again", store=store, base=base)
    assert again.forward == "loaded"
    if family == "bert":
        assert again.effect_kl is report.effect_kl is None
    else:
        assert again.effect_kl == pytest.approx(report.effect_kl, rel=1e-3)


def test_a_streamed_model_holds_one_modules_weights_at_a_time(tiny_folder):
    folder = tiny_folder("llama", **SIZES)
    stored_tensors = Stored.in_folder(folder)
    base = load_base(str(folder), device="cpu")
    config = json.loads((folder / "config.json").read_text())
    most = 0

    class Counting:
        names = stored_tensors.names
        format = stored_tensors.format

        def dense(self, name):
            nonlocal most
            most = max(most, sum(not p.is_meta for p in model.parameters()))
            return stored_tensors.dense(name)

    model = streamed_model(config, "CAUSAL_LM", "causal", Counting())
    got = logits_of(model, base, peers.ROWS, "CAUSAL_LM")
    assert most == 0
    assert all(p.is_meta for p in model.parameters())
    peers.assert_logits_equal(got, plain_logits(folder, base, peers.ROWS, "CAUSAL_LM"))


def test_a_streamed_merge_that_is_wrong_fails(tmp_path, llama, store, monkeypatch):
    _, ref = llama
    monkeypatch.setattr("adapterhub_lite.workflows.merge.fits", lambda base, models: False)
    plant(monkeypatch, lambda tensor: tensor.flip(0))
    with pytest.raises(MergeFailed, match="mean KL"):
        merge(ref, tmp_path / "out", store=store, thresholds=Thresholds(max_layer_error=1e9))


def unreachable(*arguments, **named):
    raise AssertionError("never loaded")


def test_weights_alone_loads_no_model_and_says_so(tmp_path, llama, store, monkeypatch):
    _, ref = llama
    monkeypatch.setattr(merging, "load_own_base", unreachable)
    monkeypatch.setattr("adapterhub_lite.workflows.merge_verify.plain_model", unreachable)
    report = merge(ref, tmp_path / "out", store=store, verify="weights")
    assert (report.forward, report.difference, report.metrics, report.passed) == ("none", None, (), True)
    assert any("No logits were compared" in note for note in report.notes)
    assert "No logits were compared" in (tmp_path / "out" / "merge_report.html").read_text()


@pytest.mark.parametrize(("family", "task", "kind"), [("bert", CLASSIFY, "SEQ_CLS"), ("bert", TAG, "TOKEN_CLS")])
def test_classifiers_and_taggers_are_measured_with_their_heads(tmp_path, tiny_folder, store, family, task, kind):
    from transformers import AutoModelForTokenClassification

    folder = tiny_folder(family)
    base = load_base(str(folder), device="cpu")
    if kind == "TOKEN_CLS":
        torch.manual_seed(7)
        some = {"num_labels": 3, "ignore_mismatched_sizes": True}
        plain = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32, **some)
        peers.wrap(plain, peers.config(family, "lora", kind, target_modules=["query", "dense"])).save_pretrained(
            tmp_path / "peft"
        )
    else:
        peft_folder(tmp_path / "peft", folder, family)
    ref = stored(store, "mine", tmp_path / "peft", base, task, tmp_path / "data", rows=12)
    report = merge(ref, tmp_path / "out", store=store, base=base)
    assert report.passed
    assert report.metrics[0].reference == report.metrics[0].merged
    assert report.effect_kl is None
    from adapterhub_lite.workflows.evaluate import evaluate

    again = evaluate(ref, store=store, base=base)
    assert again.metrics[again.primary_metric] == report.metrics[0].reference


def test_a_drop_in_the_metric_fails(tmp_path, tiny_folder, store, monkeypatch):
    """The head turned round: tensors and logits may differ as they like here, the labels are others."""
    folder = tiny_folder("bert")
    base = load_base(str(folder), device="cpu")
    peft_folder(tmp_path / "peft", folder, "bert")
    first = stored(store, "first", tmp_path / "peft", base, CLASSIFY, tmp_path / "data")
    texts = [f"a text of number {i}" for i in range(12)]
    runtime = Runtime(base, store)
    rows = [{"text": t, "label": p.label} for t, p in zip(texts, runtime.predict(texts, first), strict=True)]
    runtime.close()
    ref = stored(store, "mine", tmp_path / "peft", base, CLASSIFY, tmp_path / "data", test=rows)
    assert merge(ref, tmp_path / "right", store=store, base=base).metrics[0].merged == 1.0
    own = merge_write.plan_merge

    def turned(*arguments, **named):
        plan = own(*arguments, **named)
        for tensors in plan.shards.values():
            for i, one in enumerate(tensors):
                if one.name.startswith("classifier"):
                    tensors[i] = Planned(one.name, one.dtype, one.shape, lambda one=one: one.make().roll(1, 0))
        return plan

    monkeypatch.setattr(merge_write, "plan_merge", turned)
    limits = Thresholds(max_kl=1e9, min_top1=0.0, max_layer_error=1e9)
    with pytest.raises(MergeFailed, match=r"drop in accuracy of mine@1 1 \(<= 0\.02\)"):
        merge(ref, tmp_path / "wrong", store=store, base=base, thresholds=limits)
    told = kept_reports(store.path, "mine", 1)[-1][1]
    assert (told["metrics"][0]["reference"], told["metrics"][0]["merged"]) == (1.0, 0.0)


# -- bakes ------------------------------------------------------------------------------------------------------------


def test_both_bakes_are_measured_and_the_figures_are_those_of_merges(tmp_path, tiny_folder, store):
    folder = tiny_folder("llama", **SIZES)
    base = load_base(str(folder), "nf4", device="cpu")
    peft_folder(tmp_path / "peft", folder, "llama")
    ref = stored(store, "mine", tmp_path / "peft", base, INSTRUCT, tmp_path / "data")
    frozen = base.live_digest()
    report = merge(ref, tmp_path / "out", store=store, base=base, thresholds=LOOSE)
    assert [one.bake for one in report.bakes] == ["dequantised", "original"]
    assert report.bake == "dequantised"
    for one in report.bakes:
        out = tmp_path / one.bake
        alone = merge(ref, out, store=store, base=base, bake=one.bake, thresholds=LOOSE)
        assert alone.bakes == ()
        assert alone.difference is not None
        assert one.difference.mean_kl == pytest.approx(alone.difference.mean_kl, rel=1e-2, abs=1e-8)
        assert one.value == alone.metrics[0].merged
        assert one.reference == alone.metrics[0].reference
    assert report.bakes[1].difference.mean_kl > 100 * report.bakes[0].difference.mean_kl
    text = "\n".join(report.lines())
    assert "baked into dequantised weights" in text
    assert "baked into original weights" in text
    assert base.live_digest() == frozen


def test_base_and_adapter_answer_each_row_once(tmp_path, tiny_folder, store, monkeypatch):
    folder = tiny_folder("llama", **SIZES)
    base = load_base(str(folder), "nf4", device="cpu")
    peft_folder(tmp_path / "peft", folder, "llama")
    ref = stored(store, "mine", tmp_path / "peft", base, INSTRUCT, tmp_path / "data")
    monkeypatch.setattr(merge_bakes, "_ROWS", 4)
    events = []
    report = merge(ref, tmp_path / "out", store=store, base=base, thresholds=LOOSE, on_event=events.append)
    told = [(e.done, e.total) for e in events if isinstance(e, Progress) and e.title == "measuring base + adapter"]
    assert told == [(0, 6), (6, 6)]
    few = merge(ref, tmp_path / "few", store=store, base=base, metric_rows=4, bake="dequantised", thresholds=LOOSE)
    assert [(one.rows, one.reference) for one in report.bakes] == [(4, few.metrics[0].reference)] * 2
    assert report.metrics[0].rows == 6


def test_no_bake_answers_where_logits_decide(tmp_path, tiny_folder, store):
    folder = tiny_folder("llama", **SIZES)
    base = load_base(str(folder), "nf4", device="cpu")
    peft_folder(tmp_path / "peft", folder, "llama")
    ref = stored(store, "mine", tmp_path / "peft", base, INSTRUCT, tmp_path / "data")
    report = merge(ref, tmp_path / "out", store=store, base=base, thresholds=Thresholds(max_kl=1e-3, min_top1=0.5))
    near, far = report.bakes
    assert near.difference.mean_kl <= 1e-3 < far.difference.mean_kl
    assert (near.value, far.value, report.bake) == (None, None, "dequantised")
    assert report.metrics[0].rows == 6


def test_the_better_bake_is_the_one_of_the_better_metric_within_the_thresholds():
    def figures(bake: str, kl: float, value: float | None) -> BakeFigures:
        return BakeFigures(bake, Difference(1.0, 1.0, kl, 1.0, 10), "accuracy", value)

    limits = Thresholds(max_kl=0.1)
    assert better([figures("dequantised", 0.01, 0.7), figures("original", 0.05, 0.8)], limits) == "original"
    assert better([figures("dequantised", 0.01, 0.7), figures("original", 0.5, 0.8)], limits) == "dequantised"
    assert better([figures("dequantised", 0.05, 0.7), figures("original", 0.01, 0.7)], limits) == "original"
    assert better([figures("dequantised", 0.01, None), figures("original", 0.05, None)], limits) == "dequantised"
    assert better([figures("dequantised", 2.0, 0.1), figures("original", 1.0, 0.0)], limits) == "original"


def test_that_no_metric_was_asked_for_is_said(tmp_path, llama, store):
    base, ref = llama
    report = merge(ref, tmp_path / "out", store=store, base=base, metric_rows=0)
    assert report.metrics == ()
    assert "The metric of mine@1 was not measured, as asked for (--rows 0)." in report.lines()
    assert report.to_dict()["notes"] == list(report.notes)


def test_where_there_is_one_kind_of_weights_nothing_is_tried(tmp_path, llama, store):
    base, ref = llama
    report = merge(ref, tmp_path / "out", store=store, base=base, bake="measured")
    assert (report.bakes, report.bake) == ((), "original")
    assert any("one kind of weights" in note for note in report.notes)


# -- several adapters -------------------------------------------------------------------------------------------------


def test_a_mix_is_merged_as_the_runtime_mixes(tmp_path, llama, store):
    base, first = llama
    peft_folder(tmp_path / "other", base.source.folder, "llama", seed=5)
    second = stored(store, "other", tmp_path / "other", base, INSTRUCT, tmp_path / "data")
    report = merge([first, second], tmp_path / "out", weights=[0.7, -0.3], store=store, base=base)
    assert report.passed
    assert report.difference is not None
    assert report.difference.max_logit < 1e-4
    assert [(m.ref, m.weight, m.digest) for m in report.adapters] == [
        ("mine@1", 0.7, first.digest), ("other@1", -0.3, second.digest),
    ]  # fmt: skip
    assert {one.ref for one in report.metrics} == {"mine@1", "other@1"}
    for name in ("mine", "other"):
        assert len(kept_reports(store.path, name, 1)) == 1
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["adapterhub_merge"]
    assert [entry["weight"] for entry in entries] == [0.7, -0.3]
    assert {entry["base"] for entry in entries} == {base.fingerprint.digest}


@pytest.mark.parametrize(
    ("refs", "weights", "found"),
    [
        ("a@1", None, [("a@1", 1.0)]),
        ("a@1,b:prod", [0.5, 2], [("a@1", 0.5), ("b:prod", 2.0)]),
        ("a@1=0.7, b=-0.3", None, [("a@1", 0.7), ("b", -0.3)]),
        (["a@1", "b@2=2"], None, [("a@1", 1.0), ("b@2", 2.0)]),
        ({"a@1": 0.25}, None, [("a@1", 0.25)]),
    ],
)
def test_adapters_and_weights_are_read(refs, weights, found):
    assert [(str(ref), weight) for ref, weight in members_of(refs, weights)] == found


@pytest.mark.parametrize(
    ("refs", "weights", "says"),
    [
        ("a@1,b@1", [1.0], "1 weights for 2 adapters"),
        ("a@1=0.7", [1.0], "given twice"),
        ("a@1=much", None, "not a number"),
        ("a@1=nan", None, "is nan"),
        ("a@1=0", None, "leaves it out"),
        ("a@1,a@1", None, "named twice"),
        ([], None, "no adapters"),
    ],
)
def test_what_is_no_list_of_adapters_is_refused(refs, weights, says):
    with pytest.raises(Unsupported, match=says):
        members_of(refs, weights)


# -- what is expected -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", ["lora", "patterns", "rslora", "dora"])
def test_expected_tensors_are_those_of_pefts_own_merge(tmp_path, tiny_folder, family, kind):
    folder = tiny_folder(family)
    model = peft_folder(tmp_path / "peft", folder, family, kind)
    adapter = read_adapter(tmp_path / "peft")
    expected = Expected(Checkpoint.open(folder), [(adapter, 1.0)])
    truth = model.merge_and_unload().state_dict()
    seen = 0
    for name in expected.names:
        if name in truth and not (name.startswith("classifier") and not expected.changed(name)):
            torch.testing.assert_close(expected.dense(name), truth[name], rtol=1e-5, atol=1e-5)
            seen += expected.changed(name)
    assert seen > 5


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_adapter_of_an_unknown_base_is_refused_unless_the_base_is_named(tmp_path, tiny_folder, store):
    folder = tiny_folder("llama")
    peft_folder(tmp_path / "peft", folder, "llama")
    ref = store.import_(tmp_path / "peft", "mine", {"name": str(folder)})
    with pytest.raises(Unsupported, match="not loaded unasked"):
        merge(ref, tmp_path / "out", store=store)
    report = merge(ref, tmp_path / "out", store=store, base_name=str(folder))
    assert any("does not say which base's weights" in note for note in report.notes)


def test_another_base_is_refused(tmp_path, llama, tiny_folder, store):
    _, ref = llama
    other = tiny.save("llama", tmp_path / "other", seed=3, **SIZES)
    with pytest.raises(BaseMismatch, match="weights differ"):
        merge(ref, tmp_path / "out", store=store, base_name=str(other))
    assert not (tmp_path / "out").exists()


def test_a_merged_base_is_refused(tmp_path, llama, store):
    base, ref = llama
    merge(ref, tmp_path / "once", store=store, base=base)
    with pytest.raises(Unsupported, match="is in already"):
        merge(ref, tmp_path / "twice", store=store, base_name=str(tmp_path / "once"))
    peft_folder(tmp_path / "other", base.source.folder, "llama", seed=5)
    unknown = store.import_(tmp_path / "other", "other")
    with pytest.raises(Unsupported, match="does not say that it was made for it"):
        merge(unknown, tmp_path / "twice", store=store, base_name=str(tmp_path / "once"))
    config = tmp_path / "once" / "config.json"
    told = json.loads(config.read_text())
    del told["adapterhub_merge"]
    config.write_text(json.dumps(told))
    with pytest.raises(Unsupported, match="is in already"):
        merge(ref, tmp_path / "twice", store=store, base_name=str(tmp_path / "once"))
    assert not (tmp_path / "twice").exists()


def test_an_adapter_made_for_a_merged_base_is_merged_into_it(tmp_path, llama, store):
    base, ref = llama
    merge(ref, tmp_path / "once", store=store, base=base)
    merged = load_base(str(tmp_path / "once"), device="cpu")
    peft_folder(tmp_path / "peft2", tmp_path / "once", "llama", seed=9)
    second = stored(store, "second", tmp_path / "peft2", merged, INSTRUCT, tmp_path / "data")
    assert merge(second, tmp_path / "both", store=store, base=merged).passed
    entries = json.loads((tmp_path / "both" / "config.json").read_text())["adapterhub_merge"]
    assert [entry["digest"] for entry in entries] == [ref.digest, second.digest]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "bfloat"}, "Did you mean bfloat16"),
        ({"to": "gguf-q8"}, "Did you mean gguf-q8_0"),
        ({"bake": "origin"}, "Did you mean original"),
        ({"verify": "none"}, "not a way to verify"),
        ({"to": "int8", "residual": 4}, "residual adapter repairs"),
        ({"residual": 4}, "residual adapter repairs"),
        ({"verify": "weights", "bake": "measured"}, "measured on logits"),
        ({"to": "nf4", "dtype": "int8"}, "two names"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, llama, store, options, says):
    base, ref = llama
    with pytest.raises(Unsupported, match=says):
        merge(ref, tmp_path / "out", store=store, base=base, **options)


def test_a_prefix_is_refused_before_its_base_is_loaded(tmp_path, tiny_folder, store, monkeypatch):
    folder = tiny_folder("llama")
    base = load_base(str(folder), device="cpu")
    peft_folder(tmp_path / "peft", folder, "llama", "prefix")
    ref = stored(store, "mine", tmp_path / "peft", base, None, tmp_path / "data")
    monkeypatch.setattr(merging, "load_own_base", unreachable)
    with pytest.raises(Unsupported, match="is a prefix"):
        merge(ref, tmp_path / "out", store=store)


def test_a_classifier_is_no_gguf_file_and_no_base_is_loaded_to_say_so(tmp_path, tiny_folder, store, monkeypatch):
    folder = tiny_folder("bert")
    base = load_base(str(folder), device="cpu")
    peft_folder(tmp_path / "peft", folder, "bert")
    ref = stored(store, "mine", tmp_path / "peft", base, CLASSIFY, tmp_path / "data")
    monkeypatch.setattr(merging, "load_own_base", unreachable)
    with pytest.raises(Unsupported, match="GGUF"):
        merge(ref, tmp_path / "out", store=store, to="gguf-f16")


def test_a_folder_in_the_store_or_the_base_is_refused(tmp_path, llama, store):
    base, ref = llama
    for out in (store.path / "reports" / "mine", store.path / "runs" / "x", base.source.folder / "merged"):
        with pytest.raises(StoreError, match="is inside"):
            merge(ref, out, store=store, base=base)


# -- prompts, thresholds, records -------------------------------------------------------------------------------------


def test_prompts_of_a_file_are_what_is_compared_on(tmp_path, llama, store):
    base, ref = llama
    (tmp_path / "prompts.txt").write_text("one prompt\n\nand another one\n")
    report = merge(ref, tmp_path / "out", store=store, base=base, prompts=tmp_path / "prompts.txt")
    assert report.difference is not None
    assert [row.text for row in report.difference.rows] == ["one prompt", "and another one"]
    (tmp_path / "rows.jsonl").write_text('{"question": "mine", "reply": "x"}\n')
    report = merge(ref, tmp_path / "out2", store=store, base=base, prompts=tmp_path / "rows.jsonl")
    assert report.difference is not None
    assert [row.text for row in report.difference.rows] == ["mine"]
    assert report.metrics[0].rows == 1
    peft_folder(tmp_path / "other", base.source.folder, "llama", seed=5)
    taskless = stored(store, "taskless", tmp_path / "other", base, None, tmp_path / "data")
    with pytest.raises(DataError, match="no task says how to read it"):
        merge(taskless, tmp_path / "out3", store=store, base=base, prompts=tmp_path / "rows.jsonl")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        merge(ref, tmp_path / "out3", store=store, base=base, prompts=tmp_path / "empty.txt")


def test_a_failed_report_is_kept_in_the_store_and_names_the_limits(tmp_path, llama, store):
    base, ref = llama
    with pytest.raises(MergeFailed) as failed:
        merge(ref, tmp_path / "out", store=store, base=base, to="nf4", thresholds=Thresholds(max_kl=1e-9))
    folder, told = kept_reports(store.path, "mine", 1)[-1]
    assert str(folder) in str(failed.value)
    assert (told["passed"], told["thresholds"]["max_kl"]) == (False, 1e-9)
    assert "failed" in (folder / "merge_report.html").read_text()
    assert not (tmp_path / "out").exists()
    store.verified_folder(ref)


def test_a_store_that_cannot_keep_the_report_does_not_stop_a_merge(tmp_path, llama, store):
    base, ref = llama
    (store.path / "reports").write_text("in the way")
    said: list[object] = []
    assert merge(ref, tmp_path / "out", store=store, base=base, on_event=said.append).passed
    assert any("not kept" in str(event) for event in said)
    assert (tmp_path / "out" / "merge_report.html").is_file()


def test_the_record_in_config_json_survives_plain_transformers(tmp_path, llama, store):
    from transformers import AutoModelForCausalLM

    base, ref = llama
    merge(ref, tmp_path / "out", store=store, base=base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "saved"))
    assert after["adapterhub_merge"] == before["adapterhub_merge"]
    entry = before["adapterhub_merge"][0]
    assert (entry["digest"], entry["weight"], entry["bake"]) == (ref.digest, 1.0, "original")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ref.digest in card
    assert "license: unknown" in card


def test_a_residual_adapter_lies_beside_4_bits_and_repairs(tmp_path, llama, store):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, ref = llama
    report = merge(ref, tmp_path / "out", store=store, base=base, to="nf4", residual=16, thresholds=LOOSE)
    assert report.residual_rank == 16
    assert report.difference is not None
    assert report.bare_difference is not None
    assert report.difference.mean_kl < report.bare_difference.mean_kl
    assert any("without it" in line for line in report.lines())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    PeftModel.from_pretrained(model, tmp_path / "out" / "residual")
