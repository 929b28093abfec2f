"""`ahl import hub:...` and `ahl push`, against a Hub on this machine; import of archives."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.cli.conftest import Shop, ahl, told
from tests.formats.build import lora_files
from tests.workflows.fake_hub import TOKEN, FakeHub, python

CARD = Card(
    base={"name": "smollm2-135m-instruct"},
    data={"train": {"source": "a.jsonl", "path": "/home/me/a.jsonl", "sha256": "ab" * 32, "rows": 1}},
)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    made = FakeHub()
    yield made
    made.close()


def filled(path: Path) -> Ref:
    """Put sql@1 into a store."""
    return Store(path).put("sql", lora_files(), CARD)


def client(hub: FakeHub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`ahl` in a process of its own, with the store of `home`; nothing it prints or leaves may hold the token."""
    done = python("-m", "adapterhub_lite.cli", *arguments, env=hub.environment(home), **more)
    assert "CANARY" not in done.stdout + done.stderr
    assert not any(b"CANARY" in path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert not any((home / "tmp").iterdir())
    return done


def test_push_and_import_name_the_commit(hub: FakeHub, tmp_path: Path) -> None:
    ref = filled(tmp_path / "store")
    done = client(hub, tmp_path, "push", "sql", "hub:me/sql", "--json")
    pushed = json.loads(done.stdout)
    commit = hub.repos["me/sql"].refs["main"]
    url = f"{hub.endpoint}/me/sql/tree/{commit}"
    assert pushed == {"ref": "sql@1", "digest": ref.digest, "repo": "me/sql", "commit": commit, "url": url}
    warned = next(line for line in done.stderr.splitlines() if "data.train.path" in line)
    assert warned.startswith("warning: ")
    assert "--without-paths cuts" in warned
    done = client(hub, tmp_path, "push", "sql@1", "hub:me/sql", "-m", "again")
    assert done.stdout.splitlines() == [f"sql@1 -> hub:me/sql@{commit}", f"See {url}"]
    done = client(hub, tmp_path, "import", "hub:me/sql", "--name", "copy", "--json")
    got = json.loads(done.stdout)
    assert (got["ref"], got["digest"], got["repo"], got["commit"]) == ("copy@1", ref.digest, "me/sql", commit)
    done = client(hub, tmp_path, "import", f"hub:me/sql@{commit}", "--name", "copy")
    assert f"copy@1: lora for smollm2-135m-instruct, from hub:me/sql@{commit}" in done.stdout.splitlines()
    done = client(hub, tmp_path, "import", "hub:me/sql", "--name", "sql", "--json")
    got = json.loads(done.stdout)
    assert (got["ref"], got["commit"]) == ("sql@1", commit), "the very version that was pushed"
    assert_store_sound(tmp_path / "store")


def test_a_foreign_repository_with_its_base_named(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("org/peft", lora_files())
    done = client(
        hub, tmp_path, "import", "hub:org/peft", "--name", "mine", "--base", "smollm2-135m-instruct", "--json"
    )
    got = json.loads(done.stdout)
    assert (got["ref"], got["base"], got["commit"]) == ("mine@1", "smollm2-135m-instruct", commit)
    assert not (tmp_path / "hf").exists()


def test_the_commit_that_is_printed_is_the_one_that_is_stored(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.add("org/moving", lora_files())
    hub.after_info = lambda repo: hub.repos[repo].commit(lora_files(seed=len(hub.requests)))
    done = client(hub, tmp_path, "import", "hub:org/moving", "--name", "x", "--json")
    assert json.loads(done.stdout)["commit"] == first
    assert Store(tmp_path / "store").card("x").origin["commit"] == first


def test_public_wants_a_decision_on_paths(hub: FakeHub, tmp_path: Path) -> None:
    filled(tmp_path / "store")
    done = client(hub, tmp_path, "push", "sql", "hub:me/sql", "--public")
    assert done.returncode == 1
    assert "error: The card names paths of this machine (data.train.path)" in done.stderr
    assert "--without-paths" in done.stderr
    assert hub.repos == {}
    assert client(hub, tmp_path, "push", "sql", "hub:me/sql", "--public", "--without-paths").returncode == 0
    assert not hub.repos["me/sql"].private
    assert not any(b"/home/me" in data for data in hub.repos["me/sql"].files.values())


@pytest.mark.parametrize("ref", ["parrot@1", "moods@1"])
def test_nothing_of_this_machine_is_left_of_what_was_trained_here(shop: Shop, tmp_path: Path, ref: str) -> None:
    from adapterhub_lite.workflows.model_card import model_card, without_local_paths

    store = Store(shop.store)
    folder = store.verified_folder(ref)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    here = str(shop.folder).encode()
    assert here in files["card.json"]
    assert here in files["adapter_config.json"]
    cut, digest = without_local_paths(files)
    readme = model_card(store.card(ref), store.spec(ref), ref, digest, "me/x").encode()
    assert not any(here in data for data in (*cut.values(), readme))
    (tmp_path / "cut").mkdir()
    for name, data in cut.items():
        (tmp_path / "cut" / name).write_bytes(data)
    assert Store(tmp_path / "other").import_(tmp_path / "cut", "x").digest == digest


@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN}é", "CANARY CANARY\x01"])
def test_a_token_is_never_shown(hub: FakeHub, tmp_path: Path, token: str) -> None:
    """Neither one that the server echoes in its refusal, nor one that cannot be sent as it is."""
    filled(tmp_path / "store")
    hub.add("org/echo", lora_files())
    hub.faults["org/echo"] = 401
    for arguments in (("import", "hub:org/echo", "--name", "x"), ("push", "sql", "hub:org/echo")):
        done = client(hub, tmp_path, *arguments, HF_TOKEN=token, AHL_DEBUG="1")
        assert done.returncode == 1, done.stderr
        assert "error: " in done.stderr


def test_a_saved_token_is_never_shown_either(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/echo", lora_files())
    hub.faults["org/echo"] = 403
    saved = tmp_path / "token"
    saved.write_text(TOKEN)
    done = client(
        hub, tmp_path / "home", "import", "hub:org/echo", "--name", "x", HF_TOKEN="", HF_TOKEN_PATH=str(saved)
    )
    assert "error: The Hub answered 403" in done.stderr
    assert hub.requests[-1][2] == f"Bearer {TOKEN}"


def test_without_a_network(hub: FakeHub, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = client(hub, tmp_path, "import", "hub:org/x", "--name", "x", "--json", HF_ENDPOINT=closed)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1
    assert error["type"] == "HubError"
    assert "could not be reached: ConnectError" in error["message"]
    assert error["hint"].startswith("Check the network")
    assert not (tmp_path / "store").exists()


def test_offline_says_which_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    filled(tmp_path / "store")
    for arguments in (("import", "hub:me/sql", "--name", "x"), ("push", "sql", "hub:me/sql")):
        result = ahl(*arguments, "--store", tmp_path / "store")
        assert result.exit_code == 1
        assert result.stderr.endswith("error: The Hub is switched off by AHL_OFFLINE. Unset AHL_OFFLINE to reach it.\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "hub:sql", "--name", "x"),
        ("import", "hub:me/../x", "--name", "x"),
        ("import", "hub:me/sql@", "--name", "x"),
        ("import", "hub:me/sql", "--name", "No Name"),
        ("push", "sql", "me/sql"),
        ("push", "sql", "hub:me/sql@v1"),
    ],
)
def test_wrong_names_are_refused_before_the_network(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    filled(tmp_path / "store")
    assert told(*arguments, "--store", tmp_path / "store", code=1)["error"]["type"] == "InvalidName"


def test_push_of_nothing(tmp_path: Path) -> None:
    assert told("push", "sql", "hub:me/sql", "--store", tmp_path / "store", code=1)["error"]["type"] == "NotFound"


@pytest.mark.parametrize("ending", [".tar", ""])
def test_an_exported_version_comes_back_with_its_digest(tmp_path: Path, ending: str) -> None:
    ref = filled(tmp_path / "store")
    Store(tmp_path / "store").export(ref, tmp_path / f"out{ending}")
    got = told("import", tmp_path / f"out{ending}", "--name", "copy", "--store", tmp_path / "other")
    assert (got["ref"], got["digest"]) == ("copy@1", ref.digest)
    assert not {"repo", "commit"} & set(got)
