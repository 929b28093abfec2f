"""Adapters of others: compared with their base before they are stored, and the base that was named is remembered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.bases.catalog import CATALOG, recognised
from adapterhub_lite.errors import AdapterMismatch, NotFound, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from adapterhub_lite.store.layout import CARD, MANIFEST
from adapterhub_lite.workflows import own_base
from adapterhub_lite.workflows.base_choice import BASE_GIVEN, base_name, is_trusted, run_command
from adapterhub_lite.workflows.deep_verify import verify_deep
from adapterhub_lite.workflows.own_base import load_own_base
from adapterhub_lite.workflows.receive import receive
from tests import peers, tiny
from tests.checks import assert_store_sound

NAME = "smollm2-135m-instruct"
REPO = CATALOG[NAME].hub_id


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = Store(tmp_path / "store")
    yield made
    assert_store_sound(made.path)


def peft(base: Path, to: Path, family: str = "llama", kind: str = "lora", task: str = "CAUSAL_LM", **said: Any) -> Path:
    """An adapter that PEFT saved, whose configuration then says something else too."""
    peers.wrap(peers.plain(base, task), peers.config(family, kind, task)).save_pretrained(to)
    (to / "README.md").unlink(missing_ok=True)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **said}))
    return to


# -- the base that is named --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_first_module_that_does_not_fit_is_named_with_both_shapes(
    store: Store, tiny_folder: Any, tmp_path: Path, kind: str
) -> None:
    folder = peft(tiny_folder("llama"), tmp_path / "peft", kind=kind)
    wide = tiny_folder("llama", hidden_size=64)
    with pytest.raises(AdapterMismatch) as caught:
        receive(folder, "mine", store=store, base=str(wide))
    assert f"does not fit the base {wide}" in caught.value.message
    assert "model.layers.0.mlp.down_proj has A [4, 64] and B [32, 4], this layer needs [r, 64] and [64, r]" in str(
        caught.value
    )
    assert not store.path.exists()


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_adapter_of_another_family_is_refused(store: Store, tiny_folder: Any, tmp_path: Path, kind: str) -> None:
    folder = peft(tiny_folder("llama"), tmp_path / "peft", kind=kind)
    with pytest.raises(AdapterMismatch, match=r"does not exist here|this base needs"):
        receive(folder, "mine", store=store, base=str(tiny_folder("gpt2")))
    with pytest.raises(AdapterMismatch, match="does not fit the base"):
        receive(folder, "mine", store=store, base=str(tiny_folder("t5")))
    assert not store.path.exists()


def test_a_head_of_another_class_is_refused(store: Store, tiny_folder: Any, tmp_path: Path) -> None:
    folder = peft(tiny_folder("bert"), tmp_path / "peft", "bert", task="SEQ_CLS")
    tensors = load_file(folder / "adapter_model.safetensors")
    (key,) = [key for key in tensors if key.endswith("classifier.weight")]
    tensors[key] = tensors[key].repeat_interleave(2, -1)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match=r"Head tensor .* has shape \[3, 64\], expected \[3, 32\]"):
        receive(folder, "mine", store=store, base=str(tiny_folder("bert")))


def test_no_weight_of_the_base_is_read(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save("llama", tmp_path / "base")
    folder = peft(base, tmp_path / "peft")
    (base / "model.safetensors").write_bytes(b"not weights at all")
    assert receive(folder, "mine", store=store, base=str(base)).version == 1


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_archives_are_compared_too(store: Store, tiny_folder: Any, tmp_path: Path, ending: str) -> None:
    import shutil

    folder = peft(tiny_folder("llama"), tmp_path / "peft")
    archive = shutil.make_archive(str(tmp_path / "packed"), ending, folder)
    with pytest.raises(AdapterMismatch):
        receive(archive, "mine", store=store, base=str(tiny_folder("gpt2")))
    assert receive(archive, "mine", store=store, base=str(tiny_folder("llama"))).version == 1


def test_a_name_that_is_no_base_is_refused_with_what_is_near(store: Store, tiny_folder: Any, tmp_path: Path) -> None:
    folder = peft(tiny_folder("llama"), tmp_path / "peft")
    for typed in ("smollm2-135m-instuct", "SMOLLM2-135M-INSTRUCT", "smollm2"):
        with pytest.raises(NotFound, match=f"Did you mean {NAME}"):
            receive(folder, "mine", store=store, base=typed)
    with pytest.raises(NotFound, match="There is no base '~nobody-at-all/x'"):
        receive(folder, "mine", store=store, base="~nobody-at-all/x")
    assert not store.path.exists()


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_the_named_base_is_loaded_without_being_named_again(
    store: Store, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder("llama")
    folder = peft(base, tmp_path / "peft", base_model_name_or_path="somewhere/else")
    plain = store.card(receive(folder, "mine", store=store))
    assert not is_trusted(plain)
    with pytest.raises(Unsupported, match="--base somewhere/else"):
        load_own_base(plain)
    monkeypatch.chdir(base.parent)
    card = store.card(receive(folder, "mine", store=store, base=base.name))
    assert card.base["name"] == str(base)
    monkeypatch.chdir(tmp_path)
    assert load_own_base(card, device="cpu").source.folder == base


def test_an_export_is_remembered_with_its_named_base(store: Store, tiny_folder: Any, tmp_path: Path) -> None:
    base = tiny_folder("llama")
    first = receive(peft(base, tmp_path / "peft"), "mine", store=Store(tmp_path / "other"), base=str(base))
    out = Store(tmp_path / "other").export(first, tmp_path / "out.tar")
    there = store.card(receive(out, "unasked", store=store))
    assert not is_trusted(there), "whom the other store trusted is of no weight here"
    assert is_trusted(store.card(receive(out, "named", store=store, base=str(base))))


@pytest.mark.parametrize("where", ["origin", "base"])
def test_a_foreign_card_cannot_say_that_its_base_was_named(
    store: Store, tiny_folder: Any, tmp_path: Path, where: str
) -> None:
    base = str(tiny_folder("llama"))
    folder = peft(tiny_folder("llama"), tmp_path / "peft")
    files = {name: folder / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    lies: dict[str, Any] = {"origin": {"kind": "trained", BASE_GIVEN: base}, "base": {"name": base}}
    lies[where] = {**lies[where], BASE_GIVEN: base}
    ref = Store(tmp_path / "liar").put("x", dict(files), Card(**lies))
    out = Store(tmp_path / "liar").export(ref, tmp_path / "out")
    assert {CARD, MANIFEST} <= {path.name for path in out.iterdir()}
    card = store.card(receive(out, "mine", store=store))
    assert not is_trusted(card)
    with pytest.raises(Unsupported, match="not loaded unasked"):
        load_own_base(card)


# -- bases of the catalogue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        NAME,
        REPO,
        f"/root/.cache/adapterhub-lite/bases/{NAME}-{CATALOG[NAME].wheel.version}",
        f"/home/me/.cache/huggingface/hub/models--{REPO.replace('/', '--')}/snapshots/{'a' * 40}",
    ],
)
def test_a_base_of_the_catalogue_is_recognised(
    store: Store, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = []
    monkeypatch.setattr(own_base, "load_base", lambda *arguments, **_: asked.append(arguments[0]))
    folder = peft(tiny_folder("llama"), tmp_path / "peft", base_model_name_or_path=name)
    ref = receive(folder, "mine", store=store)
    card = store.card(ref)
    load_own_base(card)
    assert asked == [NAME]
    assert run_command(ref, card) == "ahl run --adapter mine@1 PROMPT"


@pytest.mark.parametrize(
    "name", [None, "", "x", f"{NAME}-2", "evil/SmolLM2-135M-Instruct", f"/x/{NAME}", f"/bases/{NAME}-9", "/x/snapshots"]
)
def test_other_names_are_not_taken_for_it(name: str | None) -> None:
    assert recognised(name) is None


# -- modules that never load -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "task", "part"),
    [
        ("lm_head", "CAUSAL_LM", "a copy of its own of lm_head"),
        ("model.embed_tokens", "CAUSAL_LM", "a copy of its own of model.embed_tokens"),
        ("score", "CAUSAL_LM", "task type CAUSAL_LM has none"),
    ],
)
def test_modules_that_can_never_load_are_refused(
    store: Store, tiny_folder: Any, tmp_path: Path, module: str, task: str, part: str
) -> None:
    said = {"modules_to_save": [module.rpartition(".")[2]]}
    folder = peft(tiny_folder("llama"), tmp_path / "peft", **said)
    tensors = load_file(folder / "adapter_model.safetensors")
    some = next(iter(tensors.values()))
    save_file({**tensors, f"base_model.model.{module}.weight": some.clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match=f"{part}.*never be loaded"):
        receive(folder, "mine", store=store)
    assert not store.path.exists()


def test_a_changed_embedding_is_refused(store: Store, tiny_folder: Any, tmp_path: Path) -> None:
    folder = peft(tiny_folder("llama"), tmp_path / "peft", target_modules=["embed_tokens"])
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = {f"{stem}A": torch.ones(4, tiny.VOCABULARY), f"{stem}B": torch.ones(32, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match=r"embedding model\.embed_tokens.*never be loaded"):
        receive(folder, "mine", store=store)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_next_command_names_a_base_where_one_is_needed(tmp_path: Path) -> None:
    here = tmp_path / "a base"
    here.mkdir()

    def command(name: str | None, **origin: str) -> str:
        return run_command(Ref("mine", version=1), Card(base={"name": name}, origin={"kind": "imported", **origin}))

    assert command(str(here)) == f"ahl run --adapter mine@1 --base '{here}' PROMPT"
    assert command("org/model") == "ahl run --adapter mine@1 --base org/model PROMPT"
    for unknown in (None, "", str(tmp_path / "gone"), "~nobody-at-all/x", "//host/share", "\\\\host\\share"):
        assert command(unknown) == "ahl run --adapter mine@1 --base BASE PROMPT"
    assert command(str(here), base_given=str(here)) == "ahl run --adapter mine@1 PROMPT"
    assert command(str(here), base_given="another").endswith(f"--base '{here}' PROMPT")
    assert base_name(Card(base={"name": REPO})) == NAME


def test_deep_verify_names_a_command_that_works(store: Store, tiny_folder: Any, tmp_path: Path) -> None:
    base = tiny_folder("llama")
    ref = receive(peft(base, tmp_path / "peft"), "mine", store=store)
    wrong, skipped = verify_deep([ref], store=store)
    assert (wrong, len(skipped)) == ([], 1)
    assert f"ahl run --adapter mine@1 --base {base} PROMPT" in skipped[0].problem
    named = receive(tmp_path / "peft", "mine", store=store, base=str(base))
    assert verify_deep([named], store=store, device="cpu") == ([], [])
