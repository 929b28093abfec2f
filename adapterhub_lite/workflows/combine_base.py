"""The base that combined adapters stand on, as far as it is at hand: loaded, a folder of tensors, or a name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..bases.fetch import on_disk
from ..bases.load import Base, load_base
from ..errors import AdapterHubError
from ..events import Listener, Note
from ..formats.card import Card
from ..merging.weights import Weights
from .base_choice import base_name, is_trusted
from .combine_members import Member, check_one_base
from .own_base import check_weights, load_own_base
from .publish import base_summary

_CLAIMED = ("name", "repo", "commit", "revision")  # what leads to a base; of a foreign card it is not handed on


@dataclass(frozen=True)
class Ground:
    """What is known of the members' base.

    Attributes:
        facts: what a card says of it.
        folder: its checkpoint, where that is on this disk.
        base: loaded; None where it is not, or not yet.
        own: the member whose own base it is; None where the caller named one, or no card may.
        missing: why it cannot be loaded; "" where it can.
    """

    facts: dict[str, Any]
    folder: Path | None
    base: Base | None = None
    own: Member | None = None
    missing: str = ""


def ground_of(
    members: Sequence[Member], base: Base | str | None, quantize: str | None, device: str, on_event: Listener
) -> Ground:
    """Find the base of all members. One that is named is loaded; else their own is looked for on this disk only.

    Raises:
        BaseMismatch, Unsupported: the members are not of one base.
        BaseUnavailable, NotFound: the base that is named cannot be had.
    """
    if isinstance(base, str):
        kind = quantize or _heaviest(members).card.base.get("quantization") or "none"
        base = load_base(base, kind, device, on_event=on_event)
    check_one_base(members, base)
    _remark(members, on_event)
    if base is not None:
        return Ground(base_summary(base), base.source.folder, base)
    trusted = [member for member in members if is_trusted(member.card) and base_name(member.card)]
    if not trusted:
        return Ground(_without_claims(_heaviest(members).card), None, missing=_untrusted(members))
    own = _heaviest(trusted)
    folder, missing = _at_hand(own.card)
    return Ground(own.card.base, folder, own=own, missing=missing)


def with_base(
    ground: Ground, members: Sequence[Member], quantize: str | None, device: str, on_event: Listener
) -> Ground:
    """The same with the members' own base loaded, or with what was in the way: what was made is as good without it."""
    if ground.base is not None or ground.own is None or ground.missing:
        return ground
    try:
        loaded = load_own_base(ground.own.card, quantize=quantize, device=device, on_event=on_event)
        check_one_base(members, loaded)
    except AdapterHubError as error:
        return replace(ground, missing=error.message)
    return Ground(base_summary(loaded), loaded.source.folder, loaded)


def _heaviest(members: Sequence[Member]) -> Member:
    return max(members, key=lambda member: member.weight)


def _remark(members: Sequence[Member], on_event: Listener) -> None:
    kinds = {str(member.card.base.get("quantization")): str(member) for member in members}
    known = {kind: name for kind, name in kinds.items() if kind != "None"}
    if len(known) > 1:
        told = ", ".join(f"{name} on {kind}" for kind, name in known.items())
        on_event(Note(f"They were trained on one base in more than one precision: {told}.", "warning"))


def _at_hand(card: Card) -> tuple[Path | None, str]:
    """The folder of a card's base if it is on this disk, and why it is not."""
    name = str(base_name(card))
    try:
        found = on_disk(name)
    except (AdapterHubError, OSError):
        found = None
    return found, "" if found else f"The base {name} is not on this disk; --base BASE names another place."


def _without_claims(card: Card) -> dict[str, Any]:
    """The fingerprint stays: it can only refuse. A name could lead to a base that nobody here asked for."""
    return {key: value for key, value in card.base.items() if key not in _CLAIMED}


def _untrusted(members: Sequence[Member]) -> str:
    named = next((member for member in members if member.card.base.get("name")), None)
    if named is None:
        return "No card names their base; --base BASE does."
    name = named.card.base["name"]
    return f"That {named} was made for {name!r} is its maker's claim; --base {name} trusts it."


class FrozenWeights:
    """Module name -> its frozen weight [out, in] in float32, as the member's base computes with it.

    The folder is compared with the member's base when a weight is first asked for.
    """

    def __init__(self, member: Member, folder: Path, task_type: str | None) -> None:
        self._member, self._folder, self._task_type = member, folder, task_type

    def __call__(self, module: str) -> torch.Tensor:
        """The weight of one module.

        Raises:
            BaseMismatch: the folder holds other weights than the adapter was made for.
            AdapterMismatch: it has no such module.
        """
        return self._opened.weight(module)

    def bias(self, module: str) -> torch.Tensor | None:
        """The bias of one module [out], None where it has none. Raises as the weight."""
        return self._opened.bias(module)

    @cached_property
    def _opened(self) -> Weights:
        check_weights(self._folder, self._member.mark.get("weights"), str(self._member))
        config = json.loads((self._folder / "config.json").read_text("utf-8"))
        quantization = str(self._member.card.base.get("quantization") or "none")
        return Weights(self._folder, config, self._task_type, quantization)
