"""The native layers of an encoder beside torch's: every kind of adapter, and what they leave to torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.adapters.lora import LoraSite
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.kernels.encoder import has_encoder
from adapterhub_lite.runtime.batch import BatchPlan, Composer
from adapterhub_lite.runtime.encoder import Encoder, encoder_of
from adapterhub_lite.runtime.native_encoder import NativeEncoder
from tests.runtime.test_encoder import ANY, CLASSES, ROW, Zoo, assert_equal, checkpoint, drawn, known

pytestmark = pytest.mark.skipif(not has_encoder(), reason="no native encoder on this machine")


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What each native call gave."""
    calls: list[torch.Tensor] = []
    own = NativeEncoder.__call__

    def call(self: NativeEncoder, *rest: Any) -> torch.Tensor:
        calls.append(own(self, *rest))
        return calls[-1]

    monkeypatch.setattr(NativeEncoder, "__call__", call)
    return calls


def encoder(zoo_: Zoo) -> Encoder:
    found = encoder_of(zoo_.base)
    assert found is not None
    return found


def by_torch(zoo_: Zoo, plan: BatchPlan, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    one = encoder(zoo_)
    native, one.native = one.native, None
    try:
        return one(plan, rows)
    finally:
        one.native = native


def native_kinds(family: str) -> list[str]:
    return [kind for kind in known(family) if "prefix" not in kind]


@pytest.mark.parametrize("family", CLASSES)
@ANY
@given(data=st.data())
def test_any_mix_gives_what_torch_gives(zoo: Any, family: str, data: st.DataObject) -> None:
    kinds, rows = drawn(data, native_kinds(family))
    plan, one = zoo(family).plan(kinds), encoder(zoo(family))
    assert one.native is not None
    assert one.native.knows(plan)
    with torch.inference_mode():
        assert_equal(one(plan, rows), by_torch(zoo(family), plan, rows))


@pytest.mark.parametrize("family", sorted({*CLASSES} - {"electra"}))  # whose embeddings are projected by torch
def test_what_leaves_the_layers_is_the_solo_run_to_the_last_bit(
    zoo: Any, hidden: list[torch.Tensor], family: str
) -> None:
    # A batch with a prompt is embedded by torch, whose norm rounds otherwise.
    kinds = [kind for kind in native_kinds(family) if kind not in ("none", "tags", "more tags", "prompt")] * 3
    rows = [[5 + (7 * i + j) % 200 for j in range(1 + 5 * i % 23)] for i in range(len(kinds))]
    one = encoder(zoo(family))
    with torch.inference_mode():
        one(zoo(family).plan(kinds), rows)
        together = hidden.pop()
        # Rows lie sorted by adapter and length; each reads its first token.
        order = sorted(range(len(kinds)), key=lambda i: (kinds.index(kinds[i]), len(rows[i])))
        for i, mixed in zip(order, together, strict=True):
            one(zoo(family).plan([kinds[i]]), [rows[i]])
            alone = hidden.pop()
            assert torch.equal(alone[0], mixed), kinds[i]


def test_prefixes_and_scaled_inputs_that_others_read_go_by_torch(zoo: Any, hidden: list[torch.Tensor]) -> None:
    one, zoo_ = encoder(zoo("bert")), zoo("bert")
    some = zoo_.fitted["rank5"]
    up = one.layers[0].up.modules[0]
    site = LoraSite(torch.zeros(0, 64), torch.zeros(96, 0), None, None, torch.full((64,), 2.0))
    scaled = replace(some, sites={up: site}, packs={}, digest="scaled up").packed(zoo_.base.siblings)
    for kinds, plan, native in (
        (["rank5", "rank1"], zoo_.plan(["rank5", "rank1"]), 1),
        (["rank5", "prefix2"], zoo_.plan(["rank5", "prefix2"]), 0),
        (["rank5", "scaled"], Composer().compose([some, scaled], zoo_.base.device), 0),
    ):
        hidden.clear()
        with torch.inference_mode():
            found = one(plan, [ROW, ROW[:2]])
            assert len(hidden) == native, kinds
            assert_equal(found, by_torch(zoo_, plan, [ROW, ROW[:2]]))


def test_an_adapter_that_is_not_packed_goes_by_torch(zoo: Any) -> None:
    zoo_ = zoo("bert")
    loose = replace(zoo_.fitted["rank5"], packs={}, digest="loose")
    one = encoder(zoo_)
    assert one.native is not None
    assert not one.native.knows(Composer().compose([loose], zoo_.base.device))


@pytest.mark.parametrize("word", [-1, 10**6])
def test_a_word_that_the_model_does_not_have_is_refused(zoo: Any, word: int) -> None:
    """It would be read from beside the table."""
    with pytest.raises(IndexError), torch.inference_mode():
        encoder(zoo("bert"))(zoo("bert").plan(["rank5"]), [[5, word, 6]])


@pytest.mark.parametrize("what", [("bert", "nf4"), ("bert", "int8"), ("bert", "none", "bfloat16")])
def test_other_weights_go_by_torch(zoo: Any, what: tuple[str, ...]) -> None:
    assert encoder(zoo(*what)).native is None


@pytest.mark.parametrize(
    ("changes", "native"),
    [
        ({}, True),
        ({"hidden_act": "relu"}, True),
        ({"hidden_act": "gelu_new"}, False),
        ({"hidden_act": "silu"}, False),
        ({"num_attention_heads": 8}, False),  # heads of 8
        ({"layer_norm_eps": 0.1}, True),
    ],
)
def test_which_models_it_takes(tmp_path: Path, changes: dict[str, Any], native: bool) -> None:
    base = load_base(str(checkpoint(tmp_path, "bert", **changes)), device="cpu")
    found = encoder_of(base)
    assert found is not None
    assert (found.native is not None) == native


def test_without_native_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.runtime.native_encoder.has_encoder", lambda: False)
    found = encoder_of(load_base(str(checkpoint(tmp_path, "bert")), device="cpu"))
    assert found is not None
    assert found.native is None
