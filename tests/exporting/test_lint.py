"""What each reader is said to make of a version: every rule seen to fire, and every refusal with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.exporting.findings import Finding, refusals
from adapterhub_lite.exporting.lint import _DONE
from adapterhub_lite.exporting.prepare import prepare
from adapterhub_lite.exporting.readers import READERS, as_cut, reader_named
from adapterhub_lite.exporting.traits import TRAITS, Asked
from adapterhub_lite.formats.specs import LoraSpec
from tests import peers
from tests.exporting import build

PLAIN = [name for name, reader in READERS.items() if reader.plain]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def base(family: str, **changes: Any) -> Path:
        key = f"{family}{changes}"
        if key not in made:
            made[key] = build.save_base(family, tmp_path_factory.mktemp(family), **changes)
        return made[key]

    return base


def rules(findings: list[Finding]) -> dict[str, str]:
    """rule -> remedy, without advice."""
    return {one.rule: one.remedy for one in findings if one.rule != "advice"}


def test_every_rule_has_a_trait_a_remedy_and_a_reader():
    said = {rule for reader in READERS.values() for rule in (*reader.says, *as_cut(reader).says)}
    assert said == set(TRAITS) == set(_DONE)
    assert all(reader.advice for reader in READERS.values())
    assert list(READERS) == ["peft", "vllm", "sglang", "lorax", "llama.cpp", "ollama"]


def test_an_unknown_reader_is_named():
    with pytest.raises(Unsupported, match=r"'vlm' is no reader.*peft, vllm, sglang"):
        reader_named("vlm")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kind", ["prefix", "prompt", "VERA"])
def test_what_changes_no_weight_is_refused(bases, tmp_path, name, kind):
    folder = tmp_path / "in"
    model = peers.plain(bases("llama"), "CAUSAL_LM")
    if kind == "VERA":
        settings = peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    elif kind == "prompt":
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        settings = peers.config("llama", "prefix", "CAUSAL_LM")
    peers.wrap(model, settings).save_pretrained(folder)
    adapter = read_adapter(folder)
    found = refusals(prepare(adapter, READERS[name], Asked(base_name="b"), base=None).findings)
    assert "method" in {one.rule for one in found}
    assert {"prefix": "a prefix: keys", "prompt": "a prompt: virtual", "VERA": "VERA"}[kind] in found[0].what
    whole = prepare(adapter, READERS["peft"], Asked())
    assert whole.adapter is not None
    assert whole.adapter.tensors.keys() == adapter.tensors.keys()
    assert "method" in {one.rule for one in refusals(prepare(adapter, READERS["peft"], Asked(rank=2)).findings)}


@pytest.mark.parametrize("name", [*PLAIN, "peft"])
def test_biases(bases, tmp_path, name):
    made = build.make(bases("llama"), "llama", "bias", tmp_path / "in")
    found = made.prepare(name, base_name="b")
    if name == "peft":
        assert rules(found.findings)["lora_bias"] == "told"
        assert rules(made.prepare(name, rank=2).findings)["lora_bias"] == "refused"
    else:
        assert rules(found.findings)["lora_bias"] == "refused"
        assert found.adapter is None


@pytest.mark.parametrize("name", [*PLAIN, "peft"])
def test_heads(bases, tmp_path, name):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", task="SEQ_CLS", modules_to_save=["score"])
    found = made.prepare(name, base_name="b")
    kept = name in ("vllm", "peft")
    assert rules(found.findings)["head"] == ("told" if kept else "refused")
    if kept:
        assert found.adapter is not None
        assert "score" in found.adapter.spec.modules_to_save
        assert "base_model.model.score.weight" in found.adapter.tensors


def test_a_head_of_two_layers_is_none_that_vllm_loads(bases, tmp_path):
    made = build.make(bases("roberta"), "roberta", "lora", tmp_path / "in")
    assert rules(made.prepare("vllm").findings)["head"] == "refused"


def test_vllms_largest_rank(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", r=24)
    refused = refusals(made.prepare("vllm").findings)
    assert [one.rule for one in refused] == ["rank_limit"]
    assert "rank 24" in refused[0].what
    assert "--rank 16" in refused[0].done
    assert "--max-rank" in refused[0].done
    assert made.prepare("vllm", max_rank=32).adapter is not None
    cut = made.prepare("vllm", rank=16)
    assert rules(cut.findings)["rank_limit"] == "svd"
    error = next(one.error for one in cut.findings if one.rule == "rank_limit")
    assert error is not None
    assert 0 < error < 1
    assert cut.adapter is not None
    assert cut.adapter.spec.rank == 16
    given = refusals(made.prepare("vllm", max_rank=8).findings)[0]
    assert given.what == "rank 24 is above your --max-rank 8."
    assert "--max-rank 32" in given.done
    assert "--rank 8" in given.done
    with pytest.raises(Unsupported, match="no largest rank of 24"):
        made.prepare("vllm", max_rank=24)
    with pytest.raises(Unsupported, match="takes ranks up to 16, not 20"):
        made.prepare("vllm", rank=20)


def test_a_rank_between_kernels_is_padded(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", r=20)
    found = made.prepare("lorax")
    assert rules(found.findings)["padded_rank"] == "rewritten"
    assert found.adapter is not None
    assert found.adapter.spec.rank == 32
    assert [READERS["lorax"].padded(r) for r in (1, 16, 17, 128, 129, 200)] == [16, 16, 32, 128, 256, 256]
    assert READERS["vllm"].padded(7) == 7


def test_a_largest_rank_below_every_kernel_has_no_cut_that_helps(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", r=2)
    found = refusals(made.prepare("lorax", max_rank=8).findings)[0]
    assert found.what == "rank 2, padded to 16, is above your --max-rank 8."
    assert "--max-rank 16" in found.done
    assert "--rank 8" not in found.done
    large = build.make(bases("llama"), "llama", "lora", tmp_path / "large", r=16, rank_pattern={"q_proj": 130})
    found = refusals(large.prepare("lorax", max_rank=64).findings)[0]
    assert "--max-rank" not in found.done  # it has no kernels for more than 128
    assert "--rank 64" in found.done


def test_without_its_base(bases, tmp_path):
    dora = build.make(bases("llama"), "llama", "dora", tmp_path / "dora")
    found = dora.prepare("vllm", base=False)
    assert rules(refusals(found.findings)) == {"dora": "refused"}
    assert "--base" in refusals(found.findings)[0].done
    half = build.make(bases("llama"), "llama", "lora", tmp_path / "half", target_modules=["q_proj"])
    assert rules(half.prepare("sglang", base=False).findings)["siblings"] == "refused"
    assert rules(half.prepare("lorax", base=False).findings)["layers"] == "told"
    assert rules(half.prepare("llama.cpp", base=False).findings)["architecture"] == "refused"
    ragged = build.make(
        bases("llama"), "llama", "lora", tmp_path / "ragged", target_modules=["layers.0.self_attn.q_proj", "k_proj"]
    )
    assert rules(ragged.prepare("lorax", base=False).findings)["layers"] == "refused"
    assert half.prepare("vllm", base=False).adapter is not None


def test_another_base(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in")
    other = build.Made(bases("gpt2"), "gpt2", "CAUSAL_LM", made.folder, made.logits, made.bare)
    for name in PLAIN:
        assert rules(other.prepare(name, base_name="b").findings)["module"] == "refused"
    wider = build.Made(bases("llama", intermediate_size=96), "llama", "CAUSAL_LM", made.folder, made.logits, made.bare)
    found = refusals(wider.prepare("vllm").findings)
    assert [one.rule for one in found] == ["module"]
    assert "of another shape" in found[0].what


def test_an_output_layer_that_is_the_embedding(bases, tmp_path):
    tied = bases("llama", tie_word_embeddings=True)
    made = build.make(tied, "llama", "lora", tmp_path / "in", target_modules=["q_proj", "lm_head"])
    assert rules(made.prepare("llama.cpp").findings)["tied_output"] == "refused"
    assert made.prepare("vllm").adapter is not None
    free = build.make(bases("llama"), "llama", "lora", tmp_path / "free", target_modules=["q_proj", "lm_head"])
    assert "tied_output" not in rules(free.prepare("llama.cpp").findings)


def test_an_embedding(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", target_modules=["q_proj", "embed_tokens"])
    assert rules(made.prepare("lorax").findings)["embedding"] == "refused"
    found = made.prepare("vllm")
    assert rules(found.findings)["embedding"] == "told"
    assert found.adapter is not None
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in found.adapter.tensors


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_embedding_keeps_its_change_when_scales_are_folded(bases, tmp_path, name):
    targets = ["q_proj", "v_proj", "embed_tokens"]
    made = build.make(
        bases("llama"), "llama", "rslora", tmp_path / "in", target_modules=targets, alpha_pattern={"embed_tokens": 3}
    )
    folder = build.write(made, name, tmp_path / "out")
    assert build.near(build.by_peft(made, folder), made.logits) < 1e-5


def test_architectures_without_gguf_files(bases, tmp_path):
    made = build.make(bases("bert"), "bert", "lora", tmp_path / "in")
    found = made.prepare("llama.cpp")
    assert rules(found.findings)["architecture"] == "refused"
    assert "bert" in next(one.what for one in found.findings if one.rule == "architecture")


def test_a_gpt2_base_is_remarked_on(bases, tmp_path):
    made = build.make(bases("gpt2"), "gpt2", "lora", tmp_path / "in")
    assert rules(made.prepare("vllm").findings)["conv1d"] == "told"
    found = made.prepare("sglang").adapter
    assert found is not None
    assert isinstance(found.spec, LoraSpec)
    assert found.spec.fan_in_fan_out


def test_an_ia3_adapter_that_moves_biases_is_refused(bases, tmp_path):
    made = build.make(bases("bert"), "bert", "ia3", tmp_path / "in")
    assert rules(made.prepare("vllm").findings)["lora_bias"] == "refused"


@pytest.mark.parametrize(
    ("name", "stored", "remedy", "says"),
    [
        ("org/base", "org/base", None, ""),
        ("org/base", "elsewhere", "rewritten", "written as org/base"),
        (None, None, "told", "--base-name NAME"),
        ("/home/me/base", "/home/me/base", "told", "--base-name NAME"),
    ],
)
def test_the_bases_name_for_vllms_resolver(name, stored, remedy, says):
    pairs = {
        "base_model.model.q_proj.lora_A.weight": torch.ones(2, 4),
        "base_model.model.q_proj.lora_B.weight": torch.ones(4, 2),
    }
    adapter = Adapter(LoraSpec(2, 2.0, ("q_proj",), base_model=stored), pairs)
    found = prepare(adapter, READERS["vllm"], Asked(), base_name=name)
    one = next((one for one in found.findings if one.rule == "base_name"), None)
    assert (one.remedy if one else None) == remedy
    assert says in (one.done if one else "")
    assert found.adapter is not None
    assert found.adapter.spec.base_model == name


def test_a_path_that_the_user_names_is_meant(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in")
    found = made.prepare("vllm", base_name="/models/base")
    assert rules(found.findings)["base_name"] == "rewritten"


def test_ollama_must_be_told_what_it_calls_the_base(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in")
    assert rules(refusals(made.prepare("ollama").findings)) == {"base_name": "refused"}
    assert made.prepare("ollama", base_name="llama3.2:1b").adapter is not None


def test_a_plain_version_has_nothing_but_advice(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in")
    config = made.folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(made.base), "org/base"))
    for name in ("peft", "vllm", "sglang", "llama.cpp"):
        assert rules(made.prepare(name).findings) == {}
