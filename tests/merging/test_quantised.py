"""Merged checkpoints in NF4 and int8: bitsandbytes' own bytes, loaded by plain transformers, made layer by layer."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.bases.quantization import quantization_config
from adapterhub_lite.errors import AdapterMismatch, Unsupported
from adapterhub_lite.merging.checkpoint import Checkpoint, Planned
from adapterhub_lite.merging.inputs import Inputs
from adapterhub_lite.merging.merge import staged_merge
from adapterhub_lite.merging.plan import plan_merge
from adapterhub_lite.merging.quantised import linear_layers, quantised_plan
from tests import peers, tiny

KINDS = ("nf4", "int8")
WIDE = {"hidden_size": 64, "intermediate_size": 128}
CASES = [
    ("llama", "CAUSAL_LM", {}),
    ("llama", "SEQ_CLS", {}),
    ("llama", "CAUSAL_LM", {"tie_word_embeddings": True}),
    ("gpt2", "CAUSAL_LM", {}),
    ("bert", "SEQ_CLS", {}),
    ("roberta", "SEQ_CLS", {}),
    ("t5", "SEQ_2_SEQ_LM", {}),
]


@pytest.fixture(scope="session")
def wide_folder(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, **changes) -> the folder of a checkpoint whose layers are whole blocks wide."""
    made: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        if family not in ("gpt2", "t5"):
            return tiny_folder(family, **{**WIDE, **changes})
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            _wide(family).save_pretrained(made[family])
            tiny.tokenizer(tiny.kind_of(family)).save_pretrained(made[family])
        return made[family]

    return folder


def _wide(family: str) -> Any:
    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        made: Any = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, **ids))
    else:
        sizes = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16}
        made = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **ids))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
    return made.eval()


def coupled(width: int, seed: int = 0, tokens: int = 300) -> torch.Tensor:
    """Inputs that hang together [tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn((8, width), generator=generator)
    few = torch.randn((tokens, 8), generator=generator) @ mix
    return few + 0.3 * torch.randn((tokens, width), generator=generator)


def merge_plan(tmp_path: Path, folder: Path, family: str, task: str, dtype: str = "float32", kind: str = "lora") -> Any:
    """The plan of a merge with a random LoRA."""
    model = peers.wrap(peers.plain(folder, task), peers.config(family, kind, task))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "peft", name="mine")
    options: dict[str, Any] = {"quantization": "none", "bake": "original", "dtype": dtype, "labels": None}
    return plan_merge(adapter, Checkpoint.open(folder), **options)


def written(plan: Any, base: Path, out: Path) -> Path:
    with staged_merge(plan, base, out):
        pass
    return out


def loaded(folder: Path, task: str, **options: Any) -> Any:
    """Plain transformers, told nothing of quantisation; bitsandbytes' packed path rounds to bfloat16, so it is off."""
    made = peers._AUTO[task].from_pretrained(folder, **options).eval()
    for module in made.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return made


def dequantised(module: Any) -> torch.Tensor:
    """bitsandbytes' own."""
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, scale)


def quantised_modules(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)}


def dense_twin(folder: Path, merged: Path, task: str) -> Any:
    """The merged model in float32 whose quantised layers are replaced by what bitsandbytes makes of them."""
    twin = peers.plain(merged, task)
    stored = quantised_modules(loaded(folder, task, dtype=torch.float32))
    for name, module in twin.named_modules():
        if name in stored:
            dense = dequantised(stored[name]).float()
            module.weight.data = dense.T.contiguous() if type(module).__name__ == "Conv1D" else dense
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "task", "changes"), CASES)
def test_plain_transformers_loads_what_was_meant(tmp_path, wide_folder, family, task, changes, kind):
    base = wide_folder(family, **changes)
    plan = merge_plan(tmp_path, base, family, task)
    merged, out = written(plan, base, tmp_path / "merged"), tmp_path / "out"
    quantised = quantised_plan(plan, kind)
    written(quantised, base, out)
    model = loaded(out, task, dtype=torch.float32)
    modules = quantised_modules(model)
    assert set(modules) == set(quantised.layers) == set(quantised.roundings)
    original = dict(peers.plain(merged, task).named_modules())
    stems = {name: layer.source.name.removesuffix("weight") for name, layer in quantised.layers.items()}
    files = load_file(out / "model.safetensors")
    for name, module in modules.items():
        parts = {k.removeprefix(stems[name]): t for k, t in files.items() if k.startswith(f"{stems[name]}")}
        parts = {k: t for k, t in parts.items() if k in quantised.layers[name].form.layout((1, 64), torch.float32)}
        assert torch.equal(dequantised(module).float(), quantised.layers[name].form.dense(parts)), name
        weight = original[name].weight.T if type(original[name]).__name__ == "Conv1D" else original[name].weight
        error = float((dequantised(module).float() - weight.detach()).norm() / weight.detach().norm())
        assert error == pytest.approx(quantised.roundings[name].error, rel=1e-4)
        assert error < (0.2 if kind == "nf4" else 0.02)  # of single weights it is more where outputs are kept
    rest = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in modules}
    for name, parameter in rest.items():
        assert torch.equal(parameter, dict(peers.plain(merged, task).named_parameters())[name]), name
    found, expected = peers.logits(model), peers.logits(dense_twin(out, merged, task))
    if kind == "nf4":
        peers.assert_logits_equal(found, expected)
    else:  # bitsandbytes rounds what an int8 layer reads as well
        peers.assert_logits_equal(found, expected, relative=0.2)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found, peers.logits(peers.plain(merged, task)), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "task", "changes"), CASES[:5])
def test_without_a_search_the_bytes_are_those_that_transformers_writes(
    tmp_path, wide_folder, family, task, changes, kind
):
    base = wide_folder(family, **changes)
    plan = merge_plan(tmp_path, base, family, task)
    merged = written(plan, base, tmp_path / "merged")
    if kind == "int8":  # bitsandbytes rounds to float16 first, so that is what it is given
        rounded = peers.plain(merged, task)
        rounded.half().float().save_pretrained(merged)
        halved = load_file(merged / "model.safetensors")
        plan = replace(plan, shards={f: [_fixed(p, halved) for p in shard] for f, shard in plan.shards.items()})
    out = written(quantised_plan(plan, kind, search=False), base, tmp_path / "out")
    config = quantised_plan(plan, kind).config["quantization_config"]
    said = quantization_config(kind, torch.float32, config["llm_int8_skip_modules"])
    model = peers._AUTO[task].from_pretrained(merged, quantization_config=said, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(out / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    tied = {"lm_head.weight"} if changes.get("tie_word_embeddings") else set()
    assert set(ours) - tied == set(theirs) - tied
    for name in set(theirs) & set(ours):
        if ".quant_state." in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(theirs[name].tolist())), name
        else:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name]), name
    theirs_said = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert {k: v for k, v in theirs_said.items() if v != config.get(k)} == {}


def _fixed(planned: Planned, tensors: dict[str, torch.Tensor]) -> Planned:
    if planned.name not in tensors:
        return planned
    return replace(planned, make=lambda: tensors[planned.name], source=None, edit=None)


def test_scales_quantised_twice_are_read_as_they_were_meant(tmp_path, tiny_folder):
    base = tiny_folder("llama", **WIDE)
    plan = merge_plan(tmp_path, base, "llama", "CAUSAL_LM", "bfloat16")
    quantised = quantised_plan(plan, "nf4", double_quant=True)
    merged, out = written(plan, base, tmp_path / "merged"), written(quantised, base, tmp_path / "out")
    once = quantised_plan(plan, "nf4")
    written(once, base, tmp_path / "once")
    for name, module in quantised_modules(loaded(out, "CAUSAL_LM")).items():
        assert module.weight.quant_state.nested
        assert module.weight.quant_state.dtype == torch.bfloat16
        weight = peers.plain(merged, "CAUSAL_LM").get_submodule(name).weight
        error = float((dequantised(module).float() - weight.detach()).norm() / weight.detach().norm())
        assert error == pytest.approx(quantised.roundings[name].error, rel=1e-2)
        assert error < 1.05 * once.roundings[name].error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_folder_computes_in_the_dtype_of_its_other_tensors(tmp_path, tiny_folder, dtype):
    base = tiny_folder("llama", **WIDE)
    out = written(
        quantised_plan(merge_plan(tmp_path, base, "llama", "CAUSAL_LM", dtype), "nf4"), base, tmp_path / "out"
    )
    model = loaded(out, "CAUSAL_LM")
    assert model.dtype == getattr(torch, dtype)
    first = next(iter(quantised_modules(model).values()))
    assert first.compute_dtype == first.weight.quant_state.dtype == getattr(torch, dtype)


def test_a_sharded_checkpoint_stays_sharded_and_is_the_same(tmp_path, tiny_folder):
    whole = tiny_folder("llama", **WIDE)
    sharded = tmp_path / "sharded"
    tiny.model("llama", **WIDE).save_pretrained(sharded, max_shard_size="150KB")
    tiny.tokenizer().save_pretrained(sharded)
    one = written(
        quantised_plan(merge_plan(tmp_path / "a", whole, "llama", "CAUSAL_LM"), "nf4"), whole, tmp_path / "one"
    )
    plan = quantised_plan(merge_plan(tmp_path / "b", sharded, "llama", "CAUSAL_LM"), "nf4")
    many = written(plan, sharded, tmp_path / "many")
    assert len(plan.shards) > 1
    peers.assert_logits_equal(
        peers.logits(loaded(many, "CAUSAL_LM")), peers.logits(loaded(one, "CAUSAL_LM")), relative=0.0
    )


def test_one_layer_is_in_memory_at_a_time_and_made_once(tmp_path, tiny_folder):
    base = tiny_folder("llama", **WIDE)
    plan = merge_plan(tmp_path, base, "llama", "CAUSAL_LM")
    alive: set[str] = set()
    count: dict[str, int] = {}
    most = 0

    def watched(planned: Planned) -> Planned:
        def make() -> torch.Tensor:
            nonlocal most
            made = planned.make().clone()
            alive.add(planned.name)
            weakref.finalize(made.untyped_storage(), alive.discard, planned.name)
            count[planned.name] = count.get(planned.name, 0) + 1
            most = max(most, len(alive))
            return made

        return replace(planned, make=make)

    watching = replace(plan, shards={f: [watched(p) for p in shard] for f, shard in plan.shards.items()})
    quantised = quantised_plan(watching, "nf4")
    written(quantised, base, tmp_path / "out")
    assert most <= 2  # the next is made while the writer still names the one before
    assert set(count.values()) == {1}
    assert all(not layer._parts for layer in quantised.layers.values())


def test_parts_may_be_taken_in_any_order_and_again(tmp_path, tiny_folder):
    base = tiny_folder("llama", **WIDE)
    plan = quantised_plan(merge_plan(tmp_path, base, "llama", "CAUSAL_LM"), "nf4")
    shard = next(iter(plan.shards.values()))
    first = {p.name: p.make() for p in shard}
    again = {p.name: p.make() for p in reversed(shard)}
    assert all(torch.equal(first[name], again[name]) for name in first)
    for planned in shard:
        assert (first[planned.name].dtype, tuple(first[planned.name].shape)) == (planned.dtype, planned.shape)


def test_what_cannot_be_quantised_is_refused(tmp_path, tiny_folder):
    base = tiny_folder("llama", **WIDE)
    plan = merge_plan(tmp_path, base, "llama", "CAUSAL_LM")
    with pytest.raises(Unsupported, match="way to quantise"):
        quantised_plan(plan, "fp4")
    with pytest.raises(Unsupported, match="quantised twice"):
        quantised_plan(plan, "int8", double_quant=True)
    with pytest.raises(Unsupported, match="no model class"):
        quantised_plan(replace(plan, config={**plan.config, "architectures": ["Path"]}), "nf4")
    (file, shard), *_ = plan.shards.items()
    renamed = [replace(p, name=p.name.replace("q_proj", "query")) for p in shard]
    with pytest.raises(Unsupported, match="has no tensor"):
        quantised_plan(replace(plan, shards={file: renamed}), "nf4")
    broken = [
        replace(p, make=lambda p=p: torch.full(p.shape, float("nan"))) if "down_proj" in p.name else p for p in shard
    ]
    with pytest.raises(AdapterMismatch, match="down_proj"):
        written(quantised_plan(replace(plan, shards={file: broken}), "nf4"), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_whose_rows_are_no_whole_blocks_stay_as_they_are(tmp_path, tiny_folder):
    """bitsandbytes reads them wrongly on a CPU with AVX-512; int8 has no blocks."""
    base = tiny_folder("llama", hidden_size=64, intermediate_size=80)
    plan = merge_plan(tmp_path, base, "llama", "CAUSAL_LM")
    quantised = quantised_plan(plan, "nf4")
    out = written(quantised, base, tmp_path / "out")
    model = loaded(out, "CAUSAL_LM", dtype=torch.float32)
    assert set(quantised_modules(model)) == set(quantised.layers)
    assert len(quantised.layers) == 12
    assert not any("down_proj" in name for name in quantised.layers)
    assert any("2 layers" in note and "down_proj" in note for note in quantised.notes)
    merged = peers.plain(written(plan, base, tmp_path / "merged"), "CAUSAL_LM")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(model.get_submodule(name).weight, merged.get_submodule(name).weight)
    peers.assert_logits_equal(peers.logits(model), peers.logits(dense_twin(out, tmp_path / "merged", "CAUSAL_LM")))
    assert len(quantised_plan(plan, "int8").layers) == 14
    small = tiny_folder("llama", intermediate_size=48)
    with pytest.raises(Unsupported, match="no linear layer"):
        quantised_plan(merge_plan(tmp_path / "small", small, "llama", "CAUSAL_LM"), "nf4")


def test_an_output_layer_is_known_by_what_the_model_says():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lm_head, self.score = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 2)

    assert linear_layers(Odd(), ["lm_head", "score"]) == {"inner": False}


def test_a_plan_has_an_identity_of_its_own(tmp_path, wide_folder):
    plan = merge_plan(tmp_path, wide_folder("llama"), "llama", "CAUSAL_LM")
    inputs, others = Inputs(64), Inputs(64)
    inputs.add(coupled(64))
    others.add(coupled(64, seed=1))
    name = "model.layers.0.self_attn.q_proj"
    ways: list[dict[str, Any]] = [
        {}, {"search": False}, {"residual_rank": 2}, {"residual_rank": 3}, {"double_quant": True},
        {"inputs": {name: inputs}}, {"inputs": {name: others}},
    ]  # fmt: skip
    found = [quantised_plan(plan, "nf4", **way).identity for way in ways]
    found += [plan.identity, quantised_plan(plan, "int8").identity]
    assert len(set(found)) == len(found)
    assert quantised_plan(plan, "nf4", inputs={name: inputs}).identity == found[5]
