"""One file that another store imports with the same digest; and what a version keeps, and loses, on the way."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from adapterhub_lite.errors import FormatError, NotFound, StoreError, UnsafeFile
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.strict_json import dump
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Manifest, Store
from adapterhub_lite.store.manifest import FileFact
from tests.checks import assert_store_sound
from tests.formats.build import lora_config, lora_files
from tests.store.faulty import Unsynced

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CARD = Card(
    base={"name": "tiny", "fingerprint": {"digest": "d", "weights": "w"}},
    task={"type": "instruct"},
    recipe={"data": {"train": "/home/me/train.jsonl"}},
    data={"train": {"source": "train.jsonl", "path": "/home/me/train.jsonl", "sha256": "ab", "rows": 3}},
    metrics={"test": {"accuracy": 0.5}},
    parents=["sql@7"],
    origin={"kind": "trained", "steps": 3},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", fs=Unsynced())


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other", fs=Unsynced())


@pytest.fixture
def made(store: Store) -> Ref:
    return store.put("sql", lora_files(), CARD)


@pytest.mark.parametrize("target", ["out.tar", "out"])
def test_the_digest_survives(store: Store, other: Store, made: Ref, tmp_path: Path, target: str) -> None:
    exported = store.export(made, tmp_path / target)
    there = other.import_(exported, "copied")
    assert there.digest == made.digest
    assert other.verify() == []
    again = other.export(there, tmp_path / f"again-{target}")
    third = Store(tmp_path / "third", fs=Unsynced()).import_(again, "sql")
    assert third.digest == made.digest
    for file in (CONFIG, WEIGHTS, "card.json"):
        assert (store.folder(made) / file).read_bytes() == (other.folder(there) / file).read_bytes()
    assert_store_sound(other.path)


def test_two_exports_are_the_same_bytes(store: Store, other: Store, made: Ref, tmp_path: Path) -> None:
    one = store.export(made, tmp_path / "one.tar").read_bytes()
    os.utime(store.folder(made) / CONFIG, (0, 0))
    assert store.export(made, tmp_path / "two.tar").read_bytes() == one
    there = other.import_(tmp_path / "one.tar", "sql")
    assert other.export(there, tmp_path / "three.tar").read_bytes() == one


def test_plain_tar_unpacks_what_peft_reads(store: Store, made: Ref, tmp_path: Path) -> None:
    with tarfile.open(store.export(made, tmp_path / "out.tar")) as archive:
        names = archive.getnames()
        assert [Path(name).parent.name for name in names] == ["sql-1"] * 4
        data = {Path(name).name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert data[WEIGHTS] == (store.folder(made) / WEIGHTS).read_bytes()


def test_what_came_along_is_a_claim(store: Store, other: Store, made: Ref, tmp_path: Path) -> None:
    there = other.import_(
        store.export(made, tmp_path / "out.tar"), "sql", {"name": "mine"}, {"kind": "hub", "repo": "a/b"}
    )
    card = other.card(there)
    assert card.recipe is None
    assert card.parents == []
    assert "path" not in card.data["train"]
    assert card.base["name"] == "mine"
    assert card.metrics == CARD.metrics
    assert card.origin["kind"] == "imported"
    assert card.origin["claimed_origin"] == CARD.origin
    assert card.origin["claimed_parents"] == ["sql@7"]
    assert card.origin["repo"] == "a/b"
    received = other.received(there)
    assert received is not None
    assert (received["kind"], received["repo"], received["from"]) == ("hub", "a/b", "out.tar")
    assert store.received(made) is None
    (entry,) = other.list()
    assert entry.summary["origin"] == "imported"
    assert [event.kind for event in other.log("sql")] == ["imported"]
    other.remove(there)  # its claimed parent and path hold nothing back


def test_the_same_file_twice_is_one_version(store: Store, other: Store, made: Ref, tmp_path: Path) -> None:
    path = store.export(made, tmp_path / "out.tar")
    first = other.import_(path, "sql")
    assert other.import_(path, "sql") == first
    assert other.versions("sql") == [1]
    assert other.import_(path, "else").digest == first.digest
    assert store.import_(path, "sql") == made


@pytest.mark.parametrize("position", range(0, 900, 60))
def test_a_flipped_byte_of_the_receipt_is_noticed(
    store: Store, other: Store, made: Ref, tmp_path: Path, position: int
) -> None:
    there = other.import_(store.export(made, tmp_path / "out.tar"), "sql")
    path = other.folder(there) / "manifest.json"
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    assert [finding.where for finding in other.verify()] == ["sql@1"]


def packed(files: dict[str, bytes], form: str, folder: str = "") -> bytes:
    out = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(folder + name, data)
    else:
        with tarfile.open(fileobj=out, mode=f"w:{form}") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(folder + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("form", ["", "gz", "zip"])
@pytest.mark.parametrize("folder", ["", "my-adapter/"])
def test_archives_of_peft_folders(store: Store, tmp_path: Path, form: str, folder: str) -> None:
    path = tmp_path / "upload"
    path.write_bytes(packed({**lora_files(), "README.md": b"hello", "run.py": b"import os"}, form, folder))
    ref = store.import_(path, "sql")
    card = store.card(ref)
    assert (card.origin["kind"], card.origin["by"], card.origin["from"]) == ("imported", "archive", "upload")
    assert {Path(name).name for name in card.origin["ignored"]} == {"README.md", "run.py"}
    assert store.manifest(ref).files[WEIGHTS] == FileFact.of(lora_files()[WEIGHTS])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["store", "upload"]
    assert_store_sound(store.path)


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({CONFIG: lora_config()}, NotFound, "holds no adapter_model.safetensors"),
        ({CONFIG: lora_config(), "adapter_model.bin": b"\x80"}, UnsafeFile, "pickle"),
        ({CONFIG: b'{"config": {}, "model_type": "bert", "version": "adapters.1.0"}'}, FormatError, "AdapterHub"),
        ({**lora_files(), "../evil": b"x"}, UnsafeFile, "evil"),
        ({"README.md": b"x"}, FormatError, "adapter_config.json"),
    ],
)
def test_archives_that_are_refused(
    store: Store, tmp_path: Path, files: dict[str, bytes], error: type[Exception], words: str
) -> None:
    path = tmp_path / "in.tar"
    path.write_bytes(packed(files, ""))
    with pytest.raises(error, match=words):
        store.import_(path, "sql")
    assert not store.path.exists()


def test_what_is_no_archive(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"hello" * 200)
    with pytest.raises(FormatError, match=r"neither a folder nor an archive \(.tar, .tar.gz, .zip\)"):
        store.import_(path, "sql")


def forged(files: dict[str, bytes], card: bytes) -> dict[str, bytes]:
    """An export with a card of somebody's making, and a manifest that agrees with it."""
    told = {**files, "card.json": card}
    manifest = Manifest({name: FileFact.of(data) for name, data in told.items()})
    return {**told, "manifest.json": manifest.to_bytes()}


def test_a_forged_export_gets_no_more_than_it_may(store: Store, other: Store, made: Ref, tmp_path: Path) -> None:
    files = {name: (store.folder(made) / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    card = (store.folder(made) / "card.json").read_bytes()
    config = files[CONFIG].replace(b'"auto_mapping": null', b'"auto_mapping": {"parent_library": "os"}')
    lying = Card.from_bytes(card).to_bytes().replace(b'"rank": 2', b'"rank": 9')
    assert lying != card
    assert config != files[CONFIG] or b"auto_mapping" not in files[CONFIG]
    foreign = {**files, CONFIG: lora_config()}
    for number, content in enumerate((forged(foreign, card), forged(files, lying), forged(files, b"{}"))):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(packed(content, ""))
        ref = other.import_(path, f"forged{number}")
        assert other.received(ref) is None  # a foreign adapter with a card made here
        assert other.card(ref).metrics == {}
        assert ref.digest != made.digest
    assert_store_sound(other.path)


def test_a_single_file_is_new_or_nothing(store: Store, made: Ref, tmp_path: Path) -> None:
    (tmp_path / "there.tar").write_bytes(b"mine")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to("elsewhere")
    for name, words in (("there.tar", "exists"), ("folder.tar", "exists"), ("link.tar", "symbolic link")):
        with pytest.raises(StoreError, match=words):
            store.export(made, tmp_path / name)
    with pytest.raises(StoreError, match="inside the store"):
        store.export(made, store.path / "out.tar")
    assert (tmp_path / "there.tar").read_bytes() == b"mine"
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def test_an_identity_is_written_as_canonical_json(store: Store, made: Ref) -> None:
    manifest = store.manifest(made)
    files = {name: {"sha256": fact.sha256, "size": fact.size} for name, fact in manifest.files.items()}
    assert manifest.to_bytes() == dump({"files": files, "format": 1}, indent=2)
