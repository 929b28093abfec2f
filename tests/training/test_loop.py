"""The loop on a stand-in in float64: learners beside each other, early stopping, what is not finite, the optimiser."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import TrainingFailed, TrainingInterrupted, Unsupported
from adapterhub_lite.events import Evaluated, Step
from adapterhub_lite.recipe import EarlyStopping
from adapterhub_lite.tasks.task import Example
from adapterhub_lite.training.batches import Order, row_key
from adapterhub_lite.training.frozen import unchanged
from adapterhub_lite.training.member import FAILED, FINISHED, STOPPED, Course
from adapterhub_lite.training.optimizer import FlatAdamW
from adapterhub_lite.training.stopping import Watch
from tests.training.standin import Softmax, config, examples, members, run

COURSES = [
    Course(config(seed=1), examples(20, 1), examples(7, 11), "first"),
    Course(config(seed=2, batch_size=3, schedule="cosine", warmup=0.2, epochs=5), examples(31, 2), (), "second"),
    Course(
        config(seed=3, learning_rate=0.2, max_grad_norm=0.05, eval_every=None), examples(9, 3), examples(3, 13), "c"
    ),
    Course(
        config(seed=4, learning_rate=3.0, epochs=20, early_stopping=EarlyStopping(patience=2), gradient_accumulation=2),
        examples(16, 4),
        examples(8, 14),
        "fourth",
    ),
]


def outcome(member):
    history = member.history
    told = (history.losses, history.evaluations, history.tokens, history.kept_step, member.status, member.step)
    return told, member.optimizer.values.detach().clone()


class TestTogether:
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_each_is_what_it_is_alone_to_the_last_bit(self, dropout: float):
        crowd = run(COURSES, dropout=dropout)
        assert len({member.step for member in crowd}) == len(COURSES), "they should end at different steps"
        for course, member in zip(COURSES, crowd, strict=True):
            (alone,) = run([course], dropout=dropout)
            (told, values), (expected, wanted) = outcome(member), outcome(alone)
            assert told == expected
            assert torch.equal(values, wanted)

    def test_one_that_diverges_leaves_and_the_others_go_on_unchanged(self):
        crowd = run(COURSES, poison={0: 3})
        assert crowd[0].status == FAILED
        assert crowd[0].step == 2
        for course, member in list(zip(COURSES, crowd, strict=True))[1:]:
            (alone,) = run([course])
            assert outcome(member)[0] == outcome(alone)[0]
            assert torch.equal(outcome(member)[1], outcome(alone)[1])

    def test_events_say_whose_they_are(self):
        seen = []
        run(COURSES, on_event=seen.append)
        names = {e.learner for e in seen if isinstance(e, Step)}
        assert names == {course.name for course in COURSES}
        steps = [e.step for e in seen if isinstance(e, Step) and e.learner == "second"]
        assert steps == list(range(1, len(steps) + 1))
        assert {e.learner for e in seen if isinstance(e, Evaluated)} == {"first", "c", "fourth"}


def test_dropout_depends_on_seed_step_and_row_only():
    course = COURSES[0]
    again = [run([course], dropout=0.4)[0].history.losses for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] != run([course])[0].history.losses
    keys = [row_key(seed, step, index) for seed in range(5) for step in range(20) for index in range(20)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    bits = torch.tensor([[(key >> bit) & 1 for bit in range(63)] for key in keys], dtype=torch.float64).mean(0)
    assert float((bits - 0.5).abs().max()) < 0.05


def test_smoothed_losses_speed_and_memory_are_told():
    seen = list(_steps(COURSES[0]))
    assert seen[0].smoothed == pytest.approx(seen[0].loss)
    total = weight = 0.0
    for event in seen:
        total, weight = 0.9 * total + 0.1 * event.loss, 0.9 * weight + 0.1
        assert event.smoothed == pytest.approx(total / weight)
    assert seen[-1].memory > 10**6
    assert seen[-1].tokens_per_second > 0
    assert seen[-1].eta == 0


def _steps(course):
    seen = []
    run([course], on_event=seen.append)
    return [e for e in seen if isinstance(e, Step)]


class TestEarlyStopping:
    def course(self, **changes):
        changes = {"learning_rate": 1.5, "epochs": 30, "schedule": "constant", "eval_every": 1, **changes}
        return Course(config(**changes), examples(12, 5), examples(12, 6))

    def test_it_stops_when_patience_ends_and_keeps_the_best(self):
        (member,) = run([self.course(early_stopping=EarlyStopping(patience=3))])
        losses = [e["loss"] for e in member.history.evaluations]
        best = min(range(len(losses)), key=lambda i: losses[i])
        assert member.status == STOPPED
        assert member.history.ended == STOPPED
        assert len(losses) - 1 - best == 3
        assert member.step == len(losses) < member.order.total
        assert member.history.kept_step == best + 1
        (short,) = run([self.course(max_steps=best + 1)])
        assert torch.equal(member.optimizer.values, short.optimizer.values), "not the values of the best step"

    def test_the_last_is_kept_if_the_recipe_wants_it(self):
        (member,) = run([self.course(early_stopping=EarlyStopping(patience=3), keep="last")])
        (short,) = run([self.course(max_steps=member.step)])
        assert member.history.kept_step is None
        assert torch.equal(member.optimizer.values, short.optimizer.values)

    def test_the_best_is_kept_without_stopping_early(self):
        (member,) = run([self.course(keep="best", epochs=8)])
        losses = [e["loss"] for e in member.history.evaluations]
        assert member.status != STOPPED
        assert member.step == member.order.total
        assert member.history.kept_step == losses.index(min(losses)) + 1 < member.step

    def test_accuracy_rises(self):
        (member,) = run([self.course(early_stopping=EarlyStopping(patience=4, metric="accuracy"))])
        accuracies = [e["accuracy"] for e in member.history.evaluations]
        best = accuracies.index(max(accuracies))
        assert (member.history.kept_step or member.step) == best + 1

    def test_a_metric_that_is_not_measured_is_refused(self):
        made, _ = members([self.course(early_stopping=EarlyStopping(patience=1, metric="accuracy"))])
        from adapterhub_lite.training.computation import Sums

        with pytest.raises(Unsupported, match="accuracy is not measured"):
            made[0].evaluated(Sums(1.0, 1, 1))

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(values=st.lists(st.floats(0, 9), min_size=1, max_size=30), patience=st.integers(1, 5))
    def test_watch(self, values: list[float], patience: int):
        watch = Watch("loss", patience)
        for step, value in enumerate(values, 1):
            watch.see(step, {"loss": value})
            best = min(values[:step])
            assert (watch.best, watch.best_step) == (best, values.index(best) + 1)
            assert watch.has_enough == (step - watch.best_step >= patience)


class TestDivergence:
    def test_it_says_step_rate_and_rows_and_keeps_the_state_before(self):
        course = Course(config(seed=7), examples(20), (), "x", lines=tuple(range(100, 120)))
        (member,) = run([course], poison={0: 4})
        (whole,) = run([Course(config(seed=7, epochs=3), course.train)])
        taken = sorted(100 + i for i in whole.order.rows(3))
        assert "at step 4" in member.failure
        assert f"learning rate {whole.rate(3):.3g}" in member.failure
        assert f"lines {', '.join(map(str, taken))}" in member.failure
        assert member.history.losses == whole.history.losses[:3]
        assert all(bool(torch.isfinite(t).all()) for t in member.state()[0].values())

    def test_a_validation_loss_that_is_not_finite(self):
        bad = Course(config(learning_rate=1e308), examples(8), examples(8))
        (member,) = run([bad])
        assert member.status == FAILED
        assert "diverged" in member.failure


class TestStopping:
    def test_a_wish_ends_it_after_the_step_that_runs(self):
        steps = []

        def wish() -> int:
            return 15 if len(steps) >= 3 else 0

        with pytest.raises(TrainingInterrupted, match="after step 3") as caught:
            run([COURSES[0]], on_event=lambda e: steps.append(e) if isinstance(e, Step) else None, wish=wish)
        assert caught.value.exit_code == 143
        assert len(steps) == 3

    def test_a_wish_does_not_wait_for_a_validation_part(self):
        course = Course(config(eval_every=2), examples(20), examples(500))
        calls = []
        with pytest.raises(TrainingInterrupted, match="after step 2"):
            run([course], before=calls.append, wish=lambda: 2 * (calls.count("losses") >= 2))
        assert calls.count("losses") == 2, "the whole part takes eight"


def test_a_step_takes_the_mean_over_its_items():
    """AdamW and clipping hide a factor, so the gradients themselves are looked at."""
    course = Course(config(batch_size=3, gradient_accumulation=2, max_grad_norm=1e9), examples(20, 1))
    (member,), (learner,) = members([course])
    computation = Softmax([learner])
    member.optimizer.clear()
    rows = member.rows()
    assert len(rows) == 6
    (sums,) = computation.gradients(rows)
    summed = member.optimizer.gradients.clone()
    assert member.learn(sums)
    torch.testing.assert_close(member.optimizer.gradients, summed / 6, rtol=1e-14, atol=0)
    assert member.history.losses == [pytest.approx(sums.total / 6)]


class TestOptimizer:
    def parameters(self, dtype: torch.dtype, seed: int = 0):
        chance = torch.Generator().manual_seed(seed)
        shapes = [(4, 8), (33,), (5, 5), (1,), (130, 3)]
        return [torch.nn.Parameter(torch.randn(s, generator=chance, dtype=dtype)) for s in shapes]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("decay", [0.0, 0.1])
    def test_it_is_torch_s_fused_adamw(self, dtype: torch.dtype, decay: float):
        """Bit for bit where torch computes with vectors. The last few values of a tensor, which it takes one by one,
        it rounds otherwise itself.
        """
        ours, theirs = self.parameters(dtype), self.parameters(dtype)
        flat = FlatAdamW(ours, decay)
        peer = torch.optim.AdamW(theirs, lr=1.0, weight_decay=decay, fused=True)
        for step in range(20):
            gradients = self.parameters(dtype, seed=step + 1)
            flat.clear()
            for one, other, grad in zip(ours, theirs, gradients, strict=True):
                one.grad += grad.data
                other.grad = grad.data.clone()
            norm = flat.mean(1)
            flat.step(0.01 * (step + 1), norm, 1e9)
            peer.param_groups[0]["lr"] = 0.01 * (step + 1)
            peer.step()
        for one, other in zip(ours, theirs, strict=True):
            whole = one.numel() - one.numel() % 16
            assert torch.equal(one.flatten()[:whole], other.flatten()[:whole])
            torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-6)

    def test_clipping_is_torch_s(self):
        ours, theirs = self.parameters(torch.float64), self.parameters(torch.float64)
        flat = FlatAdamW(ours, 0.0)
        for one, other in zip(ours, theirs, strict=True):
            one.grad += 3 * one.data
            other.grad = other.data.clone()
        norm = flat.mean(3)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 0.5)), rel=1e-12)
        flat.step(0.0, norm, 0.5)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)

    def test_values_begin_at_cache_lines_and_gradients_are_views(self):
        ours = self.parameters(torch.float32)
        flat = FlatAdamW(ours, 0.0)
        for one in ours:
            assert (one.data_ptr() - flat.values.data_ptr()) % 64 == 0
            assert (one.grad.data_ptr() - flat.gradients.data_ptr()) % 64 == 0

    def test_a_gradient_that_somebody_replaced_counts(self):
        ours = self.parameters(torch.float32)
        flat = FlatAdamW(ours, 0.0)
        ours[1].grad = torch.full_like(ours[1], 2.0)
        assert flat.mean(1) == pytest.approx(2 * math.sqrt(33))

    def test_it_goes_on_from_its_tensors(self):
        first, second = self.parameters(torch.float32), self.parameters(torch.float32, seed=9)
        one, other = FlatAdamW(first, 0.1), FlatAdamW(second, 0.1)
        for step in range(6):
            if step == 3:
                other.restore({k: v.clone() for k, v in one.tensors().items()}, 3)
            for flat, parameters in ((one, first), (other, second)):
                flat.clear()
                for parameter, grad in zip(parameters, self.parameters(torch.float32, seed=step + 1), strict=True):
                    parameter.grad += grad.data
                flat.step(0.05, flat.mean(2), 1.0)
        assert torch.equal(one.values, other.values)

    def test_what_does_not_fit_is_refused(self):
        flat = FlatAdamW(self.parameters(torch.float32), 0.0)
        tensors = {k: v[:-1] for k, v in flat.tensors().items()}
        with pytest.raises(ValueError, match="parameters is"):
            flat.restore(tensors, 1)


class TestOrder:
    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(
        count=st.integers(1, 60),
        size=st.integers(1, 9),
        accumulation=st.integers(1, 4),
        epochs=st.floats(0.1, 4),
        seed=st.integers(0, 99),
    )
    def test_any_step_can_be_asked_for(self, count: int, size: int, accumulation: int, epochs: float, seed: int):
        lengths = [Example([0] * (1 + i % 5), [0]) for i in range(count)]
        settings = config(batch_size=size, gradient_accumulation=accumulation, epochs=epochs, seed=seed)
        forward = Order(settings, lengths)
        steps = [forward.rows(i) for i in range(forward.total)]
        backward = Order(settings, lengths)
        assert steps == [backward.rows(i) for i in reversed(range(backward.total))][::-1]
        for epoch in range(forward.total // forward.steps_per_epoch):
            begin = epoch * forward.steps_per_epoch
            taken = [i for step in steps[begin : begin + forward.steps_per_epoch] for i in step]
            assert sorted(taken) == list(range(count))

    def test_epochs_differ(self):
        order = Order(config(epochs=4), examples(30))
        firsts = [order.rows(i * order.steps_per_epoch) for i in range(4)]
        assert all(a != b for a, b in pairwise(firsts))


def test_a_run_that_is_over_says_so():
    (member,) = run([COURSES[0]])
    assert member.history.ended == FINISHED
    assert member.history.kept_step is None


class TestFrozen:
    def model(self):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 3))

    def test_a_base_that_was_changed_is_found(self):
        model = self.model()
        with unchanged(model):
            model.eval()(torch.ones(2, 300))
        with pytest.raises(TrainingFailed, match="changed a weight of the base"), unchanged(model), torch.no_grad():
            model[2].bias += 1e-3
        with pytest.raises(TrainingFailed), unchanged(model), torch.no_grad():
            model[0].weight *= 1.001
        with pytest.raises(TrainingFailed), unchanged(model):
            model.train()(torch.randn(4, 300))  # buffers of running means

    def test_an_error_inside_is_the_one_that_is_told(self):
        with pytest.raises(KeyError), unchanged(self.model()):
            raise KeyError("x")
