"""What differs between two versions, for people: a line for what is the same, a small table for what is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from .render import Column, age, counted, cut, ellipsis, printable, seconds, shows, table, width

if TYPE_CHECKING:
    from ..adapters.compare import Comparison, Overlap
    from ..workflows.difference import Answers, Change, DataChange, Difference

_SHOWN_ANSWERS = 4
_SHORTEST, _LONGEST = 16, 120  # characters of an answer or a prompt, on wide screens too
_VALUE = 48
_ONE_COLUMN = 12  # layers; more stand side by side where there is room
_BAR = 8
_EIGHTHS = " ▏▎▍▌▋▊▉"
_WHOLE, _PLAIN_WHOLE = "█", "#"
_DIGEST = re.compile(r"[0-9a-f]{40,64}", re.ASCII)
_IN_RECIPE = {"seed": "training.seed", "task.max_length": "training.max_length"}


def difference_lines(found: Difference, modules: bool = False) -> list[str]:
    """The whole comparison; with `modules` every module instead of every layer."""
    if found.same:
        return [f"{found.a.ref} and {found.b.ref} are the same, byte for byte (digest {found.a.digest[:12]})."]
    return [
        *_heads(found),
        *_changes("recipe", found, found.recipe, found.recipe_note),
        *_changes("base", found, found.base),
        *_data(found),
        *_metrics(found),
        *_changes("made", found, _beyond_recipe(found)),
        *_weights(found, modules),
        *(line for answers in found.answers for line in _answers(found, answers)),
        *([] if found.answers else ["answers: none recorded; --outputs N lets both answer now"]),
    ]


def _heads(found: Difference) -> list[str]:
    columns = [Column("", 0)] * 2 + [Column("", 2), Column("", 1), Column("", 3)]
    rows = [
        (letter, side.ref, side.type, side.digest[:12], age(side.created))
        for letter, side in (("a", found.a), ("b", found.b))
    ]
    return table(columns, rows)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)]


def _room() -> int:
    return width() - 2


# --- facts -------------------------------------------------------------------------------------------------------


def _changes(title: str, found: Difference, changes: Iterable[Change], note: str = "") -> list[str]:
    rows = [(change.path, *_values(change)) for change in changes]
    if not rows:
        return [f"{title}: {note or 'the same'}"]
    return _section(title, table([Column("FIELD"), *_sides(found)], rows, _room()))


def _sides(found: Difference, right: bool = False) -> list[Column]:
    return [Column(found.a.ref, right=right), Column(found.b.ref, right=right)]


def _beyond_recipe(found: Difference) -> list[Change]:
    """What the recipe's changes do not say already."""
    told = {change.path for change in found.recipe}
    return [change for change in found.made if _IN_RECIPE.get(change.path, change.path) not in told]


def _values(change: Change) -> list[str]:
    return _cut_alike([_value(change.path, value) for value in (change.a, change.b)], _VALUE)


def _value(path: str, value: Any) -> str:
    if value is None:
        return "-"
    if path == "duration_seconds":
        return seconds(value) if value >= 60 else f"{value:.3g} s"
    if isinstance(value, str):
        return value[:12] if _DIGEST.fullmatch(value) else value
    return json.dumps(value, ensure_ascii=False)


def _cut_alike(texts: Sequence[str], limit: int) -> list[str]:
    """Texts in at most `limit` characters, all from the same place: a little before the first two differ."""
    texts = [printable(text) for text in texts]
    if max(map(len, texts)) <= limit:
        return list(texts)
    differing = next((i for i, (a, b) in enumerate(zip_longest(*texts[:2])) if a != b), 0)
    start = max(0, differing - limit // 3)
    return [_cut(text, start, limit) for text in texts]


def _cut(text: str, start: int, limit: int) -> str:
    mark = ellipsis()
    return cut(f"{mark}{text[start + len(mark) :]}" if start and len(text) > start else text[start:], limit)


def _data(found: Difference) -> list[str]:
    if all(split.same for split in found.data):
        told = ", ".join(f"{split.split} {counted((split.a or {}).get('rows'), 'rows')}" for split in found.data)
        return [printable(f"data: the same ({told})" if told else "data: none recorded")]
    rows = [(split.split, "the same" if split.same else "other rows", *_sources(split)) for split in found.data]
    return _section("data", table([Column("SPLIT"), Column(""), *_sides(found)], rows, _room()))


def _sources(split: DataChange) -> list[str]:
    return [
        f"{counted(told['rows'], 'rows')}, {str(told['sha256'])[:12]}, {told['source']}" if told else "-"
        for told in (split.a, split.b)
    ]


def _metrics(found: Difference) -> list[str]:
    if not found.metrics:
        return ["metrics: none recorded"]
    if all(one.delta == 0 and one.same_data for one in found.metrics):
        told = ", ".join(f"{one.split} {one.name} {one.a:.3f}" for one in found.metrics)
        return [printable(f"metrics: the same ({told})")]
    columns = [Column("METRIC"), *_sides(found, True), Column("CHANGE", right=True), Column("", 1)]
    rows = [
        (
            f"{one.split} {one.name}",
            *("-" if value is None else f"{value:.3f}" for value in (one.a, one.b)),
            "-" if one.delta is None else f"{one.delta:+.3f}",
            "" if one.same_data or one.delta is None else "on other rows",
        )
        for one in found.metrics
    ]
    return _section("metrics", table(columns, rows, _room()))


# --- weights -----------------------------------------------------------------------------------------------------


def _weights(found: Difference, modules: bool) -> list[str]:
    if found.weights is None:
        return [printable(f"weights: not compared: {found.weights_note}")]
    if found.same_weights and found.same_config and not modules:
        return ["weights: the same"]
    weights = found.weights
    shown = weights.modules if modules else [one for one in weights.layers if one.part in ("delta", "prefix")]
    name = Column("MODULE" if modules else "LAYER")
    columns = [name, *_sides(found, True), Column("COSINE"), Column("", picture=True)]
    rows = [_overlap(one) for one in (*shown, *weights.whole)]
    lines = table(columns, rows, _room())
    if len(lines) > 1 + len(rows):  # too narrow for a line a row
        return _section("weights", [*lines, *_alone(found, weights)])
    head, body, whole = lines[0], lines[1 : 1 + len(shown)], lines[1 + len(shown) :]
    return _section("weights", [*_side_by_side(head, body), *whole, *_alone(found, weights)])


def _overlap(one: Overlap) -> list[str]:
    name = one.name if one.part in ("delta", "prefix") else f"{one.name} {one.part}"
    norms = ["-" if norm is None else f"{norm:.3g}" for norm in (one.norm_a, one.norm_b)]
    return [name, *norms, *(("-", "") if one.cosine is None else (f"{one.cosine:+.3f}", _bar(one.cosine)))]


def _bar(cosine: float) -> str:
    if not shows(_WHOLE + _EIGHTHS):
        return _PLAIN_WHOLE * round(abs(cosine) * _BAR)
    whole, eighths = divmod(round(abs(cosine) * _BAR * 8), 8)
    return (_WHOLE * whole + _EIGHTHS[eighths]).rstrip()


def _side_by_side(head: str, body: list[str]) -> list[str]:
    """Many short lines in up to three columns, read downwards, each under its own head."""
    if not body:
        return [head]
    longest = max(map(len, (head, *body)))
    fitting = (_room() + 3) // (longest + 3) if _room() < 1000 else 1  # without a screen there is one column
    columns = max(1, min(3, fitting, -(-len(body) // _ONE_COLUMN)))
    height = -(-len(body) // columns)
    parts = [[head, *body[i : i + height]] for i in range(0, len(body), height)]
    lines = zip_longest(*parts, fillvalue="")
    return ["   ".join(cell.ljust(longest) for cell in cells).rstrip() for cells in lines]


def _alone(found: Difference, weights: Comparison) -> list[str]:
    lines = []
    for side, name in (("a", found.a.ref), ("b", found.b.ref)):
        only = weights.only_in(side)  # type: ignore[arg-type]
        if only:
            named = ", ".join(f"{one.name} {one.part}" if one.part != "delta" else one.name for one in only[:3])
            more = f" and {len(only) - 3} more" if len(only) > 3 else ""
            lines.append(printable(f"only in {name}: {named}{more}"))
    return lines


# --- answers -----------------------------------------------------------------------------------------------------


def _answers(found: Difference, answers: Answers) -> list[str]:
    kind = "given now" if answers.live else "recorded"
    if answers.note:
        return [printable(f"answers {kind}: {answers.split} not compared: {answers.note}")]
    if not answers.changed:
        every = "all " if answers.compared != 1 else ""
        return [printable(f"answers {kind}: the same to {every}{counted(answers.compared, 'rows')} of {answers.split}")]
    limit = max(min(_room() - 12, _LONGEST), _SHORTEST)
    lines = []
    for one in answers.changed[:_SHOWN_ANSWERS]:
        lines.append(f"row {one.row}" + (f": {_cut(printable(one.prompt), 0, limit)}" if one.prompt else ""))
        names = [found.a.ref, found.b.ref] + (["expected"] if one.reference is not None else [])
        texts = _cut_alike([one.a, one.b, one.reference or ""], limit)
        size = max(map(len, names))
        lines += [f"  {name:<{size}}  {text}".rstrip() for name, text in zip(names, texts, strict=False)]
    left = len(answers.changed) - _SHOWN_ANSWERS
    if left > 0:
        lines.append(f"and {left} more; --json shows all")
    count = f"{len(answers.changed)} of {counted(answers.compared, 'rows')} of {answers.split} differ"
    return _section(printable(f"answers {kind}: {count}"), lines)
