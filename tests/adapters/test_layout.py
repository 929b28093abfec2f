"""Adapters that are fitted as one of their shape was: the same to the last bit, and refused for the same reasons."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter, stored_adapter
from adapterhub_lite.adapters.fit import Fitted
from adapterhub_lite.adapters.layout import Layouts
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.errors import AdapterHubError, AdapterMismatch, NoEffect, StoreCorrupt
from adapterhub_lite.kernels.library import library
from adapterhub_lite.names import Ref
from adapterhub_lite.runtime.admit import admit, fit_to_base
from adapterhub_lite.runtime.changes import _made, _table
from adapterhub_lite.runtime.decoder import decoder_of
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store, vetting
from tests.runtime import build
from tests.runtime.test_decoder import checkpoint

pytestmark = pytest.mark.skipif(library().functions is None, reason=f"no native products: {library().reason}")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tiny_base) -> Base:
    return forgetful(tiny_base("llama", seed=3))


def forgetful(base: Base) -> Base:
    """The base, which other tests share, without what was fitted to it."""
    base.derived.pop("layouts", None)
    return base


@pytest.fixture
def store() -> Store:
    return Store()


def put(store: Store, base: Base, seed: int, **changes: Any) -> Ref:
    return build.stored(store, base, f"a{seed}", build.lora(base, seed, **changes))


def without(adapter: Adapter, *parts: str) -> Adapter:
    """The adapter without the modules whose names hold one of these."""
    left = {key: tensor for key, tensor in adapter.tensors.items() if not any(part in key for part in parts)}
    modules = tuple(m for m in adapter.spec.target_modules if not any(part in m for part in parts))
    return replace(adapter, spec=replace(adapter.spec, target_modules=modules), tensors=left)


def unseen(store: Store, base: Base, name: str, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> Ref:
    """A version of these weights in a store that looked at others: `put` would refuse them."""
    good, vet = build.lora(base, 90).files(), vetting.vet
    with monkeypatch.context() as patch:
        seen = vet(good["adapter_config.json"], good[WEIGHTS])
        patch.setattr(vetting, "vet", lambda config, weights: replace(seen, weights=weights, config=config))
        return build.stored(store, base, name, adapter)


def layouts(base: Base) -> Layouts:
    return base.derived["layouts"]  # type: ignore[no-any-return]


def from_the_beginning(store: Store, ref: Ref, base: Base) -> Fitted:
    return fit_to_base(stored_adapter(store.read(ref)), base)


def assert_same(one: Fitted, other: Fitted) -> None:
    assert (one.name, one.digest, one.task_type, one.tensors) == (
        other.name,
        other.digest,
        other.task_type,
        other.tensors,
    )
    assert one.nbytes == other.nbytes == sum(site.nbytes for site in one.sites.values())
    assert list(one.packs) == list(other.packs)
    assert set(one.sites) == set(other.sites)
    for group, pack in one.packs.items():
        assert pack.ranks == other.packs[group].ranks
        for mine, theirs in zip(pack.tensors, other.packs[group].tensors, strict=True):
            assert mine.stride() == theirs.stride()
            assert torch.equal(mine, theirs)
    for module, site in one.sites.items():
        assert torch.equal(site.down, other.sites[module].down)
        assert torch.equal(site.up, other.sites[module].up)
    assert one.finite


def q_alone(adapter: Adapter) -> Adapter:
    return without(adapter, "k_proj", "v_proj", "mlp")


KINDS: dict[str, Any] = {
    "plain": {},
    "of one rank": {"rank": 1},
    "rsLoRA": {"use_rslora": True},
    "some alphas": {"alpha_pattern": {"q_proj": 3.0, "layers.0.mlp.up_proj": 0.5}},
}


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_of_a_shape_is_fitted_to_the_last_bit(base, store, kind: str, some: bool) -> None:
    made = [build.lora(base, seed, **KINDS[kind]) for seed in (1, 2, 3)]
    refs = [build.stored(store, base, f"a{i}", q_alone(one) if some else one) for i, one in enumerate(made)]
    found = [admit(store, ref, base).fitted for ref in refs]
    assert len(layouts(base)) == 1
    assert found[0].laid is None
    for ref, one in zip(refs[1:], found[1:], strict=True):
        assert one.laid is not None, "it was fitted from the beginning"
        assert_same(one, from_the_beginning(store, ref, base))


def test_each_configuration_and_each_header_has_a_layout_of_its_own(base, store) -> None:
    """The same file under another alpha, and another file under the same configuration, are other adapters."""
    one = build.lora(base, 1)
    doubled = replace(one, spec=replace(one.spec, alpha=4 * one.spec.alpha))
    fewer = without(one, "mlp")
    refs = [build.stored(store, base, f"b{i}", made) for i, made in enumerate((one, doubled, fewer) * 2)]
    found = [admit(store, ref, base).fitted for ref in refs]
    assert len(layouts(base)) == 3
    assert [fitted.laid is None for fitted in found] == [True] * 3 + [False] * 3
    for ref, fitted in zip(refs, found, strict=True):
        assert_same(fitted, from_the_beginning(store, ref, base))
    up, strong = (next(iter(fitted.sites.values())).up for fitted in found[3:5])
    assert torch.equal(strong, 4 * up)


def test_what_is_not_all_matrices_as_they_are_has_no_layout(base, store) -> None:
    narrow = build.lora(base, 4)
    narrow = replace(narrow, tensors={key: tensor.bfloat16() for key, tensor in narrow.tensors.items()})
    made = {"dora": build.lora(base, 1, dora=True), "ia3": build.ia3(base, 2), "prefix": build.prefix(base, 3)}
    for name, adapter in {**made, "narrow": narrow}.items():
        for again in range(2):
            ref = build.stored(store, base, f"{name}{again}", adapter)
            fitted = admit(store, ref, base).fitted
            assert fitted.laid is None
        assert len(layouts(base)) == 0, name


def test_a_head_is_no_matrix(tiny_base, store) -> None:
    base = forgetful(tiny_base("bert", seed=3))
    found = [admit(store, build.stored(store, base, f"h{i}", build.lora(base, i)), base).fitted for i in (1, 2)]
    assert len(layouts(base)) == 0
    assert all(fitted.head is not None for fitted in found)


def test_few_layouts_are_kept(base, store) -> None:
    for rank in range(1, 12):
        admit(store, put(store, base, rank, rank=rank), base)
    assert len(layouts(base)) == 8
    first, last = (admit(store, put(store, base, 20 + rank, rank=rank), base).fitted for rank in (1, 11))
    assert first.laid is None
    assert last.laid is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_found_wherever_it_is(base, store, value: float, monkeypatch) -> None:
    admit(store, put(store, base, 1), base)
    keys = sorted(build.lora(base, 2).tensors)
    for i, key in enumerate([keys[0], keys[-1], keys[len(keys) // 2]]):
        adapter = build.lora(base, 2)
        adapter.tensors[key][-1, -1] = value
        ref = unseen(store, base, f"odd{i}", adapter, monkeypatch)
        with pytest.raises(AdapterMismatch, match=f"{re.escape(key)} holds NaN or infinity"):
            admit(store, ref, base)
    assert len(layouts(base)) == 1


def test_a_scale_that_makes_infinity_is_found(base, store) -> None:
    def large(seed: int, size: float) -> Ref:
        adapter = build.lora(base, seed)
        adapter.tensors[max(adapter.tensors)][-1, -1] = size
        return build.stored(store, base, f"large{seed}", adapter)

    assert admit(store, large(1, 1e38), base).fitted.finite
    with pytest.raises(AdapterMismatch, match="makes infinity"):
        admit(store, large(2, 3e38), base)


def test_one_that_does_nothing_is_refused(base, store, monkeypatch) -> None:
    admit(store, put(store, base, 1), base)
    adapter = build.lora(base, 2)
    for key, tensor in adapter.tensors.items():
        if "lora_B" in key:
            tensor.zero_()
    with pytest.raises(NoEffect):
        admit(store, unseen(store, base, "idle", adapter, monkeypatch), base)


def test_damage_is_what_is_said_whatever_was_fitted(base, store) -> None:
    admit(store, put(store, base, 1), base)
    ref = put(store, base, 2)
    path = store.folder(ref) / WEIGHTS
    whole = path.read_bytes()
    for damaged in (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], whole[:-4], whole + b"\0" * 4):
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(StoreCorrupt):
            admit(store, ref, base)
    path.unlink()
    path.write_bytes(whole)
    assert_same(admit(store, ref, base).fitted, from_the_beginning(store, ref, base))


def test_a_failed_load_changes_nothing(base, store, monkeypatch) -> None:
    runtime = Runtime(base, store, slots=2)
    good = put(store, base, 1)
    expected = runtime.logits([[5, 6, 7]], good)[0]
    adapter = build.lora(base, 2)
    adapter.tensors[min(adapter.tensors)][0, 0] = float("nan")
    with pytest.raises(AdapterHubError):
        runtime.load(unseen(store, base, "bad", adapter, monkeypatch))
    assert runtime.resident() == ["a1@1"]
    assert torch.equal(runtime.logits([[5, 6, 7]], good)[0], expected)
    runtime.close()


def test_threads_that_fit_at_once_do_not_cross(base, store) -> None:
    refs = [put(store, base, seed) for seed in range(12)]
    admit(store, refs[0], base)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ref: admit(store, ref, base).fitted, refs * 3))
    for ref, fitted in zip(refs * 3, found, strict=True):
        assert fitted.laid is not None
        assert_same(fitted, from_the_beginning(store, ref, base))


def test_the_addresses_of_one_laid_out_alike_are_its_own(base, store) -> None:
    """Also of layers that it leaves alone, and where another of the layout was the first to be asked for."""
    decoder = decoder_of(base)
    assert decoder is not None
    sites = [site.modules for site in decoder.sites]
    refs = [build.stored(store, base, f"a{i}", without(build.lora(base, i), "v_proj")) for i in range(4)]
    found = [admit(store, ref, base).fitted for ref in refs]
    assert [fitted.laid is not None for fitted in found] == [False, True, True, True]
    for fitted in found:
        moved, made = _table(fitted, sites), _made(fitted, sites)
        assert torch.equal(moved.numbers, made.numbers)
        assert (moved.width, moved.scales) == (made.width, made.scales)
        assert _table(fitted, sites) is moved


def test_what_is_replaced_has_lost_its_layout(base, store) -> None:
    fitted = [admit(store, put(store, base, seed), base).fitted for seed in (1, 2)][1]
    assert fitted.laid is not None
    assert replace(fitted, packs={}).laid is None


def test_its_rows_are_those_of_one_fitted_from_the_beginning(store, tmp_path) -> None:
    base = load_base(str(checkpoint(tmp_path, "llama")), device="cpu")
    decoder = decoder_of(base)
    assert decoder is not None
    assert decoder.native is not None
    refs, rows = [put(store, base, seed) for seed in (1, 2, 3)], [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    runtime = Runtime(base, store)
    by_layout = runtime.logits(rows, refs)
    texts = runtime.generate_ids(rows, refs, 6)
    assert runtime.fitted(refs[2]).laid is not None
    runtime.close()
    apart = Runtime(base, store)
    for ref in refs:
        base.derived.pop("layouts")
        assert apart.fitted(ref).laid is None
    for one, other in zip(by_layout, apart.logits(rows, refs), strict=True):
        assert torch.equal(one, other)
    assert apart.generate_ids(rows, refs, 6) == texts
    apart.close()
