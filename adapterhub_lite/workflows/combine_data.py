"""What data a version made of others has: that of its parents, by one name where they agree, by parent otherwise.

`test of sql@1` is the test part that sql@1 was measured on, with the task that it was asked in. Where parents differ,
the card has one such split for each, and `test` is that of the parent whose task the new version has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.card import Card
from ..tasks.rows import Rows
from .combine_members import Member
from .data import HUB, TASK, split_rows
from .figures import judge_of

OF = " of "
_MEASURED = ("test", "validation")


@dataclass(frozen=True)
class HeldOut:
    """Rows that a parent was, or may be, measured on.

    Attributes:
        split: what the parent's card calls them; "" where it has none.
        name: what the card of the new version calls them.
        task: the task in which they are asked.
    """

    parent: Member
    split: str
    name: str
    task: Mapping[str, Any]

    def rows(self) -> Rows | None:
        """The rows, if they are where they were and unchanged."""
        return split_rows(self.parent.card, self.split) if self.split else None

    @property
    def identity(self) -> tuple[object, str]:
        """Equal for the same rows, asked and judged alike."""
        return self.parent.card.data.get(self.split, {}).get("sha256"), judge_of(self.task)


def part_name(split: str, rows: int, of_rows: int) -> str:
    """What a card calls the metrics of so many rows of a split: never as those of the whole split."""
    return split if rows == of_rows else f"{split} ({rows:,} of {of_rows:,} rows)"


def held_out(members: Sequence[Member], primary: Member) -> list[HeldOut]:
    """The test sets of all members, those of `primary` first; a member without one has an entry without a split."""
    ordered = [primary, *(member for member in members if member is not primary)]
    found = [one for member in ordered for one in _sets_of(member)]
    held = {one.identity for one in found if one.split}
    if len(held) == 1 and not any(OF in one.split for one in found):
        return [HeldOut(one.parent, one.split, one.split, one.task) for one in found]
    return found


def _sets_of(member: Member) -> list[HeldOut]:
    data, task = member.card.data, member.card.task
    nested = [split for split in data if split.startswith(f"test{OF}")]
    nested += [s for s in data if s.startswith(f"validation{OF}") and s.replace("validation", "test", 1) not in nested]
    if nested:  # a mix of mixes is measured on what their parents were
        return [HeldOut(member, split, split, data[split].get(TASK) or task) for split in nested]
    split = next((split for split in _MEASURED if data.get(split)), "")
    return [HeldOut(member, split, f"{split}{OF}{member}" if split else "", task)]


def data_of(members: Sequence[Member], primary: Member) -> dict[str, Any]:
    """The `data` of the card of a version made of `members`."""
    found: dict[str, Any] = {}
    for split in dict.fromkeys(split for member in members for split in member.card.data):
        holders = [member for member in members if split in member.card.data]
        if OF in split:
            found[split] = _facts(holders[0].card, split)
        elif len(holders) == len(members) and len({_asked(member.card, split) for member in holders}) == 1:
            found[split] = _facts(primary.card, split)
        else:
            for member in holders:
                told = {TASK: dict(member.card.task)} if split in _MEASURED and member.card.task.get("type") else {}
                found[f"{split}{OF}{member}"] = {**_facts(member.card, split), **told}
            if split in _MEASURED and split in primary.card.data:
                found[split] = _facts(primary.card, split)
    return found


def _asked(card: Card, split: str) -> tuple[object, ...]:
    """Equal where two cards have the same rows in a split and, where it is measured on, the same task."""
    sha256 = card.data[split].get("sha256")
    return (sha256, judge_of(card.task)) if split in _MEASURED else (sha256,)


def _facts(card: Card, split: str) -> dict[str, Any]:
    """What the card tells of a split, and how to get the rows of a Hub dataset, which its recipe told.

    A foreign card's word leads to no dataset, and so does not in the card of what is made of it.
    """
    told = dict(card.data[split])
    if card.origin.get("kind") == "imported":
        return {key: value for key, value in told.items() if key not in (HUB, "path")}
    source = ((card.recipe or {}).get("data") or {}).get(split)
    return {**told, HUB: dict(source)} if isinstance(source, dict) and source.get("hub") else told
