from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import FormatError, Unsupported
from adapterhub_lite.formats.patterns import first_match, is_pattern
from adapterhub_lite.formats.peft_config import adapter_config, adapter_config_bytes, parse_adapter_config
from adapterhub_lite.formats.specs import Ia3Spec, LoraSpec, PrefixSpec, PromptSpec, Spec

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}
PREFIX = {
    "peft_type": "PREFIX_TUNING",
    "num_virtual_tokens": 5,
    "token_dim": 16,
    "num_layers": 2,
    "num_attention_heads": 4,
}


def parse(raw: dict[str, Any], **changes: Any) -> Spec:
    return parse_adapter_config(json.dumps({**raw, **changes}))


IA3 = {"peft_type": "IA3", "target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "token_dim": 16}
P_TUNING = {**PROMPT, "peft_type": "P_TUNING"}


def test_least_lora() -> None:
    spec = parse(LORA)
    assert spec == LoraSpec(rank=8, alpha=16.0, target_modules=("q_proj", "v_proj"))
    assert parse({"peft_type": "LORA"}) == LoraSpec(rank=8, alpha=8.0)


def test_everything_of_lora() -> None:
    spec = parse(
        LORA,
        rank_pattern={"layers.1.q_proj": 4},
        alpha_pattern={r"layers\.0\.q_proj": 2.5},
        use_rslora=True,
        use_dora=True,
        lora_dropout=0.1,
        fan_in_fan_out=True,
        modules_to_save=["score", "classifier", "score"],
        task_type="SEQ_CLS",
        base_model_name_or_path="../../etc/passwd",
        revision="main",
        auto_mapping={"base_model_class": "os", "parent_library": "subprocess"},
        init_lora_weights="gaussian",
    )
    assert isinstance(spec, LoraSpec)
    assert spec.modules_to_save == ("classifier", "score")
    assert spec.base_model == "../../etc/passwd"
    assert spec.rank_of("model.layers.1.q_proj") == 4
    assert spec.rank_of("model.layers.11.q_proj") == 8
    assert spec.scaling("model.layers.1.q_proj") == 16 / 4**0.5
    assert spec.scaling("model.layers.0.q_proj") == 2.5 / 8**0.5
    assert spec.scaling("model.layers.0.q_proj", rank=4) == 2.5 / 2
    assert replace(spec, use_rslora=False).scaling("x") == 2.0
    assert parse_adapter_config(adapter_config_bytes(spec)) == spec


def test_prefix() -> None:
    spec = parse(
        PREFIX, prefix_projection=True, encoder_hidden_size=7, init_weights="zero", num_transformer_submodules=1
    )
    assert isinstance(spec, PrefixSpec)
    assert spec.shape == (5, 64)
    assert spec.prefix_projection
    assert parse_adapter_config(adapter_config_bytes(spec)) == spec


def test_ia3() -> None:
    spec = parse(IA3, fan_in_fan_out=True, init_ia3_weights=False, modules_to_save=["score"], task_type="SEQ_CLS")
    assert spec == Ia3Spec(("down_proj", "v_proj"), ("down_proj",), True, ("score",), "SEQ_CLS")
    assert spec.targets("layers.0.v_proj")
    assert not spec.targets("layers.0.up_proj")
    assert spec.scales_input("layers.0.mlp.down_proj") is True
    assert spec.scales_input("layers.0.v_proj") is False
    assert spec.scales_input("layers.0.updown_proj") is True, "PEFT looks at the end of the name alone"
    assert parse_adapter_config(adapter_config_bytes(spec)) == spec
    for unknown in ({"feedforward_modules": ".*down"}, {"feedforward_modules": None}):
        found = parse(IA3, **unknown)
        assert isinstance(found, Ia3Spec)
        assert found.scales_input("layers.0.mlp.down_proj") is None
    narrowed = parse(IA3, exclude_modules=["layers.0.v_proj"])
    assert isinstance(narrowed, Ia3Spec)
    assert narrowed.target_modules == ()


def test_prompt() -> None:
    spec = parse(PROMPT, num_transformer_submodules=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a\nb")
    assert isinstance(spec, PromptSpec)
    assert spec.shape == (10, 16)
    assert parse_adapter_config(adapter_config_bytes(spec)) == spec
    learned = parse(P_TUNING, encoder_reparameterization_type="LSTM", encoder_hidden_size=8, encoder_dropout=0.1)
    assert learned == PromptSpec(5, 16, method="P_TUNING")
    assert parse_adapter_config(adapter_config_bytes(learned)) == learned


@pytest.mark.parametrize(
    ("raw", "changes", "words"),
    [
        (IA3, {"r": 8}, "r: unknown key"),
        (IA3, {"feedforward_modules": ["a b"]}, "feedforward_modules"),
        (IA3, {"fan_in_fan_out": "yes"}, "fan_in_fan_out"),
        (IA3, {"layers_to_transform": [0]}, "layers_to_transform: unknown key"),
        (PROMPT, {"num_virtual_tokens": 10**9}, "num_virtual_tokens"),
        (PROMPT, {"token_dim": 0}, "token_dim"),
        (PROMPT, {"num_transformer_submodules": 3}, "num_transformer_submodules"),
        (PROMPT, {"encoder_hidden_size": 4}, "encoder_hidden_size: unknown key"),
        (PROMPT, {"prefix_projection": True}, "prefix_projection: unknown key"),
        (PROMPT, {"prompt_tuning_init_text": ["x"]}, "prompt_tuning_init_text"),
        (P_TUNING, {"encoder_dropout": 2.0}, "encoder_dropout"),
        (P_TUNING, {"prompt_tuning_init": "TEXT"}, "prompt_tuning_init: unknown key"),
    ],
)
def test_refused_of_the_other_kinds(raw: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=re.escape(words)):
        parse(raw, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(a+)+$"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["lm_head"]},
        {"exclude_modules": "lm_head.*"},
    ],
)
def test_modules_that_only_the_tensors_tell(changes: dict[str, Any]) -> None:
    spec = parse(LORA, **changes)
    assert isinstance(spec, LoraSpec)
    assert spec.target_modules == ()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"surprise": 1}, "surprise: unknown key"),
    ({"auto_mapping": "os.system"}, "auto_mapping"),
    ({"auto_mapping": {"run": "x"}}, "auto_mapping"),
    ({"megatron_core": "os"}, "megatron_core"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"use_qalora": True}, "use_qalora"),
    ({"arrow_config": {}}, "arrow_config"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"monteclora_config": {}}, "monteclora_config"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"kasa_config": {}}, "kasa_config"),
    ({"velora_config": {}}, "velora_config"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ({"bias": "all"}, "bias"),
    ({"bias": 0}, "bias"),
    ({"init_lora_weights": "pissa"}, "changed the base weights"),
    ({"init_lora_weights": "pissa_niter_16"}, "changed the base weights"),
    ({"init_lora_weights": "olora"}, "changed the base weights"),
    ({"init_lora_weights": "corda"}, "changed the base weights"),
    ({"init_lora_weights": "loftq"}, "changed the base weights"),
    ({"init_lora_weights": "lora_ga"}, "changed the base weights"),
    ({"init_lora_weights": "mystery"}, "unknown initialisation"),
    ({"init_lora_weights": 1}, "unknown initialisation"),
    ({"eva_config": {"rho": 2.0}}, "eva_config"),
    ({"r": 10**9}, "r: expected a whole number"),
    ({"r": -1}, "r: expected a whole number"),
    ({"r": 0}, "r: expected a whole number"),
    ({"r": True}, "r: expected a whole number"),
    ({"r": 8.0}, "r: expected a whole number"),
    ({"lora_alpha": "8"}, "lora_alpha: expected a number"),
    ({"lora_alpha": 1e308}, "lora_alpha: expected a number"),
    ({"lora_alpha": 0}, "lora_alpha: expected a number"),
    ({"lora_alpha": -1}, "lora_alpha: expected a number"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a number"),
    ({"lora_alpha": None}, "lora_alpha: expected a number"),
    ({"lora_dropout": 2}, "lora_dropout"),
    ({"target_modules": ["a b"]}, "target_modules"),
    ({"target_modules": ["(a+)+"]}, "target_modules"),
    ({"target_modules": [1]}, "target_modules"),
    ({"target_modules": {}}, "target_modules"),
    ({"modules_to_save": ["../x"]}, "modules_to_save"),
    ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": ["q"]}, "rank_pattern"),
    ({"alpha_pattern": {"a|b": 4}}, "alpha_pattern"),
    ({"alpha_pattern": {"q": "4"}}, "alpha_pattern"),
    ({"task_type": "EXEC"}, "task_type"),
    ({"task_type": {}}, "task_type"),
    ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
    ({"base_model_name_or_path": "a\nb"}, "base_model_name_or_path"),
    ({"use_dora": "yes"}, "use_dora"),
    ({"use_dora": True, "lora_bias": True}, "cannot be combined"),
    ({"layers_to_transform": ["x"]}, "layers_to_transform"),
    ({"inference_mode": 1}, "inference_mode"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[json.dumps(changes)[:60] for changes, _ in REFUSED])
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=re.escape(words)):
        parse(LORA, **changes)


def test_all_problems_at_once() -> None:
    with pytest.raises(FormatError) as caught:
        parse(LORA, r=-1, lora_alpha="8", surprise=1, init_lora_weights="pissa", layer_replication=[[0, 1]], another=2)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("adapter_config.json: 6 problems")
    assert len(lines) == 7


@pytest.mark.parametrize("key", ["num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"])
def test_prefix_needs_its_dimensions(key: str) -> None:
    with pytest.raises(FormatError, match=f"{key}: is missing"):
        parse_adapter_config(json.dumps({name: value for name, value in PREFIX.items() if name != key}))
    with pytest.raises(FormatError, match=key):
        parse(PREFIX, **{key: 0})


def test_lora_keys_are_unknown_to_prefix() -> None:
    with pytest.raises(FormatError, match="r: unknown key"):
        parse(PREFIX, r=8)


@pytest.mark.parametrize("kind", ["POLY", "vera", "lora", "MULTITASK_PROMPT_TUNING", ["LORA"], {}, "a\nb"])
def test_other_types_are_named(kind: object) -> None:
    with pytest.raises(Unsupported, match=re.escape(ascii(kind))):
        parse_adapter_config(json.dumps({"peft_type": kind}))


def test_no_type_and_adapterhub_folders() -> None:
    with pytest.raises(FormatError, match="no peft_type"):
        parse_adapter_config("{}")
    for mark in ({"model_type": "bert"}, {"version": "adapters.1.0.0"}):
        with pytest.raises(FormatError, match="AdapterHub"):
            parse_adapter_config(json.dumps({"config": {}, "name": "x", **mark}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"peft_type":"LORA","r":8,"r":9}', "'r' occurs twice"),
        (b'{"peft_type":"LORA","lora_alpha":NaN}', "NaN is not"),
        (b'{"peft_type":"LORA","lora_alpha":1e999}', "too large"),
        (b'{"peft_type":"LORA","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
        (b'{"peft_type":"LORA","x":' + b"[" * 20 + b"]" * 20 + b"}", "nested deeper"),
        (b'{"peft_type":"LORA","x":"' + b"a" * (1 << 20) + b'"}', "the limit is 1048576"),
        (b'{"peft_type":"LORA","revision":"\\ud800"}', "surrogate"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
        (b'{"peft_type":"LORA","r":' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_hostile_text(data: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        parse_adapter_config(data)


def test_what_is_built_has_sorted_keys_and_known_keys_only() -> None:
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    known_kinds = [(LORA, LoraConfig), (PREFIX, PrefixTuningConfig), (IA3, IA3Config)]
    for raw, known in (*known_kinds, (PROMPT, PromptTuningConfig), (P_TUNING, PromptEncoderConfig)):
        built = adapter_config(parse(raw))
        assert list(built) == sorted(built)
        assert set(built) <= set(known.__dataclass_fields__)
        assert built["inference_mode"] is True
    built = adapter_config(parse(LORA))
    assert built["target_modules"] == ["q_proj", "v_proj"]
    assert type(built["lora_alpha"]) is int


def test_what_peft_writes_is_read_and_what_we_write_peft_reads(tmp_path: Path) -> None:
    from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    configs = [
        LoraConfig(),
        LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["b", "a"], alpha_pattern={"^x.b": 1, "b": 2}),
        LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], use_dora=True, init_lora_weights="orthogonal"),
        LoraConfig(init_lora_weights="eva", target_modules=["q"]),
        PrefixTuningConfig(
            num_virtual_tokens=3, token_dim=8, num_layers=2, num_attention_heads=2, num_transformer_submodules=1
        ),
        PromptTuningConfig(num_virtual_tokens=3, token_dim=8, num_transformer_submodules=1),
        PromptEncoderConfig(num_virtual_tokens=3, token_dim=8, num_transformer_submodules=1, encoder_hidden_size=4),
        IA3Config(target_modules=["a", "b"], feedforward_modules=["b"], fan_in_fan_out=True),
    ]
    for config in configs:
        config.save_pretrained(str(tmp_path))
        spec = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes())
        (tmp_path / "adapter_config.json").write_bytes(adapter_config_bytes(spec))
        again = PeftConfig.from_pretrained(str(tmp_path))
        assert type(again) is type(config)
        for key in set(adapter_config(spec)) - {
            "inference_mode",
            "init_lora_weights",
            "target_modules",
            "feedforward_modules",
        }:
            assert getattr(again, key) == getattr(config, key), key
        if isinstance(config, LoraConfig) and config.target_modules:
            assert isinstance(again, LoraConfig)
            assert again.target_modules == config.target_modules
        if isinstance(config, IA3Config):
            assert isinstance(again, IA3Config)
            assert again.target_modules == config.target_modules
            assert again.feedforward_modules == config.feedforward_modules


def test_order_of_patterns_survives() -> None:
    # The first pattern that matches counts; sorting them would change what the adapter computes.
    spec = parse(LORA, alpha_pattern={"q_proj": 1, "layers.0.q_proj": 2})
    again = parse_adapter_config(adapter_config_bytes(spec))
    assert isinstance(again, LoraSpec)
    assert list(again.alpha_pattern) == ["q_proj", "layers.0.q_proj"]
    assert again.scaling("layers.0.q_proj") == 1 / 8


PIECE = st.sampled_from(["a", "b", ".", r"\.", "_", "1", "ab.", r"b\.a"])
KEY = st.builds(
    lambda start, body, end: start + "".join(body) + end,
    st.sampled_from(["", "^", r".*\.", r"^.*\."]),
    st.lists(PIECE, min_size=1, max_size=5),
    st.sampled_from(["", "$"]),
)
NAME = st.lists(st.sampled_from(["a", "b", ".", "_", "1"]), max_size=8).map("".join)


@settings(max_examples=1500, deadline=None)
@given(st.lists(KEY, max_size=3), NAME)
def test_patterns_match_as_peft_matches(keys: list[str], name: str) -> None:
    from peft.utils.other import get_pattern_key

    assert (first_match(keys, name) or name) == get_pattern_key(keys, name)


@pytest.mark.parametrize(
    "key", ["(a+)+$", "a|b", "a*", "[ab]", "a b", "", r"\d", "a\n", "^", "$", "ä", "a$b", "a" * 257, "\\"]
)
def test_regular_expressions_are_no_patterns(key: str) -> None:
    assert not is_pattern(key)
    with pytest.raises(ValueError, match="not a module name pattern"):
        first_match([key], "a")
