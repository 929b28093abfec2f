"""The native forward beside torch's: every kind of change, ragged rows, prompts and steps, every form of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.adapters.sites import features
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.kernels.changes import tiles
from adapterhub_lite.kernels.library import library
from adapterhub_lite.runtime.batch import BatchPlan
from adapterhub_lite.runtime.changes import LaneChanges, NativeChanges
from adapterhub_lite.runtime.decoder import Decoder, decoder_of
from adapterhub_lite.runtime.prefill import prefill, read_all
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.test_decoder import CLASSES, checkpoint

pytestmark = pytest.mark.skipif(library().functions is None, reason=f"no native products: {library().reason}")

Way = type[LaneChanges] | type[NativeChanges]
PROMPTS = [[5, 6, 7, 8, 9], [11], [40, 41, 42, 43, 44, 45, 46, 47, 48], [17, 3], [9, 9, 9], [30, 31], [8], [50, 51]]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """(family, quantize) -> a base with a native forward, loaded once."""
    made: dict[tuple[str, str], Base] = {}

    def base(family: str = "llama", quantize: str = "none") -> Base:
        if (family, quantize) not in made:
            folder = checkpoint(tmp_path_factory.mktemp(family), family)
            made[family, quantize] = load_base(str(folder), quantize, device="cpu")
            model: Any = made[family, quantize].model
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if name.endswith(("proj.bias", "norm.weight")):  # as they begin, they are zeros and ones
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        return made[family, quantize]

    return base


@contextmanager
def plan_of(base: Base, kinds: list[str]) -> Iterator[tuple[Decoder, BatchPlan]]:
    """A plan with one row of each kind."""
    makers: dict[str, Callable[[int], Any]] = {
        "lora": lambda rank: build.lora(base, rank, rank),
        "dora": lambda rank: build.lora(base, 50 + rank, rank, dora=True),
        "ia3": lambda _: build.ia3(base, 3),
        "prefix": lambda count: build.prefix(base, 4, count),
        "head": lambda rank: _of_the_head(base, rank),
    }
    runtime = Runtime(base, Store())
    refs: dict[str, Any] = {}
    for kind in {*kinds} - {"none"}:
        name, _, number = kind.partition(" ")
        refs[kind] = runtime.attach(makers[name](int(number or 0)))
    with runtime._engine.plan([refs.get(kind) for kind in kinds]) as plan:
        decoder = decoder_of(base)
        assert decoder is not None
        assert decoder.native is not None
        yield decoder, plan
    runtime.close()


def _of_the_head(base: Base, rank: int) -> Adapter:
    """A LoRA of the output layer and of one other."""
    generator = torch.Generator().manual_seed(8)
    tensors, names = {}, ("lm_head", "model.layers.1.mlp.up_proj")
    for name in names:
        n_in, n_out = features(base.view().modules[name])
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn((rank, n_in), generator=generator) * 0.2
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn((n_out, rank), generator=generator) * 0.2
    return Adapter(LoraSpec(rank, 2.0 * rank, names, task_type="CAUSAL_LM"), tensors, name="of the head")


@contextmanager
def by_torch(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, changes: type[LaneChanges] | type[NativeChanges]
) -> Any:
    """The forward without native code, its changes applied as said."""
    native, decoder.native = decoder.native, None
    with monkeypatch.context() as patch:
        patch.setattr("adapterhub_lite.runtime.prefill.changes_of", lambda base, plan: changes(plan))
        yield
    decoder.native = native


def run(decoder: Decoder, plan: BatchPlan, changes: Way, rows: list[int] | None = None) -> list[torch.Tensor]:
    """The logits after the prompts and after three more tokens a row; `rows` are the plan's, by default all."""
    numbers = list(range(len(plan.rows))) if rows is None else rows
    with torch.inference_mode():
        logits, window, positions = prefill(decoder, [PROMPTS[number] for number in numbers], plan)
        found = [logits]
        for step in range(3):
            window.extend()
            tokens = torch.tensor(numbers) + 10 * step + 3
            found.append(decoder.step(tokens, positions, window, changes(plan)))
            positions = positions + 1
    return found


MIXED = ["lora 16", "none", "dora 4", "prefix 3", "ia3", "lora 1", "lora 1", "head 40"]
ALIKE = ["lora 33", "lora 33", "lora 33"]


@pytest.mark.parametrize("kinds", [MIXED, ALIKE, ["none", "none"], ["dora 20"], ["ia3", "dora 3", "none"]])
@pytest.mark.parametrize("family", CLASSES)
def test_it_is_the_forward_of_torch(
    base_of: Callable[..., Base], monkeypatch: pytest.MonkeyPatch, family: str, kinds: list[str]
) -> None:
    with plan_of(base_of(family), kinds) as (decoder, plan):
        native = run(decoder, plan, NativeChanges)
        for changes in (LaneChanges, NativeChanges):
            with by_torch(decoder, monkeypatch, changes):
                expected = run(decoder, plan, changes)
            for ours, theirs in zip(native, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_it_reads_quantised_weights(
    base_of: Callable[..., Base], monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    base = base_of("llama", quantize)
    with plan_of(base, MIXED) as (decoder, plan):
        native = run(decoder, plan, NativeChanges)
        with by_torch(decoder, monkeypatch, LaneChanges):
            expected = run(decoder, plan, LaneChanges)
        # Prompts by torch run through bitsandbytes' own products, which round; steps read the same packed weights.
        bound = 2e-2 if quantize == "int8" else 1e-4
        for ours, theirs in zip(native, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * float(theirs.abs().max()))


def test_every_token_of_a_text(base_of: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    with plan_of(base_of(), MIXED) as (decoder, plan):
        with torch.inference_mode():
            native = read_all(decoder, PROMPTS, plan)
            with by_torch(decoder, monkeypatch, LaneChanges):
                expected = read_all(decoder, PROMPTS, plan)
        assert [len(one) for one in native] == [len(prompt) for prompt in PROMPTS]
        for ours, theirs in zip(native, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_more_tokens_than_it_takes_go_by_torch(base_of: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    with plan_of(base_of(), MIXED) as (decoder, plan):
        native: Any = decoder.native
        calls: list[int] = []
        real = native._forward

        def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            calls.append(len(x))
            found: torch.Tensor = real(x, *rest)
            return found

        monkeypatch.setattr(native, "_forward", counted)
        whole = run(decoder, plan, NativeChanges)
        assert calls == [sum(map(len, PROMPTS)), 8, 8, 8]
        for most, expected in ((10, [8, 8, 8]), (7, [])):
            calls.clear()
            monkeypatch.setattr(native, "most_tokens", most)
            for ours, theirs in zip(run(decoder, plan, NativeChanges), whole, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
            assert calls == expected


def test_a_row_does_not_see_what_others_hold(base_of: Callable[..., Base]) -> None:
    """Poison in a neighbour's columns, and in columns that nobody filled, reaches no other row."""
    with plan_of(base_of(), ["lora 16", "none", "prefix 3"]) as (decoder, plan), torch.inference_mode():
        found = []
        for poison in (False, True):
            _, window, positions = prefill(decoder, PROMPTS[:3], plan)
            window.extend()
            if poison:
                window.keys[:, 1] = window.values[:, 1] = float("nan")
                window.keys[:, 0][~window.filled[0][None, None, :].expand(window.keys[:, 0].shape[:3])] = 1e30
            found.append(decoder.step(torch.tensor([3, 4, 5]), positions, window, NativeChanges(plan)))
    assert torch.equal(found[0][[0, 2]], found[1][[0, 2]])
    assert not found[1][1].isfinite().any()


def test_a_row_is_its_solo_run_to_the_last_bit(base_of: Callable[..., Base]) -> None:
    """Whatever rows are beside it; only a prefix that a gap parts from its text may round otherwise."""
    kinds = ["lora 16", "none", "dora 4", "lora 3", "ia3", "lora 1", "lora 1", "head 40"]
    with plan_of(base_of(), kinds) as (decoder, plan):
        together = run(decoder, plan, NativeChanges)
        for i in range(len(kinds)):
            alone = run(decoder, plan.select([i]), NativeChanges, [i])
            for mixed, solo in zip(together, alone, strict=True):
                assert torch.equal(mixed[i], solo[0])


def test_tokens_are_cut_into_tiles_of_one_adapter() -> None:
    assert tiles([0, 0, -1, 1, 0], [3, 2, 4, 1, 6]).tolist() == [
        [0, 4, 0], [4, 1, 0], [9, 1, 1], [10, 4, 0], [14, 2, 0],
    ]  # fmt: skip
    assert tiles([-1, -1], [1, 1]).shape == (0, 3)


def test_an_adapter_that_left_and_came_again_is_itself(base_of: Callable[..., Base], tmp_path: Path) -> None:
    """Addresses of one that is gone are not used for the next."""
    base = base_of()
    runtime = Runtime(base, Store(tmp_path), slots=1)
    refs = [build.stored(runtime.store, base, f"a{i}", build.lora(base, i, 8)) for i in range(3)]
    first = [runtime.generate_ids([PROMPTS[0]], [ref], 6) for ref in refs]
    again = [runtime.generate_ids([PROMPTS[0]], [ref], 6) for ref in refs]
    runtime.close()
    assert first == again
    assert len({str(one) for one in first}) > 1
