"""Reports on what was made of a version, kept in the store beside its versions, never in one: a version is immutable.

    reports/<name>/<N>/<time>-<random>/    merge_report.json, merge_report.html

A report's folder is written in tmp/ and renamed, so it is there whole or not at all. Removing a version leaves them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import AdapterHubError, NotFound
from ..formats.files import read_regular
from ..formats.strict_json import parse_object
from ..names import check_name, check_version
from .fs import FileSystem, discard, ensure_folder, new_tmp, storing, write_file
from .layout import Layout

REPORTS = "reports"
_FILE = re.compile(r"[a-z_]{1,40}\.(json|html)", re.ASCII)
_FOLDER = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{8}", re.ASCII)
_LIMIT = 64 << 20


def keep_report(root: Path, name: str, version: int, files: Mapping[str, bytes], fs: FileSystem | None = None) -> Path:
    """Keep the files of a report on a version; returns their folder.

    Raises:
        StoreError, StoreFull: it could not be written; nothing of it is left.
    """
    fs = fs or FileSystem()
    if not files or not all(_FILE.fullmatch(file) for file in files):
        raise ValueError(f"names of a report's files: {sorted(files)}")
    folder = _folder(root, name, version)
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    target = folder / f"{time}-{os.urandom(4).hex()}"
    tmp = Layout(root).tmp
    with storing(f"keep a report on {name}@{version}", root, sum(map(len, files.values()))):
        for needed in (tmp, folder):
            ensure_folder(fs, needed, root)
        staged = new_tmp(tmp)
        try:
            fs.mkdir(staged)
            for file, data in files.items():
                write_file(fs, staged / file, data)
            fs.fsync_dir(staged)
            fs.rename(staged, target)
        except BaseException:
            discard(fs, staged)
            raise
        fs.fsync_dir(folder)
    return target


def kept_reports(
    root: Path, name: str, version: int, file: str = "merge_report.json"
) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, content of its `file`) of each report on a version, oldest first; what cannot be read is left out."""
    folder = _folder(root, name, version)
    found = []
    for one in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
        if not _FOLDER.fullmatch(one.name):
            continue
        try:
            found.append((one, parse_object(read_regular(one / file, _LIMIT), file, limit=_LIMIT, depth=16)))
        except (AdapterHubError, NotFound, OSError):
            continue
    return found


def _folder(root: Path, name: str, version: int) -> Path:
    return root.joinpath(REPORTS, check_name(name), str(check_version(version)))
