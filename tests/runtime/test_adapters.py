"""Residence: swapping, slots, leases, names, defaults, and failures that change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.errors import AdapterHubError, AdapterMismatch, BaseMismatch, CapacityError, NotFound
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.slots import Slots
from adapterhub_lite.store import Store, vetting
from tests import peers
from tests.runtime import build

ROW = [[5, 6, 7, 8]]


@pytest.fixture
def base(tiny_base):
    made = tiny_base("llama", seed=3)
    before = made.live_digest()
    yield made
    assert made.live_digest() == before
    assert not any(m._forward_hooks for m in made.model.modules()), "a hook was left"
    peers.assert_logits_equal(
        [made.model(input_ids=torch.tensor(ROW)).logits[0]],
        peers.logits(peers.plain(made.source.folder, "CAUSAL_LM"), ROW, [[]]),
    )


@pytest.fixture
def runtime(base):
    made = Runtime(base, Store(), slots=3)
    yield made
    made.close()


def add(runtime: Runtime, name: str, seed: int, **changes):
    return build.stored(runtime.store, runtime.base, name, build.lora(runtime.base, seed, **changes))


def logits(runtime: Runtime, ref) -> torch.Tensor:
    return runtime.logits(ROW, ref)[0]


def test_swapping_there_and_back_is_exact(runtime):
    a, b, p = add(runtime, "a", 1), add(runtime, "b", 2, dora=True), None
    p = build.stored(runtime.store, runtime.base, "p", build.prefix(runtime.base, 3))
    first = {r: logits(runtime, r) for r in (None, a, b, p)}
    for ref in (a, b, a, None, p, b, None, a, p):
        assert torch.equal(logits(runtime, ref), first[ref])
    for ref in (a, b, p):
        assert not torch.allclose(first[ref], first[None], atol=1e-3)


def test_a_swap_changes_no_module(runtime):
    refs = [add(runtime, n, s) for n, s in (("a", 1), ("b", 2))]
    logits(runtime, refs[0])
    before = {n: id(m) for n, m in runtime.base.model.named_modules()}
    hooks = sum(len(m._forward_hooks) for m in runtime.base.model.modules())
    for ref in refs * 3:
        logits(runtime, ref)
    assert {n: id(m) for n, m in runtime.base.model.named_modules()} == before
    assert sum(len(m._forward_hooks) for m in runtime.base.model.modules()) == hooks


@pytest.mark.parametrize(
    "names",
    [("a", "lora"), ("foo", "foobar"), ("s1", "s10"), ("default", "base_model"), ("x.y", "x"), ("lora_a", "weight")],
)
def test_names_that_contain_each_other_do_not_cross(runtime, names: tuple[str, str]):
    """PEFT matches names by substring: there, loading foo zeroes foobar."""
    refs = [add(runtime, n, s) for s, n in enumerate(names, 1)]
    alone = []
    for ref in refs:
        fresh = Runtime(runtime.base, runtime.store)
        alone.append(logits(fresh, ref))
        fresh.close()
    for _ in range(2):
        for ref, expected in zip([*refs, *names], [*alone, *alone], strict=True):
            assert torch.equal(logits(runtime, ref), expected)
        runtime.unload(refs[0])
        assert torch.equal(logits(runtime, refs[1]), alone[1])
        mixed = runtime.logits(ROW * 2, refs)
        peers.assert_logits_equal(mixed, alone)


def test_a_new_version_and_a_moved_alias_are_seen_at_once(runtime):
    one = add(runtime, "mine", 1)
    runtime.store.alias("mine", "prod", 1)
    old = logits(runtime, "mine")
    two = add(runtime, "mine", 2)
    new = logits(runtime, "mine")
    assert not torch.allclose(old, new)
    assert torch.equal(logits(runtime, "mine@1"), old)
    assert torch.equal(logits(runtime, "mine:prod"), old)
    runtime.store.alias("mine", "prod", 2)
    assert torch.equal(logits(runtime, "mine:prod"), new)
    assert torch.equal(logits(runtime, one), old)
    assert torch.equal(logits(runtime, two), new)


def test_the_default_is_the_version_it_was(runtime):
    add(runtime, "mine", 1)
    runtime.use("mine")
    old = runtime.generate("abc", max_new_tokens=6)
    add(runtime, "mine", 2)
    assert runtime.generate("abc", max_new_tokens=6) == old
    assert runtime.default == "mine@1"


def test_using_gives_back_what_was_used(runtime):
    add(runtime, "a", 1)
    add(runtime, "b", 2)
    by_name = {n: logits(runtime, n) for n in (None, "a", "b")}
    runtime.use("a")
    with runtime.using("b") as same:
        assert same is runtime
        assert torch.equal(runtime.logits(ROW)[0], by_name["b"])
        with runtime.using(None):
            assert torch.equal(runtime.logits(ROW)[0], by_name[None])
        assert torch.equal(runtime.logits(ROW)[0], by_name["b"])
    with pytest.raises(ZeroDivisionError), runtime.using("b"):
        raise ZeroDivisionError
    with pytest.raises(NotFound), runtime.using("missing"):
        pass
    assert torch.equal(runtime.logits(ROW)[0], by_name["a"])
    assert torch.equal(runtime.logits(ROW, None)[0], by_name[None])


def test_the_least_recently_used_goes_out(runtime):
    refs = [add(runtime, n, s) for s, n in enumerate("abcd")]
    for ref in refs[:3]:
        runtime.load(ref)
    runtime.load(refs[0])
    runtime.load(refs[3])
    assert runtime.resident() == ["c@1", "a@1", "d@1"]
    runtime.unload("a")
    assert runtime.resident() == ["c@1", "d@1"]
    with pytest.raises(NotFound, match="not resident"):
        runtime.unload("a")


def test_a_batch_larger_than_the_slots_is_refused_by_logits_and_changes_nothing(runtime):
    refs = [add(runtime, n, s) for s, n in enumerate("abcd")]
    expected = logits(runtime, refs[0])
    with pytest.raises(CapacityError, match="3 slots"):
        runtime.logits(ROW * 4, refs)
    assert torch.equal(logits(runtime, refs[0]), expected)
    assert not runtime._engine.slots._leases


def test_what_a_batch_leases_stays(runtime):
    refs = [add(runtime, n, s) for s, n in enumerate("abc")]
    stream = runtime.stream("abc", refs[0], raw=True, max_new_tokens=300)
    expected = runtime.generate("abc", refs[0], max_new_tokens=300)[0]
    text = next(stream)
    with runtime.base.lock:  # the stream stands still
        with pytest.raises(CapacityError, match="running batch"):
            runtime.unload(refs[0])
        others = [add(runtime, f"o{s}", 10 + s) for s in range(4)]
        for ref in others:
            runtime.load(ref)
        assert "a@1" in runtime.resident()
    assert text + "".join(stream) == expected
    runtime.unload(refs[0])


def test_slots_alone():
    class One:
        def __init__(self, digest: str) -> None:
            self.digest = self.name = digest
            self.nbytes = 1

    slots = Slots(2)
    with slots.lease({"a", "b"}):
        assert slots.put(One("a")) == []
        assert slots.put(One("b")) == []
        with pytest.raises(CapacityError):
            slots.put(One("c"))
        assert slots.put(One("b")) == []
        with slots.lease({"a"}):
            pass
        with pytest.raises(CapacityError):
            slots.drop("a")
    assert slots.put(One("c")) == ["a"]
    assert slots.drop("b")
    assert not slots.drop("b")
    with pytest.raises(CapacityError):
        Slots(0)


def _nan(adapter):
    next(iter(adapter.tensors.values()))[0, 0] = float("nan")


def _misshapen(adapter):
    name = next(iter(adapter.tensors))
    adapter.tensors[name] = adapter.tensors[name][:, :-1].contiguous()


def _missing(adapter):
    adapter.tensors.pop(next(iter(adapter.tensors)))


def _unexpected(adapter):
    adapter.tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)


def _integer(adapter):
    name = next(iter(adapter.tensors))
    adapter.tensors[name] = adapter.tensors[name].to(torch.int8)


def stored_unseen(runtime: Runtime, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> Ref:
    """A whole version with the adapter's weights, of a store that looked at others: `put` would refuse most of them."""
    good, vet = dict(build.lora(runtime.base, 2).files()), vetting.vet
    with monkeypatch.context() as patch:
        seen = vet(good["adapter_config.json"], good["adapter_model.safetensors"])
        patch.setattr(vetting, "vet", lambda config, weights: replace(seen, weights=weights))
        return build.stored(runtime.store, runtime.base, "bad", adapter)


@pytest.mark.parametrize("spoil", [_nan, _misshapen, _missing, _unexpected, _integer])
@pytest.mark.parametrize("way", ["store", "attach"])
def test_a_bad_adapter_changes_nothing(runtime, spoil, way: str, monkeypatch: pytest.MonkeyPatch):
    good = add(runtime, "good", 1)
    expected = logits(runtime, good)
    runtime.use(good)
    adapter = build.lora(runtime.base, 2)
    spoil(adapter)

    stored = stored_unseen(runtime, adapter, monkeypatch) if way == "store" else None
    with pytest.raises(AdapterMismatch):
        runtime.attach(adapter) if stored is None else runtime.load(stored)
    assert runtime.resident() == ["good@1"]
    assert runtime.default == "good@1"
    assert torch.equal(logits(runtime, good), expected)
    assert {finding.where for finding in runtime.store.verify()} <= {"bad@1"}


def test_an_adapter_of_another_base_changes_nothing(runtime, tiny_base):
    other = tiny_base("llama", num_hidden_layers=1)
    ref = build.stored(runtime.store, other, "other", build.lora(other, 1))
    with pytest.raises(BaseMismatch):
        runtime.load(ref)
    with pytest.raises(BaseMismatch):
        runtime.generate(["a", "b"], [None, ref])
    assert runtime.resident() == []
    assert torch.isfinite(logits(runtime, None)).all()


def test_a_damaged_file_is_not_served(runtime):
    ref = add(runtime, "mine", 1)
    path = runtime.store.folder(ref) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(AdapterHubError):
        runtime.load(ref)
    assert runtime.resident() == []


def test_an_attached_adapter_that_went_out_says_so(base):
    runtime = Runtime(base, Store(), slots=1)
    first = runtime.attach(build.lora(base, 1))
    runtime.attach(build.lora(base, 2))
    for ask in (lambda: runtime.logits(ROW, first), lambda: runtime.answer(["x"], first)):
        with pytest.raises(NotFound, match="left its slot"):
            ask()
    runtime.close()


def test_two_runtimes_on_one_base(base):
    first, second = Runtime(base, Store()), Runtime(base, Store())
    a, b = first.attach(build.lora(base, 1)), second.attach(build.lora(base, 2))
    found = [logits(first, a), logits(second, b), logits(first, None)]
    second.close()
    assert torch.equal(logits(first, a), found[0])
    assert not torch.allclose(found[0], found[1])
    first.close()


def test_a_runtime_that_is_dropped_takes_its_hooks_along(base):
    runtime = Runtime(base, Store())
    runtime.attach(build.lora(base, 1))
    assert any(m._forward_hooks for m in base.model.modules())
    del runtime
