"""`ahl list`, `show REF`, `log NAME` and `search QUERY` in their plain forms, without typer.

Most of their time would be its import.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .guard import guarded


def quick(arguments: list[str]) -> int | None:
    """The exit code; None where the arguments are not the plain form, which typer then reads or refuses."""
    command, *rest = arguments
    read = _read(rest, negated=command == "search")
    if read is None:
        return None
    words, options = read
    function: Callable[..., Any]
    if command == "list" and not words:
        from .listing import list_adapters as function
    elif command == "show" and len(words) == 1:
        from .showing import show_adapter as function

        options["ref"] = words[0]
    elif command == "log" and len(words) == 1:
        from .history import show_log as function

        options["name"] = words[0]
    elif command == "search" and words:
        from .listing import search_adapters as function

        options["query"] = " ".join(words)
    else:
        return None
    return guarded(function, **options)


def _read(arguments: list[str], negated: bool) -> tuple[list[str], dict[str, Any]] | None:
    """Words, and the options --json and --store DIR; None if there is anything else.

    With `negated` a word may begin with one dash: `-alias:prod` of a search is a term, not an option.
    """
    words: list[str] = []
    options: dict[str, Any] = {"store": None, "as_json": False}
    rest = iter(arguments)
    for argument in rest:
        if argument == "--json":
            options["as_json"] = True
        elif argument == "--store":
            folder = next(rest, None)
            if folder is None or folder.startswith("-"):
                return None
            options["store"] = Path(folder)
        elif argument.startswith("-") and not (negated and len(argument) > 2 and argument[1] != "-"):
            return None
        else:
            words.append(argument)
    return words, options
