"""What we train and export, plain PEFT loads onto plain transformers, and gives the logits that ours gives."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.train import train
from tests import peers, tiny
from tests.training import recipes

LORA = {"type": "lora", "rank": 4, "alpha": 8}
ADAPTERS = {
    "lora": LORA,
    "patterns": {**LORA, "rslora": True},
    "dora": {"type": "dora", "rank": 4, "alpha": 8},
    "prefix": {"type": "prefix", "tokens": 5},
    "random": {"type": "prefix", "tokens": 5, "init": "random"},
    "projection": {"type": "prefix", "tokens": 5, "projection": True},
}
PATTERNS = {
    "llama": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    "gpt2": {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"mlp.c_proj": 3}},
    "bert": {"rank_pattern": {"query": 2}, "alpha_pattern": {"intermediate.dense": 3}},
    "roberta": {"rank_pattern": {"query": 2}, "alpha_pattern": {"intermediate.dense": 3}},
    "t5": {"rank_pattern": {"SelfAttention.q": 2}, "alpha_pattern": {"wo": 3}},
}


def peft_of(folder: Path, base, labels: int = 3):
    task = peers.task_type(base.config.model_type)
    return peft.PeftModel.from_pretrained(peers.plain(base.source.folder, task, labels), folder).eval()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_same_logits(tiny_base, tmp_path: Path, recwarn, family: str, kind: str):
    base, store = tiny_base(family), Store()
    before = base.live_digest()
    adapter = {**ADAPTERS[kind], **(PATTERNS[family] if kind == "patterns" else {})}
    path = recipes.write(tmp_path, base, adapter)
    ref = train(path, store=store, base=base)
    assert base.live_digest() == before
    assert not base.model.training
    folder = store.export(ref, tmp_path / "out")
    recwarn.clear()
    wrapped = peft_of(folder, base)
    told = [
        str(w.message) for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()
    ]
    assert told == []
    runtime = Runtime(base, store)
    answers = peers.ANSWERS if base.kind == "seq2seq" else None
    found = runtime.logits(peers.ROWS, ref, answers)
    peers.assert_logits_equal(found, peers.logits(wrapped))
    if base.kind != "encoder":
        bare = runtime.logits(peers.ROWS, None, answers)
        assert float((found[0] - bare[0]).abs().max()) > 1e-3, "the trained adapter does nothing"
    card = store.card(ref)
    assert card.base["fingerprint"]["digest"] == base.fingerprint.digest
    assert "test" in card.metrics
    assert store.verify() == []
    assert store.import_(folder, "again").version == 1


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("llama", ["layers.1.self_attn.v_proj"]),
        ("llama", "all-linear"),
        ("gpt2", ["c_proj"]),
        ("gpt2", ["attn.c_proj"]),
        ("bert", ["dense"]),
        ("bert", ["query", "output.dense"]),
        ("roberta", "all-linear"),
        ("roberta", ["dense"]),
        ("roberta", ["attention.output.dense"]),
        ("t5", ["q", "wo"]),
        ("t5", ["SelfAttention.q"]),
    ],
)
def test_peft_adapts_exactly_the_modules_that_were_trained(tiny_base, tmp_path: Path, family: str, targets):
    """A suffix such as `dense` names RoBERTa's head too, where it would be adapted besides."""
    base, store = tiny_base(family), Store()
    path = recipes.write(tmp_path, base, {**LORA, "targets": targets}, {"max_steps": 2})
    ref = train(path, store=store, base=base)
    folder = store.export(ref, tmp_path / "out")
    ours = {
        k.removeprefix("base_model.model.").partition(".lora_")[0]
        for k in load_file(folder / "adapter_model.safetensors")
        if ".lora_" in k
    }
    wrapped = peft_of(folder, base)
    theirs = {
        n.removeprefix("base_model.model.")
        for n, m in wrapped.named_modules()
        if hasattr(m, "lora_A") and len(m.lora_A)
    }
    assert ours == theirs
    heads = ("classifier", "lm_head")
    linear = {
        n
        for n, m in peers.plain(base.source.folder, peers.task_type(family)).named_modules()
        if (isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D") and not n.startswith(heads)
    }
    wanted = [targets] if isinstance(targets, str) else targets
    expected = (
        linear if targets == "all-linear" else {n for n in linear if any(n == t or n.endswith(f".{t}") for t in wanted)}
    )
    assert ours == expected
    answers = peers.ANSWERS if base.kind == "seq2seq" else None
    peers.assert_logits_equal(Runtime(base, store).logits(peers.ROWS, ref, answers), peers.logits(wrapped))


def test_the_exported_configuration_holds_only_what_peft_knows(tiny_base, tmp_path: Path):
    base, store = tiny_base("llama"), Store()
    ref = train(recipes.write(tmp_path, base, LORA, {"max_steps": 1}), store=store, base=base)
    raw = json.loads((store.export(ref, tmp_path / "out") / "adapter_config.json").read_text())
    assert set(raw) <= {*peft.LoraConfig().to_dict(), "auto_mapping", "peft_type"}
