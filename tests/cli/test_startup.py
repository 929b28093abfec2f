"""Help and listings import nothing heavy; the help text and the commands say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest
from typer.main import get_command

from adapterhub_lite.cli.overview import COMMANDS, overview
from tests.cli.conftest import Shop, ahl

_HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "bitsandbytes", "huggingface_hub", "rich"}
_PROGRAM = """
import json, sys
from adapterhub_lite.cli.main import answer
code = answer(sys.argv[1:])
sys.stdout.flush()
print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)
"""


def _imported(*arguments: str) -> tuple[int, set[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    code, names = json.loads(done.stderr.splitlines()[-1])
    return code, set(names), done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        [],
        ["--version"],
        ["list"],
        ["show", "parrot"],
        ["log", "parrot"],
        ["search", "moods", "-alias:x"],
    ],
)
def test_answered_without_typer_or_anything_heavy(arguments: list[str], shop: Shop) -> None:
    store = ["--store", str(shop.store)] if arguments[:1] and arguments[0] in ("list", "show", "log", "search") else []
    code, names, _ = _imported(*arguments, *store)
    assert code == 0
    assert not names & (_HEAVY | {"typer", "pydantic", "yaml"})


@pytest.mark.parametrize(
    "arguments", [["list", "--help"], ["alias", "x:y"], ["verify"], ["recipes"], ["train", "--help"], ["base", "list"]]
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    _, names, _ = _imported(*arguments)
    assert not names & _HEAVY


def test_a_wrong_recipe_is_refused_before_the_heavy_imports(shop: Shop) -> None:
    code, names, _ = _imported("train", shop.recipe("parrot"), "-o", "adapter.rank=0")
    assert code == 1
    assert not names & _HEAVY


def test_quick_and_typer_give_the_same(shop: Shop) -> None:
    for arguments in (["list", "--json"], ["show", "moods"], ["log", "moods"], ["search", "name:moods", "--json"]):
        _, names, quick = _imported(*arguments, "--store", str(shop.store))
        assert "typer" not in names
        assert quick == ahl(*arguments, "--store", shop.store).stdout
        _, names, _ = _imported(*arguments, f"--store={shop.store}")
        assert "typer" in names


def test_help_is_the_same_with_and_without_typer() -> None:
    assert ahl("--help").stdout == overview()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_in_its_help_what_the_overview_says(name: str) -> None:
    module, line = COMMANDS[name]
    command = get_command(import_module(f"adapterhub_lite.cli.commands.{module}").app)
    assert (command.help or "").splitlines()[0] == line
    assert f"  {name} " in overview()
    assert all(len(text) <= 90 for text in overview().splitlines())
    text = ahl(name, "--help").stdout
    assert "Examples:" in text or "Commands:" in text
    assert "--json" in text or "Commands:" in text


def test_a_mistyped_command_is_answered_with_the_nearest() -> None:
    assert "'train'" in ahl("trian").stderr
