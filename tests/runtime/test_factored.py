"""AdaLoRA, LoHa and LoKr in the slots of LoRA: PEFT's own numbers, alone and in mixed batches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.adapters.compare import compare
from adapterhub_lite.errors import AdapterMismatch, FormatError
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.receive import receive
from tests import peers
from tests.runtime import build
from tests.runtime.test_kinds import our_tokens, ragged

TARGETS = {
    "llama": ["q_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "dense"],
    "t5": ["q", "wi", "wo"],
}
PATTERNS = {
    "llama": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "bert": {"rank_pattern": {"layer.1.attention.self.query": 3}, "alpha_pattern": {"query": 5}},
    "t5": {"rank_pattern": {"wi": 3}, "alpha_pattern": {"wo": 5}},
}
KINDS = (
    "adalora",
    "adalora pruned",
    "loha",
    "loha wide",
    "lokr",
    "lokr both",
    "lokr whole",
    "loha patterns",
    "lokr patterns",
)
CASES = [(f, k) for f in TARGETS for k in KINDS if f != "gpt2" or k.startswith("adalora")]


def config(family: str, kind: str, task: str) -> Any:
    """PEFT's configuration."""
    name, _, form = kind.partition(" ")
    given: dict[str, Any] = {"task_type": task, "target_modules": TARGETS[family]}
    if name == "adalora":
        return peft.AdaLoraConfig(**given, init_r=6, target_r=3, total_step=10, lora_alpha=7)
    patterns = PATTERNS[family] if form == "patterns" else {}
    if name == "loha":
        return peft.LoHaConfig(**given, r=9 if form == "wide" else 2, alpha=3, **patterns)
    both = {"decompose_both": True, "decompose_factor": 8} if form == "both" else {}
    return peft.LoKrConfig(**given, r=64 if form == "whole" else 2, alpha=3, **both, **patterns)


def made_by_peft(folder: Path, base_folder: Path, family: str, kind: str) -> Any:
    """A PEFT model of random values, saved to `folder` and read back by PEFT."""
    torch.manual_seed(3)
    task = peers.task_type(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(peers.plain(base_folder, task), config(family, kind, task))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and any(part in name for part in ("lora_", "hada_", "lokr_")):
                parameter.data.normal_(0, 0.4)
        if kind == "adalora pruned":
            names = [n for n, _ in wrapped.named_parameters() if n.endswith("lora_E.default")]
            wrapped.peft_config["default"].rank_pattern = {
                name.removeprefix("base_model.model."): [(i + len(name)) % 3 > 0 for i in range(6)] for name in names
            }
        wrapped.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(peers.plain(base_folder, task), folder).eval()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_in_run_out_and_into_peft(tiny_base, tmp_path: Path, family: str, kind: str):
    base, store = tiny_base(family), Store()
    model = made_by_peft(tmp_path / "in", base.source.folder, family, kind)
    expected = peers.logits(model)
    bare = peers.logits(peers.plain(base.source.folder, peers.task_type(family)))
    assert not torch.allclose(expected[0], bare[0], atol=1e-3), "the reference adapter itself does nothing"
    runtime, before = Runtime(base, store), base.live_digest()
    ref = receive(tmp_path / "in", "mine", store=store, base=str(base.source.folder))
    peers.assert_logits_equal(runtime.logits(peers.ROWS, ref, peers.ANSWERS if family == "t5" else None), expected)
    runtime.close()
    assert base.live_digest() == before
    out = store.export(ref, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(peers.plain(base.source.folder, peers.task_type(family)), out).eval()
    peers.assert_logits_equal(peers.logits(again), expected)
    assert store.card(ref).adapter["type"] == kind.split()[0]
    assert Store(tmp_path / "other").import_(out, name="again").digest == ref.digest
    adapter = read_adapter(tmp_path / "in")
    assert all(one.cosine == pytest.approx(1.0) for one in compare(adapter, adapter).whole)


def test_a_row_of_a_mixed_batch_is_its_solo_row(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    runtime = Runtime(base, Store())
    refs: list[Any] = [None]
    for kind in ("adalora pruned", "loha", "loha wide", "lokr"):
        made_by_peft(tmp_path / kind, base.source.folder, "llama", kind)
        refs.append(runtime.attach(read_adapter(tmp_path / kind)))
    refs += [runtime.attach(one) for one in (build.lora(base, 1), build.ia3(base, 2), build.prompt(base, 3))]
    texts = ragged(len(refs))
    mixed, written = runtime.logits(texts, refs), our_tokens(runtime, texts, refs)
    for i, (text, ref) in enumerate(zip(texts, refs, strict=True)):
        peers.assert_logits_equal([mixed[i]], runtime.logits([text], ref))
        assert written[i] == our_tokens(runtime, [text], [ref])[0]
    runtime.close()


def _cut(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def _cut_across(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:, :-1].contiguous()


def _gone(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors.pop(name)


def _stranger(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"] = torch.ones(2, 32)


def _nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][0, 0] = float("nan")


@pytest.mark.parametrize("spoil", [_cut, _cut_across, _gone, _stranger, _nan])
@pytest.mark.parametrize("kind", ["adalora", "loha", "lokr"])
def test_a_bad_file_is_refused(tiny_base, tmp_path: Path, kind: str, spoil: Any):
    base, store = tiny_base("llama"), Store()
    made_by_peft(tmp_path, base.source.folder, "llama", kind)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    for name in [n for n in sorted(whole) if "layers.0.self_attn.q_proj" in n]:
        tensors = {k: v.clone() for k, v in whole.items()}
        spoil(tensors, name)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        runtime = Runtime(base, store)
        with pytest.raises(AdapterMismatch):
            runtime.load(store.import_(tmp_path, name="mine"))
        assert runtime.resident() == []
        runtime.close()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("adalora", {"use_dora": True}),
        ("adalora", {"rank_pattern": {"a": [1]}}),
        ("adalora", {"lora_bias": True}),
        ("adalora", {"total_step": 0}),
        ("adalora", {"total_step": None}),
        ("loha", {"r": 0}),
        ("loha", {"rank_pattern": {"(a+)+": 2}}),
        ("lokr", {"decompose_factor": "8"}),
        ("lokr", {"surprise": 1}),
    ],
)
def test_a_bad_configuration_is_refused(tiny_base, tmp_path: Path, kind: str, changes: dict[str, Any]):
    made_by_peft(tmp_path, tiny_base("llama").source.folder, "llama", kind)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(FormatError, match=next(iter(changes))):
        Store().import_(tmp_path, name="mine")


@pytest.mark.parametrize("kind", ["adalora pruned", "loha", "lokr"])
def test_they_merge_as_lora_does(tiny_base, tmp_path: Path, kind: str):
    from adapterhub_lite.workflows.merge import merge

    base, store = tiny_base("llama"), Store()
    expected = peers.logits(made_by_peft(tmp_path / "in", base.source.folder, "llama", kind))
    receive(tmp_path / "in", "mine", store=store, base=str(base.source.folder))
    merge("mine", tmp_path / "out", store=store, base=base)
    peers.assert_logits_equal(peers.logits(peers.plain(tmp_path / "out", "CAUSAL_LM")), expected, 1e-4)


@pytest.mark.parametrize("kind", ["adalora", "loha", "lokr"])
def test_a_file_with_a_gap_is_not_stored(tiny_base, tmp_path: Path, kind: str):
    made_by_peft(tmp_path, tiny_base("llama").source.folder, "llama", kind)
    whole, store = load_file(tmp_path / "adapter_model.safetensors"), Store()
    for name in [n for n in sorted(whole) if "layers.0.self_attn.q_proj" in n]:
        tensors = {k: v.clone() for k, v in whole.items() if k != name}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterMismatch, match="issing"):
            store.import_(tmp_path, name="mine")
    assert store.list() == []


@pytest.mark.parametrize("kind", ["adalora", "loha", "lokr"])
def test_a_module_too_few_is_refused(tiny_base, tmp_path: Path, kind: str):
    base = tiny_base("llama")
    made_by_peft(tmp_path, base.source.folder, "llama", kind)
    adapter, runtime = read_adapter(tmp_path), Runtime(base, Store())
    for name in [n for n in adapter.tensors if "layers.0.self_attn.q_proj" in n]:
        adapter.tensors.pop(name)
    with pytest.raises(AdapterMismatch, match="targeted but has no tensors"):
        runtime.attach(adapter)
    runtime.close()


@pytest.mark.parametrize(("kind", "most"), [("adalora", 1.0), ("loha", 1.0), ("loha wide", 2.0), ("lokr whole", 2.0)])
def test_a_change_is_not_much_larger_than_its_layer(tiny_base, tmp_path: Path, kind: str, most: float):
    base = tiny_base("llama")
    made_by_peft(tmp_path, base.source.folder, "llama", kind)
    runtime = Runtime(base, Store())
    for module, site in runtime.fitted(runtime.attach(read_adapter(tmp_path))).sites.items():
        layer: Any = module
        assert site.down.numel() + site.up.numel() <= most * layer.weight.numel()
    runtime.close()
