"""What `ahl doctor` finds: each choice with its reason, each trouble with what to do."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .render import size

if TYPE_CHECKING:
    from ..store import Store

_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)")
_OFFLINE = ("AHL_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_LEAST_FREE = 2 * 10**9


@dataclass(frozen=True)
class Fact:
    """One line: what, its value, why it is so or what to do."""

    name: str
    value: str
    reason: str = ""
    state: Literal["ok", "warning", "trouble"] = "ok"


def diagnose(store: Store) -> list[Fact]:
    """Every fact. A check that fails is itself a trouble, and the others go on."""
    checks: list[tuple[str, Callable[[], Iterator[Fact]]]] = [
        ("versions", _versions),
        ("device", _device),
        ("kernels", _kernels),
        ("memory", _memory),
        ("store", lambda: _store(store)),
        ("cache", _cache),
        ("bases", _bases),
        ("network", _network),
    ]
    found: list[Fact] = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # whatever is broken on this machine is what is asked for
            found.append(Fact(name, f"{type(error).__name__}: {error}", "this check failed", "trouble"))
    return found


def _versions() -> Iterator[Fact]:
    yield Fact(
        "adapterhub-lite", version("adapterhub-lite"), f"Python {platform.python_version()}, {platform.platform()}"
    )
    for line in requires("adapterhub-lite") or ():
        wanted = _REQUIREMENT.match(line)
        if wanted is None or "extra ==" in line:
            continue
        name, least = wanted.groups()
        try:
            here = version(name)
        except PackageNotFoundError:
            yield Fact(name, "missing", f"pip install '{name}>={least}'", "trouble")
            continue
        old = _numbers(here) < _numbers(least)
        yield Fact(name, here, f"too old: pip install '{name}>={least}'" if old else "", "trouble" if old else "ok")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3])


def _device() -> Iterator[Fact]:
    from ..bases.devices import choose_device, choose_dtype

    device = choose_device()
    dtype = choose_dtype(device.value)
    yield Fact("device", device.value, device.reason)
    yield Fact("dtype", dtype.value, dtype.reason)


def _kernels() -> Iterator[Fact]:
    import torch

    yield Fact("CPU kernels", torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads")
    from ..kernels.library import library

    native = library()
    if native.functions:
        yield Fact("native products", "built", native.reason)
    else:
        yield Fact("native products", "not here: generation on a CPU is slower", native.reason, "warning")
    if torch.cuda.is_available():
        yield Fact("CUDA", str(torch.version.cuda), torch.cuda.get_device_name(0))
    from bitsandbytes import cextension

    loaded = type(cextension.lib).__name__
    broken = "Error" in loaded or "Mock" in loaded
    reason = "nf4 and int8 need its native library: reinstall bitsandbytes" if broken else "nf4 and int8 work"
    yield Fact("quantisation", f"bitsandbytes {loaded}", reason, "trouble" if broken else "ok")


def _memory() -> Iterator[Fact]:
    from ..bases.memory import available_bytes

    free = available_bytes()
    low = free < _LEAST_FREE
    yield Fact(
        "free memory", size(free), "little for a base of 135 M parameters" if low else "", "warning" if low else "ok"
    )


def _store(store: Store) -> Iterator[Fact]:
    yield _place("store", store.path, _why_this_store(store))
    checkout = _checkout(store.path)
    if checkout is not None:
        hint = "weights would be committed: list the store in .gitignore, or move it and set AHL_HOME"
        yield Fact("git", f"the store is in the checkout {checkout}", hint, "warning")
    entries = store.list()
    damaged = [entry for entry in entries if entry.problem]
    if damaged:
        yield Fact("adapters", f"{len(damaged)} of {len(entries)} are damaged", "see `ahl verify`", "trouble")
    else:
        yield Fact("adapters", str(len(entries)))


def _checkout(folder: Path) -> Path | None:
    """The git checkout that a folder is in; its .git is a file in a worktree."""
    real = folder.resolve()
    return next((parent for parent in (real, *real.parents) if os.path.lexists(parent / ".git")), None)


def _why_this_store(store: Store) -> str:
    from ..places import default_root

    if store.path != default_root().absolute():
        return "asked for with --store"
    return (
        "AHL_HOME names it" if os.environ.get("AHL_HOME") else "the user's data folder; AHL_HOME or --store changes it"
    )


def _cache() -> Iterator[Fact]:
    from ..places import cache_root

    named = "AHL_CACHE names it" if os.environ.get("AHL_CACHE") else "the user's cache folder; AHL_CACHE changes it"
    yield _place("cache", cache_root(), named)


def _place(name: str, folder: Path, reason: str) -> Fact:
    """Whether a folder can be written to, or made."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        return Fact(name, str(folder), f"{existing} is not a folder", "trouble")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Fact(name, str(folder), f"{existing} cannot be written to", "trouble")
    return Fact(name, str(folder), reason if folder.exists() else f"made at first use; {reason}")


def _bases() -> Iterator[Fact]:
    from .bases import base_facts, list_bases

    for base in list_bases():
        told = base_facts(base["name"])
        if told["folder"]:
            yield Fact(f"base {base['name']}", "here", told["folder"])
        else:
            yield Fact(f"base {base['name']}", "not here", f"fetch it with `ahl base pull {base['name']}`", "warning")


def _network() -> Iterator[Fact]:
    from ..bases.hub import is_on

    off = [switch for switch in _OFFLINE if is_on(switch)]
    if off:
        yield Fact("network", "off", f"{' and '.join(off)} set: bases come from this disk only", "warning")
