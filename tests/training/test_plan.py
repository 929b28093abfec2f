"""The arithmetic of a plan: costs, setups, memory, time, and how much room there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.errors import Unsupported
from adapterhub_lite.recipe import TrainingConfig
from adapterhub_lite.training.computation import Load, Settings
from adapterhub_lite.training.planning.calibrate import Calibration, Sample, drawn_on, probes
from adapterhub_lite.training.planning.costs import Costs, fit_costs
from adapterhub_lite.training.planning.loads import Stride, Work
from adapterhub_lite.training.planning.plan import (
    FIELDS,
    Memory,
    Setup,
    bytes_text,
    fits,
    ladder,
    memory_of,
    parse_size,
    time_of,
)
from adapterhub_lite.training.planning.room import Peak, held, room, settle

CPU = torch.device("cpu")
EVERY = frozenset({"recompute_mlp", "offload", "table_on_host"})
TRUE = Costs(0.01, 2e-4, 3e-7, 5e-5)
LOADS = [
    Load((), n, n * n // k, n // j) for n, k, j in ((40, 1, 2), (200, 3, 5), (600, 7, 2), (1000, 2, 9), (64, 4, 1))
]


def timed(costs: Costs, loads: Sequence[Load] = LOADS) -> list[tuple[Load, float]]:
    return [(load, costs.seconds(load)) for load in loads]


def test_costs_are_found_again() -> None:
    found = fit_costs(timed(TRUE))
    assert (found.pack, found.token, found.square, found.supervised) == pytest.approx(
        (0.01, 2e-4, 3e-7, 5e-5), rel=1e-5
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_packs_are_met_with_few_terms_and_none_is_negative(count: int) -> None:
    found = fit_costs(timed(TRUE, LOADS[:count]))
    for load, seconds in timed(TRUE, LOADS[:count]):
        assert found.seconds(load) == pytest.approx(seconds, rel=0.2)
    assert min(found.pack, found.token, found.square, found.supervised) >= 0


def test_times_that_fall_with_size_give_no_negative_cost() -> None:
    found = fit_costs([(LOADS[0], 0.5), (LOADS[1], 0.4), (LOADS[3], 0.3), (LOADS[2], 0.35)])
    assert min(found.pack, found.token, found.square, found.supervised) >= 0
    assert found.seconds(LOADS[3]) == pytest.approx(0.37, rel=0.3)


def test_a_small_pack_counts_as_much_as_a_large_one() -> None:
    """A tenth off is a tenth off, whatever the size."""
    small, large = Load((), 10, 0, 0), Load((), 1000, 0, 0)
    found = fit_costs([(small, 0.012), (large, 0.8), (large, 1.2), (large, 1.0)])
    assert found.seconds(small) == pytest.approx(0.012, rel=0.1)
    assert fit_costs([]) == Costs()


def _config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**changes)


def test_setups_lose_ever_more_time_and_all_are_there() -> None:
    found = ladder([_config()], 300, True, "cpu", dequantises=True)
    assert found == [
        *(Setup(size, False, True) for size in (1024, 512)),
        *(Setup(size, False, False) for size in (1024, 512)),
        *(Setup(size, True, False) for size in (1024, 512)),
    ]
    assert [s.pack_tokens for s in ladder([_config()], 20, False, "cpu")][:5] == [1024, 512, 256, 128, 1024]
    assert ladder([_config()], 5000, False, "cpu") == [Setup(1024), Setup(1024, True)]
    assert ladder([_config()], 5000, False, "cuda")[0] == Setup(8192)
    whole = ladder([_config()], 2000, False, "cuda", heeds=EVERY, dequantises=True)
    assert len(whole) == len(set(whole)) == 3 * 2 * (2 + 2)  # sizes, table, and again: none, gates, all, all away
    lost = [setup.lost("cuda", True) for setup in whole]
    assert lost == sorted(lost)
    assert whole[0] == Setup(8192)
    assert whole[-1] == Setup(2048, True, offload=True, table_on_host=True)


def test_part_of_a_layer_is_computed_again_before_all_of_it() -> None:
    found = ladder([_config()], 1000, False, "cpu", heeds=frozenset({"recompute_mlp"}))
    assert found == [Setup(1024), Setup(1024, recompute_mlp=True), Setup(1024, True)]


def test_weights_that_are_dequantised_in_each_pack_make_small_packs_dear() -> None:
    found = ladder([_config()], 20, True, "cpu", heeds=frozenset({"recompute_mlp"}), dequantises=True)
    first = {keeps: found.index(Setup(64, False, keeps)) for keeps in (True, False)}
    assert found.index(Setup(1024, False, False)) < first[True] < found.index(Setup(1024, True, False)) < first[False]


@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"recompute_mlp": True}, "recompute_mlp", {True, False}),  # where all is computed again it is part of that
        ({"recompute_mlp": True, "checkpointing": False}, "recompute_mlp", {True}),
        ({"recompute_mlp": False}, "recompute_mlp", {False}),
        ({"offload": True}, "offload", {True}),
        ({"offload": True}, "checkpointing", {True}),
        ({"offload": False}, "offload", {False}),
        ({"table_on_host": True}, "table_on_host", {True}),
        ({"table_on_host": False}, "table_on_host", {False}),
    ],
)
def test_what_a_recipe_says_of_the_host_is_heard(changes: dict[str, Any], key: str, values: set[bool]) -> None:
    found = ladder([_config(**changes)], 2000, False, "cuda", heeds=EVERY)
    assert {getattr(one, key) for one in found} == values
    assert not any(one.offload and not one.checkpointing for one in found)
    assert {getattr(one, key) for one in ladder([_config(**changes)], 2000, False, "cpu")} <= {
        False, key == "checkpointing"
    }  # fmt: skip


def test_a_setup_is_what_a_computation_takes() -> None:
    assert Setup(99, True, True, offload=True, table_on_host=True).settings == Settings(
        99, checkpoint=True, offload=True, table_on_host=True
    )
    assert Setup(99, recompute_mlp=True).settings == Settings(99, recompute_mlp=True)
    assert set(FIELDS) <= set(TrainingConfig.__dataclass_fields__)


def test_what_a_recipe_says_is_in_all_setups() -> None:
    assert ladder([_config(pack_tokens=700, checkpointing=False)], 20, False, "cpu") == [Setup(700)]
    found = ladder([_config(checkpointing=True)], 300, True, "cpu", dequantises=True)
    assert found == [Setup(size, True, keeps) for keeps in (True, False) for size in (1024, 512)]
    assert {s.working_copies for s in ladder([_config(working_copies=True)], 300, True, "cpu")} == {True}
    assert {s.working_copies for s in ladder([_config(working_copies=False)], 300, True, "cpu")} == {False}
    # Nobody makes copies that are not there, or takes away those that are another's.
    assert {s.working_copies for s in ladder([_config(working_copies=True)], 300, False, "cpu")} == {False}
    assert {s.working_copies for s in ladder([_config()], 300, True, "cpu", may_drop=False)} == {True}


def test_of_recipes_together_the_careful_one_is_heard() -> None:
    configs = [_config(pack_tokens=700, checkpointing=False), _config(pack_tokens=90, checkpointing=True), _config()]
    assert ladder(configs, 20, False, "cpu") == [Setup(90, True)]


def calibration(**changes: Any) -> Calibration:
    strides = (
        Stride((), (LOADS[0], LOADS[1]), 3.0),
        Stride((), (LOADS[2],), 2.0),
        Stride((), (LOADS[3],), 0.0),
    )
    evaluations = (Stride((), (LOADS[1], LOADS[4]), 2.0),)
    whole = Calibration(
        ("fused decoder", "it is covered"), base=1000, peak=1700, after=1500, state=100, best=0,
        samples=tuple(Sample(*one) for one in timed(TRUE)), without=(Sample(LOADS[1], TRUE.seconds(LOADS[1]) / 4),),
        update=0.5, available=5000, work=Work(5, 5, 7000, strides, evaluations), trained=(25,),
    )  # fmt: skip
    return replace(whole, **changes)


def test_memory_is_what_dry_steps_took_and_what_comes_later() -> None:
    memory = memory_of(calibration())
    assert memory == Memory(base=1000, adapters=400, work=300, writing=600, peak=2100, available=5000)
    assert memory.above == 1100
    # Where computing takes more than writing it is the peak; the best parameters come on top and into the file.
    memory = memory_of(calibration(peak=9000, best=40))
    assert (memory.peak, memory.adapters, memory.writing) == (9040, 440, 680)
    assert memory_of(calibration(after=9000, peak=9000, best=40)).peak == 9040 + 680
    # What left the device meanwhile made room for work.
    memory = memory_of(calibration(peak=3000, table=50, on_host=70, host_room=90))
    assert (memory.work, memory.peak) == (3000 - 950 - 400, 3000)
    assert (memory.on_host, memory.host_room) == (70, 90)


def test_time_is_that_of_each_step_and_evaluation() -> None:
    configs = [_config(checkpoint_every="never")]
    found = time_of(calibration(), configs)
    assert found is not None
    one = TRUE.seconds
    learning = 3 * (one(LOADS[0]) + one(LOADS[1])) + 2 * one(LOADS[2]) + 5 * 0.5
    evaluating = 2 * (one(LOADS[1]) + one(LOADS[4])) / 4
    assert found.evaluating == pytest.approx(evaluating, rel=1e-4)
    assert found.total == pytest.approx(learning + evaluating, rel=1e-4)
    assert found.writing == 0
    written = time_of(calibration(state=10**9), [_config(checkpoint_every=2)])
    assert written is not None
    assert written.writing == pytest.approx((2 + 2) * 3e9 / 2e8)  # two evaluations, and every second of five steps
    assert written.total == pytest.approx(learning + evaluating + written.writing, rel=1e-4)
    assert time_of(calibration(samples=()), configs) is None


def test_a_peak_fits_into_what_there_is_and_what_is_allowed() -> None:
    memory = Memory(1000, 0, 0, 0, peak=2900, available=2001)
    assert fits(memory)
    assert not fits(replace(memory, available=1999))
    assert fits(memory, 2900)
    assert not fits(memory, 2899)
    assert fits(replace(memory, on_host=95, host_room=100))
    assert not fits(replace(memory, on_host=96, host_room=100))


def test_larger_packs_are_drawn_on_with_care() -> None:
    assert drawn_on([], 100) == 0
    assert drawn_on([(0, 1000)], 100) == 1000
    assert drawn_on([(0, 1000), (10, 1100), (20, 1150)], 100) == 1000 + 1.25 * 10 * 100
    assert drawn_on([(0, 1000), (10, 1100), (200, 1150)], 100) == 1150


def test_probes_are_small_large_long_and_dear() -> None:
    strides = [Stride(("a", "b"), (load,)) for load in LOADS]  # type: ignore[arg-type]
    strides.append(Stride(("c", "d"), (Load((1,), 500, 10**7, 3), Load((0, 1), 450, 9, 999))))  # type: ignore[arg-type]
    found = probes(strides)
    tokens = [load.tokens for _, load in found]
    assert tokens == sorted(tokens)
    assert {40, 1000, 500, 450} <= set(tokens)
    assert (["d"], strides[-1].packs[0]) in found
    assert (["c", "d"], strides[-1].packs[1]) in found
    assert probes([]) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("512 MiB", 2**29), ("1.5g", 1_500_000_000), (12, 12), ("2kb", 2000)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "700", "8XB", "-1GB", "0", 0, "8 8GB", "1e9", "nan"])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(Unsupported, match="is not a size"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [bytes_text(n) for n in (12, 950_000, 1_940_000_000, 12e9)] == ["12 B", "950 kB", "1.94 GB", "12 GB"]


def _proc(folder: Path, cgroup: str, free: int = 50_000) -> Path:
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text(f"MemTotal: 90000 kB\nMemAvailable:   {free} kB\n")
    (folder / "proc" / "self" / "cgroup").write_text(cgroup)
    return folder / "proc"


def _group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(str(content))


def test_room_is_what_the_host_has_free(tmp_path: Path) -> None:
    assert room(CPU, _proc(tmp_path, "0::/\n"), tmp_path / "cgroup") == 50_000 * 1024


@pytest.mark.parametrize("outer", [False, True])
def test_room_is_what_every_limit_leaves(tmp_path: Path, outer: bool) -> None:
    proc, top = _proc(tmp_path, "0::/jobs/one\n"), tmp_path / "cgroup"
    _group(top / "jobs/one", memory__max=9_000_000 if outer else 4_000_000, memory__current=3_000_000,
           memory__stat="anon 1\ninactive_file 500000\n")  # fmt: skip
    _group(top / "jobs", memory__max=4_500_000 if outer else "max", memory__current=4_000_000)
    assert room(CPU, proc, top) == (500_000 if outer else 1_500_000)


def test_room_under_limits_of_the_first_kind_and_in_a_container(tmp_path: Path) -> None:
    proc, top = _proc(tmp_path, "4:memory:/docker/abc\n3:cpu:/docker/abc\n"), tmp_path / "cgroup"
    _group(top / "memory", memory__limit_in_bytes=7_000_000, memory__usage_in_bytes=6_000_000)
    assert room(CPU, proc, top) == 1_000_000


@pytest.mark.parametrize("kernel", [True, False])
def test_a_peak_is_seen_though_it_is_gone(kernel: bool, tmp_path: Path) -> None:
    more = {} if kernel else {"clear": tmp_path / "none" / "clear_refs"}
    settle(CPU)
    before = held(CPU)
    with Peak(CPU, **more) as peak:
        block = torch.ones(40_000_000, dtype=torch.uint8)
        block.add_(1)
        if not kernel:
            for _ in range(50):
                block.add_(1)
        del block
    assert 35e6 < peak.bytes - before < 120e6
    settle(CPU)  # the allocator may have kept the block
    with Peak(CPU, **more) as later:
        pass
    assert later.bytes < peak.bytes


def test_the_benchmark_tells_the_furthest_that_a_plan_was_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import training_plan

    off = iter([1.05, 0.88, 1.0])

    def run(mode: str, trial: Any) -> dict[str, float]:
        share = next(off) if mode == "plan" else 1.0
        return {"peak": 500e6 * share, "above": 100e6, "seconds": 20.0 * share}

    monkeypatch.setattr(training_plan, "_run", run)
    rows = list(training_plan.rows(training_plan.TRIALS[:3]))
    assert [row.figure for row in rows[:3]] == pytest.approx([0.05, -0.12, 0.0])
    memory, above, time = rows[3:]
    assert (memory.figure, memory.met) == (pytest.approx(0.12), False)
    assert (above.figure, above.met) == (0.0, None)
    assert (time.figure, time.met) == (pytest.approx(0.12), True)
    assert len({str(trial) for trial in training_plan.TRIALS}) == len(training_plan.TRIALS) >= 12
