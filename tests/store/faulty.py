"""File systems for tests: one that fails at its n-th operation, and one that records what it did for the power-loss
model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub_lite.store.fs import FileSystem

OPERATIONS = (
    "create", "write", "copy_range", "fsync", "close", "fsync_dir", "mkdir", "link", "rename", "replace", "unlink",
    "rmdir",
)  # fmt: skip


class Unsynced(FileSystem):
    """Never waits for the disk: syncing is counted, recorded or failed in these tests, but need not happen."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


class Crash(BaseException):
    """The process is gone: no clean-up runs on the disk either."""


class Failing(Unsynced):
    """Fails the `at`-th operation (from 1). After a Crash every operation fails, as for a dead process; after an
    OSError, with `lasting`, every operation of the same kind does, as on a full disk. `torn`: half of what was to be
    written is; `late`: all of it is done before it fails, as over a network.
    """

    def __init__(
        self, at: int, error: BaseException, lasting: bool = False, torn: bool = False, late: bool = False
    ) -> None:
        self.at, self.error, self.lasting, self.torn, self.late = at, error, lasting, torn, late
        self.count = 0
        self.kind = ""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self._watched(name, found) if name in OPERATIONS else found

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.kind = name
                if self.torn and name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif self.torn and name == "copy_range":
                    call(*arguments[:3], arguments[3] // 2)
                elif self.late and name != "close":
                    call(*arguments)
                self._fail(name, call, arguments)
            if self.count > self.at and (isinstance(self.error, Crash) or (self.lasting and name == self.kind)):
                self._fail(name, call, arguments)
            return call(*arguments)

        return watched

    def _fail(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if name == "close":  # the kernel closes the files of a dead process; do not leak them in the test
            call(*arguments)
        raise self.error


class Recording(Unsynced):
    """Writes down every operation that changes names or bytes, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._open: dict[int, Path] = {}

    def create(self, path: Path, mode: int) -> int:
        fd = super().create(path, mode)
        self._open[fd] = path
        self.log.append(("create", path))
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        count = super().write(fd, data[: max(500, len(data) // 2)])  # short writes for all but the smallest files
        self.log.append(("write", self._open[fd], bytes(data[:count])))
        return count

    def copy_range(self, source: int, target: int, offset: int, count: int) -> int:
        count = super().copy_range(source, target, offset, min(count, max(500, count // 2)))
        self.log.append(("write", self._open[target], os.pread(source, count, offset)))
        return count

    def fsync(self, fd: int) -> None:
        self.log.append(("fsync", self._open[fd]))

    def fsync_dir(self, path: Path) -> None:
        self.log.append(("fsync_dir", path))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.log.append(("mkdir", path))

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self.log.append(("link", source, target))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(("rename", source, target))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.log.append(("rename", source, target))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.log.append(("unlink", path))

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        self.log.append(("unlink", path))
