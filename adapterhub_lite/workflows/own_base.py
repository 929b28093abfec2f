"""The base that a stored adapter was made for, loaded."""

from __future__ import annotations

from pathlib import Path

from ..bases.fingerprint import weights_digest
from ..bases.load import Base, load_base
from ..errors import BaseMismatch, Unsupported
from ..events import Listener, ignore
from ..formats.card import Card
from ..places import cache_root
from .base_choice import base_name, is_trusted


def load_own_base(
    card: Card,
    *,
    name: str | None = None,
    quantize: str | None = None,
    device: str = "auto",
    on_event: Listener = ignore,
) -> Base:
    """Load the base a card names, in the quantisation it was trained on; `name` and `quantize` decide otherwise.

    Raises:
        Unsupported: the card names no base.
        BaseUnavailable, NotFound: it cannot be found.
    """
    chosen = chosen_base(card, name)
    return load_base(chosen, quantize or card.base.get("quantization") or "none", device, on_event=on_event)


def chosen_base(card: Card, name: str | None = None) -> str:
    """The base to load: `name`, else the one a card names if that may be loaded unasked.

    Raises:
        Unsupported: the card names none, or is a foreign one.
    """
    chosen = name or base_name(card)
    if not chosen:
        raise Unsupported("This adapter does not say which base it was made for.", "Name it: --base NAME.")
    if not name and not is_trusted(card):
        raise Unsupported(
            f"This imported adapter names the base {chosen!r}; what a foreign file names is not loaded unasked.",
            f"If you trust it: --base {chosen}",
        )
    return chosen


def check_weights(folder: Path, wanted: str | None, whose: str) -> None:
    """Compare the tensors of a checkpoint folder with the digest that a card has of its base's, where it has one.

    Raises:
        BaseMismatch: they are others.
    """
    if wanted and weights_digest(folder, cache_root() / "fingerprints.json") != wanted:
        message = f"{folder} holds other weights than {whose} was made for."
        raise BaseMismatch(message, "Name its own base with --base BASE.")
