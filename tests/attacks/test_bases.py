"""I8 and I13: what an adapter says of its base is compared with the base there is, and never opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import BaseMismatch, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.store import FileFact, Manifest, Store
from tests.attacks.build import CARD, CONFIG, MANIFEST, WEIGHTS, config
from tests.attacks.doors import Place, ahl, told_error
from tests.attacks.guard import changes, tree, watching
from tests.attacks.rows_files import BASES

_OTHER = "f" * 64


@pytest.mark.parametrize("name", [name for name in BASES if name] + ["outside", "."])
def test_i8_a_base_named_by_a_foreign_file_is_not_loaded(place: Place, name: str) -> None:
    from adapterhub_lite.workflows.own_base import load_own_base

    folder = place.inbox / "foreign"
    folder.mkdir()
    for file, data in config(base_model_name_or_path=name).items():
        (folder / file).write_bytes(data)
    store = place.store
    card = store.card(store.import_(folder, "victim"))
    os.chdir(place.root)  # "outside" is then a folder that is there
    before = tree(place.root)
    with watching() as watch, pytest.raises(Unsupported, match="not loaded unasked"):
        load_own_base(card)
    assert watch.strays([], []) == []
    for words in (["run", "--adapter", "victim", "hi"], ["merge", "victim", "--out", str(place.outbox / "m")]):
        ahl(*words, "--store", str(place.store_path))  # libraries look around when they are imported
        with watching() as watch:
            said = ahl(*words, "--json", "--store", str(place.store_path))
        assert watch.strays([place.store_path], []) == []
        assert (said.exit_code, told_error(said)["type"]) == (1, "Unsupported")
    assert changes(before, tree(place.root)) == []


def claimed(store: Store, place: Place, base: Any, mark: Mapping[str, Any], **told: Any) -> Ref:
    """An adapter that fits, whose card claims to be made for a base with this fingerprint."""
    from tests.runtime.build import lora

    files = dict(lora(base, 1).files())
    ref = store.put("plain", files, Card(base={"name": "claimed", "fingerprint": dict(mark), **told}))
    content = {file: (store.folder(ref) / file).read_bytes() for file in (CONFIG, WEIGHTS, CARD)}
    content[MANIFEST] = Manifest({file: FileFact.of(data) for file, data in content.items()}).to_bytes()
    folder = place.inbox / "claimed"
    folder.mkdir()
    for file, data in content.items():
        (folder / file).write_bytes(data)
    return store.import_(folder, "claimed")


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer"])
def test_i13_another_base_is_refused_by_its_fingerprint(
    place: Place, tiny_base: Callable[..., Any], tiny_folder: Callable[..., Path], part: str
) -> None:
    from adapterhub_lite.runtime.runtime import Runtime

    base = tiny_base("llama")
    store = place.store
    mark = {**base.fingerprint.to_dict(), part: _OTHER, "digest": _OTHER}
    ref = claimed(store, place, base, mark)
    runtime = Runtime(base, store)
    before = base.live_digest()
    try:
        with pytest.raises(BaseMismatch, match=f"{part} differ") as caught:
            runtime.use(ref)
        assert _OTHER[:12] in str(caught.value)
        assert base.fingerprint.digest[:12] in str(caught.value)
        assert base.live_digest() == before
    finally:
        runtime.close()
    if part == "weights":
        words = ["run", "--adapter", "claimed", "--base", str(tiny_folder("llama")), "--quantize", "none", "hi"]
        said = ahl(*words, "--json", "--store", str(place.store_path))
        assert (said.exit_code, told_error(said)["type"]) == (1, "BaseMismatch"), said.stderr


def test_i13_another_quantisation_is_told(place: Place, tiny_base: Callable[..., Any]) -> None:
    from adapterhub_lite.runtime.admit import compare_base

    base = tiny_base("llama")
    mark = {**base.fingerprint.to_dict(), "quantization": "nf4"}
    ref = claimed(place.store, place, base, mark, quantization="nf4", dtype="bfloat16")
    remark = compare_base(str(ref), place.store.card(ref).base, base)
    assert "trained on claimed in nf4 (bfloat16)" in remark


def test_i13_the_very_base_is_taken(place: Place, tiny_base: Callable[..., Any]) -> None:
    """The same adapter with the right fingerprint is used: what is refused above is refused for that alone."""
    from adapterhub_lite.runtime.admit import admit

    base = tiny_base("llama")
    store = place.store
    ref = claimed(store, place, base, base.fingerprint.to_dict())
    admitted = admit(store, ref, base)
    assert "is what its card claims" in admitted.remark
    assert replace(ref, digest=None) == Ref("claimed", version=1)
