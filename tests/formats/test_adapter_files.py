from __future__ import annotations

import pytest

from adapterhub_lite.errors import AdapterMismatch, Unsupported
from adapterhub_lite.formats.adapter_files import LoraInventory, PrefixInventory, facts, inventory, with_targets
from adapterhub_lite.formats.safetensors_header import Header, parse_header
from adapterhub_lite.formats.specs import LoraSpec, PrefixSpec
from tests.formats.build import BASE, Tensor, f32, lora_tensors, safetensors

SPEC = LoraSpec(rank=2, alpha=4.0, target_modules=("q_proj",))
PREFIX = PrefixSpec(num_virtual_tokens=3, token_dim=4, num_layers=2, num_attention_heads=2)
Q0 = f"{BASE}model.layers.0.self_attn.q_proj"


def header(tensors: dict[str, Tensor]) -> Header:
    return parse_header(safetensors(tensors))


def changed(added: dict[str, Tensor] | None = None, remove: tuple[str, ...] = ()) -> Header:
    tensors = {name: tensor for name, tensor in lora_tensors().items() if name not in remove}
    return header({**tensors, **(added or {})})


def test_lora() -> None:
    found = inventory(SPEC, changed())
    assert isinstance(found, LoraInventory)
    assert not found.heads
    assert list(found.modules) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    ranks = found.modules["model.layers.0.self_attn.q_proj"]
    assert (ranks.rank, ranks.in_features, ranks.out_features, ranks.kind) == (2, 4, 4, "linear")


def test_embedding_dora_bias_and_head() -> None:
    spec = LoraSpec(rank=2, alpha=1.0, target_modules=("embed", "q_proj"), use_dora=True, modules_to_save=("score",))
    stem = f"{BASE}model.embed"
    extra = {
        f"{stem}.lora_embedding_A": f32(2, 9),
        f"{stem}.lora_embedding_B": f32(4, 2),
        f"{stem}.lora_magnitude_vector": f32(4),
        f"{BASE}score.weight": f32(3, 4),
        f"{BASE}score.dense.bias": f32(3),
        **{f"{BASE}model.layers.{i}.self_attn.q_proj.lora_magnitude_vector": f32(4) for i in range(2)},
    }
    found = inventory(spec, changed(extra))
    assert isinstance(found, LoraInventory)
    assert found.modules["model.embed"].kind == "embedding"
    assert found.modules["model.embed"].in_features == 9
    assert all(ranks.dora for ranks in found.modules.values())
    assert set(found.heads) == {"score.weight", "score.dense.bias"}
    with_bias = LoraSpec(rank=2, alpha=1.0, lora_bias=True)
    biases = {f"{BASE}model.layers.{i}.self_attn.q_proj.lora_B.bias": f32(4) for i in range(2)}
    assert all(ranks.bias for ranks in inventory(with_bias, changed(biases)).modules.values())  # type: ignore[union-attr]


def test_rank_pattern_is_compared() -> None:
    spec = LoraSpec(rank=8, alpha=4.0, rank_pattern={"q_proj": 2})
    assert isinstance(inventory(spec, changed()), LoraInventory)


@pytest.mark.parametrize(
    ("spec", "tensors", "words"),
    [
        (SPEC, changed(remove=(f"{Q0}.lora_B.weight",)), "expected 4 tensors, found 3, missing 1, unexpected 0"),
        (SPEC, changed(remove=(f"{Q0}.lora_A.weight",)), r"Missing: .*layers.0.self_attn.q_proj.lora_A.weight"),
        (SPEC, changed({f"{BASE}extra.weight": f32(1)}), r"unexpected 1\. Unexpected: base_model.model.extra.weight"),
        (
            SPEC,
            changed({f"{BASE}v_proj.lora_A.weight": f32(2, 4), f"{BASE}v_proj.lora_B.weight": f32(4, 2)}),
            "unexpected 2",
        ),
        (SPEC, changed({f"{Q0}.lora_magnitude_vector": f32(4)}), "unexpected 1"),
        (SPEC, changed({f"{Q0}.lora_B.bias": f32(4)}), "unexpected 1"),
        (SPEC, changed({f"{Q0}.base_layer.weight": f32(4, 4)}), "unexpected 1"),
        (SPEC, changed({f"{Q0}.lora_embedding_A": f32(2, 4)}), "unexpected"),
        (LoraSpec(2, 4.0, use_dora=True), changed(), "missing 2"),
        (LoraSpec(2, 4.0, lora_bias=True), changed(), "missing 2"),
        (LoraSpec(4, 4.0), changed(), "has rank 2 in its tensors and 4 in the configuration"),
        (LoraSpec(2, 4.0, target_modules=("proj",)), changed(), "expected 0 tensors, found 4, missing 0, unexpected 4"),
        (LoraSpec(2, 4.0, modules_to_save=("score",)), changed(), "no tensor of them"),
        (SPEC, changed({f"{BASE}score.weight": f32(1)}), "unexpected 1"),
        (SPEC, changed({f"{Q0}.lora_A.weight": f32(3, 4)}), "do not share a rank"),
        (SPEC, changed({f"{Q0}.lora_A.weight": ("I8", [2, 4], bytes(8))}), "dtype I8"),
        (SPEC, header({}), "expected 0 tensors, found 0"),
        (SPEC, header({"q_proj.lora_A.weight": f32(2, 4), "q_proj.lora_B.weight": f32(4, 2)}), "unexpected 2"),
        (PREFIX, header({"prompt_embeddings": f32(3, 8)}), r"prompt_embeddings is \[3, 8\], not \[3, 16\]"),
        (PREFIX, header({}), "missing 1"),
        (PREFIX, header({"prompt_embeddings": f32(3, 16), "x": f32(1)}), "unexpected 1"),
    ],
)
def test_mismatches(spec: LoraSpec | PrefixSpec, tensors: Header, words: str) -> None:
    with pytest.raises(AdapterMismatch, match=words):
        inventory(spec, tensors)


def test_examples_are_three() -> None:
    extra = {f"{BASE}extra{index}.weight": f32(1) for index in range(9)}
    with pytest.raises(AdapterMismatch) as caught:
        inventory(SPEC, changed(extra))
    assert "unexpected 9" in str(caught.value)
    assert str(caught.value).count(".weight") == 3


def test_wrong_magnitude_and_convolution() -> None:
    tensors = {f"{BASE}q.lora_A.weight": f32(2, 4), f"{BASE}q.lora_B.weight": f32(5, 2)}
    with pytest.raises(AdapterMismatch, match=r"q.lora_magnitude_vector is \[4\], not \[5\]"):
        inventory(LoraSpec(2, 1.0, use_dora=True), header({**tensors, f"{BASE}q.lora_magnitude_vector": f32(4)}))
    conv = {f"{BASE}c.lora_A.weight": f32(2, 4, 1, 1), f"{BASE}c.lora_B.weight": f32(5, 2, 1, 1)}
    with pytest.raises(Unsupported, match="convolution"):
        inventory(LoraSpec(2, 1.0), header(conv))


def test_prefix_with_head() -> None:
    spec = PrefixSpec(3, 4, 2, 2, modules_to_save=("classifier", "score"))
    tensors = {"prompt_embeddings": f32(3, 16), "base_model.classifier.weight": f32(2, 4)}
    found = inventory(spec, header(tensors))
    assert isinstance(found, PrefixInventory)
    assert set(found.heads) == {"classifier.weight"}
    assert facts(spec, header(tensors)) == {"type": "prefix", "tokens": 3, "tensors": 2, "parameters": 56, "bytes": 224}


def test_targets_are_spelled_out_only_where_unknown() -> None:
    found = inventory(SPEC, changed())
    unknown = with_targets(LoraSpec(rank=2, alpha=4.0), found)
    assert isinstance(unknown, LoraSpec)
    assert unknown.target_modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert with_targets(SPEC, found) is SPEC
    assert isinstance(inventory(unknown, changed()), LoraInventory)


def test_facts_of_lora() -> None:
    expected = {"type": "lora", "rank": 2, "alpha": 4.0, "tensors": 4, "parameters": 32, "bytes": 128}
    assert facts(SPEC, changed()) == expected
