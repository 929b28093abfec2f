"""`ahl import`: the base of an adapter, and a next command that works as it is printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from adapterhub_lite.store import Store
from tests.cli.conftest import Shop, ahl, told


@pytest.fixture
def peft(shop: Shop, tmp_path: Path) -> Path:
    """parrot@1 as a plain PEFT folder."""
    folder = tmp_path / "peft"
    assert ahl("export", "parrot@1", folder, "--store", shop.store).exit_code == 0
    for file in ("card.json", "manifest.json"):
        (folder / file).unlink()
    return folder


def printed(text: str) -> list[str]:
    """The command between backquotes, with a prompt in place of PROMPT."""
    words = shlex.split(text.split("`")[1])
    return ["say 1" if word == "PROMPT" else word for word in words[1:]]


def says(folder: Path, base: str | None) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


def test_the_printed_command_works(peft: Path, shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "a store"
    done = ahl("import", peft, "--name", "sql", "--store", store)
    assert done.exit_code == 0, done.stderr
    command = printed(done.stdout)
    assert "--base" in command
    answer = ahl(*command)
    assert answer.exit_code == 0, answer.stderr
    unasked = ahl("run", "-a", "sql@1", "say 1", "--store", store)
    assert (unasked.exit_code, unasked.stdout) == (1, "")


def test_with_a_base_the_next_command_needs_none(peft: Path, shop: Shop, tmp_path: Path) -> None:
    says(peft, "somebody/else")
    store = tmp_path / "store"
    done = ahl("import", peft, "--name", "sql", "--base", shop.causal, "--store", store)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"sql@1: lora for {shop.causal}")
    command = printed(done.stdout)
    assert "--base" not in command
    with_it, plain = ahl(*command), ahl("run", "-a", "sql@1", "say 1", "--store", store)
    assert with_it.exit_code == 0, with_it.stderr
    assert with_it.stdout == plain.stdout
    assert told("verify", "sql@1", "--deep", "--store", store)["measured"] == 1


def test_without_any_base_it_is_stored_and_said(peft: Path, shop: Shop, tmp_path: Path) -> None:
    says(peft, None)
    done = ahl("import", peft, "--name", "sql", "--store", tmp_path / "store")
    assert done.exit_code == 0, done.stderr
    command = printed(done.stdout)
    assert command[command.index("--base") + 1] == "BASE"
    assert "`ahl base list`" in done.stdout
    command[command.index("BASE")] = shop.causal
    assert ahl(*command).exit_code == 0


def test_a_base_that_does_not_fit_is_refused(peft: Path, shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    error = told("import", peft, "--name", "sql", "--base", shop.folder / "bert", "--store", store, code=1)["error"]
    assert error["type"] == "AdapterMismatch"
    assert "model.layers.0" in error["message"]
    typo = told("import", peft, "--name", "sql", "--base", "smollm2-135m-instrukt", "--store", store, code=1)["error"]
    assert typo["hint"].startswith("Did you mean smollm2-135m-instruct?")
    assert not store.exists()


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("https://huggingface.co/owner/name", "hub:owner/name"),
        ("http://huggingface.co/owner/name/", "hub:owner/name"),
        ("https://huggingface.co/owner/name/tree/v1.0", "hub:owner/name@v1.0"),
        ("https://huggingface.co/owner/name/tree/main/sub?x=1", "hub:owner/name@main"),
        ("huggingface.co/owner/my.name.git", "hub:owner/my.name"),
        ("https://hf.co/owner/name#files", "hub:owner/name"),
        ("https://example.org/adapter.tar", ""),
        ("https://huggingface.co/datasets/owner/name", ""),
    ],
)
def test_a_web_address_is_told_as_one(tmp_path: Path, address: str, hint: str) -> None:
    error = told("import", address, "--name", "x", "--store", tmp_path / "store", code=1)["error"]
    assert error["type"] == "InvalidName"
    expected = f"Write: ahl import {hint}" if hint else "Download it, and import the folder or archive."
    assert error["hint"] == expected


def test_a_folder_with_such_a_name_is_no_address(peft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    peft.rename(tmp_path / "hf.co-copy")
    assert told("import", "hf.co-copy", "--name", "x", "--store", "store")["ref"] == "x@1"
    assert Store(tmp_path / "store").versions("x") == [1]
