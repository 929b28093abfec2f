"""Readers of the keys that several PEFT types share in `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .fields import Check, Fields, T, boolean, integer, number, optional, shown, strings, text
from .patterns import is_pattern

MAX_ALPHA = 1e6
MAX_NAMES = 20_000

TASK_TYPES = frozenset({"SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})
_NONE: tuple[str, ...] = ()
_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*", re.ASCII)


def common(fields: Fields) -> dict[str, Any]:
    """The keys of every PEFT type. Names of bases and classes stay text: nothing opens or imports them."""
    fields.take("auto_mapping", _auto_mapping, None)
    fields.take("peft_version", optional(text(128)), None)
    fields.take("inference_mode", boolean, True)
    return {
        "modules_to_save": fields.take("modules_to_save", strings(_module_name, 64), _NONE),
        "task_type": fields.take("task_type", _task_type, None),
        "base_model": fields.take("base_model_name_or_path", optional(text(1024)), None),
        "revision": fields.take("revision", optional(text(256)), None),
    }


def targets(fields: Fields, *narrowing: str) -> tuple[str, ...]:
    """`target_modules` if a plain list says everything; else (), and the tensors say which modules they are for."""
    names = fields.take("target_modules", target_modules, _NONE)
    narrowed = [fields.take(key, _layers if key == "layers_to_transform" else _exclusion, False) for key in narrowing]
    return () if any(narrowed) else names


def _auto_mapping(value: Any) -> None:
    texts = optional(text(512))
    if value is not None and not isinstance(value, dict):
        raise ValueError("expected null or two texts")
    for key, entry in (value or {}).items():
        if key not in ("base_model_class", "parent_library"):
            raise ValueError("expected base_model_class and parent_library only")
        texts(entry)


def _task_type(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in TASK_TYPES):
        raise ValueError(f"expected null or one of {', '.join(sorted(TASK_TYPES))}")
    return value


def _module_name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 512 or not _NAME.fullmatch(value):
        raise ValueError("expected names of modules such as q_proj or layers.0.mlp")
    return value


def target_modules(value: Any) -> tuple[str, ...]:
    """The names of a list; () for a pattern."""
    if isinstance(value, str):
        text(4096)(value)
        return ()  # a regular expression or "all-linear": never compiled, the tensors tell the same
    return _module_names(value)


def named_modules(value: Any) -> tuple[str, ...]:
    """The names of a list, or one name; no pattern."""
    names = (_module_name(value),) if isinstance(value, str) else _module_names(value)
    if not names:
        raise ValueError("expected the name of a module")
    return names


_module_names = strings(_module_name, MAX_NAMES)
alpha = number(0.0, MAX_ALPHA, open_low=True)


def _exclusion(value: Any) -> bool:
    return bool(text(4096)(value) if isinstance(value, str) else _module_names(value))


def _layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [] if value is None else [value]
    for layer in layers:
        integer(0, 100_000)(layer)
    return value is not None


def any_text(value: Any) -> None:
    """A text that nobody reads."""
    if not isinstance(value, str):
        raise ValueError("expected a text")


def any_object(value: Any) -> None:
    """null or an object that nobody reads."""
    if value is not None and not isinstance(value, dict):
        raise ValueError("expected null or an object")


def pattern(check: Check[T]) -> Callable[[Any], dict[str, T]]:
    """null or an object of plain patterns, each with a value that `check` accepts."""

    def checked(value: Any) -> dict[str, T]:
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > MAX_NAMES:
            raise ValueError(f"expected an object of at most {MAX_NAMES} keys")
        for key in value:
            if not is_pattern(key):
                raise ValueError(f"key {shown(key)} is not a dotted module name (regular expressions are not compiled)")
        return {key: check(entry) for key, entry in value.items()}

    return checked
