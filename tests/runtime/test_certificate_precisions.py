"""The bounds for another precision, on a real base: what is made in one loads in all, but not with another alpha."""

from __future__ import annotations

import gc

import pytest

from adapterhub_lite.bases.fetch import cached
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import EffectChanged
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build
from tests.runtime.certified import certified, effect_of, scaled

NAME = "smollm2-135m-instruct"
FOLDER = cached(NAME)

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(FOLDER is None, reason=f"the base {NAME} is not in the cache"),
]


def _adapter(base):
    """A random one about as strong as a trained one."""
    made = build.lora(base, 1, rank=8)
    for name, tensor in made.tensors.items():
        if "lora_B" in name:
            tensor.mul_(0.02)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Right and wrong ones, measured on the base in nf4."""
    made = Store(tmp_path_factory.mktemp("precisions") / "store")
    base = load_base(str(FOLDER), "nf4", "cpu")
    adapter = _adapter(base)
    effect = effect_of(base, adapter)
    assert effect["mean_logit_change"] > 0.1
    certified(base, "right", adapter, store=made)
    for name, factor in (("doubled", 2.0), ("halved", 0.5)):
        certified(base, name, scaled(adapter, factor), effect, made)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_another_precision_is_no_other_effect_but_another_alpha_is(store, monkeypatch, tmp_path, quantize, dtype):
    monkeypatch.setenv("AHL_CACHE", str(tmp_path))
    base = load_base(str(FOLDER), quantize, "cpu", dtype)
    runtime = Runtime(base, store)
    try:
        runtime.load("right")
        for name in ("doubled", "halved"):
            with pytest.raises(EffectChanged):
                runtime.load(name)
    finally:
        runtime.close()
        del base, runtime
        gc.collect()
