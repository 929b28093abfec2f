"""Where stored versions get in each other's way, before they are combined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..bases.load import Base
from ..combining.changes import check_additive
from ..combining.conflicts import DENSITY, ConflictReport
from ..combining.conflicts import conflicts as compare_changes
from ..errors import Unsupported
from ..events import Listener, Stage, ignore
from ..store import Store
from .combine import changes_in
from .combine_base import ground_of
from .combine_members import Member, Weighted, check_one_base, members_of


def conflicts(
    adapters: Weighted,
    *,
    weights: Sequence[float] | None = None,
    density: float = DENSITY,
    plot: Path | None = None,
    store: Store | None = None,
    base: Base | str | None = None,
    on_event: Listener = ignore,
) -> ConflictReport:
    """Compare the changes of versions of one base: by module, by layer and as a whole; no model is loaded.

    Args:
        adapters, weights: as for `combine`; the weight of each is 1 by default.
        density: share of each matrix's elements, the largest, whose signs are compared.
        plot: a file (.png, .svg, .pdf) for a heat map of shares and cosines by layer.
        base: their base, loaded or by name; needed where a card does not tell its fingerprint, and for DoRA and IA3
            where their own is not on this disk.

    Raises:
        Unsupported: fewer than two adapters, or one that is no change of weights.
        BaseMismatch: they are of different bases.
    """
    store = store if store is not None else Store()
    if plot is not None:
        from .curves import check_target

        check_target(plot)
    members = members_of(store, adapters, weights, 1.0)
    if len(members) < 2:
        raise Unsupported(f"{members[0]} alone has nothing to be in conflict with.", "Name two or more adapters.")
    if not isinstance(base, str):  # one that is named is loaded, which takes a while
        check_one_base(members, base)
    adapters_read = [member.adapter(store) for member in members]
    for adapter in adapters_read:
        check_additive(adapter)
    ground = ground_of(members, base, None, "auto", on_event)
    on_event(Stage(f"comparing the changes of {', '.join(map(str, members))}"))
    report = compare_changes(
        [(changes_in(one, read, ground), one.weight) for one, read in zip(members, adapters_read, strict=True)],
        density,
        trained_on=[_trained_on(member) for member in members],
        on_event=on_event,
    )
    if plot is not None:
        from .conflicts_plot import draw_conflicts

        draw_conflicts(report, plot)
    return report


def _trained_on(member: Member) -> str:
    """The digest of its training data, "" where its card tells none."""
    train = member.card.data.get("train")
    return str(train.get("sha256") or "") if isinstance(train, dict) else ""
