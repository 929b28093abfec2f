"""How much memory there is, how much is held, and the most that was held meanwhile."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from ...bases.memory import available_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PAUSE = 0.002  # seconds between two looks, where the system keeps no peak that can be set back


def room(device: torch.device, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken beyond what is held now: of a device's memory, or of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_free_on_host(proc), *_free_in_cgroups(proc, cgroups))


def _free_on_host(proc: Path) -> int:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return available_bytes()


def _free_in_cgroups(proc: Path, cgroups: Path) -> list[int]:
    """What is left within each limit that this process is under (version 1 and 2); files that were read may go."""
    found = [1 << 62]
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                found += _limits(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
            elif not controllers:
                found += _limits(cgroups, path, "memory.max", "memory.current")
    return found


def _limits(top: Path, path: str, limit: str, usage: str) -> list[int]:
    """Of a group and all above it. In a container the path is the host's, and its own group is the top."""
    found, folder = [], top / path.lstrip("/")
    while folder.is_relative_to(top):
        with suppress(OSError, ValueError):
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            found.append(max(0, most - used + _reclaimable(folder)))
        if folder == top:
            break
        folder = folder.parent
    return found


def _reclaimable(folder: Path) -> int:
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name in ("total_inactive_file", "inactive_file"):
                return int(count)
    return 0


def held(device: torch.device) -> int:
    """Bytes that this process holds: on the device, or resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _resident()


def settle(device: torch.device) -> None:
    """Give back what was freed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        with suppress(AttributeError, OSError, TypeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """The most bytes held within a block, on the device or by the process: the kernel's own mark where it can be set
    back, else the largest of many looks.
    """

    def __init__(self, device: torch.device, clear: Path = _CLEAR) -> None:
        self._device, self._clear = device, clear
        self._watch: _Watch | None = None
        self.bytes = 0

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        try:
            self._clear.write_text("5")
        except OSError:
            self._watch = _Watch()
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        elif self._watch is not None:
            self.bytes = self._watch.end()
        else:
            # The mark is raised where pages are given back and at the end of a process, so it may lag behind.
            self.bytes = max(_status("VmHWM"), _status("VmRSS"))


class _Watch(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most, self._done = _resident(), threading.Event()

    def run(self) -> None:
        while not self._done.wait(_PAUSE):
            self._most = max(self._most, _resident())

    def end(self) -> int:
        self._done.set()
        self.join()
        return max(self._most, _resident())


def _status(key: str) -> int:
    """Bytes that the kernel tells of this process; 0 where it tells nothing."""
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
        return 1024 * int(line.split()[1])
    return 0


def _resident() -> int:
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with suppress(ImportError):
        import psutil

        return int(psutil.Process().memory_info().rss)
    return 0
