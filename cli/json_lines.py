"""Write rows to a file that appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_rows(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line; returns how many. A file that was there is replaced at the end."""
    scratch = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    count = 0
    try:
        with scratch.open("x", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
    return count
