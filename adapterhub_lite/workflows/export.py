"""A version as the files that a program elsewhere loads, computing there what it computes here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, stored_adapter
from ..bases.catalog import CATALOG
from ..bases.fetch import expanded, locate, on_disk
from ..bases.load import checked_config
from ..bases.quiet import quiet
from ..errors import AdapterHubError, AdapterMismatch, StoreError, Unsupported
from ..events import Listener, Stage, ignore
from ..exporting.base import BaseFacts, base_facts
from ..exporting.findings import Finding, one_of, refusals
from ..exporting.lint import svd_error
from ..exporting.pairs import Pair, is_exact
from ..exporting.prepare import Layer, Prepared, prepare
from ..exporting.readers import Reader, reader_named
from ..exporting.report import ExportReport
from ..exporting.staging import staged_folder
from ..exporting.trained_on import is_quantized, measured_original, quantized_advice, quantized_base
from ..exporting.traits import Asked
from ..exporting.write import MODELFILE, modelfile, write_gguf, write_peft, write_report
from ..formats.card import Card
from ..formats.specs import InjectedSpec, PrefixSpec, PromptSpec
from ..merging.merge import check_out
from ..merging.weights import Weights
from ..names import Ref
from ..store import Store
from ..store.fs import MUTABLE, FileSystem, write_file
from ..store.reports import kept_reports
from .base_choice import base_name as own_base_name
from .base_choice import is_trusted
from .own_base import check_weights

_ROUNDING = 1e-5  # of float32 factors, with room


def export(
    ref: str | Ref,
    target: str | Path,
    *,
    reader: str,
    store: Store | None = None,
    base: str | None = None,
    base_name: str | None = None,
    max_rank: int | None = None,
    rank: int | None = None,
    error: float | None = None,
    on_event: Listener = ignore,
) -> ExportReport:
    """Write a version as a folder that `reader` loads, rewritten where it would refuse it or misread it.

    The folder is read back and compared with the version before it appears; export_report.json in it says how.

    Args:
        reader: peft, vllm, sglang, lorax, llama.cpp or ollama.
        base: catalogue name, folder or Hub id of its base; by default its own, where that is on this disk.
        base_name: what the reader calls the base.
        max_rank: the largest rank that the reader's server was started with.
        rank, error: cut ranks by SVD, to this one or as far as this relative error allows.

    Raises:
        Unsupported: it cannot be written for this reader; the message says why.
        StoreError, StoreFull: `target` is there already, or could not be written.
    """
    asked = Asked(max_rank, rank, error, base_name)
    pending = look(ref, reader=reader, asked=asked, store=store, base=base, on_event=on_event)
    return pending.write(target, on_event=on_event)


@dataclass(frozen=True)
class Pending:
    """A version looked at as a reader would, and not written yet."""

    ref: Ref
    reader: Reader
    store: Store
    prepared: Prepared
    base_name: str | None

    @property
    def report(self) -> ExportReport:
        """What would be written, or why nothing can be."""
        made = self.prepared.adapter
        return ExportReport(
            ref=str(self.ref),
            digest=self.ref.digest or "",
            reader=self.reader.name,
            path=None,
            findings=tuple(self.prepared.findings),
            rank=self.prepared.facts.rank if made is not None and self._rewrites else None,
            layers=(),
            error=None,
            base_name=made.spec.base_model if made is not None else self.base_name,
        )

    def write(self, target: str | Path, *, fs: FileSystem | None = None, on_event: Listener = ignore) -> ExportReport:
        """Write it. Raises as `export`."""
        adapter, fs = self._allowed(), fs or FileSystem()
        path = _checked_target(Path(target), self.store)
        size = sum(tensor.nbytes for tensor in adapter.tensors.values())
        with staged_folder(path, size, fs, on_event) as staged:
            back = self._write(fs, staged, adapter, on_event)
            layers, error = self._proven(back)
            files = tuple(sorted(file.name for file in staged.iterdir()))
            report = replace(self.report, path=str(path), layers=layers, error=error, files=files)
            write_report(fs, staged, report.to_dict())
        return report

    @property
    def _rewrites(self) -> bool:
        return self.reader.plain or self.prepared.facts.asked.cuts

    def _allowed(self) -> Adapter:
        refused = refusals(self.prepared.findings)
        if refused or self.prepared.adapter is None:
            reasons = " ".join(f"{one.what}" for one in refused)
            raise Unsupported(f"{self.ref} is not written for {self.reader.name}: {reasons}", refused[0].done)
        return self.prepared.adapter

    def _write(self, fs: FileSystem, folder: Path, adapter: Adapter, on_event: Listener) -> Mapping[str, Pair]:
        if self.reader.form == "peft":
            return write_peft(fs, folder, adapter)
        base = self.prepared.facts.base
        assert base is not None  # else it was refused
        back = write_gguf(fs, folder, adapter, base.config, on_event)
        if self.reader.named:
            write_file(fs, folder / MODELFILE, modelfile(str(adapter.spec.base_model)), MUTABLE)
        return back

    def _proven(self, back: Mapping[str, Pair]) -> tuple[tuple[Layer, ...], float | None]:
        """What was read back against the version.

        Raises:
            AdapterMismatch: it is further from it than was said.
        """
        if not back:
            return (), None
        said = svd_error(self.prepared.facts) if self._rewrites else 0.0
        error = self.prepared.error(back)
        if not error <= said * 1.01 + _ROUNDING:
            message = f"What was written for {self.reader.name} differs from {self.ref} by {error:.1e} of it."
            raise AdapterMismatch(message, f"At most {said:.1e} was expected; nothing was written.")
        return self.prepared.layers(back), error


def look(
    ref: str | Ref,
    *,
    reader: str,
    asked: Asked | None = None,
    store: Store | None = None,
    base: str | None = None,
    on_event: Listener = ignore,
) -> Pending:
    """Look at a version as `reader` would, and rewrite it in memory. Raises as `export`; refusals are findings."""
    chosen, asked = reader_named(reader), asked or Asked()
    if asked.base_name is not None and (not asked.base_name.strip() or not asked.base_name.isprintable()):
        raise Unsupported("The name of a base is one line of text.", "Give another --base-name.")
    store = store if store is not None else Store()
    resolved = store.resolve(ref)
    card, adapter = store.card(resolved), stored_adapter(store.read(resolved))
    with quiet():
        folder = _base_folder(card, base)
        config, facts = _base(folder, adapter, named=base is not None)
        weights = None
        rewrites = chosen.plain or asked.cuts
        if folder is not None and facts is not None and rewrites and not is_exact(adapter):
            quantization = str(card.base.get("quantization") or "none")
            check_weights(folder, (card.base.get("fingerprint") or {}).get("weights"), str(resolved))
            weights = Weights(folder, config, adapter.spec.task_type, quantization)
            on_event(Stage(f"reading {resolved} as {chosen.name} would, with the weights of its base"))
        name = asked.base_name or _public_name(card) or adapter.spec.base_model
        prepared = prepare(adapter, chosen, asked, base=facts, weights=weights, base_name=name)
    findings = quantized_advice(prepared.findings, chosen, card.base.get("quantization"))
    merges = not isinstance(adapter.spec, PrefixSpec | PromptSpec | InjectedSpec)
    quantized = _quantized(card, resolved, chosen, store, merges=merges)
    other = _other_weights(card, name, str(resolved), chosen, merges=merges)
    prepared = replace(prepared, findings=[one for one in (quantized, other, *findings) if one is not None])
    return Pending(resolved, chosen, store, prepared, name)


def _base_folder(card: Card, name: str | None) -> Path | None:
    """The folder of the base: of the one that was named, else of its own where that is on this disk.

    A folder that the user names may hold config.json alone: most exports read no weights.
    """
    if name is not None:
        path = expanded(name).absolute()
        return path if (path / "config.json").is_file() else locate(name).folder
    own = own_base_name(card)
    if not own or not is_trusted(card):
        return None
    with suppress(AdapterHubError, OSError):
        return on_disk(own)
    return None


def _base(folder: Path | None, adapter: Adapter, *, named: bool) -> tuple[dict[str, Any], BaseFacts | None]:
    """The base's configuration and what it says; nothing where only we thought of it and it cannot be read."""
    if folder is None:
        return {}, None
    try:
        config = checked_config(folder)
        return config, base_facts(config, adapter.spec.task_type)
    except (AdapterHubError, OSError):
        if named:
            raise
        return {}, None


def _public_name(card: Card) -> str | None:
    """The base's name on the Hub, by which servers know it too."""
    repo = card.base.get("repo")
    entry = CATALOG.get(own_base_name(card) or "")
    return repo or (entry.hub_id if entry else None)


def _quantized(card: Card, ref: Ref, reader: Reader, store: Store, *, merges: bool) -> Finding | None:
    """That the base was quantised, with what a merge has measured on its other weights."""
    kind = card.base.get("quantization")
    if not is_quantized(kind) or ref.version is None:
        return None
    reports = [told for _, told in kept_reports(store.path, ref.name, ref.version)]
    measured = measured_original(reports, ref.digest, kind)
    return quantized_base(kind, own_base_name(card) or "its base", str(ref), reader, measured, merges=merges)


def _other_weights(card: Card, name: str | None, ref: str, reader: Reader, *, merges: bool = True) -> Finding | None:
    """Weights of a package differ from those of the same name on the Hub; a server would fetch the latter."""
    base = own_base_name(card) or ""
    entry = CATALOG.get(base)
    if entry is None or name != entry.hub_id or card.base.get("repo") is not None:
        return None
    what = f"it was trained on {base} as this machine has it, whose weights may not be those of {name} on the Hub"
    kind = card.base.get("quantization")
    load, how = ("load", f" in {kind}") if is_quantized(kind) else ("serve", "")
    loads = not is_quantized(kind) or str(kind) in reader.quantized
    ways = [f"{load} the folder that `ahl base show {base}` names{how}"] if loads else []
    ways += [f"ship the merge: `ahl merge {ref} --out DIR`"] if merges else []
    return Finding("base_weights", "info", f"{what}.", "told", one_of(ways))


def _checked_target(target: Path, store: Store) -> Path:
    """The folder to be written, which must be absent or empty and no part of the store."""
    hint = "Name a folder that does not exist yet."
    target = target.expanduser().absolute()
    if target.suffix.lower() in (".tar", ".gguf", ".zip", ".gz", ".tgz"):
        raise StoreError(f"{target.name} would be one file; for a reader a folder is written.", hint)
    check_out(target)
    if not target.parent.is_dir():
        raise StoreError(f"There is no folder {target.parent}.", "Make the folder first.")
    place = target.parent.resolve() / target.name
    if place.is_relative_to(store.path.resolve()):
        raise StoreError(f"{target} is inside the store.", hint)
    return place
