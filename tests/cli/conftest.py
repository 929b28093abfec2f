"""A tiny base, recipes for it, and the application called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapterhub_lite.cli.app import app
from tests import tiny

_INSTRUCT = """\
name: parrot
base: {base}
task: {{type: instruct, prompt: question, completion: reply, max_new_tokens: 6, metrics: [exact_match]}}
data: {{train: parrot.jsonl, test: parrot-test.jsonl}}
adapter: {{type: lora, rank: 2, alpha: 4}}
training: {{epochs: 1, batch_size: 4, learning_rate: 1.0e-2, max_length: 64}}
"""
_CLASSIFY = """\
name: moods
base: {base}
task: {{type: classify}}
data: {{train: moods.jsonl, test: moods-test.jsonl}}
adapter: {{type: lora, rank: 2, alpha: 4}}
training: {{epochs: 1, batch_size: 4, learning_rate: 1.0e-2, max_length: 64}}
"""


@dataclass(frozen=True)
class Shop:
    """A folder with two tiny bases, their recipes and data, and a store with `parrot@1` and `moods@1`."""

    folder: Path
    store: Path

    @property
    def causal(self) -> str:
        return str(self.folder / "llama")

    def recipe(self, name: str) -> str:
        return str(self.folder / f"{name}.yaml")


def ahl(*arguments: str | Path, input: str | None = None) -> Result:
    """Call the application; its result has exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input, catch_exceptions=False)


def told(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """What a command says with --json: one object, and nothing else on stdout."""
    result = ahl(*arguments, "--json")
    assert result.exit_code == code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _write_rows(path: Path, row: Callable[[int], dict[str, Any]], count: int) -> None:
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)), "utf-8")


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's store or cache, or the network."""
    monkeypatch.setenv("AHL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AHL_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("AHL_DEBUG", raising=False)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    for name, text, family in (("parrot", _INSTRUCT, "llama"), ("moods", _CLASSIFY, "bert")):
        tiny.save(family, folder / family)
        (folder / f"{name}.yaml").write_text(text.format(base=folder / family), "utf-8")
    label = {0: "glad", 1: "sad"}
    for part, count in (("", 12), ("-test", 4)):
        _write_rows(folder / f"parrot{part}.jsonl", lambda i: {"question": f"say {i}", "reply": f"{i}!"}, count)
        _write_rows(folder / f"moods{part}.jsonl", lambda i: {"text": f"text {i}", "label": label[i % 2]}, count)
    made = Shop(folder, folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AHL_CACHE", str(folder / "cache"))
        for name in ("parrot", "moods"):
            result = ahl("train", made.recipe(name), "--store", made.store)
            assert result.exit_code == 0, result.stderr
    return made
