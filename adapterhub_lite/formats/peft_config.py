"""`adapter_config.json` of PEFT: parsed into our specs, and written back from them.

Foreign JSON never reaches PEFT: it gets what `adapter_config` builds. A key of PEFT 0.21 that we do not support is
accepted only with its neutral value; unknown keys are refused. Source of the key set: `peft.config`,
`peft.tuners.{lora,ia3,prefix_tuning,prompt_tuning,p_tuning}.config` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ..errors import FormatError, Unsupported
from .fields import Fields, boolean, integer, number, optional, shown, text
from .injected import METHODS, REFUSED, injected_keys, read_injected
from .peft_fields import MAX_NAMES, alpha, any_object, any_text, common, pattern, target_modules, targets
from .specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec, PromptSpec, Spec
from .strict_json import dump, parse_object

__all__ = ["LoraSpec", "PrefixSpec", "Spec", "adapter_config", "adapter_config_bytes", "parse_adapter_config"]

MAX_BYTES = 1 << 20
MAX_RANK = 1024
MAX_VIRTUAL_TOKENS = 4096

_WHAT = "adapter_config.json"

# How A and B began says nothing about inference as long as the base stayed as it was. The others below moved the base.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_MOVING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_OURS = "it changes what the adapter computes in a way this package does not implement"
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "trainable_token_indices": (None,),
    "loftq_config": ({}, None),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False,),
    "runtime_config": (None, {"ephemeral_gpu_offload": False}),
    # Written by PEFT before 0.3, without effect since.
    "enable_lora": (None,),
    "merge_weights": (False,),
}


def parse_adapter_config(data: str | bytes) -> Spec:
    """Read an `adapter_config.json`.

    Raises:
        FormatError: not PEFT's format, or beyond a limit; all problems of the file at once.
        Unsupported: a PEFT method that is neither one with a form of ours nor one that PEFT's layers can run here.
    """
    raw = parse_object(data, _WHAT, limit=MAX_BYTES)
    kind = raw.pop("peft_type", None)
    if kind is None:
        raise _no_type(raw)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is not None:
        return reader(Fields(raw, _WHAT))
    if isinstance(kind, str) and kind in METHODS:
        return read_injected(Fields(raw, _WHAT), kind)
    why = REFUSED.get(kind) if isinstance(kind, str) else None
    hint = f"Supported are {', '.join((*_READERS, *METHODS))}; LORA with DoRA and rsLoRA."
    message = f"{_WHAT}: adapters of type {shown(kind)} are not supported"
    raise Unsupported(f"{message}: {why}." if why else f"{message}.", hint)


def adapter_config(spec: Spec) -> dict[str, Any]:
    """The content of an `adapter_config.json` that PEFT reads as `spec`: sorted keys, only keys PEFT knows.

    The patterns keep their order, since the first that matches counts.
    """
    own = _own_keys(spec)
    common = {
        "base_model_name_or_path": spec.base_model,
        "inference_mode": True,
        "modules_to_save": sorted(spec.modules_to_save) or None,
        "revision": spec.revision,
        "task_type": spec.task_type,
    }
    if isinstance(spec, InjectedSpec) and not METHODS[spec.method].heads:
        del common["modules_to_save"]
    return dict(sorted({**common, **own}.items()))


def adapter_config_bytes(spec: Spec) -> bytes:
    """`adapter_config` as the canonical bytes of the file: one spec, one digest."""
    return dump(adapter_config(spec), indent=2, sort_keys=False)


def _no_type(raw: dict[str, Any]) -> FormatError:
    if "config" in raw and ("model_type" in raw or str(raw.get("version", "")).startswith("adapters.")):
        message = f"{_WHAT} is from the AdapterHub `adapters` library, which names its file as PEFT does."
        return FormatError(message, "Only PEFT folders are read: train or convert the adapter with PEFT.")
    return FormatError(f"{_WHAT} has no peft_type.", "Expected a folder that PEFT's save_pretrained wrote.")


def _lora(fields: Fields) -> LoraSpec:
    for key, values in _NEUTRAL.items():
        fields.neutral(key, *values, reason=_NOT_OURS)
    _take_initialisation(fields)
    fields.take("qalora_group_size", optional(integer(1, 1 << 20)), None)
    spec = LoraSpec(
        rank=fields.take("r", integer(1, MAX_RANK), 8),
        alpha=fields.take("lora_alpha", alpha, 8.0),
        target_modules=targets(fields, "exclude_modules", "layers_to_transform", "layers_pattern"),
        rank_pattern=fields.take("rank_pattern", pattern(integer(1, MAX_RANK)), {}),
        alpha_pattern=fields.take("alpha_pattern", pattern(alpha), {}),
        use_rslora=fields.take("use_rslora", boolean, False),
        use_dora=fields.take("use_dora", boolean, False),
        dropout=fields.take("lora_dropout", number(0.0, 1.0), 0.0),
        lora_bias=fields.take("lora_bias", boolean, False),
        fan_in_fan_out=fields.take("fan_in_fan_out", boolean, False),
        **common(fields),
    )
    if spec.lora_bias and spec.use_dora:
        fields.problems.append("lora_bias: cannot be combined with use_dora")
    fields.finish()
    return spec


def _ia3(fields: Fields) -> Ia3Spec:
    fields.take("init_ia3_weights", boolean, True)
    spec = Ia3Spec(
        target_modules=targets(fields, "exclude_modules"),
        feedforward_modules=fields.take("feedforward_modules", target_modules, ()),
        fan_in_fan_out=fields.take("fan_in_fan_out", boolean, False),
        **common(fields),
    )
    fields.finish()
    return spec


def _prompt(fields: Fields, method: Literal["PROMPT_TUNING", "P_TUNING"]) -> PromptSpec:
    dimension = integer(1, 1 << 20)
    spec = PromptSpec(
        num_virtual_tokens=fields.need("num_virtual_tokens", integer(1, MAX_VIRTUAL_TOKENS), 1),
        token_dim=fields.need("token_dim", dimension, 1),
        num_layers=fields.take("num_layers", optional(integer(1, 4096)), None),
        num_attention_heads=fields.take("num_attention_heads", optional(dimension), None),
        num_transformer_submodules=fields.take("num_transformer_submodules", integer(1, 2), 1),
        method=method,
        **common(fields),
    )
    # How the embeddings began or were made says nothing about inference: the file holds them as they are.
    if method == "PROMPT_TUNING":
        fields.take("prompt_tuning_init", text(64), None)
        fields.take("prompt_tuning_init_text", optional(any_text), None)
        fields.take("tokenizer_name_or_path", optional(text(1024)), None)
        fields.take("tokenizer_kwargs", any_object, None)
    else:
        fields.take("encoder_reparameterization_type", text(64), None)
        fields.take("encoder_hidden_size", optional(dimension), None)
        fields.take("encoder_num_layers", integer(1, 4096), 2)
        fields.take("encoder_dropout", number(0.0, 1.0), 0.0)
    fields.finish()
    return spec


def _prefix(fields: Fields) -> PrefixSpec:
    fields.neutral("init_weights", None, "zero", reason="unknown initialisation")
    dimension = integer(1, 1 << 20)
    spec = PrefixSpec(
        num_virtual_tokens=fields.need("num_virtual_tokens", integer(1, MAX_VIRTUAL_TOKENS), 1),
        token_dim=fields.need("token_dim", dimension, 1),
        num_layers=fields.need("num_layers", integer(1, 4096), 1),
        num_attention_heads=fields.need("num_attention_heads", dimension, 1),
        num_transformer_submodules=fields.take("num_transformer_submodules", integer(1, 2), 1),
        encoder_hidden_size=fields.take("encoder_hidden_size", optional(dimension), None),
        prefix_projection=fields.take("prefix_projection", boolean, False),
        **common(fields),
    )
    fields.finish()
    return spec


def _take_initialisation(fields: Fields) -> None:
    if fields.take("init_lora_weights", _initialisation, None) == "eva":
        fields.take("eva_config", any_object, None)
    fields.neutral("eva_config", None, reason="only with init_lora_weights eva")


def _initialisation(value: Any) -> object:
    if isinstance(value, str) and value.startswith(_MOVING_INITS):
        raise ValueError(
            "this initialisation changed the base weights, so the adapter does not fit the original base; "
            "save it with path_initial_model_for_weight_conversion to convert it"
        )
    if not any(type(value) is type(known) and value == known for known in _HARMLESS_INITS):
        raise ValueError("unknown initialisation")
    return value


def _plain(value: float) -> int | float:
    # PEFT types alpha as int, and other readers insist on it.
    return int(value) if value == int(value) else value


def _factored(fields: Fields, method: Literal["ADALORA", "LOHA", "LOKR"]) -> FactoredSpec:
    names = targets(fields, "exclude_modules", "layers_to_transform", "layers_pattern")
    options: dict[str, Any] = {}
    if method == "ADALORA":
        for key, values in {**_NEUTRAL, "use_dora": (False,), "use_rslora": (False,), "lora_bias": (False,)}.items():
            fields.neutral(key, *values, reason=_NOT_OURS)
        for key in (*_UNREAD, "qalora_group_size", "r"):
            fields.take(key, _unread, None)
        options = {key: fields.take(key, _number, start) for key, start in _SCHEDULE.items()}
        if options["tinit"] >= options["total_step"] - options["tfinal"]:
            fields.problems.append("total_step: expected more steps than tinit and tfinal together")
        options["rank_pattern"] = fields.take("rank_pattern", _masks, dict[str, list[bool]]())
        options["fan_in_fan_out"] = fields.take("fan_in_fan_out", boolean, False)
        rank, scale = fields.take("init_r", integer(1, MAX_RANK), 12), fields.take("lora_alpha", alpha, 8.0)
        patterns: dict[str, Any] = {}
    else:
        fields.take("use_effective_conv2d", boolean, False)  # of convolutions alone
        for key in ("init_weights", "rank_dropout", "module_dropout", "rank_dropout_scale"):
            fields.take(key, _unread, None)
        if method == "LOKR":
            options["decompose_both"] = fields.take("decompose_both", boolean, False)
            options["decompose_factor"] = fields.take("decompose_factor", integer(-1, 1 << 20), -1)
        rank, scale = fields.take("r", integer(1, MAX_RANK), 8), fields.take("alpha", alpha, 8.0)
        patterns = {
            "rank_pattern": fields.take("rank_pattern", pattern(integer(1, MAX_RANK)), dict[str, int]()),
            "alpha_pattern": fields.take("alpha_pattern", pattern(alpha), dict[str, float]()),
        }
    spec = FactoredSpec(method, rank, scale, names, options=options, **patterns, **common(fields))
    fields.finish()
    return spec


_UNREAD = ("alpha_pattern", "beta1", "beta2", "eva_config", "init_lora_weights", "lora_dropout", "orth_reg_weight")
_SCHEDULE = {"target_r": 8, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}


def _unread(value: Any) -> None:
    """Of training alone."""
    if isinstance(value, list | dict) and len(value) > MAX_NAMES:
        raise ValueError("expected less")


def _number(value: Any) -> int:
    return integer(0, 1 << 53)(value)


def _masks(value: Any) -> dict[str, list[bool]]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        raise ValueError("expected lists of true and false")
    for key, mask in value.items():
        text(512)(key)
        if not isinstance(mask, list) or len(mask) > MAX_RANK or not all(isinstance(one, bool) for one in mask):
            raise ValueError("expected lists of true and false")
    return value


def _factored_keys(spec: FactoredSpec) -> dict[str, Any]:
    keys = {**spec.options, "peft_type": spec.method, "target_modules": sorted(spec.target_modules)}
    if spec.method == "ADALORA":
        masks = {"rank_pattern": spec.options["rank_pattern"] or None}
        return {**keys, **masks, "init_r": spec.rank, "lora_alpha": _plain(spec.alpha)}
    alphas = {key: _plain(value) for key, value in spec.alpha_pattern.items()}
    ranks = {"r": spec.rank, "rank_pattern": dict(spec.rank_pattern)}
    return {**keys, **ranks, "alpha": _plain(spec.alpha), "alpha_pattern": alphas}


_READERS: dict[str, Callable[[Fields], Spec]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "PREFIX_TUNING": _prefix,
    "ADALORA": lambda fields: _factored(fields, "ADALORA"),
    "LOHA": lambda fields: _factored(fields, "LOHA"),
    "LOKR": lambda fields: _factored(fields, "LOKR"),
    "PROMPT_TUNING": lambda fields: _prompt(fields, "PROMPT_TUNING"),
    "P_TUNING": lambda fields: _prompt(fields, "P_TUNING"),
}


def _own_keys(spec: Spec) -> dict[str, Any]:
    if isinstance(spec, LoraSpec):
        return _lora_keys(spec)
    if isinstance(spec, FactoredSpec):
        return _factored_keys(spec)
    if isinstance(spec, Ia3Spec):
        modules = {"target_modules": spec.target_modules, "feedforward_modules": spec.feedforward_modules}
        named = {key: sorted(names) for key, names in modules.items()}
        return {"fan_in_fan_out": spec.fan_in_fan_out, "init_ia3_weights": True, "peft_type": "IA3", **named}
    return injected_keys(spec) if isinstance(spec, InjectedSpec) else _front_keys(spec)


def _lora_keys(spec: LoraSpec) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "alpha_pattern": {key: _plain(value) for key, value in spec.alpha_pattern.items()},
        "bias": spec.bias,
        "fan_in_fan_out": spec.fan_in_fan_out,
        "init_lora_weights": True,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "target_modules": sorted(spec.target_modules),
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }
    # A younger key than the others: written only when it says something, so that older PEFT reads the rest.
    return {**keys, "lora_bias": True} if spec.lora_bias else keys


def _front_keys(spec: PrefixSpec | PromptSpec) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "num_attention_heads": spec.num_attention_heads,
        "num_layers": spec.num_layers,
        "num_transformer_submodules": spec.num_transformer_submodules,
        "num_virtual_tokens": spec.num_virtual_tokens,
        "token_dim": spec.token_dim,
    }
    if isinstance(spec, PromptSpec):
        return {**keys, "peft_type": spec.method}
    network = {"encoder_hidden_size": spec.encoder_hidden_size, "prefix_projection": spec.prefix_projection}
    return {**keys, **network, "peft_type": "PREFIX_TUNING"}
