"""Plain PEFT reads what the store holds, and the store reads what plain PEFT writes: same logits, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import NoEffect
from adapterhub_lite.store import Store

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(8)[None]
LORA: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.1\.self_attn\.[qk]_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
    "bias": {"target_modules": ["o_proj"], "lora_bias": True},
    "gaussian": {"target_modules": ["down_proj"], "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"},
}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def trained(model: Any) -> Any:
    """Random values in every adapter weight: as after training, nothing is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def check(tmp_path: Path, base: Any, config: Any) -> Store:
    """Save with PEFT, import, load the stored folder with PEFT into a fresh base, compare."""
    model = trained(peft.get_peft_model(base(), config))
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    store = Store(tmp_path / "store")
    folder = store.verified_folder(store.import_(tmp_path / "saved", "tiny"))
    again = peft.PeftModel.from_pretrained(base(), str(folder)).eval()
    assert torch.equal(logits(again), expected)
    assert not torch.equal(logits(base()), expected)
    return store


@pytest.mark.parametrize("name", LORA)
def test_lora(tmp_path: Path, name: str) -> None:
    store = check(tmp_path, llama, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **LORA[name]}))
    assert store.card("tiny").adapter["type"] == ("dora" if name == "dora" else "lora")


def test_classification_head_is_kept(tmp_path: Path) -> None:
    store = check(tmp_path, bert, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]))
    assert store.card("tiny").adapter["tensors"] == 6


@pytest.mark.parametrize("projection", [False, True])
def test_prefix(tmp_path: Path, projection: bool) -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=16
    )
    store = check(tmp_path, llama, config)
    assert store.card("tiny").adapter["tokens"] == 5


def test_prefix_of_a_classifier(tmp_path: Path) -> None:
    check(tmp_path, bert, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))


def test_half_precision(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = trained(peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))).to(dtype)
        model.save_pretrained(tmp_path / str(dtype))
        Store(tmp_path / "store").import_(tmp_path / str(dtype), "half")
    assert Store(tmp_path / "store").verify() == []


def test_an_untrained_adapter_is_refused(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "fresh")
    with pytest.raises(NoEffect):
        Store(tmp_path / "store").import_(tmp_path / "fresh", "fresh")


def test_the_scaling_is_that_of_peft() -> None:
    from adapterhub_lite.formats.peft_config import parse_adapter_config
    from adapterhub_lite.formats.specs import LoraSpec
    from tests.formats.build import lora_config

    changes = {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "lora_alpha": 7,
        "rank_pattern": {r"^model.layers.1.self_attn.q_proj": 3, "v_proj": 5},
        "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 2, "layers.1.self_attn.v_proj$": 9},
    }
    spec = parse_adapter_config(lora_config(**changes))
    assert isinstance(spec, LoraSpec)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, **changes))
    modules = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(modules) == 4
    for name, module in modules.items():
        assert spec.rank_of(name) == module.r["default"]
        assert spec.scaling(name) == module.scaling["default"]
