"""The folder of a merged model, by target: planned, staged, and what lies beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters.adapter import Adapter
from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import AdapterHubError
from ..events import Listener, Note, ignore
from ..merging.checkpoint import Checkpoint
from ..merging.gguf_model import check_gguf, write_gguf
from ..merging.inputs import Inputs
from ..merging.journal import Work
from ..merging.merge import plan_digest, staged_folder, staged_merge
from ..merging.merged import KEY, merged_before
from ..merging.plan import MergePlan, plan_merge
from ..merging.quantised import QuantisedPlan, quantised_plan, residual_adapter
from ..merging.report import MergeReport
from ..merging.report_html import to_html
from ..merging.residual import Factors, write_residual
from ..names import Ref
from ..store import Store
from ..store.fs import MUTABLE, FileSystem, storing, write_file
from ..store.reports import keep_report
from .merge_base import REPORT
from .merge_request import Request
from .merge_served import GGUF

PAGE = "merge_report.html"


@dataclass(frozen=True)
class Maker:
    """Makes plans of one merge.

    Attributes:
        inputs, factors: what layers read and what the adapters change, where 4 or 8 bits are to be chosen by it; asked
            for once.
    """

    request: Request
    adapters: Sequence[tuple[Adapter, float]]
    checkpoint: Checkpoint
    base: Base
    labels: list[str] | None
    inputs: Callable[[], Mapping[str, Inputs] | None]
    factors: Callable[[], Mapping[str, Factors] | None]

    def check(self) -> None:
        """Raise what makes the merge impossible, whatever the values are."""
        floats = self.floats("original")
        if self.request.gguf:
            check_gguf(floats, self.base.source.folder, self.request.kind)
        elif self.request.kind != "float":
            with quiet():
                quantised_plan(floats, self.request.kind)

    def floats(self, bake: str) -> MergePlan:
        """The plan before anything is quantised, noted in its configuration with base and bake."""
        with quiet():
            plan = plan_merge(
                self.adapters,
                self.checkpoint,
                quantization=self.base.quantization,
                bake=bake,
                dtype=self.request.dtype,
                labels=self.labels,
            )
        before, more = merged_before(plan.config), {"base": self.base.fingerprint.digest, "bake": plan.bake}
        count = len(self.adapters)
        noted = [*before[:-count], *({**entry, **more} for entry in before[-count:])]
        return replace(plan, config={**plan.config, KEY: noted})

    def final(self, floats: MergePlan) -> MergePlan:
        """The plan of what is written."""
        if self.request.kind not in ("nf4", "int8"):
            return floats
        rank, inputs = self.request.residual, self.inputs()
        changes = self.factors() if rank else None
        with quiet():
            return quantised_plan(floats, self.request.kind, residual_rank=rank, inputs=inputs, changes=changes)

    def trial(self, bake: str) -> MergePlan:
        """The plan that a bake is measured by: its 4 and 8 bits are chosen by searched scales alone."""
        floats = self.floats(bake)
        if self.request.kind not in ("nf4", "int8"):
            return floats
        with quiet():
            return quantised_plan(floats, self.request.kind)


@contextmanager
def staged(
    request: Request, plan: MergePlan, base: Base, out: Path, on_event: Listener = ignore
) -> Iterator[tuple[Path, Adapter | None]]:
    """Write the model beside `out` and yield that folder and its residual adapter; leaving well moves it to `out`.

    An exception in the block leaves nothing called `out`.

    Raises:
        StoreError, StoreFull: it could not be written.
    """
    if request.gguf:
        kind, name, source = request.kind, out.name, base.source.folder

        def write(work: Work) -> None:
            write_gguf(plan, source, work.checkpoint / GGUF, kind, FileSystem(), on_event, name=name)

        # One file is written: there is nothing that another attempt could go on from.
        identity = plan_digest(plan.varied(f"gguf {kind}"))
        with staged_folder(identity, out, plan.nbytes, write, on_event=on_event) as folder:
            yield folder, None
        return
    with staged_merge(plan, base.source.folder, out, on_event=on_event) as folder:
        residual = None
        if isinstance(plan, QuantisedPlan) and plan.residual_rank:
            with quiet():
                residual = residual_adapter(plan)
            write_residual(residual, folder)
        yield folder, residual


def report_files(report: MergeReport) -> dict[str, bytes]:
    """merge_report.json and merge_report.html."""
    text = json.dumps(report.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
    return {REPORT: text.encode(), PAGE: to_html(report).encode()}


def write_beside(folder: Path, files: Mapping[str, bytes], card: str) -> None:
    """Put the report and a model card beside the weights."""
    fs = FileSystem()
    with storing("write the report", folder, sum(map(len, files.values()))):
        for name, data in {**files, "README.md": card.encode()}.items():
            write_file(fs, folder / name, data, MUTABLE)


def keep(store: Store, refs: Sequence[Ref], files: Mapping[str, bytes], on_event: Listener = ignore) -> list[Path]:
    """Keep a report in the store for each of the versions; one that cannot be kept is said, and no reason to fail."""
    found = []
    for ref in refs:
        assert ref.version is not None
        try:
            found.append(keep_report(store.path, ref.name, ref.version, files))
        except (AdapterHubError, OSError) as error:
            on_event(Note(f"The report on {ref} is not kept in the store: {error}", "warning"))
    return found
