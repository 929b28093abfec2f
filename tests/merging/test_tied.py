"""Models whose output layer and embeddings are one tensor: adapters that change one, and checkpoints with two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.merging.report import Thresholds
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.merge import merge
from tests import peers, tiny
from tests.merging.build import peft_folder, stored

SIZES = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EMBEDDINGS = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte", "opt": "embed_tokens"}
# Relative to the largest logit; of 4 and 8 bits by the merge's own thresholds alone.
CLOSE = {"auto": 1e-5, "bfloat16": 3e-2, "gguf-f16": 1e-2}


def tied(family: str, folder: Path) -> Path:
    """A tiny model that is tied."""
    if family == "llama":
        return tiny.save("llama", folder, tie_word_embeddings=True)
    if family == "gpt2":
        return tiny.save("gpt2", folder)
    torch.manual_seed(0)
    more = {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = (
        Qwen2ForCausalLM(Qwen2Config(**SIZES, **more))
        if family == "qwen2"
        else OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32))
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def two_tensors(folder: Path) -> Path:
    """Store another output layer in a checkpoint whose configuration says tied."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 0.3 - tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def output_alone(folder: Path) -> Path:
    """Store the one tensor of a tied pair under the output layer's name; transformers fills the embeddings from it."""
    tensors = load_file(folder / "model.safetensors")
    own = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors.pop(own)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def put(tmp_path: Path, folder: Path, targets: list[str]):
    """(store, reference, PEFT's logits) of an adapter on these layers."""
    store = Store(tmp_path / "store")
    model = peft_folder(tmp_path / "peft", folder, "llama", target_modules=targets, task="CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ref = stored(store, "mine", tmp_path / "peft", load_base(str(folder), device="cpu"), None, tmp_path / "data")
    return store, ref, peers.logits(model)


def plain(out: Path):
    if (out / "model.gguf").is_file():
        return AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).eval()
    return peers.plain(out, "CAUSAL_LM")


def distance(out: Path, expected: list[torch.Tensor]) -> float:
    found = peers.logits(plain(out))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("which", ["output", "embeddings", "both"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_an_adapter_on_one_of_the_two_gives_pefts_logits(tmp_path, family, which):
    folder = tied(family, tmp_path / "base")
    targets = {"output": ["lm_head"], "embeddings": [EMBEDDINGS[family]], "both": ["lm_head", EMBEDDINGS[family]]}
    store, ref, expected = put(tmp_path, folder, targets[which])
    report = merge(ref, tmp_path / "out", store=store)
    assert distance(tmp_path / "out", expected) < 1e-5
    assert report.difference is not None
    assert report.difference.mean_kl < 1e-6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    merge(ref, tmp_path / "weights", store=store, verify="weights")


@pytest.mark.parametrize("which", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("to", ["bfloat16", "nf4", "int8", "gguf-f16"])
def test_in_every_form(tmp_path, to, which):
    store, ref, expected = put(tmp_path, tied("llama", tmp_path / "base"), [which])
    for verify in ("full", "weights"):
        out = tmp_path / verify
        assert merge(ref, out, store=store, to=to, verify=verify).passed
        assert distance(out, expected) < CLOSE.get(to, 1.0)


def test_dora_on_a_tied_output_layer(tmp_path):
    folder, store = tied("llama", tmp_path / "base"), Store(tmp_path / "store")
    model = peft_folder(tmp_path / "peft", folder, "llama", "dora", target_modules=["lm_head"])
    ref = stored(store, "mine", tmp_path / "peft", load_base(str(folder), device="cpu"), None, tmp_path / "data")
    merge(ref, tmp_path / "out", store=store)
    assert distance(tmp_path / "out", peers.logits(model)) < 1e-5


def test_an_encoder_decoder_has_no_form_of_two(tmp_path):
    store = Store(tmp_path / "store")
    folder = tiny.save("t5", tmp_path / "base")
    peft_folder(tmp_path / "peft", folder, "t5", target_modules=["lm_head"])
    ref = stored(store, "mine", tmp_path / "peft", load_base(str(folder), device="cpu"), None, tmp_path / "data")
    with pytest.raises(Unsupported, match="are one tensor of this model"):
        merge(ref, tmp_path / "out", store=store)


@pytest.mark.parametrize("verify", ["full", "weights"])
@pytest.mark.parametrize("to", ["auto", "gguf-f16"])
@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"], ["embed_tokens"]], ids=lambda targets: targets[0])
def test_two_tensors_where_the_configuration_says_one(tmp_path, targets, to, verify):
    """transformers computes with both; so must what is written."""
    store, ref, expected = put(tmp_path, two_tensors(tied("llama", tmp_path / "base")), targets)
    merge(ref, tmp_path / "out", store=store, to=to, verify=verify)
    assert distance(tmp_path / "out", expected) < CLOSE[to]
    if to == "gguf-f16":
        assert "output.weight" in [tensor.name for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors]


def test_two_equal_tensors_are_tied(tmp_path):
    """As checkpoints that were pickled hold them: a GGUF file of it needs no output layer."""
    folder = tied("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store, ref, expected = put(tmp_path, folder, ["q_proj"])
    merge(ref, tmp_path / "out", store=store, to="gguf-f16")
    assert "output.weight" not in [tensor.name for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors]
    assert distance(tmp_path / "out", expected) < CLOSE["gguf-f16"]


@pytest.mark.parametrize("verify", ["full", "weights"])
@pytest.mark.parametrize("to", ["auto", "bfloat16", "gguf-f16"])
@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"], ["embed_tokens"]], ids=lambda targets: targets[0])
def test_the_pair_stored_as_an_output_layer_alone(tmp_path, targets, to, verify):
    store, ref, expected = put(tmp_path, output_alone(tied("llama", tmp_path / "base")), targets)
    merge(ref, tmp_path / "out", store=store, to=to, verify=verify)
    assert distance(tmp_path / "out", expected) < CLOSE[to]


@pytest.mark.parametrize("target", ["c_attn", "lm_head", "wte"])
def test_the_pair_stored_as_an_output_layer_alone_in_gpt2(tmp_path, target):
    store, ref, expected = put(tmp_path, output_alone(tied("gpt2", tmp_path / "base")), [target])
    coarse = replace(Thresholds.of("nf4"), min_top1=0.5)  # of random weights many tokens are nearly as likely
    assert merge(ref, tmp_path / "out", store=store, to="nf4", thresholds=coarse).passed
    merge(ref, tmp_path / "exact", store=store)
    assert distance(tmp_path / "exact", expected) < CLOSE["auto"]
