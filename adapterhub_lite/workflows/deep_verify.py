"""Verify stored versions by what they do: each on its own base, measured anew and compared with its card."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import AdapterHubError, BaseMismatch, Unsupported
from ..events import Listener, Progress, ignore
from ..formats.card import Card
from ..names import Ref
from ..runtime.admit import admit, prove
from ..store import Finding, Store
from .base_choice import base_name, is_trusted
from .own_base import load_own_base

Findings = list[Finding]


def verify_deep(
    refs: Sequence[str | Ref], *, store: Store | None = None, device: str = "auto", on_event: Listener = ignore
) -> tuple[Findings, Findings]:
    """Measure versions again, whatever was found on this machine before. Reports; does not raise.

    Returns:
        What is wrong, and the versions that could not be measured, each with "not checked: " and the reason. Versions
        of one base follow each other, so that each base is loaded once, and one at a time.
    """
    store = store if store is not None else Store()
    wrong: Findings = []
    groups: dict[object, list[tuple[Ref, Card]]] = {}
    for ref in refs:
        try:
            resolved = store.resolve(ref)
            card = store.card(resolved)
        except AdapterHubError as error:
            wrong.append(Finding(str(ref), str(error)))
        else:
            groups.setdefault(_base_of(card), []).append((resolved, card))
    unchecked: Findings = []
    done, total = 0, sum(map(len, groups.values()))
    for versions in groups.values():
        found, skipped = _measure([ref for ref, _ in versions], versions[0][1], store, device, on_event)
        wrong, unchecked, done = wrong + found, unchecked + skipped, done + len(versions)
        on_event(Progress("measuring effects", done, total, "versions"))
    return wrong, unchecked


def _base_of(card: Card) -> object:
    """Versions alike in this are measured on one base: by what `load_own_base` makes of a card."""
    name = base_name(card)
    return name, card.base.get("quantization") or "none", is_trusted(card)


def _measure(
    refs: Sequence[Ref], card: Card, store: Store, device: str, on_event: Listener
) -> tuple[Findings, Findings]:
    if base_name(card) and not is_trusted(card):
        return [], [_not_checked(ref, _untrusted(ref, card)) for ref in refs]
    try:
        base = load_own_base(card, device=device, on_event=on_event)
    except AdapterHubError as error:
        return [], [_not_checked(ref, error) for ref in refs]
    wrong, unchecked = [], []
    for ref in refs:
        try:
            _prove(ref, store, base)
        except BaseMismatch as error:  # the base that is here now is another one; the version may be as good as ever
            unchecked.append(_not_checked(ref, error))
        except AdapterHubError as error:
            wrong.append(Finding(str(ref), str(error)))
    return wrong, unchecked


def _prove(ref: Ref, store: Store, base: Base) -> None:
    with base.lock, quiet():
        prove(admit(store, ref, base), base)


def _untrusted(ref: Ref, card: Card) -> Unsupported:
    """Each is measured where its base is named, before it answers."""
    name = str(card.base["name"])
    return Unsupported(
        f"it names the base {name!r}; what a foreign file names is not loaded unasked.",
        f"If you trust it, this measures it: ahl run --adapter {ref} --base {shlex.quote(name)} PROMPT",
    )


def _not_checked(ref: Ref, error: AdapterHubError) -> Finding:
    return Finding(str(ref), f"not checked: {error}")
