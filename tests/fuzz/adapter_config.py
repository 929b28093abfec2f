"""Any bytes as an adapter_config.json: refused with an error of ours, or the same to PEFT as to us."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from adapterhub_lite.formats.injected import METHODS
from adapterhub_lite.formats.patterns import first_match
from adapterhub_lite.formats.peft_config import adapter_config, adapter_config_bytes, parse_adapter_config
from adapterhub_lite.formats.specs import InjectedSpec, LoraSpec, Spec
from tests.formats.build import lora_config
from tests.fuzz.common import accepted, mutate_bytes, mutate_tree, pairs, plain

SEEDS = (
    lora_config(),
    lora_config(
        rank_pattern={"layers.1.q_proj": 4, r".*\.layers\.0\.v_proj$": 2},
        alpha_pattern={"^model.x": 2.5},
        use_rslora=True,
        use_dora=True,
        lora_dropout=0.1,
        modules_to_save=["score"],
        task_type="SEQ_CLS",
        revision="main",
        auto_mapping={"base_model_class": "X", "parent_library": "y"},
        init_lora_weights="gaussian",
        peft_version="0.21.0",
    ),
    lora_config(target_modules="all-linear", layers_to_transform=[0, 1], exclude_modules=["lm_head"], lora_bias=True),
    json.dumps({
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "token_dim": 16, "num_layers": 2,
        "num_attention_heads": 4, "prefix_projection": False, "init_weights": None, "encoder_hidden_size": 16,
    }).encode(),
    *(json.dumps({"peft_type": method, "target_modules": ["q_proj"], **more}).encode() for method, more in (
        ("VERA", {"r": 4, "save_projection": False, "projection_prng_key": 3, "task_type": "CAUSAL_LM"}),
        ("OFT", {"r": 0, "oft_block_size": 8, "coft": True, "eps": 0.5, "bias": "none"}),
        ("DELORA", {"r": 4, "rank_pattern": {"layers.1.q_proj": 2}, "lambda_pattern": {"v_proj": 3}}),
        ("MISS", {"r": 4, "init_weights": "bat", "layers_to_transform": [0]}),
        ("ROAD", {"variant": "road_2", "group_size": 8}),
        ("WAVEFT", {"n_frequency": 5, "wavelet_family": "db2"}),
        ("TRAINABLE_TOKENS", {"token_indices": [1, 2]}),
    )),
)  # fmt: skip
_KEYS = (
    *sorted({key for seed in SEEDS for key in json.loads(seed)}), "megatron_config", "loftq_config", "eva_config",
    "layers_pattern", "bias", "boft_block_size", "n_frequency_pattern", "act_fn", "fan_in_fan_out",
    "layer_replication", "inference_mode", "runtime_config",
)  # fmt: skip
WORDS = (
    *(f'"{key}":'.encode() for key in _KEYS),
    b"LORA",
    b"PREFIX_TUNING",
    *map(str.encode, METHODS),
    b"NaN",
    b"1e999",
    b"\\u0000",
    b"[]",
)
_NAMES = ("model.layers.1.q_proj", "model.layers.0.v_proj", "model.x", "q_proj", "layers.1.q_proj.x")


def read(data: bytes) -> Spec:
    """The parser."""
    return parse_adapter_config(data)


def fuzz(data: bytes) -> None:
    """Accepted: our form of it is a fixed point that PEFT reads, and PEFT's reading of the original agrees."""
    spec = accepted(read, data)
    if spec is None:
        return
    ours = adapter_config_bytes(spec)
    again = parse_adapter_config(ours)
    assert again == spec
    assert adapter_config_bytes(again) == ours
    built = _with_peft(adapter_config(spec))
    assert built is not None, "PEFT refuses our form"
    _check_facts(spec, built, targets=True)
    original = _with_peft(json.loads(data))
    if original is not None:
        _check_facts(spec, original, targets=False)


def _with_peft(raw: dict[str, Any]) -> Any:
    """PEFT's configuration; None where PEFT refuses it."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(raw["peft_type"])]
    known = {key: value for key, value in raw.items() if key in kind.__dataclass_fields__}
    # Words of older versions of PEFT, which mean the same to it as nothing.
    known = {key: value for key, value in known.items() if value is not None and key != "eva_config"}
    try:
        return kind(**known)
    except (TypeError, ValueError, ImportError):
        return None


def _check_facts(spec: Spec, built: Any, targets: bool) -> None:
    if isinstance(spec, InjectedSpec):
        _check_options(spec, built, targets)
        return
    if not isinstance(spec, LoraSpec):
        for key in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "prefix_projection"):
            assert getattr(built, key) == getattr(spec, key), key
        return
    from peft.utils.other import get_pattern_key

    found = (built.r, built.lora_alpha, built.lora_dropout, built.use_rslora, built.use_dora, built.fan_in_fan_out)
    assert found == (spec.rank, spec.alpha, spec.dropout, spec.use_rslora, spec.use_dora, spec.fan_in_fan_out)
    assert (built.rank_pattern or {}) == dict(spec.rank_pattern)
    assert (built.alpha_pattern or {}) == dict(spec.alpha_pattern)
    assert set(built.modules_to_save or ()) == set(spec.modules_to_save)
    if targets:
        assert set(built.target_modules or ()) == set(spec.target_modules)
    for patterns in (spec.rank_pattern, spec.alpha_pattern):
        for name in _NAMES:
            assert (first_match(patterns, name) or name) == get_pattern_key(list(patterns), name)


def _check_options(spec: InjectedSpec, built: Any, targets: bool) -> None:
    for key, value in spec.options.items():
        found = getattr(built, key)
        # Where PEFT has no pattern, it has None or an empty one.
        assert (found or value) == value if isinstance(value, dict) else found == value, key
    if targets:
        assert set(built.target_modules or ()) == set(spec.target_modules)


def mutate(data: bytes, rng: Random) -> bytes:
    """Mostly of the tree."""
    try:
        if rng.random() < 0.8:
            return plain(mutate_tree(pairs(data), rng, _KEYS))
    except (ValueError, RecursionError):
        pass
    return mutate_bytes(data, rng, WORDS)
