"""The entry point: help, version and listings at once, everything else through typer."""

from __future__ import annotations

import sys

_HELP = (["--help"], ["-h"], ["help"])
_VERSION = (["--version"], ["-V"])


def main() -> None:
    """Run `ahl` with the arguments of this process and exit with its code."""
    try:
        code = answer(sys.argv[1:])
    except KeyboardInterrupt:  # before a command has begun
        code = 130
    sys.exit(code)


def answer(arguments: list[str]) -> int:
    """The exit code of `ahl` with these arguments."""
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
    except BrokenPipeError:
        from .guard import unread

        return unread()
    return 0
