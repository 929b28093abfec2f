"""What was measured on this machine is not measured again; a lost or damaged memo costs that and nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import EffectChanged
from adapterhub_lite.runtime import memo
from adapterhub_lite.runtime.decoder import decoder_of
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.certified import Forwards, certified, effect_of, scaled

ROW = [[5, 6, 7, 8]]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A machine on which nothing was measured yet."""
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tiny_base):
    return tiny_base("llama", seed=3)


def test_what_was_found_right_here_is_not_measured_again(base, cache):
    ref = certified(base, "mine", build.lora(base, 1))
    for expected in (2, 0, 0):  # with the adapter and without
        runtime = Runtime(base, Store())
        with Forwards(base) as forwards:
            runtime.load(ref)
        assert forwards.count == expected
        runtime.close()
    others = {"kernels", "fingerprints.json"}  # of bases and of this machine
    assert {path.name for path in cache.iterdir()} - others == {"certificates.json"}


def test_a_reload_after_eviction_is_not_measured_again_even_without_a_memo(base, cache):
    cache.write_bytes(b"in the way")
    runtime = Runtime(base, Store(), slots=1)
    refs = [certified(base, name, build.lora(base, seed)) for seed, name in enumerate(("a", "b"), 1)]
    first = [runtime.logits(ROW, ref)[0] for ref in refs]
    with Forwards(base) as forwards:
        assert all(torch.equal(runtime.logits(ROW, ref)[0], old) for ref, old in zip(refs, first, strict=True))
        assert forwards.count == 2, "only the two answers"
    with Forwards(base) as forwards:
        other = Runtime(base, Store())
        other.load(refs[0])
        assert forwards.count == 2, "nothing was remembered"
    other.close()
    runtime.close()


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}', b" " * (5 << 20), "folder", "link",
    ],
)  # fmt: skip
def test_a_damaged_memo_costs_a_measurement(base, cache, damage):
    ref = certified(base, "mine", build.lora(base, 1))
    file = cache / "certificates.json"
    cache.mkdir()
    if damage == "folder":
        file.mkdir()
    elif damage == "link":
        (cache / "elsewhere").write_text("{}")
        file.symlink_to(cache / "elsewhere")
    else:
        file.write_bytes(damage)
    for expected in (2, 2 if damage == "folder" else 0):
        runtime = Runtime(base, Store())
        with Forwards(base) as forwards:
            runtime.load(ref)
        assert forwards.count == expected
        runtime.close()
    assert not [path for path in cache.iterdir() if path.name.startswith(".")], "a temporary file was left"


def test_a_memo_whose_entry_is_damaged_costs_a_measurement(base, cache):
    ref = certified(base, "mine", build.lora(base, 1))
    Runtime(base, Store()).load(ref)
    file = cache / "certificates.json"
    (key,) = json.loads(file.read_text())
    for entry in (None, 1, [], {}, {"probe_set": 2}):
        file.write_text(json.dumps({key: entry}))
        with Forwards(base) as forwards:
            Runtime(base, Store()).load(ref)
        assert forwards.count == 2


@pytest.mark.parametrize("what", ["torch", "package", "adapter", "base"])
def test_the_memo_holds_for_what_was_measured_only(base, tiny_folder, monkeypatch, what: str):
    ref = certified(base, "mine", build.lora(base, 1))
    Runtime(base, Store()).load(ref)
    if what == "torch":
        monkeypatch.setattr(memo.torch, "__version__", "0.0.1")
    elif what == "package":
        monkeypatch.setattr(memo, "__version__", "0.0.1")
    elif what == "adapter":
        ref = certified(base, "mine", build.lora(base, 2))
    else:
        base = load_base(base.name, device="cpu", dtype="bfloat16")
        decoder_of(base)  # probes once, whatever is loaded
    with Forwards(base) as forwards:
        Runtime(base, Store()).load(ref)
    assert forwards.count == 2


def test_a_failure_is_not_remembered_as_found_right(base):
    bad = certified(base, "bad", scaled(build.lora(base, 1), 2.0), effect_of(base, build.lora(base, 1)))
    for one in (Runtime(base, Store()), Runtime(base, Store())):
        with pytest.raises(EffectChanged):
            one.load(bad)


def test_the_memo_forgets_the_oldest(base, monkeypatch):
    monkeypatch.setattr(memo, "_MOST", 2)
    refs = [certified(base, name, build.lora(base, seed)) for seed, name in enumerate("abc", 1)]
    runtime = Runtime(base, Store())
    for ref in refs:
        runtime.load(ref)
    runtime.close()
    assert [memo.Memo().holds(ref.digest, base) for ref in refs] == [False, True, True]
