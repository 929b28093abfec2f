"""A function in a process of its own, watched and disturbed at its system calls by strace.

The process waits in a loop without system calls until strace holds it: nothing of Python's start is swept, and the n-th
call is the n-th call of the function.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LIMIT = 30.0  # seconds; what takes longer hangs
_SET_TRACER = 0x59616D61  # PR_SET_PTRACER
_NOTE = 4096  # bytes that a process can tell of how it ended
_CALL = re.compile(r"^(\w+)\((.*)")
_CHANGES = re.compile(
    r"p?writev?(64)?|f(data)?sync|mkdir(at)?|(sym)?link(at)?|rename(at2?)?|unlink(at)?|rmdir|f?truncate|f?chmod(at)?"
    r"|utimensat|copy_file_range|sendfile"
)


@dataclass(frozen=True)
class Call:
    """The `number`-th call (from 1) of its name; `changes`: it may change what is on the disk."""

    name: str
    number: int
    line: str
    changes: bool


@dataclass(frozen=True)
class End:
    """How a process ended: by a signal, with `note` otherwise; `trace` is what strace wrote."""

    killed: bool
    note: str
    trace: str

    @property
    def disturbed(self) -> bool:
        return self.killed or "(INJECTED)" in self.trace


class Hangs(Exception):
    """It did not end."""


@cache
def unavailable() -> str:
    """Why strace cannot be used here, or ""; tried in a process of its own, as small as those that are watched."""
    if sys.platform != "linux" or not shutil.which("strace"):
        return "strace is not installed (Debian: apt install strace)"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.stress.strace"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()[-200:]


def _tried() -> str:
    try:
        end = watch(lambda: str(os.access("/ahl-marker", os.F_OK)), ["trace=%file"])
    except OSError as error:
        return f"strace may not attach here: {error}"
    return "" if "/ahl-marker" in end.trace else f"strace sees nothing here: {end.trace!r}"


def watch(function: Callable[[], str], expressions: list[str], more: tuple[str, ...] = ()) -> End:
    """Call `function` in a new process under `strace -e ...` for each of `expressions`; what it returns is the note.

    Raises:
        OSError: strace cannot attach.
        Hangs: after 30 seconds.
    """
    shared = mmap.mmap(-1, _NOTE)
    pid = os.fork()
    if pid == 0:
        _child(function, shared)
    with tempfile.NamedTemporaryFile("r", prefix="ahl-trace-") as log:
        chosen = [part for expression in expressions for part in ("-e", expression)]
        command = ["strace", "-p", str(pid), "-o", log.name, *chosen, *more]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = tracer.stderr.readline() if tracer.stderr else ""
        if "attached" not in said:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            tracer.wait()
            raise OSError(said.strip() or "strace said nothing")
        shared[0] = 1
        try:
            tracer.communicate(timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            os.kill(pid, signal.SIGKILL)
            tracer.wait()
            raise Hangs(log.read()[-2000:]) from None
        finally:
            _, status = os.waitpid(pid, 0)
        return End(os.WIFSIGNALED(status), _note(shared), log.read())


def alone(function: Callable[[], str]) -> str:
    """Call `function` in a new process; what it returns."""
    shared = mmap.mmap(-1, _NOTE)
    shared[0] = 1
    pid = os.fork()
    if pid == 0:
        _child(function, shared)
    _, status = os.waitpid(pid, 0)
    return _note(shared) if os.WIFEXITED(status) else f"it was killed: {status}"


def calls(function: Callable[[], str], world: Path) -> list[Call]:
    """The system calls of `function` that name a path in `world`, or an open file of it, in order."""
    end = watch(function, ["trace=%file,%desc", "signal=none"], ("-y",))
    if end.killed or end.note:
        raise RuntimeError(f"it fails undisturbed: {end.note or end.trace[-2000:]}")
    seen: Counter[str] = Counter()
    found = []
    for line in end.trace.splitlines():
        match = _CALL.match(line)
        if not match:
            continue
        name, rest = match.groups()
        seen[name] += 1
        if str(world) in rest:
            found.append(Call(name, seen[name], line, bool(_CHANGES.fullmatch(name)) or "O_CREAT" in rest))
    return found


def disturb(function: Callable[[], str], call: Call, how: str, lasting: bool = False) -> End:
    """Call `function` with `how` happening at `call` (signal=KILL, error=EIO), and `lasting` at all later ones too."""
    when = f"{call.number}+" if lasting else str(call.number)
    return watch(function, [f"trace={call.name}", "signal=none", f"inject={call.name}:{how}:when={when}"])


def _note(shared: mmap.mmap) -> str:
    return bytes(shared[1:]).rstrip(b"\0").decode("utf-8", "replace")


def _child(function: Callable[[], str], shared: mmap.mmap) -> None:
    note = "it did not end"
    try:
        ctypes.CDLL(None).prctl(_SET_TRACER, ctypes.c_ulong(-1))  # where only ancestors may attach (yama)
        while not shared[0]:
            os.sched_yield()
        note = function()
    except BaseException as error:
        note = f"{type(error).__name__}: {error}"
    finally:
        told = note.encode()[: _NOTE - 1]
        shared[1 : 1 + len(told)] = told
        os._exit(0)


if __name__ == "__main__":
    print(_tried())
