"""The base of a merge: known by its folder, loaded only where it fits, and the very one that the adapters are of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..bases.devices import DTYPES, choose_device, choose_dtype
from ..bases.fetch import locate
from ..bases.fingerprint import fingerprint
from ..bases.load import Base, checked_config
from ..bases.memory import MemoryReport, available_bytes
from ..bases.quiet import quiet
from ..bases.skeleton import skeleton_of
from ..bases.views import kind_of
from ..errors import BaseUnavailable, StoreError, Unsupported
from ..events import Listener, ignore
from ..formats.card import Card
from ..merging.checkpoint import Checkpoint
from ..merging.merged import merged_before
from ..names import Ref
from ..places import cache_root
from ..runtime.admit import claim, compare_base
from ..store import Store
from .merge_probe import probe_bytes
from .own_base import chosen_base

REPORT = "merge_report.json"
_SPARE = 256 << 20  # bytes beside weights and logits: activations, the libraries
_KEPT = 3  # tables of logits of the probe: of the reference, the bare base and the merged model

MERGED = "merged"
"""The folder of a store that takes merged checkpoints; no version is there."""


def known_base(card: Card, name: str | None, quantize: str | None, device: str, on_event: Listener = ignore) -> Base:
    """A base without its weights (its model is on the meta device): configuration, tokenizer, fingerprint.

    Raises:
        Unsupported, BaseUnavailable, NotFound: as `load_own_base`.
    """
    from transformers import AutoTokenizer

    source = locate(chosen_base(card, name), on_event=on_event)
    config = checked_config(source.folder)
    choices = {"device": choose_device(device)}
    choices["dtype"] = choose_dtype(choices["device"].value)
    quantization = quantize or card.base.get("quantization") or "none"
    model = skeleton_of(config, None).model
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a broken one fails in as many ways as there are libraries below
            raise BaseUnavailable(f"{source.folder} has no tokenizer that loads: {error}", "Get it anew.") from error
        mark = fingerprint(source.folder, tokenizer, quantization, cache_root() / "fingerprints.json")
    empty = MemoryReport(0, 0, 0)
    return Base(source.name, kind_of(config), model, tokenizer, quantization, source, mark, choices, empty)


def is_loaded(base: Base) -> bool:
    """Whether its weights are in memory."""
    return not any(parameter.is_meta for parameter in base.model.parameters())


def fits(base: Base, models: int) -> bool:
    """Whether so many models of the base's size, in what it computes in, fit in the memory that is free now."""
    checkpoint = Checkpoint.open(base.source.folder)
    count = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    logits = probe_bytes(int(getattr(base.config, "vocab_size", 0) or 0))
    need = models * count * DTYPES[base.choices["dtype"].value].itemsize + _KEPT * logits + _SPARE
    return need <= _room(base.device)


def _room(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def check_base(members: Sequence[tuple[Ref, Card]], base: Base, named: bool) -> list[str]:
    """What is not quite certain of a base, in sentences.

    Args:
        named: the caller said which base it is.

    Raises:
        BaseMismatch: an adapter was made for another one.
        Unsupported: nobody says which one; or it is a merged checkpoint that one of the adapters is in already.
    """
    remarks = []
    for ref, card in members:
        mark = card.base.get("fingerprint")
        known = isinstance(mark, dict) and bool(mark.get("weights"))
        _check_not_merged(ref, known, base.source.folder)
        if not known and not named:
            raise Unsupported(
                f"{ref} does not say which base's weights it was made for: merged into others it would be nonsense.",
                "If you know its base, name it with --base NAME.",
            )
        remarks.append(compare_base(str(ref), card.base, base) or claim(str(ref), card.origin))
    return [remark for remark in remarks if remark]


def merged_into(folder: Path) -> list[dict[str, Any]]:
    """What the configuration or the report in a folder says was merged into its weights: entries with a digest."""
    try:
        found = merged_before(json.loads((folder / "config.json").read_text("utf-8")))
        if not found and (folder / REPORT).is_file():
            told = json.loads((folder / REPORT).read_text("utf-8"))
            found = [one for one in told.get("adapters") or [told] if isinstance(one, dict)]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return []
    return found


def _check_not_merged(ref: Ref, known: bool, folder: Path) -> None:
    inside = merged_into(folder)
    if any(one.get("digest") == ref.digest for one in inside):
        raise Unsupported(
            f"{folder} is a merged checkpoint that {ref} is in already.", "Merge into the base that it was made of."
        )
    if inside and not known:
        raise Unsupported(
            f"{folder} is a merged checkpoint, and {ref} does not say that it was made for it.",
            "Merge into its own base; several adapters at once with ahl merge A@1,B@1.",
        )


def place_of(out: str | Path) -> Path:
    """The folder that is meant, absolute.

    Raises:
        StoreError: no folder can be called so.
    """
    hint = "Name a folder that does not exist yet."
    try:
        path = Path(out).expanduser().absolute()
    except RuntimeError as error:
        raise StoreError(f"{out} is in the home of a user who does not exist.", hint) from error
    if "\0" in str(path) or any("\ud800" <= c <= "\udfff" for c in str(path)):  # surrogates: bytes that are no UTF-8
        raise StoreError(f"{str(path)!r} is no name that every program can read.", hint)
    return path


def check_place(out: Path, store: Store, base: Base) -> None:
    """A checkpoint written among a store's versions, or into its own base, would break them; `merged/` is for it.

    Raises:
        StoreError: it would be.
    """
    target = out.expanduser().absolute().parent.resolve() / out.name
    kept = (store.path.resolve(), base.source.folder.resolve())
    own = kept[0] / MERGED
    inside = next((k for k in kept if target.is_relative_to(k)), None)
    if inside is not None and not (target != own and target.is_relative_to(own)):
        hint = f"Name a folder outside the store and the base, or in {own}."
        raise StoreError(f"{out} is inside {inside}.", hint)
