"""A store of format 1, made of one of the present: what migration starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from adapterhub_lite.formats.strict_json import dump


def to_first_format(path: Path) -> None:
    """Write the aliases of a store as format 1 had them: one file each, with the history inside."""
    for folder in (path / "aliases").glob("*"):
        moves: dict[str, dict[int, dict[str, object]]] = {}
        for entry in folder.glob("*@*"):
            alias, _, number = entry.name.partition("@")
            told = json.loads((entry / "move.json").read_bytes())
            moves.setdefault(alias, {})[int(number)] = {key: told[key] for key in ("digest", "time", "version")}
            shutil.rmtree(entry)
        for alias, found in moves.items():
            history = [found[number] for number in sorted(found)]
            data = dump({"history": history, "version": history[-1]["version"]}, indent=2)
            (folder / f"{alias}.json").write_bytes(data)
    (path / "store.json").unlink()
    (path / "store.json").write_bytes(dump({"format": 1}))
