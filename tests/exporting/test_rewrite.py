"""Folding and padding keep the change of every module, for any ranks, alphas, dtypes and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.exporting.base import BaseFacts
from adapterhub_lite.exporting.pairs import Pair, pairs_of
from adapterhub_lite.exporting.prepare import prepare
from adapterhub_lite.exporting.readers import READERS
from adapterhub_lite.exporting.rewrite import folded, padded
from adapterhub_lite.exporting.traits import Asked
from adapterhub_lite.formats.specs import LoraSpec

PREFIX = "base_model.model."
NAMES = [f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "k_proj", "v_proj")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(pair: Pair) -> torch.Tensor:
    return pair.exact.rows(0, pair.up.shape[0])


def pair_of(rank: int, scale: float, dtype: torch.dtype, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 12, generator=generator), torch.randn(10, rank, generator=generator)
    return Pair(down.to(dtype), up.to(dtype), scale)


@given(
    rank=st.integers(1, 9),
    power=st.integers(-6, 6),
    dtype=st.sampled_from(DTYPES),
    more=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_a_scale_that_is_a_power_of_two_is_folded_exactly(rank, power, dtype, more, seed):
    pair = pair_of(rank, 2.0**power, dtype, seed)
    made = padded(folded(pair), rank + more)
    assert torch.equal(dense(made), dense(pair))
    exact = pair.up.double() * 2.0**power
    held = dtype if torch.equal(exact.to(dtype).double(), exact) else torch.float32  # the least numbers of float16
    assert (made.scale, made.rank, made.up.dtype) == (1.0, rank + more, held)


@given(rank=st.integers(1, 9), scale=st.floats(0.01, 100), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_any_scale_costs_no_more_than_float32_rounding(rank, scale, dtype, seed):
    pair = pair_of(rank, scale, dtype, seed)
    error = float((dense(folded(pair)) - dense(pair)).norm() / dense(pair).norm())
    assert error <= 6e-8


def test_a_scale_that_float16_cannot_hold_is_written_in_float32():
    pair = Pair(torch.ones(1, 4, dtype=torch.float16), torch.full((4, 1), 3e4, dtype=torch.float16), 4.0)
    assert folded(pair).up.dtype == torch.float32
    assert bool(torch.isfinite(folded(pair).up).all())


ranks = st.dictionaries(st.sampled_from([*NAMES, "q_proj", "layers.1.self_attn.v_proj"]), st.integers(1, 6), max_size=3)


@given(
    rank_pattern=ranks,
    alpha_pattern=ranks,
    rslora=st.booleans(),
    rank=st.integers(1, 6),
    alpha=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    reader=st.sampled_from(["vllm", "sglang", "lorax"]),
)
@settings(deadline=None, max_examples=80)
def test_every_export_keeps_every_change(rank_pattern, alpha_pattern, rslora, rank, alpha, dtype, reader):
    alphas = {key: float(value) for key, value in alpha_pattern.items()}
    spec = LoraSpec(rank, float(alpha), ("k_proj", "q_proj", "v_proj"), rank_pattern, alphas, rslora)
    tensors: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(NAMES):
        pair = pair_of(spec.rank_of(name), 1.0, dtype, seed)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": pair.down, f"{PREFIX}{name}.lora_B.weight": pair.up}
    adapter = Adapter(spec, tensors, name="mine@1")
    made = prepare(adapter, READERS[reader], Asked()).adapter
    assert made is not None
    assert isinstance(made.spec, LoraSpec)
    assert (made.spec.rank_pattern, made.spec.alpha_pattern, made.spec.use_rslora) == ({}, {}, False)
    before, after = pairs_of(adapter).modules, pairs_of(made).modules
    assert set(after) == set(NAMES)
    assert {pair.rank for pair in after.values()} == {made.spec.rank}
    assert len({pair.scale for pair in after.values()}) == 1
    for name in NAMES:
        error = (dense(after[name]) - dense(before[name])).norm() / dense(before[name]).norm()
        assert float(error) <= 6e-8
    assert len({tensor.dtype for tensor in made.tensors.values()}) == 1


@pytest.mark.parametrize("alpha", [1e-6, 3.3e-10, 1 / 3, 7.0, 1e12 / 3])
@pytest.mark.parametrize("pattern", [False, True])
def test_an_alpha_of_any_size_is_written_as_it_is(alpha, pattern):
    spec = LoraSpec(3, 1.0 if pattern else alpha, ("q_proj",), {}, {"q_proj": alpha} if pattern else {})
    pair = pair_of(3, 1.0, torch.float32)
    tensors = {f"{PREFIX}{NAMES[0]}.lora_{part}.weight": t for part, t in (("A", pair.down), ("B", pair.up))}
    made = prepare(Adapter(spec, tensors, name="mine@1"), READERS["vllm"], Asked()).adapter
    assert made is not None
    assert isinstance(made.spec, LoraSpec)
    assert made.spec.alpha == pytest.approx(alpha, rel=1e-11 if pattern else 0)


def base(*names: str) -> BaseFacts:
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return BaseFacts(config, dict.fromkeys(names, (12, 10)), "model", False, False)


def adapter_of(*names: str, targets: tuple[str, ...]) -> Adapter:
    tensors = {}
    for name in names:
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": torch.ones(2, 12),
            f"{PREFIX}{name}.lora_B.weight": torch.ones(10, 2),
        }
    return Adapter(LoraSpec(2, 2.0, targets), tensors)


@pytest.mark.parametrize(
    ("changed", "reader", "expected"),
    [
        (NAMES, "vllm", ("k_proj", "q_proj", "v_proj")),
        (NAMES[:3], "vllm", tuple(sorted(NAMES[:3]))),  # last names would name those of layer 1 too
        (NAMES[:3], "sglang", ("k_proj", "q_proj", "v_proj")),  # it knows modules by their last names only
    ],
)
def test_target_modules_name_what_is_there(changed, reader, expected):
    adapter = adapter_of(*changed, targets=tuple(sorted(changed)))
    made = prepare(adapter, READERS[reader], Asked(), base=base(*NAMES)).adapter
    assert made is not None
    assert made.spec.target_modules == expected


def test_zeros_come_where_they_are_wanted_only():
    adapter = adapter_of(NAMES[0], targets=("model.layers.0.self_attn.q_proj",))
    for reader, names in (("vllm", NAMES[:1]), ("sglang", NAMES[:3]), ("lorax", [NAMES[0], NAMES[3]])):
        found = prepare(adapter, READERS[reader], Asked(), base=base(*NAMES))
        assert found.adapter is not None
        modules = pairs_of(found.adapter).modules
        assert set(modules) == set(names)
        assert all(pair.norm == 0 for name, pair in modules.items() if name != NAMES[0])
        assert found.error(modules) < 1e-12


def test_the_proof_sees_a_module_that_is_wrong_or_missing():
    adapter = adapter_of(*NAMES, targets=("q_proj", "k_proj", "v_proj"))
    found = prepare(adapter, READERS["vllm"], Asked(), base=base(*NAMES))
    assert found.adapter is not None
    right = dict(pairs_of(found.adapter).modules)
    assert found.error(right) < 1e-12
    wrong = {**right, NAMES[2]: Pair(right[NAMES[2]].down, right[NAMES[2]].up, 1.1)}
    assert found.error(wrong) == pytest.approx(0.1 / 6**0.5)
    assert [layer.error for layer in found.layers(wrong)].count(pytest.approx(0.1)) == 1
    assert found.error({name: pair for name, pair in right.items() if name != NAMES[2]}) == float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_module_that_needs_float32_brings_all_to_it(dtype):
    spec = LoraSpec(2, 4.0, ("k_proj", "q_proj", "v_proj"), {}, {"layers.1.self_attn.v_proj": 3.3})
    tensors = {}
    for seed, name in enumerate(NAMES):
        pair = pair_of(2, 1.0, dtype, seed)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": pair.down, f"{PREFIX}{name}.lora_B.weight": pair.up}
    adapter = Adapter(spec, tensors, name="mine@1")
    made = prepare(adapter, READERS["vllm"], Asked()).adapter
    assert made is not None
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.float32}
    before, after = pairs_of(adapter).modules, pairs_of(made).modules
    for name in NAMES:
        exact = name != NAMES[5]
        assert torch.equal(dense(after[name]), dense(before[name])) is exact
        torch.testing.assert_close(dense(after[name]), dense(before[name]), rtol=1e-6, atol=1e-6)
