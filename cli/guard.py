"""What a failed command says, and its exit code.

0 done · 1 an error that says what to do · 2 wrong usage · 70 a bug · 130 interrupted · 141 nobody reads the output ·
143 SIGTERM ended a training run or a merge, which is kept.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from ..errors import AdapterHubError, RecipeError, TrainingInterrupted
from .render import Unwritten, emit, printable

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141


class UsageProblem(AdapterHubError):
    """Arguments that make no sense together."""

    exit_code = 2


class Failure(AdapterHubError):
    """A command that did its work and found something wrong; it has said so already."""


def guarded(function: Callable[..., Any], **arguments: Any) -> int:
    """Call a command; returns the exit code, having said on stderr what went wrong.

    With `as_json` among the arguments the error is printed as JSON too. AHL_DEBUG=1 adds the trace.
    """
    try:
        return _call(function, arguments, bool(arguments.get("as_json")))
    except (BrokenPipeError, Unwritten) as error:  # of the result, or of the error as JSON
        return unwritten(error)


def _call(function: Callable[..., Any], arguments: dict[str, Any], as_json: bool) -> int:
    try:
        function(**arguments)
    except (BrokenPipeError, Unwritten):
        raise
    except TrainingInterrupted as error:  # it says more, and which signal it was
        _complain(printable(str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        _complain(getattr(function, "interrupted", "interrupted"))
        return INTERRUPTED
    except Failure as error:
        return error.exit_code
    except AdapterHubError as error:
        return _refused(error, as_json)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _refused(AdapterHubError(f"{where}{error.strerror or error}."), as_json)
    except Exception as error:
        return _bug(error, as_json)
    return 0


def problem(error: AdapterHubError) -> dict[str, Any]:
    """An error as plain data."""
    told: dict[str, Any] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, RecipeError):
        told["problems"] = [vars(one) for one in error.problems]
    return told


def _refused(error: AdapterHubError, as_json: bool) -> int:
    _complain(f"error: {printable(str(error), keep_lines=True)}")
    return _told(problem(error), error.exit_code, as_json)


def _bug(error: Exception, as_json: bool) -> int:
    line = printable(f"{type(error).__name__}: {error}")
    _complain(f"bug: {line} ({_place(error)}). Run it again with AHL_DEBUG=1 for the trace, and report that, please.")
    return _told({"type": "Bug", "message": line, "hint": "AHL_DEBUG=1 shows the trace."}, BUG, as_json)


def _told(what: dict[str, Any], code: int, as_json: bool) -> int:
    if as_json:
        emit({"error": what})
    return code


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else "?"


def _complain(line: str) -> None:
    with suppress(OSError):  # nowhere to say it: the exit code does
        if os.environ.get("AHL_DEBUG") == "1" and sys.exc_info()[0] is not None:
            import traceback

            traceback.print_exc()
        print(line, file=sys.stderr, flush=True)


def unwritten(error: OSError) -> int:
    """The exit code where stdout takes nothing more. Said in one line, unless its reader has merely gone."""
    discard(sys.stdout)
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE
    _complain(f"error: The output could not be written: {error.strerror or error}.")
    return 1


def discard(stream: TextIO) -> None:
    """Let what is still in a broken stream go nowhere; Python would complain a second time when it ends."""
    with suppress(OSError, ValueError):  # a stream without a file, as in tests
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
