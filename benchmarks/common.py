"""What every benchmark shares: machine and versions, fair timing, a table, and adapters to measure with."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.adapters.sites import select_sites
from adapterhub_lite.bases.load import Base
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.peft_config import LoraSpec
from adapterhub_lite.store import Store
from adapterhub_lite.training.trainable import TrainableLora
from adapterhub_lite.workflows.train import base_summary

from .rows import Sample

BASE = "smollm2-135m-instruct"
_PACKAGES = ("adapterhub-lite", "torch", "transformers", "peft", "bitsandbytes")


def print_head(title: str, base: Base) -> None:
    """Title, machine, versions and base."""
    print_machine(title)
    print(f"   base {base.name}, {base.choices['dtype'].value} on {base.device}")


def print_machine(title: str) -> None:
    """Title, machine and versions."""
    print(f"\n== {title}")
    print(f"   {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}")
    print("   " + ", ".join(f"{p} {version(p)}" for p in _PACKAGES))


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def in_turn(works: dict[str, Callable[[], object]], rounds: int, warmups: int = 1) -> dict[str, Sample]:
    """Times of each work; every round runs all of them, in an order that turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for round_ in range(-warmups, rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            synchronise()
            begun = time.perf_counter()
            works[name]()
            synchronise()
            if round_ >= 0:
                times[name].append(time.perf_counter() - begun)
    return {name: Sample.of(found) for name, found in times.items()}


def synchronise() -> None:
    """Wait for what a device was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def lora_store(
    base: Base, count: int, rank: int = 16, distinct: int | None = None
) -> Iterator[tuple[Store, list[str], list[Path]]]:
    """A store of `count` random LoRA adapters on all linear layers, their references, and the same as PEFT folders.

    With `distinct` only so many of them differ, the first ones, and only these are exported.
    """
    with TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        refs, exported = [], []
        (Path(folder) / "peft").mkdir()
        made: list[dict[str, bytes]] = []
        for i in range(count):
            if len(made) < (distinct or count):
                made.append(dict(random_lora(base, rank, seed=i).files()))
            ref = store.put(f"random-{i}", made[i % len(made)], Card(base=base_summary(base)))
            refs.append(str(ref))
            if i < len(made) == i + 1:
                exported.append(store.export(ref, Path(folder) / "peft" / f"random-{i}"))
        yield store, refs, exported


def random_lora(base: Base, rank: int, seed: int, labels: int | None = None) -> Adapter:
    """An adapter whose B is random, so that it has an effect; for an encoder with a head of so many labels."""
    generator = torch.Generator().manual_seed(seed)
    view = base.view()
    output = None if base.kind == "encoder" else base.model.get_output_embeddings()  # type: ignore[operator]
    sites = select_sites(view.modules, "all-linear", output)
    spec = LoraSpec(
        rank=rank,
        target_modules=tuple(sorted(sites)),
        alpha=2.0 * rank,
        task_type="SEQ_CLS" if labels else "CAUSAL_LM",
        base_model=base.name,
        modules_to_save=(view.head_name,) if labels else (),
    )
    made = TrainableLora(spec, sites, generator)
    for site in made.sites.values():
        site.b.data.copy_(torch.randn(site.b.shape, generator=generator) * 0.01)
    tensors = made.tensors()
    if labels:
        assert view.head is not None
        head = view.head.fresh(labels, generator, 0.02)
        tensors |= {f"base_model.model.{view.head_name}.{name}": tensor for name, tensor in head.items()}
    return Adapter(spec, tensors, name=f"random-{seed}")


def chosen_prompts(count: int) -> Sequence[str]:
    """Different short prompts."""
    subjects = ("rain", "bread", "ferries", "chess", "moss", "clocks", "tea", "maps")
    return [f"Write {1 + i % 5} sentences about {subjects[i % len(subjects)]}." for i in range(count)]
