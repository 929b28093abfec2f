"""`ahl promote`: both figures, and an exit code that a pipeline can stop at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapterhub_lite.store import Store
from tests.cli.conftest import Shop, ahl, told


@pytest.fixture
def store(shop: Shop, tmp_path: Path) -> Path:
    """A store where parrot@2 is parrot@1 with other matrices, and rows in which parrot@1 is right."""
    shutil.copytree(shop.store, tmp_path / "store")
    opened = Store(tmp_path / "store")
    folder = opened.folder("parrot@1")
    tensors = load_file(folder / "adapter_model.safetensors")
    from adapterhub_lite.adapters.adapter import Adapter

    other = Adapter(opened.spec("parrot@1"), {name: tensor.flip(0) * 9 for name, tensor in tensors.items()})
    card = opened.card("parrot@1")
    card.effect.clear()
    opened.put("parrot", dict(other.files()), card)
    rows = [{"question": f"say {i}"} for i in range(4)]
    for row in rows:
        row["reply"] = told("run", "-a", "parrot@1", row["question"], "--store", opened.path)["answer"] or "?"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return opened.path


def test_promote_prints_figures_and_moves_the_alias(store: Path, tmp_path: Path) -> None:
    first = ahl("promote", "parrot@1", "--to", "prod", "--data", tmp_path / "rows.jsonl", "--store", store)
    assert first.exit_code == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].split() == ["METRIC", "parrot@1"]
    assert lines[1].split() == ["exact_match", "1.000"]
    assert lines[2].startswith("4 rows of ")
    assert lines[3] == "parrot:prod -> parrot@1"
    again = ahl("promote", "parrot@1", "--to", "prod", "--store", store)
    assert (again.exit_code, again.stdout) == (0, "parrot:prod names parrot@1 already\n")


def test_promote_exits_with_1_when_it_refuses(store: Path, tmp_path: Path) -> None:
    ahl("alias", "parrot:prod", "1", "--store", store)
    arguments = ["promote", "parrot@2", "--to", "prod", "--data", tmp_path / "rows.jsonl", "--store", store]
    refused = ahl(*arguments)
    assert refused.exit_code == 1
    lines = refused.stdout.splitlines()
    assert lines[0].split() == ["METRIC", "parrot@2", "prod", "(parrot@1)"]
    assert lines[1].split()[0] == "exact_match"
    assert lines[1].split()[2] == "1.000"
    assert lines[-1].startswith("refused: exact_match ")
    assert lines[-1].endswith("parrot:prod still names parrot@1")
    found = told(*arguments, code=1)
    assert (found["accepted"], found["moved"], found["candidate"], found["current"]) == (False, False, 2, 1)
    assert Store(store).aliases("parrot") == {"prod": 1}
    assert [move.event for move in Store(store).alias_history("parrot", "prod")] == ["set", "refuse", "refuse"]
    allowed = told(*arguments, "--margin", "1", "--metric", "exact_match")
    assert (allowed["moved"], allowed["margin"]) == (True, 1.0)
    assert Store(store).aliases("parrot") == {"prod": 2}


def test_promote_says_what_was_wrong(store: Path) -> None:
    base = ["promote", "parrot@2", "--store", store]
    assert ahl(*base).exit_code == 2
    for more, part in ((["--margin", "7"], "margin"), (["--metric", "rouge"], "exact_match")):
        result = ahl(*base, "--to", "prod", *more)
        assert result.exit_code == 1
        assert part in result.stderr
        assert result.stdout == ""
    assert told(*base, "--to", "prod", "--metric", "rouge", code=1)["error"]["type"] == "Unsupported"
    assert ahl(*base, "--to", "3").exit_code == 1
    assert Store(store).aliases("parrot") == {}


def test_promote_takes_a_base_by_name(store: Path, tmp_path: Path, shop: Shop) -> None:
    rows, peft = tmp_path / "rows.jsonl", tmp_path / "peft"
    ahl("export", "parrot@1", peft, "--store", store)
    ahl("import", peft, "--name", "foreign", "--store", store)
    arguments = ["promote", "foreign", "--to", "prod", "--data", rows, "--store", store]
    unasked = ahl(*arguments)
    assert unasked.exit_code == 1
    assert "--base" in unasked.stderr
    assert told(*arguments, "--base", shop.causal)["candidate_value"] == 1.0


def test_promote_says_what_was_measured_before(shop: Shop, tmp_path: Path) -> None:
    shutil.copytree(shop.store, tmp_path / "store")
    store = tmp_path / "store"
    created = Store(store).card("parrot@1").created
    first = ahl("promote", "parrot@1", "--to", "prod", "--store", store)
    assert first.exit_code == 0, first.stderr
    assert f"parrot@1: measured {created}, when it was made; --again measures anew" in first.stdout.splitlines()
    assert "loading" not in first.stderr
    anew = ahl("promote", "parrot@1", "--to", "beta", "--again", "--store", store)
    assert "measures anew" not in anew.stdout
    assert "loading" in anew.stderr
    found = told("promote", "parrot@1", "--to", "third", "--store", store)
    assert (found["candidate_figure"]["source"], found["candidate_figure"]["time"]) == ("card", created)
    data = ["--data", shop.folder / "parrot.jsonl", "--store", store]
    time = told("promote", "parrot@1", "--to", "a", *data)["candidate_figure"]["time"]
    text = ahl("promote", "parrot@1", "--to", "b", *data).stdout
    assert f"parrot@1: measured {time}, for an earlier decision; --again measures anew" in text.splitlines()


def test_promote_without_its_rows(store: Path, tmp_path: Path) -> None:
    error = told("promote", "parrot@1", "--to", "prod", "--data", tmp_path / "no.jsonl", "--store", store, code=1)
    assert str(tmp_path / "no.jsonl") in error["error"]["message"]
    assert error["error"]["hint"] == "Give a JSON Lines file with --data FILE.jsonl."
    assert "recipe" not in str(error)
