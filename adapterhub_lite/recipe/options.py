"""The adapter part of a recipe for PEFT's other methods: a method's name, and its options as PEFT calls them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from . import fields
from .nodes import Items, Scalar, Table
from .readers import At, read_flag, read_integer, read_number, read_table, read_text

_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9_]{1,31}", re.ASCII)
_FLAGS = ("true", "false")
_WIDEST = 10**15
_LONGEST = 100_000


def _method(text: str) -> str:
    if not _METHOD.fullmatch(text):
        raise ValueError("is not the name of a PEFT method such as VERA or IA3")
    return text.upper()


def read_option(at: At) -> Any:
    """A number, true or false, nothing, a text, or a list or mapping of these."""
    node = at.node
    if isinstance(node, Table):
        return read_table(at, item=read_option, modules=False)
    if isinstance(node, Items):
        if len(node.items) > _LONGEST:
            at.wrong(f"has {len(node.items)} entries; the limit is {_LONGEST}.")
            return None
        return [read_option(At(item, f"{at.path}[{i}]", at.problems)) for i, item in enumerate(node.items)]
    if not isinstance(node, Scalar) or not node.plain or node.is_null:
        return None if isinstance(node, Scalar) and node.is_null else read_text(at)
    if node.text.lower() in _FLAGS:
        return read_flag(at)
    for read in (read_integer, read_number):
        trial = At(node, at.path, [])
        value = read(trial, low=-_WIDEST, high=_WIDEST)
        if not trial.problems:
            return value
    return read_text(at)


def _read_options(at: At) -> Any:
    return read_table(at, item=read_option, modules=False)


@dataclass(frozen=True)
class PeftAdapter:
    """Any other method of PEFT, trained by PEFT's own layers."""

    type: Literal["peft"] = fields.choice(among=("peft",))
    method: str = fields.checked(_method)
    """PEFT's name of it: VERA, IA3, LOHA, LOKR, OFT, BOFT, FOURIERFT, LN_TUNING, ..."""
    targets: str | tuple[str, ...] = fields.targets("all-linear")
    """As for LoRA; `all-linear` stands for all layers of the kind that the method changes."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"read": _read_options, "optional": False})
    """Options of its configuration in PEFT, by the names that they have there."""
