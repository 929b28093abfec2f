"""Configurations of the methods that PEFT runs: what is read is in range, and PEFT reads it as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from adapterhub_lite.errors import AdapterMismatch, FormatError, Unsupported
from adapterhub_lite.formats.adapter_files import facts, injected_inventory, inventory, with_targets
from adapterhub_lite.formats.injected import METHODS, REFUSED, module_of
from adapterhub_lite.formats.peft_config import adapter_config, adapter_config_bytes, parse_adapter_config
from adapterhub_lite.formats.safetensors_header import parse_header
from adapterhub_lite.formats.specs import InjectedSpec
from tests.formats.build import safetensors

VERA = {"peft_type": "VERA", "r": 4, "target_modules": ["v_proj", "q_proj"]}
_TOKENS = {"TRAINABLE_TOKENS": {"token_indices": [3, 1]}}


def parse(raw: dict[str, Any], **changes: Any) -> InjectedSpec:
    spec = parse_adapter_config(json.dumps({**raw, **changes}))
    assert isinstance(spec, InjectedSpec)
    return spec


def peft_class(method: str) -> Any:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]


def test_every_method_of_peft_is_read_or_refused_for_a_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    ours = {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == ours | set(METHODS) | set(REFUSED)
    assert not set(METHODS) & set(REFUSED)


@pytest.mark.parametrize("method", METHODS)
def test_keys_and_defaults_are_pefts(method: str) -> None:
    known = {one.name: one for one in dataclasses.fields(peft_class(method))}
    common = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"}
    base = {one.name for one in dataclasses.fields(peft_class("LORA").__mro__[1])}
    told = METHODS[method]
    for key, (check, default) in told.options.items():
        value = known[key].default
        if value is dataclasses.MISSING:
            value = known[key].default_factory()  # type: ignore[misc]
        assert getattr(value, "value", value) == default or (value is None and default == {}), key
        if (method, key) != ("TRAINABLE_TOKENS", "token_indices"):
            assert check(default) == default
    fixed = {"boft_n_butterfly_factor", "sample_at_inference", "generator_seed", "save_precomputed_indices",
             "save_indices", "save_only_topk_weights"}  # fmt: skip
    if method == "TINYLORA":
        fixed.add("save_projection")
    assert set(known) - base - common - set(told.unread) - fixed == set(told.options), "a key of PEFT is not known here"


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_writes_is_read_and_written_again(method: str) -> None:
    """All keys of `save_pretrained`, as far as JSON knows them."""
    kind = peft_class(method)
    given = _TOKENS.get(method, {})
    raw = kind(target_modules=["q_proj", "v_proj"], **given).to_dict()
    raw = json.loads(json.dumps(raw, default=lambda value: sorted(value) if isinstance(value, set) else value.value))
    spec = parse(raw)
    assert spec.method == method
    assert spec.target_modules == ("q_proj", "v_proj")
    assert parse_adapter_config(adapter_config_bytes(spec)) == spec
    ours = adapter_config(spec)
    built = kind(**{key: value for key, value in ours.items() if key != "peft_type"})
    for key in METHODS[method].options:
        assert getattr(built, key) == spec.options[key], key


HOSTILE = [
    ({"r": 1 << 30}, "r: expected a whole number"),
    ({"r": True}, "r: expected a whole number"),
    ({"r": "8"}, "r: expected a whole number"),
    ({"bias": "all"}, "bias: 'all' is not supported"),
    ({"projection_prng_key": -1}, "projection_prng_key"),
    ({"projection_prng_key": 1 << 64}, "projection_prng_key"),
    ({"save_projection": "yes"}, "save_projection"),
    ({"vera_dropout": float(2)}, "vera_dropout"),
    ({"init_weights": {"a": 1}}, "init_weights"),
    ({"target_modules": ["(a+)+"]}, "target_modules"),
    ({"target_modules": ["../x"]}, "target_modules"),
    ({"modules_to_save": ["a b"]}, "modules_to_save"),
    ({"lora_alpha": 1}, "lora_alpha: unknown key"),
    ({"megatron_core": "os"}, "megatron_core: unknown key"),
    ({"shadow_model": "evil/repo"}, "shadow_model: unknown key"),
    ({"prompt_tuning_init_state_dict_path": "/etc/passwd"}, "unknown key"),
    ({"peft_type": "BOFT", "r": 4}, "r: unknown key"),
    ({"peft_type": "PEANUT", "act_fn": "os.system"}, "act_fn: expected one of"),
    ({"peft_type": "PVERA", "sample_at_inference": True}, "answers would be random"),
    ({"peft_type": "OFT", "oft_block_size": 32}, "give it or oft_block_size"),
    ({"peft_type": "GRALORA", "gralora_k": 3}, "no multiple of gralora_k"),
    ({"peft_type": "OSF", "r": 4, "target_svd_config": {"(a+)+$": 1}}, "target_svd_config"),
    ({"peft_type": "DELORA", "lambda_pattern": {"(a+)+$": 1}}, "lambda_pattern"),
    ({"peft_type": "DELORA", "delora_lambda": 1e300}, "delora_lambda"),
    ({"peft_type": "MISS", "init_weights": "pissa"}, "init_weights: expected one of"),
    ({"peft_type": "PSOFT", "ab_svd_init": "corda"}, "ab_svd_init"),
]


@pytest.mark.parametrize(("changes", "words"), HOSTILE, ids=[json.dumps(changes)[:60] for changes, _ in HOSTILE])
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=re.escape(words)):
        parse(VERA, **changes)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"peft_type": "BOFT", "boft_n_butterfly_factor": 2}, "compiles"),
        ({"peft_type": "BOFT", "boft_block_size": 4, "boft_block_num": 4}, "the other as 0"),
        ({"peft_type": "VBLORA", "save_only_topk_weights": True}, "infinite"),
        ({"peft_type": "SUPERTUNING", "save_precomputed_indices": False}, "saved"),
        ({"peft_type": "TINYLORA", "save_projection": False}, "saved"),
        ({"peft_type": "UNILORA", "save_indices": True}, "proj_seed"),
        ({"peft_type": "SHIRA", "mask_type": "custom"}, "mask_type"),
        ({"peft_type": "ROAD", "group_size": 3}, "odd"),
        ({"peft_type": "ROAD", "variant": "road_3"}, "variant"),
        ({"peft_type": "WAVEFT", "wavelet_family": "haar"}, "wavelet_family"),
        ({"peft_type": "TRAINABLE_TOKENS", "target_modules": ["wte"]}, "names no token"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1]}, "target_modules: is missing"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ".*wte"}, "target_modules"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": []}, "the name of a module"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "modules_to_save": ["score"]}, "PEFT saves none"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 1]}, "different token ids"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [-1]}, "token_indices"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [[1]]}, "token_indices"),
        ({"peft_type": "LN_TUNING", "bias": "all"}, "biases of the base"),
    ],
)
def test_refused_of_one_method(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=re.escape(words)):
        parse(raw)


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_cannot_run_are_refused_with_the_reason(method: str) -> None:
    with pytest.raises(Unsupported, match=re.escape(f"'{method}' are not supported: {REFUSED[method]}")):
        parse_adapter_config(json.dumps({"peft_type": method, "target_modules": ["q"]}))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("base_model.model.model.layers.0.q_proj.vera_lambda_b", "model.layers.0.q_proj"),
        ("base_model.model.q_proj.vera_lambda_b", "q_proj"),
        ("base_model.vera_A", ""),
        ("base_model.model.vera_A", None),
        ("base_model.other.q_proj.vera_lambda_b", None),
        ("base_model.model.q_proj.weight", None),
        ("base_model.model.q_proj.base_layer.weight", None),
        ("model.q_proj.vera_lambda_b", None),
        ("vera_A", None),
    ],
)
def test_whose_tensor_it_is(name: str, module: str | None) -> None:
    assert module_of("VERA", name) == module


def _header(shapes: dict[str, tuple[str, list[int]]]) -> Any:
    sizes = {"F32": 4, "I32": 4, "U8": 1}
    tensors = {name: (kind, shape, bytes(sizes[kind] * math.prod(shape))) for name, (kind, shape) in shapes.items()}
    return parse_header(safetensors(tensors), "x")


STEM = "base_model.model.layers.0."
FILE = {
    "base_model.vera_A": ("F32", [4, 6]),
    "base_model.vera_B": ("F32", [6, 4]),
    f"{STEM}q_proj.vera_lambda_b": ("F32", [6]),
    f"{STEM}q_proj.vera_lambda_d": ("F32", [4]),
}


def test_the_tensors_of_a_file() -> None:
    spec, header = parse(VERA), _header(FILE)
    found = injected_inventory(spec, header)
    assert found.modules == ("layers.0.q_proj",)
    assert facts(spec, header) == {"type": "vera", "tensors": 4, "parameters": 58, "bytes": 232}
    open_spec = parse(VERA, target_modules="all-linear")
    assert open_spec.target_modules == ()
    assert with_targets(open_spec, inventory(open_spec, header)) == parse(VERA, target_modules=["layers.0.q_proj"])


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({f"{STEM}k_proj.vera_lambda_b": ("F32", [6])}, {}, "unexpected 1"),
        ({f"{STEM}q_proj.weight": ("F32", [6, 6])}, {}, "unexpected 1"),
        ({f"{STEM}q_proj.base_layer.weight": ("F32", [6, 6])}, {}, "unexpected 1"),
        ({f"{STEM}q_proj.vera_lambda_d": ("I32", [4])}, {}, "has dtype I32"),
        ({}, {"r": 5}, "r is 5, and no tensor has this size"),
        ({}, {"r": 8192}, "no tensor has this size"),
        ({}, {"modules_to_save": ["score"]}, "score"),
    ],
)
def test_files_that_do_not_fit(changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterMismatch, match=re.escape(words)):
        inventory(parse(VERA, **options), _header({**FILE, **changes}))


def test_a_bank_that_no_file_holds_is_never_made() -> None:
    raw = {"peft_type": "VBLORA", "num_vectors": 1 << 24, "vector_length": 1 << 24, "target_modules": ["q_proj"]}
    header = _header({"base_model.vblora_vector_bank": ("F32", [16, 8]), f"{STEM}q_proj.vblora_logits_A": ("F32", [4])})
    with pytest.raises(AdapterMismatch, match="no tensor has this size"):
        inventory(parse(raw), header)


def test_places_are_whole_numbers_and_nothing_else_is() -> None:
    spec = parse({"peft_type": "SHIRA", "r": 2, "target_modules": ["q_proj"]})
    values = (f"{STEM}q_proj.shira_weight", f"{STEM}q_proj.shira_indices")
    inventory(spec, _header({values[0]: ("F32", [4]), values[1]: ("I32", [2, 4])}))
    for wrong in (("F32", "F32"), ("I32", "I32"), ("F32", "U8")):
        shapes = {values[0]: (wrong[0], [4]), values[1]: (wrong[1], [2, 4])}
        with pytest.raises(AdapterMismatch, match="has dtype"):
            inventory(spec, _header(shapes))


def test_an_embedding_is_named_as_peft_names_it() -> None:
    """As a text where PEFT chose it; tensors of what is tied to it lie beside its own."""
    raw = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2], "target_modules": "transformer.wte"}
    spec = parse(raw)
    assert spec.target_modules == ("transformer.wte",)
    tied = ("base_model.model.transformer.wte", "base_model.model.lm_head")
    inventory(spec, _header({f"{stem}.trainable_tokens_delta": ("F32", [2, 4]) for stem in tied}))
