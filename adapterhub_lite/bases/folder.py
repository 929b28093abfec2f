"""What a folder must hold to be a base.

Takes: a folder. Gives: nothing, or an error that names what is wrong. Never: loads a tensor or leaves the folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import FormatError, UnsafeFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_INDEX_LIMIT = 64 * 2**20


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a complete base in safetensors.

    Raises:
        UnsafeFile: only pickle weights, or a shard name that leaves the folder.
        FormatError: no config, no weights, a missing shard, or an adapter beside the model.
    """
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} holds no config.json.", "Pass a folder saved by save_pretrained().")
    if (folder / "adapter_config.json").exists():
        # transformers finds this file and loads the adapter into the base without being asked.
        raise FormatError(
            f"{folder} holds an adapter (adapter_config.json) beside the model.",
            "Move the adapter to its own folder and import it with: ahl import PATH --name NAME",
        )
    if not (folder / WEIGHTS).is_file():
        _check_shards(folder)


def _check_shards(folder: Path) -> None:
    missing = [name for name in _shards(folder) if not (folder / name).is_file()]
    if missing:
        raise FormatError(f"{folder} lacks {missing[0]} ({len(missing)} missing).", "Download or copy it again.")


def _shards(folder: Path) -> list[str]:
    """The weight files that the index names; every one a plain file name."""
    index = folder / INDEX
    if not index.is_file():
        raise _no_weights(folder)
    if index.stat().st_size > _INDEX_LIMIT:
        raise FormatError(f"{index} is larger than {_INDEX_LIMIT} bytes.")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index} is not a safetensors index.", "Download or copy it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UnsafeFile(f"{index} names {ascii(name)[:80]}, which is not a safetensors file of that folder.")
    return names


def _no_weights(folder: Path) -> FormatError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return UnsafeFile(
            f"{folder} has its weights only in {pickles[0]}, a format that can run code when it is loaded.",
            "Where you trust it, convert it once with save_pretrained(), which writes safetensors.",
        )
    return FormatError(f"{folder} holds no {WEIGHTS}.", "Pass a folder saved by save_pretrained().")
