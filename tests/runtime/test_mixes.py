"""Weighted mixes: the base with the weighted sum of what each adapter changes, in float64, is what they must give."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quantization import dense_weight
from adapterhub_lite.errors import AdapterMismatch, CapacityError, InvalidName, NotFound, Unsupported
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.mixes import MixRef
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import peers, tiny
from tests.runtime import build

ROW = [[5, 6, 7, 8]]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """family -> a base of which every bias is a number other than 0."""
    made: dict[str, Any] = {}

    def base(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny.model(family)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.data.normal_(0, 0.3)
            model.save_pretrained(folder)
            tiny.tokenizer(tiny.kind_of(family)).save_pretrained(folder)
            made[family] = load_base(str(folder), device="cpu")
        return made[family]

    return base


def with_bias(adapter: Adapter) -> Adapter:
    """The LoRA with a bias of its own at every layer (lora_bias)."""
    generator = torch.Generator().manual_seed(9)
    ups = [(name, tensor) for name, tensor in adapter.tensors.items() if name.endswith("lora_B.weight")]
    biases = {n.replace("weight", "bias"): torch.randn(len(t), generator=generator) * 0.2 for n, t in ups}
    return replace(adapter, spec=replace(adapter.spec, lora_bias=True), tensors={**adapter.tensors, **biases})


def zoo(base) -> dict[str, Adapter]:
    """Adapters of every kind that changes layers; only `headed` brings a head to an encoder."""
    dropped = (lambda a: a) if base.kind != "encoder" else headless
    return {
        "lora": dropped(build.lora(base, 1, 4)),
        "wide": dropped(build.lora(base, 2, 9)),
        "dora": dropped(build.lora(base, 3, 3, dora=True)),
        "bias": dropped(with_bias(build.lora(base, 4, 2))),
        "ia3": dropped(build.ia3(base, 5)),
        "ia3-other": dropped(build.ia3(base, 6)),
        "headed": build.lora(base, 7, 5),
    }


def headless(adapter: Adapter) -> Adapter:
    """The same changes of layers without a head."""
    heads = ("classifier", "score")
    tensors = {n: t for n, t in adapter.tensors.items() if n.split(".")[2] not in heads}
    targets = tuple(t for t in adapter.spec.target_modules if t.split(".")[0] not in heads)
    return replace(adapter, spec=replace(adapter.spec, modules_to_save=(), target_modules=targets), tensors=tensors)


def changed(module: Any, parts: dict[str, torch.Tensor], scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What one adapter alone adds to the weight [out, in] and the bias of a layer, in float64 by the definitions."""
    weight = module.weight.data.double()
    weight = weight.T if type(module).__name__ == "Conv1D" else weight
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if "ia3_l" in parts:
        factors = parts["ia3_l"].double()
        own = module.bias.data.double() if getattr(module, "bias", None) is not None else bias
        return (factors - 1) * weight, (factors.flatten() - 1) * own if factors.shape[1] == 1 else bias
    low_rank = scaling * parts["lora_B.weight"].double() @ parts["lora_A.weight"].double()
    if "lora_magnitude_vector" in parts:
        whole = weight + low_rank
        return parts["lora_magnitude_vector"].double()[:, None] * whole / whole.norm(dim=1, keepdim=True) - weight, bias
    return low_rank, scaling * parts["lora_B.bias"].double() if "lora_B.bias" in parts else bias


def merged(base, members: list[tuple[Adapter, float]], dequantised: bool = False) -> Any:
    """Plain transformers in float64 on weights with the weighted sum of all changes baked in."""
    model = peers.plain(base.source.folder, build.TASK_TYPES[base.kind]).double()
    modules = dict(model.named_modules())
    if dequantised:
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                module.weight.data = dense_weight(base.model.get_submodule(name), torch.float32).double()
    sums: dict[str, list[torch.Tensor]] = {}
    for adapter, weight in members:
        by_module: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in adapter.tensors.items():
            for part in ("ia3_l", "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"):
                if name.endswith(f".{part}"):
                    by_module.setdefault(name[len(build.PREFIX) : -len(part) - 1], {})[part] = tensor
            if name.startswith(f"{build.PREFIX}classifier") and "lora_" not in name and "ia3" not in name:
                model.get_parameter(name[len(build.PREFIX) :]).data = tensor.double()
        for name, parts in by_module.items():
            found = changed(modules[name], parts, getattr(adapter.spec, "alpha", 0) / getattr(adapter.spec, "rank", 1))
            added = sums.setdefault(name, [torch.zeros_like(t) for t in found])
            for total, one in zip(added, found, strict=True):
                total += weight * one
    for name, (delta, bias) in sums.items():
        module: Any = modules[name]
        module.weight.data += delta.T if type(module).__name__ == "Conv1D" else delta
        own = module.bias.data if getattr(module, "bias", None) is not None else 0.0
        module.bias = nn.Parameter(own + bias)
    return model


MIXES: tuple[dict[str, float], ...] = (
    {"lora": 0.7, "wide": 0.3},
    {"lora": 1.5, "wide": -0.5, "dora": 1.0},
    {"dora": 0.25, "bias": 2, "lora": -1},
    {"ia3": 0.6, "ia3-other": 0.4},
    {"ia3": -0.5},
    {"ia3": 0.8, "lora": 0.5, "bias": 1.0},
    {"lora": 1e-3, "wide": 30.0},
)


@pytest.mark.parametrize("weights", MIXES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_mix_is_the_sum_of_weighted_changes(biased, family: str, weights: dict[str, float]):
    base = biased(family)
    adapters, runtime = zoo(base), Runtime(base, Store())
    if family == "bert":
        weights = {"headed": 1.0, **weights}
    refs = {name: runtime.attach(adapters[name]) for name in weights}
    expected = peers.logits(merged(base, [(adapters[name], weight) for name, weight in weights.items()]))
    answers = peers.ANSWERS if family == "t5" else None
    try:
        found = runtime.logits(peers.ROWS, {refs[name]: weight for name, weight in weights.items()}, answers)
        peers.assert_logits_equal(found, [e.float() for e in expected], 3e-5)
        bare = peers.logits(merged(base, [(adapters["headed"], 1.0)] if family == "bert" else []))
        assert not torch.allclose(expected[0], bare[0], atol=1e-3), "the mix itself does nothing"
    finally:
        runtime.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_a_factor_on_an_input_and_one_on_an_output_do_not_add_up(tiny_base):
    base = tiny_base("llama")
    runtime = Runtime(base, Store())
    one, other = runtime.attach(build.ia3(base, 1)), runtime.attach(build.ia3(base, 2, ("up_proj",)))
    dora = runtime.attach(build.lora(base, 3, dora=True))
    for second in (other, dora):
        with pytest.raises(Unsupported, match="do not add up"):
            runtime.logits(ROW, {one: 0.5, second: 0.5})
    dead = build.ia3(base, 4)
    next(t for n, t in dead.tensors.items() if "down_proj" in n)[0, 3] = 0.0
    dead_ref, lora = runtime.attach(dead), runtime.attach(build.lora(base, 5))
    with pytest.raises(Unsupported, match="switches off"):
        runtime.logits(ROW, {dead_ref: 1, lora: 1})
    assert torch.isfinite(runtime.logits(ROW, {dead_ref: 0.5, lora: 1})[0]).all()
    runtime.close()


@pytest.mark.parametrize("kinds", [("lora", "rslora"), ("lora", "patterns", "rslora")])
def test_peft_concatenates_to_the_same(tiny_base, tmp_path, kinds: tuple[str, ...]):
    base = tiny_base("llama")
    weights = [0.7, -0.4, 1.3][: len(kinds)]
    model = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config("llama", kinds[0], "CAUSAL_LM"))
    for i, kind in enumerate(kinds[1:], 1):
        model.add_adapter(f"a{i}", peers.config("llama", kind, "CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    names = ["default", *(f"a{i}" for i in range(1, len(kinds)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, "mixed", combination_type="cat")
    model.set_adapter("mixed")
    runtime = Runtime(base, Store())
    folders = [tmp_path if name == "default" else tmp_path / name for name in names]
    refs = [runtime.attach(read_adapter(folder, name=f"peft{i}")) for i, folder in enumerate(folders)]
    peers.assert_logits_equal(runtime.logits(peers.ROWS, dict(zip(refs, weights, strict=True))), peers.logits(model))
    runtime.close()


@pytest.fixture
def runtime(tiny_base):
    made = Runtime(tiny_base("llama"), Store(), slots=6)
    for seed, name in enumerate(("a", "b", "c"), 1):
        build.stored(made.store, made.base, name, build.lora(made.base, seed, 2 * seed))
    yield made
    made.close()


def logits(runtime: Runtime, chosen) -> torch.Tensor:
    return runtime.logits(ROW, chosen)[0]


def test_weight_one_is_the_adapter_itself_and_weight_zero_drops_it(runtime):
    alone, bare = logits(runtime, "a"), logits(runtime, None)
    for chosen in ({"a": 1}, {"a": 1.0, "b": 0}, {"b": 0.0, "a": Fraction(1)}, {"a": 0.5, "a@1": 0.5}):
        assert torch.equal(logits(runtime, chosen), alone)
    runtime.store.alias("a", "prod", 1)
    assert torch.equal(logits(runtime, {"a:prod": 0.25, "a": 0.75}), alone)
    for chosen in ({"a": 0}, {"a": 1, "a@1": -1}, {"a": 0.0, "b": -0.0}):
        assert torch.equal(logits(runtime, chosen), bare)
    assert runtime.resident() == ["a@1"], "a mix of one adapter of weight 1 takes no slot of its own"


def test_two_names_of_one_version_add_up(runtime):
    runtime.store.alias("a", "prod", 1)
    expected = logits(runtime, {"a": 0.75, "b": 0.5})
    held = runtime.resident()
    assert torch.equal(logits(runtime, {"a": 0.25, "b": 0.5, "a:prod": 0.5}), expected)
    assert runtime.resident() == held


def test_a_mix_is_made_once_whatever_the_order_and_never_stored(runtime, monkeypatch):
    first = logits(runtime, {"a": 0.7, "b": 0.3})
    versions = {name: runtime.store.versions(name) for name in runtime.store.names()}
    monkeypatch.setattr("adapterhub_lite.runtime.engine.mix", None)  # a second one would fail
    assert torch.equal(logits(runtime, {"b": 0.3, "a": 0.7}), first)
    assert runtime.store.names() == ["a", "b", "c"]
    assert {name: runtime.store.versions(name) for name in runtime.store.names()} == versions
    ref = runtime.load({"a": 0.7, "b": 0.3})
    assert isinstance(ref, MixRef)
    assert str(ref) == "0.7*a@1 + 0.3*b@1"
    assert torch.equal(logits(runtime, ref), first)
    with pytest.raises(TypeError):
        logits(runtime, {"a": 0.7, "b": 0.30000000000000004})


def test_a_mix_of_a_mix(runtime):
    half = runtime.load({"a": 0.5, "b": 0.5})
    assert runtime.load({half: 0.5, "c": 1.0, "a": 0.25}) == runtime.load({"a": 0.5, "b": 0.25, "c": 1.0})


def test_members_follow_their_names_at_the_call(runtime):
    old = logits(runtime, {"a": 0.5, "b": 0.5})
    runtime.use({"a": 0.5, "b": 0.5})
    build.stored(runtime.store, runtime.base, "a", build.lora(runtime.base, 9))
    assert torch.equal(runtime.logits(ROW)[0], old)
    assert torch.equal(logits(runtime, {"a@1": 0.5, "b": 0.5}), old)
    assert not torch.allclose(logits(runtime, {"a": 0.5, "b": 0.5}), old)
    assert runtime.default == "0.5*a@1 + 0.5*b@1"
    with runtime.using({"b": 0}):
        assert torch.equal(runtime.logits(ROW)[0], logits(runtime, None))
    assert torch.equal(runtime.logits(ROW)[0], old)


@pytest.mark.parametrize(
    ("chosen", "error", "match"),
    [
        ({}, Unsupported, "no adapters"),
        ({"a": math.nan}, Unsupported, "nan"),
        ({"a": math.inf, "b": 1}, Unsupported, "inf"),
        ({"a": 10**400}, Unsupported, "bounds"),
        ({"a": 1.7e308, "a@1": 1.7e308}, Unsupported, "inf"),
        ({"a": "1"}, Unsupported, "not a number"),
        ({"a": True}, Unsupported, "not a number"),
        ({"a": None}, Unsupported, "not a number"),
        ({"a": 1j}, Unsupported, "not a number"),
        ({"a": torch.tensor(0.5)}, Unsupported, "not a number"),
        ({None: 1.0, "a": 0.5}, Unsupported, "None is no member"),
        ({5: 1.0}, Unsupported, "not an adapter"),
        ({"missing": 0.5, "a": 0.5}, NotFound, "missing"),
        ({"missing": 0, "a": 1}, NotFound, "missing"),
        ({"a@7": 0.5, "a": 0.5}, NotFound, "a@7"),
        ({"../a": 1.0}, InvalidName, "not a valid"),
        ({"a": 3e38, "b": 1.0}, AdapterMismatch, "infinity"),
        ({Ref("ghost", digest="0" * 64): 0.5, "a": 0.5}, NotFound, "ghost"),
    ],
)
def test_what_is_no_mix_is_an_error_and_changes_nothing(runtime, chosen, error, match: str):
    expected, held = logits(runtime, "b"), runtime.resident()
    for give in (
        lambda: runtime.logits(ROW, chosen),
        lambda: runtime.logits(ROW, [chosen]),
        lambda: runtime.use(chosen),
    ):
        with pytest.raises(error, match=match):
            give()
    assert set(held) <= set(runtime.resident()) <= {*held, "a@1"}
    assert runtime.default is None
    assert torch.equal(logits(runtime, "b"), expected)


@pytest.mark.parametrize("call", ["load", "pin", "unload"])
def test_the_bare_base_is_not_loaded(runtime, call: str):
    for chosen in ({"a": 0}, None):
        with pytest.raises(Unsupported, match="bare base"):
            getattr(runtime, call)(chosen)


def test_a_head_comes_along_whole_from_one_member(tiny_base):
    base = tiny_base("bert")
    adapters, store = zoo(base), Store()
    task = {"type": "classify", "text": "text", "label": "label", "labels": ["x", "y", "z"], "max_length": 64}
    for name in ("headed", "lora"):
        build.stored(
            store,
            base,
            name,
            adapters[name],
            task if name == "headed" else {"type": "classify", **task, "labels": ["o", "p"]},
        )
    build.stored(store, base, "second", build.lora(base, 8, labels=2))
    runtime = Runtime(base, store)
    found = runtime.predict(["one text"], {"lora": 4.0, "headed": 1})[0]
    assert set(found.scores) == {"x", "y", "z"}, "the labels are those of the head, not of the heaviest member"
    assert found.scores != runtime.predict(["one text"], "headed")[0].scores
    with pytest.raises(Unsupported, match=r"no share of 0\.9"):
        runtime.predict(["one text"], {"lora": 0.1, "headed": 0.9})
    with pytest.raises(Unsupported, match=r"(second|headed)@1, (second|headed)@1 each bring"):
        runtime.predict(["one text"], {"second": 1, "headed": 1})
    runtime.close()


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_what_stands_before_a_text_comes_along_whole(tiny_base, family: str, kind: str):
    base = tiny_base(family)
    runtime = Runtime(base, Store())
    front = runtime.attach(getattr(build, kind)(base, 1))
    other = runtime.attach(build.prompt(base, 4, 3))
    lora = runtime.attach(build.lora(base, 2))
    answers = [[7, 8]] if family == "t5" else None
    alone, mixed = runtime.logits(ROW, front, answers)[0], runtime.logits(ROW, {front: 1, lora: 0.5}, answers)[0]
    assert not torch.allclose(alone, mixed, atol=1e-3)
    weak = runtime.logits(ROW, {front: 1, lora: 1e-7}, answers)[0]
    torch.testing.assert_close(weak, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(Unsupported, match="virtual tokens"):
        runtime.logits(ROW, {front: 0.5, lora: 0.5}, answers)
    with pytest.raises(Unsupported, match="each bring virtual tokens"):
        runtime.logits(ROW, {front: 1, other: 1}, answers)
    runtime.close()


def test_a_question_is_put_as_the_heaviest_member_learned_it(tiny_base):
    base, store = tiny_base("llama"), Store()
    for seed, name in enumerate(("a", "b"), 1):
        task = {
            "type": "instruct",
            "system": f"You are {name}.",
            "prompt": "text",
            "completion": "label",
            "max_new_tokens": 8,
            "metrics": ["exact_match"],
        }
        build.stored(store, base, name, build.lora(base, seed), task)
    runtime = Runtime(base, store)
    for weights, leads in (({"a": 0.7, "b": 0.3}, "a"), ({"a": 0.3, "b": 0.7}, "b"), ({"b": 0.5, "a": 0.5}, "b")):
        assert runtime.task(weights).config == runtime.task(leads).config
    assert runtime.task("a").config != runtime.task("b").config
    runtime.close()


ROWS = st.lists(st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=9), min_size=2, max_size=6)
CHOICES = (
    None,
    "lora",
    "dora",
    "prefix",
    {"lora": 0.7, "wide": 0.3},
    {"lora": -1.0, "dora": 1.5, "bias": 0.2},
    {"ia3": 0.5, "ia3-other": 0.5},
    {"prefix": 1, "wide": 0.5},
    {"dora": 0.5},
)


@pytest.fixture(scope="module")
def zoos(tiny_base, tmp_path_factory):
    made: dict[str, tuple[Runtime, list[Any]]] = {}

    def runtime(family: str) -> tuple[Runtime, list[Any]]:
        if family not in made:
            base = tiny_base(family)
            one = Runtime(base, Store(tmp_path_factory.mktemp("store")), slots=None)
            refs = {n: one.attach(a) for n, a in {**zoo(base), "prefix": build.prefix(base, 8, 3)}.items()}
            made[family] = one, [_by(refs, choice) for choice in CHOICES]
        return made[family]

    yield runtime
    for one, _ in made.values():
        one.close()


def _by(refs: dict[str, Ref], choice: Any) -> Any:
    if isinstance(choice, dict):
        return {refs[name]: weight for name, weight in choice.items()}
    return refs[choice] if choice else None


@pytest.mark.parametrize("family", tiny.CAUSAL)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(data=st.data())
def test_rows_of_mixes_adapters_and_none_are_their_solo_rows(zoos, family: str, data):
    runtime, choices = zoos(family)
    texts = data.draw(ROWS)
    chosen = [choices[data.draw(st.integers(0, len(choices) - 1))] for _ in texts]
    mixed, written = runtime.logits(texts, chosen), runtime.generate_ids(texts, chosen, 5)
    for i, (text, one) in enumerate(zip(texts, chosen, strict=True)):
        peers.assert_logits_equal([mixed[i]], runtime.logits([text], one))
        assert written[i] == runtime.generate_ids([text], one, 5)[0], (chosen, i)


def test_the_rows_above_differ(zoos):
    runtime, choices = zoos("llama")
    found = [runtime.logits(ROW, one)[0] for one in choices]
    for i, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-3 for other in found[:i]), CHOICES[i]


def test_a_mix_takes_one_slot_and_its_members_only_what_is_free(runtime):
    one = Runtime(runtime.base, runtime.store, slots=1)
    expected = logits(runtime, {"a": 0.5, "b": 0.5})
    assert torch.equal(logits(one, {"a": 0.5, "b": 0.5}), expected)
    assert one.resident() == ["0.5*a@1 + 0.5*b@1"]
    with pytest.raises(CapacityError, match="1 slots"):
        one.logits(ROW * 2, [{"a": 0.5, "b": 0.5}, "a"])
    answers = one.generate_ids(ROW * 3, [{"a": 0.5, "b": 0.5}, "a", {"b": 2}], 4)
    assert answers == runtime.generate_ids(ROW * 3, [{"a": 0.5, "b": 0.5}, "a", {"b": 2}], 4)
    one.close()
    assert set(runtime.resident()) >= {"a@1", "b@1", "0.5*a@1 + 0.5*b@1"}
