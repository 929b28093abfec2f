"""Open what a command works on: the store, a base, a runtime; with the libraries underneath silenced first."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..bases.load import Base
    from ..events import Listener
    from ..formats.card import Card
    from ..names import Ref
    from ..runtime.runtime import Runtime
    from ..store import Store

DEFAULT_BASE = "smollm2-135m-instruct"
_SWITCHES = {
    "BITSANDBYTES_NOWELCOME": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def silence() -> None:
    """Keep torch, transformers and their kin from talking; they read these switches when they are imported.

    What the user has set stays. AHL_DEBUG=1 lets them talk.
    """
    if os.environ.get("AHL_DEBUG") == "1":
        return
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


def open_store(path: Path | None) -> Store:
    """The store of `--store`."""
    from ..store import Store

    return Store(path)


def open_base(card: Card | None, name: str | None, quantize: str | None, device: str, on_event: Listener) -> Base:
    """The base to work on: the one that is named, else the card's own, else the default."""
    silence()
    from ..bases.load import load_base

    if card is None:
        return load_base(name or DEFAULT_BASE, quantize or "none", device, on_event=on_event)
    from ..workflows.own_base import load_own_base

    return load_own_base(card, name=name, quantize=quantize, device=device, on_event=on_event)


def checked_card(store: Store, ref: str | Ref) -> Card:
    """The card of a version whose files are sound: damage is found before a base is loaded for it."""
    found = store.resolve(ref)
    store.verified_folder(found)
    return store.card(found)


def open_runtime(
    store: Store, ref: str | None, name: str | None, quantize: str | None, device: str, on_event: Listener
) -> Runtime:
    """A runtime on the right base, with `ref` in use. Close it."""
    card = checked_card(store, ref) if ref is not None else None
    base = open_base(card, name, quantize, device, on_event)
    from ..runtime.runtime import Runtime

    runtime = Runtime(base, store, on_event=on_event)
    runtime.use(ref)
    return runtime
