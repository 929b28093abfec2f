"""Merged checkpoints against PEFT's own merge, in plain transformers; refusals; whole or absent."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import AdapterMismatch, MergeFailed, StoreError, Unsupported
from adapterhub_lite.merging.checkpoint import Checkpoint
from adapterhub_lite.merging.edits import Edits
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.plan import plan_merge
from adapterhub_lite.merging.report import Difference, MergeReport, Thresholds, compare_logits
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.merge import merge, plain_logits
from tests import peers, tiny
from tests.store.faulty import Crash, Failing

CASES = [
    (family, kind, classify)
    for family in tiny.FAMILIES
    for kind in ("lora", "patterns", "rslora", "dora")
    for classify in (False, True)
    if classify or family not in tiny.ENCODERS
]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def saved(tmp_path: Path, folder: Path, family: str, kind: str, classify: bool = False, **changes):
    """A PEFT folder, and the PEFT model it came from."""
    task = peers.task_type(family, classify=classify)
    model = peers.wrap(peers.plain(folder, task), peers.config(family, kind, task, **changes))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    return tmp_path / "peft", model


def plan_of(folder: Path, peft_folder: Path, **options):
    adapter = read_adapter(peft_folder, name="mine")
    given = {"quantization": "none", "bake": "auto", "dtype": "auto", "labels": None, **options}
    return plan_merge([(adapter, 1.0)], Checkpoint.open(folder), **given)


@pytest.mark.parametrize(("family", "kind", "classify"), CASES)
def test_merged_checkpoint_gives_pefts_logits_in_plain_transformers(tmp_path, tiny_folder, family, kind, classify):
    folder = tiny_folder(family)
    peft_folder, model = saved(tmp_path, folder, family, kind, classify)
    task = peers.task_type(family, classify=classify)
    with staged_merge(plan_of(folder, peft_folder), folder, tmp_path / "out"):
        pass
    base = load_base(str(folder), device="cpu")
    rows = peers.ROWS
    got = plain_logits(tmp_path / "out", base, rows, task)
    expected = plain_logits_of(model.merge_and_unload(), base, rows, task)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    bare = plain_logits(folder, base, rows, task) if not classify and family not in tiny.ENCODERS else None
    assert bare is None or any((a - b).abs().max() > 1e-2 for a, b in zip(got, bare, strict=True))


def plain_logits_of(model, base, rows, task):
    """The same forward as `plain_logits`, for a model in memory."""
    from adapterhub_lite.bases.inputs import pad_rows

    ids, mask = pad_rows(rows, base.pad_id, left=False)
    arguments = {"input_ids": ids, "attention_mask": mask}
    given = rows
    if base.kind == "seq2seq" and task != "SEQ_CLS":
        given = [[base.config.decoder_start_token_id, *r[:16]] for r in rows]
        arguments["decoder_input_ids"] = pad_rows(given, base.pad_id, left=False)[0]
    with torch.inference_mode():
        logits = model.eval()(**arguments).logits
    return list(logits) if task == "SEQ_CLS" else [logits[i, : len(r)] for i, r in enumerate(given)]


def test_only_adapted_tensors_change_and_in_float64_they_are_right(tmp_path, tiny_folder):
    folder = tiny_folder("llama")
    peft_folder, _ = saved(tmp_path, folder, "llama", "lora", target_modules=["q_proj", "down_proj"])
    plan = plan_of(folder, peft_folder)
    with staged_merge(plan, folder, tmp_path / "out"):
        pass
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    lora = load_file(peft_folder / "adapter_model.safetensors")
    assert set(before) == set(after)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == set(plan.changed)
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        delta = lora[f"{stem}.lora_B.weight"].double() @ lora[f"{stem}.lora_A.weight"].double() * (8 / 4)
        torch.testing.assert_close(after[name].double(), before[name].double() + delta, rtol=1e-6, atol=1e-6)


def test_sharded_checkpoints_merge_to_the_same_tensors(tmp_path, tiny_folder):
    folder = tiny_folder("llama")
    peft_folder, _ = saved(tmp_path, folder, "llama", "lora")
    sharded = tmp_path / "sharded"
    tiny.model("llama").save_pretrained(sharded, max_shard_size="40KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    for source, out in ((folder, tmp_path / "one"), (sharded, tmp_path / "many")):
        with staged_merge(plan_of(source, peft_folder), source, out):
            pass
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert len(many.shards) > 1
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)
    assert set(one.tensors) == set(many.tensors)


def test_a_quantised_adapter_bakes_into_what_its_base_computed_with(tmp_path, tiny_folder, store):
    folder = tiny_folder("llama", hidden_size=64, intermediate_size=128)
    peft_folder, _ = saved(tmp_path, folder, "llama", "lora")
    base = load_base(str(folder), "nf4", device="cpu")
    ref = store.import_(peft_folder, "mine", {"quantization": "nf4", "fingerprint": base.fingerprint.to_dict()})
    frozen = base.live_digest()
    report = merge(ref, tmp_path / "out", store=store, base=base)
    assert (report.bake, report.passed) == ("dequantised", True)
    assert report.difference.max_logit < 1e-4
    original = merge(
        ref, tmp_path / "original", store=store, base=base, bake="original", thresholds=Thresholds(1e9, 0.0)
    )
    assert original.difference.max_logit > 10 * report.difference.max_logit
    assert base.live_digest() == frozen


def test_a_merge_beyond_the_thresholds_leaves_nothing(tmp_path, tiny_folder, store):
    folder = tiny_folder("llama")
    peft_folder, _ = saved(tmp_path, folder, "llama", "lora")
    base = load_base(str(folder), device="cpu")
    ref = store.import_(peft_folder, "mine", {"fingerprint": base.fingerprint.to_dict()})
    with pytest.raises(MergeFailed, match="Nothing was written"):
        merge(ref, tmp_path / "deep" / "out", store=store, base=base, dtype="bfloat16", thresholds=Thresholds(0.0, 1.0))
    assert list((tmp_path / "deep").iterdir()) == []


def test_the_report_lies_beside_the_weights_and_names_the_version(tmp_path, tiny_folder, store):
    folder = tiny_folder("gpt2")
    peft_folder, _ = saved(tmp_path, folder, "gpt2", "dora")
    base = load_base(str(folder), device="cpu")
    ref = store.import_(peft_folder, "mine", {"fingerprint": base.fingerprint.to_dict()})
    report = merge(ref, tmp_path / "out", store=store, base=base)
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["digest"] == ref.digest
    assert written["difference"]["top1_agreement"] == 1.0


def test_a_merged_classifier_names_its_labels(tmp_path, tiny_folder):
    folder = tiny_folder("roberta")
    peft_folder, _ = saved(tmp_path, folder, "roberta", "lora")
    with staged_merge(plan_of(folder, peft_folder, labels=["bad", "fair", "good"]), folder, tmp_path / "out"):
        pass
    model = peers.plain(tmp_path / "out", "SEQ_CLS")
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}


def test_what_cannot_be_merged_is_refused(tmp_path, tiny_folder):
    folder = tiny_folder("llama")
    prefix, _ = saved(tmp_path / "a", folder, "llama", "prefix")
    with pytest.raises(Unsupported, match="is a prefix"):
        plan_of(folder, prefix)
    lora, _ = saved(tmp_path / "b", folder, "llama", "lora")
    with pytest.raises(Unsupported, match="way to bake"):
        plan_of(folder, lora, bake="fried")
    with pytest.raises(Unsupported, match="dtype"):
        plan_of(folder, lora, dtype="float8")
    with pytest.raises(AdapterMismatch):
        plan_of(tiny_folder("gpt2"), lora)


def test_the_target_must_be_absent_or_empty(tmp_path, tiny_folder):
    folder = tiny_folder("llama")
    plan = plan_of(folder, saved(tmp_path, folder, "llama", "lora")[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out in ("full", "link", "full/thing"):
        with pytest.raises((StoreError, OSError)), staged_merge(plan, folder, tmp_path / out):
            raise AssertionError("never reached")
    assert (tmp_path / "full" / "thing").read_text() == "x"


@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")])
def test_a_fault_at_any_operation_leaves_no_folder_or_a_whole_one(tmp_path, tiny_folder, error):
    folder = tiny_folder("llama")
    plan = plan_of(folder, saved(tmp_path, folder, "llama", "lora")[0])
    out = tmp_path / "out"
    for at in range(1, 200):
        fs = Failing(at, error)
        try:
            with staged_merge(plan, folder, out, fs=fs):
                pass
        except (Crash, OSError):
            assert not out.exists() or whole(out)
        else:
            assert whole(out)
            if fs.count < at:
                return
        if out.exists():
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    raise AssertionError("never completed")


def whole(folder: Path) -> bool:
    return {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}


def test_compare_logits_against_a_hand_made_pair():
    a = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    found = compare_logits([a], [b])
    p = torch.softmax(a[0].double(), 0)
    q = torch.softmax(b[0].double(), 0)
    assert found.max_logit == 1.0
    assert found.mean_logit == 0.25
    assert found.top1_agreement == 0.5
    assert found.mean_kl == pytest.approx(float((p * (p / q).log()).sum()) / 2)


@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_never_passes(side):
    pair = [[torch.zeros(4, 2)], [torch.zeros(4, 2)]]
    limits = Thresholds(1e9, 0.0)
    assert passes(compare_logits(*pair), limits)
    pair[side] = [torch.tensor([[0.0, 0.0], [0.0, float("nan")], [0.0, 0.0], [0.0, 0.0]])]
    assert not passes(compare_logits(*pair), limits)


def passes(difference: Difference, limits: Thresholds) -> bool:
    about = ("mine@1", "", "base", "out", "original", "none", "auto", 1, 1, 1, 0.0)
    return MergeReport(*about, difference, None, limits).passed


def test_a_merge_that_loses_a_weak_adapter_fails(tmp_path, tiny_folder, store, monkeypatch):
    """Its divergence is far below the limits, because the adapter itself hardly changes anything."""
    from adapterhub_lite.merging import plan as planning

    folder = tiny_folder("llama")
    task = peers.task_type("llama")
    model = peers.wrap(peers.plain(folder, task), peers.config("llama", "lora", task))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.02)
    model.save_pretrained(tmp_path / "peft")
    base = load_base(str(folder), device="cpu")
    ref = store.import_(tmp_path / "peft", "weak", {"fingerprint": base.fingerprint.to_dict()})
    assert merge(ref, tmp_path / "right", store=store, base=base).passed
    monkeypatch.setattr(planning, "edits_of", lambda *_: Edits())
    with pytest.raises(MergeFailed):
        merge(ref, tmp_path / "lost", store=store, base=base)


def test_a_merge_into_the_store_or_the_base_is_refused(tmp_path, tiny_folder, store):
    folder = tiny_folder("llama")
    base = load_base(str(folder), device="cpu")
    peft_folder, _ = saved(tmp_path, folder, "llama", "lora")
    ref = store.import_(peft_folder, "mine", {"fingerprint": base.fingerprint.to_dict()})
    for out in (store.path / "adapters" / "mine" / "2", folder / "merged"):
        with pytest.raises(StoreError, match="is inside"):
            merge(ref, out, store=store, base=base)
    assert str(store.resolve("mine")) == "mine@1"


def test_integer_buffers_of_a_checkpoint_pass_through(tmp_path, tiny_folder):
    from safetensors.torch import save_file

    folder = tiny_folder("bert")
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    tensors = load_file(folder / "model.safetensors")
    ids = torch.arange(512)[None]
    save_file({**tensors, "bert.embeddings.position_ids": ids}, old / "model.safetensors", metadata={"format": "pt"})
    peft_folder, _ = saved(tmp_path, folder, "bert", "lora")
    with staged_merge(plan_of(old, peft_folder, dtype="bfloat16"), old, tmp_path / "out"):
        pass
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["bert.embeddings.position_ids"], ids)
    assert {t.dtype for k, t in merged.items() if "position_ids" not in k} == {torch.bfloat16}
