"""The fused decoder's gradients are those of PEFT on plain transformers, row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.fused import fuse
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Settings, make_computation
from adapterhub_lite.training.decoder.fused import FusedDecoder
from adapterhub_lite.training.decoder.parts import not_covered, parts_of
from tests.training import decoder_cases as cases
from tests.training.decoder_cases import EXAMPLES, Peer, rows_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KINDS = ("lora", "patterns", "rslora", "dora")
BOUNDS = {"float64": 1e-10, "float32": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def find(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = cases.folder(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return find


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch):
    with cases.precision(monkeypatch, "float64"):
        yield


def check(peer: Peer, settings: Settings, bound: float, examples: list[Example] | None = None) -> None:
    """Gradients and losses within `bound`, and again when the buffers are used a second time."""
    rows = rows_of(examples or EXAMPLES)
    expected, theirs = peer.gradients(rows)
    assert not_covered(peer.base, [peer.learner]) is None
    fused = make_computation(peer.base, [peer.learner], settings)
    assert isinstance(fused, FusedDecoder)
    for _ in range(2):
        peer.clear()
        (sums,) = fused.gradients(rows)
        assert sums.total == pytest.approx(expected, rel=10 * bound)
        assert cases.error(peer.ours(), theirs) <= bound
    assert sums.count == sum(label != IGNORED for row in rows for label in row.example.labels[1:])
    assert sums.tokens == sum(len(row.example.ids) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_in_double_precision(folder, double, family: str, kind: str):
    base = cases.base_of(folder(family), "float64")
    before = base.live_digest()
    check(Peer(base, kind), Settings(pack_tokens=24), BOUNDS["float64"])
    assert base.live_digest() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_in_single_precision(folder, family: str, kind: str):
    check(Peer(cases.base_of(folder(family), "float32"), kind), Settings(pack_tokens=64), BOUNDS["float32"])


@pytest.mark.parametrize("pack_tokens", [1, 24, 1024])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_packs_and_checkpoints_change_nothing(folder, double, pack_tokens: int, checkpoint: bool):
    base = cases.base_of(folder("llama"), "float64")
    check(Peer(base, "lora"), Settings(pack_tokens=pack_tokens, checkpoint=checkpoint), BOUNDS["float64"])


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equal_with_dropout(folder, double, family: str, kind: str, checkpoint: bool):
    base = cases.base_of(folder(family), "float64")
    peer = Peer(base, kind, lora_dropout=0.3)
    check(peer, Settings(pack_tokens=24, checkpoint=checkpoint), BOUNDS["float64"])
    rows = rows_of(EXAMPLES)
    fused = make_computation(base, [peer.learner], Settings())
    other = rows_of(EXAMPLES, salt=9)
    peer.clear()
    assert fused.gradients(rows)[0].total != fused.gradients(other)[0].total
    assert fused.losses(rows)[0].total == fused.losses(other)[0].total
    peer.model.eval()
    expected, _ = Peer(base, kind).gradients(rows)
    assert fused.losses(rows)[0].total == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prefix", "projection"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_equal_with_a_prefix(folder, double, family: str, kind: str, checkpoint: bool):
    peer = Peer(cases.base_of(folder(family), "float64"), kind)
    check(peer, Settings(pack_tokens=24, checkpoint=checkpoint), BOUNDS["float64"])


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"], ["o_proj"], ["gate_proj", "k_proj"]])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_some_sites_only(folder, double, targets: list[str], kind: str, checkpoint: bool):
    peer = Peer(cases.base_of(folder("llama"), "float64"), kind, target_modules=targets)
    check(peer, Settings(checkpoint=checkpoint), BOUNDS["float64"])


@pytest.mark.parametrize("layers", [[1], [2], [0, 2]])
def test_some_layers_only(folder, double, layers: list[int]):
    peer = Peer(
        cases.base_of(folder("qwen3"), "float64"),
        "lora",
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        layers_to_transform=layers,
    )
    check(peer, Settings(), BOUNDS["float64"])


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("pack_tokens", [60, 70, 1024])
def test_equal_where_rows_begin_alike(folder, double, family: str, pack_tokens: int):
    same = [60 + i % 37 for i in range(40)]
    ends = [([5, 6], [7, 8, 2]), ([9], [10, 2]), ([], [11, 12, 13, 2]), ([5, 6, 7], [2])]
    alike = [Example([*same, *q, *a], [IGNORED] * (40 + len(q)) + a) for q, a in ends]
    peer = Peer(cases.base_of(folder(family), "float64"), "lora")
    check(peer, Settings(pack_tokens=pack_tokens), BOUNDS["float64"], [*alike, *EXAMPLES])
    check(peer, Settings(pack_tokens=pack_tokens), BOUNDS["float64"], [alike[0]] * 3)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_equal_on_quantised_bases(folder, quantize: str, copies: bool, kind: str):
    base = cases.base_of(folder("llama"), "float32", quantize, working_copies=copies)
    before = base.live_digest()
    check(Peer(base, kind), Settings(pack_tokens=64), BOUNDS["float32"])
    assert base.live_digest() == before


def test_weights_are_laid_side_by_side_once(folder):
    """Whoever fuses layers that are fused already, as a runtime on the same base does, gets the same memory."""
    base = cases.base_of(folder("llama"), "float32")
    assert not_covered(base, []) is None
    group = parts_of(base).layers[1].gate_up.modules
    first, second = fuse(group), fuse(group)
    assert first is not None
    assert second is not None
    assert first.weight.data_ptr() == second.weight.data_ptr() == group[0].weight.data_ptr()
    assert torch.equal(first.weight, torch.cat([module.weight for module in group]))
    assert fuse((group[1], group[0])).weight.data_ptr() != first.weight.data_ptr()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "gelu"}, "activation"),
        ({"attention_dropout": 0.1}, "drops attention"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "longest row"),
    ],
)
def test_other_decoders_are_left_to_others(folder, changes: dict[str, Any], why: str):
    assert why in str(not_covered(cases.base_of(folder("llama", **changes), "float32"), []))


def test_a_changed_output_layer_is_left_to_others(folder):
    base = cases.base_of(folder("llama"), "float32")
    peer = Peer(base, "lora", target_modules=["q_proj"])
    peer.trainable.sites["lm_head"] = peer.trainable._new("lm_head", base.model.lm_head, torch.Generator())
    assert "outside" in str(not_covered(base, [peer.learner]))


def test_equal_with_tied_embeddings(folder, double):
    base = cases.base_of(folder("llama", tie_word_embeddings=True), "float64")
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    check(Peer(base, "lora"), Settings(), BOUNDS["float64"])


@pytest.mark.parametrize("kind", ["lora", "dora", "prefix"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_is_as_near_to_the_truth_as_peft(folder, monkeypatch, family: str, kind: str):
    """Its error against float64 is at most 1.5 times that of PEFT in bfloat16, and one in a hundred."""
    base = cases.base_of(folder(family), "bfloat16")
    rows = rows_of(EXAMPLES)
    peer = Peer(base, kind)
    with cases.precision(monkeypatch, "float64"):
        exact = Peer(base, kind, dtype=torch.float64)
        for (_, _, own), (_, _, other) in zip(exact.pairs, peer.pairs, strict=True):
            own.data.copy_(other.data)
        truth = exact.gradients(rows)[1]
    theirs = peer.gradients(rows)[1]
    fused = make_computation(base, [peer.learner], Settings())
    assert isinstance(fused, FusedDecoder)
    fused.gradients(rows)
    names = [name for name, _ in peer.ours()]
    bound = cases.error(list(zip(names, theirs, strict=True)), truth)
    assert cases.error(peer.ours(), truth) <= 1.5 * bound + 0.01
