"""The loop: schedules, batches, accumulation, determinism; and what stays as it was when a run fails."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import AdapterHubError, DataError, NoEffect, TrainingFailed, Unsupported
from adapterhub_lite.events import Evaluated, Note, Step
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.batches import epoch_batches
from adapterhub_lite.training.computation import Learner, Settings, make_computation
from adapterhub_lite.training.member import Course, Member
from adapterhub_lite.training.schedule import rate_factor
from adapterhub_lite.training.train import train_adapter
from adapterhub_lite.workflows.train import train
from tests import peers
from tests.checks import assert_store_sound
from tests.training import recipes
from tests.training.build import Twin, assert_gradients_equal

LORA = {"type": "lora", "rank": 4, "alpha": 8}
ADAPTERS = [LORA, {"type": "dora", "rank": 4}, {"type": "prefix", "tokens": 4}]
CAUSAL = [
    Example([5 + i, 6, 7 + i, *range(20, 22 + i % 4), 2], [IGNORED, IGNORED, 7 + i, *range(20, 22 + i % 4), 2])
    for i in range(12)
]


class TestSchedule:
    """transformers' schedules, but that the warm-up does not waste its first step on a rate of 0."""

    @pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
    @pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (7, 0.0), (100, 0.0), (50, 0.1), (33, 0.5), (10, 0.25)])
    def test_values_after_the_warm_up(self, schedule: str, total: int, warmup: float):
        rising = math.ceil(total * warmup)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        name = "constant_with_warmup" if schedule == "constant" else schedule
        peer = transformers.get_scheduler(name, optimizer, num_warmup_steps=rising, num_training_steps=total)
        for step in range(total):
            (expected,) = peer.get_last_lr()
            found = rate_factor(schedule, step, total, warmup)
            if step >= rising:
                assert found == pytest.approx(expected, abs=1e-12)
            else:
                assert expected < found < 1
            optimizer.step()
            peer.step()

    @pytest.mark.parametrize("warmup", [0.1, 0.5, 1.0])
    def test_the_warm_up_is_a_straight_line(self, warmup: float):
        rising = math.ceil(20 * warmup)
        found = [rate_factor("constant", step, 20, warmup) for step in range(rising)]
        assert found == pytest.approx([(i + 1) / (rising + 1) for i in range(rising)])

    def test_the_loop_uses_it(self, tiny_base, tmp_path: Path):
        base, rates = tiny_base("llama"), []
        recipe = recipes.load(tmp_path, base, LORA, {"schedule": "cosine", "warmup": 0.3, "epochs": 2})
        train_adapter(
            recipe, base, CAUSAL, on_event=lambda e: rates.append(e.learning_rate) if isinstance(e, Step) else None
        )
        assert rates == pytest.approx([0.05 * rate_factor("cosine", i, 6, 0.3) for i in range(6)])


class TestBatches:
    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(
        lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200),
        size=st.integers(1, 40),
        seed=st.integers(0, 2**32 - 1),
        epoch=st.integers(0, 50),
    )
    def test_every_example_once(self, lengths: list[int], size: int, seed: int, epoch: int):
        batches = list(epoch_batches(lengths, size, seed, epoch))
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        assert all(0 < len(b) <= size for b in batches)
        assert len(batches) >= math.ceil(len(lengths) / size)
        assert batches == list(epoch_batches(lengths, size, seed, epoch))

    def test_there_are_as_many_batches_as_the_plan_says(self):
        """Groups are multiples of the batch size, so that only the last batch of all is short."""
        for count in (1, 15, 16, 17, 250, 256, 257, 1000):
            batches = list(epoch_batches([1] * count, 16, 0, 0))
            assert len(batches) == math.ceil(count / 16)
            assert sorted(i for b in batches for i in b) == list(range(count))

    def test_epochs_and_seeds_differ(self):
        found = {str(list(epoch_batches([1] * 50, 8, seed, epoch))) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
        assert len(found) == 9

    def test_like_lengths_lie_together(self):
        lengths = [(i * 37) % 101 + 1 for i in range(256)]
        padded = sum(max(lengths[i] for i in b) * len(b) for b in epoch_batches(lengths, 16, 0, 0))
        assert padded < 1.15 * sum(lengths)

    @pytest.mark.parametrize(
        ("epochs", "accumulation", "steps"), [(1, 1, 3), (2, 2, 4), (0.5, 1, 2), (3, 4, 3), (0.01, 1, 1)]
    )
    def test_steps(self, tiny_base, tmp_path: Path, epochs: float, accumulation: int, steps: int):
        base, seen = tiny_base("llama"), []
        recipe = recipes.load(tmp_path, base, LORA, {"epochs": epochs, "gradient_accumulation": accumulation})
        train_adapter(recipe, base, CAUSAL, on_event=lambda e: seen.append(e) if isinstance(e, Step) else None)
        assert [e.step for e in seen] == list(range(1, steps + 1))
        assert {e.total for e in seen} == {steps}


def test_accumulated_batches_are_one_large_batch(tiny_base, tmp_path: Path):
    """Rows of different lengths: a mean of the batches' means would be something else."""
    base = tiny_base("llama")
    wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config("llama", "lora", "CAUSAL_LM"))
    config = replace(recipes.load(tmp_path, base, LORA).training, max_grad_norm=1e9)
    found = []
    for size, accumulation in ((12, 1), (5, 3)):
        twin = Twin(base, wrapped)
        learner = Learner(twin.adapter, None, "CAUSAL_LM")
        sizes = replace(config, batch_size=size, gradient_accumulation=accumulation)
        member = Member(0, learner, Course(sizes, CAUSAL))
        (sums,) = make_computation(base, [learner], Settings(pack_tokens=20 * size)).gradients(member.rows())
        assert member.learn(sums)
        found.append((member.history, [(n, p.grad.clone()) for n, p in twin.parameters().items()]))
    (whole, grads), (parts, others) = found
    assert whole.losses == pytest.approx(parts.losses, rel=1e-6)
    assert whole.tokens == parts.tokens == sum(len(e.ids) for e in CAUSAL)
    assert_gradients_equal(others, [g for _, g in grads], relative=1e-5)


def test_a_step_is_adamw_on_the_clipped_mean_gradient(tiny_base, tmp_path: Path):
    """Three steps by hand with torch's own AdamW on PEFT's module, in the same order of batches."""
    base = tiny_base("llama")
    recipe = recipes.load(tmp_path, base, LORA, {"batch_size": 4, "max_grad_norm": 0.5, "weight_decay": 0.1})
    seen = []
    ours = train_adapter(recipe, base, CAUSAL, on_event=lambda e: seen.append(e) if isinstance(e, Step) else None)
    start = train_adapter(replace(recipe, training=replace(recipe.training, learning_rate=1e-30)), base, CAUSAL)
    wrapped = peers.wrap(peers.plain(base.source.folder, "CAUSAL_LM"), peers.config("llama", "lora", "CAUSAL_LM"))
    named = {n.replace(".default", ""): p for n, p in wrapped.named_parameters() if p.requires_grad}
    for name, parameter in named.items():
        parameter.data = torch.zeros_like(parameter) if "lora_B" in name else start.adapter.tensors[name].clone()
    optimizer = torch.optim.AdamW(named.values(), lr=0.05, weight_decay=0.1)
    batches = epoch_batches([len(e.ids) for e in CAUSAL], 4, recipe.training.seed, 0)
    for step, indices in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 3)
        rows = [CAUSAL[i] for i in indices]
        losses, count = torch.zeros(()), 0
        for row in rows:
            logits = wrapped(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            losses = losses + torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
            count += sum(label != IGNORED for label in row.labels[1:])
        (losses / count).backward()
        assert seen[step].loss == pytest.approx(float(losses.detach()) / count, rel=1e-4)
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in named.items():
        torch.testing.assert_close(ours.adapter.tensors[name], parameter.detach(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "adapter", [*ADAPTERS, {"type": "prefix", "tokens": 4, "projection": True}], ids=lambda a: a["type"]
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_seed_fixes_every_bit(tiny_base, tmp_path: Path, family: str, adapter: dict):
    base = tiny_base(family)
    found = {}
    for run, seed in (("first", 0), ("second", 0), ("other", 1)):
        folder = tmp_path / run
        folder.mkdir()
        recipe = recipes.load(folder, base, adapter, {"seed": seed, "epochs": 2})
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        labelled = [Example(e.ids, [i % 3]) for i, e in enumerate(CAUSAL)] if family == "bert" else CAUSAL
        found[run] = train_adapter(recipe, base, labelled, labels=3).adapter.tensors
        assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers moved"
    assert all(torch.equal(found["first"][k], found["second"][k]) for k in found["first"])
    assert not any(torch.equal(found["first"][k], found["other"][k]) for k in found["first"])


def test_watching_does_not_change_the_run(tiny_base, tmp_path: Path):
    """Evaluation runs without dropout, so it draws no random number."""
    base = tiny_base("bert")
    recipe = recipes.load(tmp_path, base, {**LORA, "dropout": 0.2}, {"eval_every": 1, "epochs": 2})
    examples = [Example(e.ids, [i % 3]) for i, e in enumerate(CAUSAL)]
    alone, seen = train_adapter(recipe, base, examples, labels=3), []
    watched = train_adapter(recipe, base, examples, examples[:5], labels=3, on_event=seen.append)
    assert len([e for e in seen if isinstance(e, Evaluated)]) == 6
    assert alone.history.losses == watched.history.losses
    assert all(torch.equal(v, watched.adapter.tensors[k]) for k, v in alone.adapter.tensors.items())


def test_the_validation_loss_is_that_of_the_runtime(tiny_base, tmp_path: Path):
    base = tiny_base("bert")
    recipe = recipes.load(tmp_path, base, {**LORA, "dropout": 0.3})
    examples = [Example(e.ids, [i % 3]) for i, e in enumerate(CAUSAL)]
    trained = train_adapter(recipe, base, examples, examples, labels=3)
    runtime = Runtime(base, Store())
    ref = runtime.attach(trained.adapter)
    logits = torch.stack(runtime.logits([e.ids for e in examples], ref))
    wanted = torch.tensor([e.labels[0] for e in examples])
    loss = float(torch.nn.functional.cross_entropy(logits, wanted))
    last = trained.history.evaluations[-1]
    assert last["loss"] == pytest.approx(loss, rel=1e-5)
    assert last.get("accuracy", 0.0) == pytest.approx(float((logits.argmax(-1) == wanted).float().mean()))
    runtime.close()


class TestFailures:
    """Whatever goes wrong, base, hooks and store are as they were."""

    @pytest.fixture
    def base(self, tiny_base):
        made = tiny_base("llama", seed=9)
        row = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            before, logits = made.live_digest(), made.model(input_ids=row).logits
        yield made
        assert made.live_digest() == before
        assert not made.model.training
        assert not any(m._forward_hooks for m in made.model.modules())
        assert not any(p.requires_grad for p in made.model.parameters())
        with torch.no_grad():
            assert torch.equal(made.model(input_ids=row).logits, logits)

    def diverging(self, folder: Path, base, adapter: dict, **changes):
        recipe = recipes.load(folder, base, adapter, {"epochs": 3, "schedule": "constant"})
        return replace(recipe, training=replace(recipe.training, learning_rate=1e30, **changes))

    def test_divergence(self, base, tmp_path: Path):
        store = Store()
        with pytest.raises(TrainingFailed, match="learning_rate"):
            train(self.diverging(tmp_path, base, LORA), store=store, base=base)
        assert store.names() == []

    @pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a["type"])
    @pytest.mark.parametrize("steps", [1, None])
    def test_nothing_that_is_not_finite_is_published(self, base, tmp_path: Path, adapter: dict, steps):
        """With one step no later one notices. A normalised model may bear even such a DoRA or prefix."""
        store = Store()
        try:
            ref = train(self.diverging(tmp_path, base, adapter, max_steps=steps), store=store, base=base)
        except AdapterHubError:
            assert store.names() == []
            return
        assert adapter["type"] != "lora", "its logits cannot be finite"
        runtime = Runtime(base, store)
        assert all(torch.isfinite(one).all() for one in runtime.logits(peers.ROWS, ref))
        runtime.close()

    @pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a["type"])
    @pytest.mark.parametrize("at", [1, 3])
    def test_an_interrupt(self, base, tmp_path: Path, adapter: dict, at: int):
        store = Store()
        path = recipes.write(tmp_path, base, adapter)
        kept = train(path, store=store, base=base, name="kept")

        def interrupt(event: object) -> None:
            if isinstance(event, Step) and event.step == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(path, store=store, base=base, on_event=interrupt)
        assert store.names() == ["kept"]
        assert store.resolve("kept").digest == kept.digest
        assert_store_sound(store.path)

    def test_no_memory(self, base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        class NoMemory:
            def gradients(self, rows: object) -> None:
                raise torch.OutOfMemoryError("no memory")

        store = Store()
        path = recipes.write(tmp_path, base, LORA)
        with monkeypatch.context() as patch:
            patch.setattr("adapterhub_lite.training.train.make_computation", lambda *_: NoMemory())
            with pytest.raises(TrainingFailed, match=r"batch_size 4.*pack_tokens"):
                train(path, store=store, base=base)
        assert store.names() == []

    def test_an_adapter_without_effect(self, base):
        from adapterhub_lite.runtime.certificate import measure
        from tests.runtime import build

        runtime = Runtime(base, Store())
        adapter = build.lora(base, 1)
        assert measure(runtime, runtime.attach(adapter))["max_logit_change"] > 0
        for name, tensor in adapter.tensors.items():
            if "lora_B" in name:
                tensor.zero_()
        with pytest.raises(NoEffect, match="no logit"):
            measure(runtime, runtime.attach(adapter))
        runtime.close()

    def test_a_recipe_for_another_base(self, base, tiny_base, tmp_path: Path):
        path = recipes.write(tmp_path, tiny_base("gpt2"), LORA)
        with pytest.raises(Unsupported, match="recipe is for base"):
            train(path, store=Store(), base=base)
        with pytest.raises(Unsupported, match="quantize"):
            train(recipes.write(tmp_path, base, LORA), store=Store(), base=base, overrides={"quantize": "nf4"})

    def test_data_is_checked_before_the_first_step(self, base, tmp_path: Path):
        path = recipes.write(tmp_path, base, LORA)
        (tmp_path / "validation.jsonl").write_text('{"prompt": "' + "x" * 200 + '", "completion": "y"}')
        seen = []
        with pytest.raises(DataError, match=r"validation\.jsonl.*line 1"):
            train(path, store=Store(), base=base, on_event=seen.append)
        assert not [e for e in seen if isinstance(e, Step)]

    def test_targets_that_are_not_there(self, base, tmp_path: Path):
        path = recipes.write(tmp_path, base, {**LORA, "targets": ["q_proj", "c_attn"]})
        with pytest.raises(Unsupported, match=r"c_attn.*down_proj"):
            train(path, store=Store(), base=base)


def test_epochs_that_end_before_max_steps_are_told(tmp_path: Path, tiny_base):
    base = tiny_base("llama")
    told: list[str] = []
    for steps in (2, 9):
        made = recipes.load(tmp_path, base, LORA, {"batch_size": 4, "max_steps": steps})
        train_adapter(made, base, CAUSAL, on_event=lambda e: told.append(e.text) if isinstance(e, Note) else None)
    assert told == ["The epochs end after 3 steps: max_steps 9 is not reached; raise training.epochs"]
