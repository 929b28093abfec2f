"""The entry point: help, version and listings at once, everything else through typer."""

from __future__ import annotations

import os
import sys

_HELP = (["--help"], ["-h"], ["help"])
_VERSION = (["--version"], ["-V"])


def main() -> None:
    """Run `ahl` with the arguments of this process and exit with its code."""
    try:
        code = answer(sys.argv[1:])
    except KeyboardInterrupt:  # before a command has begun
        code = 130
    except OSError as error:
        if error.filename is not None:
            raise
        from .guard import unwritten  # help and usage are typer's to print, outside of any command

        code = unwritten(error)
    sys.exit(_flushed(code))


def answer(arguments: list[str]) -> int:
    """The exit code of `ahl` with these arguments."""
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show is escaped; a model's or a file's text must not end a command.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if not arguments or arguments in _HELP:
        from .overview import overview

        return _say(overview())
    if arguments in _VERSION:
        from .. import __version__

        return _say(f"adapterhub-lite {__version__}\n")
    if arguments[0] in ("list", "show", "log", "search"):
        from .quick import quick

        code = quick(arguments)
        if code is not None:
            return code
    from .app import run

    return run(arguments)


def _say(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        from .guard import unwritten

        return unwritten(error)
    return 0


def _fill_closed_streams() -> None:
    """Put the null device where the caller closed a stream, or the next opened file would take its number.

    In place of stdout it is opened for reading: a result that cannot be given is an error, as it is on a full disk.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)  # the lowest free one, so the very one that was closed
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8"))


def _flushed(code: int) -> int:
    """The exit code when all output is out; what is left in a stream would fail as Python ends, and change the code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        from .guard import unwritten

        failed = unwritten(error)
        code = code or failed
    try:
        sys.stderr.flush()
    except OSError:
        from .guard import discard

        discard(sys.stderr)
    return code
