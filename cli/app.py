"""The typer application: a group that imports a command's module only when that command is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup
from typer.main import get_command

from .. import __version__
from .guard import guarded
from .overview import COMMANDS, overview

_Function = TypeVar("_Function", bound=Callable[..., None])
_HELP = {"help_option_names": ["-h", "--help"]}


class LazyGroup(TyperGroup):
    """Knows every command by the table of `overview`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[arg-type,assignment]  # names, for suggestions

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command = get_command(import_module(f".commands.{COMMANDS[cmd_name][0]}", __package__).app)
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The same text as without typer."""
        formatter.write(overview())


def new_app(help_text: str | None = None, **settings: Any) -> typer.Typer:
    """A typer application for one command module, as every one of them is set."""
    return typer.Typer(
        add_completion=False,
        context_settings=_HELP,
        help=help_text,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        **settings,
    )


def command(
    app: typer.Typer, *examples: str, name: str | None = None, interrupted: str = "interrupted"
) -> Callable[[_Function], _Function]:
    """Register a function as a command: guarded, with examples below its help."""

    def register(function: _Function) -> _Function:
        @wraps(function)
        def call(**arguments: Any) -> None:
            raise typer.Exit(guarded(function, **arguments))

        function.interrupted = interrupted  # type: ignore[attr-defined]
        epilog = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
        app.command(name, epilog=epilog, context_settings=_HELP)(call)
        return function

    return register


app = typer.Typer(
    name="ahl",
    cls=LazyGroup,
    context_settings=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adapterhub-lite {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True)] = False,
) -> None: ...


def run(arguments: list[str]) -> int:
    """The exit code of the application with these arguments."""
    try:
        get_command(app).main(arguments, prog_name="ahl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
