"""`ahl show REF`: one version, readably."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import curve_lines, write_picture
from .guard import UsageProblem
from .render import age, counted, emit, fields, metrics, printable, say, seconds, size, sparkline, width

if TYPE_CHECKING:
    from ..formats.card import Card
    from ..names import Ref
    from ..store import Manifest, Store

_ORDER = ("name", "base", "quantize", "task", "data", "adapter", "training")
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*")
_MADE = ("trained", "combined")  # kinds of origin; of an export of an import the card says when it was made, not how
_REPORTS = 10  # of merges, the latest
_SHAPE = ("rank", "alpha", "tokens", "tensors", "parameters")


def show_adapter(
    ref: str, store: Path | None = None, as_json: bool = False, plot: Path | None = None, beside: Sequence[str] = ()
) -> None:
    """Print the card and the files of one version; with `plot` its curves, and those of others, go into that file."""
    from ..store import Store

    opened = Store(store)
    drawn = _draw(opened, [ref, *beside], plot)
    found = opened.resolve(ref)
    card, manifest = opened.card(found), opened.manifest(found)
    name = f"{found.name}@{found.version}"
    aliases = [alias for alias, version in opened.aliases(found.name).items() if version == found.version]
    folder = opened.folder(found)
    if as_json:
        files = {file: asdict(fact) for file, fact in manifest.files.items()}
        about = {"ref": name, "digest": found.digest, "aliases": aliases, "path": str(folder)}
        picture = {"plot": str(plot)} if plot else {}
        emit({**about, **picture, "files": files, "card": asdict(card)})
        return
    say(_headline(name, aliases, card), "", *fields(_facts(card, str(found.digest), folder)))
    say(
        *_section("curve", _curve(card, name)),
        *_section("recipe", _recipe_lines(card.recipe or card.origin.get("claimed_recipe"))),
        *_section("files", _file_lines(manifest)),
        *_section("merges", _merge_lines(opened.path, found)),
    )
    say("", *_next(opened, name, card), *drawn)


def _draw(store: Store, refs: Sequence[str], plot: Path | None) -> list[str]:
    """Draw the curves of versions into a file, if asked to; what to say of it."""
    if plot is None:
        if len(refs) > 1:
            raise UsageProblem("--with names what is drawn beside it.", "Say where with --plot FILE.")
        return []
    found = [store.resolve(ref) for ref in dict.fromkeys(refs)]
    write_picture([(f"{one.name}@{one.version}", store.card(one)) for one in found], plot)
    return [printable(f"Its curves are in {plot}.")]


def _curve(card: Card, name: str) -> list[str]:
    if not isinstance(card.origin.get("losses"), list):  # of an import its maker's word is drawn only when asked for
        return []
    from ..workflows.curves import read_curve

    return curve_lines(read_curve(card, name), width() - 2)


def _headline(name: str, aliases: list[str], card: Card) -> str:
    also = f" ({', '.join(aliases)})" if aliases else ""
    kind = card.adapter.get("type") or "adapter"
    time = _imported(card) or card.created
    return printable(f"{name}{also}: {kind}, {card.origin.get('kind') or 'made'} {age(time)} ({time})")


def _facts(card: Card, digest: str, folder: Path) -> list[tuple[str, object]]:
    return [
        ("base", _base(card)),
        ("task", card.task.get("type")),
        ("adapter", _adapter(card)),
        *((f"{split} metrics", metrics(found)) for split, found in card.metrics.items()),
        ("effect", _effect(card)),
        ("loss", _losses([value for value in card.origin.get("losses") or () if isinstance(value, int | float)])),
        ("took", seconds(card.duration_seconds) if card.duration_seconds is not None else ""),
        *((f"{split} data", _data(told)) for split, told in card.data.items()),
        ("seed", card.seed),
        ("made from", _parents(card)),
        ("came from", _origin(card)),
        _made(card),
        ("libraries", ", ".join(f"{name} {version}" for name, version in card.libraries.items())),
        ("digest", digest),
        ("path", folder),
    ]


def _parents(card: Card) -> str:
    """The versions that it was made from: of a mix with weights, method and error."""
    from ..combining.terms import weighted_sum

    told, error = card.origin, card.origin.get("error")
    members = [one for one in told.get("members") or () if isinstance(one, dict)]
    weighed = told.get("kind") == "combined" and all(isinstance(one.get("weight"), int | float) for one in members)
    names = weighted_sum((one.get("ref"), one["weight"]) for one in members) if weighed else ", ".join(card.parents)
    parts = [names, f"by {told['method']}" if told.get("method") else ""]
    lost = f"relative error {error:.3g}" if isinstance(error, int | float) and error > 1e-9 else ""
    return ", ".join(part for part in (*parts, lost) if part)


def _imported(card: Card) -> str:
    """When a version came here that another store made; its card's own time is when it was made there."""
    return str(card.origin.get("time") or "") if card.origin.get("kind") == "imported" else ""


def _made(card: Card) -> tuple[str, str]:
    """When an imported version was made, and how, as its maker says."""
    if not _imported(card) or "claimed_origin" not in card.origin:
        return ("made", "")
    told = card.origin["claimed_origin"]
    kind = told.get("kind") if isinstance(told, dict) else None
    return (str(kind) if kind in _MADE else "made", f"{card.created}, by its maker's word")


def _losses(losses: list[float]) -> str:
    if not losses:
        return ""
    return f"{sparkline(losses)} {losses[0]:.3f} -> {losses[-1]:.3f}, {counted(len(losses), 'steps')}"


def _origin(card: Card) -> str:
    """Where an imported version was got; what its card says beyond that is its maker's word."""
    told = card.origin
    if told.get("kind") != "imported":
        return ""
    repo = f"{told['repo']} at {str(told.get('commit'))[:12]}" if told.get("repo") else str(told.get("from") or "")
    word = "; its card is its maker's word" if "claimed_origin" in told else ""
    return f"{repo}, imported {told['time'][:10]}{word}" if told.get("time") else f"{repo}{word}"


def _base(card: Card) -> str:
    base = card.base
    mark = (base.get("fingerprint") or {}).get("digest") or ""
    quantized = base.get("quantization") if base.get("quantization") != "none" else ""
    parts = [quantized, base.get("dtype"), f"fingerprint {mark[:12] or 'unknown'}"]
    return f"{base.get('name') or 'unknown'} ({', '.join(str(part) for part in parts if part)})"


def _adapter(card: Card) -> str:
    shape = ", ".join(
        f"{key} {card.adapter[key]:,}" for key in _SHAPE if isinstance(card.adapter.get(key), int | float)
    )
    return ", ".join(part for part in (shape, size(card.adapter.get("bytes"))) if part)


def _effect(card: Card) -> str:
    """The certificate: what the adapter does to the base on fixed texts."""
    moved, loss, bare = (card.effect.get(key) for key in ("max_logit_change", "loss", "base_loss"))
    parts = [f"moves logits by up to {moved:.3g}"] if isinstance(moved, int | float) else []
    if isinstance(loss, int | float) and isinstance(bare, int | float):
        parts.append(f"loss on the probes {loss:.3f} (base {bare:.3f})")
    return ", ".join(parts)


def _data(told: Any) -> str:
    if not isinstance(told, dict):
        return ""
    return f"{told.get('source')}, {counted(told.get('rows'), 'rows')}, sha256 {str(told.get('sha256'))[:12]}"


def _recipe_lines(recipe: dict[str, Any] | None) -> list[str]:
    """The recipe as YAML, a section a line, without what was left open."""
    if not recipe:
        return []
    return [f"{key}: {_flow(recipe[key])}" for key in sorted(recipe, key=_place) if recipe[key] is not None]


def _place(key: str) -> tuple[int, str]:
    return (_ORDER.index(key) if key in _ORDER else len(_ORDER), key)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        keys = sorted((k for k, v in value.items() if v not in (None, {}, [])), key=lambda key: (key != "type", key))
        return "{" + ", ".join(f"{key}: {_flow(value[key])}" for key in keys) + "}"
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _file_lines(manifest: Manifest) -> list[str]:
    return [f"{fact.sha256[:12]}  {size(fact.size):>8}  {name}" for name, fact in sorted(manifest.files.items())]


def _merge_lines(root: Path, ref: Ref) -> list[str]:
    """Merges that were made of it, the latest first, failed ones too; their reports are kept in the store."""
    from ..store.reports import kept_reports

    if ref.version is None:
        return []
    lines = []
    for folder, told in kept_reports(root, ref.name, ref.version)[: -_REPORTS - 1 : -1]:
        verdict = "passed" if told.get("passed") is True else "FAILED"
        form = "" if told.get("to") in (None, "auto") else f" as {told['to']}"
        lines.append(
            f"{told.get('created')}  {verdict}  {told.get('adapter')}{form} in {told.get('out')}; report: {folder}"
        )
    return lines


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {printable(line)}" for line in lines)] if lines else []


def _next(store: Store, name: str, card: Card) -> list[str]:
    if card.task.get("type"):
        return [f"Measure it again with `ahl eval {name}`, try it with `ahl run --adapter {name} PROMPT`."]
    return [f"Try it with `ahl run --adapter {name} PROMPT`."]
