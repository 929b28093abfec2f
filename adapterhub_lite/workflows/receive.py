"""Store an adapter that others made, and compare it with the base that it is said to be for before it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bases.fetch import expanded, on_disk
from ..bases.heads import check_heads
from ..errors import AdapterHubError, AdapterMismatch, Unsupported
from ..events import Listener, Stage, ignore
from ..formats.adapter_files import LoraInventory, inventory
from ..formats.archive import is_archive, read_archive
from ..formats.files import read_regular
from ..formats.peft_config import parse_adapter_config
from ..formats.safetensors_header import Header, parse_header, read_header
from ..formats.specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec, Spec
from ..names import Ref, check_name
from ..store import Store
from ..store.incoming import LIMITS
from ..store.layout import CONFIG, WEIGHTS
from .base_choice import BASE_GIVEN

if TYPE_CHECKING:
    import torch

    from ..adapters.fit import HeadBuilder


def receive(
    path: str | Path,
    name: str,
    *,
    store: Store | None = None,
    base: str | None = None,
    base_card: Mapping[str, Any] | None = None,
    source: Mapping[str, str] | None = None,
    on_event: Listener = ignore,
) -> Ref:
    """Store the adapter of a PEFT folder or an archive as a new version of `name`.

    Args:
        base: the base that it is for: catalogue name, folder or Hub id. If it is on this disk the adapter's tensors are
            compared with its shapes. It is remembered, and loaded for this version without being named again.
        base_card, source: as in `Store.import_`.

    Raises:
        NotFound: no such adapter, or no such base.
        AdapterMismatch: the adapter does not fit `base`.
        Unsupported: it brings modules of its own that no base has a place for.
        FormatError, UnsafeFile, NoEffect, StoreError: as `Store.import_`.
    """
    check_name(name)
    store = store if store is not None else Store()
    chosen, folder = _settle(base) if base is not None else (None, None)
    found = _look(Path(path))
    if found is not None:
        spec, header = found
        _check_heads(spec, header)
        if folder is not None:
            on_event(Stage(f"comparing with the shapes of {chosen}"))
            _check_fit(spec, header, str(chosen), folder)
    if chosen is not None:
        base_card = {**(base_card or {}), "name": chosen}
        source = {**(source or {}), BASE_GIVEN: chosen}
    return store.import_(path, name, base_card, source)


def _settle(base: str) -> tuple[str, Path | None]:
    """What a base is remembered by, and where it is if it is on this disk. A folder is remembered by its whole path."""
    folder = on_disk(base)
    given = expanded(base)
    if folder is not None and given.is_dir() and folder == given.absolute():
        return str(folder.resolve()), folder
    return base, folder


def _look(path: Path) -> tuple[Spec, Header] | None:
    """Configuration and header, or None where the store will say what is wrong with them."""
    try:
        if path.is_dir():
            spec = parse_adapter_config(read_regular(path / CONFIG, LIMITS[CONFIG]))
            header = read_header(path / WEIGHTS)
        elif path.exists() and is_archive(path):
            files, _ = read_archive(path, LIMITS)
            spec, header = parse_adapter_config(files[CONFIG]), parse_header(files[WEIGHTS], WEIGHTS)
        else:
            return None
        inventory(spec, header)
    except (AdapterHubError, OSError, KeyError):
        return None
    return spec, header


def _check_heads(spec: Spec, header: Header) -> None:
    found = inventory(spec, header)
    check_heads(spec.task_type, found.heads)
    modules = found.modules if isinstance(found, LoraInventory) else {}
    embeddings = [name for name, ranks in modules.items() if ranks.kind == "embedding"]
    if embeddings:
        raise Unsupported(
            f"The adapter changes the embedding {embeddings[0]}; adapters change linear layers here, so this can never "
            "be loaded.",
            "Train it on linear layers alone.",
        )


def _check_fit(spec: Spec, header: Header, base: str, folder: Path) -> None:
    """Raise AdapterMismatch, naming the first module and both shapes, unless every tensor has its place in the base."""
    import torch

    from ..adapters.factored import factor_mismatches, split_factors
    from ..adapters.ia3 import ia3_mismatches, split_ia3
    from ..adapters.injected import check_places
    from ..adapters.lora import mismatches, split_tensors
    from ..adapters.prefix import fit_prefix, prefix_shape
    from ..adapters.prompt import fit_prompt
    from ..bases.skeleton import skeleton

    view = skeleton(folder, spec.task_type)
    tensors = {key: torch.empty(info.shape, device="meta") for key, info in header.tensors.items()}
    try:
        if isinstance(spec, LoraSpec | FactoredSpec | Ia3Spec):
            if isinstance(spec, LoraSpec):
                parts, heads = split_tensors(tensors)
                problems = mismatches(spec, parts, view.modules)
            elif isinstance(spec, FactoredSpec):
                parts, heads = split_factors(tensors)
                problems = factor_mismatches(spec, parts, view.modules)
            else:
                vectors, heads = split_ia3(tensors)
                problems = ia3_mismatches(spec, vectors, view.modules)
            if problems:
                raise AdapterMismatch(f"{len(problems)} modules do not fit: {problems[0]}.")
            stem = "base_model.model."
        elif isinstance(spec, InjectedSpec):
            # Sizes are compared where PEFT makes the layers, which not all of its methods do without weights.
            heads, stem = check_places(spec, tensors, view.modules), "base_model.model."
        else:
            heads, stem = dict(tensors), "base_model."
            embeddings = heads.pop("prompt_embeddings")
            model: Any = view.model
            if isinstance(spec, PrefixSpec):
                fit_prefix(spec, embeddings, prefix_shape(model.config))
            else:
                width = model.get_input_embeddings().weight.shape[1]
                fit_prompt(spec, embeddings, width, 2 if model.config.is_encoder_decoder else 1)
        _check_head(heads, f"{stem}{view.head_name}.", view.head)
    except AdapterMismatch as error:
        raise AdapterMismatch(
            f"The adapter does not fit the base {base}. {error.message}",
            "Name the base that it was made for: --base BASE. Nothing was stored.",
        ) from error


def _check_head(heads: dict[str, torch.Tensor], stem: str, slot: HeadBuilder | None) -> None:
    if not heads:
        return
    strange = next((key for key in heads if slot is None or not key.startswith(stem)), None)
    if strange is not None or slot is None:
        raise AdapterMismatch(f"{strange} has no place in it.")
    slot.build({key.removeprefix(stem): tensor for key, tensor in heads.items()})
