"""Copies of a module tree for PEFT's layers, and how a file is checked against a base before PEFT sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.adapters.fit import fit
from adapterhub_lite.adapters.injected import Tree, check_places, fit_injected
from adapterhub_lite.errors import AdapterMismatch
from adapterhub_lite.formats.specs import InjectedSpec
from adapterhub_lite.runtime.admit import target_of
from tests import injected, peers


class Pair(nn.Module):
    """Two layers, one of them in a module of its own and named twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.inner = nn.Sequential(self.first, nn.Tanh())
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 3] -> [..., 3]."""
        return self.scale * self.inner(x) + self.first(x)


def test_a_copy_shares_layers_and_weights_and_nothing_else():
    live, x = Pair(), torch.randn(2, 3)
    tree = Tree()
    made: Any = tree.of(live)
    assert made is tree.of(live) is not live
    assert made.inner is tree.of(live.inner) is not live.inner
    assert made.first is made.inner[0] is live.first
    assert made.scale is live.scale
    assert torch.equal(made(x), live(x))
    made.first = nn.Identity()
    made.extra = nn.Identity()
    made.register_buffer("more", torch.ones(1))
    made.register_forward_hook(lambda *given: torch.zeros(1))
    assert isinstance(live.first, nn.Linear)
    assert not hasattr(live, "extra")
    assert list(live.state_dict()) == ["scale", "first.weight", "first.bias", "inner.0.weight", "inner.0.bias"]
    assert live(x).shape == (2, 3)


def test_two_trees_do_not_meet():
    live = Pair()
    one, two = Tree(), Tree()
    one.of(live).first = nn.Identity()
    assert two.of(live).first is live.first


def test_a_later_view_of_the_same_modules_has_the_layers_too():
    live = Pair()
    tree = Tree()
    tree.of(live.inner)[0] = nn.Identity()  # type: ignore[index]
    made: Any = tree.of(live)
    assert isinstance(made.inner[0], nn.Identity)
    assert made.first is live.first


def test_a_view_that_has_a_layer_elsewhere_has_it_as_it_is_now():
    """As the classes of tokens and of texts, which hold the layers of one base in modules of their own."""
    live, other = Pair(), nn.Sequential(nn.Tanh())
    other.append(live.first)
    tree = Tree()
    changed = nn.Identity()
    tree.of(live).first = changed
    tree.keep(live)
    assert tree.of(other)[1] is changed  # type: ignore[index]
    assert tree.of(other)[0] is other[0]  # type: ignore[index]
    assert other[1] is live.first


@pytest.fixture
def made(tiny_base: Any, tmp_path: Path) -> tuple[Any, Adapter]:
    """A base and a VeRA adapter of it."""
    base = tiny_base("llama")
    injected.save(tmp_path, base.source.folder, injected.settings("llama", "VERA", "CAUSAL_LM"))
    return base, read_adapter(tmp_path)


def test_the_layers_hold_the_tensors_of_the_file(made: tuple[Any, Adapter]):
    base, adapter = made
    assert isinstance(adapter.spec, InjectedSpec)
    modules = base.view().modules
    found, others = fit_injected(adapter.spec, adapter.tensors, modules, "x")
    assert others == {}
    layer: Any = found.model(base.model).get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, peft.tuners.vera.layer.VeraLayer)
    assert layer.base_layer is modules["model.layers.1.mlp.down_proj"]
    stem = "base_model.model.model.layers.1.mlp.down_proj."
    assert torch.equal(layer.vera_lambda_b["default"], adapter.tensors[stem + "vera_lambda_b"])
    assert torch.equal(layer.vera_A["default"], adapter.tensors["base_model.vera_A"])
    assert {id(one) for one in found.tensors}.isdisjoint({id(one) for one in base.model.parameters()})
    assert len(found.tensors) == len(adapter.tensors)
    assert found.nbytes == sum(tensor.nbytes for tensor in adapter.tensors.values())
    assert not any(one.requires_grad for one in found.tensors)
    assert not any(module.training for module in found.model(base.model).modules())
    assert found.bare().model(base.model).get_submodule("model.layers.1.mlp.down_proj") is layer.base_layer


def test_what_is_fitted_knows_its_size_and_its_values(made: tuple[Any, Adapter]):
    base, adapter = made
    fitted = fit(adapter, target_of(base, "CAUSAL_LM"))
    assert fitted.injected is not None
    assert fitted.nbytes == fitted.injected.nbytes > 0
    assert fitted.finite
    moved = fitted.to(base.device, base.dtype)
    assert moved.injected is fitted.injected
    fitted.injected.tensors[0].view(-1)[0] = float("inf")
    assert not fitted.finite


def test_targets_are_taken_from_the_tensors_where_only_they_tell(made: tuple[Any, Adapter]):
    base, adapter = made
    assert isinstance(adapter.spec, InjectedSpec)
    bare = InjectedSpec("VERA", adapter.spec.options, task_type="CAUSAL_LM")
    found, _ = fit_injected(bare, adapter.tensors, base.view().modules, "x")
    model: Any = found.model(base.model)
    ids = torch.tensor([peers.ROWS[0]])
    expected, _ = fit_injected(adapter.spec, adapter.tensors, base.view().modules, "x")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected.model(base.model)(ids).logits)


@pytest.mark.parametrize(
    ("method", "targets", "words"),
    [
        ("VERA", ("mlp",), "LlamaMLP, which VERA does not change"),
        ("VERA", ("embed_tokens",), "Embedding, which VERA does not change"),
        ("VERA", ("input_layernorm",), "LlamaRMSNorm, which VERA does not change"),
        ("VERA", ("k_proj",), "layers.9.mlp.up_proj does not exist here"),
        ("LN_TUNING", ("layers",), "names none of this base's"),
        ("LN_TUNING", ("model",), "LlamaModel, which LN_TUNING does not change"),
        ("LN_TUNING", ("q_proj",), "Linear, which LN_TUNING does not change"),
        ("TRAINABLE_TOKENS", ("lm_head",), "Linear, which TRAINABLE_TOKENS does not change"),
        ("TRAINABLE_TOKENS", ("embed_tokens",), "embed_tokens has 260 tokens"),
    ],
)
def test_only_layers_of_the_right_kind_are_changed(tiny_base: Any, method: str, targets: tuple[str, ...], words: str):
    spec = InjectedSpec(method, {"token_indices": [5, 260]}, targets)
    tensors = (
        {"base_model.model.model.layers.9.mlp.up_proj.vera_lambda_b": torch.ones(64)} if "k_proj" in targets else {}
    )
    modules = tiny_base("llama").view().modules
    if targets == ("layers",):
        modules = {name: module for name, module in modules.items() if not name.endswith("layers")}
    with pytest.raises(AdapterMismatch, match=words):
        check_places(spec, tensors, modules)


def test_the_head_of_a_classifier_is_no_layer(tiny_base: Any):
    """Its slot stands in the tree, for the heads of all adapters."""
    modules = tiny_base("bert").view("SEQ_CLS").modules
    for method in ("VERA", "LN_TUNING"):
        with pytest.raises(AdapterMismatch, match="HeadSlot"):
            check_places(InjectedSpec(method, {}, ("classifier",)), {}, modules)


@pytest.mark.parametrize(
    ("method", "options", "tensor", "shape", "words"),
    [
        ("PEANUT", {"r": 2048, "depth": 4}, "peanut_A.weight", (4, 4), "r is 2048, and no tensor has this size"),
        ("PEANUT", {"r": 4, "depth": 64}, "peanut_A.weight", (4, 4), "depth is 64, and the file holds 1 tensors"),
        ("HIRA", {"r": 8192}, "hira_A", (4, 4), "r is 8192"),
        ("VBLORA", {"num_vectors": 9000, "vector_length": 32, "r": 4}, "vblora_logits_A", (0, 9000, 32), "num_vectors"),
        ("OSF", {"effective_rank": 8}, "osf_U_low", (4, 4), "no tensor for model.layers.0.self_attn.v_proj"),
    ],
)
def test_what_a_small_file_claims_is_not_built(
    tiny_base: Any, monkeypatch: pytest.MonkeyPatch, method: str, options: Any, tensor: str, shape: Any, words: str
):
    monkeypatch.setattr("adapterhub_lite.adapters.injected._wrap", None)
    spec = InjectedSpec(method, options, ("q_proj", "v_proj"))
    tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.{tensor}": torch.ones(shape)}
    with pytest.raises(AdapterMismatch, match=words):
        fit_injected(spec, tensors, tiny_base("llama").view().modules, "small")
