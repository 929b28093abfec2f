"""Norms and cosines of adapters from their thin factors are those of the dense changes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.adapters.compare import Comparison, Overlap, compare, layer_of, natural
from adapterhub_lite.adapters.prefix import fit_prefix, prefix_shape
from adapterhub_lite.errors import AdapterMismatch, Unsupported
from adapterhub_lite.formats.specs import LoraSpec, PrefixSpec
from tests import peers, tiny

STEM = "base_model.model."
ALPHAS = st.floats(0.01, 64)
Dense = dict[str, torch.Tensor]


def close(found: float | None, expected: float, scale: float = 1.0) -> bool:
    return found is not None and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9 * scale)


def check(found: tuple[Overlap, ...], a: Dense, b: Dense) -> None:
    """Every row equals the brute force on float64 matrices."""
    assert [one.name for one in found] == sorted({**a, **b}, key=natural)
    for one in found:
        x, y = a.get(one.name), b.get(one.name)
        assert (one.norm_a is None, one.norm_b is None) == (x is None, y is None)
        if x is not None:
            assert close(one.norm_a, float(x.norm()))
        if y is not None:
            assert close(one.norm_b, float(y.norm()))
        if x is None or y is None:
            assert (one.cosine, one.dot) == (None, 0.0)
        else:
            assert close(one.cosine, float((x * y).sum() / x.norm() / y.norm()))


def whole(a: Dense, b: Dense) -> tuple[float, float, float]:
    """Norms and cosine of all changes as one vector each."""
    long = [torch.cat([(side[n] if n in side else 0 * other[n]).flatten() for n in {**a, **b}])
            for side, other in ((a, b), (b, a))]  # fmt: skip
    return float(long[0].norm()), float(long[1].norm()), float(torch.cosine_similarity(long[0], long[1], dim=0))


@st.composite
def pairs(draw: Any) -> tuple[Adapter, Adapter, Dense, Dense]:
    """Two LoRA adapters of one base with ranks, alphas and scalings of their own, and their dense changes."""
    count = draw(st.integers(1, 4))
    shapes = {
        f"model.layers.{draw(st.integers(0, 11))}.m{i}": (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
        for i in range(count)
    }
    embeddings = draw(st.sets(st.sampled_from(sorted(shapes))))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sides = []
    for _ in range(2):
        names = draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
        rslora, ranks = draw(st.booleans()), {n: draw(st.integers(1, 6)) for n in sorted(names)}
        alphas = {n: draw(ALPHAS) for n in sorted(names)}
        tensors, dense = {}, {}
        for name in names:
            rank, (rows, columns) = ranks[name], shapes[name]
            down, up = torch.randn(rank, columns), torch.randn(rows, rank)
            keys = (
                ("lora_embedding_A", "lora_embedding_B") if name in embeddings else ("lora_A.weight", "lora_B.weight")
            )
            tensors |= {f"{STEM}{name}.{keys[0]}": down, f"{STEM}{name}.{keys[1]}": up}
            scale = alphas[name] / (rank**0.5 if rslora else rank)
            dense[name] = scale * up.double() @ down.double()
        # Rank and alpha of the configuration itself are wrong everywhere: the patterns alone are right.
        spec = LoraSpec(99, 99.0, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
        sides.append((Adapter(spec, tensors, name="one"), dense))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_any_two_adapters_compare_as_their_dense_changes_do(pair: tuple[Adapter, Adapter, Dense, Dense]) -> None:
    a, b, dense_a, dense_b = pair
    found = compare(a, b)
    check(found.modules, dense_a, dense_b)
    (total,) = found.whole
    expected = whole(dense_a, dense_b)
    assert close(total.norm_a, expected[0])
    assert close(total.norm_b, expected[1])
    assert close(total.cosine, expected[2])
    for layer in found.layers:
        inside = [{n: d for n, d in side.items() if n.startswith(f"{layer.name}.")} for side in (dense_a, dense_b)]
        norms = [math.sqrt(sum(float(d.norm()) ** 2 for d in side.values())) if side else None for side in inside]
        for norm, brute in zip((layer.norm_a, layer.norm_b), norms, strict=True):
            assert (norm is None) if brute is None else close(norm, brute)
        if None not in norms:
            assert close(layer.cosine, whole(*inside)[2])
    for side, other, dense in (("a", dense_b, dense_a), ("b", dense_a, dense_b)):
        assert {one.name for one in found.only_in(side)} == set(dense) - set(other)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(pairs())
def test_the_same_is_one_and_the_opposite_minus_one(pair: tuple[Adapter, Adapter, Dense, Dense]) -> None:
    a = pair[0]
    opposite = replace(a, tensors={k: -t if k.endswith(("_B.weight", "_B")) else t for k, t in a.tensors.items()})
    for other, expected in ((a, 1.0), (opposite, -1.0)):
        found = compare(a, other)
        assert all(one.cosine == pytest.approx(expected, abs=1e-12) for one in (*found.modules, *found.whole))
        assert all(one.norm_a == one.norm_b for one in found.modules)


def test_another_factorisation_of_the_same_change_is_the_same() -> None:
    """Twice the rank, alpha and a mixing of the ranks: B M and M^-1 A."""
    torch.manual_seed(0)
    down, up, mix = torch.randn(4, 6), torch.randn(5, 4), torch.randn(4, 4).double()
    a = lora({"x": (up, down)}, rank=4, alpha=8)
    b = lora({"x": (up.double() @ mix, torch.linalg.inv(mix) @ down.double())}, rank=4, alpha=4)
    found = compare(a, b).modules[0]
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.norm_a == pytest.approx(2 * (found.norm_b or 0), rel=1e-12)


def lora(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rank: int, alpha: float, **more: Any) -> Adapter:
    tensors = {}
    for name, (up, down) in factors.items():
        tensors |= {f"{STEM}{name}.lora_A.weight": down, f"{STEM}{name}.lora_B.weight": up}
    return Adapter(LoraSpec(rank, alpha, **more), tensors, name="mine")


@pytest.mark.parametrize("kind", ["lora", "patterns", "rslora", "bias", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_as_peft_itself_forms_the_changes(tmp_path: Path, tiny_folder: Any, family: str, kind: str) -> None:
    """Linear layers and GPT-2's Conv1D, against PEFT's own `get_delta_weight`; embeddings with them."""
    sides, dense = [], []
    embedding = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}[family]
    some = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}[family]
    targets = {"target_modules": [some, embedding]} if kind == "lora" else {}
    for seed in (1, 2):
        task = peers.task_type(family)
        settings = peers.config(family, kind, task, lora_alpha=8 * seed, **targets)
        wrapped = peers.wrap(peers.plain(tiny_folder(family), task), settings, seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_embedding_A" in name:
                parameter.data.normal_()
        wrapped.double()
        modules = {n.removeprefix(STEM): m for n, m in wrapped.named_modules() if hasattr(m, "get_delta_weight")}
        dense.append({n: m.get_delta_weight("default").detach() for n, m in modules.items()})
        wrapped.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        sides.append(read_adapter(tmp_path / str(seed)))
    found = compare(*sides)
    assert dense[0]
    check(tuple(one for one in found.modules if one.part == "delta"), *dense)
    if kind == "dora":
        magnitudes = [one for one in found.modules if one.part == "magnitude"]
        assert {one.name for one in magnitudes} == set(dense[0])
        own = [s.tensors[f"{STEM}{magnitudes[0].name}.lora_magnitude_vector"].double() for s in sides]
        assert magnitudes[0].norm_a == pytest.approx(float(own[0].norm()))
        assert magnitudes[0].cosine == pytest.approx(float(torch.cosine_similarity(own[0], own[1], dim=0)))
    if kind == "bias":
        assert {one.name for one in found.modules if one.part == "bias"} == set(dense[0])
        name = next(iter(dense[0]))
        bias = next(one for one in found.modules if (one.part, one.name) == ("bias", name))
        own = [s.tensors[f"{STEM}{name}.lora_B.bias"].double() * s.spec.scaling(name) for s in sides]
        assert bias.norm_b == pytest.approx(float(own[1].norm()))
    assert ({one.part for one in found.whole} >= {"head"}) == (family == "bert")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefixes_by_keys_and_values_of_each_layer(tiny_base: Any, family: str) -> None:
    """As the layers get them: an encoder-decoder's layers share rows of the file."""
    shape = prefix_shape(tiny_base(family).config)
    spec = PrefixSpec(3, shape.heads * shape.head_dim, shape.layers, shape.heads, shape.submodules)
    torch.manual_seed(0)
    a, b = (Adapter(spec, {"prompt_embeddings": torch.randn(spec.shape)}) for _ in range(2))
    found = compare(a, b)
    fitted = [fit_prefix(spec, side.tensors["prompt_embeddings"].double(), shape) for side in (a, b)]
    dense: list[Dense] = [
        {f"layers.{i}.{name}": part[i].permute(1, 0, 2).reshape(3, -1) for i in range(shape.layers)
         for name, part in (("keys", side.keys), ("values", side.values))} for side in fitted
    ]  # fmt: skip
    check(found.modules, *dense)
    assert [one.name for one in found.layers] == [f"layers.{i}" for i in range(shape.layers)]
    assert found.whole[0].cosine == pytest.approx(whole(*dense)[2])


def test_heads_are_compared_as_they_are() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 4) for _ in range(2)]
    factors = {"x": (torch.ones(2, 1), torch.ones(1, 2))}
    sides = [
        replace(one, tensors={**one.tensors, f"{STEM}classifier.weight": weight})
        for weight in weights
        for one in [lora(factors, 1, 1.0)]
    ]
    head = next(one for one in compare(*sides).whole if one.part == "head")
    assert head.cosine == pytest.approx(float(torch.cosine_similarity(*(w.flatten() for w in weights), dim=0)))
    spec = PrefixSpec(1, 2, 1, 1)
    prefixes = [Adapter(spec, {"prompt_embeddings": torch.ones(1, 4), "base_model.score.weight": w}) for w in weights]
    assert compare(*prefixes).modules[-1].name == "score.weight"
    wider = replace(sides[1], tensors={**sides[1].tensors, f"{STEM}classifier.weight": torch.ones(4, 3)})
    head = next(one for one in compare(sides[0], wider).modules if one.part == "head")
    assert (head.dot, head.cosine) == (None, None)


def test_other_shapes_have_norms_and_no_cosine() -> None:
    a = lora({"x": (torch.ones(2, 1), torch.ones(1, 3)), "y": (torch.ones(2, 1), torch.ones(1, 2))}, 1, 1.0)
    b = lora({"x": (torch.ones(3, 1), torch.ones(1, 2)), "y": (torch.ones(2, 1), torch.ones(1, 2))}, 1, 1.0)
    found = compare(a, b)
    assert [one.cosine for one in found.modules] == [None, pytest.approx(1.0)]
    assert found.modules[0].norm_a == pytest.approx(6**0.5)
    assert found.whole[0].cosine is None
    spec = PrefixSpec(2, 2, 1, 1)
    prefixes = [replace(spec, num_virtual_tokens=n) for n in (2, 3)]
    a, b = (Adapter(s, {"prompt_embeddings": torch.ones(s.shape)}) for s in prefixes)
    assert compare(a, b).whole[0].cosine is None


def test_an_adapter_that_does_nothing_has_no_direction() -> None:
    a = lora({"x": (torch.zeros(2, 1), torch.ones(1, 3))}, 1, 1.0)
    b = lora({"x": (torch.ones(2, 1), torch.ones(1, 3))}, 1, 1.0)
    found = compare(a, b).modules[0]
    assert (found.norm_a, found.cosine) == (0.0, None)


def test_tiny_and_huge_values_keep_their_direction() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(4, 2), torch.randn(2, 4)
    for size in (1e-35, 1e35):
        found = compare(lora({"x": (up * size, down * size)}, 2, 2.0), lora({"x": (up, down)}, 2, 2.0)).modules[0]
        assert found.cosine == pytest.approx(1.0, abs=1e-6)
    huge = lora({"x": (up.double() * 1e300, down)}, 2, 2.0)
    with pytest.raises(AdapterMismatch, match="too large"):
        compare(huge, huge)


def test_different_kinds_are_not_compared() -> None:
    factors = {"x": (torch.ones(2, 1), torch.ones(1, 3))}
    prefix = Adapter(PrefixSpec(1, 2, 1, 1), {"prompt_embeddings": torch.ones(1, 4)}, name="p")
    for other in (lora(factors, 1, 1.0, use_dora=True), prefix):
        with pytest.raises(Unsupported, match="mine is lora"):
            compare(lora(factors, 1, 1.0), other)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    good = lora({"x": (torch.ones(2, 1), torch.ones(1, 3))}, 1, 1.0)
    lonely = replace(good, tensors={k: t for k, t in good.tensors.items() if "lora_A" in k})
    for wrong in (lonely, lora({"x": (torch.ones(2, 2), torch.ones(1, 3))}, 1, 1.0)):
        with pytest.raises(AdapterMismatch, match="x has no A and B"):
            compare(good, wrong)
    spec = PrefixSpec(1, 2, 1, 1)
    for tensors in ({}, {"prompt_embeddings": torch.ones(1, 5)}):
        with pytest.raises(AdapterMismatch, match="prompt_embeddings"):
            compare(Adapter(spec, tensors), Adapter(spec, tensors))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1"),
        ("model.layers.2.mlp.experts.7.w1", "model.layers.2"),
        ("layers.0", "layers.0"),
        ("lm_head", "lm_head"),
        ("layer4x.conv1", "layer4x.conv1"),
    ],
)
def test_layers_of_modules(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_layers_come_in_their_order_and_all_of_it_is_json() -> None:
    one = (torch.ones(2, 1), torch.ones(1, 3))
    factors = {f"h.{i}.x": one for i in (10, 9, 0)} | {"lm_head": one}
    found: Comparison = compare(lora(factors, 1, 1.0), lora({**factors, "h.2.x": one}, 1, 1.0))
    assert [layer.name for layer in found.layers] == ["h.0", "h.2", "h.9", "h.10", "lm_head"]
    assert [one.name for one in found.only_in("b")] == ["h.2.x"]
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["kind"] == "lora"
    assert told["modules"][1] == {"name": "h.2.x", "part": "delta", "norm_a": None, "norm_b": 6**0.5, "cosine": None}


def test_no_matrix_of_the_size_of_a_weight_is_formed() -> None:
    """2^20 x 2^20 would be eight terabytes."""
    side = 1 << 20
    a = lora({"x": (torch.ones(side, 2), torch.ones(2, side))}, 2, 2.0)
    assert compare(a, a).whole[0].norm_a == pytest.approx(2.0 * side)
