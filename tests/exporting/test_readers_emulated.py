"""Exports through stand-ins of the readers, written after their sources: base + export gives the version's logits, and
the version as it is stored does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.exporting.write import write_gguf
from adapterhub_lite.store.fs import FileSystem
from tests.exporting import build, emulate
from tests.exporting.build import Made

WRONG = 0.005


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = build.save_base(family, tmp_path_factory.mktemp(family))
        return made[family]

    return base


def linear(made: Made) -> dict[str, tuple[int, int]]:
    """The layers that a server changes: those of the blocks, and the output layer."""
    shapes = made.facts.served
    return {name: shape for name, shape in shapes.items() if any(p.isdecimal() for p in name.split("."))}


READ: dict[str, Callable[[Path, Made], emulate.Deltas]] = {
    "vllm": lambda folder, made: emulate.vllm(folder, linear(made), 64),
    "sglang": lambda folder, made: emulate.sglang(folder, linear(made)),
    "lorax": lambda folder, made: emulate.lorax(folder, linear(made)),
}


def stored(made: Made, reader: str) -> float | str:
    """How far the reader is from the version when it gets what PEFT saved; `refused` where it will not have it."""
    try:
        deltas = READ[reader](made.folder, made)
    except emulate.Refused:
        return "refused"
    return build.near(build.with_deltas(made, deltas), made.logits)


# What the reader does with the stored version: right, wrong, refused.
CASES = [
    ("vllm", "lora", "right"),
    ("vllm", "patterns", "wrong"),
    ("vllm", "rslora", "right"),
    ("vllm", "dora", "refused"),
    ("vllm", "adalora", "refused"),
    ("vllm", "loha", "refused"),
    ("sglang", "lora", "right"),
    ("sglang", "patterns", "refused"),
    ("sglang", "rslora", "wrong"),
    ("lorax", "lora", "wrong"),  # rank 4 is padded to 8, and alpha divided by 8 from the second type on
    ("lorax", "patterns", "refused"),
    ("lorax", "rslora", "wrong"),
]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("reader", "kind", "as_stored"), CASES)
def test_the_export_is_right_where_the_version_was_not(bases, tmp_path, family, reader, kind, as_stored):
    made = build.make(bases(family), family, kind, tmp_path / "in")
    before = stored(made, reader)
    if as_stored == "refused":
        assert before == "refused"
    else:
        assert isinstance(before, float)
        assert before < 1e-5 if as_stored == "right" else before > WRONG
    options: dict[str, Any] = {"max_rank": 64} if reader == "vllm" else {}
    if kind == "dora":
        options["rank"] = 32
    folder = build.write(made, reader, tmp_path / "out", **options)
    found = build.with_deltas(made, READ[reader](folder, made))
    assert build.near(found, made.logits) < 1e-5
    assert build.near(made.bare, made.logits) > WRONG


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj"], ["k_proj", "gate_proj"], ["up_proj", "o_proj"]])
def test_sglang_gets_zeros_for_layers_it_fuses(bases, tmp_path, targets):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", target_modules=targets)
    folder = build.write(made, "sglang", tmp_path / "out")
    assert build.near(build.with_deltas(made, READ["sglang"](folder, made)), made.logits) < 1e-5
    assert build.near(build.by_peft(made, folder), made.logits) < 1e-5
    complete = targets == ["q_proj", "v_proj"]
    assert (stored(made, "sglang") == "refused") is not complete


def test_lorax_gets_zeros_for_layers_that_are_not_changed(bases, tmp_path):
    targets = ["q_proj", "down_proj"]
    made = build.make(
        bases("llama"), "llama", "lora", tmp_path / "in", r=16, target_modules=targets, layers_to_transform=[1]
    )
    before = READ["lorax"](made.folder, made)
    assert before == {}, "the stand-in should have dropped both types"
    folder = build.write(made, "lorax", tmp_path / "out")
    deltas = READ["lorax"](folder, made)
    assert sum(float(delta.abs().max()) > 0 for delta in deltas.values()) == 2
    assert build.near(build.with_deltas(made, deltas), made.logits) < 1e-5
    assert build.near(build.by_peft(made, folder), made.logits) < 1e-5


def test_lorax_on_two_gpus_reads_the_same(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "patterns", tmp_path / "in")
    folder = build.write(made, "lorax", tmp_path / "out")
    deltas = emulate.lorax(folder, linear(made), world_size=2)
    assert build.near(build.with_deltas(made, deltas), made.logits) < 1e-5


@pytest.mark.parametrize("reader", ["vllm", "sglang", "lorax"])
def test_names_of_a_bare_backbone_are_those_of_the_served_class(bases, tmp_path, reader):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", r=16)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        data = (made.folder / file).read_bytes()
        (bare / file).write_bytes(data)
    renamed(bare)
    assert READ[reader](bare, made) in ({}, None) or reader == "sglang"
    other = Made(made.base, "llama", "FEATURE_EXTRACTION", bare, made.logits, made.bare)
    prepared = other.prepare(reader)
    assert "key_prefix" in {finding.rule for finding in prepared.findings}
    folder = build.write(other, reader, tmp_path / "out")
    deltas = READ[reader](folder, made)
    assert build.near(build.with_deltas(made, deltas), made.logits) < 1e-5


def renamed(folder: Path) -> None:
    """The files of an adapter as PEFT saves it for the bare backbone."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k.replace("model.model.model.", "model.model."): t for k, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    targets = [name.removeprefix("model.") for name in config["target_modules"]]
    config |= {"task_type": "FEATURE_EXTRACTION", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, k) for f in ("llama", "qwen2", "gpt2") for k in ("lora", "patterns", "rslora", "dora", "adalora")],
)
def test_llama_cpp_adds_what_peft_adds(bases, tmp_path, family, kind):
    made = build.make(bases(family), family, kind, tmp_path / "in")
    prepared = made.prepare("llama.cpp", **({"rank": 32} if kind == "dora" else {}))
    assert prepared.adapter is not None, [one.what for one in prepared.findings]
    back = write_gguf(FileSystem(), tmp_path, prepared.adapter, made.config)
    deltas = emulate.llama_cpp(tmp_path / "adapter.gguf", made.config)
    assert set(deltas) == set(prepared.facts.pairs.modules)
    assert build.near(build.with_deltas(made, deltas), made.logits) < 1e-5
    assert prepared.error(back) < (1e-3 if kind == "dora" else 1e-6)


@pytest.mark.parametrize(("kind", "right"), [("lora", True), ("rslora", False), ("patterns", False)])
def test_what_llama_cpps_converter_makes_of_the_version(bases, tmp_path, kind, right):
    made = build.make(bases("llama"), "llama", kind, tmp_path / "in")
    distance = build.near(build.with_deltas(made, emulate.llama_cpp_converter(made.folder)), made.logits)
    assert distance < 1e-5 if right else distance > WRONG
    said = {finding.rule for finding in made.prepare("llama.cpp").findings if finding.severity == "silently wrong"}
    assert said == {"lora": set(), "rslora": {"rslora"}, "patterns": {"alpha_pattern"}}[kind]
