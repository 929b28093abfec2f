"""Bytes counted from shapes are those that are asked for; large models fit where they are said to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapterhub_lite.bases.quantization import state_tensors
from adapterhub_lite.training.computation import Settings
from adapterhub_lite.training.decoder.fused import FusedDecoder
from adapterhub_lite.training.decoder.ops import TorchOps
from adapterhub_lite.training.decoder.parts import not_covered, parts_of
from adapterhub_lite.training.planning.footprint import Counter, Footprint, Lora, Plan, Shape, footprint
from tests.training import decoder_cases as cases
from tests.training.decoder_cases import Peer, rows_of
from tests.training.flash_oracle import oracle

GB = 10**9
LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128256)
QWEN_14B = Shape(5120, 13824, 48, 40, 8, 128, 152064, biased=True)
ROWS = [(2048, 1024)]


def least(shape: Shape, offload: bool = True, pack: int = 2048) -> Footprint:
    settings = Settings(pack, checkpoint=True, offload=offload, table_on_host=True)
    return footprint(shape, [Lora(16)], Plan(settings, quantize="nf4-double"), ROWS)


def at_full_depth(shape: Shape) -> float:
    """Drawn on from 3 and 5 layers: all but the work, which stays as it is, grows by the layer."""
    few, more = least(replace(shape, layers=3)), least(replace(shape, layers=5))
    assert few.work == more.work
    linear = sum(a * b for a, b in shape.linear.values())
    assert few.parameters == 3 * 4 * 16 * sum(a + b for a, b in shape.linear.values())
    assert few.tables == 2 * shape.vocabulary * shape.width
    assert 3 * linear // 2 < few.weights < 3 * 0.52 * linear
    return few.total + (more.total - few.total) / 2 * (shape.layers - 3)


def test_8_billion_in_6_gb():
    assert 5.5 * GB < at_full_depth(LLAMA_8B) <= 6.0 * GB


def test_14_billion_in_10_gb():
    assert 9.5 * GB < at_full_depth(QWEN_14B) <= 10.0 * GB


def test_offloaded_work_does_not_grow_with_layers():
    small = Shape(256, 512, 4, 4, 2, 64, 1000)
    tall = Shape(256, 512, 9, 4, 2, 64, 1000)
    assert least(small).work == least(tall).work
    kept = [least(shape, offload=False).buffers for shape in (small, tall)]
    assert kept[1] - kept[0] >= 5 * 2048 * 256 * 2


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    "settings",
    [Settings(64), Settings(64, recompute_mlp=True), Settings(64, checkpoint=True), Settings(64, True, offload=True)],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_buffers_are_those_really_made(tmp_path: Path, family: str, settings: Settings, lean: bool):
    base = cases.base_of(
        cases.folder(tmp_path, family), "bfloat16", "nf4" if lean else "none", **(_BARE if lean else {})
    )
    learner = Peer(
        base, "lora", r=4, target_modules=[f"{s}_proj" for s in ("q", "k", "v", "o", "gate", "up", "down")]
    ).learner
    assert not_covered(base, [learner]) is None
    if lean and not settings.checkpoint:
        pytest.skip("buffers are freed where layers are computed again")
    ops = oracle() if lean else TorchOps()
    fused = FusedDecoder(base, [learner], settings, parts=parts_of(base), ops=ops)
    fused.gradients(rows_of(cases.EXAMPLES))
    rows = [(len(e.ids) - 1 - _unasked(e.labels), sum(label >= 0 for label in e.labels[1:])) for e in cases.EXAMPLES]
    plan = Plan(settings, base.dtype, "nf4" if lean else "none", ops=None if lean else _Unseeing())
    found = footprint(Shape.of(base.config), [Lora(4)], plan, rows)
    assert found.buffers == fused.most > 0


def _unasked(labels: list[int]) -> int:
    """Tokens behind the last supervised one."""
    return next(i for i, label in enumerate(reversed(labels)) if label >= 0)


class _Unseeing(TorchOps):
    """Attention needs values to know its spans."""

    def attend(self, *given: object) -> None:
        """Nothing to make."""

    def attend_back(self, *given: object) -> None:
        """Nothing to make."""


def test_weights_are_counted_as_a_base_has_them(tmp_path: Path):
    for quantize in ("none", "nf4", "nf4-double", "int8"):
        base = cases.base_of(
            cases.folder(tmp_path / quantize, "qwen2"), "float32", quantize, **(_BARE if quantize != "none" else {})
        )
        plan = Plan(Settings(), base.dtype, quantize)
        found = footprint(Shape.of(base.config), [Lora(2)], plan, [(8, 4)])
        table = base.model.get_input_embeddings().weight
        head = base.model.get_output_embeddings().weight
        apart = {p.data_ptr(): p.nbytes for p in (table, head)}
        assert found.tables == sum(apart.values())
        rest = sum(p.nbytes for p in base.model.parameters() if p.data_ptr() not in apart)
        scales = 0
        for module in base.model.modules():
            if type(module).__name__ == "Linear4bit":
                scales += sum(one.nbytes for one in state_tensors(module.weight.quant_state).values()) + 64
            elif type(module).__name__ == "Linear8bitLt":
                scales += module.weight.SCB.nbytes
        assert found.weights == rest + scales


_BARE: dict[str, object] = {"working_copies": False}


def test_the_counter_sees_temporaries_and_their_end():
    with Counter() as counter:
        kept = torch.empty(1024, device="meta")
        for _ in range(3):
            kept.add_((kept * 2).exp())
        del kept
    assert counter.held == 0
    assert counter.most == 3 * 4096
